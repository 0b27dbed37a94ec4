"""GPT-J (Wang & Komatsuzaki 2021) and CodeGen (Nijkamp et al. 2022, arXiv:2203.13474): GPT-2's names,
rotary positions in pairs, attention and MLP side by side on one norm, a head with a bias."""

import dataclasses

from ftjax.models.decoder import HEAD
from ftjax.models.gpt import GPT2_KEYS, GPT2_LAYER, GptBlock, GptConfig, GptDecoder, norm_rows, read_gpt2
from ftjax.weights import LOOKUP, Table, Weight

ATTN = GPT2_LAYER + "attn."


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptjConfig(GptConfig):
    rotary_dim: int


class GptjBlock(GptBlock):
    interleaved = True

    @property
    def parallel(self):
        return True


class Gptj(GptDecoder):
    Config = GptjConfig
    BLOCKS = {"layers": GptjBlock}
    KEYS = {**GPT2_KEYS, "rotary": (True,), "scale_attn_weights": (True,)}

    @classmethod
    def config(cls, hf):
        return read_gpt2(cls.Config, hf, rope_parameters=(("rope_theta", 10000.0),))

    @classmethod
    def qkv_rows(cls):
        return {name: Weight("D->NH", f"{ATTN}{name}_proj.weight") for name in "qkv"}

    @classmethod
    def block_rows(cls, cfg, kind):
        mlp = GPT2_LAYER + "mlp."
        return {
            **norm_rows("attn_norm", GPT2_LAYER + "ln_1"),
            **cls.qkv_rows(),
            "o": Weight("NH->D", ATTN + "out_proj.weight"),
            "up": Weight("D->F", mlp + "fc_in.weight"),
            "up_bias": Weight("F", mlp + "fc_in.bias", init="zeros"),
            "down": Weight("F->D", mlp + "fc_out.weight"),
            "down_bias": Weight("D", mlp + "fc_out.bias", init="zeros"),
        }

    @classmethod
    def outer_rows(cls, cfg):
        return {
            "embed": Weight("V->D", "transformer.wte.weight", LOOKUP),
            **norm_rows("final_norm", "transformer.ln_f"),
            **({} if cfg.tie_word_embeddings else HEAD),
            "lm_head_bias": Weight("V", "lm_head.bias", init="zeros"),
        }

    @classmethod
    def others(cls, cfg):
        return rf"{Table.others}|transformer\.h\.\d+\.attn\.((masked_)?bias|causal_mask)"

    def rotary(self, positions_BT, segments_BT):
        """Of the head's first `rotary_dim` features."""
        return self.rotary_table(self.cfg.rope_parameters, positions_BT, segments_BT, self.cfg.rotary_dim)


class CodegenConfig(GptjConfig):
    @property
    def sizes(self):
        """Pretraining split the heads over four devices: the files keep the q, v and k of each together."""
        return super().sizes | dict(U=3, Y=4, W=self.num_attention_heads // 4)


class CodegenBlock(GptjBlock):
    def qkv(self, h_BTD):
        qvk_BTYUWH = self.linear("BTD,DYUWH->BTYUWH", h_BTD, "qkv")
        N, H = self.cfg.num_attention_heads, self.cfg.head_dim
        q_BTNH, v_BTNH, k_BTNH = (qvk_BTYUWH[:, :, :, i].reshape(*h_BTD.shape[:2], N, H) for i in range(3))
        return q_BTNH, k_BTNH, v_BTNH


class Codegen(Gptj):
    Config = CodegenConfig
    BLOCKS = {"layers": CodegenBlock}

    @classmethod
    def qkv_rows(cls):
        return {"qkv": Weight("D->YUWH", ATTN + "qkv_proj.weight")}
