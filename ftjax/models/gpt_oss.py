"""gpt-oss: experts with biases and a clamped activation, a sink in each head's softmax, windows in every
second layer. OpenAI 2025, arXiv:2508.10925, and its reference code, github.com/openai/gpt-oss."""

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.models.decoder import ATTENTION, LAYER, MLP_NORM, O_BIAS, QKV_BIAS, Decoder, Rows
from ftjax.models.moe import MoeBlock, MoeConfig
from ftjax.ops import recomputed, rms_norm
from ftjax.weights import IN_OUT, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(MoeConfig):
    num_local_experts: int
    swiglu_alpha: float
    swiglu_limit: float

    @property
    def sizes(self):
        return super().sizes | dict(E=self.num_local_experts, M=self.intermediate_size)


MLP = LAYER + "mlp."
SINKS: Rows = {"sinks": Weight("N", LAYER + "self_attn.sinks", init="zeros")}
EXPERTS: Rows = {
    "router": Weight("D->E", MLP + "router.weight", role="router"),
    "router_logits_bias": Weight("E", MLP + "router.bias", init="zeros"),
    "experts_gate_up": Weight("E:D->MU", MLP + "experts.gate_up_proj", IN_OUT),  # gate and up in turns
    "experts_gate_up_bias": Weight("E:MU", MLP + "experts.gate_up_proj_bias", init="zeros"),
    "experts_down": Weight("E:M->D", MLP + "experts.down_proj", IN_OUT),
    "experts_down_bias": Weight("E:D", MLP + "experts.down_proj_bias", init="zeros"),
}


class GptOssBlock(MoeBlock):
    gate_up_axis = -1

    def normalise(self, x, name: str):
        return rms_norm(x, self.w[name], self.cfg.rms_norm_eps, 0.0)

    def attend(self, q_BTNH, k_BTKH, v_BTKH, **facts):
        return super().attend(q_BTNH, k_BTKH, v_BTKH, sinks=self.w["sinks"], **facts)

    def gated(self, gate, up):
        """(up + 1) · gate · sigmoid(alpha · gate), both clamped."""
        limit = self.cfg.swiglu_limit

        @recomputed
        def times(gate, up):
            gate_f32 = jnp.minimum(gate.astype(jnp.float32), limit)
            up_f32 = jnp.clip(up.astype(jnp.float32), -limit, limit)
            act = (up_f32 + 1.0) * gate_f32 * jax.nn.sigmoid(gate_f32 * self.cfg.swiglu_alpha)
            return act.astype(up.dtype)

        return times(gate, up)


class GptOss(Decoder):
    Config = GptOssConfig
    BLOCKS = {"layers": GptOssBlock}
    KEYS = {
        "hidden_act": ("silu",),  # not read: the activation is its own
        "sliding_window": None,
        "layer_types": None,
        "output_router_logits": None,
        "num_experts": None,  # another name of num_local_experts
        # said again: by num_experts_per_tok and by rope_parameters
        **dict.fromkeys(("experts_per_token", "initial_context_length")),
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = ATTENTION | SINKS | MLP_NORM | EXPERTS
        return rows | QKV_BIAS | O_BIAS if cfg.attention_bias else rows
