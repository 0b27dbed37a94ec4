import numpy as np
import pytest

from ftjax.errors import UserError
from ftjax.evaluate import statistics

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "successes, n, low, high",
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published_values(successes, n, low, high):
    assert statistics.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_edges():
    assert statistics.wilson(0, 7).low == 0 and statistics.wilson(7, 7).high == 1
    for successes, n in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(UserError, match="successes"):
            statistics.wilson(successes, n)
    with pytest.raises(UserError, match="confidence 95"):
        statistics.wilson(1, 2, confidence=95)


def test_mcnemar_against_hand_counts():
    assert statistics.mcnemar(0, 0) == 1
    assert statistics.mcnemar(0, 5) == statistics.mcnemar(5, 0) == 2 / 32
    assert statistics.mcnemar(1, 4) == 2 * (1 + 5) / 32
    assert statistics.mcnemar(3, 3) == 1


def tango_by_quartic(only_a, only_b, n, z):
    """The limits as roots of a quartic (Yang, Sun and Hardin 2013, Statistics in Medicine 32:1336-1342)."""
    g, difference, total = z * z, only_a - only_b, only_a + only_b
    coefficients = [
        n**2 * (n / g + 1) ** 2,
        -n * difference * (n / g + 1) * (4 * n / g + 1),
        2 * n * difference**2 * (3 * n / g + 2) / g - n**2 * (total / g + 1),
        n * difference * (2 * total / g + 1) - difference**3 * (4 * n / g + 1) / g,
        difference**2 * (difference**2 / g - total) / g,
    ]
    roots = np.roots(coefficients)
    real = roots[abs(roots.imag) < 1e-6].real
    return real.min(), real.max()


@pytest.mark.parametrize("only_a, only_b, n", [(9, 3, 40), (30, 2, 60), (7, 25, 32), (1, 4, 120), (5, 1, 44)])
def test_tango_against_the_closed_form(only_a, only_b, n):
    z = 1.959963984540054
    assert statistics.tango(only_a, only_b, n) == pytest.approx(
        tango_by_quartic(only_a, only_b, n, z), abs=1e-6
    )


def test_tango_edges():
    low, high = statistics.tango(0, 0, 30)  # no discordant item still leaves doubt
    assert low == pytest.approx(-high) and 0.05 < high < 0.2
    assert statistics.tango(10, 0, 10).high == 1 and statistics.tango(0, 10, 10).low == -1
    swapped = statistics.tango(3, 9, 40)
    assert statistics.tango(9, 3, 40) == pytest.approx((-swapped.high, -swapped.low))
    with pytest.raises(UserError, match="discordant"):
        statistics.tango(3, 3, 5)


@pytest.mark.parametrize("p_a, p_b, n", [(0.8, 0.2, 60), (0.15, 0.1, 60), (0.5, 0.5, 100)])
def test_tango_and_wilson_coverage(p_a, p_b, n):
    rng = np.random.default_rng(1)
    hard = rng.random((600, n, 1)) < 0.3  # items that both arms share, so the arms are correlated
    draws = rng.random((600, n, 2)) < np.array([p_a, p_b])
    a, b = np.moveaxis(draws & ~hard, -1, 0)
    share_a, share_b = 0.7 * p_a, 0.7 * p_b
    inside = inside_share = 0
    for right_a, right_b in zip(a, b, strict=True):
        low, high = statistics.tango(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()), n)
        inside += low <= share_a - share_b <= high
        low, high = statistics.wilson(int(right_a.sum()), n)
        inside_share += low <= share_a <= high
    assert 0.925 <= inside / 600 <= 0.98
    assert 0.92 <= inside_share / 600 <= 0.985


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    got = statistics.bootstrap(values.tolist(), seed=5)
    assert got == statistics.bootstrap(values.tolist(), seed=5)
    assert got != statistics.bootstrap(values.tolist(), seed=6)
    half = 1.96 * values.std() / 20
    assert got == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    median = statistics.bootstrap(values.tolist(), lambda sample: np.median(sample, -1))
    assert median.low < np.median(values) < median.high


def test_bootstrap_coverage():
    rng = np.random.default_rng(2)
    inside = 0
    for sample in rng.exponential(1.0, (200, 80)):
        low, high = statistics.bootstrap(sample.tolist(), resamples=1000)
        inside += low <= 1 <= high
    assert 0.89 <= inside / 200 <= 0.98


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(3)
    a = rng.normal(0, 10, 200)
    low, high = statistics.paired_bootstrap((a + 0.1).tolist(), a.tolist())
    assert (low, high) == pytest.approx((0.1, 0.1))
    with pytest.raises(UserError, match="a: 2, b: 3"):
        statistics.paired_bootstrap([1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="at least one"):
        statistics.paired_bootstrap([], [])


def test_compare_arms():
    results = {"base": [False] * 8 + [True] * 2, "tuned": [True] * 9 + [False]}
    base, tuned = statistics.compare_arms(results)
    assert (base.name, base.successes, base.n, base.difference, base.p_value) == ("base", 2, 10, None, None)
    assert base.interval == statistics.wilson(2, 10)
    assert tuned.difference == pytest.approx(0.7)
    assert tuned.difference_interval == statistics.tango(8, 1, 10)
    assert tuned.p_value == statistics.mcnemar(8, 1)
    flipped, _ = statistics.compare_arms(results, baseline="tuned")
    assert flipped.difference == pytest.approx(-0.7)


def test_compare_arms_refuses():
    for results, message in [({}, "at least one arm"), ({"a": [True], "b": []}, "at least one item")]:
        with pytest.raises(UserError, match=message):
            statistics.compare_arms(results)
    with pytest.raises(UserError, match="a: 1, b: 2"):
        statistics.compare_arms({"a": [True], "b": [True, False]})
    with pytest.raises(UserError, match="'c' is no arm; the arms are 'a'"):
        statistics.compare_arms({"a": [True]}, baseline="c")
