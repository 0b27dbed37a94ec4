"""What linear-attention layers are made of: the gated delta rule, the short convolution, the gated norm."""

import functools

import jax
import jax.numpy as jnp

from ftjax.ops.layers import recomputed, rms_norm

CHUNK = 64  # tokens that the chunked form takes at once


def causal_conv(x_BTC, w_CX, segments_BT, tail=None):
    """Depthwise causal convolution of width X along each document: y_t = sum over d < X of w[X-1-d] x_{t-d}.

    `tail` is what came before: (x [B, X-1, C], segments [B, X-1]) of the last tokens that are not padding,
    on the right, in segment 0 where there are fewer. With it, padding inside a document is skipped (a cache
    may hold some); without it a document's tokens must be contiguous. Returns (y [B, T, C] in x's dtype, zero
    on padding, and the tail after these tokens). Products and sums are float32.
    """
    (B, T, C), X = x_BTC.shape, w_CX.shape[1]
    first = tail is None
    if tail is None:
        tail = jnp.zeros((B, X - 1, C), x_BTC.dtype), jnp.zeros((B, X - 1), segments_BT.dtype)
    x_BSC = jnp.concatenate([tail[0].astype(x_BTC.dtype), x_BTC], axis=1)
    segments_BS = jnp.concatenate([tail[1], segments_BT], axis=1)
    live_BS = segments_BS > 0
    order_BS = jnp.argsort(live_BS, axis=1, stable=True)  # padding goes left, tokens keep their order
    dense_BSC = jnp.take_along_axis(x_BSC, order_BS[:, :, None], axis=1)
    dense_segments_BS = jnp.take_along_axis(segments_BS, order_BS, axis=1)
    tail = dense_BSC[:, T:], dense_segments_BS[:, T:]
    if first:  # no gathers in training
        return _conv(x_BTC, w_CX, segments_BT), tail
    y_BSC = _conv(dense_BSC, w_CX, dense_segments_BS)
    count_BS = jnp.cumsum(live_BS, axis=1)
    at_BT = (X - 1 + T - count_BS[:, -1:] + count_BS - 1)[:, X - 1 :]
    y_BTC = jnp.take_along_axis(y_BSC, jnp.where(segments_BT > 0, at_BT, 0)[:, :, None], axis=1)
    return jnp.where(segments_BT[:, :, None] > 0, y_BTC, jnp.zeros_like(y_BTC)), tail


@jax.checkpoint  # else each of the X shifted copies is kept in float32 for the gradient
def _conv(x_BTC, w_CX, segments_BT):
    T, X = x_BTC.shape[1], w_CX.shape[1]
    x_BSC = jnp.pad(x_BTC.astype(jnp.float32), ((0, 0), (X - 1, 0), (0, 0)))
    segments_BS = jnp.pad(segments_BT, ((0, 0), (X - 1, 0)))
    y_BTC = jnp.zeros(x_BTC.shape, jnp.float32)
    for i in range(X):
        seen_BT = (segments_BS[:, i : i + T] == segments_BT) & (segments_BT > 0)
        y_BTC += jnp.where(seen_BT[:, :, None], x_BSC[:, i : i + T], 0.0) * w_CX[:, i].astype(jnp.float32)
    return y_BTC.astype(x_BTC.dtype)


def l2_normalize(x, eps: float = 1e-6):
    """x / sqrt(sum of x² over the last axis + eps), in float32 and left there."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def gated_rms_norm(x, gate, scale, eps: float):
    """x / rms(x) · scale · silu(gate) over the last axis, in x's dtype. Qwen3-Next's order: the normed x is
    rounded to x's dtype before the scale, the gate is applied in float32."""

    @recomputed
    def norm(x, gate, scale):
        scaled = rms_norm(x, scale, eps)
        return (scaled.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)

    return norm(x, gate, scale)


def gated_delta_rule(q_BTKH, k_BTKH, v_BTNX, log_decay_BTN, beta_BTN, segments_BT, positions_BT, state=None):
    """Linear attention whose state is decayed and corrected by every token. Yang et al., arXiv:2412.06464:

        S_t = exp(g_t) S_{t-1} + k_t ⊗ beta_t (v_t - exp(g_t) S_{t-1}ᵀ k_t),    y_t = S_tᵀ q_t

    q and k come as they are used: Qwen3-Next's are `l2_normalize`d, q then times H**-0.5. Each of their K
    heads serves N / K consecutive heads of v. g is log_decay <= 0. Where positions are 0 a document starts
    with S = 0; a token of segment 0 is padding: it leaves S as it is and its y is zero. `state` [B, N, H, X]
    is S before the first token, zeros if None. Returns (y [B, T, N, X] in v's dtype, S after the last token,
    float32). Computed in float32; the gradient keeps nothing but the inputs and computes the rest again.
    """
    if state is None:
        B, _, N, X = v_BTNX.shape
        state = jnp.zeros((B, N, q_BTKH.shape[-1], X), jnp.float32)
    form = _step if v_BTNX.shape[1] == 1 else _chunks
    return form(q_BTKH, k_BTKH, v_BTNX, log_decay_BTN, beta_BTN, segments_BT, positions_BT, state)


_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _prepare(q_BTKH, k_BTKH, v_BTNX, log_decay_BTN, beta_BTN, segments_BT, positions_BT, state):
    """The arguments in float32 with N heads, zero on padding, which then changes nothing; and where a
    document starts, [B, T]."""
    live_BT = segments_BT > 0

    def clean(x):
        x = x.astype(jnp.float32)
        return jnp.where(live_BT.reshape(live_BT.shape + (1,) * (x.ndim - 2)), x, 0.0)

    groups = v_BTNX.shape[2] // q_BTKH.shape[2]
    q_BTNH, k_BTNH = (jnp.repeat(clean(x), groups, axis=2) for x in (q_BTKH, k_BTKH))
    rest = (clean(x) for x in (v_BTNX, log_decay_BTN, beta_BTN))
    return q_BTNH, k_BTNH, *rest, live_BT & (positions_BT == 0), state.astype(jnp.float32)


def _step(*args):
    """The rule itself, for one token."""
    q, k, v, g, beta, starts_BT, state = _prepare(*args)
    q, k, v, g, beta = (x[:, 0] for x in (q, k, v, g, beta))
    keep_BN = jnp.where(starts_BT, 0.0, jnp.exp(g))
    state = state * keep_BN[:, :, None, None]
    u_BNX = beta[:, :, None] * (v - _einsum("BNHX,BNH->BNX", state, k))
    state = state + k[:, :, :, None] * u_BNX[:, :, None, :]
    y_BNX = _einsum("BNHX,BNH->BNX", state, q)
    return y_BNX[:, None].astype(args[2].dtype), state


def _unit_lower_inverse(x):
    """(1 + x)⁻¹ of the strictly lower triangular x [..., C, C], by products alone: from the inverses of two
    neighbouring diagonal blocks A and D follows that of [[A, 0], [B, D]], [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]].

    A triangular solve would be a library call for each matrix, and two such calls at once can wait for each
    other for ever in XLA's CPU thread pool.
    """
    *lead, C, _ = x.shape
    size = 1 << (C - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, size - C)] * 2)
    inverse = jnp.ones((*lead, size, 1, 1), x.dtype)
    n = 1
    while n < size:
        m = size // (2 * n)
        a, d = jnp.moveaxis(inverse.reshape(*lead, m, 2, n, n), -3, 0)
        blocks = jnp.diagonal(x.reshape(*lead, m, 2 * n, m, 2 * n), axis1=-4, axis2=-2)
        b = jnp.moveaxis(blocks, -1, -3)[..., n:, :n]
        b = -_einsum("...IJ,...JK->...IK", _einsum("...IJ,...JK->...IK", d, b), a)
        top = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([b, d], axis=-1)], axis=-2)
        n *= 2
    return inverse[..., 0, :C, :C]


@jax.checkpoint
def _chunks(*args):
    """Chunks of C tokens one after the other, a chunk's tokens at once. With S the state before the chunk,
    u_t the corrected value that token t writes, d_ij the decay from token j to token i and c_i that from the
    chunk's start, both 0 where a document starts between,

        u_i + beta_i sum over j < i of d_ij (k_i·k_j) u_j = beta_i v_i - beta_i c_i Sᵀ k_i
        y_i = c_i Sᵀ q_i + sum over j <= i of d_ij (q_i·k_j) u_j

    a triangular system, solved for both terms on the right before S is known.
    """
    q, k, v, g, beta, starts_BT, state = _prepare(*args)
    (B, T, N, _), X = q.shape, v.shape[-1]
    C = min(CHUNK, T)
    L = -(-T // C)

    def split(x):
        """[B, T, N, …] as [L, B, N, C, …], zeros after the end."""
        x = jnp.pad(x, ((0, 0), (0, L * C - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(jnp.moveaxis(x.reshape(B, L, C, *x.shape[2:]), 3, 2), 1, 0)

    q, k, v, g, beta = (split(x) for x in (q, k, v, g, beta))
    document_LBNC = jnp.cumsum(split(starts_BT[:, :, None]), axis=3)  # counted within the chunk; N is 1

    row, column = jnp.arange(C)[:, None], jnp.arange(C)
    # Log decays are summed from each column's own token: the difference of two sums from the chunk's start
    # would lose the small decays after a large one, and those of a document after another's.
    ones_CC = (column <= row).astype(jnp.float32)
    sums = _einsum("IS,LBNSJ->LBNIJ", ones_CC, jnp.where(row > column, g[..., None], 0.0))
    same = (document_LBNC[..., :, None] == document_LBNC[..., None, :]) & (column <= row)
    decay_LBNCC = jnp.where(same, jnp.exp(sums), 0.0)
    start_LBNC = jnp.where(document_LBNC == 0, jnp.exp(sums[..., 0] + g[..., :1]), 0.0)

    system = jnp.where(column < row, _einsum("LBNIH,LBNJH->LBNIJ", k, k) * decay_LBNCC, 0.0) * beta[..., None]
    right = beta[..., None] * jnp.concatenate([v, k * start_LBNC[..., None]], axis=-1)
    solved = _einsum("LBNIJ,LBNJX->LBNIX", _unit_lower_inverse(system), right)
    per_chunk = (
        solved[..., :X],
        solved[..., X:],
        q * start_LBNC[..., None],
        _einsum("LBNIH,LBNJH->LBNIJ", q, k) * decay_LBNCC,
        k * decay_LBNCC[..., -1, :, None],
        start_LBNC[..., -1],
    )

    def chunk(state, x):
        u_BNCX, w_BNCH, q_BNCH, scores_BNCC, k_BNCH, start_BN = x
        u_BNCX = u_BNCX - _einsum("BNCH,BNHX->BNCX", w_BNCH, state)
        y_BNCX = _einsum("BNCH,BNHX->BNCX", q_BNCH, state) + _einsum("BNIJ,BNJX->BNIX", scores_BNCC, u_BNCX)
        state = state * start_BN[:, :, None, None] + _einsum("BNCH,BNCX->BNHX", k_BNCH, u_BNCX)
        return state, y_BNCX

    state, y_LBNCX = jax.lax.scan(chunk, state, per_chunk)
    y_BTNX = y_LBNCX.transpose(1, 0, 3, 2, 4).reshape(B, L * C, N, X)[:, :T]
    return y_BTNX.astype(args[2].dtype), state
