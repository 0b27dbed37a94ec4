"""Qwen 2 MoE and Qwen 1.5 MoE (arXiv:2407.10671), Qwen 3 MoE (arXiv:2505.09388): the dense decoders with
experts in some layers; Qwen 2's have a shared expert beside them, weighted by a gate."""

import dataclasses

from ftjax.models.decoder import LAYER, MLP, QKV_BIAS, Block, Decoder, Keys, Rows
from ftjax.models.llama import WINDOW_LAYERS, Qwen3
from ftjax.models.moe import ROUTER, MoeBlock, MoeConfig, SharedMoeBlock, expert_rows, shared_rows
from ftjax.weights import Weight

COMMON: Keys = {
    **WINDOW_LAYERS,
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "output_router_logits": None,
}
SHARED_EXPERT: Rows = shared_rows(LAYER + "mlp.shared_expert.") | {
    "shared_scale": Weight("D->J", LAYER + "mlp.shared_expert_gate.weight")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenMoeConfig(MoeConfig):
    num_experts: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    @property
    def sizes(self):
        return super().sizes | dict(E=self.num_experts, M=self.moe_intermediate_size)


class QwenMoe(Decoder):
    """Layers of kinds "dense" and "sparse", by `decoder_sparse_step` and `mlp_only_layers`."""

    Config = QwenMoeConfig

    @classmethod
    def layer_kinds(cls, cfg):
        step, dense = cfg.decoder_sparse_step, cfg.mlp_only_layers
        sparse = [(i + 1) % step == 0 and i not in dense for i in range(cfg.num_hidden_layers)]
        return ["sparse" if x and cfg.num_experts else "dense" for x in sparse]

    @classmethod
    def sparse_rows(cls, cfg):
        return ROUTER | expert_rows()

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = super().block_rows(cfg, kind)
        if kind == "dense":
            return rows
        return {name: row for name, row in rows.items() if name not in MLP} | cls.sparse_rows(cfg)


class Qwen3Moe(QwenMoe, Qwen3):
    BLOCKS = {"dense": Block, "sparse": MoeBlock}
    KEYS = {**COMMON, "num_local_experts": None}  # another name of num_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(QwenMoeConfig):
    shared_expert_intermediate_size: int
    qkv_bias: bool

    @property
    def sizes(self):
        return super().sizes | dict(I=self.shared_expert_intermediate_size)


class Qwen2Moe(QwenMoe):
    Config = Qwen2MoeConfig
    BLOCKS = {"dense": Block, "sparse": SharedMoeBlock}
    KEYS = {**COMMON, "attention_bias": (True, None)}

    @classmethod
    def config(cls, hf):
        return cls.Config.read(hf, attention_bias=False)

    @classmethod
    def sparse_rows(cls, cfg):
        return super().sparse_rows(cfg) | SHARED_EXPERT

    @classmethod
    def block_rows(cls, cfg, kind):
        return super().block_rows(cfg, kind) | (QKV_BIAS if cfg.qkv_bias else {})
