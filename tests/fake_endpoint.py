"""An endpoint of OpenAI's form on this machine that answers by a function, and misbehaves where told to."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable
from typing import Any


class Misbehave(Exception):
    """What a reply function raises instead of answering: a status with headers and a text, a cut, a wait."""

    def __init__(self, status=0, text="", headers=None, cut=False, wait=0.0, raw=None):
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers or {}
        self.cut, self.wait, self.raw = cut, wait, raw


class FakeEndpoint:
    """`reply(body, number)` gives the text of the answer to the number-th request (from 0), or a dict of
    what to change in it; `url` is what to ask. `requests` are the bodies as they came, `headers` theirs."""

    def __init__(self, reply: Callable[[dict, int], Any]):
        self.reply, self.requests, self.headers, self.files, self.batches = reply, [], [], {}, {}
        self.polls = 1  # how often a batch is looked at before it is done
        self.batch_status = "completed"
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                fake._post(self)

            def do_GET(self):
                fake._get(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def _post(self, handler) -> None:
        data = handler.rfile.read(int(handler.headers["Content-Length"]))
        if handler.path == "/v1/files":
            edge = handler.headers["Content-Type"].partition("boundary=")[2].encode()
            parts = [part.partition(b"\r\n\r\n")[2].strip() for part in data.split(b"--" + edge)[1:-1]]
            assert parts[0] == b"batch"
            name = f"file-{len(self.files)}"
            self.files[name] = parts[1]
            return _send(handler, {"id": name})
        body = json.loads(data)
        if handler.path == "/v1/batches":
            assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
            name = f"batch-{len(self.batches)}"
            self.batches[name] = {
                "id": name,
                "status": "in_progress",
                "input": body["input_file_id"],
                "seen": 0,
            }
            return _send(handler, self.batches[name])
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._chat(handler, body, number)
        finally:
            with self._lock:
                self._now -= 1

    def _chat(self, handler, body, number) -> None:
        try:
            answer = self._answer(body, number)
        except Misbehave as e:
            if e.wait:
                time.sleep(e.wait)
            if e.status:
                return _send(handler, {"error": {"message": e.text}}, e.status, e.headers)
            if e.raw is not None:
                return _send(handler, e.raw)
            answer = completion(e.text or "half an answer")
            if e.cut:
                return self._cut(handler, body, answer)
        if body.get("stream"):
            return _stream(handler, answer, body)
        _send(handler, answer)

    def _answer(self, body, number) -> dict:
        made = self.reply(body, number)
        return completion(**made) if isinstance(made, dict) else completion(made)

    def _cut(self, handler, body, answer) -> None:
        data = json.dumps(answer).encode()
        handler.send_response(200)
        if body.get("stream"):
            handler.send_header("Content-Type", "text/event-stream")
            event = {"choices": [{"delta": {"content": "half"}, "finish_reason": None}]}
            data = b"data: " + json.dumps(event).encode() + b"\n\n"
        else:
            handler.send_header("Content-Length", str(len(data)))
            data = data[: len(data) // 2]
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(data)
            handler.wfile.flush()
        handler.close_connection = True

    def _get(self, handler) -> None:
        *_, kind, name = handler.path.removesuffix("/content").split("/")
        if kind == "files":
            return _send(handler, self.files[name])
        batch = self.batches[name]
        batch["seen"] += 1
        if batch["seen"] > self.polls and batch["status"] == "in_progress":
            batch["status"] = self.batch_status
            right, wrong = [], []
            for line in self.files[batch["input"]].splitlines():
                row = json.loads(line)
                number = len(self.requests)
                self.requests.append(row["body"])
                try:
                    response = {"status_code": 200, "body": self._answer(row["body"], number)}
                    right.append({"custom_id": row["custom_id"], "response": response, "error": None})
                except Misbehave as e:
                    if e.cut:
                        continue  # the batch ended before this one
                    response = {"status_code": e.status, "body": {"error": {"message": e.text}}}
                    wrong.append({"custom_id": row["custom_id"], "response": response, "error": None})
            for key, rows in (("output_file_id", right[::-1]), ("error_file_id", wrong)):  # in no order
                if rows:
                    batch[key] = f"{name}-{key}"
                    self.files[batch[key]] = b"\n".join(json.dumps(row).encode() for row in rows)
        _send(handler, batch)


def completion(text="", finish="stop", prompt_tokens=10, new_tokens=5, **message) -> dict:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish,
    }
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


def _send(handler, value, status=200, headers=None) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    with contextlib.suppress(OSError):
        handler.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(data)


def _stream(handler, answer, body) -> None:
    text = answer["choices"][0]["message"]["content"]
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in (text[:3], text[3:])]
    events.append({"choices": [{"delta": {}, "finish_reason": answer["choices"][0]["finish_reason"]}]})
    if body.get("stream_options"):
        events.append({"choices": [], "usage": answer["usage"]})
    data = (
        b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    )
    _send(handler, data, headers={"Content-Type": "text/event-stream"})
