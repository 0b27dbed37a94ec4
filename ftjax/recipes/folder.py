"""The run folder: whose it is, what may be written over, and what a run that goes on must find unchanged."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import time
import uuid
import zlib
from typing import Any

import jax

import ftjax
from ftjax import config, distributed, quant
from ftjax.errors import UserError
from ftjax.report.files import beside, write_text

MARKS = ("base.json", "config.yaml")  # a folder that has both is a run of ours
# All that we ever write there, and so all that we ever delete there.
OURS = (
    *MARKS,
    *(
        "data.json",
        "info.json",
        "program.json",
        "metrics.jsonl",
        "summary.json",
        "scores.json",
        "samples.json",
    ),
    *("loss.png", "report.html", "tensorboard", "checkpoints", "adapter", "model", "merged", "export"),
    *("profile", "profile.json"),
)
# All that is left by a run that was killed before it had begun: config.yaml comes last, and goes first.
UNBEGUN = {"base.json", "data.json", *map(beside, ("base.json", "data.json", "config.yaml"))}


def _is_unbegun(path: pathlib.Path) -> bool:
    if path.name == "checkpoints":  # made to see that it can be written to
        return path.is_dir() and all(p.name.startswith(distributed.MARK) for p in path.iterdir())
    return path.name in UNBEGUN or path.name.startswith(distributed.MARK)


# A change of these changes nothing that a run computes, so it goes on with the new value.
FREE_KEYS = ("report", "checkpoint.every", "checkpoint.keep", "data.cache_dir", "profile", "distributed")


def quant_facts(cfg) -> dict[str, Any]:
    """How a run holds its base, as RUN/base.json keeps it. With LoftQ the adapter is none for that base."""
    return json.loads(json.dumps(dataclasses.asdict(cfg.quant))) | {
        "loftq": cfg.lora.init_lora_weights == "loftq"
    }


def quant_options(facts: dict[str, Any]) -> quant.QuantOptions | None:
    """What RUN/base.json says of how its adapter's base is held; None where it is the unquantised one."""
    held: dict[str, Any] = dict(facts.get("quant") or {"loftq": True})
    if held.pop("loftq"):
        return None
    if isinstance(held["exclude"], list):
        held["exclude"] = tuple(held["exclude"])
    return quant.QuantOptions(**held)


@dataclasses.dataclass
class RunFolder:
    """A folder that `claim` found to be ours to write to. Nothing in it changes before `begin`."""

    path: pathlib.Path
    fresh: bool  # no run goes on here: what an earlier one left is deleted when this one begins
    pins: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    lock: Any = None  # held until it is closed or the process ends, in whatever way

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        if self.lock is not None:
            with contextlib.suppress(OSError):
                self.lock.truncate(0)  # nobody is at it
            self.lock.close()

    def pin(self, name: str, facts: dict[str, Any], what: str) -> None:
        """Keep `facts` as `name` for later verbs. UserError where the run that goes on here has another
        facts["fingerprint"], or holds the weights in other bits (facts["quant"]): `what` (the weights, the
        data) changed under it; or where one process has other ones than another."""
        distributed.same({f"{what}'s fingerprint": str(facts.get("fingerprint"))})
        path = self.path / name
        if distributed.first() and not self.fresh and path.exists():
            before = json.loads(path.read_text())
            if any(before.get(key) != facts.get(key) for key in ("fingerprint", "quant")):
                raise UserError(
                    f"{what} changed since this run began, so it cannot go on as it was: choose another "
                    f"output, or --overwrite to start anew (see {path})"
                )
        self.pins[name] = facts

    def clear(self) -> None:
        """Where the run starts anew, delete what an earlier one left, by name, and nothing else; the marks
        last, so that a kill on the way leaves a folder that can still be claimed."""
        if self.fresh and distributed.first():
            for name in reversed(OURS):
                path = self.path / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def begin(self, cfg) -> None:
        """Mark the folder as this run's: everything was accepted, training starts."""
        if not distributed.first():
            return
        (self.path / "summary.json").unlink(missing_ok=True)
        for half in (p for name in OURS for p in self.path.glob(f".{name}.*.partial")):
            shutil.rmtree(half)  # a result that was being written when the run was killed
        for name, facts in self.pins.items():
            write_text(self.path / name, json.dumps(facts, indent=1))
        write_text(self.path / "config.yaml", config.dump(cfg))


# Where a process finds or leaves what is its own.
OWN_KEYS = ("distributed", "data.cache_dir")


def _facts(cfg) -> dict[str, str]:
    """What has to be the same in all processes of a run; of a checkout, which keeps its version, the code."""
    code = 0
    for path in sorted(pathlib.Path(ftjax.__file__).parent.rglob("*.py")):
        code = zlib.crc32(path.read_bytes(), code)
    packages = {"ftjax": f"{ftjax.__version__} ({code:08x})", "jax": jax.__version__}
    return packages | config.settings(cfg, ignore=OWN_KEYS)


def claim(cfg, overwrite: bool = False, resume: bool = False) -> RunFolder:
    """The folder that `cfg.output` names: new, or that of the same run, stopped. Of several processes the
    first one looks, and the others need not see it.

    UserError where the processes were not started alike, and where it holds a finished run, a different one,
    or anything that is not ours, or another process is at it: none can claim it until the context that is
    returned is left. `overwrite` starts anew over a run of ours; `resume` goes on though settings changed.
    """
    if distributed.count() > 1:
        distributed.same(_facts(cfg))
    run = RunFolder(pathlib.Path(cfg.output), fresh=False)

    def look() -> bool:
        if not _is_ours(run.path) and run.path.is_dir() and not all(map(_is_unbegun, run.path.iterdir())):
            raise UserError(f"{run.path} is not empty and holds no run of ours; choose another output")
        distributed.mark(run.path, uuid.uuid4().hex).unlink()  # while nothing has cost any time
        run.lock = _lock(run.path)
        return _is_fresh(run.path, cfg, overwrite, resume)

    try:
        run.fresh = distributed.from_first(look)
    except BaseException:
        run.__exit__()
        raise
    return run


def _is_ours(path: pathlib.Path) -> bool:
    return all((path / name).is_file() for name in MARKS)


LEASE_SECONDS = 100  # for which an NFS server keeps what a client held that it does not hear from: 90


def _lock(path: pathlib.Path) -> Any:
    """Held while the result is open and this process lives (a child that outlives it holds nothing); None
    where the disk has no locks. UserError where another process holds it."""
    name, here = path / f"{distributed.MARK}lock", f"on {socket.gethostname()},"
    file = open(name, "a+")
    until = time.monotonic() + LEASE_SECONDS
    while True:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read()
            elsewhere = bool(holder) and here not in holder
            if elsewhere and time.monotonic() < until:  # a shared disk hears late that a machine is gone
                time.sleep(1)
                continue
            gone = f"; if that machine is gone, delete {name}" if elsewhere else ""
            raise UserError(
                f"another process is at the run in {path} ({holder or 'it has just begun'}): wait for it or "
                f"end it, or choose another output{gone}"
            ) from None
        except (ImportError, OSError):
            file.close()
            return None
    with contextlib.suppress(OSError):  # a full disk is met where there is something to save
        file.truncate(0)
        file.write(f"process id {os.getpid()} {here} since {time.strftime('%F %T')}")
        file.flush()
    return file


def _is_fresh(path: pathlib.Path, cfg, overwrite: bool, resume: bool) -> bool:
    if not _is_ours(path):
        return True
    if overwrite:
        return True
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
    return False


def is_finished(path: pathlib.Path) -> bool:
    return (path / "summary.json").is_file()
