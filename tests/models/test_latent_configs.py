"""What config.json of published DeepSeek, Qwen3-Next and GLM models says is read, to the number of parameters
that each has; what would compute something else is refused; layers that only predict further tokens go
through."""

import numpy as np
import pytest
from test_parity import close, make_case

from ftjax import files, hf, hf_export, models
from ftjax.errors import UserError

pytest.importorskip("transformers")

COMMON = dict(
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=0,
    eos_token_id=1,
    hidden_act="silu",
    initializer_range=0.02,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
)


def sizes(D: int, F: int, L: int, N: int, K: int, V: int, **more):
    return more | dict(
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        vocab_size=V,
    )


YARN = dict(
    beta_fast=32,
    beta_slow=1,
    factor=40,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=4096,
    type="yarn",
)
DEEPSEEK = COMMON | dict(
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    aux_loss_alpha=0.001,
    ep_size=1,
    kv_lora_rank=512,
    moe_layer_freq=1,
    pretraining_tp=1,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-6,
    seq_aux=True,
    v_head_dim=128,
)
V3 = DEEPSEEK | dict(
    model_type="deepseek_v3",
    norm_topk_prob=True,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
)
V2 = DEEPSEEK | dict(
    model_type="deepseek_v2",
    first_k_dense_replace=1,
    max_position_embeddings=163840,
    n_shared_experts=2,
    norm_topk_prob=False,
    num_experts_per_tok=6,
    rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
    rope_theta=10000,
    scoring_func="softmax",
)
GLM = dict(head_dim=128, partial_rotary_factor=0.5, pad_token_id=151329, rope_theta=10000.0)
GLM_MOE = COMMON | dict(
    first_k_dense_replace=1,
    max_position_embeddings=131072,
    n_group=1,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_nextn_predict_layers=1,
    pad_token_id=151329,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    rope_theta=1000000,
    topk_group=1,
)
LINEAR = COMMON | dict(
    full_attention_interval=4,
    head_dim=256,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_value_head_dim=128,
    max_position_embeddings=262144,
    mlp_only_layers=[],
    moe_intermediate_size=512,
    output_router_logits=False,
    rms_norm_eps=1e-6,
    router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=512,
)
QWEN35 = LINEAR | dict(
    attn_output_gate=True,
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 10,
    mamba_ssm_dtype="float32",
    mtp_num_hidden_layers=1,
    mtp_use_dedicated_embeddings=False,
    rope_parameters=dict(
        mrope_interleaved=True,
        mrope_section=[11, 11, 10],
        partial_rotary_factor=0.25,
        rope_theta=10000000,
        rope_type="default",
    ),
)
# name -> (billions of parameters without the layers that only predict further tokens, config.json)
PUBLISHED = {
    "DeepSeek-V3": (
        671.0,
        V3
        | sizes(7168, 18432, 61, 128, 128, 129280)
        | dict(
            first_k_dense_replace=3,
            max_position_embeddings=163840,
            moe_intermediate_size=2048,
            n_group=8,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            num_nextn_predict_layers=1,
            q_lora_rank=1536,
            rope_scaling=YARN,
            rope_theta=10000,
            routed_scaling_factor=2.5,
            topk_group=4,
        ),
    ),
    "Moonlight-16B-A3B": (
        16.0,
        V3
        | sizes(2048, 11264, 27, 16, 16, 163840)
        | dict(
            first_k_dense_replace=1,
            max_position_embeddings=8192,
            moe_intermediate_size=1408,
            n_group=1,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            num_nextn_predict_layers=0,
            q_lora_rank=None,
            rope_scaling=None,
            rope_theta=50000.0,
            routed_scaling_factor=2.446,
            topk_group=1,
        ),
    ),
    "DeepSeek-V2": (
        235.7,
        V2
        | sizes(5120, 12288, 60, 128, 128, 102400)
        | dict(
            moe_intermediate_size=1536,
            n_group=8,
            n_routed_experts=160,
            q_lora_rank=1536,
            routed_scaling_factor=16.0,
            topk_group=3,
            topk_method="group_limited_greedy",
        ),
    ),
    "DeepSeek-V2-Lite": (
        15.7,
        V2
        | sizes(2048, 10944, 27, 16, 16, 102400)
        | dict(
            moe_intermediate_size=1408,
            n_group=1,
            n_routed_experts=64,
            q_lora_rank=None,
            routed_scaling_factor=1.0,
            topk_group=1,
            topk_method="greedy",
        ),
    ),
    "Qwen3-Next-80B-A3B": (
        79.7,
        LINEAR
        | sizes(2048, 5120, 48, 16, 2, 151936)
        | dict(
            model_type="qwen3_next",
            decoder_sparse_step=1,
            norm_topk_prob=True,
            num_experts=512,
            num_experts_per_tok=10,
            partial_rotary_factor=0.25,
            rope_scaling=None,
            rope_theta=10000000,
        ),
    ),
    "Qwen3.5-35B-A3B": (
        34.7,
        QWEN35
        | {k: v for k, v in sizes(2048, 0, 40, 16, 2, 248320).items() if k != "intermediate_size"}
        | dict(model_type="qwen3_5_moe_text", num_experts=256, num_experts_per_tok=8),
    ),
    "GLM-4-9B-0414": (
        9.4,
        COMMON
        | GLM
        | sizes(4096, 13696, 40, 32, 2, 151552)
        | dict(model_type="glm4", attention_bias=True, max_position_embeddings=32768, rms_norm_eps=1e-5),
    ),
    "glm-4-9b-chat-hf": (
        9.4,
        COMMON
        | GLM
        | sizes(4096, 13696, 40, 32, 2, 151552)
        | dict(
            model_type="glm", attention_bias=True, max_position_embeddings=131072, rms_norm_eps=1.5625e-07
        ),
    ),
    "GLM-4.5-Air": (
        106.9,
        GLM_MOE
        | sizes(4096, 10944, 46, 96, 8, 151552)
        | dict(
            model_type="glm4_moe",
            attention_bias=True,
            head_dim=128,
            moe_intermediate_size=1408,
            n_routed_experts=128,
            num_experts_per_tok=8,
            partial_rotary_factor=0.5,
            routed_scaling_factor=1.0,
            use_qk_norm=False,
        ),
    ),
    "GLM-4.7-Flash": (
        29.9,
        GLM_MOE
        | sizes(2048, 10240, 47, 20, 20, 154880)
        | dict(
            model_type="glm4_moe_lite",
            kv_lora_rank=512,
            moe_intermediate_size=1536,
            n_routed_experts=64,
            num_experts_per_tok=4,
            partial_rotary_factor=1.0,
            q_lora_rank=768,
            qk_nope_head_dim=192,
            qk_rope_head_dim=64,
            routed_scaling_factor=1.8,
            topk_method="noaux_tc",
            v_head_dim=256,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name):
    billions, raw = PUBLISHED[name]
    assert round(models.from_config(raw).table.count() / 1e9, 1) == billions


REFUSED = {
    "DeepSeek-V3": [dict(scoring_func="softmax"), dict(topk_method="greedy"), dict(moe_layer_freq=2)],
    "DeepSeek-V2": [dict(norm_topk_prob=True), dict(topk_method="noaux_tc"), dict(mlp_bias=True)],
    "Qwen3-Next-80B-A3B": [dict(hidden_act="gelu"), dict(layer_types=["sliding_attention"] * 48)],
    "Qwen3.5-35B-A3B": [dict(attn_output_gate=False), dict(norm_topk_prob=False)],
    "GLM-4-9B-0414": [dict(mlp_bias=True), dict(sliding_window=7)],
    "GLM-4.7-Flash": [dict(first_k_dense_replace=2)],
}


@pytest.mark.parametrize("name, change", [(n, c) for n, changes in REFUSED.items() for c in changes])
def test_what_is_not_implemented_is_refused(name, change):
    with pytest.raises(UserError, match=f"config.json: {next(iter(change))}"):
        models.from_config(PUBLISHED[name][1] | change)


@pytest.mark.parametrize(
    "name, extra",
    [("deepseek_v3", "model.layers.3.eh_proj.weight"), ("qwen3_next", "mtp.layers.0.mlp.gate.weight")],
)
def test_layers_that_predict_further_tokens_go_through(name, extra, tmp_path_factory, tmp_path):
    case = make_case(name, tmp_path_factory.getbasetemp())
    tensors = {n: case.source.get(n) for n in case.source.names()} | {extra: np.ones((3, 2), np.float32)}
    entries = {n: (x.shape, x.dtype) for n, x in tensors.items()}
    (tmp_path / "in").mkdir()
    files.write_safetensors(tmp_path / "in/model.safetensors", entries, tensors.__getitem__)
    (tmp_path / "in/config.json").write_bytes((case.folder / "config.json").read_bytes())
    source = hf.open_model(tmp_path / "in")
    model = models.from_config(source.config)
    params = hf.load_params(source, model)
    close(case.forward(params, case.tokens, *case.plain), case.logits)
    hf_export.save_model(tmp_path / "out", model, params, source)
    np.testing.assert_array_equal(hf.open_model(tmp_path / "out").get(extra), tensors[extra])
