"""The chunked losses, values and gradients, against dense ones in float64 and by autodiff."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu

from ftjax import mesh
from ftjax.ops import einsum, linear_cross_entropy, linear_logprobs, shard
from ftjax.weights import LoraWeight

pytestmark = pytest.mark.fast
B, T, D, V = 3, 11, 5, 17


def unembed(head, hidden):
    return einsum("BXD,VD->BXV", hidden, head, jnp.float32)


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.normal(0, 1, (V, D)), dtype)
    hidden = jnp.asarray(rng.normal(0, 1, (B, T, D)), dtype)
    return head, hidden, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def weights(kind):
    rng = np.random.default_rng(1)
    w = rng.uniform(0.5, 2, (B, T)).astype(np.float32)
    if kind == "some":
        w *= rng.random((B, T)) < 0.4
    if kind == "a row of none":
        w[1] = 0
    if kind == "none":
        w[:] = 0
    if kind == "negative":
        w *= -1
    return jnp.asarray(w)


def dense_logprobs(head, hidden, targets):
    logits = jnp.einsum(
        "btd,vd->btv", hidden.astype(jnp.float32), head.astype(jnp.float32), precision="highest"
    )
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


def float64_loss(head, hidden, targets, weight):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    top = logits.max(-1)
    lse = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
    gold = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    return ((lse - gold) * np.asarray(weight, np.float64)).sum()


CASES = [("all", 11), ("some", 4), ("some", 256), ("a row of none", 4), ("none", 4), ("negative", 1)]


@pytest.mark.parametrize("kind,chunk", CASES)
def test_cross_entropy(kind, chunk):
    head, hidden, targets = inputs()
    weight = weights(kind)

    @jax.jit
    def ours(hidden):
        return linear_cross_entropy(unembed, head, hidden, targets, weight, chunk, True)[0]

    def dense(hidden):
        return -jnp.sum(dense_logprobs(head, hidden, targets) * weight)

    with jax.numpy_dtype_promotion("strict"):
        loss, grad = jax.value_and_grad(ours)(hidden)
    np.testing.assert_allclose(loss, float64_loss(head, hidden, targets, weight), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(grad, jax.grad(dense)(hidden), rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(grad[weight == 0], 0)


@pytest.mark.parametrize("kind", ["some", "none"])
def test_cross_entropy_with_a_trainable_head(kind):
    head, hidden, targets = inputs()
    weight = weights(kind)

    def ours(head, hidden):
        return 3 * linear_cross_entropy(unembed, head, hidden, targets, weight, 4, False)[0]

    def dense(head, hidden):
        return -3 * jnp.sum(dense_logprobs(head, hidden, targets) * weight)

    got = jax.value_and_grad(ours, (0, 1))(head, hidden)
    want = jax.value_and_grad(dense, (0, 1))(head, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("kind,chunk", CASES[1:5])
def test_logprobs(kind, chunk):
    head, hidden, targets = inputs()
    mask = weights(kind)

    def loss(f, head, hidden):
        return jnp.sum(jnp.sin(f(head, hidden)) * jnp.where(mask != 0, 1.0, 0.0))

    def ours(head, hidden):
        return linear_logprobs(unembed, head, hidden, targets, mask, chunk, False)

    def dense(head, hidden):
        return jnp.where(mask != 0, dense_logprobs(head, hidden, targets), 0.0)

    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_allclose(ours(head, hidden), dense(head, hidden), rtol=1e-5, atol=1e-6)
        got = jax.grad(loss, (1, 2))(ours, head, hidden)
    want = jax.grad(loss, (1, 2))(dense, head, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6), got, want)

    def with_frozen_head(head, hidden):
        return linear_logprobs(unembed, head, hidden, targets, mask, chunk, True)

    frozen = jax.grad(loss, 2)(with_frozen_head, head, hidden)
    np.testing.assert_allclose(frozen, want[1], rtol=1e-5, atol=3e-6)


def adapted_logprobs(head, hidden, targets, mask, chunk):
    """Dense, the head's dropout drawn for each chunk of the positions that count."""
    order = np.argsort(np.asarray(mask) == 0, axis=1, kind="stable")
    back = np.argsort(order, axis=1)
    x = jnp.take_along_axis(hidden, jnp.asarray(order)[..., None], 1)
    size = min(-(-chunk // B), T)  # a head with dropout is cut row by row
    x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0)))
    logits = []
    for i in range(x.shape[1] // size):
        piece, keep = x[:, i * size : (i + 1) * size], 1.0
        if head.rng is not None:
            key = jax.random.fold_in(head.rng, i)
            keep = jax.random.bernoulli(key, 1 - head.dropout, piece.shape) / (1 - head.dropout)
        low = ((piece * keep) @ head.a) @ head.b
        logits.append(piece @ head.base.T + low * head.scale)
    logp = jax.nn.log_softmax(jnp.take_along_axis(jnp.concatenate(logits, 1), back[..., None], 1))
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind,chunk", [("all", 4), ("some", 3), ("some", 256)])
def test_an_adapted_head(kind, chunk, dropout):
    """The factors get gradients, the base and the dropout's key none; each chunk has its own mask."""
    base, hidden, targets = inputs()
    weight = weights(kind)
    rng = np.random.default_rng(3)
    factors = jnp.asarray(rng.normal(0, 1, (D, 2)), jnp.float32), jnp.asarray(rng.normal(0, 1, (2, V)))
    key = jax.random.key(5) if dropout else None

    def head(factors):
        a, b = factors
        return LoraWeight(base, a, b.astype(jnp.float32), jnp.float32(0.7), key, dropout)

    def unembed(w, x):
        w = w.replace(base=w.base.T)
        return einsum("BXD,DV->BXV", x, w, jnp.float32)

    # Zero for some positions that count: the backward pass has to take the same chunks nevertheless.
    cotangent = jnp.where(jnp.arange(T) % 3 == 1, 0.0, jnp.sin(jnp.arange(T) + 1.0))

    def loss(factors, hidden):
        return 3 * linear_cross_entropy(unembed, head(factors), hidden, targets, weight, chunk, False)[0]

    def dense_loss(factors, hidden):
        return -3 * jnp.sum(weight * adapted_logprobs(head(factors), hidden, targets, weight, chunk))

    def logprobs(factors, hidden):
        logp = linear_logprobs(unembed, head(factors), hidden, targets, weight, chunk, False)
        return jnp.sum(logp * cotangent)

    def dense_logprobs(factors, hidden):
        logp = adapted_logprobs(head(factors), hidden, targets, weight, chunk)
        return jnp.sum(jnp.where(weight != 0, logp, 0.0) * cotangent)

    for ours, dense in ((loss, dense_loss), (logprobs, dense_logprobs)):
        got = jax.jit(jax.value_and_grad(ours, (0, 1)))(factors, hidden)
        want = jax.value_and_grad(dense, (0, 1))(factors, hidden)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_no_gradient_of_an_adapted_heads_base_is_formed():
    base, hidden, targets = inputs()
    head = LoraWeight(base.T, jnp.ones((D, 2)), jnp.ones((2, V)), jnp.float32(1))

    def loss(w):
        args = hidden, targets, weights("all"), 4, False
        return linear_cross_entropy(lambda w, x: einsum("BXD,DV->BXV", x, w, jnp.float32), w, *args)[0]

    _, pull = jax.vjp(loss, head)
    assert not any(x.shape == (D, V) and (x != base.T).any() for x in jax.tree.leaves(pull))
    assert not pull(jnp.float32(1))[0].base.any()


def test_bfloat16():
    head, hidden, targets = inputs(jnp.bfloat16)
    weight = weights("some")

    def ours(hidden):
        return linear_cross_entropy(unembed, head, hidden, targets, weight, 4, True)[0]

    loss, grad = jax.value_and_grad(ours)(hidden)
    exact = jax.grad(lambda x: -jnp.sum(dense_logprobs(head, x, targets) * weight))(
        hidden.astype(jnp.float32)
    )
    np.testing.assert_allclose(loss, float64_loss(head, hidden, targets, weight), rtol=1e-5)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(grad.astype(np.float32), exact, rtol=0.02, atol=0.02)


# -- Over a mesh


def vocabulary(head, x):
    return einsum("BXTZ"[: x.ndim - 1] + "D,DV->" + "BXTZ"[: x.ndim - 1] + "V", x, head, jnp.float32)


def on_mesh(devices, B, T, D, V, dtype=jnp.float32):
    def shape(axes, dtype, *dims, rules=mesh.ACTIVATION_RULES):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=mesh.sharding(devices, axes, rules))

    head = shape("DV", dtype, D, V, rules=mesh.WEIGHT_RULES)
    tokens = shape("BT", jnp.int32, B, T)
    return head, shape("BTD", dtype, B, T, D), tokens, shape("BT", jnp.float32, B, T)


def the_loss(kind, frozen, chunk):
    """A scalar of the head and the hidden states, as the recipes make it, and its gradients."""

    def loss(head, hidden, targets, weight):
        args = shard(head, "DV"), hidden, targets, weight, chunk, frozen
        if kind == "cross-entropy":
            return linear_cross_entropy(vocabulary, *args, 0.1, 1e-2)[0]
        return jnp.sum(jnp.sin(linear_logprobs(vocabulary, *args)))

    return jax.jit(jax.value_and_grad(loss, 1 if frozen else (0, 1)))


COLLECTIVE = re.compile(r"= (\(?\w+\[[^=]*?) (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(")


def collectives_of(hlo: str) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape of a result) of all collectives, those of a tuple apart."""
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for types, kind in COLLECTIVE.findall(hlo)
        for dims in re.findall(r"\w+\[([\d,]*)\]", types)
    ]


def only_small_ones(hlo, B, D, V, chunk, tp, frozen):
    """What crosses devices is a few numbers a token of a chunk, its hidden states' gradient, and once the
    head and its gradient: no logits."""
    found = set(collectives_of(hlo))
    assert found, "nothing was sharded"
    head = {("all-gather", (D, V // tp))}
    head |= set() if frozen else {(kind, (D, V // tp)) for kind in ("all-reduce", "reduce-scatter")}
    tokens = [(1, chunk), (1, chunk, D), (chunk, D), (chunk,), (1,), ()]
    small = {("all-reduce", shape) for shape in tokens}
    assert found <= small | head, found - small - head
    functions, _, entry = hlo.partition("\nENTRY ")
    # in the loop over chunks never; where the compiler has unrolled it, not once a chunk
    assert (D, V // tp) not in {shape for _, shape in collectives_of(functions)}
    assert collectives_of(entry).count(("all-gather", (D, V // tp))) <= 1


@pytest.mark.parametrize(
    ("kind", "frozen", "fsdp", "tp"),
    [
        ("cross-entropy", True, 2, 4),
        ("cross-entropy", False, 2, 4),
        ("logprobs", True, 2, 4),
        ("logprobs", False, 2, 4),
        ("cross-entropy", False, 1, 8),
        ("cross-entropy", False, 8, 1),
    ],
)
def test_a_sharded_vocabulary_is_never_gathered(kind, frozen, fsdp, tp):
    B, T, D, V, chunk = 8, 12, 24, 88, 16
    rng = np.random.default_rng(0)
    values = rng.normal(size=(D, V)), rng.normal(size=(B, T, D)), rng.integers(0, V, (B, T))
    weight = rng.uniform(0.5, 2, (B, T)) * (rng.random((B, T)) < 0.6)
    values = [np.asarray(x, t) for x, t in zip((*values, weight), ("f4", "f4", "i4", "f4"), strict=True)]
    want = the_loss(kind, frozen, chunk)(*values)
    devices = mesh.make_mesh(mesh.MeshOptions(fsdp=fsdp, tp=tp))
    with mesh.use(devices):
        shapes = on_mesh(devices, B, T, D, V)
        step = the_loss(kind, frozen, chunk)
        spread = [jax.device_put(x, s.sharding) for x, s in zip(values, shapes, strict=True)]
        got = step(*spread)
        only_small_ones(step.lower(*shapes).compile().as_text(), B, D, V, chunk, tp, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)


@tpu.needs_libtpu
def test_nor_on_tpu():
    B, T, D, V, chunk = 4, 512, 256, 2048, 128
    devices = mesh.make_mesh(mesh.MeshOptions(fsdp=2, tp=2), tpu.devices())
    with mesh.use(devices):
        shapes = on_mesh(devices, B, T, D, V, jnp.bfloat16)
        program = tpu.program(the_loss("cross-entropy", False, chunk), *shapes)
    only_small_ones(program.hlo, B, D, V, chunk, 2, False)


# -- Memory


@pytest.mark.parametrize(("kind", "frozen"), [("cross-entropy", False), ("logprobs", True)])
def test_no_memory_grows_with_tokens_times_vocabulary(kind, frozen):
    """Temporaries are f(tokens) + g(vocabulary): doubling the tokens costs the same at any vocabulary. Their
    logits would be 16 MiB more at the larger."""

    def temporaries(T, V):
        S = jax.ShapeDtypeStruct
        shapes = S((16, V), jnp.bfloat16), S((2, T, 16), jnp.bfloat16), S((2, T), jnp.int32)
        compiled = the_loss(kind, frozen, 64).lower(*shapes, S((2, T), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    (small, more), (large, both) = ([temporaries(T, V) for T in (1024, 2048)] for V in (1001, 3001))
    assert both - large <= more - small + 2**17
    assert large < 2**21 + 8 * 4 * 64 * 3001 + 4 * 4 * 16 * 3001  # some of a chunk's logits, of the head
