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
from ftjax.ops.linear import einsum, embed, lookup, product
from ftjax.ops.moe import (
    balance_loss,
    expert_bias,
    experts,
    grouped,
    router_statistics,
    sigmoid_group_top_k,
    softmax_group_top_k,
    top_k_sigmoid,
    top_k_softmax,
    z_loss,
)

__all__ = [
    "activation",
    "attention",
    "balance_loss",
    "einsum",
    "embed",
    "expert_bias",
    "experts",
    "gated",
    "gelu_tanh_times",
    "gelu_times",
    "grouped",
    "l2_norm",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprobs",
    "lookup",
    "product",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "router_statistics",
    "shard",
    "sigmoid_group_top_k",
    "silu_times",
    "softmax_group_top_k",
    "top_k_sigmoid",
    "top_k_softmax",
    "z_loss",
]
