"""How factors begin: training starts at the base (or, with a quantised one, near it), PiSSA and OLoRA are
PEFT's, and EVA's directions are those of the activations."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import lora, lora_init, mesh, models, optim, weights
from ftjax.errors import UserError
from ftjax.recipes import training

TARGETS = ("q_proj", "o_proj", "down_proj")
LEFT_ALONE = {"layers_to_transform": (0, 2), "rank_pattern": {"layers.2.self_attn.q_proj": 2}}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)


def config(how, **changes):
    return lora.LoraConfig(**dict(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=how) | changes)


def begin(how, **changes):
    cfg, table = config(how, **changes), tiny.model().table
    plan = lora.plan(cfg, table)
    make = jax.jit(lambda base: lora.init(jax.random.key(0), plan, table, base, how))
    return cfg, plan, make(tiny.base())


@functools.cache
def forward():
    return jax.jit(tiny.model().logits)


def moved(tree, seed=0):
    rng = np.random.default_rng(seed)
    names = {k for k in weights.flatten(tree) if not k.endswith("0")}
    flat = weights.flatten(tree)
    return weights.unflatten(
        {
            k: x + 0.05 * rng.normal(size=x.shape).astype(np.float32) if k in names else x
            for k, x in flat.items()
        }
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("how", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_training_starts_at_the_base(how, dora):
    cfg, plan, tree = begin(how, use_dora=dora, **LEFT_ALONE)
    plain = forward()(tiny.base(), TOKENS)
    ours = forward()(lora.attach(tiny.base(), tree, plan), TOKENS)
    np.testing.assert_allclose(ours, plain, atol=2e-5 * np.abs(plain).max())
    flat = weights.flatten(tree)
    if how not in (True, "gaussian"):
        assert all(np.abs(flat[f"{path}/b"]).max() > 1e-3 for path in plan)
    for path, one in plan.items():  # what pads a lower rank is zero
        a = np.asarray(flat[path + "/a"]).reshape(*one.lead, -1, one.rank)
        assert not np.any(a * (1 - lora.live(one)[..., None, :]))
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, lora.abstract(plan, tiny.model().table))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_what_is_taken_off_becomes_plain_lora(how, rslora):
    cfg, plan, tree = begin(how, use_rslora=rslora, alpha_pattern={"o_proj": 9.0}, **LEFT_ALONE)
    tree = moved(tree)
    ours = forward()(lora.attach(tiny.base(), tree, plan), TOKENS)
    new_cfg, new_plan, new_tree = lora.plain(cfg, plan, tree)
    again = lora.plan(new_cfg, tiny.model().table)
    for path, one in again.items():
        assert one.ranks == new_plan[path].ranks and not one.origin
        np.testing.assert_allclose(one.scales, new_plan[path].scales, rtol=1e-12)
    assert set(weights.flatten(new_tree)) == {f"{path}/{k}" for path in plan for k in "ab"}
    theirs = forward()(lora.attach(tiny.base(), new_tree, again), TOKENS)
    assert np.abs(ours - forward()(tiny.base(), TOKENS)).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    merged = lora.merge(lora.attach(tiny.base(), tree, plan))
    np.testing.assert_allclose(forward()(merged, TOKENS), theirs, atol=1e-5 * np.abs(theirs).max())
    flat, leaves = weights.flatten(tiny.base()), weights.flatten(tree)
    mine = {k: np.asarray(leaves[f"layers/q/{k}"]) for k in ("a", "b", "a0", "b0")}
    one = lora.merged_one(plan["layers/q"], mine, np.asarray(flat["layers/q"])[2], (2,))
    np.testing.assert_allclose(one, merged["layers"]["q"][2], atol=1e-5)
    assert lora.merged_one(plan["layers/q"], mine, np.asarray(flat["layers/q"])[1], (1,)) is None


def test_the_start_is_not_trained():
    cfg, plan, tree = begin("pissa")
    options = optim.OptimOptions(weight_decay=0.1, warmup_ratio=0.0, schedule="constant")
    for name in ("adamw", "muon", "adafactor"):
        tx, _ = optim.make_optimizer(dataclasses.replace(options, name=name), tree, 4, tiny.model().table)
        loss = lambda t: jnp.sum(forward()(lora.attach(tiny.base(), t, plan), TOKENS) ** 2)  # noqa: E731
        grads = jax.grad(loss)(tree)
        updates, _ = jax.jit(tx.update)(grads, tx.init(tree), tree)
        for key, x in weights.flatten(updates).items():
            assert np.isfinite(x).all() and bool(np.any(np.asarray(x) != 0)) != key.endswith("0"), key


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_factors_are_pefts(how):
    torch = pytest.importorskip("torch", reason="compared with peft on torch models")
    peft = pytest.importorskip("peft")

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(12, 9, bias=False)

    torch.manual_seed(0)
    net = One()
    w = net.q.weight.detach().numpy().copy()
    net = peft.get_peft_model(
        net, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q"], init_lora_weights=how)
    )
    theirs = {k: p.detach().numpy() for k, p in net.named_parameters()}
    A, B = (theirs[f"base_model.model.q.lora_{x}.default.weight"] for x in "AB")
    a, b = lora_init.from_weight(how, jnp.asarray(w.T)[None], 1, 4, jnp.array([1.5]), jax.random.key(0))
    np.testing.assert_allclose(a[0] @ b[0], (B @ A).T, atol=1e-5)
    np.testing.assert_allclose(np.abs(a[0]), np.abs(A.T), atol=1e-5)  # singular vectors have no sign
    residual = theirs["base_model.model.q.base_layer.weight"]
    np.testing.assert_allclose(w - 1.5 * np.asarray(a[0] @ b[0]).T, residual, atol=1e-5)


def test_the_power_method_finds_the_singular_vectors():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 30)))[0] for n in (40, 50))
    w = (u * 0.7 ** np.arange(30)) @ v.T
    exact, found = (
        lora_init.from_weight(
            how, jnp.asarray(w, jnp.float32)[None], 1, 5, jnp.array([2.0]), jax.random.key(1)
        )
        for how in ("pissa", "pissa_niter_6")
    )
    np.testing.assert_allclose(exact[0][0] @ exact[1][0], found[0][0] @ found[1][0], atol=1e-5)


def int4(w):
    """Rounded to 16 levels a column."""
    step = jnp.max(jnp.abs(w), axis=0, keepdims=True) / 7.5
    return jnp.clip(jnp.round(w / step), -8, 7) * step


def test_loftq_is_nearer_to_the_weights_than_their_rounding():
    cfg = config(True, layers_to_transform=(0, 2))
    table, plan = tiny.model().table, lora.plan(cfg, tiny.model().table)
    tree = lora.init(jax.random.key(0), plan, table)
    w = np.asarray(weights.flatten(tiny.base())["layers/o"])
    errors = {}
    for steps in (0, 1, 5):
        base, start = lora_init.loftq(tiny.base(), tree, plan, int4, steps)
        merged = lora.merge(lora.attach(base, start, plan)) if steps else base
        errors[steps] = [np.linalg.norm(np.asarray(merged["layers"]["o"])[i] - w[i]) for i in range(3)]
        rounded = np.asarray(base["layers"]["o"]).reshape(3, -1, 48)
        if steps == 1:
            for i in range(3):
                np.testing.assert_allclose(rounded[i], int4(w.reshape(3, -1, 48)[i]), atol=1e-6)
            best = np.linalg.svd((w - np.asarray(base["layers"]["o"]))[0].reshape(-1, 48), compute_uv=False)
            assert math.isclose(errors[1][0], np.linalg.norm(best[4:]), rel_tol=1e-4)  # Eckart & Young
    for i in (0, 2):
        assert errors[5][i] < errors[1][i] < errors[0][i]
    assert errors[5][1] == errors[1][1] == errors[0][1]  # a layer without factors is rounded alone


def batches():
    rng = np.random.default_rng(3)
    docs = [(d, w) for d, w in tiny.documents(6, seed=int(rng.integers(9)))]
    return [
        {k: v[0] for k, v in tiny.pack([docs[i : i + 2], docs[i + 1 : i + 2]], 32).items()} for i in (0, 2, 4)
    ]


def test_eva_finds_the_directions_of_the_activations():
    """In the first layer, against inputs computed by hand; padding counts nowhere."""
    model, table = tiny.model(), tiny.model().table
    cfg = config("eva", target_modules=("q_proj", "down_proj"), rank_pattern={"layers.1.mlp.down_proj": 2})
    plan = lora.plan(cfg, table)
    moments = lora_init.second_moments(model, tiny.base(), plan, table, batches())
    # the first layer's q sees the normed embeddings
    total = np.zeros((48, 48))
    for batch in batches():
        x = np.asarray(tiny.base()["embed"])[batch["tokens"]].astype(np.float64)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 3e-5)
        x = (x * np.asarray(tiny.base()["layers"]["attn_norm"])[0])[batch["segments"] > 0]
        total += x.T @ x
    np.testing.assert_allclose(moments["layers/q"][0], total, atol=1e-4 * np.abs(total).max())
    tree = lora.init(jax.random.key(0), plan, table, tiny.base(), "eva")
    tree, missing = lora_init.eva(model, tiny.base(), tree, plan, table, batches())
    assert not missing  # of experts
    a = np.asarray(tree["layers"]["q"]["a"])[0]
    values, vectors = np.linalg.eigh(total)
    np.testing.assert_allclose(np.abs(a.T @ vectors[:, ::-1][:, :4]), np.eye(4), atol=1e-2)
    np.testing.assert_allclose(np.sum((a.T @ total) * a.T, -1), values[::-1][:4], rtol=1e-4)
    down = np.asarray(tree["layers"]["down"]["a"])
    assert np.linalg.matrix_rank(down[0]) == 4 and np.linalg.matrix_rank(down[1]) == 2
    assert not np.any(tree["layers"]["down"]["b"])


def test_eva_of_experts_sees_each_experts_tokens():
    changes = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    model = models.from_config(tiny.CONFIG | changes | {"tie_word_embeddings": False})
    base = weights.init(jax.random.key(0), model.table)
    plan = lora.plan(lora.LoraConfig(r=2, target_modules=("w1", "w2")), model.table)
    moments = lora_init.second_moments(model, base, plan, model.table, batches())
    gate, down = moments["layers/experts_gate"], moments["layers/experts_down"]
    assert gate.shape == (2, 4, 48, 48) and down.shape == (2, 4, 80, 80)
    # a token's normed input counts once for each of its two experts
    live = sum(int((b["segments"] > 0).sum()) for b in batches())
    np.testing.assert_allclose(jnp.trace(gate, axis1=-2, axis2=-1).sum(-1), 2 * 48 * live, rtol=1e-2)
    assert len({round(float(x), 3) for x in jnp.trace(gate, axis1=-2, axis2=-1).reshape(-1)}) == 8


def test_eva_keeps_random_directions_for_experts_that_few_tokens_reach():
    changes = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=1, num_hidden_layers=2)
    model = models.from_config(tiny.CONFIG | changes | {"tie_word_embeddings": False})
    base = weights.init(jax.random.key(0), model.table)
    plan = lora.plan(lora.LoraConfig(r=6, target_modules=("w1", "w2")), model.table)
    few = [{k: v[:1, :7] for k, v in batches()[0].items()}]
    start = lora.init(jax.random.key(0), plan, model.table, base, "eva")
    tree, missing = lora_init.eva(model, base, start, plan, model.table, few)
    moments = lora_init.second_moments(model, base, plan, model.table, few)
    counts = set()
    for path, short in missing.items():
        a = np.asarray(weights.flatten(tree)[path + "/a"]).reshape(8, -1, 6)
        first = np.asarray(weights.flatten(start)[path + "/a"]).reshape(8, -1, 6)
        for i, moment in enumerate(
            np.asarray(moments[path], np.float64).reshape(8, *moments[path].shape[-2:])
        ):
            np.testing.assert_allclose(a[i].T @ a[i], np.eye(6), atol=1e-5)
            found = 6 - short[i]
            values = np.linalg.eigvalsh(moment)[::-1]
            assert (values[:found] > 0).all() and (not short[i] or values[found] <= 1e-5 * values[0])
            np.testing.assert_allclose(
                np.sum((a[i].T @ moment) * a[i].T, -1),
                np.maximum(values[:6], 0),
                atol=1e-4 * values[0] + 1e-9,
            )
            # the rest are what is left of the random ones
            rest = np.linalg.qr(np.concatenate([a[i][:, :found], first[i][:, found:]], 1))[0][:, found:]
            np.testing.assert_allclose(np.abs(np.sum(rest * a[i][:, found:], 0)), 1, atol=1e-4)
            counts.add(int(short[i]))
    assert set(missing) == {"layers/experts_gate", "layers/experts_down"}
    assert 6 in counts and len(counts) > 2  # experts that no token reached, and some of a few tokens

    class Data:
        def batches(self, step):
            yield from ({k: np.asarray(v)[None] for k, v in one.items()} for one in few)

    devices = mesh.make_mesh(mesh.MeshOptions(), jax.devices()[:1])
    with mesh.use(devices):
        again, said = training.by_data(model, base, start, plan, Data(), devices)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    short = np.concatenate(list(missing.values()))
    assert f"the inputs of {(short > 0).sum()} of 16 experts' weights in the first 16 batches" in said
    assert f"{short.sum()} components begin at random" in said
    with pytest.raises(
        UserError, match=r"layers\.0\.block_sparse_moe\.experts\.0\.w1 in the data span fewer"
    ):
        plan = lora.plan(lora.LoraConfig(r=64, target_modules=("w1",)), model.table)
        start = lora.init(jax.random.key(0), plan, model.table, base, "eva")
        lora_init.eva(model, base, start, plan, model.table, few)


def test_eva_says_when_the_data_are_too_few():
    plan = lora.plan(config("eva", target_modules=("q_proj",), r=16), tiny.model().table)
    tree = lora.init(jax.random.key(0), plan, tiny.model().table, tiny.base(), "eva")
    few = {k: v[:1, :3] for k, v in batches()[0].items()}
    with pytest.raises(
        UserError, match=r"model\.layers\.0\.self_attn\.q_proj in the data span fewer than 16"
    ):
        lora_init.eva(tiny.model(), tiny.base(), tree, plan, tiny.model().table, [few])
