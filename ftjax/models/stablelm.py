"""StableLM 3B and 2: Llama with LayerNorm, a part of each head rotated, and switches: biases on q, k, v; a
norm of its own for each head; attention and MLP side by side. Bellagente et al. 2024, arXiv:2402.17834."""

import dataclasses

from ftjax.models.decoder import ATTENTION, LAYER, MLP, QKV_BIAS
from ftjax.models.gpt import GptConfig, GptDecoder, norm_rows
from ftjax.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableLMConfig(GptConfig):
    use_qkv_bias: bool
    qk_layernorm: bool
    use_parallel_residual: bool


class StableLM(GptDecoder):
    Config = StableLMConfig
    KEYS = {
        "hidden_act": ("silu",),
        "partial_rotary_factor": None,  # read into rope_parameters
        "hidden_dropout": None,  # pretraining's
        "attention_dropout": None,
    }

    @classmethod
    def config(cls, hf):
        return cls.Config.read(hf, head_dim=hf.hidden_size // hf.num_attention_heads)

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = ATTENTION | MLP | norm_rows("attn_norm", LAYER + "input_layernorm")
        if not cfg.use_parallel_residual:
            rows |= norm_rows("mlp_norm", LAYER + "post_attention_layernorm")
        if cfg.use_qkv_bias:
            rows |= QKV_BIAS
        if cfg.qk_layernorm:  # the index of the head takes the place of an expert's
            q, k = (LAYER + f"self_attn.{x}_layernorm.norms.{{expert}}.weight" for x in "qk")
            rows |= {"q_norm": Weight("N:H", q, init="ones"), "k_norm": Weight("K:H", k, init="ones")}
        return rows

    @classmethod
    def outer_rows(cls, cfg):
        return super().outer_rows(cfg) | norm_rows("final_norm", "model.norm")
