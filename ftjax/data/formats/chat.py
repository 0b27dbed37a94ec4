"""Rows with `messages` as Hugging Face's templates and TRL take them: arguments are objects."""

from typing import Any

from ftjax.data.formats.format import Format, Written
from ftjax.data.formats.messages import conversation, has_answer, rest, tools_of
from ftjax.data.record import Findings, Record

PLACE = {"source", "line"}  # where a row was read: not of the row itself
KNOWN = ("messages", "tools", "functions")


def read(values: dict[str, Any], found: Findings) -> Record:
    messages = conversation(values["messages"], found)
    has_answer(messages, found)
    return Record("sft", messages, tools=tools_of(values, found), meta=rest(values, KNOWN))


def lost(record: Record, raw: tuple | None = None) -> list[str]:
    """What a row loses of the record as a whole; `raw` is what reading the row will give."""
    losses = ["meta"] if record.meta.keys() - PLACE else []
    if record.weight != 1:
        losses.append("example weight")
    if record.raw != raw:
        losses.append("raw")
    return losses


def with_tools(row: dict[str, Any], record: Record) -> dict[str, Any]:
    return {**row, "tools": record.tools} if record.tools else row


def _write(record: Record) -> Written:
    return Written([with_tools({"messages": record.messages}, record)], lost(record))


CHAT = Format("chat", "messages: a list of {role, content}", ("sft",), ("messages",), read, _write)
