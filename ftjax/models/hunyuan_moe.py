"""Hunyuan-A13B: HunYuan's dense model with experts beside a shared one. Tencent 2025,
github.com/Tencent-Hunyuan/Hunyuan-A13B."""

import dataclasses

from ftjax.errors import UserError
from ftjax.models.decoder import LAYER, MLP
from ftjax.models.hunyuan import HunYuan, HunYuanBlock
from ftjax.models.llama import LlamaConfig
from ftjax.models.moe import SharedMoeBlock, expert_rows, shared_rows
from ftjax.weights import Weight


def one_of(hf, key: str):
    """A number that may be given for each layer; UserError where the layers differ."""
    value = getattr(hf, key)
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1:
        raise UserError(f"config.json: {key}={value!r}: layers that differ in it are not supported")
    return values.pop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunYuanMoeConfig(LlamaConfig):
    num_experts: int
    num_experts_per_tok: int

    @property
    def sizes(self):
        inner = self.intermediate_size
        return super().sizes | dict(E=self.num_experts, M=inner, I=inner)

    @classmethod
    def read(cls, hf, **given):
        for key, value in (("moe_intermediate_size", hf.intermediate_size), ("num_shared_expert", 1)):
            if getattr(hf, key, None) is not None and one_of(hf, key) != value:
                raise UserError(
                    f"config.json: {key}={getattr(hf, key)!r} is not supported; supported: {value}"
                )
        # moe_topk is config.json's name of num_experts_per_tok
        return super().read(
            hf, num_experts=one_of(hf, "num_experts"), num_experts_per_tok=one_of(hf, "moe_topk"), **given
        )


class HunYuanMoeBlock(HunYuanBlock, SharedMoeBlock):
    pass


class HunYuanMoe(HunYuan):
    Config = HunYuanMoeConfig
    BLOCKS = {"layers": HunYuanMoeBlock}
    KEYS = {
        **HunYuan.KEYS,
        "output_router_logits": None,
        "moe_topk": None,
        "num_local_experts": None,  # another name of num_experts
        **dict.fromkeys(("moe_intermediate_size", "num_shared_expert")),  # see HunYuanMoeConfig
        **dict.fromkeys(("moe_drop_tokens", "moe_random_routing_dropped_token")),  # no token is dropped
        "use_mixed_mlp_moe": (True, None),
        "moe_layer_num_skipped": (0, None),
        "norm_topk_prob": (True, None),
        "use_mla": (False, None),
        "group_limited_greedy": (False, None),
    }

    @classmethod
    def block_rows(cls, cfg, kind):
        mlp = LAYER + "mlp."
        router = Weight("D->E", mlp + "gate.wg.weight", role="router")
        rows = {path: row for path, row in super().block_rows(cfg, kind).items() if path not in MLP}
        return rows | {"router": router} | expert_rows() | shared_rows(mlp + "shared_mlp.")
