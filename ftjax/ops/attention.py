"""Attention over packed rows."""

import jax
import jax.numpy as jnp

from ftjax.ops.linear import product

QUERY_BLOCK = 1024  # longer rows are taken a block of queries at a time, so that no [T, S] array of them exists


def attention(q_BTNH, k_BSKH, v_BSKH, queries, keys, *, scale: float, window=None, softcap=None):
    """Grouped-query causal attention within segments, softmax in float32. Ainslie et al. 2023, arXiv:2305.13245.

    `queries` and `keys` are (segments, positions), int32 [B, T] and [B, S]. Query t sees key s where both are in
    the same segment, s is not later, and, given `window`, less than `window` positions before. `window` may be a
    traced scalar. A query that sees no key (padding) returns a finite value that means nothing. Result [B, T, N, H].
    """
    block = jax.checkpoint(_attend, static_argnums=(5, 7))
    T = q_BTNH.shape[1]
    if T <= QUERY_BLOCK:
        return _attend(q_BTNH, k_BSKH, v_BSKH, queries, keys, scale, window, softcap)
    out = [
        block(
            q_BTNH[:, i : i + QUERY_BLOCK],
            k_BSKH,
            v_BSKH,
            tuple(x[:, i : i + QUERY_BLOCK] for x in queries),
            keys,
            scale,
            window,
            softcap,
        )
        for i in range(0, T, QUERY_BLOCK)
    ]
    return jnp.concatenate(out, axis=1)


def _attend(q_BTNH, k_BSKH, v_BSKH, queries, keys, scale, window, softcap):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    (q_segments, q_positions), (k_segments, k_positions) = queries, keys
    distance_BTS = q_positions[:, :, None] - k_positions[:, None, :]
    mask_BTS = (q_segments[:, :, None] == k_segments[:, None, :]) & (distance_BTS >= 0)
    if window is not None:
        mask_BTS &= distance_BTS < window
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    probs = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits, -1e30), axis=-1)
    return product("BKGTS,BSKH->BTKGH", probs.astype(v_BSKH.dtype), v_BSKH).reshape(B, T, N, H)
