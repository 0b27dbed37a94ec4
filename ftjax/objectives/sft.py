"""Supervised fine-tuning: cross-entropy of the tokens that loss_weight selects."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ftjax.models import Model
from ftjax.objectives.router import NO_ROUTER, RouterLoss
from ftjax.ops import linear_cross_entropy
from ftjax.ops.attention.facts import reorder
from ftjax.ops.attention.facts import zigzag as order_of


def next_token(batch, zigzag: int = 1) -> dict:
    """The microbatch with "targets" and "weight" [B, T]: what hidden state t predicts, and how much that
    counts. With `zigzag` > 1 the tokens of each row come out in that order over so many devices
    (`ops.attention`).

    loss_weight[t] weighs the loss of predicting token t, so both are shifted by one; the last position of a
    row predicts nothing. The first token of a document carries no weight: nothing before it may predict it.
    """
    targets_BT = jnp.roll(batch["tokens"], -1, axis=1)
    same_BT = batch["segments"][:, 1:] == batch["segments"][:, :-1]
    weight_BT = jnp.where(same_BT, batch["loss_weight"][:, 1:], 0.0)
    per_token = {name: batch[name] for name in ("tokens", "positions", "segments")}
    per_token |= {"targets": targets_BT, "weight": jnp.pad(weight_BT, ((0, 0), (0, 1)))}
    if zigzag > 1:
        per_token = {name: reorder(x, order_of(zigzag)) for name, x in per_token.items()}
    return batch | per_token


def sft_loss(
    model: Model,
    params_of: Callable,
    *,
    chunk: int,
    frozen_head: bool,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
    router: RouterLoss = NO_ROUTER,
):
    """loss_fn(trainable, frozen, microbatch) of the step's contract; sums["weight"] counts trained tokens.

    sums["loss"] is the cross-entropy alone; what label smoothing, the z-loss and `router` make of it is
    reported beside it. `chunk`, `label_smoothing` and `z_loss_coef` are those of `linear_cross_entropy`.

    `params_of(trainable, frozen, rng)` puts the parameter tree together; `rng` is None outside training.
    """

    def loss_fn(trainable, frozen, batch):
        params = params_of(trainable, frozen, batch.get("rng"))
        batch = next_token(batch, model.options.zigzag)
        hidden_BTD, _, aux = model(params, batch["tokens"], batch["positions"], batch["segments"])
        inputs = model.head(params), hidden_BTD, batch["targets"], batch["weight"]
        found: Any = linear_cross_entropy(
            model.unembed, *inputs, chunk, frozen_head, label_smoothing, z_loss_coef
        )
        loss, sums = found
        weight = jnp.sum(batch["weight"])
        added, more = router(aux, weight)
        return loss + added, sums | {"weight": weight} | more

    return loss_fn
