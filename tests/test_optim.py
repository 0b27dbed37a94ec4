"""Optimisers, schedules, and how they differ between weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.errors import UserError
from ftjax.optim import OptimGroup, OptimOptions, geometry, make_optimizer, make_schedule, state_shardings
from ftjax.weights import LOOKUP, Run, Table, Weight, flatten

LAYERS = (Run("layers", (("layers/", "layers"),), ((0, 1),)),)
TABLE = Table(
    rows={
        "embed": Weight("V->D", "embed.weight", LOOKUP),
        "layers/q": Weight("D->NH", "layers.{layer}.q.weight"),
        "layers/o": Weight("NH->D", "layers.{layer}.o.weight"),
        "layers/norm": Weight("D", "layers.{layer}.norm.weight"),
        "layers/q_bias": Weight("NH", "layers.{layer}.q.bias"),
        "final_norm": Weight("D", "norm.weight"),
    },
    sizes={"V": 7, "D": 6, "N": 2, "H": 3, "L": 2},
    runs=LAYERS,
)


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tree = {"layers": {}}
    for path in TABLE.rows:
        x = jnp.asarray(rng.normal(size=TABLE.shape(path)), dtype)
        if path.startswith("layers/"):
            tree["layers"][path[7:]] = x
        else:
            tree[path] = x
    return tree


def factors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 4, 2, 3))
    return {"layers": {"q": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}}


def constant(**fields):
    return OptimOptions(schedule="constant", warmup_ratio=0.0, clip_norm=None, **fields)


def one_update(options, tree, grads=None, table: Table | None = TABLE):
    tx, _ = make_optimizer(options, tree, 10, table)
    grads = jax.tree.map(jnp.ones_like, tree) if grads is None else grads
    return flatten(tx.update(grads, tx.init(tree), tree)[0])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "lr"), [("adamw", 0.1), ("adafactor", 0.1), ("lion", 0.05), ("muon", 0.3), ("sgd", 0.05)]
)
def test_each_optimiser_goes_downhill_with_float32_state(name, lr):
    tree = params(jnp.bfloat16 if name == "adamw" else jnp.float32)
    tx, _ = make_optimizer(OptimOptions(name=name, lr=lr), tree, 30, TABLE)

    def loss(tree):
        return sum(jnp.mean(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(tree))

    @jax.jit
    def run(tree):
        def step(carry, _):
            tree, state = carry
            updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            return (optax.apply_updates(tree, updates), state), None

        return jax.lax.scan(step, (tree, tx.init(tree)), length=30)[0]

    after, state = run(tree)
    assert loss(after) < 0.5 * loss(tree)
    kinds = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert kinds <= {jnp.dtype("float32")}
    assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, tree)


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(1)
    start, grads = rng.normal(size=(4, 3)).astype("f4"), rng.normal(size=(5, 4, 3)).astype("f4")
    fields = {"lr": 0.01, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-7}
    tx, _ = make_optimizer(constant(**fields), {"w": start}, 5)
    ours = {"w": jnp.asarray(start)}
    state = tx.init(ours)
    theirs = torch.tensor(start, requires_grad=True)
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-7)
    for g in grads:
        updates, state = tx.update({"w": jnp.asarray(g)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(g)
        adamw.step()
        np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), atol=1e-6)


@pytest.mark.fast
def test_vectors_get_no_weight_decay_however_they_are_stacked():
    grads = jax.tree.map(jnp.zeros_like, params())
    updates = one_update(constant(name="sgd", lr=1.0, weight_decay=0.5), params(), grads)
    flat = flatten(params())
    for path in ("embed", "layers/q", "layers/o"):
        np.testing.assert_allclose(updates[path], -0.5 * flat[path], rtol=1e-6)
    for path in ("layers/norm", "layers/q_bias", "final_norm"):
        assert not updates[path].any()


@pytest.mark.fast
def test_groups_scale_and_decay_what_they_match():
    groups = (OptimGroup("norm", lr=0.1, weight_decay=0.2), OptimGroup("^layers/", lr=3.0))
    updates = one_update(constant(name="sgd", lr=1.0, groups=groups, weight_decay=0.0), params())
    flat = flatten(params())
    np.testing.assert_allclose(updates["embed"], -1.0)
    np.testing.assert_allclose(updates["layers/q"], -3.0)
    for path in (
        "layers/norm",
        "final_norm",
    ):  # the first group that matches has them, and its decay is explicit
        np.testing.assert_allclose(updates[path], -0.1 * (1 + 0.2 * flat[path]), rtol=1e-5)


@pytest.mark.fast
def test_lora_plus_scales_b():
    updates = one_update(constant(name="sgd", lr=1.0, lora_plus_ratio=16.0), factors())
    np.testing.assert_allclose(updates["layers/q/a"], -1.0)
    np.testing.assert_allclose(updates["layers/q/b"], -16.0)


@pytest.mark.fast
def test_muon_orthogonalises_each_matrix_of_a_stack():
    rng = np.random.default_rng(2)
    tree = {"layers": params()["layers"] | factors()["layers"] | {"o": params()["layers"]["o"]}}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)
    updates = one_update(constant(name="muon", lr=1.0), tree, grads)
    for path, shape in {"layers/q/a": (6, 4), "layers/q/b": (4, 6), "layers/o": (6, 6)}.items():
        for layer in range(2):
            values = np.linalg.svd(np.asarray(updates[path][layer]).reshape(shape), compute_uv=False)
            values /= 0.2 * max(shape) ** 0.5
            assert 0.4 < values.min() and values.max() < 1.4  # five Newton-Schulz steps bring them near 1
    adam = -np.sign(flatten(grads)["layers/norm"])  # Adam's first step
    np.testing.assert_allclose(updates["layers/norm"], adam, atol=1e-4)


@pytest.mark.fast
def test_adafactor_treats_each_matrix_of_a_stack_by_itself():
    sizes = {"D": 128, "N": 2, "H": 64, "L": 2}
    table = Table({"layers/w": Weight("D->NH", "{layer}")}, sizes, LAYERS)
    rng = np.random.default_rng(3)
    grads = jnp.asarray(
        rng.normal(size=(2, 128, 2, 64)) * np.array([1, 100]).reshape(2, 1, 1, 1), jnp.float32
    )
    tree = {"layers": {"w": jnp.ones_like(grads)}}
    both = one_update(constant(name="adafactor", lr=1.0), tree, {"layers": {"w": grads}}, table)["layers/w"]
    for layer in range(2):
        flat = {"w": grads[layer].reshape(128, 128)}
        alone = one_update(constant(name="adafactor", lr=1.0), flat, flat, None)["w"]
        np.testing.assert_allclose(both[layer].reshape(128, 128), alone, rtol=1e-5)


@pytest.mark.fast
def test_gradients_are_clipped_by_their_global_norm():
    grads = {"x": jnp.array([3.0]), "y": jnp.array([4.0])}
    options = OptimOptions(name="sgd", lr=1.0, schedule="constant", warmup_ratio=0.0, clip_norm=1.0)
    updates = one_update(options, grads, grads, None)
    np.testing.assert_allclose([updates["x"][0], updates["y"][0]], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "points"),
    [
        ({"schedule": "constant"}, {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ({"schedule": "linear"}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),
        ({"schedule": "cosine"}, {9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),
        ({"schedule": "cosine", "final_lr_ratio": 0.2}, {10: 1.0, 55: 0.6, 100: 0.2}),
        ({"schedule": "wsd", "decay_ratio": 0.2}, {9: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
    ],
)
def test_schedules(fields, points):
    schedule = make_schedule(OptimOptions(lr=1.0, warmup_steps=10, **fields), 100)
    for step, value in points.items():
        assert schedule(step) == pytest.approx(value, abs=1e-6), step


@pytest.mark.fast
def test_warm_up_by_ratio_rounds_up():
    schedule = make_schedule(OptimOptions(lr=1.0, schedule="constant", warmup_ratio=0.03), 50)
    assert [float(schedule(i)) for i in range(3)] == [0.5, 1.0, 1.0]
    assert make_schedule(OptimOptions(lr=1.0), 1)(0) == 1.0  # a run of one step trains


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "optim.lr=0.0: a positive number"),
        ({"beta2": 1.0}, "optim.beta2=1.0: a number from 0 to below 1"),
        ({"warmup_ratio": 3.0}, "optim.warmup_ratio=3.0: a share from 0 to 1"),
        ({"clip_norm": 0.0}, "or null for none"),
        ({"groups": (OptimGroup("("),)}, "not a regular expression"),
        ({"groups": (OptimGroup("x", lr=-1.0),)}, r"optim.groups\[0\].lr=-1.0"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(UserError, match=message):
        OptimOptions(**fields)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"groups": (OptimGroup("layers/k"),)},
            r"groups\[0\].match='layers/k' matches no weight; paths are like emb|lay",
        ),
        (
            {"groups": (OptimGroup("."), OptimGroup("norm"))},
            r"groups\[1\].* only weights that an earlier group has",
        ),
        ({"lora_plus_ratio": 4.0}, "this run trains no LoRA factors"),
        ({"warmup_steps": 10}, "the run has only 10 steps"),
        ({"schedule": "wsd", "warmup_steps": 5, "decay_ratio": 0.6}, "5 steps of warm-up and 6 of decay"),
    ],
)
def test_options_that_do_not_fit_the_run(fields, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimOptions(**fields), params(), 10, TABLE)


@pytest.mark.fast
def test_geometry_follows_the_table():
    assert geometry("layers/q", 4, TABLE) == (1, 1, "linear")
    assert geometry("layers/o", 4, TABLE) == (1, 2, "linear")
    assert geometry("layers/q_bias", 3, TABLE) == (1, 0, "vector")
    assert geometry("layers/o/a", 4, TABLE) == (1, 2, "a")
    assert geometry("layers/q/b", 4, TABLE) == (1, 1, "b")
    assert geometry("embed", 2, TABLE).kind == "lookup"


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_results_do_not_depend_on_the_sharding(name):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.normal(size=(128, 128)), "f4"), "v": jnp.asarray(rng.normal(size=8), "f4")}
    spread = {"w": NamedSharding(mesh, P("fsdp", "tp")), "v": NamedSharding(mesh, P("fsdp"))}
    tx, _ = make_optimizer(OptimOptions(name=name, lr=0.1, weight_decay=0.1), tree, 5)

    def step(tree, state):
        return tx.update(jax.tree.map(jnp.sin, tree), state, tree)[0]

    layout = state_shardings(tx, tree, spread, NamedSharding(mesh, P()))
    apart = jax.device_put(tree, spread)
    state = jax.jit(tx.init, out_shardings=layout)(apart)
    if name == "adamw":
        assert [x.sharding for x in jax.tree.leaves(state) if x.shape == (128, 128)] == [spread["w"]] * 2
    want, got = jax.jit(step)(tree, tx.init(tree)), jax.jit(step)(apart, state)
    for path in tree:
        np.testing.assert_allclose(got[path], want[path], atol=2e-6, rtol=1e-4)


@pytest.mark.fast
def test_state_shardings_follow_the_weights():
    tree = params()
    tx, _ = make_optimizer(OptimOptions(), tree, 5, TABLE)
    marks = jax.tree_util.tree_map_with_path(lambda path, _: str(path), tree)
    flat = jax.tree.leaves(state_shardings(tx, tree, marks, "everywhere"))
    assert flat.count("everywhere") == 2  # Adam's count and the schedule's
    assert sorted(set(flat) - {"everywhere"}) == sorted(jax.tree.leaves(marks))


def test_geometry_of_what_is_trained_beside_factors():
    """Whole weights are as their row, m is a vector, rows are a look-up's, and what is taken off is fixed."""
    assert geometry("layers/q/full", 4, TABLE) == geometry("layers/q", 4, TABLE)
    assert geometry("layers/norm/full", 2, TABLE) == geometry("layers/norm", 2, TABLE)
    assert geometry("layers/q/m", 3, TABLE) == (0, 0, "vector")
    assert geometry("embed/rows", 2, TABLE) == (0, 1, "lookup")
    assert {geometry(f"layers/q/{name}", 4, TABLE).kind for name in ("a0", "b0")} == {"fixed"}
