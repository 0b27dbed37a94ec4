"""Personal data and secrets in examples: found by their form and check digits, and masked if wanted.

Checks: Luhn (ISO/IEC 7812-1), IBAN's remainder by 97 (ISO 13616), the North American numbering plan, what the
US Social Security Administration never issues, and providers' key prefixes; other secrets by the entropy of
what is assigned to a name like password or token. Names and addresses of people are not found: that takes a
model, and its mistakes. Precision on real data: benchmarks/results/filters.md.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from ftjax.data.record import Judged, Record
from ftjax.data.steps import Step
from ftjax.data.texts import rewritten
from ftjax.errors import UserError

Kind = Literal["email", "phone", "ip", "card", "iban", "ssn", "credentials", "secret", "private_key"]
KINDS: tuple[Kind, ...] = (
    "private_key",
    "credentials",
    "secret",
    "email",
    "iban",
    "card",
    "ssn",
    "ip",
    "phone",
)
"""Where two overlap, the earlier one is meant."""
CODES = {
    "email": "P001",
    "phone": "P002",
    "ip": "P003",
    "card": "P004",
    "iban": "P005",
    "ssn": "P006",
    "credentials": "P007",
    "secret": "P008",
    "likely": "P009",
    "private_key": "P010",
}


@dataclass(frozen=True)
class PersonalOptions:
    """What is looked for in every text of a row (tool calls' arguments too), and what is done about it."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    kinds: list[Kind] = field(default_factory=list)
    """email, phone, ip, card, iban, ssn (US), credentials (in URLs), secret (API keys, tokens, passwords),
    private_key; all of them if absent."""
    mask: bool = False
    """Put [EMAIL_1], [PHONE_1] … in their place; within a row the same value gets the same number."""
    drop: bool = False
    """Leave out every row in which something is found."""
    examples: bool = True
    """Also find what belongs to nobody: values reserved for documentation (jane@example.com, 202-555-0143,
    card 4111 1111 1111 1111) and addresses of private networks."""

    def __post_init__(self):
        if self.mask and self.drop:
            raise UserError("personal: mask and drop are both set; a row is either masked or left out")
        if unknown := set(self.kinds) - set(KINDS):
            raise UserError(f"personal: there is no kind {min(unknown)!r} (kinds: {', '.join(KINDS)})")


class Found(NamedTuple):
    start: int
    end: int
    kind: str
    """One of KINDS, or "likely" for a secret known only by its look."""
    what: str
    """Which it is in words, e.g. "an e-mail address"."""


class Personal(Step):
    name = "personal"
    Options = PersonalOptions

    def apply(self, records: Iterable[Record], decision: Any, part: int) -> Iterator[Judged]:
        for record in records:
            masker = Masker(self.options)
            masked = rewritten(record, masker)
            verdicts = [
                record.verdict(CODES[f.kind], f"{f.what} at character {f.start}: {shown(text, f)}", path)
                for path, text, f in masker.found
            ]
            if verdicts and self.options.drop:
                yield Judged(None, verdicts)
            elif self.options.mask:
                yield Judged(masked, verdicts, changed=masked is not record)
            else:
                yield Judged(record, verdicts)


class Masker:
    """Masks the texts of one record, with the same placeholder for the same value; `found` lists what there
    was, by path."""

    def __init__(self, options: PersonalOptions):
        self.options = options
        self.found: list[tuple[str, str, Found]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def __call__(self, path: str, text: str) -> str:
        found = find(text, self.options)
        self.found += [(path, text, f) for f in found]
        while found:  # what stood too far from the word that gives it away may be near it now
            pieces, at = [], 0
            for f in found:
                pieces += [text[at : f.start], self._placeholder(f.kind, text[f.start : f.end])]
                at = f.end
            text = "".join([*pieces, text[at:]])
            found = find(text, self.options)
        return text

    def _placeholder(self, kind: str, value: str) -> str:
        name = "SECRET" if kind == "likely" else kind.upper()
        if kind in ("phone", "card", "iban", "ssn"):
            value = re.sub(r"\W", "", value)
        key = (name, value.casefold() if kind in ("email", "iban", "ip") else value)
        if key not in self._numbers:
            self._numbers[key] = 1 + sum(other == name for other, _ in self._numbers)
        return f"[{name}_{self._numbers[key]}]"


def mask(text: str, options: PersonalOptions | None = None) -> str:
    """The text with typed placeholders; masking it again changes nothing."""
    return Masker(options or PersonalOptions())("", text)


def shown(text: str, found: Found) -> str:
    """Enough of the value to find it again, and no more: a report must not spread what it warns of."""
    value = text[found.start : found.end]
    return f"«{value[: min(4, len(value) // 3)]}…» ({len(value)} characters)"


def find(text: str, options: PersonalOptions | None = None) -> list[Found]:
    """What is found in a text, in order, without overlaps."""
    options = options or PersonalOptions()
    out: list[Found] = []
    taken = bytearray()
    digits = _DIGIT.search(text)
    many = digits and _MANY_DIGITS.search(text)
    for kind in KINDS:
        if kind in (options.kinds or KINDS) and (many if kind in _MANY else digits or kind not in _SOME):
            for f in _FINDERS[kind](text, options.examples):
                taken = taken or bytearray(len(text))
                if not any(taken[f.start : f.end]):
                    taken[f.start : f.end] = b"\1" * (f.end - f.start)
                    out.append(f)
    return sorted(out)


# what holds no digits, or no seven in a row, needs no search for numbers
_DIGIT = re.compile(r"\d")
_MANY_DIGITS = re.compile(r"\d(?:[ ().\-–/]{0,2}\d){6}")
_SOME, _MANY = ("iban", "ip"), ("card", "ssn", "phone")

# ── e-mail, URLs, IP ──────────────────────────────────────────────────────────────────────────────

_EMAIL = re.compile(
    r"(?<![\w.+%/:-])[A-Za-z0-9][\w.+%-]{0,63}(?<!\.)@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@-])"
)
_RESERVED = re.compile(r"@(?:.*\.)?(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.I)
_FILES = ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "py", "html")


def _email(text: str, examples: bool) -> Iterator[Found]:
    if "@" not in text:
        return
    for m in _EMAIL.finditer(text):
        if m[0].rpartition(".")[2].lower() in _FILES:  # icon@2x.png
            continue
        if examples or not _RESERVED.search(m[0]):
            yield Found(m.start(), m.end(), "email", "an e-mail address")


_CREDENTIALS = re.compile(r"(?<=://)([^\s/:@\[\]\"'<>{}$]+:[^\s/@\[\]\"'<>{}$]+)@(?=[\w\[])")
_SAMPLE_LOGIN = re.compile(r"(?:user(?:name)?|login|name|foo|usr):(?:pass(?:word)?|pwd|secret|bar)\Z", re.I)


def _credentials(text: str, examples: bool) -> Iterator[Found]:
    if "://" not in text or "@" not in text:
        return
    for m in _CREDENTIALS.finditer(text):
        if examples or not _SAMPLE_LOGIN.match(m[1]):
            yield Found(m.start(1), m.end(1), "credentials", "a name and password in a URL")


_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:.]*:)(?!\w)")
_VERSION = re.compile(r"(?:version|release|v|ver|build|section|chapter)[\s.:#]*$", re.I)
_PUBLIC = frozenset(("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"))


def _ip(text: str, examples: bool) -> Iterator[Found]:
    if text.count(".") >= 3:
        for m in _IPV4.finditer(text):
            octets = [int(o) for o in m[0].split(".")]
            written = any(len(o) > 1 and o[0] == "0" for o in m[0].split("."))
            if max(octets) > 255 or max(octets) < 10 or written or m[0] in _PUBLIC:
                continue
            if octets[0] in (0, 127, 255) or _VERSION.search(text, max(0, m.start() - 12), m.start()):
                continue
            if examples or ipaddress.ip_address(m[0]).is_global:
                yield Found(m.start(), m.end(), "ip", "an IP address")
    if text.count(":") >= 2:
        for m in _IPV6.finditer(text):
            try:
                address = ipaddress.IPv6Address(m[0])
            except ValueError:
                continue
            # a clock's 12:30:15 has no eight groups and no "::"; C++'s a::b does, but not four groups
            if len(re.findall(r"[0-9A-Fa-f]+", m[0])) < 4 or not any(c.isdigit() for c in m[0]):
                continue
            if not address.is_loopback and (examples or address.is_global):
                yield Found(m.start(), m.end(), "ip", "an IPv6 address")


# ── numbers with check digits ─────────────────────────────────────────────────────────────────────


def luhn(number: str) -> bool:
    """Whether the digits pass ISO/IEC 7812-1's check: every second from the right doubled, and its digits
    summed with the others, gives a multiple of ten."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = [2 * d - 9 * (d > 4) for d in digits[-2::-2]]
    return bool(digits) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


_CARD = re.compile(r"(?<![\w.,$€£-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
_ISSUER = re.compile(
    r"(?:4(?:\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"
    r"|3[47]\d{13}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|62\d{14})"
)
_TEST_CARDS = frozenset(
    "4111111111111111 4242424242424242 4012888888881881 5555555555554444 5105105105105100 378282246310005 "
    "371449635398431 6011111111111117 4000056655665556".split()
)


def _card(text: str, examples: bool) -> Iterator[Found]:
    for m in _CARD.finditer(text):
        digits = re.sub(r"\D", "", m[0])
        separators = set(re.sub(r"\d", "", m[0]))
        if len(separators) > 1 or len(set(digits)) < 3 and digits not in _TEST_CARDS:
            continue
        if separators and not re.fullmatch(
            r"\d{4}(?:[ -]\d{4}){2,3}(?:[ -]\d{1,3})?|\d{4}[ -]\d{6}[ -]\d{4,5}", m[0]
        ):
            continue
        if _ISSUER.fullmatch(digits) and luhn(digits) and (examples or digits not in _TEST_CARDS):
            yield Found(m.start(), m.end(), "card", "a payment card's number")


_IBAN = re.compile(r"(?<![\w])[A-Z]{2}\d{2}(?:(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?)(?![\w])")
# Length by country: SWIFT's IBAN registry
_IBAN_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
    "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 "
    "QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
)
_IBAN_LENGTH = {entry[:2]: int(entry[2:]) for entry in _IBAN_LENGTHS.split()}


def iban(number: str) -> bool:
    """Whether it has its country's length and leaves 1 by 97, its first four characters moved to the end and
    letters read as 10 to 35 (ISO 13616)."""
    number = "".join(number.split()).upper()
    if _IBAN_LENGTH.get(number[:2]) != len(number) or not number.isalnum() or not number.isascii():
        return False
    return int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def _iban(text: str, examples: bool) -> Iterator[Found]:
    for m in _IBAN.finditer(text):
        value = m[0]
        # a following word in capitals may have been taken for the last group
        while value and not iban(value):
            value = value[: value.rfind(" ")] if " " in value else ""
        if value:
            yield Found(m.start(), m.start() + len(value), "iban", "an IBAN")


_SSN = re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}([- ])(?!00)\d{2}\1(?!0000)\d{4}(?![\w-]|\.\d)")
_SSN_WORD = re.compile(r"\bssn\b|social security", re.I)
_ADVERTISED = frozenset(("078-05-1120", "219-09-9999", "123-45-6789"))


def _ssn(text: str, examples: bool) -> Iterator[Found]:
    for m in _SSN.finditer(text):
        if m[1] == " " and not _SSN_WORD.search(text, max(0, m.start() - 60), m.start()):
            continue
        if examples or m[0].replace(" ", "-") not in _ADVERTISED:
            yield Found(m.start(), m.end(), "ssn", "a US Social Security number")


# North America: area and exchange codes begin with 2 to 9, and are not N11
_NANP = re.compile(
    r"(?<![\w.,$€£=*/+-])(?:\+?1[ .-]?)?(?:\((?P<a>[2-9]\d\d)\) ?|(?P<b>[2-9]\d\d)(?P<s>[.\- ]))"
    r"(?P<e>[2-9]\d\d)[.\- ](?P<n>\d{4})(?![\w-]|[.,]\d)"
)
_AFTER = r"(?![\w-]|[.,]\d|%| ?[=*<>])"
_INTERNATIONAL = re.compile(rf"(?<![\w.,=*/+-])(?:\+|00(?=[1-9]))[1-9](?:[ .\-()]{{0,2}}\d){{7,15}}{_AFTER}")
_NATIONAL = re.compile(rf"(?<![\w.,$€£=*/+-])\(?\d(?:[ .\-/()]{{0,2}}\d){{6,11}}{_AFTER}")
_PHONE_WORD = re.compile(
    r"\b(?:tele)?phone\b|\b(?:tel|mobile|cell|fax|whats ?app|hotline|landline)\b"
    r"|\bcall(?: (?:me|us|him|her|them))?(?: (?:at|on))?:? *$|\b(?:contact|phone) (?:number|no)\b",
    re.I,
)


def _phone(text: str, examples: bool) -> Iterator[Found]:
    for m in _NANP.finditer(text):
        area = m["a"] or m["b"]
        if area[1:] == "11" or m["e"][1:] == "11" and m["e"] != "411":
            continue
        if m["s"] == " " and not m[0].startswith("+") and not _near(text, m.start()):
            continue
        if examples or not (m["e"] == "555" and m["n"].startswith("01")):
            yield Found(m.start(), m.end(), "phone", "a phone number")
    for m in _INTERNATIONAL.finditer(text):
        digits = re.sub(r"\D", "", m[0])
        longest = 15 if len(digits) < len(m[0]) - 1 else 13  # a sum's term, rather, if in one piece
        if not 8 <= len(digits) <= longest or len(set(digits)) < 3:
            continue
        if m[0].startswith("00") and not _near(text, m.start()):
            continue
        yield Found(m.start(), m.end(), "phone", "a phone number")
    for m in _NATIONAL.finditer(text):
        digits = re.sub(r"\D", "", m[0])
        groups = [len(g) for g in re.findall(r"\d+", m[0])]
        if min(groups) < 2 or len(set(digits)) < 3 or _date(m[0]):
            continue
        if _near(text, m.start()):
            yield Found(m.start(), m.end(), "phone", "a phone number")


def _near(text: str, at: int) -> bool:
    return bool(_PHONE_WORD.search(text, max(0, at - 30), at))


def _date(text: str) -> bool:
    return bool(re.fullmatch(r"\d{1,4}([-./ ])\d{1,2}\1\d{2,4}|(?:19|20)\d\d[-/ ](?:19|20)\d\d", text))


# ── secrets ───────────────────────────────────────────────────────────────────────────────────────

_PEM = re.compile(
    r"-----BEGIN ((?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END \1-----|\Z)", re.S
)


def _private_key(text: str, examples: bool) -> Iterator[Found]:
    if "PRIVATE KEY" in text:
        for m in _PEM.finditer(text):
            yield Found(m.start(), m.end(), "private_key", "a private key")


# prefix -> whose, form. Forms as their owners publish them, or as their keys look
_PREFIXES: dict[str, tuple[str, str]] = {
    "sk-ant-": ("Anthropic", r"sk-ant-[\w-]{20,}"),
    "sk-": ("OpenAI or alike", r"sk-[A-Za-z0-9_-]{20,}"),
    "ghp_": ("GitHub", r"ghp_[A-Za-z0-9]{36,}"),
    "gho_": ("GitHub", r"gho_[A-Za-z0-9]{36,}"),
    "ghs_": ("GitHub", r"ghs_[A-Za-z0-9]{36,}"),
    "ghu_": ("GitHub", r"ghu_[A-Za-z0-9]{36,}"),
    "ghr_": ("GitHub", r"ghr_[A-Za-z0-9]{36,}"),
    "github_pat_": ("GitHub", r"github_pat_\w{22,}"),
    "glpat-": ("GitLab", r"glpat-[\w-]{20,}"),
    "AKIA": ("AWS", r"AKIA[A-Z0-9]{16}"),
    "ASIA": ("AWS", r"ASIA[A-Z0-9]{16}"),
    "xox": ("Slack", r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "xapp-": ("Slack", r"xapp-[A-Za-z0-9-]{20,}"),
    "hooks.slack.com": ("Slack webhook", r"hooks\.slack\.com/services/T\w{6,}/B\w{6,}/\w{16,}"),
    "AIza": ("Google", r"AIza[\w-]{35}"),
    "ya29.": ("Google", r"ya29\.[\w-]{20,}"),
    "sk_live_": ("Stripe", r"sk_live_\w{16,}"),
    "sk_test_": ("Stripe", r"sk_test_\w{16,}"),
    "rk_live_": ("Stripe", r"rk_live_\w{16,}"),
    "whsec_": ("Stripe", r"whsec_[A-Za-z0-9+/=]{24,}"),
    "SG.": ("SendGrid", r"SG\.[\w-]{20,}\.[\w-]{40,}"),
    "hf_": ("Hugging Face", r"hf_[A-Za-z0-9]{30,}"),
    "npm_": ("npm", r"npm_[A-Za-z0-9]{36}"),
    "pypi-": ("PyPI", r"pypi-[\w-]{40,}"),
    "dop_v1_": ("DigitalOcean", r"dop_v1_[a-f0-9]{64}"),
    "shpat_": ("Shopify", r"shpat_[a-fA-F0-9]{32}"),
    "gsk_": ("Groq", r"gsk_[A-Za-z0-9]{40,}"),
    "xai-": ("xAI", r"xai-[A-Za-z0-9]{40,}"),
    "eyJ": ("JSON Web Token", r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"),
}
_FORMS = {
    p: (whose, re.compile(rf"(?<![A-Za-z0-9_-]){form}(?![A-Za-z0-9_-])"))
    for p, (whose, form) in _PREFIXES.items()
}
_NAMES = (
    r"(?:secret|token|passwd|password|passphrase|pwd|credential|authorization|"
    r"(?:api|access|auth|account|private|encryption|signing|service|shared)[ _-]?keys?)"
)
_ASSIGNED = re.compile(
    rf"(?<![A-Za-z0-9])[\w.-]{{0,40}}?{_NAMES}(?:[_-]\w{{1,30}})?[\"'`]?\s{{0,3}}(?::=|=>|==?|:|\bis\b:?)\s{{0,3}}"
    r"(?:bearer\s|basic\s|token\s)?\s?[\"'`]?(?P<v>[^\s\"'`,;<>{}()\[\]]{8,200})",
    re.I,
)
_WORDS = ("secret", "token", "passw", "passphrase", "pwd", "key", "credential", "authorization")
_SAMPLE = re.compile(
    r"your|example|sample|dummy|change|placeholder|redacted|insert|replace|my_?(?:secret|key|token|pass)|"
    r"(.)\1{4}|x{3}|\*{2}|\.{3}|…|environ|getenv|process\.|config\.|settings\.|self\.|request\.|^\$|^%|^@|://|12345678|abcdefg"
    r"|password|secret|token|null|undefined",
    re.I,
)


def entropy(text: str) -> float:
    """Shannon's, in bits a character."""
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def _secret(text: str, examples: bool) -> Iterator[Found]:
    if max(map(len, text.split()), default=0) >= 15:
        for prefix, (whose, form) in _FORMS.items():
            if prefix not in text:
                continue
            for m in form.finditer(text):
                body = m[0][len(prefix) :]
                if entropy(body) >= 3.0 and any(c.isdigit() for c in body) or prefix == "eyJ":
                    yield Found(m.start(), m.end(), "secret", f"a key or token ({whose})")
    low = text.lower()
    if not any(w in low for w in _WORDS):
        return
    for m in _ASSIGNED.finditer(text):
        value = m["v"].rstrip(".,:!?")
        if _random(value):
            start = m.start("v")
            yield Found(start, start + len(value), "likely", "what looks like a password or token")


def _random(value: str) -> bool:
    """Mixed of letters and digits, with 3 bits a character and more of entropy, and no word for a sample."""
    if len(value) < 8 or _SAMPLE.search(value) or not value.isascii():
        return False
    if not any(c.isdigit() for c in value) or not any(c.isalpha() for c in value):
        return False
    if (
        re.fullmatch(
            r"[A-Za-z]+[._-]?\d{1,4}|[\d.,]+[A-Za-z]{1,4}|\w+\.\w+(?:\.\w+)*|0x[0-9a-fA-F]{1,8}", value
        )
        and len(value) < 16
    ):
        return False  # word12, 100MB, module.name
    return entropy(value) >= min(3.0, math.log2(len(value)) - 0.4)


_FINDERS: dict[str, Callable[[str, bool], Iterator[Found]]] = {
    "private_key": _private_key,
    "credentials": _credentials,
    "secret": _secret,
    "email": _email,
    "iban": _iban,
    "card": _card,
    "ssn": _ssn,
    "ip": _ip,
    "phone": _phone,
}
