"""Progress on the terminal: a bar with rate and time left, or a plain line now and then where there is
none."""

import sys
import time
from typing import Any


def duration(seconds: float) -> str:
    """ "0:42", "12:05", "3:04:00"."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def count(n: float) -> str:
    """ "812", "4.1 K", "135 M"."""
    for unit in ("", " K", " M", " B"):
        if abs(n) < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} T"


def size(n: float) -> str:
    """Bytes: "912 MB", "1.92 GB"."""
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


class Bar:
    """Progress of one piece of work, as a context manager.

        with Bar("tokenising", len(rows)) as bar:
            for row in rows:
                ...
                bar.advance()

    `note` is shown beside the bar. `shown=False` shows nothing.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        done: int = 0,
        line_seconds: float = 10.0,
        stream=None,
        shown=True,
    ):
        self.what, self.total, self.done, self.note = what, total, done, ""
        self._line_seconds, self._stream, self._shown = line_seconds, stream, shown
        self._begun = self._first = time.monotonic()
        self._first_done = done
        self._said = float("-inf")
        self._live: Any = None
        self._steps: list[tuple[float, int]] = []

    def __enter__(self) -> "Bar":
        self.open()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def open(self) -> None:
        stream = self._stream or sys.stdout
        if not self._shown or not stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=stream)
        bar = [BarColumn(bar_width=16)] if console.width >= 100 else []
        self._live = Progress(
            TextColumn("{task.description}"),
            *bar,
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=4,
        )
        self._live.start()
        self._task = self._live.add_task(
            self._title(), total=self.total, completed=self.done, note=self.note or "starting …"
        )

    def advance(self, n: int = 1, note: str | None = None) -> None:
        self.update(self.done + n, note)

    def update(self, done: int, note: str | None = None) -> None:
        """`done` of `total` is done."""
        now = time.monotonic()
        self.done, self.note = done, self.note if note is None else note
        self._steps = [*self._steps[-30:], (now, done)]
        if self._live is not None:
            text = "  ".join(filter(None, (self.note, self._pace())))
            self._live.update(self._task, description=self._title(), completed=done, note=text)
        elif self._shown and (now - self._said >= self._line_seconds or done == self.total):
            self.say("  ".join(filter(None, (self._title(), self.note, self._pace()))))
            self._said = now

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if not self._shown:
            return
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream or sys.stdout, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _title(self) -> str:
        return f"{self.what} {self.done}" + (f"/{self.total}" if self.total else "")

    def _pace(self) -> str:
        """Time left by the pace of the last updates, the first of which (it may have compiled) does not
        count."""
        if len(self._steps) < 2:
            return ""
        (t0, n0), (t1, n1) = self._steps[0], self._steps[-1]
        if n1 <= n0 or t1 <= t0:
            return ""
        rate = (n1 - n0) / (t1 - t0)
        if not self.total:
            return f"{rate:.3g}/s"
        if self.done >= self.total:
            return f"in {duration(t1 - self._begun)}"
        left = f"{duration((self.total - self.done) / rate)} left"
        if self.note:  # which says its own rate
            return left
        return f"{rate:.3g}/s  {left}" if rate >= 1 else f"{1 / rate:.3g} s each  {left}"
