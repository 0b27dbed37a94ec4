"""MiniMax-M2: q and k normed over all heads at once, part of each head rotated, experts chosen by sigmoids
and a bias. MiniMax 2025, github.com/MiniMax-AI/MiniMax-M2."""

import dataclasses

from ftjax.errors import UserError
from ftjax.models.decoder import LAYER, later_layers
from ftjax.models.mixtral import Mixtral, MixtralConfig
from ftjax.models.olmo import FLAT_QK_NORM
from ftjax.models.olmoe import FlatNormMoeBlock
from ftjax.ops import sigmoid_group_top_k
from ftjax.weights import Table, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniMaxM2Config(MixtralConfig):
    num_mtp_modules: int  # the checkpoint's layers after the last, which only predict further tokens


class MiniMaxM2Block(FlatNormMoeBlock):
    def route(self, h_XD):
        logits_XE = self.router_logits(h_XD)
        chosen_XC, weight_XC = sigmoid_group_top_k(
            logits_XE,
            self.w["router_bias"],
            self.cfg.num_experts_per_tok,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        )
        self.observe(logits_XE, chosen_XC)
        return chosen_XC, weight_XC


class MiniMaxM2(Mixtral):
    Config = MiniMaxM2Config
    BLOCKS = {"layers": MiniMaxM2Block}
    KEYS = {
        **Mixtral.KEYS,
        "sliding_window": (None,),
        **dict.fromkeys(("partial_rotary_factor", "rotary_dim")),  # read into rope_parameters
        "num_experts": None,  # another name of num_local_experts
        "attn_type_list": None,  # see `config`
        "scoring_func": ("sigmoid", None),
        "use_qk_norm": (True, None),
        "qk_norm_type": ("per_layer", None),
        "use_routing_bias": (True, None),
        "shared_intermediate_size": (0, None),
        **dict.fromkeys(("layernorm_full_attention_beta", "layernorm_mlp_beta"), (1, None)),
        # of parts that it has not: linear attention, a dense MLP, shared experts
        **dict.fromkeys(("layernorm_linear_attention_beta", "mlp_intermediate_size", "shared_moe_mode")),
        **dict.fromkeys(("use_mtp", "mtp_transformer_layers", "max_model_len")),
    }

    @classmethod
    def config(cls, hf):
        kinds = set(getattr(hf, "attn_type_list", None) or ())
        if kinds - {1}:
            raise UserError(
                f"config.json: attn_type_list has {sorted(kinds)}; supported: 1, softmax attention"
            )
        mtp = getattr(hf, "num_mtp_modules", None) or 0
        return cls.Config.read(hf, attention_bias=False, num_mtp_modules=mtp)

    @classmethod
    def block_rows(cls, cfg, kind):
        name = "e_score_correction_bias"
        sparse, torch = LAYER + "block_sparse_moe." + name, LAYER + "mlp." + name
        bias = Weight("E", sparse, init="zeros", torch=torch)
        return super().block_rows(cfg, kind) | FLAT_QK_NORM | {"router_bias": bias}

    @classmethod
    def others(cls, cfg):
        return Table.others + later_layers(cfg, cfg.num_mtp_modules)
