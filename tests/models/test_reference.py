"""Logits of every family against ones that transformers computed, kept in a file: needs no torch.

python tests/models/test_reference.py writes the file anew, with torch and transformers.
"""

import json
import pathlib
import tempfile
import zlib

import jax
import numpy as np
import pytest
from cases import FAMILIES, LENGTH, VARIANTS, config

from ftjax import files, hf, models, weights

FILE = pathlib.Path(__file__).parent / "reference_logits.npz"
CASES = [*FAMILIES, *VARIANTS]
KEPT = np.s_[:, 2::4]  # of the logits [B, T, V]: the file is small


def tokens(vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (2, LENGTH)).astype(np.int32)


def checkpoint(case: str) -> dict[str, np.ndarray]:
    """{checkpoint name: array}: random numbers that depend on the name alone."""
    table = models.from_config(config(case)).table
    sharp = case.startswith(
        "gemma4"
    )  # nothing scales q·k there: a softmax of large logits amplifies rounding
    out = {}
    for path in table.rows:
        for name in table.names(path):
            x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(
                weights.hf_shape(table, path), np.float32
            )
            if "norm" in name or "ln_" in name:
                out[name] = 1 + np.float32(0.3) * x
                if sharp and ("q_norm" in name or "k_norm" in name):
                    out[name] *= np.float32(0.3)
            else:
                out[name] = x * np.float32(0.3 if x.ndim < 2 else 0.08)
    return out


def folder_of(case: str, root: pathlib.Path) -> pathlib.Path:
    """A Hugging Face folder with that checkpoint."""
    folder = root / case
    folder.mkdir()
    files.write_json(folder / "config.json", config(case))
    arrays = checkpoint(case)
    entries = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    files.write_safetensors(folder / "model.safetensors", entries, arrays.__getitem__)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    source = hf.open_model(folder_of(case, tmp_path))
    model = models.from_config(source.config)
    got = jax.jit(model.logits)(hf.load_params(source, model), tokens(model.config.vocab_size))
    want = np.load(FILE)[case]
    assert np.abs(np.asarray(got)[KEPT] - want).max() < 1e-5 * np.abs(want).max()


def write():
    import torch
    import transformers

    out = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as root:
            folder = folder_of(case, pathlib.Path(root))
            reference, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager", output_loading_info=True
            )
            missing = {name for name in info["missing_keys"] if name != "lm_head.weight"}
            assert not missing and not info["unexpected_keys"], (case, json.dumps(info, default=list))
            vocab = reference.config.get_text_config().vocab_size
            with torch.no_grad():
                logits = reference.eval()(torch.from_numpy(tokens(vocab)).long()).logits
            out[case] = logits.float().numpy()[KEPT]
    np.savez_compressed(FILE, **out)


if __name__ == "__main__":
    write()
