import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint

from ftjax.data.record import Record
from ftjax.data.score import Forward, Score, ScoreOptions
from ftjax.errors import UserError
from ftjax.recipes import chat

TINY = str(Path(__file__).parent.parent / "assets" / "tiny_model")


@pytest.fixture(scope="module")
def speaker():
    return chat.load(TINY)


def chat_record(*turns, **more):
    roles = ("user", "assistant")
    return Record(
        "sft", [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], where="f:1", **more
    )


RECORDS = [
    chat_record("good morning", "a fine day to you"),
    chat_record("what is it?", "it is red.", "and then?", "then it is blue and red again"),
    Record("lm", text="once there was a day"),
    Record(
        "preference",
        [{"role": "user", "content": "which?"}],
        chosen=[{"role": "assistant", "content": "this one"}],
        rejected=[{"role": "assistant", "content": "none of them at all"}],
    ),
]


def test_perplexity_and_ifd_equal_transformers(speaker):
    """The same tokens through transformers' model, one document at a time, unpadded."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    forward = Forward(speaker, ScoreOptions(model=TINY))
    tokenizer = speaker.generator.tokenizer

    def losses(ids):
        with torch.no_grad():
            logp = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [-logp[t - 1, ids[t]].item() for t in range(1, len(ids))]

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for record, found in zip(RECORDS, forward.scores(RECORDS), strict=True):
        assert isinstance(found, dict)
        if record.task == "lm":
            ids = forward.renderer.render(record).tokens.tolist()
            assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses(ids))), rel=1e-4)
            assert found["tokens"] == len(ids) - 1 and "ifd" not in found
            continue
        # the spans that are trained, by hand from the text: each answer with its end-of-turn token
        messages = record.messages + record.chosen
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = ids_of(text)
        given, alone, count, at = 0.0, 0.0, 0, 0
        conditional = losses(whole)
        for message in messages:
            if message["role"] != "assistant":
                continue
            answer = ids_of(message["content"] + tokenizer.eos_token)
            at = next(i for i in range(at, len(whole)) if whole[i : i + len(answer)] == answer)
            given += sum(conditional[at - 1 : at - 1 + len(answer)])
            alone += sum(losses([start, *answer]))
            count += len(answer)
            at += len(answer)
        assert found["tokens"] == count
        assert found["perplexity"] == pytest.approx(math.exp(given / count), rel=1e-4)
        assert found["perplexity_alone"] == pytest.approx(math.exp(alone / count), rel=1e-4)
        assert found["ifd"] == pytest.approx(math.exp((given - alone) / count), rel=1e-4)


class OnThisMachine(Score):
    def local(self, name):
        return chat.load(name)


def test_what_has_no_scores_goes_on_with_a_note():
    long = chat_record("x", "day " * 200)
    records = [RECORDS[0], Record("prompt_only", [{"role": "user", "content": "q"}], where="f:2"), long]
    judged = list(OnThisMachine(ScoreOptions(model=TINY, max_length=64)).apply(records, None, 0))
    assert [j.record is not None for j in judged] == [True] * 3
    assert {"tokens", "perplexity", "ifd", "length"} <= set(judged[0].record.meta["scores"])
    assert judged[0].record.meta["scores"]["length"] == 5
    notes = [[v.code for v in j.verdicts if v.code != "Q001"] for j in judged]
    assert notes == [[], ["Q002"], ["Q002"]] and "more than max_length=64" in judged[2].verdicts[0].text
    assert judged[2].record.meta["scores"] == {"length": 200}


def test_ifd_of_one_and_more_is_noted(speaker):
    many = [chat_record(f"say {w} {i}", f"{w} it is {i}") for i in range(6) for w in ("red", "blue")]
    judged = list(OnThisMachine(ScoreOptions(model=TINY)).apply(many, None, 0))
    for one in judged:
        high = one.record.meta["scores"]["ifd"] >= 1
        assert [v.code for v in one.verdicts] == ["Q001"] * high
    assert 0 < sum(bool(j.verdicts) for j in judged)


@pytest.mark.fast
def test_the_judge_rates(tmp_path):
    votes = iter([(2, 5), (4, 5), (1, 1), None, (3, 9), (3, 3)])

    def reply(body, number):
        vote = next(votes)
        if vote is None:
            return "I can't."
        return json.dumps({"reason": "r", "complexity": vote[0], "quality": vote[1]})

    records = [chat_record("q one", "a"), chat_record("q two", "b"), RECORDS[3]]
    with FakeEndpoint(reply) as fake:
        options = ScoreOptions(
            judge=f"j@{fake.url}", votes=2, concurrency=1, answers_dir=str(tmp_path), prices={"j": [1.0, 1.0]}
        )
        step = Score(options)
        assert step.gathers
        estimate = step.decide([step.facts(records, 0)])
        assert estimate["requests"] == 6
        judged = list(step.apply(records, estimate, 0))
        assert "[user]\nq one" in fake.requests[0]["messages"][0]["content"]
        assert "this one" in fake.requests[4]["messages"][0]["content"]
        scores = [j.record.meta["scores"] for j in judged]
        assert scores[0] == {"length": 1, "complexity": 3.0, "quality": 5.0}
        assert scores[1] == {"length": 1, "complexity": 1.0, "quality": 1.0}  # of the one vote
        assert scores[2]["quality"] == 3.0  # 9 is no rating
        assert [[v.code for v in j.verdicts] for j in judged] == [[], ["Q003"], ["Q003"]]
        assert "6 requests" in step.summary(estimate)["cost"]


@pytest.mark.fast
def test_wrong_options():
    with pytest.raises(UserError, match="votes=0"):
        ScoreOptions(votes=0)
