"""ERNIE 4.5's mixtures of experts: chosen by softmax and a bias, beside shared ones. Baidu 2025, ERNIE 4.5
technical report."""

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.models.decoder import LAYER, MLP
from ftjax.models.ernie import Ernie, ErnieBlock, ErnieConfig
from ftjax.models.moe import ROUTER, SharedMoeBlock, expert_rows, shared_rows
from ftjax.weights import IN_OUT, Table, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErnieMoeConfig(ErnieConfig):
    num_experts_per_tok: int
    router_aux_loss_coef: float
    moe_num_experts: int
    moe_num_shared_experts: int
    moe_intermediate_size: int
    moe_layer_start_index: int
    moe_layer_end_index: int
    moe_layer_interval: int
    moe_norm_min: float

    @property
    def sizes(self):
        inner = self.moe_intermediate_size
        shared = inner * self.moe_num_shared_experts
        return super().sizes | dict(E=self.moe_num_experts, M=inner, I=shared)


class ErnieSparseBlock(ErnieBlock, SharedMoeBlock):
    def route(self, h_XD):
        """The choice is by softmax + bias; the weights are without it, over their sum."""
        logits_XE = self.router_logits(h_XD)
        probs_XE = jax.nn.softmax(logits_XE)
        choice_XE = jax.lax.stop_gradient(probs_XE + self.w["router_bias"].astype(jnp.float32))
        chosen_XC = jax.lax.top_k(choice_XE, self.cfg.num_experts_per_tok)[1]
        weight_XC = jnp.take_along_axis(probs_XE, chosen_XC, axis=1)
        total_X1 = jnp.sum(weight_XC, axis=-1, keepdims=True)
        self.observe(logits_XE, chosen_XC)
        return chosen_XC, weight_XC / jnp.maximum(total_X1, self.cfg.moe_norm_min)


class ErnieMoe(Ernie):
    Config = ErnieMoeConfig
    BLOCKS = {"dense": ErnieBlock, "sparse": ErnieSparseBlock}
    KEYS = {
        **Ernie.KEYS,
        "moe_k": None,  # another name of num_experts_per_tok
        "num_experts": None,  # another name of moe_num_experts
        "output_router_logits": None,
        "use_bias": (False, None),  # the head would have one too
        "moe_gate": ("topk", None),
        "moe_gate_act": ("softmax", None),
        "use_rmsnorm": (True, None),
        **dict.fromkeys(("moe_capacity", "moe_use_aux_free", "num_nextn_predict_layers")),  # training only
    }

    @classmethod
    def layer_kinds(cls, cfg):
        sparse, step = range(cfg.moe_layer_start_index, cfg.moe_layer_end_index + 1), cfg.moe_layer_interval
        layers = range(cfg.num_hidden_layers)
        return ["sparse" if i in sparse and (i + 1) % step == 0 else "dense" for i in layers]

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = super().block_rows(cfg, kind)
        if kind == "dense":
            return rows
        mlp, name = LAYER + "mlp.", "moe_statics.e_score_correction_bias"
        bias = Weight("E", mlp + name, IN_OUT, init="zeros", torch=mlp + "gate." + name)  # kept [1, E]
        rows = {path: row for path, row in rows.items() if path not in MLP}
        rows |= ROUTER | {"router_bias": bias} | expert_rows()
        if cfg.moe_num_shared_experts:
            rows |= shared_rows(mlp + "shared_experts.")
        return rows

    @classmethod
    def others(cls, cfg):
        return Table.others + r"|model\.mtp_.*"
