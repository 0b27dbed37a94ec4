"""Attention on GPUs as Pallas kernels of our own, lowered by Triton: any facts and head sizes, and a cache.

FlashAttention-2's passes (Dao, arXiv:2307.08691): out and log-sum-exp; dq over blocks of queries; dk and dv
over blocks of keys. Each program walks only the blocks that the segments, positions and window of its own
block can reach, a range that is computed beforehand."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ftjax.ops.attention.facts import UNSEEN, Facts, pad, pad_rows, span, visible, visible_blocks

DEVICE = "gpu"
INTERPRET = False  # tests: the kernels run as plain jax, on any device
LOG2_E = math.log2(math.e)


def refuses(facts: Facts, q_BTNH, k_BSKH, v_BSKH) -> str | None:
    """Takes everything."""


def blocks(T: int, S: int, dims: tuple[int, int], dtype, backward: bool) -> tuple[int, int]:
    """(queries, keys) of a block: what the operands of two stages leave room for in 100 KiB of shared memory,
    which the smallest GPUs since Ampere have."""
    wide = max(map(_power, dims)) * jnp.dtype(dtype).itemsize // 2
    if wide <= 128:
        block_q, block_k = (64, 64) if backward else (128, 64)
    elif wide <= 256:
        block_q, block_k = (32, 32) if backward else (64, 32)
    else:
        block_q, block_k = 16, 16
    return min(block_q, _power(T)), min(block_k, _power(S))


def _power(n: int) -> int:
    """The least power of two from 16 on that holds n: what Triton takes as an axis of a product."""
    return max(16, pl.next_power_of_2(n))


def _warps(dims: tuple[int, int]) -> int:
    return 4 if max(dims) <= 64 else 8


def _dot(x, y, trans_a: bool = False, trans_b: bool = False):
    # the axes are named, for a transposition would be an instruction of its own
    axes = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _load(ref, dim: int, *at):
    """The rows `at` of a ref whose last axis is filled up from `dim` to a power of two, with zeros."""
    whole = ref.shape[-1]
    ref = ref.at[(*at, slice(None))] if at else ref
    if whole == dim:
        return plgpu.load(ref)
    some = jax.lax.broadcasted_iota(jnp.int32, ref.shape, len(ref.shape) - 1) < dim
    return plgpu.load(ref, mask=some, other=0.0)


def _store(ref, x, dim: int):
    some = None
    if x.shape[-1] != dim:
        some = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < dim
    plgpu.store(ref, x.astype(ref.dtype), mask=some)


def _logits(q, k, facts: Facts):
    """(logits times log2(e), the cap's slope or None)."""
    logits = _dot(q, k, trans_b=True)
    if facts.softcap is None:
        return logits * (facts.scale * LOG2_E), None
    capped = jnp.tanh(logits * (facts.scale / facts.softcap))
    return capped * (facts.softcap * LOG2_E), 1.0 - capped * capped


def _forward_kernel(
    q_ref, k_ref, v_ref, q_segments, q_positions, k_segments, k_positions, window, first, end,
    out_ref, lse_ref, *, facts: Facts, block_k: int, dims: tuple[int, int],
):  # fmt: skip
    q = _load(q_ref, dims[0])
    where = q_segments[...], q_positions[...]
    limit = None if window is None else window[...]

    def add(j, carry):
        top, total, out = carry
        at = pl.ds(j * block_k, block_k)
        logits, _ = _logits(q, _load(k_ref, dims[0], at), facts)
        seen = visible(where, (k_segments[at], k_positions[at]), limit)
        logits = jnp.where(seen, logits, UNSEEN)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        exp = jnp.where(seen, jnp.exp2(logits - new_top[:, None]), 0.0)
        shrink = jnp.exp2(top - new_top)
        v = _load(v_ref, dims[1], at)
        out = out * shrink[:, None] + _dot(exp.astype(v.dtype), v)
        return new_top, total * shrink + jnp.sum(exp, axis=1), out

    T = q.shape[0]
    start = jnp.full((T,), UNSEEN, jnp.float32), jnp.zeros((T,), jnp.float32)
    start = *start, jnp.zeros((T, v_ref.shape[-1]), jnp.float32)
    top, total, out = jax.lax.fori_loop(first[...], end[...], add, start)
    total = jnp.maximum(total, 1e-30)
    _store(out_ref, out / total[:, None], dims[1])
    lse_ref[...] = (top + jnp.log2(total)) * (1.0 / LOG2_E)


def _p_and_d_logits(q, k, v, g, lse, delta, seen, facts: Facts):
    """The softmax and the gradient by q · k (but for the scale), [queries, keys]."""
    logits, slope = _logits(q, k, facts)
    p = jnp.where(seen, jnp.exp2(logits - lse[:, None] * LOG2_E), 0.0)
    d_logits = p * (_dot(g, v, trans_b=True) - delta[:, None])
    return p, d_logits if slope is None else d_logits * slope


def _dq_kernel(
    q_ref, k_ref, v_ref, q_segments, q_positions, k_segments, k_positions, window, first, end, lse_ref,
    delta_ref, g_ref, dq_ref, *, facts: Facts, block_k: int, dims: tuple[int, int],
):  # fmt: skip
    q, g = _load(q_ref, dims[0]), _load(g_ref, dims[1])
    lse, delta = lse_ref[...], delta_ref[...]
    where = q_segments[...], q_positions[...]
    limit = None if window is None else window[...]

    def add(j, dq):
        at = pl.ds(j * block_k, block_k)
        k, v = _load(k_ref, dims[0], at), _load(v_ref, dims[1], at)
        seen = visible(where, (k_segments[at], k_positions[at]), limit)
        _, d_logits = _p_and_d_logits(q, k, v, g, lse, delta, seen, facts)
        return dq + _dot(d_logits.astype(k.dtype), k)

    dq = jax.lax.fori_loop(first[...], end[...], add, jnp.zeros(q.shape, jnp.float32))
    _store(dq_ref, dq * facts.scale, dims[0])


def _dkv_kernel(
    q_ref, k_ref, v_ref, q_segments, q_positions, k_segments, k_positions, window, first, end, lse_ref,
    delta_ref, g_ref, dk_ref, dv_ref, *, facts: Facts, block_q: int, dims: tuple[int, int],
):  # fmt: skip
    """The keys' refs hold this program's block; the queries' hold the row, of all heads of the group."""
    k, v = _load(k_ref, dims[0]), _load(v_ref, dims[1])
    where = k_segments[...], k_positions[...]
    limit = None if window is None else window[...]

    def head(n, carry):
        def add(i, carry):
            dk, dv = carry
            at = pl.ds(i * block_q, block_q)
            q, g = _load(q_ref, dims[0], at, n), _load(g_ref, dims[1], at, n)
            seen = visible((q_segments[at], q_positions[at]), where, limit)
            p, d_logits = _p_and_d_logits(q, k, v, g, lse_ref[n, at], delta_ref[n, at], seen, facts)
            dv = dv + _dot(p.astype(g.dtype), g, trans_a=True)
            return dk + _dot(d_logits.astype(q.dtype), q, trans_a=True), dv

        return jax.lax.fori_loop(first[...], end[...], add, carry)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[1], head, start)
    _store(dk_ref, dk * facts.scale, dims[0])
    _store(dv_ref, dv, dims[1])


def _call(kernel, name: str, out_shape, grid, in_specs, out_specs, dims, *args):
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=plgpu.CompilerParams(num_warps=_warps(dims), num_stages=2),
        interpret=INTERPRET,
        name=name,
    )(*args)


def _scalar(window):
    return None if window is None else jnp.asarray(window, jnp.int32).reshape(1)


def _by_query(G: int, block_q: int, S: int, dims: tuple[int, int], window):
    """Specs, on a grid of (blocks of queries, rows, heads): a block of queries and the whole row of keys."""
    wide_q, wide_v = map(_power, dims)
    window_spec = None if window is None else pl.BlockSpec((None,), lambda i, b, n: (0,))
    where_q = pl.BlockSpec((None, block_q), lambda i, b, n: (b, i))
    where_k = pl.BlockSpec((None, S), lambda i, b, n: (b, 0))
    bound = pl.BlockSpec((None, None), lambda i, b, n: (b, i))
    inputs = [
        pl.BlockSpec((None, block_q, None, wide_q), lambda i, b, n: (b, i, n, 0)),
        pl.BlockSpec((None, S, None, wide_q), lambda i, b, n: (b, 0, n // G, 0)),
        pl.BlockSpec((None, S, None, wide_v), lambda i, b, n: (b, 0, n // G, 0)),
        *(where_q, where_q, where_k, where_k, window_spec, bound, bound),
    ]
    per_query = pl.BlockSpec((None, None, block_q), lambda i, b, n: (b, n, i))
    like_out = pl.BlockSpec((None, block_q, None, wide_v), lambda i, b, n: (b, i, n, 0))
    return inputs, per_query, like_out


def forward(facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window):
    """(out [B, T, N, H of v], log-sum-exp float32 [B, N, T])."""
    (B, T, N, H), (_, S, K, U) = q_BTNH.shape, v_BSKH.shape
    dims = H, U
    block_q, block_k = blocks(T, S, dims, q_BTNH.dtype, backward=False)
    queries, keys = pad_rows(queries, keys, block_q, block_k)
    first, end = span(visible_blocks(queries, keys, window, facts.own_row, block_q, block_k))
    q = pad(q_BTNH, 1, block_q)
    k, v = pad(k_BSKH, 1, block_k), pad(v_BSKH, 1, block_k)
    inputs, per_query, like_out = _by_query(N // K, block_q, k.shape[1], dims, window)
    padded = q.shape[1]
    out, lse = _call(
        functools.partial(_forward_kernel, facts=facts, block_k=block_k, dims=dims),
        "attention_forward",
        (
            jax.ShapeDtypeStruct((B, padded, N, U), q.dtype),
            jax.ShapeDtypeStruct((B, N, padded), jnp.float32),
        ),
        (padded // block_q, B, N),
        inputs,
        (like_out, per_query),
        dims,
        *(q, k, v, *queries, *keys, _scalar(window), first, end),
    )
    return out[:, :T], lse[:, :, :T]


def backward(
    facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window, out_BTNH, lse_BNT, delta_BNT, g_BTNH
):
    """(dq, dk, dv); `delta_BNT` is the sum of out · g over the head."""
    del out_BTNH
    (B, T, N, H), (_, S, K, U) = q_BTNH.shape, v_BSKH.shape
    dims, G = (H, U), N // K
    block_q, block_k = blocks(T, S, dims, q_BTNH.dtype, backward=True)
    queries, keys = pad_rows(queries, keys, block_q, block_k)
    seen = visible_blocks(queries, keys, window, facts.own_row, block_q, block_k)
    q, g = pad(q_BTNH, 1, block_q), pad(g_BTNH, 1, block_q)
    k, v = pad(k_BSKH, 1, block_k), pad(v_BSKH, 1, block_k)
    lse, delta = pad(lse_BNT, 2, block_q), pad(delta_BNT, 2, block_q)
    whole_T, whole_S = q.shape[1], k.shape[1]
    wide_q, wide_v = map(_power, dims)

    inputs, per_query, like_out = _by_query(G, block_q, whole_S, dims, window)
    dq = _call(
        functools.partial(_dq_kernel, facts=facts, block_k=block_k, dims=dims),
        "attention_dq",
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        (whole_T // block_q, B, N),
        [*inputs, per_query, per_query, like_out],
        pl.BlockSpec((None, block_q, None, wide_q), lambda i, b, n: (b, i, n, 0)),
        dims,
        *(q, k, v, *queries, *keys, _scalar(window), *span(seen), lse, delta, g),
    )

    window_spec = None if window is None else pl.BlockSpec((None,), lambda j, b, m: (0,))
    where_q = pl.BlockSpec((None, whole_T), lambda j, b, m: (b, 0))
    where_k = pl.BlockSpec((None, block_k), lambda j, b, m: (b, j))
    bound = pl.BlockSpec((None, None), lambda j, b, m: (b, j))
    group = pl.BlockSpec((None, G, whole_T), lambda j, b, m: (b, m, 0))
    k_spec = pl.BlockSpec((None, block_k, None, wide_q), lambda j, b, m: (b, j, m, 0))
    v_spec = pl.BlockSpec((None, block_k, None, wide_v), lambda j, b, m: (b, j, m, 0))
    dk, dv = _call(
        functools.partial(_dkv_kernel, facts=facts, block_q=block_q, dims=dims),
        "attention_dkv",
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (whole_S // block_k, B, K),
        [
            pl.BlockSpec((None, whole_T, G, wide_q), lambda j, b, m: (b, 0, m, 0)),
            *(k_spec, v_spec, where_q, where_q, where_k, where_k, window_spec, bound, bound, group, group),
            pl.BlockSpec((None, whole_T, G, wide_v), lambda j, b, m: (b, 0, m, 0)),
        ],
        (k_spec, v_spec),
        dims,
        *(q, k, v, *queries, *keys, _scalar(window), *span(jnp.swapaxes(seen, 1, 2)), lse, delta, g),
    )
    return dq[:, :T], dk[:, :S], dv[:, :S]
