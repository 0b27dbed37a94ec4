"""Rows of a source as records that training can use, or what is wrong with them."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ftjax.data import formats
from ftjax.data.options import DataSource
from ftjax.data.read import Row, rows
from ftjax.data.record import Findings, Record, Verdict
from ftjax.errors import UserError


class BadExample(UserError):
    """One example that can't be trained on; `reason` is the short name that drops are counted by."""

    def __init__(self, reason: str, where: str, message: str):
        super().__init__(f"{where}: {message}")
        self.reason = reason


_REASONS = {
    "E011": "wrong_role",
    "W120": "wrong_role",
    "E013": "empty_content",
    "W105": "empty_content",
    "E014": "no_assistant",
    "E041": "equal_pair",
}
_UNFIT = ("W105", "W120")  # for training, where other targets may take them
_UNTRAINABLE = {
    "prompt_only": "a prompt without an answer",
    "stepwise": "steps with labels, for a model that rewards processes",
    "unpaired": "an answer with a label that says whether it is good",
}


def to_record(values: dict[str, Any], format: str, where: str) -> Record:
    """The row as a Record; raises BadExample for a row that breaks its format's rules or has parts that
    can't be trained on."""
    return _trainable(values, format, where)[0]


def _trainable(values: dict[str, Any], format: str, where: str) -> tuple[Record, list[Verdict]]:
    found = Findings()
    record = formats.read(values, format, found)
    wrong = next((v for v in found if v.severity == "error" or v.code in _UNFIT), None)
    if wrong is not None:
        raise BadExample(_REASONS.get(wrong.code, "format"), where, wrong.text)
    assert record is not None
    for name in ("messages", "chosen", "rejected"):
        for i, message in enumerate(getattr(record, name)):
            if not isinstance(message["content"], str):
                text = f"{name}[{i}].content has a part of type 'image_url'; only text can be trained"
                raise BadExample("format", where, text)
    record.where = where
    return record, found


def examples(
    source: DataSource,
    format: str | None = None,
    streaming: bool = False,
    formats_seen: list[str] | None = None,
) -> Iterator[tuple[Row, Record | BadExample]]:
    """Each row with its record, or with what is wrong with it (for the caller to raise or count).

    The format is `format`, the source's own, or the first row's; it is appended to `formats_seen` once known.
    A later row in another format raises UserError naming the line, and so does a row that asks for something
    else than training on text, an answer or a pair.
    """
    wanted = source.format or format
    if wanted is not None:
        formats.format_named(wanted)
    name = wanted
    first: Row | None = None
    pairs: bool | None = None
    for row in rows(source, streaming):
        assert row.values is not None
        where = f"{source.path}:{row.line}"
        if wanted is None:
            seen = formats.detect(row.values, where)
            if name is None or first is None:
                name, first = seen, row
            elif seen != name:
                raise UserError(
                    f"{where}: mixed formats: this row is {seen} (keys {_keys(row)}), but the file began as "
                    f"{name} (line {first.line}, keys {_keys(first)}). Put them in two files, "
                    "or set `format`."
                )
        assert name is not None
        if formats_seen is not None and not formats_seen:
            formats_seen.append(name)
        try:
            record, said = _trainable(row.values, name, where)
        except BadExample as e:
            yield row, e
            continue
        _refuse_untrainable(record, row.values, where)
        if pairs is not None and pairs != (record.task == "preference"):
            raise UserError(f"{where}: preference pairs can't be mixed with other data in one file")
        pairs = record.task == "preference"
        yield row._replace(said=said), record


def _refuse_untrainable(record: Record, values: dict[str, Any], where: str) -> None:
    if record.task not in _UNTRAINABLE:
        return
    if record.task == "unpaired" and "label" in values:
        raise UserError(
            f"{where}: the key `label` says which answers are bad (KTO's unpaired preferences), which can't "
            "be trained on yet; drop the bad ones, or set `format` to train on all of them alike"
        )
    raise UserError(
        f"{where}: this row is {record.task}: {_UNTRAINABLE[record.task]}. sft trains on answers, on plain "
        "text, and dpo on pairs; `ftjax data convert` makes the ones of it that can be made"
    )


def content_hash(values: dict[str, Any]) -> int:
    """64 bits of a hash of the row, the same on every machine and wherever in a file the row stands."""
    data = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str).encode(
        "utf-8", "surrogatepass"
    )
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _keys(row: Row) -> str:
    return ", ".join(map(str, row.values or ()))
