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
import dataclasses
import shutil
from collections.abc import Iterable, Iterator
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
class Source(DataSource):
    """A file or data set to prepare."""

    license: str | None = None
    """What its rows may be used under; kept with each of them, and on the card."""
    tags: dict[str, str] = field(default_factory=dict)
    """Put into every record's meta, e.g. {team: billing}."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents to cut into sections (plain text, for `synthesize` or continued pre-training)."""

    __pydantic_config__: ClassVar = config.STRICT

    documents: list[str]
    """Files, folders, pages or sitemaps."""
    extract: ExtractOptions = field(default_factory=ExtractOptions)
    """How they are found and cut."""
    license: str | None = None
    """What they may be used under."""
    tags: dict[str, str] = field(default_factory=dict)
    """Put into every record's meta."""


@dataclass(frozen=True, kw_only=True)
class LogFiles:
    """Production logs to take examples from."""

    __pydantic_config__: ClassVar = config.STRICT

    logs: list[str]
    """Files of requests with responses, chats, or OpenTelemetry's spans."""
    take: LogsOptions = field(default_factory=LogsOptions)
    """What of them becomes examples."""
    license: str | None = None
    """What they may be used under."""
    tags: dict[str, str] = field(default_factory=dict)
    """Put into every record's meta."""


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
    recipe: Any = config.load_as(recipe_type(), arguments.recipe, arguments.settings, _entries)
    output = Path(recipe.output).expanduser()
    _may_write(output)
    earlier = _outputs(output) - _files(recipe.sources)
    if arguments.overwrite:
        shutil.rmtree(output / ".stages", ignore_errors=True)
    formats.writer(recipe.format)
    if not recipe.sources:
        raise UserError("sources is empty: name the files, documents or logs to prepare")
    runner = engine.open_engine(recipe.engine, recipe.processes)
    stages: list[pipeline.Stage] = []
    parts: list[Part] = []
    for source in recipe.sources:
        meta = {**({"license": source.license} if source.license else {}), **source.tags}
        if isinstance(source, Documents):
            with stage.progress() as said:
                found = extract.parts_of(source.documents, source.extract, said)
        elif isinstance(source, LogFiles):
            rows = [part for file in source.logs for part in log_parts(file, recipe.rows_per_part)]
            with stage.progress() as said:
                made = pipeline.run(Logs(source.take), rows, output / ".stages", runner, said)
            stages.append(made)
            print("\n".join(stage.summary(made, [])), flush=True)
            found = made.parts
        else:
            found = read.parts(source, recipe.rows_per_part)
        parts += [Labelled(part, tuple(meta.items())) for part in found] if meta else found
    with stage.progress() as said:
        chosen = [_chosen(entry) for entry in recipe.steps]
        for step in [Read(None), *(load_step(name)(options) for name, options in chosen)]:
            made = pipeline.run(step, parts, output / ".stages", runner, said)
            stages.append(made)
            print("\n".join(stage.summary(made, [])), flush=True)
            parts = list(made.parts)
    written = write.write(stages[-1].records(), output, recipe.format, folder=True)
    for path in earlier - {Path(one.path) for one in written}:
        path.unlink(missing_ok=True)
        print(f"removed {path}: an earlier run wrote it, and this recipe does not")
    stage.write_report(output / REPORT, stages, written, recipe.sources)
    print("\n".join(line for one in written for line in stage.said_of(one)))
    if recipe.card is not None and stages[-1].counts.kept:
        card.make(stages[-1].records(), output, recipe.card, output / REPORT)
        print(f"the set is described in {output / 'card.md'}{' and card.html' * recipe.card.html}")
    print(f"every verdict is in {output / REPORT}")
    return 0


def _outputs(output: Path) -> set[Path]:
    """The files that the run before wrote into this folder."""
    if not (output / REPORT).is_file():
        return set()
    return {output / Path(one["path"]).name for one in prepared.head(output / REPORT)["outputs"]}


def _files(sources: list[Any]) -> set[Path]:
    return {Path(source.path).expanduser() for source in sources if isinstance(source, Source)}


def _entries(values: Any) -> Any:
    """`- dedup` and `- dedup:` are `- dedup: {}`."""
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
