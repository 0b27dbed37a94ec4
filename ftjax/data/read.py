"""Rows of files and data sets, one at a time, in memory that does not grow with them; and sources cut into
parts, so that several processes read one file."""

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.data import formats
from ftjax.data.options import DataSource
from ftjax.data.record import Findings, Judged, Verdict
from ftjax.errors import UserError

VERSION = 2  # part of the parts' keys: raise it where the same rows give other records or verdicts
_CHUNK = 1 << 20


class Row(NamedTuple):
    """One row: its 1-based line (or row number), the values, the share of the source read so far (0 to 1)."""

    line: int
    values: dict[str, Any] | None
    """None for a line that can't be read: `said` tells why."""
    done: float | None
    said: Sequence[Verdict] = ()


class _Span(NamedTuple):
    """A piece of a file: bytes of JSON lines, row groups of Parquet; and the line of its first row."""

    begin: int = 0
    end: int | None = None
    line: int = 1


_WHOLE = _Span()


# ── a source, whole ───────────────────────────────────────────────────────────────────────────────


def is_file(source: DataSource) -> bool:
    """Whether the source is read as one local file (and not through `datasets`)."""
    path = Path(source.path).expanduser()
    return path.is_file() or (not path.is_dir() and _suffix(path) in _READERS)


def rows(source: DataSource, streaming: bool = False) -> Iterator[Row]:
    """The rows of a file, one at a time, or of a `datasets` data set.

    Raises UserError, with file and line, for a missing, empty or broken file.
    """
    empty = True
    for row in _rows(source, _WHOLE, streaming, careful=False):
        if row.values is None:
            raise UserError(f"{source.path}:{row.line}: {row.said[0].text}")
        empty = False
        yield row
    if empty:
        raise UserError(f"{source.path} holds no examples: the file is empty")


def _rows(source: DataSource, span: _Span, streaming: bool, careful: bool) -> Iterator[Row]:
    """The rows of a piece. `careful` finds what JSON readers let pass (NaN, a key twice, a byte order mark,
    empty lines) and goes on after a broken row, where it can."""
    if not is_file(source):
        found = _dataset_rows(source, streaming)
    else:
        path = _file(source)
        found = _READERS[_suffix(path)](path, span, careful)
    line, renamed = span.line, span.line > 1
    try:
        for row in found:
            line = row.line + 1
            if row.values is not None and source.columns:
                try:
                    row = row._replace(values=_renamed(row.values, source, row.line))
                    renamed = True
                except UserError as e:
                    if not (careful and renamed):  # else rows before had the columns
                        raise
                    said = str(e).removeprefix(f"{source.path}:{row.line}: ")
                    row = _broken(Path(source.path), row.line, row.done, "E007", said)
            yield row
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        said = f"the file is cut off or damaged: {e}"
        if not careful:
            raise UserError(f"{source.path}: {said}") from None
        said += "; the rest of the file is not read"
        yield _broken(Path(source.path), line, None, "E002", said)


def _file(source: DataSource) -> Path:
    if source.split or source.name:
        raise UserError(f"{source.path} is a file: `split` and `name` belong to data sets; remove them")
    path = Path(source.path).expanduser()
    _must_exist(path)
    if _suffix(path) not in _READERS:
        raise UserError(
            f"{path}: unknown kind of file; readable are {', '.join(_READERS)} (each also with .gz)"
        )
    return path


def source_digest(source: DataSource) -> str:
    """A hash of the source's bytes, for the cache."""
    if is_file(source):
        path = Path(source.path).expanduser()
        _must_exist(path)
        return file_digest(path)
    data = _load_dataset(source, streaming=False)
    return f"datasets-{data._fingerprint}"


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ── a source, in parts ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Part:
    """A piece of a source that one process reads: bytes of a file of JSON lines, row groups of a Parquet
    file, otherwise the whole."""

    source: DataSource
    format: str
    detected: bool
    """Whether each row has to look like the format, since it was found out and not given."""
    digest: str
    """Of its content."""
    begin: int = 0
    end: int | None = None
    line: int = 1
    """Of its first row."""

    def key(self) -> str:
        """A hash of its content and of how it is read."""
        read = [VERSION, self.source.path, self.source.columns, self.format, self.detected, self.digest]
        return hashlib.sha256(json.dumps([*read, self.begin, self.line]).encode()).hexdigest()

    def rows(self) -> Iterator[Row]:
        """Its rows as they are, whatever their format."""
        return _rows(self.source, _Span(self.begin, self.end, self.line), False, careful=True)

    def judged(self) -> Iterator[Judged]:
        """Its rows in order: a record with the warnings on its row, or None with what is wrong with it.

        A record's meta has `source` and `line` (kept from where a row of the format "ftjax" has them), its
        `given` the row as it was.
        """
        path = self.source.path
        for row in self.rows():
            found = Findings(path, row.line)
            found.extend(row.said)
            if row.values is None:
                yield Judged(None, list(found))
                continue
            looks_like = "chat" if self.format == "openai" else self.format
            if self.detected and looks_like not in (seen := formats.matches(row.values)):
                keys = ", ".join(map(str, row.values))
                looks = f"looks like {seen[0]}" if seen else "is of no known format"
                found.add("E004", "", f"this row {looks} (keys {keys}), and the others are {self.format}")
                yield Judged(None, list(found))
                continue
            record = formats.read(row.values, self.format, found) if found.error is None else None
            if record is None:
                yield Judged(None, list(found))
                continue
            record.where = f"{path}:{row.line}"
            record.given = self.format, row.values
            if self.format != "ftjax":  # a column of that name is not where the row stands
                record.meta = {f"given_{k}" if k in formats.PLACE else k: v for k, v in record.meta.items()}
            if "source" not in record.meta:
                record.meta |= {"source": path, "line": row.line}
            yield Judged(record, list(found))


def parts(source: DataSource | str, rows_per_part: int = 20_000) -> list[Part]:
    """The source cut into parts of about so many rows. The format is the source's own, or the first
    readable row's; a first row that could be of two formats is a UserError, as is a missing or empty
    source."""
    source = DataSource(source) if isinstance(source, str) else source
    format = source.format
    if format is None:
        format = _format_of(source)
    else:
        formats.format_named(format)
    part = partial(Part, source, format, source.format is None)
    if not is_file(source):
        return [part(source_digest(source))]
    path = Path(source.path).expanduser()
    if _suffix(path) in (".jsonl", ".ndjson") and not _is_gzip(path):
        return [part(digest, *span) for digest, span in _line_spans(path, rows_per_part)]
    digest = source_digest(source)
    if _suffix(path) == ".parquet":
        return [part(digest, *span) for span in _row_groups(path, rows_per_part)]
    return [part(digest)]


def _format_of(source: DataSource) -> str:
    """That of the first row that is of any; rows before it that are of none are E004 where they are read."""
    broken, unknown = 0, None
    for row in _rows(source, _WHOLE, False, careful=True):
        if row.values is None:
            broken += 1
        elif not formats.matches(row.values):
            unknown = unknown or row
        elif not any(v.severity == "error" for v in row.said):
            found = formats.detect(row.values, f"{source.path}:{row.line}", one=True)
            return "openai" if found == "chat" and _has_text_arguments(source) else found
    if unknown is not None:
        formats.detect(
            unknown.values or {}, f"{source.path}:{unknown.line}", one=True
        )  # says what it could be
    if broken:
        raise UserError(f"{source.path}: none of its {broken} lines can be read as a JSON object")
    raise UserError(f"{source.path} holds no examples: the file is empty")


def _has_text_arguments(source: DataSource) -> bool:
    """Whether calls of tools have their arguments as text, OpenAI's way, among the first thousand rows."""
    for row in itertools.islice(_rows(source, _WHOLE, False, careful=True), 1000):
        messages = row.values.get("messages") if row.values else None
        for message in messages if isinstance(messages, list) else ():
            calls = message.get("tool_calls") if isinstance(message, dict) else None
            for call in calls if isinstance(calls, list) else ():
                function = call.get("function") if isinstance(call, dict) else None
                if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                    return True
    return False


def _line_spans(path: Path, rows_per_part: int) -> Iterator[tuple[str, _Span]]:
    """Spans of so many lines each, with the hash of their bytes."""
    digest = hashlib.sha256()
    begin = at = 0
    line = first = 1
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            left = 0
            while line + (count := chunk.count(b"\n", left)) >= first + rows_per_part:
                # the part ends in this chunk, after the line break that makes it full
                cut = left
                for _ in range(first + rows_per_part - line):
                    cut = chunk.index(b"\n", cut) + 1
                digest.update(chunk[left:cut])
                yield digest.hexdigest(), _Span(begin, at + cut, first)
                line = first = first + rows_per_part
                digest, begin, left = hashlib.sha256(), at + cut, cut
            digest.update(chunk[left:])
            line += count
            at += len(chunk)
    if at > begin or not at:
        yield digest.hexdigest(), _Span(begin, at, first)


def _row_groups(path: Path, rows_per_part: int) -> Iterator[_Span]:
    meta = _parquet_file(path).metadata
    begin = line = 0
    count = 0
    for group in range(meta.num_row_groups):
        count += meta.row_group(group).num_rows
        if count >= rows_per_part or group == meta.num_row_groups - 1:
            yield _Span(begin, group + 1, line + 1)
            begin, line, count = group + 1, line + count, 0


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _must_exist(path: Path) -> None:
    if path.is_file():
        return
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if not path.parent.is_dir():
        hint = f"there is no folder {path.parent}"
    elif near:
        hint = f"did you mean {path.parent / near[0]}?"
    else:
        hint = f"the folder {path.parent.resolve()} has no such file"
    raise UserError(f"{path} does not exist: {hint}")


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: Path):
    """The file's bytes, unpacked if gzipped, and a function telling the share read so far."""
    raw = open(path, "rb")
    size = max(1, path.stat().st_size)
    return (gzip.GzipFile(fileobj=raw) if _is_gzip(path) else raw), lambda: min(1.0, raw.tell() / size)


class _Json:
    """Reads JSON values; careful, it also finds keys that stand twice, NaN, and characters that are none."""

    def __init__(self, careful: bool):
        self.careful = careful
        self.twice: list[str] = []
        self._decoder = (
            json.JSONDecoder(object_pairs_hook=self._object, parse_constant=_no_constant)
            if careful
            else json.JSONDecoder()
        )

    def __call__(self, text: str, at: int = 0) -> tuple[Any, int]:
        """The value that begins at `at` and where it ends; raises JSONDecodeError."""
        self.twice.clear()
        return self._decoder.raw_decode(text, at)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [k for k, _ in pairs]
            self.twice += sorted({k for k in keys if keys.count(k) > 1})
        return made

    def row(self, line: int, value: Any, done: float | None, path: Path, text: str) -> Row:
        """The row of a value, with what is wrong with it."""
        found = Findings(str(path), line)
        if not isinstance(value, dict):
            kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), f"{value!r}")
            found.add("E003", "", f"each example has to be a JSON object like {{...}}; this is {kind}")
            return Row(line, None, done, found)
        if self.careful:
            for key in self.twice:
                found.add("E005", key, f"the key {key!r} stands twice in one object")
            if _ESCAPED.search(text):
                for at, what in _characters(value):
                    found.add("E006", at, f"{at} has {what}")
        return Row(line, value, done, found)


_ESCAPED = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _characters(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Where strings have a NUL or half of a surrogate pair."""
    if isinstance(value, str):
        if "\0" in value:
            yield at, "a NUL character"
        if any("\ud800" <= c <= "\udfff" for c in value):
            yield at, "half of a surrogate pair"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _characters(key, f"{at}.{key!r}"[:80])
            yield from _characters(inner, f"{at}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _characters(inner, f"{at}[{i}]")


def _broken(path: Path, line: int, done: float | None, code: str, text: str) -> Row:
    return Row(line, None, done, [Verdict(code, text, "", str(path), line)])


def _jsonl(path: Path, span: _Span = _WHOLE, careful: bool = False) -> Iterator[Row]:
    file, done = _open(path)
    read = _Json(careful)
    at = span.begin
    with file:
        file.seek(at)
        for number, data in enumerate(file, span.line):
            if span.end is not None and at >= span.end:
                return
            at += len(data)
            warned: list[Verdict] = []
            if data.startswith(codecs.BOM_UTF8):
                data = data[3:]
                if careful:
                    warned = [Verdict("W110", "it begins with a byte order mark", "", str(path), number)]
            try:
                line = data.decode()
            except UnicodeDecodeError as e:
                said = f"not UTF-8 text (byte {data[e.start]:#04x}); convert the file to UTF-8"
                yield _broken(path, number, done(), "E001", said)
                continue
            if not line.strip():
                if careful:
                    yield _broken(path, number, done(), "W115", "a line without anything")
                continue
            row = _line(read, line, number, path, done())
            yield row._replace(said=[*warned, *row.said]) if warned else row


def _line(read: _Json, line: str, number: int, path: Path, done: float | None) -> Row:
    line = line.rstrip()  # so that what is cut off ends in its last column
    begin = len(line) - len(line.lstrip())
    try:
        value, end = read(line, begin)
        if line[end:].strip():
            end += len(line[end:]) - len(line[end:].lstrip())
            raise json.JSONDecodeError("Extra data", line, end)
    except json.JSONDecodeError as e:
        hint = "; the file looks like a JSON array: name it .json" if line.strip() in "[{" else ""
        return _broken(path, number, done, "E002", f"broken JSON at column {e.colno}: {e.msg}{hint}")
    except (ValueError, RecursionError) as e:
        said = "too deeply nested" if isinstance(e, RecursionError) else e
        return _broken(path, number, done, "E002", f"broken JSON: {said}")
    return read.row(number, value, done, path, line)


def _json(path: Path, span: _Span = _WHOLE, careful: bool = False) -> Iterator[Row]:
    file, _ = _open(path)
    with file:
        begin = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
        while not begin and (more := file.read(_CHUNK)):
            begin = more.lstrip()
    if begin.startswith(b"["):
        yield from _array(path, careful)
    else:  # JSON lines in a .json file are common
        yield from _jsonl(path, span, careful)


class _Window:
    """The text of a file from some place on, and where in the file that is."""

    def __init__(self, file):
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at, self.ended = "", 0, False
        self._line, self._column, self._counted = 1, 1, 0  # the place of text[_counted]

    def more(self) -> None:
        """Takes what was read off the beginning, and at least doubles the rest."""
        self.place(self.at)
        self.text, self.at, self._counted = self.text[self.at :], 0, 0
        data = self._file.read(max(_CHUNK, len(self.text)))
        self.text += self._decode(data, not data)
        self.ended = not data

    def place(self, position: int) -> tuple[int, int]:
        """The line and the column, from 1, of a position not before one asked for earlier."""
        breaks = self.text.count("\n", self._counted, position)
        if breaks:
            self._column = position - self.text.rindex("\n", self._counted, position)
        else:
            self._column += position - self._counted
        self._line, self._counted = self._line + breaks, position
        return self._line, self._column

    def space(self) -> str:
        """Goes over white space; the character after it, "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


_SPACE = re.compile(r"[\s]*")


def _array(path: Path, careful: bool) -> Iterator[Row]:
    """The elements of one JSON array, with no more of it in memory than an element and a megabyte."""
    file, done = _open(path)
    read, window = _Json(careful), _Window(file)

    def broken(position: int, message: str) -> Row:
        line, column = window.place(position)
        rest = "; the rest of the file is not read" if careful else ""
        return _broken(path, line, done(), "E002", f"broken JSON at column {column}: {message}{rest}")

    with file:
        try:
            window.space()
            window.at += 1  # the bracket
            if window.space() == "]":
                return
            while True:
                window.space()
                value, failed = None, None
                while True:
                    begin = window.at
                    try:
                        value, end = read(window.text, begin)
                        if end < len(window.text) or window.ended:
                            break
                    except json.JSONDecodeError as e:
                        # a text that is cut off fails at its end, or in a string that has none
                        cut = e.pos > len(window.text) - 12 or e.msg.startswith("Unterminated string")
                        if window.ended or not cut:
                            failed = broken(e.pos, e.msg)
                            break
                    except (ValueError, RecursionError) as e:
                        said = "too deeply nested" if isinstance(e, RecursionError) else str(e)
                        failed = broken(begin, said)
                        break
                    window.more()
                if failed is not None:
                    yield failed
                    return
                line, _ = window.place(begin)
                yield read.row(line, value, done(), path, window.text[begin:end] if careful else "")
                window.at = end
                after = window.space()
                if after == "]":
                    return
                if after != ",":
                    yield broken(window.at, "Expecting ',' or ']' after an example")
                    return
                window.at += 1
        except UnicodeDecodeError as e:
            said = f"not UTF-8 text (byte {e.object[e.start]:#04x}); convert the file to UTF-8"
            yield _broken(path, window.place(window.at)[0], done(), "E001", said)


def _csv(path: Path, span: _Span = _WHOLE, careful: bool = False, delimiter: str = ",") -> Iterator[Row]:
    file, done = _open(path)
    csv.field_size_limit(2**31 - 1)
    with file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape" if careful else "strict", newline="")
        reader = csv.DictReader(text, delimiter=delimiter)
        line = 1
        try:
            names = reader.fieldnames
            line = reader.line_num + 1
            for values in reader:
                if None in values or None in values.values():
                    said = f"this row does not have the header's {len(names or [])} columns"
                    yield _broken(path, line, done(), "E007", said)
                elif careful and any("\udc80" <= c <= "\udcff" for v in values.values() for c in v):
                    yield _broken(path, line, done(), "E001", "not UTF-8 text; convert the file to UTF-8")
                else:
                    yield Row(line, {k: _cell(v) for k, v in values.items()}, done())
                line = reader.line_num + 1
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; convert the file to UTF-8") from None
        except csv.Error as e:
            if not careful:
                raise UserError(f"{path}: broken CSV: {e}") from None
            yield _broken(path, line, done(), "E002", f"broken CSV: {e}; the rest of the file is not read")


def _cell(text: str) -> Any:
    """The text, or the messages that ftjax.data.write puts into a cell as JSON."""
    if not text.startswith('[{"role": '):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _tsv(path: Path, span: _Span = _WHOLE, careful: bool = False) -> Iterator[Row]:
    return _csv(path, span, careful, "\t")


def _text(path: Path, span: _Span = _WHOLE, careful: bool = False) -> Iterator[Row]:
    file, _ = _open(path)
    with file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        said = f"not UTF-8 text (byte {data[e.start]:#04x}); convert the file to UTF-8"
        yield _broken(path, data.count(b"\n", 0, e.start) + 1, 1.0, "E001", said)
        return
    if text.strip():
        yield Row(1, {"text": text}, 1.0)


def _parquet_file(path: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise UserError(f"{path}: not a readable Parquet file: {e}") from None


def _parquet(path: Path, span: _Span = _WHOLE, careful: bool = False) -> Iterator[Row]:
    import pyarrow

    file = _parquet_file(path)
    groups = range(span.begin, file.metadata.num_row_groups if span.end is None else span.end)
    number, total = span.line - 1, max(1, file.metadata.num_rows)
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=list(groups)):
            for values in batch.to_pylist():
                number += 1
                yield _from_arrow(values, str(path), number, number / total)
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise UserError(f"{path}: not a readable Parquet file: {e}") from None


_READERS: dict[str, Callable[[Path, _Span, bool], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
}


# ── data sets ─────────────────────────────────────────────────────────────────────────────────────


def _load_dataset(source: DataSource, streaming: bool) -> Any:
    import datasets

    path = Path(source.path).expanduser()
    split = source.split or "train"
    if not path.exists() and (source.path.startswith((".", "/", "~")) or source.path.count("/") > 1):
        _must_exist(path)
    try:
        if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise ValueError(f"no split {split!r}; it has {', '.join(map(str, data))}")
                data = data[split]
            return data.to_iterable_dataset() if streaming else data
        return datasets.load_dataset(source.path, source.name, split=split, streaming=streaming)
    except Exception as e:  # datasets raises many kinds, all about what the user named
        raise UserError(
            f"can't open the data set {source.path!r} (split {split!r}): {e}\n"
            f"A local file would end in {', '.join(_READERS)}."
        ) from e


def _dataset_rows(source: DataSource, streaming: bool) -> Iterator[Row]:
    data = _load_dataset(source, streaming)
    total = None if streaming else max(1, len(data))
    for number, values in enumerate(data, 1):
        yield _from_arrow(values, source.path, number, number / total if total else None)


def _from_arrow(values: dict[str, Any], path: str, number: int, done: float | None) -> Row:
    """The row without the nulls that Arrow plants where rows of one column have different keys.

    Nor with NaN, which is what data frames have for null and JSON has not.

    Inside tool calls and tool schemas a planted null can't be told from a meant one: nulls there are an
    error.
    """
    found = Findings(path, number)

    def clean(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            if name in ("arguments", "parameters") and any(v is None for v in value.values()):
                text = (
                    f"`{name}` has nulls, which Arrow adds where examples have different keys; "
                    "store it as a JSON string, or use JSONL"
                )
                found.add("E007", name, text)
            return {k: clean(v, k) for k, v in value.items() if v is not None and v == v}
        if isinstance(value, list):
            return [clean(v, name) for v in value]
        if isinstance(value, float) and math.isinf(value):
            found.add("E007", name, f"`{name}` is {value}, which JSON can't say")
        return _cell(value) if isinstance(value, str) else value

    cleaned = clean(values, "")
    return Row(number, None if found else cleaned, done, found)


def _renamed(values: dict[str, Any], source: DataSource, line: int) -> dict[str, Any]:
    renamed = set(source.columns.values()) - set(source.columns)
    out = {k: v for k, v in values.items() if k not in renamed}
    for ours, theirs in source.columns.items():
        if theirs not in values:
            near = difflib.get_close_matches(theirs, list(values), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(str, values))}"
            raise UserError(
                f"{source.path}:{line}: `columns` maps {ours} to {theirs!r}, not in this row; {hint}"
            )
        out[ours] = values[theirs]
    return out
