"""What a user sees when something is wrong: through the command line, message by message."""

import json
import pathlib
import shutil

import pytest

from ftjax import bucket, cli

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "assets" / "tiny_model"
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(MODEL, tmp_path / "model")
    write(tmp_path / "train.jsonl", [GOOD] * 20)
    return tmp_path


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


@pytest.fixture
def fails(folder, capsys):
    """fails(setting, …) -> the message; the run must end with exit code 2 and no traceback."""

    def run(*settings, config=None, verb="sft"):
        defaults = dict(
            model="model", output="run", **{"data.train": "train.jsonl", "data.max_length": 64,
            "train.max_steps": 1, "train.batch_size": 8, "train.dtype": "float32", "lora.r": 2}
        )  # fmt: skip
        given = {s.partition("=")[0] for s in settings}
        words = [] if config else [f"{k}={v}" for k, v in defaults.items() if k not in given]
        code = cli.main([verb, *([config] if config else []), *words, *settings])
        error = capsys.readouterr().err
        assert code == 2, error
        assert "Traceback" not in error
        return " ".join(error.split())

    return run


def test_missing_file_suggests_the_nearest(fails):
    said = fails("data.train=trian.jsonl")
    assert "trian.jsonl" in said and "train.jsonl" in said.replace("trian.jsonl", "")


def test_empty_file(fails, folder):
    write(folder / "empty.jsonl", [])
    said = fails("data.train=empty.jsonl")
    assert "empty.jsonl" in said and "empty" in said.replace("empty.jsonl", "")


def test_broken_json_names_the_line(fails, folder):
    write(folder / "broken.jsonl", [GOOD, GOOD, '{"messages": [', GOOD])
    assert "broken.jsonl:3" in fails("data.train=broken.jsonl")


def test_mixed_formats_name_the_first_that_differs(fails, folder):
    write(folder / "mixed.jsonl", [GOOD, {"prompt": "a", "completion": "b"}])
    assert "mixed.jsonl:2" in fails("data.train=mixed.jsonl")


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user", "content": "hi"}], [GOOD["messages"][0], {"role": "assistant", "content": ""}]],
)
def test_nothing_to_train(fails, folder, messages):
    write(folder / "none.jsonl", [GOOD, {"messages": messages}])
    said = fails("data.train=none.jsonl")
    assert "none.jsonl:2" in said and "assistant" in said and "on_bad: drop" in said


def test_wrong_role(fails, folder):
    write(folder / "role.jsonl", [{"messages": [{"role": "robot", "content": "x"}, GOOD["messages"][1]]}])
    assert "robot" in (said := fails("data.train=role.jsonl")) and "assistant" in said


def test_too_long(fails, folder):
    long = {"messages": [{"role": "user", "content": "word " * 200}, GOOD["messages"][1]]}
    write(folder / "long.jsonl", [GOOD, long])
    said = fails("data.train=long.jsonl")
    assert "long.jsonl:2" in said and "64" in said and "overlong" in said
    assert "context of 256" in fails("data.max_length=300")


def test_unknown_key_with_the_nearest_and_its_line(fails, folder):
    (folder / "c.yaml").write_text("model: model\ndata:\n  train: train.jsonl\noptim:\n  learning_rat: 1\n")
    said = fails(config="c.yaml")
    assert "c.yaml:5" in said and "learning_rat" in said and "lr" in said
    assert "max_length" in fails("data.max_lenght=3")


@pytest.mark.parametrize("setting", ["lora.r=sixteen", "train.batch_size=2.5", "seed=true", "optim.lr=[1]"])
def test_wrong_types_say_what_was_expected(fails, setting):
    key = setting.partition("=")[0]
    assert key in (said := fails(setting)) and "expected" in said


def test_rank_zero(fails):
    assert "r=0" in (said := fails("lora.r=0")) and "at least 1" in said


def test_target_that_matches_nothing_lists_the_modules(fails):
    said = fails("lora.target_modules=[q_proj, w_proj]")
    assert "w_proj" in said and "gate_proj" in said


def test_settings_without_effect(fails):
    assert "no effect" in fails("optim.momentum=0.9")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_model_folder_without(fails, folder, name):
    (folder / "model" / name).unlink()
    said = fails()
    assert name.split(".")[0].replace("model", "safetensors") in said


def test_model_without_chat_template(fails, folder):
    path = folder / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    assert "chat template" in (said := fails()) and "data.chat_template" in said


def test_vocabulary_mismatch(fails, folder):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    assert "100" in (said := fails()) and "tokenizer" in said


def test_truncated_and_tampered_weights(fails, folder):
    path = folder / "model" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert "model.safetensors" in (said := fails()) and "truncated" in said
    path.write_bytes(data[:8] + b"#" + data[9:])
    assert "model.safetensors" in fails()


def test_unsupported_model_and_field(fails, folder):
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "mamba" in (said := fails()) and "llama" in said and "qwen3" in said
    path.write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert "hidden_act='gelu'" in fails()


def test_missing_model_suggests(fails):
    assert "modle" in fails("model=modle")


def test_mesh_that_does_not_divide(fails):
    assert "fsdp=3" in (said := fails("mesh.fsdp=3")) and "there are 8" in said
    assert "mesh.tp=3" in (said := fails("mesh.fsdp=-1", "mesh.tp=3")) and "1, 2, 4, 8" in said
    assert "num_key_value_heads=2" in fails("mesh.fsdp=2", "mesh.tp=4")


def test_batch_that_does_not_divide(fails):
    assert "microbatches" in fails("train.batch_size=6", "train.microbatches=4")
    assert "mesh.fsdp=8" in fails("train.batch_size=6")


def test_output_that_is_not_ours_is_left_alone(fails, folder):
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("mine")
    assert "not empty" in fails()
    assert (folder / "run" / "thesis.txt").read_text() == "mine"


def test_no_permission(fails):
    assert "cannot write to /proc/run" in fails("output=/proc/run")  # where not even root may


def test_a_file_where_the_output_should_be(fails, folder):
    (folder / "run").write_text("")
    assert "cannot write to run" in fails()


def test_where_checkpoints_cannot_be_kept_is_found_before_anything_is_read(fails, folder, monkeypatch):
    (folder / "file").write_text("")
    for where in ("/proc/x", "file"):
        said = fails(f"checkpoint.directory={where}", "model=/nowhere")
        assert f"cannot write to {(folder / where).absolute()}: " in said
    monkeypatch.setattr(bucket.importlib.util, "find_spec", lambda name: None)
    assert "gs:// needs gcsfs" in fails("checkpoint.directory=gs://b/x", "model=/nowhere")
    assert "/nowhere: no such" in fails("model=/nowhere")  # nothing is left that would be in the way


def test_preference_data_for_sft_and_the_other_way_round(fails, folder):
    write(folder / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 20)
    assert "preference pairs" in fails("data.train=pairs.jsonl")
    assert "no preference pairs" in fails(verb="dpo")
