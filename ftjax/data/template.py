"""Chat templates: the tokenizer's own Jinja, run with a fixed date and with marks in the text."""

import datetime
import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The marks of a second render: characters of the private-use planes, one for each place, so that a mark
# survives whatever a template does to a string and never looks like text.
PLANES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_MARKS = {plane: re.compile(f"[{chr(plane.start)}-{chr(plane.stop - 1)}]") for plane in PLANES}


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: the tag around what the model writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_emit", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _emit(self, context, caller):
        marks = context.get("_generation_marks")
        return f"{marks[0]}{caller()}{marks[1]}" if marks else caller()


def _json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )  # jinja2's own tojson escapes HTML


def _raise(message: str):
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A compiled template with the variables every render gets (special tokens, the user's arguments).

    `date` (YYYY-MM-DD) is what `strftime_now` sees: today's would change every render and cache daily.
    """

    def __init__(self, source: str, variables: dict[str, Any], date: str):
        fixed = datetime.datetime.fromisoformat(date)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = fixed.strftime
        self.source = source
        self.marks_generation = "generation" in _tags(environment, source)
        self._template = environment.from_string(source)
        self._variables = variables

    def __call__(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        variables: dict[str, Any] | None = None,
        generation_marks: tuple[str, str] | None = None,
    ) -> str:
        """The text; raises jinja2.TemplateError or TypeError where the template refuses the messages."""
        return self._template.render(
            **{**self._variables, **(variables or {})},
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            _generation_marks=generation_marks,
        )


def _tags(environment: jinja2.Environment, source: str) -> set[str]:
    """The names of the block tags in a template."""
    tags, opened = set(), False
    for _, kind, value in environment.lex(source):
        if kind == "block_begin":
            opened = True
        elif opened and kind == "name":
            tags.add(value)
            opened = False
    return tags


def unmark(text: str, plane: range) -> tuple[str, dict[int, list[int]]]:
    """The text without the marks of a plane, and where in it each mark (its number in the plane) stood."""
    kept: list[str] = []
    places: dict[int, list[int]] = {}
    length = begin = 0
    for mark in _MARKS[plane].finditer(text):
        kept.append(text[begin : mark.start()])
        length += mark.start() - begin
        begin = mark.end()
        places.setdefault(ord(mark[0]) - plane.start, []).append(length)
    kept.append(text[begin:])
    return "".join(kept), places


def free_plane(strings: Iterable[str]) -> range | None:
    """A private-use plane none of the strings has a character of."""
    free = list(PLANES)
    for string in strings:
        if string and max(string) >= chr(PLANES[0].start):
            free = [plane for plane in free if not _MARKS[plane].search(string)]
    return free[0] if free else None
