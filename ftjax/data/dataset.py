"""Tokenised data on disk: flat memory-mapped arrays, made once for a file, tokenizer, template and
options."""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.data import formats
from ftjax.data.examples import BadExample, content_hash, examples
from ftjax.data.options import DataOptions, DataSource
from ftjax.data.read import Row, source_digest
from ftjax.data.record import Record
from ftjax.data.render import Rendered, Renderer, read_template
from ftjax.errors import UserError

log = logging.getLogger("ftjax")

Progress = Callable[[str, float | None, int], None]
"""Called now and then while a source is tokenised: its path, the share read (0 to 1 or None), the
examples."""

_ARRAYS = {
    "tokens": np.int32,
    "loss_weight": np.float32,
    "lengths": np.int32,
    "lines": np.int64,
    "hashes": np.uint64,
}
_LEFT_OUT = ("W116", "W117")
_CHUNK = 256  # examples tokenised at once: enough to keep the tokenizer's threads busy


@dataclass
class Report:
    """What became of one source's examples."""

    source: str
    format: str = ""
    rows: int = 0
    units: int = 0
    documents: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    """Tokens of the longest unit."""
    truncated: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    """Examples left out, by reason."""
    first_drop: dict[str, str] = field(default_factory=dict)
    """The message of the first example left out for each reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """Things worth knowing, and how many documents each is true of."""
    cached: bool = False

    def say(self, row: Row) -> None:
        """Notes what reading the row left out of it."""
        for verdict in row.said:
            if verdict.code in _LEFT_OUT:
                self.notes[verdict.text] = self.notes.get(verdict.text, 0) + 1

    def add(self, result: list[tuple[Rendered, ...]] | BadExample, on_bad: str) -> list[tuple[Rendered, ...]]:
        """Counts one example and gives its units; raises what is wrong with it unless `on_bad` is "drop"."""
        self.rows += 1
        if isinstance(result, BadExample):
            if on_bad == "error":
                raise UserError(
                    f"{result}\n(`on_bad: drop` leaves such examples out and counts them.)"
                ) from result
            self.drops[result.reason] = self.drops.get(result.reason, 0) + 1
            self.first_drop.setdefault(result.reason, str(result))
            return []
        for unit in result:
            self.units += 1
            self.documents += len(unit)
            self.longest = max(self.longest, sum(len(d.tokens) for d in unit))
            for document in unit:
                self.tokens += len(document.tokens)
                self.trained += int(np.count_nonzero(document.loss_weight))
                self.truncated += document.truncated
                for note in document.notes:
                    self.notes[note] = self.notes.get(note, 0) + 1
        return result


def effective_on_bad(options: DataOptions, result: Any) -> str:
    """How a bad example is met: one that is too long by `overlong`, others by `on_bad`."""
    if isinstance(result, BadExample) and result.reason == "overlong" and options.overlong == "drop":
        return "drop"
    return options.on_bad


class Store:
    """One tokenised source: unit i is documents [i·k, (i+1)·k), k = documents_per_unit (2 for preference
    pairs)."""

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text())
        self.report = Report(**meta["report"])
        self.documents_per_unit: int = meta["documents_per_unit"]
        arrays = {}
        for name, dtype in _ARRAYS.items():
            path, count = folder / f"{name}.bin", meta["counts"][name]
            if path.stat().st_size != count * np.dtype(dtype).itemsize:
                raise OSError(f"{path} is not as long as it was written")
            arrays[name] = np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
        self.tokens, self.loss_weight = arrays["tokens"], arrays["loss_weight"]
        self.lines, self.hashes = arrays["lines"], arrays["hashes"]
        self._starts = np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)])
        self.unit_lengths: np.ndarray = (
            np.add.reduceat(
                arrays["lengths"], np.arange(0, len(arrays["lengths"]), self.documents_per_unit)
            ).astype(np.int32)
            if len(arrays["lengths"])
            else np.empty(0, np.int32)
        )

    def __len__(self) -> int:
        return len(self.lines)

    def documents(self, unit: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, loss_weight) of each of the unit's documents."""
        k = self.documents_per_unit
        spans = [slice(self._starts[d], self._starts[d + 1]) for d in range(unit * k, unit * k + k)]
        return [(self.tokens[s], self.loss_weight[s]) for s in spans]

    def where(self, unit: int) -> str:
        return f"{self.report.source}:{self.lines[unit]}"


class Units:
    """The units of several sources under one numbering, each source a selection of its store."""

    def __init__(self, stores: list[Store], selections: list[np.ndarray], weights: list[float] | None = None):
        self.stores, self.selections, self.weights = stores, selections, weights
        self.starts = np.concatenate([[0], np.cumsum([len(s) for s in selections])]).astype(np.int64)
        self.lengths: np.ndarray = np.concatenate(
            [store.unit_lengths[chosen] for store, chosen in zip(stores, selections, strict=True)]
        )
        """Tokens of each unit, int32 [units]."""
        self.documents_per_unit = stores[0].documents_per_unit

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, unit: int) -> tuple[Store, int]:
        source = int(np.searchsorted(self.starts, unit, "right")) - 1
        return self.stores[source], int(self.selections[source][unit - self.starts[source]])

    def documents(self, unit: int) -> list[tuple[np.ndarray, np.ndarray]]:
        store, index = self._find(unit)
        return store.documents(index)

    def where(self, unit: int) -> str:
        """The unit's "file:line"."""
        store, index = self._find(unit)
        return store.where(index)

    def fingerprint(self) -> str:
        """sha256 over every unit's content hash and length, in order, and the weights."""
        digest = hashlib.sha256(repr(self.weights).encode())
        digest.update(self.lengths.tobytes())
        for store, chosen in zip(self.stores, self.selections, strict=True):
            digest.update(np.asarray(store.hashes)[chosen].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """A run's tokenised data. `train` is None for streamed data, which the loader reads itself."""

    train: Units | None
    eval: Units | None
    reports: list[Report]
    renderer: Renderer


def sources(setting: str | list[DataSource]) -> list[DataSource]:
    """The sources of a `train` or `eval` setting, their weights checked."""
    found = [DataSource(setting)] if isinstance(setting, str) else list(setting)
    if not found:
        raise UserError("data: the list of sources is empty")
    weights = [s.weight for s in found]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise UserError("data: give a weight for every source or for none")
    if any(w is not None and not w > 0 for w in weights):
        raise UserError(f"data: weights have to be above 0, not {', '.join(map(str, weights))}")
    return found


def make_renderer(options: DataOptions, tokenizer) -> Renderer:
    return Renderer(
        tokenizer,
        chat_template=read_template(options.chat_template),
        template_args=options.template_args,
        template_date=options.template_date,
        train_on=options.train_on,
        max_length=options.max_length,
        overlong=options.overlong,
    )


def load(options: DataOptions, tokenizer, progress: Progress | None = None) -> Data:
    """The run's training and evaluation data, tokenised or found in the cache. Raises UserError."""
    check(options)
    check_formats(options)
    renderer = make_renderer(options, tokenizer)
    training = sources(options.train)
    stores = [] if options.streaming else [tokenise(s, renderer, options, progress) for s in training]
    held_out = (
        [tokenise(s, renderer, options, progress) for s in sources(options.eval)] if options.eval else []
    )
    kinds = {s.documents_per_unit for s in stores + held_out}
    if len(kinds) > 1:
        listed = ", ".join(f"{s.report.source} ({s.report.format})" for s in stores + held_out)
        raise UserError(f"data: preference pairs can't be mixed with other data: {listed}")
    threshold = int(options.eval_fraction * 2**64)
    chosen, kept = [], []
    for store in stores:
        mask = np.asarray(store.hashes) < np.uint64(threshold) if threshold else np.zeros(len(store), bool)
        kept.append(np.flatnonzero(~mask))
        chosen.append(np.flatnonzero(mask))
    train = None
    if not options.streaming:
        for source, part in zip(training, kept, strict=True):
            if not len(part):
                raise UserError(
                    f"{source.path}: eval_fraction {options.eval_fraction} leaves no example to train on"
                )
        weights = [float(s.weight) for s in training if s.weight is not None]
        train = Units(stores, kept, weights or None)
    evaluation = None
    if held_out:
        evaluation = Units(held_out, [np.arange(len(s)) for s in held_out])
    elif threshold:
        if not sum(map(len, chosen)):
            raise UserError(
                f"data.eval_fraction {options.eval_fraction} of {sum(map(len, stores))} examples leaves none "
                "to evaluate on; raise it or give data.eval"
            )
        evaluation = Units(stores, chosen)
    return Data(train, evaluation, [s.report for s in stores + held_out], renderer)


def check(options: DataOptions) -> None:
    """Raises UserError for settings that contradict each other or have no effect."""
    if options.max_length < 2:
        raise UserError(f"data.max_length is {options.max_length}; it has to be at least 2")
    if not 0 <= options.eval_fraction < 1:
        raise UserError(f"data.eval_fraction is {options.eval_fraction}; it has to be at least 0 and below 1")
    if options.eval and options.eval_fraction:
        raise UserError("data: give eval or eval_fraction, not both")
    if options.streaming and options.eval_fraction:
        raise UserError(
            "data: eval_fraction needs data that is tokenised first; with streaming give data.eval"
        )
    if options.buckets:
        if options.packing != "none":
            raise UserError(
                f'data.buckets has no effect with packing "{options.packing}"; set packing to "none"'
            )
        if sorted(set(options.buckets)) != list(options.buckets) or options.buckets[0] < 1:
            raise UserError(f"data.buckets {list(options.buckets)} has to grow, from 1 at least")
        if options.buckets[-1] != options.max_length:
            raise UserError(
                f"data.buckets ends with {options.buckets[-1]}, but max_length is {options.max_length}; "
                "they have to be equal"
            )
    if options.streaming and options.packing == "none":
        raise UserError(
            'data: streaming packs as it reads; packing "none" needs data that is tokenised first'
        )


def check_formats(options: DataOptions) -> None:
    """Raises UserError for settings that have no effect on data of the formats found: the first row of each
    source is read, where there is such a setting."""
    for_chats = [
        name
        for name, default in (("chat_template", None), ("template_args", {}), ("train_on", "assistant"))
        if getattr(options, name) != default
    ]
    if not for_chats and options.overlong != "split":
        return
    found: dict[str, str] = {}  # format -> task
    for source in sources(options.train) + (sources(options.eval) if options.eval else []):
        seen: list[str] = []
        _, first = next(examples(source, options.format, options.streaming, seen), (None, None))
        for name in seen:
            known = isinstance(first, Record)
            found[name] = first.task if known else formats.FORMATS[name].tasks[0]
    tasks = set(found.values())
    if for_chats and tasks == {"lm"}:
        raise UserError(
            f"data.{', data.'.join(for_chats)}: no effect on plain text, which is what the data is (format "
            "text): it is not rendered as a chat, and all of it is trained on; leave the setting out"
        )
    whole = tasks - {"preference"} if options.train_on == "all" else tasks & {"lm"}
    if options.overlong == "split" and found and not whole:
        raise UserError(
            f"data.overlong: split cuts only plain text, and this data is {', '.join(sorted(found))}; set it "
            "to error, drop or truncate"
        )


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────


def cache_folder(options: DataOptions) -> Path:
    base = options.cache_dir or os.environ.get("FTJAX_CACHE") or "~/.cache/ftjax"
    return Path(base).expanduser() / "data"


def tokenise(
    source: DataSource, renderer: Renderer, options: DataOptions, progress: Progress | None = None
) -> Store:
    """The source's Store, from the cache or made now, in memory that does not grow with it. Raises
    UserError."""
    settings = [
        source.path,
        source.format or options.format,
        source.split,
        source.name,
        source.columns,
        options.on_bad,
    ]
    key = hashlib.sha256(
        json.dumps([source_digest(source), renderer.fingerprint, settings]).encode()
    ).hexdigest()
    folder = cache_folder(options) / key[:32]
    if folder.exists():
        try:
            store = Store(folder)
            store.report.cached = True
            return store
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.warning("the tokenised data in %s is damaged (%s); making it again", folder, e)
            shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as e:
        raise UserError(
            f"can't write to {folder.parent}: {e.strerror}; set FTJAX_CACHE or data.cache_dir"
        ) from e
    try:
        _write(beside, source, renderer, options, progress)
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.exists():  # else another run made the same at the same time
                raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {folder.parent} is full; free some space, or set FTJAX_CACHE"
            ) from e
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Store(folder)


def _write(
    folder: Path, source: DataSource, renderer: Renderer, options: DataOptions, progress: Progress | None
):
    report = Report(source.path)
    seen: list[str] = []
    counts = dict.fromkeys(_ARRAYS, 0)
    per_unit = 1
    files = {name: open(folder / f"{name}.bin", "wb") for name in _ARRAYS}

    def put(name: str, values) -> None:
        array = np.asarray(values, _ARRAYS[name])
        files[name].write(array.tobytes())
        counts[name] += array.size

    def flush(chunk: list[tuple[int, int, Record | BadExample]], done: float | None) -> None:
        nonlocal per_unit
        results = iter(renderer.units([e for _, _, e in chunk if not isinstance(e, BadExample)]))
        for line, digest, example in chunk:
            result = example if isinstance(example, BadExample) else next(results)
            for unit in report.add(result, effective_on_bad(options, result)):
                per_unit = len(unit)
                put("lines", [line])
                put("hashes", [digest])
                for document in unit:
                    put("tokens", document.tokens)
                    put("loss_weight", document.loss_weight)
                    put("lengths", [len(document.tokens)])
        if progress is not None:
            progress(source.path, done, report.rows)

    try:
        chunk: list[tuple[int, int, Record | BadExample]] = []
        done = None
        for row, example in examples(source, options.format, formats_seen=seen):
            assert row.values is not None
            report.say(row)
            chunk.append((row.line, content_hash(row.values), example))
            done = row.done
            if len(chunk) == _CHUNK:
                flush(chunk, done)
                chunk = []
        flush(chunk, done)
    finally:
        for file in files.values():
            file.close()
    report.format = seen[0] if seen else ""
    if not report.units:
        reasons = "\n".join(f"  {n} × {report.first_drop[r]}" for r, n in report.drops.items())
        raise UserError(f"{source.path}: every example was left out:\n{reasons}")
    meta = {"report": asdict(report), "documents_per_unit": per_unit, "counts": counts}
    (folder / "meta.json").write_text(json.dumps(meta))
