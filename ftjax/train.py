"""The training step that every recipe shares: a recipe is a loss function. LoRA and meshes are not known here."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct

# loss_fn(trainable, frozen, microbatch) -> (summed loss, sums); sums["weight"] is the denominator
LossFn = Callable[[Any, Any, dict[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How long and how to train."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    epochs: float = 1.0
    """Passes over the training data; ignored where max_steps is given."""
    max_steps: int | None = None
    """Optimiser steps."""
    batch_size: int = 8
    """Rows of an optimiser step, over all devices and microbatches."""
    microbatches: int = 1
    """Parts into which a batch is cut to save memory; the result is that of one part."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and products, and of the frozen base. Losses, norms and LoRA factors are float32."""
    remat: Literal["none", "act", "mlp", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing; norms and activations; the MLP; all but products; everything."""
    unroll: bool | int = 1
    """Layers an iteration of the layer loop (true: all): longer compiles, faster steps on CPU and GPU."""
    loss_chunk: int = 256
    """Positions of each row at which the head is applied at a time."""
    neftune_alpha: float = 0.0
    """Width of NEFTune's embedding noise; 5 is usual, 0 is off."""


class TrainState(struct.PyTreeNode):
    """What training changes, and so what a checkpoint holds."""

    step: jax.Array
    trainable: Any
    opt_state: Any
    finite: jax.Array  # False after a step whose loss or gradient was not: the state stays as it was before it


def init_state(trainable, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), jnp.bool_(True))


def make_train_step(loss_fn: LossFn, tx: optax.GradientTransformation, seed: int):
    """A jitted (state, frozen, batch) -> (state, metrics), with `state` donated.

    `batch` leaves are [A, B, …]: A microbatches, one gradient. Sums of loss and gradient are taken over all of
    them and divided once by the summed sums["weight"], so that the result does not depend on how the batch was
    cut. Each microbatch gets `rng`, a key that is a function of (seed, step, its index). Metrics are sums per
    weight, with "weight" itself, "grad_norm" and "finite": where the loss or a gradient is not finite, the state
    keeps its values and its step, for good.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)

    def train_step(state: TrainState, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        count = jax.tree.leaves(batch)[0].shape[0]
        batch = batch | {"rng": jax.random.split(key, count)}
        if count == 1:
            grads, sums = grad_fn(state.trainable, frozen, jax.tree.map(lambda x: x[0], batch))
        else:
            grads, sums = _accumulate(grad_fn, state.trainable, frozen, batch)
        weight = jnp.maximum(sums["weight"], 1e-9)  # a batch of nothing but padding changes nothing
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {k: v / weight for k, v in sums.items() if k != "weight"}
        metrics |= {"weight": sums["weight"], "grad_norm": optax.global_norm(grads)}
        finite = state.finite & jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics["loss"])
        after = TrainState(state.step + 1, trainable, opt_state, finite)
        # The host reads metrics a step late; until it does, a bad step and those after it change nothing.
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return kept.replace(finite=finite), metrics | {"finite": finite}

    return jax.jit(train_step, donate_argnums=0)


def _accumulate(grad_fn, trainable, frozen, batch):
    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, grad_fn(trainable, frozen, microbatch)), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(grad_fn, trainable, frozen, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, batch)[0]


def make_eval_step(loss_fn: LossFn):
    """A jitted (trainable, frozen, batch) -> sums over all microbatches of one batch."""

    def eval_step(trainable, frozen, batch):
        def one(_, microbatch):
            return None, loss_fn(trainable, frozen, microbatch)[1]

        return jax.tree.map(lambda x: x.sum(0), jax.lax.scan(one, None, batch)[1])

    return jax.jit(eval_step)
