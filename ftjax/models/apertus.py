"""Apertus: Llama with norms on each head of q and k, and an MLP of two matrices with xIELU, an activation of
two trained numbers a layer (Huang & Schlag 2024, arXiv:2411.13010). Swiss AI 2025, arXiv:2509.14233."""

import jax
import jax.numpy as jnp

from ftjax.models.arcee import no_gate
from ftjax.models.decoder import LAYER, QK_NORM, Block, Rows
from ftjax.models.llama import NO_WINDOW, Llama, LlamaConfig
from ftjax.ops import recomputed
from ftjax.weights import VECTOR, Layout, Weight

NUMBER = Layout("number", VECTOR.load, lambda x, lead, ins, outs: x.reshape(()))  # a tensor of no axes
ACT = LAYER + "mlp.act_fn."
ROWS: Rows = {
    "attn_norm": Weight("D", LAYER + "attention_layernorm.weight", init="ones"),
    "mlp_norm": Weight("D", LAYER + "feedforward_layernorm.weight", init="ones"),
    "alpha_p": Weight("Z", ACT + "alpha_p", init="ones"),
    "alpha_n": Weight("Z", ACT + "alpha_n", init="ones"),
    "beta": Weight("Z", ACT + "beta", NUMBER, init="ones"),
    "eps": Weight("Z", ACT + "eps", NUMBER, init="zeros"),
}


class ApertusConfig(LlamaConfig):
    @property
    def sizes(self):
        return super().sizes | dict(Z=1)


class ApertusBlock(Block):
    def act(self, up):
        """xIELU: a parabola above 0; below, an exponential that turns back up."""
        alpha_p, alpha_n, beta, eps = (
            self.w[name].astype(jnp.float32) for name in ("alpha_p", "alpha_n", "beta", "eps")
        )
        beta, eps = jax.lax.stop_gradient((beta, eps))  # constants that the checkpoint holds

        @recomputed
        def xielu(up, alpha_p, alpha_n, beta, eps):
            x = up.astype(jnp.float32)
            above = jax.nn.softplus(alpha_p) * x * x
            below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x, eps)) - x)
            return (jnp.where(x > 0, above, below) + beta * x).astype(up.dtype)

        return xielu(up, alpha_p, alpha_n, beta, eps)


class Apertus(Llama):
    Config = ApertusConfig
    BLOCKS = {"layers": ApertusBlock}
    KEYS = {
        **NO_WINDOW,
        "hidden_act": ("xielu",),
        "mlp_bias": (False, None),
        "qk_norm": (True,),
        "post_norm": (False,),
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        return no_gate(super().block_rows(cfg, kind)) | QK_NORM | ROWS
