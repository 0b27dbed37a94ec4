"""Where metrics go besides metrics.jsonl: TensorBoard's event files, and the trackers that report.to
names."""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from ftjax.errors import UserError


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def require(name: str) -> Any:
    """The tracker's package. UserError with what to install where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"report.to: {name} cannot be imported ({e}); pip install {name}") from None


class TensorBoard:
    def __init__(self, folder: pathlib.Path, resume_step: int):
        from tensorboardX import SummaryWriter

        # purge_step hides what a killed run wrote past the checkpoint that this one goes on from
        purge = resume_step + 1 if resume_step else None
        self.writer = SummaryWriter(str(folder), flush_secs=10, purge_step=purge)

    def log(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self):
        self.writer.close()


class Wandb:
    def __init__(self, run: pathlib.Path, project: str, name: str, config: dict):
        # W&B wants strictly rising steps, so ours is a metric of its own that the others are drawn against
        wandb = require("wandb")
        self.run = wandb.init(project=project, name=name, dir=str(run), config=config)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step, values):
        self.run.log({**values, "step": step})

    def close(self):
        self.run.finish()


class Mlflow:
    def __init__(self, run: pathlib.Path, project: str, name: str, config: dict):
        self.mlflow = require("mlflow")
        self.mlflow.set_experiment(project)
        self.mlflow.start_run(run_name=name)
        self.mlflow.log_params({k: str(v)[:500] for k, v in _flat(config).items()})

    def log(self, step, values):
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self):
        self.mlflow.end_run()


class Trackio:
    def __init__(self, run: pathlib.Path, project: str, name: str, config: dict):
        self.trackio = require("trackio")
        self.trackio.init(project=project, name=name, config=config)

    def log(self, step, values):
        self.trackio.log({**values, "step": step})

    def close(self):
        self.trackio.finish()


BY_NAME = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def _flat(value, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, x in value.items() for k, v in _flat(x, f"{path}.{name}".strip(".")).items()}
    return {path: value}
