import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data import pipeline
from ftjax.data.engine import Processes
from ftjax.data.log_forms import calls
from ftjax.data.logs import Logs, LogsOptions, Signal, _calls, _record, parts, signal, unread
from ftjax.data.record import Findings
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

U = [{"role": "user", "content": "Name a river."}]


def answer(text, **kw):
    return {"role": "assistant", "content": text, **kw}


def call(messages, said, finish="stop", id="", response=None, **row):
    """A row with an OpenAI request and response."""
    if response is None:
        response = {"id": id, "choices": [{"index": 0, "finish_reason": finish, "message": answer(said)}]}
    return {"request": {"model": "m", "messages": messages}, "response": response, **row}


@pytest.fixture
def mine(tmp_path):
    """Runs the step over rows: (records, codes by line, the stage)."""
    numbers = itertools.count()

    def run(rows, rows_per_part=1000, engine=None, **options):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        log = folder / "log.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage = pipeline.run(Logs(LogsOptions(**options)), parts(str(log), rows_per_part), folder, engine)
        codes = {}
        for verdict in stage.verdicts():
            codes.setdefault(verdict["line"], []).append(verdict["code"])
        # every row is accounted for
        lines = {r.meta["line"] for r in stage.records()} | set(codes)
        assert lines == set(range(1, len(rows) + 1))
        return list(stage.records()), codes, stage

    return run


def messages_of(row) -> list[dict]:
    (got,) = calls(row)
    assert got.failed is None, got.failed
    return got.messages


# ── forms ─────────────────────────────────────────────────────────────────────────────────────────


def test_requests_and_responses_in_the_ways_they_are_logged():
    response = call(U, "The Loire.")["response"]
    request = {"model": "m", "messages": U}
    want = [*U, answer("The Loire.")]
    for row in (
        {"request": request, "response": response},
        {"request": json.dumps(request), "response": json.dumps(response)},
        {"request_body": request, "response_body": response, "status_code": 200},
        {"custom_id": "1", "body": request, "response": {"status_code": 200, "body": response}},
        {**request, "response": response},
        {**request, "choices": response["choices"]},
        {"request": request, "response": "The Loire."},
        {"request": {"prompt": "Name a river."}, "response": {"choices": [{"text": "The Loire."}]}},
        {"prompt": "Name a river.", "response": "The Loire."},
    ):
        assert messages_of(row) == want, row
    (got,) = calls({**call(U, "x", id="c1"), "id": "r1", "user_id": 7, "timestamp": "2024-05-01T00:00:00Z"})
    assert (got.ids, got.user, got.time, got.model) == (("c1", "r1"), "7", 1714521600.0, "m")


def chunk(finish=None, **delta):
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


def test_streams_are_put_together_again():
    chunks = [chunk(role="assistant"), chunk(content="The "), chunk(content="Loire."), chunk("stop")]
    text = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
    for response in (chunks, {"chunks": chunks}, text):
        assert messages_of(call(U, "", response=response)) == [*U, answer("The Loire.")]
    part = {"index": 0, "id": "t1", "function": {"name": "find", "arguments": '{"a"'}}
    more = {"index": 0, "function": {"arguments": ": 1}"}}
    got = messages_of(
        call(U, "", response=[chunk(tool_calls=[part]), chunk(tool_calls=[more]), chunk("tool_calls")])
    )
    function = {"name": "find", "arguments": '{"a": 1}'}
    assert got[-1]["tool_calls"] == [{"id": "t1", "type": "function", "function": function}]
    (cut,) = calls(call(U, "", response=chunks[:-1]))
    assert cut.failed and cut.failed[0] == "L002"


def test_responses_api():
    request = {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
            {"type": "function_call", "call_id": "t1", "name": "rain", "arguments": '{"in": "Paris"}'},
            {"type": "function_call_output", "call_id": "t1", "output": "yes"},
        ],
    }
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "It said yes."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It rains."}]},
    ]
    response = {"id": "resp_1", "status": "completed", "output": output}
    want = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        answer(
            None,
            tool_calls=[
                {"id": "t1", "type": "function", "function": {"name": "rain", "arguments": '{"in": "Paris"}'}}
            ],
        ),
        {"role": "tool", "tool_call_id": "t1", "content": "yes"},
        answer([{"type": "text", "text": "It rains."}], reasoning_content="It said yes."),
    ]
    assert messages_of({"request": request, "response": response}) == want
    events = [
        {"type": "response.output_text.delta", "delta": "It"},
        {"type": "response.completed", "response": response},
    ]
    assert messages_of({"request": request, "response": events}) == want
    assert messages_of({"request": {"input": "Rain?"}, "response": response})[0] == {
        "role": "user",
        "content": "Rain?",
    }
    cut = {**response, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    for row, code in (
        ({"request": request, "response": cut}, "L002"),
        (
            {"request": request, "response": {**response, "status": "failed", "error": {"message": "no"}}},
            "L001",
        ),
        ({"request": {**request, "previous_response_id": "resp_0"}, "response": response}, "L015"),
    ):
        (got,) = calls(row)
        assert got.failed and got.failed[0] == code


def attributes(**values):
    """OTLP/JSON's list of attributes; a double underscore stands for a dot."""

    def value(v):
        if isinstance(v, bool):
            return {"boolValue": v}
        if isinstance(v, int):
            return {"intValue": str(v)}
        if isinstance(v, list):
            return {"arrayValue": {"values": [value(x) for x in v]}}
        if isinstance(v, dict):
            return {"kvlistValue": {"values": [{"key": k, "value": value(x)} for k, x in v.items()]}}
        return {"stringValue": v}

    return [{"key": k.replace("__", "."), "value": value(v)} for k, v in values.items()]


def otlp(*spans):
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


RAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "rain", "arguments": {"in": "Paris"}}}
        ],
        "content": "",
    },
    {"role": "tool", "tool_call_id": "t1", "content": "yes"},
    answer("It rains."),
]


def span(**kw):
    return {"spanId": "s1", "startTimeUnixNano": "1714521600000000000", "attributes": attributes(**kw)}


@pytest.mark.parametrize("as_json", [True, False])
def test_otel_messages_in_attributes(as_json):
    dump = json.dumps if as_json else (lambda x: x)
    asked = [
        {"role": "user", "parts": [{"type": "text", "content": "Rain?"}]},
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "t1", "name": "rain", "arguments": {"in": "Paris"}}],
        },
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "t1", "response": "yes"}]},
    ]
    said = [
        {"role": "assistant", "parts": [{"type": "text", "content": "It rains."}], "finish_reason": "stop"}
    ]
    row = otlp(
        span(
            gen_ai__operation__name="chat",
            gen_ai__response__id="c1",
            gen_ai__conversation__id="conv",
            gen_ai__system_instructions=dump([{"type": "text", "content": "Be brief."}]),
            gen_ai__input__messages=dump(asked),
            gen_ai__output__messages=dump(said),
        ),
        span(http__method="GET"),
    )
    got, other = calls(row)
    assert got.messages == RAIN
    assert (got.ids, got.conversation, got.time) == (("c1", "s1"), "conv", 1714521600.0)
    assert other.failed and other.failed[0] == "L005" and "1 spans" in other.failed[1]
    # a tool's result was `result` in the convention's first form
    asked[2]["parts"] = [{"type": "tool_call_response", "id": "t1", "result": "yes"}]
    row = otlp(span(gen_ai__input__messages=dump(asked), gen_ai__output__messages=dump(said)))
    assert messages_of(row) == RAIN[1:]


def test_otel_numbered_attributes_and_the_sdks_own_form():
    flat = {
        "gen_ai.prompt.0.role": "system",
        "gen_ai.prompt.0.content": "Be brief.",
        "gen_ai.prompt.1.role": "user",
        "gen_ai.prompt.1.content": "Rain?",
        "gen_ai.prompt.2.role": "assistant",
        "gen_ai.prompt.2.tool_calls.0.id": "t1",
        "gen_ai.prompt.2.tool_calls.0.name": "rain",
        "gen_ai.prompt.2.tool_calls.0.arguments": '{"in": "Paris"}',
        "gen_ai.prompt.3.role": "tool",
        "gen_ai.prompt.3.content": "yes",
        "gen_ai.prompt.3.tool_call_id": "t1",
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.content": "It rains.",
        "gen_ai.completion.0.finish_reason": "stop",
        "llm.request.functions.0.name": "rain",
    }
    row = {"name": "chat", "context": {"span_id": "0x1"}, "attributes": flat, "status": {"status_code": "OK"}}
    (got,) = calls(row)
    assert [m["role"] for m in got.messages] == [m["role"] for m in RAIN] and got.tools == [{"name": "rain"}]
    assert got.messages[2]["tool_calls"][0]["function"] == {"name": "rain", "arguments": '{"in": "Paris"}'}
    assert got.messages[-1] == RAIN[-1] and got.ids == ("0x1",)
    cut = {**row, "attributes": {**flat, "gen_ai.completion.0.finish_reason": "length"}}
    bad = {**row, "status": {"status_code": "ERROR", "description": "timeout"}}
    assert [next(calls(r)).failed[0] for r in (cut, bad)] == ["L002", "L001"]  # type: ignore[index]


def test_otel_events_of_spans_and_as_log_records():
    events = [
        ("gen_ai.system.message", {"content": "Be brief."}),
        ("gen_ai.user.message", {"content": "Rain?"}),
        ("gen_ai.assistant.message", {"tool_calls": RAIN[2]["tool_calls"]}),
        ("gen_ai.tool.message", {"id": "t1", "content": "yes"}),
        (
            "gen_ai.choice",
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "It rains."}},
        ),
        ("gen_ai.evaluation.result", {"gen_ai.evaluation.score.label": "fail"}),
    ]
    in_span = {**span(), "events": [{"name": n, "attributes": attributes(**b)} for n, b in events]}
    records = [
        {
            "spanId": "s1",
            "timeUnixNano": "1714521600000000000",
            "attributes": attributes(event__name=name, **(body if "evaluation" in name else {})),
            "body": {"kvlistValue": {"values": attributes(**body)}},
        }
        for name, body in events
    ]
    as_logs = {"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}
    for row in (otlp(in_span), as_logs):
        (got,) = calls(row)
        assert [{**m, "content": m["content"] or ""} for m in got.messages] == RAIN
        assert got.feedback == {"label": "fail"} and got.time == 1714521600.0
    old = [
        {"name": "gen_ai.content.prompt", "attributes": {"gen_ai.prompt": json.dumps(U)}},
        {
            "name": "gen_ai.content.completion",
            "attributes": {"gen_ai.completion": json.dumps([answer("The Loire.")])},
        },
    ]
    assert messages_of({"spanId": "s", "attributes": {}, "events": old}) == [*U, answer("The Loire.")]
    details = attributes(
        gen_ai__input__messages=[{"role": "user", "parts": [{"type": "text", "content": "Name a river."}]}],
        gen_ai__output__messages=[
            {"role": "assistant", "parts": [{"type": "text", "content": "The Loire."}]}
        ],
    )
    one = {"eventName": "gen_ai.client.inference.operation.details", "spanId": "s9", "attributes": details}
    assert messages_of({"resourceLogs": [{"scopeLogs": [{"logRecords": [one]}]}]}) == [
        *U,
        answer("The Loire."),
    ]


def test_rows_that_are_not_what_their_keys_say(mine):
    rows = [
        call(U, "", response='data: {"choices": [\n'),
        {"request": {"messages": [1, None]}, "response": {"choices": [7]}},
        {"request": {"messages": U}, "response": {"choices": [{"message": "x"}]}},
        {"request": {"input": [3]}, "response": {"output": [{"type": "message"}]}},
        {
            "resourceSpans": [
                {"scopeSpans": [{"spans": [{"attributes": [{"key": "gen_ai.input.messages"}]}]}]}
            ]
        },
        {"resourceSpans": 3},
        {"resourceSpans": []},
        {"spanId": "s", "attributes": {"gen_ai.input.messages": "[1", "gen_ai.output.messages": 2}},
        {"messages": ["hello"]},
        {"messages": {"role": "user"}},
    ]
    records, codes, _ = mine(rows)
    assert records == [] and set(codes) == set(range(1, 11))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                "request response messages role content choices message delta finish_reason output type "
                "value attributes key stringValue events name spanId resourceSpans scopeSpans spans parts "
                "gen_ai.input.messages gen_ai.output.messages gen_ai.prompt.0.role".split()
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["request", "response", "messages", "attributes", "spanId", "resourceSpans"]), JSON
    )
)
def test_any_row_is_read_or_said_to_be_unreadable(values):
    got = _calls(values)
    assert got
    for call in got:
        _record(call, Findings("f", 1))


# ── accounting, threading, sampling ───────────────────────────────────────────────────────────────


def test_what_is_no_example_says_why(mine):
    rows = [
        call(U, "The Loire."),
        call(U, "The", finish="length"),
        call(U, "", finish="content_filter"),
        call(U, "", response={"error": {"message": "rate limit"}}),
        {"request": {"messages": U}, "response": {"status_code": 500, "body": "oops"}},
        {"request": {"messages": U}},
        {"level": "info", "text": "started"},
        {"messages": U},
        call([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "What?"),
        call(U, "x", response={"choices": [{"message": answer("The Rhine.")}, {"message": answer("b")}]}),
    ]
    records, codes, stage = mine(rows)
    want = {
        2: ["L002"],
        3: ["L003"],
        4: ["L001"],
        5: ["L001"],
        6: ["L004"],
        7: ["L005"],
        8: ["L004"],
        9: ["E012"],
    }
    assert codes == {**want, 10: ["L014"]}
    assert [r.meta["line"] for r in records] == [1, 10] and (stage.counts.rows, stage.counts.dropped) == (
        10,
        8,
    )


def grown(n, system="", user="u", **kw):
    """The calls of a conversation of n turns."""
    messages = [{"role": "system", "content": system}] if system else []
    for i in range(n):
        messages = [*messages, {"role": "user", "content": f"{user} asks {i}"}]
        yield call(messages, f"answer {i} to {user}", user=user, timestamp=1700000000 + i, **kw)
        messages = [*messages, answer(f"answer {i} to {user}")]


def test_growing_conversation_keeps_its_longest_row(mine):
    rows = list(grown(3))
    rows[1]["request"]["messages"].insert(
        0, {"role": "system", "content": "It is noon."}
    )  # changes each time
    rows = [*rows, *grown(2, user="v"), rows[2]]
    for per_part in (1000, 2):  # in whatever parts
        records, codes, _ = mine(rows, per_part)
        assert codes == {1: ["L006"], 2: ["L006"], 4: ["L006"], 6: ["L007"]}
        assert [r.meta["line"] for r in records] == [3, 5]
        assert [m.get("weight", 1) for m in records[0].messages if m["role"] == "assistant"] == [1, 1, 1]
        assert records[0].meta["group"] != records[1].meta["group"]


def test_earlier_answers_are_learnt_only_where_the_log_has_their_calls(mine):
    shots = [{"role": "user", "content": "2+2?"}, answer("4"), {"role": "user", "content": "3+3?"}]
    (record,), _, _ = mine([call(shots, "6")])
    assert [m.get("weight", 1) for m in record.messages if m["role"] == "assistant"] == [0, 1]
    rows = list(grown(3))
    rows[0]["feedback"] = "thumbs_down"
    rows[1]["response"]["choices"][0]["finish_reason"] = "length"
    (record,), codes, _ = mine(rows)
    assert [m.get("weight", 1) for m in record.messages if m["role"] == "assistant"] == [0, 0, 1]
    assert codes == {1: ["L006"], 2: ["L002"]}
    # of a chat all answers are the model's
    (record,), _, _ = mine([{"messages": [*shots[:2], *shots]}])
    assert [m.get("weight", 1) for m in record.messages if m["role"] == "assistant"] == [1, 1]


def test_sampling_is_by_conversation_and_stays_when_the_log_grows(mine):
    rows = [row for k in range(60) for row in grown(2, user=f"u{k}")]
    some, codes, _ = mine(rows, rate=0.3, seed=1)
    taken = {r.meta["user"] for r in some}
    assert 8 <= len(taken) <= 28 and all(r.meta["line"] % 2 == 0 for r in some)
    more, _, _ = mine([*grown(1, user="new"), *rows], rows_per_part=7, rate=0.3, seed=1)
    assert {r.meta["user"] for r in more} >= taken
    other, _, _ = mine(rows, rate=0.3, seed=2)
    assert {r.meta["user"] for r in other} != taken
    assert {c for line in codes.values() for c in line} == {"L006", "L008"}


def test_caps(mine):
    rows = [call([{"role": "user", "content": f"Q{i}"}], f"A{i}", user="u") for i in range(5)]
    rows += [
        call([{"role": "user", "content": f"Q{i}"}], f"B{i}", user="v", session_id="s") for i in range(3)
    ]
    records, codes, _ = mine(rows, per_user=2)
    assert len(records) == 4 and [c for line in codes.values() for c in line] == ["L009"] * 4
    again, _, _ = mine(rows, rows_per_part=3, per_user=2)
    assert [r.id for r in again] == [r.id for r in records]
    assert len(mine(rows, per_conversation=1)[0]) == 6  # five without a conversation's id, and one


def test_same_result_in_processes(mine):
    rows = [row for k in range(6) for row in grown(2, user=f"u{k}")]
    there, here = mine(rows, 3, Processes(2)), mine(rows)
    assert [r.id for r in there[0]] == [r.id for r in here[0]] and there[1] == here[1]


def test_masking_and_provenance(mine):
    rows = [
        call(
            [{"role": "user", "content": "Mail ann@firm.org"}],
            "Sent to ann@firm.org.",
            user="ann@firm.org",
            id="c9",
        )
    ]
    (record,), codes, _ = mine(rows)
    assert [m["content"] for m in record.messages] == ["Mail [EMAIL_1]", "Sent to [EMAIL_1]."]
    assert codes == {1: ["P001", "P001"]}
    assert "ann@" not in json.dumps(record.to_json())
    assert record.meta["log_id"] == "c9" and record.meta["model"] == "m"
    (record,), _, _ = mine(rows, mask=False)
    assert record.messages[0]["content"] == "Mail ann@firm.org"


# ── feedback ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "said, want",
    [
        ({"feedback": "thumbs_up"}, Signal(True)),
        ({"feedback": "Thumbs Down"}, Signal(False)),
        ({"thumbs": -1}, Signal(False)),
        ({"thumbs_up": 0}, Signal(False)),
        ({"feedback": "👍"}, Signal(True)),
        ({"vote": "-1"}, Signal(False)),
        ({"liked": True}, Signal(True)),
        ({"accepted": False}, Signal(False)),
        ({"rating": 5}, Signal(True)),
        ({"rating": 3}, Signal(None)),
        ({"stars": "1"}, Signal(False)),
        ({"label": "pass"}, Signal(True)),
        ({"rating": 0}, Signal(False)),
        ({"feedback": "what a day"}, Signal(None)),
        ({"feedback": "", "vote": 0}, Signal(None)),
        ({"thumbs": "down", "accepted": "n/a"}, Signal(False)),
        ({"regenerated": True}, Signal(None, "", True)),
        ({"feedback": "regenerate"}, Signal(None, "", True)),
        ({"correction": {"role": "assistant", "content": "The Loire."}}, Signal(None, "The Loire.")),
        ({"edited": "The Loire.", "thumbs": "down"}, Signal(False, "The Loire.")),
        ({}, Signal()),
    ],
)
def test_signals(said, want):
    assert signal(said, LogsOptions()) == want


def test_feedback_that_cannot_be_read_is_said(mine):
    said = [{"label": "billing", "rating": "B+"}, "neutral", {"thumbs": "", "rating": 3}, {"edited": 7}]
    rows = [call([{"role": "user", "content": f"q{i}"}], "a", feedback=f) for i, f in enumerate(said)]
    records, codes, _ = mine(rows)
    assert codes == {1: ["L016", "L016"], 4: ["L016"]} and len(records) == 4
    assert unread({"edited": True, "regenerated": "maybe", "stars": "5"}) == ["regenerated"]


def test_ratings_of_one_and_minus_one():
    options = LogsOptions(good_rating=1, bad_rating=-1)
    assert [signal({"rating": n}, options).good for n in (1, 0, -1)] == [True, None, False]


def rated():
    return [
        call([{"role": "user", "content": "a"}], "good", feedback="up"),
        call([{"role": "user", "content": "b"}], "bad", feedback={"thumbs": "down"}),
        call([{"role": "user", "content": "c"}], "wrong", feedback={"correction": "right"}),
        call([{"role": "user", "content": "d"}], "plain"),
    ]


def test_sft_takes_good_unrated_and_corrected(mine):
    records, codes, _ = mine(rated())
    assert [r.answer_text() for r in records] == ["good", "right", "plain"] and codes == {2: ["L010"]}
    records, codes, _ = mine(rated(), unrated=False)
    assert [r.answer_text() for r in records] == ["good", "right"] and codes == {2: ["L010"], 4: ["L011"]}


def test_unpaired(mine):
    records, codes, _ = mine(rated(), make="unpaired")
    assert [(r.task, r.label, r.answer_text()) for r in records] == [
        ("unpaired", True, "good"),
        ("unpaired", False, "bad"),
        ("unpaired", False, "wrong"),
    ]
    assert codes == {4: ["L011"]}


def test_preference_and_all(mine):
    (record,), codes, _ = mine(rated(), make="preference")
    assert record.task == "preference" and record.messages == [{"role": "user", "content": "c"}]
    assert (record.chosen, record.rejected) == ([answer("right")], [answer("wrong")])
    assert codes == {1: ["L012"], 2: ["L012"], 4: ["L012"]}
    records, codes, _ = mine(rated(), make="all")
    assert [r.task for r in records] == ["unpaired", "unpaired", "preference", "sft"] and codes == {}


def test_regenerated_answers_lose_to_the_one_that_was_kept(mine):
    ask = [{"role": "user", "content": "Name a river."}]
    rows = [
        call(ask, "Paris.", user="u", timestamp=1),
        call(ask, "The Loire.", user="u", timestamp=2),
        call(ask, "The Po.", user="u", timestamp=3),
        # the conversation goes on with the second
        call(
            [*ask, answer("The Loire."), {"role": "user", "content": "Its length?"}],
            "1006 km",
            user="u",
            timestamp=4,
        ),
        call(ask, "The Rhine.", user="somebody else", timestamp=5),
    ]
    for per_part in (1000, 1):
        records, codes, _ = mine(rows, per_part, make="preference")
        assert [(r.chosen[0]["content"], r.rejected[0]["content"]) for r in records] == [
            ("The Loire.", "Paris."),
            ("The Loire.", "The Po."),
        ]
        assert codes == {2: ["L006"], 4: ["L012"], 5: ["L012"]}
    records, codes, _ = mine(rows)
    assert [r.answer_text() for r in records] == ["The Loire.\n1006 km", "The Rhine."]
    assert codes == {1: ["L013"], 2: ["L006"], 3: ["L013"]}
    # with nothing to go on it may be two people, or one on two days, unless it is said
    nobody = [{k: v for k, v in row.items() if k != "user"} for row in rows[:2]]
    assert len(mine(nobody)[0]) == 2 and len(mine(rows[:2])[0]) == 2
    assert len(mine([{**row, "session_id": "s"} for row in nobody])[0]) == 1
    nobody[0]["regenerated"] = True
    assert [r.answer_text() for r in mine(nobody)[0]] == ["The Loire."]


def test_feedback_inside_a_conversation_is_not_lost(mine):
    rows = list(grown(2))
    rows[0]["feedback"] = "down"
    records, codes, _ = mine(rows, make="unpaired")
    assert [(r.label, r.answer_text()) for r in records] == [(False, "answer 0 to u")] and codes == {
        2: ["L011"]
    }
    rows[0]["feedback"] = {"correction": "better"}
    records, _, _ = mine(rows)
    assert [r.answer_text() for r in records] == ["better", "answer 1 to u"]
    rows[0]["feedback"] = "up"
    records, codes, _ = mine(rows, unrated=False)
    assert [r.answer_text() for r in records] == ["answer 0 to u"] and codes == {2: ["L011"]}


def test_feedback_on_single_turns_of_a_chat(mine):
    chat = {
        "messages": [
            {"role": "user", "content": "a"},
            answer("one", feedback="up"),
            {"role": "user", "content": "b"},
            answer("two", annotation={"rating": 1}),
            {"role": "user", "content": "c"},
            answer("three", correction="3"),
        ]
    }
    (record,), _, _ = mine([chat])
    assert record.answer_text() == "one\n3"
    records, _, _ = mine([chat], make="unpaired")
    assert [(r.label, r.answer_text(), len(r.messages)) for r in records] == [
        (True, "one", 2),
        (False, "two", 4),
        (False, "three", 6),
    ]


def test_feedback_in_a_file_of_its_own(mine, tmp_path):
    rows = [call([{"role": "user", "content": f"q{i}"}], f"a{i}", id=f"c{i}") for i in range(3)]
    file = tmp_path / "feedback.jsonl"
    said = [
        {"response_id": "c0", "thumbs": "up"},
        {"response_id": "c1", "correction": "A1"},
        {"id": "c7", "thumbs": "so-so"},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in said))
    records, codes, stage = mine(rows, rows_per_part=2, feedback=str(file), unrated=False)
    assert [r.answer_text() for r in records] == ["a0", "A1"] and codes == {3: ["L011"]}
    assert stage.summary == {
        "feedback_rows": 3,
        "feedback_rows_not_understood": 1,
        "feedback_ids_not_in_the_log": 1,
    }
    (tmp_path / "f.csv").write_text("request,thumbs\nc0,up\n")
    with pytest.raises(UserError, match=r"f.csv:2: no id in this row of feedback \(keys: request, thumbs\)"):
        mine(rows, feedback=str(tmp_path / "f.csv"))


def test_options_are_checked():
    with pytest.raises(UserError, match="rate is 30"):
        LogsOptions(rate=30)
    with pytest.raises(UserError, match="bad_rating 4.5 is not below good_rating 4.0"):
        LogsOptions(bad_rating=4.5)


def test_the_verb_and_a_recipe(tmp_path, capsys, monkeypatch):
    from ftjax.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rated()))
    assert main(["data", "logs", "log.jsonl", "--make", "preference", "--output", "pairs.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "logs: 4 rows; 1 go on" in out and "L012 no_pair" in out
    (row,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert row["chosen"] == [answer("right")]
    recipe = {
        "output": "set",
        "sources": [{"logs": ["log.jsonl"], "take": {"unrated": False}, "license": "own"}],
        "steps": [{"personal": {"mask": True}}],
        "processes": 1,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["data", "prepare", "recipe.yaml"]) == 0
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert {v["code"] for v in report["verdicts"]} == {"L010", "L011"}
