"""Preference tuning: losses on the log-probabilities of a chosen and a rejected answer to one prompt."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.models import Model
from ftjax.objectives.router import NO_ROUTER, RouterLoss
from ftjax.objectives.sft import next_token
from ftjax.ops import linear_logprobs


def dpo_sigmoid(policy_BP2, reference_BP2, beta: float, label_smoothing: float):
    """(loss, rewards) of each pair, [B, P] and [B, P, 2], from summed log-probabilities (chosen, rejected).

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing as in cDPO (Mitchell 2023): the labels are
    taken to be flipped with that probability. Rewards are beta · (policy - reference)."""
    rewards_BP2 = beta * (policy_BP2 - reference_BP2)
    margin_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
    keep = -jax.nn.log_sigmoid(margin_BP) * (1.0 - label_smoothing)
    return keep - jax.nn.log_sigmoid(-margin_BP) * label_smoothing, rewards_BP2


def pair_logprobs(model: Model, params, batch, *, chunk: int, frozen_head: bool):
    """(summed log-probabilities of the trained tokens of each pair, float32 [B, P, 2]; the model's aux).

    Segments 2i+1 and 2i+2 of a row are the chosen and the rejected document of its pair i; batch["pairs"] is
    [B, P].
    """
    batch = next_token(batch, model.options.zigzag)
    hidden_BTD, _, aux = model(params, batch["tokens"], batch["positions"], batch["segments"])
    targets_BT, weight_BT = batch["targets"], batch["weight"]
    logp_BT: Any = linear_logprobs(
        model.unembed, model.head(params), hidden_BTD, targets_BT, weight_BT, chunk, frozen_head
    )
    B, P = batch["pairs"].shape
    by_segment = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=2 * P + 1))
    return by_segment(logp_BT * weight_BT, batch["segments"])[:, 1:].reshape(B, P, 2), aux


def dpo_loss(
    model: Model,
    params_of: Callable,
    *,
    beta: float,
    label_smoothing: float,
    chunk: int,
    frozen_head: bool,
    router: RouterLoss = NO_ROUTER,
):
    """loss_fn(trainable, frozen, microbatch) of the step's contract; sums["weight"] counts pairs.

    The reference model is the frozen tree as it is: under LoRA the base, which is in memory anyway.
    """

    def loss_fn(trainable, frozen, batch):
        params = params_of(trainable, frozen, batch.get("rng"))
        policy, aux = pair_logprobs(model, params, batch, chunk=chunk, frozen_head=frozen_head)
        reference, _ = pair_logprobs(model, frozen, batch, chunk=chunk, frozen_head=True)
        reference, pairs_BP = jax.lax.stop_gradient(reference), batch["pairs"]
        loss_BP, rewards_BP2 = dpo_sigmoid(policy, reference, beta, label_smoothing)
        chosen_BP, rejected_BP = jax.lax.stop_gradient((rewards_BP2[..., 0], rewards_BP2[..., 1]))

        def total(x_BP):
            return jnp.sum(x_BP * pairs_BP)

        loss, weight = total(loss_BP), jnp.sum(pairs_BP)
        added, sums = router(aux, weight)
        return loss + added, {
            "loss": loss,
            "reward_chosen": total(chosen_BP),
            "reward_rejected": total(rejected_BP),
            "reward_margin": total(chosen_BP - rejected_BP),
            "reward_accuracy": total((chosen_BP > rejected_BP).astype(jnp.float32)),
            "weight": weight,
        } | sums

    return loss_fn
