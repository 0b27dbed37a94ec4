"""Attention, values and gradients, against a loop over queries in float64."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.ops import attention

pytestmark = pytest.mark.fast
SCALE = 0.3


def reference(q, k, v, queries, keys, window=None, softcap=None, sinks=None, chunk=None):
    """One query and one head at a time, float64; NaN where a query sees no key."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.full((*q.shape[:3], v.shape[3]), np.nan)
    G = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = visible(queries, keys, b, t, window, chunk)
        if not seen.any():
            continue
        logits = k[b, seen, n // G] @ q[b, t, n] * SCALE
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        sink = [] if sinks is None else [float(sinks[n])]
        logits = np.concatenate([logits, sink])
        p = np.exp(logits - logits.max())
        out[b, t, n] = (p / p.sum())[: seen.sum()] @ v[b, seen, n // G]
    return out


def visible(queries, keys, b, t, window, chunk):
    distance = queries[1][b, t] - keys[1][b]
    seen = (keys[0][b] == queries[0][b, t]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    if chunk is not None:
        seen &= queries[1][b, t] // chunk == keys[1][b] // chunk
    return seen


def reference_grads(g, q, k, v, queries, keys, window=None, softcap=None, sinks=None, chunk=None):
    """The gradients of sum(g · reference(…)) by q, k, v and sinks, float64, from the softmax's Jacobian."""
    g, q, k, v = (np.asarray(x, np.float64) for x in (g, q, k, v))
    dq, dk, dv, d_sinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(q.shape[2])
    G = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = visible(queries, keys, b, t, window, chunk)
        if not g[b, t, n].any():
            continue
        keys_SH, values_SH = k[b, seen, n // G], v[b, seen, n // G]
        raw = keys_SH @ q[b, t, n] * SCALE
        logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
        slope = 1.0 if softcap is None else 1 - np.tanh(raw / softcap) ** 2
        if sinks is not None:  # a key of value zero
            logits = np.append(logits, float(sinks[n]))
            values_SH = np.vstack([values_SH, np.zeros(v.shape[3])])
        p = np.exp(logits - logits.max())
        p /= p.sum()
        jacobian = np.diag(p) - np.outer(p, p)
        d_logits = jacobian @ (values_SH @ g[b, t, n])
        if sinks is not None:
            d_sinks[n] += d_logits[-1]
        d_raw = d_logits[: seen.sum()] * slope * SCALE
        dq[b, t, n] += d_raw @ keys_SH
        dk[b, seen, n // G] += np.outer(d_raw, q[b, t, n])
        dv[b, seen, n // G] += np.outer(p[: seen.sum()], g[b, t, n])
    return (dq, dk, dv) if sinks is None else (dq, dk, dv, d_sinks)


def dense(q, k, v, queries, keys, window=None):
    """The same as plain jnp, for autodiff."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    distance = queries[1][:, :, None] - keys[1][:, None, :]
    mask = (queries[0][:, :, None] == keys[0][:, None, :]) & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * SCALE
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30)), v)


def inputs(B=2, T=7, N=6, K=2, H=4, dtype=jnp.float32, seed=0, U=None):
    rng = np.random.default_rng(seed)
    heads = (N, H), (K, H), (K, U or H)
    return tuple(jnp.asarray(rng.normal(0, 1, (B, T, *nh)), dtype) for nh in heads)


def packed(lengths, T):
    """(segments, positions) int32 [1, T]: documents of these lengths, then padding."""
    segments, positions = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
    at = 0
    for i, n in enumerate(lengths, 1):
        segments[0, at : at + n], positions[0, at : at + n] = i, np.arange(n)
        at += n
    return segments, positions


# documents' lengths, T, (query heads, key heads), v's head size, options
LAYOUTS = {
    "one document": ([12], 12, (6, 2), 4, {}),
    "packed, padded": ([3, 1, 5], 12, (3, 3), 4, {}),
    "window": ([9, 3], 12, (4, 1), 4, {"window": 3}),
    "softcap": ([7, 5], 12, (6, 2), 4, {"softcap": 2.0}),
    "sinks": ([7, 4], 12, (6, 2), 4, {"sinks": True}),
    "chunk": ([8, 4], 12, (6, 2), 4, {"chunk": 3}),
    "v wider": ([7, 3], 12, (6, 2), 7, {}),
    "v narrower": ([7, 3], 12, (4, 4), 3, {"softcap": 2.0}),
    "one token": ([1], 1, (6, 2), 4, {"sinks": True}),
    "all": ([9, 5], 16, (6, 2), 3, {"window": 4, "chunk": 6, "softcap": 2.0, "sinks": True}),
}


@pytest.mark.parametrize("block", [1024, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(layout, block, monkeypatch):
    """Values and gradients on packed rows, all queries at once and a block at a time."""
    monkeypatch.setattr(sys.modules["ftjax.ops.attention"], "QUERY_BLOCK", block)
    lengths, T, (N, K), U, options = LAYOUTS[layout]
    where, args = packed(lengths, T), inputs(B=1, T=T, N=N, K=K, U=U)
    rng = np.random.default_rng(1)
    options = dict(options)
    if options.pop("sinks", False):
        args += (jnp.asarray(rng.normal(0, 2, N), jnp.float32),)
    real = where[0] > 0
    g = rng.normal(size=(1, T, N, U)).astype(np.float32) * real[..., None, None]

    def ours(q, k, v, sinks=None):
        return attention(q, k, v, where, where, scale=SCALE, sinks=sinks, **options)

    with jax.numpy_dtype_promotion("strict"):
        got, pull = jax.vjp(ours, *args)
        grads = pull(jnp.asarray(g))
    assert np.isfinite(got).all()  # padding too
    if len(args) == 4:
        options["sinks"] = args[3]
    want = reference(*args[:3], where, where, **options)
    np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=0, atol=1e-6)
    for ours_, want in zip(grads, reference_grads(g, *args[:3], where, where, **options), strict=True):
        np.testing.assert_allclose(ours_, want, rtol=1e-5, atol=3e-6)


def test_sinks_in_bfloat16_beside_far_larger_logits():
    """The sink is part of the softmax's maximum: neither overflows where one is far above the other."""
    where, args = packed([6], 6), inputs(B=1, T=6, N=2, K=2)
    sinks = jnp.asarray([300.0, -300.0], jnp.bfloat16)
    got, pull = jax.vjp(lambda s: attention(*args, where, where, scale=SCALE, sinks=s), sinks)
    np.testing.assert_array_equal(got[:, :, 0], 0)
    np.testing.assert_allclose(got[:, :, 1], reference(*args, where, where)[:, :, 1], rtol=0, atol=1e-6)
    (grad,) = pull(jnp.ones_like(got))
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad.astype(np.float32), 0)


def test_a_traced_window_under_scan_and_jit():
    where = packed([12], 12)
    args = inputs(B=1, T=12)

    @jax.jit
    def both(windows):
        def loss(window, *x):
            return jnp.sum(attention(*x, where, where, scale=SCALE, window=window))

        return jax.lax.map(lambda w: jax.grad(loss, 1)(w, *args), windows)

    got = both(jnp.array([3, 12], jnp.int32))
    for g, window in zip(got, (3, None), strict=True):
        want = jax.grad(lambda q, w=window: jnp.sum(dense(q, *args[1:], where, where, window=w)))(args[0])
        np.testing.assert_allclose(g, want, rtol=1e-5, atol=3e-6)


def test_a_traced_chunk_in_blocks(monkeypatch):
    """A chunk no position reaches stands for none."""
    monkeypatch.setattr(sys.modules["ftjax.ops.attention"], "QUERY_BLOCK", 5)
    where, args = packed([12], 12), inputs(B=1, T=12)
    chunks = jnp.array([3, np.iinfo(np.int32).max], jnp.int32)
    got = jax.jit(
        lambda chunks: jax.lax.map(lambda c: attention(*args, where, where, scale=SCALE, chunk=c), chunks)
    )(chunks)
    for y, chunk in zip(got, (3, None), strict=True):
        np.testing.assert_allclose(y, reference(*args, where, where, chunk=chunk), rtol=0, atol=1e-6)


def test_with_a_cache():
    """Fewer queries than keys, the unused slots in no segment."""
    segments, positions = packed([9], 9)
    q, k, v = inputs(B=1, T=9)
    keys = (np.pad(segments, ((0, 0), (0, 4)), constant_values=-1), np.pad(positions, ((0, 0), (0, 4))))
    long_k, long_v = (jnp.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=1e3) for x in (k, v))
    got = attention(q[:, 7:], long_k, long_v, (segments[:, 7:], positions[:, 7:]), keys, scale=SCALE)
    want = reference(q, k, v, (segments, positions), (segments, positions))
    np.testing.assert_allclose(got, want[:, 7:], rtol=0, atol=1e-6)


def test_bfloat16_is_close_to_float32():
    where = packed([20, 12], 32)
    args = inputs(B=1, T=32, H=16)

    def loss(*x):
        return jnp.sum(jnp.sin(attention(*x, where, where, scale=SCALE).astype(jnp.float32)))

    want = jax.grad(loss, (0, 1, 2))(*args)
    got = jax.grad(loss, (0, 1, 2))(*(x.astype(jnp.bfloat16) for x in args))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == jnp.bfloat16
        error = jnp.linalg.norm(g.astype(jnp.float32) - w) / jnp.linalg.norm(w)
        assert error < 0.02
