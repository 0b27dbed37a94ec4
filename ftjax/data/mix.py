"""Several sources in given shares."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ftjax.data.record import Judged, Record
from ftjax.data.steps import Step
from ftjax.errors import UserError


@dataclass(frozen=True)
class MixOptions:
    """How much of each source."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    weight: list[str] = field(default_factory=list)
    """SOURCE=SHARE of the rows of the mixture, for every source or for none (all rows of each then); a source
    is the name of a file, or a value of the key `by`."""
    cap: list[str] = field(default_factory=list)
    """SOURCE=ROWS: at most so many rows of a source, before the shares are taken."""
    total: int | None = None
    """Rows of the mixture; if absent, as many as there are without any row twice."""
    by: str = "source"
    """The key of `meta` that says the source."""
    seed: int = 0
    """Other seeds draw other rows."""


@dataclass(frozen=True)
class Decision:
    copies: list[list[int]]
    """Of each part, how often each row is in the mixture."""
    why: dict[str, str]
    """Of each source, what was drawn."""
    summary: dict[str, Any]


class Mix(Step):
    """Draws rows of several sources: those with the lowest hashes, the same for the same seed, however the
    files are ordered; a source of which more is wanted than it has is repeated. M001 for each row left out.
    """

    name = "mix"
    gathers = True
    Options = MixOptions

    def __init__(self, options: MixOptions):
        super().__init__(options)
        self.weights = _pairs("weight", options.weight, float)
        self.caps = _pairs("cap", options.cap, int)
        if options.total is not None and options.total < 1:
            raise UserError(f"mix.total is {options.total}: give a number of rows")

    def _source(self, record: Record) -> str:
        value = record.meta.get(self.options.by)
        return "" if value is None else str(value)

    def facts(self, records: Iterable[Record], part: int) -> list[tuple[str, str]]:
        return [(self._source(record), record.id) for record in records]

    def decide(self, facts: Sequence[list[tuple[str, str]]]) -> Decision:
        rows: dict[str, list[tuple[bytes, int, int]]] = {}
        for part, records in enumerate(facts):
            for place, (source, content) in enumerate(records):
                drawn = hashlib.blake2b(f"{self.options.seed} {content}".encode(), digest_size=16).digest()
                rows.setdefault(source, []).append((drawn, part, place))
        weights = _of_sources("weight", self.weights, rows)
        caps = _of_sources("cap", self.caps, rows)
        if weights and set(weights) != set(rows):
            missing = ", ".join(sorted(set(rows) - set(weights)))
            raise UserError(f"mix.weight: give every source a share or none; there is none for {missing}")
        there = {source: min(len(found), caps.get(source, len(found))) for source, found in rows.items()}
        wanted = _wanted(there, weights, self.options.total)
        copies = [[0] * len(records) for records in facts]
        for source, found in rows.items():
            drawn = sorted(found)[: there[source]]
            for k in range(wanted[source]):
                _, part, place = drawn[k % len(drawn)]
                copies[part][place] += 1
        why = {s: f"{wanted[s]} of {len(rows[s])} rows are drawn" for s in rows}
        return Decision(copies, why, _summary({s: len(found) for s, found in rows.items()}, there, wanted))

    def apply(self, records: Iterable[Record], decision: Decision, part: int) -> Iterator[Judged]:
        for record, copies in zip(records, decision.copies[part], strict=True):
            if not copies:
                source = self._source(record)
                text = f"of {source or 'this source'} {decision.why[source]}"
                yield Judged(None, [record.verdict("M001", text)])
            for _ in range(copies):
                yield Judged(record)

    def summary(self, decision: Decision) -> dict[str, Any]:
        return decision.summary


def _pairs(option: str, given: list[str], number: type) -> dict[str, Any]:
    """{source: number} of SOURCE=NUMBER."""
    pairs = {}
    for text in given:
        source, equals, value = text.rpartition("=")
        try:
            pairs[source] = number(value)
        except ValueError:
            equals = ""
        if not equals or pairs[source] <= 0:
            raise UserError(f"mix.{option}: {text}: write SOURCE=NUMBER, a positive one, e.g. faq.jsonl=2")
    return pairs


def _of_sources(option: str, given: dict[str, Any], rows: Iterable[str]) -> dict[str, Any]:
    """The same by the sources as they are called in the rows; a file may be given by its name alone."""
    out = {}
    for name, value in given.items():
        same = [s for s in rows if s == name] or [s for s in rows if Path(s).name == name]
        if len(same) != 1:
            what = "is the name of several sources" if same else "is no source"
            raise UserError(f"mix.{option}: {name} {what}; there are {', '.join(sorted(rows))}")
        out[same[0]] = value
    return out


def _wanted(there: dict[str, int], weights: dict[str, float], total: int | None) -> dict[str, int]:
    """Rows of each source: shares of the total, the remainders to the largest fractions."""
    if not weights:
        if total is None:
            return there
        weights = {source: float(count) for source, count in there.items()}
    whole = sum(weights.values())
    if total is None:
        total = int(min(there[s] * whole / weights[s] for s in there) + 1e-9)
    exact = {s: total * weights[s] / whole for s in there}
    wanted = {s: int(exact[s]) for s in there}
    rest = sorted(there, key=lambda s: (wanted[s] - exact[s], s))
    for source in rest[: total - sum(wanted.values())]:
        wanted[source] += 1
    return wanted


def _summary(rows: dict[str, int], there: dict[str, int], wanted: dict[str, int]) -> dict[str, Any]:
    total = sum(wanted.values())
    sources = {}
    for source in sorted(rows):
        sources[source] = {
            "rows": rows[source],
            "drawn": wanted[source],
            "share": round(wanted[source] / total, 4) if total else 0.0,
            "times": round(wanted[source] / rows[source], 4),
        }
        if wanted[source] > there[source]:
            sources[source]["repeated"] = True
    return {"rows": total, "sources": sources}
