"""What is written in any format and read again is the record minus the losses that were listed."""

import copy
import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftjax.data import formats
from ftjax.data.formats import FORMATS, LOSSES, writer
from ftjax.data.record import TASKS, Findings, Record
from ftjax.data.targets import TARGETS

fast = pytest.mark.fast

# ── records ───────────────────────────────────────────────────────────────────────────────────────

WORDS = [
    "a",
    "é",
    "日本",
    "👩‍👩‍👧",
    "1",
    "{",
    '"',
    "\\",
    "\n",
    " ",
    "\t",
    "<image>",
    "Human:",
    "\n\n",
    "x y",
    ",",
]
text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join).filter(str.strip)
name = st.text("abcXYZ_-09", min_size=1, max_size=8)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(name, inner, max_size=2),
    max_leaves=4,
)
arguments = st.dictionaries(name, json_value, max_size=2)


@st.composite
def tool(draw):
    function = {"name": draw(name)}
    if draw(st.booleans()):
        function["description"] = draw(text)
    if draw(st.booleans()):
        function["parameters"] = {"type": "object", "properties": {draw(name): {"type": "string"}}}
    return {"type": "function", "function": function}


@st.composite
def call(draw, number, ids):
    made = {"type": "function", "function": {"name": draw(name), "arguments": draw(arguments)}}
    return {**({"id": f"{ids}{number}"} if ids else {}), **made}


@st.composite
def user(draw, plain=False):
    if not plain and draw(st.integers(0, 9)) == 0:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        return {"role": "user", "content": [{"type": "text", "text": draw(text)}, image]}
    more = {"name": "bob"} if not plain and draw(st.integers(0, 9)) == 0 else {}
    return {"role": "user", "content": draw(text), **more}


@st.composite
def assistant(draw, plain=False, weights=True):
    out = {"role": "assistant", "content": draw(text)}
    if plain:
        return out
    if draw(st.integers(0, 5)) == 0:
        out["reasoning_content"] = draw(text)
    if weights and draw(st.integers(0, 3)) == 0:
        out["weight"] = draw(st.sampled_from([0.0, 0.5, 2.0]))
    return out


@st.composite
def turns(draw, weights=True):
    """A conversation that ends with an answer; one of its answers is trained."""
    out = []
    if draw(st.integers(0, 2)) == 0:
        out.append({"role": draw(st.sampled_from(["system", "system", "developer"])), "content": draw(text)})
    plain = draw(st.booleans())
    number, ids = 0, draw(st.sampled_from(["", "call_", "abcdefgh"]))
    for _ in range(draw(st.integers(1, 3))):
        out.append(draw(user(plain)))
        if not plain and draw(st.integers(0, 3)) == 0:
            calls = [draw(call(number + i, ids)) for i in range(draw(st.integers(1, 2)))]
            said = draw(st.sampled_from(["", "Let me see."]))
            out.append({"role": "assistant", "content": said, "tool_calls": calls})
            for i, one in enumerate(calls):
                made = {"role": "tool", "content": draw(text), "name": one["function"]["name"]}
                if ids:
                    made["tool_call_id"] = f"{ids}{number + i}"
                out.append(made)
            number += len(calls)
        out.append(draw(assistant(plain, weights)))
    out[-1].pop("weight", None)
    return out


def context(messages):
    return [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in messages]


@st.composite
def records(draw, task=None):
    task = task or draw(st.sampled_from(TASKS))
    more = {"weight": draw(st.sampled_from([1.0, 1.0, 0.5]))}
    if draw(st.booleans()):
        more["meta"] = {"license": "MIT"}
    if task == "lm":
        return Record("lm", text=draw(text), **more)
    if task == "stepwise":
        steps = draw(st.lists(text, min_size=1, max_size=3))
        asked = draw(text)
        labels = [draw(st.booleans()) for _ in steps]
        message = {"role": "user", "content": asked}
        return Record(task, [message], completions=steps, labels=labels, raw=(asked,), **more)
    if draw(st.integers(0, 2)) == 0:  # strings
        asked, answer, other = draw(text), draw(text), draw(text)
        joint = draw(st.sampled_from(["", "\n\n"]))
        question = [{"role": "user", "content": asked}]
        reply = [{"role": "assistant", "content": answer}]
        if task == "prompt_only":
            return Record(task, question, raw=(asked,), **more)
        if task == "preference":
            bad = [{"role": "assistant", "content": other + "!" if other == answer else other}]
            raw = (asked + joint, answer, bad[0]["content"])
            return Record(task, question, chosen=reply, rejected=bad, raw=raw, **more)
        label = draw(st.booleans()) if task == "unpaired" else None
        return Record(task, question + reply, label=label, raw=(asked + joint, answer), **more)
    messages = draw(turns(weights=task in ("sft", "unpaired")))
    if draw(st.integers(0, 3)) == 0:
        more["tools"] = draw(st.lists(tool(), min_size=1, max_size=2))
    if task == "sft":
        return Record(task, messages, **more)
    if task == "unpaired":
        return Record(task, messages, label=draw(st.booleans()), **more)
    if task == "prompt_only":
        return Record(task, context(messages[:-1]), **more)
    chosen, rejected = [messages[-1]], [draw(assistant(weights=False))]
    if draw(st.integers(0, 4)) == 0:
        chosen = chosen + [draw(user(True)), draw(assistant(True))]
    if rejected == chosen:
        rejected = [{**rejected[0], "content": rejected[0]["content"] + "!"}]
    return Record("preference", context(messages[:-1]), chosen=chosen, rejected=rejected, **more)


# ── comparing ─────────────────────────────────────────────────────────────────────────────────────


def normal(record: Record, losses) -> dict:
    """The record as values, without what the losses name."""
    r = copy.deepcopy(record)
    both = [r.messages, r.chosen, r.rejected]
    if "meta" in losses:
        r.meta = {}
    if "example weight" in losses:
        r.weight = 1.0
    if "raw" in losses:
        r.raw = None
    if "tools" in losses:
        r.tools = None
    if "tool defaults" in losses:
        for one in r.tools or []:
            one["function"] |= {"description": "", "parameters": {}}
    if "shared turns" in losses:
        while r.chosen and r.rejected and r.chosen[0] == r.rejected[0]:
            r.messages.append({**r.chosen.pop(0), "weight": 0.0})
            r.rejected.pop(0)
    for messages in both:
        if "developer" in losses:
            for m in messages:
                m["role"] = "system" if m["role"] == "developer" else m["role"]
        if "system" in losses:
            messages[:] = [m for m in messages if m["role"] not in ("system", "developer")]
        if "joined calls" in losses:
            split = []
            for m in messages:
                if m.get("tool_calls") and m["content"]:
                    split.append({k: v for k, v in m.items() if k != "tool_calls"})
                    m = {**m, "content": ""}
                split.append(m)
            messages[:] = split
        for m in messages:
            if "weight" in losses:
                m.pop("weight", None)
            if "earlier answers" in losses and m is not messages[-1]:
                m.pop("weight", None)
            if "fractional weight" in losses and m.get("weight"):
                del m["weight"]
            if "reasoning" in losses:
                m.pop("reasoning_content", None)
            if "edges" in losses:
                m["content"] = m["content"].strip()
            if "name" in losses:
                for key in set(m) - {
                    "role",
                    "content",
                    "weight",
                    "reasoning_content",
                    "tool_calls",
                    "tool_call_id",
                }:
                    del m[key]
            if "tool call ids" in losses:
                m.pop("tool_call_id", None)
                for one in m.get("tool_calls", []):
                    one.pop("id", None)
    made = r.to_json()
    if "raw" in losses:
        made.pop("raw", None)
    return made


def back(rows, format):
    out = []
    for row in rows:
        row = json.loads(json.dumps(row))  # nothing that JSON can't hold
        found = Findings()
        record = formats.read(row, format, found)
        assert record is not None and found.error is None, (row, list(found))
        out.append(record)
    return out


QUIET = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
    "derandomize": True,
}
_CELLS = re.findall(
    r"^\| `(\w+)` \|[^|]*\| ([^|]*) \| ([^|]*) \|$",
    (Path(__file__).parents[2] / "docs/data.md").read_text(),
    re.MULTILINE,
)
DOCUMENTED = {n: (set(tasks.split(", ")), set(lost.split(", "))) for n, tasks, lost in _CELLS}
SETTINGS = settings(max_examples=25, **QUIET)


@fast
def test_the_table_in_the_docs_is_of_these_formats():
    assert {n: tasks for n, (tasks, _) in DOCUMENTED.items()} == {
        f.name: set(f.tasks) for f in FORMATS.values()
    }
    named = {loss for _, lost in DOCUMENTED.values() for loss in lost} - {"nothing"}
    of_casts = {"answer", "rejected", "label", "steps", "roles", "trained part"}
    assert named == set(LOSSES) - of_casts


@fast
@pytest.mark.parametrize("format", FORMATS)
@SETTINGS
@given(st.data())
def test_a_record_comes_back_minus_the_losses(format, data):
    record = data.draw(records(data.draw(st.sampled_from(FORMATS[format].tasks))))
    before = copy.deepcopy(record)
    written = writer(format)(record)
    assert record == before  # writing changes nothing
    if written.refused:
        assert written.refused[0] in formats_codes() and not written.rows
        return
    assert set(written.losses) <= set(LOSSES) and len(set(written.losses)) == len(written.losses)
    assert set(written.losses) <= DOCUMENTED[format][1]
    (again,) = back(written.rows, format)
    assert normal(again, written.losses) == normal(record, written.losses)
    for one in written.losses:  # and each of them is one
        fewer = [x for x in written.losses if x != one]
        assert normal(again, fewer) != normal(record, fewer), one


def formats_codes():
    from ftjax.data.codes import CODES

    return {c for c in CODES if c.startswith("E")}


@fast
@pytest.mark.parametrize("a, b", itertools.permutations(FORMATS, 2))
@settings(max_examples=2, **QUIET)
@given(st.data())
def test_from_each_format_to_each_and_back(a, b, data):
    record = data.draw(records(data.draw(st.sampled_from(FORMATS[a].tasks))))
    first = writer(a)(record)
    if first.refused:
        return
    (given_,) = back(first.rows, a)
    there = writer(b)(given_)
    if there.refused:
        return
    came = back(there.rows, b)
    if given_.task in FORMATS[b].tasks:
        (came_,) = came
        assert normal(came_, there.losses) == normal(given_, there.losses)
        home = writer(a)(came_)
        if not there.losses:
            assert home.rows == first.rows


# ── rows that are not as they should be ───────────────────────────────────────────────────────────


@st.composite
def spoilt(draw, value):
    """The value with something in it replaced, taken away or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 5)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: draw(spoilt(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(spoilt(value[at])), *value[at + 1 :]]
    return draw(
        json_value | st.sampled_from(["[", "{}", "[[]]", '{"role": 1}', {"role": []}, [{"role": "user"}]])
    )


@fast
@pytest.mark.parametrize("format", FORMATS)
@SETTINGS
@given(st.data())
def test_no_row_is_too_odd_to_be_judged(format, data):
    written = writer(format)(data.draw(records(data.draw(st.sampled_from(FORMATS[format].tasks)))))
    for row in written.rows:
        row = json.loads(json.dumps(row))
        for _ in range(3):
            row = data.draw(spoilt(row))
            if not isinstance(row, dict):
                return
            found = Findings()
            formats.matches(row)
            record = formats.read(row, format, found)
            assert (record is None) == (found.error is not None)
            for target in TARGETS.values():
                if format in target.shapes:
                    target.check(row, Findings())
            if record is not None:
                json.dumps(record.to_json())
                record.prompt_text(), record.answer_text()
                for to in FORMATS:
                    again = writer(to)(record)
                    assert bool(again.rows) != bool(again.refused)
