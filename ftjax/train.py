"""The training step and loop that every recipe shares: a recipe is a loss function. LoRA and meshes are not
known here."""

import contextlib
import dataclasses
import logging
import re
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ftjax import distributed, moments
from ftjax.errors import UserError

log = logging.getLogger("ftjax")

# loss_fn(trainable, frozen, microbatch) -> (summed loss, sums); sums["weight"] is the denominator
LossFn = Callable[[Any, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


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
    remat: Literal["none", "act", "up", "mlp", "mlp_offload", "attention", "full", "offload", "auto"] = "none"
    """What the backward pass recomputes to save memory: nothing; norms and activations; one product of the
    MLP; the MLP; the same, what is kept lying in the host's memory; all but attention; everything; all but
    attention, what is kept lying in the host's memory. `auto` compiles ahead of time and takes the fastest
    that fits."""
    mlp_chunk: int | None = None
    """Positions of each row that go through the MLP at a time, for long rows: nothing of the MLP is kept, and
    less of it exists at once."""
    unroll: bool | int | Literal["auto"] = "auto"
    """Layers an iteration of the layer loop (true: all): longer compiles, faster steps on CPU and GPU. `auto`
    is all on a GPU, else 1."""
    attention: Literal["auto", "xla", "splash", "cudnn", "pallas"] = "auto"
    """The implementation of attention: chosen by the device and the model; XLA's; splash, for TPUs; cuDNN's;
    ftjax's own kernel for GPUs."""
    loss_chunk: int = 1024
    """Tokens of each device to which the head is applied at a time: fewer need less memory (6 bytes · tokens
    · vocabulary), many fewer are slower."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the whole vocabulary while training; 0.1 is
    usual, 0 is off. The loss that is reported stays the plain cross-entropy."""
    z_loss_coef: float = 0.0
    """Weight of logsumexp² of the logits, which holds their size (PaLM's z-loss; 1e-4 is usual)."""
    neftune_alpha: float = 0.0
    """Width of NEFTune's embedding noise; 5 is usual, 0 is off."""
    trainable: tuple[str, ...] = ()
    """Regexes on weights' paths ("norm", "bias$", "layers.[01].mlp"): with lora, what is trained whole beside
    the factors; without, the only weights that are trained. A path is the name in the checkpoint less
    ".weight"."""
    freeze: tuple[str, ...] = ()
    """Without lora: regexes on the paths of weights that are not trained ("embed_tokens",
    "layers.[0-7].")."""
    router_aux_loss_coef: float | None = None
    """Weight of the loss that spreads tokens over a mixture's experts; where not given, config.json's if the
    router is trained, else 0. It is taken over each microbatch."""
    router_z_loss_coef: float = 0.0
    """Weight of the loss on the size of the router's logits (ST-MoE)."""

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "microbatches", "loss_chunk", "mlp_chunk", "unroll"):
            value = getattr(self, name)
            if not isinstance(value, bool | str | None) and value < 1:  # unroll is a bool or a number
                raise UserError(f"train.{name}={value}: at least 1")
        if not self.epochs > 0:
            raise UserError(f"train.epochs={self.epochs}: more than 0")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"train.label_smoothing={self.label_smoothing}: a number from 0 to below 1")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "z_loss_coef"):
            if not (getattr(self, name) or 0) >= 0:
                raise UserError(f"train.{name}={getattr(self, name)}: 0 (off) or more")
        for name in ("trainable", "freeze"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as e:
                    raise UserError(f"train.{name}: {pattern!r} is not a regular expression: {e}") from None
        if not self.neftune_alpha >= 0:
            raise UserError(f"train.neftune_alpha={self.neftune_alpha}: 0 (off) or more")
        if self.batch_size % self.microbatches:
            divisors = [i for i in range(1, self.batch_size + 1) if self.batch_size % i == 0]
            raise UserError(
                f"train.microbatches={self.microbatches} does not divide train.batch_size={self.batch_size}; "
                f"{', '.join(map(str, divisors))} would"
            )


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Evaluation while training; it needs data.eval or data.eval_fraction."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    every: int | None = None
    """Steps between evaluations; each epoch's end where not given. The last step is always evaluated."""
    at_start: bool = True
    """Evaluate before the first step, too."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better loss."""
    keep_best: bool = True
    """Export the weights of the best evaluation instead of the last step's."""

    def __post_init__(self):
        for name in ("every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"eval.{name}={value}: at least 1")


class TrainState(struct.PyTreeNode):
    """What training changes, and so what a checkpoint holds."""

    step: jax.Array
    trainable: Any
    opt_state: Any
    finite: (
        jax.Array
    )  # False after a step whose loss or gradient was not: the state stays as it was before it


def init_state(
    trainable, tx: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainState:
    """Step 0. `shardings` is a tree like it; without it the state is made where jax puts it."""

    def rest(trainable):
        return jnp.zeros((), jnp.int32), tx.init(trainable), jnp.bool_(True)

    out = None if shardings is None else (shardings.step, shardings.opt_state, shardings.finite)
    step, opt_state, finite = jax.jit(rest, out_shardings=out)(trainable)
    return TrainState(step, trainable, opt_state, finite)


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, seed: int, shardings: TrainState | None = None
):
    """A jitted (state, frozen, batch) -> (state, metrics), with `state` donated.

    `batch` leaves are [A, B, …]: A microbatches, one gradient. Sums of loss and gradient are taken over all
    of them and divided once by the summed sums["weight"], so that the result does not depend on how the batch
    was cut. Each microbatch gets `rng`, a key that is a function of (seed, step, its index). Metrics are sums
    per weight, with "weight" itself, "grad_norm" and "finite": where the loss or a gradient is not finite,
    the state keeps its values and its step, for good. With `shardings`, a tree like the state, the state
    comes out as it went in; without, as jax chooses, which may compile the second step anew."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    update = optax.with_extra_args_support(tx).update

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
        metrics = {k: v / weight for k, v in sums.items() if k != "weight"}
        metrics |= {"weight": sums["weight"], "grad_norm": optax.global_norm(grads)}
        finite = state.finite & jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics["loss"])
        updates, opt_state = update(grads, state.opt_state, state.trainable, finite=finite)
        trainable = optax.apply_updates(state.trainable, updates)
        after = TrainState(state.step + 1, trainable, opt_state, finite)

        # The host reads metrics a step late; until it does, a bad step and those after it change nothing.
        def choose(new, old):  # what lies in the host's memory has been chosen already
            return new if moments.in_host_memory(new) else jnp.where(finite, new, old)

        kept = jax.tree.map(choose, after, state)
        return kept.replace(finite=finite), metrics | {"finite": finite}

    out = None if shardings is None else (shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


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


def one_at_a_time() -> bool:
    """Whether a program must have ended before the next is started: on CPU devices collectives of two that
    are under way can wait for one another, until XLA aborts."""
    return jax.default_backend() == "cpu"


def settled(results):
    """`results`, once they are there if programs run one at a time."""
    return jax.block_until_ready(results) if one_at_a_time() else results


class Interrupted(Exception):
    """A signal asked the run to stop; everything up to `step` is saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class NonFinite(UserError):
    """The loss or its gradient was not a finite number; the state before that step is saved."""


@contextlib.contextmanager
def signals():
    """Yields a list to which the first SIGTERM or Ctrl-C adds its number; a second Ctrl-C interrupts at
    once. Where the main thread hangs see `distributed.loop`."""
    caught: list[int] = []

    def on_signal(signum, frame):
        if caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signum)
        again = "; Ctrl-C again stops at once, without saving" * (signum == signal.SIGINT)
        log.warning("stopping after this step%s", again)

    try:
        old = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever owns it handles its signals
        yield caught
        return
    try:
        with distributed.loop():
            yield caught
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


@dataclasses.dataclass
class Progress:
    """What the loop itself must remember over a restart."""

    best_loss: float = float("inf")
    best_step: int | None = None
    worse: int = 0  # evaluations since the best one


def fit(
    state: TrainState,
    train_step: Callable,
    batches: Iterable,
    *,
    total_steps: int,
    save: Callable[[TrainState, Progress], None],
    save_every: int,
    report: Callable[[int, dict[str, float]], None],
    documents: Callable[[int], list[str]],
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    eval_every: int = 0,
    eval_options: EvalOptions = EvalOptions(),
    progress: Progress | None = None,
    agree: Callable[[int], int] = lambda signum: signum,
) -> tuple[TrainState, Progress]:
    """Run `train_step(state, batch)` from state.step to total_steps, saving, evaluating and reporting on the
    way.

    `batches` begins at state.step. Metrics are read one step late (but where `one_at_a_time`), so that the
    host never holds up the device. `report(step, metrics)` gets "seconds" of the step and, of those,
    "input_wait", in which there was no batch to go on with; `evaluate` reports for itself and returns its
    metrics, of which "loss" chooses the best step. `agree(signum)`, called each step with the signal that
    this process got (0: none), gives the one that all processes stop for. Raises Interrupted after saving
    when a signal came, and NonFinite after saving the last good state, naming the step and its documents."""
    progress = progress or Progress()
    step, pending = int(state.step), None
    clock = time.perf_counter()

    def read() -> None:
        """Report the step whose metrics are still on the device."""
        nonlocal pending, clock
        if pending is None:
            return
        (at, metrics, waited), pending = pending, None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, clock = now - clock, now
        if not values.pop("finite"):
            with distributed.at_leisure():
                save(state.replace(finite=jax.jit(jnp.ones_like)(state.finite)), progress)
            names = documents(at)
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise NonFinite(
                f"step {at + 1}: the loss is {values['loss']} (gradient norm {values['grad_norm']}). The "
                f"state before it is saved at step {at}. Its batch held: {shown}. Look at those documents "
                "first; a smaller learning rate or float32 usually helps"
            )
        report(at + 1, values | {"seconds": seconds, "input_wait": waited})

    def look() -> None:
        """Evaluate, and remember whether it was the best."""
        nonlocal clock
        assert evaluate is not None
        with distributed.at_leisure():
            loss = evaluate(state)["loss"]
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, step, 0
        else:
            progress.worse += 1
        clock = time.perf_counter()

    def out_of_patience() -> bool:
        return eval_options.patience is not None and progress.worse >= eval_options.patience

    def keep() -> None:
        with distributed.at_leisure():
            save(state, progress)

    with signals() as caught:
        if evaluate and step == 0 and eval_options.at_start:
            look()
            if eval_options.keep_best:
                keep()  # it is the best so far
        source = iter(batches)
        while step < total_steps and not out_of_patience():
            asked = time.perf_counter()
            batch = next(source)
            waited = time.perf_counter() - asked
            distributed.progress()
            state, metrics = train_step(state, batch)
            read()
            pending = step, metrics, waited
            if one_at_a_time():
                jax.block_until_ready(metrics)
                read()
            step += 1
            last = step == total_steps
            if evaluate and (last or (eval_every and step % eval_every == 0)):
                read()
                look()
            done = last or out_of_patience()
            stop = agree(caught[0] if caught else 0)
            fresh_best = eval_options.keep_best and progress.best_step == step
            if done or stop or fresh_best or step % save_every == 0:
                read()
                keep()
                clock = time.perf_counter()
            if stop and not done:
                raise Interrupted(stop, step)
    return state, progress
