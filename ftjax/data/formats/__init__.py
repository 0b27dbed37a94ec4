"""Formats of rows: found out, read as records, and written again."""

import difflib
from collections.abc import Callable
from typing import Any

from ftjax.data.formats import alpaca, canonical, chat, mistral, openai, plain, sharegpt, trl
from ftjax.data.formats.cast import cast
from ftjax.data.formats.chat import PLACE
from ftjax.data.formats.format import LOSSES, Format, Written
from ftjax.data.record import Findings, Record
from ftjax.errors import UserError

__all__ = [
    "FORMATS",
    "LOSSES",
    "PLACE",
    "Format",
    "Written",
    "cast",
    "detect",
    "format_named",
    "matches",
    "read",
    "writer",
]

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        canonical.FTJAX,
        openai.PREFERENCE,
        sharegpt.SHAREGPT,
        alpaca.ALPACA,
        plain.HH,
        trl.PREFERENCE,
        mistral.MISTRAL,
        chat.CHAT,
        openai.FIREWORKS,
        trl.STEPWISE,
        trl.UNPAIRED,
        trl.PROMPT_COMPLETION,
        trl.PROMPT_ONLY,
        plain.TEXT,
        plain.QA,
        openai.CHAT,
        openai.RFT,
        openai.AZURE,
        openai.TOGETHER,
    )
}
"""By name."""


def format_named(name: str) -> Format:
    """The format of that name; raises UserError with the nearest one."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if name in ("trl", "hf", "huggingface"):
            hint = "TRL has a format for each of its types: "
            hint += "chat, text, prompt_only, prompt_completion, preference, unpaired, stepwise. "
        raise UserError(f"unknown data format {name!r}; {hint}known are {', '.join(FORMATS)}")
    return FORMATS[name]


def matches(values: dict[str, Any]) -> list[str]:
    """The names of all formats that the row's keys could be of, the likeliest first."""
    keys = {k for k, v in values.items() if v is not None}
    found = []
    if "task" in keys and keys & {"messages", "text", "chosen", "completions"}:
        return ["ftjax"]
    answers = keys & {"completion", "response"}
    turns = keys & {"conversations", "conversation"}
    if "input" in keys and (
        {"preferred_output", "non_preferred_output"} <= keys
        or {"preferred_completion", "non_preferred_completion"} <= keys
    ):
        found.append("openai_preference")
    if {"chosen", "rejected"} <= keys:
        if turns:
            found.append("sharegpt")
        elif "instruction" in keys:
            found.append("alpaca")
        else:
            both = (values["chosen"], values["rejected"])
            dialogues = "prompt" not in keys and all(map(plain.is_dialogue, both))
            found.append("hh" if dialogues else "preference")
    elif turns:
        found.append("sharegpt")
    elif {"instruction", "output"} <= keys:
        found.append("alpaca")
    if "interactions" in keys:
        found.append("mistral")
    labelled = "label" in keys and isinstance(values["label"], bool | str) and trl.is_label(values["label"])
    if "messages" in keys:
        if labelled:
            found.append("unpaired")
        else:
            number = isinstance(values.get("weight"), int | float)
            found.append("fireworks" if number and not isinstance(values["weight"], bool) else "chat")
    if {"completions", "labels"} <= keys:
        found.append("stepwise")
    elif "prompt" in keys and answers:
        found.append("unpaired" if labelled else "prompt_completion")
    elif "prompt" in keys and "chosen" not in keys and "messages" not in keys:
        found.append("prompt_only")
    if "text" in keys:
        found.append("text")
    if {"question", "answer"} <= keys:
        found.append("qa")
    return list(dict.fromkeys(found))


def detect(values: dict[str, Any], where: str, one: bool = False) -> str:
    """The name of the row's format; raises UserError listing the keys seen and the formats. With `one`, a
    row that could be of two is an error as well, and else the likeliest is taken."""
    found = matches(values)
    if one and len(found) > 1:
        raise UserError(
            f"{where}: the row could be {' or '.join(found)} (keys {', '.join(map(str, values))}); "
            "name its format (--from, or `format`)"
        )
    if found:
        return found[0]
    keys = ", ".join(sorted(map(str, values))) or "(none)"
    known = "\n".join(f"  {f.name}: {f.says}" for f in FORMATS.values())
    raise UserError(
        f"{where}: unknown format, with the keys {keys}. Known formats:\n"
        f"{known}\nOther names can be mapped with `columns`, e.g. {{prompt: question, completion: answer}}."
    )


def read(values: dict[str, Any], format: str, found: Findings) -> Record | None:
    """The row as a record of the format, None where `found` has an error."""
    one = FORMATS[format]
    missing = [k for k in one.required if values.get(k) is None]
    if missing:
        found.add("E007", "", f"{', '.join(missing)} missing; {format} rows have {one.says}")
        return None
    record = one.read(values, found)
    return record if found.error is None else None


_PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))


def writer(format: str) -> Callable[[Record], Written]:
    """A function that gives a record as rows of the format, cast to a task that the format has where it has
    to be (preference -> two unpaired rows …), and what is lost on the way."""
    one = format_named(format)

    def write(record: Record) -> Written:
        made, losses, refused = cast(record, one)
        if refused:
            return Written(refused=refused)
        out = Written(losses=list(losses))
        for record_ in made:
            written = one.write(record_)
            if written.refused:
                return written
            for good, bad in _PAIRS:
                if any(good in row and row[good] == row[bad] for row in written.rows):
                    text = "chosen and rejected differ only in what the format can't say"
                    return Written(refused=("E041", text))
            out.rows += written.rows
            out.losses += [x for x in dict.fromkeys(written.losses) if x not in out.losses]
        if "weight" in out.losses and "fractional weight" in out.losses:
            out.losses.remove("fractional weight")
        return out

    return write
