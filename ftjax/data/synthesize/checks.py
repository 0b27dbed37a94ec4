"""What can be said of a made-up question and answer without asking a model: free, deterministic, first."""

import re
from typing import NamedTuple

from ftjax.evaluate.metrics import token_f1

MIN_QUOTE = 10  # characters: a shorter one is found in any text


def find_quote(quote: str, text: str) -> tuple[int, int] | None:
    """Where the text has the quote, as [start, end) of characters; white space of any kind and length is the
    same. None where it has not."""
    words = quote.split()
    if not words:
        return None
    found = re.search(r"\s+".join(map(re.escape, words)), text)
    return found.span() if found else None


# ── facts ─────────────────────────────────────────────────────────────────────────────────────────


class Fact(NamedTuple):
    kind: str
    text: str


_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "(" + "|".join(f"{m[:3]}(?:{m[3:]})?" if m != "may" else m for m in _MONTHS) + r")\.?"
_DATES = [
    (re.compile(r"\b(\d{4})-(\d{1,2})-(\d{1,2})\b"), "ymd"),
    (re.compile(rf"\b(\d{{1,2}})(?:st|nd|rd|th|\.)?\s+(?:of\s+)?{_MONTH}\s+(\d{{4}})\b", re.I), "dmy"),
    (re.compile(rf"\b{_MONTH}\s+(\d{{1,2}})(?:st|nd|rd|th)?,?\s+(\d{{4}})\b", re.I), "mdy"),
    (re.compile(rf"\b{_MONTH}\s+(\d{{4}})\b", re.I), "my"),
]
_URL = re.compile(r"https?://[^\s<>\"'`\])]+")
_VERSION = re.compile(r"(?<![\w.])v?(\d+(?:\.\d+)+(?:[a-z]+\d*)?)(?!\w)")
_NUMBER = re.compile(r"(?<![\w.])(\d{1,3}(?:[,_]\d{3})+|\d+)(?!\d)")
_LIST_MARK = re.compile(r"^\s*\d+[.)]\s+", re.M)
_CODE = re.compile(r"`([^`]+)`")
_IN_CODE = re.compile(r"(?<![\w-])-{1,2}[A-Za-z][\w-]*|(?<!\w)[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
# what is a name in prose too: flags, dotted, with underscores, with capitals inside
_NAME = re.compile(
    r"(?<![\w-])--[A-Za-z][\w-]*"
    r"|(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w+)+"
    r"|\b[A-Za-z]\w*_\w+|(?<!\w)_+[A-Za-z]\w*"
    r"|\b[a-z]+[A-Z]\w*|\b(?:[A-Z][a-z0-9]+){2,}\b|\b[A-Z]{2,}[a-z]{2,}\w*"
)
_FENCE = re.compile(r"^\s*(```|~~~)\w*\s*$", re.M)
_NUMBER_WORDS = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve".split(),
        map(str, range(13)),
        strict=True,
    )
)


def _dates(text: str) -> tuple[list[tuple[str, str]], str]:
    """([(the date as it stands, YYYY-MM-DD or YYYY-MM)], the text without them)."""
    found = []
    for pattern, order in _DATES:
        for match in pattern.finditer(text):
            part = dict(zip(order, match.groups(), strict=True))
            month = part["m"] if part["m"].isdigit() else _month(part["m"])
            day = f"-{int(part['d']):02}" if "d" in part else ""
            found.append((match[0], f"{part['y']}-{int(month):02}{day}"))
        text = pattern.sub(" ", text)
    return found, text


def _month(name: str) -> int:
    return next(i for i, month in enumerate(_MONTHS, 1) if month[:3] == name[:3].lower())


def facts(text: str) -> list[Fact]:
    """The numbers, dates, versions, identifiers and URLs of a text, each once, in no particular order."""
    out: dict[Fact, None] = {}
    text = _LIST_MARK.sub("", text)
    for url in _URL.findall(text):
        out[Fact("URL", url.rstrip(".,;:!?"))] = None
    text = _URL.sub(" ", text)
    dates, text = _dates(text)
    for shown, _ in dates:
        out[Fact("date", shown)] = None
    for version in _VERSION.findall(text):
        out[Fact("version", version)] = None
    rest = _VERSION.sub(" ", text)
    for number in _NUMBER.findall(rest):
        out[Fact("number", number)] = None
    text = _FENCE.sub("", text)
    names = [name for code in _CODE.findall(text) for name in _IN_CODE.findall(code)] + _NAME.findall(text)
    for name in names:
        if name.lower() not in ("e.g", "i.e"):
            out[Fact("identifier", name)] = None
    return list(out)


def missing_facts(answer: str, section: str) -> list[Fact]:
    """The facts of the answer that the section does not have.

    A date may be written in another way, a number with other separators or, up to twelve, as a word.
    Identifiers are compared with their case, whole.
    """
    section = section.replace("\\_", "_")  # as Markdown escapes it
    dates = {date for _, date in _dates(section)[0]}
    versions = set(_VERSION.findall(section))
    numbers = {_plain(number) for number in _NUMBER.findall(section)}
    numbers |= {_NUMBER_WORDS[w] for w in re.findall(r"[a-z]+", section.lower()) if w in _NUMBER_WORDS}
    wrong = []
    for fact in facts(answer):
        if fact.kind == "URL":
            right = fact.text in section
        elif fact.kind == "date":
            right = _dates(fact.text)[0][0][1] in dates or fact.text in section
        elif fact.kind == "version":
            right = fact.text in versions
        elif fact.kind == "number":
            right = _plain(fact.text) in numbers
        else:
            right = re.search(rf"(?<!\w){re.escape(fact.text)}(?!\w)", section) is not None
        if not right:
            wrong.append(fact)
    return wrong


def _plain(number: str) -> str:
    return number.replace(",", "").replace("_", "")


# ── questions and answers ─────────────────────────────────────────────────────────────────────────

_SHOWN = "(?:given|provided|above|following|present|preceding|previous|attached)"
_PIECE = "(?:text|passages?|sections?|excerpt|article|snippet|paragraph)"
_WHOLE = rf"(?:{_PIECE}|chapter|context|page|documents?|documentation|docs)"
_SAYS = "(?:say|mention|describe|state|give|explain|recommend)s?"
_POINTING = [
    re.compile(p, re.I)
    for p in (
        rf"\b(?:according to|based on) (?:the|this|that|these) (?:{_SHOWN} )?{_WHOLE}\b",
        rf"\b(?:from|in|by|per|within|of) (?:the|this|that|these) (?:{_SHOWN} )?{_PIECE}\b(?! of\b)",
        rf"\bthe {_SHOWN} (?:{_WHOLE}|code|example|table|list)\b",
        rf"\bthis (?:{_PIECE}|chapter|page|document|documentation|code|example)\b",
        rf"\bthe {_WHOLE} {_SAYS}\b",
        r"\b(?:mentioned|described|shown|listed|given|discussed|provided) (?:above|below|here)\b",
        r"\b(?:above|below)[- ]mentioned\b",
        r"\bthe author\b",
    )
]
_MODAL = "(?:is|are|was|were|does|do|did|can|could|should|must|will)"
_NO_SUBJECT = re.compile(
    rf"^(?:(?:so|and|but)\s+)?(?:what|how|why|when|where|which|who|{_MODAL})(?:\s+(?:{_MODAL}|else))?\s+"
    r"(?:it|they|them|this|these|those|he|she)\b"
    r"(?!\s+(?:rains|snows|possible|necessary|required|safe|recommended|true|ok|okay|better|best|important|enough|allowed|"
    r"needed|that|to)\b)",
    re.I,
)


def not_self_contained(question: str) -> str:
    """The words of a question that point at a text its reader does not see, or at nothing; "" for none."""
    for pattern in (*_POINTING, _NO_SUBJECT):
        found = pattern.search(question.strip())
        if found:
            return found[0]
    return ""


_STOPWORDS = frozenset(
    "a an and are as at be been but by can do does for from had has have how if in into is it its may not of "
    "on or should so than that the their them then there these they this to was were what when where which "
    "who why will with would you your".split()
)


def content_words(text: str) -> list[str]:
    """Lower-cased words and numbers without English function words."""
    words = re.findall(r"[^\W_]+(?:[._-][^\W_]+)*", text.lower())
    return [word for word in words if word not in _STOPWORDS]


def is_echo(question: str, answer: str) -> bool:
    """Whether the answer says nothing that the question does not say: several words of content, all of them
    the question's, unless it gives a choice."""
    asked, said = set(content_words(question)), content_words(answer)
    return len(said) > 1 and set(said) <= asked and not re.search(r"\bor\b", question.lower())


def agreement(answer: str, again: str) -> float:
    """How far two answers to one question say the same, in [0, 1].

    The larger of their words' F1 and of the share of the shorter one's content words that the longer one has,
    where that is at least 0.8; 0 where one says yes and the other no, or where both have numbers and no
    number in common.
    """
    starts = [re.match(r"\W*(yes|no)\b", text.lower()) for text in (answer, again)]
    if starts[0] and starts[1] and starts[0][1] != starts[1][1]:
        return 0.0
    numbers = [{f.text for f in facts(text) if f.kind in ("number", "version")} for text in (answer, again)]
    if numbers[0] and numbers[1] and not numbers[0] & numbers[1]:
        return 0.0
    words = [set(content_words(text)) for text in (answer, again)]
    shorter = min(map(len, words))
    contained = len(words[0] & words[1]) / shorter if shorter else 0.0
    return max(token_f1([again], [answer])[0], contained if contained >= 0.8 else 0.0)


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer from memory has what the reference says: its facts all, and of its content words at
    least 60% (all of them, where they are three or fewer)."""
    if missing_facts(reference, answer):
        return False
    wanted, given = set(content_words(reference)), set(content_words(answer))
    if not wanted:
        return bool(reference.strip()) and reference.strip().lower() in answer.lower()
    return len(wanted & given) >= (len(wanted) if len(wanted) <= 3 else 0.6 * len(wanted))
