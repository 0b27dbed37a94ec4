"""From a document to its sections: cut at headings, limited in tokens, not inside a code block that fits."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

from ftjax.data.extract.document import Document, Fence, Mark, outline
from ftjax.data.record import Judged, Record, Verdict

# The pieces that tokenizers of today's models make one token of in English and in code (digits stay single);
# elsewhere bytes are the better measure. Against Qwen3's, Llama 3's, Gemma 3's and Mistral's tokenizers on
# the Python and SQLite docs: 0.79 to 1.09 of the true count, on German, Russian and Chinese 0.6 to 1.5.
_PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_+|\s{2,}|\n")


def tokens_estimate(text: str) -> int:
    """About how many tokens a text is, without a tokenizer."""
    return max(len(_PIECES.findall(text)), ceil(len(text.encode("utf-8", "surrogatepass")) / 4.5))


class Span(NamedTuple):
    """text[start:end] under the headings `breadcrumb`."""

    start: int
    end: int
    breadcrumb: tuple[str, ...]
    tokens: int


def sections(document: Document, group: str, max_tokens: int, min_tokens: int) -> Iterator[Judged]:
    """The document's sections as records of the task "lm", in order, with `meta` of where each comes from.

    A section's text is document.text[start:end] of its meta "offset"; only where one code block alone is
    larger than `max_tokens` is it cut inside, closed and opened again, and said (X013). A section of fewer
    than `min_tokens` goes with the next one under the same heading.
    """
    text = document.text
    marks, fences = outline(text) if document.markdown else ([], [])
    marks = marks if document.marks is None else document.marks
    for span in _joined(_under_headings(text, marks, document.title), text, max_tokens, min_tokens):
        for start, end in _pieces(text, span, fences, max_tokens):
            opened, closed = _fence_at(fences, start), _fence_at(fences, end)
            whole = (start, end) == (span.start, span.end)
            body = text[start:end]
            verdicts = []
            if opened or closed:
                body = (opened.opening + "\n" if opened else "") + body
                body += "\n" + closed.closing if closed else ""
                said = f"a code block is larger than max_tokens={max_tokens} by itself, and was cut"
                verdicts.append(Verdict("X013", said, source=group))
            meta = {
                **document.meta,
                "title": document.title,
                "breadcrumb": list(span.breadcrumb),
                "section": section_id(group, start, end),
                "offset": [start, end],
                "tokens_estimate": span.tokens if whole else tokens_estimate(body),
                "group": group,
            }
            if document.pages:
                meta["pages"] = [document.page(start), document.page(end - 1)]
            yield Judged(Record("lm", text=body, meta=meta, where=group), verdicts)


def section_id(group: str, start: int, end: int) -> str:
    """16 hex digits that stay the same as long as the document and the section's place in it do."""
    return hashlib.sha256(f"{group}\n{start}\n{end}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _under_headings(text: str, marks: list[Mark], title: str) -> Iterator[Span]:
    """What stands under each heading, in order; nothing for what is only white space."""
    stack: list[Mark] = []
    begun = 0
    for mark in [*marks, Mark(len(text), 0, None)]:
        breadcrumb = [title] if title and not (stack and stack[0].title == title) else []
        breadcrumb += [m.title for m in stack if m.title]
        if span := _trimmed(text, begun, mark.offset, tuple(breadcrumb)):
            yield span
        begun = mark.offset
        while stack and stack[-1].level >= mark.level:
            stack.pop()
        if mark.title is not None:
            stack.append(mark)


def _trimmed(text: str, start: int, end: int, breadcrumb: tuple[str, ...]) -> Span | None:
    part = text[start:end]
    body = part.strip()
    if not body:
        return None
    first = start + len(part) - len(part.lstrip())
    line = text.rfind("\n", start, first) + 1  # the first line keeps its indentation
    last = end - (len(part) - len(part.rstrip()))
    return Span(max(start, line), last, breadcrumb, tokens_estimate(text[max(start, line) : last]))


def _joined(spans: Iterator[Span], text: str, most: int, least: int) -> Iterator[Span]:
    """A span of fewer than `least` tokens goes with the one after it, if that is below or beside it."""
    held: Span | None = None
    for span in spans:
        if held is None:
            held = span
            continue
        shared = 0
        for a, b in zip(held.breadcrumb, span.breadcrumb, strict=False):
            if a != b:
                break
            shared += 1
        near = shared >= max(1, len(held.breadcrumb) - 1) or shared == len(held.breadcrumb)
        if held.tokens < least and near and (held.tokens + span.tokens <= most or span.tokens > most):
            bare = shared == len(held.breadcrumb) and _HEADINGS.match(text, held.start, held.end) is not None
            breadcrumb = span.breadcrumb if bare else span.breadcrumb[:shared]
            held = Span(held.start, span.end, breadcrumb, tokens_estimate(text[held.start : span.end]))
        else:
            yield held
            held = span
    if held is not None:
        yield held


_HEADINGS = re.compile(r"(?:#{1,6} .*\s*|.+\n[=-]+\s*)+\Z")
_SENTENCE = re.compile(r"(?<=[.!?;。！？])\s+")


def _pieces(text: str, span: Span, fences: list[Fence], most: int) -> Iterator[tuple[int, int]]:
    if span.tokens <= most:
        yield span.start, span.end
        return
    inside = [f for f in fences if f.start < span.end and f.end > span.start]
    for start, end in _cut(text, span.start, span.end, inside, most, 0):
        if piece := _trimmed(text, start, end, ()):
            yield piece.start, piece.end


def _cut(
    text: str, start: int, end: int, fences: list[Fence], most: int, how: int
) -> Iterator[tuple[int, int]]:
    """Pieces of at most `most` tokens, about equal: between blocks, else lines, sentences or anywhere."""
    units = [(a, b, tokens_estimate(text[a:b])) for a, b in _units(text, start, end, fences, how, most)]
    total = sum(unit[2] for unit in units)
    target = total / ceil(total / most)
    begun, held = start, 0
    for a, b, tokens in units:
        if held and (held + tokens > most or held >= target):
            yield begun, a
            begun, held = a, 0
        if tokens > most:
            yield from _cut(text, a, b, fences, most, how + 1)
            begun, held = b, 0
        else:
            held += tokens
    if held:
        yield begun, end


def _units(
    text: str, start: int, end: int, fences: list[Fence], how: int, most: int
) -> Iterator[tuple[int, int]]:
    """What is kept in one piece. how = 0: paragraphs with the code or list that they lead to, 1: blocks,
    2: lines, code blocks whole, 3: lines, 4: sentences, 5: a few characters."""
    if how == 5:  # a character is one token at most
        yield from ((a, min(a + most, end)) for a in range(start, end, most))
        return
    begun = start
    for place in _places(text, start, end, how):
        fence = _fence_at(fences, place) if how < 3 else None
        if fence is None and start < place < end:
            yield begun, place
            begun = place
    yield begun, end


def _places(text: str, start: int, end: int, how: int) -> Iterator[int]:
    if how == 4:
        yield from (found.end() for found in _SENTENCE.finditer(text, start, end))
        return
    pattern = r"\n" if how >= 2 else r"\n[ \t]*\n+"
    for found in re.finditer(pattern, text[start:end]):
        place = start + found.end()
        leads = text[start : start + found.start()].endswith(":") or text[place : place + 1] in " \t`~"
        if how > 0 or not leads:
            yield place


def _fence_at(fences: list[Fence], offset: int) -> Fence | None:
    """The code block that a cut at this offset would be inside of."""
    index = bisect_right(fences, offset, key=lambda f: f.start) - 1
    return fences[index] if index >= 0 and fences[index].start < offset < fences[index].end else None
