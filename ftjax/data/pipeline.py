"""Runs a step over the parts of a data set: every row accounted for, in memory that does not grow with it,
and resumed after a kill.

A stage is a folder. Each part's records, verdicts and counts are files that appear whole, by renaming; a
stage that is run again does only the parts that are not there yet. The folder's name holds a hash of what the
stage is made from (the parts' content, the step, its version, options and the files it reads), so a stage
whose input or options changed is another folder.
"""

import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ftjax import __version__
from ftjax.data.engine import Engine, Here
from ftjax.data.read import file_digest
from ftjax.data.record import Judged, Record, Verdict
from ftjax.data.steps import Part, Step

Progress = Callable[[str, int, int | None], None]
"""Called after each part: what is done, parts done, parts in all. Where all is one part: rows read, None."""

SAID_EACH = 2_000  # rows


@dataclass
class Counts:
    """What became of the rows of a part or a stage. rows = kept + dropped, where a step makes one of one."""

    rows: int = 0
    """Records read, and rows that could not be read."""
    kept: int = 0
    """Records that go on."""
    changed: int = 0
    """Of those kept."""
    dropped: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    """Verdicts by code."""

    def add(self, other: "Counts") -> None:
        self.rows += other.rows
        self.kept += other.kept
        self.changed += other.changed
        self.dropped += other.dropped
        self.codes = dict(sorted((Counter(self.codes) + Counter(other.codes)).items()))


@dataclass(frozen=True)
class Stored:
    """A part as a stage left it: records of the format "ftjax", one a line."""

    path: Path
    hash: str

    def key(self) -> str:
        return self.hash

    def judged(self) -> Iterator[Judged]:
        with open(self.path, encoding="utf-8", errors="surrogatepass") as file:
            for line in file:
                yield Judged(Record.from_json(json.loads(line)))


class Stage(NamedTuple):
    """What a step made: the parts, counts, and where its files are."""

    name: str
    parts: list[Stored]
    counts: Counts
    summary: dict[str, Any]
    folder: Path
    again: bool = False
    """Whether all of it was there from an earlier run."""

    def verdicts(self) -> Iterator[dict[str, Any]]:
        """Every verdict as plain values (Verdict.to_json and its `outcome`), in the order of the rows."""
        for part in self.parts:
            with open(part.path.with_suffix(".verdicts"), encoding="utf-8", errors="surrogatepass") as file:
                yield from map(json.loads, file)

    def records(self) -> Iterator[Record]:
        for part in self.parts:
            for judged in part.judged():
                assert judged.record is not None
                yield judged.record


class _Job(NamedTuple):
    step: Step
    part: Part
    number: int
    folder: Path
    said: Progress | None = None
    """Told of the rows that were read; in the calling process only."""

    def judged(self, what: str) -> Iterator[Judged]:
        for n, judged in enumerate(self.part.judged(), 1):
            if self.said is not None and n % SAID_EACH == 0:
                self.said(what, n, None)
            yield judged


def run(
    step: Step,
    parts: Sequence[Part],
    work: Path,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Stage:
    """The step over the parts, in a folder of its own under `work`; what is there is not done again."""
    engine = Here() if engine is None or step.alone else engine
    reads = [file_digest(path) for path in step.reads()]
    made_by = [__version__, step.name, step.version]
    described = [*made_by, repr(step.options), reads, [part.key() for part in parts]]
    folder = work / f"{step.name}-{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    step.folder = folder
    said = progress if len(parts) == 1 and isinstance(engine, Here) else None
    jobs = [_Job(step, part, number, folder, said) for number, part in enumerate(parts)]
    again = all(_path(job, ".counts").exists() for job in jobs)
    decision = None
    if step.gathers:
        facts = list(_missing(engine, _facts, jobs, ".facts", f"{step.name}: looking", progress))
        if not (folder / "decision").exists():
            _whole(folder / "decision", pickle.dumps(step.decide(list(map(_unpickled, facts)))))
        decision = _unpickled(folder / "decision")
    counts = Counts()
    stored = []
    for path in _missing(engine, _apply, jobs, ".counts", step.name, progress):
        made = json.loads(path.read_text())
        stored.append(Stored(path.with_suffix(".jsonl"), made.pop("hash")))
        counts.add(Counts(**made))
    return Stage(step.name, stored, counts, step.summary(decision), folder, again)


def _missing(
    engine: Engine, function, jobs: list[_Job], suffix: str, what: str, progress: Progress | None
) -> Iterator[Path]:
    """The file of each job with this suffix, in order, after those that are not there have been made."""
    paths = [_path(job, suffix) for job in jobs]
    missing = [job for job, path in zip(jobs, paths, strict=True) if not path.exists()]
    done = len(jobs) - len(missing)
    for _ in engine.map(function, missing):
        done += 1
        if progress is not None:
            progress(what, done, len(jobs))
    yield from paths


def _path(job: _Job, suffix: str) -> Path:
    return job.folder / f"part-{job.number:05}{suffix}"


def _facts(job: _Job) -> None:
    judged = job.judged(f"{job.step.name}: looking, rows")
    records = (one.record for one in judged if one.record is not None)
    _whole(_path(job, ".facts"), pickle.dumps(job.step.facts(records, job.number)))


def _apply(job: _Job) -> None:
    counts = Counts()
    decision = _unpickled(job.folder / "decision") if job.step.gathers else None
    digest = hashlib.sha256()
    files = {suffix: _path(job, suffix + ".part") for suffix in (".jsonl", ".verdicts")}
    with (
        open(files[".jsonl"], "wb") as out,
        open(files[".verdicts"], "w", encoding="utf-8", errors="surrogatepass") as said,
    ):

        def say(verdicts: Iterable[Verdict], outcome: str) -> None:
            for verdict in verdicts:
                counts.codes[verdict.code] = counts.codes.get(verdict.code, 0) + 1
                said.write(json.dumps({**verdict.to_json(), "outcome": outcome}, ensure_ascii=False) + "\n")

        def readable() -> Iterator[Record]:
            for judged in job.judged(f"{job.step.name}, rows"):
                counts.rows += 1
                if judged.record is None:
                    counts.dropped += 1
                say(judged.verdicts, "dropped" if judged.record is None else "kept")
                if judged.record is not None:
                    yield judged.record

        for judged in job.step.apply(readable(), decision, job.number):
            if judged.record is None:
                assert judged.verdicts, f"{job.step.name} dropped a row without a verdict"
                counts.dropped += 1
                say(judged.verdicts, "dropped")
                continue
            counts.kept += 1
            counts.changed += judged.changed
            say(judged.verdicts, "changed" if judged.changed else "kept")
            line = json.dumps(judged.record.to_json(), ensure_ascii=False).encode("utf-8", "surrogatepass")
            digest.update(line)
            out.write(line + b"\n")
    for suffix, path in files.items():
        os.replace(path, _path(job, suffix))
    made = {**asdict(counts), "hash": digest.hexdigest()}
    _whole(_path(job, ".counts"), json.dumps(made).encode())  # last: it says that the part is whole


def _whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)


def _unpickled(path: Path) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file)
