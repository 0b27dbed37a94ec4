"""From what was named (files, folders, addresses, sitemaps, KnowledgeSDK) to the documents to be read."""

import gzip
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from xml.etree import ElementTree

from ftjax.data.extract.document import Unreadable
from ftjax.data.extract.fetch import Fetcher, normal
from ftjax.data.extract.html import links_of
from ftjax.data.extract.knowledgesdk import KnowledgeSDK
from ftjax.data.extract.options import ExtractOptions
from ftjax.data.extract.text import decode
from ftjax.data.record import Verdict
from ftjax.errors import UserError

KINDS = {
    ".html": "html", ".htm": "html", ".xhtml": "html", ".md": "markdown", ".markdown": "markdown",
    ".mdx": "markdown", ".pdf": "pdf", ".docx": "docx", ".rst": "rst", ".rest": "rst", ".ipynb": "notebook",
    ".txt": "text", ".text": "text",
}  # fmt: skip
"""What a file's name says of its format."""
_CONTENT_TYPES = {
    "text/html": "html", "application/xhtml+xml": "html", "text/markdown": "markdown",
    "text/x-markdown": "markdown", "application/pdf": "pdf", "text/x-rst": "rst",
    "text/prs.fallenstein.rst": "rst",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/x-ipynb+json": "notebook",
}  # fmt: skip
_KNOWLEDGE = re.compile(r"knowledgesdk(\+site)?:(https?://.+)", re.I)


@dataclass(frozen=True)
class Place:
    """One document: its name (the group of its sections), the file that holds it, and what is known of it.
    Where `verdict` is given there is nothing to read."""

    name: str
    path: str = ""
    kind: str = ""
    url: str = ""
    charset: str | None = None
    title: str = ""
    source: str = ""
    """The file that a person would open, if it is not the address."""
    fetched_by: str = ""
    """The service that made the text."""
    verdict: Verdict | None = None


def discover(
    sources: list[str], options: ExtractOptions, progress: Callable[[str, int, int], None] | None = None
) -> Iterator[Place]:
    """Every document of the sources, in order, each once; what is fetched is in the cache then."""
    web = _Web(options, progress)
    seen: set[str] = set()
    for source in sources:
        for place in _of_source(source, options, web):
            if place.name not in seen or place.verdict is not None:
                seen.add(place.name)
                yield place


def _of_source(source: str, options: ExtractOptions, web: "_Web") -> Iterator[Place]:
    if found := _KNOWLEDGE.fullmatch(source):
        yield from web.knowledge(found[2], bool(found[1]))
    elif source.startswith(("http://", "https://")):
        yield from web.site(source)
    elif "://" in source:
        raise UserError(f"{source}: an address begins with http://, https:// or knowledgesdk:")
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            yield from _folder(path, options)
        elif not path.exists():
            raise UserError(f"{source}: there is no such file or folder")
        elif path.name.lower().endswith((".xml", ".xml.gz")):
            yield from web.sitemap(path.read_bytes(), str(path))
        else:
            yield _file(path, path.name, options)


def _folder(root: Path, options: ExtractOptions) -> Iterator[Place]:
    """Files below a folder by name; not hidden ones, nor Sphinx's folders of sources and static files."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            f for f in folders if f[0] != "." and f not in ("_static", "_sources", "node_modules")
        )
        for name in sorted(files):
            path = Path(folder) / name
            inside = path.relative_to(root).as_posix()
            if name[0] != "." and _wanted(inside, options):
                yield _file(path, inside, options)


def _wanted(name: str, options: ExtractOptions) -> bool:
    included = not options.include or any(fnmatch(name, pattern) for pattern in options.include)
    return included and not any(fnmatch(name, pattern) for pattern in options.exclude)


def _file(path: Path, inside: str, options: ExtractOptions) -> Place:
    name = path.as_posix()
    url = urljoin(options.base_url.rstrip("/") + "/", inside) if options.base_url else ""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        said = (
            f"files named *{path.suffix} are not read"
            if path.suffix
            else "a name without an ending is not read"
        )
        return Place(name, url=url, verdict=Verdict("X004", said, source=name))
    if path.stat().st_size > options.max_mb * 1e6:
        said = f"{path.stat().st_size / 1e6:.1f} MB; the limit is max_mb={options.max_mb:g}"
        return Place(name, url=url, verdict=Verdict("X009", said, source=name))
    return Place(url or name, name, kind, url, source=name)


@dataclass
class _Web:
    """What is fetched, with one rate, cache and count of requests for all sources."""

    options: ExtractOptions
    progress: Callable[[str, int, int], None] | None
    fetchers: list[Fetcher] = field(default_factory=list)
    _services: list[KnowledgeSDK] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        default = Path(os.environ.get("FTJAX_CACHE") or "~/.cache/ftjax") / "pages"
        return Path(self.options.cache or default).expanduser()

    def fetcher(self) -> Fetcher:
        if not self.fetchers:
            o = self.options
            self.fetchers.append(
                Fetcher(
                    self.cache,
                    o.user_agent,
                    rate=o.rate,
                    timeout=o.timeout,
                    retries=o.retries,
                    max_bytes=int(o.max_mb * 1e6),
                    fresh_hours=o.fresh_hours,
                    heed_robots=o.robots,
                )
            )
        return self.fetchers[0]

    def site(self, start: str) -> Iterator[Place]:
        """The page and, breadth first, those that it links to inside its scope; or a sitemap's pages."""
        options, fetcher = self.options, self.fetcher()
        start = normal(start)
        scope = _scope(start, options.scope)
        queue: deque[tuple[str, int]] = deque([(start, 0)])
        known = {start}
        reached: set[str] = set()
        fetched = 0
        while queue:
            if fetched >= options.max_pages:
                said = f"max_pages={options.max_pages} reached; {len(queue)} known addresses were not fetched"
                yield Place(start, url=start, verdict=Verdict("X011", said, source=start))
                return
            url, depth = queue.popleft()
            fetched += 1
            try:
                page = fetcher.page(url, partial(_inside, scope=scope) if depth else _anywhere)
            except Unreadable as e:
                yield Place(url, url=url, verdict=Verdict(e.code, e.text, source=url, fix=e.fix))
                continue
            if self.progress is not None:
                self.progress("fetching", fetched, fetched + len(queue))
            if depth == 0 and page.url != start:  # where the start leads to is where the site is
                scope = _scope(page.url, options.scope)
            if page.url in reached:
                said = f"leads to {page.url}, which is read already"
                yield Place(url, url=url, verdict=Verdict("X003", said, source=url))
                continue
            reached.add(page.url)
            known.add(page.url)
            data = page.path.read_bytes()
            if depth == 0 and _is_sitemap(data):
                yield from self.sitemap(data, page.url)
                return
            kind = _kind(page.content_type, page.url)
            if kind is None:
                said = f"content of type {page.content_type or 'unknown'} is not read"
                yield Place(url, url=url, verdict=Verdict("X004", said, source=url))
                continue
            yield Place(page.url, str(page.path), kind, page.url, page.charset)
            if kind != "html" or depth >= options.max_depth:
                continue
            for link in links_of(decode(data, page.charset, html=True)[0], page.url):
                try:
                    link = normal(link)
                except ValueError:  # e.g. a port that is no number
                    continue
                if (
                    link not in known
                    and _inside(link, scope)
                    and _wanted(_path(link), options)
                    and _readable(link)
                ):
                    known.add(link)
                    queue.append((link, depth + 1))

    def sitemap(self, data: bytes, name: str) -> Iterator[Place]:
        """The pages of a sitemap, or of the sitemaps of a sitemap index; of the same site as the sitemap, if
        that has an address."""
        fetcher, options = self.fetcher(), self.options
        host = _host(name) if "://" in name else None
        maps: deque[tuple[str, bytes | None]] = deque([(name, data)])
        fetched, mapped = 0, {name}
        while maps:
            at, content = maps.popleft()
            try:
                content = fetcher.page(at).path.read_bytes() if content is None else content
                addresses, index = _locations(content, int(options.max_mb * 1e6))
            except Unreadable as e:
                yield Place(at, url=at, verdict=Verdict(e.code, e.text, source=at, fix=e.fix))
                continue
            for number, address in enumerate(addresses):
                if host is not None and _host(address) != host:
                    yield Place(
                        address, url=address, verdict=Verdict("X010", f"not on {host}", source=address)
                    )
                elif index:
                    if address not in mapped:
                        mapped.add(address)
                        maps.append((address, None))
                elif _wanted(_path(address), options):
                    if fetched >= options.max_pages:
                        left = len(addresses) - number
                        said = (
                            f"max_pages={options.max_pages} reached; {left} addresses of it were not fetched"
                        )
                        yield Place(at, url=at, verdict=Verdict("X011", said, source=at))
                        return
                    fetched += 1
                    if self.progress is not None:
                        self.progress("fetching", fetched, min(len(addresses), options.max_pages))
                    yield self._one(address)

    def _one(self, url: str) -> Place:
        try:
            page = self.fetcher().page(url, lambda to: _host(to) == _host(url))
        except (Unreadable, ValueError) as e:
            code, text = (e.code, e.text) if isinstance(e, Unreadable) else ("X006", str(e))
            return Place(url, url=url, verdict=Verdict(code, text, source=url))
        kind = _kind(page.content_type, page.url)
        if kind is None:
            said = f"content of type {page.content_type or 'unknown'} is not read"
            return Place(url, url=url, verdict=Verdict("X004", said, source=url))
        return Place(page.url, str(page.path), kind, page.url, page.charset)

    def knowledge(self, url: str, whole_site: bool) -> Iterator[Place]:
        options = self.options
        if not self._services:
            self._services.append(KnowledgeSDK(options.knowledgesdk_url, timeout=max(options.timeout, 180.0)))
        try:
            items = (
                self._services[0].site(url, options.max_pages) if whole_site else self._services[0].page(url)
            )
        except Unreadable as e:
            yield Place(url, url=url, verdict=Verdict(e.code, e.text, source=url, fix=e.fix))
            return
        for item in items:
            # named by its content: an answer is a document of its own, not a page that may have changed
            data = item.markdown.encode("utf-8", "surrogatepass")
            path = self.cache / f"{hashlib.sha256(data).hexdigest()[:32]}.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            yield Place(
                item.url, str(path), "markdown", item.url, "utf-8", item.title, fetched_by="knowledgesdk"
            )


def _kind(content_type: str, url: str) -> str | None:
    """The format by the content's type, or by the address where that says little."""
    named = KINDS.get(Path(urlsplit(url).path).suffix.lower())
    if content_type in ("text/plain", "application/octet-stream", "", "application/json"):
        return named or ("text" if content_type == "text/plain" else None)
    return _CONTENT_TYPES.get(content_type)


_NO_DOCUMENT = re.compile(
    r"\.(png|jpe?g|gif|svg|webp|ico|css|js|json|xml|zip|gz|bz2|xz|tgz|tar|whl|exe|dmg|mp[34]|webm|woff2?|ttf|rss|atom)$",
    re.I,
)


def _readable(url: str) -> bool:
    """Not named as what is no document: such links are not followed."""
    return _NO_DOCUMENT.search(urlsplit(url).path) is None


def _host(url: str) -> str:
    return (urlsplit(url).netloc or "").lower().removeprefix("www.")


def _path(url: str) -> str:
    return unquote(urlsplit(url).path).lstrip("/")


def _scope(url: str, scope: str) -> tuple[str, str]:
    """(host, beginning of the path) of what may be fetched."""
    path = urlsplit(url).path
    return _host(url), path[: path.rfind("/") + 1] if scope == "folder" else "/" if scope == "site" else path


def _anywhere(url: str) -> bool:
    return True


def _inside(url: str, scope: tuple[str, str]) -> bool:
    return _host(url) == scope[0] and urlsplit(url).path.startswith(scope[1])


def _is_sitemap(data: bytes) -> bool:
    head = data[:1000]
    if data[:2] == b"\x1f\x8b":
        try:
            head = gzip.GzipFile(fileobj=_reader(data)).read(1000)
        except (OSError, EOFError):
            return False
    return b"<urlset" in head or b"<sitemapindex" in head


def _locations(data: bytes, most: int) -> tuple[list[str], bool]:
    """The addresses of a sitemap, and whether they are sitemaps themselves (sitemaps.org's protocol)."""
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=_reader(data)).read(most + 1)
        if len(data) > most:
            raise Unreadable("X009", f"a sitemap of more than {most / 1e6:.3g} MB")
        root = ElementTree.fromstring(data)
    except (OSError, EOFError, ElementTree.ParseError) as e:
        raise Unreadable("X001", f"no sitemap that can be read: {e}") from None
    name = root.tag.rpartition("}")[2]
    if name not in ("urlset", "sitemapindex"):
        raise Unreadable("X001", f"XML that is no sitemap (<{name}>)")
    found = [
        (location.text or "").strip()
        for entry in root
        for location in entry
        if location.tag.rpartition("}")[2] == "loc"
    ]
    return [address for address in dict.fromkeys(found) if address.startswith("http")], name == "sitemapindex"


def _reader(data: bytes) -> Any:
    import io

    return io.BytesIO(data)
