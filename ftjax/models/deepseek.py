"""DeepSeek-V2 (arXiv:2405.04434), DeepSeek-V3 and R1 (arXiv:2412.19437), GLM-4.7-Flash: multi-head latent
attention, shared experts beside the routed ones.

Keys and values are products of one latent vector a token, and one rotated key serves all heads: the cache
holds these two only. Letters beyond weights.py and moe.py: H a head of q and k, O a head of v, Q the latent
size of q, C that of k and v, P the latent with the rotated key, W what of a head of k is not rotated with a
head of v.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ftjax.models.common import KV, ModelConfig
from ftjax.models.decoder import ATTENTION, LAYER, MLP, MLP_NORM, Block, Decoder, Keys, Rows, later_layers
from ftjax.models.moe import ROUTER, SharedMoeBlock, expert_rows, shared_rows
from ftjax.ops import rms_norm, rope, sigmoid_group_top_k, softmax_group_top_k
from ftjax.weights import Table, Weight

COMMON: Keys = {
    "hidden_act": ("silu",),
    "moe_layer_freq": (1, None),
    "output_router_logits": None,
    **dict.fromkeys(("ep_size", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef")),  # training only
    **dict.fromkeys(("qk_head_dim", "num_mtp_layers", "num_nextn_predict_layers", "num_local_experts")),
}


SIGMOID_ROUTER: Keys = {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig(ModelConfig):
    rms_norm_eps: float
    attention_bias: bool
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    sparse: tuple[bool, ...]  # whether each layer's MLP is one of experts
    num_nextn_predict_layers: int  # the checkpoint's layers after the last, which only predict further tokens

    @property
    def sizes(self):
        inner = self.moe_intermediate_size
        return super().sizes | dict(E=self.n_routed_experts, M=inner, I=inner * self.n_shared_experts)

    @classmethod
    def read(cls, hf, **given):
        if "sparse" not in given:
            dense = hf.first_k_dense_replace or 0
            given["sparse"] = tuple(i >= dense for i in range(hf.num_hidden_layers))
        given["num_nextn_predict_layers"] = getattr(hf, "num_nextn_predict_layers", 0) or 0
        return super().read(hf, n_group=hf.n_group or 1, topk_group=hf.topk_group or 1, **given)


ROUTER_BIAS: Rows = {
    "router_bias": Weight("E", LAYER + "mlp.gate.e_score_correction_bias", init="zeros"),
}


class SharedExpertsBlock(SharedMoeBlock):
    """Routed as in DeepSeek-V3. Its config is a SharedExpertsConfig."""

    def route(self, h_XD):
        cfg, logits_XE = self.cfg, self.router_logits(h_XD)
        chosen_XC, weight_XC = sigmoid_group_top_k(
            logits_XE,
            self.w["router_bias"],
            cfg.num_experts_per_tok,
            n_group=cfg.n_group,
            topk_group=cfg.topk_group,
            norm_topk_prob=cfg.norm_topk_prob,
            routed_scaling_factor=cfg.routed_scaling_factor,
        )
        scores_XE = jax.nn.sigmoid(logits_XE)
        self.observe(logits_XE, chosen_XC, scores_XE / jnp.sum(scores_XE, axis=-1, keepdims=True))
        return chosen_XC, weight_XC


class SharedExperts(Decoder):
    """A decoder of kinds "dense" and "sparse" whose config is a SharedExpertsConfig."""

    @classmethod
    def layer_kinds(cls, cfg):
        return ["sparse" if sparse else "dense" for sparse in cfg.sparse]

    @classmethod
    def attention_rows(cls, cfg) -> Rows:
        return ATTENTION

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = cls.attention_rows(cfg) | MLP_NORM
        if kind == "dense":
            return rows | MLP
        shared = shared_rows(LAYER + "mlp.shared_experts.")
        return rows | ROUTER | ROUTER_BIAS | expert_rows() | shared

    @classmethod
    def others(cls, cfg):
        return Table.others + later_layers(cfg, cfg.num_nextn_predict_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig(SharedExpertsConfig):
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool

    @property
    def sizes(self):
        return super().sizes | dict(
            H=self.qk_nope_head_dim + self.qk_rope_head_dim,
            O=self.v_head_dim,
            Q=self.q_lora_rank or 0,
            C=self.kv_lora_rank,
            P=self.kv_lora_rank + self.qk_rope_head_dim,
            W=self.qk_nope_head_dim + self.v_head_dim,
        )

    @classmethod
    def read(cls, hf, **given):
        heads = dict(num_key_value_heads=hf.num_attention_heads, head_dim=hf.qk_rope_head_dim)
        return super().read(hf, **heads, **given)


ATTN = LAYER + "self_attn."
MLA: Rows = {
    "attn_norm": ATTENTION["attn_norm"],
    "kv_a": Weight("D->P", ATTN + "kv_a_proj_with_mqa.weight"),
    "kv_a_norm": Weight("C", ATTN + "kv_a_layernorm.weight", init="ones"),
    "kv_b": Weight("C->NW", ATTN + "kv_b_proj.weight"),
    "o": Weight("NO->D", ATTN + "o_proj.weight"),
}
MLA_Q: Rows = {"q": Weight("D->NH", ATTN + "q_proj.weight")}
MLA_LATENT_Q: Rows = {
    "q_a": Weight("D->Q", ATTN + "q_a_proj.weight"),
    "q_a_norm": Weight("Q", ATTN + "q_a_layernorm.weight", init="ones"),
    "q_b": Weight("Q->NH", ATTN + "q_b_proj.weight"),
}
MLA_BIAS: Rows = {
    "kv_a_bias": Weight("P", ATTN + "kv_a_proj_with_mqa.bias", init="zeros"),
    "o_bias": Weight("D", ATTN + "o_proj.bias", init="zeros"),
}
MLA_LATENT_Q_BIAS: Rows = {"q_a_bias": Weight("Q", ATTN + "q_a_proj.bias", init="zeros")}


class MlaBlock(Block):
    """Attention over latents: `k` is the rotated key [B, T, 1, H of it], `v` the latent [B, T, 1, C], until
    `remember` makes each head's keys and values of them."""

    whole_keys = True

    @classmethod
    def empty_state(cls, cfg, layers, batch, length, dtype):
        return KV.empty(len(layers), batch, length, 1, (cfg.qk_rope_head_dim, cfg.kv_lora_rank), dtype)

    @classmethod
    def mixing_flops(cls, cfg, pairs, tokens):
        return 2 * cfg.num_attention_heads * (cfg.sizes["H"] + cfg.v_head_dim) * pairs

    def normalise(self, x, name: str):
        # the latents' norms have an epsilon of their own, whatever config.json says
        eps = 1e-6 if name in ("q_a_norm", "kv_a_norm") else self.cfg.rms_norm_eps
        return rms_norm(x, self.w[name], eps)

    def qkv(self, h_BTD):
        q = {"q": "BTD,DNH->BTNH"} if self.cfg.q_lora_rank is None else {"q_a": "BTD,DQ->BTQ"}
        first, both_BTP = self.linears(h_BTD, q | {"kv_a": "BTD,DP->BTP"})
        q_BTNH = first
        if self.cfg.q_lora_rank is not None:
            q_BTNH = self.linear("BTQ,QNH->BTNH", self.norm(first, "q_a_norm"), "q_b")
        latent_BTC, k_BTH = jnp.split(both_BTP, [self.cfg.kv_lora_rank], axis=-1)
        return q_BTNH, k_BTH[:, :, None], self.norm(latent_BTC, "kv_a_norm")[:, :, None]

    def rotate(self, q_BTNH, k_BT1H):
        table, interleaved = self.rotary(), self.cfg.rope_interleave
        q_BTNH, rotated_BTNH = jnp.split(q_BTNH, [self.cfg.qk_nope_head_dim], axis=-1)
        rotated_BTNH = rope(rotated_BTNH, table, interleaved)
        return jnp.concatenate([q_BTNH, rotated_BTNH], axis=-1), rope(k_BT1H, table, interleaved)

    def remember(self, k_BTKH, v_BTKH):
        rotated_BS1H, latent_BS1C = super().remember(k_BTKH, v_BTKH)
        both_BSNW = self.linear("BSC,CNW->BSNW", latent_BS1C[:, :, 0], "kv_b")
        k_BSNH, v_BSNO = jnp.split(both_BSNW, [self.cfg.qk_nope_head_dim], axis=-1)
        rotated_BSNH = jnp.broadcast_to(rotated_BS1H, (*k_BSNH.shape[:3], rotated_BS1H.shape[-1]))
        return jnp.concatenate([k_BSNH, rotated_BSNH], axis=-1), v_BSNO

    @property
    def scale(self) -> float:
        scale = self.cfg.sizes["H"] ** -0.5
        rope = dict(self.cfg.rope_parameters)
        weight = rope.get("mscale_all_dim")
        if rope.get("rope_type", "default") == "default" or not weight or rope["factor"] <= 1:
            return scale
        return scale * (0.1 * weight * math.log(rope["factor"]) + 1.0) ** 2  # YaRN's, of q and of k


class MlaSparseBlock(MlaBlock, SharedExpertsBlock):
    pass


class DeepseekV3(SharedExperts):
    Config = MlaConfig
    BLOCKS = {"dense": MlaBlock, "sparse": MlaSparseBlock}
    KEYS = {
        **COMMON,
        "first_k_dense_replace": None,
        **SIGMOID_ROUTER,
    }

    @classmethod
    def attention_rows(cls, cfg):
        latent = cfg.q_lora_rank is not None
        rows = MLA | (MLA_LATENT_Q if latent else MLA_Q)
        if cfg.attention_bias:
            rows |= MLA_BIAS | (MLA_LATENT_Q_BIAS if latent else {})
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(MlaConfig):
    topk_method: str

    @classmethod
    def read(cls, hf, **given):
        return super().read(hf, rope_interleave=True, norm_topk_prob=False, **given)


class SoftmaxSparseBlock(MlaSparseBlock):
    def route(self, h_XD):
        cfg, logits_XE = self.cfg, self.router_logits(h_XD)
        limited = cfg.topk_method == "group_limited_greedy"
        chosen_XC, weight_XC = softmax_group_top_k(
            logits_XE,
            cfg.num_experts_per_tok,
            n_group=cfg.n_group if limited else 1,
            topk_group=cfg.topk_group if limited else 1,
            routed_scaling_factor=cfg.routed_scaling_factor,
        )
        self.observe(logits_XE, chosen_XC)
        return chosen_XC, weight_XC


class DeepseekV2(DeepseekV3):
    Config = DeepseekV2Config
    BLOCKS = {"dense": MlaBlock, "sparse": SoftmaxSparseBlock}
    KEYS = {
        **COMMON,
        "first_k_dense_replace": None,
        "scoring_func": ("softmax", None),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False, None),
        "mlp_bias": (False, None),
        "rope_interleave": (True, None),
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = super().block_rows(cfg, kind)
        return {name: row for name, row in rows.items() if name not in ROUTER_BIAS}


class Glm4MoeLite(DeepseekV3):
    KEYS = {
        **COMMON,
        "mlp_layer_types": None,
        "first_k_dense_replace": (1, None),  # what mlp_layer_types is where it is not said
        **SIGMOID_ROUTER,
    }

    @classmethod
    def config(cls, hf):
        return cls.Config.read(hf, sparse=tuple(kind == "sparse" for kind in hf.mlp_layer_types))
