"""Attention, values and gradients, against a loop over queries in float64."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.ops import attention

pytestmark = pytest.mark.fast
SCALE = 0.3


def reference(q, k, v, queries, keys, window=None, softcap=None):
    """One query and one head at a time, float64; NaN where a query sees no key."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.full(q.shape, np.nan)
    G = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        distance = queries[1][b, t] - keys[1][b]
        seen = (keys[0][b] == queries[0][b, t]) & (distance >= 0)
        if window is not None:
            seen &= distance < window
        if not seen.any():
            continue
        logits = k[b, seen, n // G] @ q[b, t, n] * SCALE
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        p = np.exp(logits - logits.max())
        out[b, t, n] = p / p.sum() @ v[b, seen, n // G]
    return out


def dense(q, k, v, queries, keys, window=None, softcap=None):
    """The same as plain jnp, for autodiff."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    distance = queries[1][:, :, None] - keys[1][:, None, :]
    mask = (queries[0][:, :, None] == keys[0][:, None, :]) & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * SCALE
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30)), v)


def inputs(B=2, T=7, N=6, K=2, H=4, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(0, 1, (B, T, n, H)), dtype) for n in (N, K, K))


def packed(lengths, T):
    """(segments, positions) int32 [1, T]: documents of these lengths, then padding."""
    segments, positions = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
    at = 0
    for i, n in enumerate(lengths, 1):
        segments[0, at : at + n], positions[0, at : at + n] = i, np.arange(n)
        at += n
    return segments, positions


LAYOUTS = {
    "one document": ([12], 12, {}),
    "packed, padded": ([3, 1, 5], 12, {}),
    "window": ([9, 3], 12, {"window": 3}),
    "softcap": ([7, 5], 12, {"softcap": 2.0}),
    "one token": ([1], 1, {}),
}


HEADS = {"packed, padded": (3, 3), "window": (4, 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(layout):
    lengths, T, options = LAYOUTS[layout]
    where, heads = packed(lengths, T), HEADS.get(layout, (6, 2))
    q, k, v = inputs(B=1, T=T, N=heads[0], K=heads[1])
    with jax.numpy_dtype_promotion("strict"):
        got = np.asarray(attention(q, k, v, where, where, scale=SCALE, **options))
    want = reference(q, k, v, where, where, **options)
    real = where[0] > 0
    assert np.isfinite(got).all()  # padding too
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    lengths, T, options = LAYOUTS[layout]
    where = packed(lengths, T)
    args = inputs(B=1, T=T)
    weight = np.random.default_rng(1).normal(size=args[0].shape).astype(np.float32)
    weight *= (where[0] > 0)[..., None, None]

    def loss(f, *args):
        return jnp.sum(f(*args, where, where, **options) * weight)

    with jax.numpy_dtype_promotion("strict"):
        got = jax.grad(loss, (1, 2, 3))(functools.partial(attention, scale=SCALE), *args)
    want = jax.grad(loss, (1, 2, 3))(dense, *args)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=3e-6)


def test_query_blocks_change_nothing(monkeypatch):
    where = packed([5, 8], 15)
    args = inputs(B=1, T=15)

    def value_and_grads(window):
        def loss(*x):
            return jnp.sum(jnp.sin(attention(*x, where, where, scale=SCALE, window=window)))

        return jax.value_and_grad(loss, (0, 1, 2))(*args)

    whole = value_and_grads(jnp.int32(4))
    monkeypatch.setattr(sys.modules["ftjax.ops.attention"], "QUERY_BLOCK", 4)  # the name is the function too
    blocked = value_and_grads(jnp.int32(4))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(blocked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


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
