"""Filters made for instructions and answers: what is wrong with an answer can be seen beside its prompt.

(The usual filters are made for web pages: C4's and Gopher's drop a quarter to a half of good instruction
data.) Each filter looks at the trained answers, says what it found with the place in the row, and then drops
the row, only flags it, or is off. The precision of each on real data: benchmarks/results/filters.md.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from ftjax.data import defects
from ftjax.data.record import Judged, Record, hash64, is_trained, text_of
from ftjax.data.steps import Step
from ftjax.errors import UserError

Action = Literal["drop", "flag", "off"]


@dataclass(frozen=True)
class FilterOptions:
    """Each filter is `drop` (the row ends here), `flag` (it goes on, with a warning in the report) or `off`.

    Of a preference pair the chosen answer is looked at, and of both what would spoil either; answers that an
    unpaired row calls bad (`label` false) are not held against it; plain text is looked at for F001, F007,
    F010 and F012.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    empty: Action = "drop"
    """F001: an answer without text and tool calls."""
    placeholder: Action = "drop"
    """F002: nothing but a stand-in (TODO, N/A, "[insert answer here]", lorem ipsum) that the prompt does not
    mention."""
    refusal: Action = "drop"
    """F003: begins by refusing ("I'm sorry, but I can't …") or with what it lacks as a model ("As an AI, I
    don't have …"). In preference pairs, where a refusal may be the point, it is at most flagged."""
    boilerplate: Action = "flag"
    """F004: a closing line that fits any answer ("I hope this helps!", "Let me know if …"), or talk of a
    knowledge cutoff."""
    cut_off: Action = "drop"
    """F005: stops in the middle: after a comma or a word that ends no sentence (the, and, because, with), or
    at a list item without text."""
    no_end: Action = "flag"
    """F015: the last sentence has no full stop, where the others have theirs: cut off in most cases, in some
    only careless."""
    open_fence: Action = "drop"
    """F006: a code fence (``` or ~~~) that is never closed."""
    repetition: Action = "drop"
    """F007: says the same again and again."""
    echo: Action = "drop"
    """F008: repeats its prompt, wholly or before it answers."""
    language: Action = "flag"
    """F009: is in another language than everything in the prompt, and no language or translation is asked
    for. Needs the extra `data`."""
    mojibake: Action = "drop"
    """F010: characters decoded wrongly (cafÃ©, donâ€™t) or lost (U+FFFD), in prompt or answer."""
    json: Action = "drop"
    """F011: the prompt asks for JSON, and the answer holds none that parses."""
    length: Action = "flag"
    """F012: prompt or answer is extremely long or short beside the rest of the data."""
    alike: Action = "drop"
    """F013: a preference pair whose two answers say the same."""
    leak: Action = "drop"
    """F014: marks of a chat template or of another turn inside the answer (<|im_end|>, [/INST],
    "### Instruction:")."""
    conflict: Action = "flag"
    """W108: the same prompt has different short answers in other rows; `drop` keeps those of the answer that
    more than half of the rows give."""

    repetition_share: float = 0.4
    """Largest share of an answer's 4-word sequences that may have occurred in it before. An answer of
    more than 100 words may repeat more: the limit grows by a tenth for each doubling, up to 0.6."""
    language_score: float = 0.8
    """How sure the language must be of both texts (0 to 1)."""
    language_letters: int = 60
    """Texts with fewer letters are too short to tell."""
    length_mads: float = 6.0
    """How many median absolute deviations (scaled to be a normal's standard deviation; of the logarithm of
    the length in characters) from the median are extreme."""
    short_answer: int = 60
    """Up to how many characters an answer is a label, which can conflict."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == Action and value not in ("drop", "flag", "off"):
                raise UserError(f"filter: {f.name} is {value!r}; it is drop, flag or off")
        for name in ("repetition_share", "language_score"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"filter: {name} is {getattr(self, name)}; it is a share, over 0 and up to 1")


class Answer(NamedTuple):
    path: str
    text: str
    asked: str
    """What it answers: the messages since the answer before."""
    context: str
    """The system prompt."""


CHECKS = {  # the option that switches it, by code
    "F001": "empty",
    "F002": "placeholder",
    "F003": "refusal",
    "F004": "boilerplate",
    "F005": "cut_off",
    "F006": "open_fence",
    "F007": "repetition",
    "F008": "echo",
    "F009": "language",
    "F010": "mojibake",
    "F011": "json",
    "F012": "length",
    "F013": "alike",
    "F014": "leak",
    "F015": "no_end",
    "W108": "conflict",
}


class Filter(Step):
    name = "filter"
    Options = FilterOptions

    def __init__(self, options: FilterOptions):
        super().__init__(options)
        self.gathers = options.length != "off" or options.conflict != "off"

    def facts(self, records: Iterable[Record], part: int) -> "Facts":
        lengths = np.zeros((2, _BINS), np.int64)
        labels = []
        for record in records:
            for which, length in enumerate(_lengths(record)):
                if length:
                    lengths[which, _bin(length)] += 1
            if (label := _label(record, self.options.short_answer)) is not None:
                labels.append(label)
        return Facts(lengths, np.array(labels, np.uint64).reshape(-1, 2))

    def decide(self, facts: Sequence["Facts"]) -> "Decision":
        lengths = sum((f.lengths for f in facts), np.zeros((2, _BINS), np.int64))
        limits = [_limits(counts, self.options.length_mads) for counts in lengths]
        labels = np.concatenate([f.labels for f in facts] or [np.zeros((0, 2), np.uint64)])
        return Decision(limits, _conflicts(labels))

    def apply(self, records: Iterable[Record], decision: Any, part: int) -> Iterator[Judged]:
        for record in records:
            verdicts, ends = [], False
            for code, path, text in self.findings(record, decision):
                action = getattr(self.options, CHECKS[code])
                if action == "off":
                    continue
                verdicts.append(record.verdict(code, text, path))
                if action == "drop" and not (code == "F003" and record.task == "preference"):
                    ends = ends or code != "W108" or not _majority(record, decision, self.options)
            yield Judged(None if ends else record, verdicts)

    def findings(self, record: Record, decision: "Decision | None") -> Iterator[tuple[str, str, str]]:
        """(code, path, text) of each thing found, also by filters that are off (but for the languages: they
        need a package)."""
        for path, text in _texts(record):
            if found := defects.mojibake(text):
                yield "F010", path, found
        for answer in answers(record):
            if not answer.text.strip():
                yield "F001", answer.path, "the answer is empty"
            elif record.task == "lm":
                if found := defects.repetition(answer.text, self.options.repetition_share):
                    yield "F007", answer.path, found
            else:
                if found := defects.leak(answer.text):
                    yield "F014", answer.path, found
                if not (record.task == "unpaired" and record.label is False):
                    yield from self._of_good(answer)
        if record.task == "preference":
            yield from _of_pair(record)
        if decision is not None:
            yield from _outliers(record, decision)
            yield from _conflict(record, decision, self.options.short_answer)

    def _of_good(self, answer: "Answer") -> Iterator[tuple[str, str, str]]:
        o, (path, text, asked, context) = self.options, answer
        if found := defects.placeholder(text, asked + context):
            yield "F002", path, found
        if found := defects.refusal(text):
            yield "F003", path, found
        if found := defects.boilerplate(text):
            yield "F004", path, found
        if found := defects.open_fence(text):
            yield "F006", path, found
        elif end := defects.cut_off(text):
            yield end[0], path, end[1]
        if found := defects.repetition(text, o.repetition_share):
            yield "F007", path, found
        if found := defects.echo(text, asked):
            yield "F008", path, found
        if o.language != "off" and (
            found := defects.language(text, asked, context, o.language_score, o.language_letters)
        ):
            yield "F009", path, found
        if found := defects.broken_json(text, asked, context):
            yield "F011", path, found

    def summary(self, decision: Any) -> dict[str, Any]:
        if decision is None:
            return {}
        names = ("prompt_characters", "answer_characters")
        limits = {n: list(lim) for n, lim in zip(names, decision.limits, strict=True) if lim}
        return {
            **({"usual_lengths": limits} if limits else {}),
            "conflicting_prompts": len(decision.conflicts),
        }


# ── what is looked at ─────────────────────────────────────────────────────────────────────────────


def answers(record: Record) -> Iterator[Answer]:
    """The trained answers (of a preference pair the chosen one's), each with what it answers."""
    if record.task == "prompt_only":
        return
    if record.task == "lm":
        yield Answer("text", record.text, "", "")
        return
    context = "\n".join(text_of(m) for m in record.messages if m["role"] in ("system", "developer"))
    asked: list[str] = []
    shared = record.task == "preference"
    for path, message in _messages(record):
        if not is_trained(message) or (shared and path.startswith("messages")):
            if message["role"] == "assistant":
                asked = []
            elif message["role"] not in ("system", "developer"):
                asked.append(text_of(message))
            continue
        content = _content(message)
        if content.strip() or not message.get("tool_calls"):
            yield Answer(f"{path}.content", content, "\n".join(asked), context)
        asked = []
    if record.task == "stepwise":
        for i, step in enumerate(record.completions):
            yield Answer(f"completions[{i}]", step, "\n".join(asked), context)


def _messages(record: Record) -> Iterator[tuple[str, dict]]:
    for name in ("messages", "chosen"):
        for i, message in enumerate(getattr(record, name)):
            yield f"{name}[{i}]", message


def _content(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    for name in ("messages", "chosen", "rejected"):
        for i, message in enumerate(getattr(record, name)):
            yield f"{name}[{i}].content", _content(message)
    if record.text:
        yield "text", record.text
    for i, step in enumerate(record.completions):
        yield f"completions[{i}]", step


def _of_pair(record: Record) -> Iterator[tuple[str, str, str]]:
    chosen, rejected = record.answer_text(), "\n".join(map(text_of, record.rejected))
    if not rejected.strip() and chosen.strip():
        yield "F001", "rejected", "the rejected answer is empty: the pair teaches only to say something"
    elif found := defects.alike(chosen, rejected):
        yield "F013", "rejected", found


# ── over the whole ────────────────────────────────────────────────────────────────────────────────

_PER_DOUBLING = 16
_BINS = 40 * _PER_DOUBLING


class Facts(NamedTuple):
    lengths: np.ndarray
    """[prompt or answer, bin of log2 characters] counts."""
    labels: np.ndarray
    """[rows, 2] uint64: hash of the prompt, hash of its short answer."""


class Decision(NamedTuple):
    limits: list[tuple[int, int] | None]
    """Characters that a prompt and an answer usually have, from, to; None where there are too few."""
    conflicts: dict[int, dict[int, int]]
    """By prompt with more than one short answer: rows by answer."""


def _lengths(record: Record) -> tuple[int, int]:
    return len(record.prompt_text()), len(record.answer_text())


def _bin(length: int) -> int:
    return min(_BINS - 1, round(math.log2(length) * _PER_DOUBLING))


def _limits(counts: np.ndarray, mads: float) -> tuple[int, int] | None:
    """Median ± mads × 1.4826 × the median absolute deviation, of log2 characters; the deviation is taken as
    a tenth of a doubling at least, and with fewer than 30 rows nothing is extreme."""
    if counts.sum() < 30:
        return None
    middle = _median(np.arange(_BINS), counts)
    deviation = _median(np.abs(np.arange(_BINS) - middle), counts) / _PER_DOUBLING
    half = mads * max(0.1, 1.4826 * deviation)
    log2 = middle / _PER_DOUBLING
    return math.floor(2 ** (log2 - half)), math.ceil(2 ** min(60, log2 + half))


def _median(values: np.ndarray, counts: np.ndarray) -> float:
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(below, below[-1] / 2)])


def _outliers(record: Record, decision: Decision) -> Iterator[tuple[str, str, str]]:
    for what, limits, length in zip(("prompt", "answer"), decision.limits, _lengths(record), strict=True):
        if limits and length and not limits[0] <= length <= limits[1]:
            size = "long" if length > limits[1] else "short"
            usual = f"{limits[0]:,} to {limits[1]:,}"
            yield (
                "F012",
                "",
                f"the {what} is extremely {size}: {length:,} characters, where {usual} are usual",
            )


def _label(record: Record, longest: int) -> tuple[int, int] | None:
    """Hashes of the prompt and of its last, short, answer, but for case, punctuation and spacing."""
    if record.task not in ("sft",) or not record.messages or not is_trained(record.messages[-1]):
        return None
    answer = _content(record.messages[-1])
    if not answer.strip() or len(answer) > longest or record.messages[-1].get("tool_calls"):
        return None
    if defects.refusal(answer) or defects.placeholder(answer, ""):
        return None  # said of it already
    prompt = "\x1f".join(" ".join(text_of(m).casefold().split()) for m in record.messages[:-1])
    return hash64(prompt), hash64(defects.normalised(answer) or answer.strip())


def _conflicts(labels: np.ndarray) -> dict[int, dict[int, int]]:
    if not len(labels):
        return {}
    pairs, counts = np.unique(labels, axis=0, return_counts=True)
    same = pairs[1:, 0] == pairs[:-1, 0]
    conflicting = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    out: dict[int, dict[int, int]] = {}
    for (prompt, answer), count in zip(
        pairs[conflicting].tolist(), counts[conflicting].tolist(), strict=True
    ):
        out.setdefault(prompt, {})[answer] = count
    return out


def _conflict(record: Record, decision: Decision, longest: int) -> Iterator[tuple[str, str, str]]:
    label = _label(record, longest) if decision.conflicts else None
    if label and (given := decision.conflicts.get(label[0])):
        path = f"messages[{len(record.messages) - 1}].content"
        text = _content(record.messages[-1]).strip()
        yield (
            "W108",
            path,
            f"{sum(given.values())} rows with this prompt have {len(given)} different answers; "
            f"{given[label[1]]} say «{text}» (conflict {label[0]:016x})",
        )


def _majority(record: Record, decision: Decision, options: FilterOptions) -> bool:
    label = _label(record, options.short_answer)
    given = decision.conflicts[label[0]] if label else {}
    return bool(label) and 2 * given[label[1]] > sum(given.values())
