"""`ftjax data extract` on three sites' documentation: pages/s, code to the letter, navigation left over.

    python -m benchmarks.extract [--docs FOLDER] [--peers PYTHON] [--sample 60] [--write]

The pages are those of Debian's packages python3.11-doc, python-flask-doc (both made by Sphinx) and
sqlite3-doc (made by hand and scripts; no page says where its main content is); they are downloaded by
`apt-get download` unless FOLDER has them. --peers names a Python with trafilatura and resiliparse, which then
read the same sample of each site's pages in the same run. --write puts the tables into
benchmarks/results/extract.md.

What is counted:
- pre: code blocks of two lines or more whose text, but for empty lines around it, is in the output to the
  letter; "in a section" says that it is whole in one section, too.
- words: of those that the page's main content has, as the site's own markup tells it, how many are left.
- navigation: pages with a line left that only the site's frame has.
"""

import argparse
import collections
import json
import os
import pathlib
import platform
import re
import subprocess
import tempfile
import time
from importlib import metadata
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
PACKAGES = ("python3.11-doc", "python-flask-doc", "sqlite3-doc")
PEERS = ("trafilatura", "resiliparse")
SPHINX = frozenset(
    ("Previous topic", "Next topic", "This Page", "Show Source", "Report a Bug", "Quick search", "Navigation",
     "Related Topics", "Table of Contents", "Created using Sphinx")
)  # fmt: skip


class Site(NamedTuple):
    name: str
    folder: str
    main: str
    """CSS of the main content."""
    frame: str
    """CSS of what in it is no content."""
    lines: frozenset[str]
    """What only the frame says."""


HEAD = """\
# Extraction

`python -m benchmarks.extract`, {date}: {machine}, selectolax {selectolax}. Debian's packages {packages},
whole; {processes} processes, their start included; from files to sections of at most 1,500 tokens.

- pages/s: by the clock, other work beside it; and alone: pages by seconds of CPU time, times the processes
- pre: code blocks of two lines or more, and how many are in a section to the letter
- words: of the main content's, what is left
- navigation: pages with a line of the site's frame left
- tokens: of a section, the median
- given up: pages that gave nothing: X002 no text, X003 the same as another, X008 an index of links

| site | pages | pages/s | alone | pre | to the letter | words | navigation | sections | tokens | given up |
|---|---|---|---|---|---|---|---|---|---|---|"""
PEERS_HEAD = """
Beside other tools: one process each, no sections, the same {sample} pages of each site at even distances,
seconds of CPU time; {peers}.

| site | tool | pages/s | time, ours = 1 | pre | to the letter | words | navigation |
|---|---|---|---|---|---|---|---|"""
_NO_TEXT = "script,style,svg,button,input,select,textarea,.headerlink,.viewcode-link"
_CONTENTS = ",.toctree-wrapper,.contents"
SITES = (
    Site("Python", "python3.11/html", "[role=main]", _NO_TEXT + _CONTENTS, SPHINX),
    Site("Flask", "python-flask-doc/html", "[role=main]", _NO_TEXT + _CONTENTS, SPHINX),
    Site(
        "SQLite",
        "sqlite3",
        "body",
        _NO_TEXT + ",.menu,.tagline,.searchmenu,.logo,.fancy_toc",
        frozenset(("Small. Fast. Reliable.", "Choose any three.", "Search Documentation", "Search Changelog",
                   "Table Of Contents", "Purchase", "Support")),
    ),
)  # fmt: skip


class Truth(NamedTuple):
    """What a page has, by its markup."""

    pre: list[str]
    words: collections.Counter


def truth(path: pathlib.Path, site: Site) -> Truth:
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(path.read_bytes())
    pre = []
    for node in tree.css("pre"):
        for line_break in node.css("br"):
            line_break.replace_with("\n")
        text = node.text().strip("\n").rstrip()
        if "\n" in text.strip():
            pre.append(text)
    main = tree.css_first(site.main)
    for node in main.css(site.frame):
        node.decompose()
    words = collections.Counter()
    for node in main.css("pre"):  # in it, every token may be an element of its own
        words += words_of(node.text())
        node.decompose()
    return Truth(pre, words + words_of(main.text(separator=" ")))


def words_of(text: str) -> collections.Counter:
    return collections.Counter(re.findall(r"\w+", text))


class Score:
    def __init__(self):
        self.pages = self.pre = self.kept = self.navigation = self.words = self.left = 0
        self.seconds = 0.0
        """Of CPU time."""
        self.wall = 0.0

    def add(self, true: Truth, text: str, site: Site) -> None:
        self.pages += 1
        self.pre += len(true.pre)
        self.kept += sum(block in text for block in true.pre)
        lines = {re.sub(r"^[\s#*>|-]+|[\s*:|]+$", "", line) for line in text.split("\n")}
        self.navigation += bool(lines & site.lines)
        self.words += true.words.total()
        self.left += (true.words & words_of(text)).total()

    def share(self, number: int) -> str:
        return f"{number / self.pre:.2%}" if self.pre else "-"


def docs_folder(given: str | None) -> pathlib.Path:
    folder = pathlib.Path(given or tempfile.mkdtemp(prefix="ftjax-docs-"))
    if not (folder / "usr/share/doc" / SITES[0].folder).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, folder], check=True)
    return folder / "usr/share/doc"


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


def ours(site: Site, root: pathlib.Path, processes: int) -> tuple[Score, collections.Counter, list[int]]:
    """(the score of the whole site, documents that gave nothing by code, tokens of each section)"""
    from ftjax.data.engine import open_engine
    from ftjax.data.extract import ExtractOptions, extract

    folder = root / site.folder
    score = Score()
    wall, cpu = time.perf_counter(), cpu_seconds()
    options = ExtractOptions(include=["*.html"])
    judged = list(extract([str(folder)], options, engine=open_engine(processes=processes)))
    score.wall, score.seconds = time.perf_counter() - wall, cpu_seconds() - cpu
    sections = collections.defaultdict(list)
    ended = {}
    tokens = []
    for each in judged:
        if each.record is None:
            ended[each.verdicts[0].source] = each.verdicts[0].code
        else:
            sections[each.record.meta["source"]].append(each.record.text)
            tokens.append(each.record.meta["tokens_estimate"])
    for path in sorted(folder.rglob("*.html")):
        if "_static" in path.parts or ended.get(str(path)) == "X003":
            continue
        if ended.get(str(path)) == "X008":  # an index: no text is wanted of it, but its code would be
            score.add(truth(path, site)._replace(words=collections.Counter()), "", site)
        else:
            score.add(truth(path, site), "\n\n".join(sections[str(path)]), site)
    return score, collections.Counter(ended.values()), tokens


def sample_of(site: Site, root: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Pages at even distances, by name; no indexes."""
    paths = [p for p in sorted((root / site.folder).rglob("*.html")) if not p.name.startswith("genindex")]
    return paths[:: max(1, len(paths) // count)][:count]


def ours_of(paths: list[pathlib.Path], site: Site) -> Score:
    from ftjax.data.extract import read
    from ftjax.data.extract.document import Unreadable

    score = Score()
    for path in paths:
        data = path.read_bytes()
        began = time.process_time()
        try:
            text = read(data, "html").text
        except Unreadable:
            text = ""
        score.seconds += time.process_time() - began
        score.add(truth(path, site), text, site)
    return score


def versions_of(python: str) -> str:
    code = (
        f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {PEERS}), sep=', ')"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def peer_of(tool: str, python: str, paths: list[pathlib.Path], site: Site) -> Score | None:
    command = [python, str(HERE / "peers" / "extract_html.py"), tool, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{tool}: {done.stderr.strip().splitlines()[-1]}")
        return None
    score = Score()
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        made = json.loads(line)
        score.seconds += made["seconds"]
        score.add(truth(path, site), made["text"], site)
    return score


RST_HEAD = """
The same pages from their reStructuredText (`_sources`), without Sphinx and the projects: the HTML pages' code
blocks that are in a code block to the letter. What Sphinx includes from other files or takes from docstrings
is in no source; test flags that it takes out of examples are.

| site | reader | pages | pages/s | pre | to the letter |
|---|---|---|---|---|---|"""


def rst_rows(site: Site, root: pathlib.Path) -> list[str]:
    """A row of our reader, and one of docutils where it is installed."""
    from ftjax.data.extract import rst

    readers = {"ftjax": lambda source: rst.read(source).text}
    try:
        import docutils.core
        from docutils import nodes
    except ImportError:
        print("docutils is not installed")
    else:
        quiet = {"report_level": 5, "halt_level": 5, "file_insertion_enabled": False}

        def by_docutils(source: str) -> str:
            tree = docutils.core.publish_doctree(source, settings_overrides=quiet)
            return "\n".join(f"\n{n.astext()}\n" for n in tree.findall(nodes.FixedTextElement))

        readers[f"docutils {metadata.version('docutils')}"] = by_docutils
    folder = root / site.folder
    pages = {p: folder / p.relative_to(folder / "_sources") for p in (folder / "_sources").rglob("*.rst.txt")}
    html = {p: to.with_suffix("").with_suffix(".html") for p, to in pages.items()}
    rows = []
    for name, read in readers.items():
        seconds, kept, blocks, count = 0.0, 0, 0, 0
        for source, page in html.items():
            if not page.exists():
                continue
            text = source.read_text(encoding="utf-8")
            began = time.process_time()
            made = read(text)
            seconds += time.process_time() - began
            pre = truth(page, site).pre
            kept += sum(f"\n{block}\n" in made for block in pre)
            blocks, count = blocks + len(pre), count + 1
        rows.append(
            f"| {site.name} | {name} | {count} | {count / seconds:.0f} | {blocks} | {kept / blocks:.2%} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--docs")
    parser.add_argument("--peers")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sample", type=int, default=60)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    root = docs_folder(args.docs)
    out = [
        HEAD.format(
            date=time.strftime("%Y-%m-%d"),
            machine=f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}",
            selectolax=metadata.version("selectolax"),
            packages=", ".join(PACKAGES),
            processes=args.processes,
        )
    ]
    for site in SITES:
        score, ended, tokens = ours(site, root, args.processes)
        codes = ", ".join(f"{code} {number}" for code, number in sorted(ended.items())) or "-"
        pages = score.pages + ended["X003"]
        out.append(
            f"| {site.name} | {pages} | {pages / score.wall:.0f} "
            f"| {args.processes * pages / score.seconds:.0f} | {score.pre} | {score.share(score.kept)} "
            f"| {score.left / score.words:.1%} | {score.navigation} | {len(tokens)} "
            f"| {sorted(tokens)[len(tokens) // 2]} | {codes} |"
        )
        print(out[-1], flush=True)
    if args.peers:
        out.append(PEERS_HEAD.format(sample=args.sample, peers=versions_of(args.peers)))
        for site in SITES:
            paths = sample_of(site, root, args.sample)
            scores = {"ftjax": ours_of(paths, site)}
            for tool in PEERS:
                if (found := peer_of(tool, args.peers, paths, site)) is not None:
                    scores[tool] = found
            for tool, score in scores.items():
                ratio = score.seconds / scores["ftjax"].seconds
                out.append(
                    f"| {site.name} | {tool} | {score.pages / score.seconds:.0f} | {ratio:.1f} "
                    f"| {score.pre} | {score.share(score.kept)} "
                    f"| {score.left / score.words:.1%} | {score.navigation} |"
                )
                print(out[-1], flush=True)
    out += [RST_HEAD, *(row for site in SITES[:2] for row in rst_rows(site, root))]
    if args.write:
        (HERE / "results" / "extract.md").write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
