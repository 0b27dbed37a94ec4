"""The rows that benchmarks/dedup.py measures with: real short texts with planted copies, and unique rows of
templates."""

import json
import random
import re
import sysconfig
from pathlib import Path

from ftjax.data.record import Record

KINDS = ("exact", "format", "typo", "sub5", "sub15", "boilerplate", "reorder", "newprompt")

PROMPTS = (
    "What does the function {name} do?",
    "Explain briefly what {name} is for.",
    "I came across {name} in a code base. Can you tell me what it does?",
    "Describe {name} in a sentence or two.",
    "Write the documentation of {name} for a developer who has never seen it.",
    "Please summarise the purpose of {name}.",
    "A colleague asked me about {name}. What should I answer?",
    "When would I use {name}, and what happens if I do?",
)
OPENINGS = (
    "Sure! ",
    "Of course! Here is a short explanation: ",
    "Certainly. ",
    "Great question! ",
    "Absolutely, I'd be happy to help with that. ",
    "Here's what you need to know: ",
)
CLOSINGS = (
    " I hope this helps!",
    " Let me know if you have any other questions.",
    " Feel free to ask if anything is unclear.",
    " I hope that answers your question. Have a great day!",
    " Is there anything else I can help you with?",
)
SYSTEM = (
    "You are the assistant of a medium-sized company that sells household goods and tools to customers in "
    "twelve countries. Answer in a friendly and concise tone, never invent facts, and when "
    "something is not clear from what the customer wrote, say so instead of guessing. Follow the output "
    "format that the task asks for exactly; do not add explanations, greetings or closing remarks unless the "
    "task itself explicitly asks you for them."
)
assert len(SYSTEM) == 431, len(SYSTEM)

_DOCSTRING = re.compile(r'^\s*(?:async )?(?:def|class) (\w+)[^#]{0,600}?:\s*r?"""(.+?)"""', re.S | re.M)


def docstrings(count: int) -> list[tuple[str, str]]:
    """Names and paragraphs of the docstrings of the standard library and the installed packages, each wording
    once: short texts that people wrote, many of them nearly alike."""
    found: dict[str, str] = {}
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            for name, text in _DOCSTRING.findall(path.read_text(encoding="utf-8", errors="ignore")):
                for paragraph in text.split("\n\n")[:4]:
                    words = " ".join(paragraph.split())[:240]
                    if len(words) >= 40:
                        found.setdefault(words, name)
            if len(found) >= count:
                return [(name, text) for text, name in found.items()][:count]
    return [(name, text) for text, name in found.items()]


def texts_of(path: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """The same of a file of short texts, one a line: two joined make an answer, named by their longest
    word."""
    lines = [
        line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line.strip()) >= 20
    ]
    random.Random(seed).shuffle(lines)
    pairs = zip(lines[::2], lines[1::2], strict=False)
    joined = [f"{a.rstrip('.')}. {b}" for a, b in pairs][:count]
    return [(max(text.split(), key=len), text) for text in joined]


def planted(texts: list[tuple[str, str]], copies: int, seed: int) -> list[Record]:
    """A row of each text, and `copies` of some of them in equal shares of the KINDS; meta says kind and
    origin (the number of the text)."""
    rng = random.Random(seed)
    words = [word for _, text in texts[:5000] for word in text.split()]
    rows = []
    for number, (name, text) in enumerate(texts):
        rows.append((rng.choice(PROMPTS).format(name=name), text, "base", number))
    for k, (prompt, text, _, origin) in enumerate(rng.sample(rows, copies)):
        kind = KINDS[k % len(KINDS)]
        rows.append((*_copy(prompt, texts[origin][0], text, kind, words, rng), kind, origin))
    rng.shuffle(rows)
    return [
        _record(prompt, text, line, {"kind": kind, "origin": origin})
        for line, (prompt, text, kind, origin) in enumerate(rows, 1)
    ]


class Sized:
    """Any number of rows, each a function of its number: nine of ten are made of words of real texts, drawn
    as often as they occur there; each tenth is a copy of one that came before, of one of the KINDS."""

    def __init__(self, texts: list[tuple[str, str]], seed: int):
        self.seed = seed
        self.names = [name for name, _ in texts]
        self.words = [word for _, text in texts for word in text.split()]

    def origin(self, number: int) -> int:
        """The row that this one is a copy of; itself where it is none."""
        if number % 10 or not number:
            return number
        origin = random.Random(f"{self.seed} origin {number}").randrange(number)
        return origin if origin % 10 else origin + 1

    def kind(self, number: int) -> str:
        return KINDS[number // 10 % len(KINDS)]

    def __call__(self, number: int) -> Record:
        origin = self.origin(number)
        prompt, name, text = self._base(origin)
        kind = "base"
        if origin != number:
            kind, rng = self.kind(number), random.Random(f"{self.seed} copy {number}")
            prompt, text = _copy(prompt, name, text, kind, self.words, rng)
        return _record(prompt, text, number + 1, {"kind": kind, "origin": origin})

    def lines(self, numbers: range) -> bytes:
        """These rows as JSON lines."""
        return b"".join(json.dumps(self(number).to_json()).encode() + b"\n" for number in numbers)

    def _base(self, number: int) -> tuple[str, str, str]:
        rng = random.Random(f"{self.seed} {number}")
        name = rng.choice(self.names)
        text = " ".join(rng.choices(self.words, k=rng.randint(10, 40)))
        return rng.choice(PROMPTS).format(name=name), name, text


def _copy(
    prompt: str, name: str, text: str, kind: str, words: list[str], rng: random.Random
) -> tuple[str, str]:
    parts = text.split()
    if kind == "format":
        text = rng.choice((str.upper, str.lower, str.title))(text)
        text = re.sub("[.,:;]", lambda m: rng.choice(("", m[0], m[0] + " ", "!")), text)
        return f"  {prompt.rstrip('.?')}", re.sub(" ", lambda m: rng.choice((" ", " ", "  ", "\n")), text)
    if kind == "typo":
        return _typos(prompt, rng), _typos(text, rng)
    if kind in ("sub5", "sub15"):
        for k in rng.sample(range(len(parts)), max(1, round(len(parts) * int(kind[3:]) / 100))):
            parts[k] = rng.choice(words)
        return prompt, " ".join(parts)
    if kind == "boilerplate":
        return prompt, rng.choice(OPENINGS) + text + rng.choice(CLOSINGS)
    if kind == "reorder":
        return prompt, " ".join(parts[len(parts) // 2 :] + parts[: len(parts) // 2])
    if kind == "newprompt":
        return rng.choice([other for p in PROMPTS if (other := p.format(name=name)) != prompt]), text
    return prompt, text


def _typos(text: str, rng: random.Random) -> str:
    out = []
    for character in text:
        if rng.random() < 0.02:  # left out, another one, or one more
            other = rng.choice("abcdefghijklmnopqrstuvwxyz")
            character = rng.choice(("", other, character + other))
        out.append(character)
    return "".join(out)


def _record(prompt: str, answer: str, line: int, meta: dict, system: str = "") -> Record:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record("sft", messages, meta={"source": "rows.jsonl", "line": line, **meta})


NAMES = "Anna Ben Clara David Elena Farid Grace Hugo Irina Jamal Karin Liam Mona Nils Olga Pedro".split()
THINGS = "lamp kettle drill chair hammer blanket mirror ladder toaster shelf bucket pillow clock".split()
PARTS = "fan lens cable handle screen battery motor lid strap charger hinge button casing filter".split()
GOOD = "reliable comfortable sturdy quiet elegant bright handy durable".split()
BAD = "flimsy noisy dim clumsy fragile sticky loose dull".split()
CITIES = "Oslo Lyon Porto Graz Ghent Turin Malmo Cork Leeds Basel".split()


def _problem(rng: random.Random) -> tuple[str, str]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, price = rng.randint(2, 60), rng.randint(2, 60), rng.randint(3, 90)
    return (
        f"{name} buys {a} {thing}s and later {b} more. Each {thing} costs {price} euros. "
        f"How much does {name} spend in total?",
        f"{name} buys {a} + {b} = {a + b} {thing}s. At {price} euros each that is {a + b} * {price} = "
        f"{(a + b) * price} euros.",
    )


def _order(rng: random.Random) -> tuple[str, str]:
    name, city, thing, other = rng.choice(NAMES), rng.choice(CITIES), *rng.sample(THINGS, 2)
    n = rng.randint(1, 9)
    return (
        f"Extract the order as JSON. Hello, this is {name} from {city}. I would like to order {n} {thing}s "
        f"and one {other}, please send them to my usual address.",
        f'{{"customer": "{name}", "city": "{city}", "items": [{{"item": "{thing}", "quantity": {n}}}, '
        f'{{"item": "{other}", "quantity": 1}}]}}',
    )


def _review(rng: random.Random) -> tuple[str, str]:
    mood = rng.choice(("positive", "negative"))
    words = GOOD if mood == "positive" else BAD
    (a, b), (x, y) = rng.sample(PARTS, 2), rng.sample(words, 2)
    return (
        f"Classify the sentiment of this review as positive or negative: The {a} is {x} and the {b} is {y}, "
        f"which is what I noticed first about this {rng.choice(THINGS)}.",
        mood,
    )


def _reply(rng: random.Random) -> tuple[str, str]:
    name, city, thing = rng.choice(NAMES), rng.choice(CITIES), rng.choice(THINGS)
    part, fault, other = rng.choice(PARTS), rng.choice(BAD), rng.choice(NAMES)
    return (
        f"Write a short reply to this customer. My name is {name} and the {part} of the {thing} that you "
        f"sent me to {city} is {fault}. What can I do?",
        f"Dear {name}, I am sorry to hear that the {part} of your {thing} is {fault}. We will send a new "
        f"{part} to you in {city} this week, free of charge. Kind regards, {other}",
    )


def templated(count: int, seed: int, system: str = SYSTEM) -> list[Record]:
    """Rows of four templates, no two the same, with one system prompt."""
    rng = random.Random(seed)
    seen: dict[tuple[str, str], None] = {}
    while len(seen) < count:
        seen.setdefault(rng.choice((_problem, _order, _review, _reply))(rng))
    return [_record(prompt, answer, line, {}, system) for line, (prompt, answer) in enumerate(seen, 1)]
