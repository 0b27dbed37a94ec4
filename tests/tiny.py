"""A tiny model and batches that several tests share."""

import functools

import jax
import numpy as np

from ftjax import lora, models, weights

CONFIG = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=3e-5,
    max_position_embeddings=128,
    rope_theta=12345.0,
    tie_word_embeddings=True,
)


def model(**changes):
    return models.from_config(CONFIG | changes)


@functools.cache
def base():
    return weights.init(jax.random.key(0), model().table)


def adapters(plan, table, seed=1):
    """Factors with b nonzero, as after some training."""
    tree = lora.init(jax.random.key(seed), plan, table)
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), tree)


def documents(count: int, seed: int = 0, low: int = 3, high: int = 14):
    """[(tokens, loss_weight)]: documents of unequal length with unequal shares of trained tokens."""
    rng = np.random.default_rng(seed)
    out = []
    for n in rng.integers(low, high, count):
        trained = (rng.random(n) < 0.6) * rng.choice([1.0, 0.5], n)
        trained[-1] = 1.0
        out.append((rng.integers(0, 96, n).astype(np.int32), trained.astype(np.float32)))
    return out


def pack(rows, length: int):
    """Batch leaves [1, B, T] from rows, each a list of documents."""
    names = ("tokens", "loss_weight", "segments", "positions")
    batch = {k: np.zeros((len(rows), length), np.float32 if k == "loss_weight" else np.int32) for k in names}
    for b, row in enumerate(rows):
        at = 0
        for segment, (tokens, trained) in enumerate(row, 1):
            span = slice(at, at + len(tokens))
            at += len(tokens)
            values = (tokens, trained, segment, np.arange(len(tokens)))
            for name, value in zip(names, values, strict=True):
                batch[name][b, span] = value
    return {k: v[None] for k, v in batch.items()}
