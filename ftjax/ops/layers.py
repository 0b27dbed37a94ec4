"""Norms, activations, rotary embedding, sharding constraints."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftjax.errors import UserError
from ftjax.weights import spec


def recomputed(f: Callable) -> Callable:
    """f with a gradient that keeps f's arguments, in the dtype they came in, and computes f again: for chains
    of elementwise operations in float32, of which autodiff would keep every step in float32."""
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: (f(*args), args), lambda args, d: jax.vjp(f, *args)[1](d))
    return g


def rms_norm(x, scale, eps: float, offset: float | None = None):
    """x / rms(x) · scale over the last axis, the mean in float32. Zhang & Sennrich 2019, arXiv:1910.07467.

    Without `offset` the normed x is rounded to x's dtype and then multiplied, as in Llama. With it, 0.0
    included, the product with (offset + scale) is taken in float32 and rounded once: offset 1 in Gemma, 0 in
    OLMo 2 and gpt-oss. In float32 the two are the same."""

    @recomputed
    def norm(x, scale):
        x_f32 = _rms_normed(x, eps)
        if offset is None:
            return x_f32.astype(x.dtype) * scale.astype(x.dtype)
        return (x_f32 * (scale.astype(jnp.float32) + offset)).astype(x.dtype)

    return norm(x, scale)


def l2_norm(x, eps: float):
    """x / rms(x) over the last axis, in float32, with no weight (Llama 4's norm of q and k)."""
    return recomputed(lambda x: _rms_normed(x, eps).astype(x.dtype))(x)


def _rms_normed(x, eps):
    x_f32 = x.astype(jnp.float32)
    return x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)


def layer_norm(x, scale, bias, eps: float, offset: float = 0.0):
    """(x - mean(x)) / std(x) · (offset + scale) + bias over the last axis, in float32, rounded once. Ba,
    Kiros & Hinton 2016, arXiv:1607.06450.

    `scale` and `bias` may be None (OLMo 1 has neither); `offset` is 1 in Nemotron."""

    @recomputed
    def norm(x, scale, bias):
        x_f32 = x.astype(jnp.float32)
        x_f32 = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
        x_f32 = _rms_normed(x_f32, eps)
        if scale is not None:
            x_f32 = x_f32 * (scale.astype(jnp.float32) + offset)
        if bias is not None:
            x_f32 = x_f32 + bias.astype(jnp.float32)
        return x_f32.astype(x.dtype)

    return norm(x, scale, bias)


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
# config.json's names. Three of them are one function: they differ in how PyTorch computes it.
ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def activation(name: str) -> Callable:
    """The function x -> act(x) of config.json's `hidden_act`, computed in float32 and rounded once.

    UserError for a name that is not in ACTIVATIONS."""
    act = _act(name)
    return recomputed(lambda x: act(x.astype(jnp.float32)).astype(x.dtype))


def gated(name: str) -> Callable:
    """The function (gate, up) -> act(gate) · up, computed in float32 and rounded once. Shazeer 2020,
    arXiv:2002.05202. UserError for a name that is not in ACTIVATIONS."""
    act = _act(name)

    @recomputed
    def times(gate, up):
        return (act(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)

    return times


def _act(name):
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json: activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


silu_times = gated("silu")
gelu_times = gated("gelu")
gelu_tanh_times = gated("gelu_pytorch_tanh")


ROPE_TYPES = ("default", "linear", "proportional", "dynamic", "yarn", "longrope", "llama3")


def rope_frequencies(parameters: dict, head_dim: int, length=None):
    """(freq, scaling) from config.json's `rope_parameters` (transformers 5 spelling): angular frequencies
    [X] in float32, X half the rotated features, and the factor that multiplies cos and sin.

    `partial_rotary_factor` is the share of the head's features that is rotated. "dynamic" and "longrope"
    depend on how long the text is: `length`, int32 of any shape [...], then gives freq [..., X]; without it
    they are those of a short text. They read `max_position_embeddings`, which is not in config.json's
    `rope_parameters`, where noted: the caller adds it.

    linear        frequencies over `factor`. Chen et al. 2023, arXiv:2306.15595.
    proportional  over `factor` (or 1); the features past the rotated share have frequency 0 (Gemma 4).
    dynamic       theta grows with the length past `max_position_embeddings`, which must be given (NTK-aware
                  scaling; arXiv:2309.00071, appendix B).
    yarn          between freq / `factor` and freq by how often a feature turns within
                  `original_max_position_embeddings`. Peng et al. 2023, arXiv:2309.00071.
    longrope      freq over `short_factor`, or over `long_factor` where the text is longer than
                  `original_max_position_embeddings`. Ding et al. 2024, arXiv:2402.13753.
    llama3        over `factor` where the wavelength exceeds original_max_position_embeddings /
                  low_freq_factor, as it is below original / high_freq_factor, blended between (Llama 3.1,
                  arXiv:2407.21783, and its code).

    yarn and longrope without `factor` take `max_position_embeddings` / `original_max_position_embeddings`.
    UserError where the type is none of these or a value it needs is missing.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    share = parameters.get("partial_rotary_factor") or 1.0
    theta = float(_needed(parameters, "rope_theta"))
    if kind == "proportional":
        angles = int(share * head_dim // 2)
        freq = np.zeros(head_dim // 2, np.float32)
        freq[:angles] = _powers(theta, head_dim)[:angles]
        return freq / np.float32(parameters.get("factor") or 1.0), 1.0
    dim = int(head_dim * share)
    freq = _powers(theta, dim)
    if kind == "default":
        return freq, 1.0
    if kind == "linear":
        return freq / np.float32(_needed(parameters, "factor")), 1.0
    if kind == "dynamic":
        return _dynamic(parameters, theta, dim, length), 1.0
    if kind == "yarn":
        return _yarn(parameters, freq, theta, dim)
    if kind == "longrope":
        return _longrope(parameters, freq, length)
    low, high = _needed(parameters, "low_freq_factor"), _needed(parameters, "high_freq_factor")
    original, factor = _needed(parameters, "original_max_position_embeddings"), _needed(parameters, "factor")
    turns = original / (2 * math.pi / freq)
    width = max(high - low, 1e-9)  # Llama 4's are equal: a step
    blend = np.clip((turns - low) / width, 0.0, 1.0).astype(np.float32)
    return (1 - blend) * freq / np.float32(factor) + blend * freq, 1.0


def _needed(parameters: dict, key: str):
    if parameters.get(key) is None:
        raise UserError(
            f"config.json: rope_parameters has no {key!r}, which rope_type "
            f"{parameters.get('rope_type', 'default')!r} needs"
        )
    return parameters[key]


def _exponents(dim: int):
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _powers(theta: float, dim: int):
    """theta^(-2i/dim), on the host: a device's float32 power is not exact enough for long texts."""
    return 1 / (theta ** _exponents(dim).astype(np.float64)).astype(np.float32)


def _extension(parameters: dict) -> float:
    """By how much the text may be longer than in pretraining."""
    if parameters.get("factor") is not None:
        return parameters["factor"]
    if parameters.get("max_position_embeddings") is None:
        return _needed(parameters, "factor")
    return parameters["max_position_embeddings"] / _needed(parameters, "original_max_position_embeddings")


def _dynamic(parameters: dict, theta: float, dim: int, length):
    short, factor = _needed(parameters, "max_position_embeddings"), _needed(parameters, "factor")
    freq = _powers(theta, dim)
    if length is None:
        return freq
    stretch = jnp.maximum(length, short)[..., None].astype(jnp.float32) * (factor / short) - (factor - 1)
    # theta · stretch^(dim/(dim-2)) to the power, taken apart so that stretch 1 leaves `freq` exactly
    return freq * stretch ** (-_exponents(dim) * np.float32(dim / (dim - 2)))


def _yarn(parameters: dict, freq, theta: float, dim: int):
    original, factor = _needed(parameters, "original_max_position_embeddings"), _extension(parameters)

    def feature(turns):
        """The index, a real number, of the feature that turns so often in the pretraining length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = feature(parameters.get("beta_fast") or 32)
    high = feature(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    stretched = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1).astype(np.float32)
    freq = stretched * freq / np.float32(factor) + (1 - stretched) * freq

    def magnitude(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scaling = parameters.get("attention_factor")
    if scaling is None:
        over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scaling = magnitude(over) / magnitude(under) if over and under else magnitude(1.0)
    return freq, float(scaling)


def _longrope(parameters: dict, freq, length):
    original = _needed(parameters, "original_max_position_embeddings")
    by_factor = [freq / np.float32(_needed(parameters, key)) for key in ("short_factor", "long_factor")]
    scaling = parameters.get("attention_factor")
    if scaling is None:
        factor = _extension(parameters)
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if length is None:
        return by_factor[0], float(scaling)
    return jnp.where(length[..., None] > original, by_factor[1], by_factor[0]), float(scaling)


def rope_table(positions_BT, segments_BT, parameters: dict, head_dim: int):
    """(cos, sin), each [B, T, 1, X] float32, X half the rotated features: made once a forward pass and used
    by every layer. `parameters` as in rope_frequencies.

    Where the frequencies depend on the text's length ("dynamic", "longrope"), it is that of the token's own
    document, the last position + 1, so that packing changes nothing; a document's tokens lie side by side.
    With a cache only this call's tokens are seen: a token decoded goes by its own position + 1, and keys
    cached before keep the frequencies that they were written with.

    The barrier keeps it one table: without it, XLA computes both anew for every head of every layer.
    """
    by_length = parameters.get("rope_type") in ("dynamic", "longrope")
    length_BT = _document_lengths(positions_BT, segments_BT) if by_length else None
    freq, scaling = rope_frequencies(parameters, head_dim, length_BT)
    angle = positions_BT[..., None].astype(jnp.float32) * freq
    cos, sin = jnp.cos(angle[:, :, None]), jnp.sin(angle[:, :, None])
    if scaling != 1.0:
        cos, sin = cos * scaling, sin * scaling
    return jax.lax.optimization_barrier((cos, sin))


def _document_lengths(positions_BT, segments_BT):
    """The last position + 1 of each token's run of equal segments."""
    T = positions_BT.shape[1]
    is_last_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    at_BT = jnp.where(is_last_BT, jnp.arange(T, dtype=jnp.int32), T - 1)
    at_BT = jax.lax.cummin(at_BT, axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, at_BT, axis=1) + 1


def rope(x_BTNH, table, interleaved: bool = False):
    """Rotary embedding of the first 2X features; the rest passes through. Su et al. 2021, arXiv:2104.09864.

    Feature i turns with feature i + X, as in most Hugging Face checkpoints, or with `interleaved` 2i with
    2i + 1 (Cohere, GLM-4, Llama 4, DeepSeek). Features keep their places.
    """
    cos, sin = table
    rotated = 2 * cos.shape[-1]
    x_f32 = x_BTNH[..., :rotated].astype(jnp.float32)
    x1, x2 = (x_f32[..., 0::2], x_f32[..., 1::2]) if interleaved else jnp.split(x_f32, 2, axis=-1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    if interleaved:
        y = jnp.stack([y1, y2], axis=-1).reshape(x_f32.shape)
    else:
        y = jnp.concatenate([y1, y2], axis=-1)
    y = y.astype(x_BTNH.dtype)
    if rotated == x_BTNH.shape[-1]:
        return y
    return jnp.concatenate([y, x_BTNH[..., rotated:]], axis=-1)


def shard(x, axes: str):
    """Constrain an activation to the mesh axes that the active rules give its letters (`weights.spec`)."""
    where = _spec(axes)
    return x if where is None else jax.lax.with_sharding_constraint(x, where)


def _spec(axes: str):
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    return spec(axes, dict(rules), mesh) if rules and mesh.shape else None  # type: ignore[arg-type]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x, axes: str, to: str):
    """`x`, which lies as `axes` says, as `to` says; its gradient the other way round, so that what one
    direction gathers the other sums where it is needed."""
    return _reshard(x, axes, to)


def _reshard(x, axes: str, to: str):
    # Both are said: between a product and the second alone jaxlib 0.10.2's partitioner may gather the weight
    # over the wrong devices (it did with dp, fsdp, cp and sp of two each).
    return shard(shard(x, axes), to)


reshard.defvjp(
    lambda x, axes, to: (_reshard(x, axes, to), None), lambda axes, to, _, g: (_reshard(g, to, axes),)
)


def places(axes: str) -> dict[str, tuple[str, ...]]:
    """{letter: the mesh axes that the active rules split it over} of an activation with these axes."""
    parts = _spec(axes) or [None] * len(axes)
    return {
        x: () if p is None else (p,) if isinstance(p, str) else p for x, p in zip(axes, parts, strict=True)
    }


def shards(letter: str, axes: str | None = None) -> int:
    """Over how many devices the active rules split the axis `letter` of an activation with these axes (or of
    that alone); 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in places(axes or letter)[letter])


def by_device(x_BT):
    """[B, T, …] -> [G, X, …]: the tokens of each of G devices (or groups of them that share theirs) together.
    What does not divide is not cut."""
    (B, T), (rows, cuts) = x_BT.shape[:2], _cuts(x_BT.shape)
    x = x_BT.reshape(rows, B // rows, cuts, T // cuts, *x_BT.shape[2:])
    x_GX = x.swapaxes(1, 2).reshape(rows * cuts, B // rows * (T // cuts), *x_BT.shape[2:])
    return shard(x_GX, "X" + "_" * (x_GX.ndim - 1))


def by_row(x_GX, B: int, T: int):
    """The inverse of `by_device`; also of its result as one axis of tokens, [1, G · X, …]."""
    rows, cuts = _cuts((B, T))
    x = x_GX.reshape(rows, cuts, B // rows, T // cuts, *x_GX.shape[2:])
    return shard(x.swapaxes(1, 2).reshape(B, T, *x_GX.shape[2:]), "BTD"[: x_GX.ndim])


def _cuts(shape) -> tuple[int, int]:
    """Over how many devices the rows of [B, T, …] are split, and the tokens of each."""
    (B, T), (rows, cuts) = shape[:2], (shards(x, "BTF") for x in "BT")
    return rows if B % rows == 0 else B, cuts if T % cuts == 0 else 1
