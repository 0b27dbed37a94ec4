"""The quickstart's task: a helpdesk message in, a ticket of a fixed JSON schema out.

The three ways of getting the job done that the quickstart compares are three prompts made here.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ftjax.evaluate import metrics

SPLITS = ("train", "eval", "test")

SYSTEM = "Route."
"""All the instruction that the tuned model gets: one word, so that no chat template adds its own."""

INSTRUCTION = """\
You route messages to the helpdesk of a shop for small appliances. Answer with one line of JSON only:
{"team":…,"priority":…,"item":…,"order":…}
team: "billing" for charges, invoices, vouchers and refunds not yet paid out; "delivery" for parcels that are
late, lost, damaged, wrong or not to be sent; "returns" for sending back or exchanging; "repair" for faults,
use, cleaning, parts and manuals, and for everything dangerous; "account" for login, profile, data and
newsletter; "sales" for questions before buying, praise and ideas.
priority: "urgent" if there is danger (fire, smoke, sparks, electric shock, injury); else "high" if the
customer names a day by which it must be done, or a stranger uses their account or card; else "normal".
Angry or hurried words alone change nothing.
item: "kettle", "toaster", "blender", "vacuum", "heater", "fan", "lamp" or "scale", also when the message
uses another word for it; null if it names none.
order: the four digits of the order number as a string; null if there is none."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """A message and the ticket that it should become."""

    message: str
    ticket: dict[str, Any]

    @property
    def answer(self) -> str:
        """The ticket as the data spells it: compact JSON, keys in the schema's order."""
        return json.dumps(self.ticket, separators=(",", ":"))


@dataclass(frozen=True)
class FewShot:
    """One way to write the few-shot prompt."""

    k: int
    """Examples from the train split."""
    instruction: Literal["none", "system", "user"]
    """Where the whole instruction stands: nowhere, in the system prompt, before the first user's message."""
    cue: bool = False
    """Whether each message is written "Message: …", "JSON:" on the next line."""
    turns: bool = True
    """Whether the examples are earlier turns of the conversation; otherwise all stand in one user's turn."""


FEW_SHOT_CANDIDATES = (
    *(FewShot(k, place) for place in ("none", "system", "user") for k in (2, 4, 8)),
    *(FewShot(k, "user", cue=True) for k in (2, 4, 8)),
    *(FewShot(k, "user", cue=True, turns=False) for k in (2, 8)),
)

FEW_SHOT = FewShot(k=4, instruction="system")
"""The candidate with the best exact match on the eval split; README.md in this folder has the table."""


def path(split: str) -> Path:
    """The JSONL file of a split."""
    return Path(str(resources.files("ftjax.quickstart") / f"{split}.jsonl"))


@functools.cache
def schema() -> Mapping[str, Any]:
    """The JSON Schema of a ticket."""
    return json.loads((path("train").parent / "schema.json").read_text(encoding="utf-8"))


@functools.cache
def rows(split: str) -> tuple[Row, ...]:
    """The rows of "train", "eval" or "test", in the file's order."""
    messages = [json.loads(line)["messages"] for line in path(split).read_text(encoding="utf-8").splitlines()]
    return tuple(Row(user["content"], json.loads(assistant["content"])) for _, user, assistant in messages)


def short_prompt(message: str) -> Messages:
    """What the tuned model gets, and what the data files hold."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]


def instruction_prompt(message: str) -> Messages:
    """The schema and every rule in words.

    In the user's turn and with a cue: as a system prompt a small model ignores it and chats.
    """
    content = f"{INSTRUCTION}\n\nMessage: {message}\nJSON:"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def few_shot_prompt(message: str, examples: Sequence[Row], style: FewShot = FEW_SHOT) -> Messages:
    """The examples, then the message; all messages' prompts are the same up to the message."""

    def asked(message: str) -> str:
        return f"Message: {message}\nJSON:" if style.cue else message

    system = INSTRUCTION if style.instruction == "system" else SYSTEM
    opening = f"{INSTRUCTION}\n\n" if style.instruction == "user" else ""
    prompt = [{"role": "system", "content": system}]
    if not style.turns:
        shown = [f"{asked(row.message)} {row.answer}" for row in examples]
        return [*prompt, {"role": "user", "content": opening + "\n\n".join([*shown, asked(message)])}]
    for row in examples:
        prompt.append({"role": "user", "content": opening + asked(row.message)})
        prompt.append({"role": "assistant", "content": row.answer})
        opening = ""
    return [*prompt, {"role": "user", "content": opening + asked(message)}]


def few_shot_examples(k: int = FEW_SHOT.k) -> list[Row]:
    """k rows of the train split, each chosen to show the most field values that those before it do not.

    An order number counts as shown or not, whichever it is; ties go to the earlier row.
    """
    chosen: list[Row] = []
    seen: set[tuple[str, Any]] = set()

    def values(row: Row) -> set[tuple[str, Any]]:
        return {(key, bool(value) if key == "order" else value) for key, value in row.ticket.items()}

    for _ in range(k):
        best = max(
            (row for row in rows("train") if row not in chosen), key=lambda row: len(values(row) - seen)
        )
        chosen.append(best)
        seen |= values(best)
    return chosen


@dataclass(frozen=True)
class Scores:
    """One entry an item, in the order of the predictions."""

    exact: list[bool]
    """The ticket is right in all four fields."""
    valid: list[bool]
    """There is a ticket, and the schema accepts it."""
    fields: dict[str, list[bool]]
    """Each field by itself."""


def parse(text: str) -> dict[str, Any] | None:
    """The first JSON object in a model's answer, prose and code fences forgiven; None without one."""
    try:
        return metrics.parse_json(text, anywhere=True)
    except ValueError:
        return None


def score(predictions: Sequence[str], wanted: Sequence[Row]) -> Scores:
    """Scores model answers, all arms by the same lenient reading (`parse`)."""
    tickets = [row.ticket for row in wanted]
    return Scores(
        exact=metrics.json_match(predictions, tickets, anywhere=True),
        valid=metrics.schema_valid(predictions, schema(), anywhere=True),
        fields=metrics.field_match(predictions, tickets, anywhere=True),
    )
