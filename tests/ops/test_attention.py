"""Attention, values and gradients, against a loop over queries in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import mesh
from ftjax.ops import attention
from ftjax.ops.attention import blockwise, dense, pallas_gpu, splash
from ftjax.ops.attention import kernel as kernel_module
from ftjax.ops.attention.facts import Facts, reorder, zigzag

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


def rows(documents, T):
    """(segments, positions) int32 [B, T], row i packed with documents of lengths documents[i]."""
    return tuple(np.concatenate(x) for x in zip(*(packed(lengths, T) for lengths in documents), strict=True))


# rows' documents, T, (query heads, key heads), v's head size, options
LAYOUTS = {
    "one document": ([[33]], 33, (6, 2), 4, {}),
    "packed, padded": ([[9, 1, 17], [1, 1, 30]], 37, (3, 3), 4, {}),
    "documents of one token": ([[1] * 20], 21, (4, 1), 4, {}),
    "window": ([[29, 6], [4, 31]], 35, (4, 1), 4, {"window": 6}),
    "window of one": ([[20]], 20, (2, 1), 4, {"window": 1}),
    "softcap": ([[17, 16]], 33, (6, 2), 4, {"softcap": 2.0}),
    "sinks": ([[17, 9], [20]], 33, (6, 2), 4, {"sinks": True}),
    "chunk": ([[28, 4]], 33, (6, 2), 4, {"chunk": 7}),
    "v wider": ([[17, 13]], 32, (6, 2), 7, {}),
    "v narrower": ([[17, 13]], 32, (4, 4), 3, {"softcap": 2.0}),
    "one token": ([[1]], 1, (6, 2), 4, {"sinks": True}),
    "all": ([[19, 15], [3, 30]], 36, (6, 2), 3, {"window": 9, "chunk": 13, "softcap": 2.0, "sinks": True}),
}
LARGE = {"splash's blocks": ([[150, 140]], 300, (2, 1), 4, {"window": 133, "sinks": True})}
KERNELS = ["dense", "dense in blocks", "blockwise", "pallas", "splash"]
# every layout where it compiles fast, elsewhere those that no other covers
FEW = ["packed, padded", "documents of one token", "v wider", "one token", "all"]
CASES = [
    (layout, kernel)
    for kernel in KERNELS
    for layout in (FEW[-1:] if "in" in kernel else LAYOUTS if kernel in ("dense", "blockwise") else FEW)
] + [(layout, "splash") for layout in LARGE]


@pytest.fixture
def small(monkeypatch):
    """Blocks so small that these rows have several, and kernels of other devices interpreted."""
    monkeypatch.setattr(dense, "QUERY_BLOCK", 5)
    monkeypatch.setattr(blockwise, "BLOCKS", {"cpu": 8})
    monkeypatch.setattr(pallas_gpu, "blocks", lambda *_, **__: (16, 16))
    monkeypatch.setattr(pallas_gpu, "INTERPRET", True)
    monkeypatch.setattr(splash, "INTERPRET", True)
    monkeypatch.setattr(splash, "block", lambda T: splash.LANES)  # the least it takes


def run(kernel, where, args, g, **options):
    """(out, gradients) of `args` [q, k, v, sinks] on rows that attend to themselves, jitted, under strict
    promotion."""
    with jax.numpy_dtype_promotion("strict"):
        return program(kernel, tuple(options.items()))(where, g, *args)


@functools.cache
def program(kernel, options):
    @jax.jit
    def both(where, g, *args):
        def ours(q, k, v, sinks=None):
            name = kernel.partition(" ")[0]
            return attention(q, k, v, where, scale=SCALE, sinks=sinks, implementation=name, **dict(options))

        out, pull = jax.vjp(ours, *args)
        return out, pull(g)

    return both


@pytest.mark.parametrize("layout, kernel", CASES)
def test_against_float64(layout, kernel, small, monkeypatch):
    """Values and gradients on packed rows of several blocks, each a row that attends to itself."""
    if kernel == "dense":
        monkeypatch.setattr(dense, "QUERY_BLOCK", 1024)
    documents, T, (N, K), U, options = (LAYOUTS | LARGE)[layout]
    where, args = rows(documents, T), inputs(B=len(documents), T=T, N=N, K=K, U=U)
    rng = np.random.default_rng(1)
    options = dict(options)
    if options.pop("sinks", False):
        args += (jnp.asarray(rng.normal(0, 2, N), jnp.float32),)
    real = where[0] > 0
    g = rng.normal(size=(*real.shape, N, U)).astype(np.float32) * real[..., None, None]
    got, grads = run(kernel, where, args, g, **options)
    assert np.isfinite(got).all()  # padding too
    if len(args) == 4:
        options["sinks"] = args[3]
    want = reference(*args[:3], where, where, **options)
    np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=0, atol=1e-6)
    for ours, want in zip(grads, reference_grads(g, *args[:3], where, where, **options), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_is_single(kernel, small):
    """A document's values and gradients are those it has in a row of its own."""
    lengths, T = [5, 20, 8], 33
    args, g = inputs(B=1, T=T), np.random.default_rng(2).normal(size=(1, T, 6, 4)).astype(np.float32)
    together = run(kernel, packed(lengths, T), args, g)
    at = 0
    for n in lengths:
        first = [np.pad(x[:, at : at + n], ((0, 0), (0, T - n), (0, 0), (0, 0))) for x in (*args, g)]
        alone = run(kernel, packed([n], T), first[:3], first[3])
        for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(x[:, :n], y[:, at : at + n], rtol=0, atol=2e-6)
        at += n


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_changes_nothing(kernel, small):
    """Whatever is at padding, the documents' values and gradients are the same."""
    where, args = packed([9, 12], 33), inputs(B=1, T=33)
    real = where[0] > 0
    g = np.random.default_rng(2).normal(size=(1, 33, 6, 4)).astype(np.float32) * real[..., None, None]
    there = [jnp.where(real[..., None, None], x, 1e3) for x in args]
    for x, y in zip(
        jax.tree.leaves(run(kernel, where, args, g)),
        jax.tree.leaves(run(kernel, where, there, g)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(x)[real], np.asarray(y)[real])
        assert np.isfinite(y).all()


@pytest.mark.parametrize("kernel", ["dense in blocks", "blockwise", "pallas"])
def test_keys_that_are_not_the_queries_row(kernel, small):
    """A prompt continued: the queries are the last of the row, the cache's free slots are in no segment, and
    prompts are padded on the left."""
    segments = np.array([[0] * 3 + [1] * 26, [0] * 9 + [1] * 20], np.int32)
    positions = np.array([[0] * 3 + [*range(26)], [0] * 9 + [*range(20)]], np.int32)
    q, k, v = inputs(B=2, T=29)
    free = ((0, 0), (0, 12))
    keys = (np.pad(segments, free, constant_values=-1), np.pad(positions, free))
    long_k, long_v = (jnp.pad(x, (*free, (0, 0), (0, 0)), constant_values=1e3) for x in (k, v))
    late = slice(10, 29)
    where = segments[:, late], positions[:, late]
    name = kernel.partition(" ")[0]
    facts = Facts(SCALE, None, (7,))
    if name == "dense":
        got = dense.attention(q[:, late], long_k, long_v, None, where, keys, 7, facts)
    else:
        got, _ = kernel_module(name).forward(facts, q[:, late], long_k, long_v, where, keys, 7)
    real = where[0] > 0
    want = reference(q, k, v, (segments, positions), (segments, positions), window=7)[:, late]
    np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=0, atol=1e-6)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_sinks_in_bfloat16_beside_far_larger_logits(kernel, small):
    """The sink is part of the softmax's maximum: neither overflows where one is far above the other."""
    where, args = packed([6], 6), inputs(B=1, T=6, N=2, K=2)
    sinks = jnp.asarray([300.0, -300.0], jnp.bfloat16)
    got, (*_, grad) = run(kernel, where, (*args, sinks), jnp.ones_like(args[0]))
    np.testing.assert_array_equal(got[:, :, 0], 0)
    np.testing.assert_allclose(got[:, :, 1], reference(*args, where, where)[:, :, 1], rtol=0, atol=1e-6)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad.astype(np.float32), 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_traced_window_under_scan_and_jit(kernel, small):
    """As layers of one stack have it: one of the values that are known beforehand."""
    where, args = packed([30], 30), inputs(B=1, T=30)

    @jax.jit
    def each(windows):
        def loss(q, window):
            name, choices = kernel.partition(" ")[0], (3, None)
            facts = dict(scale=SCALE, window=window, windows=choices, implementation=name)
            return jnp.sum(attention(q, *args[1:], where, **facts))

        return jax.lax.map(lambda w: jax.grad(loss)(args[0], w), windows)

    got = each(jnp.array([3, np.iinfo(np.int32).max], jnp.int32))
    g = np.ones_like(args[0])
    for ours, window in zip(got, (3, None), strict=True):
        want = reference_grads(g, *args, where, where, window=window)[0]
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_traced_chunk(kernel, small):
    """A chunk no position reaches stands for none."""
    where, args = packed([20, 9], 33), inputs(B=1, T=33)
    chunks = jnp.array([7, np.iinfo(np.int32).max], jnp.int32)
    name = kernel.partition(" ")[0]
    got = jax.jit(
        lambda chunks: jax.lax.map(
            lambda c: attention(*args, where, scale=SCALE, chunk=c, implementation=name), chunks
        )
    )(chunks)
    real = where[0] > 0
    for y, chunk in zip(got, (7, None), strict=True):
        want = reference(*args, where, where, chunk=chunk)
        np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_close_to_float32(kernel, small):
    """Rounding q, k, v, the softmax and the result to 8 bits each: a few times 2⁻⁹ of the norm."""
    where, args = packed([20, 12], 32), inputs(B=1, T=32, H=16)
    g = np.random.default_rng(3).normal(size=args[0].shape).astype(np.float32)
    out, grads = run("dense", where, args, g)
    args = [x.astype(jnp.bfloat16) for x in args]
    for got, want in zip(
        jax.tree.leaves(run(kernel, where, args, jnp.asarray(g, jnp.bfloat16))),
        (out, *grads),
        strict=True,
    ):
        assert got.dtype == jnp.bfloat16
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert error < 0.01


@pytest.mark.parametrize("kernel", ["blockwise", "pallas", "splash"])
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        (dict(fsdp=4, tp=2), 1),
        (dict(fsdp=2, tp=4), 1),  # the 2 key heads do not divide over tp
        (dict(fsdp=1, cp=4, tp=2), 4),
        (dict(fsdp=2, cp=2, sp=2), 1),  # rows in their own order
    ],
    ids=str,
)
def test_on_a_mesh(kernel, shape, order, small):
    """Each device on its rows, heads and queries gives what one device gives."""
    where = rows([[20, 12], [32], [5, 6, 7], [31]], 32)
    args = (*inputs(B=4, T=32, N=4, K=2), jnp.asarray([0.5, -1.0, 2.0, 0.0]))
    real = (where[0] > 0)[:, :, None, None]  # what padding sees of padding depends on the blocks
    g = np.random.default_rng(2).normal(size=args[0].shape).astype(np.float32) * real
    want, want_grads = run(kernel, where, args, g, window=9)
    program.cache_clear()
    there = zigzag(order) if order > 1 else np.arange(1)
    back = functools.partial(reorder, order=np.argsort(there))
    with mesh.use(mesh.make_mesh(mesh.MeshOptions(**shape))) as devices:
        place = mesh.sharding(devices, "BT" if order > 1 else "B", mesh.ACTIVATION_RULES)
        put = lambda x: jax.device_put(reorder(jnp.asarray(x), there), place)  # noqa: E731
        args = (*map(put, args[:3]), args[3])
        out, (*grads, d_sinks) = run(kernel, jax.tree.map(put, where), args, put(g), window=9, zigzag=order)
        got = back(out) * real, (*map(back, grads), d_sinks)
    program.cache_clear()
    assert len(out.sharding.device_set) == 8
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves((want * real, want_grads)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, 1, 200, 512, 700])
def test_blocks_known_by_their_corners_are_those_that_are_made(window, monkeypatch):
    def infos():
        return jax.tree.leaves(splash._make(Facts(1.0), window, 2000, 2000, 2))

    quick = infos()
    monkeypatch.setattr(splash, "_Causal", splash.masks.CausalMask)
    monkeypatch.setattr(splash, "_Local", splash.masks.LocalMask)
    slow = infos()
    assert len(quick) == len(slow) > 3
    for x, y in zip(quick, slow, strict=True):
        np.testing.assert_array_equal(x, y)
