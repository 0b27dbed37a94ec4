"""Files of weights: safetensors read by view and written a band at a time, JSON, and folders that take their
name when they are whole."""

import concurrent.futures
import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ftjax.errors import UserError

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
BLOCK = 512  # columns of a transposing copy at a time: a cache line of each fits the first cache
BAND = 1 << 23  # bytes of a transposed matrix that are made and written at a time


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


def few(names: Iterable, limit: int = 3) -> str:
    """The first few of `names` and how many there are."""
    names = [n.name if isinstance(n, Path) else str(n) for n in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def copy(out: np.ndarray, x: np.ndarray, split: int) -> None:
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
        raise _full(folder, e) or UserError(f"{folder}: cannot be written: {e.strerror}") from None
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
        raise _full(folder, e) or e from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _full(folder: Path, error: OSError) -> UserError | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        said = "disk full; nothing was changed: free some space, then run the same command again"
        return UserError(f"{folder}: {said}")
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_shards(folder: Path, entries, tensor: Callable[[str], np.ndarray], limit: int) -> None:
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
                copy(out.view(band.dtype).reshape(band.shape), band, 1)
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
