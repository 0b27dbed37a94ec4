"""`ftjax data inspect FILE…`: what the files hold."""

import argparse
import json
from pathlib import Path

from ftjax.data import read
from ftjax.data.codes import CODES
from ftjax.data.inspect import Inspection, inspect
from ftjax.recipes.data import stage


def main(argv: list[str]) -> int:
    """Runs the verb; raises UserError. The exit code."""
    parser = argparse.ArgumentParser(
        prog="ftjax data inspect",
        description="What files hold: format, counts, tokens, languages, and what is wrong with rows.",
    )
    stage.add_sources(parser)
    parser.add_argument(
        "--model", help="count tokens by its tokenizer and template: a folder, hub id or .gguf"
    )
    parser.add_argument("--max-length", type=int, default=2048, help="tokens in a row (default 2048)")
    parser.add_argument(
        "--epochs", type=int, help="passes, for the cost; as OpenAI's cookbook has it if absent"
    )
    parser.add_argument(
        "--price", type=float, metavar="USD", help="of a million trained tokens, at a service, for the cost"
    )
    parser.add_argument("--report", help="a JSON file for all of it")
    arguments = parser.parse_args(argv)
    found = []
    for source in stage.sources(arguments):
        parts = read.parts(source, stage.ROWS_PER_PART)
        with stage.progress() as said:
            steady = _said(parts, said, source.path)
            one = inspect(steady, source.path, parts[0].format, arguments.model, arguments.max_length)
        found.append(one)
        print("\n".join(lines(one, arguments.epochs, arguments.price)))
    if arguments.report:
        path = Path(arguments.report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([one.to_json() for one in found], ensure_ascii=False, indent=1) + "\n")
    errors = any(CODES[code].severity == "error" for one in found for code in one.codes)
    return stage.ROWS_IN_ERROR if errors else 0


def _said(parts, said, what: str):
    for number, part in enumerate(parts):
        yield part
        said(what, number + 1, len(parts))


def lines(one: Inspection, epochs: int | None = None, price: float | None = None) -> list[str]:
    """The inspection as lines to print."""
    tasks = ", ".join(f"{n:,} {task}" for task, n in one.tasks.most_common())
    out = [f"{one.path}: format {one.format}, {one.rows:,} rows, {one.records:,} readable ({tasks})"]
    if one.roles:
        roles = ", ".join(f"{n:,} {role}" for role, n in one.roles.most_common())
        mean = one.messages.total / max(1, one.messages.count)
        out.append(f"  messages: {mean:.1f} an example ({roles})")
    if one.roles:
        systems = f"{len(one.systems):,} different" if one.systems else "none"
        without = f"; {one.no_system:,} examples without" if one.systems and one.no_system else ""
        out.append(f"  system prompts: {systems}{without}")
    for name, n in (
        ("tools", one.with_tools),
        ("tool calls", one.with_tool_calls),
        ("images", one.with_images),
        ("weights", one.with_weights),
    ):
        if n:
            out.append(f"  with {name}: {n:,}")
    if one.labels:
        out.append("  labels: " + ", ".join(f"{n:,} {label}" for label, n in one.labels.most_common()))
    for name, lengths in (("prompt", one.prompt), ("answer", one.answer)):
        if lengths.most:
            n = lengths.to_json()
            out.append(
                f"  {name}: {n['mean']:,.0f} characters on average, half of them {n['p50']:,} at most, 95% "
                f"{n['p95']:,}, longest {n['most']:,}"
            )
    if one.languages:
        total = sum(one.languages.values())
        shares = ", ".join(f"{lang} {n / total:.1%}" for lang, n in one.languages.most_common(5))
        out.append(f"  languages of the answers: {shares}")
    if one.tokens is not None:
        out += _tokens(one, epochs, price)
    for code, n in sorted(one.codes.items(), key=lambda c: -c[1]):
        out.append(f"  {code} {CODES[code].name:<22}{n:>8,}  {stage.one_line(one.firsts[code].to_json())}")
    return out


def _tokens(one: Inspection, epochs: int | None, price: float | None) -> list[str]:
    tokens = one.tokens
    assert tokens is not None
    n = tokens.lengths.to_json()
    if not n["count"]:
        return ["  tokens: no example can be rendered"] + _left_out(tokens.left_out)
    share = tokens.trained / max(1, n["total"])
    out = [
        f"  tokens: {n['total']:,}, {tokens.trained:,} trained ({share:.1%}); {n['mean']:,.0f} a document, "
        f"half of them {n['p50']:,} at most, 95% {n['p95']:,}, longest {n['most']:,}"
    ]
    if tokens.over:
        out.append(f"  longer than {tokens.max_length:,} tokens, and cut for this count: {tokens.over:,}")
    passes = epochs or one.epochs()
    whose = "" if epochs else " (OpenAI's default for so many examples)"
    line = f"  training: {passes} epochs{whose} are {one.billed(passes):,} tokens"
    if price is not None:
        line += f", ${one.billed(passes) * price / 1e6:,.2f} at ${price:g} a million"
    return [*out, line, *_left_out(tokens.left_out)]


def _left_out(reasons: dict[str, int]) -> list[str]:
    return [
        f"  can't be rendered, {reason}: {n:,}" for reason, n in sorted(reasons.items(), key=lambda r: -r[1])
    ]
