"""Batches made ahead of the step that takes them, by a thread: reading, packing and the transfer to the
device go on while the device works."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Ahead(Iterator[Any]):
    """Items of `source` after `prepare`, in order, up to `depth` of them made before they are asked for.

    `source` is walked by one thread alone, which ends when `source` does, when it raises (the error comes out
    of `next`, in its turn), or at `close`. What was made and never taken is dropped: who resumes by counting
    what was taken counts right.
    """

    def __init__(self, source: Iterable, prepare: Callable[[Any], Any] = lambda x: x, depth: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._over: BaseException | None = None
        args = (iter(source), prepare, self._queue, self._stop)
        # A daemon, so that a process that fails elsewhere does not hang on a read that never returns.
        self._thread = threading.Thread(target=_make, args=args, name="ftjax-input", daemon=True)
        self._thread.start()

    def __next__(self):
        if self._over is not None:
            raise self._over
        item, error = self._queue.get()
        if error is not None:
            self._over = error
            self._thread.join()
            raise error
        return item

    def close(self, timeout: float = 30.0) -> None:
        """End the thread, waiting for the item that it is making."""
        self._stop.set()
        self._over = self._over or StopIteration()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)  # it may be waiting for room
            except queue.Empty:
                timeout -= 0.05
                if timeout < 0:
                    break

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _make(source: Iterator, prepare, out: queue.Queue, stop: threading.Event) -> None:
    error: BaseException = StopIteration()
    try:
        for item in source:
            if stop.is_set():
                break
            out.put((prepare(item), None))
            if stop.is_set():
                break
    except BaseException as e:
        error = e
    finally:
        close = getattr(source, "close", None)  # of a generator: its own threads end with it
        if close is not None:
            close()
    if not stop.is_set():
        out.put((None, error))
