"""dots.llm1: the attention of Qwen 3 and the experts of DeepSeek-V3. Huo et al. 2025, arXiv:2506.05767."""

from ftjax.models.decoder import ATTENTION, O_BIAS, QK_NORM, QKV_BIAS, Block
from ftjax.models.deepseek import COMMON, SharedExperts, SharedExpertsBlock, SharedExpertsConfig


class Dots1(SharedExperts):
    Config = SharedExpertsConfig
    BLOCKS = {"dense": Block, "sparse": SharedExpertsBlock}
    KEYS = {
        **COMMON,
        **dict.fromkeys(("first_k_dense_replace", "sliding_window", "max_window_layers", "layer_types")),
        "scoring_func": ("noaux_tc", "sigmoid", None),
        "topk_method": ("noaux_tc", None),
    }

    @classmethod
    def attention_rows(cls, cfg):
        return ATTENTION | QK_NORM | (QKV_BIAS | O_BIAS if cfg.attention_bias else {})
