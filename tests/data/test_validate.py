"""Each rule of each target by a row written by hand, and rows that other validators take for wrong."""

import base64
import copy
import json
from pathlib import Path

import pytest

from ftjax.data.codes import CODES
from ftjax.data.options import DataSource
from ftjax.data.pipeline import run
from ftjax.data.read import parts
from ftjax.data.record import Findings
from ftjax.data.targets import MB, TARGETS
from ftjax.data.validate import Validate, ValidateOptions
from ftjax.errors import UserError

pytestmark = pytest.mark.fast
TOKENIZER = str(Path(__file__).parent.parent / "assets" / "tiny_tokenizer")

S = {"role": "system", "content": "Be brief."}
U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "d", "parameters": {"type": "object"}}}
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}
ASK = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": "r"}
PNG = "data:image/png;base64,AAAA"


def image(url=PNG, **more):
    shown = {"type": "image_url", "image_url": {"url": url, **more}}
    return {"role": "user", "content": [{"type": "text", "text": "?"}, shown]}


def rows(*messages, **more):
    return {"messages": list(messages), **more}


def calls(*messages, call=None, tools=TOOLS):
    ask = {**ASK, "tool_calls": [{**CALL, **(call or {})}]}
    return {"messages": [S, U, ask, *messages], "tools": tools}


def function(**changes):
    return {"function": {**CALL["function"], **changes}}


def codes(target, row):
    found = Findings()
    TARGETS[target].check(copy.deepcopy(row), found)
    assert all(v.code in CODES and v.text for v in found)
    return [v.code for v in found]


OPENAI = [
    ({}, ["E010"]),
    ({"messages": []}, ["E010"]),
    ({"messages": "hi"}, ["E010"]),
    (rows(S, U, "hi", A), ["E007"]),
    (rows(S, {"role": "human", "content": "q"}, A), ["E011"]),
    (rows(S, {"role": "user", "content": 3}, A), ["E012"]),
    (rows(S, {"role": "user", "content": [{"type": "input_audio"}]}, A), ["E012"]),
    (rows(S, {"role": "user", "content": []}, A), ["E013"]),
    (rows(S, {"role": "user"}, A), ["E013"]),
    (rows(S, U, {"role": "assistant", "content": None}), ["E013"]),
    (rows(S, U), ["E014"]),
    (rows(S, U, {**A, "weight": 2}), ["E016"]),
    (rows(S, U, {**A, "weight": True}), ["E016"]),
    (rows(S, U, {**A, "weight": 1.0}), ["E016"]),
    (rows(S, {**U, "weight": 0}, A), ["E017"]),
    (rows(S, U, {**A, "weight": 0}), ["E018"]),
    (rows(S, U, A, tools={}), ["E020"]),
    (rows(S, U, A, tools=[{"type": "retrieval"}]), ["E020", "E020"]),
    (rows(S, U, A, tools=[{"type": "function", "function": {"name": "a b"}}]), ["E021"]),
    (rows(S, U, A, tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]), ["E020"]),
    (
        rows(
            S, U, A, tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]
        ),
        ["E020"],
    ),
    (rows(S, U, A, functions=[]), ["E020"]),
    (calls(TOLD, A, call=function(name="put")), ["E021"]),
    (calls(TOLD, A, call=function(arguments={"x": 1})), ["E022"]),
    (calls(TOLD, A, call=function(arguments="{x")), ["E022"]),
    (calls(TOLD, A, call=function(arguments=json.dumps('{"x": 1}'))), ["E022"]),
    (calls(TOLD, A, call=function(arguments="[1]")), ["E022"]),
    (calls({**TOLD, "tool_call_id": "other"}, A), ["E023", "E024"]),
    (calls({"role": "tool", "content": "r"}, A), ["E023", "E024"]),
    (calls(U, A), ["E024"]),
    (calls(TOLD, A, U, ASK), ["E025"]),
    (calls(TOLD, A, call={"id": 7}), ["E025", "E023"]),
    (calls(TOLD, A, call={"type": "tool"}), ["E007"]),
    (rows(S, {**image(), "role": "system"}, U, A), ["E030", "W102"][:1]),
    (rows(S, image("data:image/bmp;base64,AAAA"), A), ["E031"]),
    (rows(S, image("ftp://e.org/a.png"), A), ["E031"]),
    (rows(S, image(detail="huge"), A), ["E031"]),
    (rows(S, *[image()] * 11, A), ["E032"]),
    (rows(S, image("data:image/png;base64," + base64.b64encode(bytes(11 * MB)).decode()), A), ["E032"]),
    (rows(S, U, A, parallel_tool_calls="no"), ["E007"]),
    # unusual
    (rows(U, A), ["W101"]),
    (rows(S, U, A, A), ["W102"]),
    (rows(S, U, A, id=3), ["W103"]),
    (rows(S, U, {**A, "thinking": "hm"}), ["W103"]),
    (rows(S, U, {**A, "content": " a\n"}), ["W104"]),
    (rows({**S, "role": "developer"}, U, A), ["W106"]),
]
B = {**A, "content": "b"}
PAIR = {
    "input": {"messages": [S, U]},
    "preferred_output": [A],
    "non_preferred_output": [{**A, "content": "b"}],
}
PREFERENCE = [
    ({**PAIR, "input": [S, U]}, ["E040", "E010"]),
    ({**PAIR, "input": {"messages": []}}, ["E010"]),
    ({**PAIR, "preferred_output": [A, A]}, ["E040"]),
    ({**PAIR, "preferred_output": []}, ["E010"]),
    ({**PAIR, "preferred_output": [U]}, ["E011"]),
    ({**PAIR, "non_preferred_output": [A]}, ["E041"]),
    ({**PAIR, "input": {"messages": [S, U, A]}}, ["E042"]),
    ({**PAIR, "input": {"messages": [S, image()]}}, ["E032"]),
    ({**PAIR, "more": 1}, ["W103"]),
    ({"input": PAIR["input"], "preferred_completion": [A], "non_preferred_completion": [B]},
     ["W103"]),
]  # fmt: skip
TOGETHER = [
    ({"messages": [S, U, A], "text": "t"}, ["E007"]),
    ({"prompt": "q"}, ["E007"]),
    ({"prompt": "q", "completion": 3}, ["E012"]),
    ({"text": ""}, ["E013"]),
    (rows(S, U, A, id=3), ["E007"]),
    (rows(S, U, U, A), ["E026"]),
    (calls(TOLD, A), ["E011"]),
    (rows(S, {**U, "weight": 1}, {**A, "weight": 1.0}), ["E016"]),
    (rows(S, U), ["E014"]),
    (rows(S, image(), {**A, "content": "a"}), ["E012"]),
    (rows({**S, "content": [{"type": "text", "text": "s"}]}, {**image(), "weight": 1},
          {**A, "content": [{"type": "text", "text": "a"}]}), ["E016"]),
    (rows(U, A), ["W101"]),
]  # fmt: skip
FIREWORKS = [
    ({**rows(S, U, A), "weight": "high"}, ["E016"]),
    (rows(U, A, S, U, A), ["W101", "E026"]),
    (rows(S, image("https://e.org/a.png"), A), ["E031"]),
    (rows(S, image("data:image/webp;base64,AAAA"), A), ["E031"]),
]
NINE = {"id": "abcDEF123"}
MISTRAL = [
    ({"messages": [S, U, A], "interactions": [S, U, A]}, ["E010"]),
    ({"text": "t", "content": "t"}, ["E007"]),
    (rows(S, U, A, tools=TOOLS, available_tools=TOOLS), ["E020"]),
    (rows(S, U, A, tools=[{"type": "function", "function": {"name": "f"}}]), ["E020", "E020"]),
    (rows({**S, "role": "developer"}, U, A), ["E011", "W101"]),
    (rows(S, {**U, "text": "q"}, A), ["E012"]),
    (rows(S, image(), A), ["E032"]),
    (rows(S, U, {**A, "content": ""}), ["E013"]),
    (rows(S, U), ["E014"]),
    (rows(S, U, A, U), ["E015"]),
    (rows(A, U, A), ["E026", "W101"]),
    (rows(S, U, S, A), ["E026"]),
    (calls(TOLD, A), ["E025", "W114"]),
    (rows(S, U, {**ASK, "content": "so", "tool_calls": [{**CALL, **NINE}]},
          {**TOLD, "tool_call_id": NINE["id"]}, A), ["E012"]),
    (calls({**TOLD, "tool_call_id": NINE["id"]}, A, call=NINE), ["W114"]),
]  # fmt: skip
CHAT = [
    (calls(TOLD, A), ["E022"]),  # text, and templates take objects
    (rows(S, U, {**A, "weight": 0.5}), ["W114"]),
    (rows(S, U, {**A, "content": ""}), ["E013"]),
    (rows(S, U, A, tools="[{"), ["E020"]),
]
OTHERS = [
    ("text", {"text": 3}, ["E012"]),
    ("prompt_only", {"prompt": [U, A]}, ["E042"]),
    ("prompt_only", {"prompt": ""}, ["E013"]),
    ("prompt_completion", {"prompt": [U], "completion": "a"}, ["E007"]),
    ("prompt_completion", {"prompt": [U], "completion": [U, A]}, ["E026"]),
    ("prompt_completion", {"prompt": "The sky is", "completion": "blue"}, ["W119"]),
    ("prompt_completion", {"prompt": "The sky is", "response": " blue"}, ["W103"]),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, ["E041"]),
    ("preference", {"prompt": [U, A], "chosen": [A], "rejected": [{**A, "content": "b"}]}, ["E042"]),
    ("preference", {"prompt": [U], "chosen": [A], "rejected": [U]}, ["E026"]),
    ("preference", {"chosen": [U], "rejected": [U, A]}, ["E040"]),
    ("preference", {"chosen": "a", "rejected": "b"}, ["W122"]),
    ("unpaired", {"prompt": "q ", "completion": "a", "label": 1}, ["E050"]),
    ("unpaired", {"messages": [U, A], "label": True}, ["E007"]),
    ("stepwise", {"prompt": "q", "completions": ["a"], "labels": [True, False]}, ["E050"]),
    ("stepwise", {"prompt": "q", "completions": "a", "labels": [True]}, ["E007"]),
    ("stepwise", {"prompt": "q", "completions": ["a"], "labels": ["yes"]}, ["E050"]),
    ("openai_rft", {"messages": [S, U], "answer": 4, "x": 1}, []),
    ("openai_rft", {"messages": [S, U]}, ["W121"]),
    ("openai_rft", {"messages": [S, U, A], "answer": 4}, ["E042"]),
    ("azure", rows(S, *[image()] * 64, A), []),
    ("azure", rows(S, *[image()] * 65, A), ["E032"]),
    ("azure", {**PAIR, "preferred_output": [ASK, TOLD, A], "input": rows(S, U, tools=TOOLS)}, []),
    ("azure", {**PAIR, "preferred_output": [TOLD]}, ["E023", "E040"]),
    ("ftjax", {"task": "sft", "messages": [U, {**A, "weight": 0}]}, ["E018"]),
    ("ftjax", {"task": "sft", "messages": [U, A], "sample_weight": 0}, ["E018"]),
    ("ftjax", {"task": "chat", "messages": [U, A]}, ["E007"]),
    ("ftjax", {"task": "sft", "messages": [U, A], "extra": 1}, ["W103"]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}] * 2}, ["E014"]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                                    {"from": "gpt", "value": "a"}]}, ["E026"]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}],
                  "images": ["a.png", "b.png"]}, ["E032"]),
    ("alpaca", {"instruction": "q", "input": "<noinput>", "output": "a"}, ["W117"]),
    ("alpaca", {"instruction": "q", "output": ""}, ["E013"]),
    ("alpaca", {"instruction": "q", "output": "a", "kto_tag": "perhaps"}, ["E050"]),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, ["E007"]),
    ("hh", {"chosen": "a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, ["E007"]),
    ("qa", {"question": "q", "answer": 4}, ["E012"]),
]  # fmt: skip
EACH = [
    (target, row, expected)
    for target, table in (
        ("openai", OPENAI),
        ("azure", [t for t in OPENAI if "E032" not in t[1]]),
        ("openai_preference", PREFERENCE),
        ("together", TOGETHER),
        ("fireworks", FIREWORKS),
        ("mistral", MISTRAL),
        ("chat", CHAT),
    )
    for row, expected in table
] + OTHERS


@pytest.mark.parametrize("target, row, expected", EACH, ids=[f"{t}-{i}" for i, (t, _, _) in enumerate(EACH)])
def test_each_rule(target, row, expected):
    assert codes(target, row) == expected


@pytest.mark.parametrize(
    "row",
    [
        rows(S, U, {**A, "weight": 0}, U, {**A, "weight": 1}),  # the cookbook's counter fails on a weight
        calls(TOLD, A),  # its checker knows neither tool calls nor the role tool
        calls(),  # a call in the last message needs no answer
        rows(S, {"role": "user", "content": [{"type": "text", "text": "q"}]}, A),
        rows(S, image("https://e.org/a.png", detail="low"), A),
        rows(S, image(), image(), A),  # users may speak twice, as in the examples with images
        rows({**S, "name": "x"}, {**U, "name": "bob"}, A),
        rows(S, U, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}),
        rows(S, U, {"role": "assistant", "content": None, "refusal": "No."}),
        rows(S, U, {"role": "assistant", "content": None, "function_call": CALL["function"]},
             {"role": "function", "name": "get", "content": "r"}, A, functions=[TOOLS[0]["function"]]),
        calls(TOLD, A) | {"parallel_tool_calls": False},
    ],
)  # fmt: skip
def test_what_openai_takes(row):
    assert codes("openai", row) == []


def test_what_mistral_takes():
    told = {**TOLD, "tool_call_id": NINE["id"]}
    ask = {"role": "assistant", "tool_calls": [{**CALL, **NINE}], "weight": 0}
    assert codes("mistral", rows(S, U, ask, told, {**A, "weight": 1}, tools=TOOLS)) == []
    assert codes("mistral", {"text": "t"}) == codes("mistral", {"interactions": [S, U, A]}) == []


def test_paths_name_the_place():
    found = Findings("f.jsonl", 3)
    TARGETS["openai"].check(calls(TOLD, A, call=function(arguments="{x")), found)
    (verdict,) = found
    assert verdict.path == "messages[2].tool_calls[0].function.arguments"
    made = verdict.to_json()
    assert (made["source"], made["line"], made["code"], made["name"], made["severity"]) == (
        "f.jsonl", 3, "E022", "arguments_not_json", "error")  # fmt: skip
    assert made["fix"]


# ── whole files ───────────────────────────────────────────────────────────────────────────────────


def stage(tmp_path, path, rows_per_part=20_000, format=None, **options):
    step = Validate(ValidateOptions(**options))
    return run(step, parts(DataSource(path, format=format), rows_per_part), tmp_path / "work")


def said(stage):
    return [(v["line"], v["code"], v["outcome"]) for v in stage.verdicts()]


def test_too_few_rows_and_several_system_prompts(tmp_path, write):
    nine = [rows({**S, "content": f"Be {i % 3}."}, U, A) for i in range(9)]
    made = stage(tmp_path, write(nine), target="openai", rows_per_part=4)
    assert said(made) == [(0, "E060", "kept"), (0, "W112", "kept")] and made.counts.kept == 9
    assert made.summary["E060"] == "9 rows, and openai takes 10 at least"
    # a row that does not count makes ten too few
    made = stage(tmp_path, write([*nine, rows(S, U)]), target="openai")
    assert (10, "E014", "dropped") in said(made) and (0, "E060", "kept") in said(made)
    assert stage(tmp_path, write([*nine, nine[0]]), target="openai").counts.codes == {"W112": 1}
    assert stage(tmp_path, write(nine), target="together").counts.codes == {"W112": 1}


def test_too_large_a_file(tmp_path, write, monkeypatch):
    import dataclasses

    small = dataclasses.replace(TARGETS["mistral"], most_bytes=300)
    monkeypatch.setitem(TARGETS, "mistral", small)
    made = stage(tmp_path, write([rows(S, U, A)] * 5), target="mistral")
    assert said(made) == [(0, "E061", "kept")]
    assert not said(stage(tmp_path, write([rows(S, U, A)] * 2), target="mistral"))


def test_a_row_of_another_format_is_checked_as_it_would_be_written(tmp_path, write):
    good = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                              {"from": "gpt", "value": "a", "weight": 0.5}]}  # fmt: skip
    silent = copy.deepcopy(good)
    silent["conversations"][2]["weight"] = 0
    made = stage(tmp_path, write([good] * 10 + [silent]), target="openai")
    assert said(made) == [(11, "E018", "dropped")] and made.counts.kept == 10
    made = stage(tmp_path, write([{"text": "t"}]), target="openai")
    assert said(made) == [(1, "E008", "dropped"), (0, "E060", "dropped")]


def test_weights_elsewhere_are_together_s(tmp_path, write):
    row = rows(S, {**U, "weight": 1}, A)
    assert said(stage(tmp_path, write([row]), target="together")) == [(1, "W120", "kept")]
    made = said(stage(tmp_path, write([row]), target="openai"))
    assert (1, "E017", "dropped") in made


def test_lengths_by_a_models_tokens(tmp_path, write):
    long = rows(U, {**A, "content": "word " * 30})
    prompt = rows({**U, "content": "word " * 60}, A)
    path = write([rows(U, A), long, prompt])
    made = stage(tmp_path, path, target="chat", model=TOKENIZER, max_length=40)
    assert [s for s in said(made) if s[1] != "W101"] == [(2, "W111", "kept"), (3, "E070", "dropped")]
    (cut,) = (v["text"] for v in made.verdicts() if v["code"] == "W111")
    assert "more than 40" in cut and "are cut off" in cut
    assert [s[1] for s in said(stage(tmp_path, path, target="chat", model=TOKENIZER))] == ["W101"] * 3
    control = write([rows(U, {**A, "content": "a<|im_end|>b"})])
    assert ("E071", "dropped") in [
        s[1:] for s in said(stage(tmp_path, control, target="chat", model=TOKENIZER))
    ]


def test_every_code_of_form_is_in_the_docs():
    table = (Path(__file__).parents[2] / "docs/data.md").read_text()
    for code, (name, severity, fix) in CODES.items():
        if code[0] in "EW":
            assert f"| {code} | {name} | {severity} | {fix} |" in table


def test_options_that_make_no_sense():
    with pytest.raises(UserError, match="there is no 'opanai'"):
        Validate(ValidateOptions(target="opanai"))
    with pytest.raises(UserError, match="give the model"):
        Validate(ValidateOptions(max_length=10))
