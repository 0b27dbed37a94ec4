"""OLMoE: q and k normed over all heads at once, experts in every layer. Muennighoff et al. 2024,
arXiv:2409.02060."""

import dataclasses

from ftjax.models.decoder import ATTENTION, MLP_NORM, O_BIAS, QKV_BIAS, Decoder
from ftjax.models.moe import ROUTER, MoeBlock, MoeConfig, expert_rows
from ftjax.models.olmo import FLAT_QK_NORM, OlmoBlock, flat_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoeConfig(MoeConfig):
    num_experts: int
    norm_topk_prob: bool
    clip_qkv: float | None

    @property
    def sizes(self):
        return super().sizes | dict(E=self.num_experts, M=self.intermediate_size)


class FlatNormMoeBlock(MoeBlock):
    def normalise(self, x, name: str):
        return flat_norm(x, self.w[name], self.cfg.rms_norm_eps)


class OlmoeBlock(FlatNormMoeBlock, OlmoBlock):
    pass


class Olmoe(Decoder):
    Config = OlmoeConfig
    BLOCKS = {"layers": OlmoeBlock}
    KEYS = {"hidden_act": ("silu",), "output_router_logits": None}

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = ATTENTION | FLAT_QK_NORM | MLP_NORM | ROUTER | expert_rows()
        return rows | QKV_BIAS | O_BIAS if cfg.attention_bias else rows
