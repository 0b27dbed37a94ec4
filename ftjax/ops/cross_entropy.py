"""Losses over a vocabulary that never hold [B, T, V] logits: the head is applied to a few tokens at a time.

In each row the tokens that count are moved to the front and the loop ends after the last of them, so
untrained positions (prompts, padding) cost nothing at the head though every shape is static. Rows stay where
they are: with the batch axis sharded, nothing crosses devices but the loop's bound.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.weights import LoraWeight, RowsWeight

Unembed = Callable[[Any, jax.Array], jax.Array]  # (head leaf, [..., D]) -> float32 logits [..., V]


def token_nll(unembed: Unembed, head, hidden_BTD, targets_BT):
    """-log p(target), float32 [B, T]."""
    lse_BT, gold_BT = _lse_and_gold(unembed(head, hidden_BTD), targets_BT)
    return lse_BT - gold_BT


def _lse_and_gold(logits_BTV, targets_BT):
    gold_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1), gold_BT


def _compact(weight_BT):
    """(order, inverse, longest): the permutation of each row that puts nonzero weights first, in order; its
    inverse; the largest count of them in any row."""
    order_BT = jnp.argsort(weight_BT == 0, axis=1, stable=True)
    return order_BT, jnp.argsort(order_BT, axis=1), jnp.max(jnp.sum(weight_BT != 0, axis=1))


def _take(x, order_BT):
    return jnp.take_along_axis(x, order_BT.reshape(order_BT.shape + (1,) * (x.ndim - 2)), axis=1)


def _chunked(x, chunk: int):
    """Pad axis 1 to a multiple of `chunk`."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))


def _slice(x, i, chunk: int):
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _trained(head, frozen_head: bool):
    """The arrays of the head that get a gradient: of a frozen one none, of an adapted one its own."""
    if frozen_head:
        return None
    if isinstance(head, tuple):  # with a bias
        return tuple(_trained(x, False) for x in head)
    if isinstance(head, LoraWeight):
        return head.a, head.b, head.m
    return head.rows if isinstance(head, RowsWeight) else head


def _put(head, trained, i=None):
    """The head with `trained` in place; for chunk i, with dropout's key for that chunk."""
    if isinstance(head, tuple):
        return tuple(_put(x, None if trained is None else trained[j], i) for j, x in enumerate(head))
    if isinstance(head, RowsWeight):
        return head if trained is None else head.replace(rows=trained)
    if not isinstance(head, LoraWeight):
        return head if trained is None else trained
    if trained is not None:
        head = head.replace(a=trained[0], b=trained[1], m=trained[2])
    return head if i is None or head.rng is None else head.replace(rng=jax.random.fold_in(head.rng, i))


def _cotangent(head, d_trained, g=1.0):
    """A custom_vjp's cotangent of the head; None stands for zeros, whatever the leaf's dtype."""
    if d_trained is None:
        return None
    if isinstance(head, tuple):
        return tuple(_cotangent(x, d, g) for x, d in zip(head, d_trained, strict=True))
    trained = _trained(head, False)
    d_trained = jax.tree.map(lambda x, w: (x * g).astype(w.dtype), d_trained, trained)
    if isinstance(head, LoraWeight):
        a, b, m = d_trained
        return head.replace(base=None, scale=None, rng=None, a=a, b=b, m=m)
    if isinstance(head, RowsWeight):
        return head.replace(base=None, indices=None, rows=d_trained)
    return d_trained


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def linear_cross_entropy(
    unembed: Unembed, head, hidden_BTD, targets_BT, weight_BT, chunk: int, frozen_head: bool
):
    """Sum of weight · (-log p(target)) over [B, T], float32 scalar; hidden state t predicts target t.

    The gradient is formed in the forward pass, a chunk of `chunk` positions of every row at a time, so the
    head's product is never recomputed; with `frozen_head` no gradient of the head is formed at all, and of a
    LoraWeight that of its factors only. Dropout in the head draws a mask for each chunk.
    """
    return _cross_entropy_fwd(unembed, head, hidden_BTD, targets_BT, weight_BT, chunk, frozen_head)[0]


def _cross_entropy_fwd(unembed, head, hidden_BTD, targets_BT, weight_BT, chunk, frozen_head):
    return _loss_and_grads(unembed, head, hidden_BTD, targets_BT, weight_BT, weight_BT, chunk, frozen_head)


def _loss_and_grads(unembed, head, hidden_BTD, targets_BT, weight_BT, mask_BT, chunk, frozen_head):
    """The loss and the residuals of its backward pass; `mask` says which positions are taken, in chunks that
    do not change with `weight`."""
    chunk = min(chunk, hidden_BTD.shape[1])
    order, inverse, longest = _compact(mask_BT)
    hidden, targets, weight = (_chunked(_take(x, order), chunk) for x in (hidden_BTD, targets_BT, weight_BT))
    trained = _trained(head, frozen_head)

    def one_chunk(i, hidden_BXD, targets_BX, weight_BX):
        # The softmax's gradient is written out: autodiff keeps and scatters into arrays of the logits' size.
        logits_BXV, pull = jax.vjp(lambda w, x: unembed(_put(head, w, i), x), trained, hidden_BXD)
        lse_BX, gold_BX = _lse_and_gold(logits_BXV, targets_BX)
        probs_BXV = jnp.exp(logits_BXV - lse_BX[..., None])
        is_target = jnp.arange(logits_BXV.shape[-1]) == targets_BX[..., None]
        grads = pull(jnp.where(is_target, probs_BXV - 1.0, probs_BXV) * weight_BX[..., None])
        return jnp.sum((lse_BX - gold_BX) * weight_BX), grads

    def body(i, carry):
        total, d_hidden, d_trained = carry
        loss, (dw, dx) = one_chunk(i, *(_slice(x, i, chunk) for x in (hidden, targets, weight)))
        d_trained = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_trained, dw)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, dx.astype(d_hidden.dtype), i * chunk, axis=1)
        return total + loss, d_hidden, d_trained

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    start = jnp.float32(0), jnp.zeros_like(hidden), zeros
    total, d_hidden, d_trained = jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, body, start)
    d_hidden_BTD = _take(d_hidden[:, : hidden_BTD.shape[1]], inverse)
    return total, (d_hidden_BTD, d_trained, head)


def _cross_entropy_bwd(unembed, chunk, frozen_head, residuals, g):
    d_hidden, d_trained, head = residuals
    d_hidden = (d_hidden * g.astype(d_hidden.dtype)).astype(d_hidden.dtype)
    return _cotangent(head, d_trained, g), d_hidden, None, None


linear_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def linear_logprobs(unembed: Unembed, head, hidden_BTD, targets_BT, mask_BT, chunk: int, frozen_head: bool):
    """log p(target) where `mask` is not zero, else 0, float32 [B, T]; hidden state t predicts target t.

    For losses that need the log-probabilities before they know each token's weight (preference, RL): the
    backward pass goes through the head again, a chunk at a time.
    """
    return _logprobs_fwd(unembed, head, hidden_BTD, targets_BT, mask_BT, chunk, frozen_head)[0]


def _logprobs_fwd(unembed, head, hidden_BTD, targets_BT, mask_BT, chunk, frozen_head):
    T = hidden_BTD.shape[1]
    size = min(chunk, T)
    order, inverse, longest = _compact(mask_BT)
    hidden, targets = (_chunked(_take(x, order), size) for x in (hidden_BTD, targets_BT))

    def body(i, out):
        piece = _slice(hidden, i, size), _slice(targets, i, size)
        nll = token_nll(unembed, _put(head, None, i), *piece)
        return jax.lax.dynamic_update_slice_in_dim(out, -nll, i * size, axis=1)

    out = jnp.zeros(targets.shape, jnp.float32)
    out = jax.lax.fori_loop(0, (longest + size - 1) // size, body, out)
    out_BT = jnp.where(mask_BT != 0, _take(out[:, :T], inverse), 0.0)
    return out_BT, (head, hidden_BTD, targets_BT, mask_BT)


def _logprobs_bwd(unembed, chunk, frozen_head, residuals, g_BT):
    head, hidden_BTD, targets_BT, mask_BT = residuals
    weight_BT = jnp.where(mask_BT != 0, -g_BT, 0.0)
    _, (d_hidden, d_trained, _) = _loss_and_grads(
        unembed, head, hidden_BTD, targets_BT, weight_BT, mask_BT, chunk, frozen_head
    )
    return _cotangent(head, d_trained), d_hidden, None, None


linear_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd)
