"""Run configs: what is read, what is refused and with what words."""

import json
import pathlib

import jsonschema
import pytest
import yaml

from ftjax import config
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

BASE = """\
model: some/model
data:
  train: examples.jsonl
  eval_fraction: 0.1
optim:
  lr: 1e-4
lora:
  r: 8
  target_modules: [q_proj, v_proj]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        pathlib.Path("run.yaml").write_text(text)
        return "run.yaml"

    return write


def refused(path, overrides=(), recipe=None):
    with pytest.raises(UserError) as e:
        config.load(path, overrides, recipe)
    return str(e.value)


def test_a_config_with_its_defaults(write):
    c = config.load(write(BASE))
    assert c.optim.lr == 1e-4 and c.lora.r == 8 and c.lora.target_modules == ("q_proj", "v_proj")
    assert c.train.batch_size == 8 and c.output == "runs/run" and c.recipe == "sft"


def test_no_file_is_needed(tmp_path, monkeypatch):
    c = config.load(None, ["model=m", "data.train=d.jsonl"], "dpo")
    assert (c.model, c.data.train, c.output, c.dpo.beta) == ("m", "d.jsonl", "runs/dpo", 0.1)


def test_full_fine_tuning_is_one_key(write):
    assert config.load(write(BASE), ["lora=null"]).lora is None
    again = config.load(write(BASE), ["lora=null", "lora.r=4"]).lora  # later wins
    assert again.r == 4 and again.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-.5", -0.5), ("1.", 1.0), ("3", 3), ("010", 10), ("0x10", 16),
        ("true", True),
        ("null", None), ("~", None), ("", None), ("yes", "yes"), ("off", "off"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"), ("'1'", "1"), ("1_000", "1_000"), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text, value):
    read = config._parse(text, "x", {})
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "value",
    ["1e-4", "true", "yes", "null", "", "2024-01-01", "0x1", "a: b", "ü", "1", 1e-5, 0.1, 7, True, None, [1]],
)
def test_what_is_dumped_is_read_back(value):
    text = yaml.dump({"k": value}, Dumper=config._Dumper, allow_unicode=True)
    assert config._parse(text, "x", {}) == {"k": value}


def test_a_dump_has_every_default_and_loads_to_the_same_run(write):
    for overrides in (
        [],
        ["lora=null"],
        ["optim.name=muon", "optim.schedule=wsd", "train.max_steps=5"],
        ["data.eval_fraction=0", "optim.groups=[{match: a, lr: 2}]"],
    ):
        c = config.load(write(BASE), overrides)
        text = config.dump(c)
        pathlib.Path("dumped.yaml").write_text(text)
        assert config.load("dumped.yaml") == c
        assert "loss_chunk" in text and text.startswith("recipe: sft\n")


def test_differences(write):
    c = config.load(write(BASE))
    pathlib.Path("saved.yaml").write_text(config.dump(c))
    assert config.differences("saved.yaml", c) == []
    saved = pathlib.Path("saved.yaml").read_text()
    pathlib.Path("saved.yaml").write_text(saved.replace("line_seconds: 10.0", "line_seconds: 10"))
    assert saved != pathlib.Path("saved.yaml").read_text()
    assert config.differences("saved.yaml", c) == []
    changes = ["optim.lr=2e-4", "output=elsewhere", "report.every=5", "data.eval_fraction=0"]
    found = config.differences("saved.yaml", config.load(write(BASE), changes), ignore=("report", "eval"))
    assert found == ["data.eval_fraction: 0.1 -> 0.0", "optim.lr: 0.0001 -> 0.0002"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("train:\n  batch_size: true", "run.yaml:11: train.batch_size: expected a whole number, got true"),
        ("train:\n  batch_size: '8'", "train.batch_size: expected a whole number, got the text '8'"),
        ("train:\n  batch_size: 8.0", "train.batch_size: expected a whole number, got 8.0"),
        ("train:\n  epochs: three", "train.epochs: expected a number, got the text 'three'"),
        ("train:\n  dtype: fp16", "train.dtype: expected one of bfloat16, float32, got the text 'fp16'"),
        ("train: 3", "run.yaml:10: train: expected a section with keys like epochs, max_steps, batch_size"),
        ("train:", "train: expected a section with keys like"),
        ("seed: [1]", "run.yaml:10: seed: expected a whole number, got a list of 1"),
        ("output: 3", "output: expected text, got 3"),
        ("optim: {}", "run.yaml:10: optim is given twice, first at run.yaml:5"),
        ("trian: {}", "run.yaml:10: unknown key trian; did you mean train? (a config has: model,"),
        ("lr: 1e-4", "unknown key lr; did you mean optim.lr?"),
        ("lora_r: 3", "unknown key lora_r; did you mean lora?"),
        (
            "train:\n  bach_size: 3",
            "run.yaml:11: unknown key train.bach_size; did you mean train.batch_size? (train has",
        ),
        ("dpo:\n  beta: 1", "unknown key dpo; it belongs to ftjax dpo, this is a config for ftjax sft"),
        (
            "train: {remat: nothing}",
            "expected one of none, act, up, mlp, mlp_offload, attention",
        ),
        ("a: [1, 2", "run.yaml:10: not valid YAML: while parsing a flow sequence expected ',' or ']'"),
        ("\tb: 1", "run.yaml:10: not valid YAML"),
        ("b: !!python/object:os.system x", "run.yaml:10: not valid YAML: could not determine a constructor"),
        (
            "report:\n  to: [wandb, tensorbord]",
            "run.yaml:11: report.to[1]: expected one of wandb, mlflow, trackio",
        ),
    ],
)
def test_bad_values_say_where_and_what_would_be_right(write, more, words):
    assert words in refused(write(BASE + more), recipe="sft")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=fast", "command line (optim.lr=fast): optim.lr: expected a number, got the text 'fast'"),
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("nothing.like.it=1", "command line (nothing.like.it=1): unknown key nothing"),
        ("dpo.beta=1", "command line (dpo.beta=1): unknown key dpo; it belongs to ftjax dpo"),
        ("--lr=1", "a setting is written key.sub=value, like optim.lr=1e-4"),
        ("optim.lr", "a setting is written key.sub=value"),
        ("model.name=x", "model is the text 'some/model' (run.yaml:1), not a section"),
        ("seed=[1", "command line (seed=[1): not valid YAML"),
        ("lora.r=0", "command line (lora.r=0): lora.r=0: a rank is at least 1"),
        ("optim.groups=[{match: a, lr: x}]", "optim.groups[0].lr: expected a number, got the text 'x'"),
        ("optim.groups=[{match: '('}]", "optim.groups[0].match='(' is not a regular expression"),
        (
            "data.train=[{path: a, weigth: 2}]",
            "unknown key data.train[0].weigth; did you mean data.train[0].weight?",
        ),
        ("data.train={path: a}", "data.train: expected text or a list"),
        ("lora.rank_pattern={q: x}", "lora.rank_pattern.q: expected a whole number"),
        ("recipe=dpoo", "recipe: expected dpo or sft, got the text 'dpoo'"),
        ("model=null", "model: expected text, got null"),
    ],
)
def test_bad_overrides(write, override, words):
    assert words in refused(write(BASE), [override], "sft")


def test_overrides_reach_into_lists_and_the_later_wins(write):
    path = write(BASE + "seed: 1\n")
    groups = "optim.groups=[{match: a}, {match: b}]"
    c = config.load(path, [groups, "optim.groups.1.lr=3", "seed=2", "seed=3", "data.format="])
    assert [g.lr for g in c.optim.groups] == [1.0, 3] and c.seed == 3 and c.data.format is None
    assert "optim.groups has 2 entries" in refused(path, [groups, "optim.groups.2.lr=3"])


def test_all_complaints_come_at_once(write):
    message = refused(write("optim:\n  lr: x\nsead: 1\n"))
    for words in (
        "run.yaml:2: optim.lr",
        "run.yaml:3: unknown key sead; did you mean seed?",
        "model is missing: text. The base",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.momentum=0.9"], "optim.momentum has no effect in this run: adamw has none"),
        (["optim.name=sgd", "optim.beta1=0.9"], "optim.beta1 has no effect in this run: sgd does not use it"),
        (["optim.name=lion", "optim.eps=1e-6"], "lion does not use it"),
        (["optim.decay_ratio=0.1"], "optim.decay_ratio has no effect in this run: only schedule: wsd"),
        (["optim.schedule=constant", "optim.final_lr_ratio=0.1"], "a constant schedule does not fall"),
        (["optim.warmup_steps=1", "optim.warmup_ratio=0.1"], "warmup_steps is given, and decides"),
        (["lora=null", "optim.lora_plus_ratio=4"], "lora is null: every weight is tuned"),
        (["recipe=dpo", "train.label_smoothing=0.1"], "dpo.label_smoothing is its own"),
        (["recipe=dpo", "train.z_loss_coef=1e-4"], "the loss of ftjax dpo is of pairs"),
        (["train.max_steps=5", "train.epochs=2"], "train.max_steps is given, and decides"),
        (["data.buckets=[64, 128]"], "data.buckets has no effect in this run: packing is best_fit"),
        (
            ["data.eval=e.jsonl"],
            "run.yaml:4: data.eval_fraction has no effect in this run: data.eval is given",
        ),
        (
            ["data.eval_fraction=0", "eval.every=5"],
            "eval.every has no effect in this run: there is no evaluation data",
        ),
        (["report.project=x"], "report.project has no effect in this run: report.to names no tracker"),
        (["model=.", "revision=main"], "revision has no effect in this run: . is a local path"),
        (
            ["data.format=text", "data.train_on=all"],
            "plain text (data.format: text) is not rendered as a chat",
        ),
        (["data.train=[{path: a, format: chat}]", "data.format=chat"], "every source names its own format"),
        (
            ["data.streaming=true", "data.eval_fraction=0", "data.cache_dir=x"],
            "streamed data is not cached, and there is no data.eval",
        ),
    ],
)
def test_a_setting_without_effect_is_an_error(write, settings, words):
    assert words in refused(write(BASE), settings)
    assert "has no effect" not in str(config.load(write(BASE), []))


@pytest.mark.parametrize(
    "settings",
    [
        ["data.streaming=true", "data.cache_dir=x"],  # evaluation data is tokenised, and cached
        ["data.train=[{path: a, format: chat}]", "data.format=chat"],  # data.eval has that format
    ],
)
def test_what_evaluation_data_uses_has_an_effect(write, settings):
    config.load(write(BASE.replace("eval_fraction: 0.1", "eval: e.jsonl")), settings)


def test_null_where_nothing_is_meant_is_no_setting(write):
    config.load(write(BASE), ["optim.momentum=null", "revision=null"])


def test_the_verb_and_the_config_agree(write):
    path = write(BASE + "recipe: dpo\n")
    assert config.load(path).recipe == "dpo"
    assert "run.yaml:10: this config is for ftjax dpo, not ftjax sft" in refused(path, recipe="sft")


def test_every_key_of_the_effect_table_exists():
    keys = {config._dotted(path) for cls in config.RECIPES.values() for path in config._all_keys(cls)}
    assert {key for names, _, _ in config.NO_EFFECT for key in names} <= keys


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "the config rum.yaml does not exist; did you mean run.yaml?"),
        (lambda p: p.mkdir(), "rum.yaml is a folder; a config is a YAML file"),
        (lambda p: p.write_text("# nothing\n"), "rum.yaml is empty"),
        (
            lambda p: p.write_text("- a\n"),
            "rum.yaml:1: a config is a mapping of keys to values, this is a list of 1",
        ),
        (lambda p: p.write_bytes(b"a: \xff\n"), "rum.yaml is not UTF-8 text"),
        (lambda p: p.write_text("a: &x [*x]\n"), "rum.yaml: an alias that holds itself"),
        (lambda p: p.write_text("? [a]\n: b\n"), "rum.yaml:1: a key must be text"),
    ],
)
def test_bad_files(write, make, words):
    write(BASE)
    make(pathlib.Path("rum.yaml"))
    assert words in refused("rum.yaml")


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_the_schema_describes_every_key_and_fits_what_load_takes(write, recipe):
    tree = config.schema(recipe)
    jsonschema.Draft202012Validator.check_schema(tree)
    jsonschema.validate(config._parse(BASE, "x", {}), tree)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m", "data": {"train": "x"}, "lr": 1}, tree)
    sections = [tree, *tree["$defs"].values()]
    bare = [
        f"{s['title']}.{k}" for s in sections for k, v in s["properties"].items() if not v.get("description")
    ]
    assert bare == []
    assert json.loads(json.dumps(tree)) == tree


def test_no_such_recipe():
    with pytest.raises(UserError, match="there is no recipe 'x'; there are dpo and sft"):
        config.schema("x")


def test_run_args(write):
    c, flags = config.parse_run_args([write(BASE), "seed=5", "--resume"], "sft")
    assert c.seed == 5 and flags == {"overwrite": False, "resume": True}
    c, _ = config.parse_run_args(["model=m", "data.train=d"], "sft")
    assert c.output == "runs/sft"
    for argv, words in (
        ([], "needs a config, or settings"),
        (["--overwrite", "--resume"], "give one of them"),
    ):
        with pytest.raises(UserError, match=words):
            config.parse_run_args(argv, "sft")
