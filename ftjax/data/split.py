"""Train, eval and test with what belongs together on one side."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ftjax.data.duplicates import components
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


class Facts(NamedTuple):
    """What the decision needs of a part's rows, a few numbers each."""

    content: np.ndarray
    """uint64 [rows], the records' ids."""
    own: np.ndarray
    """uint64 [rows], hashes of the content as a key."""
    keys: np.ndarray
    """uint64 [K], hashes of the values of `by` that the rows have."""
    row: np.ndarray
    """int32 [K], the row of each key."""
    stratum: np.ndarray
    """int32 [rows], places in `strata`."""
    strata: list[str]


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
    version = 2  # the facts are arrays
    gathers = True
    Options = SplitOptions

    def __init__(self, options: SplitOptions):
        super().__init__(options)
        if options.test < 0 or options.eval < 0 or not 0 < options.test + options.eval < 1:
            raise UserError(
                f"split.test={options.test} and split.eval={options.eval}: give shares whose sum is above 0 "
                "and below 1; the rest is for training"
            )

    def facts(self, records: Iterable[Record], part: int) -> Facts:
        content, own, keys, rows, stratum = (array(kind) for kind in "QQQii")
        strata: dict[str, int] = {}
        for row, record in enumerate(records):
            own_id = record.id
            content.append(int(own_id, 16))
            own.append(_hash(["content", own_id]))
            stratum.append(strata.setdefault(self._stratum(record), len(strata)))
            for key in self.options.by:
                if record.meta.get(key) not in (None, ""):
                    keys.append(_hash([key, record.meta[key]]))
                    rows.append(row)
        arrays = map(np.array, (content, own, keys, rows, stratum))
        return Facts(*arrays, strata=list(strata))

    def _stratum(self, record: Record) -> str:
        if self.options.stratify is None:
            return ""
        if self.options.stratify == "answer":
            return record.answer_text()
        return str(record.meta.get(self.options.stratify))

    def decide(self, facts: Sequence[Facts]) -> Decision:
        starts = np.cumsum([0, *(len(fact.own) for fact in facts)])
        own = np.concatenate([fact.own for fact in facts])
        keys = np.concatenate([fact.keys for fact in facts])
        row = np.concatenate([fact.row + start for fact, start in zip(facts, starts[:-1], strict=True)])
        names, place = np.unique(np.concatenate([own, keys]), return_inverse=True)
        lowest = components(len(names), place[row], place[len(own) :])
        # a group's name is its lowest key
        groups, group = np.unique(lowest[place[: len(own)]], return_inverse=True)
        strata = sorted({name for fact in facts for name in fact.strata})
        number = {name: k for k, name in enumerate(strata)}
        stratum = np.concatenate(
            [np.array([number[s] for s in fact.strata], np.int32)[fact.stratum] for fact in facts]
        )
        drawn = np.array([_hash([self.options.seed, name]) / 2**64 for name in names[groups].tolist()])
        side = self._sides(drawn, group, stratum)[group]
        content = np.concatenate([fact.content for fact in facts])
        summary = self._summary(content, side, len(groups), stratum, strata)
        return Decision([part.tobytes() for part in np.split(side, starts[1:-1])], summary)

    def _sides(self, drawn: np.ndarray, group: np.ndarray, stratum: np.ndarray) -> np.ndarray:
        """The side of each group, uint8, of what was drawn for it and the group and stratum of each row."""
        shares = np.cumsum([self.options.test, self.options.eval])
        if self.options.stratify is None or not len(drawn):
            return np.searchsorted(shares, drawn, side="right").astype(np.uint8)
        # in each stratum the groups in the order of their hashes, until each side has its share of the rows
        sizes = np.bincount(group)
        pairs, rows = np.unique(np.stack([group, stratum]), axis=1, return_counts=True)
        most = np.lexsort((pairs[1], -rows, pairs[0]))
        _, first = np.unique(pairs[0][most], return_index=True)
        main = pairs[1][most[first]]  # the stratum of most of a group's rows
        order = np.lexsort((drawn, main))
        before = np.cumsum(sizes[order]) - sizes[order]
        _, begins, which = np.unique(main[order], return_index=True, return_inverse=True)
        of_stratum = np.add.reduceat(sizes[order], begins)
        middle = (before - before[begins][which] + sizes[order] / 2) / of_stratum[which]
        side = np.empty(len(sizes), np.uint8)
        side[order] = np.searchsorted(shares, middle, side="right")
        return side

    def _summary(
        self, content: np.ndarray, side: np.ndarray, groups: int, stratum: np.ndarray, strata: list[str]
    ) -> dict[str, Any]:
        def rows(side: np.ndarray) -> dict[str, int]:
            counts = np.bincount(side, minlength=len(SIDES)).tolist()
            return {name: counts[SIDES.index(name)] for name in reversed(SIDES)}

        summary: dict[str, Any] = {"rows": rows(side), "groups": groups}
        for name in ("test", "eval"):
            ids = np.sort(content[side == SIDES.index(name)])
            if len(ids):
                said = "\n".join(f"{one:016x}" for one in ids.tolist())
                summary[f"{name} hash"] = hashlib.sha256(said.encode()).hexdigest()[:16]
        if self.options.stratify is not None:
            order = np.argsort(stratum, kind="stable")
            parts = np.split(side[order], np.cumsum(np.bincount(stratum, minlength=len(strata))))
            summary["strata"] = dict(zip(strata, map(rows, parts), strict=False))
        return summary

    def apply(self, records: Iterable[Record], decision: Decision, part: int) -> Iterator[Judged]:
        for record, side in zip(records, decision.sides[part], strict=True):
            record.meta["split"] = SIDES[side]
            yield Judged(record, changed=True)

    def summary(self, decision: Decision) -> dict[str, Any]:
        return decision.summary


def _hash(value: Any) -> int:
    return hash64(json.dumps(value, sort_keys=True, default=str))
