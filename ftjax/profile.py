"""profile=true: a few steady steps traced, and a page that says where their time went.

The trace lies in RUN/profile (xprof's and TensorBoard's profile plugin read plugins/profile/*/*.xplane.pb,
ui.perfetto.dev reads perfetto_trace.json.gz); what `Profiler` makes of it is RUN/profile.json, see
`Profiler.result`."""

import dataclasses
import logging
import math
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import distributed, flops, lora, trace
from ftjax.errors import UserError
from ftjax.models import Model

log = logging.getLogger("ftjax")


@dataclasses.dataclass(frozen=True)
class ProfileOptions:
    """Which steps are traced."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    after: int = 5
    """Steps of this start that pass before the first that is traced: they compile and warm up."""
    steps: int = 3
    """Steps traced in a row; fewer where an evaluation or a checkpoint would come between them."""

    def __post_init__(self):
        for name in ("after", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"profile.{name}={getattr(self, name)}: at least 1")

    @classmethod
    def of(cls, setting: "bool | ProfileOptions") -> "ProfileOptions | None":
        """None where the setting is off."""
        return setting if isinstance(setting, ProfileOptions) else cls() if setting else None


def window(options: ProfileOptions, first: int, total: int, pauses: Sequence[int] = ()) -> range | None:
    """The steps to trace of a run that begins at step `first` of `total`, counted from 0.

    `pauses` are periods: after every so many steps something else happens, which no traced step may hold.
    Short runs trace what is left after a step that compiles; None where that is nothing."""
    begin = min(first + options.after, max(total - options.steps, first + 1))
    for steps in range(min(options.steps, total - begin), 0, -1):
        for start in range(begin, total - steps + 1):
            between = range(start + 1, start + steps)
            if not any(at % period == 0 for period in pauses if period for at in between):
                return range(start, start + steps)
    return None


def measure_peak(dtype) -> float:
    """FLOP/s of a product of two matrices of 1024 × 1024 of `dtype` on the default device: the best of 8."""
    n = 1024
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(8):
        clock = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - clock)
    return 2 * n**3 / best


def _of_here(x) -> np.ndarray:
    """The rows [A, B, …] of a batch's leaf that lie on this process's devices."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    rows = {shard.index[1].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
    return np.concatenate([rows[first] for first in sorted(rows)], axis=1)


class Profiler:
    """A train step that traces some of its calls: `step(state, batch)` as `fit` wants it. Of several
    processes one is enough: what it counts are the rows that its devices have.

    `done(result)` gets `result` once the trace is written and read, or the sentence why that failed. No value
    that the step computes is touched."""

    def __init__(
        self,
        step: Callable,
        run: pathlib.Path,
        steps: range | None,
        first: int,
        *,
        model: Model,
        plan: lora.Plan | None,
        reference: bool,
        done: Callable[[dict[str, Any] | str], None],
    ):
        self._step, self.folder, self.steps, self._at = step, run / "profile", steps, first
        self.model, self.plan, self.reference, self._done = model, plan, reference, done
        self._spent, self._tracing, self._began = 0.0, False, 0.0
        self._usual: list[float] = []
        self._work: list[flops.Work] = []
        self._part = 1.0  # of a batch's rows, those that lie on this process's devices

    def __call__(self, state, batch):
        at, self._at = self._at, self._at + 1
        if self.steps is None or at not in self.steps:
            return self._step(state, batch)
        if at == self.steps.start:
            self._start(state)
        if not self._tracing:
            return self._step(state, batch)
        here = {name: _of_here(batch[name]) for name in ("segments", "loss_weight")}
        self._part = np.shape(here["segments"])[1] / np.shape(batch["segments"])[1]
        self._work.append(flops.Work.of(here))
        with jax.profiler.StepTraceAnnotation("train", step_num=at):
            out = self._step(state, batch)
        if at == self.steps.stop - 1:
            jax.block_until_ready(out)
            self._stop(time.perf_counter() - self._began)
        return out

    def take(self, seconds: float) -> float:
        """`seconds` of a step less what tracing took since the last call; remembers the usual ones."""
        seconds, self._spent = max(seconds - self._spent, 1e-9), 0.0
        if self.steps is not None and self._at <= self.steps.start:
            self._usual.append(seconds)
        return seconds

    def _start(self, state) -> None:
        jax.block_until_ready(state)
        clock = time.perf_counter()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the steps that it watches
        try:
            jax.profiler.start_trace(
                os.fspath(self.folder),
                create_perfetto_trace=True,
                profiler_options=options,
            )
        except RuntimeError as e:
            self._done(f"no profile: {e}")
            return
        self._tracing = True
        self._began = time.perf_counter()
        self._spent += self._began - clock

    def _stop(self, seconds: float) -> None:
        clock = time.perf_counter()
        self._tracing = False
        with distributed.at_leisure():
            self._read(seconds)
        self._spent += time.perf_counter() - clock

    def _read(self, seconds: float) -> None:
        # what comes of a trace must not end the training that it watched
        try:
            jax.profiler.stop_trace()
            self._done(self.result(seconds))
        except Exception as e:
            log.debug("profile", exc_info=True)
            self._done(f"the trace in {self.folder} could not be read: {type(e).__name__}: {e}")

    def close(self) -> None:
        """Of a run that ends while it is traced."""
        if self._tracing:
            self._tracing = False
            try:
                jax.profiler.stop_trace()
            except RuntimeError as e:
                log.warning("the profiler could not be stopped: %s", e)

    def result(self, seconds: float) -> dict[str, Any]:
        """The page as data: where the `seconds` of the traced steps went.

        steps [first, last] counted from 1, step_ms (traced), usual_step_ms (the median of those before, None
        without any), device, devices, rows [{name, share, ms, running_ms, count, tflops}] a step of one
        device, in which "idle" is what is left of the step; flops {part: a step of one device} with "total";
        formula; tflops achieved by one device; peak_tflops, peak_source, mfu (None where no peak is known);
        executed_tflop, the products that ran, recomputation included; tokens, trained, positions a step; top
        [[where, category, ms, count]]; files."""
        assert self.steps is not None
        found = sorted(self.folder.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise ValueError("no .xplane.pb was written")
        read = trace.breakdown(found[-1])
        count, devices = len(self.steps), jax.device_count() * self._part
        work = sum(self._work[1:], self._work[0])
        total = flops.step(self.model, self.plan, work, reference=self.reference)
        dtype = jnp.dtype(self.model.options.dtype)
        kind = jax.local_devices()[0].device_kind
        peak, source = self._peak(kind, dtype)
        by_part = {name: total.part(name) / count / devices for name in flops.PARTS}
        step = seconds / count
        busy = sum(part.milliseconds for part in read.parts.values()) / count
        rows = []
        for name in ("matmul", "attention", "collectives", "copies", "other"):
            part = read.parts[name]
            ms = part.milliseconds / count
            done = {
                "matmul": sum(x for n, x in by_part.items() if n != "attention"),
                "attention": by_part["attention"],
            }.get(name)
            rows.append(
                {
                    "name": name,
                    "share": ms / 1e3 / step,
                    "ms": ms,
                    "running_ms": part.running / count,
                    "count": part.count / count,
                    "tflops": done / 1e12 / (ms / 1e3) if done and ms else None,
                }
            )
        idle = max(step * 1e3 - busy, 0.0)
        rows.append(
            {"name": "idle", "share": idle / 1e3 / step, "ms": idle, "running_ms": None, "count": None}
        )
        whole = sum(by_part.values())
        files = [found[-1], *self.folder.rglob("perfetto_trace.json.gz")]
        return {
            "steps": [self.steps.start + 1, self.steps.stop],
            "step_ms": step * 1e3,
            "usual_step_ms": 1e3 * statistics.median(self._usual[1:]) if len(self._usual) > 1 else None,
            "device": kind,
            "devices": jax.device_count(),
            "dtype": str(dtype),
            "rows": rows,
            "flops": {**by_part, "total": whole},
            "formula": flops.formula(self.plan),
            "tflops": whole / step / 1e12,
            "peak_tflops": peak / 1e12 if peak else None,
            "peak_source": source,
            "mfu": whole / step / peak if peak else None,
            "executed_tflop": read.flops / count / 1e12,
            "tokens": work.tokens / count / self._part,
            "trained": work.trained / count / self._part,
            "positions": work.positions / count / self._part,
            "top": [[label, category, ms / count, n / count] for label, category, ms, n in read.top],
            "files": [os.path.relpath(path, self.folder.parent) for path in files],
        }

    def _peak(self, kind: str, dtype) -> tuple[float | None, str]:
        """FLOP/s that one device could do, and whose figure that is."""
        known = flops.device(kind)
        if known is not None:
            said = f"{known.kind}, dense bfloat16: {known.source}"
            return known.bf16, said + ("" if dtype == jnp.bfloat16 else f" (this run computes in {dtype})")
        if jax.default_backend() == "cpu":
            # devices of one process share its cores
            measured = measure_peak(dtype) / jax.local_device_count()
            return measured, f"measured here by a product of two 1024 × 1024 matrices of {dtype}"
        return None, f"no figure is known for {kind}"
