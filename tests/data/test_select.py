import numpy as np
import pytest

from ftjax.data.pipeline import run
from ftjax.data.record import Judged, Record
from ftjax.data.select import Select, SelectOptions, diverse, hashed_words
from ftjax.errors import UserError

pytestmark = pytest.mark.fast


def row(question, answer, **scores):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Record("sft", messages, meta={"scores": scores} if scores else {})


class Part:
    def __init__(self, records, name):
        self.records, self.name = records, name

    def key(self):
        return self.name

    def judged(self):
        return map(Judged, self.records)


def select(tmp_path, parts, **options):
    """(the kept answers in order, {answer: code} of the others)."""
    step = Select(SelectOptions(**options))
    stage = run(step, [Part(records, str(i)) for i, records in enumerate(parts)], tmp_path)
    codes = [v["code"] for v in stage.verdicts()]
    kept = [r.messages[1]["content"] for r in stage.records()]
    assert stage.counts.rows == len(kept) + len(codes)
    return kept, codes, stage


def test_deita_keeps_the_best_that_are_unlike_those_kept(tmp_path):
    parts = [
        [
            row("what is a cat", "a small animal that purrs", complexity=2, quality=5),  # 10
            row("what is a cat", "a small animal that purrs!", complexity=5, quality=5),  # 25: like the first
            row("how do planes fly", "by lift of their wings", complexity=3, quality=3),  # 9
        ],
        [
            row("write a poem on rain", "drops fall on the roof", complexity=1, quality=1),  # 1
            row("why is the sky blue", "short waves scatter more", complexity=6, quality=2),  # 12
            row("unrated", "never seen"),
        ],
    ]
    kept, codes, stage = select(tmp_path, parts, k=3)
    assert kept == ["a small animal that purrs!", "by lift of their wings", "short waves scatter more"]
    assert codes == ["Q011", "Q010", "Q012"]
    assert "similarity 1.000" in next(stage.verdicts())["text"]
    assert stage.summary == {"selected": "3 of 6", "too similar": 1}
    # with room for all, the similar one stays out and fewer are kept; a looser threshold lets it in
    kept, codes, stage = select(tmp_path, parts, k=9)
    assert len(kept) == 4 and stage.summary["selected"] == "4 of 6; 9 were asked for"
    assert len(select(tmp_path, [[row("a b c d", "x", quality=1)], [row("a b c e", "x", quality=1)]],
                      k=9, score="quality", similarity=0.95)[0]) == 2  # fmt: skip


def test_the_threshold_is_to_those_kept_not_to_all():
    """A chain in which each is like its neighbours alone: every other one is kept (a rule that looks at the
    nearest of the whole set would keep none)."""
    angles = np.arange(9) * 0.4  # cos 0.4 = 0.92, cos 0.8 = 0.70
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    kept, left_out = diverse(range(9), lambda i: vectors[i], 100, 0.9)
    assert kept == [0, 2, 4, 6, 8] and sorted(left_out) == [1, 3, 5, 7]
    assert left_out[3] == pytest.approx(np.cos(0.4), abs=1e-6)
    assert diverse(range(9), lambda i: vectors[i], 2, 0.9)[0] == [0, 2]
    assert diverse([], lambda i: vectors[i], 2, 0.9) == ([], {})


def test_diverse_over_many_blocks_equals_the_plain_loop():
    vectors = np.random.default_rng(0).normal(size=(1500, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = []
    for i in range(1500):
        if all(vectors[i] @ vectors[j] < 0.8 for j in kept):
            kept.append(i)
    assert diverse(range(1500), lambda i: vectors[i], 10_000, 0.8)[0] == kept
    assert diverse(range(1500), lambda i: vectors[i], 70, 0.8)[0] == kept[:70]


def test_longest_top_and_random(tmp_path):
    rows = [row(f"q{i}", "x" * n, ifd=s) for i, (n, s) in enumerate([(3, 0.5), (9, 1.2), (5, 0.9), (7, 0.1)])]
    parts = [rows[:2], rows[2:]]

    def lengths(**options):
        return [len(a) for a in select(tmp_path, parts, **options)[0]]

    assert lengths(k=2, by="longest") == [9, 7]
    assert lengths(k=2, by="top", score="ifd") == [9, 5]
    assert lengths(k=2, by="top", score="ifd", below=1.0) == [3, 5]
    assert lengths(k=2, by="top", score="ifd", lowest=True) == [3, 7]
    drawn = lengths(k=2, by="random")
    assert len(drawn) == 2 and lengths(k=2, by="random") == drawn
    assert len({tuple(lengths(k=2, by="random", seed=s)) for s in range(20)}) > 3
    # a draw does not depend on how the rows are cut into parts
    assert [len(a) for a in select(tmp_path, [rows], k=2, by="random")[0]] == drawn
    _, codes, stage = select(tmp_path, parts, k=2, by="top", score="ifd", below=1.0)
    assert codes == ["Q012", "Q010"] and "ifd is 1.2, not below 1" in next(stage.verdicts())["text"]


def test_embeddings_of_ones_own(tmp_path):
    step = Select(SelectOptions(k=5, score="s"), embed=lambda texts: np.array([[len(t), 1.0] for t in texts]))
    rows = [row("same length", "abc", s=2), row("same length", "xyz", s=1), row("q", "", s=0)]
    facts = [step.facts(rows, 0)]
    assert step.decide(facts).fates[0].tolist() == [1, 2, 2 if 0.9 < 15 / 16 else 1]


def test_hashed_words_see_words_in_common():
    a, b, c = hashed_words(["the cat sat on the mat", "on the mat the cat sat", "stock prices fell sharply"])
    cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    assert cosine(a, b) == pytest.approx(1) and abs(cosine(a, c)) < 0.4


@pytest.mark.parametrize(
    "options,said",
    [
        (dict(k=0), "k=0"),
        (dict(k=1, by="top"), "name the score"),
        (dict(k=1, by="longest", score="ifd"), "no effect"),
        (dict(k=1, by="random", model="m"), "no effect"),
        (dict(k=1, below=1.0), "below"),
        (dict(k=1, similarity=0.0), "similarity"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(UserError, match=said):
        SelectOptions(**options)


def test_no_scores_at_all(tmp_path):
    with pytest.raises(UserError, match="ftjax data score"):
        select(tmp_path, [[row("q", "a")]], k=1)
