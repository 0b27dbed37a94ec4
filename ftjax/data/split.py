"""Train, eval and test with what belongs together on one side."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ftjax.data.record import Judged, Record, hash64
from ftjax.data.steps import Step
from ftjax.errors import UserError

SIDES = ("test", "eval", "train")


@dataclass(frozen=True)
class SplitOptions:
    """How large the sides are, and what stays together."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    test: float = 0.1
    """Share of the groups for the test set."""
    eval: float = 0.0
    """Share of the groups for evaluation while training."""
    by: list[str] = field(default_factory=lambda: ["group", "cluster", "conversation"])
    """Keys of `meta`: rows that have the same value of any of them stay on one side, and so do rows with the
    same content."""
    stratify: str | None = None
    """A key of `meta`, or "answer": each of its values gets its share of every side. At the border of the
    shares a group may then change sides when rows are added."""
    seed: int = 0
    """Another seed, another split."""


@dataclass(frozen=True)
class Row:
    """What the decision needs of a record."""

    content: str
    keys: tuple[int, ...]
    stratum: str


@dataclass(frozen=True)
class Decision:
    sides: list[bytes]
    """Of each part, a byte a row: the side's place in SIDES."""
    summary: dict[str, Any]


class Split(Step):
    """Writes the side of each record to `meta.split`.

    A group's side is a hash of its name (the lowest of its keys' hashes), so that it does not change when
    rows are added or come in another order, unless they join two groups.
    """

    name = "split"
    gathers = True
    Options = SplitOptions

    def __init__(self, options: SplitOptions):
        super().__init__(options)
        if options.test < 0 or options.eval < 0 or not 0 < options.test + options.eval < 1:
            raise UserError(
                f"split.test={options.test} and split.eval={options.eval}: give shares whose sum is above 0 "
                "and below 1; the rest is for training"
            )

    def facts(self, records: Iterable[Record], part: int) -> list[Row]:
        return [self._row(record) for record in records]

    def _row(self, record: Record) -> Row:
        content = record.id
        keys = [_hash(["content", content])]
        for key in self.options.by:
            if record.meta.get(key) not in (None, ""):
                keys.append(_hash([key, record.meta[key]]))
        if self.options.stratify is None:
            return Row(content, tuple(keys), "")
        if self.options.stratify == "answer":
            return Row(content, tuple(keys), record.answer_text())
        return Row(content, tuple(keys), str(record.meta.get(self.options.stratify)))

    def decide(self, facts: Sequence[list[Row]]) -> Decision:
        root: dict[int, int] = {}

        def find(key: int) -> int:
            while root.setdefault(key, key) != key:
                root[key] = root[root[key]]
                key = root[key]
            return key

        for row in (row for part in facts for row in part):
            names = sorted({find(key) for key in row.keys})
            for name in names[1:]:
                root[name] = names[0]  # the lowest is the group's name
        side = self._sides(facts, find)
        sides = [bytes(side[find(row.keys[0])] for row in part) for part in facts]
        return Decision(sides, self._summary(facts, sides, len(side)))

    def _sides(self, facts: Sequence[list[Row]], find) -> dict[int, int]:
        """The side of each group."""
        test, evaluation = self.options.test, self.options.test + self.options.eval
        groups: dict[int, Counter[str]] = defaultdict(Counter)
        for row in (row for part in facts for row in part):
            groups[find(row.keys[0])][row.stratum] += 1
        drawn = {name: _hash([self.options.seed, name]) / 2**64 for name in groups}
        if self.options.stratify is None:
            return {name: 0 if u < test else 1 if u < evaluation else 2 for name, u in drawn.items()}
        # in each stratum the groups in the order of their hashes, until each side has its share of the rows
        strata: dict[str, list[int]] = defaultdict(list)
        for name, counts in groups.items():
            strata[min(counts, key=lambda stratum: (-counts[stratum], stratum))].append(name)
        side = {}
        for names in strata.values():
            rows = sum(groups[name].total() for name in names)
            before = 0
            for name in sorted(names, key=drawn.__getitem__):
                middle = (before + groups[name].total() / 2) / rows
                side[name] = 0 if middle < test else 1 if middle < evaluation else 2
                before += groups[name].total()
        return side

    def _summary(self, facts: Sequence[list[Row]], sides: list[bytes], groups: int) -> dict[str, Any]:
        rows, strata = Counter(), defaultdict(Counter)
        held: dict[str, list[str]] = {"test": [], "eval": []}
        for part, given in zip(facts, sides, strict=True):
            for row, number in zip(part, given, strict=True):
                name = SIDES[number]
                rows[name] += 1
                strata[row.stratum][name] += 1
                if name in held:
                    held[name].append(row.content)
        summary: dict[str, Any] = {"rows": {s: rows[s] for s in reversed(SIDES)}, "groups": groups}
        for name, ids in held.items():
            if ids:
                summary[f"{name} hash"] = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]
        if self.options.stratify is not None:
            summary["strata"] = {
                stratum: {s: counts[s] for s in reversed(SIDES)} for stratum, counts in sorted(strata.items())
            }
        return summary

    def apply(self, records: Iterable[Record], decision: Decision, part: int) -> Iterator[Judged]:
        for record, side in zip(records, decision.sides[part], strict=True):
            record.meta["split"] = SIDES[side]
            yield Judged(record, changed=True)

    def summary(self, decision: Decision) -> dict[str, Any]:
        return decision.summary


def _hash(value: Any) -> int:
    return hash64(json.dumps(value, sort_keys=True, default=str))
