"""SmolLM3: Llama where some layers, one in four, have no rotary positions (Yang et al. 2025,
arXiv:2501.18795). Hugging Face 2025, huggingface.co/blog/smollm3."""

from ftjax.models.llama import COMMON, WINDOW_LAYERS, Llama


class SmolLM3(Llama):
    KEYS = {
        **COMMON,
        **WINDOW_LAYERS,
        **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "pretraining_tp")),
    }

    @classmethod
    def config(cls, hf):
        turned = hf.no_rope_layers[: hf.num_hidden_layers]  # 1 where a layer has rotary positions
        return cls.Config.read(hf, no_rope=tuple(not x for x in turned))
