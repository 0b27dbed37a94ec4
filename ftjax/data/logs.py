"""Training examples from production logs: sampled, threaded, masked, and turned by what users said of the
answers into conversations to learn, rated answers or preference pairs.

Every row of the log is accounted for: it goes on, or a verdict says why it does not.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from ftjax.data import read
from ftjax.data.formats.messages import as_context, conversation, tools_of
from ftjax.data.log_forms import FEEDBACK, Call, calls, feedback_of, ids_of
from ftjax.data.options import DataSource
from ftjax.data.personal import CODES, Masker, PersonalOptions, shown
from ftjax.data.record import Findings, Judged, Record, hash64, text_of
from ftjax.data.steps import Step
from ftjax.data.texts import rewritten
from ftjax.errors import UserError

VERSION = 2  # part of the parts' keys: raise it where the same rows give other calls


@dataclass(frozen=True)
class LogsOptions:
    """What of a log becomes examples, and of which kind."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    make: Literal["sft", "unpaired", "preference", "all"] = "sft"
    """sft: conversations, without answers that were rated bad or asked for again, a correction in place of
    what it corrects. unpaired: each rated answer with its label. preference: a correction over what it
    corrects, and an answer that was kept over one that was asked for again. all: pairs where there are any,
    rated answers otherwise, and conversations of which nothing was said."""
    feedback: str | None = None
    """A file of feedback in rows of its own, joined by id (of the response, request, row or span)."""
    unrated: bool = True
    """sft: also take conversations of which nothing was said, not only those rated good or corrected."""
    good_rating: float = 4.0
    """A `rating` (or `stars`) from here on is good. For ratings of 1 and -1: 1."""
    bad_rating: float = 2.0
    """A `rating` up to here is bad; between the two it says nothing. For ratings of 1 and -1: -1."""
    rate: float = 1.0
    """Share of the conversations that are taken, chosen by a hash, so that the same ones are taken of a log
    that has grown."""
    per_user: int | None = None
    """Most examples of one user."""
    per_conversation: int | None = None
    """Most examples of one conversation."""
    mask: bool = True
    """Put [EMAIL_1], [SECRET_1] … in the place of personal data and secrets."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise UserError(f"logs: rate is {self.rate}; it is a share, over 0 and up to 1")
        if self.bad_rating >= self.good_rating:
            raise UserError(f"logs: bad_rating {self.bad_rating} is not below good_rating {self.good_rating}")


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class LogPart:
    """A part of a log file; its records are calls and chats with an answer, of the task sft, and what the log
    says of each is in meta["log"]."""

    part: read.Part

    def key(self) -> str:
        return f"log {VERSION} {self.part.key()}"

    def judged(self) -> Iterator[Judged]:
        for row in self.part.rows():
            if row.values is None:
                yield Judged(None, list(row.said))
                continue
            for call in _calls(row.values):
                found = Findings(self.part.source.path, row.line)
                record = _record(call, found)
                if record is not None:
                    record.where = f"{found.source}:{found.line}"
                    record.meta |= {"source": found.source, "line": found.line}
                yield Judged(record, list(found))


def _calls(values: dict[str, Any]) -> list[Call]:
    """The calls of a row; one that failed where the row holds none or is not what it looks like."""
    try:
        return list(calls(values)) or [Call(failed=("L005", "the row holds no span"))]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        return [
            Call(failed=("L005", f"the row is not of the form that its keys say: {type(e).__name__}: {e}"))
        ]


def parts(source: DataSource | str, rows_per_part: int = 20_000) -> list[LogPart]:
    """A log file (JSON lines, or an array) in parts."""
    source = DataSource(source) if isinstance(source, str) else source
    # its rows are no examples, whatever keys they have
    return [LogPart(part) for part in read.parts(replace(source, format="chat"), rows_per_part)]


_MESSAGE = (
    *(
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "reasoning_content",
        "refusal",
        "function_call",
    ),
)


def _record(call: Call, found: Findings) -> Record | None:
    if call.failed:
        found.add(call.failed[0], "", call.failed[1])
        return None
    given = [{k: v for k, v in m.items() if k in _MESSAGE} for m in call.messages if isinstance(m, dict)]
    messages = conversation(given, found)
    tools = tools_of({"tools": call.tools}, found) if call.tools else None
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if found.error is not None or not messages:
        if found.error is None:
            found.add("L004", "", "the log has no answer to this request")
        return None
    if call.choices > 1:
        found.add("L014", "", f"of {call.choices} choices the first is taken")
    turns = dict(call.turns)
    if call.feedback:
        turns[len(messages) - 1] = {**turns.get(len(messages) - 1, {}), **call.feedback}
    for i, values in sorted(turns.items()):
        for key in unread(values):
            why = f"{key} {_short(values[key])} is neither good nor bad: it counts as nothing said"
            found.add("L016", f"messages[{i}]", why)
    said = {
        "ids": list(call.ids),
        "conversation": call.conversation,
        "user": call.user,
        "time": call.time,
        "model": call.model,
        "turns": {str(i): f for i, f in turns.items()},
        "chat": call.chat,
    }
    return Record("sft", messages, tools=tools, meta={"log": said})


# ── feedback ──────────────────────────────────────────────────────────────────────────────────────


class Signal(NamedTuple):
    """What was said of an answer."""

    good: bool | None = None
    correction: str = ""
    again: bool = False
    """It was asked for once more."""


_GOOD = frozenset(
    "up thumbs_up thumbsup thumb_up +1 👍 good positive like liked helpful accepted accept correct pass "
    "passed true yes great relevant".split()
)
_BAD = frozenset(
    "down thumbs_down thumbsdown thumb_down -1 👎 bad negative dislike disliked unhelpful not_helpful "
    "rejected reject incorrect fail failed false no poor irrelevant wrong".split()
)
_NEITHER = frozenset("neutral none null n/a na unrated skip skipped 0".split()) | {""}
_STARS = ("rating", "stars")
_THUMBS = ("thumbs", "thumbs_up", "accepted", "liked")  # of which 0 is bad
_CORRECTIONS = ("correction", "corrected", "edited", "edited_response", "ideal")


def signal(said: dict[str, Any], options: LogsOptions) -> Signal:
    """Of the values under FEEDBACK's keys."""
    found = [_opinion(k, said[k], options) for k in FEEDBACK if k in said and k not in _CORRECTIONS]
    good = next((o.good for o in reversed(found) if o and o.good is not None), None)
    correction = next((c for k in _CORRECTIONS if (c := _text(said.get(k)))), "")
    return Signal(good, correction, any(o.again for o in found if o))


def unread(said: dict[str, Any]) -> list[str]:
    """The keys whose values say nothing that `signal` understands."""
    opinions = [k for k in FEEDBACK if k in said and k not in _CORRECTIONS]
    lost = [k for k in opinions if _opinion(k, said[k], LogsOptions()) is None]
    return lost + [
        k for k in _CORRECTIONS if said.get(k) not in (None, "", True, False) and not _text(said[k])
    ]


def _opinion(key: str, value: Any, options: LogsOptions) -> Signal | None:
    """What one value says of the answer; None where it cannot be read."""
    word = str(value).strip().lower().replace(" ", "_")
    word = word[:1] + word[1:].replace("-", "_")
    if key == "regenerated":
        return Signal(again=word in ("true", "1")) if word in ("true", "1", "false", "0", "none") else None
    if value is None or word in _NEITHER and not (word == "0" and key in (*_STARS, *_THUMBS)):
        return Signal()
    if isinstance(value, bool):
        return Signal(value)
    number = _number(value)
    if key in _STARS and number is not None:
        return Signal(
            True if number >= options.good_rating else False if number <= options.bad_rating else None
        )
    if word in _GOOD | _BAD:
        return Signal(word in _GOOD)
    if number is not None:
        return Signal(number > 0)
    if key in ("feedback", "label", "vote") and ("regenerat" in word or "retry" in word):
        return Signal(again=True)
    return None


def _both(row: Signal, file: Signal) -> Signal:
    good = row.good if file.good is None else file.good
    return Signal(good, file.correction or row.correction, row.again or file.again)


def _spoils(said: Signal) -> bool:
    return said.good is False or said.again or bool(said.correction)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) < 60 else said[:57] + "…"


def _text(value: Any) -> str:
    """A correction: a text, or a message with one."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value.strip() else ""


# ── the step ──────────────────────────────────────────────────────────────────────────────────────


class Seen(NamedTuple):
    """What the decision needs of one call."""

    whole: int
    """Hash of the conversation with its answer (without system prompts, which may differ each time)."""
    asked: int
    """Of the conversation before the answer."""
    earlier: tuple[int, ...]
    """Of each beginning that ends with an earlier answer."""
    ids: tuple[int, ...]
    thread: int
    user: int
    conversation: int
    time: float
    said: Signal
    """Of the answer, in the row itself."""
    chat: bool
    offset: int
    """Of the answer in the part's file of answers."""
    line: int


class Fate(NamedTuple):
    """Of one call that does not simply go on."""

    code: str
    text: str
    other: tuple[int, int] | None = None
    """Part and offset of the answer that was kept."""


class Decision(NamedTuple):
    fates: list[dict[int, Fate]]
    """By part and number in it."""
    feedback: list[dict[int, dict]]
    """From the file of its own, likewise."""
    good: frozenset[int]
    """Of conversations whose last answer may be trained where a longer one holds it."""
    counts: dict[str, int]


def chain(messages: list[dict], group: str) -> list[tuple[int, int, int]]:
    """(index, hash before it, hash with it) of each assistant message, of the conversation so far."""
    out, so_far = [], hash64(group)
    for i, message in enumerate(messages):
        if message["role"] in ("system", "developer"):
            continue
        before = so_far
        so_far = hash64(f"{so_far} {message['role']} {text_of(message).strip()}")
        if message["role"] == "assistant":
            out.append((i, before, so_far))
    return out


class Logs(Step):
    """Over parts of logs (`parts`)."""

    name = "logs"
    gathers = True
    writes = "ftjax"
    Options = LogsOptions

    def reads(self) -> Sequence[str]:
        return [self.options.feedback] if self.options.feedback else []

    def facts(self, records: Iterable[Record], part: int) -> list[Seen]:
        seen = []
        with open(self._answers(part), "wb") as file:
            for record in records:
                log = record.meta["log"]
                group = log["conversation"] or log["user"]
                turns = chain(record.messages, group)
                (_, asked, whole), earlier = turns[-1], turns[:-1]
                offset = file.tell()
                file.write(json.dumps(record.messages[-1]).encode() + b"\n")
                last = str(len(record.messages) - 1)
                said = signal(log["turns"].get(last, {}), self.options)
                seen.append(
                    Seen(
                        whole,
                        asked,
                        tuple(h for _, _, h in earlier),
                        tuple(map(hash64, log["ids"])),
                        _thread(record),
                        hash64(log["user"]) if log["user"] else 0,
                        hash64(log["conversation"]) if log["conversation"] else 0,
                        log["time"],
                        said._replace(correction=said.correction[:1]),
                        log["chat"],
                        offset,
                        record.meta["line"],
                    )
                )
        return seen

    def decide(self, facts: Sequence[list[Seen]]) -> Decision:
        fates: list[dict[int, Fate]] = [{} for _ in facts]
        order = sorted((s.time, part, i) for part, seen in enumerate(facts) for i, s in enumerate(seen))
        at = [(part, i, facts[part][i]) for _, part, i in order]
        feedback, counts = self._joined(facts)
        for part, found in enumerate(feedback):
            for i, values in found.items():
                seen = facts[part][i]
                facts[part][i] = seen._replace(said=_both(seen.said, signal(values, self.options)))
        at = [(part, i, facts[part][i]) for part, i, _ in at]
        earlier = {h: s.line for _, _, s in at for h in s.earlier}
        first: dict[int, int] = {}
        for part, i, s in at:
            if s.whole in first:
                fates[part][i] = Fate("L007", f"the same call was logged before, in line {first[s.whole]}")
            first.setdefault(s.whole, s.line)
        again = _asked_again(at, fates, earlier)
        of_good = {h for _, _, s in at if s.said.good for h in s.earlier}
        for part, i, s in at:
            if i not in fates[part] and s.whole in earlier and not self._stands(s, of_good):
                why = f"the conversation goes on in line {earlier[s.whole]}, which holds this turn"
                fates[part][i] = Fate("L006", why)
        for (part, i), fate in again.items():
            fates[part][i] = fate
        self._sample(at, fates)
        bad = {s.whole for part, i, s in at if _spoils(s.said) or (part, i) in again}
        return Decision(fates, feedback, frozenset(s.whole for _, _, s in at) - bad, counts)

    def _stands(self, s: Seen, of_good: set[int]) -> bool:
        """Whether a call gives an example of its own though a longer conversation holds it: what was said of
        its answer would be lost."""
        if s.chat:  # which says of each answer what was said of it, in its longer copy too
            return False
        if self.options.make != "sft":
            return s.said != Signal()
        return bool(s.said.correction) or bool(
            not self.options.unrated and s.said.good and s.whole not in of_good
        )

    def _sample(self, at: list[tuple[int, int, Seen]], fates: list[dict[int, Fate]]) -> None:
        """Fates of what the rate and the caps leave out, by hashes alone: the order does not matter."""
        o = self.options

        def rank(number: int) -> float:
            return hash64(f"{o.seed} {number}") / 2**64

        for part, i, s in at:
            if rank(s.thread) >= o.rate:
                other = fates[part].get(i)
                if other is None or other.code == "L013":
                    fates[part][i] = Fate("L008", f"not in the sample of {o.rate:.2%}")
        for name, most in (("user", o.per_user), ("conversation", o.per_conversation)):
            if most is None:
                continue
            taken: Counter = Counter()
            for part, i, s in sorted(at, key=lambda one: (rank(one[2].whole), one[0], one[1])):
                whose = getattr(s, name)
                if i in fates[part] or not whose:
                    continue
                taken[whose] += 1
                if taken[whose] > most:
                    fates[part][i] = Fate("L009", f"more than {most} of one {name}")

    def _joined(self, facts: Sequence[list[Seen]]) -> tuple[list[dict[int, dict]], dict[str, int]]:
        """The rows of the feedback's file by the calls they are about."""
        out: list[dict[int, dict]] = [{} for _ in facts]
        if not self.options.feedback:
            return out, {}
        said: dict[int, dict] = {}
        rows, lost = 0, 0
        for row in read.rows(DataSource(self.options.feedback)):
            values = row.values or {}
            found, ids = feedback_of(values), ids_of(values)
            rows += 1
            lost += bool(unread(found))
            if not ids:
                keys = ", ".join(map(str, values))
                raise UserError(
                    f"{self.options.feedback}:{row.line}: no id in this row of feedback (keys: {keys})"
                )
            for one in ids:
                said.setdefault(hash64(one), {}).update(found)
        joined = set()
        for part, seen in enumerate(facts):
            for i, s in enumerate(seen):
                for one in s.ids:
                    if one in said:
                        out[part][i] = {**out[part].get(i, {}), **said[one]}
                        joined.add(one)
        return out, {
            "feedback_rows": rows,
            "feedback_rows_not_understood": lost,
            "feedback_ids_not_in_the_log": len(said.keys() - joined),
        }

    def summary(self, decision: Any) -> dict[str, Any]:
        return decision.counts

    def apply(self, records: Iterable[Record], decision: Any, part: int) -> Iterator[Judged]:
        for i, record in enumerate(records):
            fate = decision.fates[part].get(i)
            if fate is not None and (fate.other is None or self.options.make in ("sft",)):
                yield Judged(None, [record.verdict(fate.code, fate.text)])
                continue
            log = record.meta["log"]
            turns = {int(k): v for k, v in log["turns"].items()}
            if i in decision.feedback[part]:
                last = len(record.messages) - 1
                turns[last] = {**turns.get(last, {}), **decision.feedback[part][i]}
            signals = {k: signal(v, self.options) for k, v in turns.items()}
            kept = None
            if fate is not None:
                last = len(record.messages) - 1
                signals[last] = signals.get(last, Signal())._replace(again=True)
                kept = self._answer(*fate.other)  # type: ignore[misc]
            clean = _without_log(record, decision.good)
            for judged in _made(clean, signals, kept, self.options):
                yield self._masked(judged)

    def _masked(self, judged: Judged) -> Judged:
        if judged.record is None or not self.options.mask:
            return judged
        masker = Masker(PersonalOptions())
        masked = rewritten(judged.record, masker)
        verdicts = [
            masked.verdict(CODES[f.kind], f"{f.what} at character {f.start}, masked: {shown(text, f)}", path)
            for path, text, f in masker.found
        ]
        return Judged(masked, [*judged.verdicts, *verdicts], judged.changed or masked is not judged.record)

    def _answers(self, part: int) -> str:
        assert self.folder is not None, "the pipeline gives the step a folder"
        return f"{self.folder}/answers-{part:05}.jsonl"

    def _answer(self, part: int, offset: int) -> dict:
        with open(self._answers(part), "rb") as file:
            file.seek(offset)
            return json.loads(file.readline())


def _thread(record: Record) -> int:
    """Of the conversation: its id, or what it began with."""
    log = record.meta["log"]
    if log["conversation"]:
        return hash64(log["conversation"])
    begun = next((text_of(m) for m in record.messages if m["role"] == "user"), "")
    return hash64(f"{log['user']} {begun}")


def _asked_again(at, fates, earlier) -> dict[tuple[int, int], Fate]:
    """Of calls of one conversation that ask the same and got other answers, all but the one that was kept:
    that which the conversation went on with, or the last."""
    groups: dict[int, list[tuple[int, int, Seen]]] = {}
    for part, i, s in at:
        if i not in fates[part]:
            groups.setdefault(s.asked, []).append((part, i, s))
    out = {}
    for group in groups.values():
        went_on = [one for one in group if one[2].whole in earlier]
        # one user's equal questions may be of two days, or of a program: unless it is known that they are not
        sure = (
            any(s.said.again for _, _, s in group)
            or all(s.conversation for _, _, s in group)
            or (went_on and all(s.user for _, _, s in group))
        )
        if len(group) < 2 or not sure:
            continue
        best = (went_on or [one for one in group if not one[2].said.again] or group)[-1]
        for part, i, _ in group:
            if (part, i) != best[:2]:
                why = f"it was asked again: the answer of line {best[2].line} was kept"
                out[part, i] = Fate("L013", why, (best[0], best[2].offset))
    return out


def _without_log(record: Record, good: frozenset[int]) -> Record:
    """The record with provenance in place of the log's own facts, and with earlier answers trained only where
    the log has their calls too (few-shot examples in a prompt, and answers that failed or were rated bad, are
    not)."""
    log = record.meta["log"]
    messages = record.messages
    if not log["chat"]:
        logged = {i for i, _, h in chain(messages, log["conversation"] or log["user"])[:-1] if h in good}
        messages = [
            {**m, "weight": 0.0}
            if m["role"] == "assistant" and i < len(messages) - 1 and i not in logged
            else m
            for i, m in enumerate(messages)
        ]
    meta = {k: v for k, v in record.meta.items() if k != "log"}
    meta |= {"group": f"{_thread(record):016x}"}
    meta |= {k: log[k] for k in ("model", "time") if log[k]}
    meta |= {"log_id": log["ids"][0]} if log["ids"] else {}
    meta |= {"user": f"{hash64(log['user']):016x}"} if log["user"] else {}
    return replace(record, messages=messages, meta=meta, where=record.where)


def _made(
    record: Record, signals: dict[int, Signal], kept: dict | None, options: LogsOptions
) -> Iterator[Judged]:
    """What becomes of a conversation by what was said of its answers."""
    answers = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
    said = {i: s for i, s in signals.items() if i in answers and s != Signal()}
    last = len(record.messages) - 1
    pairs = {i: {"role": "assistant", "content": s.correction} for i, s in said.items() if s.correction}
    if kept is not None:
        pairs.setdefault(last, kept)
    made: list[Record] = []
    if options.make in ("preference", "all"):
        made += [
            replace(
                record,
                task="preference",
                messages=as_context(record.messages[:i]),
                chosen=[chosen],
                rejected=[_plain(record.messages[i])],
            )
            for i, chosen in sorted(pairs.items())
        ]
    if options.make in ("unpaired", "all"):
        for i, s in sorted(said.items()):
            if options.make == "all" and i in pairs:
                continue
            label = False if s.again or s.correction else s.good
            if label is not None:
                messages = [*as_context(record.messages[:i]), _plain(record.messages[i])]
                made.append(replace(record, task="unpaired", messages=messages, label=label))
    if options.make == "sft" or (options.make == "all" and not made and not said):
        learnt, why = _learnt(record, said, options)
        if learnt is None:
            yield Judged(None, [record.verdict(*why)])
            return
        made.append(learnt)
    if not made:
        which = ("L012", "no correction and no other answer to make a pair of")
        if options.make != "preference":
            which = ("L011", "nothing was said of its answers")
        yield Judged(None, [record.verdict(*which)])
    for one in made:
        yield Judged(one)


def _plain(message: dict) -> dict:
    return {k: v for k, v in message.items() if k != "weight"}


def _learnt(
    record: Record, said: dict[int, Signal], options: LogsOptions
) -> tuple[Record | None, tuple[str, str]]:
    """The conversation without what was bad in it, and why there is none."""
    messages = list(record.messages)
    last = len(messages) - 1
    for i, s in said.items():
        if s.correction and i == last:
            messages[i] = {"role": "assistant", "content": s.correction}
        elif _spoils(s):
            messages[i] = {**messages[i], "weight": 0.0}
    if not any(m["role"] == "assistant" and m.get("weight", 1.0) > 0 for m in messages):
        return None, ("L010", "all of its answers were rated bad, or asked for again")
    if not options.unrated and not any(s.good or s.correction for s in said.values()):
        return None, ("L011", "nothing good was said of its answers")
    return replace(record, messages=messages), ("", "")
