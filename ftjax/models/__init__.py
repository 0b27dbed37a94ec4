"""The registry: config.json's model_type -> the class that implements it."""

import importlib
import re
from collections.abc import Iterable
from typing import Any

from ftjax.errors import UserError
from ftjax.models.common import KV, Cache, Model, ModelConfig, RunOptions, text_config

# model_type -> "file:class" under ftjax/models, imported when asked for
REGISTRY = {
    "apertus": "apertus:Apertus",
    "arcee": "arcee:Arcee",
    "codegen": "gptj:Codegen",
    "cohere": "cohere:Cohere",
    "cohere2": "cohere:Cohere2",
    "deepseek_v2": "deepseek:DeepseekV2",
    "deepseek_v3": "deepseek:DeepseekV3",
    "dots1": "dots1:Dots1",
    "ernie4_5": "ernie:Ernie",
    "ernie4_5_moe": "ernie_moe:ErnieMoe",
    "exaone4": "exaone4:Exaone4",
    "gemma": "gemma:Gemma",
    "gemma2": "gemma:Gemma2",
    "gemma3_text": "gemma:Gemma3",
    "gemma4_text": "gemma4:Gemma4",
    "gemma4_unified_text": "gemma4:Gemma4Unified",
    "glm": "glm:Glm",
    "glm4": "glm:Glm4",
    "glm4_moe": "glm:Glm4Moe",
    "glm4_moe_lite": "deepseek:Glm4MoeLite",
    "gpt2": "gpt:Gpt2",
    "gpt_neox": "gpt:GptNeox",
    "gpt_oss": "gpt_oss:GptOss",
    "gptj": "gptj:Gptj",
    "granite": "granite:Granite",
    "granitemoe": "granitemoe:GraniteMoe",
    "granitemoehybrid": "granite:GraniteHybrid",
    "granitemoeshared": "granitemoe:GraniteMoeShared",
    "hunyuan_v1_dense": "hunyuan:HunYuan",
    "hunyuan_v1_moe": "hunyuan_moe:HunYuanMoe",
    "internlm3": "internlm3:InternLM3",
    "llama": "llama:Llama",
    "llama4_text": "llama4:Llama4",
    "minimax_m2": "minimax_m2:MiniMaxM2",
    "ministral": "ministral:Ministral",
    "ministral3": "ministral:Ministral3",
    "mistral": "llama:Mistral",
    "mixtral": "mixtral:Mixtral",
    "nemotron": "nemotron:Nemotron",
    "olmo": "olmo:Olmo",
    "olmo2": "olmo:Olmo2",
    "olmo3": "olmo:Olmo3",
    "olmoe": "olmoe:Olmoe",
    "phi": "phi:Phi",
    "phi3": "phi:Phi3",
    "qwen2": "llama:Qwen2",
    "qwen2_moe": "qwen_moe:Qwen2Moe",
    "qwen3": "llama:Qwen3",
    "qwen3_5_moe_text": "qwen3_next:Qwen35Moe",
    "qwen3_5_text": "qwen3_next:Qwen35",
    "qwen3_moe": "qwen_moe:Qwen3Moe",
    "qwen3_next": "qwen3_next:Qwen3Next",
    "seed_oss": "seed_oss:SeedOss",
    "smollm3": "smollm3:SmolLM3",
    "stablelm": "stablelm:StableLM",
    "starcoder2": "starcoder2:Starcoder2",
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
        plain = {k: _infinities(v) for k, v in decoder.prepare(raw).items() if k != "transformers.js_config"}
        hf = AutoConfig.for_model(**plain)  # type: ignore[arg-type]
    except Exception as e:  # a value of the wrong type shows as one of several libraries' classes
        raise UserError(f"config.json: {e}") from e
    config = decoder.read_config(hf, raw)
    return Model(config, decoder.make_table(config), decoder)


def _infinities(value):
    """With {"__float__": "Infinity"}, which transformers writes as JSON has no such number, as the number."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_infinities(x) for x in value] if isinstance(value, list) else value


# Families whose published files hold all of a layer's experts in one tensor, though transformers saves each
# alone: their tables say the latter, and hf.HfFolder shows the former so
SPLITS_EXPERTS = ("qwen3_5_moe_text",)

# A multimodal model's text decoder lies under one of these in its checkpoint ...
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")
# ... and in transformers' module under the first of these, or whole under `language_model.`
_TORCH_TEXT, _NESTED = "model.language_model.", ("llama4",)


def table_names(raw: dict[str, Any], names: Iterable[str]) -> dict[str, str | None]:
    """{name in the checkpoint: name in the family's weight table}, None for what is no part of the text
    decoder."""
    names = list(names)
    if "text_config" in raw:
        return {n: _text_name(n) for n in names}
    renames = family(raw["model_type"]).RENAMES if raw.get("model_type") in REGISTRY else {}
    out = {}
    for name in names:
        out[name] = name
        for pattern, replacement in renames.items():
            out[name] = re.sub(rf"^{pattern}", replacement, out[name])
    return out


def _text_name(name: str) -> str | None:
    found = _TEXT.fullmatch(name)
    if found is None:
        return name if name.startswith("lm_head.") else None
    return found[1] if found[1].startswith("lm_head.") else "model." + found[1]


def torch_name(raw: dict[str, Any], name: str) -> str:
    """A parameter of transformers' text decoder, by its name in the class that loads the checkpoint."""
    if "text_config" not in raw:
        return name
    if raw.get("model_type") in _NESTED:
        return "language_model." + name
    return re.sub(r"^model\.", _TORCH_TEXT, name)


__all__ = [
    "KV",
    "REGISTRY",
    "Cache",
    "Model",
    "ModelConfig",
    "RunOptions",
    "family",
    "from_config",
    "table_names",
    "text_config",
    "torch_name",
]
