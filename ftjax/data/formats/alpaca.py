"""Alpaca's rows, and what LLaMA-Factory added to them: system, history, chosen and rejected, kto_tag."""

from typing import Any

from ftjax.data.formats.chat import lost
from ftjax.data.formats.format import Format, Written
from ftjax.data.formats.messages import flag, parsed, rest
from ftjax.data.formats.pairs import pair
from ftjax.data.record import Findings, Record

_KNOWN = ("instruction", "input", "output", "system", "history", "chosen", "rejected", "kto_tag")
_NONE = ("None", "none", "<noinput>", "N/A", "n/a")


def _read(values: dict[str, Any], found: Findings) -> Record | None:
    instruction, extra = values["instruction"], values.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(extra, str):
        found.add("E012", "instruction", "instruction and input have to be strings")
        return None
    if extra.strip() in _NONE:
        found.add("W117", "input", f"input is {extra.strip()!r}, taken for none")
        extra = ""
    prompt = f"{instruction}\n{extra}" if extra.strip() else instruction
    if not prompt.strip():
        found.add("E013", "instruction", "instruction is empty")
        return None
    system = values.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    before += _history(values.get("history"), found)
    asked = [*before, {"role": "user", "content": prompt}]
    meta = rest(values, _KNOWN)

    def answer(name: str) -> list[dict]:
        value = values.get(name)
        if isinstance(value, str) and value.strip():
            return [{"role": "assistant", "content": value}]
        if value is None:
            found.add("E007", name, f"{name} missing; alpaca rows have {_SAYS}")
        elif isinstance(value, str):
            found.add("E013", name, f"{name} is empty")
        else:
            found.add("E012", name, f"{name} has to be a string, not {type(value).__name__}")
        return []

    # Without a template something has to tell the instruction from its answer: an empty line.
    begin = () if before else (prompt + "\n\n",)
    if values.get("chosen") is not None and values.get("rejected") is not None:
        good, bad = answer("chosen"), answer("rejected")
        raw = (*begin, values["chosen"], values["rejected"]) if begin and good and bad else None
        return pair(asked, good, bad, found, raw=raw, meta=meta)
    given = answer("output")
    raw = (*begin, values["output"]) if begin and given else None
    record = Record("sft", asked + given, raw=raw, meta=meta)
    if values.get("kto_tag") is not None:
        record.task, record.label = "unpaired", flag(values["kto_tag"])
        if record.label is None:
            found.add("E050", "kto_tag", f"kto_tag is {values['kto_tag']!r}; it has to be true or false")
    return record


def _history(history: Any, found: Findings) -> list[dict]:
    """Earlier turns, trained as LLaMA-Factory does."""
    history = parsed(history, found, "history") or []
    out = []
    for i, one in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(one, list | tuple) or len(one) != 2 or not all(isinstance(s, str) for s in one):
            found.add("E007", f"history[{i}]", f"history[{i}] has to be [question, answer], two strings")
            continue
        out += [{"role": "user", "content": one[0]}, {"role": "assistant", "content": one[1]}]
    return out


def _write(record: Record) -> Written:
    losses = lost(record, record.raw)
    asked = list(record.messages)
    answers = [record.chosen, record.rejected] if record.task == "preference" else [[asked.pop()]]
    row: dict[str, Any] = {}
    if asked and asked[0]["role"] in ("system", "developer"):
        row["system"] = asked[0]["content"]
        if asked.pop(0)["role"] == "developer":
            losses.append("developer")
    given = [part[0] for part in answers if len(part) == 1]
    told = asked + given
    roles = [m["role"] for m in told]
    turns = [("user", "assistant")[i % 2] for i in range(len(asked))] + ["assistant"] * len(answers)
    if roles != turns or len(asked) % 2 == 0 or any(m.get("tool_calls") for m in told):
        return Written(refused=("E008", "an alpaca row is questions and answers by turns, without tools"))
    if any(not isinstance(m["content"], str) for m in told):
        return Written(refused=("E032", "the row holds images, and an alpaca row is text"))
    if any(not m["content"].strip() for m in given):
        return Written(refused=("E013", "the answer is empty"))
    pairs = [[u["content"], a["content"]] for u, a in zip(asked[:-1:2], asked[1::2], strict=True)]
    earlier = [m for m in asked if m["role"] == "assistant"]
    untrained = [m for m in earlier if m.get("weight", 1.0) != 1]
    if record.task != "preference" and (untrained or given[0].get("weight", 1.0) != 1):
        losses.append("weight")  # all are trained
    if record.task == "preference":
        if any(m.get("weight", 1.0) != 1 for m in given):
            losses.append("weight")
    if any(m.get("reasoning_content") for m in told):
        losses.append("reasoning")
    if any(set(m) - {"role", "content", "weight", "reasoning_content"} for m in told + record.messages[:1]):
        losses.append("name")
    if record.tools:
        losses.append("tools")
    names = ("chosen", "rejected") if record.task == "preference" else ("output",)
    row = {
        "instruction": asked[-1]["content"],
        "input": "",
        **{name: m["content"] for name, m in zip(names, given, strict=True)},
        **row,
        **({"history": pairs} if pairs else {}),
    }
    if record.task == "unpaired":
        row["kto_tag"] = record.label
    raw = None if pairs or "system" in row else (row["instruction"] + "\n\n", *(row[n] for n in names))
    if record.raw != raw:
        losses.append("raw")
    return Written([row], losses)


_SAYS = "instruction, output and perhaps input (or chosen and rejected)"
ALPACA = Format("alpaca", _SAYS, ("sft", "preference", "unpaired"), ("instruction",), _read, _write)
