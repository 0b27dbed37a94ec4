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

from ftjax import config, generate, hf, hf_export, host, lora, models, peft, report
from ftjax.errors import UserError
from ftjax.evaluate import statistics
from ftjax.quickstart import model as embedded
from ftjax.quickstart import task
from ftjax.recipes import card, folder, sft, training

MAX_NEW_TOKENS = 64  # the longest answer has 22; the base writes its JSON with more space

BATCH = 24  # prompts answered at once: more would not fit 4 GiB with the few-shot prompt's cache

COLUMNS = ("exact match", "valid JSON", "prompt tokens", "time a message")


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
    "train.dtype=bfloat16",
    "train.unroll=true",
    "train.loss_chunk=64",
    "lora.r=16",
    "lora.lora_alpha=32",
    "optim.lr=2e-3",
    "optim.warmup_ratio=0.1",
    "eval.at_start=false",
    "checkpoint.every=50",
)


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    console = Console(highlight=False)
    clock = time.perf_counter()
    name = args.model or str(embedded.fetch(console.print))
    cfg = run_config(name, pathlib.Path(args.output), args.seed)
    items = task.rows("test")[: args.items]
    output = pathlib.Path(args.output)
    scored = (output / "scores.json").is_file()
    trained = (
        folder.is_finished(output) and not scored and not args.overwrite
    )  # it was stopped in part 3 or 4
    if not trained:
        folder.claim(cfg, overwrite=args.overwrite)  # before any work is spent
    source = hf.open_model(name)
    tokenizer = hf.load_tokenizer(source, need_chat_template=True)
    dtype = generate.default_dtype()
    model = models.from_config(source.config).with_options(dtype=dtype)
    eos = generate.end_tokens(source.config, source.path, tokenizer)

    def answers(name: str, params, prompt) -> Arm:
        return answer(name, generate.Generator(model, params, tokenizer, eos=eos), items, prompt)

    console.print("[bold]1/4[/] the base model, with an instruction and with few-shot examples")
    examples = task.few_shot_examples()
    few_shot = f"base, {len(examples)} examples" + (
        " and instruction" if task.FEW_SHOT.instruction != "none" else ""
    )
    base = hf.load_params(source, model, dtype=dtype)
    instructed = answers("base, instruction", base, task.instruction_prompt)
    before = answers(few_shot, base, lambda message: task.few_shot_prompt(message, examples))
    del base  # training loads its own
    host.return_freed_memory()

    console.print("[bold]2/4[/] tuning")
    run = output if trained else training.start(cfg, sft.make_loss, overwrite=args.overwrite)

    host.return_freed_memory()
    console.print("[bold]3/4[/] the tuned model, with a one-word prompt")
    _, plan, adapters = peft.load(run / "adapter", model)
    attached = lora.attach(hf.load_params(source, model, dtype=dtype), adapters, plan)
    probe = hf_export.probe(model, attached, tokenizer)
    after = answers("tuned, one word", generate.prepare(attached), task.short_prompt)
    del attached

    console.print("[bold]4/4[/] exporting")
    arms = [instructed, before, after]
    notes = conclude(before, after, len(examples))
    samples = pick_samples(items, before, after)
    rows = [{"name": arm.name, "cells": arm.cells(), "best": arm is after} for arm in arms]
    scores = {"title": "Held-out test", "columns": list(COLUMNS), "rows": rows, "notes": notes}
    report.write_json(run / "scores.json", scores)
    report.write_json(run / "samples.json", samples)
    exported = hf_export.save_model(
        run / "merged",
        model,
        None,
        source,
        plan=plan,
        adapters=adapters,
        stop_ids=eos,
        card=card.of_run(run, source.source, "transformers"),
        check=probe,
        overwrite=True,
    )
    report.write_report(run)

    console.print(table(arms, after))
    for note in notes:
        console.print(note, style="dim")
    for sample in samples:
        show(console, sample)
    console.print(f"\nIn {time.perf_counter() - clock:.0f} s. {run}/ holds")
    console.print("  report.html  the report")
    console.print("  adapter/     the PEFT adapter")
    console.print("  merged/      the merged Hugging Face model; re-opened, against the tuned one:")
    console.print(f"               {exported.drift}")
    console.print("Talk to it:")
    console.print(f"  ftjax chat {run} --system {task.SYSTEM}")
    console.print("Tune on a file of your own:")
    console.print(f"  ftjax sft model={name} data.train=YOUR.jsonl", soft_wrap=True)
    return 0


def answer(name: str, generator: generate.Generator, items, prompt) -> Arm:
    """Greedy answers to every item, scored."""
    prompts = [generate.chat_prompt(generator.tokenizer, prompt(row.message)) for row in items]
    options = generate.GenerateOptions(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
    start = time.perf_counter()
    with report.Bar("answer", len(items)) as bar:
        completions = generator.generate_many(
            prompts, options, batch_size=BATCH, progress=lambda done, total: bar.update(done, name)
        )
    seconds = time.perf_counter() - start - generator.compile_s
    return Arm(name, completions, task.score([c.text for c in completions], items), seconds)


def conclude(before: Arm, after: Arm, k: int) -> list[str]:
    """What the numbers say, with the paired interval of tuned minus few-shot."""
    pairs = list(zip(after.exact, before.exact, strict=True))
    gained, lost = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    interval = statistics.tango(gained, lost, len(pairs))
    return [
        f"{len(pairs)} held-out messages. Tuned minus few-shot: {(gained - lost) / len(pairs):+.0%} exact "
        "match, "
        f"paired 95% interval {interval.low:+.0%} to {interval.high:+.0%}. "
        + ("Tuning helps here." if interval.low > 0 else "No gain is shown: do not tune for this."),
        f"The few-shot prompt, its k={k} examples from the train split, was chosen on the eval split. Shares "
        "have "
        "95% Wilson intervals. Time is a message's share of its batch, compilation left out.",
    ]


def table(arms: list[Arm], best: Arm) -> Table:
    out = Table(box=None, header_style="dim", pad_edge=False)
    out.add_column("")
    for i, column in enumerate(COLUMNS):
        out.add_column(column, justify="left" if i < 2 else "right")
    for arm in arms:
        cells = [c["text"] if isinstance(c, dict) else c for c in arm.cells()]
        out.add_row(arm.name, *cells, style="bold" if arm is best else "")
    return out


def show(console: Console, sample: dict) -> None:
    console.print(f"\n{sample['prompt']}", style="italic", markup=False)
    for name, colour in (("before", "red"), ("after", "green")):
        mark = "✓" if sample[name + "_ok"] else "✗"
        text = " ".join(sample[name].split())[:150]
        console.print(f"  {name:<7}{mark} {text}", style=colour, markup=False)


def pick_samples(items, before: Arm, after: Arm, count: int = 3) -> list[dict]:
    """Items at even distances in the file: not chosen for how they came out."""
    return [
        {
            "prompt": row.message,
            "expected": row.answer,
            "before": before.completions[i].text,
            "after": after.completions[i].text,
            "before_ok": before.exact[i],
            "after_ok": after.exact[i],
        }
        for i, row in list(enumerate(items))[:: len(items) // count][:count]
    ]


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ftjax quickstart",
        description="Tune a small model on a shipped data set; compare it with prompting on held-out items.",
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
