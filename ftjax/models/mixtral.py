"""Mixtral: Mistral with eight experts a layer, two of them for each token. Jiang et al. 2024,
arXiv:2401.04088."""

import dataclasses

from ftjax.models.decoder import ATTENTION, LAYER, MLP_NORM, Decoder
from ftjax.models.moe import MoeBlock, MoeConfig, expert_rows
from ftjax.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(MoeConfig):
    num_local_experts: int

    @property
    def sizes(self):
        return super().sizes | dict(E=self.num_local_experts, M=self.intermediate_size)


class Mixtral(Decoder):
    Config = MixtralConfig
    BLOCKS = {"layers": MoeBlock}
    KEYS = {
        "hidden_act": ("silu",),
        "sliding_window": None,
        "attention_bias": (False, None),
        "router_jitter_noise": (0, 0.0, None),
        "output_router_logits": None,
    }

    @classmethod
    def config(cls, hf):
        return cls.Config.read(hf, attention_bias=False)

    @classmethod
    def block_rows(cls, cfg, kind):
        sparse = LAYER + "block_sparse_moe."
        router = Weight("D->E", sparse + "gate.weight", role="router", torch=LAYER + "mlp.gate.weight")
        names = ("w1", "w3", "w2")
        return (
            ATTENTION | MLP_NORM | {"router": router} | expert_rows(sparse + "experts.{expert}.", names=names)
        )
