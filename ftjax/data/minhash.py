"""Texts as sets of hashed shingles, the sets' MinHash sketches, and the pairs of rows that may be alike.

MinHash and its bands: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman
and Ullman, "Mining of Massive Datasets", chapter 3. Arrays only; rows are numbers here.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby

import numpy as np

WIDTH = 5
"""Characters in a shingle."""
BANDS, ROWS = 32, 4
"""Rows of Jaccard similarity s meet in a band with probability 1 - (1 - s^ROWS)^BANDS: 0.87 at 0.5, 0.988 at
0.6, 0.9998 at 0.7; of 0.1, 0.003."""
HASHES = BANDS * ROWS
_BITS = 22  # of the table that counts in how many rows a shingle is


@cache
def _separators() -> re.Pattern[str]:
    """Runs of punctuation, space and controls. Letters, digits, marks (vowel signs of many scripts) and
    symbols (+ < = $, emoji) say something and stay."""
    codes = [c for c in range(0x10000) if unicodedata.category(chr(c))[0] in "PZC" or chr(c) in "`^~´¨¯¸"]
    runs = [list(run) for _, run in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    spans = (f"\\u{run[0][1]:04x}-\\u{run[-1][1]:04x}" for run in runs)
    return re.compile(f"[{''.join(spans)}]+")


def normalise(text: str) -> str:
    """The text without what layout changes: NFKC, case folded, each run of punctuation and space one
    space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _separators().sub(" ", text.casefold()).strip()


def _mixed(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser, in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct hashed shingles (uint32, sorted) of each normalised text, end to end, and how many each
    has; none of an empty text, one of a text shorter than a shingle."""
    padded = [text.ljust(WIDTH) if text else "" for text in texts]
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
    if not len(codes):
        return np.zeros(0, np.uint32), np.zeros(len(texts), np.int64)
    count = len(codes) - WIDTH + 1
    hashed = np.zeros(count, np.uint32)
    for k, odd in enumerate((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)):
        hashed += codes[k : k + count] * np.uint32(odd)
    _mixed(hashed)
    rows = np.repeat(np.arange(len(texts), dtype=np.uint64), lengths)[:count]
    within = np.ones(count, bool)
    for k in range(1, WIDTH):  # those that reach into the next text
        begun = np.cumsum(lengths)[:-1] - k
        within[begun[(begun >= 0) & (begun < count)]] = False
    keys = np.sort(rows[within] << np.uint64(32) | hashed[within])
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    return keys.astype(np.uint32), counts


def _counter(hashes: np.ndarray) -> np.ndarray:
    return hashes & np.uint32((1 << _BITS) - 1)


class Common:
    """The shingles that are in too many rows to say that two rows are alike: a system prompt's, a
    template's."""

    def __init__(self):
        self.counts = np.zeros(1 << _BITS, np.uint32)
        self.rows = 0
        self.table = np.zeros(1 << _BITS, bool)

    def count(self, hashes: np.ndarray, rows: int) -> None:
        """Adds some rows' distinct shingles. (Two that share a counter are counted together: with 4 M
        counters that is a few rows.)"""
        self.counts += np.bincount(_counter(hashes), minlength=1 << _BITS).astype(np.uint32)
        self.rows += rows

    def cut(self, share: float) -> None:
        """Common are those of more than `share` of the counted rows; of few rows, of more than ten or, if
        there are fewer than twenty, than half (but two), since one pair's own would be common else."""
        self.table = self.counts > max(share * self.rows, min(self.rows / 2, 10), 2)

    def out(self, hashes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same sets without what is common."""
        return without(hashes, counts, self.table[_counter(hashes)])

    def information(self, hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """What each set says, in nats: the sum of -log of the share of rows that have the shingle too. A word
        of five letters is in six shingles that say the same, so the sum is divided by six."""
        others = np.maximum(self.counts[_counter(hashes)], 2) - 1
        sets = np.repeat(np.arange(len(counts)), counts)
        return np.bincount(sets, np.log(self.rows / others), len(counts)) / (WIDTH + 1)


def without(hashes: np.ndarray, counts: np.ndarray, gone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sets without the hashes that are `gone` (bool)."""
    sets = np.repeat(np.arange(len(counts)), counts)
    return hashes[~gone], np.bincount(sets[~gone], minlength=len(counts))


def sketches(hashes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each set (none empty): the keys of its bands [rows, BANDS] uint32, equal where all of the band's
    minima are, and the lowest byte of each minimum [rows, HASHES], whose equal share estimates Jaccard's."""
    random = np.random.default_rng(20)
    factors = random.integers(0, 2**32, HASHES, np.uint32) | np.uint32(1)
    shifts = random.integers(0, 2**32, HASHES, np.uint32)
    starts = np.cumsum(counts) - counts
    minima = np.empty((HASHES, len(counts)), np.uint32)
    scratch = np.empty_like(hashes)
    for k in range(HASHES):
        np.multiply(hashes, factors[k], out=scratch)
        np.add(scratch, shifts[k], out=scratch)
        np.minimum.reduceat(scratch, starts, out=minima[k])
    keys = np.zeros((BANDS, len(counts)), np.uint32)
    for k in range(ROWS):
        keys = _mixed(keys ^ minima[k::ROWS]) + np.uint32(k)
    # mixed: a minimum's own high bits are nearly all zero, and its low ones depend on the hash's low ones
    return keys.T, _mixed(minima).astype(np.uint8).T


def estimates(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Jaccard similarity estimated from the bytes of `sketches` [pairs, HASHES] of both."""
    equal = (one == other).mean(1)
    return (equal - 1 / 256) / (1 - 1 / 256)


def overlaps(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The shingles that set k of `one` shares with set k of `other`: hashes end to end, and how many."""
    keys = [
        np.repeat(np.arange(len(counts), dtype=np.uint64), counts) << np.uint64(32) | hashes
        for hashes, counts in (one, other)
    ]
    both = np.sort(np.concatenate(keys))
    shared = both[1:][both[1:] == both[:-1]]
    counts = np.bincount((shared >> np.uint64(32)).astype(np.int64), minlength=len(one[1]))
    return shared.astype(np.uint32), counts


def meeting(keys: np.ndarray, rows: np.ndarray, crowd: int = 20) -> np.ndarray:
    """Pairs (i << 32 | j, i < j) of rows with equal keys (uint32, of some band): each with the first of all
    and, where they are at most `crowd`, with the two before it; so a million rows that meet give no billion
    pairs, and those that meet by a template few."""
    both = np.sort(keys.astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64))
    keys, rows = both >> np.uint64(32), both & np.uint64(0xFFFFFFFF)
    if not len(keys):
        return rows
    heads = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sizes = np.diff(heads, append=len(keys))
    head, size = np.repeat(heads, sizes), np.repeat(sizes, sizes)
    pairs = []
    place = np.arange(len(keys))
    for back in (1, 2):
        at = np.flatnonzero((place - head >= back) & (size <= crowd))
        pairs.append(rows[at - back] << np.uint64(32) | rows[at])
    at = np.flatnonzero((place > head) & ((size > crowd) | (place - head > 2)))
    pairs.append(rows[head[at]] << np.uint64(32) | rows[at])
    return np.concatenate(pairs)
