"""Attention on NVIDIA GPUs by cuDNN, through jax._src.cudnn.fused_attention_stablehlo.

Rows of one document each are plain causal attention. Packed rows are laid end to end as one row of B·T
tokens, with the offset and length of every run of one segment (padding is one), so that no mask exists and
documents cost what they are. cuDNN wants a bound on their number, and keeps a log-sum-exp of [documents, N,
B·T] for its backward pass, so the bound is low; a batch with more documents goes to the kernel of our own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.lib import cuda_versions

from ftjax.ops.attention import pallas_gpu
from ftjax.ops.attention.facts import Facts, for_each_window

DEVICE = "gpu"
INTERPRET = False  # cuDNN has no such mode


def refuses(facts: Facts, q_BTNH, k_BSKH, v_BSKH) -> str | None:
    """Why not, or None."""
    H, U = q_BTNH.shape[3], v_BSKH.shape[3]
    if not facts.own_row:
        return (
            "cuDNN's attention is used for rows that attend to themselves, not for a cache or a part of a row"
        )
    if facts.softcap is not None or facts.sinks:
        return f"cuDNN's attention has no {'soft-cap' if facts.softcap is not None else 'sinks'}"
    if not facts.windows:
        return "cuDNN must know the values that a window may have"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention is in half precision, not {q_BTNH.dtype}"
    if H != U:
        return f"cuDNN's packed attention wants one head size, not {H} of q and k and {U} of v"
    if not installed():
        return "this machine's jax has no cuDNN"
    hopper = fused.check_compute_capability("9.0")
    if H % 8 or H > (256 if hopper else 128):
        return f"cuDNN's attention wants heads of a multiple of 8 up to {256 if hopper else 128}, not {H}"
    if facts.documents != 1 and not hopper:
        return "cuDNN's packed attention wants a GPU of compute capability 9.0 (Hopper) or later"


def installed() -> bool:
    return cuda_versions is not None


def rest(facts: Facts) -> tuple[str, ...]:
    """What is kept beyond out and log-sum-exp: cuDNN's own of packed rows, [devices, documents, N, B·T]."""
    return () if facts.documents == 1 else ("BXNX",)


def bound(facts: Facts, B: int, T: int) -> int:
    """Runs of one segment in a batch: as promised; else so many that what is kept is 2 MiB a head at most (as
    far as four documents allow it), or one in 16 tokens."""
    if facts.documents is not None:
        return B * (facts.documents + 1)
    return max(4, min(2**19 // (B * T), B * T // 16))


def runs(segments_BT, most: int):
    """(lengths int32 [1, most], offsets int32 [1, most + 1], their number) of the runs of one segment in rows
    laid end to end; those there are not have length 0 and begin at the end."""
    B, T = segments_BT.shape
    first = jnp.ones((B, 1), bool)
    begins = jnp.concatenate([first, segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1).reshape(-1)
    (offsets,) = jnp.nonzero(begins, size=most + 1, fill_value=B * T)
    offsets = offsets.astype(jnp.int32)
    return jnp.diff(offsets)[None], offsets[None], jnp.sum(begins)


def _call(facts: Facts, window: int | None, q, k, v, lengths=None, offsets=None) -> Any:
    """(out, cuDNN's log-sum-exp), packed where lengths are given."""
    packed = lengths is not None
    return fused.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=facts.scale,
        mask_type=fused.MaskType.PADDING_CAUSAL if packed else fused.MaskType.CAUSAL,
        sliding_window_length=window,
        return_residual=True,
    )


def _gradients(facts: Facts, window: int | None, q, k, v, places, out, kept, g):
    """(dq, dk, dv) by jax's rule for `_call`, whose backward pass it gives no way to call alone: the rule is
    traced for shapes, and what it keeps is put in."""
    which: list[int | None] = []

    def rule(q, k, v, *places):
        (out, kept), pull = jax.vjp(lambda *x: _call(facts, window, *x, *places), q, k, v)
        known = q, k, v, out, kept, *places
        for leaf in jax.tree.leaves(pull):
            which.append(next((i for i, x in enumerate(known) if x is leaf), None))
        return pull

    pull: Any = jax.eval_shape(rule, q, k, v, *places)
    leaves, tree = jax.tree.flatten(pull)
    known = q, k, v, out, kept, *places
    for n, i in enumerate(which):
        assert i is not None or leaves[n].size == 0, "jax's rule for cuDNN keeps something that is not known"
        leaves[n] = jnp.zeros(leaves[n].shape, leaves[n].dtype) if i is None else known[i]
    return jax.tree.unflatten(tree, leaves)((g, jnp.zeros(kept.shape, kept.dtype)))


def _repeats(q_BTNH, k_BSKH) -> int:
    """How often k's and v's heads are repeated for packed rows: before jax 0.11.2 their offsets were taken
    for those of as many heads as q has."""
    return 1 if jax.__version_info__ >= (0, 11, 2) else q_BTNH.shape[2] // k_BSKH.shape[2]


def _one_row(x_BTNH, repeats: int = 1):
    x = x_BTNH.reshape(1, -1, *x_BTNH.shape[2:])
    return jnp.repeat(x, repeats, axis=2) if repeats > 1 else x


def forward(facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window):
    """(out [B, T, N, H], log-sum-exp float32 [B, N, T]), and of packed rows cuDNN's own, in whose stead the
    log-sum-exp is that of our own kernel, or nothing."""
    B, T, N, _ = q_BTNH.shape
    if facts.documents == 1:
        # no token of the document sees the padding that comes after it
        one = functools.partial(functools.partial, _call, facts)
        return for_each_window(one, facts, window, T, q_BTNH, k_BSKH, v_BSKH)
    most = bound(facts, B, T)
    lengths, offsets, count = runs(queries[0], most)
    n = _repeats(q_BTNH, k_BSKH)

    def fast() -> tuple:
        args = _one_row(q_BTNH), _one_row(k_BSKH, n), _one_row(v_BSKH, n), lengths, offsets
        one = functools.partial(functools.partial, _call, facts)
        out, kept = for_each_window(one, facts, window, T, *args)
        return out.reshape(q_BTNH.shape), jnp.zeros((B, N, T), jnp.float32), kept[None]

    def slow():
        out, lse = pallas_gpu.forward(facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window)
        return out, lse, jnp.zeros((1, most, N, B * T), jnp.float32)

    return fast() if facts.documents is not None else jax.lax.cond(count <= most, fast, slow)


def backward(
    facts: Facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window, out_BTNH, lse_BNT, delta_BNT, g_BTNH, *kept
):
    """(dq, dk, dv); `delta_BNT` is the sum of out · g over the head."""
    B, T = q_BTNH.shape[:2]

    def of(window):
        def gradients(q, k, v, out, kept, g, *places):
            return _gradients(facts, window, q, k, v, places, out, kept, g)

        return gradients

    if facts.documents == 1:
        args = q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT, g_BTNH
        return for_each_window(of, facts, window, T, *args)
    most = bound(facts, B, T)
    lengths, offsets, count = runs(queries[0], most)
    n = _repeats(q_BTNH, k_BSKH)

    def fast():
        args = _one_row(q_BTNH), _one_row(k_BSKH, n), _one_row(v_BSKH, n)
        args += _one_row(out_BTNH), kept[0][0], _one_row(g_BTNH), lengths, offsets
        dq, dk, dv = for_each_window(of, facts, window, T, *args)
        dk, dv = (_add_repeats(x, n).reshape(k_BSKH.shape) for x in (dk, dv))
        return dq.reshape(q_BTNH.shape), dk, dv

    def slow():
        more = out_BTNH, lse_BNT, delta_BNT, g_BTNH
        return pallas_gpu.backward(facts, q_BTNH, k_BSKH, v_BSKH, queries, keys, window, *more)

    return fast() if facts.documents is not None else jax.lax.cond(count <= most, fast, slow)


def _add_repeats(x, n: int):
    if n == 1:
        return x
    B, T, N, H = x.shape
    return x.reshape(B, T, N // n, n, H).astype(jnp.float32).sum(3).astype(x.dtype)
