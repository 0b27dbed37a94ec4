"""Products with every leaf type, and embedding noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import lora
from ftjax.ops import einsum, embed, product
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
