"""Adapters in PEFT's format without PEFT: written, read back, and refused with a reason."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from ftjax import files, lora, peft
from ftjax.errors import UserError

pytestmark = pytest.mark.fast


class NoSource:
    """As much of a source as an adapter's config tells."""

    source, revision, kind = "org/base", "v2", "hf"

    def fingerprint(self):
        return "f" * 64

    def torch_name(self, name):
        return name


def save(folder, config=None, table=None, **options):
    table = table or tiny.model().table
    config = config or lora.LoraConfig(r=4, lora_alpha=7)
    plan = lora.plan(config, table)
    adapters = live(plan, tiny.adapters(plan, table))
    peft.save(folder, plan, adapters, config, table, NoSource(), **options)
    return config, plan, adapters


def live(plan, adapters):
    """Zero where a rank pads."""
    flat = {}
    for path, adapted in plan.items():
        leaf = adapters
        for part in path.split("/"):
            leaf = leaf[part]
        mask = lora.live(adapted) > 0
        a, b = np.asarray(leaf["a"]), np.asarray(leaf["b"])
        lead = len(adapted.lead)
        flat[path + "/a"] = a * mask.reshape(*mask.shape[:lead], *(1,) * (a.ndim - lead - 1), -1)
        flat[path + "/b"] = b * mask.reshape(*mask.shape, *(1,) * (b.ndim - lead - 1))
    return lora.unflatten(flat)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "a")
    return tmp_path / "a"


CONFIGS = {
    "all": dict(r=4, lora_alpha=7, lora_dropout=0.1),
    "patterns": dict(r=4, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, use_rslora=True),
    "alpha": dict(r=4, target_modules=("q_proj", "o_proj"), alpha_pattern={"o_proj": 3}),
    "layers": dict(r=2, target_modules=("v_proj",), layers_to_transform=(0, 2)),
    "one layer": dict(r=2, layers_to_transform=1),
    "regex": dict(r=2, target_modules=r".*\.[02]\.mlp\.(up|down)_proj"),
    "regex in layers": dict(r=2, target_modules=r".*mlp\.(up|down)_proj", layers_to_transform=(1,)),
    "head": dict(r=2, target_modules=("lm_head", "q_proj")),
}


@pytest.mark.parametrize("layout", ["peft", "vllm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_back_in_gives_what_went_out(name, layout, tmp_path):
    model = tiny.model(tie_word_embeddings=False)
    config, plan, adapters = save(
        tmp_path / "a", lora.LoraConfig(**CONFIGS[name]), model.table, layout=layout
    )
    again, plan_again, back = peft.load(tmp_path / "a", model)
    base = tiny.base() | {"lm_head": np.ones((48, 96), np.float32)}
    trees = [lora.merge(lora.attach(base, a, p)) for a, p in ((adapters, plan), (back, plan_again))]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *trees)
    if layout == "vllm":
        assert again.r == again.lora_alpha == 8
        return
    assert plan_again == plan
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert getattr(again, field) == getattr(config, field), field


def test_what_is_written(tmp_path):
    save(tmp_path / "a", card="# card\n", chat_template="{{ x }}")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "org/base" and config["revision"] == "v2"
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    own = json.loads((tmp_path / "a/ftjax.json").read_text())
    assert own["base"] == dict(source="org/base", revision="v2", kind="hf", fingerprint="f" * 64)
    file = files.SafetensorsFile(tmp_path / "a/adapter_model.safetensors")
    assert file.metadata == {"format": "pt"} and len(file.entries) == 2 * 7 * 3
    key = "base_model.model.model.layers.2.self_attn.k_proj.lora_"
    assert file.entries[key + "A.weight"][:2] == (np.float32, (4, 48))
    assert file.entries[key + "B.weight"][:2] == (np.float32, (32, 4))
    assert (tmp_path / "a/README.md").read_text() == "# card\n"
    assert (tmp_path / "a/chat_template.jinja").read_text() == "{{ x }}"


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    table = tiny.model().table
    plan = lora.plan(lora.LoraConfig(r=4), table)
    adapters = jax.tree.map(lambda x: x * np.nan, tiny.adapters(plan, table))
    with pytest.raises(UserError, match="values that are not finite: it was not saved"):
        peft.save(tmp_path / "a", plan, adapters, lora.LoraConfig(r=4), table, NoSource())
    assert not (tmp_path / "a").exists()


def test_an_existing_folder_is_kept(saved):
    with pytest.raises(UserError, match="exists"):
        save(saved)
    save(saved, lora.LoraConfig(r=2), overwrite=True)
    assert peft.load(saved, tiny.model())[0].r == 2


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def views(path):
    file = files.SafetensorsFile(path)
    return [(name, file.view(name)) for name in file.entries]


def without(folder, part):
    path = folder / "adapter_model.safetensors"
    rewrite(path, {n: np.array(x) for n, x in views(path) if part not in n})


def rewrite(path, tensors):
    path.unlink()
    files.write_safetensors(path, {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.__getitem__)


def not_finite(folder):
    file = folder / "adapter_model.safetensors"
    tensors = {n: np.array(x) for n, x in views(file)}
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = np.inf
    rewrite(file, tensors)


BROKEN = {
    "missing": (
        lambda f: without(f, "layers.1."),
        r"missing 14 tensors that adapter_config.json promises: .*layers.1.* and 11 more",
    ),
    "extra": (
        lambda f: edit(f, target_modules=["q_proj"]),
        r"36 tensors that adapter_config.json does not account for in this model: .* and 33 more",
    ),
    "rank": (lambda f: edit(f, r=5), r"lora_A.weight has shape \[4, .*another base model or rank"),
    "kind": (lambda f: edit(f, peft_type="IA3"), "peft_type='IA3' is not supported; supported: LORA"),
    "dora": (lambda f: edit(f, use_dora=True), r"missing 21 tensors .*down_proj.lora_magnitude_vector"),
    "lora bias": (lambda f: edit(f, lora_bias=True), "lora_bias=True is not supported; supported: False"),
    "saved modules": (
        lambda f: edit(f, modules_to_save=["norm"]),
        r"missing 7 tensors .*layers.0.input_layernorm.weight",
    ),
    "parted": (
        lambda f: edit(f, modules_to_save=["lm_head"], ensure_weight_tying=False),
        "ensure_weight_tying=false, PEFT's default: .* was saved untied, .* merge it in PEFT into a",
    ),
    "parted, of another model": (
        lambda f: (edit(f, modules_to_save=["lm_head"]), without(f, "layers.1.")),
        "missing 14 tensors .* the file is incomplete or of another base model",
    ),
    "parted, of another shape": (
        lambda f: edit(f, modules_to_save=["embed_tokens"], r=5),
        r"lora_A.weight has shape \[4, .*another base model or rank",
    ),
    "not finite": (not_finite, r"layers.1.mlp.up_proj.lora_B.weight has values that are not finite"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported"),
    "targets": (
        lambda f: edit(f, target_modules=["c_attn"]),
        "'c_attn',\\) matches no linear layer; the model's",
    ),
    "no targets": (lambda f: edit(f, target_modules=None), "target_modules=None"),
    "bad regex": (lambda f: edit(f, target_modules="(q"), "is not a regular expression"),
    "zero rank": (lambda f: edit(f, r=0), "a rank is at least 1"),
    "broken json": (lambda f: (f / "adapter_config.json").write_text("{\n,"), "adapter_config.json:2"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json: not an adapter"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "truncated",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapter(name, saved):
    change, message = BROKEN[name]
    change(saved)
    with pytest.raises(UserError, match=message):
        peft.load(saved, tiny.model())


def test_another_base(saved):
    with pytest.raises(UserError, match=r"has shape \[80, 4\], this base .* make it \[72, 4\]"):
        peft.load(saved, tiny.model(intermediate_size=72))


def test_what_peft_forgives_is_forgiven(saved, tmp_path, caplog):
    """PEFT lets a target or pattern match nothing, as lists made for several families do."""
    config = json.loads((saved / "adapter_config.json").read_text())
    edit(saved, target_modules=[*config["target_modules"], "c_attn"], rank_pattern={"c_attn": 3})
    peft.load(saved, tiny.model())
    assert "c_attn" in caplog.text
    other = shutil.copytree(saved, tmp_path / "other")
    without(other, "q_proj")
    edit(other, rank_pattern={}, exclude_modules=["q_proj"])
    assert "layers/q" not in peft.load(other, tiny.model())[1]
