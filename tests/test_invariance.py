"""What must not depend on how a batch was cut, packed or spread over devices."""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny

from ftjax import lora, mesh, train, weights
from ftjax.objectives.preference import dpo_loss
from ftjax.objectives.sft import sft_loss

PLAN = lora.plan(lora.LoraConfig(r=4, lora_alpha=8), tiny.model().table)


def params_of(trainable, frozen, rng):
    return lora.attach(frozen, trainable, PLAN, rng=rng)


@functools.cache
def sft_step():
    loss = sft_loss(tiny.model(), params_of, chunk=8, frozen_head=True)
    return train.make_train_step(loss, optax.sgd(1.0), 0)


def after_step(batch, step=None, base=None, trainable=None):
    """(adapters after one SGD step of rate 1, metrics): the difference to before is the gradient."""
    trainable = trainable or tiny.adapters(PLAN, tiny.model().table)
    state = train.init_state(trainable, optax.sgd(1.0))
    state, metrics = (step or sft_step())(state, base or tiny.base(), batch)
    return jax.tree.map(np.asarray, state.trainable), jax.device_get(metrics)


def assert_same(one, two, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(one[1]["loss"], two[1]["loss"], rtol=rtol)
    np.testing.assert_allclose(one[1]["grad_norm"], two[1]["grad_norm"], rtol=rtol)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one[0], two[0])


DOCUMENTS = tiny.documents(8)


def test_packed_equals_one_document_a_row():
    packed = tiny.pack([DOCUMENTS[:4], DOCUMENTS[4:]], 48)
    alone = tiny.pack([[d] for d in DOCUMENTS], 16)
    one, two = after_step(packed), after_step(alone)
    assert one[1]["weight"] == two[1]["weight"]
    assert_same(one, two)


def test_order_in_the_row_does_not_matter():
    assert_same(
        after_step(tiny.pack([DOCUMENTS[:4], DOCUMENTS[4:]], 48)),
        after_step(tiny.pack([DOCUMENTS[3::-1], DOCUMENTS[:3:-1]], 48)),
    )


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_equal_one_batch(microbatches):
    batch = tiny.pack([DOCUMENTS[i : i + 2] for i in (0, 2, 4, 6)], 32)
    cut = {k: v.reshape(microbatches, -1, v.shape[-1]) for k, v in batch.items()}
    assert_same(after_step(batch), after_step(cut))


def test_padding_rows_change_nothing():
    batch = tiny.pack([DOCUMENTS[i : i + 2] for i in (0, 2, 4, 6)], 32)
    padded = {k: np.concatenate([v, np.zeros_like(v)], 1) for k, v in batch.items()}
    assert_same(after_step(batch), after_step(padded))


def test_a_batch_of_padding_alone_changes_nothing():
    batch = {k: np.zeros_like(v) for k, v in tiny.pack([DOCUMENTS[:2]], 32).items()}
    after, metrics = after_step(batch)
    assert metrics["finite"] and metrics["weight"] == 0
    before = tiny.adapters(PLAN, tiny.model().table)
    jax.tree.map(np.testing.assert_array_equal, after, jax.tree.map(np.asarray, before))


def dpo_batch():
    rows = [DOCUMENTS[:4], DOCUMENTS[4:6]]
    return tiny.pack(rows, 48) | {"pairs": np.array([[[1, 1], [1, 0]]], np.float32)}


@functools.cache
def odd():
    """A model with an odd vocabulary and a head of its own, and its weights."""
    model = tiny.model(vocab_size=97, tie_word_embeddings=False)
    return model, weights.init(jax.random.key(0), model.table)


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [(recipe, shape) for recipe in ("sft", "dpo", "full") for shape in ((8, 1), (4, 2), (2, 2))]
    + [("odd", (4, 2)), ("an adapted head", (4, 2))],
)
def test_any_mesh_equals_one_device(shape, recipe):
    model, plan = tiny.model(), PLAN
    batch = tiny.pack([[d] for d in DOCUMENTS], 16)
    if recipe == "dpo":
        rows = [DOCUMENTS[i : i + 2] for i in (0, 2, 4, 6)] * 2
        batch = tiny.pack(rows, 32) | {"pairs": np.ones((1, 8, 1), np.float32)}
        loss = dpo_loss(model, params_of, beta=0.1, label_smoothing=0.1, chunk=8, frozen_head=True)
    elif recipe == "an adapted head":
        model = odd()[0]
        plan = lora.plan(lora.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), model.table)
        attach = lambda t, f, rng: lora.attach(f, t, plan)  # noqa: E731
        loss = sft_loss(model, attach, chunk=8, frozen_head=False)
    elif recipe == "sft":
        loss = sft_loss(model, params_of, chunk=8, frozen_head=True)
    else:
        model = odd()[0] if recipe == "odd" else model
        loss = sft_loss(model, lambda t, f, rng: t, chunk=8, frozen_head=False, label_smoothing=0.1)
    whole = recipe in ("full", "odd")
    base = tiny.base() if model.config.vocab_size == 96 else odd()[1]
    trainable = base if whole else tiny.adapters(plan, model.table)
    step = train.make_train_step(loss, optax.sgd(1.0), 0)

    def run(trainable, base, batch):
        state = train.init_state(jax.tree.map(lambda x: x.copy(), trainable), optax.sgd(1.0))
        state, metrics = step(state, base, batch)
        return jax.tree.map(np.asarray, state.trainable), jax.device_get(metrics)

    frozen = {} if whole else base
    one = run(trainable, frozen, batch)
    devices = mesh.make_mesh(
        mesh.MeshOptions(fsdp=shape[0], tp=shape[1]), jax.devices()[: shape[0] * shape[1]]
    )
    with mesh.use(devices):
        base_shardings = weights.shardings(model.table, mesh.weight_rules(devices, model.table), devices)
        adapter_shardings = mesh.adapter_shardings(devices, plan, model.table)
        spread = jax.device_put(trainable, base_shardings if whole else adapter_shardings)
        frozen = {} if whole else jax.device_put(frozen, base_shardings)
        many = run(spread, frozen, jax.device_put(batch, mesh.batch_sharding(devices)))
    assert_same(one, many, atol=1e-5 if recipe == "odd" else 2e-6)


def test_dropout_depends_on_seed_and_step_alone():
    batch = tiny.pack([DOCUMENTS[:4], DOCUMENTS[4:]], 48)

    def noisy(trainable, frozen, rng):
        return lora.attach(frozen, trainable, PLAN, rng=rng, dropout=0.3)

    loss = sft_loss(tiny.model(), noisy, chunk=8, frozen_head=True)
    losses = {}
    for seed in (0, 1):
        step = train.make_train_step(loss, optax.sgd(0.0), seed)
        state = train.init_state(tiny.adapters(PLAN, tiny.model().table), optax.sgd(0.0))
        for i in range(2):
            state, metrics = step(state, tiny.base(), batch)
            losses[seed, i] = float(metrics["loss"])
    assert len(set(losses.values())) == 4, losses
    again = train.init_state(tiny.adapters(PLAN, tiny.model().table), optax.sgd(0.0))
    step = train.make_train_step(loss, optax.sgd(0.0), 1)
    assert float(step(again, tiny.base(), batch)[1]["loss"]) == losses[1, 0]
