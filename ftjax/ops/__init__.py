"""The array operations that models and losses are made of. Axis letters as in weights.py."""

from ftjax.ops.attention import attention
from ftjax.ops.cross_entropy import linear_cross_entropy, linear_logprobs
from ftjax.ops.layers import (
    activation,
    gated,
    gelu_tanh_times,
    gelu_times,
    l2_norm,
    layer_norm,
    rms_norm,
    rope,
    rope_frequencies,
    rope_table,
    shard,
    silu_times,
)
from ftjax.ops.linear import einsum, embed, product

__all__ = [
    "activation",
    "attention",
    "einsum",
    "embed",
    "gated",
    "gelu_tanh_times",
    "gelu_times",
    "l2_norm",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprobs",
    "product",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "shard",
    "silu_times",
]
