"""GLM-4 (arXiv:2406.12793), GLM-4-0414 and GLM-Z1, GLM-4.5 and 4.6 (arXiv:2508.06471).

Against Llama: half of each head is rotated, in neighbouring pairs; gate and up are one matrix; GLM-4-0414
also norms what attention and MLP give. GLM-4.5 has the experts of DeepSeek-V3 and rotates halves.
"""

import dataclasses

from ftjax.models.decoder import ATTENTION, FUSED_MLP, LAYER, MLP_NORM, QK_NORM, QKV_BIAS, Block, Keys
from ftjax.models.deepseek import (
    COMMON,
    SIGMOID_ROUTER,
    SharedExperts,
    SharedExpertsBlock,
    SharedExpertsConfig,
)
from ftjax.models.llama import Llama
from ftjax.weights import Weight

ROTARY: Keys = {"partial_rotary_factor": None}  # read into rope_parameters


class GlmBlock(Block):
    interleaved = True


class Glm(Llama):
    BLOCKS = {"layers": GlmBlock}
    KEYS = {**ROTARY, "hidden_act": ("silu",)}

    @classmethod
    def block_rows(cls, cfg, kind):
        return ATTENTION | MLP_NORM | FUSED_MLP | (QKV_BIAS if cfg.attention_bias else {})


class Glm4(Glm):
    @classmethod
    def block_rows(cls, cfg, kind):
        return super().block_rows(cfg, kind) | {
            "attn_post_norm": Weight("D", LAYER + "post_self_attn_layernorm.weight", init="ones"),
            "mlp_post_norm": Weight("D", LAYER + "post_mlp_layernorm.weight", init="ones"),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig(SharedExpertsConfig):
    use_qk_norm: bool


class Glm4Moe(SharedExperts):
    Config = Glm4MoeConfig
    BLOCKS = {"dense": Block, "sparse": SharedExpertsBlock}
    KEYS = {
        **COMMON,
        **ROTARY,
        "first_k_dense_replace": None,
        **SIGMOID_ROUTER,
    }

    @classmethod
    def attention_rows(cls, cfg):
        return ATTENTION | (QKV_BIAS if cfg.attention_bias else {}) | (QK_NORM if cfg.use_qk_norm else {})
