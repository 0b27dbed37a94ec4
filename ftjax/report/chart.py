"""The loss chart: as an SVG that follows the page's colours, and as loss.png."""

import html
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple


class Series(NamedTuple):
    """Points of one curve."""

    x: list[float]
    y: list[float]


class Curves(NamedTuple):
    train: Series
    smooth: Series
    eval: Series
    learning_rate: Series


def curves(records: Sequence[dict]) -> Curves:
    """From the lines of metrics.jsonl; a step written twice counts as its last line says."""

    def series(kind: str, key: str) -> Series:
        points = {r["step"]: r[key] for r in records if r.get("kind") == kind and r.get(key) is not None}
        steps = sorted(points)
        return Series([float(s) for s in steps], [float(points[s]) for s in steps])

    train = series("train", "loss")
    return Curves(train, smoothed(train), series("eval", "loss"), series("train", "learning_rate"))


def smoothed(series: Series) -> Series:
    """Mean of the points around each, near ones counting more, over about a twentieth of the run: it does not
    lag."""
    reach = max(1, min(50, len(series.x) // 20))
    weights = [reach + 1 - abs(d) for d in range(-reach, reach + 1)]
    out = []
    for i in range(len(series.y)):
        near = [
            (w, series.y[j])
            for w, j in zip(weights, range(i - reach, i + reach + 1), strict=True)
            if 0 <= j < len(series.y)
        ]
        out.append(sum(w * y for w, y in near) / sum(w for w, _ in near))
    return Series(series.x, out)


def limits(c: Curves) -> tuple[float, float]:
    """Of the loss axis: everything, but for the odd step far above the rest."""
    values = sorted(c.train.y)
    high = max([values[int(0.99 * (len(values) - 1))] * 1.02, *c.smooth.y, *c.eval.y])
    low = min([*values, *c.eval.y])
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return max(low - pad, 0.0) if low >= 0 else low - pad, high + pad


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(series: Series, most: int = 800) -> Series:
    """At most that many points, the extremes of each stretch among them."""
    n = len(series.x)
    if n <= most:
        return series
    keep = {0, n - 1}
    size = math.ceil(2 * n / most)
    for start in range(0, n, size):
        span = range(start, min(start + size, n))
        keep |= {min(span, key=series.y.__getitem__), max(span, key=series.y.__getitem__)}
    index = sorted(keep)
    return Series([series.x[i] for i in index], [series.y[i] for i in index])


def loss_svg(c: Curves) -> str:
    """An <svg> whose colours are the page's CSS classes; "" where nothing was trained."""
    if not c.train.x:
        return ""
    W, left, right = 880, 52, 16
    top, middle, gap, bottom = 12, 262, 30, 338
    x0, x1 = 0.0, max([*c.train.x, *c.eval.x, 1.0])
    y0, y1 = limits(c)
    rate_top = max(c.learning_rate.y, default=0.0) or 1.0

    def px(x):
        return left + (x - x0) / (x1 - x0) * (W - left - right)

    def py(y):
        return middle - (min(max(y, y0), y1) - y0) / (y1 - y0) * (middle - top)

    def pr(y):
        return bottom - y / rate_top * (bottom - middle - gap)

    def line(series, to_y, css):
        few = thinned(series)
        points = " ".join(f"{px(x):.1f},{to_y(y):.1f}" for x, y in zip(few.x, few.y, strict=True))
        return f'<polyline class="{css}" points="{points}"/>'

    def text(x, y, s, anchor="end"):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(s)}</text>'

    parts = [
        f'<svg viewBox="0 0 {W} 382" role="img" aria-label="Loss and learning rate by step" class="chart">'
    ]
    for y in ticks(y0, y1, 6):
        parts.append(f'<line class="grid" x1="{left}" x2="{W - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(text(left - 8, py(y) + 4, f"{y:g}"))
    for x in [t for t in ticks(x0, x1, 8) if t == int(t)]:
        parts.append(text(px(x), bottom + 18, f"{x:g}", "middle"))
        parts.append(
            f'<line class="grid" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
    parts += [line(c.train, py, "raw"), line(c.smooth, py, "smooth")]
    if c.eval.x:
        parts.append(line(c.eval, py, "eval"))
        shown = thinned(c.eval, 60)
        for x, y in zip(shown.x, shown.y, strict=True):
            title = f"<title>step {x:g}: eval loss {y:.4g}</title>"
            parts.append(f'<circle class="dot" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5">{title}</circle>')
    if c.learning_rate.x:
        parts.append(f'<line class="grid" x1="{left}" x2="{W - right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(text(left - 8, middle + gap + 8, f"{rate_top:.0e}".replace("e-0", "e-")))
        parts.append(text(left - 8, bottom + 4, "0"))
        parts.append(line(c.learning_rate, pr, "rate"))
        parts.append(text(W - right, middle + gap + 2, "learning rate"))
    parts.append(text(W - right, 376, "step"))
    return "\n".join([*parts, "</svg>"])


BLUE, ORANGE, INK, FAINT = "#2f5fd0", "#d9772b", "#33383f", "#dfe3e8"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    return made


def plain(axes: Any, grid: Literal["x", "y"] = "y") -> None:
    """Axes without a frame, with faint lines across."""
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.margins(x=0.01)


def save(figure: Any, path: pathlib.Path) -> None:
    """As a PNG that is there whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, format="png")
    beside.replace(path)


def loss_png(c: Curves, path: pathlib.Path, title: str) -> None:
    """Draw it with matplotlib; nothing where nothing was trained."""
    if not c.train.x:
        return
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    drawn = figure(8, 4.8)
    loss, rate = drawn.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    loss.plot(*c.train, color=BLUE, alpha=0.25, linewidth=1)
    loss.plot(*c.smooth, color=BLUE, linewidth=2, label="train")
    if c.eval.x:
        loss.plot(*c.eval, color=ORANGE, linewidth=1.6, marker="o", markersize=4, label="eval")
    loss.set_ylim(*limits(c))
    loss.set_ylabel("loss", color=INK)
    loss.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    loss.legend(frameon=False, labelcolor=INK)
    rate.plot(*c.learning_rate, color="#7a8490", linewidth=1.4)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning\nrate", color=INK, fontsize=9)
    rate.set_xlabel("step", color=INK)
    rate.yaxis.set_major_locator(MaxNLocator(2))
    rate.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.1e}".replace("e-0", "e-") if y else "0"))
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(loss)
    plain(rate)
    save(drawn, path)
