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
# A family's line holds what differs from BASE; None takes a key of BASE away.
FAMILIES: dict[str, dict] = {
    "llama": dict(),
    "mistral": dict(sliding_window=7),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=24),
}
# name -> (family, what differs from the family's line)
VARIANTS: dict[str, tuple[str, dict]] = {
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
