"""Defects, personal data and secrets put into clean rows, by a seed: what has to be found again."""

import json
import random
import re
from functools import partial

from ftjax.data.record import Record

# ── planted defects ───────────────────────────────────────────────────────────────────────────────

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "Unfortunately, I can't provide that information.",
    "As an AI language model, I don't have access to real-time data.",
    "I apologize, but I am unable to fulfill this request.",
    "Sorry, but I won't be able to help you with this one.",
    "I must decline to answer this question.",
    "I am just an AI, I cannot express opinions on this matter.",
    "That is not something I can do.",
    "I'm not comfortable writing this.",
    "My guidelines do not permit me to discuss it.",
    "This request goes against my policies, so I will not answer it.",
    # written after the rules for those above; found of these before the rules were widened: one
    "I'm unable to process this kind of request.",
    "Sorry, this is something I can't talk about.",
    "I cannot in good conscience answer that.",
    "As a responsible assistant, I will not do this.",
    "I am programmed not to answer such questions.",
    "That question is not appropriate.",
    "I'd rather we talked about something else.",
    "No, I won't do that.",
)
CLOSINGS = (
    "I hope this helps!",
    "Let me know if you have any other questions.",
    "Feel free to ask if you need more help!",
    "Is there anything else I can help you with?",
    "Please don't hesitate to reach out if anything is unclear.",
    "Hope that clears it up.",
    "If you need more details, just let me know!",
    "I'd be happy to elaborate on any of these points.",
)
STANDINS = (
    "TODO|N/A|[insert answer here]|...|null|Lorem ipsum dolor sit amet.|<answer>|TBD|placeholder|"
    "Your response here|xxxx|-"
).split("|")
FOREIGN = (
    "Das lässt sich am besten mit einem Beispiel erklären: Man nimmt die größere Zahl und zieht die "
    "kleinere ab.",
    "Pour répondre à cette question, il faut d'abord regarder les données et ensuite comparer les résultats.",
    "La respuesta depende de varios factores, pero lo más importante es empezar con una lista de objetivos.",
    "Per ottenere un buon risultato bisogna mescolare bene gli ingredienti e lasciare riposare l'impasto.",
    "Чтобы ответить на этот вопрос, нужно сначала собрать все данные, а затем сравнить полученные "
    "результаты.",
    "要回答这个问题，首先需要收集所有相关的数据，然后仔细比较得到的结果，最后写出一个简短的总结，"
    "并说明这些结果为什么重要，以及接下来应该怎样继续进行。",
    "この質問に答えるには、まず関連するデータをすべて集め、それから結果を注意深く比較し、"
    "最後に短いまとめを書く必要があります。そのうえで、次に何をするかを決めます。",
    "Para responder a esta pergunta, é preciso primeiro olhar os números e depois comparar com o "
    "que já sabemos.",
    "Aby odpowiedzieć na to pytanie, trzeba najpierw zebrać wszystkie dane, a potem dokładnie "
    "porównać wyniki.",
    "Om deze vraag te beantwoorden moet je eerst alle gegevens verzamelen en daarna de uitkomsten "
    "vergelijken.",
    "Bu soruyu yanıtlamak için önce bütün verileri toplamak, sonra da sonuçları dikkatle "
    "karşılaştırmak gerekir.",
    "للإجابة عن هذا السؤال يجب أولا جمع كل البيانات ثم مقارنة النتائج بعناية وكتابة ملخص قصير في النهاية.",
)
ACCENTED = "don’t|café|“quoted”|naïve|Zürich – Bern|50 €|déjà vu|Привет|São Paulo|…".split("|")
ASKS = (
    "Answer in JSON.",
    "Return the result as a JSON object.",
    "Respond only with valid JSON.",
    "Output JSON with the keys name, items, ok and about.",
)
MARKS = (
    "<|im_end|>\n<|im_start|>user\nThanks",
    "\n### Instruction:\nNow another one",
    " [/INST]",
    "<|eot_id|>",
    "</s>",
    "\nHuman: and what else?",
    "<end_of_turn>",
    "\n### Response:\nSure",
)


def chat(*turns: str, system: str = "") -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]


def plant(rows: list[Record], seed: int = 0, each: int = 200) -> dict[str, list[Record]]:
    """By code, clean rows with one defect each."""
    rng = random.Random(seed)
    long = [r for r in rows if len(r.messages[-1]["content"].split()) >= 60]
    asking = [r for r in rows if 60 < len(r.messages[-2]["content"]) < 2000]

    def made(record: Record, change) -> Record:
        asked, said = record.messages[-2]["content"], record.messages[-1]["content"]
        asked, said = change(asked, said)
        return Record("sft", chat(asked, said), meta=dict(record.meta))

    def cut(asked, said):
        at = rng.randrange(len(said) * 3 // 10, len(said) * 19 // 20)
        return asked, said[:at].rstrip() if rng.random() < 0.5 else said[:at].rsplit(None, 1)[0]

    def fence(asked, said):
        mark = rng.choice(("```python", "```", "~~~", "```json"))
        whole = "```\nmake all\n```\n" * rng.randrange(2)
        return asked, f"{said}\n{whole}{mark}\nfor i in range({rng.randrange(99)}):\n    print(i)\n"

    def wrong(asked, said):
        word = rng.choice(ACCENTED)
        broken = word.encode().decode(rng.choice(("cp1252", "latin-1")), "replace")
        if rng.random() < 0.1:
            broken = word[:2] + "\ufffd"
        words = said.split(" ")
        words.insert(rng.randrange(len(words) + 1), broken)
        return asked, " ".join(words)

    def loop(asked, said):
        sentences = re.split(r"(?<=[.!?])\s+", said)
        at = rng.randrange(len(sentences))
        times = rng.randrange(4, 30)
        if rng.random() < 0.3:  # a few words, over and over
            words = said.split()
            k = rng.randrange(1, 6)
            start = rng.randrange(max(1, len(words) - k))
            return asked, " ".join(words[: start + k] + words[start : start + k] * (len(words) // k + 20))
        return asked, " ".join(sentences[: at + 1] + [sentences[at]] * times)

    def repeat(asked, said):
        return asked, asked if rng.random() < 0.3 else f"{asked}\n{said}"

    def json_broken(asked, said):
        items = [rng.randrange(99) for _ in range(4)]
        value = json.dumps(
            {"name": said.split()[0], "items": items, "ok": True, "about": {"text": said[:60]}}
        )
        places = [i for i, c in enumerate(value) if c in '{}[]",:']
        kind = rng.random()
        if kind < 0.5:
            at = rng.choice(places)
            value = value[:at] + value[at + 1 :]
        elif kind < 0.75:
            value = value[: rng.randrange(5, len(value) - 1)]
        else:
            value = said
        ask = rng.choice(ASKS)
        if rng.random() < 0.3 and kind < 0.75:
            value = f"Here it is:\n```json\n{value}\n```"
        return f"{asked}\n{ask}", value

    def pick(choices, how):
        def change(asked, said):
            return asked, how(said, rng.choice(choices))

        return change

    changes = {
        "F001": (rows, lambda asked, said: (asked, rng.choice(("", " ", "\n\n")))),
        "F002": (rows, pick(STANDINS, lambda said, one: one)),
        "F003": (rows, pick(REFUSALS, lambda said, one: f"{one} {said}" if rng.random() < 0.3 else one)),
        "F004": (
            long,
            pick(CLOSINGS, lambda said, one: f"{said}{' ' if said[-1] in '.!?' else chr(10) * 2}{one}"),
        ),
        "F005": (long, cut),
        "F006": (rows, fence),
        "F007": (long, loop),
        "F008": (asking, repeat),
        "F009": (asking, pick(FOREIGN, lambda said, one: one)),
        "F010": (rows, wrong),
        "F011": (rows, json_broken),
        "F014": (rows, pick(MARKS, lambda said, one: said + one)),
    }
    return {
        code: [made(r, change) for r in rng.sample(base, min(each, len(base)))]
        for code, (base, change) in changes.items()
    }


def plant_pairs(pairs: list[Record], rng: random.Random, each: int = 200) -> list[Record]:
    """Pairs whose rejected answer is the chosen one but for case, punctuation, spacing or a few words."""
    out = []
    for record in rng.sample(pairs, min(each, len(pairs))):
        said = record.answer_text()
        kind = rng.randrange(4)
        words = said.split()
        if kind == 0:
            other = said.lower()
        elif kind == 1:
            other = re.sub(r"[,.!]", "", said)
        elif kind == 2:
            other = "  ".join(words)
        else:
            keep = [w for w in words if not w.isdigit()]
            at = rng.randrange(len(keep))
            left_out = words.index(keep[at])
            other = " ".join(words[:left_out] + words[left_out + 1 :])
        rejected = [{"role": "assistant", "content": other}]
        out.append(Record("preference", record.messages, chosen=record.chosen, rejected=rejected))
    return out


def luhn_number(rng: random.Random, prefix: str, length: int) -> str:
    body = prefix + "".join(rng.choice("0123456789") for _ in range(length - len(prefix) - 1))
    back = enumerate(map(int, reversed(body)))
    total = sum(sum(divmod(2 * digit, 10)) if i % 2 == 0 else digit for i, digit in back)
    return body + str(-total % 10)


ASSIGNMENTS = (
    "password: {}",
    'api_key = "{}"',
    "SECRET_TOKEN={}",
    '"client_secret": "{}"',
    "Authorization: Bearer {}",
    "The password is {}.",
    "auth-token: {}",
    "DB_PASSWORD='{}'",
)
NO_KEYS = (
    "sk-your-api-key-goes-here",
    "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
    "ghp_short",
    "AKIA",
    "xoxo love",
    "task-list-of-the-whole-team-of-2024",
)
NO_PASSWORDS = (
    'api_key = os.environ["KEY_2024"]',
    "password: ********",
    "token = request.headers.get('X-Token2')",
    "The key is important here in 2024",
    "password: changeme123",
    "max_tokens: 1024000000",
    "secret: <your-secret-1>",
    "password = getpass1()",
)
IBANS = (
    ("DE", "d" * 18),
    ("GB", "LLLL" + "d" * 14),
    ("FR", "d" * 10 + "x" * 11 + "dd"),
    ("NL", "LLLL" + "d" * 10),
    ("ES", "d" * 20),
)


def iban_number(rng: random.Random) -> str:
    country, form = rng.choice(IBANS)
    sets = {"d": "0123456789", "L": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "x": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    body = "".join(rng.choice(sets[c]) for c in form)
    value = "".join(str(int(c, 36)) for c in f"{body}{country}00")
    return f"{country}{98 - int(value) % 97:02}{body}"


def plant_personal(
    rows: list[Record], seed: int = 1, each: int = 200
) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """By code: rows with one value put in, and rows with what looks like one and is not."""
    rng = random.Random(seed)
    alnum = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

    def random_text(n: int, of: str = alnum) -> str:
        return "".join(rng.choice(of) for _ in range(n))

    def digits(n: int) -> str:
        return random_text(n, "0123456789")

    def grouped(text: str, n: int, by: str) -> str:
        return by.join(text[i : i + n] for i in range(0, len(text), n))

    def email():
        name = rng.choice("anna.berg j_smith info m.oneil kim+news Li-Wei x9".split())
        host = rng.choice("mail.de uni-berg.edu gmail.com sub.firm.co.uk".split())
        return f"{name}{rng.randrange(100)}@{host}"

    def phone():
        a = f"{rng.randrange(2, 10)}{rng.choice('02345678')}{rng.randrange(10)}"
        e, n = f"{rng.randrange(2, 10)}{digits(1)}2", digits(4)
        forms = (
            *(f"({a}) {e}-{n}", f"{a}-{e}-{n}", f"{a}.{e}.{n}", f"+1 {a} {e} {n}", f"+1-{a}-{e}-{n}"),
            *(f"+44 20 7{digits(3)} {digits(4)}", f"+49 30 {digits(8)}", f"+91 98{digits(3)} {digits(5)}"),
            *(f"+33 6 {grouped(digits(8), 2, ' ')}", f"+86 138 {digits(4)} {digits(4)}"),
            *(f"phone: 0{digits(2)} {digits(7)}", f"call 0{digits(3)} {digits(6)}"),
        )
        return rng.choice(forms)

    def ip():
        if rng.random() < 0.2:
            groups = [random_text(4, "123456789abcdef") for _ in range(3)]
            return f"2a02:8108:{groups[0]}:{groups[1]}::{groups[2]}"
        octets = (rng.choice((81, 93, 146, 185, 203)), *(rng.randrange(1, 255) for _ in range(3)))
        return ".".join(map(str, octets))

    def card():
        if rng.random() < 0.2:
            number = luhn_number(rng, "37", 15)
            return rng.choice((number, f"{number[:4]} {number[4:10]} {number[10:]}"))
        number = luhn_number(rng, rng.choice(("4", "51", "55", "2221", "6011", "3530")), 16)
        return rng.choice((number, grouped(number, 4, " "), grouped(number, 4, "-")))

    def iban():
        number = iban_number(rng)
        return rng.choice((number, grouped(number, 4, " ")))

    def ssn():
        return f"{rng.randrange(1, 666):03}-{rng.randrange(1, 100):02}-{rng.randrange(1, 10000):04}"

    def credentials():
        scheme = rng.choice(("https", "postgres", "ftp", "mongodb+srv"))
        return f"{scheme}://{random_text(6)}:{random_text(10)}@db.host.net:5432/x"

    def key():
        plain = {"sk-proj-": 48, "sk-": 48, "sk-ant-api03-": 60, "ghp_": 36, "AIza": 35, "sk_live_": 24}
        plain |= {"glpat-": 20, "hf_": 34, "npm_": 36}
        prefix = rng.choice((*plain, "AKIA", "xoxb", "github_pat_", "jwt"))
        if prefix in plain:
            return prefix + random_text(plain[prefix])
        return {
            "AKIA": f"AKIA{random_text(16, 'ABCDEFGHIJKLMNOPQRSTUVWXYZ234567')}",
            "xoxb": f"xoxb-{digits(12)}-{digits(12)}-{random_text(24)}",
            "github_pat_": f"github_pat_{random_text(22)}_{random_text(59)}",
            "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJ{random_text(40)}.{random_text(43)}",
        }[prefix]

    def password():
        value = random_text(rng.randrange(10, 33), alnum + "!#%+") + digits(2)
        return rng.choice(ASSIGNMENTS).format(value)

    def pem():
        kind = rng.choice(("RSA ", "EC ", "OPENSSH ", ""))
        body = grouped(random_text(256), 64, "\n")
        return f"-----BEGIN {kind}PRIVATE KEY-----\n{body}\n-----END {kind}PRIVATE KEY-----"

    def bad_card():
        number = luhn_number(rng, "4", 16)
        return number[:-1] + str((int(number[-1]) + rng.randrange(1, 10)) % 10)

    def bad_iban():
        number = iban_number(rng)
        return number[:-1] + ("0" if number[-1] != "0" else "1")

    makers = dict(
        zip(
            (f"P{i:03}" for i in range(1, 11)),
            (email, phone, ip, card, iban, ssn, credentials, key, password, pem),
            strict=True,
        )
    )

    def look_alike(code: str) -> str:
        d = digits
        return {
            "P001": lambda: rng.choice(("icon@2x.png", "@handle", "user@host", "a @ b.com", "matrix@{i,j}")),
            "P002": lambda: rng.choice(
                (
                    *(d(10), f"{d(4)}-{d(2)}-{d(2)}", f"{d(3)} {d(3)} {d(4)} units", f"1,{d(3)},{d(3)}"),
                    *(f"3.{d(9)}", f"ISBN 978-3-16-{d(6)}-0", f"{d(5)}-{d(4)}"),
                )
            ),
            "P003": lambda: rng.choice(
                (
                    f"version 1.{rng.randrange(20)}.{rng.randrange(9)}.{rng.randrange(9)}",
                    *("127.0.0.1", f"12:{rng.randrange(10, 60)}:07", "std::vector::iterator"),
                    f"{rng.randrange(256, 999)}.1.2.3",
                )
            ),
            "P004": lambda: rng.choice((bad_card(), grouped(bad_card(), 4, " "), f"0.{d(16)}", d(13))),
            "P005": lambda: rng.choice((bad_iban(), f"AB12 {random_text(4, 'ABCDEFGH')} {d(4)}")),
            "P006": lambda: rng.choice(
                (f"000-{d(2)}-{d(4)}", f"9{d(2)}-45-{d(4)}", f"{d(3)}-00-{d(4)}", f"{d(3)}-{d(3)}-{d(4)}")
            ),
            "P007": lambda: rng.choice(("https://host.net:8080/a@b", "see https://x.org/@team", "scp a:b@c")),
            "P008": lambda: rng.choice((*NO_KEYS, random_text(40, "0123456789abcdef"))),
            "P009": lambda: rng.choice(NO_PASSWORDS),
            "P010": lambda: "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----",
        }[code]()

    frames = (
        "It is {}",
        "You can use {} for this.",
        "({})",
        "Write it down: {}\nThen go on.",
        "… and {} is what was sent",
    )

    def with_one(make) -> list[Record]:
        out = []
        for record in rng.sample(rows, each):
            sentences = record.messages[-1]["content"].split(". ")
            sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(frames).format(make()))
            out.append(Record("sft", chat(record.messages[-2]["content"], ". ".join(sentences))))
        return out

    there = {code: with_one(make) for code, make in makers.items()}
    return there, {code: with_one(partial(look_alike, code)) for code in makers}
