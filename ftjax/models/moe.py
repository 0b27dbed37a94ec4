"""Layers whose MLP is a mixture of experts: the rows most families have, and the block. Shazeer et al. 2017,
arXiv:1701.06538; no token is dropped."""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax.models.decoder import LAYER, Block, Rows
from ftjax.ops import einsum, experts, grouped, router_statistics, top_k_softmax
from ftjax.weights import Weight


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


ROUTER: Rows = {"router": Weight("D->E", LAYER + "mlp.gate.weight", role="router")}


class MoeBlock(Block):
    """A config with these needs `num_experts`, `num_experts_per_tok` and, in its sizes, E and M (an expert's
    inner size)."""

    normalise_weights = True

    def mlp(self, h_BTD, prefix: str = ""):
        h_XD = h_BTD.reshape(-1, h_BTD.shape[-1])
        chosen_XC, weight_XC = self.route(h_XD)
        count = self.cfg.sizes["E"]
        return experts(h_XD, chosen_XC, weight_XC, self.expert, count).reshape(h_BTD.shape)

    def route(self, h_XD):
        """(experts, their weights), each [X, C]."""
        logits_XE = self.router_logits(h_XD)
        chosen_XC, weight_XC = top_k_softmax(logits_XE, self.cfg.num_experts_per_tok, self.normalise_weights)
        self.observe(logits_XE, chosen_XC)
        return chosen_XC, weight_XC

    def router_logits(self, h_XD):
        return checkpoint_name(einsum("XD,DE->XE", h_XD, self.w["router"], jnp.float32), "router")

    def observe(self, logits_XE, chosen_XC, probs_XE=None):
        """Put the statistics that balance losses are made of, over live tokens, into `aux`."""
        live_X = (self.shared.queries[0].reshape(-1) > 0).astype(jnp.float32)
        self.aux = router_statistics(logits_XE, chosen_XC, live_X, probs_XE)

    def expert(self, rows_MD, sizes):
        gate = checkpoint_name(grouped(rows_MD, self.w["experts_gate"], sizes), "gate")
        up = checkpoint_name(grouped(rows_MD, self.w["experts_up"], sizes), "up")
        return grouped(checkpoint_name(self.gated(gate, up), "act"), self.w["experts_down"], sizes)
