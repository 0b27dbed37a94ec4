"""The pipeline: write, check for free, answer again, judge, ask without the section."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ftjax.data.record import Judged, Record
from ftjax.data.synthesize import checks
from ftjax.data.synthesize.prompts import Prompts
from ftjax.data.writer import Answer, Ask, Writer, count_tokens
from ftjax.evaluate.metrics import parse_json
from ftjax.report.progress import Bar

if TYPE_CHECKING:
    from ftjax.data.synthesize import SynthesizeOptions

KINDS = ("qa", "instruction", "conversation", "unanswerable", "preference")
FACTUAL = ("qa", "preference")  # the kinds whose answers are facts that a model may know
STAGES = ("quote", "facts", "question", "echo", "length", "again", "judge")
AT_ONCE, BATCHED = 64, 5_000  # sections worked on together; where answers take hours
QUESTION_WORDS = (3, 150)
UNASKED = -1  # among the counts of right answers: facts that the base model gave no answer to


class Roles(NamedTuple):
    writer: Writer
    judge: Writer
    base: Writer | None
    prompts: Prompts


# ── the forms of answers ──────────────────────────────────────────────────────────────────────────


def _object(**properties: Any) -> dict[str, Any]:
    """A JSON Schema in which every property is required and no other allowed, as strict modes want it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT, _TRUTH = {"type": "string"}, {"type": "boolean"}
_PAIR = _object(question=_TEXT, answer=_TEXT, quote=_TEXT)
_ITEMS = {
    "qa": _PAIR,
    "instruction": _PAIR,
    "conversation": _object(turns={"type": "array", "items": _PAIR}),
    "unanswerable": _object(question=_TEXT),
    "preference": _object(question=_TEXT, answer=_TEXT, quote=_TEXT, rejected=_TEXT),
}
SCHEMAS = {kind: _object(items={"type": "array", "items": item}) for kind, item in _ITEMS.items()}
ANSWER = _object(answerable=_TRUTH, answer=_TEXT)
VOTE = _object(reason=_TEXT, supported=_TRUTH, complete=_TRUTH, useful=_TRUTH)
SAME = _object(same=_TRUTH)


class Malformed(Exception):
    """An answer that is not what was asked for: the code, and why."""

    def __init__(self, code: str, why: str):
        super().__init__(why)
        self.code = code


def read(answer: Answer, schema: dict[str, Any]) -> Any:
    """The JSON of an answer, also out of a code fence or from between prose; raises Malformed."""
    text = _text(answer)
    try:
        value = _json(text)
    except ValueError:
        raise _unreadable(answer, text) from None
    _validate(value, schema)
    return value


def read_items(answer: Answer, kind: str) -> Iterator[dict[str, Any] | Malformed]:
    """The items of what was written, each whole or as what is wrong with it; those before a place where the
    JSON breaks off are taken. Raises Malformed where there are none to tell apart."""
    text = _text(answer)
    broken = None
    begin = re.search(r'"items"\s*:\s*\[', text) or re.match(r"\s*(?:```\w*\s*)?\[", text)
    if begin:
        items, whole = _items(text, begin.end())
        if not whole:
            broken = _unreadable(answer, text)
    else:
        try:
            value = _json(text)
        except ValueError:
            raise _unreadable(answer, text) from None
        if "items" in value:
            raise Malformed("S005", f"`items` is not a list: {text[:200]}")
        items = [value]  # one by itself, as small models give it
    if broken is not None and not items:
        raise broken
    for item in items:
        try:
            _validate(item, _ITEMS[kind])
            yield item
        except Malformed as e:
            yield e
    if broken is not None:
        yield broken


def _text(answer: Answer) -> str:
    """What was said, without what was thought before; raises Malformed for a failure."""
    if answer.failed:
        raise Malformed("S002" if answer.failed == "cost" else "S001", answer.text)
    return re.sub(r"\A\s*<think>.*?(</think>|\Z)", "", answer.text, flags=re.S).strip()


def _json(text: str) -> Any:
    fence = re.fullmatch(r"```\w*\s*\n(.*?)\n?```", text, re.S)
    try:
        return parse_json(fence[1] if fence else text)
    except (ValueError, RecursionError):
        return parse_json(text, anywhere=True)


def _items(text: str, at: int) -> tuple[list[Any], bool]:
    """(the values of a JSON list from its first on, whether it ends as one)."""
    decoder, items = json.JSONDecoder(), []
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        if text[at : at + 1] == "]":
            return items, True
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return items, False
        items.append(item)


def _unreadable(answer: Answer, text: str) -> Malformed:
    if answer.finish == "length":
        return Malformed("S003", f"cut off after {answer.new_tokens} tokens (max_tokens): …{text[-200:]}")
    return Malformed("S004", text[:500])


def _validate(value: Any, schema: dict[str, Any]) -> None:
    import jsonschema

    error = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(value)), None)
    if error is not None:
        place = error.json_path.removeprefix("$").removeprefix(".")
        said = f"{place}: {error.message}" if place else error.message
        raise Malformed("S005", f"{said[:300]}; given: {json.dumps(value)[:500]}")


# ── candidates ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Candidate:
    """What was written as one example, and what became of it."""

    kind: str
    section: Record
    item: dict[str, Any]
    place: str
    evidence: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, str, str] | None = None
    """The code, why, and the field."""

    @property
    def turns(self) -> list[dict[str, str]]:
        return self.item["turns"] if self.kind == "conversation" else [self.item]

    def refuse(self, code: str, why: str, field: str = "") -> None:
        if self.refused is None:
            self.refused = code, why, field


@dataclass
class Tally:
    """Counts of one part: by kind what went into each stage and came out of it."""

    sections: int = 0
    skipped: int = 0
    asked: Counter = field(default_factory=Counter)
    """By kind, requests of writing; `unread` of them came to nothing."""
    unread: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    passed: dict[str, Counter] = field(default_factory=dict)
    """By kind and stage, what was left after it."""
    right: Counter = field(default_factory=Counter)
    """How many facts the base model got right how often (UNASKED: had no answer for)."""

    def count(self, kind: str, stage: str, left: int) -> None:
        self.passed.setdefault(kind, Counter())[stage] += left

    def line(self, kind: str) -> str:
        """ "20 requests → 57 written → quote 51 (89%) → …": each stage's yield of what it was given."""
        lost = f" ({self.unread[kind]} came to nothing)" if self.unread[kind] else ""
        parts = [f"{self.asked[kind]} requests{lost}", f"{self.written[kind]} written"]
        before = self.written[kind]
        for stage in STAGES:
            if stage not in self.passed.get(kind, {}):
                continue
            left = self.passed[kind][stage]
            parts.append(f"{stage} {left}" + (f" ({left / before:.0%})" if before else ""))
            before = left
        share = f" ({before / self.written[kind]:.0%} of those written)" if self.written[kind] else ""
        return " → ".join(parts) + f" → kept {before}{share}"

    def to_json(self) -> dict[str, Any]:
        return {
            "sections": self.sections,
            "skipped": self.skipped,
            "asked": dict(self.asked),
            "unread": dict(self.unread),
            "written": dict(self.written),
            "passed": {kind: dict(stages) for kind, stages in self.passed.items()},
            "right": {str(k): v for k, v in sorted(self.right.items())},
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Tally":
        return Tally(
            values["sections"],
            values["skipped"],
            *(Counter(values[name]) for name in ("asked", "unread", "written")),
            passed={kind: Counter(stages) for kind, stages in values["passed"].items()},
            right=Counter({int(k): v for k, v in values["right"].items()}),
        )

    @staticmethod
    def sum(tallies: Iterable["Tally"]) -> "Tally":
        total = Tally()
        for one in tallies:
            total.sections += one.sections
            total.skipped += one.skipped
            for name in ("asked", "unread", "written", "right"):
                getattr(total, name).update(getattr(one, name))
            for kind, stages in one.passed.items():
                total.passed.setdefault(kind, Counter()).update(stages)
        return total


def _values(section: Record) -> dict[str, Any]:
    """What prompts are told of a section."""
    under = section.meta.get("breadcrumb") or ""
    return {
        "text": section.text.strip(),
        "title": section.meta.get("title") or "",
        "breadcrumb": under if isinstance(under, str) else " > ".join(map(str, under)),
    }


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class Pairs:
    """Examples of sections, some sections at a time; the same answers give the same examples."""

    def __init__(self, roles: Roles, options: "SynthesizeOptions", tally: Tally, bar: Bar | None = None):
        self.roles, self.options, self.tally, self.bar = roles, options, tally, bar
        self.hashes = {name: roles.prompts.hash(name) for name in (*options.kinds, "context")}

    def of(self, records: Iterable[Record]) -> Iterator[Judged]:
        records = iter(records)
        size = self.options.at_once or (BATCHED if self.options.batch else AT_ONCE)
        while some := list(itertools.islice(records, size)):
            yield from self._some(some)
            if self.bar is not None:
                self.bar.advance(len(some), note="")

    def _some(self, records: list[Record]) -> Iterator[Judged]:
        usable = []
        ended: dict[int, Judged] = {}
        for i, record in enumerate(records):
            why = self._unusable(record)
            if why is None:
                usable.append(i)
            else:
                self.tally.skipped += 1
                ended[i] = Judged(None, [record.verdict(*why)])
        self.tally.sections += len(usable)
        wrong, candidates = self._write([records[i] for i in usable])
        self._check(candidates)
        self._again(candidates)
        self._judge(candidates)
        self._probe(candidates)
        of_section: dict[int, list[Judged]] = {}
        for section, judged in [*wrong, *((c.section, self._judged(c)) for c in candidates)]:
            of_section.setdefault(id(section), []).append(judged)
        for i, record in enumerate(records):
            if i in ended:
                yield ended[i]
                continue
            none = [Judged(None, [record.verdict("S007", "the model found nothing to ask here")])]
            yield from of_section.get(id(record), none)

    def _unusable(self, record: Record) -> tuple[str, str] | None:
        if record.task != "lm":
            return "S008", f"a record of the task {record.task} is no section"
        if len(record.text.strip()) < self.options.min_section:
            return "S006", f"{len(record.text.strip())} characters (min_section {self.options.min_section})"
        return None

    def _judged(self, c: Candidate) -> Judged:
        if c.refused is not None:
            code, why, name = c.refused
            shown = json.dumps(c.item, ensure_ascii=False)
            return Judged(None, [c.section.verdict(code, f"{why}; written was {shown}", c.place + name)])
        return Judged(self._record(c))

    def _record(self, c: Candidate) -> Record:
        o = self.options
        made = {"kind": c.kind, "model": self.roles.writer.name, "prompt": self.hashes[c.kind]}
        evidence = c.evidence if c.kind == "conversation" else next(iter(c.evidence), None)
        meta = {**c.section.meta, **made, **({"evidence": evidence} if evidence else {}), **c.found}
        meta.pop("tokens_estimate", None)  # the section's
        turns = [(turn["question"].strip(), turn.get("answer", o.unanswered).strip()) for turn in c.turns]
        if o.context or c.kind == "unanswerable":
            meta["context_prompt"] = self.hashes["context"]
            asked = self.roles.prompts("context", **_values(c.section), question=turns[0][0])
            turns[0] = (asked, turns[0][1])
        messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if c.kind == "preference":
            chosen, rejected = messages[1:], [{"role": "assistant", "content": c.item["rejected"].strip()}]
            return Record(
                "preference", messages[:1], chosen=chosen, rejected=rejected, meta=meta, where=c.section.where
            )
        return Record("sft", messages, meta=meta, where=c.section.where)

    # ── writing ──

    def _write(self, sections: list[Record]) -> tuple[list[tuple[Record, Judged]], list[Candidate]]:
        asks = [(s, kind, self._writing(s, kind)) for s in sections for kind in self.options.kinds]
        answers = self._ask(self.roles.writer, [ask for _, _, ask in asks], "writing")
        wrong, candidates = [], []
        for (section, kind, _), answer in zip(asks, answers, strict=True):
            self.tally.asked[kind] += 1
            try:
                for number, item in enumerate(read_items(answer, kind)):
                    self.tally.written[kind] += 1
                    place = f"{kind}[{number}]"
                    if isinstance(item, Malformed):
                        said = section.verdict(item.code, str(item), place)
                        wrong.append((section, Judged(None, [said])))
                    else:
                        candidates.append(Candidate(kind, section, item, place))
            except Malformed as e:
                self.tally.unread[kind] += 1
                wrong.append((section, Judged(None, [section.verdict(e.code, str(e), kind)])))
        return wrong, candidates

    def _writing(self, section: Record, kind: str) -> Ask:
        o = self.options
        text = self.roles.prompts(kind, **_values(section), count=o.count, turns=o.turns)
        turns = '"turns": [{' if kind == "conversation" else ""
        opening = f'{{"items": [{{{turns}"question": "'
        return Ask(_message(text), SCHEMAS[kind], o.max_tokens, o.temperature, opening=opening)

    # ── checks ──

    def _check(self, candidates: list[Candidate]) -> None:
        self._seen: set[tuple[int, str, str]] = set()
        for stage in ("quote", "facts", "question", "echo", "length"):
            check = getattr(self, f"_{stage}")
            for c in candidates:
                if c.refused is None:
                    check(c)
            self._passed(stage, candidates)

    def _passed(self, stage: str, candidates: list[Candidate]) -> None:
        for kind in self.options.kinds:
            left = sum(c.refused is None for c in candidates if c.kind == kind)
            self.tally.count(kind, stage, left)

    def _quote(self, c: Candidate) -> None:
        if c.kind == "unanswerable":
            return
        for i, turn in enumerate(c.turns):
            quote = turn["quote"].strip()
            place = checks.find_quote(quote, c.section.text)
            if place is None:
                return c.refuse("S010", "the quote is not in the section", _field(c, i, "quote"))
            if len(quote) < checks.MIN_QUOTE:
                why = f"a quote of {len(quote)} characters proves nothing"
                return c.refuse("S011", why, _field(c, i, "quote"))
            c.evidence.append({"quote": c.section.text[slice(*place)], "start": place[0], "end": place[1]})

    def _facts(self, c: Candidate) -> None:
        if c.kind == "unanswerable":
            return
        given = _values(c.section)
        source = "\n".join((c.section.text, given["title"], given["breadcrumb"]))
        for i, turn in enumerate(c.turns):
            wrong = checks.missing_facts(turn["answer"], source)
            if wrong:
                said = ", ".join(f"{fact.kind} {fact.text}" for fact in wrong)
                return c.refuse("S012", f"the section does not have {said}", _field(c, i, "answer"))

    def _question(self, c: Candidate) -> None:
        question = c.turns[0]["question"] if c.turns else ""
        pointing = checks.not_self_contained(question)
        if pointing:
            return c.refuse("S013", f"“{pointing}” points at what is not there", _field(c, 0, "question"))
        asked = id(c.section), c.kind, " ".join(checks.content_words(question))
        if asked in self._seen:
            return c.refuse("S016", "asked already in this section", _field(c, 0, "question"))
        self._seen.add(asked)

    def _echo(self, c: Candidate) -> None:
        for i, turn in enumerate(c.turns):
            if "answer" in turn and checks.is_echo(turn["question"], turn["answer"]):
                return c.refuse("S014", "the answer only repeats the question", _field(c, i, "answer"))

    def _length(self, c: Candidate) -> None:
        o = self.options
        if not c.turns or (c.kind == "conversation" and len(c.turns) < 2):
            return c.refuse("S015", f"a conversation of {len(c.turns)} questions", ".turns")
        for i, turn in enumerate(c.turns):
            asked = (1 if i else QUESTION_WORDS[0], QUESTION_WORDS[1])
            for name, (least, most) in (("question", asked), ("answer", (o.min_words, o.max_words))):
                words = len(turn.get(name, o.unanswered).split())
                if not least <= words <= most:
                    return c.refuse("S015", f"{words} words, not {least} to {most}", _field(c, i, name))

    # ── answering again ──

    def _again(self, candidates: list[Candidate]) -> None:
        o = self.options
        left = [c for c in candidates if c.refused is None]
        asks, whose = [], []
        for c in left:
            for i, turn in enumerate(c.turns):
                # that there is no answer in the section is asked as often as a pair is judged
                for sample in range(max(1, o.votes) if c.kind == "unanswerable" else 1):
                    text = self.roles.prompts(
                        "answer", **_values(c.section), question=turn["question"], history=c.turns[:i]
                    )
                    limit = max(256, 2 * count_tokens(turn.get("answer", "")) + 64)
                    heat = o.temperature if sample else 0.0
                    asks.append(Ask(_message(text), ANSWER, limit, heat, sample, '{"answerable": '))
                    whose.append((c, i, turn))
        unlike = []
        absent: Counter = Counter()
        for (c, i, turn), answer in zip(whose, self._ask(self.roles.writer, asks, "answering"), strict=True):
            try:
                again = read(answer, ANSWER)
            except Malformed as e:
                if c.kind != "unanswerable" or e.code in ("S001", "S002"):
                    c.refuse(e.code, f"answering again: {e}", _field(c, i, "answer"))
                continue
            if c.kind == "unanswerable":
                absent[id(c)] += not again["answerable"]
                if again["answerable"]:
                    c.found.setdefault("answered", again["answer"])
            elif not again["answerable"]:
                why = "asked again, the model finds no answer in the section"
                c.refuse("S020", why, _field(c, i, "answer"))
            else:
                same = checks.agreement(turn["answer"], again["answer"])
                c.found["agreement"] = round(min(same, c.found.get("agreement", 1.0)), 3)
                if same < o.agree:
                    unlike.append((c, i, turn, again["answer"]))
        for c in left:
            if c.kind == "unanswerable":
                answered = c.found.pop("answered", "")
                if 2 * absent[id(c)] <= max(1, o.votes):
                    c.refuse("S022", f"the section answers it: {answered}", _field(c, 0, "question"))
        said = self._same([(turn["question"], turn["answer"], again) for _, _, turn, again in unlike])
        for (c, i, _, again), same in zip(unlike, said, strict=True):
            if not same:
                c.refuse("S021", f"asked again, the answer is another: {again}", _field(c, i, "answer"))
        self._passed("again", candidates)

    def _same(self, triples: Sequence[tuple[str, str, str]]) -> list[bool]:
        """Whether the judge takes two answers to a question for the same; by the rule alone they are not."""
        if self.options.compare == "rule" or not triples:
            return [False] * len(triples)
        prompts = [self.roles.prompts("same", question=q, answer=a, again=b) for q, a, b in triples]
        asks = [Ask(_message(prompt), SAME, 64, opening='{"same": ') for prompt in prompts]
        return [_true(a, SAME, "same") for a in self._ask(self.roles.judge, asks, "comparing")]

    # ── judging ──

    def _judge(self, candidates: list[Candidate]) -> None:
        o = self.options
        if not o.votes:
            return
        asks, whose = [], []
        for c in candidates:
            if c.refused is not None or c.kind == "unanswerable":
                continue
            for i, turn in enumerate(c.turns):
                for name in ("answer", "rejected") if c.kind == "preference" else ("answer",):
                    for sample in range(o.votes):
                        text = self.roles.prompts(
                            "judge",
                            **_values(c.section),
                            question=turn["question"],
                            answer=turn[name],
                            history=c.turns[:i],
                        )
                        heat = o.temperature if sample else 0.0
                        asks.append(Ask(_message(text), VOTE, 300, heat, sample, '{"reason": "'))
                        whose.append((c, i, name))
        votes: dict[tuple[int, int, str], list[Any]] = {}
        of = {}
        for (c, i, name), answer in zip(whose, self._ask(self.roles.judge, asks, "judging"), strict=True):
            of[id(c)] = c
            try:
                vote = read(answer, VOTE)
            except Malformed as e:
                if e.code == "S002":
                    c.refuse(e.code, f"judging: {e}", _field(c, i, name))
                vote = {"reason": f"no vote ({e.code}): {e}", "lost": e.code == "S001"}
            votes.setdefault((id(c), i, name), []).append(vote)
        for (key, i, name), given in votes.items():
            c = of[key]
            wanted = ("supported", "complete", "useful") if name == "answer" else ("supported",)
            right = sum(all(vote.get(part, False) for part in wanted) for vote in given)
            if name == "rejected":
                # a vote that can't be read says nothing for the rejected answer's being wrong
                wrong = sum(vote.get("supported", True) is False for vote in given)
                if 2 * wrong <= len(given):
                    why = f"only {wrong} of {len(given)} votes find the rejected answer wrong"
                    c.refuse("S031", why, ".rejected")
                continue
            least = min(right, c.found.get("votes", [right])[0])
            c.found["votes"] = [least, len(given)]
            if 2 * right <= len(given):
                against = next(v["reason"] for v in given if not all(v.get(part, False) for part in wanted))
                said = f"{right} of {len(given)} votes for it: {against}"
                lost = sum(vote.get("lost", False) for vote in given)  # they may have been for it
                code = "S001" if 2 * (right + lost) > len(given) else "S030"
                c.refuse(code, said, _field(c, i, name))
        for c in of.values():
            c.found["judge"] = self.roles.judge.name
        self._passed("judge", candidates)

    # ── without the section ──

    def _probe(self, candidates: list[Candidate]) -> None:
        """How often the base model says each fact by itself: once greedily, then sampled."""
        o, base = self.options, self.roles.base
        left = [c for c in candidates if c.refused is None and c.kind in FACTUAL]
        if base is None or not left:
            return
        asks = []
        for c in left:
            text = self.roles.prompts("closed_book", question=c.item["question"])
            limit = max(48, 2 * count_tokens(c.item["answer"]))
            asks += [Ask(_message(text), None, limit, 0.5 if i else 0.0, i) for i in range(o.tries)]
        answers = self._ask(base, asks, "closed book")
        right: Counter = Counter()
        unlike = []
        answered: Counter = Counter()
        for c, answer in zip((c for c in left for _ in range(o.tries)), answers, strict=True):
            if answer.failed:  # an answer that is missing says nothing of the fact
                continue
            answered[id(c)] += 1
            said = answer.text.split("\nQuestion:")[0]
            if checks.is_right(said, c.item["answer"]):
                right[id(c)] += 1
            else:
                unlike.append((c, said))
        same = self._same([(c.item["question"], c.item["answer"], said) for c, said in unlike])
        for (c, _), agrees in zip(unlike, same, strict=True):
            right[id(c)] += agrees
        for c in left:
            if answered[id(c)] == o.tries:
                self.tally.right[right[id(c)]] += 1
                c.found["known"] = [right[id(c)], o.tries]
            else:
                self.tally.right[UNASKED] += 1

    def _ask(self, writer: Writer, asks: Sequence[Ask], doing: str) -> list[Answer]:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            if self.bar is not None:
                self.bar.advance(0, note=f"{doing} {done}/{len(asks)}")

        report: Callable[[int], None] | None = progress if self.bar is not None else None
        return writer.answer(asks, report) if asks else []


def _field(c: Candidate, turn: int, name: str) -> str:
    return f".turns[{turn}].{name}" if c.kind == "conversation" else f".{name}"


def _true(answer: Answer, schema: dict[str, Any], name: str) -> bool:
    try:
        return read(answer, schema)[name] is True
    except Malformed:
        return False


# ── what it will take ─────────────────────────────────────────────────────────────────────────────

ITEM, AGAIN, JUDGED, PROBED = 130, 80, 60, 24  # new tokens: of a written pair, and of each answer about it
FRAME = 260  # tokens of a prompt beside the section


def estimate(records: Iterable[Record], roles: Roles, options: "SynthesizeOptions") -> dict[str, float]:
    """Requests, tokens and cost of sections, if every pair passes every check; what is written already (the
    answers at hand) is taken off, and what follows from it in proportion."""
    o, total = options, Counter()
    pairs = Pairs(roles, options, Tally())
    for record in records:
        if pairs._unusable(record) is not None:
            continue
        tokens = count_tokens(record.text)
        for kind in o.kinds:
            total["writing"] += 1
            ask = pairs._writing(record, kind)
            if roles.writer.kept.get(roles.writer.key(ask)) is not None:
                total["kept"] += 1
                continue
            turns = o.turns if kind == "conversation" else 1
            again = max(1, o.votes) if kind == "unanswerable" else turns
            votes = o.votes * {"unanswerable": 0, "preference": 2}.get(kind, turns)
            tries = o.tries if roles.base is not None and kind in FACTUAL else 0
            for writer, count, prompt, new in (
                (roles.writer, 1, count_tokens(ask.messages[0]["content"]), o.count * turns * ITEM),
                (roles.writer, o.count * again, tokens + FRAME, AGAIN),
                (roles.judge, o.count * votes, tokens + FRAME, JUDGED),
                (roles.base or roles.writer, o.count * tries, 100, PROBED),
            ):
                total["requests"] += count
                total["prompt_tokens"] += count * prompt
                total["new_tokens"] += count * new
                total["cost"] += writer.cost(count * prompt, count * new)  # type: ignore[assignment]
    return dict(total)
