"""Products with weights: the one place that knows what a leaf of the parameter tree may be."""

import functools
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from ftjax.ops import target
from ftjax.ops.dequant import FP8_MAX, dequantise
from ftjax.ops.layers import by_device, by_row, shard, shards
from ftjax.weights import LoraWeight, NoisyEmbedding, ObservedWeight, QuantWeight, RowsWeight, StackedLora


def asked(dtype):
    """The dtype to ask a product for whose result is wanted in `dtype`. Sums are in float32 everywhere; on
    CPU a float32 output is the difference between a fast bfloat16 kernel and a slow one, on accelerators it
    would be written and read again only to be rounded."""
    return jnp.float32 if target.kind() == "cpu" else dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(eqn: str, x, w, dtype=None):
    """jnp.einsum(eqn, x, w) accumulated in float32 and rounded once, in the backward products too; result in
    `dtype` or x's."""
    dtype = dtype or x.dtype
    out = jnp.einsum(eqn, x, w.astype(x.dtype), preferred_element_type=asked(dtype))
    return out.astype(dtype)


def _product_fwd(eqn, x, w, dtype):
    return product(eqn, x, w, dtype), (x, w)


def _product_bwd(eqn, dtype, residuals, g):
    x, w = residuals
    (x_axes, w_axes), y_axes = eqn.split("->")[0].split(","), eqn.split("->")[1]
    g = g.astype(x.dtype)
    dot: Any = jnp.einsum
    dw = dot(f"{x_axes},{y_axes}->{w_axes}", x, g, preferred_element_type=asked(w.dtype))
    return _input_gradient(eqn, g, w), dw.astype(w.dtype)


def _input_gradient(eqn, g, w):
    (x_axes, w_axes), y_axes = eqn.split("->")[0].split(","), eqn.split("->")[1]
    dot: Any = jnp.einsum
    dx = dot(f"{y_axes},{w_axes}->{x_axes}", g, w.astype(g.dtype), preferred_element_type=asked(g.dtype))
    return dx.astype(g.dtype)


product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def quantised_product(eqn: str, x, w: QuantWeight, dtype=None):
    """`product` with a frozen weight that is kept in few bits. What it stands for is made where it is used
    and not kept: the backward product, which is of x alone, makes it again. Of `fp8_dynamic` it never is
    made: codes are multiplied with codes."""
    if w.kind == "fp8_dynamic":
        return _fp8_product(eqn, x, _gathered(eqn, w), dtype or x.dtype)
    return product(eqn, x, dequantise(_gathered(eqn, w), x.dtype), dtype)


def _gathered(eqn: str, w: QuantWeight) -> QuantWeight:
    """`w` whole along the hidden axis: over FSDP it is the codes that travel, and not what they stand for."""
    if jax.sharding.get_abstract_mesh().empty:
        return w
    letters = eqn.split("->")[0].split(",")[1]
    axes = letters[0] + letters[len(w.ins) :]
    spec = PartitionSpec(*(None if letter == "D" else PartitionSpec.UNCONSTRAINED for letter in axes))
    codes, scale = (jax.lax.with_sharding_constraint(x, spec) for x in (w.codes, w.scale))
    return w.replace(codes=codes, scale=scale)


def _quantised_bwd(eqn, dtype, residuals, g):
    like, w = residuals
    g = g.astype(like.dtype)
    if w.kind == "fp8_dynamic":
        return _fp8_input_gradient(eqn, g, _gathered(eqn, w)), None
    g, w = again(g, w)
    return _input_gradient(eqn, g, dequantise(_gathered(eqn, w), g.dtype)), None


def _fp8_product(eqn: str, x, w: QuantWeight, dtype):
    x_axes, ins, outs, y_axes, _ = _sides(eqn, len(w.ins))
    codes, scale = fp8(x, [x_axes.index(c) for c in ins])
    return _fp8_dot(
        f"{x_axes},{ins}{outs}->{y_axes}", codes, scale, w, dtype, _along(w.scale[0], outs, y_axes)
    )


def _fp8_input_gradient(eqn: str, g, w: QuantWeight):
    """The axes contracted here are those of the weight's scales, so the gradient takes them first."""
    x_axes, ins, outs, y_axes, _ = _sides(eqn, len(w.ins))
    scaled = g.astype(jnp.float32) * _along(w.scale[0], outs, y_axes)
    codes, scale = fp8(scaled, [y_axes.index(c) for c in outs])
    return _fp8_dot(f"{y_axes},{ins}{outs}->{x_axes}", codes, scale, w, g.dtype)


def _fp8_dot(eqn: str, codes, scale, w: QuantWeight, dtype, more: Any = None):
    """The product of two arrays of e4m3, times the first's scales (of the axes that stay) and `more`."""
    (axes, w_axes), y_axes = eqn.split("->")[0].split(","), eqn.split("->")[1]
    y: Any = jnp.einsum(eqn, codes, w.codes.reshape(w.shape), preferred_element_type=asked(dtype))
    y = y.astype(jnp.float32) * _along(scale, "".join(c for c in axes if c not in w_axes), y_axes)
    return (y if more is None else y * more).astype(dtype)


def fp8(x, axes: Sequence[int]):
    """(codes, scales) of x in e4m3 with one scale, float32, for all of `axes`, which the scales do not have:
    the largest magnitude is 448. Gradients too, as in torchao's rowwise recipe: with a scale a token they
    need e4m3's third bit more than e5m2's range."""
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True)
    codes = x * (FP8_MAX / jnp.where(top == 0, 1.0, top))
    codes = jnp.clip(codes, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    return codes, jnp.squeeze(top, axis=tuple(axes)) / FP8_MAX


def again(g, w: QuantWeight):
    """(g, w), w tied to the gradient g, without which XLA would see that an unrolled loop dequantises every
    weight twice, and keep what came of the first time."""
    return jax.lax.optimization_barrier((g, w))


quantised_product.defvjp(
    lambda eqn, x, w, dtype: (quantised_product(eqn, x, w, dtype), (jnp.empty(0, x.dtype), w)),
    _quantised_bwd,
)


def einsum(eqn: str, x, w, dtype=None) -> Any:
    """`product(eqn, x, w)` where `w` may be any leaf type. Of adapted weights a·b is never formed.

    An embedding table is a head too where the two are tied: whichever of its sides `eqn` contracts, an
    adapter on it acts as base + scale · a b.
    """
    if isinstance(w, NoisyEmbedding):
        return einsum(eqn, x, w.base, dtype)
    if isinstance(w, RowsWeight):
        return _rows_product(eqn, x, w, dtype)
    if isinstance(w, StackedLora):
        return _stacked_product(eqn, x, w, dtype)
    if isinstance(w, ObservedWeight):
        return einsum(eqn, _observe(eqn, x, w.moment), w.base, dtype)
    if isinstance(w, LoraWeight):
        return _adapted_product(eqn, x, w, dtype)
    if isinstance(w, QuantWeight):
        return quantised_product(eqn, x, w, dtype)
    return product(eqn, x, w, dtype)


def einsums(eqns: Sequence[str], x, ws: Sequence[Any]) -> list[Any]:
    """`einsum` of one x with several weights that contract the same axes of it: x is read once for the first
    factors of all that are adapted, forward and backward."""

    def first(x, a_XR):
        x_axes, ins = eqns[0].split(",")[0], _sides(eqns[0], a_XR.ndim - 1)[1]
        rank = next(c for c in "R" + string.ascii_lowercase if c not in eqns[0])
        y_axes = "".join(c for c in x_axes if c not in ins) + rank
        return product(f"{x_axes},{ins}{rank}->{y_axes}", x, a_XR, jnp.float32)

    lows = first_factors(x, ws, first)
    return [
        einsum(eqn, x, w) if low is None else _adapted_product(eqn, x, w, None, low)
        for eqn, w, low in zip(eqns, ws, lows, strict=True)
    ]


def first_factors(x, ws: Sequence[Any], first: Callable) -> list[Any]:
    """`first(x, a)` [..., R] of each weight's first factor a [..., R], by one call with the factors side by
    side; None for what is not adapted, or has dropout, whose masks are its own."""
    lows: list[Any] = [None] * len(ws)
    alike = [i for i, w in enumerate(ws) if isinstance(w, LoraWeight) and (w.rng is None or w.dropout == 0.0)]
    if len(alike) < 2:
        return lows
    factors = [ws[i].a for i in alike]
    ends = np.cumsum([a.shape[-1] for a in factors])[:-1]
    for i, low in zip(alike, jnp.split(first(x, jnp.concatenate(factors, -1)), ends, -1), strict=True):
        lows[i] = low
    return lows


def wide(dtype):
    """The dtype to ask a base's product for to which an adapter's is added, given the result's. A GPU's
    matrix product adds to an array of its output's own type at no cost; elsewhere the sum is rounded once.
    Over a mesh that splits what is summed over, it is the products' dtype that travels."""
    return dtype if target.kind() == "gpu" or shards("F") > 1 else jnp.float32


def _adapted_product(eqn: str, x, w: LoraWeight, dtype, low: Any = None) -> Any:
    """x with base + scale · a b; `low` is x with the first factor where that is known already."""
    dtype = dtype or x.dtype
    x_axes, ins, outs, y_axes, forward = _sides(eqn, w.a.ndim - 1)
    rank = next(c for c in "R" + string.ascii_lowercase if c not in eqn)
    h_axes = "".join(c for c in x_axes if c not in ins) + rank
    first, second = (w.a, w.b) if forward else (w.b, w.a)
    first_axes, second_axes = (ins + rank, rank + outs) if forward else (rank + ins, outs + rank)
    gain = None if w.m is None else output_gain(w)
    branch = dropout(x, w)
    dropped = branch is not x
    if gain is not None and not forward:  # the outputs that DoRA scales are contracted here
        scaled = branch.astype(jnp.float32) * _along(gain, ins, x_axes)
        x32 = x.astype(jnp.float32) + (scaled - branch.astype(jnp.float32)) if dropped else scaled
        x, branch, gain = x32.astype(x.dtype), scaled.astype(x.dtype), None
    if low is None:
        low = product(f"{x_axes},{first_axes}->{h_axes}", branch, first, jnp.float32)
    h = checkpoint_name((low * w.scale).astype(x.dtype), "lora")
    delta: Any = product(f"{h_axes},{second_axes}->{y_axes}", h, second, asked(dtype))
    if gain is None:
        y = einsum(eqn, x, w.base, wide(dtype))
        return (y + delta.astype(y.dtype)).astype(dtype)
    y, delta = einsum(eqn, x, w.base, jnp.float32), delta.astype(jnp.float32)
    gain = _along(gain, outs, y_axes)
    if not dropped:
        return (gain * (y + delta)).astype(dtype)
    # as in PEFT: the base sees the whole input once, and what DoRA adds to it is of the dropped one
    dropped_y = einsum(eqn, branch, w.base, jnp.float32)
    return (y + (gain - 1.0) * dropped_y + gain * delta).astype(dtype)


def _sides(eqn: str, count: int) -> tuple[str, str, str, str, bool]:
    """(x's letters, the weight's contracted ones, its others, y's, whether the contracted are the weight's
    first `count`: in a tied head they are its last)."""
    (x_axes, w_axes), y_axes = eqn.split("->")[0].split(","), eqn.split("->")[1]
    ins, outs = w_axes[:count], w_axes[count:]
    if all(c in x_axes for c in ins):
        return x_axes, ins, outs, y_axes, True
    return x_axes, outs, ins, y_axes, False


def _along(gain, letters: str, axes: str):
    """`gain`, whose axes are `letters`, shaped to multiply an array of `axes`."""
    order = sorted(range(len(letters)), key=lambda i: axes.index(letters[i]))
    sizes = dict(zip(letters, gain.shape, strict=True))
    return gain.transpose(order).reshape([sizes.get(c, 1) for c in axes])


def output_norm(base, a, b, scale):
    """‖W + s a b‖ over the inputs, for each output: float32 [*lead, *out]. `scale` is [*lead].

    By ‖W‖² + Σ_r s b ⊙ (2 aᵀW + s (aᵀa) b), so that a b is never formed. For W [I, O] and rank R that is
    2 I O R operations (aᵀW), as many as the weight's own product with R more tokens, once a layer and pass;
    beside it 2 I O (‖W‖²) and 2 (I + O) R². No gradient goes through it. Of a quantised base the matrices are
    made one at a time.
    """
    if isinstance(base, QuantWeight):
        if scale.ndim:
            return jax.lax.map(lambda one: output_norm(*one), (base, a, b, scale))
        base = dequantise(base, jnp.float32)
    lead, count = scale.ndim, a.ndim - scale.ndim - 1
    letters = string.ascii_uppercase
    L, ins, outs = letters[:lead], letters[lead : lead + count], letters[lead + count : base.ndim]
    base, a, b, scale = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (base, a, b, scale))
    dot: Any = functools.partial(jnp.einsum, precision="highest")
    s = scale.reshape(scale.shape + (1,) * (1 + len(outs)))
    aw = dot(f"{L}{ins}r,{L}{ins}{outs}->{L}r{outs}", a, base)
    aab = dot(f"{L}rq,{L}q{outs}->{L}r{outs}", dot(f"{L}{ins}r,{L}{ins}q->{L}rq", a, a), b)
    squared = jnp.sum(jnp.square(base), axis=tuple(range(lead, lead + count)))
    squared += jnp.sum(s * b * (2.0 * aw + s * aab), axis=lead)
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))


def output_gain(w: LoraWeight):
    """DoRA's factor of each output, m / ‖W + s a b‖: float32 [*lead, *out]. The norm counts as a constant in
    the gradient (arXiv:2402.09353, section 4.3)."""
    assert w.m is not None
    gain = w.m.astype(jnp.float32) / output_norm(w.base, w.a, w.b, w.scale)
    return jnp.where(jnp.isinf(w.m), 1.0, gain)


def _observe(eqn: str, x, moment):
    x_axes, w_axes = eqn.split("->")[0].split(",")
    ins = [x_axes.index(c) for c in w_axes if c in x_axes]
    order = [i for i in range(x.ndim) if i not in ins] + ins
    seen = observed(x.transpose(order).reshape(-1, moment.shape[-1]), moment)
    return seen.reshape([x.shape[i] for i in order]).transpose(np.argsort(order))


@jax.custom_vjp
def observed(x_MI, moment_II):
    """x; the gradient of `moment` is Σ x xᵀ over the rows whose own gradient is not zero."""
    return x_MI


def _observed_bwd(x_MI, g_MI):
    x_MI = jnp.where(jnp.any(g_MI != 0, axis=-1, keepdims=True), x_MI, 0).astype(jnp.float32)
    return g_MI, jnp.einsum("MI,MJ->IJ", x_MI, x_MI, precision="highest")


observed.defvjp(lambda x_MI, moment_II: (x_MI, x_MI), _observed_bwd)


def _rows_product(eqn: str, x, w: RowsWeight, dtype):
    """A head of which some outputs are trained: theirs take the place of the base's."""
    (x_axes, w_axes), y_axes = eqn.split("->")[0].split(","), eqn.split("->")[1]
    out = w_axes[w.axis]
    rows_axes = out + w_axes[1 - w.axis]
    y: Any = einsum(eqn, x, w.base, dtype)
    trained: Any = product(f"{x_axes},{rows_axes}->{y_axes}", x, w.rows, y.dtype)
    at = tuple(w.indices if c == out else slice(None) for c in y_axes)
    return y.at[at].set(trained)


def _stacked_product(eqn: str, x, w: StackedLora, dtype):
    x_axes, ins, outs, y_axes, forward = _sides(eqn, w.a.ndim - 2)
    rank, batch = next(c for c in "R" + string.ascii_lowercase if c not in eqn), x_axes[0]
    h_axes = "".join(c for c in x_axes if c not in ins) + rank
    which = jnp.repeat(w.which, x.shape[0] // w.which.shape[0])  # where rows and tokens are one axis
    a, b = _chosen(w.a, which), _chosen(w.b, which)
    first, second = (a, b) if forward else (b, a)
    first_axes, second_axes = (ins + rank, rank + outs) if forward else (rank + ins, outs + rank)
    gain = None if w.gain is None else _chosen(w.gain, which, 1.0)
    if gain is not None and not forward:
        x = (x.astype(jnp.float32) * _along(gain, batch + ins, x_axes)).astype(x.dtype)
    h: Any = product(f"{x_axes},{batch}{first_axes}->{h_axes}", x, first)
    delta: Any = product(f"{h_axes},{batch}{second_axes}->{y_axes}", h, second, jnp.float32)
    y = einsum(eqn, x, w.base, jnp.float32) + delta
    if gain is not None and forward:
        y = y * _along(gain, batch + outs, y_axes)
    return y.astype(dtype or x.dtype)


def _chosen(x, which, other: float = 0.0):
    """x[which], `other` where that is -1."""
    rows = x[jnp.maximum(which, 0)]
    return jnp.where((which >= 0).reshape(-1, *(1,) * (rows.ndim - 1)), rows, jnp.asarray(other, rows.dtype))


def dropout(x, w: LoraWeight):
    """The low-rank branch's input: x with a share w.dropout of its elements zeroed, the rest scaled up. With
    a key a row each row's share is drawn from its own."""
    if w.rng is None or w.dropout == 0.0:
        return x
    if w.rng.ndim:
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - w.dropout, x.shape[1:]))(w.rng)
    else:
        keep = jax.random.bernoulli(w.rng, 1.0 - w.dropout, x.shape)
    return jnp.where(keep, x / (1.0 - w.dropout), 0).astype(x.dtype)


def lookup(w, ids, dtype):
    """Rows of a table [V, *out] of any leaf type as [*ids, *out]. Of a LoraWeight a row is
    base[id] + scale · a[id] b, without dropout, as in PEFT."""
    if isinstance(w, NoisyEmbedding | ObservedWeight):
        return lookup(w.base, ids, dtype)
    if isinstance(w, RowsWeight):
        rows = jnp.arange(w.rows.shape[0], dtype=jnp.int32)
        slot = jnp.full(w.base.shape[0], -1, jnp.int32).at[w.indices].set(rows)[ids]
        trained = w.rows[jnp.maximum(slot, 0)].astype(dtype)
        return jnp.where(slot[..., None] >= 0, trained, lookup(w.base, ids, dtype))
    axes, letters = string.ascii_lowercase[: ids.ndim], "DEFGH"
    if isinstance(w, LoraWeight):
        h = (w.a[ids] * w.scale).astype(dtype)
        outs = letters[: w.b.ndim - 1]
        delta: Any = product(f"{axes}R,R{outs}->{axes}{outs}", h, w.b, jnp.float32)
        y = lookup(w.base, ids, jnp.float32) + delta
        return (y if w.m is None else y * output_gain(w)).astype(dtype)
    if isinstance(w, StackedLora):
        which = w.which.reshape(-1, *(1,) * (ids.ndim - 1))
        h = w.a[jnp.maximum(which, 0), ids].astype(dtype)
        outs = letters[: w.b.ndim - 2]
        b = _chosen(w.b, w.which)
        delta: Any = product(f"{axes}R,{axes[0]}R{outs}->{axes}{outs}", h, b, jnp.float32)
        y = lookup(w.base, ids, jnp.float32) + delta
        if w.gain is not None:
            y = y * _along(_chosen(w.gain, w.which, 1.0), axes[0] + outs, axes + outs)
        return y.astype(dtype)
    return w[ids].astype(dtype)


def embed(w, tokens_BT, segments_BT, dtype, scale: float | None = None):
    """Rows of an embedding table [V, D], times `scale` rounded to `dtype`, as [B, T, D]. NEFTune's noise is
    added to that and has the width alpha / sqrt(T' D), T' the length of the token's own document (segment),
    so that packing does not change it."""
    if shards("X") > 1:
        # A device looks its part of the hidden axis up for all tokens; one exchange gives each its own.
        x_GXD = shard(lookup(w, by_device(tokens_BT), dtype), "O_Z")
        x_BTD = by_row(shard(x_GXD, "X__"), *tokens_BT.shape)
    else:
        x_BTD = lookup(w, tokens_BT, dtype)
    if scale is not None:
        x_BTD = x_BTD * jnp.asarray(scale, dtype)
    if not isinstance(w, NoisyEmbedding):
        return x_BTD
    length_BT = jnp.sum(segments_BT[:, :, None] == segments_BT[:, None, :], axis=-1)
    width_BT = w.alpha * jax.lax.rsqrt((length_BT * x_BTD.shape[-1]).astype(jnp.float32))
    noise = jax.random.uniform(w.rng, x_BTD.shape, jnp.float32, -1.0, 1.0) * width_BT[..., None]
    return x_BTD + noise.astype(dtype)
