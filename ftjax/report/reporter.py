"""The running report of one training run."""

import contextlib
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ftjax.report import files, trackers
from ftjax.report.page import write_report
from ftjax.report.progress import Bar, count, size

if TYPE_CHECKING:
    from ftjax.report import ReportOptions

PACKAGES = ("ftjax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


class Reporter:
    """Writes a run's metrics, progress and report (see the package's docstring for the files).

    `resume_step` is the number of steps that were done before: what metrics.jsonl says of later ones is
    dropped. Of several processes only the first writes; `writes` overrides that. UserError where a tracker is
    not installed.
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
        self._peak, self._seconds, self._trained = 0, 0.0, 0.0
        for name in self.options.to:
            trackers.require(name)

    def start(self, info: Mapping[str, Any]) -> None:
        """Open the files. `info` is what the report says of model and data; hardware and versions are
        added."""
        if not self.writes:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        files.write_json(self.run / "info.json", {**info, "hardware": hardware(), "versions": versions()})
        kept = files.truncate(self.run / "metrics.jsonl", self.resume_step)
        for record in kept:
            if record.get("kind") == "train":
                self._peak = max(self._peak, record.get("memory_bytes") or 0)
                self._seconds, self._trained = record.get("elapsed") or 0.0, record.get("trained") or 0.0
        self._file = open(self.run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if self.options.tensorboard:
            self._trackers.append(trackers.TensorBoard(self.run / "tensorboard", self.resume_step))
        name = self.options.name or self.run.resolve().name
        for tracker in self.options.to:
            config = self._config()
            self._trackers.append(trackers.BY_NAME[tracker](self.run, self.options.project, name, config))
        self._bar.open()

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the step that was the `step`-th, counted from 1."""
        if not self.writes:
            return
        values = dict(metrics)
        if values.get("seconds"):
            values["rate"] = values.get("weight", 0.0) / values["seconds"]
        self._seconds += values.get("seconds", 0.0)
        self._trained += values.get("weight", 0.0)
        values |= {"memory_bytes": memory_bytes(), "elapsed": self._seconds, "trained": self._trained}
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
        """Write summary.json, which marks the run as finished, loss.png and report.html."""
        self.close()
        if not self.writes:
            return
        facts = {
            "seconds": self._seconds,
            "trained": self._trained,
            "peak_memory_bytes": self._peak,
            "finished": time.time(),
        }
        files.write_json(self.run / "summary.json", {**facts, **summary})
        write_report(self.run)

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError("Reporter.start() comes before the first metrics")
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **files.plain(values)}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if kind != "event":
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
