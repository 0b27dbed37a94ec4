"""The page of a profile (RUN/profile.json, made by ftjax.profile), for the terminal and for report.html."""

import html
from collections.abc import Mapping
from typing import Any

SAYS = {
    "matmul": "matmul",
    "attention": "attention",
    "collectives": "collectives",
    "copies": "copies",
    "other": "elementwise, other",
    "idle": "idle",
}


def milliseconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def summary(profile: Mapping[str, Any]) -> list[str]:
    """What a profile comes to, a sentence each."""
    first, last = profile["steps"]
    several = f"steps {first} to {last}" if last > first else f"step {first}"
    lines = [
        f"{several}, {milliseconds(profile['step_ms'])} ms each on {profile['devices']} × {profile['device']}"
    ]
    if profile["usual_step_ms"]:
        lines[0] += f" ({milliseconds(profile['usual_step_ms'])} ms untraced)"
    done = (
        f"{profile['flops']['total'] / 1e12:.4g} TFLOP a step of one device, {profile['tflops']:.4g} TFLOP/s"
    )
    if profile["mfu"] is None:
        done += f"; MFU unknown: {profile['peak_source']}"
    else:
        done += (
            f": MFU {profile['mfu']:.1%} of {profile['peak_tflops']:.4g} TFLOP/s ({profile['peak_source']})"
        )
    lines.append(done)
    if profile["executed_tflop"]:
        lines.append(
            f"products in the program: {profile['executed_tflop']:.4g} TFLOP a step, recomputation, padding "
            "and masked parts of attention included (those of library kernels as far as shapes say them)"
        )
    padding = 1 - profile["tokens"] / max(profile["positions"], 1)
    lines.append(
        f"{profile['tokens']:,.0f} tokens a step, {profile['trained']:,.0f} of them trained; "
        f"{padding:.1%} of the positions are padding"
    )
    return lines


NOTES = (
    "Where several run at once the instant counts for the first in the order matmul, attention, elementwise, "
    "collectives, copies: of the last two what is counted is what nothing hides.",
    "TFLOP/s of a row: the model's FLOPs of that kind over the row's time.",
)


def text(profile: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [f"profile: {summary(profile)[0]}"]
    lines.append(f"  {'':<20}{'share':>8}{'ms':>10}{'launches':>10}{'TFLOP/s':>10}")
    for row in profile["rows"]:
        launches = "" if row["count"] is None else f"{row['count']:,.0f}"
        rate = f"{row['tflops']:.4g}" if row.get("tflops") else ""
        first = f"  {SAYS[row['name']]:<20}{row['share']:>8.1%}{milliseconds(row['ms']):>10}"
        lines.append(f"{first}{launches:>10}{rate:>10}".rstrip())
    return "\n".join([*lines, *(f"  {line}" for line in summary(profile)[1:])])


def section(profile: Mapping[str, Any] | None) -> str:
    """For the page; "" without one."""
    if not profile:
        return ""
    e = html.escape
    rows = []
    for row in profile["rows"]:
        width = 130
        fill = min(max(row["share"], 0), 1) * width
        bar = (
            f'<svg class="bar" viewBox="0 0 {width} 8" aria-hidden="true">'
            f'<rect class="track" y="2" width="{width}" height="4" rx="2"/>'
            f'<rect class="fill" y="2" width="{fill:.1f}" height="4" rx="2"/></svg>'
        )
        hidden = ""
        if row["running_ms"] and row["running_ms"] > 1.05 * row["ms"]:
            hidden = f" <small>({row['running_ms']:.4g} with what others hide)</small>"
        launches = "" if row["count"] is None else f"{row['count']:,.0f}"
        rate = f"{row['tflops']:.4g}" if row.get("tflops") else ""
        rows.append(
            f"<tr><td>{e(SAYS[row['name']])}</td><td>{row['share']:.1%}{bar}</td>"
            f"<td>{milliseconds(row['ms'])}{hidden}</td><td>{launches}</td><td>{rate}</td></tr>"
        )
    head = "<th></th><th>of the step</th><th>ms a step</th><th>launches</th><th>TFLOP/s</th>"
    table = f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    top = "".join(
        f"<tr><td>{e(label)}</td><td>{e(SAYS[category])}</td><td>{milliseconds(ms)}</td><td>{count:,.0f}</td></tr>"
        for label, category, ms, count in profile["top"]
    )
    longest = (
        "<details><summary>The operations that took longest</summary><table><thead><tr><th>where</th>"
        f"<th>kind</th><th>ms a step</th><th>launches</th></tr></thead><tbody>{top}</tbody></table></details>"
    )
    said = "".join(f"<p>{e(line[0].upper() + line[1:])}.</p>" for line in summary(profile))
    notes = [f"FLOPs: {profile['formula']}.", *NOTES, f"The trace: {', '.join(profile['files'])}."]
    soft = "".join(f'<p class="soft">{e(note)}</p>' for note in notes)
    return f'{said}<div class="card wide">{table}</div>{longest}{soft}'
