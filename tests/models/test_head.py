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
    return linear_cross_entropy(MODEL.unembed, head, hidden, TOKENS, weight, 4, frozen)[0]


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


# -- Label smoothing and z-loss, of heads of every kind, against the formula in float64


def soft_capped(params, x):
    cap = models.from_config(cases.config("gemma2")).config.final_logit_softcapping
    return cap * np.tanh(x @ params["embed"].T / cap)


def adapted(params, x):
    a, b = params["a"], params["b"]
    return x @ (params["lm_head"] + 2.0 * a @ b) + params["lm_head_bias"]


HEADS = {  # family, logits in numpy
    "tied, with a soft-cap": ("gemma2", soft_capped),
    "with a bias": ("phi", lambda p, x: x @ p["lm_head"] + p["lm_head_bias"]),
    "adapted, with a bias": ("phi", adapted),
    "scaled": ("cohere", lambda p, x: x @ p["embed"].T * cases.config("cohere")["logit_scale"]),
}


@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 3e-2)])
@pytest.mark.parametrize("kind", HEADS)
def test_smoothing_and_z_loss(kind, smoothing, z):
    family, logits_of = HEADS[kind]
    model = models.from_config(cases.config(family))
    D, V = model.config.hidden_size, model.config.vocab_size
    rng = np.random.default_rng(0)
    params = {
        k: rng.normal(0, 0.3, x.shape)
        for k, x in weights.flatten(weights.abstract(model.table)).items()
        if k in (model.head_path, "lm_head_bias")
    }
    if kind.startswith("adapted"):
        params |= {"a": rng.normal(0, 0.3, (D, 3)), "b": rng.normal(0, 0.3, (3, V))}
    hidden, targets = rng.normal(0, 1, (2, 7, D)), rng.integers(0, V, (2, 7))
    weight = rng.uniform(0.5, 2, (2, 7)) * (rng.random((2, 7)) < 0.6)

    def exact(params, hidden):
        logits = logits_of(params, hidden)
        lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        target = np.full(logits.shape, smoothing / V)
        np.put_along_axis(target, targets[..., None], 1 - smoothing + smoothing / V, -1)
        smooth = lse - (target * logits).sum(-1)
        nll = lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        of = (
            {"loss": nll}
            | ({"smoothed_loss": smooth} if smoothing else {})
            | ({"z_loss": lse**2} if z else {})
        )
        return ((smooth + z * lse**2) * weight).sum(), {k: (x * weight).sum() for k, x in of.items()}

    def ours(params, hidden):
        if "a" in params:
            leaf = weights.LoraWeight(params["lm_head"], params["a"], params["b"], jnp.float32(2))
            params = params | {"lm_head": leaf}
        args = model.head(params), hidden, jnp.asarray(targets), jnp.asarray(weight, jnp.float32), 5, False
        return linear_cross_entropy(model.unembed, *args, smoothing, z)

    def along(direction, h=1e-5):
        """The derivative of the exact loss, by a central difference in float64."""
        at = lambda s: jax.tree.map(lambda x, d: x + s * h * d, (params, hidden), direction)  # noqa: E731
        return (exact(*at(1))[0] - exact(*at(-1))[0]) / (2 * h)

    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, hidden))
    with jax.numpy_dtype_promotion("strict"):
        (loss, sums), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(*single)
        evaluated, _ = jax.jit(ours)(*single)  # another program: that of an evaluation
    want, want_sums = exact(params, hidden)
    np.testing.assert_allclose([loss, evaluated], want, rtol=1e-5)
    assert sums.keys() == want_sums.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, want_sums)
    if kind.startswith("adapted"):
        assert not grads[0].pop("lm_head").any()  # the base of an adapter is frozen
        frozen = {"lm_head": np.zeros_like(params["lm_head"])}
    else:
        frozen = {}
    for _ in range(6):
        draw = lambda x: rng.normal(size=x.shape)  # noqa: E731
        change, moved = {k: draw(x) for k, x in params.items()} | frozen, draw(hidden)
        slope = sum(np.sum(g * change[k]) for k, g in grads[0].items()) + np.sum(grads[1] * moved)
        np.testing.assert_allclose(slope, along((change, moved)), rtol=2e-4, atol=1e-3)
