"""What config.json of published mixtures of experts says is read, to the number of parameters that each has,
and what would compute something else is refused."""

import pytest

from ftjax import models
from ftjax.errors import UserError

pytest.importorskip("transformers")

COMMON = dict(
    hidden_act="silu",
    attention_dropout=0.0,
    initializer_range=0.02,
    use_cache=True,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    bos_token_id=1,
    eos_token_id=2,
)
ROUTER = dict(output_router_logits=False, router_aux_loss_coef=0.001)


def sizes(D: int, F: int, L: int, N: int, K: int, V: int, **more):
    return more | dict(
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        vocab_size=V,
    )


QWEN = dict(
    decoder_sparse_step=1, max_window_layers=21, rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False
)
LLAMA_4 = dict(
    attention_bias=False,
    attention_chunk_size=8192,
    attn_scale=0.1,
    attn_temperature_tuning=True,
    cache_implementation="hybrid",
    floor_scale=8192,
    for_llm_compressor=False,
    interleave_moe_layer_step=1,
    intermediate_size_mlp=16384,
    layer_types=[*["chunked_attention"] * 3, "full_attention"] * 12,
    max_position_embeddings=10485760,
    model_type="llama4_text",
    moe_layers=[*range(48)],
    no_rope_layers=[1, 1, 1, 0] * 12,
    num_experts_per_tok=1,
    num_local_experts=16,
    rms_norm_eps=1e-5,
    rope_scaling=dict(
        factor=16.0,
        high_freq_factor=1.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0,
    router_jitter_noise=0.0,
    use_qk_norm=True,
)
# name -> (billions of parameters, config.json)
PUBLISHED = {
    "Qwen3-30B-A3B": (
        30.5,
        COMMON
        | ROUTER
        | QWEN
        | sizes(2048, 6144, 48, 32, 4, 151936, head_dim=128)
        | dict(
            model_type="qwen3_moe",
            attention_bias=False,
            max_position_embeddings=40960,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_experts=128,
            num_experts_per_tok=8,
            rope_scaling=None,
            sliding_window=None,
        ),
    ),
    "Qwen1.5-MoE-A2.7B": (
        14.3,
        COMMON
        | ROUTER
        | QWEN
        | sizes(2048, 5632, 24, 16, 16, 151936)
        | dict(
            model_type="qwen2_moe",
            max_position_embeddings=8192,
            moe_intermediate_size=1408,
            norm_topk_prob=False,
            num_experts=60,
            num_experts_per_tok=4,
            shared_expert_intermediate_size=5632,
            sliding_window=32768,
        ),
    ),
    "OLMoE-1B-7B": (
        6.9,
        COMMON
        | ROUTER
        | sizes(2048, 1024, 16, 16, 16, 50304)
        | dict(
            model_type="olmoe",
            attention_bias=False,
            clip_qkv=None,
            max_position_embeddings=4096,
            norm_topk_prob=False,
            num_experts=64,
            num_experts_per_tok=8,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            rope_theta=10000.0,
        ),
    ),
    "gpt-oss-20b": (
        20.9,
        COMMON
        | ROUTER
        | sizes(2880, 2880, 24, 64, 8, 201088, head_dim=64)
        | dict(
            model_type="gpt_oss",
            attention_bias=True,
            experts_per_token=4,
            initial_context_length=4096,
            layer_types=["sliding_attention", "full_attention"] * 12,
            max_position_embeddings=131072,
            num_experts_per_tok=4,
            num_local_experts=32,
            quantization_config=dict(quant_method="mxfp4"),
            rms_norm_eps=1e-5,
            rope_scaling=dict(
                beta_fast=32.0,
                beta_slow=1.0,
                factor=32.0,
                original_max_position_embeddings=4096,
                rope_type="yarn",
                truncate=False,
            ),
            rope_theta=150000,
            sliding_window=128,
            swiglu_limit=7.0,
        ),
    ),
    "Llama-4-Scout, its text part": (
        107.8,
        dict(
            model_type="llama4",
            boi_token_index=200080,
            vision_config=dict(model_type="llama4_vision_model"),
            text_config=COMMON | ROUTER | LLAMA_4 | sizes(5120, 8192, 48, 40, 8, 202048, head_dim=128),
        ),
    ),
    "granite-3.1-3b-a800m": (
        3.3,
        COMMON
        | ROUTER
        | sizes(1536, 512, 32, 24, 8, 49155)
        | dict(
            model_type="granitemoe",
            attention_bias=False,
            attention_multiplier=0.015625,
            embedding_multiplier=12.0,
            logits_scaling=6.0,
            max_position_embeddings=131072,
            num_experts_per_tok=8,
            num_local_experts=40,
            residual_multiplier=0.22,
            rms_norm_eps=1e-6,
            rope_scaling=None,
            rope_theta=5000000,
            tie_word_embeddings=True,
        ),
    ),
    "dots.llm1": (
        142.8,
        COMMON
        | sizes(4096, 10944, 62, 32, 32, 152064)
        | dict(
            model_type="dots1",
            attention_bias=False,
            first_k_dense_replace=1,
            max_position_embeddings=32768,
            max_window_layers=62,
            moe_intermediate_size=1408,
            moe_layer_freq=1,
            n_group=1,
            n_routed_experts=128,
            n_shared_experts=2,
            norm_topk_prob=True,
            num_experts_per_tok=6,
            pretraining_tp=1,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            rope_theta=1e7,
            routed_scaling_factor=2.5,
            scoring_func="noaux_tc",
            sliding_window=None,
            topk_group=1,
            topk_method="noaux_tc",
        ),
    ),
    "MiniMax-M2": (
        228.7,
        COMMON
        | ROUTER
        | sizes(3072, 1536, 62, 48, 8, 200064, head_dim=128)
        | dict(
            model_type="minimax_m2",
            attn_type_list=[1] * 62,
            layernorm_full_attention_beta=1.0,
            layernorm_linear_attention_beta=1.0,
            layernorm_mlp_beta=1.0,
            max_position_embeddings=196608,
            mlp_intermediate_size=8192,
            mtp_transformer_layers=1,
            num_experts_per_tok=8,
            num_local_experts=256,
            num_mtp_modules=3,
            qk_norm_type="per_layer",
            quantization_config=dict(quant_method="fp8"),
            rms_norm_eps=1e-6,
            rope_theta=5000000,
            rotary_dim=64,
            router_jitter_noise=0.0,
            scoring_func="sigmoid",
            shared_intermediate_size=0,
            shared_moe_mode="sigmoid",
            sliding_window=None,
            use_mtp=True,
            use_qk_norm=True,
            use_routing_bias=True,
        ),
    ),
    "ERNIE-4.5-21B-A3B": (
        21.8,
        COMMON
        | sizes(2560, 12288, 28, 20, 4, 103424)
        | dict(
            model_type="ernie4_5_moe",
            max_position_embeddings=131072,
            moe_capacity=[64, 64, 64],
            moe_gate="topk",
            moe_intermediate_size=1536,
            moe_k=6,
            moe_layer_end_index=27,
            moe_layer_interval=1,
            moe_layer_start_index=1,
            moe_num_experts=64,
            moe_num_shared_experts=2,
            moe_use_aux_free=True,
            num_nextn_predict_layers=1,
            rms_norm_eps=1e-5,
            rope_theta=500000,
            tie_word_embeddings=True,
            use_bias=False,
        ),
    ),
    "Hunyuan-A13B": (
        80.4,
        COMMON
        | sizes(4096, 3072, 32, 32, 8, 128167, head_dim=128)
        | dict(
            model_type="hunyuan_v1_moe",
            attention_bias=False,
            cla_share_factor=2,
            max_position_embeddings=32768,
            mlp_bias=False,
            moe_drop_tokens=False,
            moe_intermediate_size=[3072] * 32,
            moe_layer_num_skipped=0,
            moe_topk=[8] * 32,
            norm_topk_prob=True,
            norm_type="rms",
            num_experts=64,
            num_shared_expert=[1] * 32,
            pad_id=127961,
            rms_norm_eps=1e-5,
            rope_scaling=dict(alpha=1000.0, factor=1.0, type="dynamic"),
            rope_theta=10000.0,
            tie_word_embeddings=True,
            use_cla=False,
            use_mixed_mlp_moe=True,
            use_qk_norm=True,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name):
    billions, raw = PUBLISHED[name]
    assert round(models.from_config(raw).table.count() / 1e9, 1) == billions


REFUSED = {
    "Qwen3-30B-A3B": dict(hidden_act="gelu"),
    "gpt-oss-20b": dict(layer_types=["chunked_attention"] * 24),
    "dots.llm1": dict(scoring_func="softmax"),
    "MiniMax-M2": dict(attn_type_list=[0, 1] * 31),
    "ERNIE-4.5-21B-A3B": dict(use_bias=True),
    "Hunyuan-A13B": dict(moe_topk=[8, 4] * 16),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused(name):
    ((key, _),) = REFUSED[name].items()
    with pytest.raises(UserError, match=f"config.json: {key}"):
        models.from_config(PUBLISHED[name][1] | REFUSED[name])
