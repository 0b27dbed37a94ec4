"""Intervals and tests for scores: what a difference between two arms on the same items is worth."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ftjax.errors import UserError


class Interval(NamedTuple):
    low: float
    high: float


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence} is not between 0 and 1: 0.95 means 95%")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a share of n independent items (Wilson 1927, JASA 22:209-212).

    Raises UserError for n < 1 or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise UserError(f"{successes} successes of {n} items: need at least one item, and 0..n successes")
    z, share = _z(confidence), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # at none and at all the bound is exactly 0 and 1; rounding would miss it
    return Interval(middle - half if successes else 0.0, middle + half if successes < n else 1.0)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of the exact McNemar test, from the items that only one of two arms gets right.

    Twice the smaller tail of Binomial(only_a + only_b, 1/2), at most 1 (McNemar 1947, Psychometrika
    12:153-157; exact form in Agresti, Categorical Data Analysis, section 11.1).
    """
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def tango(only_a: int, only_b: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of share(a) - share(b) for two arms on the same n items.

    `only_a` and `only_b` count the items that one arm alone gets right. Keeps its level at small n and at
    zero counts, where the Wald interval collapses (Tango 1998, Statistics in Medicine 17:891-908).
    Raises UserError when the counts do not fit.
    """
    if n < 1 or min(only_a, only_b) < 0 or only_a + only_b > n:
        raise UserError(f"{only_a} + {only_b} discordant of {n} items: need counts >= 0 that fit into n >= 1")
    z = _z(confidence)

    def score(delta: float) -> float:
        # q: the maximum-likelihood share of "only b" given that the true difference is delta
        b = (2 * n - only_a + only_b) * delta - only_a - only_b
        q = (math.sqrt(max(0.0, b * b + 8 * n * only_b * delta * (1 - delta))) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        gap = only_a - only_b - n * delta
        return gap / math.sqrt(variance) if variance > 1e-15 else math.copysign(math.inf, gap) if gap else 0.0

    def solve(target: float, inside: float, outside: float) -> float:
        # the score falls as delta grows; halve the bracket until floats are exhausted
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(score(middle)) < target:
                inside = middle
            else:
                outside = middle
        return (inside + outside) / 2

    estimate = (only_a - only_b) / n
    return Interval(solve(z, estimate, -1.0), solve(z, estimate, 1.0))


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of independent items (Efron and Tibshirani 1993, chapter 13).

    values: [n]. statistic maps [resamples, n] to [resamples]; None is the mean. The same seed gives the same
    interval. Percentile, not BCa: BCa is undefined where all items agree, which happens at small n.
    Raises UserError for no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not data.size:
        raise UserError(f"bootstrap of values of shape {data.shape}: need a list of at least one number")
    _z(confidence)  # refuses a bad level
    rng = np.random.default_rng(seed)
    rows = max(1, 2_000_000 // data.size)  # bounds memory to tens of MB
    draws = []
    for start in range(0, resamples, rows):
        sample = data[rng.integers(data.size, size=(min(rows, resamples - start), data.size))]
        draws.append(sample.mean(-1) if statistic is None else statistic(sample))
    low, high = np.quantile(np.concatenate(draws), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of mean(a) - mean(b) for two arms' scores of the same items, items resampled.

    For scores on a scale (F1, ROUGE-L, latency); for right/wrong prefer `tango`. Raises UserError when the
    lengths differ.
    """
    _same_length({"a": a, "b": b})
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return bootstrap(differences.tolist(), confidence=confidence, resamples=resamples, seed=seed)


@dataclass(frozen=True)
class Arm:
    """One row of a comparison: a share with its interval, and how it differs from the baseline arm."""

    name: str
    n: int
    successes: int
    share: float
    interval: Interval
    """Wilson's."""
    difference: float | None
    """This arm's share minus the baseline's; None in the baseline's own row, as are the next two."""
    difference_interval: Interval | None
    """Tango's, paired by item."""
    p_value: float | None
    """Exact McNemar's."""


def _same_length(arms: Mapping[str, Sequence]) -> None:
    if len({len(results) for results in arms.values()}) > 1:
        lengths = ", ".join(f"{name}: {len(results)}" for name, results in arms.items())
        raise UserError(f"arms must be scored on the same items, in the same order; got {lengths}")


def compare_arms(
    results: Mapping[str, Sequence[bool]], *, baseline: str | None = None, confidence: float = 0.95
) -> list[Arm]:
    """Table rows for arms scored right or wrong on the same items in the same order, in the order given.

    Differences are against `baseline` (None: the first arm), each at its own level: no correction for
    several comparisons. Raises UserError for no arm, an unknown baseline, or arms of different lengths.
    """
    if not results or not all(map(len, results.values())):
        raise UserError("compare_arms needs at least one arm, and at least one item in each")
    baseline = next(iter(results)) if baseline is None else baseline
    if baseline not in results:
        raise UserError(f"baseline {baseline!r} is no arm; the arms are {', '.join(map(repr, results))}")
    _same_length(results)
    base = [bool(right) for right in results[baseline]]
    rows = []
    for name, result in results.items():
        right = [bool(value) for value in result]
        n, successes = len(right), sum(right)
        difference = difference_interval = p_value = None
        if name != baseline:
            only_here = sum(x and not y for x, y in zip(right, base, strict=True))
            only_base = sum(y and not x for x, y in zip(right, base, strict=True))
            difference = (only_here - only_base) / n
            difference_interval = tango(only_here, only_base, n, confidence)
            p_value = mcnemar(only_here, only_base)
        interval = wilson(successes, n, confidence)
        rows.append(
            Arm(name, n, successes, successes / n, interval, difference, difference_interval, p_value)
        )
    return rows
