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
# A family's line holds what differs from BASE; None takes a key of BASE away.
FAMILIES: dict[str, dict] = {
    "deepseek_v2": MLA | dict(first_k_dense_replace=1, topk_method="group_limited_greedy", rope_scaling=YARN),
    "deepseek_v3": MLA | dict(first_k_dense_replace=1, rope_scaling=YARN),
    "glm4_moe_lite": MLA | dict(n_group=1, topk_group=1),
    "llama": dict(),
    "mistral": dict(sliding_window=7),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=24),
}
# name -> (family, what differs from the family's line)
VARIANTS: dict[str, tuple[str, dict]] = {
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
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-bias-rope3": ("llama", dict(attention_bias=True, rope_scaling=LLAMA3)),
    "llama-linear": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=3.0))),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
}
LENGTH = 23  # of the sequences: longer than any window


def config(name: str) -> dict:
    """The keyword arguments of transformers' config of a family or variant."""
    family, changes = VARIANTS.get(name, (name, {}))
    values = BASE | FAMILIES[family] | changes
    return {"model_type": family} | {k: v for k, v in values.items() if v is not None}
