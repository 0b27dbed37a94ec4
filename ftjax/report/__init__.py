"""What a run writes while it trains and when it ends, all of it in the run folder.

    metrics.jsonl  one JSON object a line, appended and flushed: {"kind": "train" | "eval" | "event" | "time",
    "step": steps done, "time": Unix seconds, "wall": seconds since the run first began, …}. Train lines have
    loss, learning_rate, grad_norm, weight (trained
    tokens or pairs), seconds (of the step), input_wait (those of them without a batch to go on with),
    rate (weight / seconds), memory_bytes, and summed over all steps
    so far elapsed (seconds), waited (input_wait) and trained (weight), and goodput; eval lines the recipe's
    metrics; event lines "message"; time lines "part" and "seconds" of what is no step (ftjax.report.goodput).
    Values that are not finite are null. info.json      what the recipe knows at the start: {"recipe",
    "model", "parameters", "trainable", "total_steps", "train": {counts of the data, "dropped": {reason:
    count}, "efficiency": share}, "eval": likewise, …}, and from us "hardware" and "versions". Any key may be
    missing, and others are shown as well. summary.json   the recipe's at the end, with "seconds", "trained",
    "peak_memory_bytes", "goodput", "time" (seconds of the wall time by part) and "finished" (Unix seconds)
    added; a run that has it is finished. scores.json    the
    headline table: {"title", "columns": [name, …], "rows": [{"name", "cells": [cell, …], "best": bool}, …],
    "notes": [text, …]}; a cell is text, a number, or {"text", "value", "low", "high"} with shares from 0 to
    1, drawn as a bar with its interval. Written by whoever scores. samples.json   [{"prompt", "expected",
    "before", "after", "before_ok", "after_ok"}, …]: texts, and whether they are right; all but the prompt may
    be missing. Written by whoever generates. profile.json   where the time of traced
    steps went: ftjax.profile.Profiler.result. loss.png, report.html, tensorboard/

`write_report(run)` makes the last two pictures from the files above at any time.
"""

import dataclasses
from typing import ClassVar, Literal

from ftjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What a run writes while it trains, besides metrics.jsonl, loss.png and report.html."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    to: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that get the metrics too; each must be installed."""
    project: str = "ftjax"
    """The trackers' project (MLflow's experiment)."""
    name: str | None = None
    """The run's name there; not given: the name of the run folder."""
    tensorboard: bool = True
    """Write TensorBoard event files to tensorboard/ in the run folder."""
    every: int = 1
    """Steps between training lines of metrics.jsonl and points of the trackers."""
    line_seconds: float = 10.0
    """Seconds between lines of progress where the output is no terminal."""

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"report.every={self.every}: at least 1 step")


from ftjax.report.files import write_json  # noqa: E402
from ftjax.report.page import write_report  # noqa: E402
from ftjax.report.progress import Bar  # noqa: E402
from ftjax.report.reporter import Reporter  # noqa: E402

__all__ = ["Bar", "ReportOptions", "Reporter", "write_json", "write_report"]
