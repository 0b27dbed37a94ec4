"""Vectors of texts from a model's own hidden states, for comparing what texts mean."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

TOKENS = 512
"""Of a longer text the beginning counts."""
BATCH = 16


@functools.cache
def embedder(model: str) -> Callable[[Sequence[str]], np.ndarray]:
    """texts -> [texts, D] float32: the mean over each text's tokens of the model's last hidden states, of
    length 1 (0 for a text without tokens).

    `model` is a Hugging Face folder, a hub id or a GGUF file. Raises UserError.
    """
    import jax
    import jax.numpy as jnp

    import ftjax

    net, params, tokenizer = ftjax.load(model)

    @jax.jit
    def mean(params, tokens_BT, segments_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden_BTD, *_ = net(params, tokens_BT, positions_BT, segments_BT)
        sums_BD = jnp.where(segments_BT[..., None] > 0, hidden_BTD.astype(jnp.float32), 0).sum(1)
        norms_B = jnp.linalg.norm(sums_BD, axis=1, keepdims=True)  # of a mean and of a sum the same direction
        return sums_BD / jnp.where(norms_B > 0, norms_B, 1)

    def embed(texts: Sequence[str]) -> np.ndarray:
        ids = [tokenizer.encode(text)[:TOKENS] if text else [] for text in texts]
        order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
        out = []
        for begin in range(0, len(order), BATCH):
            rows = order[begin : begin + BATCH]
            length = 1 << max(4, (len(ids[rows[-1]]) - 1).bit_length())  # few lengths, few compilations
            tokens_BT = np.zeros((BATCH, length), np.int32)
            segments_BT = np.zeros((BATCH, length), np.int32)
            for b, row in enumerate(rows):
                tokens_BT[b, : len(ids[row])] = ids[row]
                segments_BT[b, : len(ids[row])] = 1
            out.append(np.asarray(mean(params, tokens_BT, segments_BT))[: len(rows)])
        vectors = np.concatenate(out) if out else np.zeros((0, 1), np.float32)
        return vectors[np.argsort(order)] if order else vectors

    return embed
