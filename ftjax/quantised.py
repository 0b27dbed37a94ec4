"""Checkpoints that are stored quantised, read as the unquantised ones they stand for.

`Dequantised` lies between a folder's safetensors and whoever reads a model: it gives tensors under the names
and shapes of an unquantised checkpoint, each computed when asked for, in float32, and rounded once to the
dtype that config.json names. A format is a function that finds its tensors by their names; `FORMATS` has
them by config.json's quant_method.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from ftjax.errors import UserError
from ftjax.ops.dequant import LEVELS, NESTED, dynamic

Entries = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of each stored tensor
Codes = Callable[[slice], np.ndarray]  # rows -> their codes, float32 [rows, I], new each time

TILE = 1 << 18  # elements at a time: the float32 copy stays in cache
FLOATS = {np.dtype(t).name: np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32)}
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
PACKED = (*map(np.dtype, (np.uint8, np.int8, np.int32, ml_dtypes.float8_e8m0fnu)), *FLOAT8)
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second: compressed-tensors' old name of it
# What quantised checkpoints keep for activations and caches, which nothing here needs
DROPPED = re.compile(
    r"\.((input|output|activation|k|v|q)_(scale|zero_point)|activation_scale_inv|input_scale_ub|weight_format)$"
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the unquantised checkpoint: `read(dtype, **arrays)` of the stored ones in `parts`."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]  # argument of `read`: name of the stored tensor
    read: Callable[..., np.ndarray]
    kept: "Kept | None" = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """How a stored tensor is held as it is (weights.QuantWeight): `kind`, inputs in a row that share a scale,
    and whether the scales are quantised, too. `read(**arrays)` of the tensor's parts gives "codes" of its
    shape, 4-bit ones a byte each, "scale" of that shape but for the inputs (its axis `inputs`), which are
    blocks, and "nested" and "offset" where `double`."""

    kind: str
    block: int
    double: bool
    read: Callable[..., dict[str, np.ndarray]]
    inputs: int = -1


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a format looks at: the stored tensors, and its settings in config.json."""

    where: str
    settings: Mapping[str, Any]
    entries: Entries
    get: Callable[[str], np.ndarray]

    def ending(self, suffix: str) -> Iterator[str]:
        """The names with this ending, without it."""
        return (n.removesuffix(suffix) for n in self.entries if n.endswith(suffix))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.entries:
            raise UserError(f"{self.where}: {name} is missing: the other tensors of its layer are there")
        return self.entries[name][1]

    def dtype(self, name: str) -> np.dtype:
        return self.entries[name][0]

    def check(self, ok: bool, name: str, wanted: str) -> None:
        if not ok:
            dtype, shape = self.entries[name]
            raise UserError(f"{self.where}: {name} is {dtype} {list(shape)}: {wanted}")

    def optional(self, **parts: str) -> dict[str, str]:
        return {k: name for k, name in parts.items() if name in self.entries}


class Dequantised:
    """The tensors of a quantised checkpoint as those of an unquantised one.

    `config` is config.json, `entries` and `get` the stored tensors, `where` the folder, for messages. A
    stored tensor that is not quantised comes as it is, and all do where config.json has no
    quantization_config. UserError where the format, or a variant of it, is not read, or where tensors do not
    fit together.
    """

    def __init__(
        self,
        where: str,
        config: Mapping[str, Any],
        entries: Entries,
        get: Callable[[str], np.ndarray],
    ):
        self._entries, self._get = entries, get
        self._names, self._tensors = list(entries), {}
        settings = quantization(config)
        if settings is not None:
            self._find(where, config, settings)

    def _find(self, where: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        entries, method = self._entries, _method(settings)
        if method not in FORMATS:
            raise UserError(
                f"{where}/config.json: quant_method={method!r}: a quantised checkpoint of a kind that is not "
                f"read; {', '.join(FORMATS)} are. Give the unquantised model, or a GGUF file"
            )
        self._dtype = _float_dtype(where, config)
        self._tensors = dict(FORMATS[method](Stored(where, settings, entries, self._get)))
        owner = {part: name for name, tensor in self._tensors.items() for part in tensor.parts.values()}
        self._names = list(
            dict.fromkeys(owner.get(n, n) for n in entries if n in owner or not DROPPED.search(n))
        )
        left = [n for n in self._names if n not in self._tensors and entries[n][0] in PACKED]
        left += [n for n in self._tensors if n in entries and n not in owner]
        if left:
            raise UserError(
                f"{where}: {left[0]} ({entries[left[0]][0]}, one of {len(left)} such) does not belong to a "
                f"layer stored as quant_method={method!r} of config.json stores it: give the unquantised "
                "model, or a GGUF file"
            )
        if not self._tensors:
            raise UserError(
                f"{where}: config.json says quant_method={method!r}, yet no tensor is stored so: if these "
                "are plain weights, take quantization_config out of it"
            )

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape if name in self._tensors else self._entries[name][1]

    def dtype(self, name: str) -> np.dtype:
        return self._dtype if name in self._tensors else self._entries[name][0]

    def parts(self, name: str) -> list[str]:
        """The stored tensors that `name` is made of."""
        return list(self._tensors[name].parts.values()) if name in self._tensors else [name]

    def get(self, name: str) -> np.ndarray:
        """The tensor: a new array where it was quantised, else what is stored."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return self._get(name)
        return tensor.read(self._dtype, **{k: self._get(part) for k, part in tensor.parts.items()})

    def kept(self, name: str) -> Kept | None:
        """How the tensor can be held as it is stored; None where that is no kind of ours."""
        return self._tensors[name].kept if name in self._tensors else None

    def get_kept(self, name: str) -> dict[str, np.ndarray]:
        """What `Kept.read` gives of the tensor."""
        tensor = self._tensors[name]
        assert tensor.kept is not None, name
        return tensor.kept.read(**{k: self._get(part) for k, part in tensor.parts.items()})


def quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, its own or that of its text model; None without one."""
    for part in (config, config.get("text_config") or {}):
        for key in CONFIG_KEYS:
            if part.get(key):
                return part[key]
    return None


def unquantised_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the unquantised model."""
    config = {k: v for k, v in config.items() if k not in CONFIG_KEYS}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k not in CONFIG_KEYS}
    return config


def _method(settings: Mapping[str, Any]) -> str:
    if "quant_method" not in settings and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"  # as it was written before quant_method was
    return str(settings.get("quant_method"))


def _float_dtype(where: str, config: Mapping[str, Any]) -> np.dtype:
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key) or "").removeprefix("torch.")
            if name:
                if name not in FLOATS:
                    raise UserError(f"{where}/config.json: {key}={name!r}: one of {', '.join(FLOATS)}")
                return FLOATS[name]
    return FLOATS["bfloat16"]


# -- Arithmetic. O and I are a matrix's output and input axes, G the groups of I that share a scale.


def _affine(
    codes: Codes,
    shape: tuple[int, int],
    dtype: np.dtype,
    scales_OG: np.ndarray,
    zeros_OG: np.ndarray | None = None,
    group_I: np.ndarray | None = None,
) -> np.ndarray:
    """(code - zero) * scale [O, I]; `group_I` is each column's group, None where groups are equal runs."""
    rows, columns = shape
    scales_OG = np.broadcast_to(scales_OG.astype(np.float32), (rows, scales_OG.shape[1]))
    out = np.empty(shape, dtype)
    step = max(1, TILE // columns)
    for i in range(0, rows, step):
        tile = slice(i, i + step)
        x = codes(tile)
        if zeros_OG is not None:
            x -= _spread(zeros_OG[tile].astype(np.float32), columns, group_I)
        x *= _spread(scales_OG[tile], columns, group_I)
        out[tile] = x
    return out


def _spread(x_OG: np.ndarray, columns: int, group_I: np.ndarray | None) -> np.ndarray:
    if x_OG.shape[1] == 1:
        return x_OG
    return x_OG.repeat(columns // x_OG.shape[1], 1) if group_I is None else x_OG.take(group_I, 1)


def _runs(columns: int, groups: int, size: int) -> np.ndarray | None:
    """`group_I` where the last of `groups` runs of `size` columns may be short."""
    return None if groups == 1 or groups * size == columns else np.arange(columns) // size


def _pairs(values: np.ndarray, high_first: bool) -> np.ndarray:
    """The two float32 values of every byte of two 4-bit codes, as one 8-byte item, so that one look-up gives
    both."""
    byte = np.arange(256)
    pair = (byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4)
    return np.ascontiguousarray(values.astype(np.float32)[np.stack(pair, -1)]).view(np.uint64)[:, 0]


INTEGERS = _pairs(np.arange(16), high_first=False)


def _integer_codes(words: np.ndarray, bits: int, columns: int) -> Codes:
    """Unsigned codes of 4 or 8 bits, packed low bits first along the last axis of int32 words."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return lambda rows: raw[rows, :columns].astype(np.float32)
    return lambda rows: INTEGERS.take(raw[rows]).view(np.float32)[:, :columns]


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The same as one uint8 array [..., words * 32 / bits]."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    return np.stack((raw & 15, raw >> 4), -1).reshape(*raw.shape[:-1], -1)


def _byte_codes(stored: np.ndarray) -> Codes:
    """Values of one byte each, [O, I]: float8 or int8."""
    if stored.dtype not in FLOAT8:
        return lambda rows: stored[rows].astype(np.float32)
    values = np.arange(256, dtype=np.uint8).view(stored.dtype).astype(np.float32)
    raw = stored.view(np.uint8)
    return lambda rows: values.take(raw[rows])  # ten times faster than astype


def _transpose(x: np.ndarray) -> np.ndarray:
    """x.T, copied in strips: several times faster than as one."""
    out = np.empty(x.shape[::-1], x.dtype)
    for i in range(0, x.shape[0], 64):
        out[:, i : i + 64] = x[i : i + 64].T
    return out


# -- Formats


def _mxfp4(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Two e2m1 codes a byte, low bits first, and a power of two for each 32 of them (OCP Microscaling Formats
    1.0). gpt-oss stores experts [E, O, I] as blocks [E, O, I/32, 16], and unquantised as [E, I, O]."""
    for name in stored.ending("_blocks"):
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        *lead, rows, groups, width = stored.shape(blocks)
        ok = len(lead) == 1 and width == 16 and stored.dtype(blocks) == np.uint8
        stored.check(ok, blocks, "uint8 [experts, rows, groups, 16] is read")
        ok = stored.shape(scales) == (*lead, rows, groups) and stored.dtype(scales).itemsize == 1
        stored.check(ok, scales, f"uint8 {[*lead, rows, groups]} goes with {blocks}")
        shape = (*lead, groups * 32, rows)
        kept = Kept("mxfp4", 32, False, _keep_mxfp4, inputs=-2)
        yield name, Tensor(shape, {"blocks": blocks, "scales": scales}, _read_mxfp4, kept)


def _read_mxfp4(dtype: np.dtype, blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    experts, rows, groups, _ = blocks.shape
    out = np.empty((experts, groups, 16, 2, rows), dtype)
    low, high = LEVELS["mxfp4"][np.arange(256) & 15], LEVELS["mxfp4"][np.arange(256) >> 4]
    step = max(1, TILE // (32 * rows))
    for e in range(experts):  # the codes are turned while they are small
        codes = _transpose(blocks[e].reshape(rows, -1)).reshape(groups, 16, rows)
        power = _powers(_transpose(scales[e]))[:, None]
        for i in range(0, groups, step):
            tile = slice(i, i + step)
            out[e, tile, :, 0] = low.take(codes[tile]) * power[tile]
            out[e, tile, :, 1] = high.take(codes[tile]) * power[tile]
    return out.reshape(experts, groups * 32, rows)


def _keep_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    experts, rows, groups, _ = blocks.shape
    out = np.empty((experts, groups, 16, 2, rows), np.uint8)
    for e in range(experts):
        codes = _transpose(blocks[e].reshape(rows, -1)).reshape(groups, 16, rows)
        out[e, :, :, 0], out[e, :, :, 1] = codes & 15, codes >> 4
    return {
        "codes": out.reshape(experts, groups * 32, rows),
        "scale": scales.view(np.uint8).transpose(0, 2, 1),
    }


def _powers(scales: np.ndarray) -> np.ndarray:
    """2^(s - 127), E8M0 codes; their 255 is a NaN."""
    return scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def _fp8(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """float8 weights [..., O, I] with a scale for each block of weight_block_size (DeepSeek-V3,
    arXiv:2412.19437 section 3.3), each row, or all. Layers without scales are not quantised."""
    block = stored.settings.get("weight_block_size") or (128, 128)
    for suffix in ("_scale_inv", "_scale"):
        for name in stored.ending(suffix):
            if name in stored.entries:  # else an activation's
                yield name, _scaled(stored, name, name + suffix, block)


def _scaled(stored: Stored, weight: str, scale: str, block, zero: str = "") -> Tensor:
    """float8, or where there may be a zero point int8, [..., O, I]; scales one for all, one a block
    [..., ceil(O / block), ceil(I / block)], one a row [O, 1], or one a group of a row [O, G]."""
    shape, have = stored.shape(weight), stored.shape(scale)
    kinds = (*FLOAT8, np.dtype(np.int8)) if zero else FLOAT8
    ok = len(stored.shape(weight)) > 1 and stored.dtype(weight) in kinds
    stored.check(ok, weight, f"{' or '.join(map(str, kinds))} matrices go with {scale}")
    rows, columns = shape[-2], shape[-1]
    grid = (*shape[:-2], -(-rows // block[0]), -(-columns // block[1])) if block else None
    if math.prod(have) == 1:
        kind = "one"
    elif have == grid:
        kind = "block"
    else:
        ok = len(shape) == len(have) == 2 and have[0] == rows and columns % have[1] == 0
        wanted = f"{list(grid)} (blocks of {list(block)})" if grid else f"{[rows, 1]}"
        stored.check(ok, scale, f"{wanted} goes with {weight} {list(shape)}")
        kind = "row"
    parts = {"weight": weight, "scale": scale} | (stored.optional(zero=zero) if zero else {})
    read = partial(_read_scaled, kind=kind, block=block)
    held = {np.dtype(np.int8): "int8", np.dtype(ml_dtypes.float8_e4m3fn): "fp8"}.get(stored.dtype(weight))
    if held is None or "zero" in parts:
        return Tensor(shape, parts, read)
    size = columns if kind == "one" else columns // have[-1]
    if kind == "block":  # where the last of a row is short, its blocks are cut into equal ones
        size = math.gcd(block[1], columns)
    return Tensor(shape, parts, read, Kept(held, size, False, partial(_keep_scaled, block=block, size=size)))


def _keep_scaled(weight, scale, *, block, size: int) -> dict[str, np.ndarray]:
    *lead, rows, columns = weight.shape
    if scale.dtype == np.uint8:
        scale = _powers(scale)
    scale = np.asarray(scale, np.float32)
    if scale.size == 1:
        scale = np.broadcast_to(scale.reshape(()), (*lead, rows, 1))
    elif block and scale.shape == (*lead, -(-rows // block[0]), -(-columns // block[1])):
        scale = scale.repeat(block[0], -2)[..., :rows, :].repeat(block[1] // size, -1)[..., : columns // size]
    return {"codes": weight, "scale": scale}


def _read_scaled(dtype, weight, scale, zero=None, *, kind, block) -> np.ndarray:
    *_, rows, columns = weight.shape
    if scale.dtype == np.uint8:
        scale = _powers(scale)
    groups, group_I = (scale.shape[-1], None) if kind != "one" else (1, None)

    def by_row(x):
        if kind == "block":
            x = x.repeat(block[0], -2)[..., :rows, :]
        return x.reshape(-1, groups)

    if kind == "block":
        group_I = _runs(columns, groups, block[1])
    flat = weight.reshape(-1, columns)
    zeros = None if zero is None else np.broadcast_to(by_row(zero), (len(flat), groups))
    return _affine(_byte_codes(flat), flat.shape, dtype, by_row(scale), zeros, group_I).reshape(weight.shape)


def _compressed_tensors(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """The formats of https://github.com/vllm-project/compressed-tensors that keep a code of 8 bits a weight
    or pack 4 or 8 bits into int32."""
    known = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
    groups = [g for g in (stored.settings.get("config_groups") or {}).values() if isinstance(g, dict)]
    formats = {f for f in (stored.settings.get("format"), *(g.get("format") for g in groups)) if f}
    formats -= {"mixed-precision", "dense"}  # the first only says that groups differ
    sparsity = (stored.settings.get("sparsity_config") or {}).get("format") or "dense"
    formats |= {sparsity} - {"dense"}
    for given in sorted(formats):
        if given not in known:
            raise UserError(
                f"{stored.where}/config.json: compressed-tensors format={given!r} is not read; "
                f"{', '.join(known)} are. Give the unquantised model, or a GGUF file"
            )
    if (stored.settings.get("transform_config") or {}).get("config_groups"):
        raise UserError(
            f"{stored.where}/config.json: compressed-tensors transform_config: rotated weights are not read: "
            "give the unquantised model, or a GGUF file"
        )
    structures = [(g.get("weights") or {}).get("block_structure") for g in groups]
    blocks = {tuple(map(int, b)) for b in structures if b}
    if len(blocks) > 1:
        raise UserError(f"{stored.where}/config.json: more than one block_structure: {sorted(blocks)}")
    block = next(iter(blocks), None)
    for name in stored.ending(".weight_scale"):
        weight, scale, zero = (f"{name}.{part}" for part in ("weight", "weight_scale", "weight_zero_point"))
        if weight in stored.entries:
            yield weight, _scaled(stored, weight, scale, block, zero)
        else:
            yield weight, _packed(stored, name)


def _packed(stored: Stored, name: str) -> Tensor:
    """compressed-tensors' pack-quantized: codes from -2^(bits-1), packed along I; zero points along O."""
    packed, scale, zero = f"{name}.weight_packed", f"{name}.weight_scale", f"{name}.weight_zero_point"
    rows, words = stored.shape(packed)[0], stored.shape(packed)[-1]
    stored.check(
        len(stored.shape(packed)) == 2 and stored.dtype(packed) == np.int32,
        packed,
        "int32 [O, words] is read",
    )
    stored.shape(f"{name}.weight_shape")
    shape = tuple(map(int, stored.get(f"{name}.weight_shape")))
    bits = [b for b in (4, 8) if len(shape) == 2 and -(-shape[1] * b // 32) == words]
    stored.check(
        bool(bits) and shape[0] == rows, packed, f"4 or 8 bits a weight are read; its shape is {list(shape)}"
    )
    have = stored.shape(scale)
    ok = len(have) == 2 and have[0] in (1, rows) or math.prod(have) == 1
    stored.check(ok, scale, f"[{rows}, groups] goes with {packed}")
    parts = {"packed": packed, "scale": scale, "weight_shape": f"{name}.weight_shape"}
    parts |= stored.optional(zero=zero, g_idx=f"{name}.weight_g_idx")
    return Tensor(shape, parts, partial(_read_packed, bits=bits[0], where=f"{stored.where}: {name}"))


def _read_packed(
    dtype, packed, scale, weight_shape, zero=None, g_idx=None, *, bits: int, where: str
) -> np.ndarray:
    rows, columns = map(int, weight_shape)
    scale = scale.reshape(-1, scale.shape[-1]) if scale.ndim == 2 else scale.reshape(1, 1)
    groups, middle = scale.shape[1], 1 << (bits - 1)
    zeros = np.full((rows, groups), middle, np.uint8)
    if zero is not None and zero.dtype == np.int32:
        zeros = _unpack(zero.T, bits).T[:rows]
    elif zero is not None:
        zeros = np.broadcast_to(zero.reshape(-1, groups).astype(np.int16) + middle, (rows, groups))
    group_I = _group_index(where, columns, groups, g_idx)
    return _affine(_integer_codes(packed, bits, columns), (rows, columns), dtype, scale, zeros, group_I)


def _group_index(where: str, columns: int, groups: int, g_idx, size: int = 0) -> np.ndarray | None:
    """Each column's group; None where they are equal runs."""
    if g_idx is not None and g_idx.size == columns and not (g_idx == -1).all():  # -1: not used
        if g_idx.min() < 0 or g_idx.max() >= groups:
            raise UserError(f"{where}: g_idx has groups {g_idx.min()}…{g_idx.max()}, scales have {groups}")
        equal = columns % groups == 0 and np.array_equal(g_idx, np.arange(columns) // (columns // groups))
        return None if equal else g_idx
    size = size if size > 0 else -(-columns // groups)
    if -(-columns // size) != groups:
        raise UserError(f"{where}: scales have {groups} groups for {columns} columns in groups of {size}")
    return _runs(columns, groups, size)


def _gptq(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """qweight int32 [I * bits / 32, O], qzeros int32 [G, O * bits / 32], scales [G, O], g_idx [I]: the files
    of AutoGPTQ and GPTQModel (the method: arXiv:2210.17323). Format "gptq" keeps zero points less one."""
    given = stored.settings.get("checkpoint_format") or stored.settings.get("format") or "gptq"
    if given not in ("gptq", "gptq_v2"):
        raise UserError(
            f"{stored.where}/config.json: GPTQ checkpoint_format={given!r} is not read; gptq and gptq_v2 "
            "are. Give the unquantised model, or a GGUF file"
        )
    size = int(stored.settings.get("group_size") or -1)
    for name in stored.ending(".qweight"):
        qweight, qzeros, scales = (f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
        bits = _bits(stored, name, (4, 8))
        groups, out = stored.shape(scales)
        shape = (out, stored.shape(qweight)[0] * 32 // bits)
        stored.check(stored.shape(qweight)[1] == out, qweight, f"[words, {out}] goes with {scales}")
        parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        parts |= stored.optional(g_idx=f"{name}.g_idx")
        read = partial(
            _read_gptq, bits=bits, plus=int(given == "gptq"), size=size, where=f"{stored.where}: {name}"
        )
        yield f"{name}.weight", Tensor(shape, parts, read)


def _bits(stored: Stored, name: str, read: tuple[int, ...]) -> int:
    """Bits a weight, from the zero points: a module's may differ from config.json's."""
    qweight, qzeros, scales = (f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
    for part in (qweight, qzeros):
        ok = len(stored.shape(part)) == 2 and stored.dtype(part) == np.int32
        stored.check(ok, part, "an int32 matrix is read")
    stored.check(len(stored.shape(scales)) == 2, scales, "[groups, outputs] is read")
    (groups, out), have = stored.shape(scales), stored.shape(qzeros)
    bits = [b for b in read if have == (groups, out * b // 32) and out * b % 32 == 0]
    stored.check(
        bool(bits),
        qzeros,
        f"{' or '.join(map(str, read))} bits a weight are read, with {scales} {[groups, out]}",
    )
    return bits[0]


def _read_gptq(
    dtype, qweight, qzeros, scales, g_idx=None, *, bits: int, plus: int, size: int, where: str
) -> np.ndarray:
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    zeros = (_unpack(qzeros, bits) + np.uint8(plus)) & np.uint8((1 << bits) - 1)  # a zero of 0 is kept as -1
    group_I = _group_index(where, columns, len(scales), g_idx, size)
    codes = _integer_codes(_transpose(qweight), bits, columns)
    return _affine(codes, (rows, columns), dtype, scales.T, zeros.T, group_I)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each 4 bits of a word are of, low bits first


def _awq(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """qweight int32 [I, O / 8], qzeros int32 [G, O / 8], scales [G, O]: AutoAWQ's version "gemm" (the method:
    arXiv:2306.00978)."""
    settings = stored.settings
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    backend = str(settings.get("backend") or "autoawq").lower()
    if version != "gemm" or backend == "llm-awq":
        raise UserError(
            f"{stored.where}/config.json: AWQ version={version!r}, backend={backend!r} is not read; version "
            "gemm of autoawq is. Give the unquantised model, or a GGUF file"
        )
    for name in stored.ending(".qweight"):
        qweight, qzeros, scales = (f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
        _bits(stored, name, (4,))
        groups, out = stored.shape(scales)
        columns, words = stored.shape(qweight)
        ok = words * 8 == out and columns % groups == 0
        stored.check(ok, qweight, f"[inputs, {out // 8}] in {groups} groups goes with {scales}")
        parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        yield f"{name}.weight", Tensor((out, columns), parts, _read_awq)


def _read_awq(dtype, qweight, qzeros, scales) -> np.ndarray:
    codes, zeros = _awq_codes(qweight), _awq_codes(qzeros)
    return _affine(lambda rows: codes[rows].astype(np.float32), codes.shape, dtype, scales.T, zeros)


def _awq_codes(words: np.ndarray) -> np.ndarray:
    """int32 [I, O / 8] -> uint8 [O, I]."""
    words = _transpose(words)
    out = np.empty((len(words), 8, words.shape[1]), np.uint8)
    for i, row in enumerate(AWQ_ORDER):
        out[:, row] = (words >> (4 * i)) & 15
    return out.reshape(-1, words.shape[1])


def _bitsandbytes(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """4 bits: two codes a byte, high bits first, looked up in quant_map, by the largest magnitude of each
    run of blocksize weights (QLoRA, arXiv:2305.14314), which may be quantised to 8 bits itself. 8 bits: int8
    rows [O, I] by their largest magnitude over 127 (arXiv:2208.07339)."""
    for kind in ("nf4", "fp4"):
        suffix = f".quant_state.bitsandbytes__{kind}"
        for name in stored.ending(suffix):
            yield name, _four_bits(stored, name, name + suffix)
    for name in stored.ending(".SCB"):
        weight, scale, layout = f"{name}.weight", f"{name}.SCB", f"{name}.weight_format"
        shape = stored.shape(weight)
        ok = len(shape) == 2 and stored.dtype(weight) == np.int8
        stored.check(ok, weight, "int8 [outputs, inputs] goes with SCB")
        stored.check(math.prod(stored.shape(scale)) == shape[0], scale, f"[{shape[0]}] goes with {weight}")
        if layout in stored.entries and int(stored.get(layout)) != 0:
            raise UserError(f"{stored.where}: {layout} is {int(stored.get(layout))}: only 0 (rows) is read")
        kept = Kept("int8", shape[1], False, _keep_int8)
        yield weight, Tensor(shape, {"weight": weight, "scale": scale}, _read_int8, kept)


def _four_bits(stored: Stored, name: str, state: str) -> Tensor:
    try:
        facts = json.loads(bytes(stored.get(state)))
        shape, size = tuple(map(int, facts["shape"])), int(facts["blocksize"])
        nested = (
            (int(facts["nested_blocksize"]), float(facts["nested_offset"]))
            if (f"{name}.nested_absmax" in stored.entries)
            else None
        )
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{stored.where}: {state} is damaged: {e!r}") from None
    count = math.prod(shape)
    have = math.prod(stored.shape(name)) * stored.dtype(name).itemsize
    stored.check(have == -(-count // 2), name, f"{-(-count // 2)} bytes make a matrix {list(shape)}")
    absmax, code = f"{name}.absmax", f"{name}.quant_map"
    wanted = np.uint8 if nested else np.float32
    ok = math.prod(stored.shape(absmax)) == -(-count // size) and stored.dtype(absmax) == wanted
    stored.check(ok, absmax, f"{np.dtype(wanted)} [{-(-count // size)}] goes with {name}")
    stored.check(stored.shape(code) == (16,), code, "16 values are read")
    parts = {"weight": name, "absmax": absmax, "code": code, "state": state}
    if nested:
        parts |= {"nested_absmax": f"{name}.nested_absmax", "nested_code": f"{name}.nested_quant_map"}
        blocks = -(-stored.shape(absmax)[0] // nested[0])
        ok = stored.shape(parts["nested_absmax"]) == (blocks,)
        stored.check(ok, parts["nested_absmax"], f"[{blocks}] goes with {absmax}")
        stored.check(
            stored.shape(parts["nested_code"]) == (256,), parts["nested_code"], "256 values are read"
        )
    read = partial(_read_four_bits, shape=shape, size=size, nested=nested)
    kind = state.rpartition("__")[2]
    known = np.array_equal(stored.get(code), LEVELS[kind]) and len(shape) == 2 and shape[1] % 2 == 0
    if nested:  # within rounding of the arithmetic that stands for the table
        same = np.allclose(stored.get(parts["nested_code"]), dynamic(np.arange(256)), 1e-6, 0)
        known = known and nested[0] == NESTED and same
    if not known:
        return Tensor(shape, parts, read)
    # Blocks that run on into the next row are cut into equal ones, each with its own scale.
    whole = shape[1] % size == 0
    block = size if whole else math.gcd(size, shape[1])
    keep = partial(_keep_four_bits, shape=shape, size=size, nested=nested, block=block)
    return Tensor(shape, parts, read, Kept(kind, block, bool(nested) and whole, keep))


def _keep_four_bits(
    weight, absmax, code, state, nested_absmax=None, nested_code=None, *, shape, size: int, nested, block: int
) -> dict[str, np.ndarray]:
    raw, count = weight.reshape(-1).view(np.uint8), math.prod(shape)
    codes = np.stack((raw >> 4, raw & 15), -1).reshape(-1)[:count].reshape(shape)
    absmax, (rows, columns) = absmax.reshape(-1), shape
    if nested and block == size:
        assert nested_absmax is not None
        scale = absmax.reshape(rows, -1)
        return {
            "codes": codes,
            "scale": scale,
            "nested": nested_absmax,
            "offset": np.array(nested[1], np.float32),
        }
    if nested and nested_absmax is not None and nested_code is not None:
        run, offset = nested
        absmax = nested_code[absmax] * nested_absmax.repeat(run)[: absmax.size] + np.float32(offset)
    scale = absmax.repeat(size // block)[: count // block].reshape(rows, columns // block)
    return {"codes": codes, "scale": scale}


def _keep_int8(weight, scale) -> dict[str, np.ndarray]:
    return {"codes": weight, "scale": scale.reshape(-1, 1) / np.float32(127)}


def _read_four_bits(
    dtype, weight, absmax, code, state, nested_absmax=None, nested_code=None, *, shape, size: int, nested
) -> np.ndarray:
    absmax = absmax.reshape(-1)
    if nested_code is not None and nested_absmax is not None:
        run, offset = nested
        absmax = nested_code[absmax] * nested_absmax.repeat(run)[: absmax.size] + np.float32(offset)
    count, blocks = math.prod(shape), absmax.size
    raw = weight.reshape(-1).view(np.uint8)
    short = blocks * size // 2 - raw.size
    if short:
        raw = np.concatenate((raw, np.zeros(short, np.uint8)))
    raw, pairs = raw.reshape(blocks, size // 2), _pairs(code, high_first=True)

    def codes(rows):
        return pairs.take(raw[rows]).view(np.float32)

    return _affine(codes, (blocks, size), dtype, absmax[:, None]).reshape(-1)[:count].reshape(shape)


def _read_int8(dtype, weight, scale) -> np.ndarray:
    return _affine(_byte_codes(weight), weight.shape, dtype, scale.reshape(-1, 1) / np.float32(127))


FORMATS: Mapping[str, Callable[[Stored], Iterator[tuple[str, Tensor]]]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
