"""A model with more tokens in its vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.models import Model
from ftjax.weights import flatten, unflatten


def resize_vocabulary(model: Model, params: dict, size: int) -> tuple[Model, dict]:
    """(model, params) with `size` tokens: embedding, head and its bias get new rows, each the mean of the old
    ones (Hewitt 2021, "Initializing new word embeddings for pretrained language models"), so that a new token
    begins no likelier than an average one. Arrays keep their dtype. UserError where `size` is smaller than
    the vocabulary.

    Train the new rows with lora.trainable_token_indices, or the tables whole with lora.modules_to_save.
    """
    now = model.config.vocab_size
    if size < now:
        raise UserError(
            f"a vocabulary of {size} tokens is smaller than the model's {now}: tokens are only added"
        )
    config = dataclasses.replace(model.config, vocab_size=size)
    table = model.module_type.make_table(config)  # type: ignore[attr-defined]

    def resized(path: str, x: jax.Array) -> jax.Array:
        letters = model.table.dims(path)
        if "V" not in letters or size == now:
            return x
        axis = letters.index("V")
        mean = jnp.mean(x.astype(jnp.float32), axis=axis, keepdims=True).astype(x.dtype)
        return jnp.concatenate([x, jnp.repeat(mean, size - now, axis=axis)], axis=axis)

    flat = {path: resized(path, x) for path, x in flatten(params).items()}
    return dataclasses.replace(model, config=config, table=table), unflatten(flat)
