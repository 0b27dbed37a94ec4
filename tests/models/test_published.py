"""Published checkpoints as they are: the keys of their config.json, the names and buffers in their files."""

import json

import numpy as np
import pytest
from test_parity import LORA, T, close, make_case, with_peft

from ftjax import files, hf, hf_export, models, peft
from ftjax.errors import UserError

# What config.json of each says, less sizes and what is always ignored.
CONFIGS = {
    "pythia-410m": dict(
        model_type="gpt_neox",
        hidden_act="gelu",
        hidden_size=1024,
        intermediate_size=4096,
        layer_norm_eps=1e-05,
        max_position_embeddings=2048,
        num_attention_heads=16,
        num_hidden_layers=24,
        rotary_emb_base=10000,
        rotary_pct=0.25,
        tie_word_embeddings=False,
        use_parallel_residual=True,
        vocab_size=50304,
    ),
    "gpt-neox-20b": dict(
        model_type="gpt_neox",
        attention_probs_dropout_prob=0,
        hidden_act="gelu_fast",
        hidden_dropout_prob=0,
        hidden_size=6144,
        intermediate_size=24576,
        layer_norm_eps=1e-05,
        max_position_embeddings=2048,
        num_attention_heads=64,
        num_hidden_layers=44,
        rotary_emb_base=10000,
        rotary_pct=0.25,
        tie_word_embeddings=False,
        vocab_size=50432,
    ),
    "gpt2": dict(
        model_type="gpt2",
        activation_function="gelu_new",
        architectures=["GPT2LMHeadModel"],
        attn_pdrop=0.1,
        embd_pdrop=0.1,
        initializer_range=0.02,
        layer_norm_epsilon=1e-05,
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        n_positions=1024,
        resid_pdrop=0.1,
        summary_activation=None,
        summary_first_dropout=0.1,
        summary_proj_to_labels=True,
        summary_type="cls_index",
        summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        vocab_size=50257,
    ),
    "phi-3-mini-4k": dict(
        model_type="phi3",
        attention_bias=False,
        attention_dropout=0.0,
        embd_pdrop=0.0,
        hidden_act="silu",
        hidden_size=3072,
        intermediate_size=8192,
        max_position_embeddings=4096,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        original_max_position_embeddings=4096,
        resid_pdrop=0.0,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=10000.0,
        sliding_window=2047,
        tie_word_embeddings=False,
        vocab_size=32064,
    ),
    "phi-3-mini-128k": dict(
        model_type="phi3",
        hidden_size=3072,
        intermediate_size=8192,
        max_position_embeddings=131072,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-05,
        rope_scaling=dict(long_factor=[1.5] * 48, short_factor=[1.25] * 48, type="su"),
        rope_theta=10000.0,
        sliding_window=262144,
        tie_word_embeddings=False,
        vocab_size=32064,
    ),
    "phi-4-mini": dict(
        model_type="phi3",
        attention_bias=False,
        attention_dropout=0.0,
        embd_pdrop=0.0,
        full_attn_mod=1,
        hidden_act="silu",
        hidden_size=3072,
        intermediate_size=8192,
        interpolate_factor=1,
        lm_head_bias=False,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=24,
        num_hidden_layers=32,
        num_key_value_heads=8,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        resid_pdrop=0.0,
        rms_norm_eps=1e-05,
        rope_scaling=dict(long_factor=[1.5] * 48, short_factor=[1.0] * 48, type="longrope"),
        rope_theta=10000.0,
        sliding_window=262144,
        tie_word_embeddings=True,
        vocab_size=200064,
    ),
    "starcoder2-3b": dict(
        model_type="starcoder2",
        activation_function="gelu",
        attention_dropout=0.1,
        attention_softmax_in_fp32=True,
        embedding_dropout=0.1,
        hidden_act="gelu_pytorch_tanh",
        hidden_size=3072,
        intermediate_size=12288,
        layer_norm_epsilon=1e-05,
        max_position_embeddings=16384,
        mlp_type="default",
        norm_epsilon=1e-05,
        norm_type="layer_norm",
        num_attention_heads=24,
        num_hidden_layers=30,
        num_key_value_heads=2,
        residual_dropout=0.1,
        rope_theta=999999.4420358813,
        scale_attention_softmax_in_fp32=True,
        scale_attn_weights=True,
        sliding_window=4096,
        use_bias=True,
        vocab_size=49152,
    ),
    "minitron-4b": dict(
        model_type="nemotron",
        hidden_act="relu2",
        hidden_size=3072,
        intermediate_size=9216,
        kv_channels=128,
        max_position_embeddings=4096,
        norm_eps=1e-05,
        num_attention_heads=24,
        num_hidden_layers=32,
        num_key_value_heads=8,
        partial_rotary_factor=0.5,
        rope_theta=10000,
        tie_word_embeddings=False,
        vocab_size=256000,
    ),
    "internlm3-8b": dict(
        model_type="internlm3",
        attention_dropout=0.0,
        bias=False,
        head_dim=128,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=10240,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_hidden_layers=48,
        num_key_value_heads=2,
        qkv_bias=False,
        rms_norm_eps=1e-05,
        rope_scaling=dict(factor=6.0, rope_type="dynamic"),
        rope_theta=50000000,
        tie_word_embeddings=False,
        vocab_size=128512,
    ),
    "falcon3-7b": dict(
        model_type="llama",
        attention_bias=False,
        attention_dropout=0.0,
        head_dim=256,
        hidden_act="silu",
        hidden_size=3072,
        intermediate_size=23040,
        max_position_embeddings=32768,
        mlp_bias=False,
        num_attention_heads=12,
        num_hidden_layers=28,
        num_key_value_heads=4,
        pretraining_tp=1,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000042,
        tie_word_embeddings=False,
        vocab_size=131072,
    ),
}
PARAMETERS = {  # as their pages count them; of GPT-NeoX and Pythia with both embedding tables
    "pythia-410m": 405_334_016,
    "gpt-neox-20b": 20_554_567_680,
    "gpt2": 124_439_808,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-mini-128k": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "starcoder2-3b": 3_030_371_328,
    "falcon3-7b": 7_455_550_464,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name):
    model = models.from_config(CONFIGS[name])
    if name in PARAMETERS:
        assert model.table.count() == PARAMETERS[name]


REFUSED = {
    "gpt2": [dict(hidden_act="relu"), dict(add_cross_attention=True), dict(activation_function="tanh")],
    "pythia-410m": [dict(hidden_dropout=0.1), dict(num_key_value_heads=4), dict(hidden_act="quick_gelu")],
    "phi-4-mini": [dict(lm_head_bias=True), dict(full_attn_mod=2), dict(hidden_act="gelu")],
    "starcoder2-3b": [dict(norm_type="rms_norm"), dict(mlp_type="gated"), dict(layer_norm_eps=1e-3)],
    "minitron-4b": [dict(rope_percent=0.25), dict(hidden_act="swiglu")],
    "internlm3-8b": [dict(sliding_window=7), dict(hidden_act="gelu")],
}


@pytest.mark.parametrize("name, change", [(n, c) for n, changes in REFUSED.items() for c in changes])
def test_config_refused(name, change):
    with pytest.raises(UserError, match=next(iter(change))):
        models.from_config(CONFIGS[name] | change)


def rewritten(case, folder, rename, buffers):
    """The case's checkpoint with other names and with `buffers` beside its weights."""
    folder.mkdir()
    source = case.source
    tensors = {rename(n): source.get(n) for n in source.names()} | buffers
    entries = {n: (x.shape, x.dtype) for n, x in tensors.items()}
    files.write_safetensors(folder / "model.safetensors", entries, tensors.__getitem__)
    (folder / "config.json").write_bytes((case.folder / "config.json").read_bytes())
    return tensors


def masks(module):
    mask = np.tril(np.ones((1, 1, T, T), np.bool_))
    each = {"bias": mask, "masked_bias": np.array(-1e9, np.float32)}
    return {f"{module.format(i)}.{name}": x for i in range(3) for name, x in each.items()}


FILES = {
    # openai-community/gpt2: saved from the model without a head, with the causal mask
    "gpt2": (lambda n: n.removeprefix("transformer."), masks("h.{}.attn")),
    # the same with a head: names with the prefix
    "gpt2-lm": (lambda n: n, masks("transformer.h.{}.attn")),
    # EleutherAI/pythia: embed_out, masks and frequencies
    "gpt_neox": (
        lambda n: n,
        masks("gpt_neox.layers.{}.attention")
        | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(4, np.float32)},
    ),
    # what the module calls the head now
    "gpt_neox-head": (lambda n: n.replace("embed_out.", "lm_head."), {}),
}


@pytest.mark.parametrize("name", FILES)
def test_names(name, tmp_path_factory, tmp_path):
    """Loads, computes the same, and goes out under the names, and with the buffers, that it came with."""
    case = make_case(name.partition("-")[0], tmp_path_factory.getbasetemp())
    tensors = rewritten(case, tmp_path / "in", *FILES[name])
    source = hf.open_model(tmp_path / "in")
    model = models.from_config(source.config)
    params = hf.load_params(source, model)
    close(case.forward(params, case.tokens, *case.plain), case.logits)
    hf_export.save_model(tmp_path / "out", model, params, source)
    out = files.SafetensorsFile(tmp_path / "out/model.safetensors")
    assert set(out.entries) == set(tensors)
    for key, x in tensors.items():
        np.testing.assert_array_equal(out.view(key), x)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_conv1d_adapter(tmp_path_factory, tmp_path):
    """PEFT is told that GPT-2's matrices lie [in, out], and an adapter that says so is read."""
    case = make_case("gpt2", tmp_path_factory.getbasetemp())
    peft.save(tmp_path / "a", case.plan, case.adapters, LORA, case.model.table, case.source)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["fan_in_fan_out"] is True
    close(case.tuned[0][1], case.torch_logits(with_peft(case, tmp_path / "a")))
    peft.load(tmp_path / "a", case.model)
