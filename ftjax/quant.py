"""Frozen bases in few bits, as functions on a parameter tree.

`plan` says which weights of a table are quantised and how, `quantise` makes the leaves, `ops.dequant` says
what they stand for. A base that is quantised cannot be trained: adapters beside it are, and they are exported
for the base as it is published."""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ftjax import lora
from ftjax.errors import UserError
from ftjax.ops.dequant import FOUR_BITS, FP8_MAX, LEVELS, NESTED, POWERS, dequantise, dynamic
from ftjax.weights import QuantWeight, Table, flatten, is_leaf, module_of, unflatten

Kind = Literal["nf4", "fp4", "int4", "mxfp4", "int8", "fp8", "fp8_dynamic"]
# inputs that share a scale, 0 for all of them: bitsandbytes' blocks, the Microscaling Formats', LLM.int8's
BLOCKS: dict[str, int] = {"nf4": 64, "fp4": 64, "int4": 64, "mxfp4": 32} | dict.fromkeys(
    ("int8", "fp8", "fp8_dynamic"), 0
)
FP8 = ("fp8", "fp8_dynamic")
CODES: dict[str, Any] = {"int8": jnp.int8} | dict.fromkeys(FP8, jnp.float8_e4m3fn)  # a byte a code
DOUBLE = ("nf4", "fp4")  # whose scales may be quantised too


@dataclasses.dataclass(frozen=True)
class QuantOptions:
    """In how few bits the frozen base is held in memory."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    kind: Kind = "nf4"
    """nf4: 4 bits by the quantiles of a normal distribution (QLoRA, arXiv:2305.14314); fp4: bitsandbytes'
    4-bit float; int4: evenly spaced; mxfp4: OCP's 4-bit float; int8: bitsandbytes' rows (LLM.int8,
    arXiv:2208.07339); fp8: e4m3; fp8_dynamic: the same, with products of e4m3: a layer's inputs and gradients
    are rounded to it, with a scale a token (experts' products are as of fp8)."""
    double: bool = True
    """Of nf4 and fp4: quantise the scales, too, to 8 bits (0.37 bits a weight less)."""
    block_size: int | None = None
    """Consecutive inputs that share a scale; where not given 64 of nf4, fp4 and int4, all of int8 and fp8.
    mxfp4 has 32, fp8_dynamic all."""
    exclude: str | tuple[str, ...] = ()
    """Module names, or a regex on whole module paths, of linear layers that are not quantised. Embeddings,
    heads, routers and norms never are."""

    def __post_init__(self):
        if self.block_size is not None:
            odd = self.kind in FOUR_BITS and self.block_size % 2
            if self.kind in ("mxfp4", "fp8_dynamic") or self.block_size < 1 or odd:
                right = {"mxfp4": "of mxfp4 is 32", "fp8_dynamic": "fp8_dynamic has one scale for all inputs"}
                right = right.get(self.kind, f"of {self.kind} an even number" if odd else "at least 1")
                raise UserError(f"quant.block_size={self.block_size}: {right}")


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one weight is held: `block` inputs share a scale, whose scales are quantised where `double`."""

    kind: str
    block: int
    double: bool = False


def plan(options: QuantOptions, table: Table) -> dict[str, Spec]:
    """{path: how it is held} of every weight that is quantised. UserError as `chosen` and `spec`."""
    return {path: spec(options, table, path) for path in chosen(options, table)}


def chosen(options: QuantOptions, table: Table) -> list[str]:
    """The paths of linear layers that are not excluded. UserError where `exclude` matches nothing, or a part
    of a stack."""
    out = []
    used = set()
    for path, row in table.rows.items():
        if row.role != "linear":
            continue
        modules = [module_of(name) for name in table.names(path)]
        hits = [lora.matches(options.exclude, module, "") if options.exclude else None for module in modules]
        used |= {hit for hit in hits if hit is not None}
        if all(hit is not None for hit in hits):
            continue
        if any(hit is not None for hit in hits):
            which = modules[next(i for i, hit in enumerate(hits) if hit is not None)]
            raise UserError(
                f"quant.exclude={options.exclude!r} matches {which} but not {row.module} in every layer: "
                "layers of one kind are held as one array, so exclude all or none of them"
            )
        out.append(path)
    names = (options.exclude,) if isinstance(options.exclude, str) else options.exclude
    for name in names:
        if name and name not in used:
            linear = sorted({r.module.rpartition(".")[2] for r in table.rows.values() if r.role == "linear"})
            raise UserError(f"quant.exclude: {name!r} matches no linear layer; there are {', '.join(linear)}")
    return out


def spec(options: QuantOptions, table: Table, path: str) -> Spec:
    """How the options hold one weight. UserError where blocks do not divide its inputs."""
    inputs = math.prod(table.ins(path))
    block = (BLOCKS[options.kind] if options.block_size is None else options.block_size) or inputs
    step = 2 if options.kind in FOUR_BITS else 1
    if inputs % block or inputs % step:
        fit = [i for i in range(step, block, step) if inputs % i == 0]
        instead = "" if options.kind == "mxfp4" or not fit else f"quant.block_size={fit[-1]} does, or "
        raise UserError(
            f"quant: blocks of {block} do not divide the {inputs} inputs of {table.rows[path].module}: "
            f"{instead}leave it out by quant.exclude"
        )
    return Spec(options.kind, block, options.double and options.kind in DOUBLE)


def check(paths: Collection[str], trained: lora.Plan, table: Table) -> None:
    """UserError where a weight that is quantised is to be trained itself."""
    for path, one in trained.items():
        if path in paths and not isinstance(one, lora.Adapted):
            module = table.rows[path].module
            raise UserError(
                f"quant: {module} is to be trained whole, which a quantised weight cannot be: "
                f"quant.exclude=[{module.rpartition('.')[2]}] keeps it as it is"
            )


# -- Shapes and shardings


def abstract(table: Table, path: str, one: Spec) -> QuantWeight:
    """The leaf of `path` as jax.ShapeDtypeStruct."""
    lead, ins, outs = table.lead(path), table.ins(path), table.outs(path)
    groups = math.prod(ins) // one.block
    nested = offset = None
    if one.double:
        count = -(-groups * math.prod(outs) // NESTED)
        nested = jax.ShapeDtypeStruct((*lead, count), jnp.float32)
        offset = jax.ShapeDtypeStruct(lead, jnp.float32)
    rows = math.prod(ins) // (2 if one.kind in FOUR_BITS else 1)
    codes = jax.ShapeDtypeStruct((*lead, rows, *outs), CODES.get(one.kind, jnp.uint8))
    scale_dtype = jnp.uint8 if one.kind in POWERS or one.double else jnp.float32
    scale = jax.ShapeDtypeStruct((*lead, groups, *outs), scale_dtype)
    return QuantWeight(codes, scale, nested, offset, one.kind, ins, len(outs))


def shardings(table: Table, path: str, one: Spec, sharding) -> QuantWeight:
    """Shardings of the leaf, given that of the whole weight: the scales are where their codes are, nested
    ones on every device. UserError where a block would be cut."""
    lead, ins, outs = table.lead(path), table.ins(path), table.outs(path)
    if not isinstance(sharding, NamedSharding):
        codes = scale = whole = sharding
    else:
        mesh = sharding.mesh
        axes = [*sharding.spec, *[None] * (len(table.shape(path)) - len(sharding.spec))]
        first, inner, last = (
            axes[: len(lead)],
            axes[len(lead) : len(lead) + len(ins)],
            axes[len(lead) + len(ins) :],
        )
        assert not any(inner[1:]), (path, sharding)
        parts = math.prod(mesh.shape[name] for name in np.ravel(inner[0]) if name is not None)
        inputs = math.prod(ins)
        groups = inner[0] if inputs > one.block else None
        if groups is not None and inputs // parts % one.block:
            step = 2 if one.kind in FOUR_BITS else 1
            fit = [i for i in range(step, one.block, step) if inputs // parts % i == 0]
            instead = f"quant.block_size={fit[-1]}, " if fit and one.kind != "mxfp4" else ""
            raise UserError(
                f"quant: the {inputs} inputs of {table.rows[path].module} are split over {parts} devices "
                f"(mesh.{inner[0]}), which cuts blocks of {one.block}: {instead}fewer devices on that axis, "
                "or quant.exclude would do"
            )
        rows = inner[0] if groups is not None or one.kind not in FOUR_BITS else None
        codes = NamedSharding(mesh, PartitionSpec(*first, rows, *last))
        scale = NamedSharding(mesh, PartitionSpec(*first, groups, *last))
        whole = NamedSharding(mesh, PartitionSpec(*first))
    double = whole if one.double else None
    return QuantWeight(codes, scale, double, double, one.kind, ins, len(outs))


def nbytes(params) -> int:
    """Bytes of a parameter tree, or a part of one, in memory."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


# -- Quantising


def quantise(params: dict, table: Table, options: QuantOptions) -> dict:
    """The tree with the weights that `plan` names quantised, matrix by matrix."""
    flat = flatten(params)
    for path, one in plan(options, table).items():
        w, lead = flat[path], table.lead(path)
        matrices = w.reshape(-1, *w.shape[len(lead) :])
        leaves = [quantise_one(x, one, len(table.outs(path))) for x in matrices]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *leaves)
        flat[path] = jax.tree.map(lambda x, lead=lead: x.reshape(*lead, *x.shape[1:]), stacked)
    return unflatten(flat)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantise_one(w, one: Spec, outs: int) -> QuantWeight:
    """One matrix [*in, *out], of which the last `outs` axes are outputs.

    nf4, fp4, their double quantisation and int8 are bitsandbytes' to the code; int4's scale takes the largest
    magnitude to -8; mxfp4's is the power of two below it, over four (OCP Microscaling Formats 1.0, 6.3).
    """
    shape, out_shape = w.shape, w.shape[w.ndim - outs :]
    x = w.astype(jnp.float32).reshape(-1, one.block, *out_shape)  # [G, block, *out]
    top = jnp.max(jnp.abs(x), axis=1)
    safe = jnp.where(top == 0, 1.0, top)
    nested = offset = None
    scale: Any = top
    if one.kind in ("nf4", "fp4"):
        codes = _nearest(LEVELS[one.kind], jnp.clip(x * (1.0 / safe)[:, None], -1.0, 1.0))
    elif one.kind == "int8":
        codes = jnp.round(x * (127.0 / safe)[:, None]).astype(jnp.int8)
        scale = top / 127.0
    elif one.kind == "int4":
        at = jnp.argmax(jnp.abs(x), axis=1, keepdims=True)
        scale = jnp.take_along_axis(x, at, axis=1)[:, 0] / -8.0
        codes = jnp.round(x * jnp.where(scale == 0, 0.0, 1.0 / scale)[:, None])
        codes = (jnp.clip(codes, -8.0, 7.0) + 8.0).astype(jnp.uint8)
    elif one.kind in FP8:
        scale = top / FP8_MAX
        x = x * (FP8_MAX / safe)[:, None]
        codes = jnp.clip(x, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    else:
        assert one.kind == "mxfp4", one.kind
        exponent = jnp.frexp(safe)[1] - 1 - 2  # 2: the exponent of the largest level, 6
        scale = jnp.where(top == 0, 0, jnp.clip(exponent + 127, 0, 253)).astype(jnp.uint8)
        inverse = (254 - scale.astype(jnp.uint32)) << 23  # the bits of 2^(127 - scale)
        codes = _nearest_even(x * jax.lax.bitcast_convert_type(inverse, jnp.float32)[:, None])
    if one.double:
        scale, nested, offset = _quantise_scales(scale)
    if one.kind in FOUR_BITS:
        codes = pack(codes, 1)
    codes = codes.reshape(-1, *out_shape)
    return QuantWeight(codes, scale, nested, offset, one.kind, shape[: w.ndim - outs], outs)


def leaves_of_stored(table: Table, path: str, one: Spec, arrays: Mapping[str, Any]) -> list[Any]:
    """The leaves of the matrices in one checkpoint tensor that is stored as `one` says: `arrays` as of
    quantised.Kept."""
    layout, together, outs = table.rows[path].layout, table.together(path), table.outs(path)
    inputs = math.prod(table.ins(path))
    codes = layout.load(arrays["codes"], together, (inputs // one.block, one.block), outs)
    if one.kind in FOUR_BITS:
        codes = pack(codes, len(together) + 1)
    codes = codes.reshape(*together, -1, *outs)
    scale = layout.load(arrays["scale"], together, (inputs // one.block,), outs)
    if one.kind not in POWERS and not one.double:
        scale = scale.astype(np.float32)
    return [codes, scale, *(arrays[name] for name in ("nested", "offset") if one.double)]


def pack(codes, axis: int):
    """Codes of four bits two to a byte, `axis` being a block: its first half low, its second high."""
    low, high = (jnp if isinstance(codes, jax.Array) else np).split(codes, 2, axis)
    return low | (high << 4)


def _nearest(levels: np.ndarray, x):
    """The code of the nearest level, of two as near the lower one."""
    order = np.argsort(levels, kind="stable")
    edges = (levels[order][:-1] + levels[order][1:]) / np.float32(2)
    rank: Any = sum((x > edge).astype(jnp.int32) for edge in edges)
    if (order == np.arange(len(order))).all():
        return rank.astype(jnp.uint8)
    return jnp.asarray(order, jnp.int32)[rank].astype(jnp.uint8)


def _nearest_even(x):
    """The code of the nearest E2M1 level, of two as near the one with an even mantissa."""
    size, rank = jnp.abs(x), jnp.zeros(x.shape, jnp.int32)
    for i, edge in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):  # above the i-th is the code i + 1
        rank += ((size > edge) if i % 2 == 0 else (size >= edge)).astype(jnp.int32)
    return jnp.where(jnp.signbit(x), rank + 8, rank).astype(jnp.uint8)


def _quantise_scales(scale):
    """(codes uint8 [G, *out], nested [n], offset []) of scales less their mean, 256 at a time."""
    offset = jnp.mean(scale)
    flat = jnp.moveaxis(scale, 0, -1).reshape(-1) - offset
    blocks = jnp.pad(flat, (0, -flat.size % NESTED)).reshape(-1, NESTED)
    nested = jnp.max(jnp.abs(blocks), axis=1)
    values = jnp.clip(blocks * (1.0 / jnp.where(nested == 0, 1.0, nested))[:, None], -1.0, 1.0)
    table = dynamic(jnp.arange(256, dtype=jnp.uint8))
    codes = jnp.searchsorted((table[:-1] + table[1:]) / 2.0, values).astype(jnp.uint8)
    codes = codes.reshape(-1)[: flat.size].reshape(*scale.shape[1:], scale.shape[0])
    return jnp.moveaxis(codes, -1, 0), nested, offset


def dequantised(params: dict, dtype=None) -> dict:
    """The tree with plain arrays in place of quantised weights, also of those that adapters stand beside."""

    def one(w):
        if isinstance(w, QuantWeight):
            return dequantise(w, dtype or jnp.float32)
        if is_leaf(w):
            return w.replace(base=one(w.base))
        return w

    return jax.tree.map(one, params, is_leaf=is_leaf)
