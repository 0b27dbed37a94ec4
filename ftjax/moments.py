"""How an optimiser's moments are kept between steps: in fewer bits, or in the host's memory.

In 8 bits a moment is cut into blocks, each scaled by its largest magnitude, and every element is a code of
dynamic tree quantisation (Dettmers et al. 2022, arXiv:2110.02861, section 3 and appendix F; blocks of 256 as
in bitsandbytes): code 2^i + k, k < 2^i, is the middle of the k-th of 2^i equal parts of the decade from 0.1
to 1 times 10^(i - top). So codes are found and read by arithmetic, without a table. Two things are otherwise:

Rounding is stochastic. A second moment falls by a thousandth a step, less than half the distance between
codes (or between bfloat16 numbers), so that rounded to the nearest it would never fall. The dither is a hash
of the step and of the element's place in its weight, and does not depend on how the weight is sharded.

A second moment that is not zero never rounds to zero, which would make its element's step m / eps.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from ftjax.weights import flatten, unflatten

BLOCK = 256
SMALL = 4096  # matrices of fewer elements stay in float32 and on the device, as in bitsandbytes
SIGNED_TOP, UNSIGNED_TOP = 6, 7  # decades below the largest: codes 1 … 2^(top + 1) - 1, and 0

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class Moment8(struct.PyTreeNode):
    """`codes` int8, or uint8 of what is never negative, shaped as the weight; `scale` float32 is what the
    block's largest code stands for, each axis shorter by the block's length there."""

    codes: jax.Array
    scale: jax.Array


def block_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A block's length along each axis: the last axis' largest divisor up to 256; where that is short, the
    axes before it take part, too. It depends on the weight's shape alone."""
    block, room = [1] * len(shape), BLOCK
    for i in reversed(range(len(shape))):
        block[i] = max(d for d in range(1, min(room, shape[i]) + 1) if shape[i] % d == 0)
        room //= block[i]
        if math.prod(block) >= BLOCK // 4:
            break
    return tuple(block)


def _apart(x, block):
    """[d0 / b0, b0, d1 / b1, b1, …]."""
    return x.reshape([n for d, b in zip(x.shape, block, strict=True) for n in (d // b, b)])


def _spread(scale, shape, block):
    inner = tuple(range(1, 2 * len(block), 2))
    wide = jnp.broadcast_to(
        jnp.expand_dims(scale, inner), [n for s, b in zip(scale.shape, block, strict=True) for n in (s, b)]
    )
    return wide.reshape(shape)


def _power(base: float, x):
    return jnp.exp2(x.astype(jnp.float32) * math.log2(base))


def code_value(code, top: int):
    """What a code from 0 stands for, as a share of 1: float32."""
    octave = 31 - jax.lax.clz(jnp.maximum(code, 1).astype(jnp.int32))
    size = (1 << octave).astype(jnp.float32)
    value = (0.1 + 0.9 * (code.astype(jnp.float32) - size + 0.5) / size) * _power(10.0, octave - top)
    return jnp.where(code > 0, value, 0.0)


def _largest(top: int) -> float:
    return 1.0 - 0.45 / 2**top


def quantise(x, signed: bool, dither) -> Moment8:
    """`x` float32 as codes; `dither` [0, 1) like x: at 0.5 each is rounded to the nearest code, where it is
    random to one that is right on average."""
    top = SIGNED_TOP if signed else UNSIGNED_TOP
    block = block_shape(x.shape)
    scale = jnp.max(jnp.abs(_apart(x, block)), axis=tuple(range(1, 2 * x.ndim, 2))) / _largest(top)
    share = jnp.abs(x) / _spread(jnp.where(scale > 0, scale, 1.0), x.shape, block)
    octave = jnp.floor(jnp.log10(jnp.maximum(share, 1e-30))).astype(jnp.int32) + 1 + top
    octave = jnp.clip(octave, 0, top)
    size = (1 << octave).astype(jnp.float32)
    place = size * (1.0 + (share * _power(10.0, top - octave) - 0.1) / 0.9) - 0.5
    below = jnp.clip(jnp.floor(place), 0, 2 ** (top + 1) - 2).astype(jnp.int32)
    low, high = code_value(below, top), code_value(below + 1, top)
    code = below + (dither < (share - low) / (high - low))
    if not signed:
        return Moment8(jnp.where(x > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8), scale)
    return Moment8(jnp.where(x < 0, -code, code).astype(jnp.int8), scale)


def dequantise(m: Moment8):
    """float32."""
    signed = m.codes.dtype == jnp.int8
    block = tuple(d // s for d, s in zip(m.codes.shape, m.scale.shape, strict=True))
    code = m.codes.astype(jnp.int32)
    value = code_value(jnp.abs(code), SIGNED_TOP if signed else UNSIGNED_TOP)
    return jnp.where(code < 0, -value, value) * _spread(m.scale, m.codes.shape, block)


def _bits(shape, step, salt: int):
    """uint32, a hash of (step, salt, the element's index): the finaliser "lowbias32" of Chris Wellons'
    hash-prospector (in the public domain)."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    h = index ^ (step.astype(jnp.uint32) * np.uint32(0x9E3779B9) + np.uint32(salt))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return h ^ (h >> 16)


def _to_bfloat16(x, bits):
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def weight_of(path, known: Mapping[tuple, Any]) -> tuple | None:
    """The path of the weight that a leaf of an optimiser's state at `path` belongs to: the end of its own."""
    if path and str(path[-1]) in (".codes", ".scale"):
        path = path[:-1]
    return next((path[i:] for i in range(len(path)) if path[i:] in known), None)


def _weights(tree) -> dict[tuple, Any]:
    return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


class Stored(NamedTuple):
    """The state of `stored`: how often it was updated, and the inner state with its moments as they are
    kept."""

    count: jax.Array
    inner: Any


def is_small(path: str, leaf, stacks: Mapping[str, int]) -> bool:
    """Whether one of the matrices that `leaf` stacks (along stacks[path] axes) has few elements."""
    return math.prod(leaf.shape[stacks[path] :]) < SMALL


def stored(
    tx: optax.GradientTransformation, dtype: Literal["bfloat16", "int8"], stacks: Mapping[str, int]
) -> optax.GradientTransformation:
    """`tx` with its moments (leaves of its state that are shaped as their weight) kept in `dtype`, and in
    float32 while it works; in int8 small ones stay in float32. `stacks` as of `is_small`."""

    def keep(state, params, step):
        known = _weights(params)

        def one(path, x):
            weight = weight_of(path, known)
            if weight is None or x.shape != known[weight].shape:
                return x
            name = "/".join(k.key for k in weight)
            bits = _bits(x.shape, step, zlib.crc32(jax.tree_util.keystr(path).encode()))
            if dtype == "bfloat16":
                return _to_bfloat16(x, bits)
            if is_small(name, x, stacks) or math.prod(block_shape(x.shape)) < 16:
                return x
            dither = (bits >> 8).astype(jnp.float32) * 2.0**-24
            return quantise(x, signed=".nu" not in map(str, path), dither=dither)

        return jax.tree_util.tree_map_with_path(one, state)

    def read(state):
        def one(x):
            if isinstance(x, Moment8):
                return dequantise(x)
            return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

        return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Moment8))

    def init(params):
        """Moments begin at 0, whose codes and scales are 0: made so, and not for the compiler to compute."""
        count, inner = jnp.zeros((), jnp.int32), tx.init(params)
        kept = jax.eval_shape(keep, inner, params, count)

        def one(x, shape):
            same = jax.tree.structure(shape) == jax.tree.structure(x) and x.dtype == shape.dtype
            return x if same else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)

        return Stored(count, jax.tree.map(one, inner, kept))

    def update(updates, state, params=None):
        shapes = updates
        updates, inner = tx.update(updates, read(state.inner), params)
        count: Any = optax.safe_increment(state.count)
        return updates, Stored(count, keep(inner, shapes, count))

    return optax.GradientTransformation(init, update)


def one_by_one(
    make: Callable[[str], optax.GradientTransformation], stacks: Mapping[str, int], offload: bool
) -> optax.GradientTransformationExtraArgs:
    """`make(path)` for each weight by itself, one after the other, once all gradients are there: while they
    are formed, when memory is scarcest, moments take only what they are stored in.

    With `offload` they lie in the host's memory meanwhile, but for small ones. The update then takes
    `finite`: where that is False they stay as they are, since what lies in the host's memory cannot be chosen
    from outside.
    """

    def place(state, params, space):
        if not offload:
            return state
        known = _weights(params)

        def one(path, x):
            weight = weight_of(path, known)
            if weight is None:
                return x
            small = is_small("/".join(k.key for k in weight), known[weight], stacks)
            return x if small else jax.device_put(x, space)

        return jax.tree_util.tree_map_with_path(one, state)

    def init(params):
        parts = {path: unflatten({path: x}) for path, x in flatten(params).items()}
        return {path: place(make(path).init(part), part, HOST) for path, part in parts.items()}

    def update(updates, state, params=None, *, finite=True, **extra):
        del extra
        weights, after, out, done = flatten(params), {}, {}, []
        for path, u in flatten(updates).items():
            # The one before the last must be done before this one's moments begin to come.
            wait = done[-2:][:1]
            u, old, _ = jax.lax.optimization_barrier((u, state[path], wait))
            part = unflatten({path: u})
            old = place(old, part, DEVICE)
            u, new = make(path).update(part, old, unflatten({path: weights[path]}))
            if offload:
                new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
            out[path] = flatten(u)[path]
            after[path] = place(new, part, HOST)
            done.append(jax.tree.leaves(new)[-1])  # not the update, which need not be an array of its own
        return unflatten(out), after

    return optax.GradientTransformationExtraArgs(init, update)


def in_host_memory(x) -> bool:
    """Of an array or a tracer."""
    return jax.typeof(x).memory_space == HOST
