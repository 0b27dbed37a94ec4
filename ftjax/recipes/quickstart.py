"""ftjax quickstart: the main job, whole, on an embedded default.

Is tuning worth it? The same held-out messages are answered by the base with an instruction, by the base with
few-shot examples, and by the tuned model with a one-word prompt.
"""

import argparse
import dataclasses
import pathlib
import time

from rich.console import Console
from rich.table import Table

from ftjax import config, generate, hf, lora, models, peft, report
from ftjax.errors import UserError
from ftjax.evaluate import statistics
from ftjax.quickstart import model as embedded
from ftjax.quickstart import task
from ftjax.recipes import sft, training

MAX_NEW_TOKENS = 64  # the longest answer has 22; the base writes its JSON with more space

BATCH = 30  # prompts answered at once: more would not fit 4 GiB with the few-shot prompt's cache


@dataclasses.dataclass
class Arm:
    """One way of getting the job done, and how it did on the test items."""

    name: str
    completions: list[generate.Completion]
    scores: task.Scores
    seconds: float  # of generating, compiling left out

    @property
    def exact(self) -> list[bool]:
        return self.scores.exact

    def share(self, flags: list[bool]) -> dict:
        """A cell of scores.json: the share of true flags with its 95% interval."""
        interval = statistics.wilson(sum(flags), len(flags))
        value = sum(flags) / len(flags)
        return {
            "text": f"{value:.0%} ({interval.low:.0%}–{interval.high:.0%})",
            "value": value,
            "low": interval.low,
            "high": interval.high,
        }

    def cells(self) -> list:
        count = len(self.completions)
        prompt = sum(c.prompt_tokens for c in self.completions) / count
        return [
            self.share(self.scores.exact),
            self.share(self.scores.valid),
            f"{prompt:.0f}",
            f"{1000 * self.seconds / count:.0f} ms",
        ]


def run_config(source: str, output: pathlib.Path, seed: int):
    """The settings of the run, the same as configs/quickstart.yaml would give."""
    settings = [
        f"model={source}",
        f"output={output}",
        f"seed={seed}",
        f"data.train={task.path('train')}",
        f"data.eval={task.path('eval')}",
        *SETTINGS,
    ]
    return config.load(None, settings, "sft")


# Found on the eval split: the fewest tokens that show the effect (see ftjax/quickstart/README.md).
SETTINGS = (
    "data.max_length=256",
    "train.epochs=1",
    "train.batch_size=1",
    "train.dtype=float32",
    "train.unroll=true",
    "lora.r=16",
    "lora.lora_alpha=32",
    "optim.lr=2e-3",
    "optim.warmup_ratio=0.1",
    "eval.at_start=false",
    "checkpoint.every=50",
)


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    console = Console()
    clock = time.perf_counter()
    source_name = args.model or str(embedded.fetch(console.print))
    output = pathlib.Path(args.output)
    cfg = run_config(source_name, output, args.seed)
    items = task.rows("test")[: args.items]

    console.print(
        "[bold]1/4[/] the base model, with an instruction and with few-shot examples", highlight=False
    )
    source = hf.open_model(source_name)
    tokenizer = hf.load_tokenizer(source, need_chat_template=True)
    model = models.from_config(source.config).with_options(dtype=generate.default_dtype())
    base = hf.load_params(source, model, dtype=generate.default_dtype())
    examples = task.few_shot_examples()
    arms = [
        answer(console, "base, instruction", model, base, tokenizer, source, items, task.instruction_prompt),
        answer(
            console,
            f"base, {len(examples)} examples" + (" and instruction" if task.FEW_SHOT.instruction else ""),
            model,
            base,
            tokenizer,
            source,
            items,
            lambda message: task.few_shot_prompt(message, examples),
        ),
    ]
    before = arms[1]

    console.print("[bold]2/4[/] tuning", highlight=False)
    run = training.start(cfg, sft.make_loss, overwrite=args.overwrite)

    console.print("[bold]3/4[/] the tuned model, with a one-word prompt", highlight=False)
    _, plan, adapters = peft.load(run / "adapter", model)
    probe = hf.probe(model, lora.attach(base, adapters, plan), tokenizer)
    tuned = generate.prepare(lora.attach(base, adapters, plan))
    arms.append(answer(console, "tuned, one word", model, tuned, tokenizer, source, items, task.short_prompt))
    after = arms[2]
    del base, tuned

    console.print("[bold]4/4[/] exporting", highlight=False)
    only_tuned = sum(a and not b for a, b in zip(after.exact, before.exact, strict=True))
    only_base = sum(b and not a for a, b in zip(after.exact, before.exact, strict=True))
    gain = statistics.tango(only_tuned, only_base, len(items))
    difference = (sum(after.exact) - sum(before.exact)) / len(items)
    notes = [
        f"{len(items)} held-out messages. Tuned minus few-shot: {difference:+.0%} exact match, paired 95% interval "
        f"{gain.low:+.0%} to {gain.high:+.0%}. "
        + ("Tuning helps here." if gain.low > 0 else "No gain is shown: do not tune for this."),
        f"The few-shot prompt (k={len(examples)}) was chosen on the eval split. Shares have 95% Wilson intervals. "
        "Time is per message, in batches, on this machine.",
    ]
    columns = ["", "exact match", "valid JSON", "prompt tokens", "time a message"]
    report.write_json(
        run / "scores.json",
        {
            "title": "Held-out test",
            "columns": columns,
            "rows": [{"name": a.name, "cells": a.cells(), "best": a is after} for a in arms],
            "notes": notes,
        },
    )
    samples = pick_samples(items, before, after)
    report.write_json(run / "samples.json", samples)
    scores = {a.name: a.cells()[0]["text"] for a in arms}
    exported = hf.save_model(
        run / "merged",
        model,
        None,
        source,
        plan=plan,
        adapters=adapters,
        stop_ids=generate.end_tokens(source.config, source.path, tokenizer),
        card=hf.model_card(
            name=run.name,
            base=source.source,
            library="transformers",
            data={"train": "ftjax quickstart, train split", "rows": len(task.rows("train"))},
            settings=dict(s.split("=", 1) for s in SETTINGS),
            scores=scores,
        ),
        check=probe,
        overwrite=True,
    )
    report.write_report(run)

    table = Table(box=None, header_style="dim", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right")
    for arm in arms:
        cells = [c["text"] if isinstance(c, dict) else c for c in arm.cells()]
        table.add_row(arm.name, *cells, style="bold" if arm is after else "")
    console.print()
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False)
    for sample in samples:
        console.print()
        console.print(sample["prompt"], style="italic", highlight=False, markup=False)
        for name, colour in (("before", "red"), ("after", "green")):
            mark = "✓" if sample[name + "_ok"] else "✗"
            shown = " ".join(sample[name].split())[:150]
            console.print(f"  {name:<7}{mark} {shown}", style=colour, highlight=False, markup=False)
    console.print()
    console.print(f"In {time.perf_counter() - clock:.0f} s. Everything is in {run}/:", highlight=False)
    console.print(f"  {run / 'report.html'}   the report")
    console.print(f"  {run / 'adapter'}       the PEFT adapter")
    console.print(
        f"  {run / 'merged'}        the merged Hugging Face model; drift against the tuned one: {exported.drift}"
    )
    console.print(f"Talk to it:        ftjax chat {run} --system {task.SYSTEM}", highlight=False)
    console.print(f"Your own file:     ftjax sft model={source_name} data.train=YOUR.jsonl", highlight=False)
    return 0


def answer(console, name: str, model, params, tokenizer, source, items, prompt) -> Arm:
    """Greedy answers to every item, scored."""
    generator = generate.Generator(
        model, params, tokenizer, eos=generate.end_tokens(source.config, source.path, tokenizer)
    )
    prompts = [generate.chat_prompt(tokenizer, prompt(row.message)) for row in items]
    options = generate.GenerateOptions(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
    bar = report.Bar("answer", len(items))
    bar.open()
    start = time.perf_counter()
    try:
        completions = generator.generate_many(
            prompts, options, batch_size=BATCH, progress=lambda done, total: bar.update(done, name)
        )
    finally:
        bar.close()
    seconds = time.perf_counter() - start - generator.compile_s
    scores = task.score([c.text for c in completions], items)
    return Arm(name, completions, scores, seconds)


def pick_samples(items, before: Arm, after: Arm, count: int = 3) -> list[dict]:
    """The first items, by the file's order: not chosen for how they came out."""
    return [
        {
            "prompt": row.message,
            "expected": row.answer,
            "before": before.completions[i].text,
            "after": after.completions[i].text,
            "before_ok": before.exact[i],
            "after_ok": after.exact[i],
        }
        for i, row in enumerate(items[:count])
    ]


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ftjax quickstart",
        description="Tune a small model on a shipped data set, and compare it with prompting on held-out items.",
    )
    parser.add_argument("--model", help="folder, hub id or .gguf file instead of SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="runs/quickstart", help="run folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=len(task.rows("test")), help="test items (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run in the output folder")
    args = parser.parse_args(argv)
    if args.items < 60:
        raise UserError(f"--items {args.items}: fewer than 60 items show nothing")
    return args
