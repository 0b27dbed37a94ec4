"""Every family in the registry against transformers and PEFT, on tiny models with odd numbers.

The functions in PROOFS are the columns of the README's table; each runs on every family (`tests/models/
cases.py`), and `proofs.py` beside makes the table of what passed.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILIES, VARIANTS, WHOLE
from cases import LENGTH as T
from cases import config as case_config

from ftjax import files, hf, hf_export, lora, mesh, models, peft, weights

torch = pytest.importorskip(
    "torch", reason="parity is checked against torch models, and torch is not installed"
)
transformers = pytest.importorskip("transformers")

LORA = lora.LoraConfig(r=4, lora_alpha=7)  # on every linear layer


@dataclasses.dataclass
class Case:
    name: str
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

    @functools.cached_property
    def forward(self):
        """(params, tokens, positions, segments) -> logits, compiled once for all proofs."""
        return jax.jit(self.model.logits)

    @functools.cached_property
    def plain(self):
        """Positions and segments of rows that are one document each."""
        positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
        return positions, np.ones((2, T), np.int32)

    @functools.cached_property
    def plan(self):
        return lora.plan(LORA, self.model.table)

    @functools.cached_property
    def adapters(self):
        return random_adapters(self.plan, self.model.table)

    @functools.cached_property
    def loss_and_grads(self):
        """(adapters, base, tokens) -> ((summed next-token loss, logits), gradient of the adapters)."""

        def loss(adapters, base, tokens):
            logits = self.model.logits(lora.attach(base, adapters, self.plan), tokens)
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).sum(), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    @functools.cached_property
    def tuned(self):
        """((loss, logits), gradients) on one device."""
        return jax.device_get(self.loss_and_grads(self.adapters, self.params, self.tokens))


@pytest.fixture(scope="module", params=[*FAMILIES, *VARIANTS])
def case(request, tmp_path_factory) -> Case:
    return make_case(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=[*FAMILIES, *WHOLE])
def family(request, tmp_path_factory) -> Case:
    return make_case(request.param, tmp_path_factory.getbasetemp())


@functools.cache
def make_case(name: str, root: Path) -> Case:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**case_config(name))
    config._attn_implementation = "eager"
    reference = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    saved = set(reference.state_dict())  # the other buffers are constants: frequencies, Gemma's scale
    with torch.no_grad():  # norms of ones and biases of zeros would hide mistakes
        for key, p in [*reference.named_parameters(), *reference.named_buffers()]:
            if key not in saved or "A_log" in key or not p.is_floating_point():
                continue
            if "norm" in key or "ln_" in key or "layer_scalar" in key:
                p.add_(0.3 * torch.randn_like(p))  # 1, or 0 where the scale is 1 + the weight
                if "gemma4" in name and ("q_norm" in key or "k_norm" in key):
                    p.mul_(0.3)  # its attention has no scale but theirs
            elif p.ndim < 2:
                p.copy_(0.3 * torch.randn_like(p))
            elif "bias" in key:
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.mul_(4.0)
    folder = root / f"parity-{name}"
    reference.save_pretrained(folder)
    source = hf.open_model(folder)
    model = models.from_config(source.config)
    params = hf.load_params(source, model)
    vocab = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (2, T)).astype(np.int32)
    out = Case(name, folder, reference, source, model, params, tokens, np.zeros(0))
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
    flat = weights.flatten(tree)
    rng = np.random.default_rng(seed)
    for path, adapted in plan.items():
        b = rng.normal(size=flat[path + "/b"].shape).astype(np.float32) * 0.2
        mask = lora.live(adapted)
        flat[path + "/b"] = jnp.asarray(b * mask.reshape(*mask.shape, *(1,) * (b.ndim - mask.ndim)))
    return weights.unflatten(flat)


def test_no_family_is_left_out():
    assert set(FAMILIES) == set(models.REGISTRY)


# -- The forward pass, on families and variants


def test_logits(case):
    with jax.numpy_dtype_promotion("strict"):
        ours = case.forward(case.params, case.tokens, *case.plain)
    close(ours, case.logits)


def test_export_is_import(case, tmp_path):
    saved = hf_export.save_model(tmp_path / "out", case.model, case.params, case.source)
    again = hf.open_model(tmp_path / "out")
    extra = set(case.source.names()) - set(again.names())
    assert extra <= {"lm_head.weight"} and set(again.names()) <= set(case.source.names())
    for name in again.names():
        assert again.dtype(name) == case.source.dtype(name)
        assert again.get(name).tobytes() == case.source.get(name).tobytes(), name
    assert (tmp_path / "out/config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    assert "generation_config.json" in saved.files
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    close(case.torch_logits(reference), case.logits, 1e-6)


def test_cached_decode(case):
    """Two prompts of unequal length, padded on the left, decoded one token at a time past any window."""
    pad = 5
    tokens, (positions, segments) = case.tokens.copy(), map(np.copy, case.plain)
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
    """Both rows hold the beginnings of both documents, in turns, and padding."""
    a, b = 9, T - 9 - 2
    cut = lambda x, n: x[:n]  # noqa: E731
    packed = np.stack(
        [
            np.r_[cut(case.tokens[0], a), cut(case.tokens[1], b), [0, 0]],
            np.r_[cut(case.tokens[1], b), cut(case.tokens[0], a), [0, 0]],
        ]
    ).astype(np.int32)
    segments = np.array([[1] * a + [2] * b + [0] * 2, [1] * b + [2] * a + [0] * 2], np.int32)
    positions = np.stack(
        [np.r_[np.arange(a), np.arange(b), [0, 0]], np.r_[np.arange(b), np.arange(a), [0, 0]]]
    ).astype(np.int32)
    ours = case.forward(case.params, packed, positions, segments)
    close(ours[0, :a], case.logits[0, :a])
    close(ours[0, a : a + b], case.logits[1, :b])
    close(ours[1, :b], case.logits[1, :b])
    close(ours[1, b : a + b], case.logits[0, :a])


# -- LoRA on every linear layer, on families


@pytest.mark.filterwarnings("error:.*adapter keys.*")
def test_adapter_through_peft(family, tmp_path):
    peft.save(tmp_path / "a", family.plan, family.adapters, LORA, family.model.table, family.source)
    (_, ours), _ = family.tuned
    assert np.abs(ours - family.logits).max() > 1e-2  # the adapter does something
    close(ours, family.torch_logits(with_peft(family, tmp_path / "a")))
    again, plan_again, back = peft.load(tmp_path / "a", family.model)
    assert plan_again == family.plan and (again.r, again.lora_alpha) == (4, 7)
    assert jax.tree.structure(back) == jax.tree.structure(family.adapters)
    jax.tree.map(np.testing.assert_array_equal, back, family.adapters)


def test_merged_export(family, tmp_path):
    (_, ours), _ = family.tuned
    tree = lora.attach(family.params, family.adapters, family.plan)
    saved = hf_export.save_model(
        tmp_path / "m",
        family.model,
        None,
        family.source,
        plan=family.plan,
        adapters=family.adapters,
        check=hf_export.probe(family.model, tree),
    )
    assert saved.drift.max_logit < 1e-3 and saved.drift.agree == 1.0 and saved.rounding < 1e-3
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    close(ours, family.torch_logits(reference.eval()))


def test_gradients(family, tmp_path):
    """Of one LoRA step, against PyTorch's through PEFT."""
    peft.save(tmp_path / "a", family.plan, family.adapters, LORA, family.model.table, family.source)
    module = with_peft(family, tmp_path / "a")
    for key, p in module.named_parameters():
        p.requires_grad_("lora_" in key)
    tokens = torch.tensor(family.tokens).long()
    logp = torch.log_softmax(module(tokens).logits[:, :-1], -1)
    (-logp.gather(-1, tokens[:, 1:, None]).sum()).backward()
    theirs = {
        key.replace(".default", ""): p.grad.numpy() for key, p in module.named_parameters() if p.requires_grad
    }
    _, grads = family.tuned
    write = lambda tree: peft.to_peft(family.plan, weights.flatten(tree), family.model.table)  # noqa: E731
    ours, ones = write(grads), write(jax.tree.map(np.ones_like, grads))
    assert set(ours) == set(theirs)
    for key, grad in theirs.items():
        close(ours[key], grad * ones[key], 1e-4)  # what PEFT fuses has blocks that are not ours


def test_mesh(family):
    """Loss, logits and gradients of a LoRA step with FSDP over four devices and TP over two."""
    table = family.model.table
    devices = mesh.make_mesh(mesh.MeshOptions(fsdp=4, tp=2), jax.devices()[:8])
    shardings = weights.shardings(table, mesh.WEIGHT_RULES, devices)
    params = hf.load_params(family.source, family.model, shardings=shardings)
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    assert split > len(table.rows) / 3
    adapters = jax.device_put(family.adapters, mesh.adapter_shardings(devices, family.plan, table))
    twice = np.tile(family.tokens, (2, 1))
    with mesh.use(devices):
        (loss, logits), grads = family.loss_and_grads(adapters, params, twice)
    (loss_1, logits_1), grads_1 = family.tuned
    close(loss, 2 * loss_1)
    close(logits, np.tile(logits_1, (2, 1, 1)))
    jax.tree.map(lambda a, b: close(a, 2 * b, 1e-4), grads, grads_1)


# -- PEFT's settings, on one family

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
@pytest.mark.parametrize("name", [n for n in LORA_CASES if n != "all"])
def test_peft_loads_every_setting(name, tmp_path_factory, tmp_path):
    case = make_case("llama", tmp_path_factory.getbasetemp())
    check_peft_loads(case, lora.LoraConfig(**LORA_CASES[name]), tmp_path / "a")
    check_peft_loads(case, lora.LoraConfig(**LORA_CASES[name]), tmp_path / "b", layout="vllm")
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
    a, b = (files.SafetensorsFile(tmp_path / x / peft.WEIGHTS) for x in ("theirs", "ours"))
    assert set(a.entries) == set(b.entries)
    for key in a.entries:
        np.testing.assert_array_equal(a.view(key), b.view(key))


def test_a_tied_head_stays_tied(tmp_path_factory, tmp_path):
    case = make_case("llama-tied", tmp_path_factory.getbasetemp())
    params = case.params | {"embed": case.params["embed"] * 1.5}
    hf_export.save_model(
        tmp_path / "m", case.model, params, case.source, check=hf_export.probe(case.model, params)
    )
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
    files.write_safetensors(folder / "model.safetensors", entries, get)
    hf.load_params(hf.open_model(folder), case.model)
