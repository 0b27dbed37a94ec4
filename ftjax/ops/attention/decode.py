"""Attention of one new token a row over a cache that is read as it lies."""

import jax.numpy as jnp


def decode_attention(
    q_BTNH,
    k_BKSH,
    v_BKSH,
    new_k_BTKH,
    new_v_BTKH,
    queries,
    past,
    *,
    scale: float,
    window=None,
    softcap: float | None = None,
    sinks=None,
    chunk=None,
):
    """What `attention` gives for a single token (T = 1) whose own key and value are not in the cache yet.

    `queries` are (segments, positions) of the token, [B, 1], `past` those of the cache's slots, [B, S]: a
    token sees the slots of its segment that are not later, and always itself. The rest as of `attention`.
    Both products are batched over (B, K), the cache's own order, so that nothing of it is transposed and a
    compiler may read a layer where it lies in the stack. Result [B, 1, N, H], H that of v.
    """
    B, T, N, H = q_BTNH.shape
    assert T == 1, T
    K = k_BKSH.shape[1]
    q_BKGH = q_BTNH.reshape(B, K, N // K, H)
    new_k_BKH, new_v_BKH = new_k_BTKH[:, 0].astype(k_BKSH.dtype), new_v_BTKH[:, 0].astype(v_BKSH.dtype)
    visible_BS = _visible(queries, past, window, chunk)[:, None, None]

    def cap(logits):
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    logits_BKGS = cap(_dot("BKGH,BKSH->BKGS", q_BKGH, k_BKSH) * scale)
    logits_BKGS = jnp.where(visible_BS, logits_BKGS, -1e30)
    own_BKG1 = cap(_dot("BKGH,BKH->BKG", q_BKGH, new_k_BKH) * scale)[..., None]
    top = jnp.maximum(jnp.max(logits_BKGS, axis=-1, keepdims=True), own_BKG1)
    sink = 0.0
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(K, -1, 1)
        top = jnp.maximum(top, sink)
        sink = jnp.exp(sink - top)
    exp_BKGS, own_BKG1 = jnp.exp(logits_BKGS - top), jnp.exp(own_BKG1 - top)
    total = jnp.sum(exp_BKGS, axis=-1, keepdims=True) + own_BKG1 + sink
    out_BKGH = _dot("BKGS,BKSH->BKGH", exp_BKGS.astype(v_BKSH.dtype), v_BKSH)
    out_BKGH = (out_BKGH + own_BKG1 * new_v_BKH[:, :, None].astype(jnp.float32)) / total
    return out_BKGH.astype(q_BTNH.dtype).reshape(B, T, N, v_BKSH.shape[-1])


def _visible(queries, past, window, chunk):
    """Which slots each row's token sees, [B, S]."""
    (segments_B1, positions_B1), (segments_BS, positions_BS) = queries, past
    distance_BS = positions_B1 - positions_BS
    mask_BS = (segments_B1 == segments_BS) & (distance_BS >= 0)
    if window is not None:
        mask_BS &= distance_BS < window
    if chunk is not None:
        mask_BS &= positions_B1 // chunk == positions_BS // chunk
    return mask_BS


def _dot(eqn: str, x, y):
    return jnp.einsum(eqn, x, y, preferred_element_type=jnp.float32)
