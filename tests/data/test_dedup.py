"""Duplicates: what is one and what never is, against brute force, however the data set is cut into parts."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data import duplicates, minhash, pipeline
from ftjax.data.dedup import Dedup, DedupOptions, numbers
from ftjax.data.engine import Processes
from ftjax.data.pipeline import Stored
from ftjax.data.record import Record
from ftjax.errors import UserError

WORDS = (
    "river mountain silver engine basket winter market gentle copper window planet orange candle bridge "
    "garden ticket hammer velvet thunder pocket saddle mirror carbon island whisper dragon needle forest "
    "cotton anchor pepper rocket meadow violin tunnel magnet hollow cannon ribbon shadow"
).split()


def row(prompt, answer, line=0, **meta):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record("sft", messages, meta={"source": "f.jsonl", "line": line, **meta})


def sentence(seed, words=14):
    return " ".join(random.Random(seed).sample(WORDS, words))


def numbered(records):
    for line, record in enumerate(records, 1):
        record.meta |= {"source": "f.jsonl", "line": line}
    return records


def filled(records, others=40):
    """The records and unlike ones, so that there is something to be distinctive against."""
    return numbered([*records, *(row(sentence(1000 + k, 6), sentence(2000 + k)) for k in range(others))])


def parted(records, cuts, folder):
    """The records as parts that end before each of `cuts`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for k, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(records)], strict=True)):
        path = folder / f"{k}.jsonl"
        lines = [json.dumps(r.to_json()) + "\n" for r in records[a:b]]
        path.write_text("".join(lines))
        parts.append(Stored(path, f"{folder}{k}{lines}"))
    return parts


def run(records, tmp_path, cuts=(), engine=None, embed=None, **options):
    step = Dedup(DedupOptions(**options), embed)
    stage = pipeline.run(step, parted(records, cuts, tmp_path / "in"), tmp_path / "work", engine)
    return [r.meta["line"] for r in stage.records()], list(stage.verdicts()), stage


def gone(records, tmp_path, **options):
    kept, _, _ = run(records, tmp_path, **options)
    return sorted({r.meta["line"] for r in records} - set(kept))


def test_kinds_of_copies(tmp_path):
    prompt, answer = sentence(1, 6), sentence(2, 20)
    words = answer.split()
    copies = [
        row(prompt, answer),
        row(f"  {prompt.upper()} ??", answer.title().replace(" ", ",  ")),  # form alone: exact
        row(prompt, answer.replace("e", "3", 1).replace("3", "a")),  # a typo
        row(prompt, " ".join(words[10:] + words[:10])),
        row(prompt, f"Sure! {answer} I hope this helps!"),
    ]
    _, verdicts, stage = run(filled(copies), tmp_path)
    assert [(v["line"], v["code"]) for v in verdicts] == [(2, "D001"), (3, "D002"), (4, "D002"), (5, "D002")]
    assert all("f.jsonl:1," in v["text"] for v in verdicts)
    first = next(stage.records())
    assert first.meta["cluster"] in verdicts[0]["text"]
    assert stage.summary["clusters"] == 1 and stage.summary["largest cluster"] == 5
    assert not list(stage.folder.glob("shingles-*"))  # what is no longer needed is gone


@pytest.mark.parametrize(
    "one, other",
    [
        (row("What is 3 plus 4, added up slowly and carefully?", "Three and four: 7 apples"),
         row("What is 3 plus 5, added up slowly and carefully?", "Three and four: 7 apples")),
        (row("Is it -5 degrees outside tonight or is it much warmer?", "it is below zero for certain"),
         row("Is it 5 degrees outside tonight or is it much warmer?", "it is below zero for certain")),
        (row("Classify: the film was long and rather slow", "positive"),
         row("Classify: the film was long and rather slow", "negative")),
        (row("Name and city as JSON: Ann of Oslo, by train", '{"city": "Oslo", "by": "train", "who": "Ann"}'),
         row("Name and city as JSON: Ann of Oslo, by train", '{"city": "Oslo", "by": "tram", "who": "Ann"}')),
    ],
)  # fmt: skip
def test_never_duplicates(one, other, tmp_path):
    # exact copies of the first beside it show that the row is looked at at all
    copy = Record.from_json(json.loads(json.dumps(one.to_json())))
    kept, verdicts, _ = run(filled([one, other, copy]), tmp_path, threshold=0.95)
    assert [v["line"] for v in verdicts] == [3]


def test_what_is_the_same_but_for_layout():
    same = minhash.normalise("  Use **Foo_bar**, please!\n\n- now ")
    assert same == minhash.normalise("use foo bar PLEASE now") == "use foo bar please now"
    assert minhash.normalise("ﬁne ＡＢＣ　x") == "fine abc x"  # NFKC
    # symbols and the vowel signs of other scripts say something
    for one, other in [("C", "C++"), ("a < b", "a > b"), ("कि", "का"), ("good 👍", "good 👎")]:
        assert minhash.normalise(one) != minhash.normalise(other)


def test_numbers_have_their_signs():
    assert numbers("-5 + 3, (-7) and 1-2; x-4, a)-6, −8, v2.10") == [
        "-5",
        "3",
        "-7",
        "1",
        "2",
        "4",
        "6",
        "-8",
        "2",
        "10",
    ]


def test_other_labels_tools_and_images_are_other_rows(tmp_path):
    text = sentence(3, 20)
    image = {"type": "image_url", "image_url": {"url": "https://x/1.png"}}
    other = {"type": "image_url", "image_url": {"url": "https://x/2.png"}}
    records = [row(text, text) for _ in range(6)]
    records[1].tools = [{"type": "function", "function": {"name": "look"}}]
    records[2].messages[0]["content"] = [{"type": "text", "text": text}, image]
    records[3].messages[0]["content"] = [{"type": "text", "text": text}, other]
    records[4].task, records[4].label = "unpaired", True
    records[5].task, records[5].label = "unpaired", False
    assert gone(filled(records), tmp_path) == []


def test_rows_of_a_template_with_a_long_system_prompt_stay(tmp_path):
    system = " ".join(WORDS * 2)
    rng = random.Random(0)
    names, things = WORDS[:20], WORDS[20:]
    seen = {(rng.choice(names), rng.choice(things), rng.choice(names)) for _ in range(600)}
    records = [
        row(f"Write to {a} that the {b} has come", f"Dear {a}, the {b} has come. Yours, {c}")
        for a, b, c in seen
    ]
    for record in records:
        record.messages.insert(0, {"role": "system", "content": system})
    assert len(gone(numbered(records), tmp_path)) <= 0.01 * len(records)
    # a check that compares whole texts would take nearly all
    assert len(gone(records, tmp_path / "b", df_cut=1.0)) < len(records)


def test_many_templates_stay_too(tmp_path):
    # each is in fewer rows than the cut, so that only the family says what it is
    records = []
    for k in range(30):
        rng = random.Random(k)
        form = " ".join(rng.sample(WORDS, 16)) + " {} " + " ".join(rng.sample(WORDS, 5)) + " {}"
        seen = {tuple(rng.sample(WORDS, 2)) for _ in range(40)}
        records += [row(form.format(*pair), "there is an answer to that") for pair in sorted(seen)]
    assert len(gone(numbered(records), tmp_path)) <= 0.02 * len(records)


def test_which_of_them_stays(tmp_path):
    answer = sentence(5, 20)
    records = [
        row("a question", answer),
        row("a question", answer + " indeed"),
        row("a question", answer + "."),
    ]
    for record, score in zip(records, (0.2, 0.1, 0.9), strict=True):
        record.meta["score"] = score
    assert gone(filled(records), tmp_path / "a") == [2, 3]
    assert gone(records, tmp_path / "b", keep="longest", df_cut=1.0) == [1, 3]
    assert gone(records, tmp_path / "c", keep="best", df_cut=1.0) == [1, 2]
    with pytest.raises(UserError, match=r"f.jsonl:4: .*meta.score"):
        run(filled(records), tmp_path / "d", keep="best")


def test_on_the_prompt_or_the_answer_alone(tmp_path):
    prompt, answer = sentence(6, 12), sentence(7, 20)
    records = [
        row(prompt, answer),
        row(prompt, sentence(8, 20)),
        row(sentence(9, 12), answer),
        row("", answer),
    ]
    records = filled(records)
    assert gone(records, tmp_path, on="prompt") == [2]
    assert gone(records, tmp_path, on="answer") == [3, 4]
    assert gone(records[:3] + records[4:], tmp_path, on="both") == []


def test_report_only_drops_nothing(tmp_path):
    records = filled([row("the same", sentence(1, 20)) for _ in range(3)])
    kept, verdicts, stage = run(records, tmp_path, report_only=True)
    assert kept == [r.meta["line"] for r in records]
    assert [(v["code"], v["line"], v["outcome"]) for v in verdicts] == [
        ("W107", 2, "changed"),
        ("W107", 3, "changed"),
    ]
    clusters = [r.meta.get("cluster") for r in stage.records()]
    assert len(set(clusters[:3])) == 1 and set(clusters[3:]) == {None}


@pytest.mark.parametrize(
    "texts", [[], [""], ["", "", ""], ["x"], ["x", "x"], ["\ud800", "\ud800", "🙂 é"], ["?!", ".."]]
)
def test_small_and_strange_sets(texts, tmp_path):
    records = numbered([row("", text) for text in texts])
    kept, verdicts, stage = run(records, tmp_path)
    # nothing to compare is no duplicate; the second of two that are the same is one
    normal = [minhash.normalise(text) for text in texts]
    expected = [k + 1 for k, text in enumerate(normal) if text and text in normal[:k]]
    assert [v["line"] for v in verdicts] == expected
    assert len(kept) + len(verdicts) == len(texts)
    assert stage.summary["nothing to compare"] == normal.count("")


def rows_of(draws):
    """Rows of a few drawn sentences, each changed in a drawn number of words."""
    records = []
    for base, changes, seed in draws:
        words = sentence(base, 20).split()
        rng = random.Random(seed)
        for k in rng.sample(range(20), changes):
            words[k] = "".join(rng.choices("abcdefghijk", k=6))
        records.append(row("tell me", " ".join(words)))
    return numbered(records)


DRAWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=24)


@settings(max_examples=15, deadline=None)
@given(DRAWS, st.data())
def test_the_cut_into_parts_and_partitions_changes_nothing(tmp_path_factory, draws, data):
    records = rows_of(draws)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(records)), max_size=3)))
    folder = tmp_path_factory.mktemp("parts")
    keep = data.draw(st.sampled_from(["first", "longest"]))
    whole = run(records, folder / "one", keep=keep)[:2]
    assert run(records, folder / "many", cuts, keep=keep)[:2] == whole
    before = duplicates.PARTITION, duplicates.CHUNK, duplicates.BLOCK
    duplicates.PARTITION, duplicates.CHUNK, duplicates.BLOCK = 3, 2, 2
    try:
        assert run(records, folder / "partitions", cuts, keep=keep)[:2] == whole
    finally:
        duplicates.PARTITION, duplicates.CHUNK, duplicates.BLOCK = before


@settings(max_examples=30, deadline=None)
@given(DRAWS)
def test_clusters_are_those_of_brute_force(tmp_path_factory, draws):
    records = rows_of(draws) + [
        row("tell me", sentence(k)) for k in range(50, 90)
    ]  # nothing is common but the prompt
    step = Dedup(DedupOptions(df_cut=1.0))
    step.folder = tmp_path_factory.mktemp("brute")
    found = step.decide([step.facts(iter(numbered(records)), 0)]).found
    texts = [f"tell me {r.answer_text()}" for r in records]
    sets = [{t[k : k + 5] for k in range(len(t) - 4)} for t in texts]
    root = list(range(len(records)))
    numbers = [[w for w in t.split() if w.isdigit()] for t in texts]
    assert not any(numbers)
    for j in range(len(sets)):
        for i in range(j):
            if len(sets[i] & sets[j]) >= 0.7 * len(sets[i] | sets[j]):
                a, b = root[i], root[j]
                root = [min(a, b) if r in (a, b) else r for r in root]
    expected = {i: r for i, r in enumerate(root) if root.count(r) > 1}
    first = {}
    ours = {int(f["row"]): first.setdefault(int(f["cluster"]), int(f["row"])) for f in found}
    assert ours == expected
    for f in found:  # each that goes is itself like the row that it names
        i, j = int(f["row"]), int(f["kept"])
        assert i == j or len(sets[i] & sets[j]) / len(sets[i] | sets[j]) == pytest.approx(f["similarity"])


def test_processes_give_the_same(tmp_path):
    records = rows_of([(k % 4, k % 6, k) for k in range(40)])
    here = run(records, tmp_path / "a", [10, 20])[:2]
    assert here[1]
    assert run(records, tmp_path / "b", [10, 20], Processes(2))[:2] == here


def test_meaning_by_a_function_or_a_file_of_vectors(tmp_path):
    records = filled(
        [row("q", sentence(1, 15)), row("q", sentence(2, 15)), row("q", "12 " + sentence(3, 15))]
    )
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(records), 8))
    vectors[1] = 3 * vectors[0] + 0.01
    vectors[2] = vectors[0]  # but its numbers are others
    by_text = {f"{r.prompt_text()}\n{r.answer_text()}": v for r, v in zip(records, vectors, strict=True)}
    embed = lambda texts: np.stack([by_text[t] for t in texts])  # noqa: E731
    _, verdicts, _ = run(records, tmp_path / "a", [5], embed=embed, semantic=0.99)
    assert [(v["line"], v["code"]) for v in verdicts] == [(2, "D003")]
    np.save(tmp_path / "v.npy", vectors)
    given = run(records, tmp_path / "b", [5], semantic=0.99, vectors=str(tmp_path / "v.npy"))
    assert given[1] == verdicts
    with pytest.raises(UserError, match=r"shape \[43, 8\]; there are 2 rows"):
        run(records[:2], tmp_path / "c", semantic=0.99, vectors=str(tmp_path / "v.npy"))


def test_meaning_by_the_models_own_hidden_states(tmp_path):
    model = str(Path(__file__).parent.parent / "assets" / "tiny_model")
    from ftjax.data.embed import embedder

    texts = ["a cat", sentence(1, 15), "", sentence(2, 30)]
    vectors = embedder(model)(texts)
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1, 1, 0, 1], abs=1e-5)
    # a text alone has the vector that it has among longer ones
    np.testing.assert_allclose(embedder(model)(texts[:1])[0], vectors[0], atol=1e-5)
    records = filled([row("q", sentence(1, 15)), row("q", " ".join(reversed(sentence(1, 15).split())))], 3)
    _, verdicts, _ = run(records, tmp_path, semantic=0.999999, model=model)
    assert verdicts == []


@pytest.mark.parametrize(
    "options, said",
    [
        ({"threshold": 0.3}, "from 0.5 to 1"),
        ({"df_cut": 0.0}, "share of the rows"),
        ({"semantic": 0.9}, "dedup.model"),
        ({"vectors": "v.npy"}, "only with dedup.semantic"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(UserError, match=said):
        Dedup(DedupOptions(**options))
