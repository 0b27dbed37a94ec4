"""From documents to sections: clean Markdown cut at headings, code verbatim, each with its origin."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ftjax.data.engine import Engine, Here
from ftjax.data.extract import docx, html, notebook, pdf, rst, text
from ftjax.data.extract.document import Document, Unreadable
from ftjax.data.extract.options import ExtractOptions
from ftjax.data.extract.sections import sections
from ftjax.data.extract.sources import Place, discover
from ftjax.data.record import Judged, Verdict

__all__ = ["ExtractOptions", "Documents", "extract", "parts_of", "read"]

DOCUMENTS_A_PART = 16


def extract(
    sources: Sequence[str],
    options: ExtractOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    engine: Engine | None = None,
) -> Iterator[Judged]:
    """The sections of every document that the sources name, in order, as records of the task "lm"; a document
    that gives none has a verdict with its name and why (X…).

    Of documents with the same text only the first is kept (X003). Network and folders are read first, by this
    process; then the engine reads the documents.
    """
    options = options or ExtractOptions()
    parts = parts_of(sources, options, progress)
    total = sum(len(part.places) for part in parts)
    texts: dict[bytes, str] = {}
    done = 0
    for results in (engine or Here()).map(_results, parts):
        for result in results:
            done += 1
            first = texts.setdefault(result.digest, result.name) if result.digest else result.name
            if first == result.name:
                yield from result.judged
            else:
                said = f"the same text as {first}"
                yield Judged(None, [Verdict("X003", said, source=result.name)])
        if progress is not None:
            progress("reading", done, total)


@dataclass(frozen=True)
class Documents:
    """A few documents as one part of a data set (ftjax.data.steps.Part)."""

    places: tuple[Place, ...]
    options: ExtractOptions

    def key(self) -> str:
        digest = hashlib.sha256(repr((self.options, self.places)).encode())
        for place in self.places:
            if place.path:
                digest.update(Path(place.path).read_bytes())
        return digest.hexdigest()

    def judged(self) -> Iterator[Judged]:
        for result in _results(self):
            yield from result.judged


def parts_of(
    sources: Sequence[str],
    options: ExtractOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Documents]:
    """The documents that the sources name, cut into parts. Pages are fetched here, into the cache."""
    places = list(discover(list(sources), options, progress))
    cuts = range(0, len(places), DOCUMENTS_A_PART)
    return [Documents(tuple(places[at : at + DOCUMENTS_A_PART]), options) for at in cuts]


class _Result(NamedTuple):
    name: str
    digest: bytes
    judged: list[Judged]


def _results(part: Documents) -> list[_Result]:
    return [_result(place, part.options) for place in part.places]


def _result(place: Place, options: ExtractOptions) -> _Result:
    if place.verdict is not None:
        return _Result(place.name, b"", [Judged(None, [place.verdict])])
    try:
        document = read(Path(place.path).read_bytes(), place.kind, place.charset, place.url, options)
    except Unreadable as e:
        return _Result(
            place.name, b"", [Judged(None, [Verdict(e.code, e.text, source=place.name, fix=e.fix)])]
        )
    except OSError as e:
        said = e.strerror or str(e)
        return _Result(place.name, b"", [Judged(None, [Verdict("X001", said, source=place.name)])])
    document.title = document.title or place.title or Path(place.path if not place.url else place.url).stem
    document.meta["source"] = place.source or place.url
    if place.url:
        document.meta["url"] = place.url
    document.meta["format"] = place.kind
    if place.fetched_by:
        document.meta["fetched_by"] = place.fetched_by
    if options.license:
        document.meta["license"] = options.license
    judged = list(sections(document, place.name, options.max_tokens, options.min_tokens))
    said = [replace(verdict, source=place.name) for verdict in document.verdicts]
    judged[0].verdicts[:0] = said
    return _Result(
        place.name, hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest(), judged
    )


def read(
    data: bytes, kind: str, charset: str | None = None, url: str = "", options: ExtractOptions | None = None
) -> Document:
    """A document of one of the formats html, markdown, rst, notebook, text, pdf, docx. Raises Unreadable."""
    options = options or ExtractOptions()
    try:
        document = _read(data, kind, charset, url, options)
    except RecursionError:  # some 480 elements, one in another
        raise Unreadable("X001", "nested too deeply") from None
    lines = document.text.split("\n")
    if all(not line.strip() or (document.markdown and line[0] == "#") for line in lines):
        raise Unreadable("X002", "no text but headings" if document.text.strip() else "no text")
    return document


def _read(data: bytes, kind: str, charset: str | None, url: str, options: ExtractOptions) -> Document:
    if kind == "pdf":
        document = pdf.read(data)
    elif kind == "docx":
        document = docx.read(data)
    else:
        characters, said = text.decode(data, charset, html=kind == "html")
        if kind == "html":
            document = html.read(characters, url, options.links)
        elif kind == "markdown":
            document = text.read_markdown(characters)
        elif kind == "rst":
            document = rst.read(characters)
        elif kind == "notebook":
            document = notebook.read(characters, options.outputs)
        else:
            assert kind == "text", kind
            document = text.read_plain(characters)
        document.verdicts += said
    return document
