"""Any endpoint that speaks OpenAI's chat completions, and its batch API.

The client is urllib in threads: an answer takes seconds, so what a connection pool or an event loop would
save does not show, and the base install needs no HTTP library for it.
"""

import contextlib
import email.utils
import hashlib
import http.client
import itertools
import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ftjax.data.writer import Answer, Answers, Ask, Local, Speaker, Usage, Writer, count_tokens, money
from ftjax.errors import UserError

log = logging.getLogger("ftjax")

LONGEST_WAIT = 600.0  # seconds that an endpoint may ask to wait; where it asks for more, the run ends
LOST_IN_A_ROW = 3  # questions that get no answer whatever is tried, one after another, before the run ends
BATCH_REQUESTS, BATCH_BYTES = 50_000, 150_000_000  # in one batch (OpenAI takes 50,000 and 200 MB)


@dataclass(frozen=True)
class EndpointOptions:
    """How an endpoint is asked. A model is named MODEL@URL, the URL being the one that ends before
    /chat/completions, e.g. gpt-4.1-mini@https://api.openai.com/v1; without @URL it is a local one."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    key_env: str = ""
    """The environment variable that holds the endpoint's key, e.g. OPENAI_API_KEY, and with several endpoints
    each one's, e.g. api.openai.com=OPENAI_API_KEY,localhost:8000=LOCAL_KEY. No key is sent without it, and
    none is stored or shown."""
    concurrency: int = 8
    """Requests under way at once."""
    requests_per_minute: float = 0.0
    """The most requests a minute; 0 is no limit of ours (what the endpoint says with 429 is kept to)."""
    tokens_per_minute: float = 0.0
    """The most tokens a minute, of prompts and answers together; 0 is no limit of ours."""
    timeout: float = 120.0
    """Seconds without a byte before a request counts as lost."""
    retries: int = 6
    """Tries after the first, for 408, 429, 5xx, timeouts, and connections or streams that are cut."""
    retry_wait: float = 1.0
    """Seconds before the first retry (and before the first look at a batch), doubled each time, at most 60; a
    Retry-After of the endpoint's goes before."""
    stream: bool = False
    """Ask for answers as streams, for endpoints behind proxies that end a request without traffic."""
    json_mode: Literal["schema", "object", "none"] = "schema"
    """How JSON is asked for: by its schema, as any JSON object, or in the prompt alone. What the endpoint
    does not take is found out, and said."""
    batch: bool = False
    """Ask through the batch API (files and batches), cheaper and within a day; a run that is ended meanwhile
    goes on with the batches it had sent."""
    prices: dict[str, list[float]] = field(default_factory=dict)
    """What a million tokens of prompts and of answers cost by model, e.g. {gpt-4.1-mini: [0.4, 1.6]}."""
    max_cost: float | None = None
    """Stop before the requests of this run cost more, in the money of `prices`."""
    answers_dir: str | None = None
    """Folder of the answers that are kept; the environment's FTJAX_CACHE, else ~/.cache/ftjax, and answers in
    it if absent."""
    seed: int = 0
    """Another seed asks everything anew."""

    def __post_init__(self):
        for name, right, said in (
            ("concurrency", self.concurrency >= 1, "at least 1"),
            ("requests_per_minute", self.requests_per_minute >= 0, "0 (no limit) or more"),
            ("tokens_per_minute", self.tokens_per_minute >= 0, "0 (no limit) or more"),
            ("timeout", self.timeout > 0, "seconds, above 0"),
            ("retries", self.retries >= 0, "0 or more"),
            ("retry_wait", self.retry_wait >= 0, "seconds, 0 or more"),
            ("max_cost", self.max_cost is None or self.max_cost >= 0, "0 or more"),
        ):
            if not right:
                raise UserError(f"{name}={getattr(self, name)}: {said}")
        for model, price in self.prices.items():
            if len(price) != 2 or min(price) < 0:
                raise UserError(
                    f"prices: {model}: {price}: give two numbers, what a million tokens of prompts and "
                    "answers cost, e.g. [0.4, 1.6]"
                )


class _Lost(Exception):
    """A try that may be repeated."""

    def __init__(self, why: str, wait: float | None = None, billed: bool = False):
        super().__init__(why)
        self.wait, self.billed = wait, billed  # billed: the model may have worked on it


class _Refused(Exception):
    """The endpoint does not take this request."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args):
        return None


class _Pace:
    """Keeps to so many units a minute."""

    def __init__(self, per_minute: float):
        self.per_minute, self._free = per_minute, 0.0

    def book(self, units: float, now: float) -> float:
        """Seconds to wait before `units` may be used."""
        if not self.per_minute:
            return 0.0
        start = max(now, self._free)
        self._free = start + units * 60 / self.per_minute
        return start - now

    def give_back(self, units: float) -> None:
        if self.per_minute:
            self._free -= units * 60 / self.per_minute


class Endpoint(Writer):
    """MODEL@URL, asked by OpenAI's chat completions; raises UserError for what is wrong with the name, the
    key's variable or the prices."""

    def __init__(self, name: str, options: EndpointOptions, answers: Answers, usage: Usage):
        super().__init__(answers, usage)
        self.name, _, url = name.rpartition("@")
        self.url, self.options = url.rstrip("/"), options
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https") or not self.name:
            raise UserError(
                f"{name}: an endpoint is named MODEL@URL, e.g. gpt-4.1-mini@https://api.openai.com/v1"
            )
        if urllib.parse.urlsplit(self.url).password is not None:
            raise UserError("an endpoint's URL has no password in it: name the key's variable with key_env")
        self._variable = key_variable(options.key_env, self.url)
        self._key = os.environ.get(self._variable, "").strip() if self._variable else ""
        if self._variable and not self._key:
            raise UserError(f"key_env: the environment variable {self._variable} is not set")
        place = urllib.parse.urlsplit(self.url)
        if self._key and place.scheme == "http" and place.hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("%s: the key of %s goes there unencrypted (http)", self.url, self._variable)
        price = options.prices.get(self.name)
        if price is None and options.max_cost is not None:
            raise UserError(
                f"max_cost: what {self.name} costs is not known; give what a million tokens of prompts and "
                f"of answers cost, e.g. prices={{{self.name}: [0.4, 1.6]}}"
            )
        self.price = price
        self.identity = [self.url, self.name, options.seed]
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._requests, self._tokens = _Pace(options.requests_per_minute), _Pace(options.tokens_per_minute)
        self._resume_at = 0.0  # when the endpoint, after a 429, takes requests again
        self._lost = 0
        self._stop = threading.Event()
        self._json_mode = options.json_mode
        self._token_limit = "max_tokens"
        self._without: set[str] = set()  # parameters that the endpoint does not take
        self._settled = False  # whether a request has gone through

    def cost(self, prompt_tokens: float, new_tokens: float) -> float:
        return (
            0.0 if self.price is None else (prompt_tokens * self.price[0] + new_tokens * self.price[1]) / 1e6
        )

    def _most(self, ask: Ask) -> float:
        """The most an ask costs: two bytes a token is more than any text at hand has."""
        return self.cost(len(json.dumps([ask.messages, ask.schema]).encode()) / 2 + 64, ask.max_tokens)

    def _ask(self, asks: Mapping[str, Ask]) -> Iterator[tuple[str, Answer]]:
        self._stop.clear()
        if self.options.batch and len(asks) > 1:
            yield from self._batches(asks)
            return
        pool = ThreadPoolExecutor(min(self.options.concurrency, len(asks)))
        try:
            futures = {pool.submit(self._one, ask): key for key, ask in asks.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            # answers that are under way are paid for, so they are kept
            for future, key in futures.items():
                with contextlib.suppress(Exception):
                    if not future.cancelled() and not (answer := future.result()).failed:
                        self.kept.put(key, answer)
            raise
        pool.shutdown()

    def _one(self, ask: Ask) -> Answer:
        """The answer, by as many tries as it takes."""
        most = self._most(ask)
        expected = count_tokens(json.dumps(ask.messages)) + ask.max_tokens
        tries = 0
        while True:
            if not self.usage.reserve(most):
                return _over_cost(self.usage)
            cost = 0.0
            try:
                self._wait_turn(expected)
                body = self._body(ask)
                self.usage.add(requests=1)
                answer = self._stream(body, ask) if self.options.stream else self._whole(body, ask)
                cost = self.cost(answer.prompt_tokens, answer.new_tokens)
                with self._lock:
                    self._lost, self._settled = 0, True
                    self._tokens.give_back(max(0, expected - answer.prompt_tokens - answer.new_tokens))
                return answer
            except _Refused as e:
                with self._lock:
                    if self._body(ask) == body and not self._adapt(str(e), body):
                        return Answer(str(e), failed="refused")
                continue
            except _Lost as e:
                cost, lost = most if e.billed else 0.0, e
            finally:
                self.usage.settle(most, cost)
            if tries == self.options.retries:
                return self._give_up(str(lost), tries + 1)
            self.usage.add(retries=1)
            if lost.wait is None:
                self._sleep(min(60.0, self.options.retry_wait * 2**tries) * random.uniform(0.5, 1.0))
            else:  # it holds for all requests
                with self._lock:
                    self._resume_at = max(self._resume_at, time.monotonic() + lost.wait)
            tries += 1

    def _give_up(self, why: str, tries: int) -> Answer:
        with self._lock:
            self._lost += 1
            if self._lost >= LOST_IN_A_ROW:
                raise UserError(
                    f"{self.url}: {self._lost} questions one after another got no answer in {tries} tries "
                    f"each; the last: {why}. What was answered is kept: the same command goes on from there"
                )
        return Answer(f"no answer in {tries} tries; the last: {why}", failed="lost")

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise UserError("stopped")

    def _wait_turn(self, tokens: int) -> None:
        with self._lock:
            now = time.monotonic()
            wait = max(self._requests.book(1, now), self._tokens.book(tokens, now))
        self._sleep(wait)
        while (wait := self._resume_at - time.monotonic()) > 0:
            self._sleep(wait)

    def _body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.name, "messages": ask.messages}
        body[self._token_limit] = ask.max_tokens
        body["temperature"] = ask.temperature
        body["seed"] = self.options.seed + ask.sample
        if ask.schema is not None and self._json_mode == "schema":
            described = {"name": "answer", "strict": True, "schema": ask.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        elif ask.schema is not None and self._json_mode == "object":
            body["response_format"] = {"type": "json_object"}
        if self.options.stream and not self.options.batch:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return {k: v for k, v in body.items() if k not in self._without}

    def _adapt(self, why: str, body: dict[str, Any]) -> bool:
        """Whether the request can be made without what the endpoint says that it does not take."""
        if "response_format" in body and any(
            w in why for w in ("response_format", "json_schema", "json_object")
        ):
            schema = body["response_format"]["type"] == "json_schema"
            self._json_mode = "object" if schema else "none"
            log.warning(
                "%s takes no such response_format: asked with json_mode=%s", self.url, self._json_mode
            )
            return True
        if "max_completion_tokens" in why and "max_tokens" in body:
            self._token_limit = "max_completion_tokens"
            return True
        for name in ("stream_options", "temperature", "seed"):
            if name in why and name in body:
                self._without.add(name)
                log.warning("%s does not take `%s`: asked without", self.url, name)
                return True
        return False

    def _whole(self, body: dict[str, Any], ask: Ask) -> Answer:
        return self._read(self._json(self._send("POST", "/chat/completions", body)), ask)

    def _stream(self, body: dict[str, Any], ask: Ask) -> Answer:
        pieces: list[str] = []
        usage = finish = None
        with self._open("POST", "/chat/completions", body) as response:
            for line in self._lines(response):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    break
                event = self._json(data)
                if event.get("error"):
                    raise _Lost(f"an error in the stream: {_said(event)}", billed=True)
                usage = event.get("usage") or usage
                for choice in event.get("choices") or []:
                    pieces.append((choice.get("delta") or {}).get("content") or "")
                    finish = choice.get("finish_reason") or finish
        if finish is None:
            raise _Lost("the stream was cut", billed=True)
        choice = {"message": {"content": "".join(pieces)}, "finish_reason": finish}
        return self._read({"usage": usage, "choices": [choice]}, ask)

    def _read(self, value: Any, ask: Ask) -> Answer:
        """The Answer of a chat completion's JSON."""
        try:
            choice = value["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason") or "stop"
            text, refusal = message.get("content"), message.get("refusal")
            usage = value.get("usage") or {}
            prompt = usage.get("prompt_tokens") or count_tokens(json.dumps(ask.messages))
            new = usage.get("completion_tokens") or count_tokens(text or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Lost(f"not a chat completion: {str(value)[:200]}", billed=True) from None
        self.usage.add(prompt_tokens=prompt, new_tokens=new)
        failed: Literal["", "refused"] = ""
        if finish == "content_filter" or refusal:
            text, failed = f"the endpoint would not answer: {refusal or finish}", "refused"
        if isinstance(text, list):  # parts, as some give
            text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
        return Answer(text or "", finish, prompt, new, failed)

    # ── HTTP ──

    def _lines(self, response) -> Iterator[bytes]:
        try:
            for line in response:
                yield self._hidden(line)
        except (OSError, http.client.HTTPException) as e:
            raise _Lost(f"the stream was cut: {e!r}", billed=True) from None

    def _send(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> bytes:
        with self._open(method, path, body, kind) as response:
            try:
                return self._hidden(response.read())
            except (OSError, http.client.HTTPException) as e:
                raise _Lost(f"the connection was cut: {type(e).__name__}", billed=True) from None

    def _hidden(self, data: bytes) -> bytes:
        """Some endpoints repeat the key in what they say."""
        return data.replace(self._key.encode(), b"[key]") if self._key else data

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError:
            raise _Lost(f"not JSON, or cut: {data[:100]!r}", billed=True) from None

    def _open(self, method: str, path: str, body: Any = None, kind: str = "application/json"):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": kind, "Accept": "application/json", "User-Agent": "ftjax"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            return self._opener.open(request, timeout=self.options.timeout)
        except urllib.error.HTTPError as e:
            with contextlib.suppress(OSError, http.client.HTTPException), e:
                said = _said(self._hidden(e.read()))
                raise self._status(e.code, said, e.headers) from None
            raise _Lost(f"status {e.code}, and the connection was cut") from None
        except TimeoutError:
            raise _Lost(f"nothing came for {self.options.timeout:g} s", billed=True) from None
        except urllib.error.URLError as e:
            if isinstance(e.reason, TimeoutError):
                raise _Lost(f"no connection in {self.options.timeout:g} s") from None
            raise _Lost(f"no connection: {e.reason}") from None
        except (OSError, http.client.HTTPException) as e:
            raise _Lost(f"the connection was cut: {type(e).__name__}", billed=True) from None

    def _status(self, code: int, said: str, headers) -> Exception:
        """What a status that is no success means."""
        if code in (401, 403):
            right = f"see that {self._variable} holds" if self._key else "name by key_env the variable of"
            return UserError(
                f"{self.url} refuses (status {code}: {said}): {right} a key that may use {self.name}"
            )
        if code == 404:
            return UserError(f"{self.url} has no such thing ({said}): see that it and {self.name} are right")
        if 300 <= code < 400:
            return UserError(
                f"{self.url} says that it is at {headers.get('Location', 'another place')}: give that URL (a "
                "redirect is not followed, since it would carry the key along)"
            )
        if code == 429 and ("insufficient_quota" in said or "billing" in said):
            return UserError(f"{self.url}: the account has nothing left: {said}")
        if code == 429 or code in (408, 409, 425) or code >= 500:
            wait = _retry_after(headers)
            if wait is not None and wait > LONGEST_WAIT:
                return UserError(
                    f"{self.url} asks to wait {wait:.0f} s: start the same command then; what was answered "
                    "is kept"
                )
            return _Lost(f"status {code}: {said}", wait, billed=code == 504)
        return _Refused(f"status {code}: {said}")

    # ── batches ──

    def _batches(self, asks: Mapping[str, Ask]) -> Iterator[tuple[str, Answer]]:
        under_way: dict[str, list[str]] = {}
        for key in asks:
            if (id := self.kept.batch(key)) is not None:
                under_way.setdefault(id, []).append(key)
        for id, keys in under_way.items():  # of a run that was ended
            yield from self._collect(id, keys, asks, 0.0)
        left = [key for key in asks if not any(key in keys for keys in under_way.values())]
        if left and not self._settled:  # one by itself, so that what the endpoint does not take is known
            key = left.pop(0)
            yield key, self._one(asks[key])
        while left:
            sent = []
            for keys, data, most in self._batch_files(left, asks):
                if not self.usage.reserve(most, wait=False):
                    break
                file = self._call("POST", "/files", *_multipart(data))["id"]
                wanted = {
                    "input_file_id": file,
                    "endpoint": "/v1/chat/completions",
                    "completion_window": "24h",
                }
                id = str(self._call("POST", "/batches", wanted)["id"])
                self.kept.put_batch(keys, id)
                sent.append((id, keys, most))
            if not sent:
                yield from ((key, _over_cost(self.usage)) for key in left)
                return
            left = left[sum(len(keys) for _, keys, _ in sent) :]
            for id, keys, most in sent:
                yield from self._collect(id, keys, asks, most)

    def _batch_files(
        self, keys: Sequence[str], asks: Mapping[str, Ask]
    ) -> Iterator[tuple[list[str], bytes, float]]:
        """(keys, the file's content, the most it costs) of each batch, none costing more than is left."""
        room = float("inf") if self.usage.max_cost is None else self.usage.max_cost - self.usage.cost
        some: list[str] = []
        data, most = bytearray(), 0.0
        for key in keys:
            one = {
                "custom_id": key,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": self._body(asks[key]),
            }
            line, price = json.dumps(one).encode() + b"\n", self._most(asks[key])
            full = len(some) == BATCH_REQUESTS or len(data) + len(line) > BATCH_BYTES or most + price > room
            if some and full:
                yield some, bytes(data), most
                some, data, most = [], bytearray(), 0.0
            some.append(key)
            data += line
            most += price
        if some:
            yield some, bytes(data), most

    def _collect(
        self, id: str, keys: list[str], asks: Mapping[str, Ask], most: float
    ) -> Iterator[tuple[str, Answer]]:
        """What a batch came to, waiting for it."""
        batch = self._finished(id)
        left, spent = set(keys), 0.0
        for key, answer in self._results(batch, asks):
            if key in left:
                left.discard(key)
                spent += self.cost(answer.prompt_tokens, answer.new_tokens)
                yield key, answer
        self.usage.settle(most, spent)
        self.kept.forget_batch(id)
        why = f"the batch {id} is {batch['status']}" + (
            f": {_said(batch['errors'])}" if batch.get("errors") else ""
        )
        if batch["status"] == "failed" and len(left) == len(keys):
            raise UserError(f"{self.url}: {why}")
        yield from ((key, Answer(why, failed="lost")) for key in left)

    def _finished(self, id: str) -> dict[str, Any]:
        wait = self.options.retry_wait
        while True:
            batch = self._call("GET", f"/batches/{urllib.parse.quote(id)}")
            if batch.get("status") in ("completed", "failed", "expired", "cancelled"):
                return batch
            self._sleep(wait)
            wait = min(60.0, wait * 2)

    def _results(self, batch: dict[str, Any], asks: Mapping[str, Ask]) -> Iterator[tuple[str, Answer]]:
        for name in ("output_file_id", "error_file_id"):
            if not batch.get(name):
                continue
            data = self._call("GET", f"/files/{urllib.parse.quote(batch[name])}/content", raw=True)
            for line in data.splitlines():
                if not line.strip():
                    continue
                row = self._json(line)
                key, response = row.get("custom_id"), row.get("response") or {}
                if key not in asks:
                    continue
                self.usage.add(requests=1)
                if row.get("error") or response.get("status_code", 0) != 200:
                    code = response.get("status_code", 0)
                    why = f"status {code}: {_said(row.get('error') or response.get('body') or {})}"
                    again = code == 429 or code >= 500 or not code
                    yield key, Answer(why, failed="lost" if again else "refused")
                    continue
                try:
                    yield key, self._read(response.get("body"), asks[key])
                except _Lost as e:
                    yield key, Answer(str(e), failed="lost")

    def _call(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", raw=False
    ) -> Any:
        """A request of the batch API, by as many tries as it takes."""
        for tries in itertools.count():
            try:
                data = self._send(method, path, body, kind)
                return data if raw else self._json(data)
            except _Refused as e:
                raise UserError(f"{self.url}{path}: {e}") from None
            except _Lost as e:
                if tries == self.options.retries:
                    raise UserError(
                        f"{self.url}{path}: {e}, after {tries + 1} tries; the same command goes on from there"
                    ) from None
                self.usage.add(retries=1)
                self._sleep(e.wait if e.wait is not None else min(60.0, self.options.retry_wait * 2**tries))


def _over_cost(usage: Usage) -> Answer:
    return Answer(f"max_cost={usage.max_cost:g} is reached ({money(usage.cost)} spent)", failed="cost")


def _multipart(data: bytes) -> tuple[bytes, str]:
    """(body, content type) of the upload of a batch's file."""
    edge = hashlib.sha256(data).hexdigest()[:32]
    head = (
        f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="batch.jsonl"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    )
    return head.encode() + data + f"\r\n--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}"


def _retry_after(headers) -> float | None:
    """Seconds, of a Retry-After that is a number or a date."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _said(answer: Any) -> str:
    """What an error says, in a line."""
    if isinstance(answer, bytes):
        try:
            answer = json.loads(answer)
        except ValueError:
            return " ".join(answer.decode("utf-8", "replace").split())[:300]
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        if isinstance(error, dict) and "message" in error:
            parts = [error["message"], *(error.get(k) for k in ("code", "param"))]
            return " ".join(", ".join(str(p) for p in parts if p).split())[:300]
        answer = error
    return " ".join(json.dumps(answer, ensure_ascii=False).split())[:300]


def key_variable(key_env: str, url: str) -> str:
    """The environment variable of an endpoint's key, of VAR or HOST=VAR,HOST=VAR; "" for none."""
    for one in filter(None, (part.strip() for part in key_env.split(","))):
        host, named, variable = one.partition("=")
        if not named or host == urllib.parse.urlsplit(url).netloc:
            return variable if named else one
    return ""


class Models:
    """What opens models by name: endpoints as MODEL@URL, others with `local`. One Usage counts for all."""

    def __init__(self, options: EndpointOptions, local: Callable[[str], Speaker]):
        self.options, self._local = options, local
        self.answers, self.usage = Answers(options.answers_dir), Usage(options.max_cost)
        self._hosts: set[str] = set()
        self._opened: dict[str, Writer] = {}

    def open(self, name: str) -> Writer:
        """The model of this name, opened once."""
        if name not in self._opened:
            self._opened[name] = self._open(name)
        return self._opened[name]

    def _open(self, name: str) -> Writer:
        if "@http" not in name:
            return Local(self._local(name), self.answers, self.usage, self.options.seed)
        self._hosts.add(urllib.parse.urlsplit(name.rpartition("@")[2]).netloc)
        if self.options.key_env and "=" not in self.options.key_env and len(self._hosts) > 1:
            raise UserError(
                f"key_env={self.options.key_env}: whose key is it, of {' or '.join(sorted(self._hosts))}? "
                "Say HOST=VARIABLE, so that it goes nowhere else"
            )
        return Endpoint(name, self.options, self.answers, self.usage)
