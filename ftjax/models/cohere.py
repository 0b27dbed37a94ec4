"""Cohere's Command R, Aya (cohere), Command R7B and Command A (cohere2).

Against Llama: attention and MLP side by side on one norm; LayerNorm without bias; rotary pairs side by side;
logits multiplied by a constant. Command R+ norms each head of q and k with weights of its own. cohere2 has
windows, and no positions on the layers without one (Yang et al. 2025, arXiv:2501.18795). Cohere 2025,
arXiv:2504.00698.
"""

import dataclasses

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import ATTENTION, LAYER, MLP, O_BIAS, QKV_BIAS, Block, Decoder, Rows
from ftjax.ops import layer_norm
from ftjax.weights import IN_OUT, Weight

HEAD_NORM: Rows = {  # a weight a head and feature, kept as a matrix
    "q_norm": Weight("N->H", LAYER + "self_attn.q_norm.weight", IN_OUT, init="ones", role="vector"),
    "k_norm": Weight("K->H", LAYER + "self_attn.k_norm.weight", IN_OUT, init="ones", role="vector"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohereConfig(ModelConfig):
    layer_norm_eps: float
    logit_scale: float
    attention_bias: bool
    use_qk_norm: bool


class CohereBlock(Block):
    interleaved = True

    def __call__(self, x_BTD):
        h_BTD = self.norm(x_BTD, "attn_norm")
        return x_BTD + self.attention(h_BTD) + self.feed_forward(h_BTD)

    def normalise(self, x, name):
        return layer_norm(x, self.w[name], None, self.cfg.layer_norm_eps)


class Cohere(Decoder):
    Config = CohereConfig
    BLOCKS = {"layers": CohereBlock}
    KEYS = {"hidden_act": ("silu",)}

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = ATTENTION | MLP | (HEAD_NORM if cfg.use_qk_norm else {})
        return rows | QKV_BIAS | O_BIAS if cfg.attention_bias else rows

    @staticmethod
    def unembed(cfg, head, hidden):
        return Decoder.unembed(cfg, head, hidden) * cfg.logit_scale


class Cohere2(Cohere):
    KEYS = {
        "hidden_act": ("silu",),
        "sliding_window": None,
        "sliding_window_pattern": None,
        "layer_types": None,
        # written by Cohere, read by nobody; what they say of the model is always this
        "use_qk_norm": (False, None),
        "use_parallel_block": (True,),
        "use_gated_activation": (True,),
        "use_embedding_sharing": (True,),
        "use_parallel_embedding": (False,),
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1, 1.0),
        "layer_switch": (4,),
    }

    @classmethod
    def config(cls, hf):
        no_rope = tuple(kind == "full_attention" for kind in hf.layer_types)
        return cls.Config.read(hf, use_qk_norm=False, no_rope=no_rope)
