"""GPT-2 and GPT-NeoX, and the block of the decoders that come of them: LayerNorm with a bias, an MLP of two
matrices, and, in some, attention and MLP side by side.

GPT-2: Radford et al. 2019, "Language models are unsupervised multitask learners". GPT-NeoX (Pythia):
arXiv:2204.06745, arXiv:2304.01373. Attention and MLP in parallel are from GPT-J (Wang & Komatsuzaki 2021).
"""

import dataclasses

import numpy as np

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import HEAD, Block, Decoder, Keys, Rows
from ftjax.ops import embed, layer_norm
from ftjax.ops.layers import ACTIVATIONS
from ftjax.weights import IN_OUT, LOOKUP, Table, Weight

ANY_ACTIVATION = tuple(ACTIVATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptConfig(ModelConfig):
    layer_norm_eps: float
    hidden_act: str


def norm_rows(name: str, hf: str, scale: str = "ones") -> Rows:
    """A LayerNorm's scale and bias."""
    return {
        name: Weight("D", hf + ".weight", init=scale),
        name + "_bias": Weight("D", hf + ".bias", init="zeros"),
    }


class GptBlock(Block):
    """Needs `layer_norm_eps` and `hidden_act` in its config. Where the table has no mlp_norm, the MLP reads
    what attention reads."""

    def __call__(self, x_BTD):
        if not self.parallel:
            return super().__call__(x_BTD)
        h_BTD = self.norm(x_BTD, "attn_norm")
        mlp_BTD = self.feed_forward(self.norm(x_BTD, "mlp_norm") if "mlp_norm" in self.w else h_BTD)
        return x_BTD + (self.attention(h_BTD) + mlp_BTD)

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP are added to the same input."""
        return getattr(self.cfg, "use_parallel_residual", False)

    def normalise(self, x, name: str):
        return layer_norm(x, self.w[name], self.w.get(name + "_bias"), self.cfg.layer_norm_eps)


class GptDecoder(Decoder):
    Config = GptConfig
    BLOCKS = {"layers": GptBlock}
    KEYS = {"hidden_act": ANY_ACTIVATION}


# -- GPT-NeoX


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptNeoxConfig(GptConfig):
    use_parallel_residual: bool
    attention_bias: bool

    @property
    def sizes(self):
        return super().sizes | dict(U=3)


NEOX_LAYER = "gpt_neox.layers.{layer}."


class GptNeoxBlock(GptBlock):
    def qkv(self, h_BTD):
        qkv_BTNUH = self.linear("BTD,DNUH->BTNUH", h_BTD, "qkv")
        return qkv_BTNUH[..., 0, :], qkv_BTNUH[..., 1, :], qkv_BTNUH[..., 2, :]


class GptNeox(GptDecoder):
    Config = GptNeoxConfig
    BLOCKS = {"layers": GptNeoxBlock}
    KEYS = {
        **GptDecoder.KEYS,
        "rotary_pct": None,  # these three are read into rope_parameters
        "rotary_emb_base": None,
        "partial_rotary_factor": None,
        "num_key_value_heads": (),
        "classifier_dropout": None,
        "attention_probs_dropout_prob": (0, 0.0),
        "hidden_dropout_prob": (0, 0.0),
    }
    RENAMES = {r"lm_head\.": "embed_out."}  # what the module calls it

    @classmethod
    def config(cls, hf):
        heads = hf.num_attention_heads
        return cls.Config.read(hf, num_key_value_heads=heads, head_dim=hf.hidden_size // heads)

    @classmethod
    def block_rows(cls, cfg, kind):
        qkv, dense = NEOX_LAYER + "attention.query_key_value.", NEOX_LAYER + "attention.dense."
        up, down = NEOX_LAYER + "mlp.dense_h_to_4h.", NEOX_LAYER + "mlp.dense_4h_to_h."
        rows = {
            **norm_rows("attn_norm", NEOX_LAYER + "input_layernorm"),
            "qkv": Weight("D->NUH", qkv + "weight"),
            "o": Weight("NH->D", dense + "weight"),
            **norm_rows("mlp_norm", NEOX_LAYER + "post_attention_layernorm"),
            "up": Weight("D->F", up + "weight"),
            "up_bias": Weight("F", up + "bias", init="zeros"),
            "down": Weight("F->D", down + "weight"),
            "down_bias": Weight("D", down + "bias", init="zeros"),
        }
        if cfg.attention_bias:
            rows["qkv_bias"] = Weight("NUH", qkv + "bias", init="zeros")
            rows["o_bias"] = Weight("D", dense + "bias", init="zeros")
        return rows

    @classmethod
    def outer_rows(cls, cfg):
        head = Weight("D->V", "embed_out.weight", role="head", torch="lm_head.weight")
        return {
            "embed": Weight("V->D", "gpt_neox.embed_in.weight", LOOKUP),
            **norm_rows("final_norm", "gpt_neox.final_layer_norm"),
            **({} if cfg.tie_word_embeddings else {"lm_head": head}),
        }

    @classmethod
    def others(cls, cfg):
        return rf"{Table.others}|gpt_neox\.layers\.\d+\.attention\.(masked_)?bias"


# -- GPT-2

# A config.json of GPT-2's time has names of its own, and dropout rates of pretraining, which change nothing
# here: tuning drops out the adapter's input alone. Values that the module does not read are refused.
GPT2_KEYS: Keys = {
    **dict.fromkeys("n_embd n_head n_layer n_inner n_positions n_ctx layer_norm_epsilon".split()),
    **dict.fromkeys("attn_pdrop embd_pdrop resid_pdrop summary_activation summary_first_dropout".split()),
    **dict.fromkeys("summary_proj_to_labels summary_type summary_use_proj gradient_checkpointing".split()),
    **dict.fromkeys(("hidden_act", "layer_norm_eps", "intermediate_size", "num_key_value_heads"), ()),
    "activation_function": ANY_ACTIVATION,
}


def read_gpt2(config: type[ModelConfig], hf, **given):
    """A config of GPT-2's names: `n_embd` and its like have the usual names as aliases in transformers."""
    return config.read(
        hf,
        layer_norm_eps=hf.layer_norm_epsilon,
        hidden_act=hf.activation_function,
        intermediate_size=hf.n_inner if hf.n_inner is not None else 4 * hf.n_embd,
        num_key_value_heads=hf.n_head,
        head_dim=hf.n_embd // hf.n_head,
        windows=(None,) * hf.n_layer,
        **given,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(GptConfig):
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool

    @property
    def sizes(self):
        return super().sizes | dict(U=3, P=self.max_position_embeddings)


GPT2_LAYER = "transformer.h.{layer}."


class Gpt2Block(GptBlock):
    def qkv(self, h_BTD):
        qkv_BTUNH = self.linear("BTD,DUNH->BTUNH", h_BTD, "qkv")
        q_BTNH, k_BTNH, v_BTNH = (qkv_BTUNH[:, :, i] for i in range(3))
        if "scale" in self.layer:
            q_BTNH = q_BTNH * self.layer["scale"].astype(q_BTNH.dtype)
        return q_BTNH, k_BTNH, v_BTNH

    def rotate(self, q_BTNH, k_BTKH):
        return q_BTNH, k_BTKH

    @property
    def scale(self):
        return super().scale if self.cfg.scale_attn_weights else 1.0


class Gpt2(GptDecoder):
    Config = Gpt2Config
    BLOCKS = {"layers": Gpt2Block}
    KEYS = {**GPT2_KEYS, "reorder_and_upcast_attn": None}  # attention is in float32 as it is
    RENAMES = {r"(?=(wte|wpe|h|ln_f)\.)": "transformer."}  # OpenAI's files are of the model without a head

    @classmethod
    def config(cls, hf):
        return read_gpt2(cls.Config, hf)

    @classmethod
    def block_rows(cls, cfg, kind):
        attn, mlp = GPT2_LAYER + "attn.", GPT2_LAYER + "mlp."
        return {
            **norm_rows("attn_norm", GPT2_LAYER + "ln_1"),
            "qkv": Weight("D->UNH", attn + "c_attn.weight", IN_OUT),
            "qkv_bias": Weight("UNH", attn + "c_attn.bias", init="zeros"),
            "o": Weight("NH->D", attn + "c_proj.weight", IN_OUT),
            "o_bias": Weight("D", attn + "c_proj.bias", init="zeros"),
            **norm_rows("mlp_norm", GPT2_LAYER + "ln_2"),
            "up": Weight("D->F", mlp + "c_fc.weight", IN_OUT),
            "up_bias": Weight("F", mlp + "c_fc.bias", init="zeros"),
            "down": Weight("F->D", mlp + "c_proj.weight", IN_OUT),
            "down_bias": Weight("D", mlp + "c_proj.bias", init="zeros"),
        }

    @classmethod
    def outer_rows(cls, cfg):
        return {
            "embed": Weight("V->D", "transformer.wte.weight", LOOKUP),
            "position": Weight("P->D", "transformer.wpe.weight", LOOKUP),
            **norm_rows("final_norm", "transformer.ln_f"),
            **({} if cfg.tie_word_embeddings else HEAD),
        }

    @classmethod
    def others(cls, cfg):
        return rf"{Table.others}|transformer\.h\.\d+\.attn\.(masked_)?bias"

    def embed(self, w, tokens_BT, positions_BT, segments_BT):
        x_BTD = super().embed(w, tokens_BT, positions_BT, segments_BT)
        return x_BTD + embed(w["position"], positions_BT, segments_BT, x_BTD.dtype)

    def rotary(self, positions_BT, segments_BT):
        return None

    def layer_data(self, w, x_BTD, tokens_BT):
        if not self.cfg.scale_attn_by_inverse_layer_idx:
            return {}
        return {"scale": 1 / np.arange(1, self.cfg.num_hidden_layers + 1, dtype=np.float32)}
