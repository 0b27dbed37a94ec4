"""Test items in the training data: those of given benchmarks, and those of the set's own test side.

The rule is that of Tülu 3 (Lambert et al. 2024): an item is in a row if at least half of its words are in
sequences of eight words that both have.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ftjax.data import minhash, read
from ftjax.data.options import DataSource
from ftjax.data.record import Judged, Record, hash64, text_of
from ftjax.data.steps import Step
from ftjax.errors import UserError

HELD_OUT = ("test", "eval")
QUESTIONS = ("question", "prompt", "problem", "instruction", "query")
QUESTIONS += ("turns", "messages", "conversations", "text")
"""The keys that are looked for in a benchmark's row: the first that it has is the item's text."""
CHUNK = 512
_LETTERS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai … Han
_BITS = 22


@dataclass(frozen=True)
class ContamOptions:
    """What may not be in the training data, and how much of it makes a row go."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    against: list[str] = field(default_factory=list)
    """Benchmark files, or ids of data sets; besides them the rows whose `meta.split` is test or eval."""
    key: list[str] = field(default_factory=list)
    """Keys of a benchmark's row whose texts are the item; if absent, its question, prompt, instruction …"""
    n: int = 8
    """Words in a sequence."""
    cover: float = 0.5
    """Share of an item's words that are in shared sequences from which a row has the item."""
    report_only: bool = False
    """Drop nothing: report the rows."""


class Index:
    """Items to look for.

    Sequences that are in many of the items (in more than 5 %, and more than ten) are a template's and count
    neither for nor against. An item of fewer than `n` words is found where a message is it and nothing else.
    """

    def __init__(self, items: Sequence[tuple[str, str]], n: int, cover: float):
        """Of (name, text)."""
        self.names = [name for name, _ in items]
        self.n, self.cover = n, cover
        texts = [_words(text) for _, text in items]
        self.short: dict[str, int] = {}
        for k, text in enumerate(texts):
            if text and text.count(" ") < n - 1:
                self.short.setdefault(text, k)
        grams, item, place = _grams(texts, n)
        order = np.lexsort((place, item, grams))
        grams, item, place = grams[order], item[order], place[order]
        again = np.concatenate([[False], (grams[1:] == grams[:-1]) & (item[1:] == item[:-1])])[: len(grams)]
        distinct, counts = np.unique(grams[~again], return_counts=True)  # items that have each
        common = distinct[counts > max(0.05 * len(items), min(len(items) / 2, 10), 2)]
        kept = ~np.isin(grams, common)
        self.grams, self.item, self.place = grams[kept], item[kept], place[kept]
        self.words = np.zeros(len(items), np.int64)
        for k, places in _by(self.item, self.place):
            self.words[k] = _covered(places, n)
        self.table = np.zeros(1 << _BITS, bool)
        self.table[_slot(self.grams)] = True

    def find(self, rows: "Rows") -> Iterator[tuple[int, int, float]]:
        """(row, item, share of the item's words) of each item that is in a row."""
        if self.short:
            for k, texts in enumerate(rows.texts):
                for item in sorted({self.short[text] for text in texts if text in self.short}):
                    yield k, item, 1.0
        grams, row = rows.grams, rows.row
        likely = self.table[_slot(grams)]
        grams, row = grams[likely], row[likely]
        low, high = (np.searchsorted(self.grams, grams, side) for side in ("left", "right"))
        for k, here in _by(row, np.arange(len(row))):
            spans = {(int(low[h]), int(high[h])) for h in here}
            found: dict[int, set[int]] = defaultdict(set)
            for a, b in spans:
                for at in range(a, b):
                    found[int(self.item[at])].add(int(self.place[at]))
            for item, places in sorted(found.items()):
                share = _covered(np.array(sorted(places)), self.n) / self.words[item]
                if share >= self.cover:
                    yield k, item, float(share)


class Rows:
    """Rows, each given by the texts of its messages, as any index of sequences of `n` words looks at them."""

    def __init__(self, rows: Sequence[Sequence[str]], n: int):
        self.texts = [[_words(text) for text in texts] for texts in rows]
        self.grams, self.row, _ = _grams([" ".join(texts) for texts in self.texts], n)


def _words(text: str) -> str:
    """Words with a space between them; of scripts without spaces every letter is one."""
    text = minhash.normalise(text)
    return text if text.isascii() else " ".join(_LETTERS.sub(r" \g<0> ", text).split())


def _slot(grams: np.ndarray) -> np.ndarray:
    return (grams >> np.uint64(64 - _BITS)).astype(np.int64)


def _by(keys: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(key, its values, sorted) of each key."""
    if not len(keys):
        return
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    for a, b in zip(begins, [*begins[1:], len(keys)], strict=True):
        yield int(keys[a]), values[a:b]


def _covered(places: np.ndarray, n: int) -> int:
    """Words in the sequences of `n` that begin at these places, which are sorted."""
    return int(np.minimum(np.diff(places, append=places[-1] + n), n).sum()) if len(places) else 0


def _mixed(x: np.ndarray) -> np.ndarray:
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    return x


_FACTORS = np.random.default_rng(8).integers(0, 2**64, 128, np.uint64) | np.uint64(1)


def _grams(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hash, text, first word's number) of each sequence of `n` words of normalised texts."""
    counts = np.array([text.count(" ") + 1 if text else 0 for text in texts], np.int64)
    joined = "".join(f"{text} " for text in texts if text)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    total = int(counts.sum())
    if total < n:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(codes == 32)[:-1] + 1])  # a word and the space after it
    within = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    words = _mixed(np.add.reduceat((codes + np.uint64(1)) * _FACTORS[within % 64], starts))
    grams = np.zeros(total - n + 1, np.uint64)
    for k in range(n):
        grams += words[k : k + len(grams)] * _FACTORS[64 + k % 64]
    text = np.repeat(np.arange(len(texts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    whole = text[: len(grams)] == text[n - 1 :]
    places = np.arange(total)[: len(grams)] - first[: len(grams)]
    return _mixed(grams[whole]), text[: len(grams)][whole], places[whole]


def texts_of(record: Record) -> list[str]:
    """The texts of a record's messages, without system prompts."""
    messages = [*record.messages, *record.chosen, *record.rejected]
    asked = [text_of(m) for m in messages if m["role"] not in ("system", "developer")]
    return [text for text in [*asked, record.text, *record.completions] if text]


def benchmark(path: str, keys: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(place, text) of each item of a benchmark's file or data set."""
    items = []
    for row in read.rows(DataSource(path)):
        values = row.values or {}
        named = list(keys) or [key for key in QUESTIONS if values.get(key)][:1]
        if not named or any(key not in values for key in named):
            raise UserError(
                f"{path}:{row.line}: the row has no {', '.join(keys or QUESTIONS)}; it has "
                f"{', '.join(values)}: name those that make the item with contam.key"
            )
        text = " ".join(_text(values[key]) for key in named)
        if named == ["instruction"] and values.get("input"):
            text += f" {values['input']}"
        items.append((f"{path}:{row.line}", text))
    return items


def _text(value: Any) -> str:
    """The text of a value; of a conversation that of what is asked."""
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, dict):
        if value.get("role", value.get("from")) in ("assistant", "gpt", "system"):
            return ""
        return _text(value.get("content") or value.get("value") or value.get("text") or "")
    return str(value)


@dataclass(frozen=True)
class Facts:
    hits: list[tuple[int, str, str, float]]
    """(row, benchmark, item, share)."""
    held: list[tuple[str, list[str], str]]
    """(place, texts, cluster) of the rows of the test and eval sides."""


@dataclass(frozen=True)
class Decision:
    hits: list[list[tuple[int, str, str, float]]]
    index: Index | None
    exact: dict[int, str]
    """The place of each text that is held out, by its hash."""
    clusters: dict[str, str]
    summary: dict[str, Any]


class Contam(Step):
    """Drops, or reports, rows of the training side that have an item of a benchmark (C001) or of the set's
    own test and eval sides (C002: the same text, the same cluster, or most of its words)."""

    name = "contam"
    version = 2  # texts that are held out are known by their hashes
    gathers = True
    Options = ContamOptions

    def __init__(self, options: ContamOptions):
        super().__init__(options)
        if options.n < 2:
            raise UserError(f"contam.n is {options.n}: give a number of words, 2 or more")
        if not 0 < options.cover <= 1:
            raise UserError(f"contam.cover is {options.cover}: give a share, above 0 and up to 1")
        self._indices: list[tuple[str, Index]] | None = None

    def reads(self) -> Sequence[str | Path]:
        return [path for path in self.options.against if Path(path).is_file()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": None}  # every process makes its own

    def indices(self) -> list[tuple[str, Index]]:
        """An index of each benchmark."""
        if self._indices is None:
            self._indices = [
                (path, Index(benchmark(path, self.options.key), self.options.n, self.options.cover))
                for path in self.options.against
            ]
        return self._indices

    def facts(self, records: Iterable[Record], part: int) -> Facts:
        facts = Facts([], [])
        for first, chunk in _chunks(records):
            rows = []
            for record in chunk:
                held = record.meta.get("split") in HELD_OUT
                rows.append([] if held else texts_of(record))
                if held:
                    place = f"{record.meta.get('source') or 'row'}:{record.meta.get('line', 0)}"
                    facts.held.append((place, texts_of(record), str(record.meta.get("cluster") or "")))
            seen = Rows(rows, self.options.n)
            for path, index in self.indices():
                for row, item, share in index.find(seen):
                    facts.hits.append((first + row, path, index.names[item], share))
        return facts

    def decide(self, facts: Sequence[Facts]) -> Decision:
        held = [row for part in facts for row in part.held]
        summary: dict[str, Any] = {}
        for path, index in self.indices():
            hits = [(number, hit) for number, part in enumerate(facts) for hit in part.hits if hit[1] == path]
            summary[path] = {
                "items": len(index.names),
                "items hit": len({hit[2] for _, hit in hits}),
                "rows": len({(number, hit[0]) for number, hit in hits}),
            }
        if held:
            summary["held out rows"] = len(held)
        items = [(place, " ".join(texts)) for place, texts, _ in held]
        return Decision(
            [part.hits for part in facts],
            Index(items, self.options.n, self.options.cover) if items else None,
            {hash64(minhash.normalise(text)): place for place, text in reversed(items)},
            {cluster: place for place, _, cluster in reversed(held) if cluster},
            summary,
        )

    def apply(self, records: Iterable[Record], decision: Decision, part: int) -> Iterator[Judged]:
        hits: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for row, _, item, share in decision.hits[part]:
            hits[row].append(("C001", f"{share:.0%} of {item} is in it"))
        for first, chunk in _chunks(records):
            rows = [[] if r.meta.get("split") in HELD_OUT else texts_of(r) for r in chunk]
            for k, leak in self._leaks(chunk, rows, decision):
                hits[first + k].append(("C002", leak))
            for row, record in enumerate(chunk, first):
                verdicts = [record.verdict(code, text) for code, text in hits.pop(row, [])]
                dropped = verdicts and not self.options.report_only
                yield Judged(None if dropped else record, verdicts)

    def _leaks(
        self, records: Sequence[Record], rows: Sequence[list[str]], decision: Decision
    ) -> Iterator[tuple[int, str]]:
        if decision.index is None:
            return
        leaks: dict[int, str] = {}
        for k, item, share in decision.index.find(Rows(rows, self.options.n)):
            leaks.setdefault(k, f"{share:.0%} of {decision.index.names[item]}, which is held out, is in it")
        for k, (record, texts) in enumerate(zip(records, rows, strict=True)):
            cluster = str(record.meta.get("cluster") or "")
            if not texts:
                continue
            if place := decision.exact.get(hash64(minhash.normalise(" ".join(texts)))):
                leaks[k] = f"it is {place}, which is held out"
            elif place := decision.clusters.get(cluster):
                leaks[k] = f"{place} of its cluster {cluster} is held out"
        yield from sorted(leaks.items())

    def summary(self, decision: Decision) -> dict[str, Any]:
        return decision.summary


def _chunks(records: Iterable[Record]) -> Iterator[tuple[int, list[Record]]]:
    """(number of its first, records) by CHUNK."""
    iterator, first = iter(records), 0
    while chunk := list(islice(iterator, CHUNK)):
        yield first, chunk
        first += len(chunk)
