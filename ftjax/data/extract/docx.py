"""Word documents (.docx): headings, lists, tables, code by its style or font, footnotes.

Read from the XML itself (ECMA-376 part 1, §17), by the standard library: python-docx would bring lxml and
reads no lists' numbering, footnotes or code either.
"""

import io
import re
import zipfile
from typing import Any
from xml.etree import ElementTree

from ftjax.data.extract.document import Document, Unreadable
from ftjax.data.extract.writer import Writer

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_SKIPPED = {
    _W + "del",
    _W + "instrText",
    "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",
}
_CODE_STYLE = re.compile(r"code|source|preformatted|verbatim|listing|macro", re.I)
_MONOSPACED = re.compile(r"consol|courier|menlo|monaco|mono|source code|fira code|jetbrains", re.I)
MAX_XML = 200_000_000
"""Bytes of XML in one document; a file that unpacks to more is refused."""


def read(data: bytes) -> Document:
    """The document's body as Markdown. Raises Unreadable (X001)."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            body = _xml(archive, "word/document.xml")
            styles, numbering, notes = (
                _xml(archive, f"word/{n}.xml") for n in ("styles", "numbering", "footnotes")
            )
            core = _xml(archive, "docProps/core.xml")
    except (zipfile.BadZipFile, ElementTree.ParseError, OSError, RuntimeError, NotImplementedError) as e:
        raise Unreadable("X001", f"no Word document that can be read: {e}") from None
    if body is None or (body := body.find(_W + "body")) is None:
        raise Unreadable("X001", "a zip file without word/document.xml: no Word document")
    reader = _Reader(styles, numbering)
    reader.blocks(body)
    reader.flush()
    for note in notes.iter(_W + "footnote") if notes is not None else ():
        if note.get(_W + "type") is None:
            reader.put(f"[{note.get(_W + 'id')}] " + " ".join(map(reader.words, note.iter(_W + "p"))).strip())
    title = core.findtext("{http://purl.org/dc/elements/1.1/}title") if core is not None else None
    return reader.document((title or "").strip())


def _xml(archive: zipfile.ZipFile, name: str) -> Any:
    if name not in archive.namelist():
        return None
    if archive.getinfo(name).file_size > MAX_XML:
        raise Unreadable("X009", f"{name} unpacks to more than {MAX_XML / 1e6:.0f} MB")
    return ElementTree.fromstring(archive.read(name))


def _value(node: Any, path: str) -> str | None:
    found = node.find("/".join(_W + name for name in path.split("/"))) if node is not None else None
    return found.get(_W + "val") if found is not None else None


class _Reader(Writer):
    def __init__(self, styles: Any, numbering: Any):
        super().__init__()
        known = styles.iter(_W + "style") if styles is not None else ()
        self.styles = {style.get(_W + "styleId"): style for style in known}
        self.numbering = numbering
        self.numbers: dict[tuple[str, int], int] = {}
        self.code: list[str] = []
        self.titled = 0
        """1 under a title, which is above headings of level 1."""

    def blocks(self, parent: Any) -> None:
        for node in parent:
            if node.tag == _W + "p":
                self.paragraph(node)
            elif node.tag == _W + "tbl":
                self.flush()
                rows = [list(map(self.cell, row.findall(_W + "tc"))) for row in node.findall(_W + "tr")]
                if any(any(row) for row in rows):
                    self.put_table([row for row in rows if row])
            elif node.tag in (_W + "sdt", _W + "sdtContent", _W + "ins"):
                self.blocks(node)

    def paragraph(self, node: Any) -> None:
        style = self.styles.get(_value(node, "pPr/pStyle"))
        name = (_value(style, "name") or _value(node, "pPr/pStyle") or "").lower()
        if _CODE_STYLE.search(name) or self._monospaced(node):
            self.code.append(self.words(node, marked=False))
            return
        self.flush()
        text = self.words(node).strip()
        outline = _value(node, "pPr/outlineLvl") or _value(style, "pPr/outlineLvl")
        number = _value(node, "pPr/numPr/numId") or _value(style, "pPr/numPr/numId")
        if not text:
            return
        if name == "title":
            self.heading(1, text.strip("*"))
            self.titled = 1
        elif name.startswith("heading ") or (outline and int(outline) < 6):
            level = int(name[8]) if name[8:9].isdigit() else int(outline or 0) + 1
            self.heading(level + self.titled, text.strip("*"))
        elif number and number != "0":
            depth = int(_value(node, "pPr/numPr/ilvl") or _value(style, "pPr/numPr/ilvl") or 0)
            self.tight = (number, depth) in self.numbers or depth > 0
            self.bullet = "  " * depth + self._sign(number, depth)
            self.put(text)
            self.tight = False
        else:
            self.numbers = {key: value for key, value in self.numbers.items() if key[1] == 0}
            self.put(text)

    def cell(self, node: Any) -> str:
        return " ".join(map(self.words, node.iter(_W + "p"))).strip()

    def words(self, node: Any, marked: bool = True) -> str:
        """The paragraph's text; bold and italic runs `marked`."""
        out: list[str] = []
        for run in _runs(node):
            text = "".join(_characters(run))
            bold, italic = (run.find(f"{_W}rPr/{_W}{name}") for name in "bi")
            sign = "**" * _is_on(bold) + "*" * _is_on(italic) if marked and text.strip() else ""
            core = text.strip()
            out.append(text.replace(core, sign + core + sign[::-1], 1) if sign else text)
        return re.sub(r"(?<=\S)(\*{1,3})\1(?=\S)", "", "".join(out))  # two runs of one bold word

    def flush(self) -> None:
        """The code paragraphs so far, as one block."""
        code = "\n".join(self.code).strip("\n").rstrip()
        self.code = []
        if code:
            self.put_code(code)

    def _monospaced(self, node: Any) -> bool:
        runs = [run for run in _runs(node) if "".join(_characters(run)).strip()]
        fonts = [run.find(f"{_W}rPr/{_W}rFonts") for run in runs]
        named = [f.get(_W + "ascii") or "" for f in fonts if f is not None]
        return bool(runs) and len(named) == len(runs) and all(map(_MONOSPACED.search, named))

    def _sign(self, number: str, depth: int) -> str:
        kind = None
        if self.numbering is not None:
            of = {n.get(_W + "numId"): _value(n, "abstractNumId") for n in self.numbering.iter(_W + "num")}
            for abstract in self.numbering.iter(_W + "abstractNum"):
                if abstract.get(_W + "abstractNumId") == of.get(number):
                    for level in abstract.iter(_W + "lvl"):
                        if level.get(_W + "ilvl") == str(depth):
                            kind = _value(level, "numFmt")
        self.numbers = {key: value for key, value in self.numbers.items() if key[1] <= depth}
        self.numbers[number, depth] = self.numbers.get((number, depth), 0) + 1
        return "- " if kind in (None, "bullet", "none") else f"{self.numbers[number, depth]}. "


def _runs(node: Any) -> Any:
    """The runs of text in reading order, also those of links and of text that was inserted."""
    for child in node:
        if child.tag == _W + "r":
            yield child
        elif child.tag not in _SKIPPED and child.tag != _W + "pPr":
            yield from _runs(child)


def _characters(run: Any) -> Any:
    for node in run:
        if node.tag == _W + "t":
            yield node.text or ""
        elif node.tag == _W + "tab":
            yield "\t"
        elif node.tag in (_W + "br", _W + "cr"):
            yield "\n"
        elif node.tag == _W + "noBreakHyphen":
            yield "-"
        elif node.tag == _W + "footnoteReference":
            yield f"[{node.get(_W + 'id')}]"


def _is_on(node: Any) -> bool:
    return node is not None and node.get(_W + "val") not in ("0", "false", "none")
