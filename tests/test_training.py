"""Training recipes from the command line to what lies in the run folder, on eight devices or one of them."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax import cli, report

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "assets" / "tiny_model"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    words = "the cat sat on a mat and the dog ran to it".split()
    chats = [
        [("user", " ".join(words[i % 5 : i % 5 + 3])), ("assistant", " ".join(words[i % 7 : i % 7 + 2]))]
        for i in range(40)
    ]
    write("chat.jsonl", [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats])
    pairs = [{"prompt": c[0][1], "chosen": c[1][1], "rejected": "no " + c[0][1]} for c in chats]
    write("pairs.jsonl", pairs)
    write("text.jsonl", [{"text": " ".join(words[i % 6 :])} for i in range(20)])
    return tmp_path


def write(name, rows):
    pathlib.Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def ftjax(folder, capfd):
    """ftjax(verb, setting, …) -> (exit code, all that was said)."""

    def run(*words):
        verb, *settings = words
        given = {s.partition("=")[0] for s in settings}
        data = "pairs.jsonl" if verb == "dpo" else "chat.jsonl"
        defaults = {
            "model": MODEL, "output": "run", "data.train": data, "data.max_length": 64, "train.max_steps": 3,
            "train.batch_size": 8, "train.dtype": "float32", "optim.lr": 1e-2, "report.tensorboard": "false",
        }  # fmt: skip
        words = [f"{k}={v}" for k, v in defaults.items() if k not in given]
        try:
            code = cli.main([verb, *words, *settings])
        except SystemExit as e:
            code = e.code
        out = capfd.readouterr()
        return code, " ".join((out.out + out.err).split())

    return run


def summary(run="run"):
    return json.loads(pathlib.Path(run, "summary.json").read_text())


def losses(run="run"):
    rows = map(json.loads, pathlib.Path(run, "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def test_what_a_run_says_and_leaves(ftjax, folder):
    code, said = ftjax("sft", "data.eval_fraction=0.2")
    assert code == 0, said
    assert "chat.jsonl: chat format, 40 rows, 40 kept" in said and "weights are trained" in said
    for name in ("config.yaml", "base.json", "data.json", "info.json", "loss.png", "report.html"):
        assert (folder / "run" / name).stat().st_size > 10
    done = summary()
    assert done["finished"] > 1.7e9 and done["steps"] == 3
    info = json.loads((folder / "run" / "info.json").read_text())
    assert info["train"]["examples"] + info["eval"]["examples"] == 40
    assert "evaluation loss" in (folder / "run" / "adapter" / "README.md").read_text()
    assert "1970" not in (folder / "run" / "report.html").read_text()


@pytest.mark.parametrize("mesh", [("mesh.fsdp=4", "mesh.tp=2"), ("mesh.cp=2", "mesh.sp=2")])
@pytest.mark.parametrize("how", ["lora.r=4", "lora=null"])
def test_meshes_of_the_config_export_the_same(ftjax, how, mesh):
    name = {"lora.r=4": "adapter/adapter_model.safetensors", "lora=null": "model/model.safetensors"}[how]
    assert (done := ftjax("sft", how, *mesh, "optim.lr=1e-3"))[0] == 0, done[1]
    assert (done := ftjax("sft", how, "mesh.fsdp=1", "mesh.tp=8", "output=other", "optim.lr=1e-3"))[0] == 2
    assert "num_attention_heads=4" in done[1]
    assert (done := ftjax("sft", how, "mesh.fsdp=2", "mesh.tp=2", "output=other", "optim.lr=1e-3"))[0] == 2
    assert "there are 8" in done[1]
    assert (done := ftjax("sft", how, "output=other", "optim.lr=1e-3", "train.microbatches=1"))[0] == 0, done[
        1
    ]
    one, two = load_file(f"run/{name}"), load_file(f"other/{name}")
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=2e-4, err_msg=key)


@pytest.mark.parametrize("how", ["lora.r=4", "lora=null"])
def test_dpo(ftjax, how):
    code, said = ftjax("dpo", how, "train.max_steps=8", "data.eval_fraction=0.2", "optim.lr=3e-3")
    assert code == 0, said
    rows = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if row["kind"] == "eval"]
    assert abs(evals[0]["loss"] - np.log(2)) < 1e-5  # policy and reference are the same before the first step
    assert evals[-1]["loss"] < evals[0]["loss"] and evals[-1]["reward_margin"] > 0


def test_neftune_in_full_fine_tuning_of_tied_embeddings(ftjax):
    code, said = ftjax("sft", "lora=null", "train.neftune_alpha=5")
    assert code == 0, said


def test_training_that_never_helps_keeps_the_base_and_says_so(ftjax):
    write("other.jsonl", [{"text": "qx zv " * (1 + i % 3)} for i in range(8)])
    code, said = ftjax("sft", "data.format=text", "data.train=text.jsonl", "data.eval=other.jsonl",
                       "lora=null", "optim.lr=0.5", "train.max_steps=12")  # fmt: skip
    assert code == 0, said
    assert "no evaluation was better than the one before training" in said
    tuned, base = load_file("run/model/model.safetensors"), load_file(MODEL / "model.safetensors")
    for key in base:
        np.testing.assert_array_equal(tuned[key], base[key])


def test_a_finished_run_goes_on_with_more_steps_when_told(ftjax):
    assert ftjax("sft", "optim.schedule=constant")[0] == 0
    code, said = ftjax("sft", "optim.schedule=constant", "train.max_steps=6")
    assert code == 2 and "train.max_steps: 3 -> 6" in said
    assert ftjax("sft", "optim.schedule=constant", "train.max_steps=6", "--resume")[0] == 0
    assert summary()["steps"] == 6 and sorted(losses()) == [1, 2, 3, 4, 5, 6]
    assert ftjax("sft", "optim.schedule=constant", "train.max_steps=6", "output=whole")[0] == 0
    assert losses() == losses("whole")


def test_steps_larger_than_the_data_are_said(ftjax):
    code, said = ftjax("sft", "data.max_length=256", "train.max_steps=1")
    assert code == 0 and "a step takes 8: each goes over all of it" in said
    assert "goes over all of it" not in ftjax("sft", "output=other", "train.max_steps=1")[1]


def test_resume_that_cannot_start_leaves_the_finished_run_as_it_was(ftjax, folder):
    assert ftjax("sft")[0] == 0
    before = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}
    assert ftjax("sft", "data.train=nowhere.jsonl", "--resume")[0] == 2
    assert ftjax("sft", "data.train=nowhere.jsonl", "--overwrite")[0] == 2
    assert ftjax("sft", "lora.r=3", "--resume")[0] == 2
    assert before == {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--resume",)])
@pytest.mark.parametrize("output", ["project", "."])
def test_a_folder_of_the_users_is_never_emptied(ftjax, folder, flag, output):
    (folder / "project").mkdir()
    for name in ("project/config.yaml", "project/thesis.txt", "config.yaml"):
        (folder / name).write_text("model: mine")
    code, said = ftjax("sft", f"output={output}", *flag)
    assert code == 2 and "no run of ours" in said
    assert (folder / "project" / "thesis.txt").read_text() == "model: mine" and (
        folder / "config.yaml"
    ).exists()


def test_overwriting_a_run_spares_what_is_not_of_the_run(ftjax, folder):
    assert ftjax("sft")[0] == 0
    (folder / "run" / "notes.txt").write_text("mine")
    assert ftjax("sft", "train.max_steps=2", "--overwrite")[0] == 0
    assert (folder / "run" / "notes.txt").read_text() == "mine" and summary()["steps"] == 2


def test_a_loss_that_is_not_finite_names_step_and_documents(ftjax):
    code, said = ftjax("sft", "optim.lr=1e30", "optim.clip_norm=null", "lora=null", "optim.name=sgd")
    assert code == 2 and "chat.jsonl:" in said and "is saved at step" in said, said


def test_streamed_data(ftjax):
    code, said = ftjax("sft", "data.streaming=true", "data.eval=text.jsonl")
    assert code == 0 and "chat.jsonl: chat format" in said, said
    assert "examples" not in json.loads(pathlib.Path("run/info.json").read_text())["train"]
    code, said = ftjax("sft", "data.streaming=true", "data.train=pairs.jsonl", "output=other")
    assert code == 2 and "holds preference pairs" in said
    code, said = ftjax("dpo", "data.streaming=true", "data.train=chat.jsonl", "output=other")
    assert code == 2 and "no preference pairs" in said
    code, said = ftjax("dpo", "data.streaming=true", "output=other")
    assert code == 0, said


def test_mixtures_and_buckets(ftjax):
    mix = "data.train=[{path: chat.jsonl, weight: 3}, {path: text.jsonl, weight: 1}]"
    code, said = ftjax("sft", mix)
    assert code == 0 and "text.jsonl: text format" in said, said
    code, said = ftjax(
        "sft", "data.packing=none", "data.buckets=[16, 32, 64]", "data.eval_fraction=0.2", "output=b"
    )
    assert code == 0, said


@pytest.mark.parametrize(
    "setting",
    ["train.microbatches=0", "train.loss_chunk=0", "train.label_smoothing=1",
     "train.z_loss_coef=-1", "train.epochs=-1", "train.unroll=-1", "train.max_steps=0",
     "train.neftune_alpha=-3", "eval.every=-1", "eval.patience=0", "train.microbatches=3"],
)  # fmt: skip
def test_numbers_out_of_range(ftjax, setting):
    settings = ["data.eval_fraction=0.2", setting]
    if setting.startswith("train.epochs"):
        settings.append("train.max_steps=null")
    code, said = ftjax("sft", *settings)
    assert code == 2 and setting.partition("=")[0] in said and "Traceback" not in said


def test_hh_rlhf_trains(ftjax, folder):
    import gzip
    import os

    assets = os.environ.get("FTJAX_TEST_ASSETS")
    if not assets:
        pytest.skip("FTJAX_TEST_ASSETS has no data/hh-rlhf")
    source = pathlib.Path(assets) / "data" / "hh-rlhf" / "helpful-base.test.jsonl.gz"
    rows = gzip.open(source, "rt").read().splitlines()
    rows = sorted(rows, key=len)[:60]
    (folder / "hh.jsonl").write_text("\n".join(rows) + "\n")
    shutil.copytree(MODEL, folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    code, said = ftjax(
        "dpo", "model=model", "data.train=hh.jsonl", "data.max_length=1024", "data.on_bad=drop"
    )
    assert code == 0 and "hh format" in said, said


def test_too_little_memory_says_what_needs_less(ftjax, monkeypatch):
    def full(*args):
        said = "RESOURCE_EXHAUSTED: Out of memory allocating 12884901888 bytes."
        raise jax.errors.JaxRuntimeError(said + "\nBufferAssignment: …")

    monkeypatch.setattr(report.Reporter, "train", full)
    code, said = ftjax("sft")
    assert code == 2 and "Out of memory allocating 12884901888 bytes." in said and "train.remat" in said
    assert "Traceback" not in said and "BufferAssignment" not in said
