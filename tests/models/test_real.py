"""Published weights against transformers, where an environment variable names their GGUF file."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from ftjax import gguf, hf, models

torch = pytest.importorskip("torch", reason="the reference is a torch model, and torch is not installed")
transformers = pytest.importorskip("transformers")

# environment variable -> the architecture of the file, and what no base model's perplexity of TEXT exceeds
FILES = {"FTJAX_TEST_GEMMA3_270M": ("gemma3", 40.0), "FTJAX_TEST_SMOLLM2": ("llama", 40.0)}
TEXT = (
    "The water cycle describes how water moves above, on and below the surface of the Earth. Heat from the "
    "sun turns water in the oceans into vapour, which rises, cools and condenses into clouds. When the drops "
    "in a cloud grow heavy enough they fall as rain or snow. Some of that water soaks into the ground, some "
    "runs into rivers, and the rivers carry it back to the sea, where the cycle begins again."
)


@pytest.mark.parametrize("variable", FILES)
def test_logits_and_perplexity(variable, tmp_path):
    architecture, most = FILES[variable]
    file = Path(os.environ.get(variable, ""))
    if not file.is_file():
        pytest.skip(f"{variable} does not name a GGUF file of the architecture {architecture}")
    load = transformers.AutoModelForCausalLM.from_pretrained
    options = dict(gguf_file=file.name, dtype=torch.float32, attn_implementation="eager")
    reference = load(file.parent, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if architecture in gguf.ARCHITECTURES:
        source = hf.open_model(file)
    else:  # the folder that transformers makes of it, dequantised
        reference.hf_quantizer = None
        del reference.config.quantization_config
        reference.save_pretrained(tmp_path)
        source = hf.open_model(tmp_path)
    model = models.from_config({k: v for k, v in source.config.items() if k != "_model_name_or_path"})
    params = hf.load_params(source, model)
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    tokens = np.array([tokenizer(TEXT).input_ids], np.int32)
    ours = np.asarray(jax.jit(model.logits)(params, tokens))
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens).long()).logits.numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    np.testing.assert_allclose(perplexity(ours, tokens), perplexity(theirs, tokens), rtol=1e-5)
    assert perplexity(ours, tokens) < most


def perplexity(logits, tokens):
    """exp of the mean negative log-likelihood of each token but the first; logits [1, T, V]."""
    logits, following = logits[0, :-1].astype(np.float64), tokens[0, 1:, None]
    logits -= logits.max(-1, keepdims=True)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, following, -1)[:, 0]
    return np.exp(nll.mean())
