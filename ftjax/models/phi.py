"""Phi-3, Phi-3.5 and Phi-4 (model_type phi3): Llama with q, k, v in one matrix and gate and up in another.
Abdin et al. 2024, arXiv:2404.14219. Long texts by LongRoPE; Phi-4-mini rotates a part of each head."""

import dataclasses

from jax.ad_checkpoint import checkpoint_name

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import ATTENTION, LAYER, MLP, MLP_NORM, Block, Decoder
from ftjax.ops import shard
from ftjax.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(ModelConfig):
    rms_norm_eps: float

    @property
    def sizes(self):
        return super().sizes | dict(U=2, Q=self.num_attention_heads + 2 * self.num_key_value_heads)


class Phi3Block(Block):
    def qkv(self, h_BTD):
        qkv_BTQH = self.linear("BTD,DQH->BTQH", h_BTD, "qkv")
        N, K = self.cfg.num_attention_heads, self.cfg.num_key_value_heads
        return qkv_BTQH[:, :, :N], qkv_BTQH[:, :, N : N + K], qkv_BTQH[:, :, N + K :]

    def mlp(self, h_BTD, prefix: str = ""):
        both_BTUF = checkpoint_name(self.linear("BTD,DUF->BTUF", h_BTD, "gate_up"), "up")
        h_BTF = self.gated(both_BTUF[:, :, 0], both_BTUF[:, :, 1])
        return self.linear("BTF,FD->BTD", shard(checkpoint_name(h_BTF, "act"), "BTF"), "down")


class Phi3(Decoder):
    Config = Phi3Config
    BLOCKS = {"layers": Phi3Block}
    KEYS = {
        "hidden_act": ("silu",),
        "sliding_window": None,
        # both are read into rope_parameters
        "original_max_position_embeddings": None,
        "partial_rotary_factor": None,
        # pretraining's dropout
        "resid_pdrop": None,
        "embd_pdrop": None,
        "attention_dropout": None,
        # what Phi-4-mini's config.json says and transformers' model does not read
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "lm_head_bias": (False, None),
        "full_attn_mod": (1, None),
        "interpolate_factor": (1, None),
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        return {
            "attn_norm": ATTENTION["attn_norm"],
            "qkv": Weight("D->QH", LAYER + "self_attn.qkv_proj.weight"),
            "o": ATTENTION["o"],
            **MLP_NORM,
            "gate_up": Weight("D->UF", LAYER + "mlp.gate_up_proj.weight"),
            "down": MLP["down"],
        }
