"""Every kind of adapter against PEFT: values and gradients of tiny models, with PEFT's own tensors put into
our tree by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import hf, lora, models, weights
from ftjax.ops import grouped, linear

torch = pytest.importorskip(
    "torch", reason="adapters are checked against torch models, and torch is not installed"
)
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="adapters are checked against peft, and it is not installed")

BASE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=3e-5,
)
T = 13


@dataclasses.dataclass
class Case:
    folder: str
    model: models.Model
    params: dict
    tokens: np.ndarray
    reference: torch.nn.Module


@functools.cache
def make_case(kind: str, root) -> Case:
    torch.manual_seed(1)
    changes = {
        "untied": dict(model_type="llama", attention_bias=True, tie_word_embeddings=False),
        "tied": dict(model_type="llama", attention_bias=False, tie_word_embeddings=True),
        "experts": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    }[kind]
    config = transformers.AutoConfig.for_model(**BASE | changes)
    config._attn_implementation = "eager"
    reference = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for key, p in reference.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p)) if "norm" in key else p.normal_(0, 0.15)
    folder = root / f"adapters-{kind}"
    reference.save_pretrained(folder)
    source = hf.open_model(folder)
    model = models.from_config(source.config)
    tokens = np.random.default_rng(0).integers(0, 96, (2, T)).astype(np.int32)
    return Case(str(folder), model, hf.load_params(source, model), tokens, reference)


@pytest.fixture
def root(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def close(ours, theirs, tolerance=1e-5):
    """Largest difference relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, error


def with_peft(case: Case, options: dict, seed=0):
    """The base with a fresh adapter of PEFT whose trained tensors are moved at random."""
    base = transformers.AutoModelForCausalLM.from_pretrained(case.folder, attn_implementation="eager")
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    module = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, p in module.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        here = dict(module.named_parameters())
        for head, embed in TIES.items():  # PEFT makes two parameters of what begins as one
            if head in here and embed in here and options.get("ensure_weight_tying"):
                here[head].copy_(here[embed].T)
    return module


TIES = {
    "base_model.model.lm_head.lora_A.default.weight": (
        "base_model.model.model.embed_tokens.lora_embedding_B.default"
    ),
    "base_model.model.lm_head.lora_B.default.weight": (
        "base_model.model.model.embed_tokens.lora_embedding_A.default"
    ),
}


def tree_of(tensors: dict, plan: lora.Plan, table: weights.Table) -> dict:
    """Our trainable tree of PEFT's tensors by name."""
    flat = {}

    def put(key, path, index, x):
        shape = lora.abstract(plan, table)
        like = weights.flatten(shape)[f"{path}/{key}"]
        lead = table.apart(path)
        at = np.unravel_index(index, lead) if lead else ()
        flat.setdefault(f"{path}/{key}", np.zeros(like.shape, np.float32))
        flat[f"{path}/{key}"][at] = x.reshape(like.shape[len(lead) :])

    def first(*names):
        return next(tensors[n] for n in names if n in tensors)

    for path, one in plan.items():
        for i, name in enumerate(table.names(path)):
            key = "base_model.model." + weights.module_of(name)
            parent, _, leaf = name.rpartition(".")
            parent = "base_model.model." + parent
            if isinstance(one, lora.Whole):
                x = first(
                    f"{parent}.modules_to_save.default.{leaf}",
                    f"{parent}.base_layer.{leaf}",
                    f"{parent}.{leaf}",
                )
                put("full", path, i, weights.from_hf(table, path, x))
            elif isinstance(one, lora.Rows):
                put("rows", path, i, tensors[key + ".token_adapter.trainable_tokens_delta.default"])
            elif not lora._apart(table, path, one.ranks)[i]:
                put("a", path, i, np.zeros(flat_shape(one, table, path, "a")))
            elif key + ".lora_embedding_A.default" in tensors:
                put("a", path, i, tensors[key + ".lora_embedding_A.default"].T)
                put("b", path, i, tensors[key + ".lora_embedding_B.default"].T)
            else:
                a, b = (tensors[f"{key}.lora_{x}.default.weight"].T for x in "AB")
                R = one.rank
                put("a", path, i, np.pad(a, [(0, 0), (0, R - a.shape[1])]))
                put("b", path, i, np.pad(b, [(0, R - b.shape[0]), (0, 0)]))
            magnitude = tensors.get(key + ".lora_magnitude_vector.default.weight")
            if magnitude is not None:
                put("m", path, i, magnitude)
    assert set(flat) == set(weights.flatten(lora.abstract(plan, table)))
    return weights.unflatten({k: jnp.asarray(x) for k, x in flat.items()})


def flat_shape(one, table, path, key):
    return weights.flatten(lora.abstract({path: one}, table))[f"{path}/{key}"].shape[len(table.apart(path)) :]


def torch_loss(module, tokens):
    tokens = torch.tensor(tokens).long()
    logits = module(tokens).logits
    logp = torch.log_softmax(logits[:, :-1], -1)
    return -logp.gather(-1, tokens[:, 1:, None]).sum(), logits


def ours_loss(case, plan):
    def loss(tree, base, tokens):
        logits = case.model.logits(lora.attach(base, tree, plan), tokens)
        logp = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


ATTENTION = ("q_proj", "o_proj", "down_proj")
HEAD_TOKENS = {"embed_tokens": [3, 90], "lm_head": [90, 4, 5]}
TIED = dict(target_modules=ATTENTION, ensure_weight_tying=True)
Q_UP = dict(target_modules=("q_proj", "up_proj"))
EVERY = dict(target_modules="all-linear")
DORA = dict(target_modules=ATTENTION, use_dora=True)
KINDS = {
    "dora": ("untied", dict(target_modules=(*ATTENTION, "lm_head"), use_dora=True)),
    "dora-layer": ("untied", DORA | dict(layers_to_transform=(1,))),
    "dora-patterns": ("untied", DORA | dict(rank_pattern={"layers.1.self_attn.q_proj": 6})),
    "dora-embedding": ("untied", dict(target_modules=("embed_tokens", "k_proj"), use_dora=True)),
    "embedding": ("untied", dict(target_modules=("embed_tokens", "lm_head", "up_proj"))),
    "embedding-tied": ("tied", dict(target_modules=("embed_tokens", "up_proj"), ensure_weight_tying=True)),
    "saved": ("untied", dict(target_modules=ATTENTION, modules_to_save=("embed_tokens", "lm_head", "norm"))),
    "saved-tied": ("tied", TIED | dict(modules_to_save=("embed_tokens",))),
    "saved-beats-target": ("untied", EVERY | dict(modules_to_save=("up_proj",))),
    "tokens": ("untied", dict(target_modules=ATTENTION, trainable_token_indices=(3, 90, 17))),
    "tokens-head": ("untied", dict(target_modules=ATTENTION, trainable_token_indices=HEAD_TOKENS)),
    "tokens-tied": ("tied", dict(target_modules=ATTENTION, trainable_token_indices=(3, 90, 17))),
    "bias": ("untied", Q_UP | dict(bias="all")),
    "bias-lora": ("untied", Q_UP | dict(bias="lora_only", layers_to_transform=(0,))),
    "exclude": ("untied", EVERY | dict(exclude_modules=("o_proj", "layers.1.mlp.up_proj"))),
    "exclude-regex": ("untied", EVERY | dict(exclude_modules=r".*layers\.0\..*")),
}  # fmt: skip


def compare(case, module, plan):
    table = case.model.table
    tensors = {k: p.detach().numpy() for k, p in module.named_parameters()}
    tree = tree_of(tensors, plan, table)
    loss, logits = torch_loss(module, case.tokens)
    loss.backward()
    # of a stacked weight that is trained in one layer only, the others' gradient must be zero
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in module.named_parameters()}
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if lora.tied(table):
        for head, embed in TIES.items():
            if head in grads:
                grads[embed] = grads[embed] + grads[head].T
                count -= grads[head].numel()
    theirs = tree_of({k: g.numpy() for k, g in grads.items()}, plan, table)
    assert count == sum(live_size(plan, path, x) for path, x in weights.flatten(tree).items())
    with jax.numpy_dtype_promotion("strict"):
        (_, ours), grads = ours_loss(case, plan)(tree, case.params, case.tokens)
    plain = case.model.logits(case.params, case.tokens)
    assert np.abs(ours - plain).max() > 1e-2  # the adapter does something
    close(ours, logits.detach().numpy())
    for path, grad in weights.flatten(theirs).items():
        close(weights.flatten(grads)[path], grad, 1e-4)
    return tree, ours


def live_size(plan, path, x) -> int:
    row, _, leaf = path.rpartition("/")
    one = plan[row]
    if isinstance(one, lora.Whole) and one.live:
        return x.size * sum(one.live) // len(one.live)
    if not isinstance(one, lora.Adapted):
        return x.size
    n = len(one.ranks)
    if leaf == "m":
        return x.size // n * sum(r > 0 for r in one.ranks)
    return x.size // n // one.rank * sum(one.ranks)


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_pefts(name, root):
    kind, options = KINDS[name]
    case = make_case(kind, root)
    options = dict(r=4, lora_alpha=7) | options
    table = case.model.table
    plan = lora.plan(lora.LoraConfig(**options), table)
    module = with_peft(case, options)
    tree, ours = compare(case, module, plan)

    # merged, and merged tensor by tensor in numpy, it computes the same
    merged = lora.merge(lora.attach(case.params, tree, plan))
    close(case.model.logits(merged, case.tokens), ours)
    flat, leaves = weights.flatten(case.params), weights.flatten(tree)
    for path, one in plan.items():
        mine = {k.rpartition("/")[2]: np.asarray(x) for k, x in leaves.items() if k.startswith(path + "/")}
        for at in np.ndindex(table.apart(path)):
            base = np.asarray(flat[path])[at]
            out = lora.merged_one(one, mine, base, at)
            close(base if out is None else out, weights.flatten(merged)[path][at])


@pytest.mark.parametrize("name", KINDS)
def test_training_starts_at_the_base(name, root):
    kind, options = KINDS[name]
    case = make_case(kind, root)
    table = case.model.table
    plan = lora.plan(lora.LoraConfig(**options), table)
    tree = lora.init(jax.random.key(0), plan, table, case.params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
        lambda x: (x.shape, x.dtype), lora.abstract(plan, table)
    )
    letters = lora.axes(plan, table)
    assert {k: len(v) for k, v in letters.items()} == {k: x.ndim for k, x in weights.flatten(tree).items()}
    plain = case.model.logits(case.params, case.tokens)
    close(case.model.logits(lora.attach(case.params, tree, plan), case.tokens), plain)


def test_dora_with_dropout_is_pefts():
    """One layer in training mode, PEFT given the mask we drew: values and gradients; on an expert too."""

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(12, 9, bias=False)

        def forward(self, x):
            return self.q(x)

    torch.manual_seed(0)
    options = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q"], use_dora=True, lora_dropout=0.4)
    module = peft.get_peft_model(One(), options)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    p = {k: v.detach().numpy() for k, v in module.named_parameters()}
    key = "base_model.model.q."
    a, b = (jnp.asarray(p[f"{key}lora_{x}.default.weight"].T) for x in "AB")
    m = jnp.asarray(p[key + "lora_magnitude_vector.default.weight"])
    w = jnp.asarray(p[key + "base_layer.weight"].T)
    rng, scale = jax.random.key(3), jnp.float32(1.5)
    x = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    mask = np.asarray(linear.dropout(jnp.ones((5, 12)), weights.LoraWeight(w, a, b, scale, rng, 0.4)))
    assert 0.2 < (mask == 0).mean() < 0.6

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(mask)

    layer = module.base_model.model.q
    layer.lora_dropout["default"] = Masked()
    module.train()
    inputs = torch.tensor(x, requires_grad=True)
    y = module(inputs)
    (y**2).sum().backward()

    def ours(x, a, b, m):
        out = linear.einsum("BD,DF->BF", x, weights.LoraWeight(w, a, b, scale, rng, 0.4, m))
        return jnp.sum(out**2), out

    (_, found), grads = jax.value_and_grad(ours, (0, 1, 2, 3), has_aux=True)(jnp.asarray(x), a, b, m)
    close(found, y.detach().numpy())
    theirs = [inputs.grad, layer.lora_A["default"].weight.grad.T, layer.lora_B["default"].weight.grad.T]
    for one, other in zip(grads, [*theirs, layer.lora_magnitude_vector["default"].weight.grad], strict=True):
        close(one, other.numpy(), 1e-5)
    expert = weights.LoraWeight(w[None], a[None], b[None], scale[None], rng, 0.4, m[None])
    close(grouped(jnp.asarray(x), expert, jnp.array([5], jnp.int32)), found)


def test_the_norm_is_that_of_the_formed_weight_in_bfloat16_too():
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (2, 3, 8, 4, 5), jnp.float32).astype(jnp.bfloat16)
    a, b = jax.random.normal(keys[1], (2, 3, 8, 6)), jax.random.normal(keys[2], (2, 3, 6, 4, 5))
    scale = jnp.arange(6.0).reshape(2, 3)
    formed = w.astype(jnp.float32) + lora.delta(a, b, scale)
    found = linear.output_norm(w, a, b, scale)
    np.testing.assert_allclose(found, jnp.linalg.norm(formed, axis=2), rtol=1e-5)
    # a b of one layer and expert has 8·4·5 entries; no product of factors is that large
    text = str(jax.make_jaxpr(linear.output_norm)(w, a, b, scale))
    outputs = [line for line in text.splitlines() if "dot_general" in line]
    assert len(outputs) == 3 and not any("f32[2,3,8,4,5]" in line.split("=")[0] for line in outputs)
