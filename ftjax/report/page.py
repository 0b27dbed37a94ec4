"""report.html: one self-contained page, made from what lies in the run folder."""

import html
import os
import pathlib
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.report import chart, files, goodput, profile
from ftjax.report.progress import count, duration, size

CSS = """
:root { --ink: #1d2329; --soft: #5c6670; --line: #e2e6ea; --page: #f6f7f9; --card: #ffffff; --blue: #2f5fd0;
  --orange: #c8641b; --good: #1a7f47; --bad: #b3372f; --wash: #eef3fd; --code: #f2f4f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #98a3ae; --line: #2c333b; --page:
  #12161a;
  --card: #1a1f25; --blue: #7ea6ff; --orange: #f0a05f; --good: #62c98e; --bad: #f08a82; --wash: #1f2a3f;
  --code: #14181d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 48px 24px 80px; }
header p { margin: 6px 0 0; color: var(--soft); }
.brand { font-size: 13px; letter-spacing: .08em; text-transform: uppercase; color: var(--soft); }
h1 { font-size: 34px; line-height: 1.2; letter-spacing: -.02em; margin: 4px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 44px 0 14px; }
h3 { font-size: 14px; margin: 0 0 8px; color: var(--soft); font-weight: 600; }
section > p { margin: 8px 0; }
.soft, small { color: var(--soft); font-size: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 1px; overflow:
  hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin-top: 28px; }
.figures div { padding: 14px 16px; box-shadow: 0 0 0 1px var(--line); }
.figures b { display: block; font-size: 22px; font-weight: 600; letter-spacing: -.01em; white-space: nowrap;
  }
.figures span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 13px; font-weight: 600; color: var(--soft); }
th, td { padding: 9px 14px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.wide { overflow-x: auto; }
.scores td { white-space: nowrap; }
.scores td:first-child { font-weight: 500; }
.scores tr.best td { background: var(--wash); }
.scores tr.best td:first-child { box-shadow: inset 3px 0 var(--blue); }
.scores th:first-child, .scores td:first-child { padding-left: 14px; }
.bar { display: block; width: 130px; height: 8px; margin-top: 5px; }
.bar .track { fill: var(--line); } .bar .fill { fill: var(--blue); } .bar .range { stroke: var(--ink); }
.facts td:first-child { color: var(--soft); width: 46%; }
.facts td { overflow-wrap: anywhere; padding-top: 6px; padding-bottom: 6px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 20px;
  align-items: start; }
.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.chart .grid { stroke: var(--line); } .chart polyline { fill: none; stroke-linejoin: round; }
.chart .raw { stroke: var(--blue); opacity: .28; } .chart .smooth { stroke: var(--blue); stroke-width: 2.2;
  }
.chart .eval { stroke: var(--orange); stroke-width: 1.8; } .chart .dot { fill: var(--orange); }
.chart .rate { stroke: var(--soft); stroke-width: 1.5; }
.legend { display: flex; gap: 20px; font-size: 13px; color: var(--soft); margin: 0 0 8px 52px; }
.legend i { display: inline-block; width: 18px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  margin: 0;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap:
  anywhere; }
.sample { margin-bottom: 16px; break-inside: avoid; }
.sample .columns { margin-top: 14px; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr));
  }
.ok { color: var(--good); } .no { color: var(--bad); }
summary { cursor: pointer; color: var(--soft); font-size: 14px; }
details pre { margin-top: 12px; }
ul { margin: 8px 0; padding-left: 20px; }
footer { margin-top: 56px; color: var(--soft); font-size: 13px; }
@media print { body { background: none; font-size: 11pt; } main { padding: 0; max-width: none; }
  .card, .figures, pre { border-color: #ccc; } section { break-inside: auto; } h2 { break-after: avoid; }
  tr, .figures, .chart { break-inside: avoid; } details > * { display: block; } }
"""


def write_report(run: str | os.PathLike, summary: Mapping | None = None) -> pathlib.Path:
    """loss.png and report.html from the files of a run folder, finished or not; the page's path. `summary` is
    what summary.json is about to say."""
    run = pathlib.Path(run)
    summary = summary or files.read_json(run / "summary.json")
    records = files.read_lines(run / "metrics.jsonl")
    lines = chart.curves(records)
    name = run.resolve().name
    chart.loss_png(lines, run / "loss.png", name)
    path = run / "report.html"
    files.write_text(path, page(run, name, records, lines, summary))
    return path


def page(
    run: pathlib.Path, name: str, records: Sequence[dict], lines: chart.Curves, summary: Mapping | None
) -> str:
    info = files.read_json(run / "info.json") or {}
    base = files.read_json(run / "base.json") or {}
    config = (run / "config.yaml").read_text("utf-8") if (run / "config.yaml").exists() else ""
    sections = [
        _scores(files.read_json(run / "scores.json")),
        _loss(lines),
        _samples(files.read_json(run / "samples.json")),
        _commands(run, info),
        _data(info),
        _speed(records, summary, info),
        _section("Profile", profile.section(files.read_json(run / "profile.json"))),
        _events(records),
        _setup(info, base),
        _section("Config", f"<pre>{_e(config.rstrip())}</pre>") if config else "",
    ]
    body = "\n".join(filter(None, sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_e(name)} · ftjax</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{_header(name, info, summary, lines)}\n{body}\n{_footer(summary, info)}\n"
        "</main>\n</body>\n</html>\n"
    )


def _e(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{_e(title)}</h2>\n{body}\n</section>" if body else ""


def _header(name: str, info: Mapping, summary: Mapping | None, lines: chart.Curves) -> str:
    recipe = info.get("recipe")
    what = " · ".join(_e(x) for x in (recipe and str(recipe).upper(), info.get("model")) if x)
    figures = []
    if lines.train.x:
        first, last = lines.smooth.y[0], lines.smooth.y[-1]
        figures.append((f"{first:.2g} → {last:.2g}", "training loss, smoothed"))
    if lines.eval.x:
        best = min(range(len(lines.eval.y)), key=lines.eval.y.__getitem__)
        figures.append((f"{lines.eval.y[best]:.4g}", f"best eval loss, step {lines.eval.x[best]:g}"))
    if lines.train.x:
        total = info.get("total_steps")
        figures.append((f"{lines.train.x[-1]:g}" + (f" / {total}" if total else ""), "steps"))
    if info.get("trainable"):
        share = f" of {count(info['parameters'])}" if info.get("parameters") else ""
        figures.append((count(info["trainable"]), "weights trained" + share.replace(" ", "\u00a0")))
    if summary and summary.get("seconds"):
        figures.append((duration(summary["seconds"]), "training time"))
    cells = "".join(f"<div><b>{_e(value)}</b><span>{_e(label)}</span></div>" for value, label in figures)
    state = "" if summary else "<p>This run has not finished.</p>"
    grid = f'<div class="figures">{cells}</div>' if cells else ""
    title = f'<div class="brand">ftjax</div>\n<h1>{_e(name)}</h1>\n<p>{what}</p>{state}'
    return f"<header>\n{title}\n{grid}\n</header>"


def _scores(scores: Mapping | None) -> str:
    if not scores:
        return ""
    head = "".join(f"<th>{_e(c)}</th>" for c in ["", *scores["columns"]])
    rows = []
    for row in scores["rows"]:
        cells = "".join(f"<td>{_score(cell)}</td>" for cell in row["cells"])
        best = ' class="best"' if row.get("best") else ""
        rows.append(f"<tr{best}><td>{_e(row['name'])}</td>{cells}</tr>")
    notes = "".join(f'<p class="soft">{_e(note)}</p>' for note in scores.get("notes", ()))
    table = f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return _section(scores.get("title") or "Scores", f'<div class="card wide">{table}</div>{notes}')


def _score(cell: Any) -> str:
    if not isinstance(cell, Mapping):
        return _e(f"{cell:.4g}" if isinstance(cell, float) else cell)
    text = _e(cell.get("text", ""))
    if cell.get("value") is None:
        return text
    value, width = float(cell["value"]), 130

    def at(share):
        return f"{min(max(float(share), 0.0), 1.0) * width:.1f}"

    bar = f'<rect class="track" y="2" width="{width}" height="4" rx="2"/>'
    bar += f'<rect class="fill" y="2" width="{at(value)}" height="4" rx="2"/>'
    if cell.get("low") is not None and cell.get("high") is not None:
        bar += f'<line class="range" x1="{at(cell["low"])}" x2="{at(cell["high"])}" y1="4" y2="4"/>'
        for end in (cell["low"], cell["high"]):
            bar += f'<line class="range" x1="{at(end)}" x2="{at(end)}" y1="1" y2="7"/>'
    return f'{text}<svg class="bar" viewBox="0 0 {width} 8" aria-hidden="true">{bar}</svg>'


def _loss(lines: chart.Curves) -> str:
    svg = chart.loss_svg(lines)
    if not svg:
        return ""
    legend = '<span><i style="background: var(--blue)"></i>train (smoothed, and each step)</span>'
    if lines.eval.x:
        legend += '<span><i style="background: var(--orange)"></i>eval</span>'
    return _section("Loss", f'<div class="card"><div class="legend">{legend}</div>\n{svg}</div>')


def _samples(samples: Sequence[Mapping] | None) -> str:
    cards = []
    for sample in samples or ():
        boxes = []
        for key, label in (("expected", "Expected"), ("before", "Before"), ("after", "After")):
            if sample.get(key) is None:
                continue
            right = sample.get(f"{key}_ok")
            mark = (
                ""
                if right is None
                else ' <span class="ok">✓</span>'
                if right
                else ' <span class="no">✗</span>'
            )
            boxes.append(f"<div><h3>{label}{mark}</h3><pre>{_e(sample[key])}</pre></div>")
        cards.append(
            f'<div class="card sample"><h3>Prompt</h3><pre>{_e(sample["prompt"])}</pre>'
            f'<div class="columns">{"".join(boxes)}</div></div>'
        )
    return _section("Samples", "\n".join(cards))


def _commands(run: pathlib.Path, info: Mapping) -> str:
    folder = shlex.quote(str(run))
    text = f"ftjax chat {folder}\nftjax export {folder} --for hf\nftjax export {folder} --for peft"
    if not (run / "adapter").exists() and (run / "model").exists():  # every weight was tuned: no adapter
        text = text.rpartition("\n")[0]
    return _section("Use it", f"<pre>{_e(text)}</pre>")


_LABELS = {
    "row_tokens": "tokens with padding",
    "efficiency": "packing efficiency",
    "units": "examples placed",
    "compile_seconds": "compiling",
    "setup_seconds": "loading model and data",
    "seconds": "training time",
}


def _rows(facts: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in facts.items():
        label = prefix + _LABELS.get(key, str(key).replace("_", " "))
        if value is None or value == {} or value == []:
            continue
        if isinstance(value, Mapping):
            rows += _rows(value, f"{label}: ")
        elif isinstance(value, list | tuple):
            rows.append((label, ", ".join(map(str, value))))
        elif isinstance(value, bool):
            rows.append((label, "yes" if value else "no"))
        elif key.endswith("_bytes"):
            rows.append((label.removesuffix(" bytes"), size(value)))
        elif key.endswith("seconds"):
            rows.append(
                (label.removesuffix(" seconds"), duration(value) if value >= 60 else f"{value:.3g} s")
            )
        elif key in ("efficiency", "share") or key.endswith("_share"):
            rows.append((label, f"{100 * value:.1f}%"))
        elif isinstance(value, int):
            rows.append((label, f"{value:,}".replace(",", "\u202f")))
        elif isinstance(value, float):
            rows.append((label, f"{value:.4g}"))
        else:
            rows.append((label, str(value)))
    return rows


def _facts(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    cells = "".join(f"<tr><td>{_e(label)}</td><td>{_e(value)}</td></tr>" for label, value in rows)
    head = f"<h3>{_e(title)}</h3>" if title else ""
    return f'<div class="card">{head}<table class="facts">{cells}</table></div>'


def _columns(*cards: str) -> str:
    shown = [card for card in cards if card]
    return f'<div class="columns">{"".join(shown)}</div>' if shown else ""


def _data(info: Mapping) -> str:
    parts = [
        _facts(t, _rows(info[k])) for k, t in (("train", "Training"), ("eval", "Evaluation")) if info.get(k)
    ]
    return _section("Data", _columns(*parts))


def _speed(records: Sequence[Mapping], summary: Mapping | None, info: Mapping) -> str:
    train = [r for r in records if r.get("kind") == "train" and r.get("seconds")]
    rows = []
    if len(train) > 2:
        later = [r["seconds"] for r in train[1:]]
        typical = statistics.median(later)
        compiling = max(train[0]["seconds"] - typical, 0.0)
        rates = [r["rate"] for r in train[1:] if r.get("rate")]
        rows += [
            ("first step, beyond a usual one", f"{compiling:.3g} s"),
            ("a step", f"{typical:.3g} s"),
        ]
        if rates:
            rows.append(("trained per second, median", count(statistics.median(rates))))
    if summary:
        if summary.get("trained"):
            rows.append(("trained in all (tokens, or pairs)", count(summary["trained"])))
        rows += _rows(
            {k: summary[k] for k in ("seconds", "peak_memory_bytes") if summary.get(k)}, "training: "
        )
    rows += _rows({k: info[k] for k in ("setup_seconds",) if info.get(k)})
    more = {
        k: v
        for k, v in (summary or {}).items()
        if k not in ("seconds", "peak_memory_bytes", "trained", "finished", "goodput", "time")
    }
    cards = _facts("Training", rows), _facts("Outcome", _rows(more)), _facts("Wall time", _time(summary))
    return _section("Speed and memory", _columns(*cards))


def _time(summary: Mapping | None) -> list[tuple[str, str]]:
    """Where the wall time went, and so the goodput (ftjax.report.goodput)."""
    spent = (summary or {}).get("time") or {}
    wall = sum(spent.values())
    rows = [("goodput", f"{summary['goodput']:.1%} of {duration(wall)}")] if summary and spent else []
    for name, seconds in spent.items():
        said = duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"
        rows.append((goodput.NAMES[name], f"{said} ({seconds / wall:.1%})"))
    return rows


def _events(records: Sequence[Mapping]) -> str:
    items = [
        f"<li>after step {r['step']}: {_e(r.get('message', ''))}</li>"
        for r in records
        if r.get("kind") == "event"
    ]
    return _section("What happened", f"<ul>{''.join(items)}</ul>" if items else "")


def _setup(info: Mapping, base: Mapping) -> str:
    known = ("recipe", "model", "train", "eval", "hardware", "versions", "setup_seconds", "total_steps")
    rest = {k: v for k, v in info.items() if k not in known}
    return _section(
        "Where and what",
        _columns(
            _facts("Base model", _rows(base) + _rows(rest)),
            _facts("Hardware", _rows(info.get("hardware") or {})),
            _facts("Versions", _rows(info.get("versions") or {})),
        ),
    )


def _footer(summary: Mapping | None, info: Mapping) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime((summary or {}).get("finished") or time.time()))
    version = (info.get("versions") or {}).get("ftjax", "")
    return f"<footer>{'Finished' if summary else 'Written'} {when} · ftjax {_e(version)}</footer>"
