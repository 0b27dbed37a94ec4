"""KnowledgeSDK (https://api.knowledgesdk.com) as a source: pages rendered and cleaned by that service.

`/v1/extract` has meant two things, and either answer is understood: one page as Markdown ("markdown"), and a
site's "knowledgeItems". A whole site is asked for as a job (`/v1/business/async`, formerly
`/v1/extract/async`) that is polled, since it takes minutes. The key is read from KNOWLEDGESDK_API_KEY for
each call, sent in the header x-api-key, and kept nowhere.
"""

import json
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from ftjax.data.extract.document import Unreadable
from ftjax.data.extract.fetch import request
from ftjax.errors import UserError

KEY = "KNOWLEDGESDK_API_KEY"
_DONE = ("completed", "complete", "succeeded", "success", "done", "finished")
_FAILED = ("failed", "error", "cancelled", "canceled", "expired")


class Item(NamedTuple):
    """One document of an answer."""

    url: str
    title: str
    markdown: str


class KnowledgeSDK:
    """The service at `base`; `timeout` in seconds for one call, and for a job until it is done."""

    def __init__(
        self,
        base: str,
        *,
        timeout: float = 180.0,
        job_timeout: float = 1800.0,
        poll: float = 5.0,
        sleep=time.sleep,
    ):
        self.base, self.timeout, self.job_timeout, self.poll = base.rstrip("/"), timeout, job_timeout, poll
        self.sleep = sleep
        if not os.environ.get(KEY):
            raise UserError(f"KnowledgeSDK needs a key: set the environment variable {KEY}")

    def page(self, url: str) -> list[Item]:
        """One page. Raises Unreadable (X014) with the service's own message."""
        return list(_items(self._call("POST", "/v1/extract", {"url": url}), url))

    def site(self, url: str, max_pages: int) -> list[Item]:
        """A site's pages, by a job. Raises Unreadable (X014)."""
        body = {"url": url, "maxPages": max_pages}
        try:
            job = self._call("POST", "/v1/business/async", body)
        except Unreadable as e:
            if "status 404" not in e.text:
                raise
            job = self._call("POST", "/v1/extract/async", {**body, "maxPages": min(max_pages, 20)})
        if "jobId" not in job:  # answered at once
            return list(_items(job, url))
        began = time.monotonic()
        while True:
            state = self._call("GET", f"/v1/jobs/{job['jobId']}", None)
            status = str(state.get("status", "")).lower()
            if status in _DONE:
                result = next(
                    (state[k] for k in ("result", "data", "output") if isinstance(state.get(k), dict)), state
                )
                return list(_items(result, url))
            if status in _FAILED:
                said = state.get("error") or state.get("message") or status
                raise Unreadable("X014", f"KnowledgeSDK's job {job['jobId']} failed: {said}")
            if time.monotonic() - began > self.job_timeout:
                raise Unreadable(
                    "X014", f"KnowledgeSDK's job {job['jobId']} is not done after {self.job_timeout:g} s"
                )
            self.sleep(self.poll)

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"x-api-key": os.environ.get(KEY, ""), "Accept": "application/json"}
        data = None
        if method == "POST":
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        try:
            answer = request(
                self.base + path, headers=headers, data=data, timeout=self.timeout, sleep=self.sleep
            )
        except OSError as e:
            raise Unreadable("X014", f"KnowledgeSDK does not answer: {e}") from None
        try:
            values = json.loads(answer.body)
        except ValueError:
            values = None
        if answer.status // 100 != 2:
            said = (
                f"{values.get('error', '')}: {values.get('message', '')}" if isinstance(values, dict) else ""
            )
            if answer.status in (401, 403):
                raise UserError(
                    f"KnowledgeSDK refuses the key in {KEY} (status {answer.status}) {said}".strip()
                )
            raise Unreadable(
                "X014", f"KnowledgeSDK answers status {answer.status} {said.strip(': ')}".strip()
            )
        if not isinstance(values, dict):
            raise Unreadable("X014", "KnowledgeSDK's answer is no JSON object")
        return values


def _items(answer: dict[str, Any], url: str) -> Iterator[Item]:
    """The documents of either shape of answer."""
    found = False
    if isinstance(answer.get("markdown"), str):
        found = True
        yield Item(str(answer.get("url") or url), str(answer.get("title") or ""), answer["markdown"])
    for number, item in enumerate(answer.get("knowledgeItems") or []):
        content = item.get("content") if isinstance(item, dict) else None
        if isinstance(content, str):
            found = True
            source = item.get("source")
            source = source if isinstance(source, str) and source else f"{url}#item-{number + 1}"
            yield Item(source, str(item.get("title") or ""), content)
    if not found:
        known = ", ".join(sorted(answer)) or "nothing"
        raise Unreadable(
            "X014", f'KnowledgeSDK\'s answer has neither "markdown" nor "knowledgeItems" ({known})'
        )
