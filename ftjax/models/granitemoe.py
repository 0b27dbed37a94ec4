"""Granite 3's mixtures of experts (1B-A400M, 3B-A800M) and PowerMoE (Shen et al. 2024, arXiv:2408.13359):
Granite with experts in every layer, and with an MLP for every token beside them."""

import dataclasses

from ftjax.models.decoder import ATTENTION, LAYER, MLP_NORM, O_BIAS, QKV_BIAS
from ftjax.models.granite import Granite, GraniteBlock, GraniteConfig
from ftjax.models.moe import MoeBlock, MoeConfig, SharedMoeBlock
from ftjax.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteMoeConfig(GraniteConfig, MoeConfig):
    num_local_experts: int

    @property
    def sizes(self):
        return super().sizes | dict(E=self.num_local_experts, M=self.intermediate_size)


class GraniteMoeBlock(GraniteBlock, MoeBlock):
    pass


class GraniteMoe(Granite):
    Config = GraniteMoeConfig
    BLOCKS = {"layers": GraniteMoeBlock}
    KEYS = {"hidden_act": ("silu",), "output_router_logits": None}

    @classmethod
    def block_rows(cls, cfg, kind):
        sparse = LAYER + "block_sparse_moe."
        experts = sparse + "experts."
        rows = ATTENTION | MLP_NORM
        rows |= {
            "router": Weight(
                "D->E", sparse + "router.layer.weight", role="router", torch=sparse + "router.weight"
            ),
            "experts_gate_up": Weight(
                "E:D->UM", sparse + "input_linear.weight", torch=experts + "gate_up_proj"
            ),
            "experts_down": Weight("E:M->D", sparse + "output_linear.weight", torch=experts + "down_proj"),
        }
        return rows | QKV_BIAS | O_BIAS if cfg.attention_bias else rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteMoeSharedConfig(GraniteMoeConfig):
    shared_intermediate_size: int

    @property
    def sizes(self):
        return super().sizes | dict(I=self.shared_intermediate_size)


class GraniteMoeSharedBlock(GraniteBlock, SharedMoeBlock):
    pass


class GraniteMoeShared(GraniteMoe):
    Config = GraniteMoeSharedConfig
    BLOCKS = {"layers": GraniteMoeSharedBlock}

    @classmethod
    def block_rows(cls, cfg, kind):
        if not cfg.shared_intermediate_size:
            return super().block_rows(cfg, kind)
        return super().block_rows(cfg, kind) | {
            "shared_gate_up": Weight("D->UI", LAYER + "shared_mlp.input_linear.weight"),
            "shared_down": Weight("I->D", LAYER + "shared_mlp.output_linear.weight"),
        }
