"""Every architecture against transformers and PEFT, on tiny models with odd numbers."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import hf, lora, mesh, models, peft, weights

torch = pytest.importorskip(
    "torch", reason="parity is checked against torch models, and torch is not installed"
)
transformers = pytest.importorskip("transformers")

BASE = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=3e-5,
    max_position_embeddings=128,
    rope_theta=12345.0,
    tie_word_embeddings=False,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
CASES = {
    "llama": dict(model_type="llama"),
    "llama-tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama-bias-rope3": dict(model_type="llama", attention_bias=True, rope_scaling=LLAMA3),
    "llama-linear": dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=3.0)),
    "mistral": dict(model_type="mistral", sliding_window=7),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2-window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(model_type="qwen3", head_dim=24),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
T = 23  # longer than any window


@dataclasses.dataclass
class Case:
    folder: Path  # as transformers saved it
    reference: torch.nn.Module
    source: hf.Source
    model: models.Model
    params: dict
    tokens: np.ndarray
    logits: np.ndarray  # the reference's

    def torch_logits(self, module, tokens=None):
        with torch.no_grad():
            tokens = torch.tensor(self.tokens if tokens is None else tokens)
            return module(tokens.long()).logits.numpy()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    return make_case(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Case:
    return make_case(request.param, tmp_path_factory.getbasetemp())


@functools.cache
def make_case(name: str, root: Path) -> Case:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**BASE | CASES[name])
    config._attn_implementation = "eager"
    reference = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for key, p in reference.named_parameters():  # norms of ones and biases of zeros would hide mistakes
            if "norm" in key:
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif "bias" in key:
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.mul_(4.0)
    folder = root / f"parity-{name}"
    reference.save_pretrained(folder)
    source = hf.open_model(folder)
    model = models.from_config(source.config)
    params = hf.load_params(source, model)
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, T)).astype(np.int32)
    out = Case(folder, reference, source, model, params, tokens, np.zeros(0))
    out.logits = out.torch_logits(reference)
    return out


def close(ours, theirs, tolerance=1e-5):
    """Largest difference relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, error


def random_adapters(plan, table, seed=3):
    tree = lora.init(jax.random.key(seed), plan, table)
    live = {path: adapted for path, adapted in plan.items()}
    flat = weights.flatten(tree)
    rng = np.random.default_rng(seed)
    for path, adapted in live.items():
        b = rng.normal(size=flat[path + "/b"].shape).astype(np.float32) * 0.2
        mask = lora._live(adapted)
        flat[path + "/b"] = jnp.asarray(b * mask.reshape(*mask.shape, *(1,) * (b.ndim - mask.ndim)))
    return weights.unflatten(flat)


def test_logits(case):
    with jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(case.model.logits)(case.params, case.tokens)
    close(ours, case.logits)


def test_export_is_import_reversed(case, tmp_path):
    saved = hf.save_model(tmp_path / "out", case.model, case.params, case.source)
    again = hf.open_model(tmp_path / "out")
    extra = set(case.source.names()) - set(again.names())
    assert extra <= {"lm_head.weight"} and set(again.names()) <= set(case.source.names())
    for name in again.names():
        assert again.dtype(name) == case.source.dtype(name)
        assert again.get(name).tobytes() == case.source.get(name).tobytes(), name
    assert (tmp_path / "out/config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    assert "generation_config.json" in saved.files
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(case.torch_logits(reference), case.logits, 1e-6)


def test_ragged_cached_decode_equals_forward(case):
    """Two prompts of unequal length, padded on the left, decoded one token at a time past any window."""
    pad = 5
    tokens, segments = case.tokens.copy(), np.ones((2, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    tokens[1] = np.r_[np.zeros(pad, np.int32), case.tokens[1, : T - pad]]
    segments[1, :pad] = 0
    positions[1] = np.r_[np.zeros(pad, np.int32), np.arange(T - pad)]
    step = jax.jit(case.model.__call__)
    cache, hidden, at = case.model.init_cache(2, T + 3), [], 0
    for n in (15, *(1,) * (T - 15)):
        now = slice(at, at + n)
        h, cache, _ = step(case.params, tokens[:, now], positions[:, now], segments[:, now], cache)
        hidden.append(h)
        at += n
    ours = case.model.unembed(case.model.head(case.params), jnp.concatenate(hidden, 1))
    close(ours[0], case.logits[0])
    close(ours[1, pad:], case.logits[1, : T - pad])


def test_packed_equals_single(case):
    a, b = 9, 14
    packed = np.r_[case.tokens[0, :a], case.tokens[1, :b]][None]
    segments = np.r_[np.full(a, 1), np.full(b, 2)][None].astype(np.int32)
    positions = np.r_[np.arange(a), np.arange(b)][None].astype(np.int32)
    ours = jax.jit(case.model.logits)(case.params, packed, positions, segments)[0]
    close(ours[:a], case.logits[0, :a])
    close(ours[a:], case.logits[1, :b])


def test_mesh_equals_one_device(case):
    devices = mesh.make_mesh(mesh.MeshOptions(fsdp=2, tp=2), jax.devices()[:4])
    shardings = weights.shardings(case.model.table, mesh.WEIGHT_RULES, devices)
    params = hf.load_params(case.source, case.model, shardings=shardings)
    leaf = params["layers"]["q"]
    assert {s.data.shape for s in leaf.addressable_shards} == {(3, 24, 2, leaf.shape[-1])}
    with mesh.use(devices):
        ours = jax.jit(case.model.logits)(params, case.tokens)
    close(ours, case.logits)


# -- LoRA against PEFT

LORA_CASES = {
    "all": dict(r=4, lora_alpha=7),
    "rslora": dict(r=4, lora_alpha=7, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "patterns": dict(
        r=4,
        lora_alpha=7,
        target_modules=("q_proj", "v_proj", "o_proj", "up_proj"),
        rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
        alpha_pattern={"up_proj": 3, r"model\.layers\.2\.self_attn\.o_proj": 11},
    ),
    "layers": dict(r=3, lora_alpha=5, target_modules=("q_proj", "gate_proj"), layers_to_transform=(0, 2)),
    "regex": dict(r=3, lora_alpha=5, target_modules=r".*layers\.[12]\.(self_attn|mlp)\.(k|o|down)_proj"),
}


def tuned(case, config):
    plan = lora.plan(config, case.model.table)
    adapters = random_adapters(plan, case.model.table)
    return plan, adapters, lora.attach(case.params, adapters, plan)


def with_peft(case, folder):
    """The reference model with the adapter in `folder`; every warning that PEFT gives about its keys
    fails."""
    peft_library = pytest.importorskip("peft", reason="peft is not installed")
    base = transformers.AutoModelForCausalLM.from_pretrained(case.folder, attn_implementation="eager")
    return peft_library.PeftModel.from_pretrained(base, folder).eval()


def check_peft_loads(case, config, folder, **options):
    plan, adapters, tree = tuned(case, config)
    peft.save(folder, plan, adapters, config, case.model.table, case.source, **options)
    ours = jax.jit(case.model.logits)(tree, case.tokens)
    assert np.abs(ours - case.logits).max() > 1e-2  # the adapter does something
    close(ours, case.torch_logits(with_peft(case, folder)))
    return plan, adapters, tree


@pytest.mark.filterwarnings("error:.*adapter keys.*")
def test_peft_loads_our_adapter_and_back(family, tmp_path):
    config = lora.LoraConfig(r=4, lora_alpha=7)
    plan, adapters, _ = check_peft_loads(family, config, tmp_path / "a")
    again, plan_again, back = peft.load(tmp_path / "a", family.model)
    assert plan_again == plan and (again.r, again.lora_alpha) == (4, 7)
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


@pytest.mark.filterwarnings("error:.*adapter keys.*")
@pytest.mark.parametrize("name", [n for n in LORA_CASES if n != "all"])
def test_peft_loads_every_setting(name, tmp_path_factory, tmp_path):
    case = make_case("llama", tmp_path_factory.getbasetemp())
    check_peft_loads(case, lora.LoraConfig(**LORA_CASES[name]), tmp_path / "a")
    check_peft_loads(case, lora.LoraConfig(**LORA_CASES[name]), tmp_path / "b", portable=True)
    written = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] and not written["use_rslora"] and not written["rank_pattern"]


@pytest.mark.parametrize("name", LORA_CASES)
def test_we_load_what_peft_saved(name, tmp_path_factory, tmp_path):
    peft_library = pytest.importorskip("peft", reason="peft is not installed")
    case = make_case("llama", tmp_path_factory.getbasetemp())
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in LORA_CASES[name].items()}
    options.setdefault("target_modules", "all-linear")
    base = transformers.AutoModelForCausalLM.from_pretrained(case.folder, attn_implementation="eager")
    theirs = peft_library.get_peft_model(
        base, peft_library.LoraConfig(task_type="CAUSAL_LM", **options)
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_B" in key:
                p.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    config, plan, adapters = peft.load(tmp_path / "theirs", case.model)
    assert config.r == options["r"] and config.use_rslora == options.get("use_rslora", False)
    ours = jax.jit(case.model.logits)(lora.attach(case.params, adapters, plan), case.tokens)
    close(ours, case.torch_logits(theirs))
    # and what we then save is what PEFT saved
    peft.save(tmp_path / "ours", plan, adapters, config, case.model.table, case.source)
    a, b = (hf.SafetensorsFile(tmp_path / x / peft.WEIGHTS) for x in ("theirs", "ours"))
    assert set(a.entries) == set(b.entries)
    for key in a.entries:
        np.testing.assert_array_equal(a.view(key), b.view(key))


def test_merged_export_gives_our_logits(family, tmp_path):
    plan, adapters, tree = tuned(family, lora.LoraConfig(r=4, lora_alpha=7))
    check = hf.probe(family.model, tree)
    saved = hf.save_model(
        tmp_path / "m", family.model, None, family.source, plan=plan, adapters=adapters, check=check
    )
    assert saved.drift.max_logit < 1e-3 and saved.drift.agree == 1.0 and saved.rounding < 1e-3
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    close(jax.jit(family.model.logits)(tree, family.tokens), family.torch_logits(reference.eval()))


def test_gradients_of_a_lora_step_equal_pytorch(family, tmp_path):
    config = lora.LoraConfig(r=4, lora_alpha=7)
    plan, adapters, _ = tuned(family, config)
    peft.save(tmp_path / "a", plan, adapters, config, family.model.table, family.source)
    module = with_peft(family, tmp_path / "a")
    for key, p in module.named_parameters():
        p.requires_grad_("lora_" in key)
    tokens = torch.tensor(family.tokens).long()
    logp = torch.log_softmax(module(tokens).logits[:, :-1], -1)
    (-logp.gather(-1, tokens[:, 1:, None]).sum()).backward()
    theirs = {
        key.replace(".default", ""): p.grad.numpy() for key, p in module.named_parameters() if p.requires_grad
    }

    def loss(adapters, base):
        logits = family.model.logits(lora.attach(base, adapters, plan), family.tokens)[:, :-1]
        logp = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logp, family.tokens[:, 1:, None], -1).sum()

    ours = weights.flatten(jax.jit(jax.grad(loss))(adapters, family.params))
    ours = peft._to_peft(plan, {k: np.asarray(v) for k, v in ours.items()}, family.model.table)
    assert set(ours) == set(theirs)
    for key, grad in theirs.items():
        close(ours[key], grad, 1e-4)


def test_a_tied_head_stays_tied(tmp_path_factory, tmp_path):
    case = make_case("llama-tied", tmp_path_factory.getbasetemp())
    params = case.params | {"embed": case.params["embed"] * 1.5}
    hf.save_model(tmp_path / "m", case.model, params, case.source, check=hf.probe(case.model, params))
    assert "lm_head.weight" not in hf.open_model(tmp_path / "m").names()
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    close(jax.jit(case.model.logits)(params, case.tokens), case.torch_logits(reference))
    # a head written beside its twin is ignored where the two agree
    folder = tmp_path / "twice"
    shutil.copytree(tmp_path / "m", folder)
    source = hf.open_model(tmp_path / "m")
    names = [*source.names(), "lm_head.weight"]
    embed = "model.embed_tokens.weight"
    entries = {n: (source.shape(n if n != names[-1] else embed), np.dtype(np.float32)) for n in names}
    get = lambda n: source.get(n if n != "lm_head.weight" else embed)  # noqa: E731
    hf.write_safetensors(folder / "model.safetensors", entries, get)
    hf.load_params(hf.open_model(folder), case.model)
