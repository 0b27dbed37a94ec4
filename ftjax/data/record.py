"""The canonical record, one example of any format, and the verdicts that steps give on records."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from ftjax.data.codes import CODES

Task = Literal["sft", "lm", "prompt_only", "preference", "unpaired", "stepwise"]
TASKS: tuple[str, ...] = get_args(Task)


@dataclass
class Record:
    """One example.

    `messages` are OpenAI's, in one form: content a string (or, where there are images, a list of parts),
    tool calls' arguments objects, an assistant's `weight` (default 1.0) says whether it is trained,
    `reasoning_content` holds its thinking. What they are depends on the task:

    - sft, unpaired: the whole conversation (unpaired: with `label`, whether its answer is a good one)
    - prompt_only: it ends before the answer
    - preference: the shared beginning; `chosen` and `rejected` go on from it
    - lm: none; `text` is plain text, all of it trained
    - stepwise: the prompt; `completions` are the steps of the answer, each with one of `labels`
    """

    task: Task
    messages: list[dict] = field(default_factory=list)
    text: str = ""
    tools: list[dict] | None = None
    chosen: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    label: bool | None = None
    completions: list[str] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    weight: float = 1.0
    """Of the whole example, in the loss."""
    raw: tuple[str, ...] | None = None
    """The strings of a row that had no messages (prompt, completion or prompt, chosen, rejected), for
    tokenizers without a chat template."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Provenance and what steps found: source (the file that it first came from), line, license, url,
    section, offset, group (rows that must stay on one side of a split), cluster, split, scores …"""
    where: str = ""
    """ "file:line" as it was read now; not saved."""
    given: tuple[str, dict[str, Any]] | None = field(default=None, compare=False, repr=False)
    """The format and the values of the row that it was read from now; not saved."""

    @property
    def id(self) -> str:
        """16 hex digits of a hash of the content; equal content has equal ids, whatever its provenance."""
        content = {k: v for k, v in self.to_json().items() if k not in ("id", "meta")}
        data = json.dumps(content, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return hashlib.sha256(data).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The record as the values of a row of the format "ftjax", without what is empty."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("where", "given") or value is None or value in ([], {}, ""):
                continue
            if f.name == "weight" and value == 1.0:
                continue
            out["sample_weight" if f.name == "weight" else f.name] = list(value) if f.name == "raw" else value
        return out

    @staticmethod
    def from_json(values: dict[str, Any], where: str = "") -> "Record":
        """The record of a row that `to_json` made; nothing is checked."""
        values = {k: v for k, v in values.items() if k != "id"}
        raw = values.pop("raw", None)
        return Record(
            weight=values.pop("sample_weight", 1.0), raw=tuple(raw) if raw else None, where=where, **values
        )

    def verdict(self, code: str, text: str, path: str = "", fix: str = "") -> "Verdict":
        """A verdict on this record, with its place."""
        return Verdict(code, text, path, self.meta.get("source", ""), self.meta.get("line", 0), fix)

    def prompt_text(self, system: bool = True) -> str:
        """What is asked, as text: every message that is not trained (its system prompts only if wanted)."""
        skipped = () if system else ("system", "developer")
        asked = [m for m in self.messages if not is_trained(m) and m["role"] not in skipped]
        return "\n".join(text_of(m) for m in asked)

    def answer_text(self) -> str:
        """What is trained, as text: the trained messages (preference: `chosen`), the steps, or the plain
        text."""
        if self.task == "lm":
            return self.text
        if self.task == "stepwise":
            return "\n".join(self.completions)
        given = self.chosen if self.task == "preference" else [m for m in self.messages if is_trained(m)]
        return "\n".join(text_of(m) for m in given)


def hash64(data: str | bytes) -> int:
    """64 bits of a hash, the same on every machine."""
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def is_trained(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1.0) > 0


def text_of(message: dict) -> str:
    """A message's text: its content's text parts and, as JSON, its tool calls."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    calls = message.get("tool_calls") or []
    said = [json.dumps(call["function"], ensure_ascii=False, sort_keys=True) for call in calls]
    return "\n".join(filter(None, [content, *said]))


@dataclass(frozen=True)
class Verdict:
    """What is said of one place of one row."""

    code: str
    """A key of CODES."""
    text: str
    """What was found there."""
    path: str = ""
    """Where in the row, e.g. messages[3].tool_calls[0].function.arguments."""
    source: str = ""
    line: int = 0
    fix: str = ""
    """What would be right; the code's own advice if absent."""

    @property
    def severity(self) -> str:
        return CODES[self.code].severity

    def to_json(self) -> dict[str, Any]:
        code = CODES[self.code]
        return {**asdict(self), "name": code.name, "severity": code.severity, "fix": self.fix or code.fix}


@dataclass
class Judged:
    """What a step makes of one record: a record that goes on, perhaps changed, or None where it ends here;
    a record that ends has at least one verdict that says why."""

    record: Record | None
    verdicts: list[Verdict] = field(default_factory=list)
    changed: bool = False


class Findings(list[Verdict]):
    """The verdicts on one row, as it is read or checked."""

    def __init__(self, source: str = "", line: int = 0):
        super().__init__()
        self.source, self.line = source, line

    def add(self, code: str, path: str, text: str, fix: str = "") -> None:
        self.append(Verdict(code, text, path, self.source, self.line, fix))

    @property
    def error(self) -> Verdict | None:
        """The first that is an error."""
        return next((v for v in self if v.severity == "error"), None)
