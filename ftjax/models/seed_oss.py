"""Seed-OSS: Llama with biases on q, k, v and, by a switch of its own, on o. ByteDance Seed 2025,
github.com/ByteDance-Seed/seed-oss."""

import dataclasses

from ftjax.models.decoder import O_BIAS, QKV_BIAS, Decoder
from ftjax.models.llama import COMMON, NO_WINDOW, Llama, LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedOssConfig(LlamaConfig):
    attention_out_bias: bool


class SeedOss(Llama):
    Config = SeedOssConfig
    # the dropout of its own pretraining, written in its config.json
    KEYS = {**COMMON, **NO_WINDOW, "attention_dropout": None, "residual_dropout": None}

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = Decoder.block_rows(cfg, kind)
        rows |= QKV_BIAS if cfg.attention_bias else {}
        return rows | (O_BIAS if cfg.attention_out_bias else {})
