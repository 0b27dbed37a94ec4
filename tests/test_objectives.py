"""Losses against the same formulas in PyTorch, on the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import lora
from ftjax.objectives.preference import dpo_loss, dpo_sigmoid
from ftjax.objectives.sft import next_token

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
    _, weight = next_token({k: jnp.array(v) for k, v in batch.items()})
    segments = batch["segments"][0]
    starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
    assert not np.any(np.asarray(weight)[0, starts[1:] - 1])
