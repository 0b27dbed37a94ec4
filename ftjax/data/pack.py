"""Which documents share a row: a plan made from lengths alone, so that it can be made again at any time."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Rows of units: row r has units[starts[r] : starts[r + 1]], and is `lengths[r]` tokens long, padding
    included."""

    units: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, r: int) -> np.ndarray:
        return self.units[self.starts[r] : self.starts[r + 1]]


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row number of each length, in turn put into the row it fills best; give lengths in decreasing order
    for least waste.

    The open rows' free spaces are the set bits of one integer, so the best row is found by its lowest set
    bit.
    """
    rows = np.empty(len(lengths), np.int64)
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    bit = [1 << i for i in range(capacity + 1)]
    spaces = opened = 0
    for i, length in enumerate(lengths.tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            same = by_space[space]
            row = same.pop()
            if not same:
                spaces ^= bit[space]
        else:
            row, space = opened, capacity
            opened += 1
        rows[i] = row
        left = space - length
        if left:
            by_space[left].append(row)
            spaces |= bit[left]
    return rows


def first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row number of each length, in turn put into the earliest row with space for it.

    A binary tree over the rows keeps the largest free space below each node; rows not opened yet have all
    of it.
    """
    rows = np.empty(len(lengths), np.int64)
    size = 1
    # At most one row is half empty, so this many rows are enough.
    while size * capacity < 2 * int(lengths.sum()) + capacity:
        size *= 2
    tree = [capacity] * (2 * size)
    for i, length in enumerate(lengths.tolist()):
        node = 1
        while node < size:
            node *= 2
            if tree[node] < length:
                node += 1
        rows[i] = node - size
        tree[node] -= length
        node //= 2
        while node:
            most = max(tree[2 * node], tree[2 * node + 1])
            if tree[node] == most:
                break
            tree[node] = most
            node //= 2
    return rows


def pack(
    order: np.ndarray,
    lengths: np.ndarray,
    capacity: int,
    packing: str,
    random: np.random.Generator | None,
) -> Plan:
    """The units of `order` (indices into `lengths`) in rows of `capacity`, "best_fit" or "first_fit".

    With `random`, rows come shuffled; without, in the order in which they were opened, and units in the
    order given.
    """
    if random is not None and packing == "best_fit":
        order = order[np.argsort(-lengths[order], kind="stable")]
    rows = (best_fit if packing == "best_fit" else first_fit)(lengths[order], capacity)
    count = int(rows.max()) + 1 if len(rows) else 0
    if random is not None:
        rows = random.permutation(count)[rows]
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=count), out=starts[1:])
    return Plan(order[np.argsort(rows, kind="stable")], starts, np.full(count, capacity, np.int64))


def bucketed(
    order: np.ndarray,
    lengths: np.ndarray,
    buckets: list[int],
    batch: int,
    random: np.random.Generator | None,
    pad: bool = False,
) -> Plan:
    """One unit a row, in batches of `batch` rows that all have one bucket's length.

    What does not fill a batch of its bucket goes to the next larger one; what is left in the last one (only
    where `batch` does not divide the number of units) makes a short batch. With `pad` it stays in its own
    bucket and empty rows fill its batch. Batches are shuffled with `random`.
    """
    which = np.searchsorted(buckets, lengths[order])
    groups: list[tuple[np.ndarray, int]] = []
    carried = order[:0]
    for i, bucket in enumerate(buckets):
        mine = np.concatenate([carried, order[which == i]])
        last = i == len(buckets) - 1
        full = len(mine) if last or pad else len(mine) // batch * batch
        carried = mine[full:]
        groups += [(mine[at : min(at + batch, full)], bucket) for at in range(0, full, batch)]
    if random is not None:
        groups = [groups[i] for i in random.permutation(len(groups))]
    counts, spans = [], []
    for units, bucket in groups:
        rows = batch if pad else len(units)
        counts += [1] * len(units) + [0] * (rows - len(units))
        spans += [bucket] * rows
    starts = np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)
    units = np.concatenate([u for u, _ in groups]) if groups else order[:0]
    return Plan(units, starts, np.array(spans, np.int64))
