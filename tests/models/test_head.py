"""A head with a bias (Phi): the chunked loss and its gradients against the logits written out."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import lora, models, weights
from ftjax.ops import linear_cross_entropy

MODEL = models.from_config(cases.config("phi"))
TOKENS = jax.random.randint(jax.random.key(0), (2, 11), 0, MODEL.config.vocab_size)
HIDDEN = jax.random.normal(jax.random.key(1), (2, 11, MODEL.config.hidden_size))
HEAD = {
    k: jax.random.normal(jax.random.key(i), x.shape)
    for i, (k, x) in enumerate(sorted(weights.abstract(MODEL.table).items()))
    if k.startswith("lm_head")
}


def plain(params, hidden):
    logp = jax.nn.log_softmax(MODEL.unembed(MODEL.head(params), hidden))
    return -jnp.take_along_axis(logp, TOKENS[..., None], -1).sum()


def chunked(params, hidden, frozen=False):
    head, weight = MODEL.head(params), jnp.ones(TOKENS.shape)
    return linear_cross_entropy(MODEL.unembed, head, hidden, TOKENS, weight, 4, frozen)


def same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)


def test_trained_and_frozen():
    value, grads = jax.value_and_grad(plain, (0, 1))(HEAD, HIDDEN)
    assert set(HEAD) == {"lm_head", "lm_head_bias"} and np.abs(grads[0]["lm_head_bias"]).max() > 0.1
    same(jax.value_and_grad(chunked, (0, 1))(HEAD, HIDDEN), (value, grads))
    same(jax.grad(lambda x: chunked(HEAD, x, True))(HIDDEN), grads[1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapted(dropout):
    plan = lora.plan(lora.LoraConfig(r=3, target_modules=("lm_head",)), MODEL.table)
    adapters = lora.init(jax.random.key(2), plan, MODEL.table)
    adapters = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)

    def loss(f):
        rng = jax.random.key(3)
        return lambda a, x: f(lora.attach(HEAD, a, plan, rng=rng, dropout=dropout), x)

    ours, grads = jax.value_and_grad(loss(chunked), (0, 1))(adapters, HIDDEN)
    if dropout:  # each chunk draws a mask of its own: nothing to compare with but that it is dropped
        assert np.isfinite(ours) and abs(ours - loss(plain)(adapters, HIDDEN)) > 1e-3
    else:
        same((ours, grads), jax.value_and_grad(loss(plain), (0, 1))(adapters, HIDDEN))
