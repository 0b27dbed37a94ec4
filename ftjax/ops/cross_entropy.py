"""Losses over a vocabulary that never hold [B, T, V] logits: the head is applied to a few tokens at a time.

The tokens of a batch that lie on one device are one sequence (G of them, [G, X]), in which those that
count are moved to the front; the loop ends after the last of them, so untrained positions (prompts, padding)
cost nothing at the head though every shape is static. With the batch axis sharded, nothing crosses devices
but the loop's bound; with the vocabulary sharded, a few numbers a token and the gradient of its hidden state.

How many tokens a chunk should have: of a [D, V] head in bfloat16 the two products of C tokens (logits, and
the hidden states' gradient) read 4DV bytes for 4CDV operations, and write and read 8CV bytes of their own.
At D = 4096 that is 228 operations a byte for C = 256, 410 for 512 and 683 for 1,024; accelerators of today
do 160 to 560 in the time of a byte (H100 295, TPU v5e 240, v6e 560). The elementwise passes over the logits
cost the same however they are cut. So 1,024 is about the fewest with which products are as fast as they can
be, and more costs memory (6 bytes · C · V: 0.8 GB for 128k tokens) for nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.ops.layers import by_device, by_row, shard, shards
from ftjax.weights import LoraWeight, RowsWeight

Unembed = Callable[[Any, jax.Array], jax.Array]  # (head leaf, [..., D]) -> float32 logits [..., V]


def _lse_and_gold(logits_GXV, targets_GX):
    """(logsumexp, the target's logit, which logit that is). The logit is found by a masked sum, for which a
    vocabulary that is sharded needs not be gathered."""
    is_target = jnp.arange(logits_GXV.shape[-1]) == targets_GX[..., None]
    gold_GX = jnp.sum(jnp.where(is_target, logits_GXV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_GXV, axis=-1), gold_GX, is_target


def _split(logits_GXV):
    return shard(logits_GXV, "X_V")


class _Chunks:
    """The tokens of a batch in chunks, those with a weight first. All of its methods take and give arrays
    whose first two axes are [B, T], or [G, chunk]."""

    def __init__(self, weight_BT, chunk: int, head):
        self.B, self.T = weight_BT.shape
        # Dropout draws a mask a chunk, and must not depend on the mesh: then each row is cut by itself.
        self._apart = _has_dropout(head)
        counts = self._grouped(weight_BT) != 0
        self.G, length = counts.shape
        self.size = min(-(-chunk // self.B) if self._apart else chunk, length)
        self._order = jnp.argsort(~counts, axis=1, stable=True)
        self._inverse = jnp.argsort(self._order, axis=1)
        self.count = (jnp.max(jnp.sum(counts, axis=1)) + self.size - 1) // self.size
        self._length, self._pad = length, -length % self.size

    def _grouped(self, x):
        return shard(x, "B_D"[: x.ndim]) if self._apart else by_device(x)

    def _whole(self, x):
        """[G, …], of which only the first axis is split."""
        return shard(x, ("B" if self._apart else "X") + "_" * (x.ndim - 1))

    def take(self, x):
        """In the order of chunks, padded to whole ones."""
        x = self._whole(_take(self._grouped(x), self._order))
        return jnp.pad(x, [(0, 0), (0, self._pad)] + [(0, 0)] * (x.ndim - 2))

    def put_back(self, x):
        """Undo `take`."""
        x = self._whole(_take(self._whole(x[:, : self._length]), self._inverse))
        return shard(x, "BTD"[: x.ndim]) if self._apart else by_row(x, self.B, self.T)

    def __getitem__(self, i):
        """A function that slices chunk i out of what `take` gave."""
        return lambda x: jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=1)

    def write(self, x, i, piece):
        return jax.lax.dynamic_update_slice_in_dim(x, piece.astype(x.dtype), i * self.size, axis=1)


def _take(x, order):
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def _has_dropout(head) -> bool:
    if isinstance(head, tuple):
        return any(map(_has_dropout, head))
    return isinstance(head, LoraWeight) and head.rng is not None and head.dropout > 0


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7, 8))
def linear_cross_entropy(
    unembed: Unembed,
    head,
    hidden_BTD,
    targets_BT,
    weight_BT,
    chunk: int,
    frozen_head: bool,
    label_smoothing: float = 0.0,
    z_coef: float = 0.0,
):
    """(what to minimise, sums to report), float32 scalars; hidden state t predicts target t.

    sums["loss"] is Σ weight · (-log p(target)) over [B, T]. With label smoothing ε, what is minimised takes
    as the target's distribution 1 - ε on the target and ε spread over all V tokens (Szegedy et al. 2016,
    arXiv:1512.00567, eq. 7), and sums["smoothed_loss"] is that; with `z_coef`, z_coef · logsumexp² is added
    for each token (PaLM, arXiv:2204.02311, section 5), and sums["z_loss"] is Σ weight · logsumexp². The sums
    have no gradient.

    The gradient is formed in the forward pass, `chunk` tokens of each device at a time (where the head has
    dropout, a B-th of them of each row), so the head's product is never recomputed; with `frozen_head` no
    gradient of the head is formed at all, and of a LoraWeight that of its factors only. Dropout in the head
    draws a mask for each chunk.
    """
    chunks = _Chunks(weight_BT, chunk, head)
    hidden, targets, weight = map(chunks.take, (hidden_BTD, targets_BT, weight_BT))

    def body(i, totals):
        logits = _split(unembed(_put(head, None, i), chunks[i](hidden)))
        new, _ = _token_losses(logits, chunks[i](targets), chunks[i](weight), label_smoothing, z_coef)
        return jax.tree.map(jnp.add, totals, new)

    start = _no_loss(chunks.G, label_smoothing, z_coef)
    return jax.tree.map(jnp.sum, jax.lax.fori_loop(0, chunks.count, body, start))


def _no_loss(G: int, label_smoothing: float, z_coef: float):
    names = ["loss"] + ["smoothed_loss"] * bool(label_smoothing) + ["z_loss"] * bool(z_coef)
    return jnp.zeros(G, jnp.float32), {name: jnp.zeros(G, jnp.float32) for name in names}


def _token_losses(logits_GXV, targets_GX, weight_GX, label_smoothing: float, z_coef: float):
    """((loss, sums) of a chunk [G], the loss's gradient with respect to the logits). The gradient is written
    out: autodiff keeps and scatters into arrays of the logits' size."""
    lse_GX, gold_GX, is_target = _lse_and_gold(logits_GXV, targets_GX)
    nll_GX = lse_GX - gold_GX
    loss_GX, sums = nll_GX, {"loss": nll_GX}
    on, off, scale_GX = 1.0, 0.0, weight_GX
    if label_smoothing:
        off = label_smoothing / logits_GXV.shape[-1]
        on = 1.0 - label_smoothing + off
        uniform_GX = lse_GX - jnp.mean(logits_GXV, axis=-1)
        loss_GX = (1.0 - label_smoothing) * nll_GX + label_smoothing * uniform_GX
        sums["smoothed_loss"] = loss_GX
    if z_coef:
        squared_GX = lse_GX**2
        loss_GX = loss_GX + z_coef * squared_GX
        scale_GX = weight_GX * (1.0 + 2.0 * z_coef * lse_GX)
        sums["z_loss"] = squared_GX
    probs_GXV = jnp.exp(logits_GXV - lse_GX[..., None])
    d_logits = probs_GXV * scale_GX[..., None] - jnp.where(is_target, on, off) * weight_GX[..., None]
    total = lambda x_GX: jnp.sum(x_GX * weight_GX, axis=1)  # noqa: E731
    return (total(loss_GX), jax.tree.map(total, sums)), d_logits


def _loss_and_grads(
    unembed, head, hidden_BTD, targets_BT, weight_BT, mask_BT, chunk, frozen_head, label_smoothing, z_coef
):
    """The loss and the residuals of its backward pass; `mask` says which positions are taken, in chunks that
    do not change with `weight`."""
    chunks = _Chunks(mask_BT, chunk, head)
    hidden, targets, weight = map(chunks.take, (hidden_BTD, targets_BT, weight_BT))
    trained = _trained(head, frozen_head)
    # Each device sums the head's gradient over its own tokens; those sums are added up once, after the loop.
    apart = trained is not None and chunks.G == shards("X") > 1
    if apart:
        trained = jax.tree.map(lambda w: jnp.broadcast_to(w, (chunks.G, *w.shape)), trained)

    def body(i, carry):
        totals, d_hidden, d_trained = carry
        apply = lambda w, x: unembed(_put(head, w, i), x)  # noqa: E731
        logits, pull = jax.vjp(jax.vmap(apply) if apart else apply, trained, chunks[i](hidden))
        new, d_logits = _token_losses(
            _split(logits), chunks[i](targets), chunks[i](weight), label_smoothing, z_coef
        )
        dw, dx = pull(d_logits)
        d_trained = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_trained, dw)
        return jax.tree.map(jnp.add, totals, new), chunks.write(d_hidden, i, dx), d_trained

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    start = _no_loss(chunks.G, label_smoothing, z_coef), jnp.zeros_like(hidden), zeros
    totals, d_hidden, d_trained = jax.lax.fori_loop(0, chunks.count, body, start)
    if apart:
        d_trained = jax.tree.map(lambda d: jnp.sum(d, axis=0), d_trained)
    return jax.tree.map(jnp.sum, totals), (chunks.put_back(d_hidden), d_trained, head)


def _cross_entropy_fwd(
    unembed, head, hidden_BTD, targets_BT, weight_BT, chunk, frozen_head, label_smoothing, z_coef
):
    inputs = head, hidden_BTD, targets_BT, weight_BT, weight_BT
    return _loss_and_grads(unembed, *inputs, chunk, frozen_head, label_smoothing, z_coef)


def _cross_entropy_bwd(unembed, chunk, frozen_head, label_smoothing, z_coef, residuals, g):
    d_hidden, d_trained, head = residuals
    g, _ = g
    d_hidden = (d_hidden * g.astype(d_hidden.dtype)).astype(d_hidden.dtype)
    return _cotangent(head, d_trained, g), d_hidden, None, None


linear_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def linear_logprobs(unembed: Unembed, head, hidden_BTD, targets_BT, mask_BT, chunk: int, frozen_head: bool):
    """log p(target) where `mask` is not zero, else 0, float32 [B, T]; hidden state t predicts target t.

    For losses that need the log-probabilities before they know each token's weight (preference, RL): the
    backward pass goes through the head again, a chunk at a time (see `linear_cross_entropy`).
    """
    return _logprobs_fwd(unembed, head, hidden_BTD, targets_BT, mask_BT, chunk, frozen_head)[0]


def _logprobs_fwd(unembed, head, hidden_BTD, targets_BT, mask_BT, chunk, frozen_head):
    chunks = _Chunks(mask_BT, chunk, head)
    hidden, targets = map(chunks.take, (hidden_BTD, targets_BT))

    def body(i, out):
        logits = _split(unembed(_put(head, None, i), chunks[i](hidden)))
        lse, gold, _ = _lse_and_gold(logits, chunks[i](targets))
        return chunks.write(out, i, gold - lse)

    out = jax.lax.fori_loop(0, chunks.count, body, jnp.zeros(targets.shape, jnp.float32))
    out_BT = jnp.where(mask_BT != 0, chunks.put_back(out), 0.0)
    return out_BT, (head, hidden_BTD, targets_BT, mask_BT)


def _logprobs_bwd(unembed, chunk, frozen_head, residuals, g_BT):
    head, hidden_BTD, targets_BT, mask_BT = residuals
    weight_BT = jnp.where(mask_BT != 0, -g_BT, 0.0)
    inputs = head, hidden_BTD, targets_BT, weight_BT, mask_BT
    _, (d_hidden, d_trained, _) = _loss_and_grads(unembed, *inputs, chunk, frozen_head, 0.0, 0.0)
    return _cotangent(head, d_trained), d_hidden, None, None


linear_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd)
