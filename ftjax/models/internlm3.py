"""InternLM 3: Llama with biases in the MLP too, where there are any, and dynamic rotary scaling.
Cai et al. 2024, arXiv:2403.17297, and its code."""

import dataclasses

from ftjax.models.decoder import MLP_BIAS
from ftjax.models.llama import NO_WINDOW, Llama, LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternLM3Config(LlamaConfig):
    mlp_bias: bool


class InternLM3(Llama):
    Config = InternLM3Config
    KEYS = {**NO_WINDOW, "hidden_act": ("silu",), "qkv_bias": None, "bias": None}  # their names here

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = super().block_rows(cfg, kind)
        return rows | MLP_BIAS if cfg.mlp_bias else rows
