"""Llama 4, its text part: attention within chunks and rotary positions in most layers, all of the past and no
positions in the others; experts whose inputs are weighted, beside a shared one. Meta 2025,
github.com/meta-llama/llama-models."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ftjax.models.decoder import ATTENTION, LAYER, MLP_NORM, O_BIAS, QKV_BIAS, Block, Decoder, Rows
from ftjax.models.moe import MoeConfig, SharedMoeBlock, shared_rows
from ftjax.ops import l2_norm, top_k_sigmoid
from ftjax.weights import IN_OUT, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4Config(MoeConfig):
    intermediate_size_mlp: int
    num_local_experts: int
    moe_layers: tuple[int, ...]
    use_qk_norm: bool
    chunks: tuple[int | None, ...]  # of each layer, None = all of the past
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float

    @property
    def sizes(self):
        inner = self.intermediate_size
        return super().sizes | dict(F=self.intermediate_size_mlp, E=self.num_local_experts, M=inner, I=inner)


class Llama4Block(Block):
    interleaved = True

    def rotate(self, q_BTNH, k_BTKH):
        q_BTNH, k_BTKH = super().rotate(q_BTNH, k_BTKH)
        cfg, no_rope = self.cfg, self.layer.get("rope", 0) == 1
        if cfg.use_qk_norm:
            q_BTNH, k_BTKH = (jnp.where(no_rope, x, l2_norm(x, cfg.rms_norm_eps)) for x in (q_BTNH, k_BTKH))
        if cfg.attn_temperature_tuning:  # Nakanishi 2025, arXiv:2501.19399
            past_BT = (self.shared.queries[1] + 1).astype(jnp.float32)
            scale_BT = jnp.log1p(jnp.floor(past_BT / cfg.floor_scale)) * cfg.attn_scale + 1.0
            scale_BT = jnp.where(no_rope, scale_BT, 1.0)
            q_BTNH = (q_BTNH.astype(jnp.float32) * scale_BT[:, :, None, None]).astype(q_BTNH.dtype)
        return q_BTNH, k_BTKH

    def attend(self, q_BTNH, k_BTKH, v_BTKH, **facts):
        return super().attend(q_BTNH, k_BTKH, v_BTKH, chunk=self.layer.get("chunk"), **facts)


class Llama4SparseBlock(Llama4Block, SharedMoeBlock):
    weigh_input = True

    def route(self, h_XD):
        logits_XE = self.router_logits(h_XD)
        chosen_XC, weight_XC = top_k_sigmoid(logits_XE, self.cfg.num_experts_per_tok)
        self.observe(logits_XE, chosen_XC)
        return chosen_XC, weight_XC


MLP = LAYER + "feed_forward."
DENSE: Rows = {
    "gate": Weight("D->F", MLP + "gate_proj.weight"),
    "up": Weight("D->F", MLP + "up_proj.weight"),
    "down": Weight("F->D", MLP + "down_proj.weight"),
}
EXPERTS: Rows = {
    "router": Weight("D->E", MLP + "router.weight", role="router"),
    "experts_gate_up": Weight("E:D->UM", MLP + "experts.gate_up_proj", IN_OUT),
    "experts_down": Weight("E:M->D", MLP + "experts.down_proj", IN_OUT),
}


class Llama4(Decoder):
    Config = Llama4Config
    BLOCKS = {"dense": Llama4Block, "sparse": Llama4SparseBlock}
    LAYER_TYPES = ("full_attention", "chunked_attention")
    KEYS = {
        "hidden_act": ("silu",),
        "output_router_logits": None,
        "router_jitter_noise": (0, 0.0, None),
        "for_llm_compressor": (False, None),
        # read as `chunks`, `no_rope` and `moe_layers`
        **dict.fromkeys(("layer_types", "attention_chunk_size", "no_rope_layers", "no_rope_layer_interval")),
        "interleave_moe_layer_step": None,
    }

    @classmethod
    def config(cls, hf):
        chunk = hf.attention_chunk_size
        return cls.Config.read(
            hf,
            chunks=tuple(chunk if kind == "chunked_attention" else None for kind in hf.layer_types),
            no_rope=tuple(not rope for rope in hf.no_rope_layers[: hf.num_hidden_layers]),
        )

    @classmethod
    def layer_kinds(cls, cfg):
        return ["sparse" if i in cfg.moe_layers else "dense" for i in range(cfg.num_hidden_layers)]

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = ATTENTION | MLP_NORM | (QKV_BIAS | O_BIAS if cfg.attention_bias else {})
        return rows | (DENSE if kind == "dense" else EXPERTS | shared_rows(MLP + "shared_expert."))

    def layer_data(self, w, x_BTD, tokens_BT):
        data = super().layer_data(w, x_BTD, tokens_BT)
        if any(self.cfg.chunks):
            never = np.iinfo(np.int32).max
            data["chunk"] = np.array([chunk or never for chunk in self.cfg.chunks], np.int32)
        return data
