"""reStructuredText to Markdown by a light reader of our own, which knows Sphinx's directives and roles.

Why not docutils: without Sphinx and the project's own extensions it knows neither their directives nor their
roles, and what is in those becomes errors: of the Python documentation's code blocks it keeps 70 %, this 96 %
(benchmarks/results/extract.md).
"""

import re

from ftjax.data.extract.document import Document
from ftjax.data.extract.writer import Writer

_ADORNMENT = re.compile(r"([!-/:-@[-`{-~])\1{2,}\s*$")
_DIRECTIVE = re.compile(r"\.\. +(?:\|([^|]+)\| +)?([\w:+.-]+):: *(.*)$")
_NOTE = re.compile(r"\.\. +\[(#?[\w.*-]*)\] *(.*)$")
_OPTION = re.compile(r"\s+:([\w-]+):\s*(.*)$")
_BULLET = re.compile(r"([-*+•]|\(?(?:\d+|#|[a-zA-Z]|[ivxIVX]+)[.)])( +|$)")
_FIELD = re.compile(r":([^:\s`][^:`]*):(?:\s+|$)(.*)")
_CODE = frozenset("""
    code-block code sourcecode parsed-literal doctest testcode testoutput literalinclude productionlist prompt
    ipython console raw math""".split())  # fmt: skip
_ADMONITIONS = frozenset("""
    note warning tip hint important caution danger error attention seealso admonition topic sidebar
    impl-detail todo""".split())  # fmt: skip
_VERSIONS = {
    "versionadded": "New in version",
    "versionchanged": "Changed in version",
    "deprecated": "Deprecated since version",
    "deprecated-removed": "Deprecated since version",
    "versionremoved": "Removed in version",
}
_SIGNATURES = frozenset("""
    function class method classmethod staticmethod attribute data exception decorator property decoratormethod
    describe object option cmdoption program-option envvar confval opcode 2to3fixer coroutinefunction
    coroutinemethod abstractmethod awaitablefunction awaitablemethod macro member type struct union enum
    enumerator var directive pdbcommand audit-event monitoring-event autofunction autoclass automodule
    automethod autoexception autodata autoattribute""".split())  # fmt: skip
_SILENT = frozenset("""
    toctree index module currentmodule sectionauthor moduleauthor codeauthor contents meta program
    tabularcolumns default-role role include sectnum target-notes title header footer testsetup testcleanup
    namespace""".split())  # fmt: skip
_PLAIN = (
    "only",
    "ifconfig",
    "container",
    "class",
    "rst-class",
    "availability",
)  # their argument says nothing
_LANGUAGES = {"python3": "python", "pycon3": "pycon", "none": "", "text": "", "default": ""}
_CODE_ROLES = frozenset("""
    func meth class mod attr data exc const obj keyword program option envvar file command samp code literal
    kbd token opcode makevar pypi macro member type struct source""".split())  # fmt: skip
_LABELS = {"seealso": "See also", "impl-detail": "CPython implementation detail"}


def read(text: str) -> Document:
    """Headings by their adornments, code verbatim, admonitions, tables, lists and API descriptions."""
    reader = _Reader(text)
    reader.blocks(text.expandtabs(8).split("\n"), top=True)
    return reader.document("")


class _Reader(Writer):
    def __init__(self, text: str):
        super().__init__()
        self.adornments: list[str] = []
        self.language = ""
        """Of literal blocks, as the last highlight directive says."""
        self.replaced = dict(re.findall(r"^\.\. \|([^|\n]+)\| replace:: *(.*)$", text, re.M))

    def blocks(self, lines: list[str], top: bool = False) -> None:
        """Everything in these lines, whose indentation has been taken away."""
        i = 0
        while i < len(lines):
            line = lines[i].rstrip()
            if not line:
                i += 1
            elif top and (height := _title(lines, i)):
                over = height == 3
                sign = lines[i][0] + "^" if over else lines[i + 1][0]
                if sign not in self.adornments:
                    self.adornments.append(sign)
                self.heading(self.adornments.index(sign) + 1, self.inline(lines[i + over].strip()))
                i += height
            elif (
                _ADORNMENT.match(line)
                and " " not in line
                and len(line) > 3
                and _blank(lines, i + 1) is not False
            ):
                i += 1  # a transition
            elif line.startswith(".."):
                end = _block_end(lines, i)
                self.explicit(lines[i:end])
                i = end
            elif line[0] == " ":  # a block quote
                end = _block_end(lines, i - 1)
                self.blocks(_dedented(lines[i:end]))
                i = end
            elif line.startswith(">>>"):
                end = _paragraph_end(lines, i)
                self.put_code("\n".join(map(str.rstrip, lines[i:end])), "pycon")
                i = end
            elif re.match(r"(=+ +=[= ]*|\+[-=]+\+.*)$", line):
                i = self.ascii_table(lines, i)
            elif _is_item(lines, i):
                i = self.bullets(lines, i)
            elif (field := _FIELD.match(line)) is not None:
                end = _block_end(lines, i)
                self.item(f"- **{self.inline(field[1])}**: ", [field[2], *_dedented(lines[i + 1 : end])])
                i = end
            elif _blank(lines, i + 1) is False and lines[i + 1].startswith(" "):
                end = _block_end(lines, i)
                term = self.inline(line.split(" : ")[0])
                term = term if "`" in term or "*" in term else f"**{term}**"
                self.item(f"- {term}: ", _dedented(lines[i + 1 : end]))
                i = end
            else:
                i = self.paragraph(lines, i)

    def paragraph(self, lines: list[str], i: int) -> int:
        end = _paragraph_end(lines, i)
        words = " ".join(line.strip().removeprefix("| ") for line in lines[i:end])
        code = words.endswith("::")
        if code:
            words = words[:-2].rstrip() if words[-3:-2] in (" ", "") else words[:-1]
        if words:
            self.put(self.inline(words))
        if not code:
            return end
        while end < len(lines) and not lines[end].strip():
            end += 1
        if end < len(lines) and lines[end].startswith(" "):
            last = _block_end(lines, end - 1)
            self.put_code(_code(lines[end:last]), self._guess(lines[end]))
            return last
        return end

    def _guess(self, first: str) -> str:
        return "pycon" if first.lstrip().startswith(">>>") else self.language

    def bullets(self, lines: list[str], i: int) -> int:
        items: list[tuple[str, list[str]]] = []
        numbered = lines[i][0] not in "-*+•"
        while i < len(lines) and (found := _BULLET.match(lines[i])):
            if numbered != (lines[i][0] not in "-*+•"):
                break
            width = len(found[0]) if found[2] else len(found[1]) + 1
            end = _block_end(lines, i)
            rest = [line[min(width, len(line) - len(line.lstrip(" "))) :] for line in lines[i + 1 : end]]
            sign = found[1].strip("(")
            if not numbered:
                sign = "-"
            elif sign[0] == "#":
                sign = f"{len(items) + 1}."
            sign = sign.replace(")", ".")
            items.append((sign + " ", [lines[i][width:], *rest]))
            while end < len(lines) and not lines[end].strip():
                end += 1
            i = end
        tight = self.tight
        for number, (sign, body) in enumerate(items):
            self.tight = number > 0 and all(all(line.strip() for line in each) for _, each in items)
            self.item(sign, body)
        self.tight = tight
        return i

    def item(self, bullet: str, body: list[str]) -> None:
        before = self.indent, self.tight
        self.bullet = (self.indent if self.bullet is None else self.bullet) + bullet
        self.indent += " " * min(len(bullet), 3) if bullet[0].isdigit() else "  "
        self.blocks(body)
        if self.bullet is not None:
            self.bullet = self.bullet.rstrip(": ")
            self.put("")
        self.indent, self.tight = before

    def explicit(self, lines: list[str]) -> None:
        """A directive with its body, a footnote, or a comment or target (which say nothing)."""
        if note := _NOTE.match(lines[0]):
            self.item(f"[{note[1].lstrip('#') or '*'}] ", [note[2], *_dedented(lines[1:])])
            return
        found = _DIRECTIVE.match(lines[0])
        if found is None or found[1]:
            return
        name, argument = found[2].lower(), found[3].strip()
        short = name.rpartition(":")[2]
        rest, options = _options(lines[1:])
        body = _dedented(rest)
        if short in _CODE:
            if short == "math":
                self.put("$$\n" + "\n".join(filter(None, [argument, _code(rest).strip()])) + "\n$$")
            elif short == "parsed-literal":
                self.put_code(self.inline(_code(rest), code=True))
            elif short == "literalinclude":
                self.put(f"[code of {argument}]")
            elif code := _code(rest):
                given = argument if short in ("code-block", "code", "sourcecode") else ""
                self.put_code(code, _LANGUAGES.get(given, given) or self._guess(code))
        elif short == "highlight":
            self.language = _LANGUAGES.get(argument, argument)
        elif short in _SILENT:
            return
        elif short in ("image", "figure"):
            if options.get("alt"):
                self.put(f"[image: {options['alt']}]")
            self.blocks(body)
        elif short in _VERSIONS:
            version, _, said = argument.partition(" ")
            lead = self.indent if self.bullet is None else self.bullet
            self.bullet = f"{lead}{_VERSIONS[short]} {version}: "
            self.blocks([said, *body])
            if self.bullet is not None:
                self.bullet = self.bullet.rstrip(": ")
                self.put("")
        elif short in _ADMONITIONS or short.endswith("-note"):
            label = (
                argument
                if short in ("admonition", "topic", "sidebar")
                else _LABELS.get(short, short.capitalize())
            )
            first = [] if short in ("admonition", "topic", "sidebar") or not argument else [argument]
            lead = self.indent if self.bullet is None else self.bullet
            self.bullet = f"{lead}**{self.inline(label)}:** "
            self.blocks([*first, *body])
        elif short == "rubric":
            self.put(f"**{self.inline(argument)}**")
        elif short in _SIGNATURES:
            self.signature(argument, body)
        elif short == "list-table":
            self.list_table(argument, body)
        elif short == "csv-table":
            import csv

            rows = [row for row in csv.reader([options.get("header", ""), *filter(str.strip, body)]) if row]
            self.put_table([[self.inline(cell.strip()) for cell in row] for row in rows])
        else:  # only, container, tab, table …: what is in it; of an unknown one also what it was given
            if argument and short not in _PLAIN:
                self.put(self.inline(argument))
            self.blocks(body)

    def signature(self, argument: str, body: list[str]) -> None:
        """A heading, or in a list a bold line; further signatures of the same thing follow it."""
        more: list[str] = []
        while body and argument.endswith("\\"):
            argument, body = argument[:-1].rstrip() + " " + body[0].strip(), body[1:]
        while body and body[0].strip() and _DIRECTIVE.match(body[0]) is None and len(more) < 20:
            more.append(body[0].strip())  # up to the first empty line
            body = body[1:]
        first, outer = re.sub(r"\\(.)", r"\1", argument), self.level
        if self.indent or self.bullet is not None:
            self.put(f"**`{first}`**")
        else:
            self.heading(outer + 1, f"`{first}`" if first else "")
        for each in more:
            self.put(f"**`{each}`**")
        self.blocks(body)
        if not self.indent:
            self.level = outer
            self.end_of_headings(outer + 1)

    def list_table(self, title: str, body: list[str]) -> None:
        rows: list[list[str]] = []
        for line in body:
            if found := re.match(r"\* +- ?(.*)$", line):
                rows.append([found[1]])
            elif rows and (found := re.match(r"  +- ?(.*)$", line)):
                rows[-1].append(found[1])
            elif rows and line.strip():
                rows[-1][-1] += " " + line.strip()
        if title:
            self.put(f"**{self.inline(title)}**")
        if rows:
            self.put_table([[self.inline(cell.strip()) for cell in row] for row in rows])

    def ascii_table(self, lines: list[str], i: int) -> int:
        """A pipe table; a grid table with cells over several rows or columns stays as it was drawn."""
        end = i + 1
        if lines[i].startswith("+"):
            while end < len(lines) and lines[end].startswith(("+", "|")):
                end += 1
            rows = _grid([line.rstrip() for line in lines[i:end]])
            if not rows:
                self.put_code("\n".join(lines[i:end]))
            else:
                self.put_table([[self.inline(cell) for cell in row] for row in rows])
            return end
        columns = [found.span() for found in re.finditer("=+", lines[i])]
        rules = 1
        rows = []
        new = True
        while end < len(lines):
            line = lines[end]
            if re.fullmatch(r"[= ]*=[= ]*", line) or re.fullmatch(r"[- ]*-{2,}[- ]*", line):
                rules += "=" in line
                new = True
                if "=" in line and (rules == 3 or not "".join(lines[end + 1 : end + 2]).strip()):
                    end += 1
                    break
            elif line.strip():
                ends = [b for _, b in columns[:-1]] + [None]  # the last column goes on to the line's end
                cells = [line[a:b].strip() for (a, _), b in zip(columns, ends, strict=True)]
                if cells[0] or new or not rows:
                    rows.append(cells)
                else:  # a first cell that is empty goes on with the row above
                    rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
                new = False
            end += 1
        if rows:
            self.put_table([[self.inline(cell) for cell in row] for row in rows])
        return end

    def inline(self, text: str, code: bool = False) -> str:
        """Roles, references and escapes as Markdown; `code`: without marks of its own."""
        kept: list[str] = []

        def keep(said: str, sign: str = "`") -> str:
            kept.append(said if code else f"{sign}{said}{sign}" if sign not in said else f"`` {said} ``")
            return f"\ue000{len(kept) - 1}\ue001"

        def role(found: re.Match) -> str:
            name, said = found[1].rpartition(":")[2], found[2]
            if said.endswith(">") and name not in ("file", "samp", "kbd"):
                said = re.sub(r"\s*<[^<>]*>$", "", said)
            said = said.lstrip("!")
            if said.startswith("~"):
                said = said[1:].rpartition(".")[2]
            if name == "doc":
                return said.strip("/")
            if name in ("pep", "rfc"):
                return f"{name.upper()} {said}"
            if name in ("func", "meth") and not said.endswith(")"):
                said += "()"
            return keep(said) if name in _CODE_ROLES else keep(said, "$") if name == "math" else said

        if not code:
            text = re.sub(r"``(.+?)``(?!`)", lambda found: keep(found[1]), text)
        text = re.sub(r":([\w+.:-]+):`([^`]+)`", role, text)
        text = re.sub(r"`([^`]+?)(?:\s*<[^<>`]*>)?`_{1,2}", r"\1", text)
        text = re.sub(r"\[#?([\w-]*)\]_", r"[\1]", text)
        text = re.sub(r"\|([^|\s][^|]*)\|", lambda found: self.replaced.get(found[1], found[0]), text)
        if not code:
            text = re.sub(r"\\(?:\s|$)", "", text)
            text = re.sub(r"\\([^\w\s])", r"\1", text)
        return re.sub("\ue000(\\d+)\ue001", lambda found: kept[int(found[1])], text)


def _title(lines: list[str], i: int) -> int:
    """2 or 3: the lines of a title with an underline, or an overline too; 0: no title begins here."""
    line = lines[i].rstrip()
    below = lines[i + 1].rstrip() if i + 1 < len(lines) else ""
    if _ADORNMENT.match(line) and below and i + 2 < len(lines) and not _ADORNMENT.match(below):
        if lines[i + 2].rstrip() == line and len(line) >= len(below.strip()):
            return 3
    if line[0] != " " and _ADORNMENT.match(below) and not _ADORNMENT.match(line):
        return 2 if len(below) >= len(line) - 1 else 0
    return 0


def _grid(lines: list[str]) -> list[list[str]] | None:
    edges = [at for at, sign in enumerate(lines[0]) if sign == "+"]
    rows: list[list[str]] = []
    new = False
    for line in lines:
        if line.startswith("+"):
            if [at for at, sign in enumerate(line) if sign == "+"] != edges or not set(line) <= set("+-="):
                return None
            new = True
            continue
        if len(line) != len(lines[0]) or any(line[at] != "|" for at in edges):
            return None
        cells = [line[a + 1 : b].strip() for a, b in zip(edges, edges[1:], strict=False)]
        if new:
            rows.append(cells)
        else:
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
        new = False
    return rows


def _is_item(lines: list[str], i: int) -> bool:
    """Whether a list's item begins here; a letter and a dot with more of a paragraph below it is none."""
    found = _BULLET.match(lines[i])
    below = lines[i + 1] if i + 1 < len(lines) else ""
    return found is not None and not (found[1][0].isalpha() and below.strip() and below[0] != " ")


def _blank(lines: list[str], i: int) -> bool | None:
    return None if i >= len(lines) else not lines[i].strip()


def _paragraph_end(lines: list[str], i: int) -> int:
    while i < len(lines) and lines[i].strip():
        i += 1
    return i


def _block_end(lines: list[str], i: int) -> int:
    """After the lines that are indented below line i, and the empty ones between them."""
    end = i = i + 1
    while i < len(lines) and (not lines[i].strip() or lines[i].startswith(" ")):
        i += 1
        if lines[i - 1].strip():
            end = i
    return end


def _dedented(lines: list[str]) -> list[str]:
    depth = min((len(line) - len(line.lstrip(" ")) for line in lines if line.strip()), default=0)
    return [line[depth:].rstrip() for line in lines]


def _code(lines: list[str]) -> str:
    return "\n".join(_dedented(lines)).strip("\n")


def _options(lines: list[str]) -> tuple[list[str], dict[str, str]]:
    options = {}
    for number, line in enumerate(lines):
        found = _OPTION.match(line)
        if found is None:
            return lines[number:], options
        options[found[1]] = found[2]
    return [], options
