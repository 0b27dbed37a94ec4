import logging
import time
from email.utils import formatdate

import pytest
from fake_endpoint import FakeEndpoint, Misbehave

from ftjax.data.endpoint import Endpoint, EndpointOptions, Models
from ftjax.data.writer import Answers, Ask, Usage
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def ask(text, **more):
    return Ask([{"role": "user", "content": text}], **more)


def echo(body, number):
    return "to " + body["messages"][-1]["content"]


@pytest.fixture
def opened(tmp_path):
    """opened(fake, **options): an Endpoint whose answers are kept in this test's folder."""

    def open_it(fake, usage=None, **options):
        options = EndpointOptions(retry_wait=0.01, **options)
        usage = usage or Usage(options.max_cost)
        return Endpoint(f"m@{fake.url}", options, Answers(tmp_path / "answers"), usage)

    return open_it


@pytest.fixture
def flaky():
    """A reply function that misbehaves so at each text's first request, and then answers."""

    def made(**how):
        seen = set()

        def reply(body, number):
            text = body["messages"][-1]["content"]
            if text not in seen:
                seen.add(text)
                raise Misbehave(**how)
            return "to " + text

        return reply

    return made


def test_answers_are_in_order_and_asked_once(opened):
    with FakeEndpoint(echo) as fake:
        endpoint = opened(fake, concurrency=3)
        asks = [ask(f"q{i}") for i in range(9)] + [ask("q0")]
        counted = []
        found = endpoint.answer(asks, counted.append)
        assert [a.text for a in found] == [f"to q{i}" for i in range(9)] + ["to q0"]
        assert len(fake.requests) == 9 and fake.most_at_once <= 3 and sum(counted) == 10
        assert (found[0].prompt_tokens, found[0].new_tokens) == (10, 5)
        body = fake.requests[0]
        assert body["model"] == "m" and body["max_tokens"] == 512 and body["temperature"] == 0.0
        assert "response_format" not in body and "stream" not in body
        # another process, another client: nothing is asked again; another sample, schema or seed is
        again = opened(fake)
        assert again.answer(asks) == found and len(fake.requests) == 9 and again.usage.cached == 9
        again.answer([ask("q0", sample=1), ask("q0", schema=SCHEMA)])
        opened(fake, seed=7).answer([ask("q0")])
        assert len(fake.requests) == 12 and fake.requests[-1]["seed"] == 7


@pytest.mark.parametrize(
    "how",
    [
        dict(status=500),
        dict(status=429),
        dict(status=503),
        dict(cut=True),
        dict(raw=b'{"choices": [{"mess'),
        dict(raw=b"<html>gateway</html>"),
        dict(raw=b'{"object": "list"}'),
        dict(wait=0.6),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_lost_is_asked_again(opened, flaky, how, stream):
    with FakeEndpoint(flaky(**how)) as fake:
        endpoint = opened(fake, stream=stream, timeout=0.3)
        assert [a.text for a in endpoint.answer([ask("x"), ask("y")])] == ["to x", "to y"]
        assert len(fake.requests) == 4 and endpoint.usage.retries == 2


def test_streams_give_text_usage_and_finish(opened):
    with FakeEndpoint(lambda body, n: {"text": "abcdefg", "finish": "length", "new_tokens": 7}) as fake:
        (answer,) = opened(fake, stream=True).answer([ask("x")])
        assert (answer.text, answer.finish, answer.new_tokens) == ("abcdefg", "length", 7)


@pytest.mark.parametrize("after", ["0.4", None])
def test_retry_after_holds_for_all(opened, after):
    began = []

    def reply(body, number):
        began.append(time.monotonic())
        if number == 0:
            # a date has no parts of seconds, so one second from now is 0 to 1 s away
            raise Misbehave(429, headers={"Retry-After": after or formatdate(time.time() + 2, usegmt=True)})
        return "yes"

    with FakeEndpoint(reply) as fake:
        endpoint = opened(fake, concurrency=1)
        endpoint.answer([ask("x"), ask("y")])
        assert began[1] - began[0] >= (0.38 if after else 0.9) and len(began) == 3


def test_too_long_a_wait_and_an_empty_account_end_the_run(opened):
    def busy(body, number):
        raise Misbehave(429, headers={"Retry-After": "3600"})

    with FakeEndpoint(busy) as fake, pytest.raises(UserError, match="asks to wait 3600 s"):
        opened(fake).answer([ask("x")])

    def broke(body, number):
        raise Misbehave(429, "You exceeded your current quota, code insufficient_quota")

    with FakeEndpoint(broke) as fake, pytest.raises(UserError, match="nothing left"):
        opened(fake).answer([ask("x")])


def test_a_lost_question_is_a_failure_and_a_dead_endpoint_an_error(opened):
    def reply(body, number):
        if body["messages"][0]["content"].startswith("bad"):
            raise Misbehave(500, "boom")
        return "fine"

    with FakeEndpoint(reply) as fake:
        endpoint = opened(fake, retries=2, concurrency=1)
        bad, good = endpoint.answer([ask("bad"), ask("good")])
        assert bad.failed == "lost" and "boom" in bad.text and "3 tries" in bad.text and good.text == "fine"
        assert len(fake.requests) == 4
        endpoint.answer([ask("bad"), ask("good")])  # a failure is not kept
        assert len(fake.requests) == 7
        with pytest.raises(UserError, match="same command goes on"):
            endpoint.answer([ask("bad2"), ask("bad3"), ask("bad4"), ask("bad5")])
    gone = opened(fake, retries=1, concurrency=1)
    assert gone.answer([ask("good")])[0].text == "fine"  # kept
    with pytest.raises(UserError, match="no connection"):
        gone.answer([ask(f"new {i}") for i in range(4)])


def test_the_key_is_sent_and_nowhere_else(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-secret-4711")

    def reply(body, number):
        if body["messages"][0]["content"] == "tell":
            return "the key is sk-secret-4711"
        raise Misbehave(int(body["messages"][0]["content"]), "wrong key sk-secret-4711 given")

    with FakeEndpoint(reply) as fake:
        endpoint = opened(fake, key_env="MY_KEY", retries=0)
        assert endpoint.answer([ask("tell")])[0].text == "the key is [key]"
        assert fake.headers[0]["Authorization"] == "Bearer sk-secret-4711"
        for status in ("401", "403", "404"):
            with pytest.raises(UserError, match="wrong key .key. given|no such thing") as e:
                endpoint.answer([ask(status)])
            assert "4711" not in str(e.value)
        for status in ("400", "500"):
            (failed,) = endpoint.answer([ask(status)])
            assert failed.failed and "4711" not in failed.text
        for file in (tmp_path / "answers").iterdir():
            assert b"sk-secret-4711" not in file.read_bytes()
        opened(fake).answer([ask("tell")])  # kept: no request; and without a variable's name no key
        opened(fake, seed=1).answer([ask("tell")])
        assert "Authorization" not in fake.headers[-1]
    assert "4711" not in repr(endpoint.options) + repr(endpoint.identity)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="MY_KEY is not set"):
        opened(fake, key_env="MY_KEY")


def test_redirects_are_not_followed(opened, monkeypatch):
    monkeypatch.setenv("MY_KEY", "k")
    with FakeEndpoint(echo) as other:

        def reply(body, number):
            raise Misbehave(307, headers={"Location": other.url + "/chat/completions"})

        with FakeEndpoint(reply) as fake, pytest.raises(UserError, match="redirect"):
            opened(fake, key_env="MY_KEY").answer([ask("x")])
        assert not other.requests


def test_what_the_endpoint_does_not_take_is_left_out_and_said(opened, caplog):
    def reply(body, number):
        kind = body.get("response_format", {}).get("type")
        if kind in ("json_schema", "json_object"):
            raise Misbehave(400, f"response_format {kind} is not supported")
        if "max_tokens" in body:
            raise Misbehave(400, "'max_tokens' is not supported. Use 'max_completion_tokens' instead.")
        if "temperature" in body:
            raise Misbehave(400, "'temperature' does not support 0.0 with this model")
        if "seed" in body:
            raise Misbehave(422, '[{"loc": ["body", "seed"]}]')
        return "done"

    with FakeEndpoint(reply) as fake, caplog.at_level(logging.WARNING, "ftjax"):
        endpoint = opened(fake, concurrency=4)
        found = endpoint.answer([ask(f"x{i}", schema=SCHEMA) for i in range(4)])
        assert {a.text for a in found} == {"done"}
        assert fake.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA
        assert set(fake.requests[-1]) == {"model", "messages", "max_completion_tokens"}
        before = len(fake.requests)
        endpoint.answer([ask("later", schema=SCHEMA)])
        assert len(fake.requests) == before + 1
    assert "json_mode=none" in caplog.text and "`temperature`" in caplog.text and "`seed`" in caplog.text


def test_a_refused_question_is_a_failure(opened):
    def reply(body, number):
        if body["messages"][0]["content"] == "long":
            raise Misbehave(400, "maximum context length exceeded")
        return {"finish": "content_filter"} if body["messages"][0]["content"] == "bad" else "fine"

    with FakeEndpoint(reply) as fake:
        long, bad, fine = opened(fake).answer([ask("long"), ask("bad"), ask("fine")])
        assert long.failed == bad.failed == "refused" and fine.text == "fine"
        assert "maximum context" in long.text and "content_filter" in bad.text


def test_requests_and_tokens_a_minute(opened):
    with FakeEndpoint(echo) as fake:
        start = time.monotonic()
        opened(fake, requests_per_minute=600).answer([ask(f"q{i}") for i in range(5)])
        assert time.monotonic() - start >= 0.4  # one each 0.1 s, the first at once
        start = time.monotonic()
        # 15 of the tokens expected are used, and the others given back
        few = [ask(f"p{i}", max_tokens=100) for i in range(4)]
        opened(fake, tokens_per_minute=60_000, concurrency=1).answer(few)
        assert 0.04 <= time.monotonic() - start < 0.35


def test_cost_is_counted_and_stops_before_the_limit(opened):
    prices = {"m": [1.0, 10.0]}
    with FakeEndpoint(lambda body, n: {"text": "x", "prompt_tokens": 100, "new_tokens": 20}) as fake:
        endpoint = opened(fake, prices=prices)
        endpoint.answer([ask(f"q{i}") for i in range(3)])
        assert endpoint.usage.cost == pytest.approx(3 * (100 * 1 + 20 * 10) / 1e6)
        # each costs 0.0003 and at the most about 0.0053 (512 new tokens)
        limited = opened(fake, prices=prices, max_cost=0.007, concurrency=4)
        found = limited.answer([ask(f"q{i}") for i in range(40)])  # the first three are kept, so free
        assert limited.usage.cost <= 0.007
        done = [a for a in found if not a.failed]
        assert [a.failed for a in found if a.failed] == ["cost"] * (40 - len(done))
        assert 3 + 3 < len(done) < 40 and "max_cost=0.007 is reached" in found[-1].text
        assert limited.usage.cost == pytest.approx((len(done) - 3) * 3e-4)
        count = len(fake.requests)
        assert opened(fake, prices=prices, max_cost=0.0).answer([ask("q39z")])[0].failed == "cost"
        assert len(fake.requests) == count
        # the rest, where the limit allows: nothing is paid for twice
        rest = opened(fake, prices=prices, max_cost=1.0)
        assert not any(a.failed for a in rest.answer([ask(f"q{i}") for i in range(40)]))
        assert len(fake.requests) == 40
    with pytest.raises(UserError, match="max_cost: what m costs is not known"):
        opened(fake, max_cost=1.0)


def test_a_lost_stream_counts_as_paid_for(opened, flaky):
    with FakeEndpoint(flaky(cut=True)) as fake:
        endpoint = opened(fake, prices={"m": [1.0, 10.0]})
        endpoint.answer([ask("x")])
        assert endpoint.usage.cost > (512 * 10) / 1e6


@pytest.mark.parametrize("bad", [dict(concurrency=0), dict(prices={"m": [1.0]}), dict(max_cost=-1.0)])
def test_wrong_options(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        EndpointOptions(**bad)


@pytest.mark.parametrize("name", ["m@ftp://x", "@http://x", "m@http://user:pw@x"])
def test_wrong_names(name, tmp_path):
    with pytest.raises(UserError, match="endpoint"):
        Endpoint(name, EndpointOptions(), Answers(tmp_path), Usage())


# ── batches ──


def test_batch(opened):
    def reply(body, number):
        if body["messages"][0]["content"] == "q2":
            raise Misbehave(400, "no")
        if body["messages"][0]["content"] == "q5":
            raise Misbehave(500, "boom")
        return echo(body, number)

    with FakeEndpoint(reply) as fake:
        endpoint = opened(fake, batch=True, prices={"m": [1.0, 10.0]})
        found = endpoint.answer([ask(f"q{i}") for i in range(6)])
        assert [a.text for a in found if not a.failed] == ["to q0", "to q1", "to q3", "to q4"]
        assert found[5].failed == "lost" and "status 500: boom" in found[5].text
        assert found[2].failed == "refused" and "status 400: no" in found[2].text
        assert len(fake.batches) == 1 and len(fake.files[fake.batches["batch-0"]["input"]].splitlines()) == 5
        assert endpoint.usage.cost == pytest.approx(4 * (10 * 1 + 5 * 10) / 1e6)
        again = opened(fake, batch=True)
        assert again.answer([ask("q0"), ask("q4")]) == [found[0], found[4]] and len(fake.batches) == 1


def test_a_batch_of_an_ended_run_is_waited_for_and_not_sent_again(opened, monkeypatch):
    with FakeEndpoint(echo) as fake:
        first = opened(fake, batch=True)
        fake.polls = 10**9

        def killed(id):
            raise KeyboardInterrupt

        monkeypatch.setattr(first, "_finished", killed)
        with pytest.raises(KeyboardInterrupt):
            first.answer([ask(f"q{i}") for i in range(5)])
        assert len(fake.batches) == 1
        fake.polls = 1
        found = opened(fake, batch=True).answer([ask(f"q{i}") for i in range(7)])
        assert [a.text for a in found] == [f"to q{i}" for i in range(7)]
        # q0 by itself, four in the first batch, the new two as one by itself and one
        assert len(fake.requests) == 7 and len(fake.batches) <= 2


def test_an_expired_batch_keeps_what_it_has(opened):
    def reply(body, number):
        if body["messages"][0]["content"] in ("q3", "q4"):
            raise Misbehave(cut=True)
        return echo(body, number)

    with FakeEndpoint(reply) as fake:
        fake.batch_status = "expired"
        found = opened(fake, batch=True).answer([ask(f"q{i}") for i in range(5)])
        assert [bool(a.failed) for a in found] == [False] * 3 + [True] * 2 and "is expired" in found[4].text


def test_batches_keep_to_the_cost_limit(opened):
    with FakeEndpoint(lambda body, n: {"text": "x", "prompt_tokens": 100, "new_tokens": 20}) as fake:
        endpoint = opened(fake, batch=True, prices={"m": [1.0, 10.0]}, max_cost=0.012)
        found = endpoint.answer([ask(f"q{i}") for i in range(40)])
        done = sum(not a.failed for a in found)
        assert endpoint.usage.cost == pytest.approx(done * 3e-4) and endpoint.usage.cost <= 0.012
        assert 10 < done < 40 and len(fake.batches) > 1


def test_a_key_goes_to_its_host_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("ONE", "first-key")
    monkeypatch.setenv("TWO", "second-key")
    with FakeEndpoint(echo) as one, FakeEndpoint(echo) as two, FakeEndpoint(echo) as three:
        hosts = [fake.url.removeprefix("http://").removesuffix("/v1") for fake in (one, two)]
        named = EndpointOptions(key_env=f"{hosts[0]}=ONE, {hosts[1]}=TWO", answers_dir=str(tmp_path))
        models = Models(named, lambda name: pytest.fail(name))
        for fake, sent in ((one, "Bearer first-key"), (two, "Bearer second-key"), (three, None)):
            models.open(f"m@{fake.url}").answer([ask("x")])
            assert fake.headers[0].get("Authorization") == sent
        models = Models(
            EndpointOptions(key_env="ONE", answers_dir=str(tmp_path)), lambda name: pytest.fail(name)
        )
        models.open(f"m@{one.url}")
        models.open(f"other@{one.url}")
        with pytest.raises(UserError, match="whose key is it"):
            models.open(f"m@{two.url}")


def test_a_key_sent_in_the_clear_is_warned_of(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MY_KEY", "sk-secret-4711")
    for url, warned in (
        ("http://example.org/v1", 1),
        ("https://example.org/v1", 0),
        ("http://localhost:1", 0),
    ):
        caplog.clear()
        Endpoint(f"m@{url}", EndpointOptions(key_env="MY_KEY"), Answers(tmp_path), Usage())
        assert caplog.text.count("unencrypted") == warned and "4711" not in caplog.text
