"""HunYuan's dense models and Hy-MT: Llama that norms each head of q and k after the rotary embedding, whose
theta is stretched for long texts. Tencent 2025, github.com/Tencent-Hunyuan."""

import dataclasses

from ftjax.models.common import read_rope
from ftjax.models.decoder import LAYER, Block, Rows
from ftjax.models.llama import COMMON, NO_WINDOW, Llama
from ftjax.weights import Weight

ROTATED_NORM: Rows = {
    "rotated_q_norm": Weight("H", LAYER + "self_attn.query_layernorm.weight", init="ones"),
    "rotated_k_norm": Weight("H", LAYER + "self_attn.key_layernorm.weight", init="ones"),
}


class HunYuanBlock(Block):
    def rotate(self, q_BTNH, k_BTKH):
        q_BTNH, k_BTKH = super().rotate(q_BTNH, k_BTKH)
        return self.normalise(q_BTNH, "rotated_q_norm"), self.normalise(k_BTKH, "rotated_k_norm")


class HunYuan(Llama):
    BLOCKS = {"layers": HunYuanBlock}
    # in every config.json of the family, of its tokenizer, its classifiers and its multimodal kin
    UNUSED = (
        "add_classification_head attention_head_dim cla_share_factor class_num dense_list eod_token_id "
        "im_end_id im_newline_id im_start_id mask_init_id norm_type org_vocab_size pad_id pool_type "
        "text_end_id text_start_id attention_dropout"
    )
    KEYS = {
        **COMMON,
        **NO_WINDOW,
        **dict.fromkeys(UNUSED.split()),
        "use_cla": (False,),
        "use_qk_norm": (True,),
        "use_rotary_pos_emb": (True,),
        "position_embedding_xdrope": (False,),
    }

    @classmethod
    def config(cls, hf):
        config = cls.Config.read(hf)
        rope = dict(read_rope(hf))
        if rope.get("rope_type") != "dynamic" or not rope.get("alpha"):
            return config
        # its "dynamic" with an alpha does not depend on the length
        dim = config.head_dim
        theta = rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))
        return dataclasses.replace(config, rope_parameters=(("rope_theta", theta), ("rope_type", "default")))

    @classmethod
    def block_rows(cls, cfg, kind):
        return super().block_rows(cfg, kind) | ROTATED_NORM
