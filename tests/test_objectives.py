"""Losses against the same formulas in PyTorch, on the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import lora, weights
from ftjax.objectives.preference import dpo_loss, dpo_sigmoid
from ftjax.objectives.sft import next_token, sft_loss

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
PLAN = lora.plan(lora.LoraConfig(r=4, lora_alpha=8), tiny.model().table)


def trl_sigmoid(chosen, rejected, reference_chosen, reference_rejected, beta, smoothing):
    """TRL's DPOTrainer, loss_type="sigmoid"."""
    logits = (chosen - rejected) - (reference_chosen - reference_rejected)
    loss = (
        -torch.nn.functional.logsigmoid(beta * logits) * (1 - smoothing)
        - torch.nn.functional.logsigmoid(-beta * logits) * smoothing
    )
    return loss, beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_equals_trl_formula(smoothing):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-30, 10, (2, 5, 3, 2)).astype(np.float32)
    loss, rewards = dpo_sigmoid(jnp.array(policy), jnp.array(reference), 0.3, smoothing)
    p, r = torch.tensor(policy), torch.tensor(reference)
    want, chosen, rejected = trl_sigmoid(p[..., 0], p[..., 1], r[..., 0], r[..., 1], 0.3, smoothing)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rewards, torch.stack([chosen, rejected], -1), rtol=1e-5)


def test_dpo_on_packed_rows_equals_torch_on_single_documents():
    """The whole loss: our packed forward against each document alone, summed by torch."""
    model, base = tiny.model(), tiny.base()
    adapters = tiny.adapters(PLAN, model.table)
    rows = [tiny.documents(4, 5), tiny.documents(2, 6)]
    batch = {k: v[0] for k, v in tiny.pack(rows, 56).items()}
    batch["loss_weight"] = (batch["loss_weight"] > 0).astype(np.float32)
    batch |= {"pairs": np.array([[1, 1], [1, 0]], np.float32)}
    loss_fn = dpo_loss(
        model,
        lambda t, f, rng: lora.attach(f, t, PLAN),
        beta=0.1,
        label_smoothing=0.1,
        chunk=8,
        frozen_head=True,
    )
    loss, sums = jax.jit(loss_fn)(adapters, base, batch)

    forward = jax.jit(model.logits)

    def summed(params, tokens, trained):
        padded = np.pad(tokens, (0, 16 - len(tokens)))[None]  # one shape to compile; what follows is not seen
        logits = torch.tensor(np.array(forward(params, padded)))[0, : len(tokens)]
        logp = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(tokens[1:, None]).long())[:, 0]
        return (logp * torch.tensor((trained[1:] > 0).astype(np.float32))).sum()

    tuned = lora.attach(base, adapters, PLAN)
    total, margin = 0.0, 0.0
    for row in rows:
        for chosen, rejected in zip(row[::2], row[1::2], strict=True):
            values = [summed(p, *d) for p in (tuned, base) for d in (chosen, rejected)]
            one, reward_chosen, reward_rejected = trl_sigmoid(*values, 0.1, 0.1)
            total += float(one)
            margin += float(reward_chosen - reward_rejected)
    assert sums["weight"] == 3
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(sums["reward_margin"], margin, rtol=1e-4, atol=1e-6)


def test_next_token_never_crosses_documents():
    batch = {k: v[0] for k, v in tiny.pack([tiny.documents(3)], 48).items()}
    batch["loss_weight"] = np.ones_like(batch["loss_weight"])  # the first token of each document, too
    weight = next_token({k: jnp.array(v) for k, v in batch.items()})["weight"]
    segments = batch["segments"][0]
    starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
    assert not np.any(np.asarray(weight)[0, starts[1:] - 1])


@pytest.mark.parametrize("kind", ["every weight, NEFTune, tied", "an adapted head with dropout"])
def test_noise_beside_the_head_has_gradients(kind):
    """Random keys in the tree that the head is taken from, and NEFTune's noise not in the logits."""
    batch = {k: v[0] for k, v in tiny.pack([tiny.documents(3, 5)], 48).items()} | {"rng": jax.random.key(1)}
    if kind == "an adapted head with dropout":
        model = tiny.model(tie_word_embeddings=False)
        frozen = weights.init(jax.random.key(0), model.table)
        plan = lora.plan(lora.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), model.table)
        trainable = tiny.adapters(plan, model.table)

        def params_of(trainable, frozen, rng):
            return lora.attach(frozen, trainable, plan, rng=rng, dropout=0.3)
    else:
        model, trainable, frozen = tiny.model(), tiny.base(), {}

        def params_of(trainable, frozen, rng):
            return trainable | {"embed": weights.NoisyEmbedding(trainable["embed"], rng, 5.0)}

    loss_fn = sft_loss(model, params_of, chunk=48, frozen_head=False)

    def dense(trainable):
        params = params_of(trainable, frozen, batch["rng"])
        hidden, _, _ = model(params, batch["tokens"], batch["positions"], batch["segments"])
        after = next_token(batch)
        targets, weight = after["targets"], after["weight"]
        order = jnp.argsort(weight == 0, axis=1, stable=True)
        hidden, targets, weight = (
            jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), 1)
            for x in (hidden, targets, weight)
        )
        head = params[model.head_path]
        if isinstance(head, weights.LoraWeight):
            head = head.replace(rng=jax.random.fold_in(head.rng, 0))
        else:
            head = trainable["embed"]
        logp = jax.nn.log_softmax(model.unembed(head, hidden))
        return -jnp.sum(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weight)

    got = jax.jit(jax.value_and_grad(lambda t: loss_fn(t, frozen, batch)[0]))(trainable)
    want = jax.jit(jax.value_and_grad(dense))(trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)
