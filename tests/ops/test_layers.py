"""Norm, rotary embedding and SwiGLU's middle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import UserError
from ftjax.ops import rms_norm, rope, rope_frequencies, rope_table, silu_times

pytestmark = pytest.mark.fast
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=12345.0,
)
ROPES = {
    "default": dict(rope_type="default", rope_theta=12345.0),
    "linear": dict(rope_type="linear", factor=3.0, rope_theta=12345.0),
    "llama3": LLAMA3,
}


def test_rms_norm_against_float64():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(0, 3, (4, 33)).astype(np.float32), rng.normal(1, 0.3, 33).astype(np.float32)
    with jax.numpy_dtype_promotion("strict"):
        got = rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-3)
        low = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale), 1e-3)
    x64 = x.astype(np.float64)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), want, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_against_transformers(kind):
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=ROPES[kind])
    rng = np.random.default_rng(0)
    q, k = (rng.normal(0, 1, (2, 9, n, 32)).astype(np.float32) for n in (2, 1))
    positions = rng.integers(0, 500, (2, 9)).astype(np.int32)
    tq, tk = (torch.from_numpy(x).transpose(1, 2) for x in (q, k))
    cos, sin = LlamaRotaryEmbedding(config)(tq, torch.from_numpy(positions.astype(np.int64)))
    with jax.numpy_dtype_promotion("strict"):
        table = rope_table(jnp.asarray(positions), rope_frequencies(ROPES[kind], 32))
        got = [rope(jnp.asarray(x), table) for x in (q, k)]
    for mine, theirs in zip(got, apply_rotary_pos_emb(tq, tk, cos, sin), strict=True):
        np.testing.assert_allclose(mine, theirs.transpose(1, 2).numpy(), rtol=0, atol=5e-5)


def test_rope_turns_by_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(0, 1, (1, 1, 1, 16)), jnp.float32) for _ in range(2))
    freq = rope_frequencies(LLAMA3, 16)

    def score(i, j):
        at = [rope_table(jnp.array([[p]], jnp.int32), freq) for p in (i, j)]
        return float(jnp.sum(rope(q, at[0]) * rope(k, at[1])))

    assert score(40, 33) == pytest.approx(score(7, 0), abs=1e-4)
    assert score(40, 33) != pytest.approx(score(8, 0), abs=1e-4)


def test_an_unknown_rope_is_refused():
    with pytest.raises(UserError, match="yarn.*default, linear, llama3"):
        rope_frequencies({"rope_type": "yarn", "rope_theta": 1e4}, 16)


def test_silu_times():
    gate, up = (jnp.linspace(-90, 90, 7) * s for s in (1.0, 0.5))
    with jax.numpy_dtype_promotion("strict"):
        got = silu_times(gate, up)
        low = silu_times(gate.astype(jnp.bfloat16), up.astype(jnp.bfloat16))
        grads = jax.grad(lambda g, u: jnp.sum(silu_times(g, u)), (0, 1))(gate, up)
    np.testing.assert_allclose(got, jax.nn.silu(gate) * up, rtol=1e-6)
    assert low.dtype == jnp.bfloat16 and all(np.isfinite(g).all() for g in grads)
