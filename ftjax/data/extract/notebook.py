"""Jupyter notebooks: Markdown cells as they are, code cells as fenced code."""

import json
import re
from typing import Any

from ftjax.data.extract.document import Document, Unreadable
from ftjax.data.extract.text import read_markdown


def read(text: str, outputs: bool = False) -> Document:
    """The cells in order; `outputs` adds what code cells wrote as text. Raises Unreadable (X001)."""
    try:
        notebook = json.loads(text)
        cells = (
            notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        )  # before format 4
        info = notebook.get("metadata", {})
        language = (
            info.get("language_info", {}).get("name")
            or info.get("kernelspec", {}).get("language")
            or "python"
        )
        parts = [part for cell in cells for part in _cell(cell, language, outputs)]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise Unreadable("X001", f"not a notebook: {type(e).__name__}: {e}") from None
    return read_markdown("\n\n".join(part.strip("\n") for part in parts if part.strip()))


def _cell(cell: dict[str, Any], language: str, outputs: bool) -> list[str]:
    kind = cell["cell_type"]
    source = _text(cell.get("source", cell.get("input", "")))
    if kind == "heading":  # before format 4
        return ["#" * int(cell.get("level", 1)) + " " + source]
    if kind != "code":
        return [source]
    parts = [_fenced(source, language)] if source.strip() else []
    for output in cell.get("outputs", []) if outputs else []:
        said = output.get("text") or output.get("data", {}).get("text/plain") or ""
        said = _text(said) if output.get("output_type") != "error" else "\n".join(output.get("traceback", []))
        said = re.sub(r"\x1b\[[0-9;]*m", "", said)  # colours of a terminal
        if said.strip():
            parts.append(_fenced(said, ""))
    return parts


def _text(source: Any) -> str:
    return source if isinstance(source, str) else "".join(source)


def _fenced(code: str, language: str) -> str:
    fence = "`" * (max(map(len, re.findall(r"`{3,}", code)), default=2) + 1)
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"
