"""How long the training loop waits for its input: seconds and share of a step, on quick and slow disks.

    python -m benchmarks.input [--steps 40] [--step 0.1] [--write]

The loop is the recipe's (ftjax.train.fit over ftjax.data.ahead.Ahead over the loader), with real batches of
packed documents (lengths log-normal, 300 tokens in the middle) that go to the device; the device's work is a
sleep of as many seconds as a step of 8,192 tokens of a 1B model takes on an H100 (65,000 to 82,000 tokens a
second: 0.1 to 0.125). A slow disk is simulated: every document's read (streamed: every line's) waits first.
--write puts the table into benchmarks/results/input.md.
"""

import argparse
import itertools
import os
import pathlib
import platform
import statistics
import tempfile
import time
from importlib import metadata

HERE = pathlib.Path(__file__).parent
TOKENIZER = HERE.parent / "tests" / "assets" / "tiny_model"
ROWS, LENGTH = 4, 2048


def write_texts(path: pathlib.Path, count: int) -> None:
    import json

    import numpy as np

    rng = np.random.default_rng(0)
    words = "the cat sat on a mat and the dog ran to it".split()
    with open(path, "w") as f:
        for _ in range(count):
            size = int(np.clip(rng.lognormal(np.log(75), 0.8), 8, 400))
            f.write(json.dumps({"text": " ".join(rng.choice(words, size))}) + "\n")


def waits(batches, prepare, steps: int, seconds: float, ahead: bool) -> list[float]:
    """Seconds that each step of a run waited, the first ones left out."""
    import numpy as np

    from ftjax import train
    from ftjax.data.ahead import Ahead

    found: list[float] = []

    def step(state, batch):
        time.sleep(seconds)
        return state, {"loss": 1.0, "finite": True}

    source = Ahead(batches, prepare) if ahead else map(prepare, batches)
    try:
        train.fit(
            train.TrainState(np.int32(0), {}, (), np.bool_(True)),
            step,
            source,
            total_steps=steps,
            save=lambda *_: None,
            save_every=10**9,
            report=lambda at, metrics: found.append(metrics["input_wait"]),
            documents=lambda at: [],
        )
    finally:
        if isinstance(source, Ahead):
            source.close()
    return found[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from ftjax import hf
    from ftjax.data import dataset, stream
    from ftjax.data.loader import Loader
    from ftjax.data.options import DataOptions

    tokenizer = hf.load_tokenizer(hf.open_model(str(TOKENIZER)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "texts.jsonl"
        write_texts(path, 4000)
        fields = dict(max_length=LENGTH, format="text", overlong="split", cache_dir=folder)
        options = DataOptions(str(path), **fields)
        units = dataset.load(options, tokenizer).train
        assert units is not None
        read, lines = dataset.Store.documents, stream.examples

        def prepare(batch):
            return jax.device_put({k: v[None] if v.ndim == 2 else v for k, v in batch.items()})

        def slow_lines(delay):
            def examples(*given):
                for each in lines(*given):
                    time.sleep(delay)
                    yield each

            return examples

        for name, delay, ahead in (
            ("tokenised", 0.0, False),
            ("tokenised", 0.0, True),
            ("tokenised", 0.002, False),
            ("tokenised", 0.002, True),
            ("tokenised", 0.01, True),
            ("tokenised", 0.02, True),
            ("streamed", 0.0, False),
            ("streamed", 0.0, True),
            ("streamed", 0.001, True),
        ):
            dataset.Store.documents = lambda self, unit, delay=delay: (time.sleep(delay), read(self, unit))[1]
            stream.examples = slow_lines(delay) if delay else lines
            if name == "tokenised":
                loader = Loader(units, options, batch_size=ROWS)
            else:
                loader = stream.StreamLoader(
                    DataOptions(str(path), streaming=True, **fields), tokenizer, batch_size=ROWS
                )
            some = list(itertools.islice(loader.batches(), 3))
            documents = statistics.mean(int(b["segments"].max(axis=-1).sum()) for b in some)
            found = waits(loader.batches(), prepare, args.steps, args.step, ahead)
            mean, worst = statistics.mean(found), max(found)
            rows.append((name, 1000 * delay, documents, "yes" if ahead else "no", mean, worst))
            print(f"{rows[-1]}", flush=True)
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "grain", "numpy"))
    table = [
        f"`python -m benchmarks.input --steps {args.steps} --step {args.step}`, {time.strftime('%F')}: "
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}. "
        f"Batches of {ROWS} × {LENGTH} tokens; a step is {1000 * args.step:.0f} ms of the device's. 16 "
        "batches are read side by side, so a disk is slow enough to be waited for when a batch's reads take "
        "16 steps.",
        "",
        "| data | a read waits, ms | documents a batch | ahead | a step waits, ms | share | longest, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, delay, documents, ahead, mean, worst in rows:
        share = mean / (mean + args.step)
        table.append(
            f"| {name} | {delay:g} | {documents:.0f} | {ahead} | {1000 * mean:.2f} | {share:.2%} | "
            f"{1000 * worst:.1f} |"
        )
    text = "\n".join(table) + "\n"
    print(text)
    if args.write:
        (HERE / "results" / "input.md").write_text("# Waiting for input\n\n" + text)


if __name__ == "__main__":
    main()
