"""Attention a block of queries and of keys at a time, in plain jax: any facts, on any device.

The softmax is kept as a running maximum and sum over the blocks of keys (Rabe & Staats, arXiv:2112.05682; Dao
et al., arXiv:2205.14135), so that memory grows with the row's length and not its square; blocks of keys that
no query of a block sees are not visited, so that packed documents and windows cost what they are."""

import jax
import jax.numpy as jnp

from ftjax.ops import target
from ftjax.ops.attention.facts import UNSEEN, Facts, pad, pad_rows, span, visible, visible_blocks

DEVICE, INTERPRET = None, False  # runs on any
# The most queries and keys of a block: on a CPU what its caches hold, elsewhere what fills the chip.
BLOCKS = {"cpu": 128, "gpu": 512, "tpu": 512}


def refuses(facts: Facts, q_BTNH, k_BSKH, v_BSKH) -> str | None:
    """Takes everything."""


def blocks(T: int, S: int) -> tuple[int, int]:
    """(queries, keys) of a block."""
    most = BLOCKS[target.kind()]
    return min(most, -(-T // 16) * 16), min(most, -(-S // 16) * 16)


def _dot(eqn: str, x, y):
    return jnp.einsum(eqn, x, y, preferred_element_type=jnp.float32)


def _queries(x_BTNH, K: int, block: int):
    """[B, blocks, K, G, block, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T // block, block, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)


def _rows(x):
    """The inverse of _queries."""
    B, Q, K, G, block, H = x.shape
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(B, Q * block, K * G, H)


def _keys(x_BSKH, block: int):
    """[B, blocks, K, block, H]."""
    B, S, K, H = x_BSKH.shape
    return x_BSKH.reshape(B, S // block, block, K, H).transpose(0, 1, 3, 2, 4)


def _setup(q_BTNH, k_BSKH, v_BSKH, queries, keys, window, facts: Facts):
    """What both passes walk over: ([B·blocks, …] of queries, their (row, first and last block of keys) and
    (segments, positions)), and the blocks of keys with theirs."""
    T, S, K = q_BTNH.shape[1], k_BSKH.shape[1], k_BSKH.shape[2]
    block_q, block_k = blocks(T, S)
    queries, keys = pad_rows(queries, keys, block_q, block_k)
    first, end = span(visible_blocks(queries, keys, window, facts.own_row, block_q, block_k))
    B, Q = first.shape
    row = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, Q))

    def flat(x):
        return x.reshape(B * Q, *x.shape[2:])

    walk = jax.tree.map(flat, (row, first, end, tuple(x.reshape(B, Q, block_q) for x in queries)))

    def each(x_BTNH):
        return flat(_queries(pad(x_BTNH, 1, block_q), K, block_q))

    k, v = (_keys(pad(x, 1, block_k), block_k) for x in (k_BSKH, v_BSKH))
    return walk, each, k, v, tuple(x.reshape(B, -1, block_k) for x in keys)


def _take(x, row, j):
    return jax.lax.dynamic_slice(x, (row, j) + (0,) * (x.ndim - 2), (1, 1, *x.shape[2:]))[0, 0]


def _logits(q_KGTH, k_KSH, facts: Facts):
    """(logits, the cap's slope or None), float32 [K, G, T, S]."""
    logits = _dot("KGTH,KSH->KGTS", q_KGTH, k_KSH) * facts.scale
    if facts.softcap is None:
        return logits, None
    capped = jnp.tanh(logits / facts.softcap)
    return facts.softcap * capped, 1.0 - capped * capped


def forward(facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window):
    """(out [B, T, N, H of v], log-sum-exp float32 [B, N, T])."""
    B, T, U = *q_BTNH.shape[:2], v_BSKH.shape[3]
    walk, each, k, v, keys = _setup(q_BTNH, k_BSKH, v_BSKH, queries, keys, window, facts)

    def one(_, of):
        q_KGTH, (row, first, end, where) = of

        def add(j, carry):
            top, total, out = carry
            seen = visible(where, tuple(_take(x, row, j) for x in keys), window)
            logits = jnp.where(seen, _logits(q_KGTH, _take(k, row, j), facts)[0], UNSEEN)
            new_top = jnp.maximum(top, logits.max(-1))
            exp = jnp.where(seen, jnp.exp(logits - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + exp.sum(-1)
            more = _dot("KGTS,KSH->KGTH", exp.astype(v.dtype), _take(v, row, j))
            return new_top, total, out * shrink[..., None] + more

        shape = q_KGTH.shape[:3]
        start = jnp.full(shape, UNSEEN, jnp.float32), jnp.zeros(shape), jnp.zeros((*shape, U))
        top, total, out = jax.lax.fori_loop(first, end, add, start)
        total = jnp.maximum(total, 1e-30)
        return None, ((out / total[..., None]).astype(q_BTNH.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(one, None, (each(q_BTNH), walk))
    out = _rows(out.reshape(B, -1, *out.shape[1:]))[:, :T]
    lse = _rows(lse.reshape(B, -1, *lse.shape[1:], 1))[:, :T, :, 0]
    return out, lse.transpose(0, 2, 1)


def backward(
    facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window, out_BTNH, lse_BNT, delta_BNT, g_BTNH
):
    """(dq, dk, dv); `delta_BNT` is the sum of out · g over the head."""
    del out_BTNH
    B, T, S, K = q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1], k_BSKH.shape[2]
    walk, each, k, v, keys = _setup(q_BTNH, k_BSKH, v_BSKH, queries, keys, window, facts)
    per_query = (each(x.transpose(0, 2, 1)[..., None]) for x in (lse_BNT, delta_BNT))

    def one(sums, of):
        q_KGTH, g_KGTH, lse, delta, (row, first, end, where) = of

        def add(j, carry):
            dq, dk, dv = carry
            k_KSH, v_KSH = _take(k, row, j), _take(v, row, j)
            seen = visible(where, tuple(_take(x, row, j) for x in keys), window)
            logits, slope = _logits(q_KGTH, k_KSH, facts)
            p = jnp.where(seen, jnp.exp(logits - lse), 0.0)
            d_logits = p * (_dot("KGTH,KSH->KGTS", g_KGTH, v_KSH) - delta) * facts.scale
            if slope is not None:
                d_logits = d_logits * slope
            p, d_logits = p.astype(v.dtype), d_logits.astype(q_KGTH.dtype)
            dq = dq + _dot("KGTS,KSH->KGTH", d_logits, k_KSH)
            dk = _add(dk, row, j, _dot("KGTS,KGTH->KSH", d_logits, q_KGTH))
            dv = _add(dv, row, j, _dot("KGTS,KGTH->KSH", p, g_KGTH))
            return dq, dk, dv

        start = jnp.zeros(q_KGTH.shape, jnp.float32), *sums
        dq, *sums = jax.lax.fori_loop(first, end, add, start)
        return tuple(sums), dq.astype(q_BTNH.dtype)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(one, start, (each(q_BTNH), each(g_BTNH), *per_query, walk))

    def whole(x, dtype):
        return x.transpose(0, 1, 3, 2, 4).reshape(B, -1, K, x.shape[-1])[:, :S].astype(dtype)

    dq = _rows(dq.reshape(B, -1, *dq.shape[1:]))[:, :T]
    return dq, whole(dk, k_BSKH.dtype), whole(dv, v_BSKH.dtype)


def _add(x, row, j, part):
    at = (row, j) + (0,) * (x.ndim - 2)
    return jax.lax.dynamic_update_slice(x, _take(x, row, j)[None, None] + part[None, None], at)
