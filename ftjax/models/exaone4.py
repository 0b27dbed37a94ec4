"""EXAONE 4.0: Llama with norms on what attention and MLP put out and on each head of q and k; with windows,
the layers without one have no positions. LG AI Research 2025, arXiv:2507.11407."""

import dataclasses

from ftjax.models.common import ModelConfig
from ftjax.models.decoder import ATTENTION, MLP, QK_NORM, Decoder
from ftjax.models.olmo import POST_NORMS, PostNormBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exaone4Config(ModelConfig):
    rms_norm_eps: float


class Exaone4(Decoder):
    Config = Exaone4Config
    BLOCKS = {"layers": PostNormBlock}
    KEYS = {
        "hidden_act": ("silu",),
        "sliding_window": None,
        "sliding_window_pattern": None,
        "layer_types": None,
    }

    @classmethod
    def config(cls, hf):
        hybrid = hf.sliding_window is not None
        no_rope = tuple(hybrid and kind == "full_attention" for kind in hf.layer_types)
        return cls.Config.read(hf, no_rope=no_rope)

    @classmethod
    def block_rows(cls, cfg, kind):
        return ATTENTION | MLP | QK_NORM | POST_NORMS
