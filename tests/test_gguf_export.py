"""GGUF files as export writes them: read by transformers, by our own reader and computed by llama.cpp,
where that is installed."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize

from ftjax import gguf, gguf_export
from ftjax.errors import UserError
from ftjax.gguf_export import export_gguf

torch = pytest.importorskip("torch", reason="the checkpoints are made by torch models")
transformers = pytest.importorskip("transformers")

ASSETS = Path(os.environ.get("FTJAX_TEST_ASSETS", "no assets"))
TOKENIZER = Path(__file__).parent / "assets" / "tiny_tokenizer"
V, D, F, L, N, K, H, T = 416, 64, 96, 4, 4, 2, 16, 24
BASE = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=N,
    num_key_value_heads=K,
    max_position_embeddings=128,
    rope_theta=12345.0,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0)
LONG = dict(
    rope_type="longrope",
    short_factor=[1.0 + 0.1 * i for i in range(H // 2)],
    long_factor=[1.5 + 0.3 * i for i in range(H // 2)],
)
MOE = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[]
)
MLA = dict(
    num_key_value_heads=N,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
    attention_bias=False,
)
MHA = dict(num_key_value_heads=N)
GRANITE = dict(
    attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0
)
GPT2 = dict(n_embd=D, n_layer=L, n_head=N, n_positions=128, vocab_size=V, bos_token_id=0, eos_token_id=2)
CASES: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", rms_norm_eps=3e-5),
    "llama-tied-bias-rope3": dict(
        model_type="llama", tie_word_embeddings=True, attention_bias=True, rope_scaling=LLAMA3, head_dim=24
    ),
    "llama-linear": dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=3.0)),
    "llama-yarn": dict(model_type="llama", rope_scaling=YARN),
    "llama-yarn-factor": dict(model_type="llama", rope_scaling=YARN | dict(attention_factor=1.5)),
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=H),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2_moe": dict(
        model_type="qwen2_moe", shared_expert_intermediate_size=64, norm_topk_prob=False, **MOE
    ),
    "qwen3": dict(model_type="qwen3", head_dim=24),
    "qwen3_moe": dict(model_type="qwen3_moe", head_dim=H, norm_topk_prob=True, **MOE),
    "gemma": dict(model_type="gemma", head_dim=H, tie_word_embeddings=True),
    "gemma2": dict(
        model_type="gemma2", head_dim=H, tie_word_embeddings=True, query_pre_attn_scalar=H, sliding_window=8,
        final_logit_softcapping=5.0, attn_logit_softcapping=3.0,
    ),
    "gemma3": dict(
        model_type="gemma3_text", head_dim=H, tie_word_embeddings=True, query_pre_attn_scalar=H,
        sliding_window=8, num_hidden_layers=7,
    ),
    "gemma3-pattern": dict(
        model_type="gemma3_text", head_dim=H, tie_word_embeddings=True, query_pre_attn_scalar=H,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
    ),
    "phi3": dict(model_type="phi3", sliding_window=None),
    "phi3-longrope": dict(
        model_type="phi3", sliding_window=None, rope_scaling=LONG, original_max_position_embeddings=256,
        max_position_embeddings=512,  # llama.cpp's smallest context is 256
    ),
    "olmo": dict(model_type="olmo", clip_qkv=0.5),
    "olmo2": dict(model_type="olmo2"),
    "olmo3": dict(
        model_type="olmo3", sliding_window=8,
        rope_parameters=dict(
            full_attention=YARN | dict(rope_theta=12345.0),
            sliding_attention=dict(rope_type="default", rope_theta=12345.0),
        ),
    ),
    "olmoe": dict(model_type="olmoe", num_experts=4, num_experts_per_tok=2, norm_topk_prob=False,
                  num_key_value_heads=N),
    "granite": dict(model_type="granite", **GRANITE),
    "smollm3": dict(model_type="smollm3", sliding_window=None, use_sliding_window=False),
    "starcoder2": dict(model_type="starcoder2", sliding_window=None, use_bias=True),
    "cohere": dict(model_type="cohere", logit_scale=0.5, tie_word_embeddings=True),
    "cohere2": dict(model_type="cohere2", logit_scale=0.5, tie_word_embeddings=True, sliding_window=8),
    "gpt2": dict(model_type="gpt2", **GPT2),
    "gpt_neox": dict(model_type="gpt_neox", rotary_pct=0.5, use_parallel_residual=True, **MHA),
    "gpt_neox-serial": dict(model_type="gpt_neox", rotary_pct=0.5, use_parallel_residual=False, **MHA),
    "glm4": dict(model_type="glm4", head_dim=H, partial_rotary_factor=0.5),
    "nemotron": dict(model_type="nemotron", partial_rotary_factor=0.5),
    "exaone4": dict(
        model_type="exaone4", sliding_window=None, layer_types=["full_attention"] * L, rope_scaling=LLAMA3
    ),
    "gpt_oss": dict(
        model_type="gpt_oss", head_dim=H, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        intermediate_size=64, rope_scaling=YARN,
    ),
    "deepseek_v2": dict(model_type="deepseek_v2", topk_method="greedy", **MLA),
    "deepseek_v3-yarn": dict(
        model_type="deepseek_v3", n_group=2, topk_group=1, norm_topk_prob=True,
        rope_scaling=YARN | dict(mscale=0.8, mscale_all_dim=0.8), **MLA,
    ),
    "deepseek_v3": dict(model_type="deepseek_v3", n_group=2, topk_group=1, norm_topk_prob=True, **MLA),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    folder: Path
    config: dict
    tensors: dict[str, np.ndarray]
    logits: np.ndarray  # transformers', of TOKENS

    def export(self, path: Path, **options):
        shapes = {name: x.shape for name, x in self.tensors.items()}
        return export_gguf(path, self.config, shapes, self.tensors.__getitem__, TOKENIZER, **options)


TOKENS = np.random.default_rng(0).integers(3, V, T)


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)[None]).logits[0].float().numpy()


@functools.cache
def make_case(name: str, root: Path) -> Case:
    from safetensors.numpy import load_file

    torch.manual_seed(1)
    facts = (BASE if name != "gpt2" else {}) | CASES[name]
    config = transformers.AutoConfig.for_model(**facts)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for key, p in model.named_parameters():  # norms of ones and biases of zeros would hide mistakes
            if "norm" in key or "ln_" in key:
                p.copy_(p + 0.3 * torch.randn_like(p))
            elif "bias" in key or "sinks" in key:
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_(0.15 * torch.randn_like(p))
        for key, p in model.named_buffers():
            if "e_score_correction" in key:
                p.copy_(0.1 * torch.randn_like(p))
    folder = root / f"gguf-{name}"
    model.save_pretrained(folder)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return Case(folder, json.loads((folder / "config.json").read_text()), tensors, logits_of(model))


@pytest.fixture(params=CASES)
def case(request, tmp_path_factory) -> Case:
    return make_case(request.param, tmp_path_factory.getbasetemp())


def error(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def llama_cpp_logits(path: Path) -> np.ndarray:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    f32 = dict(type_k=0, type_v=0)  # of cached keys and values
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, **f32)
    model.eval(TOKENS.tolist())
    return np.array(model.scores[:T])


def test_llama_cpp_computes_the_same(case, tmp_path):
    case.export(tmp_path / "m.gguf", quantise="F32")
    ours = llama_cpp_logits(tmp_path / "m.gguf")
    gelu = case.config["model_type"].startswith(("gemma", "starcoder2", "gpt2", "gpt_neox"))
    # llama.cpp looks GELU up in a table of F16 values (2^-11 each); all else is float32
    assert error(ours, case.logits) < (2e-3 if gelu else 1e-5)


# --- read without llama.cpp

READABLE = (  # by transformers' reader of GGUF files
    "llama", "llama-linear", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "gpt2",
    "starcoder2", "nemotron", "gemma2", "gemma3",
)  # fmt: skip
NAMES = {  # after "blk.N."; the checkpoint's after its layer
    "attn_norm": ("input_layernorm", "ln_1"), "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",), "attn_v": ("self_attn.v_proj",),
    "attn_output": ("self_attn.o_proj", "attn.c_proj", "attention.dense"),
    "attn_q_norm": ("self_attn.q_norm",), "attn_k_norm": ("self_attn.k_norm",),
    "attn_qkv": ("self_attn.qkv_proj", "attn.c_attn", "attention.query_key_value"),
    "attn_sinks": ("self_attn.sinks",),
    "attn_q_a": ("self_attn.q_a_proj",), "attn_q_a_norm": ("self_attn.q_a_layernorm",),
    "attn_q_b": ("self_attn.q_b_proj",), "attn_kv_a_mqa": ("self_attn.kv_a_proj_with_mqa",),
    "attn_kv_a_norm": ("self_attn.kv_a_layernorm",),
    "ffn_norm": ("post_attention_layernorm", "ln_2"),
    "post_attention_norm": ("post_self_attn_layernorm",), "post_ffw_norm": ("post_mlp_layernorm",),
    "ffn_gate": ("mlp.gate_proj",), "ffn_down": ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h"),
    "ffn_up": ("mlp.up_proj", "mlp.c_fc", "mlp.gate_up_proj", "mlp.dense_h_to_4h"),
    "ffn_gate_inp": ("mlp.gate", "block_sparse_moe.gate", "mlp.router"),
    "ffn_gate_inp_shexp": ("mlp.shared_expert_gate",),
    "exp_probs_b": ("mlp.gate.e_score_correction",),
} | {
    f"ffn_{part}_shexp": (f"mlp.shared_expert.{part}_proj", f"mlp.shared_experts.{part}_proj")
    for part in ("gate", "up", "down")
}  # fmt: skip
OUTER = {
    "token_embd": ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in"),
    "position_embd": ("transformer.wpe",),
    "output_norm": ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"),
    "output": ("lm_head", "embed_out"),
}
# Where a sublayer's norm comes after it, the same names mean other places.
AFTER = {
    "post_attention_norm": ("post_attention_layernorm",),
    "post_ffw_norm": ("post_feedforward_layernorm",),
}
BEFORE = {"ffn_norm": ("pre_feedforward_layernorm",)}


def places(kind: str) -> dict[str, str]:
    """Checkpoint's name -> the file's."""
    table = dict(NAMES)
    if kind in ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"):
        table |= AFTER | BEFORE
    elif kind == "gpt_oss":
        table |= {"post_attention_norm": ("post_attention_layernorm",), "ffn_norm": ()}
    return {name: ours for ours, names in table.items() for name in names}


def in_file(case: Case) -> dict[str, np.ndarray]:
    """What the file should hold, each tensor by a formula of its own."""
    c = case.config
    kind = c["model_type"]
    where, outer = places(kind), {name: ours for ours, names in OUTER.items() for name in names}
    out: dict[str, np.ndarray] = {}
    experts: dict[str, list] = {}
    heads = {"q": c.get("num_attention_heads", N), "k": c.get("num_key_value_heads", N)}
    for name, x in case.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem in outer:
            if not (c.get("tie_word_embeddings") and stem == "lm_head"):
                less = name == "model.norm.weight" and is_less_one(kind)
                out[f"{outer[stem]}.{suffix}"] = x + 1 if less else x
            continue
        layer, _, rest = name.split(".", 2)[2].partition(".")
        if ".experts." in name and kind != "gpt_oss":
            part = {"w1": "gate", "w2": "down", "w3": "up"}.get(rest.split(".")[3], rest.split(".")[3][:-5])
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).append((int(rest.split(".")[2]), x))
        elif ".experts." in name:
            part, bias = rest.split(".")[2].removesuffix("_bias"), rest.endswith("_bias")
            suffix = "bias" if bias else "weight"
            for i, which in enumerate(("down",) if part == "down_proj" else ("gate", "up")):
                y = x if part == "down_proj" else x[..., [*range(i, x.shape[-1], 2)]]
                out[f"blk.{layer}.ffn_{which}_exps.{suffix}"] = y if bias else np.einsum("eio->eoi", y)
        elif rest == "self_attn.kv_b_proj.weight":
            rows = [x[h * 28 : (h + 1) * 28] for h in range(N)]  # 16 of k without rotation, 12 of v
            out[f"blk.{layer}.attn_k_b.weight"] = np.array([r[:16].T for r in rows])
            out[f"blk.{layer}.attn_v_b.weight"] = np.array([r[16:] for r in rows])
        else:
            stem, _, suffix = rest.replace("_correction_bias", "_correction.bias").rpartition(".")
            if rest == "self_attn.sinks":
                stem, suffix = rest, "weight"
            if stem in ("self_attn.q_proj", "self_attn.k_proj") and kind in NEIGHBOURS:
                half = x.shape[0] // heads[stem[10]] // 2
                order = [
                    h * 2 * half + i + j * half
                    for h in range(heads[stem[10]])
                    for i in range(half)
                    for j in (0, 1)
                ]
                x = x[order]
            elif "norm" in stem and suffix == "weight" and is_less_one(kind):
                x = x + 1
            elif kind == "gpt2" and x.ndim == 2:
                x = x.T
            elif "query_key_value" in stem:
                each = D // N
                x = x[[h * 3 * each + p * each + i for p in range(3) for h in range(N) for i in range(each)]]
            elif stem == "mlp.shared_expert_gate":
                x = x.reshape(-1)
            out[f"blk.{layer}.{where[stem]}.{suffix}"] = x
    return out | {
        name: np.array([x for _, x in sorted(parts, key=lambda p: p[0])]) for name, parts in experts.items()
    }


NEIGHBOURS = ("llama", "mistral", "mixtral", "olmo", "granite", "smollm3")


def is_less_one(kind: str) -> bool:
    return kind in ("gemma", "gemma2", "gemma3_text", "nemotron")


def read_back(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    return {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type)) for t in GGUFReader(path).tensors}


def test_every_tensor_is_where_it_belongs(case, tmp_path):
    done = case.export(tmp_path / "m.gguf", quantise="F32")
    found, wanted = read_back(tmp_path / "m.gguf"), in_file(case)
    extra = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    assert set(found) - extra == set(wanted) and done.tensors == len(found)
    for name, x in wanted.items():
        assert found[name][0] == "F32"
        np.testing.assert_array_equal(found[name][1].reshape(x.shape), x, err_msg=name)


# Error of a rounded weight, root mean square relative to the weights': F16 keeps 11 bits, BF16 8; Q8_0 has
# 127 steps up to the largest of 32, 2.1 standard deviations off: 2.1 / 127 / sqrt(12).
ROUNDING = {"F32": 1e-6, "F16": 2**-11 / 3**0.5, "BF16": 2**-8 / 3**0.5, "Q8_0": 0.0048}
# Of the logits: 7 matrices in each of 4 layers add theirs up, as independent errors: sqrt(28), and norms and
# products of two rounded factors may double that.
GROWTH = 10


def spread(ours, theirs) -> float:
    return float(np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()))


@pytest.mark.parametrize(  # a rounded router may choose other experts, which is no small error
    "name, quantise", [(n, q) for n in READABLE for q in ROUNDING if q == "F32" or "moe" not in n]
)
def test_transformers_reads_it(name, quantise, tmp_path_factory, tmp_path):
    case = make_case(name, tmp_path_factory.getbasetemp())
    case.export(tmp_path / "m.gguf", quantise=quantise)
    config = transformers.AutoConfig.from_pretrained(
        case.folder
    )  # its reader takes a part of the file's only
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=config, attn_implementation="eager", dtype=torch.float32
    )
    assert spread(logits_of(model.eval()), case.logits) < GROWTH * ROUNDING[quantise]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_transformers_reads_the_config(name, tmp_path_factory, tmp_path):
    case = make_case(name, tmp_path_factory.getbasetemp())
    case.export(tmp_path / "m.gguf")
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    for field in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    ):  # fmt: skip
        if field in case.config:
            assert getattr(config, field) == pytest.approx(case.config[field]), field
    assert config.rope_parameters["rope_theta"] == 12345.0


@pytest.mark.parametrize("quantise", ROUNDING)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_llama_cpp_computes_what_is_rounded(name, quantise, tmp_path_factory, tmp_path):
    case = make_case(name, tmp_path_factory.getbasetemp())
    case.export(tmp_path / "m.gguf", quantise=quantise)
    # llama.cpp rounds what it multiplies the weights by in the same way: two errors, and GELU's
    allowed = GROWTH * max(2 * ROUNDING[quantise], ROUNDING["F16"])
    assert spread(llama_cpp_logits(tmp_path / "m.gguf"), case.logits) < allowed


def test_types(tmp_path_factory, tmp_path):
    """Matrices in the type asked for, the rest in F32; a row that is not of whole blocks in F16."""
    case = make_case("qwen2_moe", tmp_path_factory.getbasetemp())
    wanted = in_file(case)
    for quantise in gguf_export.TYPES:
        case.export(tmp_path / "m.gguf", quantise=quantise)
        for name, (kind, x) in read_back(tmp_path / "m.gguf").items():
            small = x.ndim == 1 or "norm" in name or "gate_inp" in name
            assert kind == ("F32" if small else quantise), name
            type_ = GGMLQuantizationType[kind]
            rounded = dequantize(quantize(np.ascontiguousarray(wanted[name]), type_), type_)
            np.testing.assert_array_equal(x.reshape(rounded.shape), rounded, err_msg=name)
    odd = make_case("llama-tied-bias-rope3", tmp_path_factory.getbasetemp())  # 4 heads of 24
    tensors = {k: v[..., :40] if "down_proj" in k else v for k, v in odd.tensors.items()}
    dataclasses.replace(odd, tensors=tensors).export(tmp_path / "o.gguf", quantise="Q8_0")
    kinds = {name: kind for name, (kind, _) in read_back(tmp_path / "o.gguf").items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_bfloat16_is_kept(tmp_path_factory, tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    case = make_case("qwen3", tmp_path_factory.getbasetemp())
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in case.tensors.items()}
    case = dataclasses.replace(case, tensors=tensors)
    case.export(tmp_path / "m.gguf", quantise="BF16")
    found = read_back(tmp_path / "m.gguf")
    for name, x in in_file(case).items():
        np.testing.assert_array_equal(found[name][1], x.astype(np.float32), err_msg=name)


def test_the_text_part_of_gemma3(tmp_path_factory, tmp_path):
    case = make_case("gemma3", tmp_path_factory.getbasetemp())
    case.export(tmp_path / "text.gguf", quantise="F32")
    names = {name: name.replace("model.", "model.language_model.", 1) for name in case.tensors}
    tensors = {names[name]: x for name, x in case.tensors.items()}
    tensors["model.vision_tower.a.weight"] = tensors["model.multi_modal_projector.b"] = np.zeros((2, 2))
    config = {"model_type": "gemma3", "text_config": case.config}
    done = dataclasses.replace(case, config=config, tensors=tensors).export(
        tmp_path / "m.gguf", quantise="F32"
    )
    assert done.notes == ["2 tensors left out: a GGUF file holds the text model and its own layers only"]
    found, wanted = read_back(tmp_path / "m.gguf"), read_back(tmp_path / "text.gguf")
    assert set(found) == set(wanted)
    for name, (_, x) in wanted.items():
        np.testing.assert_array_equal(found[name][1], x)
    fields = [GGUFReader(tmp_path / f).fields for f in ("m.gguf", "text.gguf")]
    told = [{k: f.contents() for k, f in part.items() if k.startswith("gemma3.")} for part in fields]
    assert told[0] == told[1]


def test_one_tensor_at_a_time(tmp_path_factory, tmp_path):
    """Nothing is read before it is written, and an error leaves no file."""
    case = make_case("qwen3_moe", tmp_path_factory.getbasetemp())
    order, shapes = [], {name: x.shape for name, x in case.tensors.items()}

    def read(name):
        order.append(name)
        if len(order) > 5:
            raise OSError("disk")
        return case.tensors[name]

    with pytest.raises(OSError, match="disk"):
        export_gguf(tmp_path / "m.gguf", case.config, shapes, read, TOKENIZER)
    assert len(order) == 6 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias-rope3", "qwen2", "qwen3"])
def test_our_reader_reads_it(name, tmp_path_factory, tmp_path):
    case = make_case(name, tmp_path_factory.getbasetemp())
    config = case.config
    if "rope3" in name:  # the reader knows Llama 3's own context only
        config = config | {
            "rope_parameters": config["rope_parameters"] | dict(original_max_position_embeddings=8192)
        }
    dataclasses.replace(case, config=config).export(tmp_path / "m.gguf", quantise="F32", stop_ids=[2, 0])
    source = gguf.GgufFile(tmp_path / "m.gguf", "m")
    for field in ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert source.config[field] == config[field], field
    assert source.config["rope_theta"] == 12345.0 and source.generation_config["eos_token_id"] == [2, 0]
    assert set(source.names()) == {
        n for n in case.tensors if n != "lm_head.weight" or not config["tie_word_embeddings"]
    }
    for key in source.names():
        np.testing.assert_array_equal(source.get(key), case.tensors[key], err_msg=key)
    theirs = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    assert source.tokenizer().encode(TEXT) == theirs.encode(TEXT)
    assert source.tokenizer().chat_template == theirs.chat_template


# --- tokenizers

TEXT = (
    "Hello  wörld, don't 12345!\n\n\tx = 3.14 // 漢字 😀😀 <|im_start|>user\nI'LL hé<|im_end|> \u00a0 end "
    "camelCase  "
)


def write_vocabulary(path: Path, folder: Path, rows: int) -> None:
    config = dict(
        BASE, model_type="qwen2", vocab_size=rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1
    )
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    tensors = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    shapes = {name: x.shape for name, x in tensors.items()}
    export_gguf(path, config, shapes, tensors.__getitem__, folder)


@pytest.mark.parametrize(
    "name, pre, rows",
    [
        ("llama3_1", "llama-bpe", 128256),
        ("qwen3", "qwen2", 151936),
        ("gemma3", None, 262144),
        ("mistral_v3", None, 32768),
    ],
)
def test_real_tokenizers(name, pre, rows, tmp_path):
    folder = ASSETS / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("FTJAX_TEST_ASSETS has no tokenizers")
    raw = json.loads((folder / "tokenizer.json").read_text())
    notes: list[str] = []
    facts = gguf_export.tokenizer_facts(folder, rows, None, None, notes)
    assert facts.get("ggml.pre") == pre
    added = {t["id"]: t["content"] for t in raw["added_tokens"]}
    for token, i in raw["model"]["vocab"].items():
        assert facts["ggml.tokens"][i].replace(" ", "▁") == added.get(i, token).replace(" ", "▁")
    if pre:
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        assert facts["ggml.merges"] == merges
    if name == "gemma3":
        assert notes == ["tokens that the embedding has no row for are left out: <image_soft_token>"]
    ours = gguf.build_tokenizer({f"tokenizer.{k}": v for k, v in facts.items()}, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, Path(gguf.__file__).read_text()[:20000], "日本語のテキスト  a"):
        assert ours.encode(text).ids == theirs.encode(text)
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    write_vocabulary(tmp_path / "v.gguf", folder, rows)
    model = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    for text in (TEXT, Path(gguf.__file__).read_text()[:20000], "日本語のテキスト  a"):
        assert model.tokenize(text.encode(), special=True) == theirs.encode(text)


def tokenizer_json(**changes) -> dict:
    raw = json.loads((TOKENIZER / "tokenizer.json").read_text())
    return (
        raw
        | {k: v for k, v in changes.items() if k != "model"}
        | {"model": raw["model"] | changes.get("model", {})}
    )


def split(pattern):
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


def test_pre_tokenizers_are_known_by_what_they_do():
    def name(**changes):
        return gguf_export.pre_tokenizer_name(tokenizer_json(**changes), TOKENIZER)

    nfc = {"type": "NFC"}
    words = gguf.PRE_TOKENIZERS["llama-bpe"].split
    assert words is not None
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert name(pre_tokenizer=bytes_) == "gpt-2"
    assert name(pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, bytes_]}) == "smollm"
    assert name(pre_tokenizer=split(words), model={"ignore_merges": True}) == "llama-bpe"
    assert name(pre_tokenizer=split(words)) == "dbrx"
    one = split(words.replace("{1,3}", ""))
    assert name(pre_tokenizer=one, normalizer=nfc) == "qwen2" and name(pre_tokenizer=one) == "stablelm2"
    for known in ("tekken", "gpt-4o"):
        for ignore in (True, False):
            pattern = gguf.PRE_TOKENIZERS[known].split
            assert name(pre_tokenizer=split(pattern), model={"ignore_merges": ignore}) == known
    for unknown in (
        dict(pre_tokenizer=split(words + "|x")),
        dict(pre_tokenizer=bytes_, normalizer={"type": "Lowercase"}),
        dict(pre_tokenizer=bytes_ | {"add_prefix_space": True}),
        dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [bytes_, digits]}),
        dict(pre_tokenizer=one, model={"ignore_merges": True}),
    ):
        with pytest.raises(UserError, match="llama.cpp has no name for this tokenizer's way to cut texts"):
            name(**unknown)


def test_tokenizer_facts(tmp_path_factory, tmp_path):
    case = make_case("llama", tmp_path_factory.getbasetemp())
    case.export(tmp_path / "m.gguf", chat_template="{{ messages }}", stop_ids=[2, 0], name="tuned")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    told = {k: f.contents() for k, f in fields.items() if k.startswith(("tokenizer", "general"))}
    assert told["general.name"] == "tuned" and told["general.file_type"] == 1
    assert told["tokenizer.chat_template"] == "{{ messages }}"
    assert told["tokenizer.ggml.eos_token_id"] == 2 and told["tokenizer.ggml.eot_token_id"] == 0
    assert told["tokenizer.ggml.add_bos_token"] is False and told["tokenizer.ggml.model"] == "gpt2"
    assert len(told["tokenizer.ggml.tokens"]) == V
    raw = json.loads((TOKENIZER / "tokenizer.json").read_text())
    for token, i in raw["model"]["vocab"].items():
        assert told["tokenizer.ggml.tokens"][i] == token
    for added in raw["added_tokens"]:
        assert told["tokenizer.ggml.token_type"][added["id"]] == (3 if added["special"] else 4)


def test_errors(tmp_path_factory, tmp_path):
    case = make_case("llama", tmp_path_factory.getbasetemp())

    def fails(said, tensors=None, options=None, **changes):
        broken = dataclasses.replace(case, config=case.config | changes, tensors=tensors or case.tensors)
        with pytest.raises(UserError, match=said):
            broken.export(tmp_path / "m.gguf", **(options or {}))
        assert not list(tmp_path.iterdir())

    fails("model_type='bert' is not one of those that GGUF files are written for: llama, ", model_type="bert")
    fails("quantise='Q4': one of F16, BF16, F32, Q8_0", options=dict(quantise="Q4"))
    fails("hidden_act='gelu': llama.cpp's llama computes with 'silu' only", hidden_act="gelu")
    fails("'dynamic' cannot be said", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))
    fails("model.x.weight: llama.cpp's llama has no such", case.tensors | {"model.x.weight": np.zeros(3)})
    name = "model.layers.1.mlp.up_proj.weight"
    huge = case.tensors | {name: np.full_like(case.tensors[name], 1e6)}
    fails(f"{name}: not finite as F16, .* BF16 holds it", huge)
    fails(f"{name}: not finite$", case.tensors | {name: huge[name] * np.nan}, dict(quantise="Q8_0"))
    rows = case.tensors | {"model.embed_tokens.weight": np.zeros((100, D), np.float32)}
    fails("token .* the embedding 100 rows", rows)
    scalar = make_case("gemma2", tmp_path_factory.getbasetemp())
    with pytest.raises(UserError, match="query_pre_attn_scalar=100: llama.cpp computes with 16"):
        dataclasses.replace(scalar, config=scalar.config | dict(query_pre_attn_scalar=100)).export(
            tmp_path / "g"
        )
    moe = make_case("qwen3_moe", tmp_path_factory.getbasetemp())
    short = {k: v for k, v in moe.tensors.items() if ".experts.1.up" not in k}
    with pytest.raises(UserError, match="experts missing"):
        dataclasses.replace(moe, tensors=short).export(tmp_path / "g")


def test_notes(tmp_path_factory, tmp_path):
    case = make_case("mistral", tmp_path_factory.getbasetemp())
    done = dataclasses.replace(case, config=case.config | dict(sliding_window=7)).export(tmp_path / "m.gguf")
    assert done.notes == [
        "llama.cpp's llama has no sliding window: texts of more than 7 tokens are attended to in full"
    ]
    assert done.size == (tmp_path / "m.gguf").stat().st_size and case.export(tmp_path / "n.gguf").notes == []


# --- Ollama

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GO = (
    '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
    "{{ end }}{{ end }}<|im_start|>assistant\n"
)


def test_modelfile():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)

    def written(template, **options):
        return gguf_export.modelfile("m.gguf", tokenizer, chat_template=template, **options)

    assert written(
        CHATML, stop=["<|im_end|>", 'a"b'], parameters={"temperature": 0.7}, system="Be brief."
    ) == (
        f'FROM ./m.gguf\nTEMPLATE """{GO}"""\nSYSTEM """Be brief."""\nPARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "a\\"b"\nPARAMETER temperature 0.7\n'
    )
    default = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
        + CHATML
    )
    assert written(default) == f'FROM ./m.gguf\nTEMPLATE """{GO}"""\nSYSTEM """Help."""\n'
    tokenizer.bos_token = "<|im_start|>"  # which the tokenizer does not add, so it stays in the template
    assert written(CHATML) == f'FROM ./m.gguf\nTEMPLATE """{GO}"""\n'
    trims = CHATML.replace("m.content", "m.content | upper")
    merges = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}" + CHATML
    )
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    numbered = CHATML.replace("m.role", "m.role + loop.index | string")
    for more in (trims, merges, refuses, numbered, CHATML.replace("im_end", "{{")):
        out = written(more)
        assert "TEMPLATE" not in out and "# The chat template does more than frame messages" in out
