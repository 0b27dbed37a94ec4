"""Llama 1-3, Mistral, Qwen 2/2.5 and Qwen 3 dense decoders. Touvron et al. 2023, arXiv:2307.09288.

Against Llama: Mistral attends within a sliding window (arXiv:2310.06825); Qwen 2 has biases on q, k, v
(arXiv:2407.10671); Qwen 3 norms each head of q and k (arXiv:2505.09388).
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ftjax.errors import UserError
from ftjax.models.common import (
    KVCache,
    ModelConfig,
    RunOptions,
    check_keys,
    declare,
    read_windows,
    scan_layers,
)
from ftjax.ops import (
    attention,
    einsum,
    embed,
    rms_norm,
    rope,
    rope_frequencies,
    rope_table,
    shard,
    silu_times,
)
from ftjax.ops.layers import ROPE_TYPES
from ftjax.weights import LOOKUP, Table, Weight

_L = "model.layers.{layer}."
ROWS = {
    "embed": Weight("V->D", "model.embed_tokens.weight", LOOKUP),
    "layers/attn_norm": Weight("D", _L + "input_layernorm.weight", init="ones"),
    "layers/q": Weight("D->NH", _L + "self_attn.q_proj.weight"),
    "layers/k": Weight("D->KH", _L + "self_attn.k_proj.weight"),
    "layers/v": Weight("D->KH", _L + "self_attn.v_proj.weight"),
    "layers/o": Weight("NH->D", _L + "self_attn.o_proj.weight"),
    "layers/mlp_norm": Weight("D", _L + "post_attention_layernorm.weight", init="ones"),
    "layers/gate": Weight("D->F", _L + "mlp.gate_proj.weight"),
    "layers/up": Weight("D->F", _L + "mlp.up_proj.weight"),
    "layers/down": Weight("F->D", _L + "mlp.down_proj.weight"),
    "final_norm": Weight("D", "model.norm.weight", init="ones"),
}
HEAD = {"lm_head": Weight("D->V", "lm_head.weight")}
QKV_BIAS = {
    "layers/q_bias": Weight("NH", _L + "self_attn.q_proj.bias", init="zeros"),
    "layers/k_bias": Weight("KH", _L + "self_attn.k_proj.bias", init="zeros"),
    "layers/v_bias": Weight("KH", _L + "self_attn.v_proj.bias", init="zeros"),
}
O_BIAS = {"layers/o_bias": Weight("D", _L + "self_attn.o_proj.bias", init="zeros")}
QK_NORM = {
    "layers/q_norm": Weight("H", _L + "self_attn.q_norm.weight", init="ones"),
    "layers/k_norm": Weight("H", _L + "self_attn.k_norm.weight", init="ones"),
}
# config.json's keys by family, with the values implemented where not all are. Where transformers' model of
# the family ignores a key, only the value that says what it computes is taken.
_Keys = dict[str, tuple | None]
_COMMON: _Keys = {"hidden_act": ("silu",), "mlp_bias": (False, None)}
_NO_WINDOW: _Keys = {"sliding_window": (None,), "use_sliding_window": (False, None)}
_WINDOW_LAYERS: _Keys = dict.fromkeys(
    ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
)
KEYS: dict[str, _Keys] = {
    "llama": {**_COMMON, **_NO_WINDOW, "attention_bias": None},
    "mistral": {**_COMMON, "sliding_window": None, "attention_bias": (False, None)},
    "qwen2": {**_COMMON, **_WINDOW_LAYERS, "attention_bias": (True, None)},
    "qwen3": {**_COMMON, **_WINDOW_LAYERS, "attention_bias": None},
}


def read_config(hf, raw) -> ModelConfig:
    """From a transformers config and the config.json it was made of."""
    check_keys(raw, dict.fromkeys(ModelConfig.__dataclass_fields__) | KEYS[hf.model_type])
    rope_type = hf.rope_parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"config.json: rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    return ModelConfig(
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rms_norm_eps=hf.rms_norm_eps,
        max_position_embeddings=hf.max_position_embeddings,
        tie_word_embeddings=hf.tie_word_embeddings,
        rope_parameters=tuple(sorted(hf.rope_parameters.items())),
        windows=read_windows(hf),
    )


def make_table(cfg: ModelConfig, hf) -> Table:
    rows = dict(ROWS)
    if not cfg.tie_word_embeddings:
        rows |= HEAD
    if cfg.model_type == "qwen2" or getattr(hf, "attention_bias", False):
        rows |= QKV_BIAS
    if cfg.model_type != "qwen2" and getattr(hf, "attention_bias", False):
        rows |= O_BIAS
    if cfg.model_type == "qwen3":
        rows |= QK_NORM
    return Table(rows, cfg.sizes, {"layers/": tuple(range(cfg.num_hidden_layers))})


class Block(nn.Module):
    cfg: ModelConfig
    table: Table
    windowed: bool

    @nn.compact
    def __call__(self, carry, per_layer, rotary, where):
        cfg, w = self.cfg, declare(self, self.table, "layers/")
        x_BTD, cache = carry
        layer, window = per_layer
        queries, keys = where

        def project(eqn, h, name):
            y = einsum(eqn, h, w[name])
            return y + w[name + "_bias"].astype(y.dtype) if name + "_bias" in w else y

        h_BTD = checkpoint_name(rms_norm(x_BTD, w["attn_norm"], cfg.rms_norm_eps), "norm")
        q_BTNH = project("BTD,DNH->BTNH", h_BTD, "q")
        k_BSKH = project("BSD,DKH->BSKH", h_BTD, "k")
        v_BSKH = checkpoint_name(project("BSD,DKH->BSKH", h_BTD, "v"), "v")
        if "q_norm" in w:
            q_BTNH = rms_norm(q_BTNH, w["q_norm"], cfg.rms_norm_eps)
            k_BSKH = rms_norm(k_BSKH, w["k_norm"], cfg.rms_norm_eps)
        q_BTNH = shard(checkpoint_name(rope(q_BTNH, rotary), "q"), "BTNH")
        k_BSKH = checkpoint_name(rope(k_BSKH, rotary), "k")
        if cache is not None:
            cache, k_BSKH, v_BSKH = cache.append(layer, k_BSKH, v_BSKH)
        y_BTNH = attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            queries,
            keys,
            scale=cfg.head_dim**-0.5,
            window=window if self.windowed else None,
        )
        x_BTD += checkpoint_name(project("BTNH,NHD->BTD", checkpoint_name(y_BTNH, "attention"), "o"), "o")

        h_BTD = checkpoint_name(rms_norm(x_BTD, w["mlp_norm"], cfg.rms_norm_eps), "norm")
        gate_BTF = checkpoint_name(einsum("BTD,DF->BTF", h_BTD, w["gate"]), "gate")
        up_BTF = checkpoint_name(einsum("BTD,DF->BTF", h_BTD, w["up"]), "up")
        h_BTF = checkpoint_name(silu_times(gate_BTF, up_BTF), "act")
        x_BTD += einsum("BTF,FD->BTD", shard(h_BTF, "BTF"), w["down"])
        return (shard(x_BTD, "BTD"), cache), None


class Llama(nn.Module):
    cfg: ModelConfig
    table: Table
    options: RunOptions

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, segments_BT, cache: KVCache | None = None):
        cfg, w = self.cfg, declare(self, self.table)
        x_BTD = shard(embed(w["embed"], tokens_BT, segments_BT, self.options.dtype), "BTD")
        rotary = rope_table(positions_BT, rope_frequencies(dict(cfg.rope_parameters), cfg.head_dim))
        queries = keys = (segments_BT, positions_BT)
        if cache is not None:
            cache = cache.mark(segments_BT, positions_BT)
            keys = (cache.segments, cache.positions)
        windowed = any(cfg.windows)
        never = jnp.iinfo(jnp.int32).max
        per_layer = (
            jnp.arange(cfg.num_hidden_layers, dtype=jnp.int32),
            jnp.array([w or never for w in cfg.windows], jnp.int32),
        )
        layers = scan_layers(Block, self.options, cfg.num_hidden_layers)
        (x_BTD, cache), _ = layers(cfg, self.table, windowed, name="layers")(
            (x_BTD, cache), per_layer, rotary, (queries, keys)
        )
        if cache is not None:
            cache = cache.advance(tokens_BT.shape[1])
        return rms_norm(x_BTD, w["final_norm"], cfg.rms_norm_eps), cache, {}

    @staticmethod
    def unembed(cfg: ModelConfig, head, hidden):
        axes = "...D,VD->...V" if cfg.tie_word_embeddings else "...D,DV->...V"
        lead = "BXTZ"[: hidden.ndim - 1]
        return einsum(axes.replace("...", lead), hidden, head, jnp.float32)
