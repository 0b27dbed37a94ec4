"""Which rows are duplicates of which, found over the files that `dedup` made of each part; out of core.

In memory are some 70 bytes a row. Shingles, sketches and candidate pairs are in files, read in order or by
blocks; bands and pairs are worked on a partition of the rows at a time, which changes nothing in the result.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax.data import minhash

ROW = np.dtype(
    [
        ("exact", np.uint64),  # hash of the normalised text and the guard
        ("guard", np.uint64),  # hash of what duplicates have in common
        ("shingles", np.uint32),  # how many the row has
        ("priority", np.float64),  # the higher stays
        ("source", np.uint32),
        ("line", np.int64),
    ]
)
FOUND = np.dtype(
    [
        ("row", np.int64),
        ("kept", np.int64),  # the row that stays: itself, if it does
        ("cluster", np.uint64),
        ("similarity", np.float32),
        ("kind", np.uint8),
    ]
)
EXACT, NEAR, SEMANTIC = 1, 2, 3

TOLD = 2.5
"""Two rows are duplicates only if what they share is surprising: the information of the shared distinctive
shingles, a word's counted once, is at least this many times log(rows). (Of n rows there are n² / 2 pairs, so
that 2 log(n) nats are shared by chance.) Rows put together of words that many rows have never get there."""
FAMILY = 20
"""More rows than this that hang together by near copies are a template with other words in it: what they
have in common is cut once more among them."""
CONTAINED, LENGTH = 0.9, 0.6
"""A row is also a duplicate if this share of the shorter's distinctive shingles is in the longer, of which
the shorter is at least this share: a copy with pleasantries around it."""
WHOLE = 0.1
"""Whole texts that are as alike as the threshold asks may be so much less alike in what is distinctive."""
PARTITION = 4_000_000
SAMPLE = 200_000  # rows that shingles are counted in
CHUNK = 1024  # rows sketched at a time: their shingles stay in a core's cache
BLOCK = 8192  # pairs compared at a time
LARGE = 2_000_000  # shingles at a time: 16 MB as sorted
SLACK = 0.12  # an estimate of 128 hashes is that far below the truth in one pair of 300
THREADS = min(os.cpu_count() or 1, 8)


class Part(NamedTuple):
    """The files of one part: its ROWs, their shingle sets end to end (uint32)."""

    rows: str
    shingles: str
    count: int


class Pairs(NamedTuple):
    """Pairs of duplicates by rank, `one` the better."""

    one: np.ndarray
    other: np.ndarray
    similarity: np.ndarray
    kind: np.ndarray

    @staticmethod
    def joined(pairs: Sequence["Pairs"]) -> "Pairs":
        return Pairs(*(np.concatenate(column) for column in zip(*pairs, strict=True)))


NONE = Pairs(*(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float32, np.uint8)))


class Table:
    """All rows, by rank: 0 is the one that stays before any other. Their shingle sets stay in the files."""

    def __init__(self, parts: Sequence[Part]):
        self.paths = [part.shingles for part in parts]
        self.starts = np.cumsum([0, *(part.count for part in parts)])
        self.total = int(self.starts[-1])
        self.exact, self.guard = np.empty(self.total, np.uint64), np.empty(self.total, np.uint64)
        counts, priority = np.empty(self.total, np.uint32), np.empty(self.total)
        for part, begin, end in zip(parts, self.starts[:-1], self.starts[1:], strict=True):
            rows = np.fromfile(part.rows, ROW)
            self.exact[begin:end], self.guard[begin:end] = rows["exact"], rows["guard"]
            counts[begin:end], priority[begin:end] = rows["shingles"], rows["priority"]
        self.row = np.argsort(-priority, kind="stable")  # of a rank
        self.rank = np.empty(self.total, np.int64)  # of a row
        self.rank[self.row] = np.arange(self.total)
        self.offset = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # of a row's set in all sets
        self.exact, self.guard = self.exact[self.row], self.guard[self.row]
        self.empty = counts[self.row] == 0
        self.common = minhash.Common()

    def sets(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sets of rows, in any order: hashes end to end, and how many each has."""
        rows = self.row[ranks]
        counts = self.offset[rows + 1] - self.offset[rows]
        ends = np.cumsum(counts)
        out = np.empty(int(counts.sum()), np.uint32)
        parts = np.searchsorted(self.starts, rows, "right") - 1
        for part in np.unique(parts):
            here = np.flatnonzero((parts == part) & (counts > 0))
            if not len(here):
                continue
            begins = self.offset[rows[here]] - self.offset[self.starts[part]]
            n = counts[here]
            within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            low, high = int(begins.min()), int((begins + n).max())
            if high - low <= 2 * len(within):  # side by side: read at once
                data = np.fromfile(self.paths[part], np.uint32, high - low, offset=4 * low)
            else:
                data, low = np.memmap(self.paths[part], np.uint32, "r"), 0
            out[np.repeat(ends[here] - n, n) + within] = data[np.repeat(begins - low, n) + within]
        return out, counts

    def sizes(self, ranks: np.ndarray) -> np.ndarray:
        rows = self.row[ranks]
        return self.offset[rows + 1] - self.offset[rows]

    def distinctive(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Their sets without what is common."""
        return self.common.out(*self.sets(ranks))


def first_copies(exact: np.ndarray) -> np.ndarray:
    """Of each rank, the first rank with the same hash."""
    order = np.argsort(exact, kind="stable")
    same = exact[order]
    begins = np.concatenate([[True], same[1:] != same[:-1]])[: len(same)]
    first = np.empty(len(exact), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(same)), 0))]
    return first


def slices(sizes: np.ndarray, most: int, rows: int) -> Iterator[slice]:
    """Cuts a sequence into pieces of at most `rows` elements whose sizes add up to about `most`."""
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(sizes):
        before = ends[begin - 1] if begin else 0
        end = int(np.searchsorted(ends, before + most, "right"))
        end = max(begin + 1, min(end, begin + rows))
        yield slice(begin, end)
        begin = end


def near(
    table: Table,
    single: np.ndarray,
    threshold: float,
    df_cut: float,
    scratch: Path,
) -> Pairs:
    """The pairs of near duplicates among the ranks `single`, by way of files under `scratch`."""
    single = table.rank[np.sort(table.row[single])]  # in the order of the files
    count_common(table, single, df_cut)
    ranks = sketch(table, single, scratch)
    paths = meet(table, ranks, scratch)
    place = np.full(table.total, -1, np.int64)  # of a rank in the sketches' file
    place[ranks] = np.arange(len(ranks))
    lowest = min(threshold - WHOLE, CONTAINED * LENGTH / (1 + LENGTH - CONTAINED * LENGTH))
    found = [NONE]
    for path in paths:
        pairs = np.unique(np.fromfile(path, np.uint64))
        one, other = (
            (pairs >> np.uint64(32)).astype(np.int64),
            (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64),
        )
        likely = np.zeros(len(one), bool)
        for begin in range(0, len(one), 8 * BLOCK):
            block = slice(begin, begin + 8 * BLOCK)
            low = np.memmap(scratch / "sketches", np.uint8, "r").reshape(-1, minhash.HASHES)
            likely[block] = (
                minhash.estimates(low[place[one[block]]], low[place[other[block]]]) > lowest - SLACK
            )
        found += checked(table, one[likely], other[likely], threshold)
    return without_families(table, Pairs.joined(found), threshold, df_cut)


def count_common(table: Table, ranks: np.ndarray, df_cut: float) -> None:
    """Counts shingles over at most about SAMPLE of the rows, chosen by their numbers, and cuts the common
    ones."""
    if len(ranks) > SAMPLE:
        mixed = (table.row[ranks].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        ranks = ranks[mixed < 2**32 * SAMPLE / len(ranks)]
    for piece in slices(table.sizes(ranks), LARGE, LARGE):
        hashes, counts = table.sets(ranks[piece])
        table.common.count(hashes, len(counts))
    table.common.cut(df_cut)


def sketch(table: Table, ranks: np.ndarray, scratch: Path) -> np.ndarray:
    """Writes the sketches of those rows that are distinctive enough, and gives their ranks."""

    needed = TOLD * np.log(max(table.common.rows, 1))

    def of(piece: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        hashes, counts = table.distinctive(ranks[piece])
        enough = table.common.information(hashes, counts) >= needed
        hashes = hashes[np.repeat(enough, counts)]
        return ranks[piece][enough], *minhash.sketches(hashes, counts[enough])

    members = [np.zeros(0, np.int64)]
    pieces = slices(table.sizes(ranks), LARGE, CHUNK)
    with ThreadPoolExecutor(THREADS) as pool, ExitStack() as files:
        bands = [files.enter_context(open(scratch / f"band-{b}", "wb")) for b in range(minhash.BANDS)]
        sketches = files.enter_context(open(scratch / "sketches", "wb"))
        while ahead := list(islice(pieces, 8 * THREADS)):
            for enough, keys, low in pool.map(of, ahead):
                members.append(enough)
                low.tofile(sketches)
                for file, column in zip(bands, keys.T, strict=True):
                    column.tofile(file)
    return np.concatenate(members)


def meet(table: Table, ranks: np.ndarray, scratch: Path) -> list[Path]:
    """Writes the pairs that meet in any band, some several times, to a file for each partition of the
    first."""
    paths = [scratch / f"pairs-{k}" for k in range(-(-table.total // PARTITION))]
    cuts = np.linspace(0, 2**32, -(-max(len(ranks), 1) // PARTITION) + 1)
    with ExitStack() as files:
        out = [files.enter_context(open(path, "wb")) for path in paths]
        for band in range(minhash.BANDS):
            keys = np.fromfile(scratch / f"band-{band}", np.uint32)
            for low, high in zip(cuts[:-1], cuts[1:], strict=True):
                here = (keys >= low) & (keys < high) if len(cuts) > 2 else slice(None)
                pairs = minhash.meeting(keys[here], ranks[here])
                one, other = pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)
                alike = table.guard[one.astype(np.int64)] == table.guard[other.astype(np.int64)]
                pairs, number = pairs[alike], one[alike] // np.uint64(PARTITION)
                for k in np.unique(number).astype(int):
                    pairs[number == k].tofile(out[k])
            del keys
            os.unlink(scratch / f"band-{band}")
    return paths


def checked(
    table: Table, one: np.ndarray, other: np.ndarray, threshold: float, cut: np.ndarray | None = None
) -> list[Pairs]:
    """Those of the pairs that are duplicates by their whole distinctive sets, less the shingles `cut`."""

    def sets(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hashes, counts = table.distinctive(ranks)
        return minhash.without(hashes, counts, np.isin(hashes, cut)) if cut is not None else (hashes, counts)

    needed = TOLD * np.log(max(table.common.rows, 1))

    def of(piece: slice) -> Pairs:
        (a, of_a), (b, of_b) = sets(one[piece]), sets(other[piece])
        hashes, shared = minhash.overlaps((a, of_a), (b, of_b))
        told = table.common.information(hashes, shared)
        jaccard = shared / np.maximum(of_a + of_b - shared, 1)
        fewer, more = np.minimum(of_a, of_b), np.maximum(of_a, of_b)
        within = (shared >= CONTAINED * fewer) & (fewer >= LENGTH * more)
        good = (jaccard >= threshold) | within
        near = np.flatnonzero(~good & (jaccard >= threshold - WHOLE))
        (a, of_a), (b, of_b) = table.sets(one[piece][near]), table.sets(other[piece][near])
        shared = minhash.overlaps((a, of_a), (b, of_b))[1]
        good[near] = shared >= threshold * (of_a + of_b - shared)
        good &= told >= needed
        kind = np.full(good.sum(), NEAR, np.uint8)
        return Pairs(one[piece][good], other[piece][good], jaccard[good].astype(np.float32), kind)

    sizes = table.sizes(one) + table.sizes(other)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(of, slices(sizes, LARGE, BLOCK)))


def without_families(table: Table, pairs: Pairs, threshold: float, df_cut: float) -> Pairs:
    """The pairs, those of large families only if they still hold without what the family has in common."""
    nodes = np.unique(np.concatenate([pairs.one, pairs.other]))
    root = components(len(nodes), np.searchsorted(nodes, pairs.one), np.searchsorted(nodes, pairs.other))
    families = np.flatnonzero(np.bincount(root, minlength=1) > FAMILY)
    of_pair = root[np.searchsorted(nodes, pairs.one)]
    kept = [NONE, Pairs(*(column[~np.isin(of_pair, families)] for column in pairs))]
    for family in families:
        members = nodes[root == family][:SAMPLE]
        hashes, counts = np.unique(table.distinctive(members)[0], return_counts=True)
        cut = hashes[counts > max(df_cut * len(members), 10)]
        here = of_pair == family
        kept += checked(table, pairs.one[here], pairs.other[here], threshold, cut)
    return Pairs.joined(kept)


def alike(table: Table, single: np.ndarray, vectors: Sequence[np.ndarray], threshold: float) -> Pairs:
    """The pairs of the ranks `single` whose vectors' cosine is at least the threshold; rows² products, by
    blocks."""

    def unit(ranks: np.ndarray) -> np.ndarray:
        rows = table.row[ranks]
        parts = np.searchsorted(table.starts, rows, "right") - 1
        out = np.empty((len(rows), vectors[0].shape[1]), np.float32)
        for part in np.unique(parts):
            here = parts == part
            out[here] = vectors[part][rows[here] - table.starts[part]]
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        return out / np.where(norms > 0, norms, 1)

    found = [NONE]
    single = np.sort(single)
    for i in range(0, len(single), 1024):
        ours = unit(single[i : i + 1024])
        for j in range(i, len(single), 8192):
            cosine = ours @ unit(single[j : j + 8192]).T
            a, b = np.nonzero(cosine >= threshold)
            one, other = single[i + a], single[j + b]
            good = (one < other) & (table.guard[one] == table.guard[other])
            kind = np.full(good.sum(), SEMANTIC, np.uint8)
            found.append(Pairs(one[good], other[good], cosine[a, b][good], kind))
    return Pairs.joined(found)


def components(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The lowest node that each of `count` nodes is connected with by the edges."""
    root = np.arange(count)
    while True:
        a, b = root[one], root[other]
        if (a == b).all():
            return root
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]


def settle(table: Table, first: np.ndarray, pairs: Pairs) -> np.ndarray:
    """What becomes of every row that has duplicates, FOUND by row.

    In order of rank, a row that is paired with one that stays goes, for the likest of those; so every row
    that goes is itself alike to the row that it names, never only to one that is alike to another that is.
    A cluster is all that are connected, named by the hash of its first row.
    """
    nodes = np.unique(np.concatenate([pairs.one, pairs.other]))
    one, other = np.searchsorted(nodes, pairs.one), np.searchsorted(nodes, pairs.other)
    root = nodes[components(len(nodes), one, other)] if len(nodes) else nodes
    stays = list(range(len(nodes)))
    similarity = [0.0] * len(nodes)
    kind = [0] * len(nodes)
    order = np.lexsort((one, other))
    for a, b, s, k in zip(*(x[order].tolist() for x in (one, other, *pairs[2:])), strict=True):
        if stays[a] == a and s > similarity[b]:
            stays[b], similarity[b], kind[b] = a, s, k

    copies = np.flatnonzero((first != np.arange(table.total)) & ~table.empty)
    ranks = np.unique(np.concatenate([nodes, copies, first[copies]]))
    found = np.zeros(len(ranks), FOUND)
    place = np.searchsorted(nodes, first[ranks]) if len(nodes) else np.zeros(len(ranks), int)
    paired = np.zeros(len(ranks), bool)
    paired[:] = len(nodes) and nodes[np.minimum(place, len(nodes) - 1)] == first[ranks]
    kept, cluster = first[ranks].copy(), first[ranks].copy()
    found["similarity"], found["kind"] = 1, EXACT
    place = place[paired]
    kept[paired], cluster[paired] = nodes[np.array(stays, int)[place]], root[place]
    gone = np.flatnonzero(paired)[kept[paired] != first[ranks[paired]]]
    place = place[kept[paired] != first[ranks[paired]]]
    found["similarity"][gone] = np.array(similarity)[place]
    found["kind"][gone] = np.array(kind)[place]
    found["row"], found["kept"] = table.row[ranks], table.row[kept]
    found["cluster"] = table.exact[cluster]
    return np.sort(found, order="row")
