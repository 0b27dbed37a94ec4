from pathlib import Path

import numpy as np
import pytest

from ftjax.data.embed import embedder

TINY = str(Path(__file__).parent.parent / "assets" / "tiny_model")


def test_vectors_have_the_direction_of_the_mean_of_transformers_last_hidden_states():
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    texts = ["a fine day", "red", "it is blue and red again and a day " * 5, ""]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModel.from_pretrained(TINY, dtype=torch.float32)
    embed = embedder(TINY)
    got = embed(texts)
    for text, vector in zip(texts, got, strict=True):
        ids = tokenizer(text)["input_ids"]
        if not ids:
            assert not vector.any()
            continue
        with torch.no_grad():
            want = model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
        want = want / np.linalg.norm(want)
        np.testing.assert_allclose(vector, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embed(texts[1:2]), got[1:2], rtol=1e-5, atol=1e-6)
