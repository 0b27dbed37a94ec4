"""PDF by pypdf: text page by page, headings from the bookmarks, lines and hyphenated words put together."""

import io
import logging
import re
from collections import Counter
from typing import Any

from ftjax.data.extract.document import Document, Mark, Unreadable
from ftjax.errors import UserError


def read(data: bytes) -> Document:
    """The text with the offset of each page.

    Raises Unreadable: X001 damaged or encrypted, X007 only pictures.
    """
    try:
        import pypdf
    except ImportError:
        raise UserError("PDF is read by pypdf, which is not installed: pip install 'ftjax[data]'") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every oddity of a file
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("X001", "encrypted by a password", "save it without one")
        pages = [page.extract_text() or "" for page in reader.pages]
        bookmarks = list(_bookmarks(reader, reader.outline, 1))
        title = str((reader.metadata or {}).get("/Title") or "").strip()
    except Unreadable:
        raise
    except Exception as e:  # a damaged file can raise anything
        raise Unreadable("X001", f"no PDF that can be read: {type(e).__name__}: {e}") from None
    if sum(map(len, map(str.strip, pages))) < 20 * len(pages) and sum(map(len, pages)) < 1000:
        raise Unreadable("X007", f"{len(pages)} pages with no text in them: a scan, most likely")
    out: list[str] = []
    starts, marks, size = [], [], 0
    for number, lines in enumerate(_without_running_heads([page.split("\n") for page in pages])):
        text, found = _page(lines, [b for b in bookmarks if b[0] == number])
        starts.append(size)
        marks += [Mark(mark.offset + size, mark.level, mark.title) for mark in found]
        text = text + "\n\n" if text else ""
        out.append(text)
        size += len(text)
    return Document("".join(out).rstrip() + "\n", title, marks, pages=starts)


def _bookmarks(reader: Any, outline: Any, level: int) -> Any:
    """(page, level, title) of each bookmark, in order."""
    for item in outline:
        if isinstance(item, list):
            yield from _bookmarks(reader, item, level + 1)
            continue
        page = reader.get_destination_page_number(item)
        if page is not None and page >= 0 and (item.title or "").strip():
            yield page, level, " ".join(item.title.split())


def _without_running_heads(pages: list[list[str]]) -> list[list[str]]:
    """Without first and last lines that, but for numbers, more than half of the pages share."""
    pages = [[line.rstrip() for line in page if line.strip()] for page in pages]
    if len(pages) < 4:
        return pages
    for edge in (0, -1, 0, -1):
        seen = Counter(_shape(page[edge]) for page in pages if page)
        common = {shape for shape, count in seen.items() if count > len(pages) / 2}
        for page in pages:
            if page and _shape(page[edge]) in common:
                page.pop(edge)
    return pages


def _shape(line: str) -> str:
    return re.sub(r"\d+|\b[ivxl]+\b", "0", line.strip())


def _page(lines: list[str], bookmarks: list[tuple[int, int, str]]) -> tuple[str, list[Mark]]:
    """The page's text with a heading at each bookmark: where its title stands, else at the top."""
    titles: dict[int, list[tuple[int, str]]] = {}
    begin = 0
    for _, level, title in bookmarks:
        at = next((n for n in range(begin, len(lines)) if _same(lines[n], title)), None)
        titles.setdefault(begin if at is None else at, []).append((level, title))
        if at is not None:
            lines[at] = ""
            begin = at
    out, marks, size = [], [], 0

    def put(text: str) -> None:
        nonlocal size
        out.append(text)
        size += len(text) + 2

    paragraph: list[str] = []
    wide = max(map(len, lines), default=0) * 0.6
    for number, line in enumerate([*lines, ""]):
        if number in titles and paragraph:
            put("\n".join(paragraph))
            paragraph = []
        for level, title in titles.get(number, []):
            marks.append(Mark(size, level, title))
            put("#" * min(level, 6) + " " + title)
        if not line:
            continue
        above = paragraph[-1] if paragraph else ""
        if re.search(r"[^\W\d_]-$", above) and line[:1].islower():
            paragraph[-1] = above[:-1] + line
        elif above and len(above.rsplit("\n", 1)[-1]) > wide and (line[0].islower() or above[-1] in ",;"):
            paragraph[-1] = f"{above} {line}"
        else:
            paragraph.append(line)
    if paragraph:
        put("\n".join(paragraph))
    return "\n\n".join(out), marks


def _same(line: str, title: str) -> bool:
    """Whether a line is a title, perhaps numbered."""
    a, b = (re.sub(r"\W+|^[\d.\s]+", "", text).lower() for text in (line, title))
    return bool(b) and a == b
