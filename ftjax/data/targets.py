"""Whether rows are what a service or a library takes: the rules of each, with the place and the remedy.

A row that is in the target's own shape is checked as it is, so that what a conversion would set right (a
weight of `true`, arguments that are no text) is found; a row of another format is checked as it would be
written. The rules: OpenAI's reference for fine-tuning and its published request schema, Together's SDK
(`check_file`), mistral-finetune and mistral-common, Fireworks' and TRL's documentation; read in 2026.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ftjax.data import formats
from ftjax.data.formats.messages import loads
from ftjax.data.formats.mistral import CALL_ID, turn_error
from ftjax.data.record import Findings, Record, Verdict, is_trained
from ftjax.errors import UserError

MB = 10**6
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Images:
    """What images a target takes."""

    count: int
    kinds: tuple[str, ...] = ("jpeg", "jpg", "png", "webp")
    links: bool = False
    """Whether https URLs, and not only data URLs."""
    bytes: int = 10 * MB


@dataclass(frozen=True)
class Target:
    """What takes the rows."""

    name: str
    shapes: tuple[str, ...]
    """Formats whose rows are checked as they are."""
    check: Callable[[dict[str, Any], Findings], None]
    """One row of the target's own shape."""
    least_rows: int = 1
    most_rows: int | None = None
    most_bytes: int | None = None
    most_tokens: int | None = None


# ── messages ──────────────────────────────────────────────────────────────────────────────────────

_KEYS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "refusal", "name", "weight", "tool_calls", "function_call"},
    "tool": {"role", "content", "tool_call_id"},
    "function": {"role", "name", "content"},
}


def _list_of_messages(values: dict[str, Any], found: Findings, path: str) -> list[dict]:
    """The messages that are objects with a role; each is given its place under the key "at"."""
    name = path.rpartition(".")[2]
    messages = values.get(name)
    if not isinstance(messages, list) or not messages:
        found.add("E010", path, f"{path} has to be a list of messages that is not empty")
        return []
    out = []
    for i, message in enumerate(messages):
        if isinstance(message, dict):
            out.append({**message, "at": f"{path}[{i}]"})
        else:
            found.add("E007", f"{path}[{i}]", f"{path}[{i}] has to be an object")
    return out


def _openai_message(message: dict, found: Findings, roles: Sequence[str], images: Images | None) -> None:
    at, role = message["at"], str(message.get("role"))
    if role not in roles:
        found.add("E011", f"{at}.role", f"{at} has the role {role!r}; roles are {', '.join(roles)}")
        return
    if role == "developer":
        found.add("W106", f"{at}.role", f"{at} is the developer's")
    for key in sorted(set(message) - _KEYS[role] - {"at", "weight"}):
        found.add("W103", f"{at}.{key}", f"{at} has the key {key!r}, which a message of {role} does not have")
    calls = message.get("tool_calls") or message.get("function_call")
    content = message.get("content")
    if content is None:
        if role == "assistant" and (calls or isinstance(message.get("refusal"), str)):
            return
        if role != "function":
            found.add("E013", f"{at}.content", f"{at} ({role}) has no content")
    elif isinstance(content, list):
        _parts(content, at, role, found, images)
    elif not isinstance(content, str):
        found.add("E012", f"{at}.content", f"{at}.content is {type(content).__name__}, not a string")
    elif content.strip() and content != content.strip() and role == "assistant":
        found.add("W104", f"{at}.content", f"{at} begins or ends with white space, which is trained as it is")


def _parts(content: list, at: str, role: str, found: Findings, images: Images | None) -> None:
    if not content:
        found.add("E013", f"{at}.content", f"{at}.content is an empty list")
    refusals = 0
    for i, part in enumerate(content):
        here = f"{at}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            continue
        if kind == "refusal" and role == "assistant" and isinstance(part.get("refusal"), str):
            refusals += 1
        elif kind == "image_url":
            _image(part, here, role, found, images)
        else:
            found.add("E012", here, f"{here} is a part of type {kind!r}")
    if refusals and len(content) > 1:
        found.add("E012", f"{at}.content", f"{at}: a refusal is the only part of its content")


def _image(part: dict, here: str, role: str, found: Findings, images: Images | None) -> None:
    if role != "user":
        found.add("E030", here, f"{here} is an image in a message of {role}")
        return
    if images is None:
        found.add("E032", here, f"{here} is an image, and none is taken here", "leave rows with images out")
        return
    shown = part.get("image_url")
    url = shown.get("url") if isinstance(shown, dict) else None
    if not isinstance(url, str):
        found.add("E031", here, f"{here}.image_url has no url")
        return
    if isinstance(shown, dict) and shown.get("detail", "auto") not in ("low", "high", "auto"):
        found.add("E031", f"{here}.image_url.detail", f"detail is {shown['detail']!r}, not low, high or auto")
    data = re.match(r"data:image/(\w+);base64,", url)
    if data:
        if data[1].lower() not in images.kinds:
            found.add("E031", here, f"{here} is {data[1]}; taken are {', '.join(images.kinds)}")
        size = (len(url) - data.end()) * 3 // 4
        if size > images.bytes:
            found.add("E032", here, f"{here} has {size / MB:.1f} MB, more than {images.bytes / MB:.0f}")
    elif not (images.links and url.startswith("https://")):
        wanted = "an https or a data URL" if images.links else "a data URL (base64)"
        found.add("E031", here, f"{here}.image_url.url is {url[:40]!r}, not {wanted}")


def _image_count(messages: list[dict], found: Findings, most: int) -> int:
    count = sum(
        isinstance(part, dict) and part.get("type") == "image_url"
        for m in messages
        if isinstance(m.get("content"), list)
        for part in m["content"]
    )
    if count > most:
        found.add("E032", "messages", f"{count} images, and at most {most} are taken")
    return count


def _weights(messages: list[dict], found: Findings, roles: Sequence[str] = ("assistant",)) -> None:
    for message in messages:
        if "weight" not in message or message["weight"] is None:
            continue
        at, weight = f"{message['at']}.weight", message["weight"]
        if message.get("role") not in roles:
            found.add("E017", at, f"{message['at']} is the {message.get('role')}'s and has a weight")
        if isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
            found.add("E016", at, f"weight is {weight!r}; it has to be the number 0 or 1")


def _answers(messages: list[dict], found: Findings) -> None:
    answers = [m for m in messages if m.get("role") == "assistant"]
    if not messages or found.error is not None:
        return
    if not answers:
        found.add("E014", "messages", "no assistant message, so there is nothing to train on")
    elif all(m.get("weight") == 0 for m in answers):
        found.add("E018", "messages", "every assistant message has the weight 0: nothing is trained")


def _unusual(messages: list[dict], found: Findings) -> None:
    """What is allowed and often a mistake."""
    if messages and messages[0].get("role") not in ("system", "developer"):
        found.add("W101", "messages", "no system message")
    for before, message in zip(messages, messages[1:], strict=False):
        images = isinstance(before.get("content"), list) or isinstance(message.get("content"), list)
        if message.get("role") == before.get("role") in ("user", "assistant") and not images:
            found.add("W102", message["at"], f"{message['at']} is the {message['role']}'s as the one before")


# ── tools ─────────────────────────────────────────────────────────────────────────────────────────


def _tools(values: dict[str, Any], found: Findings, path: str = "", strict: bool = False) -> set[str] | None:
    """The names of the row's tools, None where it has none; `strict` wants descriptions and parameters."""
    names: set[str] = set()
    given = [k for k in ("tools", "functions", "available_tools") if values.get(k) is not None]
    if not given:
        return None
    key = given[0]
    tools, at = values[key], f"{path}{key}"
    if not isinstance(tools, list) or not (key == "tools" or 1 <= len(tools) <= 128):
        found.add("E020", at, f"{at} has to be a list" + (" of 1 to 128" if key == "functions" else ""))
        return None
    for i, tool in enumerate(tools):
        here = f"{at}[{i}]"
        if key == "tools" and isinstance(tool, dict) and tool.get("type") != "function":
            found.add("E020", f"{here}.type", f"{here}.type is {tool.get('type')!r}, not 'function'")
        function = tool.get("function") if isinstance(tool, dict) and key != "functions" else tool
        if not isinstance(function, dict):
            found.add("E020", here, f"{here} has to be {{type: function, function: {{name, …}}}}")
            continue
        here = f"{here}.function" if key != "functions" else here
        name = function.get("name")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            found.add("E021", f"{here}.name", f"{here}.name is {name!r}, not 1 to 64 of A-Z a-z 0-9 _ -")
        else:
            names.add(name)
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict) or strict and parameters is None:
            found.add("E020", f"{here}.parameters", f"{here}.parameters has to be a JSON schema, an object")
        elif isinstance(parameters, dict):
            _schema(parameters, f"{here}.parameters", found)
        if strict and not isinstance(function.get("description"), str):
            found.add("E020", f"{here}.description", f"{here} has no description")
        if not isinstance(function.get("strict", False), bool | None):
            found.add("E020", f"{here}.strict", f"{here}.strict has to be true or false")
    return names


def _schema(schema: dict, at: str, found: Findings) -> None:
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as e:
        found.add("E020", at, f"{at} is no JSON schema: {e.message}"[:200])


def _calls(
    messages: list[dict],
    found: Findings,
    names: set[str] | None,
    as_text: bool = True,
    id_form: re.Pattern | None = None,
    ids: bool = True,
) -> None:
    """Calls of tools and their answers. `as_text`: arguments are JSON text, else objects; `ids`: each call
    has an id and each answer its call's."""
    seen: set[str] = set()
    open_calls: dict[str, str] = {}  # id -> place
    last = len(messages) - 1
    for i, message in enumerate(messages):
        role, at = message.get("role"), message["at"]
        if open_calls and role in ("user", "assistant", "system"):
            for place in open_calls.values():
                found.add("E024", place, f"{place} is not answered before {at}")
            open_calls.clear()
        if role == "tool" and ids:
            id = message.get("tool_call_id")
            if not isinstance(id, str):
                found.add("E023", f"{at}.tool_call_id", f"{at} has no tool_call_id")
            elif id not in seen:
                found.add("E023", f"{at}.tool_call_id", f"{at} answers {id!r}, which no call before has")
            else:
                open_calls.pop(id, None)
        calls = message.get("tool_calls")
        if isinstance(message.get("function_call"), dict):
            _function(message["function_call"], f"{at}.function_call", found, names, as_text)
        if calls is None:
            continue
        if role != "assistant" or not isinstance(calls, list) or not calls:
            found.add("E007", f"{at}.tool_calls", f"{at}.tool_calls has to be an assistant's list of calls")
            continue
        for j, call in enumerate(calls):
            here = f"{at}.tool_calls[{j}]"
            if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
                found.add("E007", here, f"{here} has to be {{id, type, function: {{name, arguments}}}}")
                continue
            _function(call["function"], f"{here}.function", found, names, as_text)
            id = call.get("id")
            if not ids and id is None:
                continue
            if as_text and call.get("type") != "function":
                found.add("E007", f"{here}.type", f"{here}.type is {call.get('type')!r}, not 'function'")
            if not isinstance(id, str) or not id:
                found.add("E025", f"{here}.id", f"{here} has no id")
            elif id in seen:
                found.add("E025", f"{here}.id", f"{here} has the id {id!r} of an earlier call")
            elif id_form and not id_form.fullmatch(id):
                found.add("E025", f"{here}.id", f"{here} has the id {id!r}, not nine letters and digits")
            if isinstance(id, str) and id:
                seen.add(id)
                if i != last and ids:
                    open_calls[id] = here
    for place in open_calls.values():
        found.add("E024", place, f"{place} is never answered")


def _function(function: dict, at: str, found: Findings, names: set[str] | None, as_text: bool) -> None:
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        found.add("E021", f"{at}.name", f"{at}.name is {name!r}")
    elif names is not None and name not in names:
        found.add(
            "E021", f"{at}.name", f"{at} calls {name!r}; tools has {', '.join(sorted(names)) or 'none'}"
        )
    at = f"{at}.arguments"
    if not as_text:
        if not isinstance(arguments, dict | None):
            text = f"{at} is a {type(arguments).__name__}; templates take an object"
            found.add("E022", at, text, "write it as an object (ftjax data convert does)")
        return
    if not isinstance(arguments, str):
        text = f"{at} is a {type(arguments).__name__}, not the text of a JSON object"
        found.add("E022", at, text, "write it as JSON text (ftjax data convert does)")
        return
    try:
        inner = loads(arguments)
    except json.JSONDecodeError as e:
        found.add("E022", at, f"{at} is no JSON: {e.msg} at column {e.colno}")
        return
    if isinstance(inner, str):
        found.add("E022", at, f"{at} is JSON within JSON: it was encoded twice")
    elif not isinstance(inner, dict):
        found.add("E022", at, f"{at} is JSON, but no object")


# ── OpenAI and those who take its rows ────────────────────────────────────────────────────────────

_OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OPENAI_IMAGES = Images(10, links=True)
_AZURE_IMAGES = Images(64, links=True)


def _extra(values: dict[str, Any], known: set[str], found: Findings, path: str = "") -> None:
    for key in sorted(map(str, set(values) - known)):
        found.add("W103", f"{path}{key}", f"the key {path}{key} is not of the format")


def _openai(
    values: dict[str, Any], found: Findings, images: Images = _OPENAI_IMAGES, roles=_OPENAI_ROLES
) -> None:
    _extra(values, {"messages", "tools", "parallel_tool_calls", "functions"}, found)
    messages = _list_of_messages(values, found, "messages")
    for message in messages:
        _openai_message(message, found, roles, images)
    _weights(messages, found)
    _calls(messages, found, _tools(values, found))
    _answers(messages, found)
    _image_count(messages, found, images.count)
    _parallel(values, found)
    _unusual(messages, found)


def _parallel(values: dict[str, Any], found: Findings, path: str = "") -> None:
    at = f"{path}parallel_tool_calls"
    if not isinstance(values.get("parallel_tool_calls"), bool | None):
        found.add("E007", at, f"{at} has to be true or false")


def _openai_preference(values: dict[str, Any], found: Findings, several: bool = False) -> None:
    outputs = ("preferred_output", "non_preferred_output")
    older = ("preferred_completion", "non_preferred_completion")
    names = older if not set(outputs) & set(values) and set(older) & set(values) else outputs
    if names is older:
        text = "preferred_completion is the name of an earlier schema"
        found.add("W103", "preferred_completion", text, "call them preferred_output and non_preferred_output")
    _extra(values, {"input", *names}, found)
    given = values.get("input")
    if not isinstance(given, dict):
        found.add("E040", "input", "input has to be {messages: [...]}")
        given = {"messages": None}
    _extra(given, {"messages", "tools", "parallel_tool_calls"}, found, "input.")
    messages = _list_of_messages(given, found, "input.messages")
    names_ = _tools(given, found, "input.")
    for message in messages:
        _openai_message(message, found, _OPENAI_ROLES, None)
    _calls(messages, found, names_)
    _parallel(given, found, "input.")
    if messages and messages[-1].get("role") == "assistant":
        found.add("E042", messages[-1]["at"], "the prompt ends with an assistant's message")
    for name in names:
        answers = _list_of_messages(values, found, name)
        for message in answers:
            _openai_message(message, found, ("assistant", "tool") if several else ("assistant",), None)
        _calls([*messages, *answers], found, names_)
        if not several and len(answers) > 1:
            found.add("E040", name, f"{name} has {len(answers)} messages, and takes one of the assistant")
        elif several and answers and not any(m.get("role") == "assistant" for m in answers):
            found.add("E040", name, f"{name} has no assistant message")
    if values.get(names[0]) == values.get(names[1]) and values.get(names[0]) is not None:
        found.add("E041", names[1], "both outputs are the same")


def _openai_rft(values: dict[str, Any], found: Findings) -> None:
    messages = _list_of_messages(values, found, "messages")
    for message in messages:
        _openai_message(message, found, _OPENAI_ROLES, _OPENAI_IMAGES)
    _calls(messages, found, _tools(values, found))
    if messages and messages[-1].get("role") != "user":
        found.add("E042", messages[-1]["at"], f"a prompt ends with the user, not {messages[-1].get('role')}")
    if not set(values) - {"messages", "tools", "parallel_tool_calls"}:
        text = "no key beside messages: the grader has nothing to compare with"
        found.add("W121", "", text)


def _azure(values: dict[str, Any], found: Findings) -> None:
    if "input" in values:
        _openai_preference(values, found, several=True)
    else:
        _openai(values, found, _AZURE_IMAGES)


def _fireworks(values: dict[str, Any], found: Findings) -> None:
    weight = values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        found.add("E016", "weight", f"weight is {weight!r}; it has to be a number")
    values = {k: v for k, v in values.items() if k != "weight"}
    if "input" in values:
        _openai_preference(values, found)
        return
    _openai(values, found, Images(10, ("png", "jpg", "jpeg")))
    messages = values.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if i and isinstance(message, dict) and message.get("role") in ("system", "developer"):
            at = f"messages[{i}]"
            found.add("E026", at, f"{at} is the system's, which may only be the first")


_TOGETHER = ({"text"}, {"messages"}, {"prompt", "completion"})


def _together(values: dict[str, Any], found: Findings) -> None:
    keys = set(values)
    if "input" in keys:
        _extra_error(keys, {"input", "preferred_output", "non_preferred_output"}, found)
        _openai_preference(values, found)
        return
    family = next((f for f in _TOGETHER if f <= keys), None)
    if family is None:
        text = f"keys are {', '.join(map(str, values))}; text, messages, or prompt and completion are taken"
        found.add("E007", "", text)
        return
    _extra_error(keys, family | ({"tools"} if "messages" in family else set()), found)
    if "messages" not in family:
        for key in family:
            _string(values, key, found)
        return
    messages = _list_of_messages(values, found, "messages")
    for message in messages:
        _openai_message(message, found, ("system", "user", "assistant"), Images(10, ("jpeg", "png", "webp")))
    for before, message in zip(messages, messages[1:], strict=False):
        role = message.get("role")
        if role == before.get("role"):
            at = message["at"]
            found.add("E026", at, f"{at} is the {role}'s as the one before; roles have to change")
    _weights(messages, found, ("system", "user", "assistant"))
    kinds = {type(m["content"]) for m in messages if m.get("content") is not None}
    if len(kinds) > 1:
        found.add("E012", "messages", "some contents are strings and some lists; all have to be the same")
    for message in messages:
        parts = message.get("content")
        shown = isinstance(parts, list) and any(
            isinstance(p, dict) and p.get("type") == "image_url" for p in parts
        )
        if shown and message.get("weight"):
            found.add("E016", f"{message['at']}.weight", "a message with an image has a weight of 0 or none")
    _tools(values, found)
    _answers(messages, found)
    _image_count(messages, found, 10)
    if messages and messages[0].get("role") != "system":
        found.add("W101", "messages", "no system message")


def _extra_error(keys: set, known: set[str], found: Findings) -> None:
    for key in sorted(map(str, keys - known)):
        found.add("E007", key, f"the key {key} is refused: no other keys are taken", "leave the key out")


# ── Mistral ───────────────────────────────────────────────────────────────────────────────────────


def _mistral(values: dict[str, Any], found: Findings) -> None:
    text = [k for k in ("text", "content") if isinstance(values.get(k), str)]
    names = [k for k in ("messages", "interactions") if k in values]
    if text and not names:
        if len(text) > 1:
            found.add("E007", "content", "text or content, not both")
        _extra(values, {"text", "content"}, found)
        return
    if len(names) != 1:
        found.add("E010", "messages", "a row has messages or interactions, one of them")
        return
    known = {"messages", "interactions", "tools", "available_tools"}
    _extra(values, known, found)
    if values.get("tools") is not None and values.get("available_tools") is not None:
        found.add("E020", "available_tools", "tools or available_tools, not both")
    messages = _list_of_messages(values, found, names[0])
    for message in messages:
        _mistral_message(message, found)
    tools = _tools(values, found, strict=True)
    _calls(messages, found, tools, id_form=CALL_ID)
    _weights(messages, found)
    _answers(messages, found)
    roles = [str(m.get("role")) for m in messages]
    if found.error is None:
        wrong = turn_error(roles)
        if wrong:
            at = messages[wrong[0]]["at"]
            found.add("E026", at, f"{at}: {wrong[1]}")
        if roles.count("system") > 1:
            found.add("E026", names[0], "several system messages, and there may be one")
        if roles[-1] != "assistant":
            found.add(
                "E015", messages[-1]["at"], f"the last message is the {roles[-1]}'s, not the assistant's"
            )
    answers = [m for m in messages if m.get("role") == "assistant"]
    if tools and any(m.get("weight", 1) for m in answers[:-1]):
        text_ = "with tools only the last answer is trained; this row has answers before it"
        found.add("W114", names[0], text_, "make a row of each answer, or know that the others are context")
    if messages and roles[0] != "system":
        found.add("W101", names[0], "no system message")


def _mistral_message(message: dict, found: Findings) -> None:
    at, role = message["at"], message.get("role")
    roles = ("user", "assistant", "system", "tool")
    if role not in roles:
        found.add("E011", f"{at}.role", f"{at} has the role {role!r}; roles are {', '.join(roles)}")
        return
    if message.get("content") is not None and message.get("text") is not None:
        found.add("E012", f"{at}.text", f"{at} has content and text, and takes one of them")
    content = message.get("content", message.get("text"))
    if message.get("tool_calls") and content:
        found.add("E012", f"{at}.content", f"{at} has content and tool_calls, and takes one of them")
    if content is None and not message.get("tool_calls"):
        found.add("E013", f"{at}.content", f"{at} ({role}) has no content")
    elif isinstance(content, list):
        _parts(content, at, role, found, None)
    elif content is not None and not isinstance(content, str):
        found.add("E012", f"{at}.content", f"{at}.content is {type(content).__name__}, not a string")
    elif role == "assistant" and content is not None and not content.strip():
        found.add("E013", f"{at}.content", f"{at} is an empty answer")


# ── TRL ───────────────────────────────────────────────────────────────────────────────────────────


def _string(values: dict[str, Any], key: str, found: Findings, path: str = "") -> None:
    at = path or key
    value = values.get(key)
    if not isinstance(value, str):
        found.add("E012", at, f"{at} has to be a string, not {type(value).__name__}")
    elif not value.strip():
        found.add("E013", at, f"{at} is empty")


def _text(values: dict[str, Any], found: Findings) -> None:
    _string(values, "text", found)


def _turns(values: dict[str, Any], key: str, found: Findings, tools: set[str] | None) -> list[dict]:
    """Messages as templates take them."""
    messages = _list_of_messages(values, found, key)
    for message in messages:
        at, role, content = message["at"], message.get("role"), message.get("content")
        if not isinstance(role, str):
            found.add("E011", f"{at}.role", f"{at} has the role {role!r}")
        if isinstance(content, list):
            _parts(content, at, str(role), found, Images(1000, links=True))
        elif content is not None and not isinstance(content, str):
            found.add("E012", f"{at}.content", f"{at}.content is {type(content).__name__}, not a string")
        elif not content and not message.get("tool_calls"):
            found.add("E013", f"{at}.content", f"{at} ({role}) has no content")
        if message.get("weight", 1) != 1:
            text = f"{at} has the weight {message['weight']!r}, which TRL does not know (ftjax does)"
            found.add("W114", f"{at}.weight", text)
    _calls(messages, found, tools, as_text=False, ids=False)
    return messages


def _chat(values: dict[str, Any], found: Findings) -> None:
    messages = _turns(values, "messages", found, _tools_of_templates(values, found))
    _answers(messages, found)
    _unusual(messages, found)


def _tools_of_templates(values: dict[str, Any], found: Findings) -> set[str] | None:
    tools = values.get("tools")
    if isinstance(tools, str):  # datasets older than 4.7 hold them as JSON
        try:
            tools = loads(tools)
        except json.JSONDecodeError as e:
            found.add("E020", "tools", f"tools is broken JSON: {e.msg}")
            return None
    return _tools({"tools": tools}, found) if tools is not None else None


def _sides(values: dict[str, Any], keys: Sequence[str], found: Findings) -> dict[str, list[dict]] | None:
    """The messages of each key where all are lists; None where all are strings."""
    kinds = {key: type(values.get(key)) for key in keys}
    if set(kinds.values()) == {str}:
        for key in keys:
            _string(values, key, found)
        return None
    if set(kinds.values()) != {list}:
        said = ", ".join(f"{k} is {t.__name__}" for k, t in kinds.items())
        found.add("E007", keys[0], f"all have to be strings or all lists of messages: {said}")
        return None
    tools = _tools_of_templates(values, found)
    return {key: _turns(values, key, found, tools) for key in keys}


def _begins_with_assistant(messages: list[dict], found: Findings) -> None:
    if messages and messages[0].get("role") != "assistant":
        at = messages[0]["at"]
        found.add("E026", at, f"{at} is the {messages[0].get('role')}'s; an answer begins with the assistant")


def _ends_with_assistant(messages: list[dict], found: Findings) -> None:
    if messages and messages[-1].get("role") == "assistant":
        found.add("E042", messages[-1]["at"], "the prompt ends with an assistant's message")


def _prompt_only(values: dict[str, Any], found: Findings) -> None:
    sides = _sides(values, ("prompt",), found)
    if sides:
        _ends_with_assistant(sides["prompt"], found)


def _prompt_completion(values: dict[str, Any], found: Findings) -> None:
    if "completion" not in values and "response" in values:
        found.add("W103", "response", "response is no key of TRL", "call it completion")
        values = {**values, "completion": values["response"]}
    sides = _sides(values, ("prompt", "completion"), found)
    if sides:
        _begins_with_assistant(sides["completion"], found)
    elif found.error is None:
        prompt, completion = values["prompt"], values["completion"]
        if not (prompt[-1:].isspace() or completion[:1].isspace()):
            text = f"nothing between prompt and completion: {prompt[-12:]!r} + {completion[:12]!r}"
            found.add("W119", "completion", text)


def _preference(values: dict[str, Any], found: Findings) -> None:
    keys = ("chosen", "rejected")
    sides = _sides(values, ("prompt", *keys) if values.get("prompt") is not None else keys, found)
    if values.get("chosen") == values.get("rejected"):
        found.add("E041", "rejected", "chosen and rejected are the same")
    if sides and "prompt" in sides:
        _ends_with_assistant(sides["prompt"], found)
        for key in keys:
            _begins_with_assistant(sides[key], found)
    elif sides:
        for key in keys:
            if not any(m.get("role") == "assistant" for m in sides[key]):
                found.add("E040", key, f"{key} has no answer")
    elif values.get("prompt") is None and found.error is None:
        found.add("W122", "prompt", "no prompt, and strings: both are trained whole")


def _unpaired(values: dict[str, Any], found: Findings) -> None:
    if not isinstance(values.get("label"), bool):
        found.add("E050", "label", f"label is {values.get('label')!r}; it has to be true or false")
    if "messages" in values and "prompt" not in values:
        found.add("E007", "messages", "TRL wants prompt and completion", "ftjax data convert --to unpaired")
        return
    _prompt_completion(values, found)


def _stepwise(values: dict[str, Any], found: Findings) -> None:
    _string(values, "prompt", found)
    steps, labels = values.get("completions"), values.get("labels")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        found.add("E007", "completions", "completions has to be a list of strings that is not empty")
    if not isinstance(labels, list) or not all(isinstance(x, bool) for x in labels):
        found.add("E050", "labels", "labels has to be a list of true and false")
    elif isinstance(steps, list) and len(steps) != len(labels):
        found.add("E050", "labels", f"{len(steps)} completions have {len(labels)} labels")


# ── what only reading checks ──────────────────────────────────────────────────────────────────────


def _ftjax(values: dict[str, Any], found: Findings) -> None:
    record = formats.read(values, "ftjax", found)
    if record is not None and record.task in ("sft", "unpaired"):
        if not any(is_trained(m) for m in record.messages):
            found.add("E018", "messages", "every assistant message has the weight 0: nothing is trained")
        messages = [{**m, "at": f"messages[{i}]"} for i, m in enumerate(record.messages)]
        ids = [call.get("id") for m in messages for call in m.get("tool_calls") or ()]
        ids += [m.get("tool_call_id") for m in messages if m["role"] == "tool"]
        _calls(messages, found, _tools_of_templates(values, found), as_text=False, ids=all(ids))
    if record is not None and record.weight == 0:
        found.add("E018", "sample_weight", "the example has the weight 0: nothing is trained")


def _sharegpt(values: dict[str, Any], found: Findings) -> None:
    """LLaMA-Factory's rule: after a system turn, odd turns are asked and even ones answered."""
    formats.read(values, "sharegpt", found)
    turns = values.get("conversations", values.get("conversation"))
    if found.error is not None or not isinstance(turns, list):
        return
    asked = ("human", "user", "observation", "tool", "function_response")
    who = [t.get("from", t.get("role")) for t in turns]
    who = who[1:] if who and who[0] == "system" else who
    for i, one in enumerate(who):
        if (one in asked) != (i % 2 == 0):
            text = f"turn {i + 1} (after a system turn) is {one}'s, and LLaMA-Factory leaves such rows out"
            found.add("E026", "conversations", text, "ask and answer by turns")
            return
    paired = "chosen" in values and "rejected" in values
    if len(who) % 2 != paired:
        end = "what is asked" if paired else "an answer"
        found.add("E026", "conversations", f"{len(who)} turns: it has to end with {end}")


def _by_reading(format: str, values: dict[str, Any], found: Findings) -> None:
    formats.read(values, format, found)


# ── targets ───────────────────────────────────────────────────────────────────────────────────────

_CHATS = ("chat", "openai")
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("ftjax", ("ftjax",), _ftjax),
        Target("openai", _CHATS, _openai, 10, None, 512 * MB, 65_536),
        Target("openai_preference", ("openai_preference",), _openai_preference, 10, None, 512 * MB, 65_536),
        Target("openai_rft", ("openai_rft",), _openai_rft, 10, None, 512 * MB, 65_536),
        Target("azure", (*_CHATS, "azure", "openai_preference"), _azure, 10, None, 512 * MB, 65_536),
        Target(
            "together",
            (*_CHATS, "together", "text", "prompt_completion", "openai_preference"),
            _together,
            most_bytes=50_100 * MB,
        ),
        Target("fireworks", (*_CHATS, "fireworks", "openai_preference"), _fireworks, 3, 3_000_000),
        Target("mistral", (*_CHATS, "mistral"), _mistral, most_bytes=512 * MB),
        Target("text", ("text",), _text),
        Target("chat", _CHATS, _chat),
        Target("prompt_only", ("prompt_only",), _prompt_only),
        Target("prompt_completion", ("prompt_completion",), _prompt_completion),
        Target("preference", ("preference",), _preference),
        Target("unpaired", ("unpaired",), _unpaired),
        Target("stepwise", ("stepwise",), _stepwise),
        Target("sharegpt", ("sharegpt",), _sharegpt),
        Target("alpaca", ("alpaca",), partial(_by_reading, "alpaca")),
        Target("hh", ("hh",), partial(_by_reading, "hh")),
        Target("qa", ("qa",), partial(_by_reading, "qa")),
    )
}
"""By the name of the format that they take."""


def target_named(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(f"target: there is no {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name]


def validate(record: Record, target: Target) -> tuple[list[Verdict], list[dict[str, Any]]]:
    """What the target has against the record, or finds unusual, and the rows that were checked."""
    found = Findings(record.meta.get("source", ""), record.meta.get("line", 0))
    if record.given is not None and record.given[0] in target.shapes:
        target.check(record.given[1], found)
        return list(found), [record.given[1]]
    written = formats.writer(target.name)(record)
    if written.refused:
        found.add(written.refused[0], "", written.refused[1])
    for row in written.rows:
        target.check(row, found)
    return list(found), written.rows
