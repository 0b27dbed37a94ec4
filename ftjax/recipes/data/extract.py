"""`ftjax data extract SOURCE…`: documents to sections, each a row with where it comes from."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftjax import config
from ftjax.data import engine, pipeline, write
from ftjax.data.codes import CODES
from ftjax.data.extract import ExtractOptions, extract
from ftjax.data.options import DataSource
from ftjax.data.record import Judged, Record
from ftjax.recipes.data import stage

EXAMPLES = """\
SOURCE is a file, a folder, an address (whose links are followed, see --scope), a sitemap, or
knowledgesdk:ADDRESS (that page by KnowledgeSDK) or knowledgesdk+site:ADDRESS.
HTML, Markdown, PDF, DOCX, reStructuredText, notebooks and plain text are read.

Examples:
  ftjax data extract docs/ --output sections.jsonl
  ftjax data extract https://example.org/docs/ --license CC-BY-4.0 --output sections.jsonl
  ftjax data extract https://example.org/sitemap.xml --include 'guide/*' --output sections.jsonl"""


def main(argv: list[str]) -> int:
    """Runs the verb; raises UserError."""
    parser = argparse.ArgumentParser(
        prog="ftjax data extract",
        description="Documents to clean sections: code to the letter, navigation gone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files, folders, addresses")
    parser.add_argument("--output", "-o", required=True, help="where the sections are written")
    parser.add_argument("--to", default="ftjax", help="the format to write (default ftjax)")
    parser.add_argument("--report", help="a JSON file for the counts and every verdict")
    parser.add_argument("--processes", type=int, default=0, help="at once; 0: one for each core (default)")
    parser.add_argument("--engine", choices=engine.ENGINES, default="local", help="who reads the documents")
    stage.add_flags(parser.add_argument_group("options"), ExtractOptions)
    arguments = parser.parse_args(argv)
    names = [field.name for field in dataclasses.fields(ExtractOptions)]
    flags = {name: getattr(arguments, "option_" + name) for name in names}
    options = config.from_flags(ExtractOptions, {k: v for k, v in flags.items() if v is not None})
    write.check(arguments.output, arguments.to)
    with stage.work(arguments.output) as folder, stage.progress() as said:
        workers = engine.open_engine(arguments.engine, arguments.processes)
        made = _Extraction("extract", [], pipeline.Counts(), {}, folder)
        judged = extract(arguments.sources, options, said, workers)
        written = write.write(made.sections(judged), arguments.output, arguments.to)
        if arguments.report:
            sources = [DataSource(source) for source in arguments.sources]
            stage.write_report(Path(arguments.report), [made], written, sources)
        for line in stage.summary(made, written):
            print(line)
    wrong = any(CODES[code].severity == "error" for code in made.counts.codes)
    return stage.ROWS_IN_ERROR if wrong or any(one.refused for one in written) else 0


class _Extraction(pipeline.Stage):
    """Extraction as a stage whose rows are the sections and the documents that gave none."""

    def sections(self, judged: Iterator[Judged]) -> Iterator[Record]:
        """The records, counted; the verdicts are kept beside."""
        documents: set[str] = set()
        tokens = 0
        with open(self.folder / "verdicts", "w", encoding="utf-8", errors="surrogatepass") as file:
            for each in judged:
                self.counts.rows += 1
                outcome = "kept" if each.record is not None else "dropped"
                for verdict in each.verdicts:
                    self.counts.codes[verdict.code] = self.counts.codes.get(verdict.code, 0) + 1
                    file.write(json.dumps({**verdict.to_json(), "outcome": outcome}) + "\n")
                if each.record is None:
                    self.counts.dropped += 1
                    continue
                self.counts.kept += 1
                documents.add(each.record.meta["group"])
                tokens += each.record.meta["tokens_estimate"]
                yield each.record
        self.summary.update(documents=len(documents), tokens_estimate=tokens)

    def verdicts(self) -> Iterator[dict[str, Any]]:
        with open(self.folder / "verdicts", encoding="utf-8") as file:
            yield from map(json.loads, file)
