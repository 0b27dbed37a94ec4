"""Questions to a language model and its answers, the same calls whoever answers (the local model here, an
endpoint in `endpoint`), each answer kept on disk so that nothing is asked, or paid for, twice."""

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Ask:
    """One question to a model. Equal asks have equal answers."""

    messages: list[dict[str, str]]
    schema: dict[str, Any] | None = None
    """The JSON Schema of the answer, where it is JSON."""
    max_tokens: int = 512
    temperature: float = 0.0
    sample: int = 0
    """Which of several answers to the same question this is."""
    opening: str = ""
    """What the answer begins with: put into a local model's mouth, without which small ones write no JSON.
    (Endpoints are given the schema.)"""


@dataclass(frozen=True)
class Answer:
    text: str
    """What the model said; of a failure, why there is no answer."""
    finish: str = "stop"
    """ "length" where it was cut off at max_tokens."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    failed: Literal["", "refused", "lost", "cost"] = ""
    """Not "" where there is no answer: the endpoint refused this question, every try was lost, or the cost
    limit was reached before it. Failures are not kept: the next run asks again."""


class Usage:
    """What was used, and the money it cost, counted for all models of one run together; thread-safe."""

    def __init__(self, max_cost: float | None = None):
        self.max_cost = max_cost
        self.requests = self.cached = self.retries = self.prompt_tokens = self.new_tokens = 0
        self.cost = 0.0
        """Paid for, a lost request at the most it may have cost."""
        self._reserved = 0.0
        self._changed = threading.Condition()

    def reserve(self, most: float, wait: bool = True) -> bool:
        """Whether what costs `most` at the most fits under the limit; where that depends on requests under
        way, their ends are waited for."""
        if self.max_cost is None:
            return True
        with self._changed:
            while self.cost + self._reserved + most > self.max_cost:
                if not wait or not self._reserved or self.cost + most > self.max_cost:
                    return False
                self._changed.wait()
            self._reserved += most
            return True

    def settle(self, most: float, cost: float) -> None:
        """A reserved request is over."""
        with self._changed:
            self.cost += cost
            if self.max_cost is not None:
                self._reserved = max(0.0, self._reserved - most)
            self._changed.notify_all()

    def add(self, **counts: int) -> None:
        with self._changed:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def to_json(self) -> dict[str, Any]:
        names = ("requests", "cached", "retries", "prompt_tokens", "new_tokens", "cost", "max_cost")
        return {name: getattr(self, name) for name in names}


class Answers:
    """The answers kept on disk, by a hash of what was asked of whom: an SQLite file, so that one that is
    written when the process is killed is there whole or not at all."""

    def __init__(self, folder: str | Path | None = None):
        cache = os.environ.get("FTJAX_CACHE") or "~/.cache/ftjax"
        path = Path(folder).expanduser() if folder else Path(cache).expanduser() / "answers"
        path.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path / "answers.sqlite", timeout=60, check_same_thread=False)
        with self._lock, self._db:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
            self._db.execute("CREATE TABLE IF NOT EXISTS batches (key TEXT PRIMARY KEY, id TEXT)")

    def get(self, key: str) -> Answer | None:
        row = self._row("SELECT answer FROM answers WHERE key = ?", key)
        return Answer(**json.loads(row)) if row else None

    def put(self, key: str, answer: Answer) -> None:
        self._write("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, json.dumps(asdict(answer)))

    def batch(self, key: str) -> str | None:
        """The id of the batch that this was sent in and that has not been read yet."""
        return self._row("SELECT id FROM batches WHERE key = ?", key)

    def put_batch(self, keys: Sequence[str], id: str) -> None:
        with self._lock, self._db:
            rows = [(key, id) for key in keys]
            self._db.executemany("INSERT OR REPLACE INTO batches VALUES (?, ?)", rows)

    def forget_batch(self, id: str) -> None:
        self._write("DELETE FROM batches WHERE id = ?", id)

    def _row(self, query: str, key: str) -> str | None:
        with self._lock:
            row = self._db.execute(query, (key,)).fetchone()
        return row[0] if row else None

    def _write(self, query: str, *values: str) -> None:
        with self._lock, self._db:
            self._db.execute(query, values)

    def close(self) -> None:
        self._db.close()


class Writer:
    """A model that answers. `identity` is what, with the question, its answers depend on."""

    name: str
    identity: list[Any]

    def __init__(self, answers: Answers, usage: Usage):
        self.kept, self.usage = answers, usage

    def key(self, ask: Ask) -> str:
        text = json.dumps([self.identity, asdict(ask)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def answer(self, asks: Sequence[Ask], progress: Callable[[int], None] | None = None) -> list[Answer]:
        """The answers, in order; those at hand are not asked for again. `progress(n)` is called when n more
        are there. Raises UserError where asking on makes no sense: a wrong key, an endpoint that is down."""
        keys = [self.key(ask) for ask in asks]
        found: dict[str, Answer] = {}
        missing: dict[str, Ask] = {}
        for key, ask in zip(keys, asks, strict=True):
            if key in found or key in missing:
                continue
            kept = self.kept.get(key)
            if kept is None:
                missing[key] = ask
            else:
                found[key] = kept
        self.usage.add(cached=len(found))
        if progress is not None:
            progress(len(asks) - len(missing))
        if missing:
            for key, answer in self._ask(missing):
                found[key] = answer
                if not answer.failed:
                    self.kept.put(key, answer)
                if progress is not None:
                    progress(1)
        return [found[key] for key in keys]

    def _ask(self, asks: Mapping[str, Ask]) -> Iterator[tuple[str, Answer]]:
        """(key, answer) of each, as they come."""
        raise NotImplementedError

    def cost(self, prompt_tokens: float, new_tokens: float) -> float:
        """In money; 0 for a model that has no price."""
        return 0.0


def count_tokens(text: str) -> int:
    """About how many tokens a text is, for estimates: four bytes each, as English has."""
    return len(text.encode("utf-8", "surrogatepass")) // 4 + 1


class Speaker(Protocol):
    """An opened model, as `ftjax.recipes.chat.load` gives it."""

    generator: Any
    name: str

    def prompt(self, messages: list[dict[str, str]]) -> list[int]: ...


class Local(Writer):
    """The model on this machine, by `ftjax.generate`. Answers do not depend on what is asked together."""

    def __init__(self, speaker: Speaker, answers: Answers, usage: Usage, seed: int = 0, batch_size: int = 16):
        super().__init__(answers, usage)
        self.name, self._speaker, self._seed, self._size = speaker.name, speaker, seed, batch_size
        self.identity = ["local", _weights_digest(speaker.generator), seed]

    def _ask(self, asks: Mapping[str, Ask]) -> Iterator[tuple[str, Answer]]:
        from ftjax.generate import GenerateOptions

        generator = self._speaker.generator
        room = generator.model.config.max_position_embeddings
        prompts = {key: self._prompt(ask) for key, ask in asks.items()}
        groups: dict[float, list[str]] = {}
        for key, ask in asks.items():
            if len(prompts[key]) + 1 > room:
                said = f"the prompt has {len(prompts[key])} tokens, the context of {self.name} {room}"
                yield key, Answer(said, failed="refused")
            else:
                groups.setdefault(ask.temperature, []).append(key)
        for temperature, keys in groups.items():
            options = GenerateOptions(temperature=temperature, seed=self._seed)
            # so many at a time that what is killed has not lost much
            for start in range(0, len(keys), 4 * self._size):
                some = keys[start : start + 4 * self._size]
                found = generator.generate_many(
                    [prompts[key] for key in some],
                    options,
                    batch_size=self._size,
                    ids=[int(key[:8], 16) for key in some],
                    max_new_tokens=[min(asks[key].max_tokens, room - len(prompts[key])) for key in some],
                )
                for key, one in zip(some, found, strict=True):
                    self.usage.add(requests=1, prompt_tokens=one.prompt_tokens, new_tokens=one.new_tokens)
                    text = asks[key].opening + one.text
                    yield key, Answer(text, one.finish, one.prompt_tokens, one.new_tokens)

    def _prompt(self, ask: Ask) -> list[int]:
        tokenizer = self._speaker.generator.tokenizer
        opening = tokenizer(ask.opening, add_special_tokens=False)["input_ids"] if ask.opening else []
        return [*self._speaker.prompt(ask.messages), *opening]


def _weights_digest(generator) -> str:
    """Tells weights apart: a hash of some numbers of each array."""
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(generator.params):
        flat = leaf.reshape(-1)
        some = np.asarray(flat[:: max(1, flat.size // 512)])
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode() + some.tobytes())
    return digest.hexdigest()


def money(amount: float) -> str:
    """ "12.40", "0.0312", "0"."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.6f}".rstrip("0").rstrip(".")
