"""Rows of strings: plain text, question and answer, and dialogues of Human and Assistant (hh-rlhf)."""

import re
from typing import Any

from ftjax.data.formats.chat import lost
from ftjax.data.formats.format import Format, Written
from ftjax.data.formats.messages import as_messages, conversation, rest
from ftjax.data.formats.pairs import pair_of_conversations
from ftjax.data.record import Findings, Record

_DIALOGUE = re.compile(r"\n\n(Human|Assistant):")


# ── text ──────────────────────────────────────────────────────────────────────────────────────────


def _read_text(values: dict[str, Any], found: Findings) -> Record | None:
    text = values["text"]
    if not isinstance(text, str):
        found.add("E012", "text", f"text has to be a string, not {type(text).__name__}")
        return None
    if not text.strip():
        found.add("E013", "text", "text is empty")
    return Record("lm", text=text, meta=rest(values, ("text",)))


def _write_text(record: Record) -> Written:
    return Written([{"text": record.text}], lost(record))


TEXT = Format("text", "text: a string", ("lm",), ("text",), _read_text, _write_text)


# ── question and answer ───────────────────────────────────────────────────────────────────────────


def _read_qa(values: dict[str, Any], found: Findings) -> Record:
    question, answer = values["question"], values["answer"]
    for name, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str):
            found.add("E012", name, f"{name} has to be a string, not {type(value).__name__}")
    messages = as_messages(question, "user", "question", found) + as_messages(
        answer, "assistant", "answer", found
    )
    # Without a template something has to tell the question from its answer: an empty line.
    raw = (f"{question}\n\n", str(answer))
    return Record("sft", messages, raw=raw, meta=rest(values, ("question", "answer")))


def turn(record: Record) -> tuple[str, str] | None:
    """The texts of a conversation of one question and its trained answer, None where it is more than
    that."""
    if [m["role"] for m in record.messages] != ["user", "assistant"]:
        return None
    if not all(isinstance(m["content"], str) and set(m) == {"role", "content"} for m in record.messages):
        return None
    return record.messages[0]["content"], record.messages[1]["content"]


def _write_qa(record: Record) -> Written:
    texts = turn(record)
    if texts is None or record.tools:
        return Written(
            refused=("E008", "a row of question and answer is one user message and one answer, of text")
        )
    raw = (f"{texts[0]}\n\n", texts[1])
    losses = lost(record, raw)
    return Written([{"question": texts[0], "answer": texts[1]}], losses)


QA = Format("qa", "question and answer: two strings", ("sft",), ("question", "answer"), _read_qa, _write_qa)


# ── hh ────────────────────────────────────────────────────────────────────────────────────────────


def is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and _DIALOGUE.match(value) is not None


def _read_hh(values: dict[str, Any], found: Findings) -> Record:
    def dialogue(name: str) -> list[dict]:
        text = values[name]
        if not is_dialogue(text):
            found.add("E007", name, f'{name} has to be a "\\n\\nHuman: … \\n\\nAssistant: …" string')
            return []
        parts = _DIALOGUE.split(text)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = [
            {"role": roles[who], "content": said.strip()}
            for who, said in zip(parts[::2], parts[1::2], strict=True)
        ]
        return conversation(turns, found, name)

    chosen, rejected = dialogue("chosen"), dialogue("rejected")
    return pair_of_conversations(chosen, rejected, found, meta=rest(values, ("chosen", "rejected")))


def _write_hh(record: Record) -> Written:
    losses = lost(record)
    asked = list(record.messages)
    if asked and asked[0]["role"] in ("system", "developer"):
        asked, losses = asked[1:], [*losses, "system"]
    rows = {}
    for name, answer in (("chosen", record.chosen), ("rejected", record.rejected)):
        text = ""
        for message in asked + answer:
            content = message["content"]
            if message["role"] not in ("user", "assistant") or message.get("tool_calls"):
                return Written(refused=("E008", "a dialogue of hh has only Human and Assistant"))
            if not isinstance(content, str):
                return Written(refused=("E030", "a dialogue of hh can't hold images"))
            if _DIALOGUE.search(content.strip()) or not content.strip():
                return Written(
                    refused=("E008", "a text that begins a turn of its own, or none, has no form in hh")
                )
            text += f"\n\n{'Human' if message['role'] == 'user' else 'Assistant'}: {content.strip()}"
        rows[name] = text
    messages = asked + record.chosen + record.rejected
    if any(m["content"] != m["content"].strip() for m in messages):
        losses.append("edges")
    if any(m.get("reasoning_content") for m in messages):
        losses.append("reasoning")
    if any(set(m) - {"role", "content", "weight", "reasoning_content"} for m in messages):
        losses.append("name")
    if any("weight" in m for m in record.chosen + record.rejected):
        losses.append("weight")
    if record.tools:
        losses.append("tools")
    return Written([rows], losses)


HH = Format(
    "hh",
    'chosen and rejected as "\\n\\nHuman: … \\n\\nAssistant: …" strings',
    ("preference",),
    ("chosen", "rejected"),
    _read_hh,
    _write_hh,
)
