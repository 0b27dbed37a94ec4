import json
from collections import Counter

import pytest
from fake_endpoint import FakeEndpoint, Misbehave

from ftjax.data.pipeline import run
from ftjax.data.record import Judged, Record
from ftjax.data.synthesize import Synthesize, SynthesizeOptions, unknown
from ftjax.data.synthesize.pairs import Malformed, Tally, read, read_items
from ftjax.data.synthesize.prompts import Prompts
from ftjax.data.writer import Answer
from ftjax.errors import UserError
from ftjax.evaluate.statistics import wilson

pytestmark = pytest.mark.fast

UPLOADS = """## Uploads

Flask takes files of any size unless `MAX_CONTENT_LENGTH` is set. It was added
in version 0.6. With a limit of 16 MB, larger requests end with a `RequestEntityTooLarge` error.
The limit holds for the whole request, so that several small files may exceed it together.
"""
SESSIONS = """## Sessions

The session is kept in a cookie that is signed with the secret key. A user can read what is in it but
cannot change it without the key. A permanent session lasts 31 days. Set
`app.secret_key` before the first request.
"""


def section(text, number=0, **meta):
    meta = {
        "source": "docs/x.html",
        "line": number + 1,
        "url": "https://example.org/x",
        "title": "Flask",
        "breadcrumb": ["Guide", "Patterns"],
        "section": f"s{number}",
        "offset": [100, 100 + len(text)],
        "license": "BSD-3-Clause",
        "group": "docs/x.html",
        **meta,
    }
    return Record("lm", text=text, meta=meta)


def pair(question, answer, quote, **more):
    return {"question": question, "answer": answer, "quote": quote, **more}


LIMIT = pair(
    "How large may a request to Flask be with a limit of 16 MB?",
    "Up to 16 MB; larger ones end with a `RequestEntityTooLarge` error.",
    "With a limit of 16 MB, larger requests end",
)
COOKIE = pair(
    "Where does Flask keep the session?",
    "In a cookie that is signed with the secret key.",
    "The session is kept in a cookie that is signed",
)


class Model:
    """Answers by the kind of prompt; `written` are the items for sections, by a word of theirs."""

    def __init__(self, written, again=None, votes=(), knows=(), answers=None):
        self.written, self.again, self.votes = written, again or {}, dict(votes)
        self.knows, self.answers = knows, answers or {}

    def __call__(self, body, number):
        prompt = body["messages"][-1]["content"]
        if "Write up to" in prompt or "conversation(s)" in prompt:
            items = next(items for word, items in self.written.items() if word in prompt)
            return items if isinstance(items, str) else json.dumps({"items": items})
        question = next((q for q in self._questions() if q in prompt), None)
        assert question is not None, prompt
        if '"supported"' in prompt:
            wrong = any(word in prompt.partition("Judge this")[2] for word in self.votes)
            good = not wrong
            return json.dumps({"reason": "as it is", "supported": good, "complete": True, "useful": True})
        if '"same"' in prompt:
            return json.dumps({"same": False})
        if '"answerable"' in prompt:
            said = self.again.get(question, self._questions()[question])
            return json.dumps({"answerable": said is not None, "answer": said or ""})
        return self._questions()[question] if question in self.knows else "I do not know."

    def _questions(self):
        found = {}
        for items in self.written.values():
            for item in items if isinstance(items, list) else []:
                for turn in item.get("turns", [item]) if isinstance(item, dict) else []:
                    if isinstance(turn, dict) and "question" in turn:
                        found[turn["question"]] = turn.get("answer")
        return dict(sorted(found.items(), key=lambda q: -len(q[0]))) | self.answers


@pytest.fixture
def synthesize(tmp_path):
    """synthesize(model, sections, **options): (step, what it yields), asked at a fake endpoint."""

    def made(model, sections, fake=None, **options):
        options = {"votes": 1, "retry_wait": 0.01, "answers_dir": str(tmp_path / "answers"), **options}
        with FakeEndpoint(model) as server:
            for name in ("writer", "judge", "base"):
                if name == "writer" or options.get(name):
                    options[name] = f"{options.get(name, 'big')}@{server.url}"
            step = Synthesize(SynthesizeOptions(**options))
            judged = list(step.apply(iter(sections), {}, 0))
            made.requests = server.requests
        return step, judged

    return made


def codes(judged):
    return [j.verdicts[0].code if j.record is None else None for j in judged]


def test_a_pair_with_its_evidence(synthesize):
    quote = "was added in version 0.6. With a limit"  # one space where the section has a line's end
    item = pair("When did Flask get MAX_CONTENT_LENGTH?", "In version 0.6.", quote)
    step, (judged,) = synthesize(Model({"Uploads": [item]}), [section(UPLOADS)], judge="other")
    record = judged.record
    assert record.task == "sft"
    assert record.messages == [
        {"role": "user", "content": item["question"]},
        {"role": "assistant", "content": item["answer"]},
    ]
    evidence = record.meta["evidence"]
    assert evidence["quote"] == "was added\nin version 0.6. With a limit"
    assert UPLOADS[evidence["start"] : evidence["end"]] == evidence["quote"]
    for key in ("source", "url", "section", "license", "group", "offset"):
        assert record.meta[key] == section(UPLOADS).meta[key]
    assert record.meta["model"] == "big" and record.meta["judge"] == "other"
    assert record.meta["prompt"] == Prompts().hash("qa") and record.meta["votes"] == [1, 1]
    assert record.meta["agreement"] == 1.0 and record.meta["kind"] == "qa"
    # the prompts are the files', with the section whole
    asked = synthesize.requests[0]["messages"][0]["content"]
    assert UPLOADS.strip() in asked and 'titled "Flask", under "Guide > Patterns"' in asked
    assert synthesize.requests[0]["temperature"] == 0.7 and synthesize.requests[1]["temperature"] == 0.0
    assert "MAX_CONTENT_LENGTH" in synthesize.requests[1]["messages"][0]["content"]


BAD = {
    "S010": pair(
        "Is there a limit in Flask?", "Yes, `MAX_CONTENT_LENGTH`.", "Flask takes files of every size"
    ),
    "S011": pair("Is there a limit for Flask?", "Yes, `MAX_CONTENT_LENGTH`.", "a limit"),
    "S012": pair("What is the limit in Flask?", "It is 32 MB.", "With a limit of 16 MB, larger"),
    "S013": pair("What does this section say of limits?", "That 16 MB is one.", "With a limit of 16 MB"),
    "S014": pair("Does Flask take files of any size?", "Flask take files of any size.", "files of any size"),
    "S015": pair("Limits?", "It may be 16 MB.", "With a limit of 16 MB, larger"),
    "S016": {**LIMIT},
    "S020": pair(
        "Why does Flask limit requests?", "So that none is too large.", "Flask takes files of any size"
    ),
    "S021": pair(
        "What ends with an error in Flask?", "A request of more than the limit.", "larger requests end"
    ),
    "S030": pair(
        "What holds for a whole Flask request?", "The limit, wrongly.", "The limit holds for the whole"
    ),
}


def test_every_check_refuses_and_the_report_holds_what_was_refused(synthesize):
    again = {BAD["S020"]["question"]: None, BAD["S021"]["question"]: "Nothing whatever comes of it at all."}
    model = Model({"Uploads": [LIMIT, *BAD.values()]}, again, votes={"wrongly": 1})
    step, judged = synthesize(model, [section(UPLOADS)])
    assert codes(judged) == [None, *BAD]
    for one, item in zip(judged[1:], BAD.values(), strict=True):
        (verdict,) = one.verdicts
        assert json.dumps(item, ensure_ascii=False) in verdict.text
        assert verdict.source == "docs/x.html" and verdict.line == 1 and verdict.path.startswith("qa[")
    assert judged[1].verdicts[0].path == "qa[1].quote" and "number 32" in judged[3].verdicts[0].text
    passed = step.tally().passed["qa"]
    # 11 written; quote: -2; facts -1; question: -2 (pointing, twice); echo -1; length -1; again -2; judge -1
    assert [passed[s] for s in ("quote", "facts", "question", "echo", "length", "again", "judge")] == [
        9, 8, 6, 5, 4, 2, 1,
    ]  # fmt: skip
    assert step.summary({})["yield of qa"] == (
        "1 requests → 11 written → quote 9 (82%) → facts 8 (89%) → question 6 (75%) → echo 5 (83%) → "
        "length 4 (80%) → again 2 (50%) → judge 1 (50%) → kept 1 (9% of those written)"
    )


def test_answers_that_cannot_be_read(synthesize):
    model = Model(
        {
            "Uploads": 'Here you are:\n```json\n{"items": [' + json.dumps(LIMIT) + "]}\n```\nBye!",
            "Sessions": json.dumps({"items": [COOKIE, {"question": "no answer?"}, "text"]}),
            "Prose": "I am sorry, I can not do that.",
            "Cut": '{"items": [{"question": "What is',
            "Empty": '{"items": []}',
            "Wrong": '{"items": "none"}',
        },
        answers={LIMIT["question"]: LIMIT["answer"], COOKIE["question"]: COOKIE["answer"]},
    )

    def reply(body, number):
        text = model(body, number)
        return {"text": text, "finish": "length"} if text.endswith("What is") else text

    def padded(name):
        return f"## {name}\n\n" + "Words that say nothing much. " * 10

    sections = [section(UPLOADS), section(SESSIONS, 1)]
    sections += [section(padded(n), i) for i, n in enumerate(("Prose", "Cut", "Empty", "Wrong"), 2)]
    sections += [section("## Tiny", 6), Record("sft", [{"role": "user", "content": "x"}])]
    step, judged = synthesize(reply, sections)
    wanted = [None, "S005", "S005", None, "S004", "S003", "S007", "S005", "S006", "S008"]
    assert codes(judged) == wanted
    assert "no answer?" in judged[1].verdicts[0].text and "sorry" in judged[4].verdicts[0].text
    tally = step.tally()
    assert (tally.sections, tally.skipped) == (6, 2)
    assert tally.unread["qa"] == 3 and tally.written["qa"] == 4


def test_an_endpoint_that_misbehaves_gives_the_same(synthesize, tmp_path):
    model = Model({"Uploads": [LIMIT, BAD["S012"]], "Sessions": [COOKIE]})
    sections = [section(UPLOADS), section(SESSIONS, 1)]
    _, calm = synthesize(model, sections, answers_dir=str(tmp_path / "calm"))
    trouble = [dict(status=429, headers={"Retry-After": "0.05"}), dict(status=500), dict(cut=True)]
    trouble += [dict(raw=b'{"choices": [{"mess'), dict(wait=0.5), dict(status=503)]

    def reply(body, number):
        if number % 2 == 0 and number < 2 * len(trouble):
            raise Misbehave(**trouble[number // 2])
        return model(body, number)

    _, wild = synthesize(reply, sections, timeout=0.3, answers_dir=str(tmp_path / "wild"))
    assert [j.record for j in wild] == [j.record for j in calm] and codes(wild) == codes(calm)
    assert len(synthesize.requests) > 6


def test_again_nothing_is_asked(tmp_path):
    model = Model({"Uploads": [LIMIT], "Sessions": [COOKIE]}, knows=[COOKIE["question"]])
    sections = [section(UPLOADS), section(SESSIONS, 1)]
    asked = []
    with FakeEndpoint(lambda body, n: (asked.append(n), model(body, n))[1]) as fake:
        options = SynthesizeOptions(
            writer=f"big@{fake.url}", base=f"small@{fake.url}", answers_dir=str(tmp_path / "again")
        )
        first = list(Synthesize(options).apply(iter(sections), {}, 0))
        count = len(asked)
        step = Synthesize(options)
        # nothing is left to be asked, as the estimate knows
        assert step.decide([step.facts(sections, 0)]).get("requests", 0) == 0
        assert list(step.apply(iter(sections), {}, 0)) == first and len(asked) == count
        assert "0 requests" in step.summary({})["cost"]


def test_instruction_conversation_unanswerable_preference(synthesize):
    task = pair(
        "Write the line that limits Flask's uploads to 16 MB.",
        "Set `MAX_CONTENT_LENGTH` to 16 MB.",
        "unless `MAX_CONTENT_LENGTH` is set",
    )
    turns = [
        LIMIT,
        pair("What is it called?", "`RequestEntityTooLarge`, an error.", "a `RequestEntityTooLarge` error"),
    ]
    pointing = [turns[1], LIMIT]
    open_question = {"question": "Which web servers limit uploads in front of Flask?"}
    answered = {"question": "What is the error of Flask for a large request?"}
    whole = "The limit holds for the whole request"
    preferred = pair(
        "Does a Flask limit hold for each file?",
        "No, for the whole request.",
        whole,
        rejected="Yes, for each file by itself.",
    )
    unclear = pair(
        "For what does a limit of Flask hold?",
        "For the whole request.",
        whole,
        rejected="For a request as a whole.",
    )
    by_kind = {
        "tasks that": [task],
        "conversation(s)": [{"turns": turns}, {"turns": pointing}, {"turns": [BAD["S012"]]}],
        "careful reader": [open_question, answered],
        "a wrong one": [preferred, unclear],
    }
    again = {open_question["question"]: None, answered["question"]: "`RequestEntityTooLarge`"}
    model = Model(by_kind, again, votes={"Yes, for each file": 1})
    kinds = ["instruction", "conversation", "unanswerable", "preference"]
    step, judged = synthesize(model, [section(UPLOADS)], kinds=kinds)
    assert codes(judged) == [None, None, "S013", "S012", None, "S022", None, "S031"]
    task_row, talk, _, _, open_row, _, preference, _ = [j.record for j in judged]
    assert task_row.messages[1]["content"] == task["answer"]
    assert [m["content"] for m in talk.messages] == [
        LIMIT["question"], LIMIT["answer"], turns[1]["question"], turns[1]["answer"],
    ]  # fmt: skip
    assert [e["quote"] for e in talk.meta["evidence"]] == [t["quote"] for t in turns]
    assert UPLOADS.strip() in open_row.messages[0]["content"]
    assert open_row.messages[0]["content"].endswith(open_question["question"])
    assert open_row.messages[1]["content"] == "The text does not say." and "evidence" not in open_row.meta
    assert preference.task == "preference" and len(preference.messages) == 1
    assert preference.chosen == [{"role": "assistant", "content": preferred["answer"]}]
    assert preference.rejected == [{"role": "assistant", "content": preferred["rejected"]}]
    # the later question was asked, and judged, with what was said before
    prompts = [request["messages"][0]["content"] for request in synthesize.requests]
    later = [p for p in prompts if "What is it called?" in p and '"turns"' not in p]
    assert len(later) == 2 and all(LIMIT["answer"] in p for p in later)


def test_the_section_in_the_prompt(synthesize):
    _, (judged,) = synthesize(Model({"Uploads": [LIMIT]}), [section(UPLOADS)], context=True)
    asked = judged.record.messages[0]["content"]
    assert UPLOADS.strip() in asked and asked.endswith(LIMIT["question"])
    assert judged.record.meta["context_prompt"] == Prompts().hash("context")


@pytest.mark.parametrize(
    "good,kept", [([1, 1, 0], True), ([1, 0, 0], False), ([1, 0, None], False), ([1, 1, None], True)]
)
def test_the_majority_of_votes(synthesize, good, kept):
    votes = iter(good)

    def reply(body, number):
        text = Model({"Uploads": [LIMIT]})(body, number)
        if '"supported"' not in body["messages"][0]["content"]:
            return text
        vote = next(votes)
        # what a judge writes beside its vote changes nothing in the pair
        more = {"reason": "so it is", "supported": bool(vote), "complete": True, "useful": True}
        return "no JSON at all" if vote is None else json.dumps(more)

    _, (judged,) = synthesize(reply, [section(UPLOADS)], votes=3, concurrency=1)
    assert (judged.record is not None) is kept
    if kept:
        assert judged.record.meta["votes"] == [2, 3]
        assert judged.record.messages[1]["content"] == LIMIT["answer"]
    else:
        assert "1 of 3 votes for it" in judged.verdicts[0].text
    temperatures = [
        r["temperature"] for r in synthesize.requests if '"supported"' in r["messages"][0]["content"]
    ]
    assert temperatures == [0.0, 0.7, 0.7]


def test_votes_that_were_lost_are_no_verdict_on_the_pair(synthesize):
    votes = iter(["for it", "lost", "lost"])

    def reply(body, number):
        if '"supported"' in body["messages"][0]["content"] and next(votes) == "lost":
            raise Misbehave(500, "boom")
        return Model({"Uploads": [LIMIT]})(body, number)

    _, (judged,) = synthesize(reply, [section(UPLOADS)], votes=3, concurrency=1, retries=0)
    assert codes([judged]) == ["S001"] and "boom" in judged.verdicts[0].text
    assert judged.verdicts[0].severity == "error"


def test_closed_book(synthesize):
    second = pair(
        "How long lasts a permanent session in Flask?", "31 days", "A permanent session lasts 31 days"
    )
    model = Model({"Uploads": [LIMIT], "Sessions": [COOKIE, second]}, knows=[second["question"]])
    sections = [section(UPLOADS), section(SESSIONS, 1)]
    step, judged = synthesize(model, sections, base="small", tries=3)
    assert [j.record.meta["known"] for j in judged] == [[0, 3], [0, 3], [3, 3]]
    asked = [r for r in synthesize.requests if r["model"] == "small"]
    assert len(asked) == 9 and not any(
        "cookie that is signed with the" in r["messages"][0]["content"] for r in asked
    )
    assert sorted(r["temperature"] for r in asked) == [0.0] * 3 + [0.5] * 6
    low, high = wilson(2, 3)
    said = step.summary({})["closed book"]
    assert f"2 of 3 facts (67%; 95% interval {low:.0%} to {high:.0%}) are unknown to small" in said
    assert "Too few to tell" in said or "Use retrieval" in said


def test_what_the_share_of_unknown_facts_means():
    options = SynthesizeOptions(writer="w@http://x", base="small")

    def text(counts):
        return unknown(Tally(right=Counter(counts)), options)

    assert "Use retrieval" in text({0: 80, 2: 20})  # 80%: 71% to 87%
    assert "is known" in text({0: 2, 4: 98})  # 2%: 1% to 7%
    assert "Too few" in text({0: 2, 1: 6})  # 25%: 7% to 59%
    assert text({-1: 5}) == "no fact to ask for"


def test_cost_limit_ends_sections_with_a_verdict(synthesize):
    sections = [section(UPLOADS.replace("16", str(16 + i)), i) for i in range(6)]
    items = {f"limit of {16 + i} MB": [] for i in range(6)}
    step, judged = synthesize(
        Model(items), sections, prices={"big": [1.0, 1000.0]}, max_cost=4.0, max_tokens=1000, concurrency=1
    )
    # a request costs 5 new tokens, 0.005, and at the most 1.0 and a little
    assert set(codes(judged)) == {"S007"}
    step, judged = synthesize(
        Model(items), [section(UPLOADS, 9)], prices={"big": [1.0, 1000.0]}, max_cost=0.5, max_tokens=999
    )
    assert codes(judged) == ["S002"] and "max_cost=0.5 is reached" in judged[0].verdicts[0].text
    assert not synthesize.requests


def test_the_estimate(tmp_path):
    options = SynthesizeOptions(
        writer="big@http://127.0.0.1:1", base="small@http://127.0.0.1:1", votes=3, tries=4, count=2,
        prices={"big": [1.0, 10.0]}, answers_dir=str(tmp_path / "again"),
    )  # fmt: skip
    step = Synthesize(options)
    made = step.decide(
        [step.facts([section(UPLOADS), section("short")], 0), step.facts([section(SESSIONS)], 1)]
    )
    # two sections: each one of writing, and for each of two pairs one again, three votes, four tries
    assert made["requests"] == 2 * (1 + 2 * (1 + 3 + 4)) and made["writing"] == 2
    # the base has no price
    new = 2 * (2 * 130 + 2 * 80 + 2 * 3 * 60)
    prompts = made["prompt_tokens"] - 2 * 2 * 4 * 100
    assert made["cost"] == pytest.approx((prompts + 10 * new) / 1e6)


def test_in_the_pipeline_batched_and_resumed(tmp_path):
    model = Model({"Uploads": [LIMIT, BAD["S012"]], "Sessions": [COOKIE]})

    class Here:
        def key(self):
            return "the sections"

        def judged(self):
            yield Judged(section(UPLOADS))
            yield Judged(section(SESSIONS, 1))

    with FakeEndpoint(model) as fake:
        options = SynthesizeOptions(
            writer=f"big@{fake.url}", batch=True, retry_wait=0.01, answers_dir=str(tmp_path / "a")
        )
        stage = run(Synthesize(options), [Here()], tmp_path / "work")
        assert [r.meta["section"] for r in stage.records()] == ["s0", "s1"]
        assert stage.counts.rows == 2 and stage.counts.kept == 2 and stage.counts.codes == {"S012": 1}
        assert [v["code"] for v in stage.verdicts()] == ["S012"] and len(fake.batches) == 3
        assert stage.summary["numbers"]["written"] == {"qa": 3}
        count = len(fake.requests)
        again = run(Synthesize(options), [Here()], tmp_path / "work")
        assert len(fake.requests) == count and again.summary["yield of qa"] == stage.summary["yield of qa"]


@pytest.mark.parametrize(
    "bad,said",
    [
        (dict(writer=""), "writer: name the model"),
        (dict(writer="w", kinds=["qa", "qa"]), "kinds="),
        (dict(writer="w", votes=-1), "votes=-1"),
        (dict(writer="w", agree=0.0), "agree=0.0"),
    ],
)
def test_wrong_options(bad, said):
    with pytest.raises(UserError, match=said):
        SynthesizeOptions(**bad)


def test_prompts_of_ones_own(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "rules.jinja").write_text("- Be brief.\n")
    assert "- Be brief." in Prompts(own)("qa", text="t", title="", breadcrumb="", count=2)
    assert Prompts(own).hash("qa") != Prompts().hash("qa") and Prompts(own).hash("judge") == Prompts().hash(
        "judge"
    )
    (own / "qq.jinja").write_text("x")
    with pytest.raises(UserError, match="to replace are"):
        Prompts(own)


def test_reading_answers():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for text in (
        '{"a": 1}',
        '```json\n{"a": 1}\n```',
        'So: {"a": 1}.',
        '<think>{"a": "x"}</think>\n{"a": 1}',
    ):
        assert read(Answer(text), schema) == {"a": 1}
    for text, code in (('{"a": "x"}', "S005"), ("none", "S004"), ("[1]", "S005"), ("<think>{}", "S004")):
        with pytest.raises(Malformed) as e:
            read(Answer(text), schema)
        assert e.value.code == code, text
    assert list(read_items(Answer(json.dumps([COOKIE])), "qa")) == [COOKIE]
    assert list(read_items(Answer(json.dumps(COOKIE)), "qa")) == [COOKIE]
    # what stands whole before the place where the JSON breaks off is taken, and the rest accounted for
    cut = json.dumps({"items": [COOKIE, LIMIT]})[:-40]
    for finish, code in (("length", "S003"), ("stop", "S004")):
        first, rest = read_items(Answer(cut, finish), "qa")
        assert first == COOKIE and isinstance(rest, Malformed) and rest.code == code
    with pytest.raises(Malformed):
        list(read_items(Answer(cut[:30]), "qa"))
