"""Polite HTTP: one request at a time, at a rate, by robots.txt, with retries, and a cache on disk.

By the standard library: what is wanted here (no redirect followed unseen, a limit on what is read, retries
that heed Retry-After) has to be said in any client, and the rest of httpx would be one more dependency.
"""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from ftjax.data.extract.document import Unreadable
from ftjax.data.extract.robots import Robots

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may be others a little later."""
LONGEST_WAIT = 300.0
"""Seconds; a server that asks for more is taken to refuse."""
MAX_REDIRECTS = 10


class _Unfollowed(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


_opener = urllib.request.build_opener(_Unfollowed)  # proxies by the environment, as usual


@dataclass
class Response:
    url: str
    """Where it came from, after redirects."""
    status: int
    headers: Message
    body: bytes
    truncated: bool = False
    """Whether there is more of it than the limit."""


def request(
    url: str,
    *,
    headers: dict[str, str] | None = None,
    data: bytes | None = None,
    timeout: float = 30.0,
    retries: int = 4,
    max_bytes: int = 50_000_000,
    sleep=time.sleep,
) -> Response:
    """One request (POST if there is data), made again after a pause while the server says that it may pass
    (PASSING, or no answer): 1, 2, 4 … seconds, or what Retry-After asks for. Redirects are not followed.

    Raises OSError where there was no answer in the end, ValueError where it is no http(s) address.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url}: not an http(s) address")
    headers = {"Accept-Encoding": "gzip", **(headers or {})}
    for attempt in range(retries + 1):
        pause = min(2.0**attempt, 60.0)
        try:
            made = urllib.request.Request(url, data=data, headers=headers)
            with _opened(made, timeout) as answer:
                body = answer.read(max_bytes + 1)
                got = Response(url, answer.status, answer.headers, body[:max_bytes], len(body) > max_bytes)
            if not got.truncated and got.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip"):
                got.body, got.truncated = _unzipped(got.body, max_bytes)
            if got.status not in PASSING or attempt == retries:
                return got
            pause = max(pause, wait) if (wait := _retry_after(got.headers)) is not None else pause
            if pause > LONGEST_WAIT:
                return got
        except (OSError, HTTPException, zlib.error) as e:
            if attempt == retries:
                raise OSError(str(getattr(e, "reason", e)) or type(e).__name__) from None
        sleep(pause)
    raise AssertionError


def _opened(made: urllib.request.Request, timeout: float) -> Any:
    try:
        return _opener.open(made, timeout=timeout)
    except urllib.error.HTTPError as answer:  # every status but 2xx
        return answer


def _unzipped(body: bytes, most: int) -> tuple[bytes, bool]:
    unzip = zlib.decompressobj(31)
    data = unzip.decompress(body, most + 1)
    return data[:most], len(data) > most


def _retry_after(headers: Message) -> float | None:
    """Seconds from now; it is given as seconds or as a date (RFC 9110 §10.2.3)."""
    given = headers.get("Retry-After", "").strip()
    if given.isdigit():
        return float(given)
    try:
        return max(parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


@dataclass
class Page:
    """A fetched document, kept in a file."""

    url: str
    """Where it is, after redirects."""
    path: Path
    content_type: str
    charset: str | None


@dataclass
class Fetcher:
    """GETs of one crawl. `rate` is requests a second to one host (robots.txt may ask for fewer)."""

    cache: Path
    user_agent: str
    rate: float = 1.0
    timeout: float = 30.0
    retries: int = 4
    max_bytes: int = 50_000_000
    fresh_hours: float = 24.0
    """For how long a page of the cache is used without asking whether it has changed."""
    heed_robots: bool = True
    requests: int = 0
    sleep: Any = time.sleep
    clock: Any = time.monotonic
    _robots: dict[str, Robots] = field(default_factory=dict)
    _next: dict[str, float] = field(default_factory=dict)

    def page(self, url: str, allowed=lambda url: True) -> Page:
        """The document at a URL, from the cache if it is there and has not changed.

        `allowed` says of each place that a redirect leads to whether we go there. Raises Unreadable: X005
        refused by robots.txt, X006 no or a bad answer, X009 too large, X010 led elsewhere.
        """
        seen = []
        while True:
            url = normal(url)
            if url in seen or len(seen) > MAX_REDIRECTS:
                raise Unreadable("X006", f"redirected in a circle: {' → '.join([*seen, url][-4:])}")
            if urlsplit(url).scheme not in ("http", "https"):
                raise Unreadable("X006", f"redirected to {url}, which is no web address")
            if seen and not allowed(url):
                raise Unreadable("X010", f"redirected to {url}, which is outside")
            if self.heed_robots and not self.robots(url).allows(url):
                raise Unreadable("X005", "robots.txt does not allow it")
            seen.append(url)
            kept = self._kept(url)
            if kept is not None and time.time() - kept["fetched"] < self.fresh_hours * 3600:
                got = kept
            else:
                got = self._asked(url, kept)
            if "location" not in got:
                return Page(url, self._path(url, "body"), got["content_type"], got["charset"])
            url = urljoin(url, got["location"])

    def robots(self, url: str) -> Robots:
        """The rules of the URL's host; a host whose robots.txt can't be had now allows nothing (RFC 9309)."""
        parts = urlsplit(url)
        host = f"{parts.scheme}://{parts.netloc}"
        if host not in self._robots:
            try:
                got = self._request(host + "/robots.txt", {})
                for _ in range(5):
                    if got.status not in (301, 302, 303, 307, 308) or "Location" not in got.headers:
                        break
                    got = self._request(urljoin(got.url, got.headers["Location"]), {})
            except (OSError, ValueError):
                self._robots[host] = Robots(None, self.user_agent)
            else:
                text = got.body[:500_000].decode("utf-8", "replace") if got.status == 200 else ""
                known = got.status < 500 and got.status != 429
                self._robots[host] = Robots(text if known else None, self.user_agent)
        return self._robots[host]

    def _asked(self, url: str, kept: dict[str, Any] | None) -> dict[str, Any]:
        headers = {}
        if kept is not None and kept.get("etag"):
            headers["If-None-Match"] = kept["etag"]
        if kept is not None and kept.get("last_modified"):
            headers["If-Modified-Since"] = kept["last_modified"]
        try:
            answer = self._request(url, headers)
        except (OSError, ValueError) as e:
            raise Unreadable("X006", f"no answer: {e}") from None
        if answer.status == 304 and kept is not None:
            got = {**kept, "fetched": time.time()}
        elif answer.status in (301, 302, 303, 307, 308) and answer.headers.get("Location"):
            got = {"location": answer.headers["Location"], "url": url, "fetched": time.time()}
        elif answer.status != 200:
            raise Unreadable("X006", f"status {answer.status}")
        elif answer.truncated:
            raise Unreadable("X009", f"larger than {self.max_bytes / 1e6:.3g} MB")
        else:
            got = {
                "url": url,
                "fetched": time.time(),
                "etag": answer.headers.get("ETag"),
                "last_modified": answer.headers.get("Last-Modified"),
                "content_type": answer.headers.get_content_type() if answer.headers["Content-Type"] else "",
                "charset": answer.headers.get_content_charset(),
            }
            _whole(self._path(url, "body"), answer.body)
        _whole(self._path(url, "json"), json.dumps(got).encode())
        return got

    def _request(self, url: str, headers: dict[str, str]) -> Response:
        """At the host's rate."""
        host = urlsplit(url).netloc

        def pause(seconds: float) -> None:
            self._next[host] = max(self._next.get(host, 0.0), self.clock() + seconds)
            self.sleep(seconds)

        wait = self._next.get(host, 0.0) - self.clock()
        if wait > 0:
            self.sleep(wait)
        rules = self._robots.get(f"{urlsplit(url).scheme}://{host}")
        delay = max(1.0 / self.rate if self.rate else 0.0, rules.delay if rules is not None else 0.0)
        self.requests += 1
        try:
            return request(
                url,
                headers={"User-Agent": self.user_agent, **headers},
                timeout=self.timeout,
                retries=self.retries,
                max_bytes=self.max_bytes,
                sleep=pause,
            )
        finally:
            self._next[host] = self.clock() + delay

    def _kept(self, url: str) -> dict[str, Any] | None:
        try:
            kept = json.loads(self._path(url, "json").read_text())
        except (OSError, ValueError):
            return None
        return kept if "location" in kept or self._path(url, "body").exists() else None

    def _path(self, url: str, what: str) -> Path:
        return self.cache / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.{what}"


def normal(url: str) -> str:
    """One form of equal URLs: no fragment, host in lower case, no default port, spaces and such as %20."""
    parts = urlsplit(url.strip())
    host = (parts.hostname or "").encode("idna").decode() if parts.hostname else ""
    port = (
        f":{parts.port}" if parts.port and parts.port != {"http": 80, "https": 443}.get(parts.scheme) else ""
    )
    if ":" in host:
        host = f"[{host}]"
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return urlunsplit((parts.scheme, host + port, path, quote(parts.query, safe="/%:@!$&'()*+,;=~-._?"), ""))


def _whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)
