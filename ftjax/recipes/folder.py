"""The run folder: whose it is, what may be written over, and what a run that goes on must find unchanged."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from ftjax import config
from ftjax.errors import UserError

MARKS = ("config.yaml", "base.json")  # a folder that has both is a run of ours
# All that we ever write there, and so all that we ever delete there.
OURS = (
    *MARKS,
    *("data.json", "info.json", "metrics.jsonl", "summary.json", "scores.json", "samples.json"),
    *("loss.png", "report.html", "tensorboard", "checkpoints", "adapter", "model", "merged", "export"),
)
# A change of these changes nothing that a run computes, so it goes on with the new value.
FREE_KEYS = ("report", "checkpoint", "data.cache_dir")


@dataclasses.dataclass
class RunFolder:
    """A folder that `claim` found to be ours to write to. Nothing in it changes before `begin`."""

    path: pathlib.Path
    fresh: bool  # no run goes on here: what an earlier one left is deleted when this one begins
    pins: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def pin(self, name: str, facts: dict[str, Any], what: str) -> None:
        """Keep `facts` as `name` for later verbs. UserError where the run that goes on here has another
        facts["fingerprint"]: `what` (the weights, the data) changed under it."""
        path = self.path / name
        if not self.fresh and path.exists():
            if json.loads(path.read_text()).get("fingerprint") != facts["fingerprint"]:
                raise UserError(
                    f"{what} changed since this run began, so it cannot go on as it was: choose another "
                    f"output, or --overwrite to start anew (see {path})"
                )
        self.pins[name] = facts

    def clear(self) -> None:
        """Where the run starts anew, delete what an earlier one left, by name, and nothing else."""
        if self.fresh:
            for name in OURS:
                path = self.path / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def begin(self, cfg) -> None:
        """Mark the folder as this run's: everything was accepted, training starts."""
        (self.path / "summary.json").unlink(missing_ok=True)
        (self.path / "config.yaml").write_text(config.dump(cfg))
        for name, facts in self.pins.items():
            (self.path / name).write_text(json.dumps(facts, indent=1))


def claim(cfg, overwrite: bool = False, resume: bool = False) -> RunFolder:
    """The folder that `cfg.output` names: new, or that of the same run, stopped.

    UserError where it holds a finished run, a different one, or anything that is not ours. `overwrite` starts
    anew over a run of ours; `resume` goes on though settings changed.
    """
    path = pathlib.Path(cfg.output)
    is_ours = all((path / name).is_file() for name in MARKS)
    if not is_ours:
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run of ours; choose another output")
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.yaml").write_text("")  # while nothing has cost any time
            (path / "config.yaml").unlink()
        except OSError as e:
            raise UserError(f"cannot write to {path}: {e.strerror}") from None
        return RunFolder(path, fresh=True)
    if overwrite:
        return RunFolder(path, fresh=True)
    changed = config.differences(path / "config.yaml", cfg, ignore=FREE_KEYS)
    if changed and not resume:
        raise UserError(
            f"{path} holds a run with other settings ({'; '.join(changed[:5])}). Choose another output; or "
            "--resume goes on with the new ones, --overwrite deletes that run and starts anew"
        )
    if is_finished(path) and not changed:
        raise UserError(
            f"{path} holds this very run, finished: `ftjax chat {path}` talks to it. Choose another output, "
            "or --overwrite to delete it and run again"
        )
    return RunFolder(path, fresh=False)


def is_finished(path: pathlib.Path) -> bool:
    return (path / "summary.json").is_file()
