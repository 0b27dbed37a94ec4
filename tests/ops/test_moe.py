"""Experts against a dense loop and transformers' modules; routers and their losses against transformers."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import lora
from ftjax.ops import (
    balance_loss,
    einsum,
    expert_bias,
    experts,
    grouped,
    router_statistics,
    sigmoid_group_top_k,
    silu_times,
    softmax_group_top_k,
    top_k_sigmoid,
    top_k_softmax,
    z_loss,
)
from ftjax.weights import LoraWeight

pytestmark = pytest.mark.fast
X, E, C, D, F, R = 13, 6, 2, 8, 5, 3
SIZES = np.array([3, 0, 4, 0, 5, 1], np.int32)  # experts without rows among them
EXPERT_M = np.repeat(np.arange(E), SIZES)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), dtype)


def close(got, want, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def lora_weight(ins, outs, scale, **kw):
    a, b = normal(E, *ins, R, seed=2), normal(E, R, *outs, seed=3)
    return LoraWeight(normal(E, *ins, *outs, seed=1), a, b, scale, **kw)


AXES = {"D->F": ((D,), (F,)), "D->NH": ((D,), (2, 5)), "FU->D": ((5, 2), (D,))}


@pytest.mark.parametrize("axes", AXES)
def test_grouped_and_its_gradients(axes):
    ins, outs = AXES[axes]
    rows, w = normal(X, *ins), normal(E, *ins, *outs, seed=1)

    def dense(rows, w):
        return jnp.einsum("mi,mio->mo", rows.reshape(X, -1), w.reshape(E, np.prod(ins), -1)[EXPERT_M])

    with jax.numpy_dtype_promotion("strict"):
        assert grouped(rows, w, SIZES).shape == (X, *outs)
        got = jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(grouped(*a, SIZES))), (0, 1))(rows, w)
    want = jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(dense(*a))), (0, 1))(rows, w)
    close(got, want)
    np.testing.assert_array_equal(got[1][1][SIZES == 0], 0)


@pytest.mark.parametrize("scale", [jnp.float32(0.7), jnp.arange(1, E + 1, dtype=jnp.float32) / 4])
@pytest.mark.parametrize("axes", AXES)
def test_grouped_lora_equals_the_merged_weight(axes, scale):
    ins, outs = AXES[axes]
    rows, w = normal(X, *ins), lora_weight(ins, outs, scale)

    def loss(rows, factors, merge):
        adapted = w.replace(a=factors[0], b=factors[1])
        if merge:
            scale_E = jnp.broadcast_to(w.scale, E)
            each = [jax.tree.map(lambda x, e=e: x[e], adapted.replace(scale=scale_E)) for e in range(E)]
            adapted = jnp.stack([lora.merged(x) for x in each])
        return jnp.sum(jnp.sin(grouped(rows, adapted, SIZES)))

    with jax.numpy_dtype_promotion("strict"):
        got = jax.value_and_grad(loss, (0, 1))(rows, (w.a, w.b), False)
    want = jax.value_and_grad(loss, (0, 1))(rows, (w.a, w.b), True)
    close(got, want, 2e-4, 2e-4)


def test_grouped_lora_of_one_expert_is_einsums():
    """Dropout too: the same mask of the same key."""
    rows, w = normal(X, D), lora_weight((D,), (F,), jnp.float32(0.7), rng=jax.random.key(0), dropout=0.4)
    one = jax.tree.map(lambda x: x[:1], w.replace(rng=None, scale=None))
    one = one.replace(rng=w.rng, scale=w.scale)
    single = one.replace(base=one.base[0], a=one.a[0], b=one.b[0])
    want = einsum("XD,DF->XF", rows, single)
    close(grouped(rows, one, jnp.array([X], jnp.int32)), want)
    assert np.abs(grouped(rows, one.replace(rng=None), jnp.array([X], jnp.int32)) - want).max() > 0.1


def test_grouped_bfloat16_accumulates_in_float32_and_is_rounded_once():
    rows, w = normal(X, 512, dtype=jnp.bfloat16), lora_weight((512,), (F,), jnp.float32(0.02))
    w = w.replace(base=w.base.astype(jnp.bfloat16))
    g = normal(X, F, seed=5, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        assert grouped(rows, w, SIZES, jnp.float32).dtype == jnp.float32
        got, pull = jax.vjp(lambda rows, w: grouped(rows, w, SIZES), rows, w.base)
        grads = pull(g)
    exact, pull = jax.vjp(
        lambda r, w: grouped(r, w, SIZES), rows.astype(jnp.float32), w.base.astype(jnp.float32)
    )
    assert {x.dtype for x in (got, *grads)} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip((got, *grads), (exact, *pull(g.astype(jnp.float32))), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-5)
    low = grouped(rows, w, SIZES, jnp.float32)  # the low-rank branch's input is bfloat16
    full = grouped(rows.astype(jnp.float32), w.replace(base=w.base.astype(jnp.float32)), SIZES)
    np.testing.assert_allclose(low, full, rtol=0.02, atol=0.1)


def routed(seed=0, X=X):
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(E - 1)[:C] for _ in range(X)])  # nobody chooses the last
    return jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.uniform(0.1, 1, (X, C)), jnp.float32)


def weights(dtype=jnp.float32):
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "bias": (E, F)}
    return {name: normal(*s, seed=i, dtype=dtype) * 0.4 for i, (name, s) in enumerate(shapes.items())}


def mlp(w, rows, sizes):
    gate = grouped(rows, w["gate"], sizes, jnp.float32)
    gate = (gate + expert_bias(w["bias"], sizes, rows.shape[0])).astype(rows.dtype)
    return grouped(silu_times(gate, grouped(rows, w["up"], sizes)), w["down"], sizes)


def dense_mlp(x, chosen, weight, w, weigh_input=False):
    """Every expert on every token."""
    weight_XE = jnp.sum(jax.nn.one_hot(chosen, E) * weight[..., None], axis=1)
    total = jnp.zeros_like(x)
    for e in range(E):
        h = x * weight_XE[:, e : e + 1] if weigh_input else x
        y = silu_times(h @ w["gate"][e] + w["bias"][e], h @ w["up"][e]) @ w["down"][e]
        hit = weight_XE[:, e : e + 1] > 0
        total += jnp.where(hit, y * (1.0 if weigh_input else weight_XE[:, e : e + 1]), 0.0)
    return total


@pytest.mark.parametrize("weigh_input", [False, True])
def test_experts_and_gradients_against_a_dense_loop(weigh_input):
    (chosen, weight), x, w = routed(), normal(X, D, seed=9), weights()

    @jax.jit
    def loss(x, weight, w):
        return jnp.sum(jnp.sin(experts(x, chosen, weight, mlp, w, E, weigh_input)))

    def dense(x, weight, w):
        return jnp.sum(jnp.sin(dense_mlp(x, chosen, weight, w, weigh_input)))

    with jax.numpy_dtype_promotion("strict"):
        got = jax.value_and_grad(loss, (0, 1, 2))(x, weight, w)
    want = jax.value_and_grad(dense, (0, 1, 2))(x, weight, w)
    close(got, want)


def test_experts_in_bfloat16():
    (chosen, weight), x, w = routed(), normal(X, D, seed=9), weights()

    def loss(x, w):
        return jnp.sum(experts(x, chosen, weight, mlp, w, E).astype(jnp.float32) ** 2)

    want = jax.grad(loss, (0, 1))(x, w)
    with jax.numpy_dtype_promotion("strict"):
        got = jax.grad(loss, (0, 1))(x.astype(jnp.bfloat16), weights(jnp.bfloat16))
    for g, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == jnp.bfloat16
        assert jnp.linalg.norm(g.astype(jnp.float32) - exact) < 0.03 * jnp.linalg.norm(exact)


def test_padding_changes_no_other_token():
    (chosen, weight), x, w = routed(), normal(X, D, seed=9), weights()
    alone = experts(x, chosen, weight, mlp, w, E)
    more, more_weight = routed(seed=3, X=40)
    for padding in (jnp.zeros_like(more_weight), more_weight):
        got = experts(
            jnp.concatenate([normal(40, D, seed=4) * 1e3, x]),
            jnp.concatenate([more, chosen]),
            jnp.concatenate([padding, weight]),
            mlp,
            w,
            E,
        )
        np.testing.assert_allclose(got[40:], alone, rtol=1e-6, atol=1e-6)


# -- transformers


def torch_module(family, name, config, seed=0):
    """transformers' module with random weights, float32."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    theirs = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module = getattr(theirs, name)(config)
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.4
    return module


def config_of(name, **kw):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="the reference is PyTorch")
    return getattr(transformers, name)(hidden_size=D, num_attention_heads=2, **kw)


GROUPS = dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5)
QWEN = dict(num_experts=8, num_experts_per_tok=3)
ROUTERS = {  # family, router, config, its options, ours
    "mixtral": ("MixtralTopKRouter", "MixtralConfig", dict(num_local_experts=8, num_experts_per_tok=3)),
    "qwen2_moe": ("Qwen2MoeTopKRouter", "Qwen2MoeConfig", QWEN | dict(norm_topk_prob=False)),
    "qwen3_moe": ("Qwen3MoeTopKRouter", "Qwen3MoeConfig", QWEN | dict(norm_topk_prob=True)),
    "olmoe": ("OlmoeTopKRouter", "OlmoeConfig", QWEN | dict(norm_topk_prob=False)),
    "gpt_oss": ("GptOssTopKRouter", "GptOssConfig", dict(num_local_experts=8, num_experts_per_tok=3)),
    "granitemoe": (
        "GraniteMoeTopKRouter",
        "GraniteMoeConfig",
        dict(num_local_experts=8, num_experts_per_tok=3),
    ),
    "deepseek_v3": ("DeepseekV3TopkRouter", "DeepseekV3Config", GROUPS | dict(norm_topk_prob=True)),
    "glm4_moe": ("Glm4MoeTopkRouter", "Glm4MoeConfig", GROUPS | dict(norm_topk_prob=False)),
    "deepseek_v2": (
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        GROUPS | dict(topk_method="group_limited_greedy"),
    ),
    "deepseek_v2 greedy": ("DeepseekV2TopkRouter", "DeepseekV2Config", GROUPS | dict(topk_method="greedy")),
}


def our_router(kind, options, bias):
    k, groups = 3, {n: options.get(n) for n in ("n_group", "topk_group", "routed_scaling_factor")}
    if kind in ("deepseek_v3", "glm4_moe"):
        normalise = options["norm_topk_prob"]
        return lambda x: sigmoid_group_top_k(x, bias, k, norm_topk_prob=normalise, **groups)
    if kind == "deepseek_v2":
        return lambda x: softmax_group_top_k(x, k, **groups)
    if kind == "deepseek_v2 greedy":
        return lambda x: softmax_group_top_k(x, k, **groups | dict(n_group=1, topk_group=1))
    return lambda x: top_k_softmax(x, k, options.get("norm_topk_prob", True))


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_and_their_gradients_against_transformers(kind):
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    name, config, options = ROUTERS[kind]
    router = torch_module(kind.split()[0], name, config_of(config, **options))
    hidden = torch.from_numpy(np.array(normal(200, D)))
    logits, weight, chosen = router(hidden)
    order = torch.argsort(chosen, dim=1)
    by_expert = torch.arange(1.0, 4.0)
    g = torch.autograd.grad((torch.gather(weight, 1, order) * by_expert).sin().sum(), logits)[0]
    bias = jnp.asarray(getattr(router, "e_score_correction_bias", torch.zeros(8)).numpy())
    route = our_router(kind, options, bias)
    logits = jnp.asarray(logits.detach().numpy())

    def ours(logits):
        chosen, weight = route(logits)
        order = jnp.argsort(chosen, axis=1)
        weight = jnp.take_along_axis(weight, order, 1)
        weighted = jnp.sum(jnp.sin(weight * jnp.arange(1.0, 4.0, dtype=jnp.float32)))
        return weighted, (jnp.take_along_axis(chosen, order, 1), weight)

    with jax.numpy_dtype_promotion("strict"):
        grad, (our_chosen, our_weight) = jax.grad(ours, has_aux=True)(logits)
    assert our_chosen.dtype == jnp.int32 and our_weight.dtype == jnp.float32
    np.testing.assert_array_equal(our_chosen, torch.gather(chosen, 1, order).numpy())
    want = torch.gather(weight, 1, order).detach().numpy()
    np.testing.assert_allclose(our_weight, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(grad, g.numpy(), rtol=0, atol=3e-6)


def test_llama4_against_transformers():
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    config = config_of("Llama4TextConfig", num_local_experts=E, num_experts_per_tok=2, intermediate_size=F)
    config.intermediate_size_mlp = F
    module = torch_module("llama4", "Llama4TextMoe", config)
    x = normal(X, D)
    tx = torch.from_numpy(np.array(x))
    with torch.no_grad():
        want = (module(tx)[0] - module.shared_expert(tx)).numpy()
    w = {n: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}

    def fn(w, rows, sizes):
        gate, up = jnp.split(grouped(rows, w["experts.gate_up_proj"], sizes), 2, axis=1)
        return grouped(silu_times(gate, up), w["experts.down_proj"], sizes)

    chosen, weight = top_k_sigmoid(x @ w["router.weight"].T, 2)
    got = experts(x, chosen, weight, fn, w, E, weigh_input=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_expert_mlps_against_transformers(family):
    """The whole layer: router, experts, and with gpt-oss the biases and its own gate."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    if family == "gpt_oss":
        options = dict(num_local_experts=E, num_experts_per_tok=C, intermediate_size=F)
        module = torch_module(family, "GptOssMLP", config_of("GptOssConfig", **options))
    else:
        options = dict(num_experts=E, num_experts_per_tok=C, moe_intermediate_size=F, norm_topk_prob=True)
        module = torch_module(family, "Qwen3MoeSparseMoeBlock", config_of("Qwen3MoeConfig", **options))
    x = normal(X, D)
    with torch.no_grad():
        want = module(torch.from_numpy(np.array(x))[None])
    want = (want[0] if isinstance(want, tuple) else want).numpy().reshape(X, D)
    w = {n.split(".", 1)[1]: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}

    def qwen(w, rows, sizes):
        both = grouped(rows, w["gate_up_proj"].reshape(E, 2, F, D).transpose(0, 3, 1, 2), sizes)
        return grouped(silu_times(both[:, 0], both[:, 1]), w["down_proj"].transpose(0, 2, 1), sizes)

    def gpt_oss(w, rows, sizes):
        both = grouped(rows, w["gate_up_proj"], sizes) + expert_bias(w["gate_up_proj_bias"], sizes, len(rows))
        gate, up = jnp.minimum(both[:, 0::2], 7.0), jnp.clip(both[:, 1::2], -7.0, 7.0)
        h = (up + 1) * gate * jax.nn.sigmoid(gate * 1.702)
        return grouped(h, w["down_proj"], sizes) + expert_bias(w["down_proj_bias"], sizes, len(rows))

    chosen, weight = top_k_softmax(x @ w["weight"].T + w.get("bias", 0.0), C, True)
    got = experts(x, chosen, weight, gpt_oss if family == "gpt_oss" else qwen, w, E)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# -- statistics


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_against_transformers(masked):
    """Layers pooled; padding left out; its gradient too."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_LXE = np.array(normal(3, X, E) * 2)
    mask = np.ones(X, np.int64)
    if masked:
        mask[4:8] = 0
    theirs = [torch.from_numpy(x).requires_grad_() for x in logits_LXE]
    want = load_balancing_loss_func(tuple(theirs), E, C, torch.from_numpy(mask)[None] if masked else None)
    want.backward()

    def ours(logits_LXE):
        def layer(x):
            return router_statistics(x, top_k_softmax(x, C, True)[0], jnp.asarray(mask, jnp.int32))

        return balance_loss(jax.vmap(layer)(logits_LXE))

    with jax.numpy_dtype_promotion("strict"):
        loss, grad = jax.value_and_grad(ours)(jnp.asarray(logits_LXE))
    np.testing.assert_allclose(loss, want.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, np.stack([x.grad.numpy() for x in theirs]), rtol=0, atol=1e-6)


def test_router_statistics_are_sums():
    logits = normal(X, E)
    chosen, _ = top_k_softmax(logits, C, False)
    mask = jnp.arange(X) % 3 > 0
    whole = router_statistics(logits, chosen, mask)
    pieces = [router_statistics(logits[s], chosen[s], mask[s]) for s in (slice(0, 5), slice(5, X))]
    close(jax.tree.map(jnp.add, *pieces), whole)
    live = np.asarray(mask)
    assert whole["tokens"] == live.sum()
    np.testing.assert_array_equal(whole["counts"], np.bincount(np.asarray(chosen)[live].ravel(), minlength=E))
    np.testing.assert_allclose(whole["probs"], jax.nn.softmax(logits)[live].sum(0), rtol=1e-6)
    lse = np.log(np.exp(np.asarray(logits, np.float64)).sum(1))
    np.testing.assert_allclose(z_loss(whole), (lse[live] ** 2).mean(), rtol=1e-6)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), whole)
    np.testing.assert_allclose(z_loss(stacked), z_loss(whole), rtol=1e-6)
    other = router_statistics(logits, chosen, mask, jnp.full((X, E), 1 / E))
    np.testing.assert_allclose(balance_loss(other), C, rtol=1e-6)  # even probabilities: k whatever the counts
