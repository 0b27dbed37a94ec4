"""Arcee's AFM: Llama with an MLP of two matrices and squared ReLU (So et al. 2021, arXiv:2109.08668). Arcee
AI 2025, huggingface.co/arcee-ai/AFM-4.5B."""

import dataclasses

from jax.ad_checkpoint import checkpoint_name

from ftjax.models.decoder import Block, Rows
from ftjax.models.llama import NO_WINDOW, Llama, LlamaConfig
from ftjax.ops import activation, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArceeConfig(LlamaConfig):
    hidden_act: str


def no_gate(rows: Rows) -> Rows:
    return {name: row for name, row in rows.items() if name != "gate"}


class TwoMatrixBlock(Block):
    """An MLP without a gate."""

    def mlp(self, h_BTD, prefix: str = ""):
        up_BTF = checkpoint_name(self.linear("BTD,DF->BTF", h_BTD, prefix + "up"), "up")
        act_BTF = shard(checkpoint_name(self.act(up_BTF), "act"), "BTF")
        return self.linear("BTF,FD->BTD", act_BTF, prefix + "down")

    def act(self, up):
        return activation(self.cfg.hidden_act)(up)


class Arcee(Llama):
    Config = ArceeConfig
    BLOCKS = {"layers": TwoMatrixBlock}
    KEYS = {**NO_WINDOW, "mlp_bias": (False, None)}

    @classmethod
    def block_rows(cls, cfg, kind):
        return no_gate(super().block_rows(cfg, kind))
