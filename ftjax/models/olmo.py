"""OLMo 1, 2 and 3. Groeneveld et al. 2024, arXiv:2402.00838; OLMo 2, arXiv:2501.00656.

Against Llama: OLMo 1 has LayerNorm without weights and may clip q, k and v. OLMo 2 norms what attention and
MLP put out instead of what they take, and norms q and k over all heads at once. OLMo 3 besides has windows,
and rotary frequencies that differ between the layers with a window and those without.
"""

import dataclasses

import jax.numpy as jnp

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import ATTENTION, LAYER, MLP, O_BIAS, QKV_BIAS, Block, Decoder, Rows
from ftjax.models.llama import COMMON, Llama
from ftjax.ops import layer_norm, rms_norm
from ftjax.weights import Weight

POST_NORMS: Rows = {
    "attn_norm": Weight("D", LAYER + "post_attention_layernorm.weight", init="ones"),
    "mlp_norm": Weight("D", LAYER + "post_feedforward_layernorm.weight", init="ones"),
}
FLAT_QK_NORM: Rows = {
    "q_norm": Weight("NH", LAYER + "self_attn.q_norm.weight", init="ones"),
    "k_norm": Weight("KH", LAYER + "self_attn.k_norm.weight", init="ones"),
}


def flat_norm(x, scale, eps: float, offset: float | None = None):
    """RMS norm with q's or k's heads as one vector."""
    flat = x.reshape(*x.shape[:2], -1)
    return rms_norm(flat, scale.reshape(-1), eps, offset).reshape(x.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoConfig(ModelConfig):
    attention_bias: bool
    clip_qkv: float | None


class OlmoBlock(Block):
    def normalise(self, x, name):
        return layer_norm(x, None, None, 1e-5)  # the one eps of all OLMo 1; config.json has none

    def qkv(self, h_BTD):
        q_BTNH, k_BTKH, v_BTKH = super().qkv(h_BTD)
        clip = self.cfg.clip_qkv
        if clip is None:
            return q_BTNH, k_BTKH, v_BTKH
        return tuple(jnp.clip(x, -clip, clip) for x in (q_BTNH, k_BTKH, v_BTKH))


class Olmo(Decoder):
    Config = OlmoConfig
    BLOCKS = {"layers": OlmoBlock}
    KEYS = COMMON

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = {name: row for name, row in (ATTENTION | MLP).items() if name != "attn_norm"}
        return rows | QKV_BIAS | O_BIAS if cfg.attention_bias else rows

    @classmethod
    def outer_rows(cls, cfg):
        return {name: row for name, row in super().outer_rows(cfg).items() if name != "final_norm"}


class PostNormBlock(Block):
    """A layer that norms what attention and MLP put out, not what they take."""

    def __call__(self, x_BTD):
        x_BTD += self.norm(self.attention(x_BTD), "attn_norm")
        return x_BTD + self.norm(self.feed_forward(x_BTD), "mlp_norm")


class Olmo2Block(PostNormBlock):
    def normalise(self, x, name):
        return flat_norm(x, self.w[name], self.cfg.rms_norm_eps, offset=0.0)


class Olmo2(Llama):
    BLOCKS = {"layers": Olmo2Block}
    KEYS = COMMON

    @classmethod
    def block_rows(cls, cfg, kind):
        return super().block_rows(cfg, kind) | POST_NORMS | FLAT_QK_NORM


class Olmo3(Olmo2):
    """`rope_parameters` has an entry for each layer type."""

    KEYS = {**COMMON, "sliding_window": None, "layer_types": None}
