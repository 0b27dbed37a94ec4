"""`ftjax data render FILE --model MODEL`: training data as the model will see it."""

import argparse
from itertools import groupby

from ftjax.data.options import DataOptions, DataSource
from ftjax.recipes.data import stage


def main(argv: list[str]) -> None:
    """Runs the verb; raises UserError."""
    parser = argparse.ArgumentParser(
        prog="ftjax data render",
        description="Show examples as tokens, the trained ones in colour, and count what a file comes to.",
    )
    stage.add_sources(parser, 1)
    parser.add_argument(
        "--model", required=True, help="whose tokenizer and template: a folder, hub id or .gguf file"
    )
    parser.add_argument("--n", type=int, default=3, help="how many examples to show (default 3)")
    parser.add_argument("--max-length", type=int, default=DataOptions("").max_length, help="tokens in a row")
    parser.add_argument(
        "--chat-template", help='a Jinja file instead of the tokenizer\'s template, or "none"'
    )
    parser.add_argument("--train-on", choices=["assistant", "last", "all"], default="assistant")
    arguments = parser.parse_args(argv)
    source = stage.sources(arguments)[0]
    options = DataOptions(
        train=[source],
        max_length=arguments.max_length,
        on_bad="drop",
        overlong="split" if arguments.format == "text" else "drop",
        chat_template=arguments.chat_template,
        train_on=arguments.train_on,
    )
    show(source, options, arguments.model, arguments.n)


def show(source: DataSource, options: DataOptions, model: str, count: int) -> None:
    """Prints `count` examples of the source, coloured, and the counts of all of them."""
    from rich.console import Console
    from rich.text import Text

    from ftjax.data.dataset import Report, make_renderer
    from ftjax.data.examples import BadExample, examples
    from ftjax.hf import tokenizer_of

    console = Console(highlight=False, soft_wrap=True)
    tokenizer = tokenizer_of(model)
    renderer = make_renderer(options, tokenizer)
    report, seen = Report(source.path), []
    chunk, shown = [], 0

    def flush() -> None:
        nonlocal shown
        results = iter(renderer.units([e for e in chunk if not isinstance(e, BadExample)]))
        for example in chunk:
            result = example if isinstance(example, BadExample) else next(results)
            for unit in report.add(result, "drop"):
                if shown < count:
                    shown += 1
                    where = "" if isinstance(example, BadExample) else example.where
                    for name, document in zip(
                        ("chosen", "rejected") if len(unit) == 2 else ("",), unit, strict=True
                    ):
                        console.print(
                            _document(document, tokenizer, f"{where} {name}".strip(), console.is_terminal)
                        )
        chunk.clear()

    for row, example in examples(source, options.format, formats_seen=seen):
        report.say(row)
        chunk.append(example)
        if len(chunk) >= (count if report.rows == 0 and count else 256):
            flush()
    flush()
    report.format = seen[0] if seen else ""
    console.print(Text("\n".join(summary(report))))


def _document(document, tokenizer, title: str, colour: bool):
    """One document; trained runs are green, or in ⟦brackets⟧ where there is no colour."""
    from rich.text import Text

    trained = document.loss_weight
    weights = sorted({float(w) for w in trained if w not in (0.0, 1.0)})
    text = Text()
    count = f"{len(trained)} tokens, {int((trained > 0).sum())} trained"
    text.append(f"── {title}: {count}{f', weights {weights}' if weights else ''}\n", "bold")
    for weight, run in groupby(range(len(trained)), lambda i: float(trained[i])):
        piece = tokenizer.decode(
            document.tokens[list(run)], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if weight and not colour:
            mark = "" if weight == 1 else f"×{weight:g} "
            text.append(f"⟦{mark}{piece}⟧")
        else:
            text.append(piece, "bold green" if weight == 1 else "yellow" if weight else "dim")
    return text.append("\n")


def summary(report) -> list[str]:
    """The counts of a Report as lines to print."""
    lines = [f"{report.source}: {report.format} format, {report.rows} rows, {report.units} kept"]
    if report.units:
        share = report.trained / max(1, report.tokens)
        lines.append(
            f"{report.tokens} tokens, {report.trained} trained ({share:.1%}), "
            f"{report.tokens / report.documents:.0f} a document on average, longest {report.longest}"
        )
    if report.truncated:
        lines.append(f"{report.truncated} documents cut to max_length")
    for reason, number in sorted(report.drops.items(), key=lambda d: -d[1]):
        lines.append(f"{number} left out, {reason}; the first: {report.first_drop[reason]}")
    for note, number in report.notes.items():
        lines.append(f"note, {number} documents: {note}")
    return lines
