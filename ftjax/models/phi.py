"""Phi-1, 1.5 and 2 (model_type phi): attention and MLP side by side on one norm, biases throughout, the head
included. Li et al. 2023, arXiv:2309.05463.

Phi-3, Phi-3.5 and Phi-4 (model_type phi3): Llama with q, k, v in one matrix and gate and up in another. Abdin
et al. 2024, arXiv:2404.14219. Long texts by LongRoPE; Phi-4-mini rotates a part of each head.
"""

import dataclasses

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import ATTENTION, FUSED_MLP, LAYER, MLP_NORM, QKV_BIAS, Block, Decoder
from ftjax.models.gpt import GptBlock, GptConfig, GptDecoder, norm_rows
from ftjax.weights import Weight

PHI_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attention_dropout"))  # pretraining's


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhiConfig(GptConfig):
    qk_layernorm: bool


class PhiBlock(GptBlock):
    @property
    def parallel(self):
        return True


class Phi(GptDecoder):
    Config = PhiConfig
    BLOCKS = {"layers": PhiBlock}
    KEYS = {
        **GptDecoder.KEYS,
        "partial_rotary_factor": None,  # read into rope_parameters
        **PHI_DROPOUT,
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        attn, mlp = LAYER + "self_attn.", LAYER + "mlp."
        rows = {
            **norm_rows("attn_norm", LAYER + "input_layernorm"),
            **{name: ATTENTION[name] for name in "qkv"},
            **QKV_BIAS,
            "o": Weight("NH->D", attn + "dense.weight"),
            "o_bias": Weight("D", attn + "dense.bias", init="zeros"),
            "up": Weight("D->F", mlp + "fc1.weight"),
            "up_bias": Weight("F", mlp + "fc1.bias", init="zeros"),
            "down": Weight("F->D", mlp + "fc2.weight"),
            "down_bias": Weight("D", mlp + "fc2.bias", init="zeros"),
        }
        for name in "qk" if cfg.qk_layernorm else "":
            norm = attn + name + "_layernorm."
            rows[name + "_norm"] = Weight("H", norm + "weight", init="ones")
            rows[name + "_norm_bias"] = Weight("H", norm + "bias", init="zeros")
        return rows

    @classmethod
    def outer_rows(cls, cfg):
        head_bias = Weight("V", "lm_head.bias", init="zeros")
        norm = norm_rows("final_norm", "model.final_layernorm")
        return super().outer_rows(cfg) | norm | {"lm_head_bias": head_bias}


# -- Phi-3 and 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(ModelConfig):
    rms_norm_eps: float

    @property
    def sizes(self):
        return super().sizes | dict(Q=self.num_attention_heads + 2 * self.num_key_value_heads)


class Phi3Block(Block):
    def qkv(self, h_BTD):
        qkv_BTQH = self.linear("BTD,DQH->BTQH", h_BTD, "qkv")
        N, K = self.cfg.num_attention_heads, self.cfg.num_key_value_heads
        return qkv_BTQH[:, :, :N], qkv_BTQH[:, :, N : N + K], qkv_BTQH[:, :, N + K :]


class Phi3(Decoder):
    Config = Phi3Config
    BLOCKS = {"layers": Phi3Block}
    KEYS = {
        "hidden_act": ("silu",),
        "sliding_window": None,
        # both are read into rope_parameters
        "original_max_position_embeddings": None,
        "partial_rotary_factor": None,
        **PHI_DROPOUT,
        # what Phi-4-mini's config.json says and transformers' model does not read
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "lm_head_bias": (False, None),
        "full_attn_mod": (1, None),
        "interpolate_factor": (1, None),
    }

    @classmethod
    def prepare(cls, raw):
        """LongRoPE was called "su", and "yarn", in Phi-3's first files."""
        rope = raw.get("rope_scaling") or {}
        if rope.get("type", rope.get("rope_type")) not in ("su", "yarn"):
            return raw
        return {
            **raw,
            "rope_scaling": {k: v for k, v in rope.items() if k != "type"} | {"rope_type": "longrope"},
        }

    @classmethod
    def block_rows(cls, cfg, kind):
        return {
            "attn_norm": ATTENTION["attn_norm"],
            "qkv": Weight("D->QH", LAYER + "self_attn.qkv_proj.weight"),
            "o": ATTENTION["o"],
            **MLP_NORM,
            **FUSED_MLP,
        }
