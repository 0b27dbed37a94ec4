"""Duplicates: exact after normalisation, near by shingles that not everyone has, alike in meaning by vectors.

What the usual tools get wrong on data for tuning is handled before rows are compared: shingles of more than
`df_cut` of the rows (a system prompt, a template) say nothing of two rows' likeness and are left out, and
rows whose numbers, short answers, JSON answers, labels, tools or images differ are never duplicates. Every
pair is then checked exactly, and every row that goes names one that stays and how alike they are.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from ftjax.data import duplicates, minhash
from ftjax.data.record import Judged, Record, hash64, is_trained, text_of
from ftjax.data.steps import Step
from ftjax.errors import UserError


@dataclass(frozen=True)
class DedupOptions:
    """What counts as a duplicate, and which of them stays."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    on: Literal["prompt", "answer", "both"] = "both"
    """The text that is compared. A row where it is empty is no duplicate of any."""
    threshold: float = 0.7
    """Jaccard similarity of two rows' distinctive shingles from which they are duplicates, 0.5 to 1."""
    df_cut: float = 0.05
    """A shingle in more than this share of the rows is not distinctive; 1 compares whole texts."""
    keep: Literal["first", "longest", "best"] = "first"
    """Which of the duplicates stays; the best is that of the highest score."""
    score: str = "score"
    """The key of `meta` that holds a row's score, for keep=best."""
    report_only: bool = False
    """Drop nothing: warn (W107) where a row would have gone."""
    semantic: float = 0.0
    """Cosine similarity from which rows are duplicates in meaning; 0: meaning is not compared."""
    vectors: str | None = None
    """For semantic: a .npy file [rows, X] of a vector for each row, in order."""
    model: str | None = None
    """For semantic: the model whose mean hidden states are the vectors, an id or a folder."""


CODE = {duplicates.EXACT: "D001", duplicates.NEAR: "D002", duplicates.SEMANTIC: "D003"}
LIKE = {
    duplicates.EXACT: "the same as",
    duplicates.NEAR: "nearly the same as",
    duplicates.SEMANTIC: "means the same as",
}
SHORT_WORDS = 3
"""An answer of at most so many words is a label: another one is another answer."""
CHUNK_ROWS, CHUNK_CHARACTERS = 1024, 2_000_000
_DIGITS = re.compile(r"\d+")


def compared_text(record: Record, on: str) -> str:
    """The record's text that is compared with others'."""
    texts = []
    if on != "answer":
        texts.append(record.prompt_text())
    if on != "prompt":
        texts += [record.answer_text(), *map(text_of, record.rejected)]
    return "\n".join(filter(None, texts))


def differing(record: Record, text: str) -> bytes:
    """What duplicates have in common however alike they are: the numbers of the compared text, in order; a
    short or a JSON answer; labels, tools and their calls, images, the number of trained turns."""
    answer = record.answer_text().strip()
    short = minhash.normalise(answer) if len(answer) < 80 else ""
    if short.count(" ") >= SHORT_WORDS:
        short = ""
    if answer[:1] in ("{", "["):
        try:
            short = json.dumps(json.loads(answer), sort_keys=True)
        except ValueError:
            pass
    messages = [*record.messages, *record.chosen]
    calls = [call["function"] for m in messages for call in m.get("tool_calls") or []]
    lists = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    images = [part for content in lists for part in content if part.get("type") != "text"]
    facts = [numbers(text), short, record.task, record.label, record.labels]
    facts += [calls, images, record.tools, sum(map(is_trained, messages))]
    return json.dumps(facts, sort_keys=True, default=str).encode()


def numbers(text: str) -> list[str]:
    """The runs of digits, with a minus where one stands before and is no hyphen ("5-7", "(a)-1")."""
    found = []
    for match in _DIGITS.finditer(text):
        before = text[max(match.start() - 2, 0) : match.start()]
        minus = before[-1:] in ("-", "−") and not (before[:-1].isalnum() or before[:-1] in ("_", ")"))
        found.append("-" + match[0] if minus else match[0])
    return found


@dataclass(frozen=True)
class Facts:
    """Of one part: the files of its rows' hashes and shingles."""

    part: duplicates.Part
    sources: list[str]
    vectors: str | None


@dataclass(frozen=True)
class Decision:
    parts: list[duplicates.Part]
    starts: list[int]
    """The number of each part's first row, and the number of all."""
    found: np.ndarray
    """Every row that has duplicates, duplicates.FOUND by row."""
    places: list[str]
    """file:line of each one's kept row."""
    summary: dict[str, Any]


class Dedup(Step):
    """Drops duplicates (D001 exact, D002 near, D003 in meaning), or reports them (W107), and writes the
    cluster of each row that has any to `meta.cluster`.

    `embed` (texts -> [texts, X]) gives the vectors for `semantic`, instead of the options' file or model.
    """

    name = "dedup"
    gathers = True
    Options = DedupOptions

    def __init__(self, options: DedupOptions, embed: Callable[[list[str]], np.ndarray] | None = None):
        super().__init__(options)
        self.embed = embed
        self.alone = options.model is not None
        if not 0.5 <= options.threshold <= 1:
            raise UserError(f"dedup.threshold is {options.threshold}: give a similarity from 0.5 to 1")
        if not 0 < options.df_cut <= 1:
            raise UserError(
                f"dedup.df_cut is {options.df_cut}: give a share of the rows, above 0 and up to 1"
            )
        if not 0 <= options.semantic <= 1:
            raise UserError(f"dedup.semantic is {options.semantic}: give a cosine similarity, or 0 for none")
        given = (embed is not None) + (options.vectors is not None) + (options.model is not None)
        if options.semantic and given != 1:
            raise UserError(
                "dedup.semantic compares vectors: give one of dedup.model (its hidden states) and "
                "dedup.vectors (a .npy file)"
            )
        if given and not options.semantic:
            raise UserError("dedup: vectors are compared only with dedup.semantic, a cosine such as 0.95")

    def reads(self) -> Sequence[str | Path]:
        return [self.options.vectors] if self.options.vectors else []

    def facts(self, records: Iterable[Record], part: int) -> Facts:
        folder = self.folder or Path(tempfile.mkdtemp(prefix="ftjax-dedup-"))
        path = {name: str(folder / f"{name}-{part:05}") for name in ("rows", "shingles", "vectors")}
        sources: dict[str, int] = {}
        vectors = []
        count = 0
        embed = self.embed
        if self.options.model:
            from ftjax.data.embed import embedder  # brings jax

            embed = embedder(self.options.model)
        with open(path["rows"], "wb") as of_rows, open(path["shingles"], "wb") as of_sets:
            for chunk in _chunks(records, self.options.on):
                texts = [text for _, text in chunk]
                normal = [minhash.normalise(text) for text in texts]
                hashes, sizes = minhash.shingles(normal)
                rows = []
                for (record, text), plain, size in zip(chunk, normal, sizes.tolist(), strict=True):
                    guard = differing(record, text)
                    exact = hash64(plain.encode("utf-8", "surrogatepass") + b"\0" + guard)
                    source = sources.setdefault(str(record.meta.get("source", "")), len(sources))
                    line = record.meta.get("line", 0)
                    rows.append((exact, hash64(guard), size, self._priority(record, text), source, line))
                np.array(rows, duplicates.ROW).tofile(of_rows)
                hashes.tofile(of_sets)
                if embed is not None:
                    vectors.append(np.asarray(embed(texts), np.float32))
                count += len(chunk)
        if embed is not None:
            with open(path["vectors"], "wb") as file:
                np.save(file, np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32))
        files = duplicates.Part(path["rows"], path["shingles"], count)
        return Facts(files, list(sources), path["vectors"] if embed is not None else None)

    def _priority(self, record: Record, text: str) -> float:
        if self.options.keep == "longest":
            return len(text)
        if self.options.keep == "best":
            score = record.meta.get(self.options.score)
            if not isinstance(score, int | float):
                place = f"{record.meta.get('source', '')}:{record.meta.get('line', 0)}"
                raise UserError(
                    f"{place}: dedup.keep=best needs a number in meta.{self.options.score}, which is "
                    f"{score!r}: run `ftjax data score` before, or name another key with dedup.score"
                )
            return score
        return 0.0

    def decide(self, facts: Sequence[Facts]) -> Decision:
        table = duplicates.Table([fact.part for fact in facts])
        first = duplicates.first_copies(table.exact)
        single = np.flatnonzero((first == np.arange(table.total)) & ~table.empty)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            pairs = duplicates.near(table, single, self.options.threshold, self.options.df_cut, Path(scratch))
        if self.options.semantic:
            vectors = self._vectors(facts, table)
            pairs = duplicates.Pairs.joined(
                [pairs, duplicates.alike(table, single, vectors, self.options.semantic)]
            )
        found = duplicates.settle(table, first, pairs)
        starts = table.starts.tolist()
        return Decision(
            [fact.part for fact in facts],
            starts,
            found,
            _places(facts, starts, found["kept"]),
            _summary(table, found),
        )

    def _vectors(self, facts: Sequence[Facts], table: duplicates.Table) -> list[np.ndarray]:
        if self.options.vectors is None:
            return [np.load(fact.vectors, mmap_mode="r") for fact in facts if fact.vectors]
        whole = np.load(self.options.vectors, mmap_mode="r")
        if whole.ndim != 2 or len(whole) != table.total:
            raise UserError(
                f"dedup.vectors: {self.options.vectors} has the shape {list(whole.shape)}; there are "
                f"{table.total} rows, and each needs a vector, in their order"
            )
        return np.split(whole, table.starts[1:-1])

    def apply(self, records: Iterable[Record], decision: Decision, part: int) -> Iterator[Judged]:
        begin, end = np.searchsorted(decision.found["row"], decision.starts[part : part + 2])
        entries = {int(decision.found["row"][k]): k for k in range(begin, end)}
        for row, record in enumerate(records, decision.starts[part]):
            if row not in entries:
                yield Judged(record)
                continue
            entry = decision.found[entries[row]]
            record.meta["cluster"] = cluster = f"{int(entry['cluster']):016x}"
            if entry["kept"] == row:
                yield Judged(record, changed=True)
                continue
            kind = int(entry["kind"])
            text = f"{LIKE[kind]} {decision.places[entries[row]]}, similarity {entry['similarity']:.2f}"
            text += f", cluster {cluster}"
            if self.options.report_only:
                yield Judged(record, [record.verdict("W107", text)], changed=True)
            else:
                yield Judged(None, [record.verdict(CODE[kind], text)])
        for path in decision.parts[part][:2]:  # decided and done
            Path(path).unlink(missing_ok=True)

    def summary(self, decision: Decision) -> dict[str, Any]:
        return decision.summary


def _chunks(records: Iterable[Record], on: str) -> Iterator[list[tuple[Record, str]]]:
    chunk, size = [], 0
    for record in records:
        text = compared_text(record, on)
        chunk.append((record, text))
        size += len(text)
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _places(facts: Sequence[Facts], starts: list[int], rows: np.ndarray) -> list[str]:
    """file:line of rows."""
    places = [""] * len(rows)
    for fact, begin, end in zip(facts, starts[:-1], starts[1:], strict=True):
        here = np.flatnonzero((rows >= begin) & (rows < end))
        if len(here):
            part = np.fromfile(fact.part.rows, duplicates.ROW)[rows[here] - begin]
            for k, source, line in zip(here, part["source"], part["line"], strict=True):
                places[k] = f"{fact.sources[source] or 'row'}:{line}"
    return places


def _summary(table: duplicates.Table, found: np.ndarray) -> dict[str, Any]:
    gone = found[found["kept"] != found["row"]]
    _, sizes = np.unique(found["cluster"], return_counts=True)
    return {
        "rows": table.total,
        "nothing to compare": int(table.empty.sum()),
        "clusters": len(sizes),
        "largest cluster": int(sizes.max(initial=0)),
        "exact": int((gone["kind"] == duplicates.EXACT).sum()),
        "near": int((gone["kind"] == duplicates.NEAR).sum()),
        "semantic": int((gone["kind"] == duplicates.SEMANTIC).sum()),
        "common shingles": int(table.common.table.sum()),
    }
