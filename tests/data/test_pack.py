import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.pack import best_fit, bucketed, first_fit, pack

pytestmark = pytest.mark.fast
CAPACITY = 32
some_lengths = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=80).map(np.array)


@settings(max_examples=200, deadline=None)
@given(some_lengths, st.sampled_from(["best_fit", "first_fit"]), st.one_of(st.none(), st.integers(0, 99)))
def test_every_unit_once_and_no_row_too_full(lengths, packing, seed):
    random = None if seed is None else np.random.default_rng(seed)
    order = np.arange(len(lengths)) if random is None else random.permutation(len(lengths))
    plan = pack(order, lengths, CAPACITY, packing, random)
    assert sorted(plan.units.tolist()) == list(range(len(lengths)))
    rows = [plan.row(r) for r in range(len(plan))]
    assert sum(map(len, rows)) == len(lengths) and all(len(r) for r in rows)
    assert all(lengths[r].sum() <= CAPACITY for r in rows)
    # At most one row can be half empty, or two would have shared one.
    assert sum(lengths[r].sum() * 2 <= CAPACITY for r in rows) <= 1


@settings(max_examples=200, deadline=None)
@given(some_lengths)
def test_the_fits_are_what_they_say(lengths):
    for fit, best in ((best_fit, True), (first_fit, False)):
        rows, space = fit(lengths, CAPACITY), []
        for length, row in zip(lengths.tolist(), rows.tolist(), strict=True):
            fitting = [r for r, s in enumerate(space) if s >= length]
            if row == len(space):
                assert not fitting
                space.append(CAPACITY)
            elif best:
                assert space[row] == min(space[r] for r in fitting)
            else:
                assert row == fitting[0]
            space[row] -= length


@settings(max_examples=200, deadline=None)
@given(some_lengths, st.integers(1, 6), st.booleans(), st.integers(0, 9))
def test_buckets_give_batches_of_one_length(lengths, batch, pad, seed):
    buckets = [4, 8, 20, CAPACITY]
    plan = bucketed(np.arange(len(lengths)), lengths, buckets, batch, np.random.default_rng(seed), pad)
    assert sorted(plan.units.tolist()) == list(range(len(lengths)))
    if pad or len(lengths) % batch == 0:
        assert len(plan) % batch == 0
        assert all(len(set(plan.lengths[i : i + batch])) == 1 for i in range(0, len(plan), batch))
    for r in range(len(plan)):
        assert len(plan.row(r)) <= 1 and lengths[plan.row(r)].sum() <= plan.lengths[r]
    if pad:  # nothing is padded further than to its own bucket
        for r in range(len(plan)):
            assert all(buckets[np.searchsorted(buckets, lengths[u])] == plan.lengths[r] for u in plan.row(r))


def test_a_hundred_thousand_documents_pack_tightly():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5.5, 0.8, 100_000).astype(np.int64) + 5, 2048)
    for packing, least in (("best_fit", 0.995), ("first_fit", 0.97)):
        plan = pack(random.permutation(len(lengths)), lengths, 2048, packing, random)
        assert lengths.sum() / (len(plan) * 2048) > least
