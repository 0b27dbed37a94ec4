"""`ftjax data card FILE… --output DIR`: what a set holds, as card.md, card.json, pictures and a page."""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ftjax import config
from ftjax.data import read
from ftjax.data.card import CardOptions, make, prepared
from ftjax.data.codes import CODES
from ftjax.data.options import DataSource
from ftjax.data.record import Record
from ftjax.errors import UserError
from ftjax.recipes.data import stage

REPORT = "report.json"


def main(argv: list[str]) -> int:
    """Writes the card; 3 where rows could not be read, which the card counts."""
    parser = argparse.ArgumentParser(
        prog="ftjax data card",
        description="Describe a set: counts, tokens, languages, licences, where it comes from, hashes, "
        "pictures and, with --html, a page to browse its rows in. FILE may be a folder that "
        "`ftjax data prepare` made.",
    )
    stage.add_sources(parser)
    parser.add_argument(
        "--output", "-o", metavar="DIR", help="the folder to write to; that of a prepared set if absent"
    )
    parser.add_argument(
        "--report", metavar="REPORT.json", help="of `ftjax data prepare`; the one beside the files if absent"
    )
    stage.add_flags(parser.add_argument_group("options"), CardOptions)
    arguments = parser.parse_args(argv)
    given = {name: getattr(arguments, "option_" + name) for name, *_ in config.described(CardOptions)}
    options = config.from_flags(CardOptions, {k: v for k, v in given.items() if v is not None})
    folders = [Path(file).expanduser() for file in arguments.files]
    folders = [folder for folder in folders if (folder / REPORT).is_file()]
    arguments.files = [file for name in arguments.files for file in _files(name)]
    output = arguments.output or (folders[0] if folders else None)
    if output is None:
        raise UserError("card: say where to write it (--output DIR)")
    unreadable: Counter[str] = Counter()
    records = _records(stage.sources(arguments), unreadable)
    facts = make(records, output, options, arguments.report or _report(arguments.files), unreadable)
    tokens = facts["tokens"]
    print(
        f"{facts['rows']:,} rows, {tokens['total']:,} tokens{' (estimated)' if tokens['estimate'] else ''}, "
        f"{tokens['trained']:,} trained"
    )
    for code, number in unreadable.items():
        print(f"  could not be read: {number:,} rows, {code} {CODES[code].name}")
    names = "card.md, card.json, pictures" + (" and card.html" if options.html else "")
    print(f"wrote {names} to {output}")
    return stage.ROWS_IN_ERROR if unreadable else 0


def _files(name: str) -> list[str]:
    """The file itself, or what a prepared folder's report says was written there."""
    folder = Path(name).expanduser()
    if not (folder / REPORT).is_file():
        return [name]
    return [str(folder / Path(o["path"]).name) for o in prepared.head(folder / REPORT)["outputs"]]


def _report(files: list[str]) -> Path | None:
    """The report beside the files, where they are in one folder that has one and are what it wrote."""
    folders = {Path(file).expanduser().parent for file in files}
    path = folders.pop() / REPORT
    if folders or not path.is_file():
        return None
    written = {Path(o["path"]).name for o in prepared.head(path)["outputs"]}
    return path if {Path(file).name for file in files} <= written else None


def _records(sources: list[DataSource], unreadable: Counter[str]) -> Iterator[Record]:
    for source in sources:
        for part in read.parts(source):
            for judged in part.judged():
                if judged.record is None:
                    unreadable[next(v.code for v in judged.verdicts if v.severity == "error")] += 1
                else:
                    yield judged.record
