"""The format "ftjax": records as Record.to_json writes them, nothing lost."""

import dataclasses
from typing import Any

from ftjax.data.formats.format import Format, Written
from ftjax.data.formats.messages import conversation, decoded, has_answer, tools_of
from ftjax.data.record import TASKS, Findings, Record

_KEYS = {f.name for f in dataclasses.fields(Record)} - {"weight", "where", "given"} | {"sample_weight", "id"}
_TYPES: dict[str, tuple[type, str]] = {
    "text": (str, "a string"),
    "label": (bool, "true or false"),
    "completions": (list, "a list of strings"),
    "labels": (list, "a list of true and false"),
    "raw": (list, "a list of strings"),
    "meta": (dict, "an object"),
    "sample_weight": (float, "a number from 0"),
}


def _read(values: dict[str, Any], found: Findings) -> Record | None:
    task = values["task"]
    if task not in TASKS:
        found.add("E007", "task", f"task is {task!r}; tasks are {', '.join(TASKS)}")
        return None
    for key in set(values) - _KEYS:
        found.add("W103", key, f"{key} is no key of the format ftjax; notes belong into meta")
    given: dict[str, Any] = {}
    for key, (kind, words) in _TYPES.items():
        value = values.get(key)
        if value is None or value == "":
            continue
        if kind is not str:
            value = decoded(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is float and not 0 <= value < float("inf")):
            code = {"label": "E050", "sample_weight": "E016"}.get(key, "E007")
            found.add(code, key, f"{key} has to be {words}, not {value!r}"[:200])
            continue
        given[key] = value
    if not all(isinstance(s, str) for s in (*given.get("completions", ()), *given.get("raw", ()))):
        found.add("E007", "completions", "completions and raw have to be lists of strings")
    if not all(isinstance(s, bool) for s in given.get("labels", ())):
        found.add("E050", "labels", "labels has to be a list of true and false")
    parts = {
        k: conversation(values[k], found, k) for k in ("messages", "chosen", "rejected") if values.get(k)
    }
    if found.error is not None:
        return None
    raw = given.pop("raw", None)
    record = Record(
        task,
        **parts,
        tools=tools_of(values, found),
        weight=given.pop("sample_weight", 1.0),
        raw=tuple(raw) if raw else None,
        **given,
    )
    _check(record, found)
    return record


def _check(record: Record, found: Findings) -> None:
    """What a record of its task has to have."""
    if record.task in ("sft", "unpaired"):
        if not record.messages:
            found.add("E010", "messages", "messages is missing or empty")
        has_answer(record.messages, found)
    if record.task == "unpaired" and record.label is None:
        found.add("E050", "label", "an unpaired row needs a label")
    if record.task in ("prompt_only", "stepwise") and not record.messages:
        found.add("E010", "messages", "messages is missing or empty")
    strings = {"sft": 2, "unpaired": 2, "preference": 3, "lm": 0}.get(record.task, 1)
    if record.raw and len(record.raw) != strings:
        found.add("E007", "raw", f"raw has {len(record.raw)} strings, not the {strings} of {record.task}")
    if record.task == "lm" and not record.text.strip():
        found.add("E013", "text", "text is empty")
    if record.task == "stepwise" and not (
        record.completions and len(record.completions) == len(record.labels)
    ):
        found.add("E050", "labels", "completions needs a label for each step")
    if record.task == "preference":
        for name, part in (("chosen", record.chosen), ("rejected", record.rejected)):
            if not any(m["role"] == "assistant" for m in part):
                found.add("E040", name, f"{name} has no assistant turn of its own, so nothing to compare")
        if record.chosen and record.chosen == record.rejected:
            found.add("E041", "rejected", "chosen and rejected are the same")


def _write(record: Record) -> Written:
    return Written([record.to_json()])


FTJAX = Format("ftjax", "task, and what it has (messages, chosen, text …)", TASKS, ("task",), _read, _write)
