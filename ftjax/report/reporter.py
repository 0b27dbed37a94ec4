"""The running report of one training run."""

import contextlib
import json
import os
import pathlib
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ftjax.report import files, goodput, profile, trackers
from ftjax.report.page import write_report
from ftjax.report.progress import Bar, count, size

if TYPE_CHECKING:
    from ftjax.report import ReportOptions

PACKAGES = ("ftjax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


class Reporter:
    """Writes a run's metrics, progress and report (see the package's docstring for the files).

    `resume_step` is the number of steps that were done before: what metrics.jsonl says of later ones is
    dropped. Of several processes only the first writes; `writes` overrides that. `began` is when this process
    did, by time.perf_counter(). UserError where a tracker is not installed.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        options: "ReportOptions | None" = None,
        *,
        total_steps: int,
        resume_step: int = 0,
        unit: str = "tok",
        writes: bool | None = None,
        stream=None,
        began: float | None = None,
    ):
        from ftjax.report import ReportOptions

        self.run, self.options = pathlib.Path(run), options or ReportOptions()
        self.total_steps, self.resume_step, self.unit = total_steps, resume_step, unit
        self.writes = _first_process() if writes is None else writes
        self._bar = Bar(
            "step",
            total_steps,
            done=resume_step,
            line_seconds=self.options.line_seconds,
            stream=stream,
            shown=self.writes,
        )
        self._trackers: list[trackers.Tracker] = []
        self._file: Any = None
        self._last_eval: dict[str, float] = {}
        self._peak, self._seconds, self._trained, self._waited = 0, 0.0, 0.0, 0.0
        self._began = time.perf_counter() if began is None else began
        self._wall = 0.0  # of the processes before this one
        self._parts: defaultdict[str, float] = defaultdict(float)  # of all of them
        self._step = resume_step
        self._last_line = 0  # the step of the last training line of the processes before this one
        for name in self.options.to if self.writes else ():
            trackers.require(name)

    def start(self, info: Mapping[str, Any]) -> None:
        """Open the files. `info` is what the report says of model and data; hardware and versions are
        added."""
        if not self.writes:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        files.write_json(self.run / "info.json", {**info, "hardware": hardware(), "versions": versions()})
        stopped = self._go_on(self.run / "metrics.jsonl")
        self._file = open(self.run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if stopped:
            self.spent("stopped", stopped)
        if self.options.tensorboard:
            self._trackers.append(trackers.TensorBoard(self.run / "tensorboard", self.resume_step))
        name = self.options.name or self.run.resolve().name
        for tracker in self.options.to:
            config = self._config()
            self._trackers.append(trackers.BY_NAME[tracker](self.run, self.options.project, name, config))
        self._bar.open()
        if lost := self._lost():
            self.event(
                self.resume_step,
                f"metrics.jsonl has no lines of steps {lost}: they were lost with the process that did "
                "them, or with its disk; the checkpoint has the steps themselves",
            )

    def _go_on(self, path: pathlib.Path) -> float:
        """Keep what metrics.jsonl says of the steps that the run still has; how long nothing ran."""
        records = files.read_lines(path)
        if not records:
            return 0.0
        step = self.resume_step
        kept = [r for r in records if step and r["step"] <= step]
        kept += goodput.fold(kept, records[len(kept) :], step)
        files.write_lines(path, kept)
        for record in kept:
            if record.get("kind") == "train":
                self._peak = max(self._peak, record.get("memory_bytes") or 0)
                self._seconds, self._trained = record.get("elapsed") or 0.0, record.get("trained") or 0.0
                self._waited = record.get("waited") or 0.0
                self._last_line = record["step"]
            elif record.get("kind") == "time":
                self._parts[record["part"]] += record["seconds"]
        began = time.time() - (time.perf_counter() - self._began)
        stopped = max(0.0, began - max(r.get("time") or 0.0 for r in records))
        self._wall = max(r.get("wall") or 0.0 for r in records) + stopped
        return stopped

    def _lost(self) -> str:
        """The last of the steps that were done before, where lines of them are due that are not there."""
        due = (self._last_line // self.options.every + 1) * self.options.every
        return f"{self._last_line + 1}–{self.resume_step}" if due <= self.resume_step else ""

    def wall(self) -> float:
        """Seconds since the run first began, by all its processes."""
        return self._wall + time.perf_counter() - self._began

    def spent(self, part: str, seconds: float) -> None:
        """Time that did not go into steps; `part` is one of goodput.NAMES."""
        if self.writes:
            assert part in goodput.NAMES
            self._parts[part] += seconds
            self._write("time", self._step, {"part": part, "seconds": round(seconds, 3)})

    @contextlib.contextmanager
    def spending(self, part: str):
        """`spent` of what happens inside."""
        clock = time.perf_counter()
        yield
        self.spent(part, time.perf_counter() - clock)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the step that was the `step`-th, counted from 1."""
        if not self.writes:
            return
        values = dict(metrics)
        if values.get("seconds"):
            values["rate"] = values.get("weight", 0.0) / values["seconds"]
        self._step = step
        self._seconds += values.get("seconds", 0.0)
        self._waited += values.get("input_wait", 0.0)
        self._trained += values.get("weight", 0.0)
        values |= {"memory_bytes": memory_bytes(), "elapsed": self._seconds, "trained": self._trained}
        values |= {"waited": self._waited, "goodput": (self._seconds - self._waited) / self.wall()}
        self._peak = max(self._peak, values["memory_bytes"])
        if step % self.options.every == 0 or step in (self.resume_step + 1, self.total_steps):
            self._write("train", step, values)
        parts = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        if "learning_rate" in values:
            parts.append(f"lr {values['learning_rate']:.1e}")
        if "rate" in values:
            parts.append(f"{count(values['rate'])} {self.unit}/s")
        parts.append(size(values["memory_bytes"]))
        if "loss" in self._last_eval:
            parts.append(f"eval {self._last_eval['loss']:.4g}")
        self._bar.update(step, "  ".join(parts))

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an evaluation after `step` steps."""
        if not self.writes:
            return
        self._last_eval = dict(metrics)
        self._write("eval", step, metrics)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "weight")
        self._bar.say(f"evaluation after step {step}: {shown}")

    def event(self, step: int, message: str) -> None:
        """Something worth knowing, said and kept."""
        if not self.writes:
            return
        self._write("event", step, {"message": message})
        self._bar.say(message)

    def profile(self, step: int, result: Mapping[str, Any] | str) -> None:
        """Where the time of traced steps went (ftjax.profile.Profiler.result), or why that is not known."""
        if not self.writes:
            return
        if isinstance(result, str):
            self.event(step, result)
            return
        files.write_json(self.run / "profile.json", result)
        self._bar.say(profile.text(result))
        self._write("event", step, {"message": f"profile: {profile.summary(result)[0]}"})
        write_report(self.run)  # to look at while the run goes on

    def say(self, line: str) -> None:
        """Something to read now that need not be kept."""
        if self.writes:
            self._bar.say(line)

    def close(self) -> None:
        """Release the terminal and the files; may be called again."""
        self._bar.close()
        if self._file is not None:
            # what cannot be flushed has raised when it was written, and must not hide why the run ends
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        while self._trackers:
            self._trackers.pop().close()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write loss.png, report.html and summary.json, which marks the run as finished and so comes last."""
        self.close()
        if not self.writes:
            return
        spent = goodput.account(self._parts, self._seconds, self._waited, self.wall())
        facts = {
            "seconds": self._seconds,
            "trained": self._trained,
            "peak_memory_bytes": self._peak,
            "goodput": spent.get("productive", 0.0) / sum(spent.values()),
            "time": spent,
            "finished": time.time(),
            **summary,
        }
        write_report(self.run, facts)
        files.write_json(self.run / "summary.json", facts)
        self._bar.say(goodput.text(spent))

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError("Reporter.start() comes before the first metrics")
        clocks = {"time": round(time.time(), 3), "wall": round(self.wall(), 3)}
        record = {"kind": kind, "step": step, **clocks, **files.plain(values)}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if kind in ("train", "eval"):
            numbers = {f"{kind}/{k}": v for k, v in record.items() if isinstance(v, int | float)}
            for name in ("step", "time"):
                del numbers[f"{kind}/{name}"]
            for tracker in self._trackers:
                tracker.log(step, numbers)

    def _config(self) -> dict:
        import yaml

        path = self.run / "config.yaml"
        return yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}


def _first_process() -> bool:
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


def memory_bytes() -> int:
    """In use now: of the first accelerator, on CPU of this process."""
    jax = sys.modules.get("jax")
    if jax is not None:
        stats = jax.local_devices()[0].memory_stats()
        if stats and "bytes_in_use" in stats:
            return int(stats["bytes_in_use"])
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {"system": platform.platform(), "cpu": _cpu(), "cores": _cores()}
    try:
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        pass
    jax = sys.modules.get("jax")
    if jax is not None:
        devices = jax.devices()
        facts["devices"] = f"{len(devices)} × {devices[0].device_kind}"
        facts["processes"] = jax.process_count()
    return facts


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found
