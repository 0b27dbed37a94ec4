"""Rows of production logs as calls of a model: OpenAI's requests with their responses (chat completions, also
streamed, and the Responses API), chats, and spans or log records of OpenTelemetry's GenAI conventions.

OpenTelemetry: https://opentelemetry.io/docs/specs/semconv/gen-ai/ as of 1.37 and later (the attributes
gen_ai.input.messages, gen_ai.output.messages, gen_ai.system_instructions), its events up to 1.36
(gen_ai.user.message …, gen_ai.choice), and the numbered attributes of OpenLLMetry (gen_ai.prompt.0.content).
"""

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Call:
    """One call: the messages that were sent and, last, the answer; or why there is none."""

    messages: list[dict] = field(default_factory=list)
    """As they were logged, in OpenAI's form or near it."""
    tools: Any = None
    failed: tuple[str, str] | None = None
    """A code of the section L and what was found."""
    ids: tuple[str, ...] = ()
    """What feedback may name it by: of the response, the request, the row, the span."""
    conversation: str = ""
    user: str = ""
    time: float = 0.0
    """Seconds since 1970; 0 if the log does not say."""
    model: str = ""
    feedback: dict[str, Any] = field(default_factory=dict)
    """What was said of the answer, by key."""
    turns: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Likewise of single messages of a chat."""
    chat: bool = False
    """Whether the row is a conversation, all of whose answers are the model's (and not one call of it)."""
    choices: int = 1


FEEDBACK = (
    *(
        "feedback",
        "thumbs",
        "thumbs_up",
        "vote",
        "liked",
        "rating",
        "stars",
        "accepted",
        "label",
        "regenerated",
    ),
    *("correction", "corrected", "edited", "edited_response", "ideal"),
)
"""Keys that hold feedback, in a row or in a file of its own."""
_IDS = ("id", "request_id", "response_id", "message_id", "call_id", "custom_id", "span_id", "spanId")


def calls(values: dict[str, Any]) -> Iterator[Call]:
    """The calls of one row; of a row that holds none, one that failed with L005."""
    if any(k in values for k in ("resourceSpans", "resource_spans", "resourceLogs", "resource_logs")):
        yield from _otlp(values)
    elif "attributes" in values and any(k in values for k in ("spanId", "span_id", "context", "traceId")):
        yield from _spans([values], {})
    else:
        yield _row(values)


def feedback_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the row says of the answer, by the keys of FEEDBACK; `feedback` may hold them itself."""
    inner = values.get("feedback")
    found = {k: values[k] for k in FEEDBACK if values.get(k) is not None and not isinstance(values[k], dict)}
    return {**found, **feedback_of(inner)} if isinstance(inner, dict) else found


def ids_of(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(values[k]) for k in _IDS if isinstance(values.get(k), str | int) and values[k] != "")


def _first(values: dict[str, Any], *keys: str) -> Any:
    return next((values[k] for k in keys if values.get(k) is not None), None)


def _loaded(value: Any) -> Any:
    """The value, parsed where it is JSON in a string."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _seconds(value: Any) -> float:
    """A time in seconds since 1970, from a number (of any unit) or ISO 8601."""
    if isinstance(value, str) and not value.isdigit():
        try:
            return datetime.datetime.fromisoformat(value).timestamp()
        except ValueError:
            return 0.0
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        return 0.0
    while number > 1e11:  # milliseconds, micro-, nanoseconds
        number /= 1000
    return number


# ── requests and responses, chats ─────────────────────────────────────────────────────────────────


def _row(values: dict[str, Any]) -> Call:
    request = _body(_first(values, "request", "request_body", "req"))
    response = _loaded(_first(values, "response", "response_body", "resp", "completion"))
    if not isinstance(request, dict) and isinstance(values.get("body"), dict) and "response" in values:
        request = values["body"]
    if not isinstance(request, dict) and (response is not None or "choices" in values):
        request = values
        response = values if response is None else response
    if isinstance(request, dict) and response is not None:
        call = _exchange(request, response, values.get("status_code"))
        for name, keys in _SAID.items():
            if not getattr(call, name) and (value := _first({**request, **values}, *keys)) is not None:
                setattr(call, name, str(value))
    elif turns := _first(values, "messages", "conversation", "conversations"):
        call = _chat(turns)
        if "error" in values and values["error"]:
            call.failed = ("L001", f"the call failed: {_short(values['error'])}")
        for name, keys in _SAID.items():
            setattr(call, name, str(_first(values, *keys) or ""))
    elif isinstance(request, dict) or "error" in values:
        said = values.get("error")
        call = Call(failed=("L001", f"the call failed: {_short(said)}") if said else _NO_ANSWER)
    else:
        keys = ", ".join(map(str, values)) or "none"
        return Call(failed=("L005", f"no call of a model is in this row (its keys: {keys[:120]})"))
    call.ids = tuple(dict.fromkeys((*call.ids, *ids_of(values))))
    call.time = call.time or _seconds(_first(values, "created", "created_at", "timestamp", "time", "ts"))
    call.feedback = feedback_of(values)
    return call


_SAID = {
    "conversation": ("conversation_id", "session_id", "thread_id", "chat_id", "conversation"),
    "user": ("user_id", "user", "safety_identifier"),
    "model": ("model",),
}
_NO_ANSWER = ("L004", "the log has no answer to this request")


def _body(value: Any) -> Any:
    value = _loaded(value)
    return (
        _loaded(value["body"])
        if isinstance(value, dict) and isinstance(value.get("body"), dict | str)
        else value
    )


def _exchange(request: dict[str, Any], response: Any, status: Any = None) -> Call:
    if isinstance(response, dict):
        status = response.get("status_code", status)
    response = _body(response)
    call = Call(messages=_asked(request), tools=_tools(request), model=str(request.get("model") or ""))
    if isinstance(response, dict) and response is not request:
        call.ids = tuple(str(response[k]) for k in ("id",) if response.get(k))
        call.time = _seconds(_first(response, "created", "created_at"))
        call.model = str(response.get("model") or call.model)
    error = response.get("error") if isinstance(response, dict) else None
    if error or (isinstance(status, int) and status >= 400):
        call.failed = ("L001", f"the call failed: {_short(error or f'status {status}')}")
        return call
    answer, finish, call.choices = _answer(response)
    if answer is None:
        call.failed = _NO_ANSWER
        return call
    call.messages = [*call.messages, answer]
    call.failed = finished(finish)
    if request.get("previous_response_id") or (request.get("conversation") and "input" in request):
        call.failed = ("L015", "the turns before are on the server (previous_response_id), not in the row")
    if not call.messages[:-1]:
        call.failed = ("L004", "the log has no request to this answer")
    return call


def finished(reason: Any) -> tuple[str, str] | None:
    """What a finish reason says against the answer."""
    if reason in ("length", "max_tokens", "max_output_tokens", "model_length", _CUT_STREAM):
        why = "the stream ends without an end" if reason == _CUT_STREAM else f"finish reason {reason}"
        return "L002", f"the answer is cut off ({why})"
    if reason in ("content_filter", "safety", "refusal"):
        return "L003", f"the answer was filtered (finish reason {reason})"
    if reason in ("error", "failed", "cancelled"):
        return "L001", f"the call failed (finish reason {reason})"
    return None


_CUT_STREAM = "(none)"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("message") or json.dumps(value, ensure_ascii=False)
    return " ".join(str(value).split())[:160]


def _asked(request: dict[str, Any]) -> list[dict]:
    messages = _loaded(request.get("messages"))
    if isinstance(messages, list):
        return messages
    if isinstance(request.get("prompt"), str):
        return [{"role": "user", "content": request["prompt"]}]
    asked = _loaded(request.get("input"))
    out = [{"role": "user", "content": asked}] if isinstance(asked, str) else _items(asked or [])
    if request.get("instructions"):
        out = [{"role": "system", "content": request["instructions"]}, *out]
    return out


def _tools(request: dict[str, Any]) -> Any:
    return _loaded(_first(request, "tools", "functions"))


def _items(items: Any) -> list[dict]:
    """Items of the Responses API as messages."""
    out: list[dict] = []
    for item in items if isinstance(items, list) else []:
        if not isinstance(item, dict):
            continue
        kind = item.get("type", "message")
        if kind == "message" and "role" in item:
            content = item.get("content")
            if isinstance(content, list):
                content = [_item_part(p) for p in content]
            last = out[-1] if out else {}
            if item["role"] == "assistant" and last.get("role") == "assistant" and not last.get("content"):
                last["content"] = content
            else:
                out.append({"role": item["role"], "content": content})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": None})
            out[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            said = item.get("output")
            said = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
            out.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": said})
        elif kind == "reasoning" and (thought := _thought(item)):
            out.append({"role": "assistant", "content": None, "reasoning_content": thought})
    return out


def _thought(item: dict) -> str:
    parts = [*(item.get("content") or []), *(item.get("summary") or [])]
    return "\n".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def _item_part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text", "")}
    return part


def _answer(response: Any) -> tuple[dict | None, Any, int]:
    """(the answer as a message, the reason it finished, how many choices there were)."""
    if isinstance(response, str) and "data:" in response[:200]:
        lines = (line[5:].strip() for line in response.splitlines() if line.startswith("data:"))
        response = [json.loads(line) for line in lines if line and line != "[DONE]"]
    if isinstance(response, str):
        return {"role": "assistant", "content": response}, None, 1
    if isinstance(response, dict) and isinstance(response.get("chunks"), list):
        response = response["chunks"]
    if isinstance(response, list):
        return _streamed([chunk for chunk in response if isinstance(chunk, dict)])
    if not isinstance(response, dict):
        return None, None, 0
    if isinstance(response.get("choices"), list) and response["choices"]:
        choice = response["choices"][0]
        message = choice.get("message")
        if message is None and isinstance(choice.get("text"), str):
            message = {"role": "assistant", "content": choice["text"]}
        if isinstance(message, dict):
            message = {**message, "role": "assistant"}
        return message, choice.get("finish_reason"), len(response["choices"])
    if isinstance(response.get("output"), list):
        made = _items(response["output"])
        reason = (response.get("incomplete_details") or {}).get("reason") or response.get("status")
        return _joined(made), reason, 1
    if "role" in response and "content" in response:
        return response, response.get("finish_reason"), 1
    if isinstance(said := _first(response, "output_text", "content", "text"), str):
        return {"role": "assistant", "content": said}, response.get("finish_reason"), 1
    return None, None, 0


def _joined(messages: list[dict]) -> dict | None:
    """One assistant message of the several items of a response."""
    if not messages:
        return None
    out: dict = {"role": "assistant", "content": None}
    for message in messages:
        for key, value in message.items():
            if value is not None and key != "role":
                out[key] = value if out.get(key) is None else out[key] + value
    return out


def _streamed(chunks: list[dict]) -> tuple[dict | None, Any, int]:
    """The answer of a stream, put together again."""
    for chunk in chunks:  # the Responses API's last event has it all
        if chunk.get("type") in ("response.completed", "response.incomplete", "response.failed"):
            return _answer(chunk["response"])
    texts = [c.get("delta", "") for c in chunks if c.get("type") == "response.output_text.delta"]
    if texts:
        return {"role": "assistant", "content": "".join(texts)}, _CUT_STREAM, 1
    out: dict[str, Any] = {"role": "assistant", "content": ""}
    made: dict[int, dict] = {}
    finish, some, choices = None, False, 1
    for chunk in chunks:
        for choice in chunk.get("choices") or []:
            choices = max(choices, choice.get("index", 0) + 1)
            if choice.get("index", 0):
                continue
            some = True
            delta = choice.get("delta") or {}
            for key in ("content", "reasoning_content", "refusal"):
                if isinstance(delta.get(key), str):
                    out[key] = (out.get(key) or "") + delta[key]
            for part in delta.get("tool_calls") or []:
                call = made.setdefault(part.get("index", 0), {"type": "function", "function": {}})
                call.update({"id": part["id"]} if part.get("id") else {})
                for key, value in (part.get("function") or {}).items():
                    if isinstance(value, str):
                        call["function"][key] = call["function"].get(key, "") + value
            finish = choice.get("finish_reason") or finish
    if made:
        out["tool_calls"] = [made[i] for i in sorted(made)]
    return (out if some else None), finish or _CUT_STREAM, choices


def _chat(turns: Any) -> Call:
    messages, said = [], {}
    for i, turn in enumerate(_loaded(turns) if isinstance(_loaded(turns), list) else []):
        if not isinstance(turn, dict):
            continue
        role = turn.get("role", _SPEAKERS.get(str(turn.get("from")), turn.get("from")))
        found = feedback_of({**turn, **(turn.get("annotation") or {})})
        if found and role == "assistant":
            said[i] = found
        kept = {k: v for k, v in turn.items() if k in _MESSAGE}
        messages.append({**kept, "role": role, "content": turn.get("content", turn.get("value"))})
    call = Call(messages=messages, turns=said, chat=True)
    if not any(m["role"] == "assistant" for m in messages):
        call.failed = _NO_ANSWER
    return call


_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_MESSAGE = ("name", "tool_calls", "tool_call_id", "reasoning_content", "refusal", "function_call")


# ── OpenTelemetry ─────────────────────────────────────────────────────────────────────────────────


def _otlp(values: dict[str, Any]) -> Iterator[Call]:
    """Of the OTLP/JSON form of traces and logs. Events that came as log records are joined to their spans
    within a row."""
    spans, events, lone = [], {}, []
    for resource in _first(values, "resourceSpans", "resource_spans") or []:
        for scope in _first(resource, "scopeSpans", "scope_spans") or []:
            spans += scope.get("spans") or []
    for resource in _first(values, "resourceLogs", "resource_logs") or []:
        for scope in _first(resource, "scopeLogs", "scope_logs") or []:
            for record in _first(scope, "logRecords", "log_records") or []:
                span = _first(record, "spanId", "span_id") or f"record {len(lone)}"
                if span not in events:
                    lone.append(span)
                events.setdefault(span, []).append(_log_event(record))
    named = {_first(s, "spanId", "span_id") for s in spans}
    spans += [{"spanId": span, "attributes": {}} for span in lone if span not in named]
    yield from _spans(spans, events)


def _spans(spans: list[dict], events: dict[str, list[dict]]) -> Iterator[Call]:
    others = 0
    for span in spans:
        call = _span(span, events.get(_first(span, "spanId", "span_id"), []))
        others += call is None
        if call is not None:
            yield call
    if others:
        yield Call(failed=("L005", f"{others} spans are no calls of a model with their texts"))


def _log_event(record: dict) -> dict:
    attributes = _attributes(record.get("attributes"))
    name = _first(record, "eventName", "event_name") or attributes.get("event.name", "")
    time = _first(record, "timeUnixNano", "time_unix_nano", "observedTimeUnixNano")
    return {"name": name, "attributes": attributes, "body": _any_value(record.get("body")), "time": time}


def _attributes(given: Any) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    return {a["key"]: _any_value(a.get("value")) for a in given or [] if isinstance(a, dict) and "key" in a}


def _any_value(value: Any) -> Any:
    """OTLP's AnyValue as plain JSON."""
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((kind, inner),) = value.items()
    if kind in ("stringValue", "boolValue", "doubleValue", "bytesValue"):
        return inner
    if kind == "intValue":
        return int(inner)
    if kind == "arrayValue":
        return [_any_value(v) for v in (inner or {}).get("values") or []]
    if kind == "kvlistValue":
        return _attributes((inner or {}).get("values"))
    return value


def _span(span: dict, more: list[dict]) -> Call | None:
    found = _attributes(span.get("attributes"))
    events = [
        {"name": e.get("name", ""), "attributes": _attributes(e.get("attributes")), "body": None}
        for e in span.get("events") or []
    ] + more
    for event in more:  # an operation's details may be an event of their own
        if event["name"] == "gen_ai.client.inference.operation.details":
            found = {**found, **event["attributes"]}
    context = span.get("context") or {}
    ids = (found.get("gen_ai.response.id"), _first(span, "spanId", "span_id") or context.get("span_id"))
    call = Call(
        ids=tuple(str(i) for i in ids if i),
        conversation=str(_first(found, "gen_ai.conversation.id", "session.id") or ""),
        user=str(_first(found, "user.id", "enduser.id") or ""),
        model=str(_first(found, "gen_ai.response.model", "gen_ai.request.model") or ""),
        time=_seconds(_first(span, "startTimeUnixNano", "start_time_unix_nano", "start_time"))
        or next((_seconds(e["time"]) for e in more if e.get("time")), 0.0),
        feedback=_evaluations(events),
    )
    call.tools = _loaded(_first(found, "gen_ai.tool.definitions", "llm.request.functions"))
    if call.tools is None:
        call.tools = _numbered(found, "llm.request.functions") or None
    for read in (_from_messages, _from_numbered, _from_events):
        asked, answers = read(found, events)
        if asked or answers:
            break
    else:
        return None
    status = span.get("status") or {}
    failed = status.get("code", status.get("status_code")) in (2, "STATUS_CODE_ERROR", "ERROR")
    if failed or found.get("error.type"):
        said = status.get("message") or status.get("description") or found.get("error.type") or "status ERROR"
        call.messages, call.failed = asked, ("L001", f"the call failed: {_short(said)}")
    elif not asked or not answers:
        which = "answer to this request" if asked else "request to this answer"
        call.messages, call.failed = asked, ("L004", f"the span has no {which}")
    else:
        answer, finish = answers[0]
        reasons = _loaded(found.get("gen_ai.response.finish_reasons"))
        if not finish and reasons:
            finish = reasons[0] if isinstance(reasons, list) else reasons
        call.messages, call.failed, call.choices = [*asked, answer], finished(finish), len(answers)
    return call


_Read = tuple[list[dict], list[tuple[dict, Any]]]  # what was asked; each answer with its finish reason


def _from_messages(found: dict, events: list[dict]) -> _Read:
    """gen_ai.input.messages, gen_ai.output.messages: {role, parts: [{type, …}]}."""
    given = _loaded(found.get("gen_ai.system_instructions"))
    asked = []
    if given:
        parts = given if isinstance(given, list) else [{"type": "text", "content": given}]
        asked = _parts({"role": "system", "parts": parts})
    for message in _loaded(found.get("gen_ai.input.messages")) or []:
        asked += _parts(message)
    answers = []
    for message in _loaded(found.get("gen_ai.output.messages")) or []:
        made = _parts({**message, "role": "assistant"})
        answers += [(made[0], message.get("finish_reason"))] if made else []
    return asked, answers


def _parts(message: Any) -> list[dict]:
    """A message of parts as one message, and its tool results as messages of their own."""
    if not isinstance(message, dict):
        return []
    if "parts" not in message:
        return [{k: v for k, v in message.items() if k != "finish_reason"}]
    content: list[dict] = []
    out: dict[str, Any] = {"role": message.get("role")}
    results = []
    for part in message["parts"] or []:
        kind = part.get("type")
        if kind == "text":
            content.append({"type": "text", "text": part.get("content") or ""})
        elif kind == "reasoning":
            out["reasoning_content"] = out.get("reasoning_content", "") + (part.get("content") or "")
        elif kind == "tool_call":
            function = {"name": part.get("name"), "arguments": part.get("arguments")}
            call = {"id": part.get("id"), "type": "function", "function": function}
            out.setdefault("tool_calls", []).append(call)
        elif kind == "tool_call_response":
            said = _first(part, "response", "result")
            said = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
            results.append({"role": "tool", "tool_call_id": part.get("id"), "content": said})
        elif kind == "uri" and part.get("modality") == "image":
            content.append({"type": "image_url", "image_url": {"url": part.get("uri")}})
        else:
            content.append(part)  # what reads the messages will say that it can't be trained
    if content or "tool_calls" in out or "reasoning_content" in out:
        texts = all(p.get("type") == "text" for p in content)
        out["content"] = "".join(p["text"] for p in content) if texts else content
        return [out, *results]
    return results


def _from_numbered(found: dict, events: list[dict]) -> _Read:
    """gen_ai.prompt.0.role, gen_ai.completion.0.content …"""
    asked = [_from_flat(m) for m in _numbered(found, "gen_ai.prompt")]
    answers = _numbered(found, "gen_ai.completion")
    return asked, [({**_from_flat(m), "role": "assistant"}, m.get("finish_reason")) for m in answers]


def _numbered(found: dict, prefix: str) -> list[dict]:
    """Attributes PREFIX.0.a, PREFIX.0.b.1.c as [{a, b: [{c}]}], by number."""
    groups: dict[int, dict] = {}
    for key, value in found.items():
        if key.startswith(prefix + ".") and (rest := key[len(prefix) + 1 :]).partition(".")[0].isdigit():
            number, _, name = rest.partition(".")
            groups.setdefault(int(number), {})[name] = value
    return [groups[n] for n in sorted(groups)]


def _from_flat(flat: dict) -> dict:
    out = {k: v for k, v in flat.items() if k in ("role", "tool_call_id")}
    out["content"] = _loaded(flat.get("content"))
    if isinstance(out["content"], dict):
        out["content"] = flat["content"]
    calls = [
        {
            "id": c.get("id"),
            "type": "function",
            "function": {"name": c.get("name"), "arguments": c.get("arguments")},
        }
        for c in _numbered(
            {"calls." + k[11:]: v for k, v in flat.items() if k.startswith("tool_calls.")}, "calls"
        )
    ]
    return {**out, "tool_calls": calls} if calls else out


def _from_events(found: dict, events: list[dict]) -> _Read:
    """Events gen_ai.{system,user,assistant,tool}.message and gen_ai.choice, or gen_ai.content.prompt and
    gen_ai.content.completion."""
    asked: list[dict] = []
    answers: list[tuple[dict, Any]] = []
    for event in events:
        name, held = event["name"], event["body"] if isinstance(event["body"], dict) else event["attributes"]
        held = {k: _loaded(v) if k in ("message", "tool_calls") else v for k, v in held.items()}
        if name == "gen_ai.choice":
            message = held["message"] if isinstance(held.get("message"), dict) else held
            if isinstance(held.get("message"), str):
                message = {"content": held["message"]}
            kept = {k: message[k] for k in ("content", "tool_calls") if message.get(k) is not None}
            answers.append(({"content": None, **kept, "role": "assistant"}, held.get("finish_reason")))
        elif name.startswith("gen_ai.") and name.endswith(".message"):
            role = held.get("role") or name.split(".")[1]
            kept = {k: held[k] for k in ("content", "tool_calls") if held.get(k) is not None}
            if role == "tool":
                kept["tool_call_id"] = held.get("id") or held.get("tool_call_id")
            asked.append({"content": None, **kept, "role": role})
        elif name == "gen_ai.content.prompt":
            said = _loaded(held.get("gen_ai.prompt"))
            asked += said if isinstance(said, list) else [{"role": "user", "content": said}]
        elif name == "gen_ai.content.completion":
            said = _loaded(held.get("gen_ai.completion"))
            said = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
            answers += [({**m, "role": "assistant"}, m.pop("finish_reason", None)) for m in map(dict, said)]
    return asked, answers


def _evaluations(events: list[dict]) -> dict[str, Any]:
    """gen_ai.evaluation.result's label."""
    for event in events:
        if event["name"] == "gen_ai.evaluation.result":
            if label := event["attributes"].get("gen_ai.evaluation.score.label"):
                return {"label": label}
    return {}
