"""Mistral's rows (mistral-finetune, mistral-common): strict turns, and tool calls' ids of nine characters."""

import hashlib
import json
import re
from typing import Any

from ftjax.data.formats.chat import lost
from ftjax.data.formats.format import Format, Written
from ftjax.data.formats.messages import as_context, conversation, has_answer, rest, tools_of
from ftjax.data.formats.openai import Unanswered, holds_images, outgoing
from ftjax.data.record import Findings, Record

CALL_ID = re.compile(r"[A-Za-z0-9]{9}")
MAY_FOLLOW: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user", "assistant", "system"),
    "user": ("assistant", "user", "system"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("assistant", "tool", "user"),
}
"""Which role may come after which (the first: after nothing)."""
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _read(values: dict[str, Any], found: Findings) -> Record | None:
    if values.get("text") is not None or isinstance(values.get("content"), str):
        text = values.get("text", values.get("content"))
        if not isinstance(text, str) or not text.strip():
            found.add("E013", "text", "text is empty, or no string")
            return None
        return Record("lm", text=text, meta=rest(values, ("text", "content")))
    name = "messages" if values.get("messages") is not None else "interactions"
    if values.get(name) is None:
        found.add("E010", "messages", "messages (or interactions) missing")
        return None
    given = values[name]
    if isinstance(given, list):  # a message's text may be called `text`
        given = [
            {**m, "content": m["text"]} if isinstance(m, dict) and "text" in m and "content" not in m else m
            for m in given
        ]
        given = [{k: v for k, v in m.items() if k != "text"} if isinstance(m, dict) else m for m in given]
    messages = conversation(given, found, name)
    has_answer(messages, found)
    tools = tools_of(values, found)
    if tools:  # only the last answer is trained then
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        messages = as_context(messages[:last]) + messages[last:]
    meta = rest(values, ("messages", "interactions", "tools", "available_tools", "functions"))
    return Record("sft", messages, tools=tools, meta=meta)


def call_id(given: Any, number: int) -> str:
    """Nine letters and digits for call number `number` of a row, the same ones for the same id again."""
    if isinstance(given, str) and CALL_ID.fullmatch(given):
        return given
    digest = int.from_bytes(hashlib.sha256(json.dumps([given, number]).encode()).digest()[:8], "big")
    return "".join(_ALPHABET[digest // 62**i % 62] for i in range(9))


def turn_error(roles: list[str]) -> tuple[int, str] | None:
    """The first turn that may not follow the one before, and why."""
    before = ""
    for i, role in enumerate(roles):
        if role not in MAY_FOLLOW[before]:
            return i, f"{role} may not follow {before}" if before else f"a row may not begin with {role}"
        before = role
    return None


def _write(record: Record) -> Written:
    losses = lost(record)
    if record.task == "lm":
        return Written([{"text": record.text}], losses)
    if holds_images(record.messages):
        return Written(refused=("E032", "the row holds images, and the format takes text"))
    try:
        messages = outgoing(record.messages, losses, call_id)
    except Unanswered as e:
        return Written(refused=("E023", str(e)))
    out: list[dict] = []
    for message in messages:
        if message.get("tool_calls") and message["content"]:
            losses.append("joined calls") if "joined calls" not in losses else None
            out.append({k: v for k, v in message.items() if k != "tool_calls"})
            message = {**message, "content": None}
        if message.get("tool_calls"):
            message = {k: v for k, v in message.items() if k != "content"}
        if message.pop("name", None) is not None and "name" not in losses:
            losses.append("name")
        out.append(message)
    roles = [m["role"] for m in out]
    wrong = turn_error(roles)
    if wrong:
        return Written(refused=("E026", f"messages[{wrong[0]}]: {wrong[1]}"))
    if roles.count("system") > 1:
        return Written(refused=("E026", "several system messages, and there may be one"))
    if roles[-1] != "assistant":
        return Written(refused=("E015", f"the last message is the {roles[-1]}'s"))
    row: dict[str, Any] = {"messages": out}
    if record.tools:
        row["tools"] = tools = [_whole(tool) for tool in record.tools]
        if tools != record.tools:
            losses.append("tool defaults")
        earlier = [m for m in out[:-1] if m["role"] == "assistant"]
        if any(m.get("weight", 1) for m in earlier):
            losses.append("earlier answers")
            if "fractional weight" in losses and record.messages[-1].get("weight", 1.0) in (0, 1):
                losses.remove("fractional weight")
        for message in earlier:  # said, since it is so
            message["weight"] = 0
    return Written([row], losses)


def _whole(tool: dict) -> dict:
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {**tool, "function": {**empty, **{k: v for k, v in function.items() if v is not None}}}


MISTRAL = Format(
    "mistral",
    "messages (or interactions) that end with the assistant's; or text",
    ("sft", "lm"),
    (),
    _read,
    _write,
)
