"""Tiny configurations with odd numbers, one for each family in the registry and some variants of them.

A port adds its line to FAMILIES. `test_parity.py` runs every proof on each; VARIANTS get those of the forward
pass only.
"""

BASE = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=3e-5,
    max_position_embeddings=128,
    rope_theta=12345.0,
    tie_word_embeddings=False,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
GEMMA = dict(head_dim=20, num_hidden_layers=4, sliding_window=6, tie_word_embeddings=True)
GEMMA4 = GEMMA | dict(
    global_head_dim=24,
    num_hidden_layers=6,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    final_logit_softcapping=2.0,
    vocab_size_per_layer_input=96,
    rope_theta=None,
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=99.0),
        full_attention=dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=12345.0),
    ),
)
MLA = dict(
    num_key_value_heads=4,
    head_dim=None,
    q_lora_rank=20,
    kv_lora_rank=28,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=14,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.7,
)
YARN = dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=8.0,
    beta_slow=1.0,
    mscale=0.7,
    mscale_all_dim=0.9,
)
BARE = dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=None)
GPT2 = BARE | dict(
    hidden_size=None,
    n_embd=48,
    intermediate_size=None,
    n_inner=80,
    num_hidden_layers=None,
    n_layer=3,
    num_attention_heads=None,
    n_head=4,
    max_position_embeddings=None,
    n_positions=40,
    rope_theta=None,
    layer_norm_epsilon=3e-4,
)
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GRANITE = dict(embedding_multiplier=3, residual_multiplier=0.4, attention_multiplier=0.11, logits_scaling=0.7)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.25, 1.5],
    long_factor=[1.5, 3.0, 7.0],
)
COHERE = dict(rms_norm_eps=None, layer_norm_eps=3e-4, logit_scale=0.3, tie_word_embeddings=True)
DELTA = dict(
    num_hidden_layers=5,
    full_attention_interval=2,
    linear_conv_kernel_dim=3,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
DELTA_MOE = DELTA | dict(
    num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=36
)
GLM = dict(partial_rotary_factor=0.5, attention_bias=False, pad_token_id=0)
GLM_MOE = GLM | {k: MLA[k] for k in MLA if "expert" in k or "group" in k or "moe" in k}
# A family's line holds what differs from BASE; None takes a key of BASE away.
FAMILIES: dict[str, dict] = {
    "codegen": GPT2 | dict(n_head=8, rotary_dim=4),
    "apertus": dict(rope_scaling=LLAMA3),
    "arcee": dict(hidden_act="relu2", head_dim=None),
    "cohere": COHERE | dict(use_qk_norm=True),
    "cohere2": COHERE | dict(sliding_window=5, sliding_window_pattern=2, head_dim=None),
    "deepseek_v2": MLA | dict(first_k_dense_replace=1, topk_method="group_limited_greedy", rope_scaling=YARN),
    "deepseek_v3": MLA | dict(first_k_dense_replace=1, rope_scaling=YARN),
    "dots1": dict(
        **dict(n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=24),
        **dict(first_k_dense_replace=1, sliding_window=5, max_window_layers=2, routed_scaling_factor=1.7),
        head_dim=None,
    ),
    "ernie4_5": dict(use_bias=False),
    "ernie4_5_moe": dict(
        **dict(moe_num_experts=5, moe_k=2, moe_intermediate_size=24, moe_num_shared_experts=2),
        head_dim=None,
    ),
    "exaone4": dict(sliding_window=5, layer_types=LAYER_TYPES),
    "gemma": dict(head_dim=20, tie_word_embeddings=True),
    "gemma2": GEMMA | dict(query_pre_attn_scalar=20, attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
    "gemma3_text": GEMMA
    | dict(query_pre_attn_scalar=20, sliding_window_pattern=3, rope_local_base_freq=99.0),
    "glm": GLM | dict(attention_bias=True),
    "glm4": GLM,
    "glm4_moe": GLM_MOE | dict(first_k_dense_replace=1, use_qk_norm=True),
    "gemma4_text": GEMMA4
    | dict(num_kv_shared_layers=3, use_double_wide_mlp=True, hidden_size_per_layer_input=10),
    "gemma4_unified_text": GEMMA4 | dict(attention_k_eq_v=True, num_global_key_value_heads=1),
    "glm4_moe_lite": MLA | dict(n_group=1, topk_group=1),
    "gpt2": GPT2 | dict(tie_word_embeddings=True),
    "gptj": GPT2 | dict(rotary_dim=10),
    "gpt_neox": BARE | dict(layer_norm_eps=3e-4, rotary_pct=0.5, rope_theta=None, rotary_emb_base=12345),
    "gpt_oss": dict(
        **dict(num_hidden_layers=4, num_local_experts=5, num_experts_per_tok=2, sliding_window=7),
        **dict(rope_scaling=YARN | dict(truncate=False), swiglu_limit=1.5),
    ),
    "granite": GRANITE,
    "granitemoe": dict(
        **dict(num_local_experts=5, num_experts_per_tok=2, head_dim=None, embedding_multiplier=3.0),
        **dict(residual_multiplier=0.7, attention_multiplier=0.2, logits_scaling=1.7),
    ),
    "granitemoehybrid": GRANITE
    | dict(
        **dict(intermediate_size=64, shared_intermediate_size=80, num_local_experts=0, mamba_n_heads=4),
        **dict(layer_types=["attention"] * 3, position_embedding_type="rope"),
    ),
    "granitemoeshared": dict(
        **dict(num_local_experts=5, num_experts_per_tok=2, head_dim=None, shared_intermediate_size=36),
        **dict(residual_multiplier=0.7, attention_multiplier=0.2, logits_scaling=1.7, intermediate_size=24),
    ),
    "hunyuan_v1_dense": dict(rope_scaling=dict(rope_type="dynamic", alpha=50.0, factor=1.0)),
    "hunyuan_v1_moe": dict(num_experts=5, moe_topk=2, intermediate_size=24, tie_word_embeddings=True),
    "internlm3": dict(attention_bias=True, mlp_bias=True, rope_scaling=dict(rope_type="dynamic", factor=3.0)),
    "llama": dict(),
    "llama4_text": dict(
        **dict(num_hidden_layers=4, num_local_experts=5, interleave_moe_layer_step=2, intermediate_size=24),
        **dict(intermediate_size_mlp=56, no_rope_layer_interval=2, attention_chunk_size=6, floor_scale=4),
    ),
    "minimax_m2": dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=24, rotary_dim=6),
    "ministral": dict(sliding_window=5, layer_types=LAYER_TYPES),
    "ministral3": dict(
        rope_theta=None, rope_parameters=YARN | dict(rope_theta=12345.0, llama_4_scaling_beta=0.3)
    ),
    "mistral": dict(sliding_window=7),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
    "olmo": dict(rms_norm_eps=None, clip_qkv=0.8),
    "olmo2": dict(),
    "olmo3": dict(sliding_window=5, layer_types=LAYER_TYPES, rope_scaling=YARN),
    "nemotron": dict(rms_norm_eps=None, norm_eps=3e-4, partial_rotary_factor=0.75, mlp_bias=True),
    "olmoe": dict(num_experts=5, num_experts_per_tok=2, intermediate_size=24, head_dim=None, clip_qkv=0.9),
    "phi": dict(head_dim=None, rms_norm_eps=None, layer_norm_eps=3e-4, partial_rotary_factor=0.5),
    "phi3": dict(
        head_dim=None,
        pad_token_id=5,
        partial_rotary_factor=0.5,
        sliding_window=11,
        rope_scaling=LONGROPE,
        original_max_position_embeddings=64,
    ),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen2_moe": dict(
        **dict(num_hidden_layers=4, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24),
        **dict(shared_expert_intermediate_size=36, decoder_sparse_step=2, head_dim=None),
    ),
    "qwen3": dict(head_dim=24),
    "seed_oss": dict(attention_bias=True, attention_out_bias=False),
    "smollm3": dict(no_rope_layers=[1, 0, 1], pad_token_id=0),
    "stablelm": dict(
        **dict(head_dim=None, rms_norm_eps=None, layer_norm_eps=3e-4, partial_rotary_factor=0.5),
        **dict(use_qkv_bias=True, qk_layernorm=True),
    ),
    "starcoder2": dict(head_dim=None, rms_norm_eps=None, norm_epsilon=3e-4, sliding_window=9, use_bias=True),
    "qwen3_5_moe_text": DELTA_MOE | dict(intermediate_size=None),
    "qwen3_5_text": DELTA,
    "qwen3_moe": dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    "qwen3_next": DELTA_MOE,
}
# name -> (family, what differs from the family's line)
VARIANTS: dict[str, tuple[str, dict]] = {
    "arcee-bias": ("arcee", dict(attention_bias=True, tie_word_embeddings=True)),
    "cohere-bias": ("cohere", dict(use_qk_norm=False, attention_bias=True, tie_word_embeddings=False)),
    "deepseek_v2-lite": ("deepseek_v2", dict(q_lora_rank=None, topk_method="greedy")),
    "deepseek_v3-plain": (
        "deepseek_v3",
        dict(
            q_lora_rank=None,
            rope_interleave=False,
            norm_topk_prob=False,
            attention_bias=True,
            rope_scaling=None,
            first_k_dense_replace=0,
        ),
    ),
    "dots1-bias": ("dots1", dict(attention_bias=True, norm_topk_prob=True, sliding_window=None)),
    "ernie4_5-bias": ("ernie4_5", dict(use_bias=True, tie_word_embeddings=True)),
    "ernie4_5_moe-interval": ("ernie4_5_moe", dict(num_hidden_layers=4, moe_layer_interval=2)),
    "ernie4_5_moe-unshared": ("ernie4_5_moe", dict(moe_num_shared_experts=0, moe_layer_end_index=1)),
    "exaone4-global": ("exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 3)),
    "gpt2-untied-scales": (
        "gpt2",
        dict(
            tie_word_embeddings=False,
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            reorder_and_upcast_attn=True,
            activation_function="relu",
        ),
    ),
    "gpt_neox-serial": ("gpt_neox", dict(use_parallel_residual=False, attention_bias=False)),
    "gemma-bias-untied": ("gemma", dict(attention_bias=True, tie_word_embeddings=False)),
    "gemma2-uncapped": ("gemma2", dict(attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma3-linear": (
        "gemma3_text",
        dict(rope_scaling=dict(rope_type="linear", factor=8.0), final_logit_softcapping=2.0),
    ),
    "gpt_oss-unbiased": (
        "gpt_oss",
        dict(attention_bias=False, rope_scaling=None, layer_types=["full_attention"] * 4),
    ),
    "granite-bias": ("granite", dict(attention_bias=True, tie_word_embeddings=True)),
    "granitemoe-bias": ("granitemoe", dict(attention_bias=True, tie_word_embeddings=True)),
    "granitemoehybrid-nope": ("granitemoehybrid", dict(position_embedding_type="nope")),
    "hunyuan-bias": ("hunyuan_v1_dense", dict(attention_bias=True, rope_scaling=None)),
    "hunyuan_v1_moe-lists": ("hunyuan_v1_moe", dict(moe_topk=[2, 2, 2], attention_bias=True)),
    "internlm3-no-bias": ("internlm3", dict(attention_bias=False, mlp_bias=False)),
    "glm4-bias": ("glm4", dict(attention_bias=True, tie_word_embeddings=True)),
    "glm4_moe-bias": (
        "glm4_moe",
        dict(first_k_dense_replace=0, use_qk_norm=False, attention_bias=True, partial_rotary_factor=0.25),
    ),
    "gemma4-moe": (
        "gemma4_text",
        dict(
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            attention_bias=True,
            enable_moe_block=True,
            num_experts=5,
            top_k_experts=2,
            moe_intermediate_size=12,
        ),
    ),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-bias-rope3": ("llama", dict(attention_bias=True, rope_scaling=LLAMA3)),
    "llama-linear": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=3.0))),
    "llama4_text-sparse": (
        "llama4_text",
        dict(
            **dict(interleave_moe_layer_step=1, num_experts_per_tok=2, use_qk_norm=False),
            **dict(attention_bias=True, attn_temperature_tuning=False),
            **dict(rope_scaling=LLAMA3 | dict(high_freq_factor=1.0)),
        ),
    ),
    "ministral3-window": ("ministral3", dict(sliding_window=6)),
    "olmo-bias": ("olmo", dict(clip_qkv=None, attention_bias=True)),
    "olmo2-bias": ("olmo2", dict(attention_bias=True, tie_word_embeddings=True)),
    "olmoe-normed": ("olmoe", dict(norm_topk_prob=True, clip_qkv=None, attention_bias=True)),
    "qwen2_moe-window": (
        "qwen2_moe",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=3, qkv_bias=False),
    ),
    "qwen3_moe-dense": (
        "qwen3_moe",
        dict(
            **dict(num_hidden_layers=4, mlp_only_layers=[0, 2], attention_bias=True, norm_topk_prob=False),
            **dict(use_sliding_window=True, sliding_window=5),
        ),
    ),
    "nemotron-attention-bias": ("nemotron", dict(attention_bias=True, mlp_bias=False, head_dim=20)),
    "phi-norms": ("phi", dict(qk_layernorm=True, hidden_act="gelu_new", num_key_value_heads=4)),
    # every text of the proofs is longer than 4: all take the long factors
    "phi3-long": (
        "phi3",
        dict(original_max_position_embeddings=4, sliding_window=None, tie_word_embeddings=True),
    ),
    "phi3-plain": ("phi3", dict(rope_scaling=None, partial_rotary_factor=None)),
    "qwen3_next-dense": (
        "qwen3_next",
        dict(
            num_hidden_layers=4,
            full_attention_interval=4,
            mlp_only_layers=[1],
            attention_bias=True,
            norm_topk_prob=False,
            partial_rotary_factor=0.5,
            tie_word_embeddings=True,
        ),
    ),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "seed_oss-out-bias": ("seed_oss", dict(attention_bias=False, attention_out_bias=True)),
    "smollm3-window": ("smollm3", dict(use_sliding_window=True, sliding_window=5)),
    "stablelm-parallel": (
        "stablelm",
        dict(use_qkv_bias=False, qk_layernorm=False, use_parallel_residual=True, tie_word_embeddings=True),
    ),
    "starcoder2-no-bias": ("starcoder2", dict(use_bias=False, sliding_window=None, tie_word_embeddings=True)),
}
# variants that are proven as families are: their layers are of another kind
WHOLE = ("gemma4-moe",)
LENGTH = 23  # of the sequences: longer than any window


def config(name: str) -> dict:
    """The keyword arguments of transformers' config of a family or variant."""
    family, changes = VARIANTS.get(name, (name, {}))
    values = BASE | FAMILIES[family] | changes
    return {"model_type": family} | {k: v for k, v in values.items() if v is not None}


# test in test_parity.py -> its column in the README's table
PROOFS = {
    "test_logits": "logits",
    "test_export_is_import": "export = import",
    "test_cached_decode": "cached decode",
    "test_packed_equals_single": "packed = single",
    "test_adapter_through_peft": "PEFT both ways",
    "test_merged_export": "merged export",
    "test_gradients": "LoRA gradients",
    "test_mesh": "8 devices",
}
