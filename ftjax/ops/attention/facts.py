"""What is known of an attention when its program is traced, and which of its blocks hold nothing to see."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NEVER = np.iinfo(np.int32).max  # a window that no distance reaches
UNSEEN = -1e30  # a logit that counts for nothing, and the log-sum-exp of a query that sees no key
# Segments of the tokens that pad a row to whole blocks: no query's meets a key's.
PAD_QUERY, PAD_KEY = -(2**30), -(2**30) - 1


@dataclasses.dataclass(frozen=True)
class Context:
    """The mesh axes over which a row's positions are split, how many `parts` that makes, and whether its
    tokens come in zig-zag order."""

    axes: tuple[str, ...]
    parts: int
    zigzag: bool


def zigzag(parts: int) -> np.ndarray:
    """The order in which a row's 2 · parts equal blocks lie over `parts` devices so that causal attention is
    as much work on each: 0 and the last on the first device, 1 and the last but one on the second, …"""
    return np.array([block for i in range(parts) for block in (i, 2 * parts - 1 - i)])


def reorder(x, order: np.ndarray, axis: int = 1):
    """`x` with the len(order) equal blocks of `axis` in another order."""
    shape = x.shape[:axis] + (len(order), x.shape[axis] // len(order)) + x.shape[axis + 1 :]
    return jnp.take(x.reshape(shape), order, axis=axis, unique_indices=True).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Facts:
    """The static part of an attention. `windows` are all values that its window may have, None among them
    for none; () where that is not known. `own_row`: the keys are the queries' own row (see `attention`).
    `documents`: a row has at most so many runs of one segment; None where that is not known. `sinks`: heads
    have them. `context`: the keys are the whole row, the queries one device's part of it."""

    scale: float
    softcap: float | None = None
    windows: tuple[int | None, ...] = (None,)
    own_row: bool = False
    documents: int | None = None
    sinks: bool = False
    context: "Context | None" = None


def visible(queries, keys, window):
    """The mask [..., T, S] of (segments, positions) [..., T] and [..., S]; `window` may be None."""
    (q_segments, q_positions), (k_segments, k_positions) = queries, keys
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    mask = (q_segments[..., :, None] == k_segments[..., None, :]) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def keeps_promise(segments_BT, documents: int):
    """Whether rows hold no more than so many documents, the first from the row's first token on."""
    begins = (segments_BT[:, 1:] != segments_BT[:, :-1]) & (segments_BT[:, 1:] != 0)
    return jnp.all(begins.sum(1) < documents)


def pad(x, axis: int, multiple: int, value=0):
    """`x` with `axis` filled up to a multiple."""
    short = -x.shape[axis] % multiple
    if not short:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, short)
    return jnp.pad(x, widths, constant_values=value)


def pad_rows(queries, keys, block_q: int, block_k: int):
    """(queries, keys) filled up to whole blocks with tokens that see nothing and are not seen."""
    q_segments, q_positions = queries
    k_segments, k_positions = keys
    return (
        (pad(q_segments, 1, block_q, PAD_QUERY), pad(q_positions, 1, block_q)),
        (pad(k_segments, 1, block_k, PAD_KEY), pad(k_positions, 1, block_k)),
    )


def visible_blocks(queries, keys, window, own_row: bool, block_q: int, block_k: int):
    """Bool [B, blocks of queries, blocks of keys]: False where no query of the one sees a key of the other,
    by the least and greatest segment and position of each, and by the place in the row where the two are one
    row. Lengths are multiples of the blocks."""

    def bounds(x, block):
        x = x.reshape(x.shape[0], -1, block)
        return x.min(-1), x.max(-1)

    (q_segments, q_positions), (k_segments, k_positions) = queries, keys
    q_first, q_last = bounds(q_segments, block_q)
    k_first, k_last = bounds(k_segments, block_k)
    q_least, q_most = bounds(q_positions, block_q)
    k_least, k_most = bounds(k_positions, block_k)
    seen = (q_first[:, :, None] <= k_last[:, None]) & (k_first[:, None] <= q_last[:, :, None])
    seen &= k_least[:, None] <= q_most[:, :, None]
    if window is not None:
        seen &= q_least[:, :, None] - k_most[:, None] < window
    if own_row:
        q_start = jnp.arange(q_first.shape[1], dtype=jnp.int32)[:, None] * block_q
        k_start = jnp.arange(k_first.shape[1], dtype=jnp.int32) * block_k
        seen &= k_start <= q_start + (block_q - 1)
        if window is not None:
            seen &= q_start - (k_start + (block_k - 1)) < window
    return seen


def span(seen):
    """(first, end) int32 of the True entries along the last axis; both 0 where there are none."""
    n = seen.shape[-1]
    some = seen.any(-1)
    first = jnp.argmax(seen, axis=-1)
    end = n - jnp.argmax(seen[..., ::-1], axis=-1)
    return jnp.where(some, first, 0).astype(jnp.int32), jnp.where(some, end, 0).astype(jnp.int32)


def for_each_window(of: Callable[[int | None], Callable], facts: Facts, window, T: int, *args) -> Any:
    """`of(window)(*args)` with the window that `window` is, a kernel for each that differs on T tokens."""
    effective = [w if w is not None and w < T else None for w in facts.windows]
    different = list(dict.fromkeys(effective))
    if len(different) == 1:
        return of(different[0])(*args)
    values = jnp.array([NEVER if w is None else w for w in facts.windows], jnp.int32)
    branches = jnp.array([different.index(w) for w in effective], jnp.int32)
    return jax.lax.switch(branches[jnp.argmax(values == window)], list(map(of, different)), *args)
