"""Ministral: Mistral with a window on some layers only. Ministral 3 (also Devstral 2 and the text part of
Mistral 3): Mistral whose queries grow with the position, against the softmax flattening over long texts.
Mistral AI 2026, arXiv:2601.08584; the scale is Llama 4's.
"""

import dataclasses

import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.models.decoder import Block
from ftjax.models.llama import LlamaConfig, Mistral


class Ministral(Mistral):
    KEYS = {**Mistral.KEYS, "layer_types": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ministral3Config(LlamaConfig):
    llama_4_scaling_beta: float
    original_max_position_embeddings: int


class Ministral3Block(Block):
    def rotate(self, q_BTNH, k_BTKH):
        q_BTNH, k_BTKH = super().rotate(q_BTNH, k_BTKH)
        times_BT = self.shared.queries[1] // self.cfg.original_max_position_embeddings
        scale_BT = 1 + self.cfg.llama_4_scaling_beta * jnp.log1p(times_BT.astype(jnp.float32))
        return q_BTNH * scale_BT[:, :, None, None].astype(q_BTNH.dtype), k_BTKH


class Ministral3(Mistral):
    Config = Ministral3Config
    BLOCKS = {"layers": Ministral3Block}

    @classmethod
    def config(cls, hf):
        given = {}
        for key in ("llama_4_scaling_beta", "original_max_position_embeddings"):
            given[key] = hf.rope_parameters.get(key)
            if given[key] is None:
                raise UserError(
                    f"config.json: rope_parameters has no {key!r}, which model_type 'ministral3' needs"
                )
        return cls.Config.read(hf, attention_bias=False, **given)
