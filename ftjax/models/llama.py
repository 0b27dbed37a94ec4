"""Llama 1-3, Mistral, Qwen 2/2.5 and Qwen 3 dense decoders. Touvron et al. 2023, arXiv:2307.09288.

Against Llama: Mistral attends within a sliding window (arXiv:2310.06825); Qwen 2 has biases on q, k, v
(arXiv:2407.10671); Qwen 3 norms each head of q and k (arXiv:2505.09388).
"""

import dataclasses

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import O_BIAS, QK_NORM, QKV_BIAS, Decoder, Keys

COMMON: Keys = {"hidden_act": ("silu",), "mlp_bias": (False, None)}
NO_WINDOW: Keys = {"sliding_window": (None,), "use_sliding_window": (False, None)}
WINDOW_LAYERS: Keys = dict.fromkeys(
    ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    rms_norm_eps: float
    attention_bias: bool


class Llama(Decoder):
    Config = LlamaConfig
    KEYS = {**COMMON, **NO_WINDOW}

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = super().block_rows(cfg, kind)
        return rows | QKV_BIAS | O_BIAS if cfg.attention_bias else rows


class Mistral(Llama):
    KEYS = {**COMMON, "sliding_window": None, "attention_bias": (False, None)}

    @classmethod
    def config(cls, hf):
        return cls.Config.read(hf, attention_bias=False)


class Qwen2(Llama):
    KEYS = {**COMMON, **WINDOW_LAYERS, "attention_bias": (True, None)}

    @classmethod
    def config(cls, hf):
        return cls.Config.read(hf, attention_bias=True)

    @classmethod
    def block_rows(cls, cfg, kind):
        return Decoder.block_rows(cfg, kind) | QKV_BIAS


class Qwen3(Llama):
    KEYS = {**COMMON, **WINDOW_LAYERS}

    @classmethod
    def block_rows(cls, cfg, kind):
        return super().block_rows(cfg, kind) | QK_NORM
