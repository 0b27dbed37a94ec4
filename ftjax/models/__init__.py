"""The registry: config.json's model_type -> the file that implements it."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models import llama
from ftjax.models.common import KVCache, Model, ModelConfig, RunOptions

# model_type -> (module with read_config and make_table, flax module)
REGISTRY = {
    "llama": (llama, llama.Llama),
    "mistral": (llama, llama.Llama),
    "qwen2": (llama, llama.Llama),
    "qwen3": (llama, llama.Llama),
}


def from_config(raw: dict[str, Any]) -> Model:
    """The model that a config.json describes, its defaults filled in as transformers fills them in.

    Raises UserError for a model_type or a field that is not implemented, naming what is.
    """
    kind = raw.get("model_type")
    if kind not in REGISTRY:
        raise UserError(
            f"config.json: model_type={kind!r} is not supported; supported: {', '.join(sorted(REGISTRY))}. "
            "docs/porting.md says how to add one."
        )
    from transformers import AutoConfig  # slow to import, and only needed here

    port, module = REGISTRY[kind]
    try:
        hf = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "transformers.js_config"})
    except Exception as e:  # a value of the wrong type shows as one of several libraries' classes
        raise UserError(f"config.json: {e}") from e
    config = port.read_config(hf, raw)
    return Model(config, port.make_table(config, hf), module)


__all__ = ["REGISTRY", "KVCache", "Model", "ModelConfig", "RunOptions", "from_config"]
