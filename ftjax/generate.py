"""Text from a model: prompts are prefilled into a key/value cache, then decoded a chunk of tokens at a time.

Prefill and decode are compiled apart, for lengths rounded up to a few buckets. A batch's prompts are padded
on the left. What all prompts begin with (an instruction, few-shot examples) is prefilled once and copied to
every row. Between chunks the host looks for stop strings and hands text on; within one, nothing leaves the
device.
"""

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
from ftjax.weights import LoraWeight, NoisyEmbedding, RowsWeight, StackedLora, is_leaf

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
    """The same seed, prompt and place in the list give the same answer."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these that its text contains."""

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
    prefill_s: float  # of the batch it was in, compilation not counted
    decode_s: float

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


def choose(logits_BV, seen_BV, filters: Filters, n: Mapping[str, Any], ids_B, index):
    """The next token of each row, int32 [B]. A row's draw depends on (seed, its id, `index`: the tokens it
    made before)."""
    logits_BV = filter_logits(logits_BV, seen_BV, filters, n)
    if filters.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(row, logits_V):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(n["seed"]), row), index)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(ids_B, logits_BV).astype(jnp.int32)


class State(struct.PyTreeNode):
    """A batch between two chunks."""

    cache: Cache
    token: jax.Array  # [B] the last one chosen, not yet in the cache
    position: jax.Array  # [B] its position
    left: jax.Array  # [B] tokens the row may still make
    done: jax.Array  # [B]
    made: jax.Array  # tokens chosen so far, a scalar
    ids: jax.Array  # [B] what the row's random numbers are drawn from
    seen: jax.Array | None  # [B, V] tokens of prompt and answer, with a repetition penalty


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
        self.spread = _Program(self._spread)
        self.prefill = _Program(self._prefill, donate=(2,))
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

    def _spread(self, size: tuple[int, int], prefix: Cache | None):
        """An empty cache of `size` (rows, slots), its first slots those of `prefix`."""
        cache = self.model.init_cache(*size)
        return cache if prefix is None else cache.begin(prefix)

    def _prefill(self, filters, params, state: State, tokens_BT, positions_BT, eos, n):
        segments_BT = (positions_BT >= 0).astype(jnp.int32)
        hidden_BTD, cache, _ = self.model(
            params, tokens_BT, jnp.maximum(positions_BT, 0), segments_BT, state.cache
        )
        state = state.replace(cache=cache, position=positions_BT[:, -1])
        return self._next(filters, params, state, hidden_BTD[:, -1], eos, n)

    def _next(self, filters, params, state: State, hidden_BD, eos, n):
        logits_BV = self.model.unembed(self.model.head(params), hidden_BD)
        token = choose(logits_BV, state.seen, filters, n, state.ids, state.made)
        token = jnp.where(state.done, state.token, token)
        left = state.left - 1
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(seen.shape[0]), token].set(True)
        return state.replace(
            token=token,
            position=state.position + 1,
            left=left,
            done=state.done | (left <= 0) | jnp.isin(token, eos),
            made=state.made + 1,
            seen=seen,
        )

    def _decode(self, filters, params, state: State, eos, n, steps):
        """Up to `steps` more tokens of each row: (state, tokens [B, CHUNK], how many)."""
        B = state.token.shape[0]

        def more(carry):
            i, state, _ = carry
            return (i < steps) & ~jnp.all(state.done)

        def step(carry):
            i, state, out = carry
            hidden_BTD, cache, _ = self.model(
                params,
                state.token[:, None],
                state.position[:, None],
                jnp.ones((B, 1), jnp.int32),
                state.cache,
            )
            state = self._next(filters, params, state.replace(cache=cache), hidden_BTD[:, 0], eos, n)
            return i + 1, state, jax.lax.dynamic_update_slice(out, state.token[:, None], (0, i))

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
        """Take the tokens up to the row's end."""
        before = len(self.tokens)
        for token in tokens:
            if self.finish:
                break
            self.tokens.append(int(token))
            if int(token) in self.eos:
                self.finish = "stop"
            elif len(self.tokens) >= self.budget:
                self.finish = "length"
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

    def budget(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[int]:
        """New tokens each prompt may have within the context; a cut is logged, no room is a UserError."""
        room = self.model.config.max_position_embeddings
        for i, prompt in enumerate(prompts):
            if len(prompt) >= room:
                raise UserError(
                    f"generate: prompt {i} has {len(prompt)} tokens, the model's context is {room} "
                    "(max_position_embeddings): shorten it"
                )
        budgets = [min(options.max_new_tokens, room - len(p)) for p in prompts]
        short = [b for b in budgets if b < options.max_new_tokens]
        if short:
            log.warning(
                "the context of %d tokens leaves %d of %d prompts fewer than max_new_tokens=%d (least: %d)",
                room,
                len(short),
                len(prompts),
                options.max_new_tokens,
                min(short),
            )
        return budgets

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: GenerateOptions,
        *,
        ids: Sequence[int] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        share_prefix: bool = True,
        adapters: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """All prompts as one batch. `on_text(index, piece)` gets text as it comes. `ids` (default 0, 1, …)
        name the rows for their random numbers."""
        tokens = self.encode(prompts)
        if not tokens:
            return []
        budgets = self.budget(tokens, options)
        ids = range(len(tokens)) if ids is None else ids
        which = self._which(adapters, len(tokens))
        prefix, spent = self._prefix(tokens, share_prefix and which is None)
        rows = list(zip(range(len(tokens)), tokens, budgets, ids, strict=True))
        return self._batch(rows, len(rows), options, prefix, spent, on_text, which)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        options: GenerateOptions,
        *,
        batch_size: int = 32,
        ids: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
        share_prefix: bool = True,
        adapters: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """Any number of prompts, in batches of like length; results in the prompts' order. What all prompts
        begin with is prefilled once. `progress(done, total)` is called after each batch."""
        if batch_size < 1:
            raise UserError(f"generate: batch_size={batch_size}: at least 1")
        tokens = self.encode(prompts)
        if not tokens:
            return []
        budgets = self.budget(tokens, options)
        ids = range(len(tokens)) if ids is None else ids
        which = self._which(adapters, len(tokens))
        prefix, spent = self._prefix(tokens, share_prefix and which is None)
        rows = sorted(
            zip(range(len(tokens)), tokens, budgets, ids, strict=True), key=lambda row: (-len(row[1]), row[0])
        )
        batches = -(-len(rows) // batch_size)
        size = -(-len(rows) // batches)  # as even as can be, so that one program serves them all
        out: dict[int, Completion] = {}
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            results = self._batch(part, size, options, prefix, spent if start == 0 else 0.0, None, which)
            out |= {row[0]: result for row, result in zip(part, results, strict=True)}
            if progress is not None:
                progress(len(out), len(rows))
        return [out[i] for i in range(len(rows))]

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

    def _batch(
        self, rows, size: int, options: GenerateOptions, prefix, spent: float, on_text, which=None
    ) -> list[Completion]:
        """Answers to `rows` of (index, tokens, budget, id); rows that are done at once fill up to `size`."""
        P = 0 if prefix is None else prefix.segments.shape[1]
        V = self.model.config.vocab_size
        T = bucket(max(len(r[1]) for r in rows) - P)
        S = -(-(P + T + max(r[2] for r in rows)) // 64) * 64
        tokens_BT = np.zeros((size, T), np.int32)
        positions_BT = np.full((size, T), -1, np.int32)  # -1 pads
        seen_BV = np.zeros((size, V), bool) if options.repetition_penalty != 1 else None
        left, ids = np.zeros(size, np.int32), np.zeros(size, np.uint32)
        for b, (_, tokens, budget, id_) in enumerate(rows):
            own = tokens[P:]
            tokens_BT[b, T - len(own) :] = own
            positions_BT[b, T - len(own) :] = np.arange(P, len(tokens))
            left[b], ids[b] = budget, id_
            if seen_BV is not None:
                seen_BV[b, tokens] = True
        eos = np.array(self.eos or (-1,), np.int32)
        static, data = Filters.of(options), numbers(options)
        params = self.params
        if which is not None:
            params = adapters.select(params, [which[r[0]] for r in rows] + [-1] * (size - len(rows)))

        compiled, start = self.compile_s, time.perf_counter()
        cache = self._call(self._programs.spread, (size, S), prefix)
        state = State(
            cache=cache,
            token=jnp.full(size, eos[0], jnp.int32),
            position=jnp.zeros(size, jnp.int32),
            left=jnp.asarray(left),
            done=jnp.asarray(left == 0),
            made=jnp.int32(0),
            ids=jnp.asarray(ids),
            seen=None if seen_BV is None else jnp.asarray(seen_BV),
        )
        state = self._call(self._programs.prefill, static, params, state, tokens_BT, positions_BT, eos, data)
        first = np.asarray(state.token)[:, None]
        prefill_s = spent + time.perf_counter() - start - (self.compile_s - compiled)

        compiled, start = self.compile_s, time.perf_counter()
        ends = frozenset(self.eos)
        answers = [_Row(self.tokenizer, row[1], row[2], ends, options.stop) for row in rows]
        if options.stop and self.tokenizer is None:
            raise UserError("generate: stop strings need a tokenizer")
        steps = np.int32(STREAM_CHUNK if on_text else CHUNK)
        out, made = first, 1
        while True:
            for (index, *_), answer, new in zip(rows, answers, out, strict=False):
                answer.feed(new[:made])
                if on_text is not None and (piece := answer.piece()):
                    on_text(index, piece)
            if all(a.finish for a in answers):
                break
            done = np.array([bool(a.finish) for a in answers] + [True] * (size - len(rows)))
            state = state.replace(done=jnp.asarray(done))
            state, out, made = self._call(self._programs.decode, static, params, state, eos, data, steps)
            out, made = np.asarray(out), int(made)
        decode_s = time.perf_counter() - start - (self.compile_s - compiled)
        return [
            Completion(a.final(), tuple(a.tokens), a.finish or "length", len(row[1]), prefill_s, decode_s)
            for row, a in zip(rows, answers, strict=True)
        ]


def prepare(params, dtype=None, *, merge: bool = True):
    """A parameter tree ready to generate with: weights in `dtype` (as they are if None), LoRA factors
    folded in (in float32, rounded once) or, without `merge`, left beside their weights."""

    def one(w):
        if isinstance(w, NoisyEmbedding):
            return one(w.base)
        if isinstance(w, StackedLora):
            return w.replace(base=one(w.base))
        if isinstance(w, LoraWeight) and not merge:
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
