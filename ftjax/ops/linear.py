"""Products with weights: the one place that knows what a leaf of the parameter tree may be."""

import functools
import string
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.weights import LoraWeight, NoisyEmbedding


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(eqn: str, x, w, dtype=None):
    """jnp.einsum(eqn, x, w) accumulated in float32, in the backward products too; result in `dtype` or x's.

    Every product asks for a float32 output and rounds once. On CPU that is the difference between a fast
    bfloat16 kernel and a slow one, and no backend gives a less exact result for it.
    """
    out = jnp.einsum(eqn, x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype)


def _product_fwd(eqn, x, w, dtype):
    return product(eqn, x, w, dtype), (x, w)


def _product_bwd(eqn, dtype, residuals, g):
    x, w = residuals
    (x_axes, w_axes), y_axes = eqn.split("->")[0].split(","), eqn.split("->")[1]
    g = g.astype(x.dtype)
    dx = jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", g, w.astype(x.dtype), preferred_element_type=jnp.float32)
    dw = jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x, g, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


product.defvjp(_product_fwd, _product_bwd)


def einsum(eqn: str, x, w, dtype=None) -> Any:
    """`product(eqn, x, w)` where `w` may be any leaf type. For a LoraWeight, a·b is never formed."""
    if isinstance(w, NoisyEmbedding):
        return einsum(eqn, x, w.base, dtype)
    if not isinstance(w, LoraWeight):
        return product(eqn, x, w, dtype)
    (x_axes, w_axes), y_axes = eqn.split("->")[0].split(","), eqn.split("->")[1]
    ins = "".join(c for c in w_axes if c in x_axes)
    outs = "".join(c for c in w_axes if c not in x_axes)
    rank = next(c for c in "R" + string.ascii_lowercase if c not in eqn)
    h_axes = "".join(c for c in x_axes if c not in ins) + rank
    h: Any = product(f"{x_axes},{ins}{rank}->{h_axes}", dropout(x, w), w.a, jnp.float32)
    h = (h * w.scale).astype(x.dtype)
    delta: Any = product(f"{h_axes},{rank}{outs}->{y_axes}", h, w.b, jnp.float32)
    return (einsum(eqn, x, w.base, jnp.float32) + delta).astype(dtype or x.dtype)  # rounded once


def dropout(x, w: LoraWeight):
    """The low-rank branch's input: x with a share w.dropout of its elements zeroed, the rest scaled up."""
    if w.rng is None or w.dropout == 0.0:
        return x
    keep = jax.random.bernoulli(w.rng, 1.0 - w.dropout, x.shape)
    return jnp.where(keep, x / (1.0 - w.dropout), 0).astype(x.dtype)


def embed(w, tokens_BT, segments_BT, dtype):
    """Rows of an embedding table [V, D] as [B, T, D]. NEFTune's noise has the width alpha / sqrt(T' D), T'
    the length of the token's own document (segment), so that packing does not change it."""
    if not isinstance(w, NoisyEmbedding):
        return w[tokens_BT].astype(dtype)
    x_BTD = embed(w.base, tokens_BT, segments_BT, dtype)
    length_BT = jnp.sum(segments_BT[:, :, None] == segments_BT[:, None, :], axis=-1)
    width_BT = w.alpha * jax.lax.rsqrt((length_BT * x_BTD.shape[-1]).astype(jnp.float32))
    noise = jax.random.uniform(w.rng, x_BTD.shape, jnp.float32, -1.0, 1.0) * width_BT[..., None]
    return x_BTD + noise.astype(dtype)
