"""Several sources in given shares."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ftjax.data.record import Judged, Record, hash64
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


class Facts(NamedTuple):
    """What the decision needs of a part's rows."""

    drawn: np.ndarray
    """uint64 [rows], by which the rows of a source are ordered: a hash of their content and the seed."""
    source: np.ndarray
    """int32 [rows], places in `sources`."""
    sources: list[str]


@dataclass(frozen=True)
class Decision:
    copies: list[np.ndarray]
    """Of each part, how often each row is in the mixture, uint32."""
    why: dict[str, str]
    """Of each source, what was drawn."""
    summary: dict[str, Any]


class Mix(Step):
    """Draws rows of several sources: those with the lowest hashes, the same for the same seed, however the
    files are ordered; a source of which more is wanted than it has is repeated. M001 for each row left out.
    """

    name = "mix"
    version = 2  # the facts are arrays
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

    def facts(self, records: Iterable[Record], part: int) -> Facts:
        drawn, source = array("Q"), array("i")
        sources: dict[str, int] = {}
        for record in records:
            drawn.append(hash64(f"{self.options.seed} {record.id}"))
            source.append(sources.setdefault(self._source(record), len(sources)))
        return Facts(np.array(drawn, np.uint64), np.array(source, np.int32), list(sources))

    def decide(self, facts: Sequence[Facts]) -> Decision:
        names = sorted({name for fact in facts for name in fact.sources})
        number = {name: k for k, name in enumerate(names)}
        source = np.concatenate(
            [np.array([number[s] for s in fact.sources], np.int32)[fact.source] for fact in facts]
        )
        drawn = np.concatenate([fact.drawn for fact in facts])
        count = np.bincount(source, minlength=len(names)).tolist()
        rows = dict(zip(names, count, strict=True))
        weights = _of_sources("weight", self.weights, rows)
        caps = _of_sources("cap", self.caps, rows)
        if weights and set(weights) != set(rows):
            missing = ", ".join(sorted(set(rows) - set(weights)))
            raise UserError(f"mix.weight: give every source a share or none; there is none for {missing}")
        there = {source: min(found, caps.get(source, found)) for source, found in rows.items()}
        wanted = _wanted(there, weights, self.options.total)
        copies = np.zeros(len(source), np.uint32)
        in_order = np.lexsort((drawn, source))  # stable: equals as they come
        for name, found in zip(names, np.split(in_order, np.cumsum(count)), strict=False):
            times, more = divmod(wanted[name], there[name])
            copies[found[: there[name]]] = times
            copies[found[:more]] += 1
        why = {name: f"{wanted[name]} of {rows[name]} rows are drawn" for name in names}
        ends = np.cumsum([len(fact.source) for fact in facts])[:-1]
        return Decision(np.split(copies, ends), why, _summary(rows, there, wanted))

    def apply(self, records: Iterable[Record], decision: Decision, part: int) -> Iterator[Judged]:
        for record, copies in zip(records, decision.copies[part].tolist(), strict=True):
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
