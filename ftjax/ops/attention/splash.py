"""Attention on TPUs by jax's splash kernel (jax.experimental.pallas.ops.tpu.splash_attention).

Its mask by places in the row must be known when tracing: causal, or a window. A window that is traced is one
of a few that are known, and the program holds a kernel for each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from ftjax.ops.attention.facts import PAD_KEY, Facts, for_each_window, pad, zigzag

DEVICE = "tpu"
INTERPRET = False  # tests: the kernels run as plain jax, on any device
LANES = 128  # of a vector register: blocks are multiples of it


def refuses(facts: Facts, q_BTNH, k_BSKH, v_BSKH) -> str | None:
    """Why not, or None."""
    if not facts.own_row and not facts.context:
        return "splash attention takes rows that attend to themselves, not a cache"
    if not facts.windows:
        return "splash attention must know the values that a window may have"


def block(T: int) -> int:
    """Queries, and keys, of a block: the more the better while little is added to the row to fill it."""
    if T <= 512:
        return -(-T // LANES) * LANES
    return next(n for n in (512, 256, LANES) if n == LANES or -(-T // n) * n <= 1.125 * T)


class _ByCorners:
    """Of a mask's blocks those that are all seen or all hidden are known by their corners, and need not be
    made: a row of 262,144 tokens has as many blocks, of as many elements each."""

    ALL, NONE = np.ones((1, 1), bool), np.zeros((1, 1), bool)

    def __getitem__(self, at):
        queries, keys = self.q_sequence[at[0]], at[1]  # type: ignore[attr-defined]
        low, high = queries.min(), queries.max()
        back = getattr(self, "window_size", (len(self.q_sequence),))[0]  # type: ignore[attr-defined]
        if high - back <= keys.start and keys.stop - 1 <= low:
            return self.ALL
        if high < keys.start or keys.stop - 1 < low - back:
            return self.NONE
        return super().__getitem__(at)  # type: ignore[misc]


class _Causal(_ByCorners, masks.CausalMask): ...


class _Local(_ByCorners, masks.LocalMask): ...


def _make(facts: Facts, window: int | None, T: int, S: int, N: int):
    """The kernel for T queries on S keys, filled up to blocks, and N query heads. With a context the queries
    are this device's of the row's: the kernel masks by their places, of which it is given its own part."""
    n, context = block(T), facts.context
    parts = context.parts if context else 1
    place = np.arange(parts * T, dtype=np.int32)
    if context and context.zigzag:
        place = place.reshape(2 * parts, -1)[zigzag(parts)].reshape(-1)
    place = np.pad(place.reshape(parts, T), ((0, 0), (0, -T % n)), "edge").reshape(-1)
    shape = len(place), -(-S // n) * n
    mask = _Causal(shape) if window is None else _Local(shape, (window - 1, 0), 0)
    mask.q_sequence = place
    sizes = kernel.BlockSizes(
        block_q=n,
        block_kv=n,
        block_q_dkv=n,
        block_kv_dkv=n,
        block_q_dq=n,
        block_kv_dq=n,
    )
    made = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        save_residuals=True,
        attn_logits_soft_cap=facts.softcap,
        head_shards=1,
        q_seq_shards=parts,
        interpret=INTERPRET,
    )
    if not context:
        return made
    part = jax.lax.axis_index(context.axes)

    def own(info):
        """Of arrays [heads, blocks of queries, blocks of keys], and of the places."""
        cut = lambda x, axis: None if x is None else _part(x, part, parts, axis)  # noqa: E731
        assert info.partial_mask_blocks is None, "the mask is computed"
        return info._replace(
            data_next=cut(info.data_next, 1),
            mask_next=cut(info.mask_next, 1),
            block_mask=cut(info.block_mask, 1),
            q_sequence=cut(info.q_sequence, 0),
        )

    infos = made.fwd_mask_info, made.dq_mask_info, made.dkv_mask_info
    return kernel.SplashAttentionKernel(*map(own, infos), **made.kwargs)


def _part(x, i, parts: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, i * (x.shape[axis] // parts), x.shape[axis] // parts, axis)


def _heads(x_BTNH, T: int):
    """[B, N, X filled up to the blocks of T queries, H]."""
    return pad(x_BTNH, 1, block(T)).transpose(0, 2, 1, 3)


def _tokens(x_BNTH, T: int):
    return x_BNTH.transpose(0, 2, 1, 3)[:, :T]


def _inputs(facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys):
    """The kernel's (q, k, v, segments or None); it has no scale, so q has it."""
    T = q_BTNH.shape[1]
    q = (q_BTNH.astype(jnp.float32) * facts.scale).astype(q_BTNH.dtype)
    # one document and then padding: no token of the document sees what comes after it
    segments = None
    if facts.documents != 1:
        segments = kernel.SegmentIds(*(pad(x[0], 1, block(T), PAD_KEY) for x in (queries, keys)))
    return *(_heads(x, T) for x in (q, k_BSKH, v_BSKH)), segments


def forward(facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window):
    """(out [B, T, N, H of v], log-sum-exp float32 [B, N, T])."""
    (T, N), S = q_BTNH.shape[1:3], k_BSKH.shape[1]

    def of(window):
        one_row = _make(facts, window, T, S, N)
        return jax.vmap(lambda q, k, v, segments: one_row(q, k, v, segments))

    args = _inputs(facts, q_BTNH, k_BSKH, v_BSKH, queries, keys)
    out, (lse,) = for_each_window(of, facts, window, S, *args)
    return _tokens(out, T), lse[:, :, :T]


def backward(
    facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window, out_BTNH, lse_BNT, delta_BNT, g_BTNH
):
    """(dq, dk, dv); the kernel makes `delta_BNT` itself."""
    (T, N), S = q_BTNH.shape[1:3], k_BSKH.shape[1]

    def of(window):
        made = _make(facts, window, T, S, N)
        rule = functools.partial(
            kernel._splash_attention_bwd,
            False,
            made.kwargs["mask_value"],
            False,
            made.kwargs["block_sizes"],
            None,
            made.kwargs["mask_function"],
            facts.softcap,
            INTERPRET,
        )

        def one_row(q, k, v, segments, out, lse, g):
            # not through its own rule of differentiation: `out` and `lse` may have sinks in them
            kept = q, k, v, segments, None, out, lse, made.dq_mask_info, made.dkv_mask_info
            return rule(kept, g)[3:6]

        return jax.vmap(one_row)

    args = _inputs(facts, q_BTNH, k_BSKH, v_BSKH, queries, keys)
    more = _heads(out_BTNH, T), pad(lse_BNT, 2, block(T)), _heads(g_BTNH, T)
    dq, dk, dv = for_each_window(of, facts, window, S, *args, *more)
    dq, dk, dv = _tokens(dq, T), _tokens(dk, S), _tokens(dv, S)
    return (dq.astype(jnp.float32) * facts.scale).astype(dq.dtype), dk, dv
