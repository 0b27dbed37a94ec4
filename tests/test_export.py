"""ftjax export on a run folder as training leaves it."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import test_gguf
import test_hf
import tiny

from ftjax import files, gguf_export, hf, hf_export, lora, models, peft
from ftjax.errors import UserError
from ftjax.recipes import export

ASSETS = pathlib.Path(__file__).parent / "assets"


def make_run(run, source, dtype=None):
    """(model, tuned tree): a finished run with an adapter on `source`."""
    model = models.from_config(source.config)
    config = lora.LoraConfig(r=4, lora_alpha=7, use_rslora=True)
    plan = lora.plan(config, model.table)
    adapters = tiny.adapters(plan, model.table)
    run.mkdir()
    files.write_json(run / "base.json", hf.describe(source))
    (run / "config.yaml").write_text("recipe: sft\nlora:\n  r: 4\ndata:\n  train: examples.jsonl\n")
    peft.save(run / "adapter", plan, adapters, config, model.table, source)
    return model, lora.attach(hf.load_params(source, model), adapters, plan)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    test_hf.make(root / "base")
    model, tree = make_run(root / "run", hf.open_model(root / "base"))
    return root, model, tree


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[0] / "run", tmp_path / "run")


def test_merged(made, run, capsys):
    _, model, tree = made
    assert export.main([str(run), "--for", "hf"]) == 0
    out = capsys.readouterr().out
    assert "the merged model" in out and "max |Δlogit|" in out and "of what tuning changed" in out
    folder = run / "export" / "hf"
    again = hf.open_model(folder)
    drift = hf_export.drift(hf_export.probe(model, tree), model, hf.load_params(again, model))
    assert drift.max_logit < 1e-4
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "| lora.r | 4 |" in card and "examples.jsonl" in card
    with pytest.raises(UserError, match="exists; --overwrite replaces it"):
        export.main([str(run), "--for", "hf"])
    export.main([str(run), "--for", "hf", "--overwrite", "--dtype", "bfloat16"])
    assert hf.open_model(folder).config["torch_dtype"] == "bfloat16"


def test_adapter(made, run, capsys, tmp_path):
    _, model, _ = made
    export.main([str(run), "--for", "peft", "--output", str(tmp_path / "peft")])
    assert "re-opened: max |Δlogit| 0" in capsys.readouterr().out
    assert peft.load(tmp_path / "peft", model)[0].use_rslora
    export.main([str(run), "--for", "vllm", "--output", str(tmp_path / "out")])
    assert "re-opened: max |Δlogit|" in capsys.readouterr().out
    config, plan, adapters = peft.load(tmp_path / "out", model)
    assert not config.use_rslora and config.lora_alpha == config.r == 8  # the smallest rank that vLLM has
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card


def test_of_a_gguf_the_base_comes_along(tmp_path, capsys):
    """The dequantised weights are the base that the adapter names."""
    path = test_gguf.write(tmp_path / "m.gguf", "llama", test_gguf.random_tensors("llama"), kind="Q8_0")
    model, tree = make_run(tmp_path / "run", hf.open_model(path))
    run = str(tmp_path / "run")
    export.main([run, "--for", "peft", "--dtype", "float32"])
    assert "the dequantised base" in capsys.readouterr().out
    adapter = tmp_path / "run/export/peft"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    own = json.loads((adapter / "ftjax.json").read_text())["base"]
    assert own == json.loads((tmp_path / "run/base.json").read_text()) and own["kind"] == "gguf"
    source = hf.open_model(base)
    assert source.path == tmp_path / "run/export/base"
    params = hf.load_params(source, model)
    _, plan, adapters = peft.load(adapter, model)
    assert (
        hf_export.drift(hf_export.probe(model, tree), model, lora.attach(params, adapters, plan)).max_logit
        < 1e-5
    )
    export.main([run, "--for", "hf"])
    merged = hf.open_model(tmp_path / "run/export/hf")
    assert {str(merged.dtype(n)) for n in merged.names()} == {"bfloat16"}
    assert hf.load_tokenizer(merged).chat_template == "{{ messages }}"


def test_what_vllm_does_not_load_is_merged(made, run, tmp_path, capsys, monkeypatch):
    def refuse(*_, layout, **__):
        assert layout == "vllm"
        raise peft.Inexpressible("DoRA")

    monkeypatch.setattr(peft, "save", refuse)
    export.main([str(run), "--for", "vllm", "--output", str(tmp_path / "out")])
    assert "vLLM does not load such an adapter (DoRA): the merged model is written" in capsys.readouterr().out
    assert hf.open_model(tmp_path / "out").names()


@pytest.mark.parametrize("quantise", ["F32", "Q8_0"])
def test_one_gguf_file(quantise, tmp_path, capsys):
    """The committed tiny model has a tokenizer of llama.cpp's kinds."""
    base = hf.open_model(ASSETS / "tiny_model")
    model, tree = make_run(tmp_path / "run", base)
    export.main([str(tmp_path / "run"), "--for", "gguf", "--quantise", quantise])
    out = capsys.readouterr().out
    assert "re-opened: max |Δlogit|" in out and "ollama create run -f" in out
    folder = tmp_path / "run/export/gguf"
    assert sorted(p.name for p in folder.iterdir()) == ["Modelfile", "README.md", f"run-{quantise}.gguf"]
    source = hf.open_model(folder / f"run-{quantise}.gguf")
    again = models.from_config(source.config)
    drift = hf_export.drift(hf_export.probe(model, tree), again, hf.load_params(source, again))
    assert drift.relative < (1e-6 if quantise == "F32" else 0.03)
    assert f"FROM ./run-{quantise}.gguf" in (folder / "Modelfile").read_text()


def test_a_gguf_file_of_another_family_is_compared_by_tensors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hf, "open_model", functools.partial(_no_gguf, hf.open_model))
    make_run(tmp_path / "run", hf.open_model(ASSETS / "tiny_model"))
    export.main([str(tmp_path / "run"), "--for", "gguf", "--quantise", "Q8_0"])
    assert "its tensors are within 0.00" in capsys.readouterr().out
    write = gguf_export.Tensor.make
    broken = lambda self, read: write(self, lambda name: read(name) * (1.1 if "down" in name else 1))  # noqa: E731
    calls = []

    def make(self, read):  # the first time wrong, as a damaged file would be
        calls.append(self.name)
        return (broken if calls.count(self.name) == 1 else write)(self, read)

    monkeypatch.setattr(gguf_export.Tensor, "make", make)
    with pytest.raises(UserError, match="ffn_down.* off: it was not written well"):
        export.main([str(tmp_path / "run"), "--for", "gguf", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def _no_gguf(opened, path, *args):
    if str(path).endswith(".gguf"):
        raise UserError("an architecture that is not read")
    return opened(path, *args)


def test_push(made, run, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            calls.append((repo_id, sorted(p.name for p in pathlib.Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    out = str(tmp_path / "out")
    export.main([str(run), "--for", "peft", "--output", out, "--push", "ada/tuned", "--private"])
    assert "pushed to https://hub/ada/tuned" in capsys.readouterr().out
    assert calls[0] == ("ada/tuned", {"private": True, "exist_ok": True})
    assert {"README.md", peft.WEIGHTS, peft.CONFIG} <= set(calls[1][1])
    with pytest.raises(UserError, match="a repository is OWNER/NAME"):
        export.main([str(run), "--for", "peft", "--output", out, "--overwrite", "--push", "tuned"])

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(Api, "create_repo", offline)
    with pytest.raises(UserError, match=r"cannot be reached or refuses \(ConnectionError.* stays as it is"):
        export.main([str(run), "--for", "peft", "--output", out, "--overwrite", "--push", "ada/tuned"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--for", "hf", "--quantise", "F16"),
        ("--for", "gguf", "--dtype", "float32"),
        ("--for", "hf", "--private"),
    ],
)
def test_flags_without_effect(run, flags):
    with pytest.raises(UserError, match="is of|are of"):
        export.main([str(run), *flags])


def test_every_weight(made, run, tmp_path, capsys):
    root, model, _ = made
    shutil.rmtree(run / "adapter")
    tuned = jax.tree.map(lambda x: x * 1.1, tiny.base())
    hf_export.save_model(run / "model", model, tuned, hf.open_model(root / "base"))
    export.main([str(run), "--for", "hf", "--dtype", "bfloat16"])
    assert "the tuned model" in capsys.readouterr().out
    with pytest.raises(UserError, match="tuned every weight, so there is no adapter: --for hf"):
        export.main([str(run), "--for", "peft"])


def test_what_is_missing_or_changed(made, run, tmp_path):
    root = made[0]
    moved = shutil.copytree(root / "base", tmp_path / "moved")
    facts = json.loads((run / "base.json").read_text())
    files.write_json(run / "base.json", facts | {"source": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="the base of this run: .*no such folder.* --base says where to"):
        export.main([str(run), "--for", "hf"])
    export.main([str(run), "--for", "hf", "--base", str(moved), "--output", str(tmp_path / "out")])
    test_hf.rewrite(moved, lambda t: {n: x * np.float32(1.01) for n, x in t.items()})
    with pytest.raises(UserError, match="not the weights that the run was trained on"):
        export.main([str(run), "--for", "hf", "--base", str(moved)])
    with pytest.raises(UserError, match="no base.json: not the folder of a training run"):
        export.main([str(tmp_path), "--for", "hf"])
    shutil.rmtree(run / "adapter")
    with pytest.raises(UserError, match="neither adapter/ nor model/"):
        export.main([str(run), "--for", "hf", "--base", str(root / "base")])


def test_of_a_checkpoint(tmp_path, capsys):
    """A real run of a few steps: its adapter is that of the last checkpoint; an earlier one is another."""
    from ftjax import cli

    model = ASSETS / "tiny_model"
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "ran and saw"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    run = tmp_path / "run"
    settings = dict(
        model=model, output=run, lora="{r: 2}", checkpoint="{every: 2}", mesh="{fsdp: 4, tp: 2}",
        train="{max_steps: 4, batch_size: 4, dtype: float32}", report="{tensorboard: false}",
        optim="{schedule: wsd, warmup_steps: 1, decay_ratio: 0.5}",
        data=f"{{train: {tmp_path / 'train.jsonl'}, max_length: 64, cache_dir: {tmp_path / 'cache'}}}",
    )  # fmt: skip
    assert cli.main(["sft", *(f"{k}={v}" for k, v in settings.items())]) == 0
    files = {}
    for which in ("last", "2", "4"):
        out = tmp_path / which
        argv = ["export", str(run), "--for", "peft", "--checkpoint", which, "--output", str(out)]
        assert cli.main(argv) == 0
        files[which] = (out / peft.WEIGHTS).read_bytes()
    assert files["last"] == files["4"] == (run / "adapter" / peft.WEIGHTS).read_bytes() != files["2"]
    capsys.readouterr()
    for which, said in (("3", "there are: best, last, 2, 4"), ("best", "no evaluation chose a best")):
        assert cli.main(["export", str(run), "--for", "hf", "--checkpoint", which]) == 2
        assert said in capsys.readouterr().err


def test_of_a_checkpoint_of_all_weights(tmp_path, capsys):
    from ftjax import cli

    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "ran and saw"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    run = tmp_path / "run"
    settings = dict(
        model=ASSETS / "tiny_model", output=run, lora="null", checkpoint="{every: 2}", mesh="{fsdp: -1}",
        train="{max_steps: 4, batch_size: 8, dtype: float32}", report="{tensorboard: false}",
        data=f"{{train: {tmp_path / 'train.jsonl'}, max_length: 64, cache_dir: {tmp_path / 'cache'}}}",
    )  # fmt: skip
    assert cli.main(["sft", *(f"{k}={v}" for k, v in settings.items())]) == 0
    norms = {}
    for which in ("2", "4"):
        argv = ["export", str(run), "--for", "hf", "--checkpoint", which, "--output", str(tmp_path / which)]
        assert cli.main([*argv, "--dtype", "float32"]) == 0
        norms[which] = hf.open_model(tmp_path / which).get("model.norm.weight").tobytes()
    assert norms["4"] == hf.open_model(run / "model").get("model.norm.weight").tobytes() != norms["2"]
