"""Records to files: one file, or a folder with a file for each split, in any format and container."""

import contextlib
import csv
import gzip
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ftjax.data import formats
from ftjax.data.read import file_digest
from ftjax.data.record import Record, Verdict
from ftjax.errors import UserError


class Refused:
    """Verdicts on the records that a format cannot say at all, on disk once they are many."""

    def __init__(self):
        self._file = tempfile.SpooledTemporaryFile(1 << 20)
        self._count = 0
        self.first = ""
        """What was said of the first."""

    def add(self, verdict: Verdict) -> None:
        self.first = self.first or verdict.text
        self._file.write(json.dumps(verdict.to_json()).encode() + b"\n")
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each as Verdict.to_json gives it."""
        self._file.seek(0)
        yield from map(json.loads, self._file)
        self._file.seek(0, io.SEEK_END)


@dataclass
class Output:
    """One file that was written."""

    path: str
    format: str
    rows: int = 0
    sha256: str = ""
    losses: dict[str, int] = field(default_factory=dict)
    """What the format cannot say, a name of formats.LOSSES, and of how many records."""
    refused: Refused = field(default_factory=Refused)

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "refused": len(self.refused)}


class _File(Protocol):
    def put(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Jsonl:
    def __init__(self, file: Any):
        self.file = file

    def put(self, values: dict[str, Any]) -> None:
        line = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self.file.write(line + b"\n")

    def close(self) -> None:
        self.file.close()


class _Json(_Jsonl):
    begun = False

    def put(self, values: dict[str, Any]) -> None:
        self.file.write(b",\n" if self.begun else b"[\n")
        self.begun = True
        self.file.write(json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass"))

    def close(self) -> None:
        self.file.write(b"\n]\n" if self.begun else b"[]\n")
        self.file.close()


class _Csv:
    """Columns are those of the first row; lists and objects are JSON in their cells."""

    def __init__(self, file: Any):
        self.text = io.TextIOWrapper(file, "utf-8", newline="")
        self.writer: csv.DictWriter | None = None

    def put(self, values: dict[str, Any]) -> None:
        if self.writer is None:
            self.writer = csv.DictWriter(self.text, list(values))
            self.writer.writeheader()
        assert self.writer.fieldnames is not None
        odd = [k for k in values if k not in self.writer.fieldnames]
        if odd:
            raise UserError(
                f"a CSV file has the columns of its first row ({', '.join(self.writer.fieldnames)}); a later "
                f"row has {', '.join(odd)} too: write .jsonl"
            )
        self.writer.writerow({k: v if isinstance(v, str) else _cell(v) for k, v in values.items()})

    def close(self) -> None:
        self.text.close()


def _cell(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


class _Parquet:
    """Strings and numbers are columns of their kind; lists and objects are JSON text, since Arrow would give
    each object every other's keys."""

    def __init__(self, path: Path):
        self.path, self.rows, self.writer = path, [], None

    def put(self, values: dict[str, Any]) -> None:
        plain = {
            k: v if isinstance(v, str | bool | int | float | type(None)) else _cell(v)
            for k, v in values.items()
        }
        self.rows.append(plain)
        if len(self.rows) == 10_000:
            self._flush()

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.Table.from_pylist(self.rows, schema=self.writer.schema if self.writer else None)
        except pyarrow.ArrowException as e:
            raise UserError(
                f"{self.path}: rows of one Parquet column differ in kind ({e}): write .jsonl"
            ) from None
        if self.writer is None:
            self.writer = pyarrow.parquet.ParquetWriter(self.path, table.schema)
        self.writer.write_table(table)
        self.rows = []

    def close(self) -> None:
        if self.rows or self.writer is None:
            self._flush()
        assert self.writer is not None
        self.writer.close()


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def check(output: str | Path, format: str | None) -> None:
    """Raises UserError where nothing could be written to `output` in `format`."""
    path = Path(output)
    if path.suffix and _suffix(path) not in SUFFIXES:
        raise UserError(
            f"--output {path}: a file ends in {', '.join(SUFFIXES)} (each but Parquet also with .gz); a "
            "name without an ending is a folder"
        )
    if format is not None:
        formats.writer(format)


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _split(record: Record) -> str:
    """The split that the record is of; what could not name a file in the folder, a row's own column perhaps,
    is none."""
    split = record.meta.get("split")
    return split if isinstance(split, str) and re.fullmatch(r"\w[\w.-]{0,63}", split) else "data"


def write(
    records: Iterator[Record], output: str | Path, format: str, folder: bool | None = None
) -> list[Output]:
    """Writes the records to a file (an empty one if there are none), or to a folder's SPLIT.jsonl by each
    record's meta.split (data.jsonl where it has none), whole or not at all. Without `folder`, an output
    whose name has no ending is one."""
    convert = formats.writer(format)
    output = Path(output).expanduser()
    folder = not output.suffix if folder is None else folder
    made: dict[Path, tuple[Output, _File, Path]] = {}
    counts: dict[Path, Counter[str]] = {}
    with contextlib.ExitStack() as undo:

        def begin(path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.part")
            undo.callback(beside.unlink, missing_ok=True)
            made[path] = (Output(str(path), format), _open(beside, path), beside)
            counts[path] = Counter()

        if not folder:  # also where no record goes on: what lay there is not the result
            begin(output)
        for record in records:
            path = output / f"{_split(record)}.jsonl" if folder else output
            if path not in made:
                begin(path)
            written = convert(record)
            if written.refused:
                made[path][0].refused.add(record.verdict(*written.refused))
                continue
            for values in written.rows:
                made[path][0].rows += 1
                made[path][1].put(values)
            counts[path].update(set(written.losses))
        for path, (one, file, beside) in made.items():
            file.close()
            one.sha256 = file_digest(beside)
            one.losses = dict(counts[path].most_common())
            beside.replace(path)
    return [one for one, _, _ in made.values()]


def _open(beside: Path, path: Path) -> _File:
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _Parquet(beside)
    # no time in the gzip header: the same rows are the same bytes
    raw = open(beside, "wb")
    file: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
    return {".jsonl": _Jsonl, ".json": _Json, ".csv": _Csv}[suffix](file)
