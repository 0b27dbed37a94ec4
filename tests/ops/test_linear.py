"""Products with every leaf type, and embedding noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from ftjax import lora
from ftjax.ops import einsum, einsums, embed, groupeds, product, target
from ftjax.weights import LoraWeight, NoisyEmbedding

pytestmark = pytest.mark.fast
EQUATIONS = {
    "BTD,DF->BTF": ((2, 3, 8), (8, 6)),
    "BTD,DNH->BTNH": ((2, 3, 8), (8, 2, 5)),
    "BTNH,NHD->BTD": ((2, 3, 2, 5), (2, 5, 8)),
}


def leaf(w_shape, ins, r=3, **kw):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, 1, shape), jnp.float32)

    return LoraWeight(
        normal(*w_shape), normal(*w_shape[:ins], r), normal(r, *w_shape[ins:]), jnp.float32(0.7), **kw
    )


def ins_of(eqn):
    x_axes, w_axes = eqn.split("->")[0].split(",")
    return sum(c in x_axes for c in w_axes)


@pytest.mark.parametrize("eqn", EQUATIONS)
def test_product_and_its_gradients(eqn):
    x_shape, w_shape = EQUATIONS[eqn]
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(0, 1, s), jnp.float32) for s in (x_shape, w_shape))
    with jax.numpy_dtype_promotion("strict"):
        got = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(product(eqn, x, w))), (0, 1))(x, w)
    want = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(jnp.einsum(eqn, x, w))), (0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("eqn", EQUATIONS)
def test_lora_equals_the_merged_weight(eqn):
    x_shape, w_shape = EQUATIONS[eqn]
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, x_shape), jnp.float32)
    w = leaf(w_shape, ins_of(eqn))

    def loss(x, factors, merge):
        adapted = w.replace(a=factors[0], b=factors[1])
        return jnp.sum(jnp.sin(einsum(eqn, x, lora.merged(adapted) if merge else adapted)))

    with jax.numpy_dtype_promotion("strict"):
        got = jax.value_and_grad(loss, (0, 1))(x, (w.a, w.b), False)
        want = jax.value_and_grad(loss, (0, 1))(x, (w.a, w.b), True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_bfloat16_lora_is_rounded_once(dtype):
    eqn = "BTD,DF->BTF"
    x_shape, w_shape = EQUATIONS[eqn]
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, x_shape), jnp.bfloat16)
    w = leaf(w_shape, 1)
    w = w.replace(base=w.base.astype(jnp.bfloat16))
    with jax.numpy_dtype_promotion("strict"):
        got = einsum(eqn, x, w, dtype)
    exact = einsum(eqn, x.astype(jnp.float32), w.replace(base=w.base.astype(jnp.float32)))
    assert got.dtype == (dtype or jnp.bfloat16)
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=0.02, atol=0.1)


def test_dropout():
    eqn, x = "BTD,DF->BTF", jnp.ones((1, 4000, 8))
    w = leaf((8, 6), 1, rng=jax.random.key(0), dropout=0.25)
    plain = w.replace(rng=None)
    np.testing.assert_array_equal(einsum(eqn, x, w.replace(dropout=0.0)), einsum(eqn, x, plain))
    np.testing.assert_array_equal(einsum(eqn, x, w), einsum(eqn, x, w))  # a function of the key
    assert not np.array_equal(einsum(eqn, x, w), einsum(eqn, x, w.replace(rng=jax.random.key(1))))
    got, want = einsum(eqn, x, w).mean((0, 1)), einsum(eqn, x, plain).mean((0, 1))
    np.testing.assert_allclose(got, want, rtol=0, atol=0.25)  # unbiased
    base = w.replace(a=jnp.zeros_like(w.a))
    np.testing.assert_array_equal(einsum(eqn, x, base), product(eqn, x, w.base))  # the base sees all of x


def test_embedding_noise():
    """Of width alpha / sqrt(length · D) by document, on look-ups only."""
    table = jnp.zeros((9, 64))
    segments = jnp.asarray([[1] * 10 + [2] * 90 + [0] * 28], jnp.int32)
    tokens = jnp.zeros((1, 128), jnp.int32)
    noisy = NoisyEmbedding(table, jax.random.key(0), 5.0)
    with jax.numpy_dtype_promotion("strict"):
        x = embed(noisy, tokens, segments, jnp.float32)
    for start, length in ((0, 10), (10, 90)):
        width = 5.0 / np.sqrt(length * 64)
        piece = np.abs(np.asarray(x[0, start : start + length]))
        assert piece.max() <= width and piece.max() > 0.97 * width
    np.testing.assert_array_equal(einsum("BTD,VD->BTV", x, noisy), einsum("BTD,VD->BTV", x, table))
    np.testing.assert_array_equal(embed(table, tokens, segments, jnp.bfloat16), 0)


def products(f, *args):
    """(shapes of the operands, dtype of the result) of every product in f's program and its gradient's."""
    found = []

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "ragged_dot_general"):
                found.append((*(v.aval.shape for v in eqn.invars[:2]), eqn.outvars[0].aval.dtype))
            for inner in jax.tree.leaves(list(eqn.params.values())):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    look(getattr(inner, "jaxpr", inner))

    look(jax.make_jaxpr(f)(*args).jaxpr)
    return found


def qkv():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 3, 8)), jnp.float32)
    eqns = ["BTD,DNH->BTNH", "BTD,DKH->BTKH", "BTD,DX->BTX"]
    ws = [leaf((8, 4, 5), 1), leaf((8, 2, 5), 1, r=2), jnp.asarray(leaf((8, 6), 1).base)]
    return eqns, x, ws


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_several_weights_of_one_input_are_each_their_own(magnitude):
    eqns, x, ws = qkv()
    if magnitude:
        ws[0] = ws[0].replace(m=1.0 + jnp.arange(20.0).reshape(4, 5))

    def loss(x, ws, together):
        ys = einsums(eqns, x, ws) if together else [einsum(e, x, w) for e, w in zip(eqns, ws, strict=True)]
        return sum(jnp.sum(jnp.sin(y)) for y in ys)

    with jax.numpy_dtype_promotion("strict"):
        got, want = (jax.value_and_grad(loss, (0, 1))(x, ws, together) for together in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_one_input_is_read_once_for_all_adapters_forward_and_backward():
    eqns, x, ws = qkv()
    loss = lambda x, ws: sum(jnp.sum(jnp.sin(y)) for y in einsums(eqns, x, ws))  # noqa: E731
    # the factors side by side, of rank 3 + 2: x · [a, a'] forward and g · [a, a']ᵀ backward
    assert sum((8, 5) in one[:2] for one in products(jax.grad(loss, (0, 1)), x, ws)) == 2
    dropped = [ws[0].replace(rng=jax.random.key(0), dropout=0.5), ws[1]]
    assert not any((8, 5) in one[:2] for one in products(lambda x: einsums(eqns[:2], x, dropped), x))


def test_experts_of_one_input_are_each_their_own():
    rng = np.random.default_rng(0)
    rows, sizes = jnp.asarray(rng.normal(0, 1, (7, 8)), jnp.float32), jnp.array([3, 0, 4], jnp.int32)
    ws = [jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), leaf((8, 6), 1)) for _ in range(2)]

    def loss(rows, ws, together):
        parts = [ws] if together else [[w] for w in ws]
        return sum(jnp.sum(jnp.sin(y / 10)) for part in parts for y in groupeds(rows, part, sizes))

    got, want = (jax.value_and_grad(loss, (0, 1))(rows, ws, together) for together in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("kind", target.KINDS)
def test_accelerators_write_no_float32_activations(kind):
    x = jnp.ones((2, 64, 32), jnp.bfloat16)
    w = leaf((32, 48), 1)
    w = w.replace(base=w.base.astype(jnp.bfloat16))

    def loss(x, w):
        return jnp.sum(einsum("BTD,DF->BTF", x, w).astype(jnp.float32))

    with target.use(kind):
        found = products(jax.grad(loss, (0, 1)), x, w)
    wide = [one for one in found if one[0] == x.shape and one[1] == w.base.shape]
    big = [out for left, right, out in found if 3 not in (*left, *right)]
    assert wide and big
    expected = {"cpu": {"float32"}, "tpu": {"float32", "bfloat16"}, "gpu": {"bfloat16"}}[kind]
    assert {str(out) for out in big} == expected  # on TPU the base's sum with the adapter's is one fusion
