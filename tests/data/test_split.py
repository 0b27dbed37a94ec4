"""Splits: what belongs together on one side, and nothing moves when rows are added."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.record import Record
from ftjax.data.split import Split, SplitOptions
from ftjax.errors import UserError


def row(text, **meta):
    return Record("lm", text=text, meta=meta)


def sides(records, cuts=(), **options):
    """(the side of each record, the summary)."""
    step = Split(SplitOptions(**options))
    parts = [records[a:b] for a, b in zip([0, *cuts], [*cuts, len(records)], strict=True)]
    decision = step.decide([step.facts(iter(part), k) for k, part in enumerate(parts)])
    out = []
    for k, part in enumerate(parts):
        judged = list(step.apply(iter(part), decision, k))
        assert all(j.changed and not j.verdicts for j in judged)
        out += [j.record.meta["split"] for j in judged]
    return out, step.summary(decision)


def test_shares_are_about_those_asked_for():
    given, summary = sides([row(f"row {k}") for k in range(4000)], test=0.2, eval=0.1)
    counts = Counter(given)
    # three standard deviations of a binomial of 4,000
    assert abs(counts["test"] - 800) < 76 and abs(counts["eval"] - 400) < 57
    assert summary["rows"] == counts and summary["groups"] == 4000


def test_what_belongs_together_is_on_one_side():
    rng = random.Random(0)
    records = []
    for k in range(400):
        meta = {"group": f"doc {rng.randrange(60)}"}
        if rng.random() < 0.3:
            meta["cluster"] = f"c{rng.randrange(30)}"
        records.append(row(f"row {k % 390}", **meta))  # the last ten are the first ten again
    given, _ = sides(records, test=0.3)
    for key in ("group", "cluster"):
        of = {}
        for record, side in zip(records, given, strict=True):
            if key in record.meta:
                assert of.setdefault(record.meta[key], side) == side
    assert given[390:] == given[:10]
    # a row alone decides for itself where nothing is grouped
    assert (
        len(set(sides([row(f"row {k}", group="one") for k in range(50)], by=["cluster"], test=0.5)[0])) == 2
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.integers(0, 2**16), st.data())
def test_neither_parts_nor_order_nor_added_rows_move_a_group(groups, seed, data):
    records = [row(f"row {k}", group=g) for k, g in enumerate(groups)]
    whole, summary = sides(records, seed=seed, test=0.4)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(records)), max_size=3)))
    assert sides(records, cuts, seed=seed, test=0.4) == (whole, summary)
    order = data.draw(st.permutations(range(len(records))))
    more = [records[k] for k in order] + [row("new", group=100), row("other", group=101)]
    moved, _ = sides(more, seed=seed, test=0.4)
    # a group is named by the lowest of its keys, so one that gets no new row keeps its side
    assert [moved[order.index(k)] for k in range(len(records))] == whole


def test_strata_get_their_share_each():
    records = [row(f"row {k}", label="rare" if k % 20 == 0 else "often") for k in range(400)]
    given, summary = sides(records, stratify="label", test=0.25, eval=0.25)
    assert summary["strata"] == {
        "often": {"train": 190, "eval": 95, "test": 95},
        "rare": {"train": 10, "eval": 5, "test": 5},
    }
    assert Counter(given) == {"train": 200, "eval": 100, "test": 100}


def test_the_hash_of_the_test_side_says_whether_it_is_the_same():
    records = [row(f"row {k}") for k in range(200)]
    first = sides(records)[1]["test hash"]
    assert sides(records[::-1])[1]["test hash"] == first
    side = sides(records)[0]
    tested = side.index("test")
    assert sides(records[:tested] + records[tested + 1 :])[1]["test hash"] != first
    trained = side.index("train")
    assert sides(records[:trained] + records[trained + 1 :])[1]["test hash"] == first
    assert sides(records, seed=1)[1]["test hash"] != first


@pytest.mark.parametrize(
    "options", [{"test": 0.0}, {"test": 1.0}, {"test": 0.6, "eval": 0.5}, {"test": -0.1}]
)
def test_shares_that_make_no_sense(options):
    with pytest.raises(UserError, match="give shares"):
        Split(SplitOptions(**options))


@pytest.mark.parametrize("stratify", [None, "answer"])
def test_no_rows(stratify):
    given, summary = sides([], test=0.5, stratify=stratify)
    assert not given and summary["rows"] == {"train": 0, "eval": 0, "test": 0} and summary["groups"] == 0
