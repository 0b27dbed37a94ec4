"""Hugging Face checkpoints in and out: folders, hub ids and GGUF files.

Reading is lazy. A source maps its files into memory and gives views; `load_params` copies each tensor once,
straight to where it will live, and lets go of its pages, so that the peak over the final size is a tensor
or two. Writing goes tensor by tensor too, into a folder beside the target that takes its name when it is
whole.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ftjax import gguf, lora, models, quantised
from ftjax.errors import UserError
from ftjax.lora import Plan
from ftjax.models import Model
from ftjax.weights import Table, flatten, from_hf, hf_shape, to_hf_one, unflatten

# safetensors' names of the dtypes that weights may have, and of those that only quantised ones have
FLOATS: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
DTYPES: Mapping[str, np.dtype] = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    **FLOATS,
}
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json "
    "vocab.json merges.txt vocab.txt chat_template.jinja chat_template.json"
).split()
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HOST = ("cpu",)  # platforms whose arrays lie in host memory
BLOCK = 512  # columns of a transposing copy at a time: a cache line of each fits the first cache
BAND = 1 << 23  # bytes of a transposed matrix that are made and written at a time
HEADS = {"lm_head.weight", "embed_out.weight"}  # which a tied model may have beside its embedding
THREADS = min(4, os.cpu_count() or 1)  # each may hold one tensor's float32 copy, so few


class Source(Protocol):
    """An opened base model: its config.json, and its tensors under the names of its family's weight table."""

    @property
    def source(self) -> str: ...  # as the user gave it

    @property
    def revision(self) -> str | None: ...

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> str: ...  # "hf" or "gguf"

    @property
    def config(self) -> dict[str, Any]: ...  # config.json, less how its weights were quantised

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def get(self, name: str) -> np.ndarray:
        """The tensor, read only; where the file has it as it is, a view whose pages are read when touched."""
        ...

    def release(self, name: str) -> None:
        """Give the pages of `name` back to the system; views of it stay valid, read again when touched."""
        ...

    def fingerprint(self) -> str:
        """sha256 over the names, shapes, dtypes and bytes of all tensors, whatever file each is in."""
        ...

    def stored_name(self, name: str) -> str:
        """What the checkpoint itself calls `name`."""
        ...

    def torch_name(self, name: str) -> str:
        """`name`, a parameter of transformers' text decoder, in the class that loads the whole checkpoint."""
        ...

    def others(self) -> list[str]:
        """Tensors that are no part of the text decoder (a vision tower's), by the checkpoint's names."""
        ...

    def tokenizer(self) -> Any: ...

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Put the tokenizer's files into `folder`, byte for byte where the source has them; their names."""
        ...

    @property
    def generation_config(self) -> dict[str, Any] | None: ...


class SafetensorsFile:
    """The header of one .safetensors file, checked against the file, and views of its tensors."""

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        if size < 8:
            raise UserError(f"{path}: truncated: {size} bytes, too short for a safetensors header")
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > size - 8:
                raise UserError(
                    f"{path}: truncated or not a safetensors file: its header should take {length} bytes, "
                    f"the file has {size - 8} after the first 8"
                )
            raw = f.read(length)
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata, self.entries = self._parse(raw, 8 + length, size)

    def _parse(self, raw: bytes, start: int, size: int):
        try:
            header = json.loads(raw)
            metadata = header.pop("__metadata__", {})
            rows = [
                (name, e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
                for name, e in header.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{self.path}: the safetensors header is damaged: {e!r}") from None
        entries, end = {}, 0
        for name, kind, shape, first, last in sorted(rows, key=lambda row: row[3:]):
            if kind not in DTYPES:
                raise UserError(f"{self.path}: {name} has dtype {kind}; supported: {', '.join(FLOATS)}")
            size_ok = min(shape, default=0) >= 0 and last - first == math.prod(shape) * DTYPES[kind].itemsize
            if first != end or not size_ok:
                raise UserError(
                    f"{self.path}: the safetensors header is damaged: {name} ({kind} {list(shape)}) is "
                    f"said to be at bytes {first}…{last}"
                )
            entries[name], end = (DTYPES[kind], shape, start + first), last
        if start + end != size:
            what = "truncated" if size < start + end else "damaged"
            raise UserError(f"{self.path}: {what}: {size} bytes, its header describes {start + end}")
        return metadata, entries

    def view(self, name: str) -> np.ndarray:
        dtype, shape, offset = self.entries[name]
        return np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)

    def release(self, name: str) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        dtype, shape, offset = self.entries[name]
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, offset - first + math.prod(shape) * dtype.itemsize)


class HfFolder:
    """A folder with config.json, safetensors and a tokenizer, as transformers saves it."""

    kind = "hf"

    def __init__(self, path: Path, source: str, revision: str | None = None):
        self.path, self.source, self.revision = path, source, revision
        config = read_json(path / "config.json")
        self.config = quantised.unquantised_config(config)
        self._files = _weight_files(path)
        self._where = {name: file for file in self._files for name in file.entries}
        entries = {name: file.entries[name][:2] for name, file in self._where.items()}
        self._tensors = quantised.Dequantised(str(path), config, entries, self._stored)
        renamed = models.table_names(self.config, self._tensors.names())
        self._names = {new: old for old, new in renamed.items() if new is not None}
        self._others = [old for old, new in renamed.items() if new is None]
        self._pieces = self._apart()
        self._digest: str | None = None

    def _apart(self) -> dict[str, tuple[str, int, int, int]]:
        """Where a family keeps its experts in a tensor each, but these files keep all in one: the names of
        the experts' tensors -> (stored tensor, expert, i, n), the i-th of n parts of its outputs."""
        config = models.text_config(self.config)
        if config.get("model_type") not in models.SPLITS_EXPERTS:
            return {}
        out = {}
        for name, stored in list(self._names.items()):
            found = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
            if found is None:
                continue
            parts = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
            del self._names[name]
            for e in range(self._tensors.shape(stored)[0]):
                for i, part in enumerate(parts):
                    piece = f"{found[1]}.{e}.{part}.weight"
                    out[piece] = stored, e, i, len(parts)
                    self._names[piece] = stored.removesuffix(found[2]) + f"{e}.{part}.weight"
        return out

    def _stored(self, name: str) -> np.ndarray:
        return self._where[name].view(name)

    def names(self) -> list[str]:
        return list(self._names)

    def others(self) -> list[str]:
        return list(self._others)

    def stored_name(self, name: str) -> str:
        return self._names.get(name, name)

    def torch_name(self, name: str) -> str:
        return models.torch_name(self.config, name)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._pieces:
            stored, _, _, n = self._pieces[name]
            _, rows, columns = self._tensors.shape(stored)
            return rows // n, columns
        return self._tensors.shape(self.stored_name(name))

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(self._pieces[name][0] if name in self._pieces else self.stored_name(name))

    def get(self, name: str) -> np.ndarray:
        if name in self._pieces:
            stored, e, i, n = self._pieces[name]
            return np.split(self._tensors.get(stored)[e], n)[i]
        return self._tensors.get(self.stored_name(name))

    def release(self, name: str) -> None:
        if name in self._pieces:  # its neighbours are read next, from the same pages
            return
        for part in self._tensors.parts(self.stored_name(name)):
            self._where[part].release(part)

    def fingerprint(self) -> str:
        if self._digest is None:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # sha256 lets go of the GIL
                lines = pool.map(self._fingerprint_line, sorted(self._where))
                self._digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        return self._digest

    def _fingerprint_line(self, name: str) -> str:
        file = self._where[name]
        dtype, shape, _ = file.entries[name]
        digest = hashlib.sha256(file.view(name).reshape(-1).view(np.uint8).data).hexdigest()
        file.release(name)
        return f"{name} {dtype} {shape} {digest}\n"

    @property
    def generation_config(self) -> dict[str, Any] | None:
        path = self.path / "generation_config.json"
        return read_json(path) if path.is_file() else None

    def tokenizer(self):
        if not any((self.path / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(
                f"{self.path}: no tokenizer (tokenizer.json): copy the tokenizer files of the model that "
                "it was tuned from"
            )
        from transformers import AutoTokenizer  # slow to import

        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except Exception as e:  # the tokenizers library raises bare Exception
            raise UserError(f"{self.path}: the tokenizer cannot be read: {e}") from e

    def write_tokenizer(self, folder: Path) -> list[str]:
        names = [n for n in TOKENIZER_FILES if (self.path / n).is_file()]
        for name in names:
            shutil.copyfile(self.path / name, folder / name)
        return names


def read_json(path: Path) -> dict:
    """A JSON object. UserError with the line where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[SafetensorsFile]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map in it")
        shards = sorted(set(weight_map.values()))
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {few(missing)} of {len(shards)} shards named in {index.name} missing: "
                "the download was not complete"
            )
        files = {s: SafetensorsFile(folder / s) for s in shards}
        astray = [n for n, s in weight_map.items() if n not in files[s].entries]
        if astray:
            raise UserError(f"{index}: tensors that are not in the shard named for them: {few(astray)}")
        return list(files.values())
    found = sorted(p for p in folder.glob("*.safetensors") if p.name != "adapter_model.safetensors")
    if (folder / "model.safetensors").is_file():
        found = [folder / "model.safetensors"]
    if len(found) == 1:
        return [SafetensorsFile(found[0])]
    if found:
        raise UserError(
            f"{folder}: {len(found)} .safetensors files and no model.safetensors.index.json: {few(found)}"
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5"))
    hint = f"; {few(others)} would have to be saved as safetensors first" if others else ""
    raise UserError(f"{folder}: no weights (model.safetensors){hint}")


def few(names: Iterable, limit: int = 3) -> str:
    """The first few of `names` and how many there are."""
    names = [n.name if isinstance(n, Path) else str(n) for n in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def open_model(source: str | os.PathLike, revision: str | None = None) -> Source:
    """Open a folder, a .gguf file (or a folder with one and no config.json), or a hub id.

    Only headers are read. UserError where there is none, or what is there is incomplete or damaged.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{source}: a model is a folder, a hub id or a .gguf file")
        return gguf.GgufFile(path, source)
    if not path.is_dir():
        path = _from_hub(source, revision)
    if (path / "config.json").is_file():
        return HfFolder(path, source, revision)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return gguf.GgufFile(ggufs[0], source)
    if ggufs:
        raise UserError(f"{path}: {len(ggufs)} .gguf files, name one of them: {few(ggufs)}")
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(f"{path}: an adapter, not a model: its base is {base!r}")
    raise UserError(f"{path}: no config.json: a model folder has config.json and model.safetensors")


def _from_hub(source: str, revision: str | None) -> Path:
    first = source.split("/")[0]
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", source) or ("/" in source and Path(first).is_dir()):
        raise UserError(_not_found(source))
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=HUB_PATTERNS))
    except errors.GatedRepoError:
        raise UserError(
            f"{source}: gated: accept its licence on its page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{source}: the hub has no revision {revision!r} of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{_not_found(source)}, and the hub has no public model of that name") from None
    except Exception as e:  # offline shows as one of a dozen classes of two libraries
        raise UserError(
            f"{_not_found(source)}, and the hub cannot be reached for it ({type(e).__name__}): download it "
            "elsewhere and give the folder's path"
        ) from e


def _not_found(source: str) -> str:
    path = Path(source).expanduser()
    while not path.parent.is_dir():
        path = path.parent
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"{source}: no such folder or file" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def describe(source: Source) -> dict[str, Any]:
    """Which weights these are, as RUN/base.json and an adapter's ftjax.json keep it."""
    return {
        "source": source.source if _is_hub_id(source) else str(source.path.absolute()),
        "revision": source.revision,
        "kind": source.kind,
        "fingerprint": source.fingerprint(),
    }


def _is_hub_id(source: Source) -> bool:
    return not Path(source.source).expanduser().exists()


def load_tokenizer(source: Source, *, need_chat_template: bool = False):
    """The source's tokenizer (a transformers PreTrainedTokenizerFast).

    UserError where it has none, where its ids exceed the embedding's rows, and, if asked, where it has no
    template.
    """
    tokenizer = source.tokenizer()
    rows, top = (
        models.text_config(source.config).get("vocab_size"),
        max(tokenizer.get_vocab().values(), default=-1),
    )
    if rows is not None and top >= rows:
        token = tokenizer.convert_ids_to_tokens(top)
        raise UserError(
            f"{source.source}: the tokenizer does not fit the model: its id {top} ({token!r}) is beyond the "
            f"embedding's {rows} rows (config.json: vocab_size)"
        )
    if need_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"{source.source}: the tokenizer has no chat template, which conversations need: tune the "
            "instruct variant of the model, or put a chat_template.jinja beside tokenizer.json"
        )
    return tokenizer


def check_names(source: Source, table: Table, shapes: bool = True) -> None:
    """UserError where the checkpoint's tensors are not those of the table, by name, dtype or, if `shapes`,
    shape."""
    wanted = {name: path for path in table.rows for name in table.names(path)}
    have = set(source.names())
    missing = [n for n in wanted if n not in have]
    if missing:
        raise UserError(f"{source.source}: {len(missing)} tensors missing from the weights: {few(missing)}")
    extra = [n for n in source.names() if n not in wanted and not re.fullmatch(table.others, n)]
    for twin in HEADS & set(extra) if "lm_head" not in table.rows else ():
        embed = table.names("embed")[0]
        if not np.array_equal(source.get(twin), source.get(embed)):
            raise UserError(
                f"{source.source}: config.json says tie_word_embeddings=true, yet {twin} differs from {embed}"
            )
        extra.remove(twin)
    if extra:
        raise UserError(
            f"{source.source}: {len(extra)} tensors in the weights that a "
            f"{source.config.get('model_type')} model of "
            f"this config does not have: {few(extra)}"
        )
    for name, path in wanted.items():
        if source.dtype(name) not in FLOATS.values():
            raise UserError(
                f"{source.source}: {name} is {source.dtype(name)}: quantised weights are not supported"
            )
        if shapes and source.shape(name) != hf_shape(table, path):
            raise UserError(
                f"{source.source}: {name} has shape {list(source.shape(name))}, config.json makes it "
                f"{list(hf_shape(table, path))}"
            )


def load_params(
    source: Source,
    model: Model,
    dtype=None,
    shardings=None,
    progress: Callable[[str, int], None] | None = None,
) -> dict:
    """The model's parameter tree, each leaf read straight into its sharding.

    Matrices get `dtype` (the checkpoint's unless given), norms and biases float32. `shardings` is a tree like
    the params' (`weights.shardings`); without it all is on the first device. `progress(path, bytes)` is
    called once a leaf. Over what stays on the host (on CPU all of it) its memory peaks at a few tensors.
    UserError as `check_names`.
    """
    table = model.table
    check_names(source, table)
    flat = flatten(shardings) if shardings is not None else {}
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def size(path: str) -> int:  # of one tensor
        return math.prod(table.shape(path)) // math.prod(table.apart(path))

    loading, params = {}, {}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            for path in sorted(table.rows, key=size, reverse=True):  # so that no large one is left to the end
                kind = np.float32 if not table.rows[path].ins else dtype or source.dtype(table.names(path)[0])
                sharding = flat.get(path, default)
                loading[path] = _load_leaf(source, table, path, np.dtype(kind), sharding, pool)
            for path in table.rows:
                params[path] = loading.pop(path)()
                if progress is not None:
                    progress(path, params[path].nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return unflatten(params)


def _load_leaf(
    source: Source, table: Table, path: str, dtype: np.dtype, sharding, pool
) -> Callable[[], jax.Array]:
    """Start loading, where all of it stays on the host; the result finishes it."""
    shape, apart, names = table.shape(path), table.apart(path), table.names(path)
    n = len(apart)
    at = list(np.ndindex(apart))  # where in the leaf each tensor goes
    where = {
        device: tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }

    def holds(bounds, i: int) -> bool:
        return all(first <= x < last for x, (first, last) in zip(at[i], bounds[:n], strict=True))

    def inside(bounds, i: int) -> tuple[int, ...]:
        return tuple(x - first for x, (first, _) in zip(at[i], bounds[:n], strict=True))

    def read(i: int, outs) -> None:
        """Fill {bounds of a shard: its part of tensor i}."""
        x = from_hf(table, path, source.get(names[i]))
        for bounds, out in outs.items():
            part = x[tuple(slice(*b) for b in bounds[n:])]
            for matrix in np.ndindex(part.shape[: len(table.together(path))]):
                _copy(out[matrix], part[matrix], len(table.ins(path)))
        source.release(names[i])

    def on_host() -> Callable[[], list[jax.Array]]:
        # On CPU device_put takes no copy: an aligned buffer that nobody else holds becomes the array.
        buffers = {bounds: aligned_empty(_extent(bounds), dtype) for bounds in set(where.values())}
        jobs = [
            pool.submit(read, i, {k: x[inside(k, i)] for k, x in buffers.items() if holds(k, i)})
            for i in range(len(names))
        ]

        def finish() -> list[jax.Array]:
            for job in jobs:
                job.result()
            return [jax.device_put(buffers[bounds], device) for device, bounds in where.items()]

        return finish

    def elsewhere() -> list[jax.Array]:
        if n == 0:
            return on_host()()
        # The host holds a few tensors at a time, not the whole stack.
        parts = {device: jnp.zeros(_extent(bounds), dtype, device=device) for device, bounds in where.items()}
        jobs = collections.deque()
        for i in range(len(names) + THREADS):
            if i < len(names):
                outs = {k: aligned_empty(_extent(k[n:]), dtype) for k in set(where.values()) if holds(k, i)}
                jobs.append((i, outs, pool.submit(read, i, outs)))
            if i >= THREADS - 1 and jobs:
                which, outs, job = jobs.popleft()
                job.result()
                for device, k in where.items():
                    if k in outs:
                        one = jax.device_put(outs[k], device)
                        parts[device] = _set_part(parts[device], one, inside(k, which))
                jax.block_until_ready(list(parts.values()))
        return list(parts.values())

    shards = on_host() if all(device.platform in HOST for device in where) else elsewhere
    return lambda: jax.make_array_from_single_device_arrays(shape, sharding, shards())


def _extent(bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


@functools.partial(jax.jit, donate_argnums=0)
def _set_part(stack, part, at):
    part = part.reshape((1,) * len(at) + part.shape)
    return jax.lax.dynamic_update_slice(stack, part, (*at, *(0,) * (part.ndim - len(at))))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, at a 64-byte boundary: what XLA's CPU client needs to take an array without a copy.

    A large one is mapped by itself: np.empty asks for huge pages, whose first touch took 2 to 5 times as long
    as that of small ones on a virtual machine that hands free memory back to its host."""
    size = math.prod(shape) * dtype.itemsize
    if size >= 1 << 22 and hasattr(mmap, "MAP_ANONYMOUS"):
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(mapped, dtype).reshape(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, x: np.ndarray, split: int) -> None:
    """out[...] = x, cast; `split` axes go in. Where x lies transposed it goes by blocks that stay in cache.

    A block is first copied, as it lies, into rows an odd number of cache lines apart: rows of a matrix are
    often a power of two apart, so that a column of them falls into a few sets of the cache.
    """
    if split == 0 or x.strides[-1] == x.itemsize:
        out[...] = x
        return
    rows, columns = math.prod(x.shape[:split]), math.prod(x.shape[split:])
    bits = np.dtype(f"u{out.itemsize}")  # numpy moves its own integers fastest
    width, line = 512 // out.itemsize, 64 // out.itemsize
    scratch = np.empty((BLOCK, width + line), out.dtype)
    out, x = out.reshape(rows, columns).view(bits), x.reshape(rows, columns)
    for j in range(0, columns, BLOCK):
        for i in range(0, rows, width):
            block = x[i : i + width, j : j + BLOCK].T
            near = scratch[: block.shape[0], : block.shape[1]]
            near[...] = block
            out[i : i + width, j : j + BLOCK] = near.view(bits).T


# -- Out


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a model says to a few prompts: logits float32 [B, T, V] on tokens and segments int32 [B, T]."""

    tokens: np.ndarray
    segments: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far a second model's logits are from a first's, over the real positions of a probe."""

    max_logit: float
    relative: float  # root mean square of the difference, over the logits' standard deviation
    kl: float  # mean KL(first || second), nats a token
    agree: float  # share of positions with the same most likely token

    def __str__(self):
        size = f"max |Δlogit| {self.max_logit:.2g}, {self.relative:.1g} of their spread"
        return f"{size}, KL {self.kl:.2g} nats a token, same top token {self.agree:.1%}"


@dataclasses.dataclass(frozen=True)
class Saved:
    folder: Path
    files: list[str]
    size: int  # bytes of weights
    drift: Drift | None  # of the re-opened folder against the probe
    rounding: float | None  # what the cast to the saved dtype changed, over what tuning changed (norms)


PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog. Then it",
    '{"name": "Ada Lovelace", "born": 1815, "field": "',
    "Question: what is 12 + 30?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n",
)
MAX_DRIFT = 0.1  # Drift.relative: rounding to bfloat16 makes it some 0.01, a wrong weight about 1


def probe(model: Model, tree, tokenizer=None, texts: Iterable[str] = PROBE_TEXTS, length: int = 24) -> Probe:
    """The logits of `model` with the parameters (plain, LoRA leaves or both) in `tree`, computed in float32.

    Without a tokenizer the tokens are arbitrary ids.
    """
    vocab, texts = model.config.vocab_size, list(texts)
    length = min(length, model.config.max_position_embeddings)
    tokens, segments = np.zeros((2, len(texts), length), np.int32)
    for row, text in enumerate(texts):
        if tokenizer is None:
            ids = [(i * 7919 + row * 104729 + 1) % vocab for i in range(length)]
        else:
            ids = tokenizer.encode(text, add_special_tokens=False)[:length]
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    return Probe(tokens, segments, _logits(model, tree, tokens, segments))


def _logits(model: Model, tree, tokens, segments) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    run = jax.jit(model.with_options(dtype=np.float32, remat="none").logits)
    return np.asarray(run(tree, tokens, positions, segments))


def drift(first: Probe, model: Model, tree) -> Drift:
    """How far `tree`'s logits are from those that `first` holds."""
    keep = first.segments > 0
    a = first.logits[keep].astype(np.float64)
    b = _logits(model, tree, first.tokens, first.segments)[keep].astype(np.float64)
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1).mean()
    return Drift(
        max_logit=float(np.abs(a - b).max()),
        relative=float(np.sqrt(np.square(a - b).mean()) / np.maximum(a.std(axis=-1).mean(), 1e-30)),
        kl=float(kl),
        agree=float((a.argmax(-1) == b.argmax(-1)).mean()),
    )


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def save_model(
    folder: str | os.PathLike,
    model: Model,
    params: dict | None,
    source: Source,
    *,
    plan: Plan | None = None,
    adapters: dict | None = None,
    dtype=None,
    max_shard_bytes: int = 5 * 10**9,
    chat_template: str | None = None,
    stop_ids: Iterable[int] = (),
    card: str | None = None,
    check: Probe | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
) -> Saved:
    """Write a Hugging Face folder of `params`, or of the base with `adapters` (of `plan`) merged in if given.

    A merge adds in float32 to the base's weights as `source` has them, one tensor at a time, and casts
    once: to `dtype`, or the dtype that each tensor has in the source (bfloat16 for a GGUF file). The folder
    gets the source's config.json with no key changed that need not be, its generation config (with
    `stop_ids` added to the end-of-sequence ids), its tokenizer files byte for byte (but for
    `chat_template`, where given), and `card` as README.md. It is written beside and renamed into place,
    then re-opened; given `check`, its logits are compared. Where `params` are of another shape than the
    source's (a larger vocabulary), `config` says what changes in config.json and `tokenizer` {file: content}
    takes the place of the source's tokenizer files. UserError where the folder exists (unless
    `overwrite`), the disk is full, or the logits are further off than MAX_DRIFT.
    """
    check_names(source, model.table, shapes=config is None)
    dtype = None if dtype is None else np.dtype(dtype)
    if dtype is None and source.kind == "gguf":
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dtype is not None and dtype not in FLOATS.values():
        raise UserError(f"dtype {dtype} cannot be saved; one of: float32, bfloat16, float16")
    noise = np.zeros(2)
    tuned = Tuned(model.table, source, plan=plan, adapters=adapters, params=params)
    shapes = tuned.shapes()
    own = {source.stored_name(n): n for n in shapes}
    entries = {stored: (shapes[name], dtype or source.dtype(name)) for stored, name in own.items()}
    # what is no part of the decoder goes out as it came in, but for a tied head's copy of the embedding
    carried = [n for n in source.names() if re.fullmatch(model.table.others, n) and n not in shapes]
    carried = {source.stored_name(n): n for n in carried} | {n: n for n in source.others()}
    entries |= {stored: (source.shape(n), source.dtype(n)) for stored, n in carried.items()}

    def tensor(name: str) -> np.ndarray:
        if name in carried:
            return source.get(carried[name])
        base, x = tuned(own[name])
        out = x.astype(entries[name][1], copy=False)
        if not _finite(x):
            raise UserError(f"{name} has values that are not finite: nothing was written")
        if base is not None:
            noise[:] += np.square(out.astype(np.float32) - x).sum(), np.square(x - base).sum()
        return out

    size = sum(math.prod(shape) * kind.itemsize for shape, kind in entries.values())
    with writing(folder, size, overwrite) as tmp:
        _write_shards(tmp, entries, tensor, max_shard_bytes)
        _write_config(tmp, source, dtype, config or {})
        _write_generation_config(tmp, source, stop_ids)
        if tokenizer is None:
            source.write_tokenizer(tmp)
        for name, content in (tokenizer or {}).items():
            (tmp / name).write_bytes(content)
        if chat_template is not None:
            write_chat_template(tmp, chat_template)
        if card is not None:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        result = None
        if check is not None:
            again = open_model(tmp)
            result = drift(check, model, load_params(again, model))
            if not result.relative <= MAX_DRIFT:
                raise UserError(f"{folder}: what was written does not compute what was tuned ({result})")
        files = sorted(p.name for p in tmp.iterdir())
    rounding = float(np.sqrt(noise[0] / noise[1])) if noise[1] else None
    return Saved(Path(folder), files, size, result, rounding)


class Tuned:
    """A tuned model's tensors by their names in the table, each made when asked for: name -> (the base's
    float32 tensor where an adapter changed it, else None; the tuned tensor).

    `params` are all weights, or None: those of `source`, with the adapters of `plan` merged in if given.
    """

    def __init__(self, table: Table, source: Source, *, plan: Plan | None = None, adapters=None, params=None):
        self.table, self.source, self.plan = table, source, plan or {}
        self.leaves = collections.defaultdict(dict)
        for key, x in flatten(adapters or {}).items():
            self.leaves[key.rpartition("/")[0]][key.rpartition("/")[2]] = np.asarray(x)
        self.params = flatten(params) if params is not None else None
        self.where = {name: (path, i) for path in table.rows for i, name in enumerate(table.names(path))}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape}"""
        return {name: hf_shape(self.table, path) for name, (path, _) in self.where.items()}

    def __call__(self, name: str) -> tuple[np.ndarray | None, np.ndarray]:
        path, i = self.where[name]
        table, apart = self.table, self.table.apart(path)
        at = tuple(map(int, np.unravel_index(i, apart))) if apart else ()
        if self.params is not None:
            leaf = self.params[path]
            if isinstance(leaf, jax.Array) and all(d.platform in HOST for d in leaf.devices()):
                leaf = np.asarray(leaf)  # without a copy, where indexing takes one
            return None, to_hf_one(table, path, np.asarray(leaf[at]))
        if path not in self.plan:
            return None, self.source.get(name)
        base = self.source.get(name)
        tuned = lora.merged_one(self.plan[path], self.leaves[path], from_hf(table, path, base), at)
        return (None, base) if tuned is None else (base.astype(np.float32), to_hf_one(table, path, tuned))


@contextlib.contextmanager
def writing(folder: str | os.PathLike, size: int = 0, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name when the block ends well, and goes when it does not.

    UserError where `folder` exists and is not empty (unless `overwrite`), cannot be written, or the disk has
    fewer than `size` bytes left.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists; overwrite replaces it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < size:
            raise UserError(
                f"{folder}: disk full: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
            )
        tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror}") from None
    try:
        tmp.chmod(0o777 & ~_umask())
        yield tmp
        old = None
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
            folder.rename(old / "replaced")
        tmp.rename(folder)
        if old is not None:
            shutil.rmtree(old)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: disk full; nothing was changed") from None
        raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _finite(x: np.ndarray) -> bool:
    """Whether all of x is. The bits of positive floats are ordered as the floats are, those of negative ones
    by size with the sign as top bit; infinity and what is not a number are the largest of either."""
    if x.dtype.itemsize != 2 or not x.size:
        return bool(np.isfinite(x).all())
    top = int(np.array(np.inf, x.dtype).view(np.uint16))  # float16's and bfloat16's own isfinite are slow
    return bool(x.view(np.int16).max() < top and x.view(np.uint16).max() < top | 0x8000)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_shards(folder: Path, entries, tensor: Callable[[str], np.ndarray], limit: int) -> None:
    """model.safetensors, or shards of at most `limit` bytes (a tensor is never cut) with their index."""
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, (shape, dtype) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", entries, tensor)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: entries[name] for name in names}, tensor)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(
    path: Path,
    entries: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensor: Callable[[str], np.ndarray],
) -> None:
    """One file. Widest dtypes come first, as the safetensors library orders them.

    A thread makes tensors, or where one lies transposed bands of it, one ahead of what is being written.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    order = sorted(entries, key=lambda name: (-entries[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        shape, dtype = entries[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)

    def pieces() -> Iterator[np.ndarray]:
        bands = [np.empty(0, np.uint8)] * 2  # while one is written the other is filled
        for name in order:
            x = np.asarray(tensor(name))
            assert x.shape == entries[name][0] and x.dtype == entries[name][1], name
            if x.ndim < 2 or x.flags.c_contiguous:
                yield np.ascontiguousarray(x).reshape(-1).view(np.uint8)
                continue
            x = x.reshape(-1, *x.shape[-2:])  # matrices: a view, but for layouts that no family has
            rows = max(1, BAND // (x.shape[2] * x.itemsize))
            for i, first in itertools.product(range(len(x)), range(0, x.shape[1], rows)):
                band = x[i, first : first + rows]
                if bands[0].size < band.nbytes:
                    bands[0] = np.empty(max(BAND, band.nbytes), np.uint8)
                out = bands[0][: band.nbytes]
                _copy(out.view(band.dtype).reshape(band.shape), band, 1)
                yield out
                bands.reverse()

    with open(path, "wb") as f, concurrent.futures.ThreadPoolExecutor(1) as pool:
        f.write(len(raw).to_bytes(8, "little") + raw)
        source = pieces()
        ahead = pool.submit(next, source, None)
        while (piece := ahead.result()) is not None:
            ahead = pool.submit(next, source, None)
            f.write(piece.data)
        f.flush()
        os.fsync(f.fileno())


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_config(folder: Path, source: Source, dtype: np.dtype | None, changes: Mapping[str, Any]) -> None:
    key = "dtype" if "dtype" in source.config else "torch_dtype"
    new: dict[str, Any] = source.config | ({key: dtype.name} if dtype is not None else {})
    if "text_config" in new:
        new["text_config"] = dict(new["text_config"]) | dict(changes)
    else:
        new |= changes
    raw = source.path / "config.json"
    if raw.is_file() and read_json(raw) == new:
        shutil.copyfile(raw, folder / "config.json")
    else:
        write_json(folder / "config.json", new)


def _write_generation_config(folder: Path, source: Source, stop_ids: Iterable[int]) -> None:
    raw, config = source.path / "generation_config.json", source.generation_config
    now = (config or source.config).get("eos_token_id")
    now = [now] if isinstance(now, int) else list(now or [])
    ends = list(dict.fromkeys([*now, *map(int, stop_ids)]))
    if raw.is_file() and ends == now:
        shutil.copyfile(raw, folder / raw.name)
        return
    if config is None:
        config = {k: v for k, v in source.config.items() if k.endswith("_token_id") and v is not None}
    if ends:
        config = config | {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    if config:
        write_json(folder / raw.name, config)


def push(folder: str | os.PathLike, repository: str, *, private: bool = False) -> str:
    """Upload a folder's files to a repository of the hub, made if there is none; its address.

    UserError where the hub refuses: not logged in, no right to write there, not reachable.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if not re.fullmatch(r"[\w][\w.-]*/[\w.-]+", repository):
        raise UserError(f"--push {repository}: a repository is OWNER/NAME")
    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Tuned with ftjax")
    except errors.LocalTokenNotFoundError:
        raise UserError(f"--push {repository}: not logged in: `hf auth login`, or set HF_TOKEN") from None
    except Exception as e:  # offline shows as one of a dozen classes of two libraries
        status = getattr(getattr(e, "response", None), "status_code", None)
        why = (
            "no right to write there: `hf auth login` with a token that may write"
            if status in (401, 403)
            else f"the hub cannot be reached or refuses ({type(e).__name__}: {e})"
        )
        raise UserError(f"--push {repository}: {why}. {folder} stays as it is") from e
    return f"pushed to {url}"


def write_chat_template(folder: Path, template: str) -> None:
    """The one place that readers look first, and out of tokenizer_config.json, so that there are not two."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        write_json(path, config)


USE = {
    "transformers": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```""",
    "peft": """```python
from transformers import AutoModelForCausalLM
from peft import PeftModel

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "PATH")
```""",
    "gguf": """```
ollama create NAME -f Modelfile
```""",
}


def model_card(
    *,
    name: str,
    base: str,
    library: str,
    data: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    notes: str = "",
) -> str:
    """README.md of a tuned model or adapter: front matter for the hub, then tables of what is given.

    `library` is "transformers", "peft" or "gguf".
    """
    front = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- ftjax"]
    if library == "peft":
        front.append("- lora")
    if re.fullmatch(r"[\w][\w.-]*/[\w.-]+", base) and not Path(base).exists():
        front.append(f"base_model: {base}")  # the hub wants an id here, never a path
    front.append("---")
    parts = [
        "\n".join(front),
        f"# {name}",
        f"Tuned from `{base}` with ftjax." + (f" {notes}" if notes else ""),
        USE[library].format(base=base),
    ]
    for title, rows in (("Scores", scores), ("Data", data), ("Settings", settings)):
        if rows:
            lines = [f"| {k} | {_cell(v)} |" for k, v in rows.items()]
            parts.append(f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
