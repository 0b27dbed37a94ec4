"""Where the parts of a data set are worked on: in this process, in several, or on a Ray cluster.

An engine is one thing, an ordered map: what it yields is in the order of the items, whoever was done first,
so every engine gives the same result. What travels is small (a step, the name of a part, counts): the rows
are read and written by the worker itself, on storage that all of them see.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from ftjax.errors import UserError


class Engine(Protocol):
    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """function(item) of each item, in the items' order; what a call raises is raised here."""
        ...


class Here:
    """One after another, in this process."""

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return map(function, items)


class Processes:
    """In `count` processes of this machine."""

    def __init__(self, count: int):
        self.count = count

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        # not forked: the parent may hold threads (JAX, tokenizers), which a fork would leave locked
        context = multiprocessing.get_context("spawn")
        count = min(self.count, max(1, len(items)))
        with ProcessPoolExecutor(count, context, _end_with_parent) as pool:
            try:
                yield from pool.map(function, items)
            except BrokenProcessPool:
                raise UserError(
                    "a worker process was ended from outside, by a lack of memory perhaps: give fewer "
                    "--processes"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _end_with_parent() -> None:
    """In a worker: Ctrl-C ends it without a word, and so does the end of the process that started it, however
    that ended; else a worker would wait for work for ever."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in a shell's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Ray:
    """As Ray Data, on the cluster of `address` (RAY_ADDRESS), or on one started here.

    Ray Data and not Beam or Spark: the functions are plain Python over files and arrays, and Ray runs them
    as they are, without a JVM (Spark) and without a runner to be had first (Beam's own local one is for
    tests); and it is what JAX users' clusters already run beside their accelerators.
    """

    def __init__(self, address: str | None = None, processes: int | None = None):
        try:
            import ray
        except ImportError:
            raise UserError("engine: ray is not installed: pip install 'ftjax[ray]'") from None
        if not ray.is_initialized():
            address = address or os.environ.get("RAY_ADDRESS")
            # a cluster has ftjax installed; workers started here find what this process finds
            here = {} if address else {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
            ray.init(
                address=address,
                num_cpus=None if address else processes,
                runtime_env=here,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        import ray

        if not items:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        rows = [{"item": pickle.dumps(item)} for item in items]
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_Called(function))
        for row in made.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, Exception):
                raise result
            yield result


class _Called:
    """function(item) as a row of Ray Data's; what it raises travels as a result, so that the error is the
    same as in any other engine."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            result = self.function(pickle.loads(row["item"]))
        except Exception as e:
            result = e
        return {"result": pickle.dumps(result)}


ENGINES = ("local", "ray")


def open_engine(name: str = "local", processes: int = 1) -> Engine:
    """The engine of a name of ENGINES; `processes` at once on this machine (0: one for each of its cores)."""
    if processes < 0:
        raise UserError(f"processes={processes}: 0 (one a core) or more")
    count = processes or _cores()
    if name == "ray":
        return Ray(processes=count)
    if name != "local":
        raise UserError(f"engine: there is no {name!r}; there are {', '.join(ENGINES)}")
    return Here() if count == 1 else Processes(count)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
