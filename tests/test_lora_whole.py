"""What is trained whole or in rows: freezing by regex, new tokens, experts by name, and runs of each."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file
from test_training import MODEL, folder, ftjax  # noqa: F401 - fixtures

from ftjax import lora, models, optim, weights
from ftjax.errors import UserError
from ftjax.ops import linear_cross_entropy, linear_logprobs
from ftjax.resize import resize_vocabulary

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)


def table(**changes):
    return tiny.model(**changes).table


def logits(model, params, plan=None, tree=None):
    params = params if plan is None else lora.attach(params, tree, plan)
    return jax.jit(model.logits)(params, TOKENS)


# -- Which weights


def test_freezing_by_regex():
    plan = lora.plan_run(None, table(), (), ("embed_tokens", r"layers\.[01]\.", "norm"))
    assert plan is not None and "embed" not in plan and "final_norm" not in plan
    assert plan["layers/q"] == lora.Whole((False, False, True), (3,))
    assert "layers/attn_norm" not in plan
    assert lora.plan_run(None, table()) is None
    plan = lora.plan_run(None, table(), ("norm$",))
    assert plan == {p: lora.Whole() for p in ("layers/attn_norm", "layers/mlp_norm", "final_norm")}
    both = lora.plan_run(
        lora.LoraConfig(r=2, target_modules=("q_proj",)), table(), ("mlp.up_proj", r"s\.1\..*norm")
    )
    assert both is not None and both["layers/up"] == lora.Whole()
    assert both["layers/mlp_norm"] == lora.Whole((False, True, False), (3,))
    assert isinstance(both["layers/q"], lora.Adapted)


TOKENS_AND_WHOLE = dict(trainable_token_indices=(1,), modules_to_save=("embed_tokens",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(modules_to_save=("foo",)), "modules_to_save: 'foo' matches no module"),
        (dict(trainable_token_indices=(96,)), r"\[96\] .* the vocabulary is 0…95"),
        (TOKENS_AND_WHOLE, "cannot both be trained whole and have rows trained"),
        (
            dict(modules_to_save=("lm_head",), ensure_weight_tying=False),
            "embedding and head are one weight",
        ),
        (dict(init_lora_weights="pisa"), "init_lora_weights='pisa': one of true, false, gaussian"),
        (dict(r=3, init_lora_weights="orthogonal"), "orthogonal factors need an even rank"),
        (dict(exclude_modules="("), r"lora.exclude_modules='\(' is not a regular expression"),
    ],
)
def test_settings_that_do_not_fit_are_said(options, said):
    with pytest.raises(UserError, match=said):
        lora.plan(lora.LoraConfig(**options), table())


@pytest.mark.parametrize(
    ("config", "trainable", "freeze", "said"),
    [
        (None, ("q_prj",), (), "train.trainable: 'q_prj' matches no weight; paths are like model"),
        (None, (), ("nothing",), "train.freeze: 'nothing' matches no weight"),
        (None, ("norm",), ("",), "leaves no weight to train"),
        (lora.LoraConfig(), ("q_proj",), (), "q_proj cannot both have factors and be trained whole"),
    ],
)
def test_regexes_that_do_not_fit_are_said(config, trainable, freeze, said):
    with pytest.raises(UserError, match=said):
        lora.plan_run(config, table(), trainable, freeze)


def test_tied_head_is_the_embedding():
    """By either name the one weight is adapted, in the look-up and in the head."""
    one, other = (
        lora.plan(lora.LoraConfig(target_modules=(name,)), table()) for name in ("embed_tokens", "lm_head")
    )
    assert one == other and set(one) == {"embed"}
    saved = lora.plan(lora.LoraConfig(target_modules=("q_proj",), modules_to_save=("lm_head",)), table())
    assert saved["embed"] == lora.Whole()
    tree = tiny.adapters(one, table())
    a, b = (tree["embed"][k] for k in "ab")
    full = tiny.base() | {"embed": tiny.base()["embed"] + 2.0 * a @ b}
    ours = logits(tiny.model(), tiny.base(), one, tree)
    np.testing.assert_allclose(ours, logits(tiny.model(), full), atol=2e-5 * np.abs(ours).max())


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=("lm_head",), use_dora=True),
        dict(target_modules=("lm_head", "q_proj"), lora_dropout=0.3),
        dict(target_modules=("q_proj",), trainable_token_indices={"lm_head": (5, 90, 1)}),
        dict(target_modules=("q_proj",), modules_to_save=("lm_head",)),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_losses_give_the_heads_gradient(options, tied):
    """The chunked losses against autodiff through the logits, for every kind of head."""
    model = tiny.model(tie_word_embeddings=tied)
    base = weights.init(jax.random.key(0), model.table)
    cfg = lora.LoraConfig(r=4, **options)
    plan = lora.plan(cfg, model.table)
    start = lora.init(jax.random.key(1), plan, model.table, base)
    rng = np.random.default_rng(0)
    flat = {
        k: x + 0.05 * rng.normal(size=x.shape).astype(np.float32) for k, x in weights.flatten(start).items()
    }
    head = weights.unflatten({k: x for k, x in flat.items() if k.startswith(model.head_path)})
    one = {model.head_path: plan[model.head_path]}
    hidden = jnp.asarray(rng.normal(size=(2, 9, 48)), jnp.float32)
    targets, weight = rng.integers(0, 96, (2, 9)), jnp.asarray(rng.random((2, 9)) < 0.7, jnp.float32)

    def leaf(head):
        return model.head(
            base
            | {
                model.head_path: lora.attach({model.head_path: base[model.head_path]}, head, one)[
                    model.head_path
                ]
            }
        )

    def plain(head, hidden):
        logp = jax.nn.log_softmax(model.unembed(leaf(head), hidden))
        return -jnp.sum(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weight)

    def chunked(head, hidden):
        return linear_cross_entropy(model.unembed, leaf(head), hidden, targets, weight, 4, False)[0]

    def logprobs(head, hidden):
        return -jnp.sum(
            linear_logprobs(model.unembed, leaf(head), hidden, targets, weight, 4, False) * weight
        )

    wanted = jax.value_and_grad(plain, (0, 1))(head, hidden)
    for found in (chunked, logprobs):
        close = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * (np.abs(y).max() + 1e-9))  # noqa: E731
        jax.tree.map(close, jax.value_and_grad(found, (0, 1))(head, hidden), wanted)


# -- Experts


MOE = tiny.CONFIG | dict(
    model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2
)


def test_ranks_and_factors_by_expert():
    """Ranks per router expert by name; stacked DoRA over layers and experts is that of each matrix."""
    model = models.from_config(MOE)
    pattern = {r"layers\.1\..*experts\.2\.w1": 2, r"experts\.3\.w1": 6}
    cfg = lora.LoraConfig(
        r=4, lora_alpha=8, target_modules=("w1", "w2"), rank_pattern=pattern, use_dora=True,
        exclude_modules=r".*layers\.0\..*experts\.1\..*",
    )  # fmt: skip
    plan = lora.plan(cfg, model.table)
    gate = plan["layers/experts_gate"]
    assert isinstance(gate, lora.Adapted) and gate.ranks == (4, 0, 4, 6, 4, 4, 2, 6) and gate.lead == (2, 4)
    base = weights.init(jax.random.key(0), model.table)
    tree = lora.init(jax.random.key(1), plan, model.table, base)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), tree)
    adapted = lora.attach(base, tree, plan)
    ours = logits(model, base, plan, tree)
    merged = lora.merge(adapted)
    np.testing.assert_allclose(ours, logits(model, merged), atol=3e-5 * np.abs(ours).max())
    old, new = (np.asarray(x["layers"]["experts_gate"]) for x in (base, merged))
    np.testing.assert_array_equal(old[0, 1], new[0, 1])  # no factors there: left alone
    w = old[1, 2] + 4.0 * np.asarray(
        tree["layers"]["experts_gate"]["a"][1, 2] @ tree["layers"]["experts_gate"]["b"][1, 2]
    )
    m = np.asarray(tree["layers"]["experts_gate"]["m"][1, 2])
    np.testing.assert_allclose(new[1, 2], w * m / np.linalg.norm(w, axis=0), rtol=1e-4, atol=1e-6)


# -- New tokens


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens(tied):
    model = tiny.model(tie_word_embeddings=tied)
    base = weights.init(jax.random.key(0), model.table)
    bigger, params = resize_vocabulary(model, base, 100)
    assert bigger.config.vocab_size == 100 and bigger.table.shape("embed") == (100, 48)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, weights.abstract(bigger.table))
    old, new = logits(model, base), logits(bigger, params)
    np.testing.assert_allclose(new[..., :96], old, atol=1e-5)
    np.testing.assert_allclose(new[..., 96:], old.mean(-1, keepdims=True).repeat(4, -1), atol=1e-4)
    np.testing.assert_allclose(params["embed"][97], base["embed"].mean(0), rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="smaller than the model's 96"):
        resize_vocabulary(model, base, 95)

    rows = {"embed_tokens": (96, 97, 98, 99)} | ({} if tied else {"lm_head": (96, 97, 98, 99)})
    cfg = lora.LoraConfig(target_modules=(), trainable_token_indices=rows)
    plan = lora.plan(cfg, bigger.table)
    tree = lora.init(jax.random.key(0), plan, bigger.table, params)
    np.testing.assert_allclose(logits(bigger, params, plan, tree), new, atol=1e-5)
    tokens = np.array(TOKENS) % 4 + 96

    def loss(tree):
        out = bigger.logits(lora.attach(params, tree, plan), tokens)
        return optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], tokens[:, 1:]).mean()

    tx, _ = optim.make_optimizer(optim.OptimOptions(lr=0.02), tree, 20, bigger.table)
    state, step = tx.init(tree), jax.jit(jax.value_and_grad(loss))
    first = last = None
    for _ in range(20):
        last, grads = step(tree)
        first = last if first is None else first
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    assert last < 0.7 * first
    merged = lora.merge(lora.attach(params, tree, plan))
    np.testing.assert_array_equal(merged["embed"][:96], base["embed"])
    assert np.abs(merged["embed"][96:] - params["embed"][96:]).min() > 0


# -- Whole runs


RUNS = {
    "lora": ["lora.r=2", "lora.use_dora=true", "lora.init_lora_weights=pissa", "train.trainable=[norm]"],
    "eva": ["lora.r=2", "lora.init_lora_weights=eva", "lora.lora_dropout=0.1", "lora.bias=all"],
    "tokens": ["lora.r=2", "lora.trainable_token_indices=[3, 5]", "mesh.fsdp=4", "mesh.tp=2"],
    "freeze": ["lora=null", "train.freeze=[embed_tokens, 'layers.0.']", "optim.name=adafactor"],
    "bitfit": ["lora=null", "train.trainable=[norm]", "mesh.fsdp=4", "mesh.tp=2", "train.dtype=bfloat16"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_what_it_says(ftjax, name):  # noqa: F811
    code, said = ftjax("sft", *RUNS[name], "optim.lr=1e-2")
    assert code == 0, said
    if name in ("lora", "eva", "tokens"):
        assert list(pathlib.Path("run/adapter").glob("*.safetensors"))
        return
    before, after = load_file(MODEL / "model.safetensors"), load_file("run/model/model.safetensors")
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    if name == "freeze":
        frozen = {k for k in before if "embed_tokens" in k or "layers.0." in k}
        assert changed == set(before) - frozen
    else:
        assert changed == {k for k in before if "norm" in k}


def test_freezing_has_no_effect_with_lora(ftjax):  # noqa: F811
    code, said = ftjax("sft", "train.freeze=[norm]")
    assert code == 2 and "train.freeze has no effect in this run: lora trains nothing of the base" in said
    code, said = ftjax("sft", "lora.init_lora_weights=loftq")
    assert code == 2 and "loftq begins at what quantising takes off the base: set quant.kind" in said
    code, said = ftjax("sft", "lora=null", "quant.kind=nf4")
    assert code == 2 and "quant.kind has no effect in this run: lora is null" in said
    code, said = ftjax("sft", "quant.kind=int8", "quant.double=false")
    assert code == 2 and "quant.double has no effect in this run: the scales of int8 are not" in said
    assert not pathlib.Path("run").exists()
