"""Mixture of experts without dropping: routers, products with stacked expert weights, router statistics.

Tokens are rows here, [X, D]; each goes to C experts (HF's num_experts_per_tok, the routers' `k`). M = X · C
rows, sorted by expert, go through the experts.
"""

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.ops.linear import dropout, output_gain
from ftjax.weights import LoraWeight, ObservedWeight


def experts(x_XD, chosen_XC, weight_XC, fn: Callable, count: int, weigh_input: bool = False):
    """The sum over each token's chosen experts of weight · fn(token), summed in float32; result [X, ...].

    `fn(rows_MD, group_sizes)` gets a copy of each token for each of its experts, sorted by expert, and the
    number of rows of each of the `count` experts, int32 [E]; it computes with `grouped` and `expert_bias`.
    No row is dropped and none depends on another, so what padding does changes no other token. `chosen` is
    int32 in [0, count). With `weigh_input` the copies are weighted before `fn` instead (Llama 4).
    """
    X, C = chosen_XC.shape
    expert_M = chosen_XC.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    inverse_M = jnp.argsort(order_M)
    group_sizes = jnp.bincount(expert_M, length=count).astype(jnp.int32)
    rows_MD: Any = _spread(x_XD, order_M, inverse_M, C)
    if weigh_input:
        weight_M1 = _reorder(weight_XC.reshape(-1), order_M, inverse_M)[:, None].astype(jnp.float32)
        rows_MD = (rows_MD.astype(jnp.float32) * weight_M1).astype(x_XD.dtype)
    out = _reorder(fn(rows_MD, group_sizes), inverse_M, order_M)
    out = out.reshape(X, C, *out.shape[1:]).astype(jnp.float32)
    if not weigh_input:
        out = out * weight_XC.astype(jnp.float32).reshape(X, C, *(1,) * (out.ndim - 2))
    return jnp.sum(out, axis=1).astype(x_XD.dtype)


# Both are gathers whose gradient autodiff would scatter, in the rows' dtype; that of a permutation is the
# gather of its inverse.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_XD, order_M, inverse_M, copies: int):
    """x[order // copies]: that many copies of every token, in the order of `order`."""
    return x_XD[order_M // copies]


def _spread_bwd(copies, inverse_M, g_MD):
    g = g_MD[inverse_M].reshape(-1, copies, *g_MD.shape[1:]).astype(jnp.float32)
    return jnp.sum(g, axis=1).astype(g_MD.dtype), None, None


_spread.defvjp(lambda x, order, inverse, copies: (x[order // copies], inverse), _spread_bwd)


@jax.custom_vjp
def _reorder(x, order_M, inverse_M):
    return x[order_M]


_reorder.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, g: (g[inverse], None, None))


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
    if not isinstance(w, LoraWeight):
        return _grouped(rows, w, group_sizes, dtype)
    branch = dropout(rows, w)
    h: Any = _grouped(branch, w.a, group_sizes, jnp.float32)
    scale = w.scale
    if scale.ndim:
        scale = scale[_row_experts(group_sizes, rows.shape[0])][:, None]
    delta: Any = _grouped((h * scale).astype(rows.dtype), w.b, group_sizes, jnp.float32)
    y = grouped(rows, w.base, group_sizes, jnp.float32)
    if w.m is None:
        return (y + delta).astype(dtype or rows.dtype)  # rounded once
    gain = output_gain(w)[_row_experts(group_sizes, rows.shape[0])]
    if branch is rows:
        return (gain * (y + delta)).astype(dtype or rows.dtype)
    dropped = grouped(branch, w.base, group_sizes, jnp.float32)  # as in ops.einsum
    return (y + (gain - 1.0) * dropped + gain * delta).astype(dtype or rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(rows, w, group_sizes, dtype):
    rows_MI, w_EIO = _flat(rows, w)
    out_MO = _ragged(rows_MI, w_EIO.astype(rows.dtype), group_sizes)
    return out_MO.reshape(rows.shape[0], *w.shape[rows.ndim :]).astype(dtype or rows.dtype)


def _flat(rows, w):
    """The rows as [M, I] and the weight as [E, I, O]."""
    size = prod(rows.shape[1:])
    return rows.reshape(-1, size), w.reshape(w.shape[0], size, -1)


def _ragged(rows_MI, w_EIO, group_sizes):
    return jax.lax.ragged_dot(rows_MI, w_EIO, group_sizes, preferred_element_type=jnp.float32)


# [M, I] and [M, O] -> [E, I, O], the sum over each expert's rows
_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _grouped_bwd(dtype, residuals, g):
    rows, w, group_sizes = residuals
    rows_MI, w_EIO = _flat(rows, w)
    g_MO = g.reshape(g.shape[0], -1).astype(rows.dtype)
    d_rows = _ragged(g_MO, w_EIO.astype(rows.dtype).transpose(0, 2, 1), group_sizes)
    d_w = jax.lax.ragged_dot_general(
        rows_MI, g_MO, group_sizes, _BY_EXPERT, preferred_element_type=jnp.float32
    )
    return d_rows.reshape(rows.shape).astype(rows.dtype), d_w.reshape(w.shape).astype(w.dtype), None


_grouped.defvjp(
    lambda rows, w, group_sizes, dtype: (_grouped(rows, w, group_sizes, dtype), (rows, w, group_sizes)),
    _grouped_bwd,
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
