"""Weight tables: one row per parameter; everything else is derived from it.

A model file declares rows `path -> Weight`. A row's axes give the array's shape, its sharding, its layout in
a Hugging Face checkpoint and the LoRA factors that fit it. The leaf types that may stand in a parameter tree
in place of an array live here too; `ops.linear` is the one place that computes with them.

Axis letters: B batch, T query length, S key length, D hidden_size, N query heads, K key/value heads, G = N/K,
H head_dim, F intermediate_size, V vocab_size, L layers, E experts, R LoRA rank, A microbatches, X local and
said."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """A named pair of inverse functions between a checkpoint's array and ours.

    `load(x, ins, outs)` and `save(x, ins, outs)` take one layer's array and the two shapes of the row.
    """

    name: str
    load: Callable[[np.ndarray, tuple, tuple], np.ndarray]
    save: Callable[[np.ndarray, tuple, tuple], np.ndarray]


def _load_linear(x, ins, outs):
    x = x.reshape(*outs, *ins)
    return x.transpose(*range(len(outs), x.ndim), *range(len(outs)))


def _save_linear(x, ins, outs):
    x = x.transpose(*range(len(ins), x.ndim), *range(len(ins)))
    return x.reshape(math.prod(outs), math.prod(ins))


LINEAR = Layout("linear", _load_linear, _save_linear)  # torch.nn.Linear keeps [out, in], we keep [*in, *out]
LOOKUP = Layout(  # an embedding table: [in, out] on both sides
    "lookup",
    lambda x, ins, outs: x.reshape(*ins, *outs),
    lambda x, ins, outs: x.reshape(math.prod(ins), math.prod(outs)),
)
VECTOR = Layout(  # a norm's scale or a bias: flat in the checkpoint
    "vector", lambda x, ins, outs: x.reshape(outs), lambda x, ins, outs: x.reshape(-1)
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter. `axes` is "in->out" ("D->NH") or just "out" for a vector.

    `hf` is its name in the checkpoint, `{layer}` standing for the layer's index. `layout` is LINEAR for a
    matrix and VECTOR for a vector unless said."""

    axes: str
    hf: str
    layout: Layout = None  # type: ignore[assignment]
    init: str = "normal"  # or "ones", "zeros"

    def __post_init__(self):
        if self.layout is None:
            object.__setattr__(self, "layout", LINEAR if "->" in self.axes else VECTOR)

    @property
    def ins(self) -> str:
        return self.axes.partition("->")[0] if "->" in self.axes else ""

    @property
    def outs(self) -> str:
        return self.axes.rpartition("->")[2]

    @property
    def module(self) -> str:
        """The torch module that owns it: the checkpoint name less `.weight` or `.bias`."""
        return self.hf.rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one model with the numbers that its letters stand for.

    `stacks` names the prefixes whose rows are stacked over layers and the layers that each covers, in order:
    {"layers/": (0, 1, …)}.
    """

    rows: Mapping[str, Weight]
    sizes: Mapping[str, int]
    stacks: Mapping[str, tuple[int, ...]]

    def layers(self, path: str) -> tuple[int, ...] | None:
        """The checkpoint layers stacked in `path`, None where it is not stacked."""
        return next((layers for prefix, layers in self.stacks.items() if path.startswith(prefix)), None)

    def dims(self, path: str) -> str:
        """Axis letters of the stored array, in order: "LDNH" for a stacked "D->NH"."""
        row = self.rows[path]
        return ("" if self.layers(path) is None else "L") + row.ins + row.outs

    def ins(self, path: str) -> tuple[int, ...]:
        return tuple(self.sizes[x] for x in self.rows[path].ins)

    def outs(self, path: str) -> tuple[int, ...]:
        return tuple(self.sizes[x] for x in self.rows[path].outs)

    def lead(self, path: str) -> tuple[int, ...]:
        layers = self.layers(path)
        return () if layers is None else (len(layers),)

    def shape(self, path: str) -> tuple[int, ...]:
        return self.lead(path) + self.ins(path) + self.outs(path)

    def names(self, path: str) -> list[str]:
        """The checkpoint names that `path` holds, in the order of its stack."""
        layers = self.layers(path)
        return (
            [self.rows[path].hf] if layers is None else [self.rows[path].hf.format(layer=i) for i in layers]
        )

    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(self.shape(path)) for path in self.rows)


def hf_shape(table: Table, path: str) -> tuple[int, ...]:
    """Shape that one checkpoint tensor of `path` must have."""
    row = table.rows[path]
    probe = np.broadcast_to(np.zeros((), np.int8), table.ins(path) + table.outs(path))
    return row.layout.save(probe, table.ins(path), table.outs(path)).shape


def from_hf(table: Table, path: str, x: np.ndarray) -> np.ndarray:
    """One layer of `path` in our layout, from its checkpoint tensor."""
    return table.rows[path].layout.load(x, table.ins(path), table.outs(path))


def to_hf(table: Table, path: str, x) -> dict[str, np.ndarray]:
    """{checkpoint name: array} of the whole of `path`. Inverse of from_hf."""
    save = table.rows[path].layout.save
    layers = [x] if table.layers(path) is None else list(x)
    return {
        name: save(np.asarray(one), table.ins(path), table.outs(path))
        for name, one in zip(table.names(path), layers, strict=True)
    }


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
        std = 0.02 if row.layout is LOOKUP else math.prod(table.ins(path)) ** -0.5
        return (std * jax.random.normal(path_key(key, path), shape)).astype(dtype)

    return unflatten_dict({path: one(path, row) for path, row in table.rows.items()}, sep="/")


def abstract(table: Table, dtype=jnp.float32) -> dict:
    """The params tree as jax.ShapeDtypeStruct leaves."""
    return unflatten_dict({p: jax.ShapeDtypeStruct(table.shape(p), dtype) for p in table.rows}, sep="/")


def shardings(table: Table, rules: Mapping[str, Any], mesh) -> dict:
    """A tree of NamedSharding: each axis letter on the mesh axis that `rules` gives it, else replicated."""

    def one(path):
        return NamedSharding(mesh, PartitionSpec(*map(rules.get, table.dims(path))))

    return unflatten_dict({path: one(path) for path in table.rows}, sep="/")


class LoraWeight(struct.PyTreeNode):
    """A frozen weight [*in, *out] with factors a [*in, R], b [R, *out]: acts as base + scale · a b.

    Stacked leaves carry a leading L everywhere; `scale` is then [L]. With `rng` (a key a layer) the input of
    the a·b branch is dropped out at rate `dropout`."""

    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    rng: jax.Array | None = None
    dropout: float = struct.field(pytree_node=False, default=0.0)


class NoisyEmbedding(struct.PyTreeNode):
    """An embedding table whose look-ups get uniform noise: NEFTune, arXiv:2310.05914. Other uses see
    `base`."""

    base: Any
    rng: jax.Array
    alpha: float = struct.field(pytree_node=False)


def is_leaf(x) -> bool:
    """For jax.tree.map: stop at this module's leaf types."""
    return isinstance(x, LoraWeight | NoisyEmbedding)


def flatten(tree) -> dict[str, Any]:
    """{path: leaf} of a nested dict."""
    return flatten_dict(tree, sep="/")  # type: ignore[return-value]


def unflatten(flat) -> dict:
    return unflatten_dict(flat, sep="/")
