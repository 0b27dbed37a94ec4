"""What a format is: how its rows are told from others', read as records, and written."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ftjax.data.record import Findings, Record


@dataclass
class Written:
    """A record as rows of a format: none where the format can't say it, and then `refused` says why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    """What of the record the rows do not hold, as in LOSSES."""
    refused: tuple[str, str] | None = None
    """A code and what was found."""


@dataclass(frozen=True)
class Format:
    """One format of rows."""

    name: str
    says: str
    """Its keys, in words, for messages."""
    tasks: tuple[str, ...]
    """The tasks whose records it can write, the likeliest first."""
    required: tuple[str, ...]
    """Keys without which a row is not of this format."""
    read: Callable[[dict[str, Any], Findings], Record | None]
    """The row's record; what is wrong or unusual goes to the findings. None only with an error there."""
    write: Callable[[Record], Written]
    """A record of one of the tasks as a row."""


LOSSES: dict[str, str] = {
    "meta": "provenance and notes (`meta`)",
    "example weight": "the weight of the example",
    "weight": "message weights",
    "fractional weight": "message weights between 0 and 1, and above (0 or 1 is written)",
    "raw": "how the row reads without a chat template",
    "tools": "descriptions of tools",
    "tool call ids": "the ids of tool calls (new ones are made)",
    "reasoning": "reasoning",
    "name": "names and other keys of messages",
    "developer": "the role developer (written as system)",
    "system": "system messages",
    "earlier answers": "that answers before the last are trained",
    "roles": "who says what",
    "trained part": "what is trained (all of the text is)",
    "shared turns": "that equal first turns of both answers are trained",
    "tool defaults": "that a tool had no description or parameters (empty ones are written)",
    "joined calls": "that text and tool calls were one message (two are written)",
    "edges": "white space at the ends of messages",
    "answer": "the answer",
    "rejected": "the worse answer",
    "label": "whether the answer is a good one",
    "steps": "the steps of the answer and their labels",
}
"""What a conversion may lose: its name and in words."""
