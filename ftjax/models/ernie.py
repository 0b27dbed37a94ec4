"""ERNIE 4.5's dense model: Llama with rotary pairs side by side and biases everywhere or nowhere. Baidu 2025,
ERNIE 4.5 technical report."""

import dataclasses

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import MLP_BIAS, O_BIAS, QKV_BIAS, Block, Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErnieConfig(ModelConfig):
    rms_norm_eps: float
    use_bias: bool


class ErnieBlock(Block):
    interleaved = True


class Ernie(Decoder):
    Config = ErnieConfig
    BLOCKS = {"layers": ErnieBlock}
    KEYS = {"hidden_act": ("silu",)}

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = super().block_rows(cfg, kind)
        return rows | QKV_BIAS | O_BIAS | MLP_BIAS if cfg.use_bias else rows
