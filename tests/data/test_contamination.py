"""Test items in training rows: found where half covered, and the set's own leaks."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data import minhash
from ftjax.data.contamination import Contam, ContamOptions, Index, Rows, benchmark, texts_of
from ftjax.data.record import Record
from ftjax.errors import UserError

WORDS = [
    a + b for a in ("ka", "mo", "ri", "tu", "pe", "so") for b in ("lan", "ver", "nik", "dos", "bum", "fit")
]


def sentence(seed, words):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def row(prompt, answer="none", line=1, **meta):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record("sft", messages, meta={"source": "f.jsonl", "line": line, **meta})


def run(records, cuts=(), **options):
    """([(line, code, text, dropped)], summary), as processes would have it."""
    for line, record in enumerate(records, 1):
        record.meta["line"] = line
    step = Contam(ContamOptions(**options))
    parts = [records[a:b] for a, b in zip([0, *cuts], [*cuts, len(records)], strict=True)]
    facts = [pickle.loads(pickle.dumps(step.facts(iter(part), k))) for k, part in enumerate(parts)]
    decision = pickle.loads(pickle.dumps(step.decide(facts)))
    out = []
    for k, part in enumerate(parts):
        for judged in pickle.loads(pickle.dumps(step)).apply(iter(part), decision, k):
            out += [(v.line, v.code, v.text, judged.record is None) for v in judged.verdicts]
    return out, step.summary(decision)


def shared_words(item, text, n):
    """The share of the item's words in sequences of n that the text has too, word by word."""
    item, text = item.split(), text.split()
    there = {tuple(text[k : k + n]) for k in range(len(text) - n + 1)}
    hit = set()
    for k in range(len(item) - n + 1):
        if tuple(item[k : k + n]) in there:
            hit.update(range(k, k + n))
    return len(hit) / len(item)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(2, 5),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=8),
)
def test_the_share_is_that_of_a_count_by_hand(seed, n, pieces):
    items = [sentence(seed + k, 20) for k in range(3)]
    # rows put together of pieces of the items and of other words
    words = [w for k, at in pieces for w in (items[k].split()[at : at + 7] or [sentence(at, 3)])]
    text = " ".join(words)
    index = Index([(str(k), item) for k, item in enumerate(items)], n, 1e-9)
    found = {item: share for _, item, share in index.find(Rows([[text]], n))}
    expected = {k: s for k, item in enumerate(items) if (s := shared_words(item, text, n))}
    assert found == pytest.approx(expected)


@pytest.fixture
def bench(tmp_path):
    items = [sentence(k, 24) for k in range(30)] + ["short one here"]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps({"question": item, "answer": "x"}) + "\n" for item in items))
    return str(path), items


def test_benchmarks_items_are_found(bench):
    path, items = bench
    half = " ".join(items[2].split()[:12])
    less = " ".join(items[3].split()[:11])
    records = [
        row("something else entirely", items[0].upper() + "!"),
        row(f"before {items[1]} after"),
        row(f"{half} and then {sentence(99, 20)}"),
        row(f"{less} and then {sentence(98, 20)}"),
        row("Short one, here?"),
        row("a short one here is only part of this message"),
        row(items[4], split="test"),  # it is not trained on
    ]
    found, summary = run(records, [2, 4], against=[path])
    assert [(line, code) for line, code, _, _ in found] == [
        (1, "C001"),
        (2, "C001"),
        (3, "C001"),
        (5, "C001"),
    ]
    assert all(dropped for *_, dropped in found)
    assert found[2][2] == f"50% of {path}:3 is in it"
    assert summary[path] == {"items": 31, "items hit": 4, "rows": 4}
    assert [f[:3] for f in run(records, against=[path], report_only=True)[0]] == [f[:3] for f in found]
    assert not any(f[3] for f in run(records, against=[path], report_only=True)[0])
    # a higher bar, shorter sequences
    assert [f[0] for f in run(records, against=[path], cover=0.9)[0]] == [1, 2, 5]
    assert [f[0] for f in run(records, against=[path], cover=0.4)[0]] == [1, 2, 3, 4, 5]


def test_what_many_items_share_does_not_count(tmp_path):
    path = tmp_path / "mmlu.jsonl"
    frame = "the following are multiple choice questions with answers about many things choose the best one"
    path.write_text("".join(json.dumps({"question": f"{frame} {sentence(k, 10)}"}) + "\n" for k in range(40)))
    records = [row(f"{frame} {sentence(500, 10)}"), row(f"{frame} {sentence(7, 10)}")]
    assert [f[0] for f in run(records, against=[str(path)])[0]] == [2]


def test_other_keys_and_conversations(tmp_path):
    item = sentence(1, 20)
    shapes = {
        "a.jsonl": {"turns": [item, "go on"]},
        "b.jsonl": {
            "messages": [{"role": "user", "content": item}, {"role": "assistant", "content": sentence(2, 90)}]
        },
        "c.jsonl": {"instruction": sentence(3, 3), "input": item, "output": "x"},
    }
    for name, values in shapes.items():
        (tmp_path / name).write_text(json.dumps(values) + "\n")
        assert [f[1] for f in run([row(item)], against=[str(tmp_path / name)])[0]] == ["C001"], name
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({"stem": item, "id": 4}) + "\n")
    with pytest.raises(UserError, match=r"odd.jsonl:1: .*it has stem, id.*contam.key"):
        run([row(item)], against=[str(odd)])
    assert [f[1] for f in run([row(item)], against=[str(odd)], key=["stem"])[0]] == ["C001"]


def test_leaks_between_own_sides():
    texts = [sentence(k, 30) for k in range(60)]
    records = [row(f"question {k} of these", text, split="train") for k, text in enumerate(texts)]
    held = row(texts[0], texts[1], split="test", cluster="cl")
    same = row(texts[0], texts[1].upper(), split="train")
    cluster = row("another wording", "altogether", split="train", cluster="cl")
    evaluation = row(texts[3], "an answer of its own", split="eval")
    records = [*records, held, same, cluster, evaluation]
    expected = [1, 2, 4, 62, 63]  # texts 0 and 1 are half of the test row each, text 3 most of the eval row
    for cuts in ((), (20, 61), (62,)):
        found, summary = run(records, cuts)
        assert [f[0] for f in found] == expected and {f[1] for f in found} == {"C002"}
        assert summary["held out rows"] == 2
    assert "it is f.jsonl:61" in found[3][2] and "cluster cl" in found[4][2]


def test_system_prompts_are_not_looked_at():
    record = row("hello")
    record.messages.insert(0, {"role": "system", "content": sentence(1, 40)})
    assert texts_of(record) == ["hello", "none"]


def test_scripts_without_spaces():
    index = Index([("1", "これは長い文章です。だれかが書きました")], 8, 0.5)
    rows = Rows([["前 これは長い文章です。だれかが読みました"], ["これは短い文です"]], 8)
    # every letter is a word: the first 13 of 18 are in sequences of eight that both have
    assert list(index.find(rows)) == [(0, 0, 13 / 18)]


@pytest.mark.parametrize(
    "texts", [[], [[]], [[""]], [["x"], []], [["\ud800 " * 12]], [["これは長い文章です。" * 4]]]
)
def test_small_and_strange_rows(texts):
    index = Index([("1", sentence(1, 20)), ("2", "x"), ("3", "")], 8, 0.5)
    expected = [(k, 1, 1.0) for k, row in enumerate(texts) for t in row if minhash.normalise(t) == "x"]
    assert list(index.find(Rows(texts, 8))) == expected
    assert list(Index([], 8, 0.5).find(Rows([[sentence(1, 20)]], 8))) == []


@pytest.mark.parametrize("options", [{"n": 1}, {"cover": 0.0}, {"cover": 1.1}])
def test_options_that_make_no_sense(options):
    with pytest.raises(UserError, match="contam"):
        Contam(ContamOptions(**options))


def test_gsm8k_is_found_in_a_training_set_and_its_own_training_side_is_not():
    folder = Path(os.environ.get("FTJAX_TEST_ASSETS", "")) / "data" / "gsm8k"
    if "FTJAX_TEST_ASSETS" not in os.environ or not folder.is_dir():
        pytest.skip("gsm8k is not at hand (FTJAX_TEST_ASSETS)")
    items = benchmark(str(folder / "test.jsonl"))
    index = Index(items, 8, 0.5)
    rng = random.Random(0)

    def changed(text):
        words = text.split()
        for k in rng.sample(range(len(words)), len(words) // 10):
            words[k] = "other"
        return " ".join(words)

    ways = {
        "as it is": (1.0, str),
        "within another text": (1.0, lambda text: f"Please solve this with care. {text} Show your work."),
        "a tenth of the words changed": (0.94, changed),
    }
    for name, (least, way) in ways.items():
        found = {(k, item) for k, item, _ in index.find(Rows([[way(text)] for _, text in items], 8))}
        assert sum((k, k) in found for k in range(len(items))) >= least * len(items), name
    trained = [[text] for _, text in benchmark(str(folder / "train.jsonl"))]
    # three of 7,473, which are the same problems with other numbers
    assert len({k for k, _, _ in index.find(Rows(trained, 8))}) <= 5
