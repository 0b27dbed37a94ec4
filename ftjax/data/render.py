"""Examples to tokens and loss weights.

A conversation is rendered once by the tokenizer's own template and tokenised once. What is trained is a set
of character spans of that text: for each assistant turn, from where the generation prompt ends (what a
server would have put before the model starts writing) to the end-of-turn token, that one included.
Everything the model has to write itself is in it: the reasoning and its tags, the tool calls and the syntax
around them.

The spans come from a second render with marks around each assistant part (or from the template's
`{% generation %}`); without its marks the second render has to equal the first, else the example is refused.
What a template inserts by itself before an answer, like Qwen3's empty <think> block, is not trained: the data
does not hold it, and a server adds it to the prompt.

A token that straddles the beginning of a span is not trained, since part of it belongs to the prompt, where a
server would have tokenised it differently; one that begins inside a span is trained, even where it ends
beyond.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np

from ftjax.data.examples import BadExample
from ftjax.data.record import Record
from ftjax.data.template import ChatTemplate, free_plane, unmark
from ftjax.errors import UserError

RENDERER_VERSION = 2  # part of the cache's key: raise it with any change to the tokens or weights made here

_THINK = re.compile(r"(</?think>)")


@dataclass(frozen=True)
class Rendered:
    """One document: tokens int32 [n], and loss_weight float32 [n] that weighs predicting each token."""

    tokens: np.ndarray
    loss_weight: np.ndarray
    truncated: bool = False
    notes: tuple[str, ...] = ()
    """What the template did that its author may not expect, in words, e.g. an inserted empty think block."""


@dataclass
class _Span:
    begin: int
    end: int
    weight: float
    stop: Literal["after", "inside", "given"] = "after"
    """Whether the end-of-turn token follows `end`, or may be the span's own last, or is not asked for."""
    closing: bool = False
    """Other text may stand between the last known place (of a tool call) and the end-of-turn token."""
    bound: int = 0
    """Where the next message is known to be: the end-of-turn token comes before."""


@dataclass
class _Draft:
    """A text and what to train of it, before tokenising."""

    where: str
    text: str
    spans: list[_Span]
    prefix: list[int] = field(default_factory=list)
    suffix: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weight: float = 1.0
    """Of the whole example."""


class Renderer:
    """Renders examples for one tokenizer (a fast one of `transformers`) and one set of options.

    `chat_template` is Jinja source replacing the tokenizer's own, or "none". Raises UserError for a
    tokenizer that is not a fast one and for a broken template.
    """

    def __init__(
        self,
        tokenizer,
        *,
        chat_template: str | None = None,
        template_args: dict[str, Any] | None = None,
        template_date: str = "2024-07-26",
        train_on: Literal["assistant", "last", "all"] = "assistant",
        max_length: int | None = None,
        overlong: Literal["error", "drop", "truncate", "split"] = "error",
    ):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets; "
                "ftjax needs one with a tokenizer.json"
            )
        backend.no_truncation()
        backend.no_padding()
        self.tokenizer, self._backend = tokenizer, backend
        self.train_on, self.max_length, self.overlong = train_on, max_length, overlong
        self.eos: int | None = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        added = backend.get_added_tokens_decoder()
        self._special = {i for i, t in added.items() if t.special} | {
            i for i in (self.eos, self.bos) if i is not None
        }
        contents = [added[i].content for i in self._special if i in added]
        self._control = re.compile(
            "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)"
        )
        self._control_first = frozenset(c[0] for c in contents if c)
        start = backend.encode("", add_special_tokens=True).ids
        self._text_prefix = start[:1] if start and start[0] == self.bos and self.bos != self.eos else []

        source = chat_template if chat_template is not None else _own_template(tokenizer)
        self._raw_wanted = source == "none"
        self.template: ChatTemplate | None = None
        if source is not None and source != "none":
            try:
                self.template = ChatTemplate(
                    source, {**tokenizer.special_tokens_map, **(template_args or {})}, template_date
                )
            except (jinja2.TemplateError, ValueError) as e:
                raise UserError(f"the chat template can't be used: {e}") from None
        self._prompts = self._generation_prompts(set(template_args or {}))
        self._openers = self._find_openers()
        self.stop_tokens: frozenset[int] = frozenset(self._find_stop_tokens())
        """Ids that end an assistant turn, the tokenizer's end-of-sequence token among them."""
        settings = [
            RENDERER_VERSION,
            source,
            template_args or {},
            template_date,
            train_on,
            max_length,
            overlong,
        ]
        digest = hashlib.sha256(backend.to_str().encode())
        digest.update(
            json.dumps([settings, tokenizer.special_tokens_map], sort_keys=True, default=str).encode()
        )
        self.fingerprint: str = digest.hexdigest()
        """Changes with anything the tokens and weights depend on, except the example."""

    # ── what callers use ──────────────────────────────────────────────────────────────────────────

    def units(self, batch: list[Record]) -> list[list[tuple[Rendered, ...]] | BadExample]:
        """Each example's units, or what is wrong with it.

        A unit is what stays together in one row: one document, or a pair (chosen, rejected). An example is
        one unit, except for a long text under overlong="split".
        """
        drafts: list[tuple[_Draft, ...] | BadExample] = []
        for example in batch:
            try:
                made = self._drafts(example)
            except BadExample as e:
                drafts.append(e)
                continue
            for draft in made:
                draft.weight = example.weight
            drafts.append(made)
        texts = [d.text for ds in drafts if not isinstance(ds, BadExample) for d in ds]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        out: list[list[tuple[Rendered, ...]] | BadExample] = []
        for ds in drafts:
            if isinstance(ds, BadExample):
                out.append(ds)
                continue
            mine = [next(encodings) for _ in ds]
            try:
                documents = tuple(self._finish(d, e) for d, e in zip(ds, mine, strict=True))
                out.append(self._fit(documents, ds[0].where))
            except BadExample as e:
                out.append(e)
        return out

    def render(self, example: Record) -> Rendered:
        """The example as one document; raises BadExample."""
        (documents,) = self._only(example)
        (document,) = documents
        return document

    def render_pair(self, example: Record) -> tuple[Rendered, Rendered]:
        """A preference example as (chosen, rejected), the shared prompt untrained in both; raises
        BadExample."""
        (documents,) = self._only(example)
        chosen, rejected = documents
        return chosen, rejected

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Token ids of the conversation and the generation prompt: what a model is given to answer."""
        if self.template is None:
            raise self._no_template("the conversation")
        return self._ids(self.template(_for_template(messages), tools, add_generation_prompt=True))

    def _only(self, example: Record) -> list[tuple[Rendered, ...]]:
        (result,) = self.units([example])
        if isinstance(result, BadExample):
            raise result
        return result

    # ── drafts: text and spans ────────────────────────────────────────────────────────────────────

    def _drafts(self, example: Record) -> tuple[_Draft, ...]:
        if example.task == "lm":
            self._refuse_control(example.text, "text", example.where)
            whole = _Span(0, len(example.text), 1.0, "given")
            return (
                _Draft(example.where, example.text, [whole], self._text_prefix, self._eos_for(example.where)),
            )
        if self.template is None:
            return self._raw(example)
        if example.task == "preference":
            return tuple(
                self._chat(replace(example, messages=example.messages + part))
                for part in (example.chosen, example.rejected)
            )
        return (self._chat(example),)

    def _raw(self, example: Record) -> tuple[_Draft, ...]:
        """Prompt and completion joined as they are, for a tokenizer without a chat template."""
        if example.raw is None:
            raise self._no_template(example.where)
        prompt, *completions = example.raw
        drafts = []
        for completion in completions:
            text = prompt + completion
            self._refuse_control(text, "the row", example.where)
            span = _Span(0 if self.train_on == "all" else len(prompt), len(text), 1.0, "given")
            draft = _Draft(example.where, text, [span], self._text_prefix, self._eos_for(example.where))
            if not self._raw_wanted:
                draft.notes.append("no chat template: prompt and completion are joined as they are")
            drafts.append(draft)
        return tuple(drafts)

    def _chat(self, example: Record) -> _Draft:
        messages, where = example.messages, example.where
        for i, message in enumerate(messages):
            for name in ("content", "reasoning_content"):
                self._refuse_control(message.get(name, ""), f"messages[{i}].{name}", where)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        weights = {i: float(messages[i].get("weight", 1.0)) for i in answers}
        if self.train_on == "last":
            weights = {i: w if i == answers[-1] else 0.0 for i, w in weights.items()}
        plane = free_plane(_strings([messages, example.tools]))
        if plane is None:
            raise BadExample(
                "template", where, "characters of both private-use planes leave none to mark the text with"
            )
        forms = [messages]
        if any(m.get("tool_calls") for m in messages):
            # Most templates want dict arguments, a few JSON strings.
            forms.append(_string_arguments(messages))
        for last, form in zip([False] * (len(forms) - 1) + [True], forms, strict=True):
            try:
                text = self._render(form, example.tools)
                break
            except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as e:
                if last:
                    raise BadExample(
                        "template", where, f"the chat template refuses these messages: {e}"
                    ) from None
        draft = _Draft(where, text, [])
        if example.tools and not any(name in text for name in _tool_names(example.tools)):
            draft.notes.append("the chat template does not show the row's `tools`")
        if self.train_on == "all":
            draft.spans = [_Span(0, len(text), 1.0, "given")]
        elif self.template is not None and self.template.marks_generation:
            draft.spans = self._generation_spans(form, example.tools, text, weights, plane, where)
        else:
            draft.spans = self._marked_spans(form, example.tools, text, weights, plane, draft)
        return draft

    def _render(self, messages: list[dict], tools, **options) -> str:
        assert self.template is not None
        return self.template(_for_template(messages), tools, **options)

    def _generation_spans(self, messages, tools, text, weights, plane, where) -> list[_Span]:
        marked = self._render(messages, tools, generation_marks=(chr(plane.start), chr(plane.start + 1)))
        clean, places = unmark(marked, plane)
        begins, ends = places.get(0, []), places.get(1, [])
        if clean != text or len(begins) != len(ends):
            raise _changed(where, text, clean)
        if len(begins) == len(weights):
            each = list(weights.values())
        elif len(set(weights.values())) == 1:
            each = [next(iter(weights.values()))] * len(begins)
        else:
            raise BadExample(
                "template",
                where,
                f"the template marks {len(begins)} generated parts for {len(weights)} assistant messages, "
                "so their different weights can't be told apart",
            )
        return [
            _Span(a, b, w, "inside", bound=len(text))
            for a, b, w in zip(begins, ends, each, strict=True)
            if b > a
        ]

    def _marked_spans(self, messages, tools, text, weights, plane, draft: _Draft) -> list[_Span]:
        located = None
        for strategy in _STRATEGIES if any(m.get("tool_calls") for m in messages) else _STRATEGIES[:1]:
            marked, parts, bounds = _marked(messages, plane, *strategy)
            try:
                clean, places = unmark(self._render(marked, tools), plane)
            except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):
                continue
            if clean == text:
                located = parts, bounds, places
                break
        if located is None:
            raise _changed(draft.where, text, clean)
        parts, bounds, places = located

        turns: dict[int, list[tuple[int, int, str]]] = {i: [] for i in weights}
        for index, kind, mark in parts:
            begins, ends = places.get(mark, []), places.get(mark + 1, [])
            if not begins and not ends:
                if kind == "tool call" and weights[index]:
                    raise BadExample(
                        "template",
                        draft.where,
                        f"the chat template does not show the tool calls of messages[{index}]",
                    )
                if weights[index]:  # as Qwen3 does with the thinking of earlier turns
                    draft.notes.append(f"the template leaves out the {kind} of some assistant messages")
                continue
            if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
                at = (begins + ends)[0]
                raise BadExample(
                    "template",
                    draft.where,
                    f"the template does not show the {kind} of messages[{index}] exactly once, near "
                    f"{text[max(0, at - 40) : at + 40]!r}, so what to train can't be told",
                )
            turns[index].append((begins[0], ends[0], kind))
        for turn in turns.values():
            turn.sort()
        hidden = [i for i, turn in turns.items() if not turn and weights[i]]
        if hidden:
            raise BadExample(
                "template",
                draft.where,
                f"the chat template shows nothing of the assistant's messages[{hidden[0]}]",
            )
        stops = sorted(
            [turn[0][0] for turn in turns.values() if turn] + [p for b in bounds for p in places.get(b, [])]
        )
        spans, low = [], 0
        for index, turn in sorted(turns.items()):
            if not turn:
                continue
            last_end = turn[-1][1]
            if weights[index]:
                begin = self._turn_begin(messages, tools, index, text, low, turn[0], draft)
                bound = next((s for s in stops if s >= last_end and s > turn[-1][0]), len(text))
                spans.append(
                    _Span(begin, last_end, weights[index], closing=turn[-1][2] == "tool call", bound=bound)
                )
            low = last_end
        return spans

    def _turn_begin(
        self, messages, tools, index, text, low, first: tuple[int, int, str], draft: _Draft
    ) -> int:
        """Where the generation prompt ends and the model begins to write."""
        shown, _, kind = first
        ends = [at + len(p) for p in self._prompts if (at := text.rfind(p, low, shown)) >= 0]
        after = max(ends, default=None)
        if after is None:
            try:
                before = self._render(messages[:index], tools, add_generation_prompt=True)
                if text.startswith(before) and low <= len(before) <= shown:
                    after = len(before)
            except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):
                pass
        if after is not None:
            inserted = text[after:shown]
            if kind != "content" or not inserted.strip():
                return after
            draft.notes.append(
                f"the template inserts {inserted!r} before answers; it is not trained, so serve with it"
            )
            return shown
        if kind == "content":
            return shown
        raise BadExample(
            "template",
            draft.where,
            f"can't tell where the model begins to write messages[{index}]: the generation prompt is not "
            f"found before its {kind}, near {text[max(0, shown - 60) : shown + 20]!r}",
        )

    def _generation_prompts(self, argument_names: set[str]) -> list[str]:
        """What the template adds for the model to write after: with the user's arguments, and without
        thinking set.

        Earlier turns of a conversation are often shown without what the user's arguments add to the last.
        """
        if self.template is None:
            return []
        found = []
        for variables in ({}, {"enable_thinking": True}) if "enable_thinking" in argument_names else ({},):
            try:
                asked = [{"role": "user", "content": "x"}]
                before = self.template(asked, variables=variables)
                after = self.template(asked, add_generation_prompt=True, variables=variables)
            except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):
                continue
            if after.startswith(before) and after != before:
                found.append(after[len(before) :])
        return found

    def _find_openers(self) -> set[int]:
        """Special tokens that begin a turn, so that none is taken for the end of the turn before."""
        openers = {self.bos} if self.bos is not None else set()
        if self._prompts:
            for prompt in self._prompts:
                openers.update(self._ids(prompt))
        elif self.template is not None:
            try:
                before, _, after = self.template(_for_template(_PROBE)).rpartition(_PROBE[1]["content"])
            except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):
                before = after = ""
            openers.update(self._ids(before.partition(_PROBE[0]["content"])[0]))
            openers.difference_update(self._ids(after))
        return (openers & self._special) - {self.eos}

    def _find_stop_tokens(self) -> set[int]:
        stops = {self.eos} if self.eos is not None else set()
        if self.template is None:
            return stops
        try:
            draft = self._chat(Record("sft", _PROBE))
            document = self._finish(draft, self._backend.encode(draft.text, add_special_tokens=False))
        except (BadExample, UserError):
            return stops
        trained = document.tokens[document.loss_weight > 0].tolist()
        return stops | {i for i in trained[-2:] if i in self._special}

    # ── tokens and weights ────────────────────────────────────────────────────────────────────────

    def _finish(self, draft: _Draft, encoding) -> Rendered:
        ids = encoding.ids
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # Some tokenizers leave a token's leading space out of its offsets: it begins where the one before
        # ends.
        before = np.concatenate([[0], np.maximum.accumulate(offsets[:, 1])])[: len(ids)]
        begins, ends = np.minimum(offsets[:, 0], before), offsets[:, 1]
        special = [
            (int(b), int(e), i) for b, e, i in zip(begins, ends, ids, strict=True) if i in self._special
        ]
        weight = np.zeros(len(ids), np.float32)
        for span in draft.spans:
            end = self._turn_end(span, draft, special)
            weight[(begins >= span.begin) & (begins < end)] = span.weight
        tokens = np.array(draft.prefix + ids + draft.suffix, np.int32)
        ones = np.ones(len(draft.suffix), np.float32)
        weight = np.concatenate([np.zeros(len(draft.prefix), np.float32), weight, ones])
        weight *= np.float32(draft.weight)
        if len(tokens) > 1 and self.bos is not None and tokens[0] == tokens[1] == self.bos:
            raise BadExample(
                "doubled_bos",
                draft.where,
                f"the text begins with {self.tokenizer.bos_token!r} twice: both template and data give it",
            )
        if len(weight):
            weight[0] = 0.0  # nothing comes before the first token to predict it from
        if not weight.any():
            raise BadExample(
                "nothing_to_train", draft.where, "no token has a loss weight, so there is nothing to train on"
            )
        return Rendered(tokens, weight, notes=tuple(dict.fromkeys(draft.notes)))

    def _turn_end(self, span: _Span, draft: _Draft, special: list[tuple[int, int, int]]) -> int:
        """Where the turn's end-of-turn token ends; raises BadExample where there is none, naming the
        place."""
        if span.stop == "given":
            return span.end
        text = draft.text
        if span.stop == "inside":
            inside = [s for s in special if span.begin <= s[0] < span.end]
            if inside and not text[inside[-1][1] : span.end].strip():
                return span.end
        after = [s for s in special if span.end <= s[0] < span.bound and s[2] not in self._openers]
        if span.closing:
            known = [s for s in after if s[2] in getattr(self, "stop_tokens", ())]
            found = (known or after)[:1]
        else:
            found = [s for s in after[:1] if not text[span.end : s[0]].strip()]
        if found:
            return found[0][1]
        raise BadExample(
            "no_end_of_turn",
            draft.where,
            "no end-of-turn token follows the answer, near "
            f"{text[max(span.begin, span.end - 40) : span.end + 40]!r}, so the model "
            "would not learn to stop; the template should put one there",
        )

    def _fit(self, documents: tuple[Rendered, ...], where: str) -> list[tuple[Rendered, ...]]:
        limit, total = self.max_length, sum(len(d.tokens) for d in documents)
        if limit is None or total <= limit:
            return [documents]
        what = "chosen and rejected have together" if len(documents) == 2 else "the example has"
        if self.overlong == "split" and len(documents) == 1 and documents[0].loss_weight[1:].all():
            return [(window,) for window in _windows(documents[0], limit)]
        if self.overlong != "truncate":
            hint = "; `split` cuts only plain text" if self.overlong == "split" else ""
            raise BadExample(
                "overlong",
                where,
                f"{what} {total} tokens, more than max_length = {limit}; raise max_length, or set "
                f"`overlong` to drop or truncate{hint}",
            )
        keep = _shares([len(d.tokens) for d in documents], limit)
        cut = tuple(
            replace(d, tokens=d.tokens[:n], loss_weight=d.loss_weight[:n], truncated=n < len(d.tokens))
            for d, n in zip(documents, keep, strict=True)
        )
        if not all(d.loss_weight.any() for d in cut):
            raise BadExample(
                "truncated_answer",
                where,
                f"{what} {total} tokens, and cutting to max_length = {limit} removes all of the answer",
            )
        return [cut]

    # ── small things ──────────────────────────────────────────────────────────────────────────────

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _eos_for(self, where: str) -> list[int]:
        if self.eos is None:
            raise UserError(
                f"{where}: the tokenizer has no end-of-sequence token, so a model could not learn to stop"
            )
        return [self.eos]

    def _no_template(self, where: str) -> UserError:
        return UserError(
            f"{where}: the tokenizer has no chat template (a base model?), so a conversation can't be "
            "rendered. Set data.chat_template to a Jinja file (for example the chat_template.jinja of the "
            "model's instruct version), or give the data as prompt and completion strings."
        )

    def _refuse_control(self, text: str, name: str, where: str) -> None:
        """A control token spelled out in the data would become one, and cut or forge a turn."""
        if self._control_first.isdisjoint(text):
            return
        found = self._control.search(text)
        if found:
            raise BadExample("control_token", where, f"{name} has the control token {found[0]!r} in its text")


def render(example: Record, tokenizer, **options) -> Rendered:
    """The example's tokens and loss weights; for more than a few make one Renderer. Raises BadExample."""
    return Renderer(tokenizer, **options).render(example)


def read_template(setting: str | None) -> str | None:
    """The `chat_template` setting as Renderer takes it: "none", or the text of the file that it names."""
    if setting is None or setting == "none":
        return setting
    path = Path(setting).expanduser()
    if not path.is_file():
        raise UserError(f'data.chat_template: {setting} is no file; give a Jinja file, or "none"')
    return path.read_text(encoding="utf-8")


_PROBE: list[dict] = [{"role": "user", "content": "question-7"}, {"role": "assistant", "content": "answer-8"}]
# How to mark a tool call (by its name, or by a string among its arguments, for templates that look the name
# up) and whether to mark the message after it; the first whose render is otherwise unchanged is used.
_STRATEGIES = [("name", True), ("name", False), ("arguments", True), ("arguments", False)]


def _own_template(tokenizer) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def _for_template(messages: list[dict]) -> list[dict]:
    """Messages as templates expect them: no weights of ours, and the reasoning also by its other name."""
    out = []
    for message in messages:
        message = {k: v for k, v in message.items() if k != "weight"}
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
        out.append(message)
    return out


def _tool_names(tools: list[dict]) -> list[str]:
    schemas = [t.get("function", t) for t in tools]
    return [str(s.get("name")) for s in schemas if isinstance(s, dict)]


def _string_arguments(messages: list[dict]) -> list[dict]:
    out = []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                calls.append({**call, "function": {**call["function"], "arguments": arguments}})
            message = {**message, "tool_calls": calls}
        out.append(message)
    return out


def _marked(messages: list[dict], plane: range, call_by: str, mark_next: bool):
    """The messages with marks, the parts [(message, kind, mark)], and the marks that only say where one is.

    Marks stand inside of the white space at a part's ends, so that trimming finds what it would have found.
    """
    parts: list[tuple[int, str, int]] = []
    bounds: list[int] = []
    fresh = 0

    def around(text: str, index: int, kind: str) -> str:
        nonlocal fresh
        core = text.strip()
        if not core:
            return text
        begin = text.index(core)
        parts.append((index, kind, fresh))
        opened, closed = chr(plane[fresh]), chr(plane[fresh + 1])
        fresh += 2
        return text[:begin] + opened + core + closed + text[begin + len(core) :]

    out, after_call = [], False
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            content = message["content"]
            if after_call and mark_next and len(content) > 1:
                half = len(content) // 2
                bounds.append(fresh)
                message = {**message, "content": content[:half] + chr(plane[fresh]) + content[half:]}
                fresh += 2
            after_call = False
            out.append(message)
            continue
        message = dict(message)
        if "reasoning_content" in message:
            message["reasoning_content"] = around(message["reasoning_content"], index, "reasoning")
        # Templates take thinking out of a content by its tags, so each side of a tag is a part of its own.
        pieces, thinking = _THINK.split(message["content"]), message["content"].lstrip().startswith("<think>")
        message["content"] = "".join(
            p if _THINK.fullmatch(p) else around(p, index, "reasoning" if thinking and i <= 2 else "content")
            for i, p in enumerate(pieces)
        )
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                function = dict(call["function"])
                if call_by == "name":
                    function["name"] = around(function["name"], index, "tool call")
                else:
                    mark = partial(around, index=index, kind="tool call")
                    function["arguments"] = _mark_leaf(function["arguments"], mark)
                calls.append({**call, "function": function})
            message["tool_calls"] = calls
        after_call = bool(message.get("tool_calls"))
        out.append(message)
    return out, parts, bounds


def _mark_leaf(value: Any, mark):
    """The value with the first non-blank string in it marked."""
    done = False

    def walk(v):
        nonlocal done
        if done:
            return v
        if isinstance(v, str) and v.strip():
            done = True
            return mark(v)
        if isinstance(v, dict):
            return {k: walk(x) for k, x in v.items()}
        if isinstance(v, list):
            return [walk(x) for x in v]
        return v

    return walk(value)


def _changed(where: str, text: str, clean: str) -> BadExample:
    at = next(
        (i for i, (a, b) in enumerate(zip(text, clean, strict=False)) if a != b), min(len(text), len(clean))
    )
    return BadExample(
        "template",
        where,
        "marking the answers changes what the template renders, so what to train can't be told, near "
        f"{text[max(0, at - 40) : at + 40]!r}",
    )


def _strings(value: Any):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _strings(k)
            yield from _strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from _strings(v)


def _windows(document: Rendered, limit: int) -> list[Rendered]:
    """Windows of at most `limit` tokens, each beginning with the last token of the one before.

    A window's first token can't be predicted in it, so without the overlap one in `limit` would go untrained.
    """
    out = []
    for begin in range(0, len(document.tokens) - 1, limit - 1):
        weight = document.loss_weight[begin : begin + limit].copy()
        weight[0] = 0.0
        out.append(Rendered(document.tokens[begin : begin + limit], weight))
    return out


def _shares(lengths: list[int], limit: int) -> list[int]:
    """How much of each document to keep, together `limit` tokens, the longer giving way first."""
    if len(lengths) == 1:
        return [min(lengths[0], limit)]
    a, b = lengths
    half = limit // 2
    return [a, limit - a] if a <= half else [limit - b, b] if b <= half else [half, half]
