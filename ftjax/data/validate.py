"""The step `validate`: rows that a target does not take end, and the whole is held against its limits."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ftjax.data.record import Judged, Record, Verdict, hash64
from ftjax.data.steps import Step
from ftjax.data.targets import MB, TARGETS, target_named, validate
from ftjax.errors import UserError


@dataclass(frozen=True)
class ValidateOptions:
    """What rows are checked for."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    target: str = "ftjax"
    """What the rows are for: a service (openai, openai_preference, openai_rft, azure, together, fireworks,
    mistral), a type of TRL's (text, chat, prompt_only, prompt_completion, preference, unpaired, stepwise),
    LLaMA-Factory (alpaca, sharegpt), or ftjax."""
    model: str | None = None
    """A model folder, hub id or .gguf file whose tokenizer and template count the tokens; without it lengths
    are not checked."""
    max_length: int | None = None
    """Tokens that an example may have; the target's own limit if absent."""


@dataclass
class _Facts:
    records: int = 0
    """Those with errors, too."""
    rows: int = 0
    bytes: int = 0
    images: int = 0
    systems: tuple[int, ...] = ()
    """Hashes of the system prompts, the first few."""


class Validate(Step):
    """Rows with an error end; those with warnings go on. What is wrong with the whole (too few rows, too
    large) is said of its first row."""

    name = "validate"
    version = 2
    Options = ValidateOptions
    gathers = True

    def __init__(self, options: ValidateOptions):
        super().__init__(options)
        self.target = target_named(options.target)
        self.writes = options.target
        self.limit = options.max_length or self.target.most_tokens
        if options.max_length is not None and options.model is None:
            raise UserError("max_length counts tokens: give the model whose tokens they are (--model)")
        self._renderer: Any = None

    def __getstate__(self):
        return {**self.__dict__, "_renderer": None, "target": self.target.name}

    def __setstate__(self, state):
        self.__dict__ = {**state, "target": TARGETS[state["target"]]}

    def facts(self, records: Iterable[Record], part: int) -> _Facts:
        facts = _Facts()
        systems: dict[int, None] = {}
        for record in records:
            facts.records += 1
            found, rows = validate(record, self.target)
            if any(v.severity == "error" for v in found):
                continue
            facts.rows += len(rows)
            facts.bytes += sum(len(json.dumps(row, ensure_ascii=False).encode()) + 1 for row in rows)
            messages = record.messages
            facts.images += any(isinstance(m["content"], list) for m in messages)
            if messages and messages[0]["role"] == "system" and len(systems) < 20:
                systems[hash64(str(messages[0]["content"]))] = None
        facts.systems = tuple(systems)
        return facts

    def decide(self, facts: Sequence[_Facts]) -> tuple[int, list[tuple[str, str]]]:
        """The part with the first row, and what is to be said there of the whole: codes and words."""
        target, said = self.target, []
        rows, size, images = (sum(getattr(f, n) for f in facts) for n in ("rows", "bytes", "images"))
        systems = len({s for f in facts for s in f.systems})
        if rows < target.least_rows:
            said.append(("E060", f"{rows} rows, and {target.name} takes {target.least_rows} at least"))
        if target.most_rows is not None and rows > target.most_rows:
            said.append(("E061", f"{rows} rows, and {target.name} takes {target.most_rows} at most"))
        if target.most_bytes is not None and size > target.most_bytes:
            most = target.most_bytes / MB
            said.append(("E061", f"{size / MB:.0f} MB, and {target.name} takes {most:.0f} MB at most"))
        if images > 50_000 and target.name in ("openai", "azure"):
            said.append(("E032", f"{images} rows with images, and {target.name} takes 50000 at most"))
        if 1 < systems < 20:
            said.append(("W112", f"{systems} different system prompts"))
        return next((part for part, f in enumerate(facts) if f.records), 0), said

    def apply(
        self, records: Iterable[Record], decision: tuple[int, list[tuple[str, str]]], part: int
    ) -> Iterator[Judged]:
        of_the_whole = decision[1] if part == decision[0] else []
        for record in records:
            found, _ = validate(record, self.target)
            source = record.meta.get("source", "")
            found += [Verdict(code, text, "", source) for code, text in of_the_whole]
            whole, of_the_whole = len(of_the_whole), []
            own = found[: len(found) - whole]
            if self.options.model is not None and not any(v.severity == "error" for v in own):
                long = self._length(record)
                own, found = own + long, found + long
            ends = any(v.severity == "error" for v in own)
            yield Judged(None if ends else record, found)

    def summary(self, decision: tuple[int, list[tuple[str, str]]]) -> dict[str, Any]:
        return {"target": self.target.name, **dict(decision[1])}

    def _length(self, record: Record) -> list[Verdict]:
        """What the model's tokenizer has against the record."""
        from ftjax.data.examples import BadExample

        if record.task in ("prompt_only", "stepwise"):
            return []
        if self._renderer is None:
            self._renderer = renderer_of(self.options.model)
        (units,) = self._renderer.units([record])
        if isinstance(units, BadExample):
            code = "W113" if units.reason == "doubled_bos" else "E071"
            return [record.verdict(code, str(units).removeprefix(f"{record.where}: "))]
        out = []
        for unit in units:
            for document in unit:
                length = len(document.tokens)
                if self.limit is None or length <= self.limit:
                    continue
                lost = int((document.loss_weight[self.limit :] > 0).sum())
                kept = int((document.loss_weight[: self.limit] > 0).sum())
                text = f"{length} tokens, more than {self.limit}; of {lost + kept} trained {lost} are cut off"
                out.append(record.verdict("E070" if not kept else "W111", text))
        return out


def renderer_of(model: str) -> Any:
    """A Renderer with the tokenizer and the template of a model, or of a folder with a tokenizer."""
    from ftjax.data.render import Renderer
    from ftjax.hf import tokenizer_of

    return Renderer(tokenizer_of(model))
