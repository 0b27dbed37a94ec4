"""StarCoder2: LayerNorm, biases throughout, an MLP that is not gated, a window. Lozhkov et al. 2024,
arXiv:2402.19173."""

import dataclasses

from ftjax.models.decoder import ATTENTION, LAYER, O_BIAS, QKV_BIAS
from ftjax.models.gpt import GptConfig, GptDecoder, norm_rows
from ftjax.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Starcoder2Config(GptConfig):
    use_bias: bool


class Starcoder2(GptDecoder):
    Config = Starcoder2Config
    KEYS = {
        **GptDecoder.KEYS,
        "norm_epsilon": None,
        "layer_norm_eps": (),
        "sliding_window": None,
        # pretraining's dropout
        "attention_dropout": None,
        "residual_dropout": None,
        "embedding_dropout": None,
        # what the published files say besides, and transformers' model does not read
        "activation_function": None,
        "layer_norm_epsilon": None,
        "attention_softmax_in_fp32": None,
        "scale_attention_softmax_in_fp32": None,
        "scale_attn_weights": (True,),
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
    }

    @classmethod
    def config(cls, hf):
        return cls.Config.read(hf, layer_norm_eps=hf.norm_epsilon)

    @classmethod
    def block_rows(cls, cfg, kind):
        up, down = LAYER + "mlp.c_fc.", LAYER + "mlp.c_proj."
        rows = {
            **ATTENTION,
            **norm_rows("attn_norm", LAYER + "input_layernorm"),
            **norm_rows("mlp_norm", LAYER + "post_attention_layernorm"),
            "up": Weight("D->F", up + "weight"),
            "down": Weight("F->D", down + "weight"),
        }
        if cfg.use_bias:
            rows |= QKV_BIAS | O_BIAS
            rows["up_bias"] = Weight("F", up + "bias", init="zeros")
            rows["down_bias"] = Weight("D", down + "bias", init="zeros")
        return rows

    @classmethod
    def outer_rows(cls, cfg):
        return super().outer_rows(cfg) | norm_rows("final_norm", "model.norm")
