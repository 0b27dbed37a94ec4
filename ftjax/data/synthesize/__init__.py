"""From sections of documents to grounded examples: written by a model, checked against the section."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ftjax.data.endpoint import EndpointOptions, Models
from ftjax.data.record import Judged, Record
from ftjax.data.steps import Step
from ftjax.data.synthesize.pairs import KINDS, UNASKED, Pairs, Roles, Tally, estimate
from ftjax.data.synthesize.prompts import Prompts
from ftjax.data.writer import Speaker, money
from ftjax.errors import UserError
from ftjax.evaluate.statistics import wilson
from ftjax.report.progress import Bar

Kind = Literal["qa", "instruction", "conversation", "unanswerable", "preference"]

MUCH_UNKNOWN = 0.2  # of the facts: beyond it, tuning on them is warned of


@dataclass(frozen=True)
class SynthesizeOptions(EndpointOptions):
    """What is made of each section, by which models, and what it has to pass."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    writer: str = ""
    """The model that writes and answers again: MODEL@URL, e.g. gpt-4.1-mini@https://api.openai.com/v1, or a
    local model: a folder, a hub id, a .gguf file or a run."""
    judge: str = ""
    """The model that judges, named likewise; the writer if absent, which judges itself too kindly."""
    base: str = ""
    """The model to be tuned, named likewise: how many of the facts it knows is measured; not if absent."""
    kinds: list[Kind] = field(default_factory=lambda: ["qa"])
    """What is made: qa, instruction, conversation, unanswerable, preference."""
    count: int = 3
    """The most of each kind that are asked for in one section."""
    turns: int = 3
    """Questions of a conversation."""
    votes: int = 3
    """How often each pair is judged; more than half have to be for it. 0: not at all."""
    tries: int = 4
    """How often the base model is asked for each fact."""
    agree: float = 0.5
    """How much of an answer's words the one that was given again, from the section, has to share (F1, or
    one contained in the other)."""
    compare: Literal["rule", "judge"] = "rule"
    """Where words do not agree, the pair ends, or the judge says whether the answers mean the same (it then
    says too whether the base model's answers are right)."""
    context: bool = False
    """Put the section before the question, for a model that will be given what was retrieved. Examples of
    the kind unanswerable always have it."""
    unanswered: str = "The text does not say."
    """The answer of examples of the kind unanswerable."""
    max_tokens: int = 1500
    """The most tokens of what is written for one section."""
    temperature: float = 0.7
    """Of writing, and of votes and tries after the first."""
    min_section: int = 200
    """Characters; shorter sections are left out."""
    min_words: int = 1
    """The fewest words of an answer."""
    max_words: int = 400
    """The most words of an answer."""
    prompts: str | None = None
    """A folder with .jinja files that replace the package's own of the same names."""
    at_once: int = 0
    """Sections worked on together, whose pairs are held in memory; 0: 64, with `batch` 5,000."""

    def __post_init__(self):
        super().__post_init__()
        if not self.writer:
            raise UserError("writer: name the model that writes, e.g. gpt-4.1-mini@https://api.openai.com/v1")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise UserError(f"kinds={self.kinds}: each once, of {', '.join(KINDS)}")
        for name, least in (("count", 1), ("turns", 2), ("votes", 0), ("tries", 1), ("at_once", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: at least {least}")
        if not 0 < self.agree <= 1:
            raise UserError(f"agree={self.agree}: a share above 0 and up to 1")


class Synthesize(Step):
    """Sections (records of the task "lm") to examples; what is refused ends here with a verdict of code S
    that holds it."""

    name = "synthesize"
    Options = SynthesizeOptions
    gathers = True
    alone = True  # limits of rate and cost are one process's

    def __init__(self, options: SynthesizeOptions):
        super().__init__(options)
        self._roles: Roles | None = None
        self._usage: Any = None
        self._said = False
        self._tallies: dict[int, Tally] = {}

    def local(self, name: str) -> Speaker:
        """Opens a model of this machine."""
        raise UserError(f"{name}: only endpoints can be used here: MODEL@URL")

    def reads(self) -> Sequence[str | Path]:
        o = self.options
        files = sorted(Path(o.prompts).expanduser().glob("*.jinja")) if o.prompts else []
        for model in (o.writer, o.judge, o.base):
            adapter = Path(model).expanduser() / "adapter" / "adapter_model.safetensors"
            if "@" not in model and adapter.is_file():
                files.append(adapter)
        return files

    def roles(self) -> Roles:
        if self._roles is None:
            o = self.options
            models = Models(o, self.local)
            writer = models.open(o.writer)
            judge = models.open(o.judge or o.writer)
            base = models.open(o.base) if o.base else None
            self._roles = Roles(writer, judge, base, Prompts(o.prompts))
            self._usage = models.usage
        return self._roles

    # ── what it will cost ──

    def facts(self, records: Iterable[Record], part: int) -> dict[str, float]:
        return estimate(records, self.roles(), self.options)

    def decide(self, facts: Sequence[dict[str, float]]) -> dict[str, float]:
        return dict(sum((Counter(one) for one in facts), Counter()))

    # ── the pairs ──

    def apply(self, records: Iterable[Record], decision: Any, part: int) -> Iterator[Judged]:
        roles = self.roles()
        if decision is not None and not self._said:
            self._said = True
            print(before("synthesize", decision, self.options), file=sys.stderr, flush=True)
        tally = self._tallies[part] = Tally()
        with Bar("sections", None, stream=sys.stderr) as bar:
            yield from Pairs(roles, self.options, tally, bar).of(records)
        if self.folder is not None:
            path = self.folder / f"part-{part:05}.tally"
            path.write_text(json.dumps(tally.to_json()))

    def tally(self) -> Tally:
        """The counts of all parts, those of earlier runs that are not done again included."""
        if self.folder is None:
            return Tally.sum(self._tallies.values())
        files = sorted(self.folder.glob("part-*.tally"))
        return Tally.sum(Tally.from_json(json.loads(file.read_text())) for file in files)

    def summary(self, decision: Any) -> dict[str, Any]:
        tally, o = self.tally(), self.options
        out: dict[str, Any] = {"sections": f"{tally.sections} asked on, {tally.skipped} too short"}
        for kind in o.kinds:
            out[f"yield of {kind}"] = tally.line(kind)
        if o.base:
            out["closed book"] = unknown(tally, o)
        numbers = {**tally.to_json(), "estimate": decision or {}}
        if self._usage is not None:
            numbers["used"] = self._usage.to_json()
            out["cost"] = after(numbers["used"])
        numbers["models"] = {"writer": o.writer, "judge": o.judge or o.writer, "base": o.base}
        prompts = Prompts(o.prompts)
        numbers["prompts"] = {name: prompts.hash(name) for name in (*o.kinds, "answer", "judge")}
        return {**out, "numbers": numbers}


def before(step: str, e: dict[str, float], options: EndpointOptions) -> str:
    """What the estimate says, in a line."""
    if not e.get("requests"):
        return f"{step}: nothing to ask that is not answered already"
    text = (
        f"{step}: about {e['requests']:,.0f} requests, {e['prompt_tokens']:,.0f} tokens of prompts and "
        f"{e['new_tokens']:,.0f} of answers, if every pair passes every check"
    )
    if e.get("kept"):
        text += f" ({e['kept']:,.0f} of {e['writing']:,.0f} requests of writing are answered already)"
    if options.prices:
        text += f"; at the most about {money(e.get('cost', 0.0))}"
        if options.max_cost is not None:
            text += f", and never more than max_cost={options.max_cost:g}"
    return text


def after(used: dict[str, Any]) -> str:
    """What was used in this run, in a line."""
    return (
        f"{money(used['cost'])} for {used['requests']:,} requests ({used['retries']:,} tries repeated, "
        f"{used['cached']:,} answers were at hand), {used['prompt_tokens']:,} tokens of prompts and "
        f"{used['new_tokens']:,} of answers"
    )


def unknown(tally: Tally, options: SynthesizeOptions) -> str:
    """The share of facts that the base model never gets right, and what that means (Gekhman et al. 2024,
    arXiv:2405.05904: facts a model does not know are learnt slowly and, once learnt, make it invent more)."""
    never = tally.right[0]
    n = sum(tally.right.values()) - tally.right[UNASKED]
    if not n:
        return "no fact to ask for"
    low, high = wilson(never, n)
    text = (
        f"{never} of {n} facts ({never / n:.0%}; 95% interval {low:.0%} to {high:.0%}) are unknown to "
        f"{options.base}: not right once in {options.tries} tries without the section"
    )
    if low > MUCH_UNKNOWN:
        return text + ". Use retrieval: tuned on facts that it does not know, a model learns to invent"
    if high < MUCH_UNKNOWN:
        return text + ". Most of it is known: tuning teaches how to say it"
    return text + ". Too few to tell whether retrieval is needed"
