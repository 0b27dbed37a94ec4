"""Scores of examples: by a model's own forward pass over the tokens that would be trained, and by a judge."""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ftjax.data.endpoint import EndpointOptions, Models
from ftjax.data.examples import BadExample
from ftjax.data.record import Judged, Record, Verdict, text_of
from ftjax.data.render import Rendered, Renderer, read_template
from ftjax.data.steps import Step
from ftjax.data.synthesize import after, before
from ftjax.data.synthesize.pairs import Malformed, read
from ftjax.data.synthesize.prompts import Prompts
from ftjax.data.writer import Ask, Speaker, Writer, count_tokens
from ftjax.errors import UserError
from ftjax.report.progress import Bar

AT_ONCE = 256  # records scored together
BATCH_TOKENS = 8192  # of one call of the model, padding counted
RATINGS = ("complexity", "quality")
_RATED = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        **{name: {"type": "integer", "minimum": 1, "maximum": 6} for name in RATINGS},
    },
    "required": ["reason", *RATINGS],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class ScoreOptions(EndpointOptions):
    """What is scored, by which models."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    model: str | None = None
    """A local model (folder, hub id, .gguf file or run): its perplexity of the answers, and their IFD."""
    judge: str | None = None
    """A model that rates complexity and quality, 1 to 6: MODEL@URL, or a local one."""
    votes: int = 1
    """How often the judge rates; the mean counts."""
    max_length: int = 2048
    """Tokens; longer examples get no scores of the model's."""
    chat_template: str | None = None
    """A Jinja file used instead of the tokenizer's template, or "none", as for training."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which turns are scored, as for training."""
    prompts: str | None = None
    """A folder with a score.jinja that replaces the package's own."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("votes", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1")


class Score(Step):
    """Puts scores into `meta.scores`; no record ends here.

    length: words of the answer. With `model`, over the tokens that training would weigh: tokens, their
    count; perplexity, exp of their mean cross-entropy; perplexity_alone, the same without what is asked (each
    answer after a beginning-of-text token, or an end-of-text one where there is none); ifd, their ratio (Li
    et al. 2023, arXiv:2308.12032): at 1 or above what is asked does not help to say the answer. With `judge`:
    complexity and quality.
    """

    name = "score"
    Options = ScoreOptions
    alone = True

    def __init__(self, options: ScoreOptions):
        super().__init__(options)
        self.gathers = options.judge is not None
        self._judge: Writer | None = None
        self._usage: Any = None
        self._forward: Forward | None = None
        self._said = False

    def local(self, name: str) -> Speaker:
        """Opens a model of this machine."""
        raise UserError(f"{name}: only endpoints can be used here: MODEL@URL")

    def reads(self) -> Sequence[str]:
        template = self.options.chat_template
        return [template] if template not in (None, "none") else []

    def _open(self) -> None:
        o = self.options
        if o.judge is not None and self._judge is None:
            models = Models(o, self.local)
            self._judge, self._usage, self._prompts = models.open(o.judge), models.usage, Prompts(o.prompts)
        if o.model is not None and self._forward is None:
            self._forward = Forward(self.local(o.model), o)

    # ── what the judge will cost ──

    def facts(self, records: Iterable[Record], part: int) -> Counter:
        self._open()
        assert self._judge is not None
        total: Counter = Counter()
        for record in records:
            for ask in self._asks(record):
                total["writing"] += 1
                if self._judge.kept.get(self._judge.key(ask)) is not None:
                    total["kept"] += 1
                    continue
                prompt = count_tokens(ask.messages[0]["content"])
                total["requests"] += 1
                total["prompt_tokens"] += prompt
                total["new_tokens"] += 60
                total["cost"] += self._judge.cost(prompt, 60)  # type: ignore[assignment]
        return total

    def decide(self, facts: Sequence[Counter]) -> dict[str, float]:
        return dict(sum(facts, Counter()))

    # ── the scores ──

    def apply(self, records: Iterable[Record], decision: Any, part: int) -> Iterator[Judged]:
        self._open()
        if decision is not None and not self._said:
            self._said = True
            print(before("score", decision, self.options), file=sys.stderr, flush=True)
        records = iter(records)
        with Bar("scored", None, stream=sys.stderr, shown=self.options.judge is not None) as bar:
            while some := list(itertools.islice(records, AT_ONCE)):
                yield from self._some(some)
                bar.advance(len(some))

    def _some(self, records: list[Record]) -> Iterator[Judged]:
        scores: list[dict[str, float]] = [{"length": len(r.answer_text().split())} for r in records]
        verdicts: list[list[Verdict]] = [[] for _ in records]
        if self._forward is not None:
            for record, mine, said, found in zip(
                records, scores, verdicts, self._forward.scores(records), strict=True
            ):
                if isinstance(found, str):
                    said.append(record.verdict("Q002", found))
                    continue
                mine |= found
                if found.get("ifd", 0.0) >= 1:
                    said.append(
                        record.verdict("Q001", f"IFD {found['ifd']:.3f}: the prompt does not help to say it")
                    )
        if self._judge is not None:
            self._rate(records, scores, verdicts)
        for record, mine, said in zip(records, scores, verdicts, strict=True):
            record.meta["scores"] = {**record.meta.get("scores", {}), **mine}
            yield Judged(record, said, changed=True)

    def _asks(self, record: Record) -> list[Ask]:
        messages = record.messages + (record.chosen if record.task == "preference" else [])
        if not messages:
            messages = [{"role": "assistant", "content": record.answer_text()}]
        shown = [{"role": m["role"], "text": text_of(m)} for m in messages]
        prompt = [{"role": "user", "content": self._prompts("score", messages=shown)}]
        return [
            Ask(prompt, _RATED, 300, 0.7 if i else 0.0, i, '{"reason": "') for i in range(self.options.votes)
        ]

    def _rate(self, records: list[Record], scores: list[dict], verdicts: list[list[Verdict]]) -> None:
        assert self._judge is not None
        asks = [self._asks(record) for record in records]
        answers = iter(self._judge.answer([ask for some in asks for ask in some]))
        for record, some, mine, said in zip(records, asks, scores, verdicts, strict=True):
            rated = []
            for answer in itertools.islice(answers, len(some)):
                try:
                    rated.append(read(answer, _RATED))
                except Malformed as e:
                    said.append(record.verdict("Q003", f"{e.code}: {e}"))
            if rated:
                mine |= {name: sum(r[name] for r in rated) / len(rated) for name in RATINGS}

    def summary(self, decision: Any) -> dict[str, Any]:
        if self._usage is None:
            return {}
        used = self._usage.to_json()
        numbers = {"used": used, "prompts": {"score": self._prompts.hash("score")}}
        return {"cost": after(used), "numbers": numbers}


class Forward:
    """A model's cross-entropy of the tokens that training would weigh."""

    def __init__(self, speaker: Speaker, options: ScoreOptions):
        generator = speaker.generator
        self.model, self.params = generator.model, generator.params
        self.renderer = Renderer(
            generator.tokenizer,
            chat_template=read_template(options.chat_template),
            template_args=getattr(speaker, "template_args", {}),
            train_on=options.train_on,
        )
        start = self.renderer.bos if self.renderer.bos is not None else self.renderer.eos
        if start is None:
            raise UserError(f"{options.model}: its tokenizer has no token to begin a text with")
        self.start: int = start
        self.max_length = min(options.max_length, self.model.config.max_position_embeddings)
        self._sums: Any = None

    def scores(self, records: Sequence[Record]) -> list[dict[str, float] | str]:
        """The scores of each record, or why it has none."""
        out: list[dict[str, float] | str] = []
        documents: list[tuple[np.ndarray, np.ndarray]] = []
        places: list[tuple[int, int]] = []  # of each document: the record, and 0 for whole, 1 for alone
        for i, (record, units) in enumerate(zip(records, self._render(records), strict=True)):
            if isinstance(units, str):
                out.append(units)
                continue
            tokens, weight = units.tokens, (units.loss_weight > 0).astype(np.float32)
            out.append({"tokens": int(weight.sum())})
            documents.append((tokens, weight))
            places.append((i, 0))
            if record.task != "lm":
                for run in _runs(tokens, weight):
                    documents.append(self._alone(run))
                    places.append((i, 1))
        total = np.zeros((len(records), 2))
        for (i, which), nll in zip(places, self.nll(documents), strict=True):
            total[i, which] += nll
        for i, mine in enumerate(out):
            if isinstance(mine, str):
                continue
            given, alone = (total[i] / mine["tokens"]).tolist()
            mine["perplexity"] = _exp(given)
            if records[i].task != "lm":
                mine |= {"perplexity_alone": _exp(alone), "ifd": _exp(given - alone)}
        return out

    def _render(self, records: Sequence[Record]) -> Iterator[Rendered | str]:
        wanted = [r for r in records if r.task in ("sft", "lm", "preference", "unpaired")]
        # of a pair the chosen answer is scored, whatever the other is
        units = iter(self.renderer.units([_one_answer(r) for r in wanted]))
        for record in records:
            if record.task not in ("sft", "lm", "preference", "unpaired"):
                yield f"a record of the task {record.task} has no answer"
                continue
            made = next(units)
            if isinstance(made, BadExample):
                yield str(made).removeprefix(f"{record.where}: ")
                continue
            ((document,),) = made
            if len(document.tokens) > self.max_length:
                yield f"{len(document.tokens)} tokens, more than max_length={self.max_length}"
            else:
                yield document

    def _alone(self, run: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.concatenate([[self.start], run]).astype(np.int32)
        return tokens, np.concatenate([[0.0], np.ones(len(run))]).astype(np.float32)

    def nll(self, documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Σ weight · -log p(token) of each (tokens, weight), float64 [n]; few shapes are compiled."""
        from ftjax.generate import bucket

        out = np.zeros(len(documents))
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i][0]))
        while order:
            length = bucket(len(documents[order[0]][0]))
            some, order = order[: max(1, BATCH_TOKENS // length)], order[max(1, BATCH_TOKENS // length) :]
            rows = bucket(len(some)) if len(some) < BATCH_TOKENS // length else len(some)
            batch = {
                "tokens": np.zeros((rows, length), np.int32),
                "loss_weight": np.zeros((rows, length), np.float32),
                "segments": np.zeros((rows, length), np.int32),
                "positions": np.zeros((rows, length), np.int32),
            }
            for row, i in enumerate(some):
                tokens, weight = documents[i]
                n = len(tokens)
                batch["tokens"][row, :n], batch["loss_weight"][row, :n] = tokens, weight
                batch["segments"][row, :n], batch["positions"][row, :n] = 1, np.arange(n)
            out[some] = np.asarray(self._program()(self.params, batch))[: len(some)]
        return out

    def _program(self):
        if self._sums is None:
            import jax
            import jax.numpy as jnp

            from ftjax.objectives.sft import next_token
            from ftjax.ops import linear_logprobs

            def sums(params, batch):
                batch = next_token(batch, self.model.options.zigzag)
                hidden_BTD, _, _ = self.model(params, batch["tokens"], batch["positions"], batch["segments"])
                inputs = self.model.head(params), hidden_BTD, batch["targets"], batch["weight"]
                logp_BT: Any = linear_logprobs(self.model.unembed, *inputs, 1024, True)
                return -jnp.sum(logp_BT * batch["weight"], axis=1)

            self._sums = jax.jit(sums)
        return self._sums


def _one_answer(record: Record) -> Record:
    if record.task == "preference":
        raw = record.raw[:2] if record.raw else None
        return Record("sft", record.messages + record.chosen, tools=record.tools, raw=raw, where=record.where)
    if record.task == "unpaired":
        return Record("sft", record.messages, tools=record.tools, raw=record.raw, where=record.where)
    return record


def _runs(tokens: np.ndarray, weight: np.ndarray) -> Iterator[np.ndarray]:
    """The runs of tokens that have a weight."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weight > 0, [0]]).astype(np.int8)))
    for begin, end in edges.reshape(-1, 2):
        yield tokens[begin:end]


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
