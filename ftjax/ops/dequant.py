"""What the codes of a quantised weight stand for: the inverse of ftjax.quant, made to be fused into the
product that reads it.

Codes of four bits are two to a byte, a block's first half with its second, so that they come apart as two
runs and not interleaved. Compiled for a TPU v5e (four layers of two 4096 × 14336 matrices, 2048 tokens,
forward and backward, jax 0.10.2), the program accesses 2.6 GB so, 12.1 with neighbours in a byte and 3.1 with
jax's own 4-bit integers; those, a program for CPU widens to bytes, all layers at once. A level is found by
four rounds of selects between constants, elementwise, so that it can be fused on TPU and GPU."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.ops import target
from ftjax.weights import QuantWeight

NESTED = 256  # scales that share a scale where they are quantised too

LEVELS: dict[str, np.ndarray] = {
    # The quantiles of a normal distribution, QLoRA, arXiv:2305.14314, appendix E
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
        + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
        + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
        + [0.7229568362236023, 1.0],
        np.float32,
    ),
    # bitsandbytes' 4-bit float: a sign, two bits of exponent, one of mantissa, over its largest
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / 12,
    # E2M1 of the OCP Microscaling Formats 1.0
    "mxfp4": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32),
}
FOUR_BITS = (*LEVELS, "int4")
FP8_MAX = 448.0  # e4m3's largest
POWERS = ("mxfp4",)  # kinds whose scales are powers of two, E8M0


def dequantise(w: QuantWeight, dtype):
    """The weight [*lead, *in, *out]: level times scale in float32, rounded once to `dtype`."""
    scale = scales(w)
    shape = (*scale.shape[: w.lead + 1], -1, *scale.shape[w.lead + 1 :])
    codes = w.codes.reshape(shape)
    if w.kind in FOUR_BITS:
        codes = jnp.concatenate([codes & 15, codes >> 4], w.lead + 1)
    x = levels(codes, w.kind) * jnp.expand_dims(scale, w.lead + 1)
    return x.reshape(w.shape).astype(dtype)


def levels(codes, kind: str):
    """Each code's level, float32."""
    if kind in LEVELS:
        return _select(LEVELS[kind], codes.astype(jnp.int32))
    return codes.astype(jnp.float32) - (8.0 if kind == "int4" else 0.0)


def _select(values: np.ndarray, index):
    """values[index], by selects: one round a bit of the index, the lowest first. XLA for CPU would write each
    round to memory; it gathers well."""
    if target.kind() == "cpu":
        return jnp.asarray(values).at[index].get(mode="promise_in_bounds")
    left = [jnp.float32(x) for x in values]
    bit = 0
    while len(left) > 1:
        odd = (index >> bit) & 1 == 1
        left = [jnp.where(odd, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
        bit += 1
    return left[0]


def scales(w: QuantWeight):
    """The scales [*lead, G, *out], float32."""
    if w.kind in POWERS:
        exponent = w.scale.astype(jnp.uint32)
        power = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
        power = jnp.where(exponent == 0, jnp.float32(2.0**-127), power)
        return jnp.where(exponent == 255, jnp.float32(jnp.nan), power)
    if w.nested is None:
        return w.scale.astype(jnp.float32)
    assert w.offset is not None
    lead, (groups, *outs) = w.scale.shape[: w.lead], w.scale.shape[w.lead :]
    size = groups * math.prod(outs)
    spread = jnp.broadcast_to(w.nested[..., None], (*w.nested.shape, NESTED))
    spread = spread.reshape(*lead, -1)[..., :size].reshape(*lead, *outs, groups)
    spread = jnp.moveaxis(spread, -1, w.lead)
    offset = w.offset.reshape(*lead, *(1,) * (1 + w.outs))
    return dynamic(w.scale) * spread + offset


def dynamic(codes):
    """The level of each code of bitsandbytes' signed 8-bit "dynamic" type (Dettmers 2016, arXiv:1511.04561):
    float32, by arithmetic, within rounding of its table of 256.

    127 is 0 and 255 is 1; k above or below 127, with i = floor(log2 k), is the k - 2^i-th of 2^i equal steps
    in the decade that ends at 10^(i - 6), in its middle."""
    k = jnp.asarray(codes).astype(jnp.int32) - 127
    size = jnp.maximum(jnp.abs(k), 1)
    i = sum((size >= 2**n).astype(jnp.int32) for n in range(1, 7))
    i = jnp.asarray(i)
    decade = _select(np.array([10.0 ** (n - 6) for n in range(7)] + [0.0], np.float32), i)
    step = _select(np.array([2.0**-n for n in range(7)] + [0.0], np.float32), i)
    middle = 0.1 + 0.9 * ((size.astype(jnp.float32) + 0.5) * step - 1.0)
    value = jnp.sign(k).astype(jnp.float32) * decade * middle
    return jnp.where(k == 128, 1.0, value)
