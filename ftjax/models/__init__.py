"""The registry: config.json's model_type -> the class that implements it."""

import importlib
from typing import Any

from ftjax.errors import UserError
from ftjax.models.common import KV, Cache, Model, ModelConfig, RunOptions, text_config

# model_type -> "file:class" under ftjax/models, imported when asked for
REGISTRY = {
    "llama": "llama:Llama",
    "mistral": "llama:Mistral",
    "mixtral": "mixtral:Mixtral",
    "qwen2": "llama:Qwen2",
    "qwen3": "llama:Qwen3",
}


def family(model_type: str | None):
    """The Decoder class of a model_type. UserError, with the list, for one that is not ported."""
    if model_type not in REGISTRY:
        raise UserError(
            f"config.json: model_type={model_type!r} is not supported; supported: "
            f"{', '.join(sorted(REGISTRY))}. docs/porting.md says how to add one."
        )
    file, _, name = REGISTRY[model_type].partition(":")
    return getattr(importlib.import_module(f"ftjax.models.{file}"), name)


def from_config(raw: dict[str, Any]) -> Model:
    """The model that a config.json describes, its defaults filled in as transformers fills them in.

    Of a multimodal model it is the text decoder. Raises UserError for a model_type or a field that is not
    implemented, naming what is.
    """
    raw = text_config(raw)
    decoder = family(raw.get("model_type"))
    from transformers import AutoConfig  # slow to import, and only needed here

    try:
        hf = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "transformers.js_config"})
    except Exception as e:  # a value of the wrong type shows as one of several libraries' classes
        raise UserError(f"config.json: {e}") from e
    config = decoder.read_config(hf, raw)
    return Model(config, decoder.make_table(config), decoder)


__all__ = [
    "KV",
    "REGISTRY",
    "Cache",
    "Model",
    "ModelConfig",
    "RunOptions",
    "family",
    "from_config",
    "text_config",
]
