"""Every text of a record, wherever in it: content, reasoning, tool calls' arguments, tools, plain text."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ftjax.data.record import Record

_NAMES = frozenset(("role", "id", "type", "tool_call_id", "url"))
"""Keys of messages, calls and parts whose values are names, not text (an image's url may be megabytes)."""


def rewritten(record: Record, change: Callable[[str, str], str]) -> Record:
    """The record with change(path, text) in place of each of its texts; the same object if none differs.

    Provenance (`meta`) is left as it is.
    """
    new = {}
    for name in ("messages", "tools", "chosen", "rejected", "text", "completions", "raw"):
        value = getattr(record, name)
        if value and (made := _rewritten(value, name, change)) is not value:
            new[name] = made
    return replace(record, **new) if new else record


def _rewritten(value: Any, path: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        made = change(path, value) if value else value
        return value if made == value else made
    if isinstance(value, dict):
        inside = path.endswith("arguments") or ".arguments." in path  # where any key may be text
        items = {
            k: v if k in _NAMES and not inside else _rewritten(v, f"{path}.{k}", change)
            for k, v in value.items()
        }
        return items if any(items[k] is not v for k, v in value.items()) else value
    if isinstance(value, list | tuple):
        made = [_rewritten(v, f"{path}[{i}]", change) for i, v in enumerate(value)]
        return type(value)(made) if any(a is not b for a, b in zip(made, value, strict=True)) else value
    return value
