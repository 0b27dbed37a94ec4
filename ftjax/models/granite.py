"""Granite 3 and the dense Granite 4.0: Llama with constants that multiply the embeddings, what each layer
adds, the attention logits and (as a divisor) the logits, as maximal update parametrisation has them (Yang
et al. 2022, arXiv:2203.03466). IBM 2024, github.com/ibm-granite/granite-3.0-language-models.
"""

import dataclasses

import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.models.decoder import ATTENTION, LAYER, MLP_NORM, O_BIAS, QKV_BIAS, Block
from ftjax.models.llama import COMMON, NO_WINDOW, Llama, LlamaConfig
from ftjax.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float


def scaled(x, factor: float):
    """x · factor, rounded once: the factor itself is not rounded to x's dtype."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class GraniteBlock(Block):
    def __call__(self, x_BTD):
        residual = self.cfg.residual_multiplier
        x_BTD += scaled(self.attention(self.norm(x_BTD, "attn_norm")), residual)
        return x_BTD + scaled(self.feed_forward(self.norm(x_BTD, "mlp_norm")), residual)

    @property
    def scale(self):
        return float(self.cfg.attention_multiplier)


class Granite(Llama):
    Config = GraniteConfig
    BLOCKS = {"layers": GraniteBlock}

    def embed(self, w, tokens_BT, positions_BT, segments_BT):
        x_BTD = super().embed(w, tokens_BT, positions_BT, segments_BT)
        return scaled(x_BTD, self.cfg.embedding_multiplier)

    @staticmethod
    def unembed(cfg, head, hidden):
        return Llama.unembed(cfg, head, hidden) / cfg.logits_scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteHybridConfig(GraniteConfig):
    shared_intermediate_size: int

    @property
    def sizes(self):
        return super().sizes | dict(F=self.shared_intermediate_size)


class GraniteHybrid(Granite):
    """Granite 4.0 without Mamba layers and without experts (Micro, 1B, 350M)."""

    Config = GraniteHybridConfig
    # what only experts and Mamba layers read; where both are none, it changes nothing
    UNUSED = (
        "num_experts_per_tok output_router_logits router_aux_loss_coef mamba_n_heads mamba_n_groups "
        "mamba_d_state mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias "
        "mamba_proj_bias time_step_limit init_method"
    )
    KEYS = {
        **COMMON,
        **NO_WINDOW,
        **dict.fromkeys(UNUSED.split()),
        "num_local_experts": None,
        "layer_types": None,
        "layers_block_type": None,
        "position_embedding_type": None,
        "normalization_function": ("rmsnorm",),
    }
    LAYER_TYPES = ("full_attention", "linear_attention")

    @classmethod
    def config(cls, hf):
        mamba = sum(kind == "linear_attention" for kind in hf.layer_types)
        if mamba:
            raise UserError(
                f"config.json: {mamba} of {hf.num_hidden_layers} layers are Mamba layers, which are not "
                "supported; of Granite 4.0, the models without -h- in their names have none"
            )
        if hf.num_local_experts:
            raise UserError(
                f"config.json: num_local_experts={hf.num_local_experts} is not supported for model_type "
                "'granitemoehybrid'; supported: 0"
            )
        no_rope = hf.position_embedding_type != "rope"
        return cls.Config.read(hf, no_rope=(no_rope,) * hf.num_hidden_layers)

    @classmethod
    def block_rows(cls, cfg, kind):
        mlp = {
            "gate_up": Weight("D->UF", LAYER + "shared_mlp.input_linear.weight"),
            "down": Weight("F->D", LAYER + "shared_mlp.output_linear.weight"),
        }
        return ATTENTION | MLP_NORM | mlp | (QKV_BIAS | O_BIAS if cfg.attention_bias else {})
