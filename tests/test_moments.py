"""Moments in fewer bits, and in the host's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu

from ftjax import checkpoint, mesh, moments, train
from ftjax.errors import UserError
from ftjax.moments import Moment8, code_value, dequantise, quantise
from ftjax.optim import OptimOptions, make_optimizer

pytestmark = pytest.mark.fast
KEPT = [dict(state_dtype="bfloat16"), dict(state_dtype="int8"), dict(offload=True)]
KEPT += [dict(state_dtype="bfloat16", offload=True)]
names = lambda kept: "-".join(map(str, kept.values()))  # noqa: E731


# -- Codes


def test_codes_are_those_of_bitsandbytes():
    """But for 1.0, which its tables add, and with a decade more below where there is no sign."""
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for signed, top in ((True, moments.SIGNED_TOP), (False, moments.UNSIGNED_TOP)):
        theirs = np.array(bnb.create_dynamic_map(signed=signed))
        theirs = theirs[(theirs > 0) & (theirs < 1)]
        ours = np.array(code_value(jnp.arange(1, 2 ** (top + 1)), top))
        np.testing.assert_allclose(ours[ours > theirs.min() * 0.99], theirs, rtol=2e-6)
        assert len(ours) - len(theirs) == (0 if signed else 1)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_found_again(signed):
    top = moments.SIGNED_TOP if signed else moments.UNSIGNED_TOP
    codes = jnp.arange(2 ** (top + 1))
    codes = jnp.concatenate([codes, -codes[1:]]) if signed else codes
    x = jnp.where(codes < 0, -1, 1) * code_value(jnp.abs(codes), top) * 3e-5
    found = quantise(x[None], signed, 0.5)
    np.testing.assert_array_equal(np.asarray(found.codes, np.int32)[0], codes)
    np.testing.assert_allclose(dequantise(found)[0], x, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 64, 16), (7, 512), (40, 101), (5, 4, 4, 64), (300,)])
def test_an_element_is_off_by_less_than_a_code(shape):
    block = moments.block_shape(shape)
    assert all(n % b == 0 for n, b in zip(shape, block, strict=True)) and np.prod(block) <= 256
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * 10.0 ** rng.integers(-4, 1, shape)).astype(np.float32)
    for signed in (True, False):
        values = x if signed else x**2
        found = quantise(jnp.asarray(values), signed, 0.5)
        codes = np.array(code_value(jnp.arange(256), moments.SIGNED_TOP if signed else moments.UNSIGNED_TOP))
        codes = codes[:128] if signed else codes
        scale = np.array(moments._spread(found.scale, shape, block))
        share = np.clip(np.abs(values) / scale, 0, codes[-1])
        above = np.clip(np.searchsorted(codes, share), 1, None)
        nearest = np.minimum(share - codes[above - 1], codes[above] - share)
        if not signed:  # what is not zero does not become it
            nearest = np.where(share < codes[1], codes[1] - share, nearest)
        got = np.array(dequantise(found))
        np.testing.assert_array_less(np.abs(got - values) / scale, nearest * 1.001 + 2e-7)


def test_rounding_is_right_on_average_and_never_ends_a_second_moment():
    x = jnp.asarray(np.geomspace(1e-9, 1, 256), jnp.float32)[None]
    mean = np.mean(
        [
            dequantise(quantise(x, False, (moments._bits(x.shape, jnp.int32(i), 7) >> 8) / 2.0**24))
            for i in range(400)
        ],
        axis=0,
    )
    representable = np.asarray(x) > 1e-7
    off = mean[representable] / np.asarray(x)[representable] - 1
    assert np.abs(off).max() < 0.15 and abs(off.mean()) < 0.01, (off.max(), off.mean())
    assert (mean > 0).all()


# -- Optimisers


def problem():
    """(loss, weights): a two-layer regression whose inputs differ in size by a factor of 1,000."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(256, 64)) * np.geomspace(1e-2, 10, 64)).astype(np.float32)
    y = np.tanh(x @ rng.normal(0, 0.2, (64, 16))).astype(np.float32)
    tree = {
        "a": jnp.asarray(rng.normal(0, 0.05, (64, 128)), jnp.float32),
        "b": jnp.asarray(rng.normal(0, 0.05, (128, 64)), jnp.float32),
        "bias": jnp.zeros(64),
    }

    def loss(tree):
        out = jnp.tanh(x @ tree["a"]) @ tree["b"] + tree["bias"]
        return jnp.mean((out[:, :16] - y) ** 2)

    return loss, tree


@functools.cache
def trained(name, **kept):
    """(the last loss, the state) after 150 steps."""
    loss, tree = problem()
    rates = {"adamw": 3e-3, "lion": 1e-3, "muon": 3e-3, "sgd": 0.1}
    tx, _ = make_optimizer(OptimOptions(name=name, lr=rates[name], **kept), tree, 150)

    @jax.jit
    def step(tree, state):
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return jax.tree.map(jnp.add, tree, updates), state

    state = jax.jit(tx.init)(tree)
    for _ in range(150):
        tree, state = step(tree, state)
    return float(loss(tree)), state


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_training_ends_where_float32_does(name, dtype):
    start = float(problem()[0](problem()[1]))
    full, few = trained(name)[0], trained(name, state_dtype=dtype)[0]
    assert full < 0.5 * start
    assert few < full + 0.03 * (start - full), (start, full, few)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_offloaded_moments_are_the_same_numbers(name):
    (loss, state), (want, _) = trained(name, offload=True), trained(name)
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    where = {x.shape: moments.in_host_memory(x) for x in jax.tree.leaves(state)}
    assert where[(64, 128)] and not where[(64,)] and not where[()]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_second_moment_falls(dtype):
    """By a thousandth a step; rounded to the nearest it would stay as it is."""
    tree = {"w": jnp.ones((64, 128))}
    tx, _ = make_optimizer(OptimOptions(state_dtype=dtype, clip_norm=None), tree, 10)
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(rng.uniform(0.5, 1, (64, 128)), jnp.float32)}
    _, state = jax.jit(tx.update)(grads, tx.init(tree), tree)

    def second(state):
        (nu,) = [
            x
            for p, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, Moment8))
            if ".nu" in map(str, p)
        ]
        return np.mean(dequantise(nu) if isinstance(nu, Moment8) else nu.astype(jnp.float32))

    def body(_, state):
        return tx.update({"w": jnp.zeros((64, 128))}, state, tree)[1]

    after = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, body, state))(state)
    np.testing.assert_allclose(second(after) / second(state), 0.999**1000, rtol=0.03)


def devices():
    return mesh.make_mesh(mesh.MeshOptions(fsdp=4, tp=2))


def spread(tree, on):
    axes = {"a": "DF", "b": "FD", "bias": "D"}
    return {k: jax.device_put(x, mesh.sharding(on, axes[k])) for k, x in tree.items()}


def loss_fn(trainable, frozen, batch):
    loss = problem()[0](trainable) * jnp.float32(batch["x"].size)
    return loss, {"loss": loss, "weight": jnp.float32(batch["x"].size)}


BATCH = {"x": jnp.ones((1, 2, 3))}


def start(kept, tree=None, on=None):
    """(state, step) on a mesh or one device."""
    tree = problem()[1] if tree is None else tree
    tx, _ = make_optimizer(OptimOptions(lr=3e-3, **kept), tree, 20)
    return train.init_state(tree, tx, on and mesh.state_shardings(on, tx, tree)), train.make_train_step(
        loss_fn, tx, 0
    )


@pytest.mark.parametrize("kept", KEPT, ids=names)
def test_a_mesh_keeps_them_as_their_weights_and_a_run_resumes_bit_for_bit(kept, tmp_path):
    on = devices()
    with mesh.use(on):
        state, step = start(kept, spread(problem()[1], on), on)
        for _ in range(3):
            state, metrics = step(state, {}, BATCH)
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
            weight = next((k for k in ("a", "b") if f"['{k}']" in str(path[-2:])), None)
            if weight and x.ndim == 2 and str(path[-1]) != ".scale":
                host = kept.get("offload", False)
                assert x.sharding.spec == state.trainable[weight].sharding.spec, path
                assert (x.sharding.memory_kind == "pinned_host") == host, path
        saver = checkpoint.Checkpoints(tmp_path)
        saver.save(state, {})
        saver.wait()
        fresh, _ = start(kept, spread(problem()[1], on), on)
        restored, _ = saver.restore(fresh)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            assert old.dtype == new.dtype and old.sharding.is_equivalent_to(new.sharding, old.ndim)
            np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
        one, two = step(state, {}, BATCH)[0], step(restored, {}, BATCH)[0]
        saver.close()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, two)
    alone, step = start(kept)
    for _ in range(3):
        alone, at_one = step(alone, {}, BATCH)
    np.testing.assert_allclose(metrics["loss"], at_one["loss"], rtol=2e-3)


@pytest.mark.parametrize("kept", KEPT, ids=names)
def test_a_step_that_is_not_finite_leaves_them_as_they_were(kept):
    state, _ = start(kept)
    tree = state.trainable
    tx, _ = make_optimizer(OptimOptions(lr=3e-3, **kept), tree, 20)

    def bad(trainable, frozen, batch):
        loss, sums = loss_fn(trainable, frozen, batch)
        return loss * batch["x"][0, 0], {k: v * batch["x"][0, 0] for k, v in sums.items()}

    step = train.make_train_step(bad, tx, 0)
    state, _ = step(state, {}, BATCH)
    before = jax.tree.map(np.array, state)
    after, metrics = step(state, {}, {"x": jnp.full((1, 2, 3), jnp.nan)})
    assert not metrics["finite"]
    for name in ("trainable", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))


def test_what_has_no_effect_is_said():
    tree = {"w": jnp.ones((8, 8))}
    with pytest.raises(UserError, match="optim.offload=True: not with state_dtype: int8"):
        OptimOptions(state_dtype="int8", offload=True)
    for kept in KEPT[1:3]:
        with pytest.raises(UserError, match="fewer than 4,096 elements"):
            make_optimizer(OptimOptions(**kept), tree, 5)
    make_optimizer(OptimOptions(state_dtype="bfloat16"), tree, 5)


# -- Memory


def state_bytes(**kept):
    tree = {"w": jax.ShapeDtypeStruct((8, 256, 1024), jnp.float32)}
    tx, _ = make_optimizer(OptimOptions(**kept), tree, 5)
    state = jax.eval_shape(tx.init, tree)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / (8 * 256 * 1024)


def test_bytes_of_a_weight():
    assert [round(state_bytes(state_dtype=d), 2) for d in ("float32", "bfloat16", "int8")] == [8.0, 4.0, 2.03]


@tpu.needs_libtpu
def test_on_tpu():
    """Offloaded moments lie in the host's memory and travel by asynchronous copies; in 8 bits they take a
    quarter of what they do among the arguments. While weights are updated some are on the chip in float32, in
    temporaries: these grow, by less than what offloading saves, and in 8 bits by more (not held here)."""
    L, N = 8, 2048
    on = mesh.make_mesh(mesh.MeshOptions(fsdp=4), tpu.devices())
    sharding = mesh.sharding(on, "DF")
    tree = {f"w{i}": jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=sharding) for i in range(L)}
    x = jax.ShapeDtypeStruct((1, 8, N), jnp.float32, sharding=mesh.batch_sharding(on))

    def loss(trainable, frozen, batch):
        x = batch["x"]
        for w in trainable.values():
            x = jnp.tanh(x @ w)
        return jnp.sum(x), {"loss": jnp.sum(x), "weight": jnp.float32(8)}

    def program(**kept):
        tx, _ = make_optimizer(OptimOptions(**kept), tree, 20)
        state = jax.eval_shape(functools.partial(train.init_state, tx=tx), tree)
        make = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        state = jax.tree.map(make, state, mesh.state_shardings(on, tx, tree))
        with mesh.use(on):
            return tpu.program(train.make_train_step(loss, tx, 0), state, {}, {"x": x})

    one = N * N * 4 // 4  # a moment of one weight on one chip
    plain, few, away = program(), program(state_dtype="int8"), program(offload=True)
    assert plain.memory.arguments - away.memory.arguments >= 0.99 * 2 * L * one
    assert plain.memory.arguments - few.memory.arguments >= 0.74 * 2 * L * one
    assert away.memory.host >= 2 * L * one
    assert away.memory.total < plain.memory.total
    assert away.hlo.count("S(5)") >= 4 * L and "copy-start" in away.hlo


def test_cuda_has_a_program_for_it():
    """It is lowered, not run: no card is at hand."""
    tx, _ = make_optimizer(OptimOptions(offload=True), problem()[1], 20)
    step = train.make_train_step(loss_fn, tx, 0)
    state = jax.eval_shape(functools.partial(train.init_state, tx=tx), problem()[1])
    text = step.trace(state, {}, BATCH).lower(lowering_platforms=("cuda",)).as_text()
    assert "pinned_host" in text
