"""stub"""
import dataclasses
from typing import ClassVar, Literal

@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What a run writes while it trains; metrics.jsonl, loss.png and report.html always are."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    to: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that get the metrics too; each must be installed."""
    project: str = "ftjax"
    """The trackers' project, MLflow's experiment."""
    name: str | None = None
    """The run's name there; not given: the name of the run folder."""
    tensorboard: bool = True
    """Write TensorBoard event files under the run folder's tensorboard/."""
    every: int = 1
    """Steps between lines of metrics.jsonl and points of the trackers."""
    line_seconds: float = 10.0
    """Seconds between lines of progress where the output is no terminal."""
