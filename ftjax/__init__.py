"""ftjax: fine-tuning for JAX. Nothing heavy is imported until it is used."""

__version__ = "0.1.0"


def load(source, *, revision=None, dtype=None):
    """(model, params, tokenizer) of a Hugging Face folder, a hub id or a GGUF file, on the first device.

    `dtype` is that of matrices and of the computation, float32 unless given. Raises UserError.
    """
    import jax.numpy as jnp

    from ftjax import hf, models

    opened = hf.open_model(source, revision)
    dtype = jnp.dtype(dtype or jnp.float32)
    model = models.from_config(opened.config).with_options(dtype=dtype)
    return model, hf.load_params(opened, model, dtype=dtype), hf.load_tokenizer(opened)
