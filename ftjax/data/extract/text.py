"""Plain text and Markdown, and the bytes of any text as characters."""

import codecs
import re
from typing import Any

from ftjax.data.extract.document import Document, Unreadable, outline
from ftjax.data.record import Verdict

_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\x00\x00", "utf-32-le"), (b"\x00\x00\xfe\xff", "utf-32-be"),
         (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))  # fmt: skip
_META = re.compile(
    rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w:.-]+)|<\?xml[^>]+encoding\s*=\s*[\"']([\w:.-]+)", re.I
)
# What the web calls these is more than what they are (WHATWG Encoding Standard, §4.2)
_MEANT = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030",
          "shift_jis": "cp932", "euc_kr": "cp949", "iso8859-9": "cp1254"}  # fmt: skip


def decode(data: bytes, declared: str | None = None, html: bool = False) -> tuple[str, list[Verdict]]:
    """The text of bytes: by its byte-order mark, as UTF-8 if it is that, else as declared (in the header, or
    in a page's <meta>), else as Windows-1252; with a verdict (X012) where the declaration was wrong or bytes
    were replaced. Ends of lines become "\\n".

    Raises Unreadable (X001) where it is no text.
    """
    said: list[Verdict] = []
    for mark, name in _BOMS:
        if data.startswith(mark):
            text = data[len(mark) :].decode(name, "replace")
            break
    else:
        if html and (found := _META.search(data[:4096])) and not declared:
            declared = (found[1] or found[2]).decode("ascii")
        name = _codec(declared)
        try:
            text = data.decode("utf-8")
            if name and name != "utf-8" and not data.isascii() and b"\x1b" not in data:
                said.append(Verdict("X012", f"it is UTF-8, not {declared} as declared"))
            elif name and name.startswith(("utf-16", "utf-32", "iso2022")):
                text = data.decode(name, "replace")
        except UnicodeDecodeError:
            tried = name if name and name != "utf-8" else "cp1252"
            text = data.decode(tried, "replace")
            if name == "utf-8" or (not name and declared):
                said.append(Verdict("X012", f"it is not {declared} as declared; read as {tried}"))
            if bad := text.count("\ufffd"):
                said.append(Verdict("X012", f"{bad} bytes are no {tried} and were replaced"))
    if text.count("\0") > len(text) / 1000:
        raise Unreadable("X001", "binary data, not text")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", ""), said


def _codec(declared: str | None) -> str | None:
    try:
        name = codecs.lookup(declared).name if declared else None
    except LookupError:
        return None
    return _MEANT.get(name, name) if name else None


def read_plain(text: str) -> Document:
    """Plain text as it is; nothing in it is a heading."""
    return Document(text.strip("\n") + "\n", markdown=False)


_FRONT = re.compile(r"\A(---|\+\+\+)[ \t]*\n(.*?)\n(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.S)


def read_markdown(text: str) -> Document:
    """Markdown as it is, to the letter; its front matter (YAML or TOML) goes to `meta`."""
    front: dict[str, Any] = {}
    if found := _FRONT.match(text):
        values = _front_matter(found[2], found[1])
        if values is not None:
            front, text = values, text[found.end() :]
    text = text.strip("\n") + "\n"
    tops = [mark.title for mark in outline(text)[0] if mark.level == 1 and mark.title]
    title = str(front.get("title") or (tops[0] if tops else ""))
    meta: dict[str, Any] = {"front_matter": front} if front else {}
    if isinstance(front.get("license"), str):
        meta["license"] = front["license"]
    return Document(text, title, meta=meta)


def _front_matter(text: str, sign: str) -> dict[str, Any] | None:
    """None where it is no front matter but a text between two rules."""
    try:
        if sign == "---":
            import yaml

            values = yaml.safe_load(text)
        else:
            import tomllib

            values = tomllib.loads(text)
    except Exception:  # yaml's and tomllib's errors have no common base but this
        return None
    return {str(key): _plain(value) for key, value in values.items()} if isinstance(values, dict) else None


def _plain(value: Any) -> Any:
    """What JSON can hold; a date is its text."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
