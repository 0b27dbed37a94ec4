"""What a training step takes, by arithmetic: memory of a device by part, collectives, time, before anything
is compiled. docs/planning.md has the formulas and how far they are from what compilers say."""

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any

import jax.numpy as jnp

from ftjax import flops, lora
from ftjax.models import Model
from ftjax.ops import memory
from ftjax.quant import QuantOptions
from ftjax.weights import Rules


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a mesh splits weights and activations: the sizes of its axes, and the two dicts of ftjax.mesh."""

    sizes: Mapping[str, int]
    weights: Rules
    activations: Rules

    def over(self, letters: str, rules: Rules) -> int:
        """The devices over which an array with these axes is split, each mesh axis used once."""
        axes = {axis for letter in letters for axis in rules.get(letter, ())}
        return prod(self.sizes[axis] for axis in axes)

    @property
    def rows(self) -> int:
        """The devices that have other tokens."""
        return self.over("X", self.activations)

    @property
    def devices(self) -> int:
        return prod(self.sizes.values())


@dataclasses.dataclass(frozen=True)
class Job:
    """A step as the estimate sees it. `model` has the options that it is computed with; `plan` is None where
    every weight is trained; rows and length are those of a whole batch."""

    model: Model
    plan: lora.Plan | None
    layout: Layout
    rows: int
    length: int
    microbatches: int = 1
    loss_chunk: int = 1024
    quant: QuantOptions | None = None
    reference: bool = False  # whether the frozen model has a forward pass of its own (DPO)

    @property
    def tokens(self) -> int:
        """Of a device, in a microbatch."""
        return max(1, self.rows * self.length // self.microbatches // self.layout.rows)

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.model.options.dtype).itemsize

    @property
    def head_trained(self) -> bool:
        return self.plan is None or self.model.head_path in self.plan


# -- What is kept of each layer


def kept(job: Job, rung: str | None = None) -> tuple[float, float]:
    """(bytes on the device, bytes in the host's memory) that the layers keep for their backward pass, by the
    names of a rung of ops.memory's ladder."""
    here = there = 0.0
    for prefix, layers in job.model.table.stacks.items():
        device, host = _kept_of_layer(job, prefix, rung or job.model.options.remat)
        here += len(layers) * device * job.tokens
        there += len(layers) * host * job.tokens
    return here, there


def of_layer(job: Job) -> float:
    """Bytes of a token that the largest layer computes and autodiff keeps if nothing says otherwise."""
    return max(_kept_of_layer(job, prefix, "none", chunked=False)[0] for prefix in job.model.table.stacks)


def _worked_on(job: Job) -> float:
    """Bytes of what a layer computes, of the positions that its parts have in hand at a time."""
    chunk = min(job.model.options.mlp_chunk or job.tokens, job.tokens)

    def size(prefix: str) -> float:
        whole, outside = (_kept_of_layer(job, prefix, "none", chunked)[0] for chunked in (False, True))
        return outside * job.tokens + (whole - outside) * chunk

    return max(map(size, job.model.table.stacks))


def _kept_of_layer(job: Job, prefix: str, rung: str, chunked: bool = True) -> tuple[float, float]:
    """Bytes of a token, as `kept`."""
    table = job.model.table
    names = [path.removeprefix(prefix) for path in table.rows if path.startswith(prefix)]
    names = [name for name in names if "/" not in name]
    one, chunk = memory.LADDER[rung], job.model.options.mlp_chunk
    cut = chunked and chunk is not None and chunk < job.length
    between = job.layout.over("T", job.layout.activations) // job.layout.over("S", job.layout.activations)
    D = table.sizes["D"] * job.width / between  # sp splits what is between the layers
    wanted, on_host = memory.kept(rung, names)
    saved = {name: _named(job, prefix, name, cut) for name in names + [memory.ATTENTION, *memory.SMALL]}
    if "mlp_post_norm" not in names:  # nobody reads what is only added to the stream
        saved["down"] = 0.0
    device = sum(saved.get(name, 0.0) for name in {*wanted})
    host = sum(saved.get(name, 0.0) for name in on_host) + (D if one.host else 0.0)
    if not one.host:
        device += D  # a layer's input is the loop's carry, which is kept whatever the rung
    if rung == "none" and not cut:  # norms and activations are kept, too
        norms = sum(name.endswith("norm") and table.rows[prefix + name].axes == "D" for name in names)
        inner = saved.get("up", 0.0) + saved.get("gate_up", 0.0) / 2
        device += norms * D + inner + saved.get("experts_up", saved.get("experts_gate_up", 0.0) / 2)
    return device, host


def _named(job: Job, prefix: str, name: str, cut: bool) -> float:
    """Bytes of a token under a name of the ladder."""
    table, cfg = job.model.table, job.model.config
    copies = _copies(job)
    if name == memory.ATTENTION:
        row = table.rows.get(prefix + "o")
        if row is None:
            return 0.0
        parts = job.layout.over(row.ins, job.layout.activations)
        return (prod(table.ins(prefix + "o")) * job.width + 4 * cfg.num_attention_heads) / parts
    if name == "lora":
        adapted = [(p, one) for p, one in (job.plan or {}).items() if p.startswith(prefix)]
        ranks = sum(
            one.rank * (copies if table.rows[p].many else 1)
            for p, one in adapted
            if isinstance(one, lora.Adapted) and not (cut and _in_mlp(p.removeprefix(prefix)))
        )
        return ranks * job.width
    if name == "route":
        return 8.0 * copies if prefix + "router" in table.rows else 0.0
    row = table.rows.get(prefix + name)
    if row is None or not row.ins or row.role not in ("linear", "router") or (cut and _in_mlp(name)):
        return 0.0
    width = 4 if row.role == "router" else job.width
    parts = job.layout.over(row.outs, job.layout.activations)
    return prod(table.outs(prefix + name)) * width * (copies if row.many else 1) / parts


def _copies(job: Job) -> int:
    """Rows that a device's experts have room for, for each token of its own: where a mesh splits the experts,
    those of all who share them, each with as many experts as a device can have of it (ops.moe.experts)."""
    table = job.model.table
    if not any(row.many for row in table.rows.values()):
        return 1
    over = job.layout.over("E", job.layout.activations)
    return over * min(flops.active_experts(job.model), table.sizes["E"] // over)


def _in_mlp(name: str) -> bool:
    return name in ("up", "gate", "down", "gate_up", "router") or name.startswith(("shared_", "experts_"))


# -- Memory of a device


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes that lie on a device before a step begins, from the shapes of its arguments."""

    weights: int
    adapters: int
    optimiser: int
    batch: int
    trainable: int  # of the adapters, or of the weights where they are trained

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.optimiser + self.batch


def features(job: Job, held: Held) -> dict[str, float]:
    """What temporaries are made of, in bytes of a device."""
    table, split = job.model.table, job.layout
    tp = lambda path: split.over(_free(table.dims(path), split), split.weights)  # noqa: E731
    gathers = any(split.over(table.dims(p), split.weights) > tp(p) for p in table.rows)
    chunk = min(job.loss_chunk, job.tokens)
    vocabulary = job.model.config.vocab_size / split.over("V", split.activations)
    head = prod(table.shape(job.model.head_path)) / tp(job.model.head_path)
    layers = [
        {
            path: prod(table.shape(path)[1:]) / tp(path)
            for path in table.rows
            if path.startswith(prefix) and "/" not in path.removeprefix(prefix) and table.rows[path].ins
        }
        for prefix in table.stacks
    ]
    layer, largest = (max(f(sizes.values()) for sizes in layers) for f in (sum, max))
    experts = max(sum(n for path, n in sizes.items() if table.rows[path].many) for sizes in layers)
    worked = _worked_on(job)
    copies = _copies(job)
    rows = float(copies * job.tokens * table.sizes["D"] * job.width) if copies > 1 else 0.0
    trains, tied = job.plan is None, job.model.head_path == "embed"
    return {
        "kept": kept(job)[0],
        "gradients": float(held.trainable) * (2 if job.microbatches > 1 else 1),
        "stream": float(job.tokens * table.sizes["D"] * job.width),
        "logits": 4.0 * chunk * vocabulary,
        "head": job.width * head if gathers or trains else 0.0,
        "tied head": job.width * head if gathers and tied and not job.head_trained else 0.0,
        "head gradient": 4.0 * head if job.head_trained and trains else 0.0,
        "layer": worked,
        "experts": worked if copies > 1 else 0.0,
        "expert rows": rows,
        "adapted rows": rows if any(table.rows[path].many for path in job.plan or ()) else 0.0,
        "gathered": job.width * layer if gathers or trains else 0.0,
        "gathered ahead": job.width * experts if gathers and not trains else 0.0,
        "a gradient": 4.0 * largest if trains else 0.0,
    }


def _free(dims: str, split: Layout) -> str:
    """The axes of a weight that stay split while it is used: those that activations are split over, too."""
    return "".join(x for x in dims if split.weights.get(x) == split.activations.get(x))


# How many bytes each byte of a feature stands for. What the layers keep and the gradients are there all the
# while; over them comes the larger of two moments, that of the loss and that of a layer's backward pass. The
# constants that are not 1 were fitted to the rows of benchmarks/plan.py that say so; docs/planning.md has
# what it comes to on the others.
ALWAYS = {"kept": 1.0, "gradients": 1.0}
LOSS = {"stream": 3.0, "logits": 1.0, "head": 1.0, "tied head": 0.55, "head gradient": 1.0}
LAYER = {"layer": 1.8, "gathered": 1.0, "a gradient": 1.0}
LAYER |= {"experts": 0.47, "expert rows": 3.5, "adapted rows": 6.0, "gathered ahead": 1.0}
CODE = 40e6  # bytes of a step's own instructions


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes of a device by part; `activations` are what layers keep for the backward pass, `temporaries` all
    else that comes and goes. `host` lies in the host's memory."""

    weights: float
    adapters: float
    optimiser: float
    batch: float
    activations: float
    temporaries: float
    results: float
    code: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "host")


def parts(job: Job, held: Held, found: Any = None) -> Parts:
    """By arithmetic; or, where `found` (a plan.Memory) says what a compiler came to, that, the activations in
    it by arithmetic."""
    on_device, on_host = kept(job)
    if found is not None:
        live = found.total - found.arguments - found.results - found.code
        activations = min(on_device, live)
        temporaries = live - activations
        rest = found.arguments - held.total  # padding of small arrays
        results, code, on_host = found.results + max(rest, 0), found.code, found.host
    else:
        sizes = features(job, held)
        always, *moments = (
            sum(factor * sizes[name] for name, factor in group.items()) for group in (ALWAYS, LOSS, LAYER)
        )
        activations, temporaries = on_device, always - on_device + max(moments)
        results, code = 0.0, CODE
    return Parts(
        held.weights,
        held.adapters,
        held.optimiser,
        held.batch,
        activations,
        temporaries,
        results,
        code,
        on_host,
    )


# -- Collectives


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of a step: `received` bytes of a device from its slice, `across` from other slices."""

    kinds: dict[str, dict[str, float]]  # {kind: {"count", "bytes", "received"}}
    received: float
    across: float


def traffic(job: Job, slices: int = 1) -> Traffic:
    """What the axes of a mesh must move: a weight is gathered once a pass (what is computed again in the
    backward pass shares its) in the width of the products; gradients of trained weights are reduced in
    float32; where a product's inputs are split its output is summed, forward and backward. Over cp keys and
    values are gathered and their gradients scattered; over ep tokens are gathered, sums scattered. Where a
    slice has whole copies of the model only gradients go between slices. docs/sharding.md."""
    table, split, A = job.model.table, job.layout, job.microbatches
    kinds: dict[str, dict[str, float]] = {}
    received = across = 0.0

    def add(kind: str, count: float, size: float, n: int, all_slices: bool = False) -> None:
        nonlocal received, across
        if n <= 1 or not count:
            return
        factor, total = 2 if kind == "all-reduce" else 1, count * size
        one = kinds.setdefault(kind, {"count": 0.0, "bytes": 0.0, "received": 0.0})
        one["count"] += count
        one["bytes"] += total / n if kind == "reduce-scatter" else total
        far, m = 0.0, n
        if slices > 1 and n % slices == 0 and all_slices:  # within each slice, and then between them
            m = n // slices
            far = total / m if kind == "reduce-scatter" else total
        elif slices > 1 and n % slices == 0 and split.sizes["dp"] % slices:
            far = total * (slices - 1) / n
        near = total * factor * (m - 1) / m - (far if m == n else 0.0)
        one["received"] += near + far
        across, received = across + far, received + near

    for path, row in table.rows.items():
        dims = table.dims(path)
        whole, free = split.over(dims, split.weights), split.over(_free(dims, split), split.weights)
        layers = len(table.layers(path) or (0,))
        size = prod(table.shape(path)) / layers / free
        how = job.plan.get(path) if job.plan is not None else lora.Whole()
        lookup = row.role == "lookup" and path != job.model.head_path
        if row.ins and not lookup:
            uses = 1 + job.reference  # the head's, which all microbatches share
            if table.layers(path) is not None:
                uses = A * (2 + job.reference)
            add("all-gather", layers * uses, size * _stored(job, path), whole // free)
        if isinstance(how, lora.Whole):
            kind = "reduce-scatter" if whole > free else "all-reduce"
            add(kind, layers * A, 4.0 * size, split.rows, all_slices=True)
        elif isinstance(how, lora.Adapted):
            factors = how.rank * (prod(table.ins(path)) + prod(table.outs(path)))
            size_ = 4.0 * factors * prod(table.lead(path)[1:]) / free
            add("all-reduce", layers * A, size_, split.rows, all_slices=True)
        inner = split.over(row.ins, split.weights) if row.ins else 1
        shared = split.over(_free(row.ins, split), split.weights)
        if inner > 1 and shared > 1 and table.layers(path) is not None:
            add("all-reduce", layers * A * 2, job.tokens * table.sizes["D"] * job.width, shared)
        ep, cp = split.over("E", split.activations), split.over("S", split.activations)
        name = path.rpartition("/")[2]
        if name in ("k", "v"):
            whole = cp * job.tokens * prod(table.outs(path)) * job.width
            whole /= split.over(row.outs, split.activations)
            add("all-gather", layers * A * 2, whole, cp)
            add("reduce-scatter", layers * A, whole, cp)
        if name == "router":
            whole = ep * job.tokens * table.sizes["D"] * job.width
            add("all-gather", layers * A * 2, whole, ep)
            add("reduce-scatter", layers * A * 2, whole, ep)
    return Traffic(kinds, received, across)


def _stored(job: Job, path: str) -> float:
    """Bytes of a weight in what is gathered: codes of a quantised one, else the width of the products."""
    if job.quant is None or job.model.table.rows[path].role != "linear":
        return float(job.width)
    from ftjax import quant

    if path not in quant.chosen(job.quant, job.model.table):
        return float(job.width)
    return 1.0 if job.quant.kind in ("int8", "fp8") else 0.5


def recomputed(job: Job) -> set[str]:
    """Names of products in layers that the backward pass does again."""
    rung = job.model.options.remat
    if rung == "none":
        return set()
    out = set()
    for prefix in job.model.table.stacks:
        names = [p.removeprefix(prefix) for p in job.model.table.rows if p.startswith(prefix)]
        saved = {name for where in memory.kept(rung, names) for name in where}
        needed = {n for n in names if job.model.table.rows[prefix + n].ins} - saved
        out |= needed - ({"down"} if "mlp_post_norm" not in names else set())
    return out


# -- Time


PRODUCTS, ATTENTION, MEMORY, NETWORK = 0.75, 0.30, 0.80, 0.80
FORMULA = (
    f"seconds = max(compute, network); compute = products / ({PRODUCTS:g} · peak) + attention / "
    f"({ATTENTION:g} · peak) + elementwise bytes / ({MEMORY:g} · memory bandwidth), network = bytes received "
    f"/ ({NETWORK:g} · link bandwidth) + bytes from other slices / ({NETWORK:g} · network bandwidth)"
)


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step, by part. `seconds` has communication hidden behind computation, `unhidden` none of
    it. `model_flops` are those of the whole step over all devices, MFU's."""

    products: float
    attention: float
    elementwise: float
    links: float
    network: float
    model_flops: float
    peak: float  # of all devices

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.elementwise

    @property
    def seconds(self) -> float:
        return max(self.compute, self.links + self.network)

    @property
    def unhidden(self) -> float:
        return self.compute + self.links + self.network

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.seconds * self.peak)

    @property
    def bound(self) -> str:
        return "computation" if self.compute >= self.links + self.network else "communication"


def time(job: Job, chip: Any, moved: Traffic, held: Held, work: flops.Work | None = None) -> Time:
    """The roofline (FORMULA) on a chips.Chip's devices; `work` says what a step's rows hold, where not given
    one document each."""
    work = work or flops.Work.rows(job.rows, job.length)
    asked = flops.step(job.model, job.plan, work, reference=job.reference)
    n, peak = job.layout.devices, chip.peak
    mixed = asked.part("attention")
    again = recomputed(job)
    more = sum(
        2 * size * work.positions
        for path, (_, size) in flops.matrices(job.model).items()
        if path.rpartition("/")[2] in again
    )
    mixed_again = asked.forward["attention"] if job.model.options.remat == "full" else 0
    products = (asked.total - mixed + more) / n
    layers = sum(len(layers) for layers in job.model.table.stacks.values())
    steps = job.microbatches
    bytes_moved = 4 * of_layer(job) * job.tokens * steps * layers
    bytes_moved += _factors_traffic(job) * job.tokens * steps
    bytes_moved += 12 * job.model.config.vocab_size * work.trained / n  # float32 logits, three times
    bytes_moved += 7 * held.trainable  # weights and two moments read and written, gradients read
    bytes_moved += 2 * kept(job)[0] * steps
    return Time(
        products=products / (PRODUCTS * peak.bf16),
        attention=(mixed + mixed_again) / n / (ATTENTION * peak.bf16),
        elementwise=bytes_moved / (MEMORY * peak.bandwidth),
        links=moved.received / (NETWORK * chip.link),
        network=moved.across / (NETWORK * chip.network),
        model_flops=float(asked.total),
        peak=n * peak.bf16,
    )


def _factors_traffic(job: Job) -> float:
    """Bytes of a token that LoRA's products read and write in all layers: each reads what goes into its
    weight and adds to what comes out, forward and twice backward."""
    total = 0.0
    for path, how in (job.plan or {}).items():
        if isinstance(how, lora.Adapted):
            table = job.model.table
            layers = len(table.layers(path) or (0,))
            copies = flops.active_experts(job.model) if table.rows[path].many else 1
            each = prod(table.ins(path)) + 2 * prod(table.outs(path))
            parts = job.layout.over(table.rows[path].outs, job.layout.activations)
            total += 3.0 * job.width * layers * copies * each / parts
    return total
