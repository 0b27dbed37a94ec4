"""OpenAI's files and those of the services that took them over: arguments are JSON text, weights 0 or 1."""

import json
from collections.abc import Callable
from typing import Any

from ftjax.data.formats import chat, plain, trl
from ftjax.data.formats.chat import lost
from ftjax.data.formats.format import Format, Written
from ftjax.data.formats.messages import as_context, conversation, decoded, parsed, rest, tools_of
from ftjax.data.formats.pairs import pair
from ftjax.data.record import Findings, Record

# ── messages in OpenAI's dialect ──────────────────────────────────────────────────────────────────


def outgoing(
    messages: list[dict], losses: list[str], new_id: Callable[[Any, int], str] | None = None
) -> list[dict]:
    """The messages as OpenAI has them, and in `losses` what of them is left out.

    `new_id` makes the id of call number n of a given id (None where it has none); a tool's message gets the
    id of its call, in the calls' order where it has none. Raises Unanswered for a tool's message without a
    call.
    """
    out: list[dict] = []
    waiting: list[tuple[Any, str, str]] = []  # id as given, id as written, name
    made = 0

    def lose(name: str) -> None:
        if name not in losses:
            losses.append(name)

    for message in messages:
        role = {"developer": "system", "ipython": "tool"}.get(message["role"], message["role"])
        if role != message["role"]:
            lose("developer" if role == "system" else "roles")
        new: dict[str, Any] = {"role": role, "content": message["content"]}
        extra = set(message) - {"role", "content", "weight", "tool_calls", "reasoning_content"}
        if role == "tool":
            given = message.get("tool_call_id")
            at = next((i for i, w in enumerate(waiting) if w[0] == given or given is None), None)
            if at is None:
                raise Unanswered(f"a tool's message answers no call (tool_call_id {given!r})")
            _, new["tool_call_id"], name = waiting.pop(at)
            if given is None or given != new["tool_call_id"]:
                lose("tool call ids")
            extra -= {"tool_call_id"} | ({"name"} if message.get("name") == name else set())
        elif "name" in extra:
            new["name"] = message["name"]
            extra -= {"name"}
        if "reasoning_content" in message:
            lose("reasoning")
        if extra:
            lose("name")
        if message.get("tool_calls"):
            calls, new["content"] = [], new["content"] or None
            for call in message["tool_calls"]:
                given = call.get("id")
                id = new_id(given, made) if new_id else given or f"call_{made + 1}"
                made += 1
                if id != given:
                    lose("tool call ids")
                if set(call) - {"id", "type", "function"} or set(call["function"]) - {"name", "arguments"}:
                    lose("name")
                function = {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                }
                calls.append({"id": id, "type": "function", "function": function})
                waiting.append((given, id, function["name"]))
            new["tool_calls"] = calls
        weight = message.get("weight", 1.0)
        if role == "assistant" and weight != 1:
            new["weight"] = int(weight > 0)
            if weight != 0:
                lose("fractional weight")
                del new["weight"]
        out.append(new)
    return out


class Unanswered(Exception):
    """A tool's message that no call asked for."""


def without_weights(messages: list[dict]) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "weight"} for m in messages]


def holds_images(messages: list[dict]) -> bool:
    return any(isinstance(m.get("content"), list) for m in messages)


# ── chat ──────────────────────────────────────────────────────────────────────────────────────────


def _row(record: Record, losses: list[str], messages: list[dict]) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": messages}
    if record.tools:
        row["tools"] = record.tools
        if isinstance(record.meta.get("parallel_tool_calls"), bool):
            row["parallel_tool_calls"] = record.meta["parallel_tool_calls"]
    return row


def _write_chat(record: Record) -> Written:
    losses = lost(record)
    try:
        messages = outgoing(record.messages, losses)
    except Unanswered as e:
        return Written(refused=("E023", str(e)))
    return Written([_row(record, losses, messages)], losses)


CHAT = Format(
    "openai",
    "messages: a list of {role, content}; arguments of tool calls are JSON text",
    ("sft",),
    ("messages",),
    chat.read,
    _write_chat,
)


# ── preference ────────────────────────────────────────────────────────────────────────────────────


def _read_preference(values: dict[str, Any], found: Findings) -> Record | None:
    given = parsed(values["input"], found, "input")
    if not isinstance(given, dict) or "messages" not in given:
        found.add("E040", "input", "input has to be {messages: [...]}")
        return None
    asked = conversation(given["messages"], found, "input.messages")
    answers = []
    for ours, older in (
        ("preferred_output", "preferred_completion"),
        ("non_preferred_output", "non_preferred_completion"),
    ):
        name = ours if values.get(ours) is not None else older
        if values.get(name) is None:
            found.add("E040", ours, f"{ours} missing; openai_preference rows have {_PREFERENCE}")
            return None
        answers.append(conversation(values[name], found, name))
    meta = rest(values, ("input", "preferred_output", "non_preferred_output", "preferred_completion",
                         "non_preferred_completion"))  # fmt: skip
    if isinstance(given.get("parallel_tool_calls"), bool):
        meta["parallel_tool_calls"] = given["parallel_tool_calls"]
    preferred, other = answers
    return pair(asked, preferred, other, found, tools_of(given, found), meta=meta)


def _write_preference(record: Record) -> Written:
    return _preference(record, one_message=True)


def _preference(record: Record, one_message: bool) -> Written:
    losses = lost(record)
    parts = record.messages, record.chosen, record.rejected
    if any(map(holds_images, parts)):
        return Written(refused=("E032", "the row holds images, and preference rows are text"))
    if one_message and max(len(record.chosen), len(record.rejected)) > 1:
        return Written(refused=("E040", "an answer of several messages, and OpenAI takes one"))
    if not record.messages:
        return Written(refused=("E010", "nothing is asked before the answers"))
    if record.messages[-1]["role"] == "assistant":
        return Written(refused=("E042", "the prompt ends with an assistant's message"))
    try:
        asked = without_weights(outgoing(record.messages, losses))
        chosen, rejected = (
            outgoing(record.messages + part, losses)[len(record.messages) :] for part in parts[1:]
        )
    except Unanswered as e:
        return Written(refused=("E023", str(e)))
    if any("weight" in m for m in chosen + rejected):
        losses.append("weight")
    row = {
        "input": _row(record, losses, asked),
        "preferred_output": without_weights(chosen),
        "non_preferred_output": without_weights(rejected),
    }
    return Written([row], losses)


_PREFERENCE = "input.messages, preferred_output and non_preferred_output"
PREFERENCE = Format(
    "openai_preference", _PREFERENCE, ("preference",), ("input",), _read_preference, _write_preference
)


# ── reinforcement ─────────────────────────────────────────────────────────────────────────────────


def _read_rft(values: dict[str, Any], found: Findings) -> Record:
    messages = conversation(values["messages"], found)
    if messages and messages[-1]["role"] == "assistant":
        found.add("E042", f"messages[{len(messages) - 1}]", "the prompt ends with an assistant's message")
    reference = rest(values, (*chat.KNOWN, "parallel_tool_calls"))
    meta = {"reference": reference} if reference else {}
    return Record("prompt_only", as_context(messages), tools=tools_of(values, found), meta=meta)


def _write_rft(record: Record) -> Written:
    losses = lost(record)
    if "meta" in losses and record.meta.keys() - chat.PLACE == {"reference"}:
        losses.remove("meta")
    try:
        messages = without_weights(outgoing(record.messages, losses))
    except Unanswered as e:
        return Written(refused=("E023", str(e)))
    if messages[-1]["role"] == "assistant":
        return Written(refused=("E042", "the prompt ends with an assistant's message"))
    return Written([{**record.meta.get("reference", {}), **_row(record, losses, messages)}], losses)


RFT = Format(
    "openai_rft",
    "messages that end with the user's, and keys of your own for the grader",
    ("prompt_only",),
    ("messages",),
    _read_rft,
    _write_rft,
)


# ── others that take OpenAI's rows ────────────────────────────────────────────────────────────────


def _read_azure(values: dict[str, Any], found: Findings) -> Record | None:
    return _read_preference(values, found) if "input" in values else _messages_of(values, found)


def _messages_of(values: dict[str, Any], found: Findings) -> Record | None:
    if values.get("messages") is None:
        found.add("E010", "messages", "messages missing")
        return None
    return chat.read(values, found)


def _write_azure(record: Record) -> Written:
    return _preference(record, one_message=False) if record.task == "preference" else _write_chat(record)


AZURE = Format(
    "azure", "as openai and openai_preference", ("sft", "preference"), (), _read_azure, _write_azure
)


def _read_fireworks(values: dict[str, Any], found: Findings) -> Record | None:
    """A root `weight`, any number, weighs the whole example."""
    weight = decoded(values.get("weight", 1.0))
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        found.add("E016", "weight", f"weight is {weight!r}; only numbers from 0 can be trained with")
        return None
    record = _read_azure({k: v for k, v in values.items() if k != "weight"}, found)
    if record is not None:
        record.weight = float(weight)
    return record


def _write_fireworks(record: Record) -> Written:
    messages = record.messages
    if any(m["role"] in ("system", "developer") for m in messages[1:]):
        return Written(refused=("E026", "a system message that is not the first"))
    written = _write_azure(record)
    if "example weight" in written.losses:
        written.losses.remove("example weight")
    # in all rows or in none, so in all
    written.rows = [{**row, "weight": record.weight} for row in written.rows]
    return written


FIREWORKS = Format(
    "fireworks",
    "as openai and openai_preference, with a `weight` of the example",
    ("sft", "preference"),
    (),
    _read_fireworks,
    _write_fireworks,
)


def _read_together(values: dict[str, Any], found: Findings) -> Record | None:
    for key, one in (
        ("text", plain.TEXT),
        ("prompt", trl.PROMPT_COMPLETION),
        ("input", PREFERENCE),
    ):
        if values.get(key) is not None:
            return one.read(values, found)
    return _messages_of(values, found)


def _write_together(record: Record) -> Written:
    if record.task == "lm":
        return plain.TEXT.write(record)
    if record.task == "preference":
        return _write_preference(record)
    texts = plain.turn(record) if record.raw and not record.tools else None
    if texts:
        return trl.PROMPT_COMPLETION.write(record)
    messages = record.messages
    for i, message in enumerate(messages):
        if message["role"] == "tool" or message.get("tool_calls"):
            return Written(
                refused=("E011", f"messages[{i}] is of a tool, and roles are system, user, assistant")
            )
        if i and message["role"] == messages[i - 1]["role"]:
            return Written(refused=("E026", f"messages[{i}] is the {message['role']}'s as the one before"))
    losses = lost(record)
    out = outgoing(messages, losses)
    for message in out:
        if message.pop("name", None) is not None and "name" not in losses:
            losses.append("name")
    if holds_images(out):  # all contents are lists, or all are strings
        out = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
            for m in out
        ]
    if record.tools:
        losses.append("tools")
    return Written([{"messages": out}], losses)


TOGETHER = Format(
    "together",
    "one of text, messages, prompt and completion, or input and two outputs",
    ("sft", "preference", "lm"),
    (),
    _read_together,
    _write_together,
)
