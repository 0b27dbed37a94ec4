"""Weights written as a GGUF file, for llama.cpp, Ollama and what is built on them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What each architecture's file must hold
is what llama.cpp (https://github.com/ggml-org/llama.cpp, src/models) reads: names come from the `gguf`
package's tables, and FAMILIES has one row per architecture. What llama.cpp computes otherwise than the model
was trained is an error, or a note where only some texts are concerned.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftjax import gguf as reader
from ftjax.errors import UserError

TYPES = ("F16", "BF16", "F32", "Q8_0")  # of matrices; vectors, norms and routers are F32
SMALL = re.compile(r"(_norm|ffn_gate_inp|ffn_gate_inp_shexp|position_embd)\.weight$|\.bias$")
EXPERT = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".masked_bias", ".inv_freq")
OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.", "audio_tower.", "embed_vision.")

Function = Callable[[np.ndarray], np.ndarray]
Piece = tuple[str, tuple[int, ...], Function]  # name, shape, what makes it of the tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """What llama.cpp does in one architecture that it does not do in all."""

    arch: str  # general.architecture
    interleave: bool = False  # it rotates neighbouring rows of q and k, the checkpoint two halves of a head
    one_less: bool = False  # norms are saved as their difference from 1
    window: int | None = None  # every n-th layer attends to all, the others within the window; None: all do
    assumes: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  # config field -> its only values
    facts: Callable[[Any], dict[str, Any]] = lambda c: {}  # metadata beyond what all have
    pieces: Callable[[str, tuple[int, ...], Any], list[Piece] | None] = lambda name, shape, c: None


@dataclasses.dataclass(frozen=True)
class Exported:
    path: Path
    size: int  # bytes
    tensors: int
    tokenizer_pre: str | None  # llama.cpp's name of how text is cut; None: SentencePiece's way
    notes: list[str]  # where llama.cpp will compute otherwise, or leaves something out


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _same_size(fn: Function, name: str, shape) -> list[Piece]:
    return [(name, shape, fn)]


# --- the transformations of tensors


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k: head h's rows (0, 1, …, H-1) become (0, H/2, 1, H/2+1, …), so that the pairs that
    rotate together are neighbours."""
    return np.ascontiguousarray(x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2)).reshape(x.shape)


def _gpt2(name: str, shape: tuple[int, ...], c) -> list[Piece] | None:
    if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):  # a Conv1D holds [in, out]
        return [(name, shape[::-1], lambda x: x.T)]


def _gpt_neox(name: str, shape: tuple[int, ...], c) -> list[Piece] | None:
    if "query_key_value" in name:  # a head's q, k, v after one another -> all q, all k, all v
        heads = c.num_attention_heads

        def regroup(x):
            return x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

        return _same_size(regroup, name, shape)


def _gpt_oss(name: str, shape: tuple[int, ...], c) -> list[Piece] | None:
    if name.endswith("sinks"):
        return [(name + ".weight", shape, _same)]
    if not (found := re.search(r"experts\.(gate_up_proj|down_proj)(_bias)?$", name)):
        return None
    stem, suffix = name[: found.start(1)], "bias" if found[2] else "weight"
    turned = _same if found[2] else (lambda x: x.swapaxes(1, 2))  # [experts, in, out] -> [experts, out, in]
    shape = shape if found[2] else (shape[0], shape[2], shape[1])
    if found[1] == "down_proj":
        return [(f"{stem}down_proj.{suffix}", shape, turned)]
    half = (shape[0], shape[1] // 2, *shape[2:])  # gate and up alternate
    return [
        (f"{stem}{part}_proj.{suffix}", half, lambda x, i=i: turned(x)[:, i::2])
        for i, part in enumerate(("gate", "up"))
    ]


def _deepseek(name: str, shape: tuple[int, ...], c) -> list[Piece] | None:
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("_correction_bias", "_correction.bias"), shape, _same)]
    if not name.endswith("kv_b_proj.weight"):
        return None
    heads, nope, value, rank = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, shape[1]

    def split(x):
        return x.reshape(heads, nope + value, rank)

    return [  # q is multiplied by k_b (latent attention without making k), hence the transpose
        (
            name.replace("kv_b", "k_b"),
            (heads, rank, nope),
            lambda x: split(x)[:, :nope].swapaxes(1, 2),
        ),
        (name.replace("kv_b", "v_b"), (heads, value, rank), lambda x: split(x)[:, nope:]),
    ]


def _shared_gate(name: str, shape: tuple[int, ...], c) -> list[Piece] | None:
    if name.endswith("shared_expert_gate.weight"):
        return [(name, shape[1:], lambda x: x[0])]


# --- the metadata of single architectures


def _experts(c) -> dict[str, Any]:
    return {
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": getattr(c, "shared_expert_intermediate_size", None),
    }


def _softcaps(c) -> dict[str, Any]:
    _query_scale(c, 46)
    return {
        "attn_logit_softcapping": c.attn_logit_softcapping,
        "final_logit_softcapping": c.final_logit_softcapping,
    }


def _gemma3(c) -> dict[str, Any]:
    _query_scale(c, 62)
    if getattr(c, "use_bidirectional_attention", None):
        raise UserError("config.json: use_bidirectional_attention: llama.cpp's gemma3 is causal")
    return {"final_logit_softcapping": getattr(c, "final_logit_softcapping", None)}


def _query_scale(c, layers_of_27b: int) -> None:
    """llama.cpp takes the scale of q from the size of the model: 1/sqrt(D/N) in the 27B, else 1/sqrt(H)."""
    large = c.num_hidden_layers == layers_of_27b
    wanted = c.hidden_size // c.num_attention_heads if large else c.head_dim
    if c.query_pre_attn_scalar != wanted:
        raise UserError(
            f"config.json: query_pre_attn_scalar={c.query_pre_attn_scalar}: llama.cpp computes with {wanted} "
            "in a model of this size"
        )


def _granite(c) -> dict[str, Any]:
    return {
        "attention.scale": float(c.attention_multiplier),
        "embedding_scale": float(c.embedding_multiplier),
        "residual_scale": float(c.residual_multiplier),
        "logit_scale": float(c.logits_scaling),
    }


def _cohere(c) -> dict[str, Any]:
    if getattr(c, "use_qk_norm", False) and c.num_hidden_layers < 64:
        raise UserError(
            "config.json: use_qk_norm: llama.cpp's command-r has norms of q and k from 64 layers on"
        )
    return {"logit_scale": float(c.logit_scale), "rope.scaling.type": "none"}


def _smollm3(c) -> dict[str, Any]:
    wanted = [int((i + 1) % 4 != 0) for i in range(c.num_hidden_layers)]
    if list(c.no_rope_layers) != wanted:
        raise UserError(
            f"config.json: no_rope_layers={list(c.no_rope_layers)}: llama.cpp leaves rotation out of every "
            "fourth layer"
        )
    return {}


def _exaone4(c) -> dict[str, Any]:
    windowed = "sliding_attention" in (c.layer_types or ())
    if windowed != (c.num_hidden_layers == 64):
        raise UserError(
            "config.json: layer_types: llama.cpp's exaone4 has a sliding window with 64 layers and with no "
            f"other number; here {c.num_hidden_layers} layers, window: {windowed}"
        )
    return {}


def _olmo3(c) -> dict[str, Any]:
    bases = {rope["rope_theta"] for rope in c.rope_parameters.values()}
    if len(bases) > 1:
        raise UserError(f"config.json: rope_theta differs between layers {bases}: llama.cpp's olmo2 has one")
    return {}


def _olmoe(c) -> dict[str, Any]:
    if c.num_key_value_heads != c.num_attention_heads:
        raise UserError(
            "config.json: num_key_value_heads: llama.cpp's olmoe has as many as num_attention_heads"
        )
    return {}


def _gpt_oss_facts(c) -> dict[str, Any]:
    return {"expert_feed_forward_length": c.intermediate_size}


def _deepseek_facts(c) -> dict[str, Any]:
    v3 = c.model_type == "deepseek_v3"
    rope = c.rope_parameters or {}
    every = rope.get("mscale_all_dim")
    if not every and rope.get("rope_type") == "yarn":
        raise UserError(
            "config.json: rope_parameters: yarn without mscale_all_dim: not known to be computed alike"
        )
    if every and rope.get("mscale") != every:
        raise UserError("config.json: rope_parameters: llama.cpp needs mscale and mscale_all_dim to be equal")
    if c.q_lora_rank is None and c.num_hidden_layers not in (26, 27):
        raise UserError("config.json: q_lora_rank=null: llama.cpp has that for 26 and 27 layers only")
    grouped = v3 or c.topk_method == "group_limited_greedy"
    return {
        "attention.head_count_kv": 1,  # in the latent space all heads share one key
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.scaling.yarn_log_multiplier": 0.1 * every if every else None,
        "rope.scaling.attn_factor": None,  # follows from that
        "leading_dense_block_count": c.first_k_dense_replace,
        "expert_count": c.n_routed_experts,
        "expert_shared_count": c.n_shared_experts or 0,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": bool(c.norm_topk_prob) if v3 else False,
        "expert_gating_func": 2 if v3 else 1,  # sigmoid, softmax
        "expert_group_count": c.n_group if grouped else None,
        "expert_group_used_count": c.topk_group if grouped else None,
    }


SILU = {"hidden_act": ("silu",)}
GELU = {"hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")}  # llama.cpp: the tanh form
GEMMA = {"hidden_activation": (None, *GELU["hidden_act"]), "tie_word_embeddings": (True,)}
QWEN_MOE = SILU | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}

FAMILIES = {  # config.json's model_type ->
    "llama": Family("llama", interleave=True, assumes=SILU),
    "mistral": Family("llama", interleave=True, assumes=SILU),
    "mixtral": Family("llama", interleave=True, assumes=SILU),
    "qwen2": Family("qwen2", assumes=SILU),
    "qwen2_moe": Family(
        "qwen2moe", assumes=QWEN_MOE | {"norm_topk_prob": (False,)}, facts=_experts, pieces=_shared_gate
    ),
    "qwen3": Family("qwen3", assumes=SILU),
    "qwen3_moe": Family("qwen3moe", assumes=QWEN_MOE | {"norm_topk_prob": (True,)}, facts=_experts),
    "gemma": Family("gemma", one_less=True, assumes=GEMMA),
    "gemma2": Family("gemma2", one_less=True, window=2, assumes=GEMMA, facts=_softcaps),
    "gemma3_text": Family("gemma3", one_less=True, window=6, assumes=GEMMA, facts=_gemma3),
    "phi3": Family("phi3", assumes=SILU, facts=lambda c: {"attention.sliding_window": c.sliding_window or 0}),
    "olmo": Family(
        "olmo",
        interleave=True,
        assumes=SILU,
        facts=lambda c: {"attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": c.clip_qkv},
    ),
    "olmo2": Family("olmo2", assumes=SILU),
    "olmo3": Family("olmo2", window=4, assumes=SILU, facts=_olmo3),
    "olmoe": Family("olmoe", assumes=SILU | {"clip_qkv": (None,), "norm_topk_prob": (False,)}, facts=_olmoe),
    "granite": Family("granite", interleave=True, assumes=SILU, facts=_granite),
    "smollm3": Family("smollm3", interleave=True, assumes=SILU, facts=_smollm3),
    "starcoder2": Family("starcoder2", assumes=GELU),
    "cohere": Family("command-r", assumes=SILU, facts=_cohere),
    "cohere2": Family("cohere2", window=4, assumes=SILU, facts=_cohere),
    "gpt2": Family(
        "gpt2",
        assumes={
            "activation_function": GELU["hidden_act"],
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        pieces=_gpt2,
    ),
    "gpt_neox": Family(
        "gptneox",
        assumes=GELU | {"attention_bias": (True,)},
        facts=lambda c: {"use_parallel_residual": c.use_parallel_residual},
        pieces=_gpt_neox,
    ),
    "glm4": Family("glm4", assumes=SILU),
    "nemotron": Family("nemotron", one_less=True, assumes={"hidden_act": ("relu2",)}),
    "exaone4": Family("exaone4", window=4, assumes=SILU, facts=_exaone4),
    "gpt_oss": Family("gpt-oss", window=2, facts=_gpt_oss_facts, pieces=_gpt_oss),
    "deepseek_v2": Family(
        "deepseek2", assumes=SILU | {"attention_bias": (False,)}, facts=_deepseek_facts, pieces=_deepseek
    ),
    "deepseek_v3": Family(
        "deepseek2",
        assumes=SILU | {"attention_bias": (False,), "rope_interleave": (True,)},
        facts=_deepseek_facts,
        pieces=_deepseek,
    ),
}


def family(config: Mapping[str, Any]) -> tuple[Family, Any]:
    """(row of FAMILIES, transformers' config of the text model with its defaults) of a config.json."""
    from transformers import AutoConfig  # slow to import

    kind = config.get("model_type")
    known = f"GGUF files are written for: {', '.join(FAMILIES)}, and gemma3's text"
    if kind not in FAMILIES and kind != "gemma3":
        raise UserError(f"config.json: model_type={kind!r} is not one of those that {known}")
    try:
        c = AutoConfig.for_model(**config).get_text_config()
    except Exception as e:  # a value of the wrong type shows as one of several libraries' classes
        raise UserError(f"config.json: {e}") from e
    row = FAMILIES[c.model_type]
    for field, values in row.assumes.items():
        if (value := getattr(c, field, values[0])) not in values:
            raise UserError(
                f"config.json: {field}={value!r}: llama.cpp's {row.arch} computes with "
                f"{' or '.join(map(repr, values))} only"
            )
    return row, c


def export_gguf(
    path: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    tokenizer_folder: Path,
    *,
    quantise: str = "F16",
    chat_template: str | None = None,
    stop_ids: Sequence[int] | None = None,
    name: str | None = None,
) -> Exported:
    """Write the GGUF file `path` of a Hugging Face checkpoint.

    `config` is config.json's dict, `shapes` the checkpoint's names and shapes, `read` gives a tensor by its
    name, in any floating-point dtype; it is called once per tensor (twice where one becomes two), and one is
    held at a time. `quantise`: the type of matrices. A `chat_template` of None is the tokenizer's own.
    `stop_ids` are the tokens that end an answer, the most important first (None: the tokenizer's eos).

    Raises UserError for an architecture, a config field or a tokenizer that llama.cpp does not compute as
    the model was trained, and for weights that are not finite in the type asked for.
    """
    from gguf import GGUFWriter, LlamaFileType

    if quantise not in TYPES:
        raise UserError(f"quantise={quantise!r}: one of {', '.join(TYPES)} is right")
    row, c = family(config)
    notes: list[str] = []
    facts = {k: v for k, v in metadata(row, c, notes).items() if v is not None}
    rows = next(
        (
            s[0]
            for n, s in shapes.items()
            if n.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
        ),
        None,
    )
    if rows is None:
        raise UserError("the checkpoint has no embedding (embed_tokens.weight)")
    facts["vocab_size"] = rows
    vocabulary = tokenizer_facts(Path(tokenizer_folder), rows, chat_template, stop_ids, notes)
    plan = plan_tensors(row, c, shapes, quantise, notes)
    extra = rope_tensors(row, c)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # a file cut short must not have the name of a whole one
    writer = GGUFWriter(part, row.arch)
    writer.add_type("model")
    writer.add_name(name or path.stem)
    writer.add_file_type(LlamaFileType["ALL_F32" if quantise == "F32" else f"MOSTLY_{quantise}"])
    writer.add_quantization_version(2)
    for key, value in facts.items():
        _add(writer, f"{row.arch}.{key}", value)
    for key, value in vocabulary.items():
        _add(writer, f"tokenizer.{key}", value)
    try:
        for tensor_name, x in extra.items():
            writer.add_tensor_info(tensor_name, x.shape, x.dtype, x.nbytes)
        for tensor in plan:
            writer.add_tensor_info(tensor.name, tensor.bytes_shape, tensor.dtype, tensor.size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for x in extra.values():
            writer.write_tensor_data(x)
        for tensor in plan:
            writer.write_tensor_data(tensor.make(read))
        writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return Exported(path, path.stat().st_size, len(plan) + len(extra), vocabulary.get("ggml.pre"), notes)


# The largest error of an element, over the largest value of its block of 32, that a type's rounding explains
PRECISION = {"F32": 1e-6, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 254 + 2.0**-10}


def check_file(
    path: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    quantise: str,
) -> float:
    """Re-open a file of `export_gguf` and compare every tensor with what it was made of, in float32.

    Returns the largest error over the largest value of the tensor. UserError where one is further off than
    its type explains, missing or too much.
    """
    from gguf import GGUFReader, dequantize

    row, c = family(config)
    stored = {t.name: t for t in GGUFReader(path).tensors}
    extra, worst = rope_tensors(row, c), 0.0
    plan = plan_tensors(row, c, shapes, "F32", [])
    if set(stored) != {t.name for t in plan} | set(extra):
        raise UserError(f"{path.name}: its tensors are not those that were written")
    for tensor in plan:
        wanted = tensor.make(read).astype(np.float32).reshape(-1)
        found = stored[tensor.name]
        have = dequantize(found.data, found.tensor_type).astype(np.float32).reshape(-1)
        if have.shape != wanted.shape:
            raise UserError(f"{path.name}: {tensor.name} has {have.size} elements, not {wanted.size}")
        blocks = np.pad(np.abs(wanted), (0, -wanted.size % 32)).reshape(-1, 32).max(1)
        error = np.abs(have - wanted)
        limit = np.repeat(blocks, 32)[: wanted.size] * PRECISION[quantise] + 2.0**-24
        if not np.all(error <= limit):
            raise UserError(f"{path.name}: {tensor.name} is {error.max():.3g} off: it was not written well")
        worst = max(worst, float(error.max() / max(np.abs(wanted).max(), 1e-30)))
    return worst


def _add(writer, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


# --- metadata


def metadata(row: Family, c, notes: list[str]) -> dict[str, Any]:
    """The keys under the architecture's name; None where there is none."""
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    hidden = getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * c.hidden_size

    def first(*names):
        return next((v for n in names if (v := getattr(c, n, None)) is not None), None)

    facts = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": first("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": first("rms_norm_eps"),
        "attention.layer_norm_epsilon": first(
            "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"
        ),
        "expert_count": first("num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": first("num_experts_per_tok"),
    }
    return facts | _rope(c, head_dim, notes) | _window(row, c, notes) | row.facts(c)


def _rope_parameters(c) -> dict[str, Any]:
    """Of the layers that attend to all of the text."""
    rope = getattr(c, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def _rope(c, head_dim: int, notes: list[str]) -> dict[str, Any]:
    rope, local = _rope_parameters(c), (getattr(c, "rope_parameters", None) or {}).get("sliding_attention")
    if not rope:
        return {}
    share = rope.get("partial_rotary_factor", getattr(c, "partial_rotary_factor", None))
    facts = {
        "rope.dimension_count": int(head_dim * (1.0 if share is None else share)),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.freq_base_swa": float(local["rope_theta"]) if local else None,
    }
    kind = rope.get("rope_type", "default")
    if local and local.get("rope_type", "default") != "default":
        raise UserError(
            f"config.json: rope_parameters of sliding_attention: {local['rope_type']!r}: llama.cpp scales "
            "the rotation of the layers without a window only"
        )
    if kind in ("default", "llama3"):  # Llama 3's is in a tensor
        return facts
    original = rope.get("original_max_position_embeddings") or getattr(
        c, "original_max_position_embeddings", None
    )
    if kind == "linear":
        return facts | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        facts |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        facts["rope.scaling.original_context_length"] = original or c.max_position_embeddings
        for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            facts[f"rope.scaling.{key}"] = float(rope[name]) if rope.get(name) else None
        # llama.cpp multiplies what it is given by YaRN's own factor, 0.1 ln s + 1 (arXiv 2309.00071)
        own, wanted = _yarn_scale(rope["factor"], 1.0), rope.get("attention_factor")
        if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            wanted = _yarn_scale(rope["factor"], rope["mscale"])
            wanted /= _yarn_scale(rope["factor"], rope["mscale_all_dim"])
        facts["rope.scaling.attn_factor"] = None if wanted is None else wanted / own
        if rope.get("truncate") is False:
            notes.append("llama.cpp rounds the range of YaRN's ramp to whole dimensions: this model does not")
        return facts
    if kind == "longrope" and original:
        scale = c.max_position_embeddings / original
        own = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        given = rope.get("attention_factor")
        return facts | {
            "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": float(own if given is None else given),
            "rope.scaling.original_context_length": original,
        }
    raise UserError(
        f"config.json: rope_parameters: {kind!r} cannot be said in a GGUF file; default, linear, llama3, "
        "yarn and longrope can"
    )


def _yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def rope_tensors(row: Family, c) -> dict[str, np.ndarray]:
    """Divisors of the rotation's frequencies that llama.cpp reads as tensors, float32."""
    from gguf import MODEL_TENSOR, MODEL_TENSORS

    rope = _rope_parameters(c)
    kind = rope.get("rope_type")
    if kind not in ("llama3", "longrope"):
        return {}
    wanted = MODEL_TENSOR.ROPE_FREQS if kind == "llama3" else MODEL_TENSOR.ROPE_FACTORS_LONG
    if wanted not in MODEL_TENSORS[_arch(row)]:
        raise UserError(f"config.json: rope_parameters: llama.cpp's {row.arch} has no {kind!r} scaling")
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.asarray(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    divisors = reader._llama3_divisors(rope, rope["rope_theta"], head_dim)
    return {"rope_freqs.weight": divisors.astype(np.float32)}


def _window(row: Family, c, notes: list[str]) -> dict[str, Any]:
    window = getattr(c, "sliding_window", None)
    types = getattr(c, "layer_types", None)
    on = [t == "sliding_attention" for t in types] if types else [True] * c.num_hidden_layers
    if not window or not any(on) or getattr(c, "use_sliding_window", True) is False:
        return {}
    if row.window is None:
        if window < c.max_position_embeddings:
            notes.append(
                f"llama.cpp's {row.arch} has no sliding window: texts of more than {window} tokens are "
                "attended to in full"
            )
        return {}
    usual = [(i + 1) % row.window != 0 for i in range(len(on))]
    return {
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": None if on == usual else on,
    }


# --- tensors


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the file: of one of the checkpoint's, or stacked from several (experts)."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    parts: tuple[tuple[str, Function], ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({"F32": np.float32, "F16": np.float16}.get(self.kind.name, np.uint8))

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        from gguf import quant_shape_to_byte_shape

        return self.shape if self.dtype != np.uint8 else quant_shape_to_byte_shape(self.shape, self.kind)

    @property
    def size(self) -> int:
        return math.prod(self.bytes_shape) * self.dtype.itemsize

    def make(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        done = [self._encode(name, fn(np.asarray(read(name), np.float32))) for name, fn in self.parts]
        return (np.stack(done) if len(done) > 1 else done[0]).reshape(self.bytes_shape)

    def _encode(self, name: str, x: np.ndarray) -> np.ndarray:
        from gguf import quantize

        x = np.ascontiguousarray(x)
        if not np.isfinite(x).all():
            raise UserError(f"{name}: not finite")
        if self.dtype == np.uint8:
            return quantize(x, self.kind)
        with np.errstate(over="ignore"):
            out = x.astype(self.dtype)
        if not np.isfinite(out).all():
            raise UserError(f"{name}: not finite as F16, whose largest value is 65504: BF16 holds it")
        return out


def _arch(row: Family):
    from gguf import MODEL_ARCH_NAMES

    return next(k for k, v in MODEL_ARCH_NAMES.items() if v == row.arch)


def plan_tensors(row: Family, c, shapes, quantise: str, notes: list[str]) -> list[Tensor]:
    """What the file holds. UserError for a name that llama.cpp has no place for."""
    from gguf import get_tensor_name_map

    table = get_tensor_name_map(_arch(row), c.num_hidden_layers)
    experts: dict[str, dict[int, tuple[str, tuple[int, ...]]]] = {}
    found: dict[str, tuple[tuple[int, ...], list[tuple[str, Function]]]] = {}
    left_out = 0

    def place(source: str, name: str) -> str:
        ours = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise UserError(f"{source}: llama.cpp's {row.arch} has no such tensor")
        return ours

    for source, shape in shapes.items():
        name = source.replace("language_model.", "")
        if any(m in name for m in OTHER_MODALITIES):
            left_out += 1
        elif name.endswith(NOT_WEIGHTS):
            continue
        elif c.tie_word_embeddings and name in ("lm_head.weight", "embed_out.weight"):
            continue
        elif layer_of(name) is not None and layer_of(name) >= c.num_hidden_layers:
            left_out += 1  # heads that predict several tokens (DeepSeek-V3) follow the last layer
        elif one := EXPERT.fullmatch(name):
            stacked = f"{one[1]}.mlp.experts.{EXPERT_NAMES.get(one[3], one[3])}.weight"
            experts.setdefault(place(source, stacked), {})[int(one[2])] = (source, tuple(shape))
        else:
            for new, new_shape, fn in _pieces(row, c, name, tuple(shape)):
                found[place(source, new)] = (new_shape, [(source, fn)])
    for ours, members in experts.items():
        sources = [members[i] for i in sorted(members)]
        if sorted(members) != list(range(len(members))) or len({shape for _, shape in sources}) > 1:
            raise UserError(f"{ours}: experts missing, or of several shapes: {sorted(members)}")
        found[ours] = ((len(members), *sources[0][1]), [(source, _same) for source, _ in sources])
    if left_out:
        notes.append(f"{left_out} tensors left out: a GGUF file holds the text model and its own layers only")
    return [
        Tensor(name, shape, _kind(name, shape, quantise), tuple(parts))
        for name, (shape, parts) in found.items()
    ]


def layer_of(name: str) -> int | None:
    found = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    return int(found[1]) if found else None


def _pieces(row: Family, c, name: str, shape: tuple[int, ...]) -> list[Piece]:
    if (pieces := row.pieces(name, shape, c)) is not None:
        return pieces
    if row.interleave and (found := re.search(r"\.([qk])_proj\.(weight|bias)$", name)):
        heads = c.num_attention_heads if found[1] == "q" else c.num_key_value_heads
        return _same_size(functools.partial(interleaved, heads=heads), name, shape)
    if row.one_less and name.endswith("norm.weight"):
        return _same_size(lambda x: x + np.float32(1), name, shape)
    return [(name, shape, _same)]


def _kind(name: str, shape: tuple[int, ...], quantise: str):
    from gguf import GGMLQuantizationType as Kind

    if len(shape) < 2 or SMALL.search(name):
        return Kind.F32
    return Kind.F16 if quantise == "Q8_0" and shape[-1] % 32 else Kind[quantise]  # a block is 32 of a row


# --- the tokenizer


def tokenizer_facts(
    folder: Path, rows: int, chat_template: str | None, stop_ids: Sequence[int] | None, notes: list[str]
) -> dict[str, Any]:
    """The keys under "tokenizer." for an embedding of `rows` rows, from the folder's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: no tokenizer.json, which the GGUF's vocabulary is made from")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE":
        raise UserError(f"{folder}: a tokenizer of type {raw['model']['type']}: only BPE is written to GGUF")
    spaces = _sentencepiece_prefix(raw, folder)
    facts: dict[str, Any] = (
        {"ggml.model": "gpt2", "ggml.pre": pre_tokenizer_name(raw, folder)}
        if spaces is None
        else {"ggml.model": "llama", "ggml.add_space_prefix": spaces}
    )
    tokens, types = _tokens(raw, rows, spaces is not None, folder, notes)
    facts |= {"ggml.tokens": tokens, "ggml.token_type": types}
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    if spaces is None:
        facts["ggml.merges"] = merges
    else:
        facts["ggml.scores"] = scores(raw["model"]["merges"], tokens, types)

    eos = tokenizer.eos_token_id
    ends = list(dict.fromkeys(stop_ids if stop_ids else () if eos is None else (eos,)))
    if len(ends) > 3:
        notes.append(f"a GGUF file names three tokens that end an answer: {ends[3:]} are left out")
    ids = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    ids |= {
        "bos": tokenizer.bos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    facts |= {f"ggml.{k}_token_id": int(i) for k, i in ids.items() if i is not None and i < rows}

    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    before, after = full[:at], full[at + len(plain) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], ends[:1]):
        notes.append(
            f"the tokenizer frames a text by {before} and {after}: llama.cpp adds at most bos and eos"
        )
    facts["ggml.add_bos_token"] = before == [tokenizer.bos_token_id]
    facts["ggml.add_eos_token"] = bool(after) and after == ends[:1]
    template = tokenizer.chat_template if chat_template is None else chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        facts["chat_template"] = template
    return facts


def _tokens(raw, rows: int, spaces: bool, folder: Path, notes: list[str]) -> tuple[list[str], list[int]]:
    """(tokens, their types) of all rows; a row without a token is "[PAD…]", unused."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [reader.UNUSED] * rows
    for token, i in raw["model"]["vocab"].items():
        if i >= rows:
            raise UserError(f"{folder}: token {token!r} has id {i}, the embedding {rows} rows")
        tokens[i], types[i] = token, reader.NORMAL
        if spaces and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = reader.BYTE
    beyond = []
    for added in raw["added_tokens"]:
        i, token = added["id"], added["content"]
        if i >= rows:
            beyond.append(token)
            continue
        # llama.cpp cuts added tokens out of the text as it was given, before spaces become "▁"
        tokens[i] = token.replace("▁", " ") if spaces and not added["special"] else token
        types[i] = reader.CONTROL if added["special"] else reader.USER_DEFINED
        if spaces and token == raw["model"].get("unk_token"):
            types[i] = reader.UNKNOWN
    if beyond:
        notes.append(f"tokens that the embedding has no row for are left out: {', '.join(beyond[:5])}")
    return tokens, types


def scores(merges: Sequence[Any], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """SentencePiece's scores of a tokenizer that has merges: minus the rank of the first merge that makes it.

    SentencePiece joins the pair whose join has the best score, BPE the pair of the lowest rank: the same.
    """
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), i)
    last = float(len(merges))  # what no merge makes comes after all that one does
    plain = (reader.NORMAL, reader.BYTE, reader.UNKNOWN)
    return [
        -float(rank.get(token, last)) if kind in plain else -1e6
        for token, kind in zip(tokens, types, strict=True)
    ]


def _steps(part: dict | None) -> list[dict]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [s for p in part.get("normalizers") or part.get("pretokenizers") or [] for s in _steps(p)]


def _sentencepiece_prefix(raw: dict, folder: Path) -> bool | None:
    """Whether a text begins with an added space; None for a byte-level tokenizer."""
    pre, normal = _steps(raw["pre_tokenizer"]), _steps(raw["normalizer"])
    if any(s["type"] == "ByteLevel" for s in pre):
        return None
    if not raw["model"].get("byte_fallback"):
        raise UserError(f"{folder}: neither a byte-level BPE tokenizer nor SentencePiece's with bytes")
    meta = next((s for s in pre if s["type"] == "Metaspace"), None)
    escaped = meta or any(s["type"] == "Replace" and s["content"] == "▁" for s in normal)
    if not escaped or any(s["type"] not in ("Prepend", "Replace") for s in normal):
        raise UserError(
            f"{folder}: a tokenizer whose normalizer is {[s['type'] for s in normal]}: llama.cpp writes "
            "spaces as ▁ and changes nothing else"
        )
    if meta:
        return meta.get("prepend_scheme", "always") != "never"
    return any(s["type"] == "Prepend" for s in normal)


def pre_tokenizer_name(raw: dict, folder: Path) -> str:
    """tokenizer.ggml.pre: the entry of PRE_TOKENIZERS that cuts text as this tokenizer.json does.

    Raises UserError where none does: another name would cut texts otherwise than in training.
    """
    split, digits, end = None, False, None
    steps = _steps(raw["pre_tokenizer"])
    for step in steps:
        kind = step["type"]
        if kind == "Digits" and step["individual_digits"] and end is None and split is None:
            digits = True
        elif kind == "Split" and split is None and end is None and _cuts(step):
            split = step["pattern"].get("Regex")
        elif kind == "ByteLevel" and end is None and not step["add_prefix_space"]:
            end = step
        else:
            end = None
            break
    normal = [s["type"] for s in _steps(raw["normalizer"])]
    if end is not None and (split is None) == end.get("use_regex", True) and normal in ([], ["NFC"]):
        want = reader.PreTokenizer(split, digits, bool(normal), bool(raw["model"].get("ignore_merges")))
        # llama.cpp normalises nothing, so NFC tells none of its kinds apart; and where vocabularies were made
        # from ranked tokens (tiktoken's way), merges reach each of them, so taking them whole changes nothing
        for loose in ({}, {"nfc": False}, {"nfc": False, "ignore_merges": False}):
            for name, known in reader.PRE_TOKENIZERS.items():
                ranked = name in ("tekken", "gpt-4o")
                if "ignore_merges" in loose and not ranked:
                    continue
                if dataclasses.replace(known, **loose) == dataclasses.replace(want, **loose):
                    return name
    raise UserError(
        f"{folder}: llama.cpp has no name for this tokenizer's way to cut texts "
        f"({', '.join(s['type'] for s in steps) or 'none'}, normalizer {normal or 'none'}, "
        f"pattern {split!r}); "
        f"known: {', '.join(reader.PRE_TOKENIZERS)}"
    )


def _cuts(step: dict) -> bool:
    """Whether a Split keeps all text: its matches are the pieces."""
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))


# --- Ollama


def modelfile(
    gguf_name: str,
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    stop: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> str:
    """An Ollama Modelfile (https://docs.ollama.com/modelfile) for a GGUF file beside it.

    Ollama's templates are Go's, not Jinja. Where the model's template only frames each message by its role,
    which is found by rendering (`tokenizer` is transformers'), TEMPLATE says the same in Go. Where it does
    more, there is no TEMPLATE: Ollama then goes by the one in the GGUF file, of which it knows the common
    ones. `stop` are texts that end an answer, `parameters` other PARAMETER lines.
    """
    lines = [f"FROM ./{gguf_name}"]
    found = go_template(tokenizer, chat_template)
    if found is None:
        lines.append(
            "# The chat template does more than frame messages, so it is not repeated here: Ollama uses the "
            "GGUF's,\n# if it is one that it knows (`ollama show --template` says which it took)."
        )
    else:
        template, default_system = found
        system = default_system if system is None else system
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(s, ensure_ascii=False)}" for s in dict.fromkeys(stop)]
    lines += [f"PARAMETER {key} {value}" for key, value in (parameters or {}).items()]
    return "\n".join(lines) + "\n"


def go_template(tokenizer, chat_template: str | None = None) -> tuple[str, str | None] | None:
    """(Go template, the system text that the template adds when there is none) or None where the Jinja
    template is not a frame around each message, decided by rendering conversations."""

    bos = tokenizer.bos_token_id  # where a tokenizer adds it, so does Ollama, before what the template gives
    adds_bos = bos is not None and tokenizer.encode("a")[0] == bos

    def render(messages, prompt=False) -> str:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
        )
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    def message(role, content):
        return {"role": role, "content": content}

    def frame(text: str, content: str) -> tuple[str, str] | None:
        parts = text.split(content)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    talk = [
        message(*m)
        for m in (("user", "Uno!"), ("assistant", "Aye!"), ("user", "Due!"), ("assistant", "Bee!"))
    ]
    try:
        told = render([message("system", "Sys!"), *talk])
        cut = [told.index(m["content"]) for m in talk]
        # between contents lie the close of one role and the open of the next
        u_a = told[cut[0] + 4 : cut[1]]
        a_u = told[cut[1] + 4 : cut[2]]
        close = told[cut[3] + 4 :]
        if told[cut[2] + 4 : cut[3]] != u_a or not a_u.startswith(close):
            return None
        open_user = a_u[len(close) :]
        prompt = render([message("system", "Sys!"), *talk[:3]], True)[cut[2] + 4 :]
        only_user = render([message("system", "Sys!"), talk[0]])
        close_user = only_user[cut[0] + 4 :]
        if not u_a.startswith(close_user):
            return None
        open_assistant = u_a[len(close_user) :]
        first = frame(told[: cut[0]], "Sys!")
        if first is None or not first[1].endswith(open_user):
            return None
        open_system, close_system = first[0], first[1].removesuffix(open_user)
        bare = render(talk[:1], True)
        default = None
        if not bare.startswith(open_user + "Uno!"):
            head = bare[: bare.index(open_user + "Uno!")]
            if not (head.startswith(open_system) and head.endswith(close_system)):
                return None
            default = head[len(open_system) : len(head) - len(close_system)]
    except Exception:  # a template may refuse a conversation
        return None
    start = prompt.removeprefix(close_user)
    frames = {
        "system": (open_system, close_system),
        "user": (open_user, close_user),
        "assistant": (open_assistant, close),
    }

    def rebuilt(messages) -> str:
        return "".join(frames[m["role"]][0] + m["content"] + frames[m["role"]][1] for m in messages)

    check = [message("system", "Be  terse."), message("user", "Q?"), message("assistant", "A.")]
    check.append(message("user", "And?"))
    if not prompt.startswith(close_user) or rebuilt(check) + start != render(check, True):
        return None
    if any("{{" in t or '"""' in t for pair in frames.values() for t in pair) or "{{" in start:
        return None
    branches = ""
    for i, (role, (before, after)) in enumerate(frames.items()):
        test = "if" if i == 0 else "else if"
        branches += f'{{{{ {test} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
    return "{{ range .Messages }}" + branches + "{{ end }}{{ end }}" + start, default
