"""Crawling, sitemaps and KnowledgeSDK, against a local server that misbehaves."""

import email.utils
import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ftjax.data.extract import ExtractOptions, extract, fetch
from ftjax.data.extract.fetch import Fetcher, normal
from ftjax.data.extract.knowledgesdk import KEY, KnowledgeSDK
from ftjax.data.extract.robots import Robots
from ftjax.errors import UserError

SITEMAPS = "http://www.sitemaps.org/schemas/sitemap/0.9"
WORDS = "These are the words of a page, of which there are enough to be read as its main text. "


class Site:
    """`pages` maps a path to a body, or to a function of (the request, how often it was asked for) that
    answers (status, headers, body); `log` is what was asked for."""

    def __init__(self):
        self.pages: dict = {}
        self.log: list[tuple[str, str, dict]] = []
        self.bodies: list[bytes] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path
                site.log.append((self.command, path, dict(self.headers)))
                if self.command == "POST":
                    site.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                count = sum(p == path for _, p, _ in site.log)
                page = site.pages.get(path, lambda request, n: (404, {}, b"not found"))
                answer = page(self, count) if callable(page) else (200, {}, page)
                if answer is None:  # hang up
                    self.close_connection = True
                    return
                status, headers, body = answer
                body = body.encode() if isinstance(body, str) else body
                self.send_response(status)
                for name, value in {"Content-Type": "text/html; charset=utf-8", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def asked(self, path: str) -> int:
        return sum(p == path for _, p, _ in self.log)


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """What would have been slept, in seconds."""
    slept: list[float] = []
    monkeypatch.setattr(Fetcher.__init__, "__defaults__", _with_sleep(slept.append))
    return slept


def _with_sleep(sleep):
    defaults = list(Fetcher.__init__.__defaults__)
    return tuple(sleep if each is time.sleep else each for each in defaults)


def page(title: str, *links: str, words: str = WORDS) -> str:
    anchors = " ".join(f'<a href="{link}">{link}</a>' for link in links)
    main = f"<main><h1>{title}</h1><p>{words} {title} {anchors}</p></main>"
    return f"<html><head><title>{title}</title></head><body>{main}"


def options(tmp_path, **changes) -> ExtractOptions:
    return ExtractOptions(**{"rate": 0, "cache": str(tmp_path / "cache"), "retries": 2, **changes})


def outcome(sources, chosen) -> tuple[list[str], dict[str, str]]:
    """(titles of the documents kept, code of each other document)"""
    judged = list(extract(sources, chosen))
    kept = [j.record.meta["title"] for j in judged if j.record]
    return kept, {v.source: v.code for j in judged if j.record is None for v in j.verdicts}


def test_a_crawl_stays_in_its_folder_and_accounts_for_every_page(site, tmp_path, pauses):
    site.pages = {
        "/docs/": page("Start", "one.html", "two.html#part", "two.html", "/blog/x.html",
                       "http://other.invalid/",
                       "gone.html", "secret/a.html", "data.bin", "logo.png", "mailto:me@x.org", "old.html",
                       "deep/", "http://["),
        "/docs/one.html": page("One", "two.html", "./"),
        "/docs/two.html": page("Two"),
        "/docs/deep/": page("Deep", "deeper.html"),
        "/docs/deep/deeper.html": page("Deeper"),
        "/docs/data.bin": lambda r, n: (200, {"Content-Type": "application/x-thing"}, b"\0\1"),
        "/docs/old.html": lambda r, n: (301, {"Location": "/docs/two.html"}, b""),
        "/robots.txt": "User-agent: *\nDisallow: /docs/secret\nAllow: /",
    }  # fmt: skip
    kept, ended = outcome([site.url + "/docs/"], options(tmp_path))
    assert kept == ["Start", "One", "Two", "Deep", "Deeper"]
    assert {k.removeprefix(site.url): v for k, v in ended.items()} == {
        "/docs/gone.html": "X006",
        "/docs/secret/a.html": "X005",
        "/docs/data.bin": "X004",
        "/docs/old.html": "X003",
    }
    assert (
        not site.asked("/docs/secret/a.html")
        and not site.asked("/blog/x.html")
        and not site.asked("/docs/logo.png")
    )
    assert all(site.asked(p) == 1 for p in site.pages)
    assert all(headers["User-Agent"].startswith("ftjax/") for _, _, headers in site.log)


def test_limits_of_a_crawl_are_said(site, tmp_path):
    site.pages = {"/": page("P0", "/1", "/2", "/3")} | {f"/{n}": page(f"P{n}", f"/{n}0") for n in (1, 2, 3)}
    kept, ended = outcome([site.url], options(tmp_path, max_pages=2))
    assert kept == ["P0", "P1"] and ended == {site.url + "/": "X011"}
    kept, ended = outcome([site.url], options(tmp_path, scope="page", max_depth=0))
    assert kept == ["P0"] and ended == {}
    kept, _ = outcome([site.url], options(tmp_path, exclude=["2", "*0"]))
    assert kept == ["P0", "P1", "P3"]


def test_retries_with_growing_pauses_and_as_asked(site, tmp_path, pauses):
    later = email.utils.format_datetime(email.utils.localtime().replace(microsecond=0), usegmt=False)
    site.pages = {
        "/a": lambda r, n: (500, {}, b"") if n < 3 else (200, {}, page("A")),
        "/b": lambda r, n: (429, {"Retry-After": "7"}, b"") if n < 2 else (200, {}, page("B")),
        "/c": lambda r, n: None if n < 2 else (200, {}, page("C")),
        "/d": lambda r, n: (503, {}, b""),
        "/e": lambda r, n: (429, {"Retry-After": "4000"}, b""),
        "/f": lambda r, n: (503, {"Retry-After": later}, b"") if n < 2 else (200, {}, page("F")),
    }
    kept, ended = outcome(
        [site.url + p for p in "/a /b /c /d /e /f".split()], options(tmp_path, scope="page")
    )
    assert kept == ["A", "B", "C", "F"]
    assert {k[-2:]: v for k, v in ended.items()} == {"/d": "X006", "/e": "X006"}
    assert [round(p) for p in pauses if p > 0.5] == [1, 2, 7, 1, 1, 2, 1]
    assert site.asked("/d") == 3 and site.asked("/e") == 1


def test_requests_keep_to_the_rate_and_to_the_delay_that_robots_txt_asks_for(site, tmp_path):
    site.pages = {"/robots.txt": "User-agent: *\nCrawl-delay: 3", **{f"/{n}": page(str(n)) for n in range(3)}}
    now, waits = [0.0], []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    fetcher = Fetcher(tmp_path, "me", rate=2.0, sleep=sleep, clock=lambda: now[0])
    for n in range(3):
        fetcher.page(f"{site.url}/{n}")
    assert waits == [0.5, 3.0, 3.0]  # after robots.txt itself, then by what it says


def test_redirects_in_a_circle_elsewhere_and_to_files(site, tmp_path, pauses):
    site.pages = {
        "/a": lambda r, n: (302, {"Location": "/b"}, b""),
        "/b": lambda r, n: (302, {"Location": "/a"}, b""),
        "/docs/": page("Start", "away", "file"),
        "/docs/away": lambda r, n: (302, {"Location": "http://127.0.0.2/x"}, b""),
        "/docs/file": lambda r, n: (302, {"Location": "file:///etc/hostname"}, b""),
        "/n": lambda r, n: (302, {"Location": f"/n?{n}"}, b""),
    }
    assert outcome([site.url + "/a"], options(tmp_path)) == ([], {site.url + "/a": "X006"})
    kept, ended = outcome([site.url + "/docs/"], options(tmp_path))
    assert kept == ["Start"]
    assert ended == {site.url + "/docs/away": "X010", site.url + "/docs/file": "X006"}
    fetched = Fetcher(tmp_path / "c", "me", rate=0)
    with pytest.raises(fetch.Unreadable, match="X006"):
        fetched.page(site.url + "/docs/file")  # even where every place is allowed


def test_robots_that_cannot_be_had_allow_nothing_and_can_be_left_out(site, tmp_path, pauses):
    site.pages = {"/": page("Home"), "/robots.txt": lambda r, n: (503, {}, b"")}
    assert outcome([site.url], options(tmp_path)) == ([], {site.url + "/": "X005"})
    assert outcome([site.url], options(tmp_path, robots=False))[0] == ["Home"]


def test_the_cache_is_asked_first_and_the_server_whether_it_changed(site, tmp_path):
    def answer(request, n):
        if request.headers.get("If-None-Match") == '"v1"':
            return 304, {}, b""
        return 200, {"ETag": '"v1"'}, page("Home")

    site.pages = {"/": answer, "/robots.txt": ""}
    assert outcome([site.url], options(tmp_path))[0] == ["Home"]
    assert outcome([site.url], options(tmp_path))[0] == ["Home"]
    assert site.asked("/") == 1
    assert outcome([site.url], options(tmp_path, fresh_hours=0))[0] == ["Home"]
    assert [h.get("If-None-Match") for _, p, h in site.log if p == "/"] == [None, '"v1"']
    site.pages["/"] = page("New")
    assert outcome([site.url], options(tmp_path, fresh_hours=0))[0] == ["New"]


def test_wrong_charsets_sizes_types_and_compression(site, tmp_path):
    body = page("Größe").encode()
    site.pages = {
        "/latin": lambda r, n: (200, {"Content-Type": "text/html; charset=iso-8859-1"}, body),
        "/zip": lambda r, n: (200, {"Content-Encoding": "gzip"}, gzip.compress(page("Zipped").encode())),
        "/bomb": lambda r, n: (200, {"Content-Encoding": "gzip"}, gzip.compress(b"a" * 400_000)),
        "/big": "<p>" + "a" * 200_000,
        "/x.md": lambda r, n: (200, {"Content-Type": "text/plain"}, "# Markdown\n\nwords\n"),
        "/x.rst": lambda r, n: (200, {"Content-Type": "application/octet-stream"}, "Rst\n===\n\nwords\n"),
        "/x.html": lambda r, n: (200, {"Content-Type": "image/png"}, b"\x89PNG"),
    }
    sources = [site.url + path for path in site.pages]
    judged = list(extract(sources, options(tmp_path, scope="page", max_mb=0.1)))
    kept = {j.record.meta["source"].removeprefix(site.url): j.record for j in judged if j.record}
    assert set(kept) == {"/latin", "/zip", "/x.md", "/x.rst"}
    assert kept["/latin"].meta["title"] == "Größe"
    assert kept["/x.rst"].text == "# Rst\n\nwords"
    codes = {v.source.removeprefix(site.url): v.code for j in judged for v in j.verdicts}
    assert codes == {"/latin": "X012", "/bomb": "X009", "/big": "X009", "/x.html": "X004"}


def test_sitemaps_and_their_index(site, tmp_path, pauses):
    def urlset(*addresses):
        inside = "".join(f"<url><loc> {a} </loc><lastmod>2024-01-01</lastmod></url>" for a in addresses)
        return f'<?xml version="1.0"?><urlset xmlns="{SITEMAPS}">{inside}</urlset>'

    zipped = gzip.compress(urlset(f"{site.url}/c").encode())
    index = "".join(
        f"<sitemap><loc>{site.url}/{n}</loc></sitemap>" for n in ("m1.xml", "m2.xml.gz", "m3.xml")
    )
    site.pages = {
        "/sitemap.xml": f'<sitemapindex xmlns="{SITEMAPS}">{index}</sitemapindex>',
        "/m1.xml": urlset(f"{site.url}/a", f"{site.url}/b", "http://other.invalid/x"),
        "/m2.xml.gz": lambda r, n: (200, {"Content-Type": "application/gzip"}, zipped),
        "/m3.xml": "<urlset><url>",
        "/a": page("A", "/z"), "/b": page("B"), "/c": page("C"),
    }  # fmt: skip
    kept, ended = outcome([site.url + "/sitemap.xml"], options(tmp_path))
    assert kept == ["A", "B", "C"] and not site.asked("/z")
    assert ended == {"http://other.invalid/x": "X010", site.url + "/m3.xml": "X001"}
    kept, ended = outcome([site.url + "/sitemap.xml"], options(tmp_path, max_pages=1))
    assert kept == ["A"] and "X011" in ended.values()
    local = tmp_path / "sitemap.xml"
    local.write_text(urlset(site.url + "/b"))
    assert outcome([str(local)], options(tmp_path))[0] == ["B"]


def test_addresses_that_are_one():
    assert normal("HTTP://Example.org:80#part") == "http://example.org/"
    assert normal("https://bücher.example/a b?q=ü") == "https://xn--bcher-kva.example/a%20b?q=%C3%BC"
    assert normal("https://example.org/a%20b") == "https://example.org/a%20b"


@pytest.mark.parametrize(
    "rules, path, allowed",
    [
        ("User-agent: *\nDisallow: /a", "/a/b", False),
        ("User-agent: *\nDisallow: /a", "/b", True),
        ("User-agent: *\nDisallow: /\nAllow: /docs", "/docs/x", True),  # the longest wins, not the first
        ("User-agent: *\nDisallow: /*.pdf$", "/x/y.pdf", False),
        ("User-agent: *\nDisallow: /*.pdf$", "/x/y.pdf?z", True),
        ("User-agent: other\nDisallow: /", "/x", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: FTJAX\nDisallow: /no", "/x", True),  # our own group alone
        ("User-agent: ftjax\nUser-agent: other\nDisallow: /", "/x", False),
        ("User-agent: *\nDisallow: # nothing", "/x", True),
        ("User-agent: *\nDisallow: /%7Ejoe", "/~joe/x", False),
        ("User-agent: *\nDisallow: /a\nAllow: /a", "/a", True),
    ],
)
def test_robots_by_the_rfc(rules, path, allowed):
    assert Robots(rules, "ftjax/1.0").allows("http://example.org" + path) is allowed


# ── KnowledgeSDK ──


def json_answer(values, status=200, **headers):
    return status, {"Content-Type": "application/json", **headers}, json.dumps(values)


@pytest.fixture
def service(site, monkeypatch):
    monkeypatch.setenv(KEY, "sk_ks_secret")
    monkeypatch.setattr(
        KnowledgeSDK.__init__,
        "__kwdefaults__",
        {**KnowledgeSDK.__init__.__kwdefaults__, "sleep": lambda s: None},
    )
    return site


def test_knowledgesdk_answers_in_both_shapes(service, tmp_path):
    items = [
        {"title": "Refunds", "description": "d", "content": "Refunds take 5 days.", "category": "faq",
         "source": "https://x.example/r"},
        {"title": "Hours", "content": "Open from 9 to 5."},
    ]  # fmt: skip
    shapes = {
        "https://x.example/page": {"url": "https://x.example/page", "title": "Page", "links": [],
                                   "markdown": "# Page\n\n```\na\n  b\n```\n"},
        "https://x.example": {"business": {}, "knowledgeItems": items, "pagesScraped": 2},
    }  # fmt: skip
    service.pages = {"/v1/extract": lambda r, n: json_answer(shapes[json.loads(service.bodies[-1])["url"]])}
    chosen = options(tmp_path, knowledgesdk_url=service.url)
    judged = list(extract(["knowledgesdk:https://x.example/page", "knowledgesdk:https://x.example"], chosen))
    found = [(j.record.meta["url"], j.record.meta["title"], j.record.text) for j in judged]
    assert found == [
        ("https://x.example/page", "Page", "# Page\n\n```\na\n  b\n```"),
        ("https://x.example/r", "Refunds", "Refunds take 5 days."),
        ("https://x.example#item-2", "Hours", "Open from 9 to 5."),
    ]
    assert all(j.record.meta["fetched_by"] == "knowledgesdk" for j in judged)
    assert all(headers["X-Api-Key"] == "sk_ks_secret" for _, _, headers in service.log)
    assert not any(b"sk_ks_secret" in path.read_bytes() for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("older", [False, True])
def test_knowledgesdk_jobs_are_polled(service, tmp_path, older):
    result = {"knowledgeItems": [{"title": "T", "content": "Words.", "source": "https://x.example/t"}]}
    states = [
        {"status": "queued"},
        {"status": "processing"},
        {"jobId": "j1", "status": "completed", "result": result},
    ]
    service.pages = {
        "/v1/business/async": lambda r, n: (
            json_answer({"statusCode": 404, "error": "Not Found", "message": "-"}, 404)
            if older
            else json_answer({"jobId": "j1", "status": "queued"}, 202)
        ),
        "/v1/extract/async": lambda r, n: json_answer({"jobId": "j1", "status": "queued"}),
        "/v1/jobs/j1": lambda r, n: json_answer(states[n - 1]),
    }
    (judged,) = extract(
        ["knowledgesdk+site:https://x.example"], options(tmp_path, knowledgesdk_url=service.url)
    )
    assert judged.record.text == "Words." and judged.record.meta["url"] == "https://x.example/t"
    assert service.asked("/v1/jobs/j1") == 3 and service.asked("/v1/extract/async") == older


def test_knowledgesdk_errors_are_said_and_429_is_waited_for(service, tmp_path):
    failed = {"statusCode": 400, "error": "Bad Request", "message": "url is not reachable"}
    answers = {
        "https://a.example": [
            json_answer({}, 429, **{"Retry-After": "3"}),
            json_answer({"markdown": "Fine at last."}),
        ],
        "https://b.example": [json_answer(failed, 400)],
        "https://c.example": [json_answer({"surprise": 1})],
        "https://d.example": [(200, {}, "<html>")],
    }
    service.pages = {"/v1/extract": lambda r, n: answers[json.loads(service.bodies[-1])["url"]].pop(0)}
    chosen = options(tmp_path, knowledgesdk_url=service.url)
    judged = list(extract([f"knowledgesdk:{url}" for url in answers], chosen))
    assert judged[0].record.text == "Fine at last."
    said = [j.verdicts[0].text for j in judged[1:]]
    assert [j.verdicts[0].code for j in judged[1:]] == ["X014"] * 3
    assert "status 400 Bad Request: url is not reachable" in said[0]
    assert "surprise" in said[1] and "no JSON object" in said[2]
    service.pages = {
        "/v1/business/async": lambda r, n: json_answer({"jobId": "j"}),
        "/v1/jobs/j": lambda r, n: json_answer({"status": "failed", "error": "too many pages"}),
    }
    (judged,) = extract(["knowledgesdk+site:https://x.example"], chosen)
    assert "too many pages" in judged.verdicts[0].text


def test_knowledgesdk_without_a_key_or_with_a_wrong_one(service, tmp_path, monkeypatch):
    chosen = options(tmp_path, knowledgesdk_url=service.url)
    wrong = {"statusCode": 401, "error": "Unauthorized", "message": "bad key"}
    service.pages = {"/v1/extract": lambda r, n: json_answer(wrong, 401)}
    with pytest.raises(UserError, match="bad key") as caught:
        list(extract(["knowledgesdk:https://x.example"], chosen))
    assert "sk_ks_secret" not in str(caught.value)
    monkeypatch.delenv(KEY)
    with pytest.raises(UserError, match=KEY):
        list(extract(["knowledgesdk:https://x.example"], chosen))
