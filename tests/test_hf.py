"""Opening and loading Hugging Face folders: what is wrong with one is said by name."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

from ftjax import files, hf, hf_export, mesh, models, weights
from ftjax.errors import UserError
from ftjax.recipes import card

pytestmark = pytest.mark.fast
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with sharded weights, a generation config and a tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "whole"
    make(folder)
    return folder


def make(folder, params=None, limit=60_000, **changes):
    """Write a model folder without a source folder to start from."""
    config = tiny.CONFIG | {"bos_token_id": None, "eos_token_id": 2, "torch_dtype": "float32"} | changes
    model = models.from_config(config)
    flat = weights.flatten(params or weights.init(jax.random.key(0), model.table))
    tensors = {n: x for path in flat for n, x in weights.to_hf(model.table, path, flat[path]).items()}
    folder.mkdir()
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "generation_config.json", {"eos_token_id": 2, "temperature": 0.7})
    entries = {n: (x.shape, x.dtype) for n, x in tensors.items()}
    files.write_shards(folder, entries, tensors.__getitem__, limit)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder, size=96, template="{{ messages[0].content }}"):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "chat_template": template}
    files.write_json(folder / "tokenizer_config.json", config)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def load(folder, **options):
    source = hf.open_model(folder)
    return hf.load_params(source, models.from_config(source.config), **options)


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    files.write_json(path, {k: v for k, v in config.items() if v != "REMOVED"})


def rewrite(folder, change):
    """One model.safetensors of the tensors that `change` makes of {name: array}."""
    source = hf.open_model(folder)
    tensors = change({n: np.array(source.get(n)) for n in source.names()})
    for path in [*folder.glob("model-*"), folder / "model.safetensors.index.json"]:
        path.unlink()
    entries = {n: (x.shape, x.dtype) for n, x in tensors.items()}
    files.write_safetensors(folder / "model.safetensors", entries, tensors.__getitem__)


# -- Reading


def test_sharded_folder_loads_as_it_was(whole):
    assert len(list(whole.glob("model-*.safetensors"))) > 2
    flat = weights.flatten(load(whole))
    for path, x in weights.flatten(tiny.base()).items():
        np.testing.assert_array_equal(flat[path], x, err_msg=path)


def test_the_safetensors_library_reads_what_we_write(whole):
    from safetensors.numpy import load_file

    source = hf.open_model(whole)
    for path in whole.glob("model-*.safetensors"):
        for name, x in load_file(path).items():
            np.testing.assert_array_equal(x, source.get(name))


@pytest.mark.parametrize("stored", ["float16", "float64", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_any_float_dtype(copy, stored, wanted):
    stored = np.dtype(getattr(ml_dtypes, stored, None) or stored)
    rewrite(copy, lambda t: {n: x.astype(stored) for n, x in t.items()})
    flat = weights.flatten(load(copy, dtype=np.dtype(getattr(ml_dtypes, wanted, None) or wanted)))
    for path, x in weights.flatten(tiny.base()).items():
        vector = path.endswith("norm")
        assert flat[path].dtype == ("float32" if vector else wanted)
        np.testing.assert_array_equal(flat[path], np.asarray(x).astype(stored).astype(flat[path].dtype))


def test_without_a_dtype_matrices_keep_theirs_and_vectors_are_float32(copy):
    rewrite(copy, lambda t: {n: x.astype(BF16) for n, x in t.items()})
    flat = weights.flatten(load(copy))
    assert {str(x.dtype) for x in flat.values()} == {"float32", "bfloat16"}
    assert flat["final_norm"].dtype == np.float32


@pytest.mark.parametrize("host", ["cpu", "elsewhere"])
@pytest.mark.parametrize("fsdp, tp", [(8, 1), (4, 2), (2, 2), (1, 2)])
def test_shards_go_where_they_belong(whole, fsdp, tp, host, monkeypatch):
    monkeypatch.setattr(hf, "HOST", (host,))  # else layers go to the device one by one
    source = hf.open_model(whole)
    model = models.from_config(source.config)
    devices = mesh.make_mesh(mesh.MeshOptions(fsdp=fsdp, tp=tp), jax.devices()[: fsdp * tp])
    shardings = weights.shardings(model.table, mesh.WEIGHT_RULES, devices)
    flat = weights.flatten(hf.load_params(source, model, shardings=shardings))
    for path, sharding in weights.flatten(shardings).items():
        wanted = np.asarray(weights.flatten(tiny.base())[path])
        assert flat[path].sharding == sharding
        for shard in flat[path].addressable_shards:
            np.testing.assert_array_equal(shard.data, wanted[shard.index], err_msg=path)


def test_a_leaf_on_cpu_is_the_buffer_that_was_read():
    buffer = hf.aligned_empty((3, 5), np.dtype(np.float32))
    assert jax.device_put(buffer, jax.devices()[0]).unsafe_buffer_pointer() == buffer.ctypes.data


def test_fingerprint_is_of_the_tensors_alone(whole, copy):
    first = hf.open_model(whole).fingerprint()
    assert hf.open_model(copy).fingerprint() == first
    rewrite(copy, lambda t: t)  # one file instead of shards
    assert hf.open_model(copy).fingerprint() == first
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    assert hf.open_model(copy).fingerprint() != first


def test_ignorable_extra_tensors(copy):
    def change(t):
        embed = t["model.embed_tokens.weight"]
        buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
        return t | buffer | {"lm_head.weight": embed}

    rewrite(copy, change)
    load(copy)
    rewrite2 = hf.open_model(copy)
    tensors = {n: np.array(rewrite2.get(n)) for n in rewrite2.names()}
    tensors["lm_head.weight"][0, 0] += 1
    entries = {n: (x.shape, x.dtype) for n, x in tensors.items()}
    files.write_safetensors(copy / "model.safetensors", entries, tensors.__getitem__)
    with pytest.raises(UserError, match="tie_word_embeddings=true, yet lm_head.weight differs"):
        load(copy)


# -- What can be wrong


def test_no_such_folder(whole):
    with pytest.raises(UserError, match=r"whol: no such folder or file; did you mean .*whole\?"):
        hf.open_model(str(whole.parent / "whol"))
    with pytest.raises(UserError, match="no such folder or file$"):
        hf.open_model("/nowhere/at/all")
    with pytest.raises(UserError, match="a model is a folder, a hub id or a .gguf file"):
        hf.open_model(whole / "config.json")


def test_hub_id_that_cannot_be_had(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*a, **k):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="some/model: no such folder or file, and the hub cannot be reached"):
        hf.open_model("some/model")


def test_hub_id(monkeypatch, whole):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = hf.open_model("some/model", revision="v1")
    assert (
        asked["some/model"]["revision"] == "v1" and "*.safetensors" in asked["some/model"]["allow_patterns"]
    )
    facts = hf.describe(source)
    assert (facts["source"], facts["revision"], facts["kind"]) == ("some/model", "v1", "hf")


def remove(pattern):
    return lambda folder: [p.unlink() for p in folder.glob(pattern)]


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(size):
    def change(folder):
        path = sorted(folder.glob("model-*"))[1]
        path.write_bytes(path.read_bytes()[:size])

    return change


def damage_header(old, new):
    def change(folder):
        path = sorted(folder.glob("model-*"))[1]
        raw = path.read_bytes()
        assert old in raw and len(old) == len(new)
        path.write_bytes(raw.replace(old, new, 1))

    return change


def unquote(folder):
    path = sorted(folder.glob("model-*"))[1]
    raw = path.read_bytes()
    path.write_bytes(raw[:9] + b"\xff" + raw[10:])


BROKEN = {
    "no config": (remove("config.json"), "no config.json: a model folder has"),
    "broken config": (put("config.json", '{\n"a": 1,\n}'), r"config.json:[23]: not valid JSON"),
    "config is a list": (put("config.json", "[1]"), "a JSON object was expected, not list"),
    "no weights": (remove("model*"), "no weights"),
    "torch weights": (
        lambda f: (remove("model*")(f), (f / "pytorch_model.bin").write_bytes(b"")),
        "pytorch_model.bin would have to be saved as safetensors first",
    ),
    "missing shard": (remove("model-00002*"), "model-00002-of-.* of . shards named in .* missing"),
    "broken index": (put("model.safetensors.index.json", "{"), "index.json:1: not valid JSON"),
    "empty index": (put("model.safetensors.index.json", "{}"), "no weight_map"),
    "no index": (remove("*.index.json"), ". .safetensors files and no model.safetensors.index.json"),
    "cut data": (cut(-5), "truncated: .* bytes, its header describes"),
    "cut header": (cut(40), "truncated or not a safetensors file: its header should take"),
    "nothing left": (cut(3), "truncated: 3 bytes, too short"),
    "unquoted header": (unquote, "the safetensors header is damaged"),
    "other dtype": (damage_header(b'"F32"', b'"F16"'), r"header is damaged: .*F16.* is said to be at"),
    "unknown dtype": (damage_header(b'"F32"', b'"Q99"'), "has dtype Q99; supported: F64, F32"),
    "quantised": (
        lambda f: edit(f, quantization_config={"quant_method": "aqlm"}),
        r"quant_method='aqlm': a quantised checkpoint of a kind that is not read; mxfp4",
    ),
    "adapter": (
        lambda f: (
            remove("config.json")(f),
            put("adapter_config.json", '{"base_model_name_or_path": "some/base"}')(f),
        ),
        "an adapter, not a model: its base is 'some/base'",
    ),
    "wrong shape": (
        lambda f: edit(f, intermediate_size=81),
        r"mlp.gate_proj.weight has shape \[80, 48\], config.json makes it \[81, 48\]",
    ),
    "more layers": (
        lambda f: edit(f, num_hidden_layers=4),
        r"9 tensors missing from the weights: model.layers.3.* and 6 more",
    ),
    "fewer layers": (
        lambda f: edit(f, num_hidden_layers=2),
        r"9 tensors in the weights that a llama model of this config does not have: .* and 6 more",
    ),
    "integer weights": (
        lambda f: rewrite(
            f, lambda t: t | {"model.norm.weight": t["model.norm.weight"].astype(np.int8)}
        ),
        "model.norm.weight is int8: quantised weights are not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder(name, copy):
    change, message = BROKEN[name]
    change(copy)
    with pytest.raises(UserError, match=message):
        load(copy)


UNSUPPORTED = {
    "model_type='gpt_bigcode' is not supported; supported: ": dict(model_type="gpt_bigcode"),
    "docs/porting.md says how to add one": dict(model_type="gpt_bigcode"),
    "hidden_act='gelu' is not implemented for model_type 'llama'; supported: 'silu'": dict(hidden_act="gelu"),
    "mlp_bias=True is not implemented for model_type 'llama'; supported: False": dict(mlp_bias=True),
    "rope_type 'spiral' is not supported; supported: default, linear": dict(
        rope_scaling=dict(rope_type="spiral", factor=2.0, original_max_position_embeddings=64)
    ),
    "pretraining_tp=2 is not implemented": dict(pretraining_tp=2),
    "logit_scale=2.0 is unknown for model_type 'llama'": dict(logit_scale=2.0),
    "attention_dropout=0.1 is not implemented": dict(attention_dropout=0.1),
    # What transformers' model of the family does not read, though that of another does.
    "sliding_window=4096 is not implemented for model_type 'llama'; supported: None": dict(
        sliding_window=4096
    ),
    f"layer_types={['full_attention'] * 3} is unknown for model_type 'mistral'": dict(
        model_type="mistral", layer_types=["full_attention"] * 3
    ),
    "max_window_layers=1 is unknown for model_type 'mistral'": dict(
        model_type="mistral", max_window_layers=1
    ),
    "attention_bias=True is not implemented for model_type 'mistral'; supported: False": dict(
        model_type="mistral", attention_bias=True
    ),
    "attention_bias=False is not implemented for model_type 'qwen2'; supported: True": dict(
        model_type="qwen2", attention_bias=False
    ),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_config(message, copy):
    edit(copy, **UNSUPPORTED[message])
    with pytest.raises(UserError) as caught:
        models.from_config(hf.open_model(copy).config)
    assert message in str(caught.value)


def test_tokenizer_errors(copy):
    tokenizer = hf.load_tokenizer(hf.open_model(copy), need_chat_template=True)
    assert tokenizer.encode("w3 w4") == [3, 4]
    write_tokenizer(copy, size=96, template=None)
    with pytest.raises(UserError, match="the tokenizer has no chat template, which conversations need"):
        hf.load_tokenizer(hf.open_model(copy), need_chat_template=True)
    write_tokenizer(copy, size=97)
    with pytest.raises(UserError, match=r"does not fit the model: its id 96 \('w96'\) is beyond .* 96 rows"):
        hf.load_tokenizer(hf.open_model(copy))
    (copy / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        hf.load_tokenizer(hf.open_model(copy))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer \(tokenizer.json\)"):
        hf.load_tokenizer(hf.open_model(copy))


# -- Writing


def test_save_keeps_what_need_not_change(whole, tmp_path):
    source = hf.open_model(whole)
    model = models.from_config(source.config)
    out = tmp_path / "out"
    saved = hf_export.save_model(out, model, None, source, card="# card\n", max_shard_bytes=60_000)
    assert saved.drift is None and saved.size == 4 * model.table.count()
    same = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in same:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert (out / "README.md").read_text() == "# card\n"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == saved.size and set(index["weight_map"]) == set(source.names())
    assert hf.open_model(out).fingerprint() == source.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing is left beside


def test_save_with_changes(whole, tmp_path):
    source = hf.open_model(whole)
    model = models.from_config(source.config)
    hf_export.save_model(
        tmp_path / "out", model, None, source, dtype=BF16, stop_ids=[2, 5], chat_template="{{ new }}"
    )
    again = hf.open_model(tmp_path / "out")
    assert again.config == source.config | {"torch_dtype": "bfloat16"}
    assert list(again.config) == list(source.config)
    assert again.generation_config == {"eos_token_id": [2, 5], "temperature": 0.7}
    assert hf.load_tokenizer(again).chat_template == "{{ new }}"
    assert {again.dtype(n) for n in again.names()} == {BF16}


def test_save_refuses(whole, tmp_path, monkeypatch):
    source = hf.open_model(whole)
    model = models.from_config(source.config)
    out = tmp_path / "out"
    hf_export.save_model(out, model, None, source)
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(UserError, match="out: exists"):
        hf_export.save_model(out, model, None, source)
    bad = tiny.base() | {"final_norm": np.full(48, np.nan, np.float32)}
    with pytest.raises(UserError, match="model.norm.weight has values that are not finite"):
        hf_export.save_model(out, model, bad, source, overwrite=True)
    other = jax.tree.map(lambda x: x * 3, tiny.base())
    with pytest.raises(UserError, match="does not compute what was tuned .*spread"):
        hf_export.save_model(
            out, model, other, source, check=hf_export.probe(model, tiny.base()), overwrite=True
        )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(UserError, match=r"disk full: 0.00 GB are needed, 0.00 GB are free"):
        hf_export.save_model(out, model, None, source, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_leaves_what_was_there(whole, tmp_path, monkeypatch):
    source = hf.open_model(whole)
    model = models.from_config(source.config)
    out = tmp_path / "out"
    hf_export.save_model(out, model, None, source)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk full; nothing was changed"):
        hf_export.save_model(out, model, None, source, overwrite=True)
    assert hf.open_model(out).fingerprint() == source.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_drift_sees_a_small_change():
    model, base = tiny.model(), tiny.base()
    probe = hf_export.probe(model, base)
    same = hf_export.drift(probe, model, base)
    assert same.max_logit == 0 and same.kl == 0 and same.agree == 1
    rounded = jax.tree.map(lambda x: x.astype(BF16), base)
    far = jax.tree.map(lambda x: x * 1.5, base)
    a, b = hf_export.drift(probe, model, rounded), hf_export.drift(probe, model, far)
    assert 0 < a.relative < hf_export.MAX_DRIFT / 3 < 3 * hf_export.MAX_DRIFT < b.relative


def test_model_card():
    made = card.model_card(
        name="support",
        base="org/base",
        library="peft",
        data={"train": "a.jsonl"},
        settings={"lora.r": 8, "odd": "a|b"},
        scores={"exact match": 0.81234567},
    )
    assert made.startswith("---\nlibrary_name: peft\n") and "base_model: org/base\n" in made
    assert "| exact match | 0.8123 |" in made and "| odd | a\\|b |" in made and "| lora.r | 8 |" in made


def test_a_config_value_of_the_wrong_type(copy):
    edit(copy, hidden_size="wide")
    with pytest.raises(UserError, match="config.json: .*hidden_size"):
        models.from_config(hf.open_model(copy).config)


# -- Checkpoints that hold more, or hold it otherwise


def test_the_text_part_of_a_multimodal_checkpoint(whole, tmp_path):
    """It loads as the text model alone does, and goes out among the untouched rest under its own names."""
    text, source = dict(hf.open_model(whole).config), hf.open_model(whole)
    tensors = {
        (n if n.startswith("lm_head") else "language_model." + n): np.array(source.get(n))
        for n in source.names()
    }
    rest = {"vision_tower.patch.weight": np.arange(12, dtype=np.float32).reshape(3, 4).astype(BF16)}
    folder = tmp_path / "multimodal"
    shutil.copytree(whole, folder)
    rewrite(folder, lambda _: tensors | rest)
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {"patch": 3}}
    files.write_json(folder / "config.json", config)
    opened = hf.open_model(folder)
    params = load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, load(whole))
    assert opened.torch_name("model.layers.0.self_attn.q_proj.weight") == (
        "model.language_model.layers.0.self_attn.q_proj.weight"
    )
    tuned = params | {"final_norm": params["final_norm"] + 1}
    hf_export.save_model(tmp_path / "out", models.from_config(config), tuned, opened)
    out = files.SafetensorsFile(tmp_path / "out/model.safetensors")
    assert set(out.entries) == set(tensors | rest)
    for name, x in (tensors | rest).items():
        changed = name == "language_model.model.norm.weight"
        assert out.view(name).tobytes() == (x + 1 if changed else x).tobytes()
        assert out.view(name).dtype == x.dtype
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_a_quantised_checkpoint_loads_and_goes_out_unquantised(whole, tmp_path):
    """FP8 with a scale a row, as fine-grained checkpoints keep it in blocks of one row."""
    folder, kind = shutil.copytree(whole, tmp_path / "fp8"), np.dtype(ml_dtypes.float8_e4m3fn)
    plain = {}

    def quantise(tensors):
        out = {}
        for name, x in tensors.items():
            if not name.endswith("_proj.weight"):
                out[name] = plain[name] = x
                continue
            scale = np.abs(x).max(1, keepdims=True) / 448
            out[name], out[name + "_scale_inv"] = (x / scale).astype(kind), scale.astype(np.float32)
            plain[name] = out[name].astype(np.float32) * out[name + "_scale_inv"]
        return out

    rewrite(folder, quantise)
    width = max(x.shape[1] for n, x in plain.items() if x.ndim == 2)
    settings = {"quant_method": "fp8", "weight_block_size": [1, width]}
    edit(folder, quantization_config=settings)
    source = hf.open_model(folder)
    for name, x in plain.items():
        np.testing.assert_array_equal(source.get(name), x)
    model = models.from_config(source.config)
    hf_export.save_model(tmp_path / "out", model, hf.load_params(source, model), source)
    again = hf.open_model(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert set(again.names()) == set(plain) and again.dtype("model.norm.weight") == np.float32


def test_a_shorter_name_leads_to_the_tables(whole, tmp_path, monkeypatch):
    """Files of one family that name a weight in several ways, as GPT-NeoX's head is."""
    folder = shutil.copytree(whole, tmp_path / "renamed")
    rewrite(folder, lambda tensors: {n.replace("embed_tokens", "tokens"): x for n, x in tensors.items()})
    monkeypatch.setattr(models.family("llama"), "RENAMES", {r"model\.tokens": "model.embed_tokens"})
    jax.tree.map(np.testing.assert_array_equal, load(folder), load(whole))
    source = hf.open_model(folder)
    hf_export.save_model(tmp_path / "out", models.from_config(source.config), load(folder), source)
    assert "model.tokens.weight" in files.SafetensorsFile(tmp_path / "out/model.safetensors").entries
