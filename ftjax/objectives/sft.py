"""Supervised fine-tuning: cross-entropy of the tokens that loss_weight selects."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ftjax.models import Model
from ftjax.objectives.router import NO_ROUTER, RouterLoss
from ftjax.ops import linear_cross_entropy


def next_token(batch):
    """(targets, weight), each [B, T]: what hidden state t predicts, and how much that counts.

    loss_weight[t] weighs the loss of predicting token t, so both are shifted by one; the last position of a
    row predicts nothing. The first token of a document carries no weight: nothing before it may predict it.
    """
    targets_BT = jnp.roll(batch["tokens"], -1, axis=1)
    same_BT = batch["segments"][:, 1:] == batch["segments"][:, :-1]
    weight_BT = jnp.where(same_BT, batch["loss_weight"][:, 1:], 0.0)
    return targets_BT, jnp.pad(weight_BT, ((0, 0), (0, 1)))


def sft_loss(
    model: Model, params_of: Callable, *, chunk: int, frozen_head: bool, router: RouterLoss = NO_ROUTER
):
    """loss_fn(trainable, frozen, microbatch) of the step's contract; sums["weight"] counts trained tokens.

    sums["loss"] is the cross-entropy alone; what `router` adds is reported beside it.

    `params_of(trainable, frozen, rng)` puts the parameter tree together; `rng` is None outside training.
    """

    def loss_fn(trainable, frozen, batch):
        params = params_of(trainable, frozen, batch.get("rng"))
        hidden_BTD, _, aux = model(params, batch["tokens"], batch["positions"], batch["segments"])
        targets_BT, weight_BT = next_token(batch)
        loss: Any = linear_cross_entropy(
            model.unembed, model.head(params), hidden_BTD, targets_BT, weight_BT, chunk, frozen_head
        )
        weight = jnp.sum(weight_BT)
        added, sums = router(aux, weight)
        return loss + added, {"loss": loss, "weight": weight} | sums

    return loss_fn
