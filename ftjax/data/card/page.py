"""card.html: one file that works offline, to read the facts and to browse, search and filter the rows.

The rows lie in it as compressed chunks (gzip, base64), which the page unpacks as they are looked at, so that
opening it is quick with fifty thousand rows; the list draws only what is on the screen. Nothing of the data
is ever markup: Python escapes what it writes, the script makes text nodes, and the page's
Content-Security-Policy lets no other script run and nothing be fetched.
"""

import base64
import gzip
import hashlib
import html
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ftjax.data import read
from ftjax.data.card import markdown, pictures, prepared
from ftjax.data.card.facts import UNKNOWN, Measured, shown_path
from ftjax.data.codes import CODES
from ftjax.data.options import DataSource
from ftjax.data.record import text_of
from ftjax.errors import UserError
from ftjax.report import page as house
from ftjax.report.progress import count

CUT = 20_000  # characters of one text on the page
_IMAGE = 400_000  # characters of an image's data URL on the page
_PREVIEW = 140
_CHUNK_BYTES = 400_000
_HELD_BYTES = 256_000_000  # compressed rows, of which fewer are then kept
_HERE = Path(__file__).parent


@dataclass
class Sample:
    """Evenly spaced ones of what is put, at most `most`: all at first, then every second, fourth …"""

    most: int
    every: int = 1
    seen: int = 0
    size: int = 0
    kept: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    """(what the list shows of a row, the row itself as compressed JSON)"""

    def wants(self) -> bool:
        """Whether the next one is to be put; counts it as seen."""
        self.seen += 1
        return (self.seen - 1) % self.every == 0

    def put(self, entry: dict[str, Any], body: Any) -> None:
        packed = zlib.compress(json.dumps(body).encode(), 1)
        self.kept.append((entry, packed))
        self.size += len(packed)
        while len(self.kept) > max(1, self.most) or (self.size > _HELD_BYTES and len(self.kept) > 1):
            self.kept = self.kept[::2]
            self.every *= 2
            self.size = sum(len(packed) for _, packed in self.kept)


def put_row(sample: Sample, m: Measured, tokenizer: Any) -> None:
    """The row, if the sample wants it; `tokenizer` decodes its tokens."""
    if not sample.wants():
        return
    record = m.record
    asked = [x for x in record.messages if x["role"] == "user"] or record.messages
    if record.task == "sft":
        asked = asked[:1]  # how the conversation begins; else what the answer is to
    entry = {
        "id": m.id,
        "task": record.task,
        "split": m.split,
        "source": shown_path(m.source),
        "path": m.source,
        "language": m.language,
        "line": record.meta.get("line", 0),
        "tokens": m.tokens,
        "trained": m.trained,
        "scores": record.meta.get("scores"),
        "title": _preview(text_of(asked[-1]) if asked else record.text),
        "answer": _preview("" if not asked else record.answer_text()),
    }
    names = ("chosen", "rejected") if len(m.documents) == 2 and record.task == "preference" else ("",)
    mask = [
        {
            "name": name,
            "tokens": len(document.tokens),
            "trained": int((document.loss_weight > 0).sum()),
            "runs": runs(document, tokenizer),
            "notes": document.notes,
        }
        for name, document in zip(names * len(m.documents), m.documents, strict=False)
    ]
    values = shortened(record.to_json())
    if "source" in record.meta:
        values["meta"]["source"] = entry["source"]
    sample.put(entry, {"record": values, "mask": mask, "problem": m.problem})


def runs(document: Any, tokenizer: Any) -> list[tuple[str, float, int]]:
    """(text, loss weight, tokens) of each stretch of tokens with one weight."""
    out: list[tuple[str, float, int]] = []
    weights = document.loss_weight.tolist()
    left = CUT
    for weight, stretch in groupby(range(len(weights)), weights.__getitem__):
        index = list(stretch)
        text = tokenizer.decode(
            document.tokens[index], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if left <= 0:
            continue
        out.append((text if len(text) <= left else _cut(text, left), weight, len(index)))
        left -= len(text)
    return out


def shortened(value: Any) -> Any:
    """The value with texts cut to what a page can show, and said so."""
    if isinstance(value, str):
        if value.startswith("data:"):
            return value if len(value) <= _IMAGE else f"[{value[:40]}… of {len(value):,} characters]"
        return value if len(value) <= CUT else _cut(value, CUT)
    if isinstance(value, Mapping):
        return {k: shortened(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(v) for v in value]
    return value


def _cut(text: str, length: int) -> str:
    return f"{text[:length]}\n[… {len(text) - length:,} more characters, left out on this page]"


def _preview(text: str) -> str:
    text = " ".join(text[: 4 * _PREVIEW].split())
    return text if len(text) <= _PREVIEW else text[: _PREVIEW - 1] + "…"


# ── verdicts ──────────────────────────────────────────────────────────────────────────────────────


def judge(rows: Sample, report: Path, most: int) -> tuple[dict[int, list[dict[str, Any]]], Sample]:
    """({number of a row on the page: its verdicts}, the rows that ended, each with its verdicts)."""
    places: dict[tuple[str, int], list[int]] = {}
    for i, (entry, _) in enumerate(rows.kept):
        places.setdefault((entry["path"], entry["line"]), []).append(i)
    said: dict[int, list[dict[str, Any]]] = {}
    left = Sample(most)
    for (stage, source, line, outcome), group in groupby(
        prepared.verdicts(report), lambda v: (v["stage"], v["source"], v["line"], v["outcome"])
    ):
        verdicts = [
            {k: shortened(v[k]) for k in ("code", "text", "path", "fix", "stage", "outcome")} for v in group
        ]
        if outcome == "dropped":
            if left.wants():
                name = shown_path(source) if source else UNKNOWN
                entry = {
                    "id": f"{stage}:{name}:{line}",
                    "stage": stage,
                    "source": name,
                    "path": source,
                    "line": line,
                    "codes": sorted({v["code"] for v in verdicts}),
                    "title": _preview(verdicts[0]["text"]),
                    "answer": "",
                }
                left.put(entry, {"verdicts": verdicts})
        else:
            for i in places.get((source, line), ()):
                said.setdefault(i, []).extend(verdicts)
    return said, left


def find_rows(left: Sample) -> None:
    """Adds to the rows that ended what stood there, where their file is at hand: of JSON lines the line as it
    is, of others the values.

    Not for a set whose personal data was masked or left out: there it may be just what must not be shown.
    """
    wanted: dict[str, dict[int, list[int]]] = {}
    for i, (entry, _) in enumerate(left.kept):
        if entry["line"] and Path(entry["path"]).expanduser().is_file():
            wanted.setdefault(entry["path"], {}).setdefault(entry["line"], []).append(i)
    for source, lines in wanted.items():
        last = max(lines)
        for number, raw in _lines(source):
            for i in lines.get(number, ()):
                entry, packed = left.kept[i]
                body = {**json.loads(zlib.decompress(packed)), "raw": shortened(raw)}
                left.kept[i] = {**entry, "answer": _preview(raw)}, zlib.compress(json.dumps(body).encode(), 1)
            if number >= last:
                break


def _lines(source: str) -> Iterator[tuple[int, str]]:
    path = Path(source).expanduser()
    if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
        with opened as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8", "replace").rstrip("\r\n")
        return
    try:
        for row in read.rows(DataSource(source)):
            yield row.line, json.dumps(row.values, ensure_ascii=False, default=str)
    except UserError:  # the rest of a broken file: its verdicts say what is wrong
        return


# ── the file ──────────────────────────────────────────────────────────────────────────────────────


def write(
    path: Path,
    facts: Mapping[str, Any],
    histograms: Mapping[str, pictures.Histogram],
    rows: Sample,
    said: Mapping[int, Sequence[Mapping[str, Any]]],
    left: Sample,
) -> None:
    """Writes the page, there whole or not at all."""
    css = house.CSS + (_HERE / "page.css").read_text("utf-8")
    script = (_HERE / "page.js").read_text("utf-8")
    allowed = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in
               (("style", css), ("script", script))}  # fmt: skip
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; "
        f"style-src 'sha256-{allowed['style']}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    for i, (entry, _) in enumerate(rows.kept):
        entry["codes"] = sorted({v["code"] for v in said.get(i, ())})
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8", errors="replace") as file:
        file.write(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
            f"<title>{_e(facts['title'])} · ftjax</title>\n<style>{css}</style>\n</head>\n<body>\n"
            f"{_top(facts, rows, left)}\n{_overview(facts, histograms, rows, left)}\n"
            f"{(_HERE / 'page.html').read_text('utf-8')}"
        )
        for name, sample in (("rows", rows), ("left", left)):
            sizes = []
            for number, bodies in enumerate(_chunks(sample)):
                file.write(_block(f"{name}-{number}", b"[" + b",".join(bodies) + b"]"))
                sizes.append(len(bodies))
            index = _index([entry for entry, _ in sample.kept], sizes)
            index["said"] = {str(i): list(v) for i, v in said.items()} if name == "rows" else {}
            file.write(_block(name, json.dumps(index).encode()))
        codes = {code: [c.name, c.severity, c.fix] for code, c in CODES.items()}
        about = {"codes": codes, "estimate": facts["tokens"]["estimate"], "masked": facts["masked"]}
        file.write(_block("about", json.dumps(about).encode()))
        file.write(f"<script>{script}</script>\n</body>\n</html>\n")
    beside.replace(path)


def _chunks(sample: Sample) -> Iterator[list[bytes]]:
    chunk, size = [], 0
    for _, packed in sample.kept:
        body = zlib.decompress(packed)
        if chunk and size + len(body) > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(body)
        size += len(body)
    if chunk:
        yield chunk


def _block(name: str, data: bytes) -> str:
    packed = base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()
    return f'<script type="application/gzip" id="data-{name}">{packed}</script>\n'


_NAMED = ("task", "split", "source", "language", "stage")


def _index(entries: Sequence[Mapping[str, Any]], sizes: list[int]) -> dict[str, Any]:
    """The list of rows by column: names as numbers, since they are few."""
    index: dict[str, Any] = {"rows": len(entries), "chunks": sizes, "names": {}, "columns": {}}
    for column in [c for c in (entries[0] if entries else ()) if c != "path"]:
        values = [entry[column] for entry in entries]
        if column in _NAMED:
            names = sorted(set(values))
            number = {name: i for i, name in enumerate(names)}
            index["names"][column] = names
            values = [number[value] for value in values]
        index["columns"][column] = values
    return index


# ── what stands on the page without the script ────────────────────────────────────────────────────


def _e(value: Any) -> str:
    return html.escape(str(value))


def _top(facts: Mapping[str, Any], rows: Sample, left: Sample) -> str:
    tabs = [("overview", "Overview", ""), ("rows", "Rows", count(len(rows.kept)))]
    if left.kept:
        tabs.append(("left", "Left out", count(left.seen)))
    links = "".join(
        f'<a href="#{key}" id="tab-{key}">{name}{f" <small>{n}</small>" if n else ""}</a>'
        for key, name, n in tabs
    )
    return (
        f'<div class="top"><span class="brand">ftjax</span><b class="name">{_e(facts["title"])}</b>'
        f'<nav aria-label="Parts of this page">{links}</nav>'
        '<button id="help-open" type="button" title="Keys (?)" aria-label="Keys">?</button></div>'
    )


def _overview(
    facts: Mapping[str, Any], histograms: Mapping[str, pictures.Histogram], rows: Sample, left: Sample
) -> str:
    tokens = facts["tokens"]
    share = f" · {tokens['trained'] / tokens['total']:.0%} of them" if tokens["total"] else ""
    ended = sum(s["dropped"] for s in facts["stages"])
    figures = [
        (f"{facts['rows']:,}", "rows"),
        (count(tokens["total"]), "tokens" + (", estimated" if tokens["estimate"] else "")),
        (count(tokens["trained"]), f"trained{share}"),
        (f"{facts['duplicates']['rows']:,}", "rows that repeat another"),
    ]
    if facts["stages"]:
        figures.append((f"{ended:,}", "rows left out on the way"))
    cells = "".join(f"<div><b>{_e(value)}</b><span>{_e(label)}</span></div>" for value, label in figures)
    notes = [f"The tokenizer is {tokens['tokenizer']}'s." if tokens["tokenizer"] else
             "Tokens are an estimate, characters / 4: no model was named."]  # fmt: skip
    for reason, said in tokens["not_rendered"].items():
        notes.append(f"{said['rows']:,} rows could not be rendered ({reason}) and count no tokens.")
    if facts["unreadable"]:
        notes.append(markdown.unreadable(facts["unreadable"]).strip())
    if len(rows.kept) < facts["rows"]:
        notes.append(
            f"This page holds {len(rows.kept):,} of the {facts['rows']:,} rows, evenly spaced (every "
            f"{rows.every:,}th); the facts are of all of them."
        )
    if len(left.kept) < left.seen:
        notes.append(f"Of the {left.seen:,} rows that were left out it holds {len(left.kept):,}.")
    ended_by = {(entry["stage"], code) for entry, _ in left.kept for code in entry["codes"]}
    parts = [
        f"<header><h1>{_e(facts['title'])}</h1><p>{_e(' '.join(notes))}</p>"
        f'<div class="figures">{cells}</div></header>'
    ]
    drawn = ""
    for name, h in histograms.items():
        link = "#rows?min={low}&max={high}" if name == "tokens" else ""
        drawn += f'<div class="card"><h3>{_e(h.title)}</h3>{pictures.histogram_svg(h, link=link)}</div>'
    if drawn:
        parts.append(f'<section class="pictures">{drawn}</section>')
    if facts["stages"]:
        table = _table(
            ["stage", "rows", "go on", "changed", "end", "verdicts"],
            [
                [
                    _e(s["name"]),
                    *(f"{s[k]:,}" for k in ("rows", "kept", "changed", "dropped")),
                    " ".join(
                        _code(code, n, s["name"] if (s["name"], code) in ended_by else None)
                        for code, n in s["codes"].items()
                    ),
                ]
                for s in facts["stages"]
            ],
        )
        parts.append(
            _section(
                "Yield of each stage",
                f'<div class="card">{pictures.stages_svg(facts["stages"])}{table}</div>',
            )
        )
    parts.append(
        _section(
            "Splits",
            _card(
                ["split", "rows", "tokens", "trained", "sha256 of its rows"],
                [
                    [
                        _link("split", name, name),
                        *(f"{s[k]:,}" for k in ("rows", "tokens", "trained")),
                        f"<code>{s['hash'][:16]}…</code>",
                    ]
                    for name, s in facts["splits"].items()
                ],
            )
            + f'<p class="soft">The whole set: <code>{facts["hash"]}</code>, the sha256 of the rows’ ids, '
            "sorted, one a line: the same in any order.</p>",
        )
    )
    names = [
        _counted("Tasks", facts["tasks"], "task"),
        _counted("Languages", facts["languages"] or {}, "language"),
        _counted("Licences", facts["licenses"]),
        _counted("Formats", facts["formats"]),
        _counted("Roles", facts["roles"]),
        _counted("Tools offered", facts["tools"]["defined"]),
        _counted("Tools called", facts["tools"]["called"]),
        _counted("Models that wrote rows", facts["models"]),
        _counted("Prompts that made rows", facts["prompts"]),
        _counted("Pages and documents", facts["urls"]),
    ]
    parts.append(_section("What it holds", f'<div class="names">{"".join(names)}</div>'))
    if not facts["languages"]:
        parts.append(f'<p class="soft">Languages: {_e(facts["no_languages"])}.</p>')
    lengths = [
        [_e(what), *(f"{spread[k]:,.6g}" for k in ("min", "p5", "median", "mean", "p95", "max"))]
        for what, spread in markdown.distributions(facts)
    ]
    parts.append(_section("Lengths", _card(["", "least", "5%", "median", "mean", "95%", "most"], lengths)))
    sources = [
        [
            _link("source", f["name"], f["name"]),
            f"{f['rows']:,}",
            f'<code title="{_e(f["sha256"])}">{_e(f["sha256"][:16])}…</code>' if "sha256" in f else "",
        ]
        for f in facts["sources"][:200]
    ]
    parts.append(_section("Sources", _card(["file", "rows", "sha256"], sources)))
    parts.append(f"<footer>Written by ftjax {_e(facts['ftjax'])}; card.json has every fact.</footer>")
    return f'<main id="overview">{"".join(parts)}<noscript><p>The rows need JavaScript.</p></noscript></main>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are markup."""
    top = "".join(f"<th>{_e(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _card(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f'<div class="card">{_table(head, rows)}</div>'


def _counted(title: str, counts: Mapping[str, int], filter: str = "") -> str:
    if not counts:
        return ""
    items = list(counts.items())
    rows = "".join(
        f"<tr><td>{_link(filter, n, n) if filter else _e(n)}</td><td>{k:,}</td></tr>" for n, k in items[:12]
    )
    if len(items) > 12:
        rows += f"<tr><td>{len(items) - 12:,} more</td><td>{sum(k for _, k in items[12:]):,}</td></tr>"
    return f'<div class="card"><h3>{_e(title)}</h3><table>{rows}</table></div>'


def _link(filter: str, value: str, name: str) -> str:
    return f'<a href="#rows?{_e(urlencode({filter: value}))}">{_e(name)}</a>'


def _code(code: str, number: int, ended: str | None) -> str:
    """A code and how often, leading to such rows: those that `ended` in a stage, or those that went on."""
    known = CODES.get(code)
    name, severity = (known.name, known.severity) if known else ("", "note")
    where = f"left?{urlencode({'stage': ended, 'codes': code})}" if ended else f"rows?codes={code}"
    return f'<a class="code {severity}" href="#{_e(where)}">{_e(code)} {_e(name)} {number:,}</a>'
