"""The gated delta rule against transformers and its recurrence in float64, packed, padded and cached."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.ops.delta import CHUNK, causal_conv, gated_delta_rule, gated_rms_norm, l2_normalize

pytestmark = pytest.mark.fast
T, K, N, H, X = 2 * CHUNK + 21, 2, 4, 8, 6  # T is no multiple of a chunk
rule = jax.jit(gated_delta_rule)


def inputs(B=1, T=T, seed=0):
    """q, k, v, log decay, beta, state; q and k as a layer makes them."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(0, 1, (B, T, *x)).astype(np.float32) for x in ((K, H), (K, H), (N, X)))
    g = -rng.exponential(0.2, (B, T, N)).astype(np.float32)
    beta = rng.uniform(0, 1, (B, T, N)).astype(np.float32)
    state = rng.normal(0, 1, (B, N, H, X)).astype(np.float32)
    return np.array(l2_normalize(q)) * np.float32(H**-0.5), np.array(l2_normalize(k)), v, g, beta, state


def packed(*lengths):
    """(segments, positions) int32 [1, T]: documents of these lengths; a negative one is padding."""
    segments = [np.full(abs(n), (n > 0) * i) for i, n in enumerate(lengths, 1)]
    positions = [np.arange(n) if n > 0 else np.zeros(-n) for n in lengths]
    return tuple(np.concatenate(x)[None].astype(np.int32) for x in (segments, positions))


def naive(q, k, v, g, beta, state, segments, positions):
    """One token after the other, in the dtype of what is given."""
    q, k = (jnp.repeat(x, N // K, axis=2) for x in (q, k))

    def step(S, x):
        q, k, v, g, beta, segment, position = x
        new = jnp.where(((segment > 0) & (position == 0))[:, None, None, None], 0, S)
        new = new * jnp.exp(g)[..., None, None]
        u = beta[..., None] * (v - jnp.einsum("bnhx,bnh->bnx", new, k))
        new = new + k[..., None] * u[..., None, :]
        live = (segment > 0)[:, None, None]
        return jnp.where(live[..., None], new, S), jnp.where(live, jnp.einsum("bnhx,bnh->bnx", new, q), 0)

    xs = tuple(jnp.moveaxis(jnp.asarray(x), 1, 0) for x in (q, k, v, g, beta, segments, positions))
    state, y = jax.lax.scan(step, jnp.asarray(state), xs)
    return jnp.moveaxis(y, 0, 1), state


def naive64(*args):
    """`naive` in float64: its result, and a function from cotangents to the gradients of the six inputs."""
    with jax.enable_x64(True):
        floats = tuple(jnp.asarray(x, jnp.float64) for x in args[:6])
        out, vjp = jax.vjp(jax.jit(lambda *x: naive(*x, *args[6:])), *floats)
        return jax.tree.map(np.asarray, (out, vjp))[0], vjp


def close(got, want, rtol=1e-5):
    """Within rtol of the largest element."""
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("length", [1, 5, CHUNK, T])
def test_against_transformers(form, length):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    _, _, v, g, beta, state = inputs(B=2, T=length)
    rng = np.random.default_rng(1)
    q, k = (rng.normal(0, 3, (2, length, K, H)).astype(np.float32) for _ in range(2))
    where = tuple(np.tile(x, (2, 1)) for x in packed(length + 1))
    q_unit, k_unit = l2_normalize(q) * H**-0.5, l2_normalize(k)
    with jax.numpy_dtype_promotion("strict"):  # not at a document's start: from the state given
        y, last = rule(q_unit, k_unit, v, g, beta, where[0][:, 1:], where[1][:, 1:], state)
        y_new, last_new = rule(q_unit, k_unit, v, g, beta, where[0][:, :-1], where[1][:, :-1], state)
        y_none, last_none = rule(q_unit, k_unit, v, g, beta, where[0][:, 1:], where[1][:, 1:])
    f = getattr(theirs, f"torch_{form}_gated_delta_rule")
    options = dict(output_final_state=True, use_qk_l2norm_in_kernel=True)
    args = [torch.from_numpy(x) for x in (q, k, v, g, beta)]
    want = f(*args, initial_state=torch.from_numpy(state), **options)
    fresh = f(*args, **options)
    close(y, want[0])
    close(last, want[1])
    close(y_new, fresh[0])  # the state given is another document's
    close(last_new, fresh[1])
    np.testing.assert_array_equal(y_none, y_new)
    np.testing.assert_array_equal(last_none, last_new)


LAYOUTS = {
    "one document": (T,),
    "packed": (3, 1, 60, 1, CHUNK, T - 3 - 1 - 60 - 1 - CHUNK),
    "padded on the right": (70, 30, 100 - T),
    "padded on the left": (70 - T, 70),
    "padding between": (20, -5, 40, -70, T - 135),
    "a chunk of padding": (10, -(2 * CHUNK), T - 10 - 2 * CHUNK),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("carried", [False, True])
def test_values_and_gradients_against_float64(layout, carried):
    segments, positions = packed(*LAYOUTS[layout])
    assert segments.shape == (1, T)
    if carried:  # what comes first belongs to the document that the state is of
        positions = np.where(segments == segments[segments > 0][0], positions + 7, positions)
    args = (*inputs(), segments, positions)
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(1, T, N, X)), rng.normal(size=(1, N, H, X))
    want, vjp = naive64(*args)
    with jax.enable_x64(True):
        want_grads = vjp(tuple(jnp.asarray(x) for x in weights))

    def ours(q, k, v, g, beta, state):
        return gated_delta_rule(q, k, v, g, beta, segments, positions, state)

    @jax.jit
    def value_and_grads(*x):
        out, vjp = jax.vjp(ours, *x)
        return out, vjp(tuple(jnp.asarray(x, jnp.float32) for x in weights))

    with jax.numpy_dtype_promotion("strict"):
        got, grads = value_and_grads(*args[:6])
    for a, b in zip(got, want, strict=True):
        close(a, b, 2e-6)
    np.testing.assert_array_equal(got[0][segments == 0], 0)
    for name, a, b in zip(("q", "k", "v", "g", "beta", "state"), grads, want_grads, strict=True):
        assert np.isfinite(a).all(), name
        if np.any(b):
            close(a, b)
        else:
            assert name == "state" and not carried
            np.testing.assert_array_equal(a, 0)
        if name != "state":
            np.testing.assert_array_equal(a[segments == 0], 0)


def test_packed_documents_are_each_alone():
    lengths = LAYOUTS["packed"]
    *args, state = inputs()
    y, last = rule(*args, *packed(*lengths), state)
    at = 0
    for n in lengths:
        alone, end = gated_delta_rule(*(x[:, at : at + n] for x in args), *packed(n))
        close(y[:, at : at + n], alone, 1e-6)
        at += n
    close(last, end, 1e-6)


def test_what_stands_on_padding_does_not_matter():
    segments, positions = packed(*LAYOUTS["padding between"])
    *args, state = inputs()

    def loss(*args):
        y, last = gated_delta_rule(*args, segments, positions, state)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last)), y

    run = jax.jit(jax.value_and_grad(loss, tuple(range(5)), has_aux=True))
    spoilt = [np.where((segments == 0).reshape(1, T, *[1] * (x.ndim - 2)), np.nan, x) for x in args]
    for a, b in zip(jax.tree.leaves(run(*args)), jax.tree.leaves(run(*spoilt)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_key_again_and_again():
    """Nothing decays and every token overwrites: a power series of the triangular system would overflow."""
    q, k, v, g, beta, state = inputs()
    k, g, beta = np.repeat(k[:, :1], T, axis=1), np.zeros_like(g), np.ones_like(beta)
    args = (q, k, v, g, beta, state, *packed(T))
    want, _ = naive64(*args)
    for a, b in zip(rule(*args[:5], *args[6:], state), want, strict=True):
        close(a, b)


def test_small_decays_after_a_large_one():
    """Each y to 1e-5 of its own size: large sums of log decays must not enter it."""
    q, k, v, g, beta, state = inputs()
    g = np.where(np.arange(T)[None, :, None] % 32 == 5, -3000.0, g / 20).astype(np.float32)
    args = (q, k, v, g, beta, state, *packed(20, T - 20))
    want = naive64(*args)[0][0]
    got = np.asarray(rule(*args[:5], *args[6:], state)[0])
    error = np.abs(got - want).max(-1) / np.abs(want).max(-1)
    assert error.max() < 1e-5


def test_prefill_then_one_token_at_a_time():
    """A batch as generation lays it out: a shared prefix, padding, the rest of each prompt, answers."""
    args, (w, x) = inputs(B=2)[:5], conv_inputs(B=2)
    P, Q = 20, CHUNK + 30  # the prefix ends, the prompts end
    segments = np.ones((2, T), np.int32)
    segments[1, P : P + 7] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0) * segments
    tail = np.zeros((2, w.shape[1] - 1, x.shape[2]), np.float32), np.zeros((2, w.shape[1] - 1), np.int32)
    state, ys, convs = None, [], []
    conv = jax.jit(causal_conv)
    for start, end in [(0, P), (P, Q), *((t, t + 1) for t in range(Q, T))]:
        part = (segments[:, start:end], positions[:, start:end])
        y, state = rule(*(x[:, start:end] for x in args), *part, state)
        ys.append(y)
        y, tail = conv(x[:, start:end], w, part[0], tail)
        convs.append(y)
    y, y_conv = np.concatenate(ys, axis=1), np.concatenate(convs, axis=1)
    np.testing.assert_array_equal(y[segments == 0], 0)
    np.testing.assert_array_equal(y_conv[segments == 0], 0)
    for b in range(2):
        live = segments[b] > 0
        row, n = [x[b : b + 1, live] for x in args], live.sum()
        full, last = gated_delta_rule(*row, *packed(n))
        close(y[b : b + 1, live], full, 2e-6)
        close(state[b : b + 1], last, 2e-6)
        full, end = causal_conv(x[b : b + 1, live], w, packed(n)[0])
        np.testing.assert_allclose(y_conv[b : b + 1, live], full, rtol=1e-6, atol=1e-6)
        for a, e in zip(tail, end, strict=True):
            np.testing.assert_array_equal(a[b : b + 1], e)


def test_bfloat16():
    segments, positions = packed(*LAYOUTS["packed"])
    *args, state = (jnp.asarray(x, jnp.bfloat16) for x in inputs())

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype, *args):
        def loss(*args):
            y, last = gated_delta_rule(*args, segments, positions, state)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, last)

        return jax.value_and_grad(loss, tuple(range(5)), has_aux=True)(*(x.astype(dtype) for x in args))

    with jax.numpy_dtype_promotion("strict"):
        (_, got), grads = run(jnp.bfloat16, *args)
        (_, want), want_grads = run(jnp.float32, *args)
        one, last = rule(*(x[:, :1] for x in args), segments[:, :1], positions[:, :1])
    assert (one.dtype, last.dtype) == (got[0].dtype, got[1].dtype) == (jnp.bfloat16, jnp.float32)
    assert all(x.dtype == jnp.bfloat16 for x in grads)
    np.testing.assert_array_equal(got[0], want[0].astype(jnp.bfloat16))  # rounded once, at the end
    np.testing.assert_array_equal(got[1], want[1])
    for a, b in zip(grads, want_grads, strict=True):
        close(a.astype(jnp.float32), b, 0.01)  # sin' of a rounded y


def test_no_array_grows_with_the_square_of_the_length():
    length = 2048
    args = [np.zeros((1, length, 1, 2), np.float32)] * 3 + [np.zeros((1, length, 1), np.float32)] * 2
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(gated_delta_rule(*x, *packed(length))[0])))(*args)
    sizes = [
        np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", str(jaxpr))
    ]
    assert max(sizes) == length * CHUNK  # so the decays within the chunks are among those found


def test_devices_with_rows_and_heads_of_their_own_need_not_talk():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("rows", "heads"))
    P = jax.sharding.PartitionSpec
    args = (*inputs(B=2)[:5], *(np.tile(x, (2, 1)) for x in packed(T)))
    specs = [P("rows", None, "heads")] * 5 + [P("rows")] * 2
    split = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)]

    def loss(*args):
        return jnp.sum(jnp.sin(gated_delta_rule(*args, *split[5:])[0]))

    program = jax.jit(jax.grad(loss, tuple(range(5)))).lower(*split[:5]).compile()
    assert not re.search(r"all-|collective-", program.as_text())


def conv_inputs(B=1, C=5, width=4):
    rng = np.random.default_rng(3)
    return tuple(rng.normal(0, 1, shape).astype(np.float32) for shape in ((C, width), (B, T, C)))


def naive_conv(x, w, segments):
    """By hand, over the tokens of each document."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, width = np.zeros_like(x), w.shape[1]
    for s in np.unique(segments[segments > 0]):
        (own,) = np.nonzero(segments[0] == s)
        for i, t in enumerate(own):
            for d in range(min(width, i + 1)):
                y[0, t] += w[:, width - 1 - d] * x[0, own[i - d]]
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_conv(layout, width):
    segments, _ = packed(*LAYOUTS[layout])
    w, x = conv_inputs(width=width)
    none = np.zeros((1, width - 1, 5), np.float32), np.zeros((1, width - 1), np.int32)
    with jax.numpy_dtype_promotion("strict"):
        y, (tail, tail_segments) = causal_conv(x, w, segments)
        y_tail, tail2 = causal_conv(x, w, segments, none)
    want = naive_conv(x, w, segments)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(y_tail, want, rtol=1e-6, atol=1e-6)
    live = segments[0] > 0
    np.testing.assert_array_equal(tail, x[:, live][:, live.sum() - (width - 1) :])
    np.testing.assert_array_equal(tail_segments, segments[:, live][:, live.sum() - (width - 1) :])
    np.testing.assert_array_equal(tail2[0], tail)
    np.testing.assert_array_equal(tail2[1], tail_segments)


def test_conv_gradients():
    """It is linear in x and in w, so its gradients are inner products with itself."""
    segments, _ = packed(*LAYOUTS["padding between"])
    w, x = conv_inputs()
    weight = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sum(causal_conv(x, w, segments)[0] * weight), (0, 1)))(x, w)
    other_w, other_x = (np.random.default_rng(5).normal(size=a.shape) for a in (w, x))
    for d, other, y in (
        (dx, other_x, naive_conv(other_x, w, segments)),
        (dw, other_w, naive_conv(x, other_w, segments)),
    ):
        np.testing.assert_allclose(np.sum(np.float64(d) * other), np.sum(y * weight), rtol=1e-5)
    np.testing.assert_array_equal(dx[segments == 0], 0)


def test_conv_against_torch():
    torch = pytest.importorskip("torch")
    w, x = conv_inputs()
    args = torch.from_numpy(x.transpose(0, 2, 1)), torch.from_numpy(w)[:, None]
    want = torch.nn.functional.conv1d(*args, padding=3, groups=5)[:, :, :T].numpy().transpose(0, 2, 1)
    np.testing.assert_allclose(causal_conv(x, w, packed(T)[0])[0], want, rtol=1e-6, atol=1e-6)


def test_conv_rounds_once():
    w, x = (jnp.asarray(a, jnp.bfloat16) for a in conv_inputs())
    segments, _ = packed(*LAYOUTS["packed"])
    with jax.numpy_dtype_promotion("strict"):
        y, (tail, _) = causal_conv(x, w, segments)
        want, _ = causal_conv(x.astype(jnp.float32), w, segments)
        step, _ = causal_conv(x[:, -1:], w, segments[:, -1:], (x[:, -4:-1], segments[:, -4:-1]))
    assert y.dtype == tail.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))
    np.testing.assert_array_equal(step[:, 0], y[:, -1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_rms_norm_against_transformers(dtype):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    rng = np.random.default_rng(6)
    x, gate, scale = (jnp.asarray(rng.normal(0, 2, s), dtype) for s in ((64, 32), (64, 32), (32,)))
    theirs = Qwen3NextRMSNormGated(32, eps=1e-5).to(getattr(torch, dtype))
    numbers = [torch.from_numpy(np.array(a, np.float32)).to(getattr(torch, dtype)) for a in (x, gate, scale)]
    with torch.no_grad():
        theirs.weight.copy_(numbers[2])
        want = theirs(numbers[0], numbers[1]).float().numpy()
    with jax.numpy_dtype_promotion("strict"):
        got = gated_rms_norm(x, gate, scale, 1e-5)
    assert got.dtype == dtype
    if dtype == "bfloat16":  # the same roundings, save where float32's last bit falls the other way
        assert np.mean(np.asarray(got, np.float32) == want) > 0.999
    np.testing.assert_allclose(
        np.asarray(got, np.float32), want, rtol=1e-6 if dtype == "float32" else 2**-7, atol=1e-6
    )


def test_l2_normalize():
    x = np.random.default_rng(7).normal(0, 2, (3, 4, 9)).astype(np.float32)
    x[0, 0] = 0
    want = x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True) + 1e-6)
    with jax.numpy_dtype_promotion("strict"):
        got = l2_normalize(jnp.asarray(x))
        assert l2_normalize(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(l2_normalize(x)))(x)).all()
