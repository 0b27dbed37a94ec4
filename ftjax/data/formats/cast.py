"""A record of one task as records of another, where a format does not have its task."""

from dataclasses import replace

from ftjax.data.formats.format import Format
from ftjax.data.record import Record, is_trained, text_of

_WAYS: dict[str, tuple[str, ...]] = {
    "sft": ("unpaired", "lm", "prompt_only"),
    "preference": ("unpaired", "sft", "lm", "prompt_only"),
    "unpaired": ("sft", "lm", "prompt_only"),
    "stepwise": ("unpaired", "sft", "lm", "prompt_only"),
    "prompt_only": (),
    "lm": (),
}
"""The tasks that a record of a task can be cast to; what loses least comes first."""


def cast(record: Record, format: Format) -> tuple[list[Record], list[str], tuple[str, str] | None]:
    """Records of a task that the format has, what they lose, and why there are none (a code and words)."""
    if record.task in format.tasks:
        return [record], [], None
    wanted = next((task for task in _WAYS[record.task] if task in format.tasks), None)
    if wanted is None:
        missing = {
            "prompt_only": "a prompt without an answer",
            "lm": "plain text without a prompt",
            "sft": "an answer without a worse one",
            "unpaired": "one answer without its counterpart",
        }.get(record.task, f"a {record.task} row")
        return (
            [],
            [],
            ("E008", f"this is {missing} (task {record.task}), and {format.name} has no rows for it"),
        )
    return _CASTS[record.task](record, wanted)


def _of_sft(record: Record, wanted: str):
    if wanted == "unpaired":
        return [replace(record, task="unpaired", label=True)], [], None
    if wanted == "lm":
        return _as_text(record)
    return _as_prompt(record)


def _of_unpaired(record: Record, wanted: str):
    if wanted == "prompt_only":
        made, losses, refused = _as_prompt(record)
        return made, [*losses, "label"], refused
    if not record.label:
        return (
            [],
            [],
            ("E008", f"the label says that this answer is a bad one, and {wanted} would train on it"),
        )
    sft = replace(record, task="sft", label=None)
    made, losses, refused = ([sft], [], None) if wanted == "sft" else _of_sft(sft, wanted)
    return made, [*losses, "label"], refused


def _of_preference(record: Record, wanted: str):
    raw = record.raw
    good, bad = (
        replace(
            record,
            messages=record.messages + answer,
            chosen=[],
            rejected=[],
            raw=(raw[0], raw[n]) if raw else None,
        )
        for n, answer in ((1, record.chosen), (2, record.rejected))
    )
    if wanted == "unpaired":
        return (
            [
                replace(good, task="unpaired", label=True),
                replace(bad, task="unpaired", label=False),
            ],
            [],
            None,
        )
    if wanted == "prompt_only":
        if not record.messages:
            return [], [], ("E008", "the pair has no prompt")
        raw = record.raw[:1] if record.raw else None
        prompt = replace(record, task="prompt_only", chosen=[], rejected=[], raw=raw)
        return [prompt], ["answer", "rejected"], None
    sft = replace(good, task="sft")
    made, losses, refused = ([sft], [], None) if wanted == "sft" else _of_sft(sft, wanted)
    return made, [*losses, "rejected"], refused


def _of_stepwise(record: Record, wanted: str):
    raw = record.raw
    if wanted == "prompt_only":
        prompt = replace(record, task="prompt_only", completions=[], labels=[])
        return [prompt], ["answer", "steps"], None
    right = all(record.labels)
    answer = "\n".join(record.completions)
    whole = replace(
        record,
        task="unpaired",
        messages=[*record.messages, {"role": "assistant", "content": answer}],
        label=right,
        completions=[],
        labels=[],
        raw=(*raw, answer) if raw else None,
    )
    if wanted == "unpaired":
        return [whole], ["steps"], None
    if not right:
        return [], [], ("E008", f"one of the steps is wrong, and {wanted} would train on it")
    made, losses, refused = _of_unpaired(whole, wanted)
    return made, ["steps", *(x for x in losses if x != "label")], refused


_CASTS = {
    "sft": _of_sft,
    "unpaired": _of_unpaired,
    "preference": _of_preference,
    "stepwise": _of_stepwise,
}


def _as_prompt(record: Record):
    """Everything before the last assistant turn and what follows it."""
    last = max((i for i, m in enumerate(record.messages) if m["role"] == "assistant"), default=0)
    asked = [{**m, "weight": 0.0} if is_trained(m) else m for m in record.messages[:last]]
    if not asked:
        return [], [], ("E008", "nothing is asked before the answer, so there is no prompt")
    raw = record.raw[:1] if record.raw and len(asked) == 1 else None
    losses = ["answer"]
    if any(is_trained(m) for m in record.messages[:last]):
        losses.append("weight")
    return [replace(record, task="prompt_only", messages=asked, label=None, raw=raw)], losses, None


def _as_text(record: Record):
    """The messages' texts with empty lines between them, or the strings of a row of strings as they
    were."""
    if record.raw:
        text = "".join(record.raw)
    else:
        text = "\n\n".join(filter(None, map(text_of, record.messages)))
    losses = ["trained part", "roles"]
    if any(not isinstance(m["content"], str) for m in record.messages):
        return [], [], ("E030", "the row holds images, and plain text can't")
    if record.tools:
        losses.append("tools")
    if any(m.get("reasoning_content") for m in record.messages):
        losses.append("reasoning")
    lm = Record("lm", text=text, weight=record.weight, meta=record.meta, where=record.where)
    return [lm], losses, None
