"""Text from a model: prompts are prefilled, placed in the rows of a key/value cache, and decoded a chunk of
tokens at a time.

Prefill and decode are compiled apart, for lengths rounded up to a few buckets. What all prompts begin with
(an instruction, few-shot examples) is prefilled once and copied to every row; so is a prompt of which several
samples are asked. Between chunks the host looks for stop strings, hands text on and gives the rows of answers
that have ended to prompts that wait; within one, nothing leaves the device.
"""

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax import adapters, lora
from ftjax.errors import UserError
from ftjax.models import Cache, Model
from ftjax.weights import LoraWeight, NoisyEmbedding, QuantWeight, RowsWeight, StackedLora, is_leaf

log = logging.getLogger("ftjax")

Prompt = str | Sequence[int]

CHUNK = 32  # the most tokens decoded between two looks by the host
STREAM_CHUNK = 4  # … when text is streamed
MIN_PREFIX = 24  # a common prefix shorter than this is not worth a program of its own


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """How tokens are chosen, and when to stop."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    max_new_tokens: int = 256
    """The most tokens an answer may have."""
    temperature: float = 0.0
    """Logits are divided by it before sampling; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Sample among the k likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens whose probabilities sum to at least this; 1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one; 0 is off."""
    repetition_penalty: float = 1.0
    """Makes tokens that were already in prompt or answer less likely; 1 is off."""
    seed: int = 0
    """The same seed, prompt, place in the list and number of the sample give the same answer."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these that its text contains."""
    merge: bool = True
    """Fold an adapter into the weights before generating: nothing to compute beside them. Without it the base
    is left as it is, for one that several adapters share; weights kept quantised are never folded into."""

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, right, said in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "a count of tokens, 0 for off"),
            ("top_p", 0 < self.top_p <= 1, "a share in (0, 1], 1 for off"),
            ("min_p", 0 <= self.min_p <= 1, "a share in [0, 1], 0 for off"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0, 1 for off"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
        ):
            if not right:
                raise UserError(f"generate.{name}={getattr(self, name)}: {said}")
        if any(not isinstance(s, str) or s == "" for s in self.stop):
            raise UserError(f"generate.stop={self.stop!r}: each is a text that is not empty")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise UserError("generate: top_k, top_p and min_p have no effect with temperature=0 (greedy)")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str  # without the end-of-turn token, and without the stop string and what follows it
    tokens: tuple[int, ...]  # as generated, the end token or the stop string's tokens included
    finish: str  # "stop": an end token or a stop string; "length": max_new_tokens or the context
    prompt_tokens: int
    prefill_s: float  # of the prompts it was prefilled with, compilation not counted
    decode_s: float  # from then on until its end was seen, what others were prefilled for included

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)


class Filters(NamedTuple):
    """Which steps of choosing a token are compiled in: what of GenerateOptions shapes the program."""

    greedy: bool
    penalty: bool
    top_k: int
    top_p: bool
    min_p: bool

    @staticmethod
    def of(options: GenerateOptions) -> "Filters":
        return Filters(
            options.temperature == 0,
            options.repetition_penalty != 1,
            options.top_k,
            options.top_p < 1,
            options.min_p > 0,
        )


def numbers(options: GenerateOptions) -> dict[str, np.ndarray]:
    """The part of GenerateOptions that is data to the program: another temperature compiles nothing."""
    names = ("temperature", "top_p", "min_p", "repetition_penalty")
    floats = {name: np.float32(getattr(options, name)) for name in names}
    return floats | {"seed": np.uint32(options.seed)}  # type: ignore[return-value]


def filter_logits(logits_BV, seen_BV, filters: Filters, n: Mapping[str, Any]):
    """Float32 logits [B, V] with what must not be sampled at -inf, by transformers' rules and in its order:
    repetition penalty, temperature, top-k, top-p, min-p (generation/logits_process.py).

    `seen` marks the tokens of prompt and answer so far. Tokens tied at the edge of top-p are all kept.
    """
    if filters.penalty:
        penalty = n["repetition_penalty"]
        punished = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, punished, logits_BV)
    if filters.greedy:
        return logits_BV
    logits_BV = logits_BV / n["temperature"]
    if filters.top_k:
        edge = jax.lax.top_k(logits_BV, min(filters.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < edge, -jnp.inf, logits_BV)
    if filters.top_p:
        rising_BV = jnp.sort(logits_BV, axis=-1)
        kept_BV = jnp.cumsum(jax.nn.softmax(rising_BV, axis=-1), axis=-1) > 1 - n["top_p"]
        first = jnp.argmax(kept_BV.at[:, -1].set(True), axis=-1)  # the likeliest is always kept
        edge = jnp.take_along_axis(rising_BV, first[:, None], axis=-1)
        logits_BV = jnp.where(logits_BV < edge, -jnp.inf, logits_BV)
    if filters.min_p:
        top = jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < top + jnp.log(n["min_p"]), -jnp.inf, logits_BV)
    return logits_BV


def choose(logits_BV, seen_BV, filters: Filters, n: Mapping[str, Any], ids_B, samples_B, index_B):
    """The next token of each row, int32 [B]. A row's draw depends on (seed, its id, which sample of it this
    is, `index`: the tokens it made before)."""
    logits_BV = filter_logits(logits_BV, seen_BV, filters, n)
    if filters.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(logits_V, *path):
        key = jax.random.key(n["seed"])
        for one in path:
            key = jax.random.fold_in(key, one)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(logits_BV, ids_B, samples_B, index_B).astype(jnp.int32)


class Rows(struct.PyTreeNode):
    """Answers in the making, [B] each."""

    token: jax.Array  # the last one chosen, not yet in the cache
    position: jax.Array  # its position
    left: jax.Array  # tokens the row may still make
    done: jax.Array
    made: jax.Array  # tokens chosen so far
    ids: jax.Array  # what the row's random numbers are drawn from, with
    samples: jax.Array  # … which of its prompt's answers it is
    seen: jax.Array | None  # [B, V] tokens of prompt and answer, with a repetition penalty


class State(struct.PyTreeNode):
    """A batch between two chunks."""

    cache: Cache
    rows: Rows


class _Program:
    """A function compiled once for each set of static values, shapes and shardings, the compiling timed."""

    def __init__(self, function, donate: tuple[int, ...] = ()):
        self.function = jax.jit(function, static_argnums=0, donate_argnums=donate)
        self.compiled: dict[Any, Any] = {}

    def __call__(self, static, *args):
        """(seconds spent compiling, result)."""
        leaves, tree = jax.tree.flatten(args)
        key = static, tree, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        start = time.perf_counter()
        if key not in self.compiled:
            self.compiled[key] = self.function.lower(static, *args).compile()
            return time.perf_counter() - start, self.compiled[key](*args)
        return 0.0, self.compiled[key](*args)


class _Programs:
    """The compiled functions of one model, shared by every Generator over it whatever its weights."""

    of: ClassVar[dict[Any, "_Programs"]] = {}

    def __init__(self, model: Model):
        self.model = model
        self.prefix = _Program(self._prefix)
        self.start = _Program(self._start)
        self.prefill = _Program(self._prefill)
        self.place = _Program(self._place, donate=(1,))
        self.decode = _Program(self._decode, donate=(2,))

    @classmethod
    def get(cls, model: Model) -> "_Programs":
        key = model.config, model.module_type, model.options, frozenset(model.table.rows.items())
        if key not in cls.of:
            cls.of[key] = cls(model)
        return cls.of[key]

    def _prefix(self, _static, params, tokens_T):
        T = tokens_T.shape[0]
        cache = self.model.init_cache(1, T)
        row = jnp.arange(T, dtype=jnp.int32)[None]
        return self.model(params, tokens_T[None], row, jnp.ones((1, T), jnp.int32), cache)[1]

    def _start(self, static):
        """A batch of `size` free rows, for prompts of up to `prompt` slots and answers of up to `ring`."""
        size, prompt, ring, penalty = static
        zeros = jnp.zeros(size, jnp.int32)
        return State(
            cache=self.model.init_cache(size, prompt + ring, prompt=prompt),
            rows=Rows(
                token=zeros,
                position=zeros,
                left=zeros,
                done=jnp.ones(size, bool),
                made=zeros,
                ids=zeros.astype(jnp.uint32),
                samples=zeros.astype(jnp.uint32),
                seen=jnp.zeros((size, self.model.config.vocab_size), bool) if penalty else None,
            ),
        )

    def _prefill(self, _static, params, prefix: Cache | None, tokens_RT, positions_RT):
        """(a cache of the prompts' own, after `prefix`, the float32 logits [R, V] of what follows)."""
        R, T = tokens_RT.shape
        cache = self.model.init_cache(R, T if prefix is None else prefix.segments.shape[1] + T)
        cache = cache if prefix is None else cache.begin(prefix)
        segments_RT = (positions_RT >= 0).astype(jnp.int32)
        hidden_RTD, cache, _ = self.model(params, tokens_RT, jnp.maximum(positions_RT, 0), segments_RT, cache)
        return cache, self.model.unembed(self.model.head(params), hidden_RTD[:, -1])

    def _place(self, filters, state: State, prompts, at_M, rows_M, count, new: Rows, eos, n):
        """The first `count` of M answers begin: in row rows_M[i] goes the prompt at_M[i] of `prompts`, which
        is what `prefill` returned, with its first token. Entries after `count` have a row beyond the last."""
        cache, logits_RV = prompts

        def put(i, whole):
            return whole.place(rows_M[i], cache, at_M[i])

        whole = jax.lax.fori_loop(0, count, put, state.cache)
        new = self._next(filters, new, logits_RV[at_M], eos, n)
        rows = jax.tree.map(lambda x, y: x.at[rows_M].set(y, mode="drop"), state.rows, new)
        return State(whole, rows)

    def _next(self, filters, rows: Rows, logits_BV, eos, n) -> Rows:
        token = choose(logits_BV, rows.seen, filters, n, rows.ids, rows.samples, rows.made)
        token = jnp.where(rows.done, rows.token, token)
        left = rows.left - 1
        seen = rows.seen
        if seen is not None:
            seen = seen.at[jnp.arange(seen.shape[0]), token].set(True)
        return rows.replace(
            token=token,
            position=rows.position + 1,
            left=left,
            done=rows.done | (left <= 0) | jnp.isin(token, eos),
            made=rows.made + 1,
            seen=seen,
        )

    def _decode(self, filters, params, state: State, done_B, eos, n, steps, enough):
        """Up to `steps` more tokens of each row, fewer once `enough` rows are done: (state, tokens
        [B, CHUNK], how many)."""
        B = done_B.shape[0]

        def more(carry):
            i, state, _ = carry
            return (i < steps) & (jnp.sum(state.rows.done) < enough)

        def step(carry):
            i, state, out = carry
            rows: Rows = state.rows
            hidden_BTD, cache, _ = self.model(
                params,
                rows.token[:, None],
                rows.position[:, None],
                jnp.ones((B, 1), jnp.int32),
                state.cache,
            )
            logits_BV = self.model.unembed(self.model.head(params), hidden_BTD[:, 0])
            rows = self._next(filters, rows, logits_BV, eos, n)
            return i + 1, State(cache, rows), jax.lax.dynamic_update_slice(out, rows.token[:, None], (0, i))

        state = state.replace(rows=state.rows.replace(done=state.rows.done | done_B))
        start = jnp.int32(0), state, jnp.zeros((B, CHUNK), jnp.int32)
        made, state, out = jax.lax.while_loop(more, step, start)
        return state, out, made


def bucket(n: int) -> int:
    """n rounded up to 16, 32, 48, 64, 96, 128, 192, 256, …: few programs, little padding."""
    size = 16
    while size < n:
        if size >= 32 and size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size


def common_prefix(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with; each keeps at least one of its own."""
    low, high = min(prompts), max(prompts)  # in lexical order the extremes differ first
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return max(0, min(n, min(map(len, prompts)) - 1))


class _Row:
    """The host's view of one answer: its tokens, its text, where it ended."""

    def __init__(
        self, tokenizer, prompt: Sequence[int], budget: int, eos: frozenset[int], stop: tuple[str, ...]
    ):
        self.tokenizer, self.eos, self.stop, self.budget = tokenizer, eos, stop, budget
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.text = self.shown = ""
        self.cut = False
        # Some tokenizers drop a leading space: so an answer is decoded after the prompt's end, which is cut.
        self.tail = list(prompt[-4:])
        self.tail_text = self._decode(self.tail)
        if self.tail_text.endswith("\ufffd"):
            self.tail, self.tail_text = [], ""

    def _decode(self, tokens) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _text(self, count: int) -> str:
        tokens = self.tokens[:count]
        if tokens and tokens[-1] in self.eos:
            tokens = tokens[:-1]
        return self._decode(self.tail + tokens)[len(self.tail_text) :]

    def feed(self, tokens) -> None:
        """Take the tokens (ints, or an array of them) up to the row's end."""
        if self.finish:
            return
        before, room = len(self.tokens), self.budget - len(self.tokens)
        new = np.asarray(tokens[:room]).tolist()
        if not self.eos.isdisjoint(new):
            del new[next(i for i, t in enumerate(new) if t in self.eos) + 1 :]
            self.finish = "stop"
        elif len(new) == room:
            self.finish = "length"
        self.tokens += new
        if not self.stop or len(self.tokens) == before:
            return
        text = self._text(len(self.tokens))
        if any(s in text for s in self.stop):
            while before < len(self.tokens) and not any(s in self._text(before) for s in self.stop):
                before += 1
            del self.tokens[before:]
            text = self._text(before)
            self.text = text[: min(text.find(s) for s in self.stop if s in text)]
            self.finish, self.cut = "stop", True

    def piece(self) -> str:
        """Text not yet shown, less what later tokens may change: half a character, half a stop string."""
        text = self.final()
        if not self.finish:
            text = text.rstrip("\ufffd")
            longest = max((len(s) for s in self.stop), default=0)
            for n in range(min(longest - 1, len(text)), 0, -1):
                if any(s.startswith(text[-n:]) for s in self.stop):
                    text = text[:-n]
                    break
        new = text[len(self.shown) :]
        self.shown += new
        return new

    def final(self) -> str:
        return self.text if self.cut else self._text(len(self.tokens))


class Generator:
    """Answers prompts with one model and one set of weights (plain, or with leaf types of weights.py). Over
    a tree of several adapters (`adapters.stack`), `adapters` says which of them answers each prompt, None for
    the base alone.

    `eos` are the tokens that end an answer: see `end_tokens`. Programs are compiled on first use and shared
    by all generators of the same model, whatever their weights.
    """

    def __init__(self, model: Model, params, tokenizer=None, *, eos: Sequence[int] = ()):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.eos = tuple(eos)
        self.compile_s = 0.0  # spent so far
        self._programs = _Programs.get(model)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt; text gets the special tokens that the tokenizer adds (what `chat_prompt`
        makes is ids already). UserError for an empty one or an id outside the vocabulary."""
        out = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise UserError("generate: a prompt that is text needs a tokenizer")
                prompt = self.tokenizer(prompt)["input_ids"]
            ids = [int(t) for t in prompt]
            if not ids:
                raise UserError(f"generate: prompt {i} is empty")
            if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
                wrong = next(t for t in ids if not 0 <= t < self.model.config.vocab_size)
                raise UserError(
                    f"generate: prompt {i} has token {wrong}, the model's vocabulary is "
                    f"{self.model.config.vocab_size}: is the tokenizer another model's?"
                )
            out.append(ids)
        return out

    def budget(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions,
        max_new_tokens: Sequence[int] | None = None,
    ) -> list[int]:
        """New tokens each prompt may have within the context, of its own `max_new_tokens` where they are
        given; a cut is logged, no room is a UserError."""
        room = self.model.config.max_position_embeddings
        for i, prompt in enumerate(prompts):
            if len(prompt) >= room:
                raise UserError(
                    f"generate: prompt {i} has {len(prompt)} tokens, the model's context is {room} "
                    "(max_position_embeddings): shorten it"
                )
        wanted = [options.max_new_tokens] * len(prompts) if max_new_tokens is None else list(max_new_tokens)
        if len(wanted) != len(prompts) or min(wanted, default=1) < 1:
            raise UserError(
                f"generate: max_new_tokens={wanted} for {len(prompts)} prompts: at least 1 for each of them"
            )
        budgets = [min(want, room - len(p)) for want, p in zip(wanted, prompts, strict=True)]
        short = [b for b, want in zip(budgets, wanted, strict=True) if b < want]
        if short:
            log.warning(
                "the context of %d tokens leaves %d of %d prompts fewer than max_new_tokens=%d (least: %d)",
                room,
                len(short),
                len(prompts),
                max(wanted),
                min(short),
            )
        return budgets

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: GenerateOptions,
        *,
        samples: int = 1,
        ids: Sequence[int] | None = None,
        max_new_tokens: Sequence[int] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        share_prefix: bool = True,
        adapters: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """All prompts as one batch: see `generate_many`. `on_text(index, piece)` gets text as it comes,
        `index` being that of the answer in the result."""
        return self.generate_many(
            prompts,
            options,
            batch_size=max(1, len(prompts) * samples),
            samples=samples,
            ids=ids,
            max_new_tokens=max_new_tokens,
            on_text=on_text,
            share_prefix=share_prefix,
            adapters=adapters,
        )

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        options: GenerateOptions,
        *,
        batch_size: int = 32,
        samples: int = 1,
        ids: Sequence[int] | None = None,
        max_new_tokens: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        share_prefix: bool = True,
        adapters: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """Any number of prompts, up to `batch_size` answers being decoded at a time: where one ends, a prompt
        that waits takes its row. Results are in the prompts' order; with `samples`, those of prompt i are
        from i · samples on, its prefill done once.

        What all prompts begin with is prefilled once. An answer depends on its prompt, the seed, its prompt's
        entry of `ids` (default 0, 1, …), the number of the sample and nothing else: not on the batch.
        `max_new_tokens` and `adapters` have an entry a prompt. `progress(done, total)` is called when answers
        have ended. UserError for arguments that do not fit.
        """
        for name, value in (("batch_size", batch_size), ("samples", samples)):
            if value < 1:
                raise UserError(f"generate: {name}={value}: at least 1")
        if options.stop and self.tokenizer is None:
            raise UserError("generate: stop strings need a tokenizer")
        tokens = self.encode(prompts)
        if not tokens:
            return []
        budgets = self.budget(tokens, options, max_new_tokens)
        ids = range(len(tokens)) if ids is None else ids
        if len(ids) != len(tokens):
            raise UserError(f"generate: {len(ids)} ids for {len(tokens)} prompts: one each")
        which = self._which(adapters, len(tokens))
        prefix, spent = self._prefix(tokens, share_prefix and which is None)
        asked = [
            _Prompt(i, tokens[i], budgets[i], ids[i], -1 if which is None else which[i])
            for i in sorted(range(len(tokens)), key=lambda i: (-len(tokens[i]), i))
        ]
        size = min(batch_size, len(asked) * samples)
        batch = _Batch(self, options, asked, size, samples, prefix, spent, which is not None)
        return batch.run(progress, on_text)

    def _which(self, chosen: Sequence[int | None] | None, prompts: int) -> list[int] | None:
        """The adapter of each prompt, -1 for none; None where the tree has none to choose from."""
        stacked = adapters.count(self.params)
        if chosen is None:
            return None
        which = [-1 if one is None else one for one in chosen]
        if len(which) != prompts or any(not -1 <= one < stacked for one in which):
            right = (
                f"one of 0…{stacked - 1} or None each" if stacked else "the weights hold none to choose from"
            )
            raise UserError(f"generate: adapters={list(chosen)} for {prompts} prompts: {right}")
        return which

    def _call(self, program: _Program, static, *args):
        spent, out = program(static, *args)
        self.compile_s += spent
        return out

    def _prefix(self, tokens: list[list[int]], share: bool):
        """(the cache of what all prompts begin with or None, seconds)."""
        if self.model.recurrent:  # the pads after a shared beginning would be in the way
            share = False
        n = common_prefix(tokens) if share and len(tokens) > 1 else 0
        if n < MIN_PREFIX:
            return None, 0.0
        n -= n % 8  # so that prefixes that differ by a word share programs
        compiled, start = self.compile_s, time.perf_counter()
        prefix = self._call(self._programs.prefix, None, self.params, np.array(tokens[0][:n], np.int32))
        jax.block_until_ready(prefix)
        return prefix, time.perf_counter() - start - (self.compile_s - compiled)


class _Prompt(NamedTuple):
    index: int
    tokens: list[int]
    budget: int
    id: int
    adapter: int


class _Answer(NamedTuple):
    """One sample of a prompt: the host's view, and how the device came by it."""

    place: int  # in the results
    prompt: _Prompt
    row: _Row
    prefill_s: float
    since: float  # the batch's clock when it began


class _Batch:
    """Rows that prompts go through: those that wait are prefilled together, in few sizes of group, and placed
    when rows are free."""

    def __init__(
        self,
        generator: Generator,
        options: GenerateOptions,
        asked: list[_Prompt],
        size: int,
        samples: int,
        prefix: Cache | None,
        prefix_s: float,
        adapted: bool,
    ):
        self.generator, self.options, self.size, self.samples = generator, options, size, samples
        self.prefix, self.prefix_s, self.adapted = prefix, prefix_s, adapted
        self.programs = generator._programs
        self.P = 0 if prefix is None else prefix.segments.shape[1]
        self.total = len(asked) * samples
        self.waiting = collections.deque(asked)  # the longest first, so that groups are of like length
        self.rows: list[_Answer | None] = [None] * size
        self.results: dict[int, Completion] = {}
        self.filters, self.numbers = Filters.of(options), numbers(options)
        self.eos = np.array(generator.eos or (-1,), np.int32)
        self.penalty = options.repetition_penalty != 1
        ring = -(-max(one.budget for one in asked) // 64) * 64
        prompt = self.P + bucket(len(asked[0].tokens) - self.P)
        self.state = self._call(self.programs.start, (size, prompt, ring, self.penalty))
        # answers whose prompt is prefilled but which have no row yet, and where it is
        self.ready: collections.deque[tuple[_Answer, int]] = collections.deque()
        self.prefilled: Any = None
        self.ahead: tuple[jax.Array, jax.Array] | None = None  # of a chunk not looked at yet
        self._select()

    def _call(self, program: _Program, static, *args):
        return self.generator._call(program, static, *args)

    def clock(self) -> float:
        """Seconds, compilation not counted."""
        return time.perf_counter() - self.generator.compile_s

    def run(self, progress, on_text) -> list[Completion]:
        while len(self.results) < self.total:
            before = len(self.results)
            self._fill(on_text)
            if any(self.rows):
                self._decode(on_text)
            if progress is not None and len(self.results) > before:
                progress(len(self.results), self.total)
        return [self.results[i] for i in range(self.total)]

    def _fill(self, on_text) -> None:
        """Give free rows to answers for as long as there are both."""
        changed = False
        while (free := [b for b, answer in enumerate(self.rows) if answer is None]) and (
            self.ready or self.waiting
        ):
            if not self.ready:
                self._prefill(len(free))
            self._place(free[: len(self.ready)], on_text)
            changed = True
        if changed:
            self._select()

    def _prefill(self, free: int) -> None:
        """Prefill as many waiting prompts as have free rows; to have few programs, their number is that of a
        whole batch or a power of 4."""
        count, whole = -(-free // self.samples), -(-self.size // self.samples)
        count = min(count, len(self.waiting))
        if count < whole:
            count = 4 ** ((count.bit_length() - 1) // 2)
        group = [self.waiting.popleft() for _ in range(count)]
        T = bucket(max(len(one.tokens) for one in group) - self.P)
        tokens_RT = np.zeros((count, T), np.int32)
        positions_RT = np.full((count, T), -1, np.int32)  # -1 pads
        for r, one in enumerate(group):
            own = one.tokens[self.P :]
            tokens_RT[r, T - len(own) :] = own
            positions_RT[r, T - len(own) :] = np.arange(self.P, len(one.tokens))
        params = self.generator.params
        if self.adapted:
            params = adapters.select(params, [one.adapter for one in group])
        start = self.clock()
        self.prefilled = self._call(self.programs.prefill, None, params, self.prefix, tokens_RT, positions_RT)
        jax.block_until_ready(self.prefilled[1])
        now = self.clock()
        spent, self.prefix_s = self.prefix_s + now - start, 0.0
        ends = frozenset(self.generator.eos)
        for r, one in enumerate(group):
            for i in range(self.samples):
                row = _Row(self.generator.tokenizer, one.tokens, one.budget, ends, self.options.stop)
                self.ready.append((_Answer(one.index * self.samples + i, one, row, spent, now), r))

    def _place(self, free: list[int], on_text) -> None:
        """Begin the next answers that are ready in the rows `free`."""
        M, V = self.size, self.generator.model.config.vocab_size
        at, rows = np.zeros(M, np.int32), np.full(M, M, np.int32)
        ids, samples = np.zeros(M, np.uint32), np.zeros(M, np.uint32)
        position, left = np.zeros(M, np.int32), np.ones(M, np.int32)
        seen = np.zeros((M, V), bool) if self.penalty else None
        for i, b in enumerate(free):
            answer, r = self.ready.popleft()
            prompt, self.rows[b] = answer.prompt, answer
            at[i], rows[i], left[i] = r, b, prompt.budget
            position[i] = len(prompt.tokens) - 1
            ids[i], samples[i] = prompt.id, answer.place % self.samples
            if seen is not None:
                seen[i, prompt.tokens] = True
        none = np.zeros(M, np.int32)
        new = Rows(none, position, left, np.zeros(M, bool), none, ids, samples, seen)  # type: ignore[arg-type]
        self.state = self._call(
            self.programs.place,
            self.filters,
            self.state,
            self.prefilled,
            at,
            rows,
            np.int32(len(free)),
            new,
            self.eos,
            self.numbers,
        )
        if not self.ready:
            self.prefilled = None
        first = np.asarray(self.state.rows.token)
        for b in free:
            self._feed(b, first[b : b + 1], on_text)

    def _select(self) -> None:
        """The weights that each row is decoded with."""
        self.params = self.generator.params
        if self.adapted:
            which = [-1 if answer is None else answer.prompt.adapter for answer in self.rows]
            self.params = adapters.select(self.params, which)

    def _decode(self, on_text) -> None:
        """Take one chunk's tokens. Where nothing hangs on them, the next one is on its way before."""
        out, made = self.ahead or self._chunk(on_text)
        free = not (on_text or self.options.stop or self.ready or self.waiting)
        self.ahead = self._chunk(on_text) if free else None
        out = np.asarray(out)[:, : int(made)]
        for b, answer in enumerate(self.rows):
            if answer is not None:
                self._feed(b, out[b], on_text)

    def _chunk(self, on_text) -> tuple[jax.Array, jax.Array]:
        """(tokens, how many) of a chunk, which may be under way still. While prompts wait it ends once an
        eighth of the rows have."""
        done = np.array([answer is None for answer in self.rows])
        enough = max(1, self.size // 8) if self.ready or self.waiting else self.size
        self.state, out, made = self._call(
            self.programs.decode,
            self.filters,
            self.params,
            self.state,
            done,
            self.eos,
            self.numbers,
            np.int32(STREAM_CHUNK if on_text else CHUNK),
            np.int32(enough),
        )
        return out, made

    def _feed(self, b: int, tokens, on_text) -> None:
        """Hand row b's new tokens on; where they end its answer, the row is free."""
        answer = self.rows[b]
        assert answer is not None
        row = answer.row
        row.feed(tokens)
        if on_text is not None and (piece := row.piece()):
            on_text(answer.place, piece)
        if row.finish:
            self.rows[b] = None
            self.results[answer.place] = Completion(
                row.final(),
                tuple(row.tokens),
                row.finish,
                len(answer.prompt.tokens),
                answer.prefill_s,
                self.clock() - answer.since,
            )


def step_bytes(model: Model, params, batch: int, slots: int) -> int:
    """Bytes that decoding one token of `batch` rows must read: every weight once (of an embedding table that
    is no head the rows that are looked up), and `slots` slots of each row's cache. Over a device's memory
    bandwidth it bounds the seconds of a step, as long as products cost less than reading their weights; of a
    mixture of experts all of them are counted, as a large batch reads them."""
    cache = jax.eval_shape(lambda: model.init_cache(batch, slots).states)
    lookups = {path for path, row in model.table.rows.items() if row.role == "lookup"} - {model.head_path}
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    for name, tree in params.items():
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        total += size // model.table.sizes["V"] * batch if name in lookups else size
    return total


def prepare(params, dtype=None, *, merge: bool = True):
    """A parameter tree ready to generate with: weights in `dtype` (as they are if None), LoRA factors
    folded in (in float32, rounded once) or, without `merge`, left beside their weights. A quantised weight
    stays so, its factors beside it: folded in, it would no longer be small."""

    def one(w):
        if isinstance(w, NoisyEmbedding):
            return one(w.base)
        if isinstance(w, StackedLora):
            return w.replace(base=one(w.base))
        if isinstance(w, QuantWeight):
            return w
        if isinstance(w, LoraWeight) and (not merge or isinstance(w.base, QuantWeight)):
            return w.replace(base=one(w.base), rng=None, dropout=0.0)
        if isinstance(w, LoraWeight | RowsWeight):
            w = lora.merged(w, w.base.astype(jnp.float32)).astype(dtype or w.base.dtype)
        return w if dtype is None else w.astype(dtype)

    return jax.tree.map(one, params, is_leaf=is_leaf)


def default_dtype():
    """What to generate in where the user does not say: bfloat16 on accelerators, float32 on CPU, where
    decoding in bfloat16 is slower, the more so the longer the cache."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def chat_prompt(tokenizer, messages: Sequence[Mapping[str, Any]], tools=None, **template_kwargs) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks, by the tokenizer's chat template. Special
    tokens are the template's own: none is added twice. UserError where there is no template or it refuses."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template: give plain text, or a tokenizer that has one")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
    except jinja2.TemplateError as e:
        raise UserError(f"the chat template refuses this conversation: {e}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer) -> int | None:
    """The special token that the chat template puts after an assistant's answer; None where there is none."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "QZXJ"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:
        return None
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"]
    return after[0] if after and after[0] in special else None


def end_tokens(config: Mapping[str, Any], folder: Path | None, tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: of generation_config.json in `folder`, else of config.json, else of the
    tokenizer; and the chat template's end-of-turn token."""
    given = None
    if folder is not None and (path := Path(folder) / "generation_config.json").is_file():
        try:
            given = json.loads(path.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as e:
            raise UserError(f"{path} is not a JSON object: {e}") from None
    for other in (config.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)):
        given = other if given is None else given
    ends = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    turn = None if tokenizer is None else end_of_turn(tokenizer)
    return tuple(dict.fromkeys(ends if turn is None else [*ends, turn]))
