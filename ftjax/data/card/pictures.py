"""Histograms and the stages' yield, as SVGs that follow the page's colours and as PNGs."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftjax.data.card.facts import Spread
from ftjax.report import chart
from ftjax.report.progress import count

_BARS = 40
_LEFT, _RIGHT, _WIDTH, _FOOT = 46, 10, 430, 40  # of an SVG
_STAGES_WIDTH = 880


@dataclass(frozen=True)
class Histogram:
    """Rows by a number, in bars of one width; `beyond` rows are above the last."""

    title: str
    unit: str
    start: float
    width: float
    bars: tuple[int, ...]
    beyond: int
    median: float
    whole: bool
    """Whether the numbers are whole ones."""

    @property
    def single(self) -> bool:
        """Whether each bar is one number."""
        return self.whole and self.width == 1

    @property
    def stop(self) -> float:
        return self.start + self.width * len(self.bars)

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "start": self.start,
            "width": self.width,
            "rows": self.bars,
            "beyond": self.beyond,
        }


def histogram(spread: Spread, title: str, unit: str) -> Histogram | None:
    """Round bars from the least value to the 99th percentile, so that a few long rows do not press the others
    into one bar; None where there is nothing to tell apart."""
    if not spread.counts or spread.low == spread.high:
        return None
    whole = all(isinstance(v, int) or v == int(v) for v in spread.counts)
    low, high = spread.low, spread.high
    long = spread.quantile(0.99)
    if high > low + 1.3 * (long - low) and long > low:
        high = long
    raw = (high - low) / _BARS
    power = 10 ** math.floor(math.log10(raw))
    width = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        width = max(1.0, float(math.ceil(width)))
    start = math.floor(low / width) * width
    bars = [0] * (math.floor((high - start) / width + 1e-9) + 1)
    beyond = 0
    for value, number in spread.counts.items():
        bar = math.floor((value - start) / width + 1e-9)
        if bar < len(bars):
            bars[max(bar, 0)] += number
        else:
            beyond += number
    return Histogram(title, unit, start, width, tuple(bars), beyond, spread.quantile(0.5), whole)


def of_facts(spreads: Mapping[str, Spread], scores: Mapping[str, Spread], estimate: bool):
    """{file name: histogram} of what there is."""
    tokens = "tokens, estimated" if estimate else "tokens"
    made = {
        "tokens": histogram(spreads["tokens"], "Length of an example", tokens),
        "answer": histogram(spreads["answer"], "Length of what is trained", "characters"),
        "turns": histogram(spreads["turns"], "Turns of an example", "messages of user and assistant"),
    }
    for name, spread in sorted(scores.items()):
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        made[f"score-{stem}"] = histogram(spread, f"Score {name}", name)
    return {name: h for name, h in made.items() if h is not None}


# ── SVG ───────────────────────────────────────────────────────────────────────────────────────────


def _text(x: float, y: float, words: str, anchor: str = "end", css: str = "") -> str:
    css = f' class="{css}"' if css else ""
    return f'<text{css} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def histogram_svg(h: Histogram, height: int = 200, link: str = "") -> str:
    """An <svg> whose colours are the page's CSS classes; `link` is where a bar leads, with {low} and
    {high} in it."""
    top, bottom = 30, height - _FOOT
    most = max(h.bars)
    slots = len(h.bars) + (2 if h.beyond else 0)  # one of them is a gap
    slot = (_WIDTH - _LEFT - _RIGHT) / slots

    def px(value: float) -> float:
        return _LEFT + (value - h.start) / h.width * slot

    def py(rows: float) -> float:
        return bottom - rows / most * (bottom - top)

    def bar(index: int, rows: int, said: str, css: str, low: str, high: str) -> str:
        x, y = _LEFT + index * slot, min(py(rows), bottom - 1 if rows else bottom)
        gap = min(2.0, slot / 6)
        rect = (
            f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{slot - gap:.1f}" '
            f'height="{bottom - y:.1f}"><title>{html.escape(said)}</title></rect>'
        )
        return (
            f'<a href="{html.escape(link.format(low=low, high=high))}">{rect}</a>' if link and rows else rect
        )

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(h.title)}" class="chart">'
    ]
    for y in [t for t in chart.ticks(0, most, 4) if t == int(t)]:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
        )
        parts.append(_text(_LEFT - 8, py(y) + 4, count(y)))
    for i, rows in enumerate(h.bars):
        low = h.start + i * h.width
        said = f"{_between(h, i)} {h.unit}: {rows:,} rows"
        parts.append(bar(i, rows, said, "bars", f"{low:g}", f"{low + h.width - h.whole:g}"))
    if h.beyond:
        said = f"{h.stop:g} {h.unit} or more: {h.beyond:,} rows"
        parts.append(bar(len(h.bars) + 1, h.beyond, said, "bars beyond", f"{h.stop:g}", ""))
        parts.append(_text(_WIDTH - _RIGHT, bottom + 18, f"≥ {h.stop:,.6g}"))
    for x in chart.ticks(h.start, h.stop, 5):
        at = px(x) + (slot / 2 if h.single else 0)
        if at < _WIDTH - _RIGHT - (62 if h.beyond else 0):
            parts.append(_text(at, bottom + 18, f"{x:,.6g}", "middle"))
    at = px(h.median) + (slot / 2 if h.single else 0)
    parts.append(f'<line class="median" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 18}" y2="{bottom}"/>')
    side = "start" if at < _WIDTH * 0.7 else "end"
    parts.append(_text(at + (6 if side == "start" else -6), top - 9, f"median {h.median:,.6g}", side, "said"))
    parts.append(_text(_WIDTH - _RIGHT, height - 4, h.unit))
    return "\n".join([*parts, "</svg>"])


def _between(h: Histogram, bar: int) -> str:
    low = h.start + bar * h.width
    return f"{low:g}" if h.single else f"{low:,.6g} to {low + h.width:,.6g}"


def stages_svg(stages: Sequence[Mapping[str, Any]]) -> str:
    """Rows that went on from each stage and rows that ended there."""
    if not stages:
        return ""
    line, left, right = 34, 110, 210
    height = len(stages) * line + 8
    most = max(max(s["rows"], s["kept"] + s["dropped"]) for s in stages) or 1
    wide = _STAGES_WIDTH - left - right
    parts = [
        f'<svg viewBox="0 0 {_STAGES_WIDTH} {height}" role="img" class="chart" '
        'aria-label="Rows that go on from each stage">'
    ]
    for i, stage in enumerate(stages):
        y = i * line + 6
        kept, dropped = stage["kept"] / most * wide, stage["dropped"] / most * wide
        parts.append(_text(left - 12, y + 15, stage["name"], css="said"))
        parts.append(f'<rect class="bars" x="{left}" y="{y}" width="{kept:.1f}" height="20"/>')
        parts.append(f'<rect class="lost" x="{left + kept:.1f}" y="{y}" width="{dropped:.1f}" height="20"/>')
        parts.append(_text(left + kept + dropped + 10, y + 15, _stage_words(stage), "start"))
    return "\n".join([*parts, "</svg>"])


def _stage_words(stage: Mapping[str, Any]) -> str:
    ended = f", {stage['dropped']:,} ended" if stage["dropped"] else ""
    return f"{stage['kept']:,} go on{ended}"


# ── PNG ───────────────────────────────────────────────────────────────────────────────────────────


def histogram_png(h: Histogram, path: Path) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = chart.figure(8, 2.8)
    axes = figure.subplots()
    chart.plain(axes)
    middle = 0.0 if h.single else h.width / 2
    places = [h.start + i * h.width + middle for i in range(len(h.bars))]
    axes.bar(places, h.bars, width=h.width * 0.92, color=chart.BLUE)
    if h.beyond:
        at = h.stop + h.width * 1.5
        axes.bar([at], [h.beyond], width=h.width * 0.92, color=chart.BLUE, alpha=0.45)
        axes.annotate(
            f"≥ {h.stop:,.6g}", (at, h.beyond), (0, 4), textcoords="offset points", ha="right",
            fontsize=9, color=chart.INK,
        )  # fmt: skip
    axes.axvline(h.median, color=chart.ORANGE, linewidth=1.4)
    axes.annotate(
        f" median {h.median:,.6g}", (h.median, 1), xycoords=("data", "axes fraction"), va="top",
        fontsize=9, color=chart.INK,
    )  # fmt: skip
    axes.set_title(h.title, loc="left", color=chart.INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(h.unit, color=chart.INK, fontsize=9)
    axes.set_ylabel("rows", color=chart.INK, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=h.width >= 1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: count(y)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    chart.save(figure, path)


def stages_png(stages: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure = chart.figure(8, 0.8 + 0.36 * len(stages))
    axes = figure.subplots()
    chart.plain(axes, "x")
    kept, dropped = [s["kept"] for s in stages], [s["dropped"] for s in stages]
    places = range(len(stages))
    axes.barh(places, kept, height=0.62, color=chart.BLUE)
    axes.barh(places, dropped, left=kept, height=0.62, color=chart.ORANGE)
    for i, stage in enumerate(stages):
        axes.annotate(
            _stage_words(stage), (kept[i] + dropped[i], i), (6, 0), textcoords="offset points",
            va="center", fontsize=9, color=chart.INK,
        )  # fmt: skip
    axes.set_yticks(places, [s["name"] for s in stages])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xticks([])
    most = max((k + d for k, d in zip(kept, dropped, strict=True)), default=1) or 1
    axes.set_xlim(0, most * 1.45)
    axes.set_title(
        "Rows that go on from each stage", loc="left", color=chart.INK, fontsize=11, fontweight="bold"
    )
    chart.save(figure, path)
