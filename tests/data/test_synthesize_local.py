"""The local model as writer, judge and base: a tiny one for what is exact, SmolLM2 for the whole of it."""

import os
from pathlib import Path

import pytest
from test_synthesize import UPLOADS, section

from ftjax.data.synthesize import Synthesize, SynthesizeOptions
from ftjax.data.writer import Answers, Ask, Local, Usage
from ftjax.recipes import chat

TINY = str(Path(__file__).parent.parent / "assets" / "tiny_model")
SMOLLM2 = os.environ.get("FTJAX_TEST_SMOLLM2", "")


class OnThisMachine(Synthesize):
    def local(self, name):
        return chat.load(name)


@pytest.fixture(scope="module")
def tiny_speaker():
    return chat.load(TINY)


def test_local_answers_do_not_depend_on_what_is_asked_together(tiny_speaker, tmp_path):
    asks = [
        Ask([{"role": "user", "content": text}], max_tokens=8, temperature=heat, sample=sample, opening="so")
        for text in ("good", "bad day")
        for heat, sample in ((0.0, 0), (0.9, 1))
    ]
    usage = Usage()
    together = Local(tiny_speaker, Answers(tmp_path / "a"), usage).answer(asks)
    apart = Local(tiny_speaker, Answers(tmp_path / "b"), Usage())
    assert [apart.answer([asks[i]])[0] for i in (3, 1)] == [together[3], together[1]]
    assert len({a.text for a in together}) > 2  # a sample is not the greedy answer
    assert all(a.text.startswith("so") for a in together)
    assert usage.requests == 4 and usage.new_tokens == sum(a.new_tokens for a in together)
    assert Local(tiny_speaker, Answers(tmp_path / "a"), usage).answer(asks) == together
    assert usage.requests == 4 and usage.cached == 4


def test_too_long_a_prompt_is_refused_and_the_others_answered(tiny_speaker, tmp_path):
    room = tiny_speaker.generator.model.config.max_position_embeddings
    texts = ("good " * room, "good")
    long, short = (Ask([{"role": "user", "content": text}], max_tokens=4) for text in texts)
    refused, answered = Local(tiny_speaker, Answers(tmp_path), Usage()).answer([long, short])
    assert refused.failed == "refused" and f"context of {TINY} {room}" in refused.text
    assert not answered.failed and answered.new_tokens > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path(SMOLLM2).is_file(), reason="FTJAX_TEST_SMOLLM2 names no GGUF file")
def test_smollm2(tmp_path):
    options = SynthesizeOptions(
        writer=SMOLLM2,
        base=SMOLLM2,
        votes=1,
        tries=2,
        count=2,
        max_tokens=96,
        temperature=0.0,
        answers_dir=str(tmp_path),
    )
    step = OnThisMachine(options)
    sections = [section(UPLOADS)]
    estimate = step.decide([step.facts(sections, 0)])
    judged = list(step.apply(iter(sections), estimate, 0))
    tally = step.tally()
    # 135 M parameters seldom write what was asked for; whatever they write is accounted for
    assert tally.sections == tally.asked["qa"] == 1 == estimate["writing"]
    kept = sum(j.record is not None for j in judged)
    assert len(judged) == tally.unread["qa"] + tally.written["qa"] and kept == tally.passed["qa"]["judge"]
    assert all(j.verdicts[0].code.startswith("S") for j in judged if j.record is None)
    used = step.summary(estimate)["numbers"]["used"]
    assert used["requests"] >= 1 and used["new_tokens"] > 10 and used["cost"] == 0
    # the base's part by itself, since it may be that no pair got so far
    base = step.roles().base
    assert base is not None
    asked = [{"role": "user", "content": "What is the capital of France? Answer in a word."}]
    assert "Paris" in base.answer([Ask(asked, max_tokens=16)])[0].text
    # again, and nothing is asked
    again = OnThisMachine(options)
    again._roles = step._roles
    before = used["requests"] + 1
    assert list(again.apply(iter(sections), None, 0)) == judged
    assert base.usage.requests == before
