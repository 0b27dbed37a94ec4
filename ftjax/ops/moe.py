"""Mixture of experts without dropping: routers, products with stacked expert weights, router statistics.

Tokens are rows here, [X, D]; each goes to C experts (HF's num_experts_per_tok, the routers' `k`). M = X · C
rows, sorted by expert, go through the experts.
"""

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from ftjax.ops.dequant import dequantise
from ftjax.ops.layers import places, shards
from ftjax.ops.linear import again, asked, dropout, first_factors, output_gain, wide
from ftjax.weights import LoraWeight, ObservedWeight, QuantWeight, fold_in


def experts(
    x_XD, chosen_XC, weight_XC, fn: Callable, w, count: int, weigh_input: bool = False, ids_X: Any = None
):
    """The sum over each token's chosen experts of weight · fn(token), summed in float32; result [X, ...].

    `fn(w, rows_MD, group_sizes)` gets a copy of each token for each of its experts, sorted by expert, and the
    number of rows of each expert, int32 [E]; it computes with `grouped` and `expert_bias` and the experts'
    weights in `w`, a tree in which every array leads with the axis of the `count` experts. No row is dropped
    and none depends on another, so what padding does changes no other token. `chosen` is int32 in [0, count).
    With `weigh_input` the copies are weighted before `fn` instead (Llama 4). `ids_X` int32 are the tokens'
    numbers, by which dropout is drawn, where they do not come in their order.

    On a mesh each device works on its own tokens (`by_device`'s order of [B, T]), with whole experts of every
    weight. Where the mesh splits the experts, a device has all tokens of those it shares the experts with
    come to its own experts, and its part of the sums goes back: the tokens' bytes twice, however many experts
    a token has. Room is made for every one of those tokens to choose as many of its experts as it can."""
    X, C = chosen_XC.shape
    mesh, on = jax.sharding.get_abstract_mesh(), places("X") | places("E")
    if X % shards("X"):
        on["X"] = ()
    ids_X = jnp.arange(X, dtype=jnp.int32) if ids_X is None else ids_X
    run = functools.partial(_own_experts, fn, count, weigh_input, on["E"] if on["X"] else ())
    if not on["X"]:
        return run(x_XD, chosen_XC, weight_XC, ids_X, w)
    by_token, by_expert = PartitionSpec(on["X"]), PartitionSpec(on["E"] or None)
    of_w = jax.tree.map(lambda x: by_expert if x.ndim and x.shape[0] == count else PartitionSpec(), w)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(by_token, by_token, by_token, by_token, of_w),
        out_specs=by_token,
        axis_names={*on["X"], *on["E"]},
        check_vma=False,
    )(x_XD, chosen_XC, weight_XC, ids_X, w)


def _own_experts(fn, count: int, weigh_input: bool, axes, x_XD, chosen_XC, weight_XC, ids_X, w):
    """`experts` of one device, whose experts are those of its part of the mesh axes `axes`."""
    if axes:
        gather: Any = functools.partial(jax.lax.all_gather, axis_name=axes, axis=0, tiled=True)
        x_XD, chosen_XC, weight_XC, ids_X = map(gather, (x_XD, chosen_XC, weight_XC, ids_X))
        count //= jax.lax.axis_size(axes)
        chosen_XC = chosen_XC - jax.lax.axis_index(axes) * count
        chosen_XC = jnp.where((chosen_XC >= 0) & (chosen_XC < count), chosen_XC, count)
    X, C = chosen_XC.shape
    M = X * min(C, count)  # rows, at most
    expert_M = chosen_XC.reshape(-1)
    order_M = checkpoint_name(jnp.argsort(expert_M, stable=True), "route")
    inverse_M = checkpoint_name(jnp.argsort(order_M), "route")
    if axes:  # of what others do, no row
        order_M, inverse_M = order_M[:M], jnp.where(expert_M < count, inverse_M, M)
    group_sizes = jnp.bincount(expert_M, length=count).astype(jnp.int32)
    rows_MD: Any = _spread(x_XD, order_M, inverse_M, C, bool(axes))
    if weigh_input:
        weight_M: Any = _reorder(weight_XC.reshape(-1), order_M, inverse_M, bool(axes))
        weight_M1 = weight_M[:, None].astype(jnp.float32)
        rows_MD = (rows_MD.astype(jnp.float32) * weight_M1).astype(x_XD.dtype)
    w = fold_in(w, ids_X[order_M // C] * C + order_M % C)  # dropout is of a token's copy, wherever that is
    out: Any = _reorder(fn(w, rows_MD, group_sizes), inverse_M, order_M, bool(axes))
    out = out.reshape(X, C, *out.shape[1:]).astype(jnp.float32)
    if not weigh_input:
        out = out * weight_XC.astype(jnp.float32).reshape(X, C, *(1,) * (out.ndim - 2))
    out = jnp.sum(out, axis=1).astype(x_XD.dtype)
    return jax.lax.psum_scatter(out, axes, scatter_dimension=0, tiled=True) if axes else out


# Both are gathers whose gradient autodiff would scatter, in the rows' dtype; that of a permutation is the
# gather of its inverse. Of a `part` of a permutation, what is not there is beyond the end in the inverse.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _spread(x_XD, order_M, inverse_M, copies: int, part: bool):
    """x[order // copies]: that many copies of every token, in the order of `order`."""
    return x_XD[order_M // copies]


def _spread_bwd(copies, part, inverse_M, g_MD):
    g = _rows(g_MD, inverse_M, part).reshape(-1, copies, *g_MD.shape[1:]).astype(jnp.float32)
    return jnp.sum(g, axis=1).astype(g_MD.dtype), None, None


_spread.defvjp(lambda x, order, inverse, copies, part: (x[order // copies], inverse), _spread_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _reorder(x, order_M, inverse_M, part: bool):
    return _rows(x, order_M, part)


_reorder.defvjp(
    lambda x, order, inverse, part: (_rows(x, order, part), inverse),
    lambda part, inverse, g: (_rows(g, inverse, part), None, None),
)


def _rows(x, at, part: bool):
    """x[at], of a part zeros where `at` is beyond its end."""
    return x.at[at].get(mode="fill", fill_value=0) if part else x[at]


def grouped(rows, w, group_sizes, dtype=None) -> Any:
    """Each row [*in] times its expert's weight: rows [M, *in], w [E, *in, *out] -> [M, *out].

    Rows are sorted by expert, `group_sizes` int32 [E] of them each, summing to M. Float32 accumulation in the
    backward products too; result in `dtype` or rows'. `w` may be a LoraWeight with a [E, *in, R],
    b [E, R, *out], scale [E] or a scalar, and m [E, *out] or None: a·b is never formed.
    """
    if isinstance(w, ObservedWeight):
        flat = rows.reshape(rows.shape[0], -1)
        rows = _observed(flat, w.moment, group_sizes).reshape(rows.shape)
        return grouped(rows, w.base, group_sizes, dtype)
    if isinstance(w, LoraWeight):
        return _grouped_adapted(rows, w, group_sizes, dtype)
    if isinstance(w, QuantWeight):
        return _grouped_quantised(rows, w, group_sizes, dtype)
    return _grouped(rows, w, group_sizes, dtype)


def groupeds(rows, ws: Sequence[Any], group_sizes) -> list[Any]:
    """`grouped` of the same rows with several weights: the rows are read once for all first factors."""
    lows = first_factors(rows, ws, lambda rows, a: _grouped(rows, a, group_sizes, jnp.float32))
    return [
        grouped(rows, w, group_sizes) if low is None else _grouped_adapted(rows, w, group_sizes, None, low)
        for w, low in zip(ws, lows, strict=True)
    ]


def _grouped_adapted(rows, w: LoraWeight, group_sizes, dtype, low: Any = None) -> Any:
    """As ops.linear's product of an adapted weight; `low` is the rows with the first factor where known."""
    dtype = dtype or rows.dtype
    branch = dropout(rows, w)
    if low is None:
        low = _grouped(branch, w.a, group_sizes, jnp.float32)
    scale = w.scale
    if scale.ndim:
        scale = scale[_row_experts(group_sizes, rows.shape[0])][:, None]
    h = checkpoint_name((low * scale).astype(rows.dtype), "lora")
    delta: Any = _grouped(h, w.b, group_sizes, asked(dtype))
    if w.m is None:
        y = grouped(rows, w.base, group_sizes, wide(dtype))
        return (y + delta.astype(y.dtype)).astype(dtype)
    y, delta = grouped(rows, w.base, group_sizes, jnp.float32), delta.astype(jnp.float32)
    gain = output_gain(w)[_row_experts(group_sizes, rows.shape[0])]
    if branch is rows:
        return (gain * (y + delta)).astype(dtype)
    dropped = grouped(branch, w.base, group_sizes, jnp.float32)  # as in ops.einsum
    return (y + (gain - 1.0) * dropped + gain * delta).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(rows, w, group_sizes, dtype):
    rows_MI, w_EIO = _flat(rows, w)
    dtype = dtype or rows.dtype
    out_MO = _ragged(rows_MI, w_EIO.astype(rows.dtype), group_sizes, dtype)
    return out_MO.reshape(rows.shape[0], *w.shape[rows.ndim :]).astype(dtype)


def _flat(rows, w):
    """The rows as [M, I] and the weight as [E, I, O]."""
    size = prod(rows.shape[1:])
    return rows.reshape(-1, size), w.reshape(w.shape[0], size, -1)


def _ragged(rows_MI, w_EIO, group_sizes, dtype):
    return jax.lax.ragged_dot(rows_MI, w_EIO, group_sizes, preferred_element_type=asked(dtype))


# [M, I] and [M, O] -> [E, I, O], the sum over each expert's rows
_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _grouped_bwd(dtype, residuals, g):
    rows, w, group_sizes = residuals
    rows_MI, _ = _flat(rows, w)
    g_MO = g.reshape(g.shape[0], -1).astype(rows.dtype)
    d_w = jax.lax.ragged_dot_general(
        rows_MI, g_MO, group_sizes, _BY_EXPERT, preferred_element_type=asked(w.dtype)
    )
    d_rows = _rows_gradient(g_MO, w, group_sizes, rows.shape)
    return d_rows, d_w.reshape(w.shape).astype(w.dtype), None


def _rows_gradient(g_MO, w, group_sizes, shape):
    w_EIO = w.reshape(w.shape[0], -1, g_MO.shape[1]).astype(g_MO.dtype)
    d_rows = _ragged(g_MO, w_EIO.transpose(0, 2, 1), group_sizes, g_MO.dtype)
    return d_rows.reshape(shape).astype(g_MO.dtype)


_grouped.defvjp(
    lambda rows, w, group_sizes, dtype: (_grouped(rows, w, group_sizes, dtype), (rows, w, group_sizes)),
    _grouped_bwd,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_quantised(rows, w: QuantWeight, group_sizes, dtype):
    """As ops.linear's quantised_product."""
    return _grouped(rows, dequantise(w, rows.dtype), group_sizes, dtype)


def _grouped_quantised_bwd(dtype, residuals, g):
    like, w, group_sizes = residuals
    g_MO, w = again(g.reshape(g.shape[0], -1).astype(like.dtype), w)
    shape = g.shape[0], *w.shape[1 : w.ndim - w.outs]
    return _rows_gradient(g_MO, dequantise(w, like.dtype), group_sizes, shape), None, None


_grouped_quantised.defvjp(
    lambda rows, w, group_sizes, dtype: (
        _grouped_quantised(rows, w, group_sizes, dtype),
        (jnp.empty(0, rows.dtype), w, group_sizes),
    ),
    _grouped_quantised_bwd,
)


@jax.custom_vjp
def _observed(rows_MI, moment_EII, group_sizes):
    """ops.linear.observed for each expert."""
    return rows_MI


def _observed_bwd(residuals, g_MI):
    rows_MI, group_sizes = residuals
    rows_MI = jnp.where(jnp.any(g_MI != 0, axis=-1, keepdims=True), rows_MI, 0).astype(jnp.float32)
    moment = jax.lax.ragged_dot_general(rows_MI, rows_MI, group_sizes, _BY_EXPERT, precision="highest")
    return g_MI, moment, None


_observed.defvjp(lambda rows, moment, sizes: (rows, (rows, sizes)), _observed_bwd)


def expert_bias(b_EF, group_sizes, rows: int):
    """Each of the `rows` sorted rows' own expert's bias, float32 [M, F]."""
    return b_EF.astype(jnp.float32)[_row_experts(group_sizes, rows)]


def _row_experts(group_sizes, rows: int):
    ids_E = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    return jnp.repeat(ids_E, group_sizes, total_repeat_length=rows)


def top_k_softmax(logits_XE, k: int, normalise: bool):
    """(chosen int32, weight float32), each [X, k]: the k largest logits' experts and softmax probabilities.

    With `normalise` these are divided by their sum, which is the softmax over the chosen logits alone, so the
    two orders in use are one: softmax, choice, division (Mixtral, Qwen's norm_topk_prob) and choice, softmax
    (gpt-oss, Granite). Of equal logits the first is chosen.
    """
    logits_XE = logits_XE.astype(jnp.float32)
    top_XC, chosen_XC = jax.lax.top_k(logits_XE, k)
    if normalise:
        return chosen_XC, jax.nn.softmax(top_XC, axis=-1)
    return chosen_XC, jnp.exp(top_XC - jax.nn.logsumexp(logits_XE, axis=-1, keepdims=True))


def top_k_sigmoid(logits_XE, k: int):
    """(chosen int32, weight float32), each [X, k]: the k largest logits' experts and sigmoids (Llama 4, whose
    experts take weighted inputs: `weigh_input`)."""
    top_XC, chosen_XC = jax.lax.top_k(logits_XE.astype(jnp.float32), k)
    return chosen_XC, jax.nn.sigmoid(top_XC)


def sigmoid_group_top_k(
    logits_XE,
    bias_E,
    k: int,
    *,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
):
    """(chosen int32, weight float32), each [X, k], as in DeepSeek-V3 (arXiv:2412.19437) and GLM-4 MoE.

    The choice is by sigmoid(logit) + bias, among the experts of the `topk_group` of `n_group` equal groups
    whose best two sum highest; the weights are the sigmoids without the bias, over their sum where
    `norm_topk_prob`, times `routed_scaling_factor`. No gradient reaches the bias.
    """
    scores_XE = jax.nn.sigmoid(logits_XE.astype(jnp.float32))
    choice_XE = jax.lax.stop_gradient(scores_XE + bias_E.astype(jnp.float32))

    def best_two(choice_XGE):
        return jnp.sum(jax.lax.top_k(choice_XGE, 2)[0], axis=-1)

    choice_XE = _within_groups(choice_XE, best_two, n_group, topk_group, -jnp.inf)
    chosen_XC = jax.lax.top_k(choice_XE, k)[1]
    weight_XC = jnp.take_along_axis(scores_XE, chosen_XC, axis=1)
    if norm_topk_prob:
        weight_XC = weight_XC / (jnp.sum(weight_XC, axis=-1, keepdims=True) + 1e-20)
    return chosen_XC, weight_XC * routed_scaling_factor


def softmax_group_top_k(logits_XE, k: int, *, n_group: int, topk_group: int, routed_scaling_factor: float):
    """(chosen int32, weight float32), each [X, k], as in DeepSeek-V2 (arXiv:2405.04434).

    The k largest of softmax(logits) among the `topk_group` of `n_group` equal groups with the highest single
    probabilities, times `routed_scaling_factor`, never normalised. HF's topk_method "greedy" is n_group = 1.
    """
    probs_XE = jax.nn.softmax(logits_XE.astype(jnp.float32), axis=-1)
    probs_XE = _within_groups(probs_XE, lambda p: jnp.max(p, axis=-1), n_group, topk_group, 0.0)
    weight_XC, chosen_XC = jax.lax.top_k(probs_XE, k)
    return chosen_XC, weight_XC * routed_scaling_factor


def _within_groups(scores_XE, score_of, n_group: int, topk_group: int, other: float):
    """The scores, `other` outside the `topk_group` groups whose `score_of` is highest."""
    if topk_group == n_group:
        return scores_XE
    X = scores_XE.shape[0]
    scores_XGE = scores_XE.reshape(X, n_group, -1)
    of_group_XG = jax.lax.stop_gradient(score_of(scores_XGE))
    kept_XG = jnp.any(jax.nn.one_hot(jax.lax.top_k(of_group_XG, topk_group)[1], n_group, dtype=bool), axis=1)
    return jnp.where(kept_XG[..., None], scores_XGE, other).reshape(X, -1)


def router_statistics(logits_XE, chosen_XC, mask_X, probs_XE=None) -> dict[str, jax.Array]:
    """Sums over the tokens where `mask` is not zero, float32: `tokens`; `counts` [E], the choices of each
    expert; `probs` [E], softmax(logits) unless `probs_XE` says otherwise; `z`, logsumexp(logits)².

    Being sums, they add over microbatches and devices before a loss is made of them.
    """
    logits_XE = logits_XE.astype(jnp.float32)
    mask_X = (mask_X != 0).astype(jnp.float32)
    if probs_XE is None:
        probs_XE = jax.nn.softmax(logits_XE, axis=-1)
    hits_XE = jnp.sum(jax.nn.one_hot(chosen_XC, logits_XE.shape[1], dtype=jnp.float32), axis=1)
    return {
        "tokens": jnp.sum(mask_X),
        "counts": jnp.sum(hits_XE * mask_X[:, None], axis=0),
        "probs": jnp.sum(probs_XE.astype(jnp.float32) * mask_X[:, None], axis=0),
        "z": jnp.sum(jnp.square(jax.nn.logsumexp(logits_XE, axis=-1)) * mask_X),
    }


def balance_loss(stats: dict[str, jax.Array]) -> jax.Array:
    """E · Σ_e f_e · P_e, f_e the choices of expert e a token and P_e its mean probability. Fedus et al. 2021,
    arXiv:2101.03961, eq. 4-6.

    The f_e sum to k, so that even routing gives k, as in transformers' load_balancing_loss_func; k = 1 is
    Switch's. Statistics stacked over layers ("counts" [L, E], "tokens" [L], …) are pooled, as there: one
    layer's imbalance can make up for another's. The mean over layers of the paper's loss is
    jnp.mean(jax.vmap(balance_loss)(stats)). No gradient goes through f.
    """
    tokens = jnp.sum(stats["tokens"])
    counts_E, probs_E = (stats[key].reshape(-1, stats[key].shape[-1]).sum(0) for key in ("counts", "probs"))
    return counts_E.shape[0] * jnp.sum(jax.lax.stop_gradient(counts_E) * probs_E) / jnp.square(tokens)


def z_loss(stats: dict[str, jax.Array]) -> jax.Array:
    """The mean over tokens (and layers, where stacked) of logsumexp(router logits)². Zoph et al. 2022,
    arXiv:2202.08906, eq. 5."""
    return jnp.sum(stats["z"]) / jnp.sum(stats["tokens"])
