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
    "phi3": dict(model_type="phi3", sliding_window=None),
    "phi3-longrope": dict(
        model_type="phi3", sliding_window=None, rope_scaling=LONG, original_max_position_embeddings=256,
        max_position_embeddings=512,  # llama.cpp's smallest context is 256: longer than that, the long factors
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
    "gpt_neox": dict(model_type="gpt_neox", rotary_pct=0.5, use_parallel_residual=True, num_key_value_heads=N),
    "gpt_neox-serial": dict(model_type="gpt_neox", rotary_pct=0.5, use_parallel_residual=False, num_key_value_heads=N),
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
    model = llama_cpp.Llama(str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False, n_threads=1)
    model.eval(TOKENS.tolist())
    return np.array(model.scores[:T])


def test_llama_cpp_computes_the_same(case, tmp_path):
    case.export(tmp_path / "m.gguf", quantise="F32")
    ours = llama_cpp_logits(tmp_path / "m.gguf")
    # llama.cpp keeps the keys and values in F16 (11 bits), and some of its functions come from F16 tables
    assert error(ours, case.logits) < 3e-3
    assert (ours.argmax(-1) == case.logits.argmax(-1)).mean() > 0.95
