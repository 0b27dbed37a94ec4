"""Writes a document's Markdown block by block, and keeps where its headings are."""

import re

from ftjax.data.extract.document import Document, Mark, plain


class Writer:
    """`indent` stands before every line but code's, `bullet` instead of it before the next block; `tight`: no
    empty line before a bullet; `level` is that of the heading that we are under.

    Code is never indented: what is between the fences is the source's to the letter.
    """

    def __init__(self):
        self.out: list[str] = []
        self.size = 0
        self.marks: list[Mark] = []
        self.indent = ""
        self.bullet: str | None = None
        self.tight = False
        self.level = 0

    def put(self, text: str) -> None:
        lead = self.indent if self.bullet is None else self.bullet
        if self.indent:
            text = text.replace("\n", "\n" + self.indent)
        self._write(("\n" if self.tight and self.bullet is not None else "\n\n") + (lead + text).rstrip())
        self.bullet = None

    def put_code(self, text: str, language: str = "") -> None:
        if self.bullet is not None and self.bullet.strip():
            self.put("")
        longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
        fence = "`" * (longest + 1)
        self._write(f"\n\n{fence}{language}\n{text}\n{fence}")

    def heading(self, level: int, text: str) -> None:
        if text:
            if self.bullet is not None and self.bullet.strip():
                self.put("")
            self.marks.append(Mark(self.size + 2 * bool(self.out), level, plain(text)))
            self.level = level
            self.put("#" * level + " " + text if level <= 6 else f"**{text}**")

    def end_of_headings(self, level: int) -> None:
        """What follows is no longer under a heading of this level or deeper."""
        self.marks.append(Mark(self.size + 2 * bool(self.out), level, None))

    def put_table(self, rows: list[list[str]]) -> None:
        """A pipe table (GitHub's Markdown); its first row is the header."""
        width = max(map(len, rows))
        lines = []
        for row in rows:
            cells = [re.sub(r"\n+", "<br>", cell).replace("|", "\\|") for cell in row]
            lines.append("| " + " | ".join(cells + [""] * (width - len(row))) + " |")
        self.put("\n".join([lines[0], "|" + " --- |" * width, *lines[1:]]))

    def _write(self, text: str) -> None:
        text = text if self.out else text.lstrip("\n")
        self.out.append(text)
        self.size += len(text)

    def document(self, title: str) -> Document:
        """All of it; the only heading of level 1, if there is one, is a better title than `title`."""
        tops = [mark.title for mark in self.marks if mark.level == 1 and mark.title]
        return Document(
            "".join(self.out) + "\n", tops[0] if len(tops) == 1 and tops[0] else title, self.marks
        )
