"""Layers whose MLP is a mixture of experts: the rows most families have, and the block. Shazeer et al. 2017,
arXiv:1701.06538; no token is dropped.

Letters beyond weights.py: E experts, M an expert's inner size, I that of an MLP for every token beside them
(shared experts), U = 2 the gate and the up of one tensor, J = 1.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ftjax.models.decoder import LAYER, Block, Rows
from ftjax.models.llama import LlamaConfig
from ftjax.ops import (
    by_device,
    by_row,
    einsum,
    expert_bias,
    experts,
    groupeds,
    router_statistics,
    top_k_softmax,
)
from ftjax.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(LlamaConfig):
    """A subclass says in its sizes what E, M (and I) are."""

    num_experts_per_tok: int
    router_aux_loss_coef: float

    @property
    def sizes(self):
        return super().sizes | dict(U=2, J=1)


def expert_rows(
    hf: str = LAYER + "mlp.experts.{expert}.",
    torch: str = LAYER + "mlp.experts.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Rows:
    """Experts kept apart in the checkpoint and as two parameters in transformers' module."""
    gate, up, down = (f"{hf}{name}.weight" for name in names)
    fused = torch + "gate_up_proj"
    return {
        "experts_gate": Weight("E:D->M", gate, torch=fused, part=(0, 2)),
        "experts_up": Weight("E:D->M", up, torch=fused, part=(1, 2)),
        "experts_down": Weight("E:M->D", down, torch=torch + "down_proj"),
    }


def shared_rows(hf: str) -> Rows:
    """The MLP for every token."""
    return {
        "shared_gate": Weight("D->I", hf + "gate_proj.weight"),
        "shared_up": Weight("D->I", hf + "up_proj.weight"),
        "shared_down": Weight("I->D", hf + "down_proj.weight"),
    }


ROUTER: Rows = {"router": Weight("D->E", LAYER + "mlp.gate.weight", role="router")}


class MoeBlock(Block):
    """Experts in place of the MLP; `gate` and `up` are two weights, or one, `experts_gate_up`, whose outputs'
    axis `gate_up_axis` holds them. A config with these needs `num_experts_per_tok` and, in its sizes, E and
    M."""

    weigh_input: ClassVar[bool] = False  # a token's weight multiplies what its expert gets, not what it gives
    gate_up_axis: ClassVar[int] = 1

    @property
    def normalise_weights(self) -> bool:
        """Whether the weights of a token's experts sum to 1."""
        return getattr(self.cfg, "norm_topk_prob", True)

    def mlp(self, h_BTD, prefix: str = ""):
        h_XD = self.tokens(h_BTD)
        return self.back(self.experts(h_XD, *self.route(h_XD)), h_BTD)

    def tokens(self, x_BT):
        """Rows and positions as one axis, [X, …], the tokens of each device together."""
        return by_device(x_BT).reshape(-1, *x_BT.shape[2:])

    def back(self, y_XD, like_BT):
        """The inverse of `tokens`."""
        return by_row(y_XD[None], *like_BT.shape[:2])

    def experts(self, h_XD, chosen_XC, weight_XC):
        w = {name: x for name, x in self.w.items() if name.startswith("experts_")}
        B, T = self.shared.queries[0].shape
        ids_X = self.tokens(jnp.arange(B * T, dtype=jnp.int32).reshape(B, T))
        count = self.cfg.sizes["E"]
        return experts(h_XD, chosen_XC, weight_XC, self.expert, w, count, self.weigh_input, ids_X)

    def route(self, h_XD):
        """(experts, their weights), each [X, C]."""
        logits_XE = self.router_logits(h_XD)
        chosen_XC, weight_XC = top_k_softmax(logits_XE, self.cfg.num_experts_per_tok, self.normalise_weights)
        self.observe(logits_XE, chosen_XC)
        return chosen_XC, weight_XC

    def router_logits(self, h_XD):
        logits_XE = einsum("XD,DE->XE", h_XD, self.w["router"], jnp.float32)
        if "router_logits_bias" in self.w:
            logits_XE += self.w["router_logits_bias"].astype(jnp.float32)
        return self.named(logits_XE, "router")

    def observe(self, logits_XE, chosen_XC, probs_XE=None):
        """Put the statistics that balance losses are made of, over live tokens, into `aux`."""
        live_X = (self.tokens(self.shared.queries[0]) > 0).astype(jnp.float32)
        self.aux = router_statistics(logits_XE, chosen_XC, live_X, probs_XE)

    def expert(self, w, rows_MD, sizes):
        """Each row through its own expert of the weights `w`: rows sorted by expert, `sizes` [E] of them
        each."""
        if "experts_gate_up" in w:
            (both,) = self.expert_linears(w, rows_MD, ("experts_gate_up",), sizes)
            gate, up = jnp.moveaxis(both, self.gate_up_axis, 0)
        else:
            gate, up = self.expert_linears(w, rows_MD, ("experts_gate", "experts_up"), sizes)
        act_MF = self.named(self.gated(gate, up), "act")
        return self.expert_linears(w, act_MF, ("experts_down",), sizes)[0]

    def expert_linears(self, w, rows, names, sizes):
        """Each row's products with its own expert's weights, plus `name_bias` where there is one."""
        ys = groupeds(rows, [w[name] for name in names], sizes)
        for i, name in enumerate(names):
            if (bias := w.get(name + "_bias")) is not None:
                ys[i] += expert_bias(bias, sizes, len(rows)).astype(ys[i].dtype)
        return list(map(self.named, ys, names))


class SharedMoeBlock(MoeBlock):
    """Experts, and the MLP for every token where there is one; its output is times sigmoid(x ·
    `shared_scale`) where there is that."""

    def mlp(self, h_BTD, prefix: str = ""):
        y_BTD = super().mlp(h_BTD, prefix)
        return y_BTD + self.shared_mlp(h_BTD) if "shared_down" in self.w else y_BTD

    def shared_mlp(self, h_BTD):
        y_BTD = Block.mlp(self, h_BTD, "shared_")
        if "shared_scale" in self.w:
            scale_BTJ = einsum("BTD,DJ->BTJ", h_BTD, self.w["shared_scale"])
            y_BTD *= jax.nn.sigmoid(scale_BTJ.astype(jnp.float32)).astype(y_BTD.dtype)
        return y_BTD
