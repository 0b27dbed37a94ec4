"""Norms, activations and rotary embedding, against float64 and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import UserError
from ftjax.ops import (
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
    silu_times,
)
from ftjax.ops.layers import ACTIVATIONS, ROPE_TYPES

pytestmark = pytest.mark.fast
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=12345.0,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=12345.0)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=12345.0,
    original_max_position_embeddings=20,
    short_factor=list(np.linspace(1, 1.5, 16)),
    long_factor=list(np.linspace(1.2, 9, 16)),
)
ROPES = {
    "default": dict(rope_type="default", rope_theta=12345.0),
    "default, a quarter": dict(rope_type="default", rope_theta=12345.0, partial_rotary_factor=0.25),
    "linear": dict(rope_type="linear", factor=3.0, rope_theta=12345.0),
    "llama3": LLAMA3,
    "llama3, half": LLAMA3 | dict(partial_rotary_factor=0.5),
    "proportional": dict(rope_type="proportional", rope_theta=12345.0, partial_rotary_factor=0.3),
    "proportional, factor": dict(
        rope_type="proportional", rope_theta=12345.0, partial_rotary_factor=0.5, factor=8.0
    ),
    "dynamic": dict(rope_type="dynamic", factor=3.0, rope_theta=12345.0),
    "yarn": YARN,
    "yarn, betas": YARN | dict(beta_fast=7.0, beta_slow=0.5),
    "yarn, not truncated": YARN | dict(truncate=False),
    "yarn, attention_factor": YARN | dict(attention_factor=0.7),
    "yarn, mscale": YARN | dict(mscale=0.707, mscale_all_dim=1.3),
    "yarn, one mscale": YARN | dict(mscale=0.707),
    "yarn, no factor": YARN | dict(factor=None),
    "yarn, half": YARN | dict(partial_rotary_factor=0.5),
    "yarn, a sudden ramp": YARN | dict(original_max_position_embeddings=2),
    "longrope": LONGROPE,
    "longrope, factor": LONGROPE | dict(factor=5.0),
    "longrope, attention_factor": LONGROPE | dict(attention_factor=1.3),
}
MAX_POSITIONS = 40  # max_position_embeddings


def test_every_rope_type_is_compared():
    assert {p["rope_type"] for p in ROPES.values()} == set(ROPE_TYPES)


def ours(parameters):
    """As the caller of rope_table makes it."""
    return parameters | dict(max_position_embeddings=MAX_POSITIONS)


def reference(parameters):
    """transformers' (config, module) for these rope_parameters and a head of 32."""
    pytest.importorskip("torch", reason="the reference is PyTorch")
    from transformers import LlamaConfig
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=dict(parameters),
    )
    return config, Phi3RotaryEmbedding(config)


def same_table(got, want):
    """Against the reference's cos and sin of a batch of one, which hold every angle twice."""
    for mine, theirs in zip(got, want, strict=True):
        theirs = theirs[0].numpy()
        # an angle of up to 100 in float32, its frequency off by an ulp
        np.testing.assert_allclose(mine[0, :, 0], theirs[:, : theirs.shape[1] // 2], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_frequencies_against_transformers(kind):
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, module = reference(ROPES[kind])
    of_type = ROPE_INIT_FUNCTIONS.get(ROPES[kind]["rope_type"], module.compute_default_rope_parameters)
    want, want_scaling = of_type(config)
    freq, scaling = rope_frequencies(ours(ROPES[kind]), 32)
    np.testing.assert_allclose(freq, want.numpy(), rtol=5e-7)
    assert freq.dtype == np.float32 and scaling == pytest.approx(want_scaling, rel=1e-7)
    for length in (MAX_POSITIONS, MAX_POSITIONS + 1, 200):
        want = of_type(config, seq_len=torch.tensor(length))[0].numpy()
        with jax.numpy_dtype_promotion("strict"):
            freq, _ = rope_frequencies(ours(ROPES[kind]), 32, jnp.array([[length]], jnp.int32))
        np.testing.assert_allclose(np.broadcast_to(freq, (1, 1, len(want)))[0, 0], want, rtol=1e-6)


@pytest.mark.parametrize("length", [12, 20, 21, 40, 41, 100])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_table_of_one_document_against_transformers(kind, length):
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    _, module = reference(ROPES[kind])
    want = module(torch.zeros(1), torch.arange(length)[None])
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    with jax.numpy_dtype_promotion("strict"):
        got = rope_table(positions, jnp.ones_like(positions), ours(ROPES[kind]), 32)
    same_table(got, want)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_packing_changes_no_table(kind):
    lengths, documents = (50, 7, 20, 21), []
    for n in lengths:
        positions = jnp.arange(n, dtype=jnp.int32)[None]
        documents.append(rope_table(positions, jnp.ones_like(positions), ours(ROPES[kind]), 32))
    positions = jnp.concatenate([jnp.arange(n, dtype=jnp.int32) for n in lengths] + [jnp.zeros(5, jnp.int32)])
    segments = np.repeat([1, 2, 3, 4, 0], [*lengths, 5]).astype(np.int32)
    packed = jax.jit(lambda p, s: rope_table(p, s, ours(ROPES[kind]), 32))(positions[None], segments[None])
    for got, want in zip(packed, zip(*documents, strict=True), strict=True):
        assert got.shape == (1, 103, 1, 16) and got.dtype == jnp.float32
        np.testing.assert_allclose(got[:, :98], jnp.concatenate(want, axis=1), rtol=0, atol=1e-6)


def test_a_decoded_token_goes_by_its_own_position():
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    _, module = reference(LONGROPE)
    for position in (19, 20):
        one = jnp.full((1, 1), position, jnp.int32)
        want = module(torch.zeros(1), torch.tensor([[position]]))
        same_table(rope_table(one, jnp.ones_like(one), ours(LONGROPE), 32), want)


@pytest.mark.parametrize("kind", ["default", "default, a quarter", "yarn", "llama3, half"])
def test_rope_against_transformers(kind):
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    rng = np.random.default_rng(0)
    q, k = (rng.normal(0, 1, (2, 9, n, 32)).astype(np.float32) for n in (2, 1))
    positions = rng.integers(0, 100, (2, 9)).astype(np.int32)
    tq, tk = (torch.from_numpy(x).transpose(1, 2) for x in (q, k))
    cos, sin = reference(ROPES[kind])[1](tq, torch.from_numpy(positions.astype(np.int64)))
    with jax.numpy_dtype_promotion("strict"):
        table = rope_table(jnp.asarray(positions), jnp.ones((2, 9), jnp.int32), ours(ROPES[kind]), 32)
        got = [rope(jnp.asarray(x), table) for x in (q, k)]
    for mine, theirs in zip(got, apply_rotary_pos_emb(tq, tk, cos, sin), strict=True):
        np.testing.assert_allclose(mine, theirs.transpose(1, 2).numpy(), rtol=0, atol=5e-5)


def table_of(positions, parameters, head_dim):
    positions = jnp.asarray(positions, jnp.int32)
    return rope_table(positions, jnp.ones_like(positions), parameters, head_dim)


@pytest.mark.parametrize("family", ["cohere", "glm4"])
def test_interleaved_rope_against_transformers(family):
    """GLM-4 turns half of the features."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    import importlib

    theirs = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    share = {"cohere": 1.0, "glm4": 0.5}[family]
    x = np.random.default_rng(0).normal(0, 1, (1, 9, 2, 16)).astype(np.float32)
    cos, sin = table_of(np.arange(9)[None], ROPES["default"] | dict(partial_rotary_factor=share), 16)
    repeat = np.repeat if family == "cohere" else lambda c, *_: np.concatenate([c, c], -1)
    twice = [torch.from_numpy(repeat(np.asarray(c)[:, :, 0], 2, -1)) for c in (cos, sin)]
    tx = torch.from_numpy(x).transpose(1, 2)
    want = theirs.apply_rotary_pos_emb(tx, tx, *twice)[0].transpose(1, 2).numpy()
    np.testing.assert_allclose(rope(x, (cos, sin), interleaved=True), want, rtol=0, atol=1e-6)


def test_interleaved_rope_is_half_split_rope_of_reordered_features():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (1, 5, 2, 12)), jnp.bfloat16)
    table = table_of(np.arange(5)[None], ROPES["default"], 8)
    order = jnp.array([0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11])
    got = rope(x, table, interleaved=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[..., order], rope(x[..., order], table))
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])  # past the table


def test_rope_turns_by_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(0, 1, (1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = [table_of([[p]], LLAMA3, 16) for p in (i, j)]
        return float(jnp.sum(rope(q, at[0]) * rope(k, at[1])))

    assert score(40, 33) == pytest.approx(score(7, 0), abs=1e-4)
    assert score(40, 33) != pytest.approx(score(8, 0), abs=1e-4)


def test_an_unknown_rope_and_a_missing_value_are_refused():
    with pytest.raises(UserError, match="axial.*default, linear"):
        rope_frequencies({"rope_type": "axial", "rope_theta": 1e4}, 16)
    with pytest.raises(UserError, match="'factor'.*'linear'"):
        rope_frequencies({"rope_type": "linear", "rope_theta": 1e4}, 16)
    with pytest.raises(UserError, match="'max_position_embeddings'.*'dynamic'"):
        rope_frequencies(ROPES["dynamic"], 16)
    with pytest.raises(UserError, match="'factor'.*'longrope'"):
        rope_frequencies(LONGROPE, 32)


def normal(*shape, mean=0.0, std=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, std, shape).astype(np.float32)


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_rms_norm_against_float64(offset):
    x, scale = normal(4, 33, std=3), normal(33, mean=1, std=0.3, seed=1)
    with jax.numpy_dtype_promotion("strict"):
        got = rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-3, offset)
        low = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale), 1e-3, offset)
    x64 = x.astype(np.float64)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-3) * (scale + (offset or 0.0))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), want, rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    "module,name,offset",
    [
        ("llama", "LlamaRMSNorm", None),
        ("gemma", "GemmaRMSNorm", 1.0),
        ("gpt_oss", "GptOssRMSNorm", 0.0),
        ("olmo2", "Olmo2RMSNorm", 0.0),
    ],
)
def test_rms_norm_rounds_where_transformers_does(module, name, offset):
    """Bit by bit in bfloat16, but where float32 sums in another order fall across a rounding boundary."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    import importlib

    theirs = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    x, scale = normal(64, 96), normal(96, mean=0.7, std=0.3, seed=1)
    norm = theirs(96, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = torch.from_numpy(scale).to(torch.bfloat16)
    want = norm(torch.from_numpy(x).to(torch.bfloat16)).detach().float().numpy()
    args = jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16), 1e-5
    differ = {o: np.mean(np.asarray(rms_norm(*args, o), np.float32) != want) for o in (None, 0.0, 1.0)}
    assert differ[offset] < 1e-3 and all(d > 0.1 for o, d in differ.items() if o != offset)


def test_l2_norm():
    x = normal(4, 33, std=3)
    np.testing.assert_array_equal(l2_norm(x, 1e-3), rms_norm(x, np.ones(33, np.float32), 1e-3))
    assert l2_norm(jnp.asarray(x, jnp.bfloat16), 1e-3).dtype == jnp.bfloat16


@pytest.mark.parametrize("scaled,biased,offset", [(1, 1, 0.0), (1, 0, 0.0), (0, 0, 0.0), (1, 1, 1.0)])
def test_layer_norm_against_float64(scaled, biased, offset):
    x = normal(4, 33, mean=20, std=3)
    scale = normal(33, mean=1, std=0.3, seed=1) if scaled else None
    bias = normal(33, seed=2) if biased else None
    with jax.numpy_dtype_promotion("strict"):
        args = [None if w is None else jnp.asarray(w) for w in (scale, bias)]
        got = layer_norm(jnp.asarray(x), *args, 1e-3, offset)
        low = layer_norm(jnp.asarray(x, jnp.bfloat16), *args, 1e-3, offset)
    x64 = x.astype(np.float64)
    want = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-3)
    want = want * (1.0 if scale is None else scale + offset) + (0.0 if bias is None else bias)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6)  # of x about 20 an ulp is 2e-6
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), want, rtol=0, atol=0.1)  # of x itself 0.06


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_against_transformers(name):
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    from transformers.activations import ACT2FN

    x, up = np.linspace(-9, 9, 301, dtype=np.float32), normal(301)
    want = ACT2FN[name](torch.from_numpy(x)).numpy()
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_allclose(activation(name)(jnp.asarray(x)), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gated(name)(jnp.asarray(x), jnp.asarray(up)), want * up, atol=2e-6)
        low = gated(name)(jnp.asarray(x, jnp.bfloat16), jnp.asarray(up, jnp.bfloat16))
        x32, up32 = (jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in (x, up))
    np.testing.assert_array_equal(low, gated(name)(x32, up32).astype(jnp.bfloat16))  # rounded once


def test_an_unknown_activation_is_refused():
    for f in (activation, gated):
        with pytest.raises(UserError, match="xielu.*silu"):
            f("xielu")


@pytest.mark.parametrize(
    "f,name", [(silu_times, "silu"), (gelu_times, "gelu"), (gelu_tanh_times, "gelu_new")]
)
def test_gated_products_of_large_values(f, name):
    gate, up = (jnp.linspace(-90, 90, 7) * s for s in (1.0, 0.5))
    with jax.numpy_dtype_promotion("strict"):
        got = f(gate, up)
        low = f(gate.astype(jnp.bfloat16), up.astype(jnp.bfloat16))
        grads = jax.grad(lambda g, u: jnp.sum(f(g, u)), (0, 1))(gate, up)
    np.testing.assert_allclose(got, ACTIVATIONS[name](gate) * up, rtol=1e-6)
    assert low.dtype == jnp.bfloat16 and all(np.isfinite(g).all() for g in grads)


def test_gradients_keep_what_elementwise_functions_took_and_nothing_in_float32():
    x, up, scale = jnp.ones((3, 8), jnp.bfloat16), jnp.ones((3, 8), jnp.bfloat16), jnp.ones(8, jnp.bfloat16)
    functions = {
        "rms_norm": lambda x: rms_norm(x, scale, 1e-5),
        "rms_norm, offset": lambda x: rms_norm(x, scale, 1e-5, 1.0),
        "layer_norm": lambda x: layer_norm(x, scale, scale, 1e-5),
        "l2_norm": lambda x: l2_norm(x, 1e-5),
        "gated": lambda x: gated("silu")(x, up),
        "activation": activation("gelu"),
    }
    for name, f in functions.items():
        kept = jax.tree.leaves(jax.eval_shape(lambda x, f=f: jax.vjp(f, x)[1], x))
        assert all(k.dtype == jnp.bfloat16 for k in kept), name
