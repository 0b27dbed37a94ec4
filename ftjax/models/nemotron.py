"""Nemotron-4 and Minitron: LayerNorm whose scale is 1 + its weight, squared ReLU, a part of each head
rotated. Parmar et al. 2024, arXiv:2402.16819."""

import dataclasses

from ftjax.models.decoder import ATTENTION, LAYER, MLP, MLP_BIAS, O_BIAS, QKV_BIAS
from ftjax.models.gpt import GptBlock, GptConfig, GptDecoder, norm_rows
from ftjax.ops import layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class NemotronConfig(GptConfig):
    attention_bias: bool
    mlp_bias: bool


class NemotronBlock(GptBlock):
    def normalise(self, x, name: str):
        return layer_norm(x, self.w[name], self.w[name + "_bias"], self.cfg.layer_norm_eps, offset=1.0)


class Nemotron(GptDecoder):
    Config = NemotronConfig
    BLOCKS = {"layers": NemotronBlock}
    KEYS = {
        **GptDecoder.KEYS,
        "norm_eps": None,
        "layer_norm_eps": (),
        "partial_rotary_factor": None,  # read into rope_parameters
        "rope_percent": (0.5, None),  # an older name that transformers' model does not read
        "kv_channels": None,  # as head_dim, which it does read
    }

    @classmethod
    def config(cls, hf):
        return cls.Config.read(hf, layer_norm_eps=hf.norm_eps)

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = {
            **ATTENTION,
            **norm_rows("attn_norm", LAYER + "input_layernorm", "zeros"),
            **norm_rows("mlp_norm", LAYER + "post_attention_layernorm", "zeros"),
            "up": MLP["up"],
            "down": MLP["down"],
        }
        if cfg.attention_bias:
            rows |= QKV_BIAS | O_BIAS
        if cfg.mlp_bias:
            rows |= {name: MLP_BIAS[name] for name in ("up_bias", "down_bias")}
        return rows

    @classmethod
    def outer_rows(cls, cfg):
        return super().outer_rows(cfg) | norm_rows("final_norm", "model.norm", "zeros")
