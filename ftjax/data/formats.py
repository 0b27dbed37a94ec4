"""Rows of files and data sets as one kind of example, whatever format they were written in."""

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.data.options import DataSource
from ftjax.errors import UserError


class BadExample(UserError):
    """One example that can't be trained on; `reason` is the short name that drops are counted by."""

    def __init__(self, reason: str, where: str, message: str):
        super().__init__(f"{where}: {message}")
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """What one row asks for.

    kind "chat" has `messages` (and `tools`); "text" has `text`; "preference" has the shared `messages` and
    the two continuations `chosen` and `rejected`. Prompt–completion rows are chats that also keep their
    `raw` strings (prompt, completion) for tokenizers without a chat template; preference rows of strings
    likewise (prompt, chosen, rejected).
    """

    where: str
    kind: str
    messages: list[dict] = field(default_factory=list)
    tools: list[dict] | None = None
    chosen: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    raw: tuple[str, ...] | None = None
    text: str = ""


class Row(NamedTuple):
    """One record: its 1-based line (or row number), the values, the share of the source read so far (0 to
    1)."""

    line: int
    values: dict[str, Any]
    done: float | None


FORMATS = {
    "chat": "messages: a list of {role, content}",
    "sharegpt": "conversations: a list of {from, value}",
    "prompt_completion": "prompt and completion (or response): two strings or two lists of messages",
    "alpaca": "instruction, output and perhaps input",
    "text": "text: a string",
    "preference": "chosen and rejected, with prompt or as whole conversations",
    "openai_preference": "input.messages, preferred_output and non_preferred_output",
    "hh": 'chosen and rejected as "\\n\\nHuman: … \\n\\nAssistant: …" strings',
}
PREFERENCE = frozenset(("preference", "openai_preference", "hh"))
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_DIALOGUE = re.compile(r"\n\n(Human|Assistant):")


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def is_file(source: DataSource) -> bool:
    """Whether the source is read as one local file (and not through `datasets`)."""
    path = Path(source.path).expanduser()
    return path.is_file() or (not path.is_dir() and _suffix(path) in _READERS)


def rows(source: DataSource, streaming: bool = False) -> Iterator[Row]:
    """The records of a file, one at a time, or of a `datasets` data set.

    Raises UserError, with file and line, for a missing, empty or broken file.
    """
    if not is_file(source):
        records = _dataset_rows(source, streaming)
    else:
        if source.split or source.name:
            raise UserError(f"{source.path} is a file: `split` and `name` belong to data sets; remove them")
        path = Path(source.path).expanduser()
        _must_exist(path)
        reader = _READERS.get(_suffix(path))
        if reader is None:
            raise UserError(
                f"{path}: unknown kind of file; readable are {', '.join(_READERS)} (each also with .gz)"
            )
        records = reader(path)
    empty = True
    for row in records:
        empty = False
        yield row._replace(values=_renamed(row.values, source, row.line)) if source.columns else row
    if empty:
        raise UserError(f"{source.path} holds no examples: the file is empty")


def source_digest(source: DataSource) -> str:
    """A hash of the source's bytes, for the cache."""
    if is_file(source):
        path = Path(source.path).expanduser()
        _must_exist(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    data = _load_dataset(source, streaming=False)
    return f"datasets-{data._fingerprint}"


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _must_exist(path: Path) -> None:
    if path.is_file():
        return
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if not path.parent.is_dir():
        hint = f"there is no folder {path.parent}"
    elif near:
        hint = f"did you mean {path.parent / near[0]}?"
    else:
        hint = f"the folder {path.parent.resolve()} has no such file"
    raise UserError(f"{path} does not exist: {hint}")


def _open(path: Path):
    """The file's bytes, unpacked if gzipped, and a function telling the share read so far."""
    raw = open(path, "rb")
    size = max(1, path.stat().st_size)
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return (gzip.GzipFile(fileobj=raw) if zipped else raw), lambda: min(1.0, raw.tell() / size)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where}: not UTF-8 text (byte {data[e.start]:#04x}); convert the file to UTF-8"
        ) from None


def _not_an_object(where: str, value: Any) -> UserError:
    kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), f"{value!r}")
    return UserError(f"{where}: each example has to be a JSON object like {{...}}; this is {kind}")


def _jsonl(path: Path) -> Iterator[Row]:
    file, done = _open(path)
    with file:
        for number, data in enumerate(file, 1):
            where = f"{path}:{number}"
            line = _decode(data, where)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as e:
                hint = "; the file looks like a JSON array: name it .json" if line.strip() in "[{" else ""
                raise UserError(f"{where}: broken JSON at column {e.colno}: {e.msg}{hint}") from None
            if not isinstance(value, dict):
                raise _not_an_object(where, value)
            yield Row(number, value, done())


def _json(path: Path) -> Iterator[Row]:
    file, _ = _open(path)
    with file:
        text = _decode(file.read(), str(path))
    if not text.lstrip().startswith("["):  # JSON lines in a .json file are common
        if text.strip():
            yield from _jsonl(path)
        return
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s]*")
    at, line, counted = text.index("[") + 1, 1, 0

    def line_at(position: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return line

    def broken(position: int, message: str) -> UserError:
        column = position - text.rfind("\n", 0, position)
        return UserError(
            f"{path}:{text.count(chr(10), 0, position) + 1}: broken JSON at column {column}: {message}"
        )

    first = True
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]" and first:
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as e:
            raise broken(e.pos, e.msg) from None
        number, first = line_at(at), False
        if not isinstance(value, dict):
            raise _not_an_object(f"{path}:{number}", value)
        yield Row(number, value, end / len(text))
        at = space.match(text, end).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            return
        if text[at : at + 1] != ",":
            raise broken(at, "Expecting ',' or ']' after an example")
        at += 1


def _csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    file, done = _open(path)
    csv.field_size_limit(2**31 - 1)
    with file:
        try:
            reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
            names = reader.fieldnames
            line = reader.line_num + 1
            for values in reader:
                where = f"{path}:{line}"
                if None in values or None in values.values():
                    raise UserError(
                        f"{where}: this row does not have the header's {len(names or [])} columns"
                    )
                yield Row(line, dict(values), done())
                line = reader.line_num + 1
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; convert the file to UTF-8") from None
        except csv.Error as e:
            raise UserError(f"{path}: broken CSV: {e}") from None


def _tsv(path: Path) -> Iterator[Row]:
    return _csv(path, "\t")


def _text(path: Path) -> Iterator[Row]:
    file, _ = _open(path)
    with file:
        text = _decode(file.read(), str(path))
    if text.strip():
        yield Row(1, {"text": text}, 1.0)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number, total = 0, max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(number, _from_arrow(values, f"{path}:{number}"), number / total)
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise UserError(f"{path}: not a readable Parquet file: {e}") from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
}


def _load_dataset(source: DataSource, streaming: bool) -> Any:
    import datasets

    path = Path(source.path).expanduser()
    split = source.split or "train"
    if not path.exists() and (source.path.startswith((".", "/", "~")) or source.path.count("/") > 1):
        _must_exist(path)
    try:
        if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise ValueError(f"no split {split!r}; it has {', '.join(map(str, data))}")
                data = data[split]
            return data.to_iterable_dataset() if streaming else data
        return datasets.load_dataset(source.path, source.name, split=split, streaming=streaming)
    except Exception as e:  # datasets raises many kinds, all about what the user named
        raise UserError(
            f"can't open the data set {source.path!r} (split {split!r}): {e}\n"
            f"A local file would end in {', '.join(_READERS)}."
        ) from e


def _dataset_rows(source: DataSource, streaming: bool) -> Iterator[Row]:
    data = _load_dataset(source, streaming)
    total = None if streaming else max(1, len(data))
    for number, values in enumerate(data, 1):
        yield Row(number, _from_arrow(values, f"{source.path}:{number}"), number / total if total else None)


def _from_arrow(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The row without the nulls that Arrow plants where rows of one column have different keys.

    Inside tool calls and tool schemas a planted null can't be told from a meant one: nulls there are an
    error.
    """

    def clean(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            if name in ("arguments", "parameters") and any(v is None for v in value.values()):
                raise UserError(
                    f"{where}: `{name}` has nulls, which Arrow adds where examples have different keys; "
                    "store it as a JSON string, or use JSONL"
                )
            return {k: clean(v, k) for k, v in value.items() if v is not None}
        if isinstance(value, list):
            return [clean(v, name) for v in value]
        return value

    return clean(values, "")


def _renamed(values: dict[str, Any], source: DataSource, line: int) -> dict[str, Any]:
    out = dict(values)
    for ours, theirs in source.columns.items():
        if theirs not in values:
            near = difflib.get_close_matches(theirs, list(values), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(str, values))}"
            raise UserError(
                f"{source.path}:{line}: `columns` maps {ours} to {theirs!r}, not in this row; {hint}"
            )
        out[ours] = values[theirs]
    return out


# ── formats ───────────────────────────────────────────────────────────────────────────────────────


def detect(values: dict[str, Any], where: str) -> str:
    """The name of the row's format, a key of FORMATS; raises UserError listing the keys seen and the
    formats."""
    keys = set(values)
    if isinstance(values.get("label"), bool) and keys & {"messages", "completion"}:
        raise UserError(
            f"{where}: the key `label` says which answers are bad (KTO's unpaired preferences), which can't "
            "be trained on yet; drop the bad ones, or set `format` to train on all of them alike"
        )
    if {"preferred_output", "non_preferred_output"} <= keys:
        return "openai_preference"
    if {"chosen", "rejected"} <= keys:
        both = (values["chosen"], values["rejected"])
        if "prompt" not in keys and all(isinstance(v, str) and _DIALOGUE.match(v) for v in both):
            return "hh"
        return "preference"
    if "messages" in keys:
        return "chat"
    if "conversations" in keys:
        return "sharegpt"
    if "prompt" in keys and keys & {"completion", "response"}:
        return "prompt_completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if "text" in keys:
        return "text"
    known = "\n".join(f"  {name}: {what}" for name, what in FORMATS.items())
    raise UserError(
        f"{where}: unknown format, with the keys {', '.join(sorted(map(str, keys))) or '(none)'}. "
        f"Known formats:\n"
        f"{known}\nOther names can be mapped with `columns`, e.g. {{prompt: question, completion: answer}}."
    )


def examples(
    source: DataSource,
    format: str | None = None,
    streaming: bool = False,
    formats_seen: list[str] | None = None,
) -> Iterator[tuple[Row, Example | BadExample]]:
    """Each row with its example, or with what is wrong with it (for the caller to raise or count).

    The format is `format`, the source's own, or the first row's; it is appended to `formats_seen` once known.
    A later row in another format raises UserError naming the line.
    """
    wanted = source.format or format
    if wanted is not None and wanted not in FORMATS:
        near = difflib.get_close_matches(wanted, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown data format {wanted!r}; {hint}known are {', '.join(FORMATS)}")
    name = wanted
    first: Row | None = None
    for row in rows(source, streaming):
        where = f"{source.path}:{row.line}"
        if wanted is None:
            seen = detect(row.values, where)
            if name is None or first is None:
                name, first = seen, row
            elif seen != name:
                raise UserError(
                    f"{where}: mixed formats: this row is {seen} (keys {_keys(row)}), but the file began as "
                    f"{name} (line {first.line}, keys {_keys(first)}). Put them in two files, "
                    "or set `format`."
                )
        assert name is not None
        if formats_seen is not None and not formats_seen:
            formats_seen.append(name)
        try:
            yield row, to_example(row.values, name, where)
        except BadExample as e:
            yield row, e


def content_hash(values: dict[str, Any]) -> int:
    """64 bits of a hash of the row, the same on every machine and wherever in a file the row stands."""
    data = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str).encode(
        "utf-8", "surrogatepass"
    )
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def to_example(values: dict[str, Any], format: str, where: str) -> Example:
    """The row as an Example; raises BadExample for a row that breaks its format's rules."""
    missing = [k for k in _REQUIRED[format] if k not in values]
    if format == "prompt_completion" and not missing and not {"completion", "response"} & set(values):
        missing = ["completion"]
    if missing:
        raise BadExample(
            "format", where, f"{', '.join(missing)} missing; {format} rows have {FORMATS[format]}"
        )
    return _CONVERT[format](values, where)


def _keys(row: Row) -> str:
    return ", ".join(map(str, row.values))


def _chat(values, where) -> Example:
    messages = conversation(values["messages"], where)
    _has_answer(messages, where)
    return Example(where, "chat", messages, tools=_tools(values.get("tools"), where))


def _sharegpt(values, where) -> Example:
    turns = _parsed(values["conversations"], where, "conversations")
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    messages = []
    for i, turn in enumerate(turns if isinstance(turns, list) else []):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise BadExample("format", where, f"conversations[{i}] has to be {{from, value}}")
        if turn["from"] == "function_call":
            call = _parsed(turn["value"], where, f"conversations[{i}].value")
            messages.append({"role": "assistant", "tool_calls": call})
        else:
            messages.append({"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]})
    if values.get("system"):
        messages.insert(0, {"role": "system", "content": values["system"]})
    return _chat({"messages": messages, "tools": values.get("tools")}, where)


def _prompt_completion(values, where) -> Example:
    prompt = values["prompt"]
    completion = values["completion"] if "completion" in values else values["response"]
    asked = _as_messages(prompt, "user", "prompt", where)
    given = _as_messages(completion, "assistant", "completion", where)
    _has_answer(given, where)
    # What the prompt holds is context, whoever said it.
    messages = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in asked] + given
    raw = (prompt, completion) if isinstance(prompt, str) and isinstance(completion, str) else None
    return Example(where, "chat", messages, tools=_tools(values.get("tools"), where), raw=raw)


def _alpaca(values, where) -> Example:
    instruction, extra = values["instruction"], values.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(extra, str):
        raise BadExample("format", where, "instruction and input have to be strings")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    example = _prompt_completion({"prompt": prompt, "completion": values["output"]}, where)
    messages = example.messages
    if isinstance(values.get("system"), str) and values["system"].strip():
        messages = [{"role": "system", "content": values["system"]}, *messages]
    # Without a template something has to tell the instruction from its answer: an empty line.
    return Example(where, "chat", messages, raw=(prompt + "\n\n", str(values["output"])))


def _plain(values, where) -> Example:
    if not isinstance(values["text"], str):
        raise BadExample("format", where, f"text has to be a string, not {type(values['text']).__name__}")
    if not values["text"].strip():
        raise BadExample("empty_content", where, "text is empty")
    return Example(where, "text", text=values["text"])


def _preference(values, where) -> Example:
    tools = _tools(values.get("tools"), where)
    chosen, rejected = values["chosen"], values["rejected"]
    prompt = values.get("prompt")
    if prompt is None:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise BadExample(
                "format", where, "chosen and rejected are strings, so the row needs a prompt too"
            )
        both = conversation(chosen, where, "chosen"), conversation(rejected, where, "rejected")
        return _pair_of_conversations(*both, where, tools)
    asked = _as_messages(prompt, "user", "prompt", where)
    strings = all(isinstance(v, str) for v in (prompt, chosen, rejected))
    return _pair(
        asked,
        _as_messages(chosen, "assistant", "chosen", where),
        _as_messages(rejected, "assistant", "rejected", where),
        where,
        tools,
        (prompt, chosen, rejected) if strings else None,
    )


def _openai_preference(values, where) -> Example:
    given = values["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise BadExample("format", where, "input has to be {messages: [...]}")
    return _pair(
        conversation(given["messages"], where, "input.messages"),
        conversation(values["preferred_output"], where, "preferred_output"),
        conversation(values["non_preferred_output"], where, "non_preferred_output"),
        where,
        _tools(given.get("tools"), where),
    )


def _hh(values, where) -> Example:
    def dialogue(text: str, name: str) -> list[dict]:
        if not isinstance(text, str) or not _DIALOGUE.match(text):
            raise BadExample(
                "format", where, f'{name} has to be a "\\n\\nHuman: … \\n\\nAssistant: …" string'
            )
        parts = _DIALOGUE.split(text)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = [
            {"role": roles[who], "content": said.strip()}
            for who, said in zip(parts[::2], parts[1::2], strict=True)
        ]
        return conversation(turns, where, name)

    return _pair_of_conversations(
        dialogue(values["chosen"], "chosen"), dialogue(values["rejected"], "rejected"), where
    )


def _pair_of_conversations(chosen: list[dict], rejected: list[dict], where: str, tools=None) -> Example:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise BadExample("equal_pair", where, "chosen and rejected are the same")
    if shared in (len(chosen), len(rejected)):
        # One goes on where the other stops, so the last turn that both have is what is compared.
        shared -= 1
        while shared >= 0 and chosen[shared]["role"] != "assistant":
            shared -= 1
    return _pair(chosen[: max(0, shared)], chosen[max(0, shared) :], rejected[max(0, shared) :], where, tools)


def _pair(prompt, chosen, rejected, where, tools=None, raw=None) -> Example:
    for name, part in (("chosen", chosen), ("rejected", rejected)):
        if not any(m["role"] == "assistant" for m in part):
            raise BadExample(
                "no_assistant", where, f"{name} has no assistant turn of its own, so nothing to compare"
            )
    if chosen == rejected:
        raise BadExample("equal_pair", where, "chosen and rejected are the same")
    context = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in prompt]
    return Example(where, "preference", context, tools=tools, chosen=chosen, rejected=rejected, raw=raw)


_REQUIRED = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "openai_preference": ("input", "preferred_output", "non_preferred_output"),
    "hh": ("chosen", "rejected"),
}
_CONVERT: dict[str, Callable[[dict, str], Example]] = {
    "chat": _chat,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _plain,
    "preference": _preference,
    "openai_preference": _openai_preference,
    "hh": _hh,
}


# ── messages ──────────────────────────────────────────────────────────────────────────────────────


def conversation(messages: Any, where: str, name: str = "messages") -> list[dict]:
    """The messages checked and in one form: string contents, dict arguments, `reasoning_content`, float
    `weight`.

    Raises BadExample for a wrong role, an empty content, or a part that is no text.
    """
    messages = _parsed(messages, where, name)
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list) or not messages:
        raise BadExample("format", where, f"{name} has to be a list of {{role, content}} that is not empty")
    return [_message(m, f"{name}[{i}]", where) for i, m in enumerate(messages)]


def _message(message: Any, name: str, where: str) -> dict:
    if not isinstance(message, dict) or "role" not in message:
        raise BadExample("format", where, f"{name} has to be an object with role and content")
    role = message["role"]
    if role not in ROLES:
        near = [_ALIASES[role]] if role in _ALIASES else difflib.get_close_matches(str(role), ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"roles are {', '.join(ROLES)}"
        raise BadExample("wrong_role", where, f"{name} has the role {role!r}; {hint}")
    out = {k: v for k, v in message.items() if v is not None and k not in ("thinking", "reasoning")}
    out["content"] = _content(message.get("content"), name, where)
    if role != "assistant":
        if out.pop("weight", 0):
            raise BadExample(
                "wrong_role", where, f"{name} has a weight, but only assistant messages are trained on"
            )
        if not out["content"].strip() and role == "user":
            raise BadExample("empty_content", where, f"{name} ({role}) has an empty content")
        return out
    thought = next(
        (message[k] for k in ("reasoning_content", "thinking", "reasoning") if message.get(k)), None
    )
    if thought is not None:
        out["reasoning_content"] = _content(thought, f"{name}.reasoning_content", where)
    if message.get("tool_calls"):
        out["tool_calls"] = _tool_calls(message["tool_calls"], name, where)
    else:
        out.pop("tool_calls", None)
    if not out["content"].strip() and "tool_calls" not in out:
        raise BadExample("empty_content", where, f"{name} (assistant) has an empty content and no tool_calls")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise BadExample("format", where, f"{name}.weight is {weight!r}; it has to be a number from 0")
    out["weight"] = float(weight)
    return out


def _content(content: Any, name: str, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = []
        for part in content:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise BadExample(
                    "format", where, f"{name}.content has a part of type {kind!r}; only text can be trained"
                )
        return "".join(parts)
    raise BadExample("format", where, f"{name}.content has to be a string, not {type(content).__name__}")


def _tool_calls(calls: Any, name: str, where: str) -> list[dict]:
    calls = _parsed(calls, where, f"{name}.tool_calls")
    out = []
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function", call) if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise BadExample(
                "format", where, f"{name}.tool_calls[{i}] has to be {{function: {{name, arguments}}}}"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except json.JSONDecodeError as e:
                raise BadExample(
                    "format",
                    where,
                    f"{name}.tool_calls[{i}].function.arguments is no JSON: {e.msg} at column {e.colno}",
                ) from None
        call = (
            {k: v for k, v in call.items() if k != "function" and v is not None} if "function" in call else {}
        )
        out.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
    return out


def _tools(tools: Any, where: str) -> list[dict] | None:
    tools = _parsed(tools, where, "tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise BadExample("format", where, "tools has to be a list of JSON schemas")
    return tools


def _parsed(value: Any, where: str, name: str) -> Any:
    """The value, read from JSON if it is a string that looks like it (CSV and Parquet cells)."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as e:
            raise BadExample("format", where, f"{name} is broken JSON: {e.msg} at column {e.colno}") from None
    return value


def _as_messages(value: Any, role: str, name: str, where: str) -> list[dict]:
    if isinstance(value, str):
        if not value.strip():
            raise BadExample("empty_content", where, f"{name} is empty")
        value = [{"role": role, "content": value}]
    return conversation(value, where, name)


def _has_answer(messages: list[dict], where: str) -> None:
    if not any(m["role"] == "assistant" for m in messages):
        raise BadExample("no_assistant", where, "no assistant turn, so there is nothing to train on")
