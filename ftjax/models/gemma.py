"""Gemma 1, 2 and 3. Gemma Team 2024-2025, arXiv:2403.08295, arXiv:2408.00118, arXiv:2503.19786.

Against Llama: a norm multiplies by 1 + its weight, embeddings by sqrt(hidden_size), and the MLP's gate is
GELU. Gemma 2 also norms what attention and MLP return, caps logits, and attends within a window in every
other layer; Gemma 3 norms q and k instead of capping, and has a rotary base of its own in the layers with a
window, five of six.
"""

import dataclasses

import jax.numpy as jnp

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import ATTENTION, LAYER, MLP, MLP_NORM, O_BIAS, QK_NORM, QKV_BIAS, Block, Decoder
from ftjax.ops import embed, gelu_tanh_times, rms_norm
from ftjax.weights import Weight

GELU = ("gelu_pytorch_tanh",)
NORMS = ATTENTION | {
    "attn_post_norm": Weight("D", LAYER + "post_attention_layernorm.weight", init="ones"),
    "mlp_norm": Weight("D", LAYER + "pre_feedforward_layernorm.weight", init="ones"),
    "mlp_post_norm": Weight("D", LAYER + "post_feedforward_layernorm.weight", init="ones"),
}  # Gemma 2's and later ones'; "post_attention_layernorm" is Llama's name of another norm


def from_zero(rows):
    """The rows with norms that begin at zero, the identity where a norm multiplies by 1 + its weight."""
    return {k: dataclasses.replace(row, init="zeros") if "norm" in k else row for k, row in rows.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(ModelConfig):
    rms_norm_eps: float
    attention_bias: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(GemmaConfig):
    query_pre_attn_scalar: int
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None


class GemmaBlock(Block):
    def normalise(self, x, name):
        return rms_norm(x, self.w[name], self.cfg.rms_norm_eps, offset=1.0)

    def gated(self, gate, up):
        return gelu_tanh_times(gate, up)


class Gemma2Block(GemmaBlock):
    @property
    def scale(self):
        return self.cfg.query_pre_attn_scalar**-0.5

    def attend(self, q_BTNH, k_BTKH, v_BTKH, **facts):
        softcap = {"softcap": self.cfg.attn_logit_softcapping}
        return super().attend(q_BTNH, k_BTKH, v_BTKH, **(softcap | facts))


class Gemma(Decoder):
    Config = GemmaConfig
    BLOCKS = {"layers": GemmaBlock}
    # early files say "gelu", which meant this one all along
    KEYS = {
        "hidden_act": ("gelu", *GELU),
        "hidden_activation": ("gelu", *GELU, None),
        "use_bidirectional_attention": (False, None),
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        return from_zero(ATTENTION | MLP_NORM | MLP | cls.biases(cfg))

    @classmethod
    def biases(cls, cfg):
        return QKV_BIAS | O_BIAS if cfg.attention_bias else {}

    @classmethod
    def outer_rows(cls, cfg):
        return from_zero(super().outer_rows(cfg))

    def embed(self, w, tokens_BT, positions_BT, segments_BT):
        # the factor itself is rounded to the activations' dtype: 55.5 for sqrt(3072) in bfloat16
        return embed(w["embed"], tokens_BT, segments_BT, self.options.dtype, scale=self.cfg.hidden_size**0.5)


class Gemma2(Gemma):
    Config = Gemma2Config
    BLOCKS = {"layers": Gemma2Block}
    KEYS = {
        "hidden_activation": GELU,
        "hidden_act": GELU,
        "use_bidirectional_attention": (False, None),
        "sliding_window": None,
        "sliding_window_size": None,  # sliding_window, once more
        "layer_types": None,
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        return from_zero(NORMS | MLP | cls.biases(cfg))

    @staticmethod
    def unembed(cfg, head, hidden):
        logits = Decoder.unembed(cfg, head, hidden)
        cap = cfg.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class Gemma3(Gemma2):
    KEYS = {
        "hidden_activation": GELU,
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),  # transformers' Gemma 3 ignores it
        "sliding_window": None,
        "sliding_window_pattern": None,
        "_sliding_window_pattern": None,  # written beside layer_types
        "layer_types": None,
        "rope_local_base_freq": None,
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        return super().block_rows(cfg, kind) | from_zero(QK_NORM)
