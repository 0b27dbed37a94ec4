"""The k examples to keep: by score and diversity, by length, or at random."""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from ftjax.data.record import Judged, Record
from ftjax.data.steps import Step
from ftjax.errors import UserError

WORD_AXES = 512  # of the vectors of hashed words
DROPPED, SELECTED, SIMILAR, UNSCORED = range(4)


@dataclass(frozen=True)
class SelectOptions:
    """How many examples are kept, and which."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    k: int
    """How many are kept."""
    by: Literal["deita", "top", "longest", "random"] = "deita"
    """deita: best first by complexity times quality, leaving out those too similar to one that was kept.
    top: best first. longest: the longest answers, the baseline to beat. random: drawn evenly."""
    score: str | None = None
    """A name in meta.scores to go by, e.g. ifd, instead of complexity times quality; `top` needs it."""
    lowest: bool = False
    """The lowest score is best, as of perplexity."""
    below: float | None = None
    """Leave out rows whose score is this or more, e.g. 1 of ifd."""
    similarity: float = 0.9
    """deita: an example is left out where its cosine similarity to a kept one is this or more."""
    model: str | None = None
    """deita: a local model whose hidden states the similarity is of; words in common, by hashing, if
    absent."""
    seed: int = 0
    """random: another seed draws others."""

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"k={self.k}: at least 1")
        if self.by == "top" and not self.score:
            raise UserError("by=top: name the score to go by, e.g. score=ifd")
        if self.by in ("longest", "random") and (self.score or self.lowest):
            raise UserError(f"by={self.by}: score and lowest have no effect")
        if self.by != "deita" and self.model:
            raise UserError(f"by={self.by}: model has no effect")
        if self.below is not None and not self.score:
            raise UserError("below: name the score that it is of")
        if not 0 < self.similarity <= 1:
            raise UserError(f"similarity={self.similarity}: above 0 and up to 1")


class _Facts(NamedTuple):
    scores: np.ndarray
    """float64 [rows], NaN for none."""

    vectors: str | np.ndarray | None
    """[rows, X], each of length 1; or the file with them."""


class _Decision(NamedTuple):
    fates: list[np.ndarray]
    """Of each part, [rows]."""
    similar: dict[tuple[int, int], float]
    """(part, row): its similarity to a kept one, of those left out for it."""
    said: str


class Select(Step):
    """Keeps k records in their order; the rest end here, each with why.

    deita is the rule of Liu et al. 2024 (arXiv:2312.15685, section 2.4): in descending order of score, an
    example is kept if its nearest among those already kept is less similar than the threshold, until there
    are k. longest is the baseline of Zhao et al. 2024 (arXiv:2402.04833).
    """

    name = "select"
    Options = SelectOptions
    gathers = True

    def __init__(self, options: SelectOptions, embed: Callable[[list[str]], np.ndarray] | None = None):
        super().__init__(options)
        self.alone = options.model is not None
        self._embed = embed

    def facts(self, records: Iterable[Record], part: int) -> _Facts:
        o = self.options
        scores, vectors, texts = [], [], []
        for record in records:
            scores.append(self._score(record))
            if o.by == "deita":
                texts.append(f"{record.prompt_text(system=False)}\n{record.answer_text()}")
                if len(texts) == 256:
                    vectors.append(self._vectors(texts))
                    texts = []
        if texts:
            vectors.append(self._vectors(texts))
        kept: str | np.ndarray | None = None
        if vectors:
            kept = np.concatenate(vectors)
            if self.folder is not None:
                path = Path(self.folder) / f"vectors-{part:05}.npy"
                np.save(path, kept)
                kept = str(path)
        return _Facts(np.array(scores, np.float64), kept)

    def _score(self, record: Record) -> float:
        """What to sort by; NaN where the record has not got it."""
        o, scores = self.options, record.meta.get("scores") or {}
        if o.by == "random":
            draw = hashlib.sha256(f"{o.seed} {record.id}".encode()).digest()
            return float(int.from_bytes(draw[:8], "big"))
        if o.by == "longest":
            return float(len(record.answer_text()))
        if o.score:
            value = float(scores.get(o.score, np.nan))
            if o.below is not None and value >= o.below:
                return np.nan
            return -value if o.lowest else value
        return float(scores.get("complexity", np.nan)) * float(scores.get("quality", np.nan))

    def _vectors(self, texts: list[str]) -> np.ndarray:
        """[n, X], each of length 1 (or 0)."""
        if self.options.model is not None and self._embed is None:
            from ftjax.data.embed import embedder  # brings jax

            self._embed = embedder(self.options.model)
        found = np.asarray((self._embed or hashed_words)(texts), np.float32)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def decide(self, facts: Sequence[_Facts]) -> _Decision:
        o = self.options
        scores = np.concatenate([np.zeros(0), *(one.scores for one in facts)])
        ends = np.cumsum([len(one.scores) for one in facts])
        usable = np.flatnonzero(~np.isnan(scores))
        if len(scores) and not len(usable):
            name = o.score or "complexity and quality"
            raise UserError(
                f"select: no row has meta.scores of {name}"
                + (f" below {o.below:g}" if o.below is not None else "")
                + ": `ftjax data score` gives them"
            )
        order = usable[np.argsort(-scores[usable], kind="stable")]

        def place(i: int) -> tuple[int, int]:
            part = int(np.searchsorted(ends, i, side="right"))
            return part, int(i - ends[part] + len(facts[part].scores))

        left_out: dict[int, float] = {}
        if o.by == "deita":
            given = [one.vectors for one in facts]
            parts = [np.load(v, mmap_mode="r") if isinstance(v, str) else v for v in given]

            def vector(i: int) -> np.ndarray:
                part, row = place(i)
                held = parts[part]
                assert held is not None
                return held[row]

            chosen, left_out = diverse(order, vector, o.k, o.similarity)
        else:
            chosen = order[: o.k]
        fates = np.full(len(scores), DROPPED, np.uint8)
        fates[np.isnan(scores)] = UNSCORED
        fates[chosen] = SELECTED
        fates[list(left_out)] = SIMILAR
        short = f"; {o.k} were asked for" if len(chosen) < o.k else ""
        return _Decision(
            np.split(fates, ends[:-1]),
            {place(i): near for i, near in left_out.items()},
            f"{len(chosen)} of {len(scores)}{short}",
        )

    def apply(self, records: Iterable[Record], decision: _Decision, part: int) -> Iterator[Judged]:
        o = self.options
        for row, record in enumerate(records):
            fate = decision.fates[part][row]
            if fate == SELECTED:
                yield Judged(record)
            elif fate == SIMILAR:
                near = decision.similar[part, row]
                said = f"similarity {near:.3f} to a kept example (threshold {o.similarity:g})"
                yield Judged(None, [record.verdict("Q011", said)])
            elif fate == UNSCORED:
                name = o.score or "complexity and quality"
                value = (record.meta.get("scores") or {}).get(o.score or "")
                said = (
                    f"no score of {name}"
                    if value is None
                    else f"{name} is {value:.4g}, not below {o.below:g}"
                )
                yield Judged(None, [record.verdict("Q012", said)])
            else:
                yield Judged(None, [record.verdict("Q010", f"not among the {o.k} by {o.by}")])

    def summary(self, decision: _Decision) -> dict[str, Any]:
        return {"selected": decision.said, "too similar": len(decision.similar)}


def diverse(
    order: Sequence[int] | np.ndarray, vector: Callable[[int], np.ndarray], k: int, threshold: float
) -> tuple[list[int], dict[int, float]]:
    """(the first k in this order that are each less similar than the threshold to all kept before, {those
    left out: their similarity to the nearest kept one}); vectors have the length 1."""
    kept: list[int] = []
    left_out: dict[int, float] = {}
    if not len(order):
        return kept, left_out
    size = len(vector(order[0]))
    held = np.zeros((min(k, len(order)), size), np.float32)
    for start in range(0, len(order), 512):
        block = order[start : start + 512]
        vectors = np.stack([np.asarray(vector(i), np.float32) for i in block])
        before = len(kept)
        nearest = (vectors @ held[:before].T).max(axis=1) if before else np.full(len(block), -1.0)
        for i, v, near in zip(block, vectors, nearest, strict=True):
            if len(kept) == k:
                return kept, left_out
            if len(kept) > before:
                near = max(near, float((held[before : len(kept)] @ v).max()))
            if near >= threshold:
                left_out[int(i)] = float(near)
            else:
                held[len(kept)] = v
                kept.append(int(i))
    return kept, left_out


_WORDS = re.compile(r"[^\W_]+")


def hashed_words(texts: Sequence[str]) -> np.ndarray:
    """Vectors of the words of texts, float32 [n, 512]: signed feature hashing (Weinberger et al. 2009,
    arXiv:0902.2206) of square roots of counts. They see words in common, not meaning."""
    out = np.zeros((len(texts), WORD_AXES), np.float32)
    for row, text in enumerate(texts):
        words, counts = np.unique(_WORDS.findall(text.lower()), return_counts=True)
        for word, count in zip(words.tolist(), np.sqrt(counts), strict=True):
            code = zlib.crc32(word.encode("utf-8", "surrogatepass"))
            out[row, code % WORD_AXES] += count if code >> 31 else -count
    return out
