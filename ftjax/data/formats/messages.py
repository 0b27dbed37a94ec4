"""Messages of every dialect in one form, and back: what the formats share."""

import difflib
import json
from typing import Any

from ftjax.data.record import Findings

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_REMADE = frozenset(("role", "content", *_THOUGHTS, "refusal", "function_call", "tool_calls", "weight"))


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def conversation(messages: Any, found: Findings, path: str = "messages") -> list[dict]:
    """The messages as a Record has them: contents strings (parts where there are images), arguments
    objects, `reasoning_content`, a `weight` where it is not 1. What is wrong goes to `found`, and the
    message is left out."""
    messages = parsed(messages, found, path)
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list) or not messages:
        if found.error is None or found.error.path != path:
            found.add("E010", path, f"{path} has to be a list of {{role, content}} that is not empty")
        return []
    read = [_message(m, f"{path}[{i}]", found) for i, m in enumerate(messages)]
    return _named([m for m in read if m is not None])


def _named(messages: list[dict]) -> list[dict]:
    """The messages with each tool's message named after its call, as templates want it: by its id, or in the
    calls' order where it has none."""
    waiting: list[tuple[Any, str]] = []
    for message in messages:
        waiting += [(c.get("id"), c["function"]["name"]) for c in message.get("tool_calls", ())]
        if message["role"] != "tool":
            continue
        id = message.get("tool_call_id")
        at = next((i for i, w in enumerate(waiting) if id is None or w[0] == id), None)
        if at is not None:
            message.setdefault("name", waiting.pop(at)[1])
    return messages


def _message(message: Any, path: str, found: Findings) -> dict | None:
    if not isinstance(message, dict) or "role" not in message:
        found.add("E007", path, f"{path} has to be an object with role and content")
        return None
    role = message["role"]
    if role not in ROLES:
        alias = _ALIASES.get(str(role))
        near = [alias] if alias else difflib.get_close_matches(str(role), ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"roles are {', '.join(ROLES)}"
        found.add("E011", f"{path}.role", f"{path} has the role {role!r}; {hint}")
        return None
    content = _content(message.get("content"), path, found, role)
    if content is None:
        return None
    out = {
        "role": "tool" if role == "function" else role,
        "content": content,
        **{k: v for k, v in message.items() if v is not None and k not in _REMADE},
    }
    if role != "assistant":
        if message.get("weight"):
            text = f"{path} has a weight, but only assistant messages are trained on"
            found.add("W120", f"{path}.weight", text)
        if isinstance(content, str) and not content.strip() and role == "user":
            found.add("E013", f"{path}.content", f"{path} ({role}) has an empty content")
            return None
        return out
    return _assistant(message, out, path, found)


def _assistant(message: dict, out: dict, path: str, found: Findings) -> dict | None:
    thought = next((message[k] for k in _THOUGHTS if message.get(k)), None)
    if thought is not None:
        out["reasoning_content"] = _content(thought, f"{path}.reasoning_content", found, "assistant")
    if not out["content"] and isinstance(message.get("refusal"), str):
        out["content"] = message["refusal"]
    calls, name = message.get("tool_calls"), "tool_calls"
    if not calls and isinstance(message.get("function_call"), dict):
        calls, name = [{"function": message["function_call"]}], "function_call"
    if calls:
        out["tool_calls"] = tool_calls(calls, f"{path}.{name}", found)
    elif isinstance(out["content"], str) and not out["content"].strip():
        said = f"{path} (assistant) has an empty content and no tool_calls"
        found.add("W105" if message.get("content") else "E013", f"{path}.content", said)
    weight = message.get("weight", 1)
    if weight is None:
        weight = 1
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        found.add("E016", f"{path}.weight", f"{path}.weight is {weight!r}; it has to be a number from 0")
        return None
    if weight != 1:
        out["weight"] = float(weight)
    return out


def _content(content: Any, path: str, found: Findings, role: str) -> Any:
    """A string, a list of parts where there are images, or None where it is neither (and was reported)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        found.add(
            "E012", f"{path}.content", f"{path}.content has to be a string, not {type(content).__name__}"
        )
        return None
    parts: list[dict] = []
    for i, part in enumerate(content):
        one = _part(part)
        if one is None:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            code = "E030" if role != "user" and kind in ("image_url", "image") else "E012"
            found.add(
                code,
                f"{path}.content[{i}]",
                f"{path}.content has a part of type {kind!r}; only text can be trained",
            )
            return None
        if one["type"] == "image_url" and role != "user":
            found.add("E030", f"{path}.content[{i}]", f"{path} ({role}) holds an image")
            return None
        parts.append(one)
    if any(p["type"] == "image_url" for p in parts):
        return parts
    return "".join(p["text"] for p in parts)


def _part(part: Any) -> dict | None:
    """A part of a content as {type: text, text} or {type: image_url, image_url: {url, …}}."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return None
    image = part.get("image_url") or (part.get("url") or part.get("image") or part.get("path"))
    if part.get("type") in ("image_url", "image", "input_image"):
        image = {"url": image} if isinstance(image, str) else image
        if isinstance(image, dict) and isinstance(image.get("url"), str):
            return {"type": "image_url", "image_url": image}
        return None
    for key in ("text", "refusal"):
        if isinstance(part.get(key), str):
            return {"type": "text", "text": part[key]}
    return None


def tool_calls(calls: Any, path: str, found: Findings) -> list[dict]:
    """Calls as {id?, type: function, function: {name, arguments: object}}."""
    calls = parsed(calls, found, path)
    out = []
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function", call) if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            found.add("E021", f"{path}[{i}]", f"{path}[{i}] has to be {{function: {{name, arguments}}}}")
            continue
        at = f"{path}[{i}].function.arguments"
        arguments = _arguments(function.get("arguments"), at, found)
        if arguments is None:
            continue
        outer = (
            {k: v for k, v in call.items() if k not in ("function", "type") and v is not None}
            if "function" in call
            else {}
        )
        out.append({**outer, "type": "function", "function": {**function, "arguments": arguments}})
    return out


def _arguments(arguments: Any, path: str, found: Findings) -> dict | None:
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        try:
            arguments = loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as e:
            found.add("E022", path, f"{path} is no JSON: {e.msg} at column {e.colno}")
            return None
        if isinstance(arguments, str):
            found.add("E022", path, f"{path} is JSON within JSON: it was encoded twice")
            return None
    if not isinstance(arguments, dict):
        found.add("E022", path, f"{path} has to be an object, not {type(arguments).__name__}")
        return None
    return arguments


def tools_of(values: dict, found: Findings) -> list[dict] | None:
    """The row's `tools` (or `functions`) as {type: function, function: {name, …}}."""
    name = next((k for k in ("tools", "functions", "available_tools") if values.get(k)), "tools")
    tools = values.get(name)
    tools = parsed(tools, found, name) if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        if found.error is None or found.error.path != name:
            found.add("E020", name, f"{name} has to be a list of JSON schemas")
        return None
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
        for tool in tools
    ]


def parsed(value: Any, found: Findings, path: str) -> Any:
    """The value, read from JSON if it is a string that looks like it (CSV and Parquet cells)."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return loads(value)
        except json.JSONDecodeError as e:
            found.add("E007", path, f"{path} is broken JSON: {e.msg} at column {e.colno}")
            return None
    return value


def decoded(value: Any) -> Any:
    """A cell of a CSV file as the JSON that it holds, another value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return loads(value)
    except json.JSONDecodeError:
        return value


def loads(text: str) -> Any:
    """As json.loads; whatever is wrong is a JSONDecodeError (too deep nesting, numbers of thousands of
    digits)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as e:
        raise json.JSONDecodeError(f"too deep, or too large a number ({type(e).__name__})", text, 0) from None


def as_messages(value: Any, role: str, path: str, found: Findings) -> list[dict]:
    """A string as the one message of a role, or messages as `conversation` reads them."""
    if isinstance(value, str):
        if not value.strip():
            found.add("E013", path, f"{path} is empty")
            return []
        return [{"role": role, "content": value}]
    return conversation(value, found, path)


def has_answer(messages: list[dict], found: Findings) -> None:
    if found.error is None and not any(m["role"] == "assistant" for m in messages):
        found.add("E014", "messages", "no assistant turn, so there is nothing to train on")


def as_context(messages: list[dict]) -> list[dict]:
    """Messages of which none is trained."""
    return [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in messages]


def flag(value: Any) -> bool | None:
    """A label: true or false, or the words for it that a CSV file has."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def rest(values: dict, known: tuple[str, ...]) -> dict[str, Any]:
    """What else the row holds, for `meta`."""
    return {k: v for k, v in values.items() if k not in known and v is not None}
