"""Reading and writing the files of a run folder."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


def plain(value: Any) -> Any:
    """JSON's types: numbers that are not finite are None, arrays of one number are numbers, all else is
    text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    try:
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, bool | int | str):
            return number
        return float(number) if math.isfinite(number) else None
    except (TypeError, ValueError):
        return str(value)


def beside(name: str) -> str:
    """The name under which a file is written before it takes its own."""
    return f".{name}.tmp"


def write_text(path: pathlib.Path, text: str) -> None:
    """Beside it first, then renamed: nobody ever reads half a file."""
    new = path.with_name(beside(path.name))
    new.write_text(text, "utf-8")
    os.replace(new, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """None where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None


def read_lines(path: pathlib.Path) -> list[dict]:
    """The objects of a .jsonl; a last line that was cut short by a kill is left out."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def write_lines(path: pathlib.Path, records: Iterable[Mapping]) -> None:
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
