"""What a reader makes of one file or page: clean Markdown, and where its headings and code are."""

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ftjax.data.record import Verdict


class Mark(NamedTuple):
    """A heading at an offset of the text; `title` None: the part under a heading of this level ends."""

    offset: int
    level: int
    title: str | None


class Fence(NamedTuple):
    """A fenced code block, text[start:end], with its opening line and what closes it."""

    start: int
    end: int
    opening: str
    closing: str


@dataclass
class Document:
    """Clean Markdown; `markdown=False` says that it is plain text, where # is no heading."""

    text: str
    title: str = ""
    marks: list[Mark] | None = None
    """Where a reader knows the headings better than their Markdown says; None: as the Markdown has them."""
    markdown: bool = True
    pages: list[int] = field(default_factory=list)
    """Offset at which each page begins, of formats that have pages."""
    meta: dict[str, Any] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def page(self, offset: int) -> int:
        return bisect_right(self.pages, offset)


class Unreadable(Exception):
    """A document that gives no text: code X…, and why."""

    def __init__(self, code: str, text: str, fix: str = ""):
        super().__init__(code, text, fix)  # all of them, so that it can be pickled
        self.code, self.text, self.fix = code, text, fix


_FENCE = re.compile(r"[ \t>]*((`{3,})[^`\n]*|(~{3,})[^\n]*)$")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_SETEXT = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_NO_PARAGRAPH = re.compile(r"\s*$|\s{0,3}([-*+>|]|\d+[.)])(\s|$)|\s{4}|\|")


def outline(text: str) -> tuple[list[Mark], list[Fence]]:
    """The headings (ATX and setext, CommonMark 0.31 §4.2 and §4.3) and the fenced code blocks (§4.5)."""
    marks: list[Mark] = []
    fences: list[Fence] = []
    opened: tuple[int, str, str] | None = None
    offset, before, before_offset = 0, "", 0
    for line in text.split("\n"):
        end = offset + len(line)
        if opened is not None:
            stripped = line.strip(" \t>")
            mark = opened[2]
            if stripped[:1] == mark[0] and len(stripped) >= len(mark) and not stripped.strip(mark[0]):
                fences.append(Fence(opened[0], end, opened[1], mark))
                opened, before = None, ""
        elif ("```" in line or "~~~" in line) and (found := _FENCE.match(line)):
            opened = (offset, line, found[2] or found[3])
        else:
            if line.lstrip(" ")[:1] == "#" and (found := _ATX.match(line)):
                marks.append(Mark(offset, len(found[1]), plain(found[2] or "")))
                before = ""
            elif line[:4].lstrip(" ")[:1] in ("=", "-") and before and _SETEXT.match(line):
                marks.append(Mark(before_offset, 1 if "=" in line else 2, plain(before)))
                before = ""
            else:
                before, before_offset = ("" if _NO_PARAGRAPH.match(line) else line), offset
        offset = end + 1
    if opened is not None:
        fences.append(Fence(opened[0], len(text), opened[1], opened[2]))
    return marks, fences


_CALL = re.compile(r"`([^`(]+)\(.{60,}`$")


def plain(heading: str) -> str:
    """A heading's text for a breadcrumb: no links, emphasis or backticks; a long signature cut short."""
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
    heading = re.sub(r"[ \t]*\{#[^}]*\}$", "", heading)
    if found := _CALL.match(heading):
        return f"{found[1]}(…)"
    heading = re.sub(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", r"\2", heading) if "`" not in heading else heading
    return re.sub(r"`+", "", heading).strip()
