"""Attention with all of a block of queries' logits at once: the fastest for short rows, where they fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.ops.attention.facts import UNSEEN, Facts, visible

QUERY_BLOCK = 1024  # longer rows are taken a block of queries at a time, so that no [T, S] array exists


def attention(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts: Facts):
    """`ops.attention` of facts of any kind."""
    T = q_BTNH.shape[1]
    if T <= QUERY_BLOCK:
        return _attend(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts)
    block = jax.checkpoint(_attend, static_argnums=7)
    out = []
    for i in range(0, T, QUERY_BLOCK):
        at = slice(i, i + QUERY_BLOCK)
        some = tuple(x[:, at] for x in queries)
        out.append(block(q_BTNH[:, at], k_BSKH, v_BSKH, sinks, some, keys, window, facts))
    return jnp.concatenate(out, axis=1)


def _dot(eqn: str, x, y):
    return jnp.einsum(eqn, x, y, preferred_element_type=jnp.float32)


def _by_kv_head(q_BTNH, K: int):
    """[B, T, N, H] as [B, K, T, G, H]: with the axes in this order the big products leave their result where
    the softmax reads it, and only q, k and v are ever transposed."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4)


def _by_query(x_BKTGH):
    B, K, T, G, H = x_BKTGH.shape
    return x_BKTGH.transpose(0, 2, 1, 3, 4).reshape(B, T, K * G, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts: Facts):
    return _attend_fwd(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts)[0]


def _attend_fwd(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts: Facts):
    K = k_BSKH.shape[2]
    q_BKTGH = _by_kv_head(q_BTNH, K)
    logits = _dot("BKTGH,BSKH->BKTGS", q_BKTGH, k_BSKH) * facts.scale
    if facts.softcap is not None:
        logits = facts.softcap * jnp.tanh(logits / facts.softcap)
    seen = visible(queries, keys, window)[:, None, :, None, :]
    logits = jnp.where(seen, logits, UNSEEN)
    top = jnp.max(logits, axis=-1, keepdims=True)
    sink = None
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(K, 1, -1, 1)
        top = jnp.maximum(top, sink)
        sink = jnp.exp(sink - top)
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    if sink is not None:
        total = total + sink
    exp = exp.astype(v_BSKH.dtype)
    out_BKTGH = (_dot("BKTGS,BSKH->BKTGH", exp, v_BSKH) / total).astype(q_BTNH.dtype)
    inputs = q_BKTGH, k_BSKH, v_BSKH, sinks, queries, keys, window
    return _by_query(out_BKTGH), (inputs, exp, sink, total, out_BKTGH)


def _attend_bwd(facts: Facts, residuals, g_BTNH):
    (q_BKTGH, k_BSKH, v_BSKH, sinks, *integers), exp, sink, total, out_BKTGH = residuals
    g_BKTGH = _by_kv_head(g_BTNH, k_BSKH.shape[2])
    # the softmax is exp / total; dividing g by total instead of exp spares a pass over [B, K, T, G, S]
    g_f32 = g_BKTGH.astype(jnp.float32) / total
    delta = jnp.sum(g_f32 * out_BKTGH.astype(jnp.float32), axis=-1, keepdims=True)
    g_BKTGH = g_f32.astype(v_BSKH.dtype)
    dv = _dot("BKTGS,BKTGH->BSKH", exp, g_BKTGH)
    d_logits = exp.astype(jnp.float32) * (_dot("BKTGH,BSKH->BKTGS", g_BKTGH, v_BSKH) - delta) * facts.scale
    if facts.softcap is not None:
        capped = jnp.tanh(_dot("BKTGH,BSKH->BKTGS", q_BKTGH, k_BSKH) * (facts.scale / facts.softcap))
        d_logits = d_logits * (1.0 - capped * capped)
    d_logits = d_logits.astype(q_BKTGH.dtype)
    dq = _by_query(_dot("BKTGS,BSKH->BKTGH", d_logits, k_BSKH))
    dk = _dot("BKTGS,BKTGH->BSKH", d_logits, q_BKTGH)
    # a sink is a key whose value is zero, so of its logit's gradient only -delta is left
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(sink * delta, axis=(0, 2)).reshape(sinks.shape).astype(sinks.dtype)
    none = jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), tuple(integers))
    return (
        dq.astype(q_BKTGH.dtype),
        dk.astype(k_BSKH.dtype),
        dv.astype(v_BSKH.dtype),
        d_sinks,
        *none,
    )


_attend.defvjp(_attend_fwd, _attend_bwd)
