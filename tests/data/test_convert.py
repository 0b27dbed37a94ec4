"""Conversions by hand: between tasks, of real files, and by the command."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import messy
import pytest

from ftjax.data import formats
from ftjax.data.codes import CODES
from ftjax.data.formats import FORMATS, writer
from ftjax.data.formats.mistral import call_id
from ftjax.data.options import DataSource
from ftjax.data.read import parts
from ftjax.data.record import Findings, Record, Verdict
from ftjax.data.write import Refused
from ftjax.errors import UserError
from ftjax.recipes.data import main

pytestmark = pytest.mark.fast

U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
PAIR = Record("preference", [U], chosen=[A], rejected=[B], raw=("q", "a", "b"))
S = {"role": "system", "content": "s"}
CHAT = Record("sft", [S, U, A, U, B])
STEPS = Record("stepwise", [U], completions=["a", "b"], labels=[True, False], raw=("q",))
RIGHT = Record("stepwise", [U], completions=["a", "b"], labels=[True, True], raw=("q",))
GOOD, BAD = (Record("unpaired", [U, A], label=label) for label in (True, False))
PROMPT = Record("prompt_only", [U])


@pytest.mark.parametrize(
    "record, to, rows, losses",
    [
        (PAIR, "unpaired", [{"prompt": "q", "completion": "a", "label": True},
                            {"prompt": "q", "completion": "b", "label": False}], []),
        (PAIR, "openai", [{"messages": [U, A]}], ["rejected", "raw"]),
        (PAIR, "prompt_completion", [{"prompt": "q", "completion": "a"}], ["rejected"]),
        (PAIR, "prompt_only", [{"prompt": "q"}], ["answer", "rejected"]),
        (PAIR, "text", [{"text": "qa"}], ["trained part", "roles", "rejected"]),
        (CHAT, "text", [{"text": "s\n\nq\n\na\n\nq\n\nb"}], ["trained part", "roles"]),
        (CHAT, "unpaired", [{"prompt": [S, U], "completion": [A, U, B], "label": True}], []),
        (CHAT, "prompt_only", [{"prompt": CHAT.messages[:4]}], ["answer", "weight"]),
        (CHAT, "openai_rft", [{"messages": CHAT.messages[:4]}], ["answer", "weight"]),
        (GOOD, "openai", [{"messages": [U, A]}], ["label"]),
        (GOOD, "prompt_only", [{"prompt": [U]}], ["answer", "label"]),
        (STEPS, "unpaired", [{"prompt": "q", "completion": "a\nb", "label": False}], ["steps"]),
        (RIGHT, "chat", [{"messages": [U, {**A, "content": "a\nb"}]}], ["steps", "raw"]),
        (RIGHT, "prompt_only", [{"prompt": "q"}], ["answer", "steps"]),
    ],
)  # fmt: skip
def test_casts(record, to, rows, losses):
    written = writer(to)(record)
    assert (written.rows, written.losses, written.refused) == (rows, losses, None)


@pytest.mark.parametrize(
    "record, to, says",
    [
        (BAD, "openai", "the label says that this answer is a bad one"),
        (STEPS, "openai", "one of the steps is wrong"),
        (CHAT, "preference", "an answer without a worse one"),
        (GOOD, "preference", "one answer without its counterpart"),
        (PROMPT, "openai", "a prompt without an answer"),
        (Record("lm", text="t"), "openai", "plain text without a prompt"),
        (Record("lm", text="t"), "stepwise", "plain text without a prompt"),
    ],
)
def test_what_can_not_be_cast_is_refused(record, to, says):
    written = writer(to)(record)
    assert not written.rows and written.refused[0] == "E008" and says in written.refused[1]


def test_every_pair_of_tasks_and_formats_has_an_answer():
    for record in (PAIR, CHAT, STEPS, GOOD, BAD, PROMPT, Record("lm", text="t")):
        for name in FORMATS:
            written = writer(name)(record)
            assert bool(written.rows) != bool(written.refused), (record.task, name)


def test_mistrals_ids_are_made_anew_and_answers_follow():
    calls = [
        {"id": i, "type": "function", "function": {"name": "f", "arguments": {}}} for i in ("x", "abcDEF123")
    ]
    results = [{"role": "tool", "tool_call_id": i, "content": i, "name": "f"} for i in ("abcDEF123", "x")]
    record = Record("sft", [U, {"role": "assistant", "content": "", "tool_calls": calls}, *results, A])
    written = writer("mistral")(record)
    messages = written.rows[0]["messages"]
    new, kept = (c["id"] for c in messages[1]["tool_calls"])
    assert kept == "abcDEF123" and new == call_id("x", 0) != "x" and len(new) == 9 and new.isalnum()
    assert [m["tool_call_id"] for m in messages[2:4]] == [kept, new]
    assert written.losses == ["tool call ids"]


def test_old_openai_rows_and_older_names_are_read():
    row = {
        "messages": [U, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                     {"role": "function", "name": "f", "content": "r"},
                     {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
        "functions": [{"name": "f", "parameters": {}}],
    }  # fmt: skip
    record = formats.read(row, "openai", Findings())
    assert record.messages[1:] == [
        {"role": "assistant", "content": "",
         "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "r", "name": "f"},
        {"role": "assistant", "content": "No."},
    ]  # fmt: skip
    assert record.tools == [{"type": "function", "function": row["functions"][0]}]
    older = {"input": {"messages": [U]}, "preferred_completion": [A], "non_preferred_completion": [B]}
    assert formats.matches(older) == ["openai_preference"]
    assert formats.read(older, "openai_preference", Findings()).chosen == [A]


@pytest.mark.parametrize(
    "row, names",
    [
        ({"interactions": [U, A]}, ["mistral"]),
        ({"messages": [U, A], "weight": 0.5}, ["fireworks"]),
        ({"messages": [U, A], "label": True}, ["unpaired"]),
        ({"prompt": "q", "completion": "a", "label": False}, ["unpaired"]),
        ({"prompt": "q", "completion": "a", "label": "a word"}, ["prompt_completion"]),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, ["stepwise"]),
        ({"prompt": "q"}, ["prompt_only"]),
        ({"question": "q", "answer": "a"}, ["qa"]),
        ({"conversations": [], "chosen": {}, "rejected": {}}, ["sharegpt"]),
        ({"conversation": [], "kto_tag": True}, ["sharegpt"]),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, ["alpaca"]),
        ({"task": "lm", "text": "t"}, ["ftjax"]),
        ({"messages": [U, A], "chosen": [A], "rejected": [B]}, ["preference", "chat"]),
        ({"prompt": "q", "completion": "a", "text": "qa"}, ["prompt_completion", "text"]),
        ({"messages": None, "text": "t"}, ["text"]),
    ],
)
def test_formats_that_a_row_may_be_of(row, names):
    assert formats.matches(row) == names


def test_sharegpt_in_all_its_forms():
    call = {"name": "f", "arguments": {"x": 1}}
    row = {"conversations": [
        {"from": "gpt", "value": "Welcome!"},
        {"from": "human", "value": "<image>?"},
        {"from": "function", "value": json.dumps(call)},
        {"from": "observation", "value": "r"},
        {"from": "function", "value": "not a call"},
        {"from": "bing", "value": "a", "weight": 0}],
        "system": "s", "images": ["a.png"], "tools": json.dumps([{"name": "f"}]), "id": 7}  # fmt: skip
    found = Findings()
    record = formats.read(row, "sharegpt", found)
    assert [v.code for v in found] == ["W116"] and record.meta == {"id": 7}
    assert record.tools == [{"type": "function", "function": {"name": "f"}}]
    assert record.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                     {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "r", "name": "f"},
        {"role": "tool", "content": "not a call"},
        {"role": "assistant", "content": "a", "weight": 0.0},
    ]  # fmt: skip
    one = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert formats.read(one, "sharegpt", Findings()).messages == [U, A]


def test_alpaca_with_all_its_keys():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "s", "history": [["q", "a"]]}
    record = formats.read(row, "alpaca", Findings())
    assert record.messages == [
        {"role": "system", "content": "s"}, U, A,
        {"role": "user", "content": "Add.\n1 + 1"}, {"role": "assistant", "content": "2"}]  # fmt: skip
    assert record.raw is None  # its strings alone would leave the history out


def test_text_and_objects_of_a_csv_file(tmp_path):
    made = [Record("preference", [U], chosen=[A], rejected=[B], meta={"k": [1]}), PAIR]
    from ftjax.data.write import write

    for name in ("ftjax", "preference"):
        for suffix in (".csv", ".parquet", ".json", ".jsonl.gz"):
            path = tmp_path / f"{name}{suffix}"
            write(iter(made[:1]), path, name)
            ((again,),) = [[j.record for j in p.judged()] for p in parts(str(path))]
            assert (again.messages, again.chosen, again.rejected) == (made[0].messages, [A], [B]), path
            if name == "ftjax":
                assert again.meta["k"] == [1] and again.id == made[0].id
    rows = [Record("unpaired", [U, A], label=x, raw=("q", "a"), weight=0.5) for x in (True, False)]
    write(iter(rows), tmp_path / "u.csv", "unpaired")
    assert [j.record.label for p in parts(str(tmp_path / "u.csv")) for j in p.judged()] == [True, False]
    for name in ("ftjax", "fireworks"):
        write(iter([Record("sft", [U, A], weight=0.5)]), tmp_path / f"{name}.csv", name)
        (part,) = parts(DataSource(str(tmp_path / f"{name}.csv"), format=name))
        assert [j.record.weight for j in part.judged()] == [0.5]


# ── real files ────────────────────────────────────────────────────────────────────────────────────

REAL = {
    "llamafactory_demo/alpaca_en_demo.json": ("alpaca", 999, {"sft": 999}),
    "llamafactory_demo/dpo_en_demo.json": ("sharegpt", 300, {"preference": 300}),
    "llamafactory_demo/kto_en_demo.json": ("unpaired", 300, {"unpaired": 300}),
    "llamafactory_demo/glaive_toolcall_en_demo.json": ("sharegpt", 300, {"sft": 300}),
    "gsm8k/test.jsonl": ("qa", 1319, {"sft": 1319}),
    "hh-rlhf/helpful-base.test.jsonl.gz": ("hh", 2354, {"preference": 2348}),
}


def asset(name: str) -> str:
    path = Path(os.environ.get("FTJAX_TEST_ASSETS", "")) / "data" / name
    if "FTJAX_TEST_ASSETS" not in os.environ or not path.exists():
        pytest.skip(f"{name} is not at hand (FTJAX_TEST_ASSETS)")
    return str(path)


@pytest.mark.parametrize("name", REAL)
def test_real_files_to_every_format_and_back(name):
    format, count, tasks = REAL[name]
    found = parts(asset(name))
    judged = [j for p in found for j in p.judged()]
    records = [j.record for j in judged if j.record]
    assert found[0].format == format and len(judged) == count
    assert Counter(r.task for r in records) == tasks
    # its own rows again, key by key; hh's white space at the ends is the one thing that is lost
    sample = records[:: max(1, len(records) // 60)]
    for record in sample:
        written = writer(format)(record)
        (row,) = written.rows
        given = {k: v for k, v in record.given[1].items() if v not in ("", None, [])}
        if format == "hh":
            assert " ".join(row["chosen"].split()) == " ".join(given["chosen"].split())
        elif format == "qa":
            assert row == given
        (again,) = [formats.read(json.loads(json.dumps(row)), format, Findings())]
        assert (again.messages, again.chosen, again.rejected) == (
            record.messages, record.chosen, record.rejected)  # fmt: skip
    for to in FORMATS:
        for record in sample[:20]:
            written = writer(to)(record)
            assert bool(written.rows) != bool(written.refused)
            for row in written.rows:
                errors = Findings()
                assert formats.read(json.loads(json.dumps(row)), to, errors), (to, list(errors))


def test_banking77_by_its_columns():
    source = DataSource(asset("banking77/train.csv"), columns={"prompt": "text", "completion": "category"},
                        format="prompt_completion")  # fmt: skip
    (part,) = parts(source)
    records = [j.record for j in part.judged()]
    assert len(records) == 10_003 and None not in records
    assert records[0].raw == ("I am still waiting on my card?", "card_arrival")


# ── the commands ──────────────────────────────────────────────────────────────────────────────────


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    return code, capsys.readouterr().out


def test_convert_says_what_is_lost_and_what_can_not_be(write, tmp_path, capsys):
    half = {"messages": [U, {**A, "weight": 0.5}]}
    plain = {"messages": [U, A]}
    path = write([half, plain, half])
    code, out = run(capsys, "convert", path, "--to", "openai", "-o", tmp_path / "o.jsonl",
                    "--report", tmp_path / "r.json")  # fmt: skip
    assert code == 0 and "lost, of 2 rows: message weights between 0 and 1" in out
    assert [json.loads(line) for line in open(tmp_path / "o.jsonl")] == [plain] * 3
    said = [
        (v["line"], v["code"], v["text"]) for v in json.loads((tmp_path / "r.json").read_text())["verdicts"]
    ]
    assert [s[:2] for s in said] == [(1, "W118"), (3, "W118")] and "message weights" in said[0][2]
    code, out = run(capsys, "convert", path, "--to", "preference", "-o", tmp_path / "p.jsonl")
    assert code == 3 and "3 rows; 0 go on, 3 end here" in out and "E008" in out
    with pytest.raises(UserError, match="did you mean 'openai'"):
        main(["convert", path, "--to", "opanai"])


def test_a_pair_becomes_two_rows(write, tmp_path, capsys):
    path = write([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    run(capsys, "convert", path, "--to", "unpaired", "-o", tmp_path / "u.csv")
    assert (tmp_path / "u.csv").read_text().split() == ["prompt,completion,label", "q,a,true", "q,b,false"]


def test_every_row_of_a_messy_file_is_accounted_for(tmp_path, capsys):
    path = tmp_path / "messy.jsonl"
    messy.write(path)
    code, out = run(capsys, "validate", path, "--target", "openai", "-o", tmp_path / "clean.jsonl",
                    "--report", tmp_path / "r.json")  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    found: dict[int, set[str]] = {}
    for verdict in report["verdicts"]:
        found.setdefault(verdict["line"], set()).add(verdict["code"])
    places = [(v["line"], v["path"], v["code"]) for v in report["verdicts"]]
    assert len(places) == len(set(places))  # nothing is said twice
    assert {v["text"] for v in report["verdicts"] if v["line"] == 4} == {
        f"broken JSON at column {len(messy.LINES[3][0]) + 1}: Expecting ',' delimiter"
    }
    whole = found.pop(0, set())
    assert found == {n: codes for n, (_, codes) in enumerate(messy.LINES, 1) if codes}
    assert whole == {"W112"}  # "Be brief." and "Be kind."
    ended = {v["line"] for v in report["verdicts"] if v["outcome"] == "dropped"}
    counts = report["stages"][0]
    assert code == 3 and counts["rows"] == len(messy.LINES) == counts["kept"] + counts["dropped"]
    kept = [json.loads(line) for line in open(tmp_path / "clean.jsonl")]
    assert len(kept) == counts["kept"] == len(messy.LINES) - len(ended)
    # what was written is what OpenAI takes, arguments as text
    assert isinstance(kept[8]["messages"][2]["tool_calls"][0]["function"]["arguments"], str)
    code, out = run(capsys, "validate", tmp_path / "clean.jsonl", "--target", "openai")
    assert code == 0, out
    assert report["outputs"][0]["format"] == "openai"
    assert {c for codes in found.values() for c in codes} >= {
        c for c in CODES if "E" < c < "E033" and c not in ("E004", "E008", "E015", "E026")}  # fmt: skip


def test_inspect_counts(write, capsys, tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": "s"}, U, A]},
        {"messages": [U, {**A, "weight": 0}, U, B]},
        {"messages": [U]},
    ]
    path = write(rows)
    tokenizer = Path(__file__).parent.parent / "assets" / "tiny_tokenizer"
    code, out = run(capsys, "inspect", path, "--model", tokenizer, "--price", "10", "--epochs", "2",
                    "--report", tmp_path / "r.json")  # fmt: skip
    assert code == 3 and "format chat, 3 rows, 2 readable (2 sft)" in out
    assert "messages: 3.5 an example (3 user, 3 assistant, 1 system)" in out
    assert "system prompts: 1 different; 1 examples without" in out and "with weights: 1" in out
    assert "E014 no_assistant" in out
    (made,) = json.loads((tmp_path / "r.json").read_text())
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    chats = [[{k: v for k, v in m.items() if k != "weight"} for m in r["messages"]] for r in rows[:2]]
    total = sum(len(loaded.apply_chat_template(c, return_dict=True)["input_ids"]) for c in chats)
    assert made["tokens"]["lengths"]["total"] == total
    assert f"2 epochs are {2 * total:,} tokens, ${2 * total / 1e5:,.2f} at $10 a million" in out
    assert made["epochs_by_openai"] == 25 and made["codes"] == {"E014": 1}


@pytest.mark.parametrize(
    "n, epochs", [(10, 10), (33, 3), (34, 3), (100, 3), (8333, 3), (8334, 2), (30_000, 1)]
)
def test_epochs_as_openais_cookbook_estimates(n, epochs):
    from ftjax.data.inspect import Inspection

    assert Inspection("f", "chat", records=n).epochs() == epochs


def test_lengths_of_many_are_a_sample():
    import random

    from ftjax.data import inspect

    lengths = inspect.Lengths()
    numbers = list(range(300_001))
    random.Random(0).shuffle(numbers)
    for n in numbers:
        lengths.add(n)
    made = lengths.to_json()
    assert made["count"] == 300_001 and made["total"] == sum(numbers) and made["most"] == 300_000
    assert abs(made["p50"] - 150_000) < 1500 and abs(made["p95"] - 285_000) < 1500


def test_gzip_of_csv_is_read(tmp_path):
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write("prompt,completion\nq,a\n")
    ((judged,),) = [list(p.judged()) for p in parts(str(tmp_path / "a.csv.gz"))]
    assert judged.record.raw == ("q", "a")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000])
def test_json_that_python_will_not_read_is_an_error_of_the_row(text):
    call = {"function": {"name": "f", "arguments": text}}
    for row, format in (
        ({"messages": [U, {"role": "assistant", "tool_calls": [call]}]}, "chat"),
        ({"messages": [U, A], "tools": text}, "chat"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": text}]},
            "sharegpt",
        ),
    ):
        found = Findings()
        formats.read(row, format, found)
        assert found.error is not None or text[0] == "9"


def test_refused_records_are_kept_on_disk():
    refused = Refused()
    assert list(refused) == [] and refused.first == ""
    for line in range(1, 20_000):  # five megabytes
        refused.add(Verdict("E008", f"no {line}", source="a.jsonl", line=line))
    assert len(refused) == 19_999 and refused.first == "no 1" and refused._file._rolled
    assert [v["line"] for v in refused] == list(range(1, 20_000)) == [v["line"] for v in refused]
