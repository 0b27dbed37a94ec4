"""NEFTune's noise in families that scale their embeddings, against transformers' hook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import models, weights


@pytest.mark.parametrize("kind", ["gemma3_text", "granite", "llama"])
def test_neftunes_noise_is_of_transformers_size(kind):
    """Gemma's embedding module scales its rows, and the noise is added to them; Granite's multiplier is
    outside of it, and multiplies the noise too."""
    torch = pytest.importorskip("torch", reason="compared with the noise in torch models")
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.neftune import neftune_post_forward_hook

    changes = dict(model_type=kind, tie_word_embeddings=True)
    changes |= {"granite": dict(embedding_multiplier=3.0)}.get(kind, {})
    config = transformers.AutoConfig.for_model(**tiny.CONFIG | changes)
    reference = transformers.AutoModelForCausalLM.from_config(config).train().float()
    table = reference.get_input_embeddings()
    seen = []
    first = reference.model.layers[0]
    first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    tokens = np.random.default_rng(0).integers(0, 96, (1, 60)).astype(np.int32)
    torch.manual_seed(0)
    with torch.no_grad():
        reference(torch.tensor(tokens, dtype=torch.long))
        table.neftune_noise_alpha = 5.0
        table.register_forward_hook(neftune_post_forward_hook)
        reference(torch.tensor(tokens, dtype=torch.long))
    plain, noisy = (x.numpy() for x in seen)

    model = models.from_config(config.to_dict())
    module = model.module_type(model.config, model.table, model.options)
    w = jnp.asarray(table.weight.detach().numpy())
    positions, segments = np.arange(60, dtype=np.int32)[None], np.ones((1, 60), np.int32)
    ours = [
        np.asarray(module.embed({"embed": leaf}, tokens, positions, segments))
        for leaf in (w, weights.NoisyEmbedding(w, jax.random.key(0), 5.0))
    ]
    np.testing.assert_allclose(ours[0], plain, rtol=1e-6)
    found, wanted = np.abs(ours[1] - ours[0]), np.abs(noisy - plain)
    width = 5.0 / np.sqrt(60 * 48) * (3.0 if kind == "granite" else 1.0)
    # the largest of 2880 uniform draws is within a percent of the width (but for one time in e²⁸)
    np.testing.assert_allclose([found.max(), wanted.max()], width, rtol=0.01)
