"""The command of one step: `ftjax data STEP FILE… --output OUT`, its flags made of the step's options."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftjax import config
from ftjax.data import engine, pipeline, read, write
from ftjax.data.codes import CODES
from ftjax.data.formats import LOSSES
from ftjax.data.options import DataSource
from ftjax.errors import UserError
from ftjax.recipes.data import STEPS, load_step
from ftjax.report.progress import Bar

ROWS_IN_ERROR = 3  # the exit code
ROWS_PER_PART = 20_000


def main(name: str, argv: list[str]) -> int:
    """Runs the step over the files; writes what goes on and the report where that is asked for."""
    return run(name, STEPS[name].about, load_step(name), argv)


def run(name: str, about: str, step_class: type, argv: list[str], parts_of=read.parts) -> int:
    """Likewise with a step given, and how a source is cut into its parts."""
    arguments, given = _parse(name, about, step_class.Options, argv)
    step = step_class(config.from_flags(step_class.Options, given))
    found = sources(arguments)
    if arguments.output:
        write.check(arguments.output, arguments.to)
    elif arguments.to:
        raise UserError(f"--to {arguments.to} has no effect without --output")
    parts = [part for source in found for part in parts_of(source, ROWS_PER_PART)]
    with work(arguments.output) as folder, progress() as said:
        stage = pipeline.run(
            step, parts, folder, engine.open_engine(arguments.engine, arguments.processes), said
        )
        written = []
        if arguments.output:
            to = arguments.to or step.writes or parts[0].format
            written = write.write(stage.records(), arguments.output, to)
        if arguments.report:
            write_report(Path(arguments.report), [stage], written, found)
        for line in summary(stage, written):
            print(line)
        if not arguments.output and stage.counts.dropped + stage.counts.changed:
            print("nothing was written; --output OUT writes the rows that go on")
    wrong = any(CODES[code].severity == "error" for code in stage.counts.codes)
    return ROWS_IN_ERROR if wrong or any(one.refused for one in written) else 0


# ── the command line ──────────────────────────────────────────────────────────────────────────────


def _parse(
    name: str, about: str, options: type, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(the arguments that every step has, the options that were given)."""
    parser = argparse.ArgumentParser(prog=f"ftjax data {name}", description=f"{about[0].upper()}{about[1:]}.")
    add_sources(parser)
    parser.add_argument("--output", "-o", help="where the rows that go on are written: a file, or a folder")
    if "to" in {field.name for field in dataclasses.fields(options)}:
        parser.set_defaults(to=None)  # of the step itself, which then says what it writes
    else:
        parser.add_argument("--to", help="the format to write; as the first file's if absent")
    parser.add_argument("--report", help="a JSON file for the counts and every verdict")
    parser.add_argument("--processes", type=int, default=1, help="at once; 0: one for each core")
    parser.add_argument("--engine", choices=engine.ENGINES, default="local", help="who runs the parts")
    group = parser.add_argument_group("options")
    add_flags(group, options)
    arguments = parser.parse_args(argv)
    names = {field.name for field in dataclasses.fields(options)}
    given = {f: getattr(arguments, "option_" + f) for f in names}
    return arguments, {name: value for name, value in given.items() if value is not None}


def add_sources(parser: argparse.ArgumentParser, nargs: str | int = "+") -> None:
    """FILE… and how its rows are read."""
    parser.add_argument("files", nargs=nargs, metavar="FILE", help="files, or the id of a data set")
    parser.add_argument(
        "--from", "--format", dest="format", help="the rows' format, where it is not to be detected"
    )
    parser.add_argument("--name", help="configuration of a data set")
    parser.add_argument("--split", help="split of a data set")
    parser.add_argument(
        "--column", action="append", default=[], metavar="OURS=THEIRS", help="rename a column"
    )


def add_flags(group, options: type) -> None:
    """A flag for each field; each is None where it was not given."""
    for name, types, about, default in config.described(options):
        flag, dest = config.flag_of(name), "option_" + name
        required = default is dataclasses.MISSING
        shown = "" if required or default in (None, "", [], {}) else f" (default {default})"
        about = about.replace("%", "%%") + shown
        if bool in types:
            group.add_argument(
                flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=about
            )
        elif any(getattr(tp, "__origin__", None) is list for tp in types):
            group.add_argument(
                flag, dest=dest, action="append", metavar="X", required=required, help=f"{about}; may repeat"
            )
        else:
            group.add_argument(flag, dest=dest, metavar="X", required=required, help=about)


def sources(arguments: argparse.Namespace) -> list[DataSource]:
    columns = {}
    for pair in arguments.column:
        ours, equals, theirs = pair.partition("=")
        if not equals:
            raise UserError(f"--column {pair}: write OURS=THEIRS, e.g. --column prompt=question")
        columns[ours] = theirs
    return [
        DataSource(file, format=arguments.format, split=arguments.split, name=arguments.name, columns=columns)
        for file in arguments.files
    ]


@contextlib.contextmanager
def work(output: str | None) -> Iterator[Path]:
    """A folder for the stage's files, beside the output, gone afterwards."""
    beside = Path(output).expanduser().absolute().parent if output else None
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".ftjax-data-", dir=beside))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def progress() -> Iterator[pipeline.Progress]:
    """A bar for what is being done now."""
    bar: Bar | None = None

    def said(what: str, done: int, total: int | None) -> None:
        nonlocal bar
        if bar is None or bar.what != what:
            if bar is not None:
                bar.close()
            bar = Bar(what, total, shown=total != 1)
            bar.open()
        bar.update(done)

    try:
        yield said
    finally:
        if bar is not None:
            bar.close()


# ── what is said of it ────────────────────────────────────────────────────────────────────────────


def summary(stage: pipeline.Stage, written: list[write.Output]) -> list[str]:
    """What a stage did, as lines to print: counts, and each code with its first verdict."""
    counts = stage.counts
    changed = f" ({counts.changed:,} changed)" if counts.changed else ""
    lines = [
        f"{stage.name}: {counts.rows:,} rows; {counts.kept:,} go on{changed}, {counts.dropped:,} end here"
    ]
    firsts: dict[str, dict[str, Any]] = {}
    if counts.codes:
        for verdict in stage.verdicts():
            firsts.setdefault(verdict["code"], verdict)
            if len(firsts) == len(counts.codes):
                break
    for code, number in sorted(counts.codes.items(), key=lambda c: -c[1]):
        lines.append(f"  {code} {CODES[code].name:<22}{number:>8,}  {one_line(firsts[code])}")
    for key, value in stage.summary.items():
        if key == "numbers":  # for the report, said in the other lines
            continue
        lines.append(
            f"  {key}: {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value}"
        )
    return lines + [line for one in written for line in said_of(one)]


def said_of(one: write.Output) -> list[str]:
    """What was written, as lines to print."""
    lines = [f"wrote {one.rows:,} rows of the format {one.format} to {one.path}"]
    lines += [f"  lost, of {number:,} rows: {LOSSES[loss]}" for loss, number in one.losses.items()]
    if one.refused:
        lines.append(f"  {len(one.refused):,} records could not be written in it: {one.refused.first}")
    return lines


def one_line(verdict: dict[str, Any]) -> str:
    """ "file.jsonl:12 messages[1]: what was found there"."""
    place = f"{verdict['source']}:{verdict['line']}" if verdict["line"] else verdict["source"]
    text = f"{place} {verdict['path']}".strip() + ": " + verdict["text"]
    return text if len(text) <= 160 else text[:157] + "…"


def write_report(
    path: Path, stages: list[pipeline.Stage], written: list[write.Output], found: list[DataSource]
) -> None:
    """The counts of each stage and every verdict as one JSON object, written as it is read."""
    head = {
        "sources": [dataclasses.asdict(source) for source in found],
        "stages": [{"name": s.name, **dataclasses.asdict(s.counts), "summary": s.summary} for s in stages],
        "outputs": [one.to_json() for one in written],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with open(beside, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(json.dumps(head, ensure_ascii=False, indent=1, default=str)[:-2] + ',\n "verdicts": [')
        comma = ""
        said = ({"stage": stage.name, **verdict} for stage in stages for verdict in stage.verdicts())
        refused = itertools.chain.from_iterable(one.refused for one in written)
        unwritten = ({"stage": "write", **verdict, "outcome": "dropped"} for verdict in refused)
        for row in itertools.chain(said, unwritten):
            file.write(f"{comma}\n  {json.dumps(row, ensure_ascii=False)}")
            comma = ","
        file.write("\n ]\n}\n")
    beside.replace(path)
