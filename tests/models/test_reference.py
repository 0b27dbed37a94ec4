"""Logits of every family against ones that transformers computed, kept in a file: needs no torch.

python tests/models/test_reference.py writes the file anew, with torch and transformers.
"""

import pathlib
import zlib

import jax
import numpy as np
import pytest

from ftjax import models, weights

FILE = pathlib.Path(__file__).parent / "reference_logits.npz"
TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=3e-5,
    max_position_embeddings=64,
    rope_theta=12345.0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=12345.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
CASES = {
    "llama": dict(model_type="llama", tie_word_embeddings=True),
    "llama3": dict(model_type="llama", tie_word_embeddings=False, rope_scaling=LLAMA3),
    "mistral": dict(model_type="mistral", sliding_window=5),
    "qwen2": dict(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=True),
}
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 20)).astype(np.int32)


def checkpoint(table: weights.Table) -> dict[str, np.ndarray]:
    """{checkpoint name: array}: random numbers that depend on the name alone."""
    out = {}
    for path in table.rows:
        for name in table.names(path):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            shape = weights.hf_shape(table, path)
            x = rng.standard_normal(shape, np.float32)
            out[name] = 1 + 0.3 * x if "norm" in name else 0.3 * x
    return out


def test_every_family_has_a_case():
    assert {case["model_type"] for case in CASES.values()} == set(models.REGISTRY)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    model = models.from_config(TINY | CASES[case])
    arrays = checkpoint(model.table)
    params = {}
    for path in model.table.rows:
        layers = [weights.from_hf(model.table, path, arrays[name]) for name in model.table.names(path)]
        params[path] = layers[0] if model.table.layers(path) is None else np.stack(layers)
    got = jax.jit(model.logits)(weights.unflatten(params), TOKENS)
    want = np.load(FILE)[case]
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def write():
    import torch
    import transformers

    out = {}
    for case, changes in CASES.items():
        table = models.from_config(TINY | changes).table
        config = transformers.AutoConfig.for_model(**(TINY | changes))
        reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        state = {name: torch.from_numpy(x) for name, x in checkpoint(table).items()}
        missing, unexpected = reference.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        reference.tie_weights()
        with torch.no_grad():
            out[case] = reference(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.savez_compressed(FILE, **out)


if __name__ == "__main__":
    write()
