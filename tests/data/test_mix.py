"""Mixtures: shares, caps, rows drawn and repeated, and every row accounted for."""

from collections import Counter

import pytest

from ftjax.data.mix import Mix, MixOptions
from ftjax.data.record import Record
from ftjax.errors import UserError


def rows(**sources):
    return [
        Record("lm", text=f"{name} {k}", meta={"source": f"data/{name}.jsonl", "line": k + 1})
        for name, count in sources.items()
        for k in range(count)
    ]


def mixed(records, cuts=(), **options):
    step = Mix(MixOptions(**options))
    parts = [records[a:b] for a, b in zip([0, *cuts], [*cuts, len(records)], strict=True)]
    decision = step.decide([step.facts(iter(part), k) for k, part in enumerate(parts)])
    judged = [j for k, part in enumerate(parts) for j in step.apply(iter(part), decision, k)]
    drawn = [j.record.text for j in judged if j.record]
    left = [v for j in judged for v in j.verdicts]
    assert len(set(drawn)) + len(left) == len(records)  # each is drawn or has a verdict
    return drawn, left, step.summary(decision)


def of(drawn):
    return dict(Counter(text.split()[0] for text in drawn))


def test_shares_without_repeating_a_row():
    drawn, left, summary = mixed(rows(a=100, b=30), weight=["a.jsonl=2", "b.jsonl=1"])
    assert of(drawn) == {"a": 60, "b": 30} and len(set(drawn)) == 90
    assert {v.code for v in left} == {"M001"} and len(left) == 40
    assert left[0].text == "of data/a.jsonl 60 of 100 rows are drawn"
    assert summary["sources"]["data/a.jsonl"] == {"rows": 100, "drawn": 60, "share": 0.6667, "times": 0.6}


def test_a_small_source_is_repeated_evenly():
    drawn, _, summary = mixed(rows(a=10, b=4), weight=["a.jsonl=1", "data/b.jsonl=1"], total=20)
    assert of(drawn) == {"a": 10, "b": 10}
    assert sorted(Counter(t for t in drawn if t[0] == "b").values()) == [2, 2, 3, 3]
    assert (
        summary["sources"]["data/b.jsonl"]["repeated"] and summary["sources"]["data/b.jsonl"]["times"] == 2.5
    )


def test_caps_and_totals():
    assert of(mixed(rows(a=100, b=30), cap=["a.jsonl=20"])[0]) == {"a": 20, "b": 30}
    assert of(mixed(rows(a=100, b=50), total=30)[0]) == {"a": 20, "b": 10}
    # the remainder goes to the largest fraction: 10 * 1/3 and 10 * 2/3
    assert of(mixed(rows(a=50, b=50), weight=["a.jsonl=1", "b.jsonl=2"], total=10)[0]) == {"a": 3, "b": 7}
    assert of(mixed(rows(a=7))[0]) == {"a": 7}
    assert mixed([])[0] == []


def test_the_same_rows_whatever_the_parts_and_the_order():
    records = rows(a=50, b=20)
    options = {"weight": ["a.jsonl=1", "b.jsonl=1"], "total": 25}
    first = sorted(mixed(records, **options)[0])
    assert sorted(mixed(records, [10, 10, 55], **options)[0]) == first
    assert sorted(mixed(records[::-1], **options)[0]) == first
    assert sorted(mixed(records, seed=1, **options)[0]) != first


@pytest.mark.parametrize(
    "options, said",
    [
        ({"weight": ["a.jsonl=1"]}, "none for data/b.jsonl"),
        (
            {"weight": ["c.jsonl=1", "a.jsonl=1"]},
            "c.jsonl is no source; there are data/a.jsonl, data/b.jsonl",
        ),
        ({"weight": ["a.jsonl"]}, "SOURCE=NUMBER"),
        ({"weight": ["a.jsonl=-1"]}, "positive"),
        ({"cap": ["a.jsonl=1.5"]}, "SOURCE=NUMBER"),
        ({"total": 0}, "number of rows"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(UserError, match=said):
        mixed(rows(a=3, b=3), **options)
