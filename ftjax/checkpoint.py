"""Checkpoints that survive: Orbax writes them, and each is read back and sealed with the hashes of its files.

A checkpoint holds what training changes (step, trainable weights, optimiser state) and a small dict of the
loop's own facts; never the frozen base. Random numbers and data order are functions of (seed, step), so the
step is their state. A checkpoint that does not match its seal is moved aside and the one before it is taken.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import zlib
from typing import Any, ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from ftjax.errors import UserError
from ftjax.train import TrainState

log = logging.getLogger("ftjax")


class _Differs(Exception):
    """What was read back is not what was saved."""


@dataclasses.dataclass(frozen=True)
class _Unsealed:
    """A checkpoint on its way to disk: what reading it back has to give."""

    step: int
    abstract: dict[str, Any]
    digests: dict[str, int]
    facts: str


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When to save, and how many to keep."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept, at least 2: the one before goes only after the newest was read back. The best
    one by evaluation is kept besides."""

    def __post_init__(self):
        if self.keep < 2:
            raise UserError(
                f"checkpoint.keep={self.keep}: at least 2, so that a damaged one has one before it"
            )
        if self.every < 1:
            raise UserError(f"checkpoint.every={self.every}: at least 1 step")


class Checkpoints:
    """The checkpoints of one run folder. Saving returns at once; the files are written behind it."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        self.directory = pathlib.Path(directory).absolute()
        self.keep = keep
        self.best: int | None = None  # a step that pruning spares
        self._unsealed: _Unsealed | None = None
        self._manager_: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._manager_ is None:
            try:
                (self.directory / "seals").mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"cannot make the folder {self.directory}: {e.strerror}") from None
            options = ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
            self._manager_ = ocp.CheckpointManager(self.directory, options=options)
        return self._manager_

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit() and p.is_dir())

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Begin to write `state`; waits for the save before it, seals that one and prunes older ones.

        Raises UserError when the disk is full or cannot be written to; checkpoints before it are untouched.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        self._check_room(state)
        if jax.default_backend() == "cpu":
            # On CPU Orbax would read the very buffers that the next step donates.
            state = jax.tree.map(lambda x: x.copy(), state)
        plain = _plain(state)
        unsealed = _Unsealed(
            step,
            jax.tree.map(ocp.utils.to_shape_dtype_struct, plain),
            {name: _digest(leaf) for name, leaf in plain.items()},
            json.dumps(facts, sort_keys=True),
        )
        args = ocp.args.Composite(state=ocp.args.StandardSave(plain), facts=ocp.args.JsonSave(facts))
        try:
            self._manager.save(step, args=args)
        except Exception as e:
            raise self._failed(step, e) from e
        self._unsealed = unsealed

    def wait(self) -> None:
        """Until everything saved lies on disk, was read back as it was saved, and is sealed.

        UserError where that fails; a checkpoint that reads differently is moved to damaged-STEP.
        """
        if self._unsealed is None:
            return
        unsealed, self._unsealed = self._unsealed, None
        step = unsealed.step
        try:
            self._manager.wait_until_finished()
            self._read_back(unsealed)
            self._seal(step)
        except Exception as e:
            if isinstance(e, _Differs):  # unsealed and readable, so a later run would take it
                self._move_aside(step)
            raise self._failed(step, e) from e
        if jax.process_index() == 0:
            self._prune()

    def _read_back(self, saved: _Unsealed) -> None:
        """Raise _Differs where the files do not give what was saved. It takes one leaf's memory at a time."""
        folder = self.directory / str(saved.step)
        with ocp.PyTreeCheckpointer() as reader:
            for name, leaf in saved.abstract.items():
                item = {name: leaf}
                args = ocp.args.PyTreeRestore(
                    item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
                )
                try:
                    got = reader.restore(folder / "state", args=args)[name]
                except Exception as e:
                    raise _Differs(f"{name} cannot be read back: {_first_line(e)}") from e
                if _digest(got) != saved.digests[name]:
                    raise _Differs(f"{name} reads back differently from what was saved")
        facts = self._manager.restore(saved.step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))
        if json.dumps(facts["facts"], sort_keys=True) != saved.facts:
            raise _Differs("facts read back differently from what was saved")

    def close(self) -> None:
        self.wait()
        if self._manager_ is not None:
            self._manager_.close()
            self._manager_ = None

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """(state laid out and sharded as `like`, facts) of the newest checkpoint that is whole, or of `step`.

        None when there is none. A damaged checkpoint is named in a warning and moved to damaged-STEP. Raises
        UserError when checkpoints exist and none is whole, or when they were made for other weights.
        """
        steps = self.steps() if step is None else [step]
        tried = []
        for candidate in reversed(steps):
            problem = self._damage(candidate)
            if problem is None:
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
                args = ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
                )
                try:
                    got = self._manager.restore(candidate, args=args)
                    return _rebuild(like, got["state"]), got["facts"]
                except Exception as e:
                    if self._sealed(candidate):  # whole on disk, so it is not the disk that is wrong
                        raise UserError(
                            f"{self.directory / str(candidate)} was made by a run with other weights or "
                            "another "
                            f"optimiser, and cannot be continued by this config: {_first_line(e)}"
                        ) from e
                    problem = _first_line(e)
            tried.append(candidate)
            log.warning("checkpoint %d is damaged (%s); falling back to the one before", candidate, problem)
        if tried:
            left = [s for s in steps if s not in tried]
            if not left:
                raise UserError(
                    f"{self.directory}: no checkpoint is whole (tried {', '.join(map(str, tried))}); start "
                    "over "
                    "with --overwrite, or restore the folder from a copy"
                )
        return None

    def set_aside(self, after: int | None) -> None:
        """Move checkpoints later than step `after` (all, for None) to damaged-STEP, so that a run may pass
        them."""
        for step in self.steps():
            if after is None or step > after:
                self._move_aside(step)

    def _move_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self.directory / f"damaged-{step}"
            shutil.rmtree(target, ignore_errors=True)
            (self.directory / str(step)).rename(target)
        self._manager.reload()

    def _failed(self, step: int, error: Exception) -> UserError:
        whole = [s for s in self.steps() if s != step]
        kept = f"checkpoints {', '.join(map(str, whole))} are intact" if whole else "there was none before it"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.directory}: {_first_line(error)} "
            f"({kept}); free some space or mend the folder, then run the same command again to go on"
        )

    def _check_room(self, state) -> None:
        need = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self._manager.directory).free
        if free < need * 1.1 + 2**20:
            raise self._failed(
                int(state.step),
                OSError(
                    f"no space left on device: it needs {need / 2**20:.0f} MiB, {free / 2**20:.0f} are free"
                ),
            )

    def _files(self, step: int) -> dict[str, str]:
        root = self.directory / str(step)
        files = sorted(p for p in root.rglob("*") if p.is_file())
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    def _seal_path(self, step: int) -> pathlib.Path:
        return self.directory / "seals" / f"{step}.json"

    def _sealed(self, step: int) -> bool:
        return self._seal_path(step).exists()

    def _seal(self, step: int) -> None:
        if jax.process_index() == 0:
            path = self._seal_path(step)
            beside = path.with_suffix(".tmp")
            beside.write_text(json.dumps(self._files(step), indent=1))
            beside.rename(path)

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, None if nothing can be seen to be."""
        try:
            sealed = json.loads(self._seal_path(step).read_text())
        except FileNotFoundError:
            return None  # killed between writing and sealing: reading it will tell
        except ValueError as e:
            return f"its seal is unreadable: {e}"
        found = self._files(step)
        for name, digest in sealed.items():
            if name not in found:
                return f"file {name} is missing"
            if found[name] != digest:
                return f"file {name} differs from what was written"
        return None

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            if step != self.best:
                self._manager.delete(step)
                self._seal_path(step).unlink(missing_ok=True)


def _digest(x: jax.Array) -> int:
    """A CRC-32 of this process's part of `x`, shard by shard, read on the host.

    A jitted sum would be a small program over all devices for each leaf, and many of those under way at once
    can leave the devices of a CPU waiting for one another until XLA aborts.
    """
    digest = 0
    shards = (shard for shard in x.addressable_shards if shard.replica_id == 0)
    for shard in sorted(shards, key=lambda shard: str(shard.index)):
        digest = zlib.crc32(np.asarray(shard.data).tobytes(), digest)
    return digest


def _plain(state: TrainState):
    """A tree of dicts and lists, which Orbax stores the same whatever the optimiser's own types."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _rebuild(like: TrainState, plain) -> TrainState:
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(treedef, [plain[jax.tree_util.keystr(path)] for path, _ in paths])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
