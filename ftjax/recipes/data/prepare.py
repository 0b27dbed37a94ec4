"""`ftjax data prepare RECIPE.yaml`: sources and steps, one after another, to a finished set with its report.

    output: prepared/support
    sources:
      - {path: chats.jsonl, license: MIT}
    steps:
      - validate: {target: openai}
      - filter
      - dedup: {on: prompt}
      - split: {eval: 0.1}

Each stage is kept in OUTPUT/.stages under a hash of what it is made from: the same command goes on where it
stopped, and after a change does again only what depends on it.
"""

import argparse
import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ftjax import config
from ftjax.data import card, engine, extract, formats, pipeline, read, write
from ftjax.data.card import CardOptions, prepared
from ftjax.data.extract import ExtractOptions
from ftjax.data.logs import Logs, LogsOptions
from ftjax.data.logs import parts as log_parts
from ftjax.data.options import DataSource
from ftjax.data.record import Judged, Record
from ftjax.data.steps import Part, Step
from ftjax.errors import UserError
from ftjax.recipes.data import STEPS, load_step, stage

REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a source says of its rows."""

    license: str | None = None
    """What they may be used under; kept with each of them, and on the card."""
    tags: dict[str, str] = field(default_factory=dict)
    """Put into every record's meta, e.g. {team: billing}."""


@dataclass(frozen=True, kw_only=True)
class Source(Labels, DataSource):
    """A file or data set to prepare."""


@dataclass(frozen=True, kw_only=True)
class Documents(Labels):
    """Documents to cut into sections (plain text, for `synthesize` or continued pre-training)."""

    __pydantic_config__: ClassVar = config.STRICT

    documents: list[str]
    """Files, folders, pages or sitemaps."""
    extract: ExtractOptions = field(default_factory=ExtractOptions)
    """How they are found and cut."""


@dataclass(frozen=True, kw_only=True)
class LogFiles(Labels):
    """Production logs to take examples from."""

    __pydantic_config__: ClassVar = config.STRICT

    logs: list[str]
    """Files of requests with responses, chats, or OpenTelemetry's spans."""
    take: LogsOptions = field(default_factory=LogsOptions)
    """What of them becomes examples."""


class Read(Step):
    """The records as they are: sources are read, fetched and extracted once, whatever follows."""

    name = "read"

    def apply(self, records: Iterable[Record], decision: Any, part: int) -> Iterator[Judged]:
        return map(Judged, records)


def step_entry() -> type:
    """The type of an entry of `steps`: one of the names, with its options."""
    fields = [
        (name, load_step(name).Options | None, field(default=None))
        for name in STEPS  # type: ignore[operator]
    ]
    entry = dataclasses.make_dataclass("StepEntry", fields, frozen=True)
    entry.__pydantic_config__ = config.STRICT  # type: ignore[attr-defined]
    return entry


def recipe_type() -> type:
    """The type of a whole recipe."""

    @dataclass(frozen=True, kw_only=True)
    class Recipe:
        __pydantic_config__: ClassVar = config.STRICT

        output: str
        """The folder for the set: a file for each split, report.json and what steps add."""
        sources: list[Source | Documents | LogFiles]
        """What is read, in this order."""
        steps: list[step_entry()] = field(default_factory=list)  # type: ignore[valid-type]
        """What is done, in this order."""
        card: CardOptions | None = field(default_factory=CardOptions)
        """The set's description; null: none."""
        format: str = "ftjax"
        """The format that is written."""
        processes: int = 0
        """Parts worked on at once; 0: one for each core."""
        engine: str = "local"
        """Who runs the parts: local (processes) or ray."""
        rows_per_part: int = stage.ROWS_PER_PART
        """Rows that are worked on at a time."""
        keep_stages: bool = True
        """Keep what each step made, so that a change does again only what follows it; they hold the rows as
        they were read, personal data included."""

    return Recipe


@dataclass(frozen=True)
class Labelled:
    """A part whose records get a source's licence and tags."""

    part: Part
    meta: tuple[tuple[str, Any], ...]

    def key(self) -> str:
        return f"{self.part.key()}{self.meta}"

    def judged(self) -> Iterator[Judged]:
        for judged in self.part.judged():
            if judged.record is not None:
                judged.record.meta = {**judged.record.meta, **dict(self.meta)}
            yield judged


def main(argv: list[str]) -> int:
    """Runs the recipe; the exit code."""
    parser = argparse.ArgumentParser(
        prog="ftjax data prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="overrides, later ones winning")
    parser.add_argument("--overwrite", action="store_true", help="forget what an earlier run kept")
    arguments = parser.parse_args(argv)
    if Path(arguments.recipe).suffix not in (".yaml", ".yml"):
        raise UserError(
            f"{arguments.recipe}: a recipe is a .yaml file, with output, sources and steps; for one step "
            "over a file there are the other verbs (ftjax data --help)"
        )
    recipe: Any = config.load_as(recipe_type(), arguments.recipe, arguments.settings, _entries)
    output = Path(recipe.output).expanduser()
    _may_write(output)
    earlier = _outputs(output) - _files(recipe.sources)
    formats.writer(recipe.format)
    if not recipe.sources:
        raise UserError("sources is empty: name the files, documents or logs to prepare")
    for i, source in enumerate(recipe.sources):
        if isinstance(source, Source) and source.weight is not None:
            raise UserError(f"sources[{i}].weight has no effect here: shares are what the step `mix` takes")
    chosen = [_chosen(entry) for entry in recipe.steps]
    steps = [Read(None), *(load_step(name)(options) for name, options in chosen)]
    runner = engine.open_engine(recipe.engine, recipe.processes)
    with _alone(output), stage.progress() as said:
        work = Work(output / ".stages", runner, said)
        if arguments.overwrite:
            work.forget(everything=True)
        parts = [part for source in recipe.sources for part in work.parts_of(source, recipe.rows_per_part)]
        for step in steps:
            parts = work.run(step, parts).parts
        last = work.stages[-1]
        written = write.write(last.records(), output, recipe.format, folder=True)
        for path in earlier - {Path(one.path) for one in written}:
            path.unlink(missing_ok=True)
            print(f"removed {path}: an earlier run wrote it, and this recipe does not")
        stage.write_report(output / REPORT, work.stages, written, recipe.sources)
        print("\n".join(line for one in written for line in stage.said_of(one)))
        if recipe.card is not None and last.counts.kept:
            facts = card.make(last.records(), output, recipe.card, output / REPORT)
            for reason, found in facts["tokens"]["not_rendered"].items():
                print(f"{found['rows']:,} rows can't be trained on with {recipe.card.model}: {reason}")
                print("  `validate: {model: …}` leaves such rows out")
            print(f"the set is described in {output / 'card.md'}{' and card.html' * recipe.card.html}")
        work.forget(everything=not recipe.keep_stages)
    print(f"every verdict is in {output / REPORT}")
    if recipe.keep_stages and any(name == "personal" for name, _ in chosen):
        print(f"{output / '.stages'} holds the rows as they were read: do not publish it (keep_stages=false)")
    return 0


class Work:
    """The stages of a recipe, in a folder of their own."""

    def __init__(self, folder: Path, runner: engine.Engine, said: pipeline.Progress):
        self.folder, self.runner, self.said = folder, runner, said
        self.stages: list[pipeline.Stage] = []

    def run(self, step: Step, parts: Sequence[Part]) -> pipeline.Stage:
        made = pipeline.run(step, parts, self.folder, self.runner, self.said)
        self.stages.append(made)
        lines = stage.summary(made, [])
        print("\n".join([lines[0] + " (kept from before)" * made.again, *lines[1:]]), flush=True)
        return made

    def parts_of(self, source: Any, rows_per_part: int) -> Sequence[Part]:
        """The source, cut into parts whose records have its licence and tags."""
        found: Sequence[Part]
        if isinstance(source, Documents):
            found = extract.parts_of(source.documents, source.extract, self.said)
        elif isinstance(source, LogFiles):
            rows = [part for file in source.logs for part in log_parts(file, rows_per_part)]
            found = self.run(Logs(source.take), rows).parts
        else:
            found = read.parts(source, rows_per_part)
        meta = {**({"license": source.license} if source.license else {}), **source.tags}
        return [Labelled(part, tuple(meta.items())) for part in found] if meta else found

    def forget(self, everything: bool) -> None:
        """Deletes the stages that this recipe does not have any more, or all of them."""
        used = set() if everything else {made.folder.name for made in self.stages}
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in used:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """While no other process prepares this folder. UserError where one does."""
    folder = output / ".stages"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {output}: wait for it, or name another") from None
        except (ImportError, OSError):
            pass  # no locks on this disk
        yield


def _outputs(output: Path) -> set[Path]:
    """The files that the run before wrote into this folder."""
    if not (output / REPORT).is_file():
        return set()
    return {output / Path(one["path"]).name for one in prepared.head(output / REPORT)["outputs"]}


def _files(sources: list[Any]) -> set[Path]:
    return {Path(source.path).expanduser() for source in sources if isinstance(source, Source)}


def _entries(values: Any) -> Any:
    """`- dedup` and `- dedup:` are `- dedup: {}`; `- raw.jsonl` is `- {path: raw.jsonl}`."""
    if isinstance(values, dict) and isinstance(values.get("sources"), list):
        values["sources"] = [{"path": one} if isinstance(one, str) else one for one in values["sources"]]
    if isinstance(values, dict) and isinstance(values.get("steps"), list):
        entries = [{entry: {}} if isinstance(entry, str) else entry for entry in values["steps"]]
        values["steps"] = [
            {name: {} if options is None else options for name, options in entry.items()}
            if isinstance(entry, dict)
            else entry
            for entry in entries
        ]
    return values


def _chosen(entry: Any) -> tuple[str, Any]:
    given = [(f.name, getattr(entry, f.name)) for f in dataclasses.fields(entry)]
    given = [(name, options) for name, options in given if options is not None]
    if len(given) != 1:
        names = ", ".join(name for name, _ in given) or "none"
        raise UserError(f"steps: each entry is one step with its options; one entry has {names}")
    return given[0]


def _may_write(output: Path) -> None:
    if output.is_file():
        raise UserError(f"output {output} is a file; it has to be a folder")
    ours = {REPORT, ".stages"}
    if output.is_dir() and (found := {p.name for p in output.iterdir()}) and not found & ours:
        raise UserError(
            f"output {output} holds {', '.join(sorted(found)[:3])} and nothing of `ftjax data prepare`: name "
            "another folder"
        )
