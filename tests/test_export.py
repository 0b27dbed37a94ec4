"""ftjax export on a run folder as training leaves it."""

import json
import shutil

import jax
import numpy as np
import pytest
import test_gguf
import test_hf
import tiny

from ftjax import hf, lora, models, peft
from ftjax.errors import UserError
from ftjax.recipes import export


def make_run(run, source, dtype=None):
    """(model, tuned tree): a finished run with an adapter on `source`."""
    model = models.from_config(source.config)
    config = lora.LoraConfig(r=4, lora_alpha=7, use_rslora=True)
    plan = lora.plan(config, model.table)
    adapters = tiny.adapters(plan, model.table)
    run.mkdir()
    hf.write_json(run / "base.json", hf.describe(source))
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
    drift = hf.drift(hf.probe(model, tree), model, hf.load_params(again, model))
    assert drift.max_logit < 1e-4
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "| lora.r | 4 |" in card and "examples.jsonl" in card
    with pytest.raises(UserError, match="exists; --overwrite replaces it"):
        export.main([str(run), "--for", "hf"])
    export.main([str(run), "--for", "hf", "--overwrite", "--dtype", "bfloat16"])
    assert hf.open_model(folder).config["torch_dtype"] == "bfloat16"


def test_adapter(made, run, capsys, tmp_path):
    _, model, _ = made
    export.main([str(run), "--for", "peft", "--output", str(tmp_path / "out"), "--portable"])
    assert "the adapter of 21 modules, read back" in capsys.readouterr().out
    config, plan, adapters = peft.load(tmp_path / "out", model)
    assert not config.use_rslora and config.lora_alpha == config.r == 4
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
    assert hf.drift(hf.probe(model, tree), model, lora.attach(params, adapters, plan)).max_logit < 1e-5
    export.main([run, "--for", "hf"])
    merged = hf.open_model(tmp_path / "run/export/hf")
    assert {str(merged.dtype(n)) for n in merged.names()} == {"bfloat16"}
    assert hf.load_tokenizer(merged).chat_template == "{{ messages }}"


def test_every_weight(made, run, tmp_path, capsys):
    root, model, _ = made
    shutil.rmtree(run / "adapter")
    tuned = jax.tree.map(lambda x: x * 1.1, tiny.base())
    hf.save_model(run / "model", model, tuned, hf.open_model(root / "base"))
    export.main([str(run), "--for", "hf", "--dtype", "bfloat16"])
    assert "the tuned model" in capsys.readouterr().out
    with pytest.raises(UserError, match="tuned every weight, so there is no adapter: --for hf"):
        export.main([str(run), "--for", "peft"])


def test_what_is_missing_or_changed(made, run, tmp_path):
    root = made[0]
    moved = shutil.copytree(root / "base", tmp_path / "moved")
    facts = json.loads((run / "base.json").read_text())
    hf.write_json(run / "base.json", facts | {"source": str(tmp_path / "gone")})
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
    from pathlib import Path

    from ftjax import cli

    model = Path(__file__).parent / "assets" / "tiny_model"
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
