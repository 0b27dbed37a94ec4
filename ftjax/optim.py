"""Optimisers and learning-rate schedules: one optax chain made from options.

Every optimiser ends in the same step, p -= lr(step) · rate(p) · (direction + weight_decay(p) · p): decay is
always decoupled from the direction (Loshchilov & Hutter 2019, arXiv:1711.05101) and scaled by the learning
rate, as in torch.optim.AdamW. Rates and decays are numbers per weight, found once from the weight's path.

What is one matrix (for Muon and Adafactor) and what is a vector (for weight decay) follows the weight table,
not an array's rank: a stacked norm is [L, D] and still a vector, a stacked projection [L, D, N, H] is L
matrices.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from ftjax import moments
from ftjax.errors import UserError
from ftjax.weights import Table, flatten, unflatten

Schedule = Callable[[Any], jax.Array]  # step, from 0 -> learning rate


@dataclasses.dataclass(frozen=True)
class OptimGroup:
    """Weights that differ from the rest in learning rate or weight decay."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    match: str
    """Regex searched in a weight's path ("layers/q/a", "embed"); the first group that matches a weight has
    it."""
    lr: float = 1.0
    """Multiplies the learning rate; 0 freezes."""
    weight_decay: float | None = None
    """In place of optim.weight_decay, and for vectors too; not given: as for other weights."""


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """The optimiser, its learning rate over time, and how they differ between weights."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """adamw; adafactor (factored second moments, no momentum, no parameter scaling); lion (wants about a
    tenth of AdamW's rate); muon (orthogonalised momentum for matrices, at AdamW's rate by scaling its updates
    to an RMS of 0.2, and AdamW for embeddings, head and vectors); sgd."""
    lr: float = 2e-4
    """Highest learning rate. 1e-4 to 5e-4 is usual for LoRA, 5e-6 to 5e-5 for full fine-tuning."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: down a cosine, down a line, level, or level and then down a line (wsd)."""
    warmup_ratio: float = 0.03
    """Share of all steps in which the learning rate rises to its highest."""
    warmup_steps: int | None = None
    """Number of such steps, in place of warmup_ratio."""
    decay_ratio: float = 0.2
    """wsd: share of all steps, the last ones, in which the learning rate falls."""
    final_lr_ratio: float = 0.0
    """The schedule ends at this share of lr."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices, embeddings and LoRA factors; norms, biases and other vectors get none
    unless a group gives it to them."""
    clip_norm: float | None = 1.0
    """Scale gradients down to this global norm; null: never."""
    beta1: float | None = None
    """adamw, lion, and muon's AdamW: decay of the first moment; not given: 0.9."""
    beta2: float | None = None
    """adamw, lion, and muon's AdamW: decay of the second moment; not given: 0.999, for lion 0.99."""
    eps: float | None = None
    """adamw and muon's AdamW: added to the denominator; not given: 1e-8."""
    momentum: float | None = None
    """sgd and muon; not given: 0.9, for muon 0.95."""
    lora_plus_ratio: float | None = None
    """LoRA+: the learning rate of the b factors is this many times that of a (Hayou et al. 2024,
    arXiv:2402.12354; 16 is usual, with a lower lr)."""
    groups: tuple[OptimGroup, ...] = ()
    """Weights with a learning rate or weight decay of their own."""
    state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How moments are kept between steps: 4, 2 or about 1 byte each. int8 is block-wise, and leaves weights
    of fewer than 4,096 elements a layer in float32."""
    offload: bool = False
    """Keep moments in the host's memory between steps: each step waits for them to come and go."""

    def __post_init__(self):
        def check(ok: bool, name: str, right: str):
            if not ok:
                raise UserError(f"optim.{name}={getattr(self, name)}: {right}")

        check(self.lr > 0, "lr", "a positive number")
        check(self.weight_decay >= 0, "weight_decay", "zero or more")
        check(
            self.clip_norm is None or self.clip_norm > 0, "clip_norm", "a positive number, or null for none"
        )
        check(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "zero or more")
        for name in ("warmup_ratio", "decay_ratio", "final_lr_ratio"):
            check(0 <= getattr(self, name) <= 1, name, "a share from 0 to 1")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            check(value is None or 0 <= value < 1, name, "a number from 0 to below 1")
        check(self.eps is None or self.eps > 0, "eps", "a positive number")
        check(
            self.lora_plus_ratio is None or self.lora_plus_ratio > 0, "lora_plus_ratio", "a positive number"
        )
        # The compiler for TPUs (jax 0.10) stops at 8-bit arrays on their way to the host.
        ok = not (self.offload and self.state_dtype == "int8")
        check(ok, "offload", "not with state_dtype: int8; bfloat16 can be, and int8 by itself takes little")
        for i, group in enumerate(self.groups):
            where = f"optim.groups[{i}]"
            try:
                re.compile(group.match)
            except re.error as e:
                raise UserError(f"{where}.match={group.match!r} is not a regular expression: {e}") from None
            if group.lr < 0:
                raise UserError(f"{where}.lr={group.lr}: a multiple of optim.lr, zero or more")
            if group.weight_decay is not None and group.weight_decay < 0:
                raise UserError(f"{where}.weight_decay={group.weight_decay}: zero or more")


def make_schedule(options: OptimOptions, total_steps: int) -> Schedule:
    """Learning rate at each step, counted from 0.

    It is lr · (step + 1) / warm-up during the warm-up, so no step is wasted at zero, and would reach
    lr · final_lr_ratio at `total_steps`, one past the last. UserError where warm-up and decay do not fit.
    """
    if total_steps < 1:
        raise UserError(f"{total_steps} training steps: there must be at least one")
    warmup = options.warmup_steps
    if warmup is None:
        warmup = math.ceil(options.warmup_ratio * total_steps)
    decay = math.ceil(options.decay_ratio * total_steps) if options.schedule == "wsd" else 0
    if options.warmup_steps is not None and warmup >= total_steps > 1:
        raise UserError(f"optim.warmup_steps={warmup}: the run has only {total_steps} steps")
    if warmup + decay > total_steps and decay:
        raise UserError(
            f"optim: {warmup} steps of warm-up and {decay} of decay (decay_ratio={options.decay_ratio}) are "
            f"more than the run's {total_steps}"
        )
    start = total_steps - decay if options.schedule == "wsd" else warmup
    length = max(total_steps - start, 1)
    final = options.final_lr_ratio

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - start) / length, 0.0, 1.0)
        match options.schedule:
            case "cosine":
                shape = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
            case "linear" | "wsd":
                shape = final + (1 - final) * (1 - done)
            case _:
                shape = jnp.ones(())
        return options.lr * jnp.where(step < warmup, (step + 1) / max(warmup, 1), shape)

    return schedule


class Geometry(NamedTuple):
    """How many leading axes of an array stack matrices, and how many of the rest are rows of one; `rows` = 0
    is a vector. `kind` says what the weight is, where that matters; "fixed" is never changed."""

    stack: int
    rows: int
    kind: Literal["linear", "lookup", "head", "vector", "a", "b", "fixed"]


def geometry(path: str, ndim: int, table: Table | None) -> Geometry:
    """From the weight table (leaves of LoRA's tree by their row); a path the table does not know is a matrix
    from two axes on."""
    row_path, _, factor = path.rpartition("/")
    known = table.rows if table is not None else {}
    if row_path in known and path not in known:
        if factor == "full":
            return geometry(row_path, ndim, table)
        if factor == "rows":
            return Geometry(0, 1, "lookup")
        if factor in ("m", "a0", "b0"):
            return Geometry(0, 0, "vector" if factor == "m" else "fixed")
    if path in known:
        row, kind = known[path], None
    elif factor in ("a", "b") and (row_path in known or table is None):
        row, kind = known.get(row_path), factor
    else:
        row, kind = None, None
    if row is None:
        return Geometry(0, 1, kind or "linear") if ndim > 1 else Geometry(0, 0, "vector")
    assert table is not None
    stack = len(table.lead(row_path if kind else path))
    if kind == "a":
        return Geometry(stack, len(row.ins), "a")
    if kind == "b":
        return Geometry(stack, 1, "b")
    if not row.ins:
        return Geometry(stack, 0, "vector")
    name = row.role if row.role in ("lookup", "head") else "linear"
    return Geometry(stack, len(row.ins), name)


def make_optimizer(
    options: OptimOptions, trainable, total_steps: int, table: Table | None = None
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optax chain for `trainable` (a nested dict of arrays or ShapeDtypeStructs), and its learning rate.

    State is float32 whatever the dtype of weights and gradients, or what `options.state_dtype` says. `table`
    says what is a matrix (see `geometry`). Nothing depends on how arrays are sharded. UserError where a group
    matches no weight, LoRA+ finds no LoRA, or all weights are too small for `state_dtype` or `offload`.
    """
    flat = flatten(trainable)
    shapes = {path: geometry(path, len(leaf.shape), table) for path, leaf in flat.items()}
    rates, decays = _per_weight(options, shapes)
    schedule = make_schedule(options, total_steps)
    stacks = {path: shape.stack for path, shape in shapes.items()}
    if all(moments.is_small(path, leaf, stacks) for path, leaf in flat.items()):
        for name in ("state_dtype",) * (options.state_dtype == "int8") + ("offload",) * options.offload:
            raise UserError(
                f"optim.{name}={getattr(options, name)}: every weight that is trained has fewer than "
                f"{moments.SMALL:,} elements a layer, and such moments stay in float32 on the device"
            )

    def kept(some: Mapping[str, Geometry]) -> optax.GradientTransformation:
        tx = _direction(options, some)
        return tx if options.state_dtype == "float32" else moments.stored(tx, options.state_dtype, stacks)

    direction = kept(shapes)
    if options.offload or options.state_dtype != "float32":
        direction = moments.one_by_one(lambda path: kept({path: shapes[path]}), stacks, options.offload)
    steps = [direction, _descend(schedule, unflatten(rates), unflatten(decays))]
    if options.clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(options.clip_norm))
    return _in_float32(optax.chain(*steps)), schedule


def _per_weight(options: OptimOptions, shapes: Mapping[str, Geometry]):
    """{path: multiple of the learning rate}, {path: weight decay}."""
    if options.lora_plus_ratio is not None and not any(s.kind == "b" for s in shapes.values()):
        raise UserError(f"optim.lora_plus_ratio={options.lora_plus_ratio}: this run trains no LoRA factors")
    rates, decays, used = {}, {}, set()
    for path, shape in shapes.items():
        index = next((i for i, g in enumerate(options.groups) if re.search(g.match, path)), None)
        group = OptimGroup("") if index is None else options.groups[index]
        used.add(index)
        rates[path] = group.lr
        if shape.kind == "b" and options.lora_plus_ratio is not None:
            rates[path] *= options.lora_plus_ratio
        decays[path] = 0.0 if shape.kind == "vector" else options.weight_decay
        if group.weight_decay is not None:
            decays[path] = group.weight_decay
        if shape.kind == "fixed":
            rates[path] = decays[path] = 0.0
    for i, group in enumerate(options.groups):
        if i not in used:
            taken = any(re.search(group.match, path) for path in shapes)
            why = "only weights that an earlier group has" if taken else "no weight"
            raise UserError(
                f"optim.groups[{i}].match={group.match!r} matches {why}; "
                f"paths are like {_sample(list(shapes))}"
            )
    return rates, decays


def _sample(paths: list[str], count: int = 8) -> str:
    """A few paths from all over the tree."""
    few = paths[:: max(1, math.ceil(len(paths) / count))]
    return ", ".join(few) + (", …" if len(few) < len(paths) else "")


def _or(value, default):
    return default if value is None else value


def _direction(options: OptimOptions, shapes: Mapping[str, Geometry]) -> optax.GradientTransformation:
    """What the step goes against, before learning rate and decay."""
    beta1, eps = _or(options.beta1, 0.9), _or(options.eps, 1e-8)
    adam = optax.scale_by_adam(b1=beta1, b2=_or(options.beta2, 0.999), eps=eps)
    match options.name:
        case "adamw":
            return adam
        case "adafactor":
            return _adafactor(unflatten(shapes))
        case "lion":
            return optax.scale_by_lion(b1=beta1, b2=_or(options.beta2, 0.99))
        case "sgd":
            return optax.trace(decay=_or(options.momentum, 0.9))
        case "muon":
            labels = {p: "muon" if s.kind in ("linear", "a", "b") else "adam" for p, s in shapes.items()}
            return optax.partition({"muon": _muon(options, shapes), "adam": adam}, unflatten(labels))


def _muon(options: OptimOptions, shapes: Mapping[str, Geometry]) -> optax.GradientTransformation:
    """Jordan et al. 2024, with the update scaled to AdamW's usual RMS of 0.2: Liu et al. 2025,
    arXiv:2502.16982."""

    def split(path):
        shape = shapes["/".join(k.key for k in path)]
        return shape.stack, shape.stack + shape.rows

    def numbers(path, x):
        first, middle = split(path)
        return contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, x.ndim)))

    def scaled(path, u):
        first, middle = split(path)
        return u * (0.2 * math.sqrt(max(math.prod(u.shape[first:middle]), math.prod(u.shape[middle:]))))

    # leaves that AdamW has are MaskedNode here, and so not visited
    by_path = jax.tree_util.tree_map_with_path
    return optax.chain(
        contrib.scale_by_muon(
            beta=_or(options.momentum, 0.95), weight_dimension_numbers=lambda tree: by_path(numbers, tree)
        ),
        optax.stateless(lambda updates, params: by_path(scaled, updates)),
    )


def _adafactor(shapes) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, arXiv:1804.04235, without parameter scaling and momentum.

    Moments are factored over the rows and columns of each matrix of a stack; each matrix's update is clipped
    to an RMS of 1 by itself.
    """
    inner = optax.scale_by_factored_rms()

    def matrices(tree):
        def one(shape: Geometry, x):
            split = shape.stack + shape.rows
            lead, ins, outs = x.shape[: shape.stack], x.shape[shape.stack : split], x.shape[split:]
            return x.reshape(*lead, *([math.prod(ins)] if ins else []), math.prod(outs))

        return jax.tree.map(one, shapes, tree, is_leaf=lambda s: isinstance(s, Geometry))

    def clipped(shape: Geometry, u, like):
        axes = tuple(range(shape.stack, u.ndim))
        rms = jnp.sqrt(jnp.mean(u**2, axis=axes, keepdims=True))
        return (u / jnp.maximum(1.0, rms)).reshape(like.shape)

    def update(updates, state, params=None):
        small = matrices(updates)
        direction, state = inner.update(small, state, small)  # optax wants params for their shapes alone
        is_leaf = lambda s: isinstance(s, Geometry)  # noqa: E731
        return jax.tree.map(clipped, shapes, direction, updates, is_leaf=is_leaf), state

    return optax.GradientTransformation(lambda params: inner.init(matrices(params)), update)


def _descend(schedule: Schedule, rates, decays) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        lr = schedule(state.count)

        def one(u, p, rate, decay):
            return -lr * rate * (u + decay * p if decay else u)

        updates = jax.tree.map(one, updates, params, rates, decays)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    tx = optax.with_extra_args_support(tx)

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates, state, params=None, **extra):
        return tx.update(cast(updates), state, cast(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(cast(params)), update)


def state_shardings(tx: optax.GradientTransformation, trainable, shardings, replicated):
    """A tree of shardings for `tx.init(trainable)`: moments as their weights, in the memory where `tx` puts
    them; all else `replicated`.

    `trainable` may be abstract; `shardings` is a tree like it. Without this, jit makes fresh moments whole on
    every device.
    """
    state = jax.eval_shape(tx.init, trainable)
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_flatten_with_path(trainable)[0], jax.tree.leaves(shardings), strict=True
        )
    }

    def one(path, leaf, where):
        weight = moments.weight_of(path, known)
        shape, sharding = (None, replicated) if weight is None else known[weight]
        if shape is None or len(shape) != len(leaf.shape):
            sharding = replicated
        elif shape != leaf.shape:
            if str(path[-1]) != ".scale":
                return replicated
            sharding = _where_it_divides(sharding, leaf.shape)  # scales of blocks
        host = where.memory_space == moments.HOST
        return sharding.with_memory_kind("pinned_host") if host else sharding

    avals = jax.tree.unflatten(jax.tree.structure(state), jax.make_jaxpr(tx.init)(trainable).out_avals)
    return jax.tree_util.tree_map_with_path(one, state, avals)


def _where_it_divides(sharding, shape: tuple[int, ...]):
    spec = list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
    names = [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec]
    parts = [math.prod(sharding.mesh.shape[n] for n in name) for name in names]
    even = [s if n % p == 0 else None for s, n, p in zip(spec, shape, parts, strict=True)]
    while even and even[-1] is None:  # as jit writes it of what it returns
        even.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*even))
