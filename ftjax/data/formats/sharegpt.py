"""ShareGPT's conversations as LLaMA-Factory reads them: from and value, calls and observations as turns."""

import json
from typing import Any

from ftjax.data.formats.chat import lost
from ftjax.data.formats.format import Format, Written
from ftjax.data.formats.messages import conversation, flag, has_answer, loads, parsed, rest, tools_of
from ftjax.data.formats.pairs import pair
from ftjax.data.record import Findings, Record

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function": "tool",
}
_KNOWN = ("conversations", "conversation", "system", "tools", "images", "chosen", "rejected", "kto_tag")
_IMAGE = "<image>"


def _read(values: dict[str, Any], found: Findings) -> Record | None:
    name = "conversations" if values.get("conversations") is not None else "conversation"
    turns = parsed(values.get(name), found, name)
    if not isinstance(turns, list):
        found.add("E010", name, f"{name} missing; sharegpt rows have {_SAYS}")
        return None
    images = parsed(values.get("images"), found, "images") or []
    images = list(images) if isinstance(images, list) else [images]
    wanted = len(images)
    messages = _messages(turns, name, found, images)
    shown = wanted - len(images)
    if images or (wanted and any(_IMAGE in str(m.get("content")) for m in messages if m["role"] == "user")):
        found.add("E032", "images", f"{wanted} images for {shown} {_IMAGE} marks in the text")
    pairwise = values.get("chosen") is not None and values.get("rejected") is not None
    while messages and messages[0]["role"] == "assistant" and not pairwise:
        found.add("W116", f"{name}[0]", "it begins with an answer to nothing, which is left out")
        messages.pop(0)
    if isinstance(values.get("system"), str) and values["system"].strip():
        messages.insert(0, {"role": "system", "content": values["system"]})
    tools = tools_of(values, found)
    meta = rest(values, _KNOWN)
    if pairwise:
        good, bad = (
            _messages(_one(parsed(values[k], found, k)), k, found, []) for k in ("chosen", "rejected")
        )
        return pair(messages, good, bad, found, tools, meta=meta)
    has_answer(messages, found)
    record = Record("sft", messages, tools=tools, meta=meta)
    if values.get("kto_tag") is not None:
        record.task, record.label = "unpaired", flag(values["kto_tag"])
        if record.label is None:
            found.add("E050", "kto_tag", f"kto_tag is {values['kto_tag']!r}; it has to be true or false")
    return record


def _one(value: Any) -> list:
    if isinstance(value, str):
        value = {"from": "gpt", "value": value}
    return value if isinstance(value, list) else [value]


def _messages(turns: list, name: str, found: Findings, images: list) -> list[dict]:
    """The turns as messages; images are taken from the list, one for each mark in the users' texts."""
    given: list[Any] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            found.add("E007", f"{name}[{i}]", f"{name}[{i}] has to be {{from, value}}")
            return []
        who, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if who is None or said is None:
            found.add("E007", f"{name}[{i}]", f"{name}[{i}] has to be {{from, value}}")
            return []
        more = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        if who == "function_call" or (who == "function" and _is_call(said)):
            call = parsed(said, found, f"{name}[{i}].value")
            given.append({"role": "assistant", "tool_calls": call, **more})
            continue
        role = _ROLES.get(str(who), who)
        if role == "user" and images and isinstance(said, str) and _IMAGE in said:
            said = _with_images(said, images)
        given.append({"role": role, "content": said, **more})
    return conversation(given, found, name) if given else []


def _is_call(said: Any) -> bool:
    try:
        said = loads(said) if isinstance(said, str) else said
    except json.JSONDecodeError:
        return False
    calls = said if isinstance(said, list) else [said]
    return bool(calls) and all(isinstance(c, dict) and "name" in c and "arguments" in c for c in calls)


def _with_images(text: str, images: list) -> list[dict]:
    parts: list[dict] = []
    pieces = text.split(_IMAGE)
    for i, piece in enumerate(pieces):
        if piece:
            parts.append({"type": "text", "text": piece})
        if i < len(pieces) - 1:
            image = images.pop(0) if images else None
            shown = (
                {"type": "image", "image": image} if image is not None else {"type": "text", "text": _IMAGE}
            )
            parts.append(shown)
    return parts


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


def _write(record: Record) -> Written:
    losses = lost(record)
    messages = list(record.messages)
    row: dict[str, Any] = {}
    if messages and messages[0]["role"] in ("system", "developer"):
        first = messages.pop(0)
        if not isinstance(first["content"], str) or not first["content"].strip():
            return Written(refused=("E013", "the system message is empty"))
        row["system"] = first["content"]
        _note(first, losses)
    if not messages or (record.task != "preference" and messages[0]["role"] == "assistant"):
        return Written(refused=("E026", "a conversation begins with what is asked"))
    images: list[str] = []
    called = [c["function"]["name"] for m in messages for c in m.get("tool_calls", ())]
    answered = [m.get("name") for m in messages if m["role"] == "tool"]
    if answered != called[: len(answered)]:
        losses.append("name")
    turns = [turn for m in messages for turn in _turns(m, losses, images, record.task != "preference")]
    row = {"conversations": turns, **row}
    if record.task == "preference":
        for name, part in (("chosen", record.chosen), ("rejected", record.rejected)):
            answer = [turn for m in part for turn in _turns(m, losses, [], False)]
            if len(answer) != 1:
                return Written(refused=("E040", f"{name} is more than one message, and sharegpt takes one"))
            if part[0].get("weight", 1.0) != 1:
                losses.append("weight")
            row[name] = answer[0]
    if images:
        if any(_IMAGE in text for text in _texts(messages)):
            return Written(refused=("E032", f"a text with {_IMAGE} in it, beside images"))
        row["images"] = images
    if record.tools:
        row["tools"] = json.dumps(record.tools, ensure_ascii=False)
    if record.task == "unpaired":
        row["kto_tag"] = record.label
    return Written([row], losses)


def _note(message: dict, losses: list[str]) -> None:
    """What of a message has no place in a turn."""
    found = []
    if message["role"] == "developer":
        found.append("developer")
    if message.get("reasoning_content"):
        found.append("reasoning")
    extra = set(message) - {"role", "content", "weight", "tool_calls", "reasoning_content", "tool_call_id"}
    if extra - ({"name"} if message["role"] == "tool" else set()):
        found.append("name")
    calls = message.get("tool_calls") or []
    if "tool_call_id" in message or any("id" in call for call in calls):
        found.append("tool call ids")
    if any(set(c) - {"id", "type", "function"} or set(c["function"]) - {"name", "arguments"} for c in calls):
        found.append("name")
    losses += [name for name in dict.fromkeys(found) if name not in losses]


def _turns(message: dict, losses: list[str], images: list[str], weighted: bool) -> list[dict]:
    _note(message, losses)
    role, content = message["role"], message["content"]
    weight = message.get("weight", 1.0)
    more = {"weight": int(weight) if weight in (0, 1) else weight} if weighted and weight != 1 else {}
    if isinstance(content, list):
        images += [p["image_url"]["url"] for p in content if p["type"] == "image_url"]
        if any(set(p.get("image_url", {"url": 0})) != {"url"} for p in content) and "name" not in losses:
            losses.append("name")
        content = "".join(p.get("text", _IMAGE) for p in content)
    out = []
    if content or not message.get("tool_calls"):
        who = {"user": "human", "assistant": "gpt", "tool": "observation", "ipython": "observation",
               "developer": "system"}.get(role, role)  # fmt: skip
        out.append({"from": who, "value": content, **more})
    if message.get("tool_calls"):
        if content and "joined calls" not in losses:
            losses.append("joined calls")
        calls = [
            {"name": c["function"]["name"], "arguments": c["function"]["arguments"]}
            for c in message["tool_calls"]
        ]
        value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        out.append({"from": "function_call", "value": value, **more})
    return out


def _texts(messages: list[dict]):
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else [{"text": content}]:
            if isinstance(part.get("text"), str):
                yield part["text"]


_SAYS = "conversations: a list of {from, value}"
SHAREGPT = Format("sharegpt", _SAYS, ("sft", "preference", "unpaired"), (), _read, _write)
