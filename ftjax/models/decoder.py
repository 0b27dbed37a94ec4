"""The decoder that every family is a variation of: embedding, runs of stacked layers, final norm, head.

A family subclasses `Block` (one layer: overriding the lines that differ), `Decoder` (which blocks, which
rows, what config.json may say) and, where it has hyper-parameters of its own, `ModelConfig`. The block here
is Llama's: pre-norm, grouped-query attention with rotary positions, a gated MLP.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from ftjax.errors import UserError
from ftjax.models.common import KV, Cache, ModelConfig, RunOptions, check_keys
from ftjax.ops import (
    activation,
    attention,
    decode_attention,
    einsum,
    einsums,
    embed,
    memory,
    places,
    reshard,
    rms_norm,
    rope,
    rope_table,
    shard,
    shards,
    silu_times,
)
from ftjax.ops.attention.facts import keeps_promise
from ftjax.weights import LOOKUP, Run, Table, Weight, find_runs, fold_in

Rows = dict[str, Weight]
Keys = Mapping[str, tuple | None]

# The names most families give their weights; a family changes what differs.
EMBED: Rows = {"embed": Weight("V->D", "model.embed_tokens.weight", LOOKUP)}
FINAL_NORM: Rows = {"final_norm": Weight("D", "model.norm.weight", init="ones")}
HEAD: Rows = {"lm_head": Weight("D->V", "lm_head.weight", role="head")}
LAYER = "model.layers.{layer}."
ATTENTION: Rows = {
    "attn_norm": Weight("D", LAYER + "input_layernorm.weight", init="ones"),
    "q": Weight("D->NH", LAYER + "self_attn.q_proj.weight"),
    "k": Weight("D->KH", LAYER + "self_attn.k_proj.weight"),
    "v": Weight("D->KH", LAYER + "self_attn.v_proj.weight"),
    "o": Weight("NH->D", LAYER + "self_attn.o_proj.weight"),
}
QKV_BIAS: Rows = {
    "q_bias": Weight("NH", LAYER + "self_attn.q_proj.bias", init="zeros"),
    "k_bias": Weight("KH", LAYER + "self_attn.k_proj.bias", init="zeros"),
    "v_bias": Weight("KH", LAYER + "self_attn.v_proj.bias", init="zeros"),
}
O_BIAS: Rows = {"o_bias": Weight("D", LAYER + "self_attn.o_proj.bias", init="zeros")}
QK_NORM: Rows = {
    "q_norm": Weight("H", LAYER + "self_attn.q_norm.weight", init="ones"),
    "k_norm": Weight("H", LAYER + "self_attn.k_norm.weight", init="ones"),
}
MLP_NORM: Rows = {"mlp_norm": Weight("D", LAYER + "post_attention_layernorm.weight", init="ones")}
MLP: Rows = {
    "gate": Weight("D->F", LAYER + "mlp.gate_proj.weight"),
    "up": Weight("D->F", LAYER + "mlp.up_proj.weight"),
    "down": Weight("F->D", LAYER + "mlp.down_proj.weight"),
}
FUSED_MLP: Rows = {
    "gate_up": Weight("D->UF", LAYER + "mlp.gate_up_proj.weight"),
    "down": MLP["down"],
}
MLP_BIAS: Rows = {
    "gate_bias": Weight("F", LAYER + "mlp.gate_proj.bias", init="zeros"),
    "up_bias": Weight("F", LAYER + "mlp.up_proj.bias", init="zeros"),
    "down_bias": Weight("D", LAYER + "mlp.down_proj.bias", init="zeros"),
}


def later_layers(cfg, count: int) -> str:
    """A regex of the names in `count` layers after the last, which only predict further tokens; "" for 0."""
    after = "|".join(str(cfg.num_hidden_layers + i) for i in range(count))
    return rf"|model\.layers\.({after})\..*" if count else ""


class Shared(struct.PyTreeNode):
    """What all layers see: (segments, positions) of queries, of keys, and of the cache's slots before this
    call; the rotary table (of one kind, or a dict or list of them as the family made it); the slot that the
    cache writes next. `past` and `slot` are None in training."""

    queries: tuple[Any, Any]
    keys: tuple[Any, Any]
    past: tuple[Any, Any] | None
    rotary: Any
    slot: Any


class Block:
    """One layer at work: its weights `w` by name, its own entries of `Decoder.layer_data` in `layer`, what
    all layers see in `shared` (a Shared), its stack's `state` in the cache (None in training), and `carry`,
    which a family may pass on from layer to layer. A call takes and returns x_BTD; the state and the carry
    are replaced in place; what a layer wants summed over tokens (a router's statistics) goes into `aux`, and
    keys and values that the state is to be given after the last layer into `new`."""

    recurrent: ClassVar[bool] = False
    facts: Mapping[str, Any] = {}  # what the run and the stack say of every attention, as of ops.attention
    whole_keys: bool = False  # whether `remember` must see all slots though one token is decoded

    def __init__(self, cfg, w: Mapping[str, Any], layer: Mapping[str, Any], shared: Any, state, carry):
        self.cfg, self.w, self.layer, self.shared = cfg, w, layer, shared
        self.state, self.carry = state, dict(carry)
        self.aux: dict[str, Any] = {}
        self.new: tuple[Any, Any] | None = None

    @classmethod
    def empty_state(cls, cfg, layers: tuple[int, ...], batch: int, length: int, dtype):
        """What decoding keeps for a stack of these `layers` (indices in the model), None for nothing."""
        dims = (cfg.head_dim, cfg.head_dim)
        return KV.empty(len(layers), batch, length, cfg.num_key_value_heads, dims, dtype)

    @classmethod
    def mixing_flops(cls, cfg, pairs: int, tokens: int) -> int:
        """FLOPs of a forward pass between tokens, which no product with a weight holds: of attention to
        `pairs` pairs of a query and a key that it sees, of a recurrence over `tokens`."""
        return 4 * cfg.num_attention_heads * cfg.head_dim * pairs

    def __call__(self, x_BTD):
        x_BTD += self.post_norm(self.attention(self.norm(x_BTD, "attn_norm")), "attn_post_norm")
        return x_BTD + self.post_norm(self.feed_forward(self.norm(x_BTD, "mlp_norm")), "mlp_post_norm")

    def post_norm(self, y_BTD, name: str):
        """What attention or MLP put out, normed where the table has such a norm."""
        return self.norm(y_BTD, name) if name in self.w else y_BTD

    def norm(self, x, name: str):
        return self.named(self.normalise(x, name), "norm")

    def normalise(self, x, name: str):
        return rms_norm(x, self.w[name], self.cfg.rms_norm_eps)

    def linear(self, eqn: str, x, name: str) -> Any:
        """The product with the weight `name`, plus `name_bias` where the table has one."""
        return self.linears(x, {name: eqn})[0]

    def linears(self, x, eqns: Mapping[str, str]):
        """`linear` of one x with several weights, {name: eqn}: x is read once for all their adapters."""
        # Of what sp splits between the layers, products see all positions; their sums are split again.
        split = places("BTD")["T"] != places("BSD")["S"]
        if split and all(eqn.startswith("BTD,") for eqn in eqns.values()):
            x = reshard(x, "BTD", "BSD")
        ys = einsums(list(eqns.values()), x, [self.w[name] for name in eqns])
        if split:
            ends = [eqn.endswith(">BTD") for eqn in eqns.values()]
            ys = [reshard(y, "BSD", "BTD") if end else y for y, end in zip(ys, ends, strict=True)]
        biases = [self.w.get(name + "_bias") for name in eqns]
        ys = [y if b is None else y + b.astype(y.dtype) for y, b in zip(ys, biases, strict=True)]
        return list(map(self.named, ys, eqns))

    def named(self, x, name: str) -> Any:
        """`x` under a name by which a rung of the memory ladder keeps it or not (ops.memory)."""
        return x if self.nameless else checkpoint_name(x, name)

    # -- attention

    def attention(self, h_BTD):
        q_BTNH, k_BTKH, v_BTKH = self.qkv(h_BTD)
        y_BTNH = self.attend(*self.rotate(q_BTNH, k_BTKH), v_BTKH)
        return self.linear("BTNH,NHD->BTD", y_BTNH, "o")

    def qkv(self, h_BTD):
        eqns = {"q": "BTD,DNH->BTNH", "k": "BTD,DKH->BTKH", "v": "BTD,DKH->BTKH"}
        q_BTNH, k_BTKH, v_BTKH = self.linears(h_BTD, eqns)
        if "q_norm" in self.w:
            q_BTNH, k_BTKH = self.normalise(q_BTNH, "q_norm"), self.normalise(k_BTKH, "k_norm")
        return q_BTNH, k_BTKH, v_BTKH

    def rotary(self):
        """This layer's (cos, sin): the one there is, or that of the kind that `layer["rope"]` numbers."""
        if "rope" not in self.layer:
            return self.shared.rotary
        return jax.tree.map(lambda *kinds: jnp.stack(kinds)[self.layer["rope"]], *self.shared.rotary)

    interleaved: ClassVar[bool] = False  # rotary pairs (0, 1), (2, 3), … instead of the two halves

    def rotate(self, q_BTNH, k_BTKH):
        table = self.rotary()
        return rope(q_BTNH, table, self.interleaved), rope(k_BTKH, table, self.interleaved)

    @property
    def scale(self) -> float:
        return self.cfg.head_dim**-0.5

    def remember(self, k_BTKH, v_BTKH):
        """The keys and values of all slots: those in the cache with this step's put there."""
        if self.state is None:
            return k_BTKH, v_BTKH
        self.state, k_BSKH, v_BSKH = self.state.append(self.layer["index"], self.shared.slot, k_BTKH, v_BTKH)
        return k_BSKH, v_BSKH

    def attend(self, q_BTNH, k_BTKH, v_BTKH, **facts):
        """Attention over this step's keys and those in the cache; `facts` as of ops.attention."""
        q_BTNH = shard(q_BTNH, "BTNH")
        facts = {"scale": self.scale, "window": self.layer.get("window")} | facts
        if self.state is not None and q_BTNH.shape[1] == 1 and not self.whole_keys:
            # read the cache as it lies and leave it alone: all layers' new keys are written at once
            self.new = k_BTKH, v_BTKH
            k_BKSH, v_BKSH = self.state.layer(self.layer["index"])
            seen = self.shared.queries, self.shared.past
            with jax.named_scope("attention"):
                return decode_attention(q_BTNH, k_BKSH, v_BKSH, k_BTKH, v_BTKH, *seen, **facts)
        k_BSKH, v_BSKH = self.remember(k_BTKH, v_BTKH)
        keys = None if self.shared.slot is None else self.shared.keys
        facts = dict(self.facts) | facts
        with jax.named_scope("attention"):  # what a profile of the step knows it by
            return attention(q_BTNH, k_BSKH, v_BSKH, self.shared.queries, keys, **facts)

    # -- MLP

    mlp_chunk: int | None = None  # positions of each row at a time
    nameless = False  # within such a chunk: nothing of it is kept

    def feed_forward(self, h_BTD):
        """The MLP. With `mlp_chunk` a loop takes so many positions of each row at a time and keeps nothing of
        what is between, so that no [B, T, F] exists; dropout draws a mask for each chunk."""
        T, X = h_BTD.shape[1], self.mlp_chunk
        if not X or T <= X:
            return self.mlp(h_BTD)

        def one(_, xs):
            i, h_BXD, queries = xs
            block = type(self)(self.cfg, fold_in(self.w, i), self.layer, self.shared, None, {})
            block.shared, block.nameless = self.shared.replace(queries=queries), True
            return None, (block.mlp(h_BXD), block.aux)

        parts = shards("T", "BTF") if T % shards("T", "BTF") == 0 else 1
        count = -(-T // X)
        xs = jnp.arange(count), *jax.tree.map(lambda x: _cut(x, parts, count), (h_BTD, self.shared.queries))
        one = jax.checkpoint(one, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
        y_CBXD, aux = jax.lax.scan(one, None, xs)[1]
        self.aux |= jax.tree.map(lambda x: x.sum(0), aux)
        y = y_CBXD.reshape(count, h_BTD.shape[0], parts, -1, h_BTD.shape[2])
        y = jnp.moveaxis(y, 0, 2).reshape(h_BTD.shape[0], parts, -1, h_BTD.shape[2])
        return y[:, :, : T // parts].reshape(h_BTD.shape)

    def gated(self, gate, up):
        """The activation of an MLP with a gate: act(gate) · up."""
        return silu_times(gate, up)

    def act(self, up):
        """The activation of an MLP without one."""
        return activation(self.cfg.hidden_act)(up)

    def mlp(self, h_BTD, prefix: str = ""):
        """An MLP of the weights `prefix` + up, down, and gate where the table has one, or gate_up, down."""
        gate_BTF = None
        if prefix + "gate_up" in self.w:
            both_BTUF = self.linear("BTD,DUF->BTUF", h_BTD, prefix + "gate_up")
            gate_BTF, up_BTF = both_BTUF[:, :, 0], both_BTUF[:, :, 1]
        elif prefix + "gate" in self.w:
            eqns = dict.fromkeys((prefix + "gate", prefix + "up"), "BTD,DF->BTF")
            gate_BTF, up_BTF = self.linears(h_BTD, eqns)
        else:
            up_BTF = self.linear("BTD,DF->BTF", h_BTD, prefix + "up")
        act_BTF = self.act(up_BTF) if gate_BTF is None else self.gated(gate_BTF, up_BTF)
        return self.linear("BTF,FD->BTD", shard(self.named(act_BTF, "act"), "BTF"), prefix + "down")


def _cut(x_BT, parts: int, count: int):
    """[count, B, X, …] of [B, T, …], each an equal piece of each of the parts of T that lie on one device,
    filled up with zeros."""
    B, T = x_BT.shape[:2]
    x = x_BT.reshape(B, parts, T // parts, *x_BT.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -(T // parts) % count)] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(B, parts, count, -1, *x.shape[3:]), 2, 0)
    return x.reshape(count, B, -1, *x_BT.shape[2:])


class Loop(nn.Module):
    """One period of a run of layers, to be scanned over its stacked weights."""

    cfg: ModelConfig
    table: Table
    options: RunOptions
    run: Run
    kinds: tuple[type[Block], ...]

    @nn.compact
    def __call__(self, carry, per_layer, shared: Shared):
        x_BTD, states, extra = carry
        outs = []
        for (prefix, _), kind, layer, layers in zip(
            self.run.blocks, self.kinds, per_layer, self.run.layers, strict=True
        ):
            w = declare(self, self.table, prefix, self.run.name + "/")

            def one(x_BTD, state, extra, w, layer, kind=kind, layers=layers):
                block = kind(self.cfg, w, layer, shared, state, extra)
                block.facts = self.facts(layers)
                block.mlp_chunk = self.options.mlp_chunk
                y_BTD = shard(block(checkpoint_name(x_BTD, memory.INPUT)), "BTD")
                return y_BTD, block.state, block.carry, (block.aux, block.new)

            looped = self.options.unrolled(self.run.length) < self.run.length
            one = memory.remat(one, self.options.remat, w, looped=looped)
            x_BTD, state, extra, out = one(x_BTD, states.get(prefix), extra, w, layer)
            states = states | ({prefix: state} if state is not None else {})
            outs.append(out)
        return (x_BTD, states, extra), outs

    def facts(self, layers: tuple[int, ...]) -> dict[str, Any]:
        """`Block.facts` of a stack of these layers of the model."""
        windows = tuple(dict.fromkeys(self.cfg.windows[i] for i in layers)) if any(self.cfg.windows) else ()
        return {
            "windows": windows,
            "documents": self.options.documents,
            "zigzag": self.options.zigzag,
            "implementation": self.options.attention,
        }


def declare(module: nn.Module, table: Table, prefix: str = "", skip: str = "") -> dict[str, Any]:
    """The weights of `module`: {name: array or leaf type} for the rows directly under `prefix`, of which
    `skip` leads to the module itself. Reads the tree as given, so a row may hold any leaf type."""
    names = [path.removeprefix(prefix) for path in table.rows if path.startswith(prefix)]
    tree: Any = None
    for part in prefix.removeprefix(skip).strip("/").split("/"):
        if part:
            tree = module.get_variable("params", part) if tree is None else tree[part]
    read = tree.__getitem__ if tree is not None else lambda n: module.get_variable("params", n)
    return {n: read(n) for n in names if "/" not in n}


class Decoder(nn.Module):
    """A family: `model_types` in the registry point to a subclass of this."""

    cfg: Any
    table: Table
    options: RunOptions

    Config: ClassVar[type[ModelConfig]] = ModelConfig
    BLOCKS: ClassVar[Mapping[str, type[Block]]] = {"layers": Block}
    # keys of config.json beyond Config's fields -> the values implemented, None for any; where transformers'
    # model of the family ignores a key, only the value that says what it computes is taken
    KEYS: ClassVar[Keys] = {}
    # regex at the beginning of a name in the checkpoint -> its replacement: where files name the weights in
    # several ways, this leads to the table's
    RENAMES: ClassVar[Mapping[str, str]] = {}
    LAYER_TYPES: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")

    # -- what config.json says

    @classmethod
    def prepare(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config.json as transformers is to read it: old names that it no longer reads right replaced."""
        return raw

    @classmethod
    def read_config(cls, hf, raw: Mapping[str, Any]) -> ModelConfig:
        """From a transformers config and the config.json it was made of; UserError for what is not
        implemented."""
        known = dict.fromkeys(f.name for f in dataclasses.fields(cls.Config)) | dict(cls.KEYS)
        check_keys(raw, known)
        unknown = set(getattr(hf, "layer_types", None) or ()) - set(cls.LAYER_TYPES)
        if unknown:
            raise UserError(
                f"config.json: layer_types has {sorted(unknown)}; supported: {', '.join(cls.LAYER_TYPES)}"
            )
        return cls.config(hf)

    @classmethod
    def config(cls, hf) -> ModelConfig:
        """The config that a transformers config makes: `Config.read` with what must be said otherwise."""
        return cls.Config.read(hf)

    @classmethod
    def block(cls, kind: str) -> type[Block]:
        return cls.BLOCKS[kind]

    @classmethod
    def layer_kinds(cls, cfg) -> list[str]:
        """The kind (a key of BLOCKS) of each layer."""
        (kind,) = cls.BLOCKS
        return [kind] * cfg.num_hidden_layers

    @classmethod
    def block_rows(cls, cfg, kind: str) -> Rows:
        """The weights of a layer of this kind."""
        return ATTENTION | MLP_NORM | MLP

    @classmethod
    def outer_rows(cls, cfg) -> Rows:
        """The weights that are not a layer's."""
        return EMBED | FINAL_NORM | ({} if cfg.tie_word_embeddings else HEAD)

    @classmethod
    def make_table(cls, cfg) -> Table:
        outer = cls.outer_rows(cfg)
        runs = find_runs(cls.layer_kinds(cfg))
        rows = {path: row for path, row in outer.items() if row.role == "lookup"}
        for run in runs:
            for prefix, kind in run.blocks:
                rows |= {prefix + name: row for name, row in cls.block_rows(cfg, kind).items()}
        return Table(rows | outer, cfg.sizes, runs, cls.others(cfg))

    @classmethod
    def others(cls, cfg) -> str:
        """A regex of names in the checkpoint that are no part of the decoder and go out as they came."""
        return Table.others

    # -- the forward pass

    def embed(self, w, tokens_BT, positions_BT, segments_BT):
        return embed(w["embed"], tokens_BT, segments_BT, self.options.dtype)

    def rotary(self, positions_BT, segments_BT):
        """`Shared.rotary`: a table, or a list of those that `layer_data` numbers."""
        if self.rope_by_window:
            kinds = dict(self.cfg.rope_parameters)
            names = ("full_attention", "sliding_attention")
            return [self.rotary_table(kinds[name], positions_BT, segments_BT) for name in names]
        table = self.rotary_table(self.cfg.rope_parameters, positions_BT, segments_BT)
        if not any(self.cfg.no_rope):
            return table
        cos, sin = table
        return [table, (jnp.ones_like(cos), jnp.zeros_like(sin))]

    @property
    def rope_by_window(self) -> bool:
        """Whether layers with a window have rotary frequencies of their own."""
        return "sliding_attention" in dict(self.cfg.rope_parameters)

    def rotary_table(self, rope_parameters, positions_BT, segments_BT, head_dim: int | None = None):
        """(cos, sin) of these `rope_parameters` of config.json."""
        longest = {"max_position_embeddings": self.cfg.max_position_embeddings}
        parameters = longest | dict(rope_parameters)
        return rope_table(positions_BT, segments_BT, parameters, head_dim or self.cfg.head_dim)

    def layer_data(self, w, x_BTD, tokens_BT) -> dict[str, Any]:
        """What differs between layers, each entry [L, …] over the model's layers in order."""
        data = {}
        if any(self.cfg.windows):
            never = np.iinfo(np.int32).max
            data["window"] = np.array([window or never for window in self.cfg.windows], np.int32)
        if self.rope_by_window:
            data["rope"] = np.array([window is not None for window in self.cfg.windows], np.int32)
        if any(self.cfg.no_rope):
            data["rope"] = np.array(self.cfg.no_rope, np.int32)
        return data

    def carry(self, x_BTD, slots: int) -> dict[str, Any]:
        """The first value of `Block.carry`; attention has `slots` keys."""
        return {}

    def finish(self, w, x_BTD):
        """The final norm, which is as those of the layers."""
        block = next(iter(self.BLOCKS.values()))
        return block(self.cfg, w, {}, None, None, {}).normalise(x_BTD, "final_norm")

    @staticmethod
    def unembed(cfg, head, hidden):
        """Float32 logits [..., V] of hidden [..., D]; `head` is the leaf, or (leaf, bias)."""
        axes = "...D,VD->...V" if cfg.tie_word_embeddings else "...D,DV->...V"
        lead = "BXTZ"[: hidden.ndim - 1]
        weight, bias = head if isinstance(head, tuple) else (head, None)
        logits = einsum(axes.replace("...", lead), hidden, weight, jnp.float32)
        return logits if bias is None else logits + bias.astype(jnp.float32)

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, segments_BT, cache: Cache | None = None):
        w = declare(self, self.table)
        x_BTD = shard(self.embed(w, tokens_BT, positions_BT, segments_BT), "BTD")
        if self.options.documents is not None and self.options.zigzag == 1 and cache is None:
            # kernels rely on it: a broken promise is no number, which a run stops at, not a wrong one
            kept = keeps_promise(segments_BT, self.options.documents)
            x_BTD = jnp.where(kept, x_BTD, jnp.asarray(jnp.nan, x_BTD.dtype))
        queries = keys = (segments_BT, positions_BT)
        past = slot = None
        if cache is not None:
            past, slot = (cache.segments, cache.positions), cache.slot
            cache = cache.mark(segments_BT, positions_BT)
            keys = (cache.segments, cache.positions)
        shared = Shared(queries, keys, past, self.rotary(positions_BT, segments_BT), slot)
        data = self.layer_data(w, x_BTD, tokens_BT)
        carry = (x_BTD, {} if cache is None else cache.states, self.carry(x_BTD, keys[0].shape[1]))
        sums = []
        for run in self.table.runs:
            per_layer = tuple(
                {"index": jnp.arange(run.length, dtype=jnp.int32)}
                | {name: jnp.asarray(x)[np.array(layers)] for name, x in data.items()}
                for layers in run.layers
            )
            loop = nn.scan(
                Loop,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
                length=run.length,
                unroll=self.options.unrolled(run.length),
            )
            kinds = tuple(self.block(kind) for _, kind in run.blocks)
            (x_BTD, states, extra), outs = loop(
                self.cfg, self.table, self.options, run, kinds, name=run.name
            )(carry, per_layer, shared)
            # written after the last layer has read: where layers are unrolled, its new keys are there before
            x_BTD, outs = (x_BTD, outs) if cache is None else jax.lax.optimization_barrier((x_BTD, outs))
            for (prefix, _), (aux, new) in zip(run.blocks, outs, strict=True):
                sums.append(aux)
                if new is not None:
                    states = states | {prefix: states[prefix].write(slot, *new)}
            carry = x_BTD, states, extra
        x_BTD, states, _ = carry
        if cache is not None:
            cache = cache.replace(states=states).advance(tokens_BT.shape[1])
        names = sorted({name for each in sums for name in each})
        aux = {name: jnp.concatenate([each[name] for each in sums if name in each]) for name in names}
        return self.finish(w, x_BTD), cache, aux
