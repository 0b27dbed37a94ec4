"""Norms, rotary embedding, sharding constraints."""

import math

import jax
import jax.numpy as jnp
from flax.linen import spmd

from ftjax.errors import UserError


def rms_norm(x, scale, eps: float):
    """x / rms(x) · scale over the last axis, the mean in float32. Zhang & Sennrich 2019, arXiv:1910.07467."""
    x_f32 = x.astype(jnp.float32)
    x_f32 = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
    return x_f32.astype(x.dtype) * scale.astype(x.dtype)


def silu_times(gate, up):
    """silu(gate) · up, computed in float32 and rounded once. SwiGLU: Shazeer 2020, arXiv:2002.05202."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


ROPE_TYPES = ("default", "linear", "llama3")


def rope_frequencies(parameters: dict, head_dim: int) -> jax.Array:
    """Angular frequencies [H/2] in float32 from config.json's `rope_parameters` (transformers 5 spelling).

    "linear" divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595). "llama3" divides the
    frequencies whose wavelength exceeds original_max_position_embeddings / low_freq_factor by `factor`, keeps
    those below original / high_freq_factor, and blends between (Llama 3.1, arXiv:2407.21783, and its code).
    """
    kind = parameters.get("rope_type", "default")
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    freq = 1.0 / (jnp.float32(parameters["rope_theta"]) ** exponent)
    if kind == "default":
        return freq
    if kind == "linear":
        return freq / parameters["factor"]
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        original = parameters["original_max_position_embeddings"]
        wavelength = 2 * math.pi / freq
        blend = jnp.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        return (1.0 - blend) * freq / parameters["factor"] + blend * freq
    raise UserError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")


def rope_table(positions_BT, freq_X):
    """(cos, sin), each [B, T, 1, H/2] float32: made once a forward pass and used by every layer.

    The barrier keeps it so: without it, XLA computes both anew for every head of every layer.
    """
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * freq_X
    return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))


def rope(x_BTNH, table):
    """Rotary embedding, half-split as in Hugging Face checkpoints. Su et al. 2021, arXiv:2104.09864."""
    cos, sin = table
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)


def shard(x, axes: str):
    """Constrain an activation to the mesh axes that the active logical-axis rules give its letters."""
    return spmd.with_logical_constraint(x, tuple(axes))
