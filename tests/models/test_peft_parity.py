"""Every kind of adapter, out to PEFT and in from it: the logits of PEFT's model are ours."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parity import close, make_case, with_peft

from ftjax import files, hf, hf_export, lora, peft, weights
from ftjax.errors import UserError

torch = pytest.importorskip("torch", reason="parity is checked against torch models")
transformers = pytest.importorskip("transformers")
peft_library = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("error:.*adapter keys.*")

EXPERT = r".*experts\.(1\.w1|1\.w3|2\.w3|0\.w2)"
# name -> (case, LoRA's settings, regexes of weights trained whole besides)
KINDS = {
    "dora": ("llama", dict(use_dora=True)),
    "dora, patterns": (
        "llama",
        dict(use_dora=True, use_rslora=True, layers_to_transform=(0, 2), rank_pattern={"k_proj": 2}),
    ),
    "dora, Conv1D": ("gpt2", dict(use_dora=True)),
    "embedding and head": ("llama", dict(target_modules=("q_proj", "embed_tokens", "lm_head"))),
    "dora, embedding": ("llama", dict(use_dora=True, target_modules=("q_proj", "embed_tokens"))),
    "tied embedding": ("llama-tied", dict(target_modules=("q_proj", "embed_tokens"))),
    "tied head": ("llama-tied", dict(target_modules=("q_proj", "lm_head"))),
    "saved": ("llama", dict(target_modules=("q_proj",), modules_to_save=("lm_head", "embed_tokens"))),
    "saved, tied": ("llama-tied", dict(target_modules=("q_proj",), modules_to_save=("embed_tokens",))),
    "saved norms": ("llama", dict(target_modules=("q_proj",), modules_to_save=("norm",))),
    "saved with bias": ("llama-bias-rope3", dict(target_modules=("q_proj",), modules_to_save=("v_proj",))),
    "tokens": ("llama", dict(trainable_token_indices=(1, 5, 7))),
    "tokens of both": (
        "llama",
        dict(trainable_token_indices={"embed_tokens": (1, 5, 7), "lm_head": (2, 5)}),
    ),
    "tokens, tied": ("llama-tied", dict(trainable_token_indices=(1, 5, 7))),
    "bias": ("llama-bias-rope3", dict(target_modules=("q_proj", "down_proj"), bias="all")),
    "bias of the adapted": ("qwen2", dict(target_modules=("q_proj", "o_proj"), bias="lora_only")),
    "bias, Conv1D": ("gpt2", dict(bias="all")),
    "excluded": ("llama", dict(exclude_modules=("v_proj", "model.layers.1.mlp.up_proj"))),
    "pissa": ("llama", dict(init_lora_weights="pissa", rank_pattern={"q_proj": 2})),
    "experts": ("mixtral", dict(target_modules=("w1", "w2", "w3"))),
    "router": ("mixtral", dict(target_modules=("gate", "w2", "q_proj"))),
    "gate alone": ("mixtral", dict(target_modules=("w1", "q_proj"))),
    "some experts": ("mixtral", dict(target_modules=EXPERT, rank_pattern={r"1\.w1": 2, r"0\.w2": 6})),
    "experts, scales": ("mixtral", dict(alpha_pattern={"w1": 3, r"2\.w3": 11, "q_proj": 5}, use_rslora=True)),
    "experts, layers": ("mixtral", dict(layers_to_transform=(1,))),
    "saved experts": ("mixtral", dict(target_modules=("q_proj",), modules_to_save=("experts",))),
    "shared experts": ("qwen2_moe", dict(rank_pattern={"down_proj": 2}, use_rslora=True)),
    "dense layers": ("deepseek_v3", dict(target_modules=("gate_proj", "up_proj", "kv_b_proj"))),
    "transposed experts": ("gpt_oss", dict(rank_pattern={"gate_up_proj": 2})),
    "unmarked experts": ("llama4_text", dict(rank_pattern={"down_proj": 2})),
    # what is beside experts, in or near a module that is wrapped once for each of its parameters
    "experts, bias": ("gpt_oss", dict(bias="all")),
    "experts, bias of the adapted": ("gpt_oss", dict(bias="lora_only")),
    "experts, saved router": ("gpt_oss", dict(exclude_modules=("router",), modules_to_save=("router",))),
    "experts, saved modules in one another": (
        "ernie4_5_moe",
        dict(exclude_modules=("gate",), modules_to_save=("gate",)),
    ),
    "shared experts, saved gate": (
        "qwen3_5_moe_text",
        dict(exclude_modules=("shared_expert_gate",), modules_to_save=("shared_expert_gate",)),
    ),
    "unmarked experts, tokens": (
        "llama4_text",
        dict(trainable_token_indices=(1, 5, 7), modules_to_save=("norm",)),
    ),
    "dense layers, tokens": ("deepseek_v3", dict(trainable_token_indices=(1, 5, 7), bias="all")),
}


def random_tree(case, config, plan):
    """A trainable tree in which all that is trained differs from the base."""
    key, how = jax.random.key(3), config.init_lora_weights
    flat = weights.flatten(lora.init(key, plan, case.model.table, case.params, how))
    rng, out = np.random.default_rng(3), {}
    for path, x in flat.items():
        row, _, leaf = path.rpartition("/")
        one, x = plan[row], np.asarray(x, np.float32)
        noise = rng.normal(size=x.shape).astype(np.float32)
        if leaf in ("a", "a0"):
            mask = lora._live_a(one, len(case.model.table.ins(row)))
            x = noise * mask * (0.1 if case.model.table.rows[row].role != "lookup" else 0.3)
        elif leaf in ("b", "b0"):
            x = noise * lora._live_b(one, len(case.model.table.outs(row))) * 0.2
        elif leaf == "m":
            x = x * (1 + 0.3 * noise)
        elif leaf == "full" and one.live:
            mask = np.reshape(one.live, (*one.lead, *(1,) * (x.ndim - len(one.lead))))
            x = np.where(mask, x + 0.3 * noise, 0)
        else:
            x = x + 0.3 * noise
        out[path] = jnp.asarray(x)
    return weights.unflatten(out)


@pytest.mark.parametrize("name", KINDS)
def test_peft_loads_what_we_save(name, tmp_path_factory, tmp_path):
    family, settings, *whole = KINDS[name]
    case = make_case(family, tmp_path_factory.getbasetemp())
    config = lora.LoraConfig(**dict(r=4, lora_alpha=7) | settings)
    plan = lora.plan(config, case.model.table, *whole)
    assert peft.check(config, plan, case.model.table) is None
    adapters = random_tree(case, config, plan)
    peft.save(tmp_path / "a", plan, adapters, config, case.model.table, case.source)
    forward = jax.jit(case.model.logits)
    ours = forward(lora.attach(case.params, adapters, plan), case.tokens)
    assert np.abs(ours - case.logits).max() > 1e-2  # the adapter does something
    close(ours, case.torch_logits(with_peft(case, tmp_path / "a")))
    # back in it is the same tree
    _, plan, adapters = lora.plain(config, plan, adapters)
    _, plan_again, back = peft.load(tmp_path / "a", case.model, case.source)
    assert plan_again == plan
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), back, adapters)
    # and by what PEFT's files say alone, the same model
    (tmp_path / "a/ftjax.json").unlink()
    _, plan_again, back = peft.load(tmp_path / "a", case.model)
    close(forward(lora.attach(case.params, back, plan_again), case.tokens), ours)


# name -> (case, PEFT's settings)
THEIRS = {
    "transposed experts, bias": (
        "gpt_oss",
        dict(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            bias="all",
        ),
    ),
    "dora": ("llama", dict(use_dora=True, target_modules=["q_proj", "embed_tokens"])),
    "embedding and head": ("llama", dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "tied embedding": ("llama-tied", dict(target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "tied head": ("llama-tied", dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)),
    "saved": ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "saved, tied": (
        "llama-tied",
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "tokens": ("llama-tied", dict(target_modules=["q_proj"], trainable_token_indices=[1, 5])),
    "tokens of both": (
        "llama",
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [7]}),
    ),
    "bias": ("llama-bias-rope3", dict(target_modules=["q_proj", "up_proj"], bias="all")),
    "bias of the adapted": ("qwen2", dict(target_modules=["q_proj", "o_proj"], bias="lora_only")),
    "excluded": ("llama", dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.1\..*")),
    "Conv1D": ("gpt2", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "experts": ("mixtral", dict(target_modules=["q_proj", "gate", "w1", "w2", "w3"])),
    "parameters": (
        "mixtral",
        dict(
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.gate.weight"],
            rank_pattern={"experts.gate_up_proj": 6},
        ),
    ),
    "shared experts": ("qwen2_moe", dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
    "transposed experts": (
        "gpt_oss",
        dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "unmarked experts": (
        "llama4_text",
        dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_what_peft_saves(name, tmp_path_factory, tmp_path):
    family, settings = THEIRS[name]
    case = make_case(family, tmp_path_factory.getbasetemp())
    base = transformers.AutoModelForCausalLM.from_pretrained(case.folder, attn_implementation="eager")
    options = dict(task_type="CAUSAL_LM", r=4, lora_alpha=7) | settings
    theirs = peft_library.get_peft_model(base, peft_library.LoraConfig(**options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for _, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "a")
    config, plan, adapters = peft.load(tmp_path / "a", case.model)
    assert lora.plan(config, case.model.table) == plan
    ours = jax.jit(case.model.logits)(lora.attach(case.params, adapters, plan), case.tokens)
    assert np.abs(ours - case.logits).max() > 1e-2
    close(ours, case.torch_logits(theirs))


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_adapters_for_vllm(family, tmp_path_factory, tmp_path):
    """By the checkpoint's names, which PEFT converts, with one rank."""
    case = make_case(family, tmp_path_factory.getbasetemp())
    config = lora.LoraConfig(r=4, lora_alpha=7, rank_pattern={"o_proj": 3}, use_rslora=True)
    plan = lora.plan(config, case.model.table)
    adapters = random_tree(case, config, plan)
    peft.save(tmp_path / "a", plan, adapters, config, case.model.table, case.source, layout="vllm")
    file = files.SafetensorsFile(tmp_path / "a" / peft.WEIGHTS)
    names = {name for path in plan for name in case.model.table.names(path)}
    ends = {f"base_model.model.{weights.module_of(n)}.lora_{x}.weight" for n in names for x in "AB"}
    assert set(file.entries) == ends
    assert {min(shape) for _, shape, *_ in file.entries.values()} == {8}
    written = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert written["r"] == written["lora_alpha"] == 8 and not written["target_parameters"]
    assert not written["rank_pattern"] and not written["alpha_pattern"] and not written["use_rslora"]
    ours = jax.jit(case.model.logits)(lora.attach(case.params, adapters, plan), case.tokens)
    close(ours, case.torch_logits(with_peft(case, tmp_path / "a")))


def test_experts_in_one_tensor_for_vllm(tmp_path_factory, tmp_path):
    """As vLLM's 3-D loader reads them: A [experts · rank, in] and B [out, rank · experts], gate and up under
    `experts.base_layer`, down under `experts`; with one rank and scale 1."""
    case = make_case("gpt_oss", tmp_path_factory.getbasetemp())
    table = case.model.table
    config = lora.LoraConfig(r=4, lora_alpha=7, rank_pattern={"gate_up_proj": 3}, use_rslora=True)
    plan = lora.plan(config, table)
    adapters = random_tree(case, config, plan)
    peft.save(tmp_path / "a", plan, adapters, config, table, case.source, layout="vllm")
    written = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert written["r"] == written["lora_alpha"] == 8 and not written["use_rslora"]
    assert not written["rank_pattern"] and not written["alpha_pattern"]
    file = files.SafetensorsFile(tmp_path / "a" / peft.WEIGHTS)
    flat, experts = weights.flatten(adapters), case.source.config["num_local_experts"]
    for name, inside in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        path = next(p for p in plan if table.rows[p].hf.endswith("experts." + name))
        key = f"base_model.model.model.layers.1.mlp.experts{inside}.lora_"
        a, b = file.view(key + "A.weight"), file.view(key + "B.weight")
        assert a.shape[0] == b.shape[1] == experts * 8
        a, b = a.reshape(experts, 8, -1), b.reshape(len(b), 8, experts)
        theirs = np.einsum("eri,ore->eio", a, b)
        one: Any = plan[path]
        scale = np.reshape(one.scales, one.lead)[1, 0]
        ours = np.einsum("ei...r,er...o->ei...o", flat[path + "/a"][1], flat[path + "/b"][1]) * scale
        np.testing.assert_allclose(theirs, ours.reshape(theirs.shape), atol=1e-5)
    forward = jax.jit(case.model.logits)
    ours = forward(lora.attach(case.params, adapters, plan), case.tokens)
    close(ours, case.torch_logits(with_peft(case, tmp_path / "a")))
    _, plan_again, back = peft.load(tmp_path / "a", case.model, case.source)
    close(forward(lora.attach(case.params, back, plan_again), case.tokens), ours)
    config = lora.LoraConfig(r=4, target_modules=("q_proj", "experts.down_proj"))
    plan = lora.plan(config, table)
    with pytest.raises(peft.Inexpressible, match="both of a layer's expert tensors or of neither: a merged"):
        adapters = random_tree(case, config, plan)
        peft.save(tmp_path / "b", plan, adapters, config, table, case.source, layout="vllm")


class Named:
    """A source whose config has another class."""

    def __init__(self, source, architecture):
        self.source_, self.config = source, source.config | {"architectures": [architecture]}

    def __getattr__(self, name):
        return getattr(self.source_, name)


def test_experts_apart_that_vllm_takes_in_one_tensor(tmp_path_factory, tmp_path):
    """vLLM's class of Qwen3.5 MoE with images has the 3-D loader, whatever the checkpoint has: gate and up
    side by side in one adapter."""
    case = make_case("qwen3_5_moe_text", tmp_path_factory.getbasetemp())
    config = lora.LoraConfig(r=5, lora_alpha=7, use_rslora=True)
    plan = lora.plan(config, case.model.table)
    adapters = random_tree(case, config, plan)
    source: Any = Named(case.source, "Qwen3_5MoeForConditionalGeneration")
    peft.save(tmp_path / "a", plan, adapters, config, case.model.table, source, layout="vllm")
    file = files.SafetensorsFile(tmp_path / "a" / peft.WEIGHTS)
    experts = {n.split(".mlp.experts")[1]: s for n, (_, s, *_) in file.entries.items() if ".experts" in n}
    count = case.source.config["num_experts"]
    assert set(experts) == {f"{x}.lora_{y}.weight" for x in (".base_layer", "") for y in "AB"}
    assert experts[".base_layer.lora_A.weight"][0] == experts[".lora_A.weight"][0] == count * 16
    assert json.loads((tmp_path / "a" / peft.CONFIG).read_text())["r"] == 16
    ours = jax.jit(case.model.logits)(lora.attach(case.params, adapters, plan), case.tokens)
    close(ours, case.torch_logits(with_peft(case, tmp_path / "a")))


@pytest.mark.parametrize("family", ["llama4_text", "granitemoe"])
def test_experts_that_vllm_is_not_known_to_take(family, tmp_path_factory, tmp_path):
    case = make_case(family, tmp_path_factory.getbasetemp())
    config = lora.LoraConfig(r=4)
    plan = lora.plan(config, case.model.table)
    adapters = random_tree(case, config, plan)
    args = (adapters, config, case.model.table, case.source)
    with pytest.raises(peft.Inexpressible, match=r"experts, which are one tensor \(.*: a merged"):
        peft.save(tmp_path / "a", plan, *args, layout="vllm")
    # of the same model what is no expert is taken
    config = lora.LoraConfig(r=4, target_modules=("q_proj", "o_proj"))
    plan = lora.plan(config, case.model.table)
    adapters = random_tree(case, config, plan)
    peft.save(tmp_path / "b", plan, adapters, config, case.model.table, case.source, layout="vllm")
    ours = jax.jit(case.model.logits)(lora.attach(case.params, adapters, plan), case.tokens)
    close(ours, case.torch_logits(with_peft(case, tmp_path / "b")))


# name -> (case, settings, regexes of weights trained whole, what is said)
CANNOT = {
    "dora of experts": ("mixtral", dict(use_dora=True), (), "PEFT has no DoRA for parameters"),
    "tied dora": (
        "llama-tied",
        dict(use_dora=True, target_modules=("embed_tokens",)),
        (),
        "DoRA of a tied embedding and head",
    ),
    "no factors": ("llama", dict(target_modules=()), ("norm",), "factors on one module at least"),
    "a bias alone": ("llama-bias-rope3", dict(), (r"q_proj\.bias",), "q_proj.bias is part of one"),
    "a bare parameter": ("gpt_oss", dict(target_modules=("q_proj",)), ("sinks",), "sinks is part of one"),
    "a bare parameter and experts": ("gpt_oss", dict(), ("sinks",), "sinks is part of one"),
    "one of two": ("mixtral", dict(target_modules=("w1",)), (r"w3",), "w3 are one tensor to PEFT"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_peft_cannot_say(name, tmp_path_factory, tmp_path, caplog):
    family, settings, whole, message = CANNOT[name]
    case = make_case(family, tmp_path_factory.getbasetemp())
    config = lora.LoraConfig(**dict(r=4, lora_alpha=7) | settings)
    plan = lora.plan(config, case.model.table, whole)
    adapters = random_tree(case, config, plan)
    args = (plan, adapters, config, case.model.table, case.source)
    with pytest.raises(peft.Inexpressible, match=message) as said:
        peft.save(tmp_path / "a", *args)
    assert peft.check(config, plan, case.model.table) == str(said.value)  # known before training
    assert "merge" in str(said.value) and not (tmp_path / "a").exists()
    # our own layout holds it all, and PEFT does not take it for one of its own
    peft.save_run(tmp_path / "b", *args)
    assert "which PEFT does not read" in caplog.text
    config_again, plan_again, back = peft.load(tmp_path / "b", case.model, case.source)
    assert (config_again, plan_again) == (config, plan)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    with pytest.raises((KeyError, ValueError, TypeError)):
        with_peft(case, tmp_path / "b")


REFUSED = {
    "DoRA": dict(use_dora=True),
    "weights trained whole": dict(modules_to_save=("norm",)),
    "trained token rows": dict(trainable_token_indices=(3,)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_does_not_take(name, tmp_path_factory, tmp_path):
    case = make_case("llama", tmp_path_factory.getbasetemp())
    config = lora.LoraConfig(r=4, **REFUSED[name])
    plan = lora.plan(config, case.model.table)
    with pytest.raises(peft.Inexpressible, match=f"vLLM's .* does not take {name}: a merged export does"):
        tree = random_tree(case, config, plan)
        peft.save(tmp_path / "a", plan, tree, config, case.model.table, case.source, layout="vllm")


def test_an_adapter_of_other_weights(tmp_path_factory, tmp_path):
    root = tmp_path_factory.getbasetemp()
    case, other = make_case("llama", root), make_case("llama-linear", root)
    config = lora.LoraConfig(r=4)
    plan = lora.plan(config, case.model.table)
    peft.save(tmp_path / "a", plan, random_tree(case, config, plan), config, case.model.table, case.source)
    params = jax.tree.map(lambda x: x * 2, other.params)
    hf_export.save_model(tmp_path / "other", other.model, params, other.source)
    source = hf.open_model(tmp_path / "other")
    with pytest.raises(UserError, match=f"trained on {case.source.source} .* not on {source.source}"):
        peft.load(tmp_path / "a", other.model, source)
    peft.load(tmp_path / "a", case.model, case.source)
