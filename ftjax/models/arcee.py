"""Arcee's AFM: Llama with an MLP of two matrices and squared ReLU (So et al. 2021, arXiv:2109.08668). Arcee
AI 2025, huggingface.co/arcee-ai/AFM-4.5B."""

import dataclasses

from ftjax.models.decoder import Rows
from ftjax.models.llama import NO_WINDOW, Llama, LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArceeConfig(LlamaConfig):
    hidden_act: str


def no_gate(rows: Rows) -> Rows:
    return {name: row for name, row in rows.items() if name != "gate"}


class Arcee(Llama):
    Config = ArceeConfig
    KEYS = {**NO_WINDOW, "mlp_bias": (False, None)}

    @classmethod
    def block_rows(cls, cfg, kind):
        return no_gate(super().block_rows(cfg, kind))
