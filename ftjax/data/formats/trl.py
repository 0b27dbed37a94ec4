"""TRL's types, standard (strings) and conversational (messages); what they mean:
https://huggingface.co/docs/trl/dataset_formats. Language modelling is `text` and `chat`."""

from typing import Any

from ftjax.data.formats import chat
from ftjax.data.formats.chat import lost, with_tools
from ftjax.data.formats.format import Format, Written
from ftjax.data.formats.messages import (
    as_context,
    as_messages,
    conversation,
    flag,
    has_answer,
    rest,
    tools_of,
)
from ftjax.data.formats.pairs import pair, pair_of_conversations
from ftjax.data.formats.plain import turn
from ftjax.data.record import Findings, Record, is_trained

_REFUSED = Written(refused=("E008", "nothing is asked before the first trained answer"))


# ── prompt and completion ─────────────────────────────────────────────────────────────────────────


_PAIR = "prompt and completion (or response): two strings or two lists of messages"


def _read_prompt_completion(values: dict[str, Any], found: Findings) -> Record | None:
    prompt = values["prompt"]
    completion = values.get("completion", values.get("response"))
    if completion is None:
        found.add("E007", "", f"completion missing; prompt_completion rows have {_PAIR}")
        return None
    asked = as_messages(prompt, "user", "prompt", found)
    given = as_messages(completion, "assistant", "completion", found)
    has_answer(given, found)
    raw = (prompt, completion) if isinstance(prompt, str) and isinstance(completion, str) else None
    # What the prompt holds is context, whoever said it.
    return Record(
        "sft",
        as_context(asked) + given,
        tools=tools_of(values, found),
        raw=raw,
        meta=rest(values, ("prompt", "completion", "response", "tools")),
    )


def _without_weights(messages: list[dict]) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "weight"} for m in messages]


def _written(record: Record, **more: Any) -> Written:
    """Prompt and completion: strings where the row was strings, else messages."""
    texts = turn(record) if record.raw and not record.tools else None
    if texts:
        row = {"prompt": texts[0], "completion": texts[1], **more}
        return Written([row], lost(record, texts))
    first = next((i for i, m in enumerate(record.messages) if is_trained(m)), 0)
    if not first:
        return _REFUSED
    prompt, completion = _without_weights(record.messages[:first]), record.messages[first:]
    row = with_tools({"prompt": prompt, "completion": completion, **more}, record)
    return Written([row], lost(record))


PROMPT_COMPLETION = Format(
    "prompt_completion",
    _PAIR,
    ("sft",),
    ("prompt",),
    _read_prompt_completion,
    _written,
)


# ── prompt only ───────────────────────────────────────────────────────────────────────────────────


def _read_prompt(values: dict[str, Any], found: Findings) -> Record:
    prompt = values["prompt"]
    asked = as_messages(prompt, "user", "prompt", found)
    if asked and asked[-1]["role"] == "assistant":
        found.add("E042", f"prompt[{len(asked) - 1}]", "the prompt ends with an assistant's message")
    raw = (prompt,) if isinstance(prompt, str) and asked else None
    meta = rest(values, ("prompt", "tools"))
    return Record("prompt_only", as_context(asked), tools=tools_of(values, found), raw=raw, meta=meta)


def _write_prompt(record: Record) -> Written:
    text = _asked(record)
    if record.raw and text is not None and not record.tools:
        return Written([{"prompt": text}], lost(record, (text,)))
    if record.messages[-1]["role"] == "assistant":
        return Written(refused=("E042", "the prompt ends with an assistant's message"))
    return Written([with_tools({"prompt": _without_weights(record.messages)}, record)], lost(record))


def _asked(record: Record) -> str | None:
    """The text of a prompt that is one user message."""
    if len(record.messages) != 1 or set(record.messages[0]) != {"role", "content"}:
        return None
    message = record.messages[0]
    return message["content"] if message["role"] == "user" and isinstance(message["content"], str) else None


PROMPT_ONLY = Format(
    "prompt_only",
    "prompt: a string or a list of messages",
    ("prompt_only",),
    ("prompt",),
    _read_prompt,
    _write_prompt,
)


# ── preference ────────────────────────────────────────────────────────────────────────────────────


def _read_preference(values: dict[str, Any], found: Findings) -> Record | None:
    tools = tools_of(values, found)
    chosen, rejected, prompt = values["chosen"], values["rejected"], values.get("prompt")
    meta = rest(values, ("prompt", "chosen", "rejected", "tools"))
    if prompt is None:
        if isinstance(chosen, str) or isinstance(rejected, str):
            found.add("E040", "prompt", "chosen and rejected are strings, so the row needs a prompt too")
            return None
        both = conversation(chosen, found, "chosen"), conversation(rejected, found, "rejected")
        return pair_of_conversations(*both, found, tools, meta)
    asked = as_messages(prompt, "user", "prompt", found)
    if asked and asked[-1]["role"] == "assistant":
        found.add("W102", f"prompt[{len(asked) - 1}]", "the prompt ends with an assistant's message")
    strings = all(isinstance(v, str) for v in (prompt, chosen, rejected))
    return pair(
        asked,
        as_messages(chosen, "assistant", "chosen", found),
        as_messages(rejected, "assistant", "rejected", found),
        found,
        tools,
        (prompt, chosen, rejected) if strings else None,
        meta,
    )


def _write_preference(record: Record) -> Written:
    losses = lost(record)
    answers = record.chosen, record.rejected
    one = [p[0]["content"] if len(p) == 1 and set(p[0]) == {"role", "content"} else None for p in answers]
    texts = (_asked(record), *one)
    if record.raw and None not in texts and not record.tools:
        row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
        return Written([row], lost(record, texts))
    row: dict[str, Any] = {"chosen": record.chosen, "rejected": record.rejected}
    if record.messages:
        row = {"prompt": _without_weights(record.messages), **row}
    elif record.chosen[0] == record.rejected[0]:
        losses.append("shared turns")
    return Written([with_tools(row, record)], losses)


PREFERENCE = Format(
    "preference",
    "chosen and rejected, with prompt or as whole conversations",
    ("preference",),
    ("chosen", "rejected"),
    _read_preference,
    _write_preference,
)


# ── unpaired preference ───────────────────────────────────────────────────────────────────────────


def is_label(value: Any) -> bool:
    return flag(value) is not None


def _read_unpaired(values: dict[str, Any], found: Findings) -> Record | None:
    label = flag(values["label"])
    if label is None:
        found.add("E050", "label", f"label is {values['label']!r}; it has to be true or false")
    inner = {k: v for k, v in values.items() if k != "label"}
    if values.get("messages") is not None:
        record = chat.read(inner, found)
    elif values.get("prompt") is not None:
        record = _read_prompt_completion(inner, found)
    else:
        found.add("E007", "", "unpaired rows have label and either messages or prompt and completion")
        return None
    if record is not None:
        record.task, record.label = "unpaired", label
    return record


def _write_unpaired(record: Record) -> Written:
    written = _written(record, label=bool(record.label))
    if not written.refused:
        return written
    row = {"messages": record.messages, "label": bool(record.label)}
    return Written([with_tools(row, record)], lost(record))


UNPAIRED = Format(
    "unpaired",
    "prompt, completion and label (true or false); or messages and label",
    ("unpaired",),
    ("label",),
    _read_unpaired,
    _write_unpaired,
)


# ── stepwise ──────────────────────────────────────────────────────────────────────────────────────


def _read_stepwise(values: dict[str, Any], found: Findings) -> Record | None:
    prompt, steps, labels = values["prompt"], values["completions"], values["labels"]
    asked = as_messages(prompt, "user", "prompt", found)
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        found.add("E007", "completions", "completions has to be a list of strings that is not empty")
        return None
    if not isinstance(labels, list) or not all(isinstance(x, bool) for x in labels):
        found.add("E050", "labels", "labels has to be a list of true and false")
        return None
    if len(labels) != len(steps):
        found.add("E050", "labels", f"{len(steps)} completions have {len(labels)} labels")
    return Record(
        "stepwise",
        as_context(asked),
        completions=steps,
        labels=labels,
        raw=(prompt,) if isinstance(prompt, str) else None,
        meta=rest(values, ("prompt", "completions", "labels")),
    )


def _write_stepwise(record: Record) -> Written:
    text = _asked(record)
    if text is None or record.tools:
        return Written(refused=("E008", "a stepwise row's prompt is one user message of text"))
    row = {"prompt": text, "completions": record.completions, "labels": record.labels}
    return Written([row], lost(record, (text,)))


STEPWISE = Format(
    "stepwise",
    "prompt, completions (a list of steps) and labels (true or false for each)",
    ("stepwise",),
    ("prompt", "completions", "labels"),
    _read_stepwise,
    _write_stepwise,
)
