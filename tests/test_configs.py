"""Every config in configs/ loads, and its step traces at the model's real size, without its weights."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import pytest

from ftjax import config, mesh, models
from ftjax.recipes import dpo, program, sft

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.yaml"))
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=128256)
# The published shapes of the models that the configs name.
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": dict(
        LLAMA, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": dict(
        LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
        rope_scaling=LLAMA31_ROPE | {"factor": 32.0},
    ),
    "meta-llama/Llama-3.1-8B-Instruct": dict(
        LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
        rope_scaling=LLAMA31_ROPE,
    ),
    "Qwen/Qwen3-0.6B": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True,
    ),
}  # fmt: skip
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen3-0.6B": 596_049_920,
}


@pytest.mark.fast
@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name):
    assert models.from_config(MODELS[name]).table.count() == PARAMETERS[name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_loads_and_its_step_traces(path):
    lines = path.read_text().splitlines()
    recipe = lines[0].split()[2]
    assert lines[0].startswith(f"# ftjax {recipe} configs/{path.name} ")
    assert lines[1].startswith("# Hardware:")
    cfg = config.load(path, (), recipe)
    model = program.with_options(models.from_config(MODELS[cfg.model]), cfg)
    assert cfg.data.max_length <= model.config.max_position_embeddings
    count = math.prod(max(n, 1) for n in dataclasses.asdict(cfg.mesh).values())
    devices: Any = mesh.abstract(cfg.mesh, count)
    rows = cfg.train.batch_size // cfg.train.microbatches
    mesh.check(devices, model.table, rows, cfg.data.max_length)

    here = mesh.make_mesh(mesh.MeshOptions(), jax.devices()[:1])
    make_loss, pairs = (dpo.make_loss, 4) if recipe == "dpo" else (sft.make_loss, None)
    step = program.plan_step(cfg, model, make_loss, here, pairs=pairs)
    after, metrics = step.trace().out_info
    assert jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), after, step.state)
    assert metrics["loss"].shape == ()
