"""Weight tables: one row per parameter; everything else is derived from it.

A model file declares rows `path -> Weight`. A row's axes give the array's shape, its sharding, its layout in
a Hugging Face checkpoint and the LoRA factors that fit it. The leaf types that may stand in a parameter tree
in place of an array live here too; `ops.linear` and `ops.moe` are the places that compute with them.

Axis letters: B batch, T query length, S key length, D hidden_size, N query heads, K key/value heads, G = N/K,
H head_dim, F intermediate_size, V vocab_size, L layers, E experts, R LoRA rank, A microbatches, X local and
said; a family may give others a meaning in its table's sizes."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """A named pair of inverse functions between a checkpoint's array and ours.

    `load(x, lead, ins, outs)` and `save(x, lead, ins, outs)` take one checkpoint tensor and three shapes: the
    axes of separate matrices that the tensor holds (experts kept in one tensor), the row's inputs and
    outputs.
    """

    name: str
    load: Callable[[np.ndarray, tuple, tuple, tuple], np.ndarray]
    save: Callable[[np.ndarray, tuple, tuple, tuple], np.ndarray]


def _load_linear(x, lead, ins, outs):
    n = len(lead)
    x = x.reshape(*lead, *outs, *ins)
    return x.transpose(*range(n), *range(n + len(outs), x.ndim), *range(n, n + len(outs)))


def _save_linear(x, lead, ins, outs):
    n = len(lead)
    x = x.transpose(*range(n), *range(n + len(ins), x.ndim), *range(n, n + len(ins)))
    return x.reshape(*lead, math.prod(outs), math.prod(ins))


def _load_plain(x, lead, ins, outs):
    return x.reshape((*lead, *ins, *outs))


LINEAR = Layout("linear", _load_linear, _save_linear)  # torch.nn.Linear keeps [out, in], we keep [*in, *out]
IN_OUT = Layout(  # a matrix kept [in, out]: GPT-2's Conv1D, experts of one parameter
    "in_out", _load_plain, lambda x, lead, ins, outs: x.reshape(*lead, math.prod(ins), math.prod(outs))
)
LOOKUP = dataclasses.replace(IN_OUT, name="lookup")  # an embedding table: a row for each input
VECTOR = Layout(  # a norm's scale or a bias: flat in the checkpoint
    "vector", _load_plain, lambda x, lead, ins, outs: x.reshape(*lead, math.prod(outs))
)
DEPTHWISE = Layout(  # torch.nn.Conv1d with a filter a channel: [channels, 1, width]; axes "CX"
    "depthwise", _load_plain, lambda x, lead, ins, outs: x.reshape(*lead, outs[0], 1, outs[1])
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter. `axes` is "in->out" ("D->NH"), or just "out" for a vector; letters before a colon
    ("E:D->F") count separate matrices.

    `hf` is its name in the checkpoint, `{layer}` standing for the layer's index and `{expert}` for the
    expert's where each has a tensor of its own. `layout` is LINEAR for a matrix and VECTOR for a vector
    unless said. `role` is "linear", "router", "lookup", "head" or "vector", and decides what LoRA's
    "all-linear" and the optimisers' groups take it for.

    `torch` is the parameter's name in the module that transformers builds, where that differs from `hf`;
    `part` = (i, n) says that the row is the i-th of n equal parts of that parameter's outputs."""

    axes: str
    hf: str
    layout: Layout = None  # type: ignore[assignment]
    init: str = "normal"  # or "ones", "zeros"
    role: str = ""
    torch: str = ""
    part: tuple[int, int] = (0, 1)

    def __post_init__(self):
        matrix = "->" in self.axes
        if self.layout is None:
            object.__setattr__(self, "layout", LINEAR if matrix else VECTOR)
        if not self.role:
            role = "vector" if not matrix else "lookup" if self.layout is LOOKUP else "linear"
            object.__setattr__(self, "role", role)
        if not self.torch:
            object.__setattr__(self, "torch", self.hf)

    @property
    def many(self) -> str:
        return self.axes.partition(":")[0] if ":" in self.axes else ""

    @property
    def ins(self) -> str:
        return self.axes.rpartition(":")[2].partition("->")[0] if "->" in self.axes else ""

    @property
    def outs(self) -> str:
        return self.axes.rpartition(":")[2].rpartition("->")[2]

    @property
    def module(self) -> str:
        """The module that LoRA's settings name: the checkpoint name less `.weight`."""
        return module_of(self.hf)


def module_of(name: str) -> str:
    """A parameter's module, or the parameter itself where it has a name of its own in a module of several."""
    return name.removesuffix(".weight")


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers whose kinds repeat with a period, looped over as one: `blocks` are (prefix of the
    paths, kind) of each layer in a period, `layers[i]` the checkpoint's layers stacked under blocks[i]."""

    name: str
    blocks: tuple[tuple[str, str], ...]
    layers: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        return len(self.layers[0])


def find_runs(kinds: Sequence[str]) -> tuple[Run, ...]:
    """The layers, given the kind of each, cut into the runs with the fewest blocks to compile.

    Layers all of one kind are one run; a dense beginning and experts after it are two; three of one kind
    before each of another are one run of period four, and what is left at the end a run of its own.
    """
    n = len(kinds)
    # best[i] = (blocks to compile, runs, (period, repeats) of the first run) for kinds[i:]
    best: list[tuple[int, int, tuple[int, int]]] = [(0, 0, (0, 0))] * (n + 1)
    for i in reversed(range(n)):
        options = []
        for period in range(1, min(16, n - i) + 1):
            repeats = 1
            while kinds[i + repeats * period : i + (repeats + 1) * period] == kinds[i : i + period]:
                repeats += 1
            blocks, runs, _ = best[i + period * repeats]
            options.append((period + blocks, 1 + runs, (period, repeats)))
        best[i] = min(options)
    out, i, used = [], 0, {}
    while i < n:
        period, repeats = best[i][2]
        pattern = list(kinds[i : i + period])
        name = pattern[0] if period == 1 else "period" if repeats > 1 else "tail"
        used[name] = used.get(name, 0) + 1
        name += str(used[name]) if used[name] > 1 else ""
        inner = [k if pattern.count(k) == 1 else f"{k}_{j}" for j, k in enumerate(pattern)]
        prefixes = [f"{name}/"] if period == 1 else [f"{name}/{x}/" for x in inner]
        layers = tuple(tuple(range(i + j, i + period * repeats, period)) for j in range(period))
        out.append(Run(name, tuple(zip(prefixes, pattern, strict=True)), layers))
        i += period * repeats
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one model with the numbers that its letters stand for, and the runs that its stacked rows
    belong to. `others` is a regex of names in its checkpoints that are no part of it: carried along."""

    rows: Mapping[str, Weight]
    sizes: Mapping[str, int]
    runs: tuple[Run, ...] = ()
    others: str = r".*rotary_emb\.inv_freq"

    @functools.cached_property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """{prefix: the checkpoint's layers stacked under it}."""
        return {
            prefix: layers
            for run in self.runs
            for (prefix, _), layers in zip(run.blocks, run.layers, strict=True)
        }

    def layers(self, path: str) -> tuple[int, ...] | None:
        """The checkpoint layers stacked in `path`, None where it is not stacked."""
        return self.stacks.get(path.rpartition("/")[0] + "/")

    def dims(self, path: str) -> str:
        """Axis letters of the stored array, in order: "LDNH" for a stacked "D->NH"."""
        row = self.rows[path]
        return self.lead_dims(path) + row.ins + row.outs

    def lead_dims(self, path: str) -> str:
        """Letters of the axes that count separate matrices: "L", "LE", ""."""
        return ("" if self.layers(path) is None else "L") + self.rows[path].many

    def _shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.sizes[x] for x in letters)

    def ins(self, path: str) -> tuple[int, ...]:
        return self._shape(self.rows[path].ins)

    def outs(self, path: str) -> tuple[int, ...]:
        return self._shape(self.rows[path].outs)

    def lead(self, path: str) -> tuple[int, ...]:
        """Shape of the axes that count separate matrices."""
        layers = self.layers(path)
        return (() if layers is None else (len(layers),)) + self._shape(self.rows[path].many)

    def together(self, path: str) -> tuple[int, ...]:
        """Those of `lead` that one checkpoint tensor holds."""
        row = self.rows[path]
        return () if "{expert}" in row.hf else self._shape(row.many)

    def apart(self, path: str) -> tuple[int, ...]:
        """Those of `lead` over which the checkpoint keeps separate tensors."""
        lead = self.lead(path)
        return lead[: len(lead) - len(self.together(path))]

    def shape(self, path: str) -> tuple[int, ...]:
        return self.lead(path) + self.ins(path) + self.outs(path)

    def names(self, path: str) -> list[str]:
        """The checkpoint names that `path` holds, in the order of `apart`."""
        return self._names(path, self.rows[path].hf, "{expert}" in self.rows[path].hf)

    def torch_names(self, path: str) -> list[str]:
        """The parameter in transformers' module for each of `names`."""
        return self._names(path, self.rows[path].torch, "{expert}" in self.rows[path].hf)

    def _names(self, path: str, name: str, experts: bool) -> list[str]:
        layers = self.layers(path)
        each = range(math.prod(self._shape(self.rows[path].many))) if experts else (0,)
        return [name.format(layer=i, expert=e) for i in layers or (0,) for e in each]

    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(self.shape(path)) for path in self.rows)


def hf_shape(table: Table, path: str) -> tuple[int, ...]:
    """Shape that one checkpoint tensor of `path` must have."""
    shapes = table.together(path), table.ins(path), table.outs(path)
    probe = np.broadcast_to(np.zeros((), np.int8), sum(shapes, ()))
    return table.rows[path].layout.save(probe, *shapes).shape


def from_hf(table: Table, path: str, x: np.ndarray) -> np.ndarray:
    """What one checkpoint tensor of `path` holds, in our layout."""
    return table.rows[path].layout.load(x, table.together(path), table.ins(path), table.outs(path))


def to_hf_one(table: Table, path: str, x: np.ndarray) -> np.ndarray:
    """One checkpoint tensor of `path`. Inverse of from_hf."""
    return table.rows[path].layout.save(x, table.together(path), table.ins(path), table.outs(path))


def to_hf(table: Table, path: str, x) -> dict[str, np.ndarray]:
    """{checkpoint name: array} of the whole of `path`."""
    x = np.asarray(x)
    parts = x.reshape(-1, *x.shape[len(table.apart(path)) :])
    return {name: to_hf_one(table, path, one) for name, one in zip(table.names(path), parts, strict=True)}


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A random key that depends on `path` alone, not on which other paths exist."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def init(key: jax.Array, table: Table, dtype=jnp.float32) -> dict:
    """Random params: N(0, 1/fan_in) matrices, N(0, 0.02²) look-up tables, unit norms. No forward pass is
    run."""

    def one(path, row):
        shape = table.shape(path)
        if row.init != "normal":
            return jnp.full(shape, float(row.init == "ones"), dtype)
        std = 0.02 if row.role == "lookup" else max(math.prod(table.ins(path)), 1) ** -0.5
        return (std * jax.random.normal(path_key(key, path), shape)).astype(dtype)

    return unflatten_dict({path: one(path, row) for path, row in table.rows.items()}, sep="/")


def abstract(table: Table, dtype=jnp.float32) -> dict:
    """The params tree as jax.ShapeDtypeStruct leaves."""
    return unflatten_dict({p: jax.ShapeDtypeStruct(table.shape(p), dtype) for p in table.rows}, sep="/")


Rules = Mapping[str, tuple[str, ...]]  # axis letter -> the mesh axes that it may be split over


def spec(axes: str, rules: Rules, mesh) -> PartitionSpec:
    """Where an array with these axis letters lies on a mesh: in the order of `rules` each letter takes those
    of its mesh axes that none before it took; axes of one device, and manual ones (within shard_map), are
    left out."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = [name for name, kind in kinds if mesh.shape[name] > 1 and kind != AxisType.Manual]
    found = {}
    for letter, names in rules.items():
        if letter in axes:
            found[letter] = tuple(name for name in names if name in free)
            free = [name for name in free if name not in names]
    parts = [found.get(letter, ()) for letter in axes]
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in parts))


def weight_sharding(axes: str, rules: Rules, mesh) -> NamedSharding:
    """Of a weight with these axes; those of no rule are whole. So is the hidden axis of a vector (a norm's
    scale), stacked or not: to gather it would take more time than its bytes are worth."""
    if axes.strip("LE") == "D":
        rules = {letter: names for letter, names in rules.items() if letter != "D"}
    return NamedSharding(mesh, spec(axes, rules, mesh))


def shardings(table: Table, rules: Rules, mesh) -> dict:
    """A tree of NamedSharding, each weight's by `weight_sharding`."""
    return unflatten_dict(
        {path: weight_sharding(table.dims(path), rules, mesh) for path in table.rows}, sep="/"
    )


class LoraWeight(struct.PyTreeNode):
    """A frozen weight [*in, *out] with factors a [*in, R], b [R, *out]: acts as base + scale · a b.

    Axes that count separate matrices (layers, experts) lead everywhere, and are all of `scale`'s. With `rng`
    (a key a layer) the input of the a·b branch is dropped out at rate `dropout`. With `m` [*out] each output
    of that sum is scaled to the norm m (DoRA, arXiv:2402.09353), where m is not infinite."""

    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    rng: jax.Array | None = None
    dropout: float = struct.field(pytree_node=False, default=0.0)
    m: jax.Array | None = None


class StackedLora(struct.PyTreeNode):
    """A frozen weight with X adapters at once, another for each row of the batch: a [*lead, X, *in, R],
    b [*lead, X, R, *out] with the scale in it, `gain` [*lead, X, *out] that multiplies the outputs (DoRA), or
    None; `which` int32 [*lead, B] is each row's adapter, -1 for none."""

    base: Any
    a: jax.Array
    b: jax.Array
    which: jax.Array
    gain: jax.Array | None = None


class RowsWeight(struct.PyTreeNode):
    """A frozen table of which some rows are trained: `rows` [n, D] stand for `indices` int32 [n] along `axis`
    of `base` (0 of an embedding [V, D], 1 of a head [D, V])."""

    base: Any
    rows: jax.Array
    indices: jax.Array
    axis: int = struct.field(pytree_node=False, default=0)


class QuantWeight(struct.PyTreeNode):
    """A frozen weight [*lead, *in, *out] in few bits: a code's value of `kind` times the scale of its block.

    The inputs, of sizes `ins`, are one axis here, of G equal blocks: `scale` is [*lead, G, *out], `codes`
    [*lead, J, *out], a byte an input, or of a kind of four bits half as many: a block's first half is in the
    low bits, its second in the high ones. Where `nested` is given the scales are codes themselves (QLoRA's
    double quantisation): [*lead, n] float32, one for each 256 of a matrix's scales, outputs first, with
    `offset` [*lead] added. `outs` counts the output axes. `ops.dequant` says what they stand for."""

    codes: Any
    scale: Any
    nested: Any = None
    offset: Any = None
    kind: str = struct.field(pytree_node=False, default="nf4")
    ins: tuple[int, ...] = struct.field(pytree_node=False, default=())
    outs: int = struct.field(pytree_node=False, default=1)

    @property
    def lead(self) -> int:
        """How many axes count separate matrices."""
        return self.scale.ndim - 1 - self.outs

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight it stands for."""
        return (*self.scale.shape[: self.lead], *self.ins, *self.scale.shape[self.lead + 1 :])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return math.prod(self.ins) // self.scale.shape[self.lead]


class ObservedWeight(struct.PyTreeNode):
    """A weight [*lead, *in, *out] whose inputs are looked at: the gradient of `moment` [*lead, I, I] (zeros)
    is Σ x xᵀ over the rows x that a gradient reaches, whatever that is."""

    base: Any
    moment: jax.Array


class NoisyEmbedding(struct.PyTreeNode):
    """An embedding table whose look-ups get uniform noise: NEFTune, arXiv:2310.05914. Other uses see
    `base`."""

    base: Any
    rng: jax.Array
    alpha: float = struct.field(pytree_node=False)


def fold_in(tree, i):
    """The tree for part `i` of what its weights act on: with other masks of dropout there than in others. Of
    an array of parts, [M], each row of what the weights act on is one."""
    fold = jax.random.fold_in if jnp.ndim(i) == 0 else jax.vmap(jax.random.fold_in, (None, 0))

    def one(leaf):
        if not isinstance(leaf, LoraWeight) or leaf.rng is None:
            return leaf
        return leaf.replace(rng=fold(leaf.rng, i))

    return jax.tree.map(one, tree, is_leaf=is_leaf)


def is_leaf(x) -> bool:
    """For jax.tree.map: stop at this module's leaf types."""
    return isinstance(
        x, LoraWeight | StackedLora | RowsWeight | QuantWeight | ObservedWeight | NoisyEmbedding
    )


def flatten(tree) -> dict[str, Any]:
    """{path: leaf} of a nested dict."""
    return flatten_dict(tree, sep="/")  # type: ignore[return-value]


def unflatten(flat) -> dict:
    return unflatten_dict(flat, sep="/")
