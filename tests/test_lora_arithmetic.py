"""Adapters combined into one against PEFT's add_weighted_adapter, and stacked, each row with its own."""

import functools

import jax
import numpy as np
import pytest
import tiny

from ftjax import adapters, generate, lora, weights
from ftjax.errors import UserError

CONFIGS = (
    lora.LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj", "down_proj")),
    lora.LoraConfig(r=4, lora_alpha=3, target_modules=("q_proj", "up_proj")),
)


def model():
    return tiny.model(tie_word_embeddings=False)


@functools.cache
def base():
    return weights.init(jax.random.key(0), model().table)


def two(configs=CONFIGS):
    plans = [lora.plan(config, model().table) for config in configs]
    return [(plan, tiny.adapters(plan, model().table, seed)) for seed, plan in enumerate(plans)]


@functools.cache
def reference():
    """A torch model with both adapters as "one" and "two"."""
    torch = pytest.importorskip("torch", reason="adapters are combined as peft does it, on torch models")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.AutoConfig.for_model(**tiny.CONFIG | {"tie_word_embeddings": False})
    module = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    for i, (name, ours, (plan, tree)) in enumerate(zip(("one", "two"), CONFIGS, two(), strict=True)):
        options = peft.LoraConfig(
            r=ours.r,
            lora_alpha=ours.lora_alpha,
            target_modules=list(ours.target_modules),
            task_type="CAUSAL_LM",
        )
        module = module if i else peft.get_peft_model(module, options, name)
        if i:
            module.add_adapter(name, options)
        tensors, flat = dict(module.named_parameters()), weights.flatten(tree)
        with torch.no_grad():
            for path in plan:
                for k, leaf in (("A", "a"), ("B", "b")):
                    stacked = np.asarray(flat[f"{path}/{leaf}"])
                    for key, x in zip(model().table.names(path), stacked, strict=True):
                        x = x.reshape(-1, 4) if leaf == "a" else x.reshape(4, -1)
                        key = f"base_model.model.{weights.module_of(key)}.lora_{k}.{name}.weight"
                        tensors[key].copy_(torch.tensor(x.T.copy()))
    return module


def deltas(plan, tree):
    """{module: the change of its weight}, torch's way round."""
    table, flat, out = model().table, weights.flatten(tree), {}
    for path, one in plan.items():
        a, b = (np.asarray(flat[f"{path}/{k}"]) for k in "ab")
        d = lora.delta(a, b, np.array(one.scales, np.float32).reshape(one.lead), np)
        out |= {weights.module_of(k): x for k, x in weights.to_hf(table, path, d).items()}
    return out


@pytest.mark.parametrize("given", [(0.7, 0.4), (0.9, -0.5)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {"rank": 3}),
        ("svd", {}),
        ("ties", {"density": 0.6}),
        ("ties", {"density": 0.6, "majority": "frequency"}),
        ("ties_svd", {"density": 0.5, "rank": 6}),
    ],
)
def test_combining_is_pefts(method, options, given):
    module = reference()
    theirs = dict(options)
    if "rank" in theirs:
        theirs["svd_rank"] = theirs.pop("rank")
    if "majority" in theirs:
        theirs["majority_sign_method"] = theirs.pop("majority")
    name = f"{method}{len(module.peft_config)}"
    module.add_weighted_adapter(["one", "two"], list(given), name, combination_type=method, **theirs)
    plan, tree, config = adapters.combine(two(), given, method, model().table, **options)
    assert lora.plan(config, model().table) == plan  # the config says what the tree holds
    found = deltas(plan, tree)
    layers = {
        key.removeprefix("base_model.model."): layer
        for key, layer in module.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    }
    assert set(found) == set(layers)
    for key, layer in layers.items():
        wanted = layer.get_delta_weight(name).detach().numpy()
        np.testing.assert_allclose(found[key], wanted, atol=2e-6 * np.abs(wanted).max() + 1e-7, rtol=1e-4)


def test_cat_is_the_exact_sum():
    plan, tree, _ = adapters.combine(two(), (0.7, -0.4), "cat", model().table)
    one, other = (deltas(*x) for x in two())
    found = deltas(plan, tree)
    for key, x in found.items():
        wanted = 0.7 * one.get(key, 0.0) - 0.4 * other.get(key, 0.0)
        np.testing.assert_allclose(x, wanted, atol=1e-6)


def test_random_drop_keeps_a_share_and_the_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 5)).astype(np.float32)
    many = np.stack([adapters.random_drop(x, 0.3, rng) for _ in range(4000)])
    assert abs((many != 0).mean() - 0.3) < 0.01
    np.testing.assert_allclose(many.mean(0), x, atol=0.1 * np.abs(x).max())
    kept = many != 0
    np.testing.assert_allclose(many[kept], np.broadcast_to(x / np.float32(0.3), many.shape)[kept])


def test_dare_is_a_function_of_its_masks(monkeypatch):
    """With the masks given, it is the sum (or TIES' mean) of what is left; density 1 drops nothing."""
    same = [(plan, tree) for plan, tree in two((CONFIGS[0], CONFIGS[0]))]
    plan, tree, _ = adapters.combine(same, (0.5, 0.8), "dare_linear", model().table, density=1.0)
    _, linear, _ = adapters.combine(same, (0.5, 0.8), "linear", model().table)
    jax.tree.map(np.testing.assert_array_equal, tree, linear)
    monkeypatch.setattr(adapters, "random_drop", lambda x, density, rng: adapters.trim(x, density))
    _, dare, _ = adapters.combine(same, (0.5, 0.8), "dare_ties", model().table, density=0.5)
    _, ties, _ = adapters.combine(same, (0.5, 0.8), "ties", model().table, density=0.5)
    jax.tree.map(np.testing.assert_array_equal, dare, ties)
    again = [
        adapters.combine(same, (1, 1), "dare_ties", model().table, density=0.5, seed=s)[1] for s in (0, 0)
    ]
    jax.tree.map(np.testing.assert_array_equal, *again)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("mean", {}, "method='mean': one of linear"),
        ("ties", {}, "needs the share"),
        ("svd", {"density": 0.5}, "has no effect with svd"),
        ("cat", {"rank": 4}, "for svd and ties_svd"),
    ],
)
def test_wrong_settings_are_said(method, options, said):
    with pytest.raises(UserError, match=said):
        adapters.combine(two(), (1, 1), method, model().table, **options)


def test_what_cannot_be_combined_is_said():
    dora = two((CONFIGS[0], lora.LoraConfig(r=4, use_dora=True)))
    with pytest.raises(UserError, match="DoRA"):
        adapters.combine(dora, (1, 1), "cat", model().table)
    ranks = two((CONFIGS[0], lora.LoraConfig(r=2, target_modules=("q_proj",))))
    with pytest.raises(
        UserError, match=r"layers\.0\.self_attn\.q_proj have ranks \[4, 2\] .*; cat, svd and ties_svd"
    ):
        adapters.combine(ranks, (1, 1), "linear", model().table)


# -- Another adapter for each row

SETS = (
    lora.LoraConfig(r=4, lora_alpha=40),
    lora.LoraConfig(r=2, lora_alpha=30, target_modules=("q_proj", "lm_head", "embed_tokens")),
    lora.LoraConfig(r=3, lora_alpha=30, target_modules=("o_proj", "down_proj"), use_dora=True),
)


def three():
    out = []
    for seed, config in enumerate(SETS):
        plan = lora.plan(config, model().table)
        start = lora.init(jax.random.key(seed), plan, model().table, base())
        rng = np.random.default_rng(seed)
        moved = {
            k: x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
            for k, x in weights.flatten(start).items()
        }
        out.append((plan, weights.unflatten(moved)))
    return out


def test_rows_with_their_own_adapters_are_as_alone():
    net, sets = model(), three()
    tokens = np.random.default_rng(0).integers(0, 96, (4, 11)).astype(np.int32)
    stacked = adapters.stack(base(), sets)
    assert adapters.count(stacked) == 3
    forward = jax.jit(net.logits)
    with jax.numpy_dtype_promotion("strict"):
        ours = forward(adapters.select(stacked, [2, 0, -1, 1]), tokens)
    rows = [forward(lora.attach(base(), tree, plan), tokens) for plan, tree in sets]
    rows.append(forward(base(), tokens))
    for b, which in enumerate((2, 0, 3, 1)):
        np.testing.assert_allclose(ours[b], rows[which][b], atol=2e-5 * np.abs(ours).max())
        others = [np.abs(ours[b] - rows[i][b]).max() for i in range(4) if i != which]
        assert min(others) > 1e-2  # each row is one adapter's and no other's
    np.testing.assert_array_equal(
        forward(stacked, tokens), forward(adapters.select(stacked, [-1] * 4), tokens)
    )


def test_a_generator_answers_each_prompt_with_its_adapter():
    net, sets = model(), three()
    prompts = [[5, 9, 30], [7, 1, 2, 8, 4], [5, 9, 30], [11]]
    options = generate.GenerateOptions(max_new_tokens=6)
    stacked = generate.Generator(net, adapters.stack(base(), sets))
    which = [1, 0, None, 2]
    found = stacked.generate(prompts, options, adapters=which)
    many = stacked.generate_many(prompts, options, batch_size=2, adapters=which)
    assert [c.tokens for c in found] == [c.tokens for c in many]
    for prompt, one, answer in zip(prompts, which, found, strict=True):
        params = base() if one is None else lora.attach(base(), sets[one][1], sets[one][0])
        alone = generate.Generator(net, generate.prepare(params)).generate([prompt], options)[0]
        assert alone.tokens == answer.tokens
    assert found[0].tokens != found[2].tokens
    with pytest.raises(UserError, match="one of 0…2 or None each"):
        stacked.generate(prompts, options, adapters=[0, 1, 2, 3])
    with pytest.raises(UserError, match="hold none"):
        generate.Generator(net, base()).generate(prompts[:1], options, adapters=[0])
