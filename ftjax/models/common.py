"""What every model is made of around its layers: config.json read strictly, options, the cache, and `Model`,
a decoder as functions of a parameter tree. The layers themselves are in decoder.py."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ftjax.errors import UserError
from ftjax.ops import target
from ftjax.ops.attention import IMPLEMENTATIONS
from ftjax.ops.layers import ROPE_TYPES, shard, shards
from ftjax.ops.memory import LADDER
from ftjax.weights import LoraWeight, NoisyEmbedding, RowsWeight, Table

# Keys of config.json that change nothing a forward pass computes.
IGNORED = frozenset(
    "architectures auto_map dtype torch_dtype transformers_version use_cache initializer_range _name_or_path "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class "
    "name_or_path _attn_implementation _attn_implementation_autoset attn_implementation return_dict id2label "
    "label2id problem_type task_specific_params model_max_length is_llama_config transformers.js_config "
    "_commit_hash cache_implementation keys_to_ignore_at_inference chunk_size_feed_forward "
    "is_encoder_decoder "
    "output_attentions output_hidden_states unsloth_fixed unsloth_version rope_scaling rope_theta "
    "rope_parameters max_position_embeddings head_dim quantization_config custom_pipelines "
    "_model_name_or_path".split()
)
# Keys that would change the computation and are not implemented: allowed only at values that are neutral.
NEUTRAL: Mapping[str, tuple] = {
    "attention_dropout": (0, 0.0, None),
    "hidden_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    "is_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "add_cross_attention": (False, None),
}


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json: all of it, or `text_config` of a multimodal model's."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        return dict(raw)
    # transformers reads these two from either place
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return dict(text) | ({} if tied is None else {"tie_word_embeddings": tied})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Field names are config.json's, so that reading one needs no translation. A family adds its own in a
    subclass."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_parameters: tuple[tuple[str, Any], ...] = ()  # a dict's items: a config is hashable
    windows: tuple[int | None, ...] = ()  # attention window of each layer, None = all of the past
    no_rope: tuple[bool, ...] = ()  # of each layer, whether it has no positions (NoPE); () = none has

    @property
    def sizes(self) -> dict[str, int]:
        """What the letters of the weight table stand for."""
        return dict(
            D=self.hidden_size,
            N=self.num_attention_heads,
            K=self.num_key_value_heads,
            H=self.head_dim,
            F=self.intermediate_size,
            V=self.vocab_size,
            L=self.num_hidden_layers,
            U=2,  # gate and up where they are one matrix
        )

    @classmethod
    def read(cls, hf, **given) -> Self:
        """From a transformers config: every field by its name there, but for those `given`."""
        if "head_dim" not in given:
            given["head_dim"] = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        if "num_key_value_heads" not in given:
            given["num_key_value_heads"] = getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads
        if "windows" not in given:
            given["windows"] = read_windows(hf)
        if "rope_parameters" not in given:
            given["rope_parameters"] = read_rope(hf)
        given.setdefault("no_rope", ())
        names = [f.name for f in dataclasses.fields(cls) if f.name not in given]
        return cls(**{name: hashable(getattr(hf, name)) for name in names}, **given)


def hashable(value):
    if isinstance(value, Mapping):
        return tuple(sorted((k, hashable(v)) for k, v in value.items()))
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value


def read_rope(hf) -> tuple[tuple[str, Any], ...]:
    """`rope_parameters` of a transformers config as items; UserError for a type that is not implemented."""
    parameters = getattr(hf, "rope_parameters", None) or {}
    nested = [v for v in parameters.values() if isinstance(v, Mapping)]
    for each in nested or [parameters]:
        kind = each.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise UserError(
                f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
    return hashable(parameters)  # type: ignore[return-value]


def read_windows(config) -> tuple[int | None, ...]:
    """The attention window of each layer from a transformers config (`layer_types`, `sliding_window`)."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a model is computed, not what: set with `model.with_options`."""

    dtype: Any = jnp.float32  # of activations and products; parameters keep the dtype they are loaded in
    remat: str = "none"  # a key of ops.memory.LADDER
    unroll: int | bool | str = 1  # layers an iteration of the layer loop; True "all", "auto" by UNROLL
    attention: str = "auto"  # one of ops.IMPLEMENTATIONS
    documents: int | None = None  # the most documents that a row may hold, where its maker promises that
    mlp_chunk: int | None = None  # positions of each row that go through the MLP at a time
    zigzag: int = 1  # devices over which the tokens of a row come in zig-zag order (ops.attention)

    def __post_init__(self):
        if isinstance(self.unroll, bool):  # equal to a number, which would be another program
            object.__setattr__(self, "unroll", "all" if self.unroll else 1)

    def unrolled(self, length: int) -> int:
        """Layers an iteration of a loop over `length` of them."""
        count = UNROLL[target.kind()] if self.unroll == "auto" else self.unroll
        return length if count == "all" else min(int(count), length)


# What `unroll: auto` is. On a GPU a loop's stacked residuals cost a quarter of the step; on a TPU they cost
# little; on CPU they cost too, but the compile is six times as long and recomputation saves half as much.
UNROLL: dict[str, int | str] = {"gpu": "all", "tpu": 1, "cpu": 1}


def check_keys(raw: Mapping[str, Any], known: Mapping[str, tuple | None]) -> None:
    """Raise UserError on a key of config.json that is neither implemented, neutral nor ignorable.

    `known` are the family's own: key -> the values it implements, None for any.
    """
    for key, value in raw.items():
        allowed = known[key] if key in known else NEUTRAL.get(key, ())
        if key in IGNORED or allowed is None or value in allowed:
            continue
        if key in known or key in NEUTRAL:
            raise UserError(
                f"config.json: {key}={value!r} is not implemented for model_type {raw.get('model_type')!r}; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
        raise UserError(
            f"config.json: {key}={value!r} is unknown for model_type {raw.get('model_type')!r}: it may "
            "change what the model computes, so it is not ignored"
        )


class KV(struct.PyTreeNode):
    """Keys and values of a stack of layers so far, [L, B, K, S, H]; the two may differ in H. In this order
    batched products read them as they lie."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def empty(cls, layers: int, batch: int, length: int, heads: int, dims: tuple[int, int], dtype):
        return cls(*(jnp.zeros((layers, batch, heads, length, dim), dtype) for dim in dims))

    def layer(self, layer):
        """(k, v) of one layer, [B, K, S, H]."""
        read = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False)
        return read(self.k), read(self.v)

    def append(self, layer, slot, k_BTKH, v_BTKH):
        """(cache, k [B, S, K, H], v) with one layer's new keys and values from `slot` on."""
        put = lambda x, new: _put(x, jnp.swapaxes(new, 1, 2)[None], {0: layer, 3: slot})  # noqa: E731
        state = KV(put(self.k, k_BTKH), put(self.v, v_BTKH))
        k_BKSH, v_BKSH = state.layer(layer)
        k_BSKH, v_BSKH = (jnp.swapaxes(x, 1, 2) for x in (k_BKSH, v_BKSH))
        return state, k_BSKH.astype(k_BTKH.dtype), v_BSKH.astype(v_BTKH.dtype)

    def write(self, slot, k_LBTKH, v_LBTKH) -> "KV":
        """With the new keys and values of all layers from `slot` on."""
        put = lambda x, new: _put(x, jnp.swapaxes(new, 2, 3), {3: slot})  # noqa: E731
        return KV(put(self.k, k_LBTKH), put(self.v, v_LBTKH))

    def begin(self, prefix: "KV") -> "KV":
        """With every row beginning as the one row of `prefix`."""
        put = lambda x, p: x.at[:, :, :, : p.shape[3]].set(p)  # noqa: E731
        return KV(put(self.k, prefix.k), put(self.v, prefix.v))


def _put(x, new, at: Mapping[int, Any]):
    """x with the block `new` in place, which begins at `at` {axis: index}, else at 0."""
    starts = [jnp.asarray(at.get(axis, 0), jnp.int32) for axis in range(x.ndim)]
    return jax.lax.dynamic_update_slice(x, new.astype(x.dtype), starts)


class Cache(struct.PyTreeNode):
    """What decoding keeps: for each stack of layers (by its prefix in the table) a KV or another state whose
    leaves are [L, B, …]; slot s of row b holds segment segments[b, s] at positions[b, s], segment -1 where it
    is free.

    All rows write to the same slot at a time, so that a step is one write for all of them. The slots from
    `prompt` on are a ring: a row that has ended gives way to another by `place`, which puts the newcomer's
    prompt into the first `prompt` slots and frees the rest, and then goes on at the slot where all are. What
    a row writes is not reached again before as many steps as the ring has slots. Prompts of unequal length
    are padded on the left."""

    states: dict[str, Any]
    segments: jax.Array
    positions: jax.Array
    length: jax.Array  # tokens that a row that was here from the beginning has, a scalar
    prompt: int = struct.field(pytree_node=False, default=0)

    @property
    def slot(self):
        """The next to be written."""
        ring = self.segments.shape[1] - self.prompt
        return self.prompt + (self.length - self.prompt) % ring

    def mark(self, segments_BT, positions_BT):
        """Claim the next T slots; each layer then writes there, and `advance` ends the step."""
        put = lambda x, new: _put(x, new, {1: self.slot})  # noqa: E731
        return self.replace(
            segments=put(self.segments, segments_BT), positions=put(self.positions, positions_BT)
        )

    def advance(self, count):
        return self.replace(length=self.length + count)

    def begin(self, prefix: "Cache") -> "Cache":
        """An empty cache with every row beginning as the one row of `prefix`."""
        P = prefix.segments.shape[1]
        return self.replace(
            states={name: state.begin(prefix.states[name]) for name, state in self.states.items()},
            segments=self.segments.at[:, :P].set(prefix.segments),
            positions=self.positions.at[:, :P].set(prefix.positions),
            length=prefix.length,
        )

    def place(self, row, other: "Cache", at) -> "Cache":
        """With row `at` of `other`, which has at most `prompt` slots, in place of row `row`."""

        def put(x, y, axis=1):
            return _put(x, jax.lax.dynamic_index_in_dim(y, at, axis), {axis: row})

        free = jnp.full((1, self.segments.shape[1]), -1, jnp.int32)
        return self.replace(
            states=jax.tree.map(put, self.states, other.states),
            segments=put(_put(self.segments, free, {0: row}), other.segments, axis=0),
            positions=put(self.positions, other.positions, axis=0),
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder as functions of a parameter tree.

    `model(params, tokens, positions, segments, cache)` returns (hidden_BTD after the final norm, cache, aux);
    `model.unembed(model.head(params), hidden)` are float32 logits. `aux` is {} for dense models, else the
    router's sums a layer of experts (ops.moe.router_statistics), [layers, …].
    """

    config: ModelConfig
    table: Table
    module_type: type[nn.Module]
    options: RunOptions = RunOptions()

    def __call__(
        self, params, tokens_BT, positions_BT, segments_BT, cache: Cache | None = None
    ) -> tuple[Any, Any, dict]:
        module = self.module_type(self.config, self.table, self.options)  # type: ignore[call-arg]
        return module.apply({"params": params}, tokens_BT, positions_BT, segments_BT, cache)  # type: ignore[return-value]

    @property
    def head_path(self) -> str:
        return "embed" if self.config.tie_word_embeddings else "lm_head"

    def head(self, params):
        """What `unembed` takes, a leaf or (leaf, bias): where the two are tied the embedding table itself,
        without its look-ups' noise. Its hidden axis is gathered here, once, not by each chunk of a loss."""
        head, bias = params[self.head_path], params.get("lm_head_bias")
        head = head.base if isinstance(head, NoisyEmbedding) else head
        if isinstance(head, LoraWeight | RowsWeight):
            head = head.replace(base=self._gathered(head.base))
        else:
            head = self._gathered(head)
        return head if bias is None else (head, bias)

    def _gathered(self, head):
        if not isinstance(head, jax.Array):
            return head
        axes = self.table.dims(self.head_path)
        even = self.config.vocab_size % shards("V") == 0
        return shard(head, axes if even else axes.replace("V", "_"))

    def unembed(self, head, hidden):
        return self.module_type.unembed(self.config, head, hidden)  # type: ignore[attr-defined]

    def logits(self, params, tokens_BT, positions_BT=None, segments_BT=None):
        """Float32 [B, T, V]. Without positions and segments every row is one document."""
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden_BTD, _, _ = self(params, tokens_BT, positions_BT, segments_BT)
        return self.unembed(self.head(params), hidden_BTD)

    def init_cache(self, batch: int, length: int, dtype=None, prompt: int = 0) -> Cache:
        """An empty cache of `length` slots a row; see Cache for `prompt`."""
        dtype = dtype or self.options.dtype
        states = {}
        for run in self.table.runs:
            for (prefix, kind), layers in zip(run.blocks, run.layers, strict=True):
                block = self.module_type.block(kind)  # type: ignore[attr-defined]
                state = block.empty_state(self.config, layers, batch, length, dtype)
                if state is not None:
                    states[prefix] = state
        slots = jnp.zeros((batch, length), jnp.int32)
        return Cache(states, segments=slots - 1, positions=slots, length=jnp.int32(prompt), prompt=prompt)

    @property
    def recurrent(self) -> bool:
        """Whether some layer's state is a summary of the past, so that a row may not skip slots."""
        kinds = {kind for run in self.table.runs for _, kind in run.blocks}
        return any(self.module_type.block(kind).recurrent for kind in kinds)  # type: ignore[attr-defined]

    def with_options(self, **changes) -> "Model":
        """`dtype`, `remat` (a key of LADDER), `unroll`, `attention`, `documents`, `mlp_chunk`, `zigzag`: see
        RunOptions."""
        if changes.get("remat", "none") not in LADDER:
            raise UserError(f"remat={changes['remat']!r} is unknown; one of: {', '.join(LADDER)}")
        if changes.get("attention", "auto") not in IMPLEMENTATIONS:
            raise UserError(
                f"attention={changes['attention']!r} is unknown; one of: {', '.join(IMPLEMENTATIONS)}"
            )
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **changes))
