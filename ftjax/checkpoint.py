"""Checkpoints that survive: Orbax writes them, and each is read back and sealed with the hashes of its files.

A checkpoint holds what training changes (step, trainable weights, optimiser state) and a small dict of the
loop's own facts; never the frozen base. Random numbers and data order are functions of (seed, step), so the
step is their state. A checkpoint that does not match its seal is moved aside and the one before it is taken.
One whose run was killed before it was sealed, which is at the next save, is held against the sums of its
arrays, which were written (seals/STEP.PROCESS.sums) before it was: Orbax's formats do not notice a flipped
bit in a value.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import time
import types
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.futures import future, signaling_client
from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath

from ftjax import bucket, distributed
from ftjax.errors import UserError
from ftjax.files import few
from ftjax.report.files import write_text
from ftjax.train import TrainState

log = logging.getLogger("ftjax")

COMMITTED = "commit_success.txt"  # which Orbax writes last into a bucket's checkpoint
# What fails in one of Orbax's threads is raised to us, who say it in a line; it logs the traceback, too.
logging.getLogger("absl").addFilter(lambda record: record.exc_info is None)
logging.getLogger("asyncio").addFilter(lambda record: "OCDBT" not in record.getMessage())
# Orbax measures its patience by the wall clock, and one that jumps ahead during a save would end the run.
for _module in (future, signaling_client):
    _module.time = types.SimpleNamespace(time=time.monotonic, sleep=time.sleep)  # type: ignore[attr-defined]


class _Differs(Exception):
    """What was read back is not what was saved."""


READ_BYTES = 1 << 28  # of a checkpoint that are read back at a time: each reading costs milliseconds


@dataclasses.dataclass(frozen=True)
class _Unsealed:
    """A checkpoint on its way to disk: what reading it back has to give."""

    step: int
    abstract: dict[str, Any]
    sums: dict[str, dict[str, int]]  # name -> part of the array -> CRC-32, of this process's parts
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder. Saving returns at once; the files are written behind it."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        self.directory = bucket.folder(directory)
        self._in_bucket = bucket.is_bucket(self.directory)
        self.keep = keep
        self.best: int | None = None  # a step that pruning spares
        self._unsealed: _Unsealed | None = None
        self._manager_: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._manager_ is None:
            try:
                (self.directory / "seals").mkdir(parents=True, exist_ok=True)
            except Exception as e:  # of a disk, or of any of the libraries that reach buckets
                said = getattr(e, "strerror", None) or _first_line(e)
                raise UserError(f"cannot make the folder {self.directory}: {said}") from None
            options = ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
            if self._in_bucket:  # nothing can be renamed there at once
                options.temporary_path_class = CommitFileTemporaryPath
            self._manager_ = ocp.CheckpointManager(self.directory, options=options)
        return self._manager_

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first, as process 0 sees them."""
        return distributed.from_first(self._steps)

    def _steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        found = (p for p in self.directory.iterdir() if p.name.isdigit() and p.is_dir())
        return sorted(int(p.name) for p in found if not self._in_bucket or (p / COMMITTED).exists())

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Begin to write `state`; waits for the save before it, seals that one and prunes older ones.

        Raises UserError when the disk is full or cannot be written to; checkpoints before it are untouched.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        if distributed.first():
            self._check_room(state)
        if jax.default_backend() == "cpu":
            # On CPU Orbax would read the very buffers that the next step donates.
            state = jax.tree.map(lambda x: x.copy(), state)
        plain = _plain(state)
        unsealed = _Unsealed(
            step,
            jax.tree.map(ocp.utils.to_shape_dtype_struct, plain),
            {name: _sums(leaf) for name, leaf in plain.items()},
            json.loads(json.dumps(facts)),
        )
        args = ocp.args.Composite(state=ocp.args.StandardSave(plain), facts=ocp.args.JsonSave(facts))
        try:
            sums = {"sums": unsealed.sums, "facts": unsealed.facts}
            path = self._seal_path(step).with_suffix(f".{jax.process_index()}.sums")
            _write_whole(path, json.dumps(sums))
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
            self._agree(self._read_back, unsealed)
            if distributed.first():
                self._seal(step)
        except Exception as e:
            if isinstance(e, _Differs):  # unsealed and readable, so a later run would take it
                self._move_aside(step)
            raise self._failed(step, e) from e
        self._prune()

    def _agree(self, check: Callable[[_Unsealed], None], saved: _Unsealed) -> None:
        """`check` in every process; _Differs in all of them where it is so in one."""
        said = ""
        try:
            check(saved)
        except _Differs as e:
            said = str(e)
        if found := next(filter(None, distributed.from_all(said)), None):
            raise _Differs(found)

    def _read_back(self, saved: _Unsealed) -> None:
        """Raise _Differs where the files do not give what was saved: each process reads its part."""
        for name, got in self._read(saved.step, saved.abstract):
            if _sums(got) != saved.sums[name]:
                raise _Differs(f"{name} reads back differently from what was saved")
        if self._read_facts(saved.step) != saved.facts:
            raise _Differs("facts read back differently from what was saved")

    def _read(self, step: int, like: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The arrays of a checkpoint laid out as in `like`, or on the host where that is numpy's, in the
        memory of a few of them; _Differs where that fails."""
        folder = self.directory / str(step) / "state"
        groups: list[dict[str, Any]] = [{}]
        for name, leaf in like.items():
            if sum(x.size * x.dtype.itemsize for x in groups[-1].values()) > READ_BYTES:
                groups.append({})
            groups[-1][name] = leaf
        with _reader(ocp.PyTreeCheckpointHandler()) as reader:
            for group in groups:
                args = ocp.args.PyTreeRestore(
                    group,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(group),
                    partial_restore=True,
                )
                try:
                    got = reader.restore(folder, args=args)
                except Exception as e:
                    raise _Differs(f"{few(group)} cannot be read back: {_first_line(e)}") from e
                yield from got.items()

    def _read_facts(self, step: int) -> dict[str, Any]:
        with _reader(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(self.directory / str(step) / "facts", args=ocp.args.JsonRestore())

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
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
            problem = distributed.from_first(functools.partial(self._damage, candidate, abstract))
            if problem is None:
                args = ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
                )
                try:
                    got = self._manager.restore(candidate, args=args)
                    return _rebuild(like, got["state"]), got["facts"]
                except Exception as e:
                    # whole on disk, so it is not the disk that is wrong
                    if distributed.from_first(functools.partial(self._sealed, candidate)):
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

    def check(self, fresh: bool, overwrite: bool) -> None:
        """UserError where the folder cannot be made and written to, where not all processes see it, or where
        a run that begins anew finds checkpoints in it, unless it may `overwrite` them: see `clear`."""
        if self._in_bucket:
            trial = self.directory / f"{distributed.MARK}{uuid.uuid4().hex}"
            try:
                trial.write_text("")
                trial.unlink()
            except Exception as e:  # of any of the libraries that reach buckets
                raise UserError(f"cannot write to {self.directory}: {_first_line(e)}") from None
        elif max(distributed.from_all(distributed.sees(self.directory))) > 0:
            raise UserError(
                f"{self.directory} is not the same folder on all hosts, and their checkpoints have to be in "
                "one place: set checkpoint.directory to a shared disk or a bucket (gs://…, s3://…)"
            )
        found = self.steps() if fresh else []
        if found and not overwrite:
            raise UserError(
                f"checkpoint.directory={self.directory} holds checkpoints of another run (steps "
                f"{', '.join(map(str, found))}): choose another, or --overwrite to delete them"
            )

    def clear(self) -> None:
        """Delete all of them."""
        for step in self.steps():
            self._delete(step)

    def _delete(self, step: int) -> None:
        self._manager.delete(step)
        if distributed.first():
            self._seal_path(step).unlink(missing_ok=True)

    def _move_aside(self, step: int) -> None:
        if distributed.first():
            target = self.directory / f"damaged-{step}"
            bucket.remove(target)
            (self.directory / str(step)).rename(target)
        distributed.barrier()
        self._manager.reload()

    def _failed(self, step: int, error: Exception) -> UserError:
        whole = [s for s in self._steps() if s != step]
        kept = f"checkpoints {', '.join(map(str, whole))} are intact" if whole else "there was none before it"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.directory}: {_first_line(error)} "
            f"({kept}); free some space or mend the folder, then run the same command again to go on"
        )

    def _check_room(self, state) -> None:
        if self._in_bucket:
            return
        need = 1.1 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) + 2**20
        free = shutil.disk_usage(self._manager.directory).free
        if free < need:
            raise self._failed(
                int(state.step),
                OSError(
                    f"no space left on device: it needs {need / 2**20:.1f} MiB, {free / 2**20:.1f} are free"
                ),
            )

    def _files(self, step: int) -> dict[str, str]:
        return {name: _sha256(path) for name, path in bucket.files(self.directory / str(step)).items()}

    def _seal_path(self, step: int) -> Any:
        return self.directory / "seals" / f"{step}.json"

    def _sealed(self, step: int) -> bool:
        return self._seal_path(step).exists()

    def _seal(self, step: int) -> None:
        _write_whole(self._seal_path(step), json.dumps(self._files(step), indent=1))

    def _damage(self, step: int, like: dict[str, Any]) -> str | None:
        """What is wrong with a checkpoint's files, None if nothing can be seen to be."""
        try:
            sealed = json.loads(self._seal_path(step).read_text())
        except FileNotFoundError:
            return self._unsealed_damage(step, like)  # the run was killed between writing and sealing
        except ValueError as e:
            log.warning(
                "the seal of checkpoint %d is unreadable (%s); its arrays are checked instead", step, e
            )
            self._seal_path(step).unlink()
            return self._unsealed_damage(step, like)
        found = self._files(step)
        for name, digest in sealed.items():
            if name not in found:
                return f"file {name} is missing"
            if found[name] != digest:
                return f"file {name} differs from what was written"
        return None

    def _unsealed_damage(self, step: int, like: dict[str, Any]) -> str | None:
        """What differs from the sums of a checkpoint that was not sealed. Arrays are read on the host, whole:
        the run that goes on may cut them otherwise."""
        files = sorted((self.directory / "seals").glob(f"{step}.*.sums"))
        try:
            written = [json.loads(path.read_text()) for path in files]
            if not written:
                return None  # by an earlier version: reading it will tell
            if any(one["facts"] != self._read_facts(step) for one in written):
                return "facts differ from what was saved"
            if any(set(one["sums"]) != set(like) for one in written):
                return None  # of a run with other weights: restoring says so
            on_host = {k: np.broadcast_to(np.zeros((), x.dtype), x.shape) for k, x in like.items()}
            for name, got in self._read(step, on_host):
                for part, crc in (item for one in written for item in one["sums"][name].items()):
                    if zlib.crc32(got[_slices(part)].tobytes()) != crc:
                        return f"{name} differs from what was saved"
        except Exception as e:
            return _first_line(e)
        return None

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            if step != self.best:
                self._delete(step)
        if distributed.first():
            kept = {str(step) for step in self._steps()}
            for path in (self.directory / "seals").glob("*.sums"):
                if path.name.partition(".")[0] not in kept:
                    path.unlink(missing_ok=True)


def _reader(handler) -> ocp.Checkpointer:
    """Reads by itself, whatever the other processes do."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions()
    if distributed.count() > 1:
        alone = ocp.options.MultiprocessingOptions(me, {me}, f"reader-{me}")
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _sha256(path: Any) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _write_whole(path: Any, text: str) -> None:
    if bucket.is_bucket(path):  # where an object is there when it is whole
        path.write_text(text)
    else:
        write_text(path, text)


def _sums(x: jax.Array) -> dict[str, int]:
    """A CRC-32 of each of this process's parts of `x`, read on the host: {"first:end,…" by axis: CRC-32}.

    A jitted sum would be a small program over all devices for each leaf, and many of those under way at once
    can leave the devices of a CPU waiting for one another until XLA aborts.
    """
    out = {}
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            spans = (s.indices(size)[:2] for s, size in zip(shard.index, x.shape, strict=True))
            part = ",".join(f"{first}:{end}" for first, end in spans)
            out[part] = zlib.crc32(np.asarray(shard.data).tobytes())
    return out


def _slices(part: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, span.split(":"))) for span in part.split(",") if span)


def _plain(state: TrainState):
    """A tree of dicts and lists, which Orbax stores the same whatever the optimiser's own types."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _rebuild(like: TrainState, plain) -> TrainState:
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(treedef, [plain[jax.tree_util.keystr(path)] for path, _ in paths])


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # what went wrong comes last, after paths
    return line if len(line) <= 400 else f"{line[:150]} … {line[-250:]}"
