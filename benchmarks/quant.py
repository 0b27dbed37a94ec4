"""What holding SmolLM2-135M's base in few bits costs: logits, perplexity, memory, a short tuning run's loss.

    python -m benchmarks.quant --data FILE.jsonl [--model MODEL] [--steps 20] [--results FILE]

The text is the `question` and `answer` of each line (GSM8K's), end to end, cut into rows; its first rows
tune, its last are held out. Every kind gets the same rows, the same first factors and the same steps. Logits
are computed in float32 and compared with those of the weights as the file has them; "bfloat16" is what their
rounding to bfloat16, without quantising, comes to. Tuning computes in bfloat16, as a run does.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax import hf, lora, models, quant, train
from ftjax.objectives.sft import sft_loss
from ftjax.quant import QuantOptions
from ftjax.quickstart import model as smollm2
from ftjax.weights import flatten

KINDS = {
    "bfloat16": None,
    "int8": QuantOptions("int8"),
    "fp8 (e4m3)": QuantOptions("fp8"),
    "fp8, products too": QuantOptions("fp8_dynamic"),
    "nf4, double": QuantOptions("nf4"),
    "nf4": QuantOptions("nf4", double=False),
    "int4": QuantOptions("int4"),
    "fp4, double": QuantOptions("fp4"),
    "mxfp4": QuantOptions("mxfp4"),
}
B, T, HELD_OUT = 4, 128, 16  # rows of a batch, tokens of a row, rows held out


def rows(path: Path, tokenizer, count: int) -> np.ndarray:
    """int32 [count, T]: the file's text, end to end."""
    ids: list[int] = []
    with open(path) as lines:
        for line in lines:
            one = json.loads(line)
            ids += tokenizer.encode(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n")
            if len(ids) >= count * T:
                return np.array(ids[: count * T], np.int32).reshape(count, T)
    raise SystemExit(f"{path} has {len(ids)} tokens, {count * T} are needed")


def batch(tokens_BT):
    ones = jnp.ones(tokens_BT.shape, jnp.int32)
    positions = jnp.cumsum(ones, 1, dtype=jnp.int32) - 1
    weight = ones.astype(jnp.float32)
    return dict(tokens=jnp.asarray(tokens_BT), loss_weight=weight, segments=ones, positions=positions)


def compare(logits, params, wanted, tokens_XT):
    """(rms difference over the logits' spread, mean KL, perplexity) over the rows."""
    square, spread, kl, nll, n = 0.0, 0.0, 0.0, 0.0, 0
    for i in range(0, len(tokens_XT), B):
        tokens = jnp.asarray(tokens_XT[i : i + B])
        got, ref = logits(params, tokens), wanted[i // B]
        log_p, log_q = jax.nn.log_softmax(ref), jax.nn.log_softmax(got)
        square += float(jnp.mean(jnp.square(got - ref)))
        spread += float(jnp.mean(jnp.std(ref, axis=-1)))
        kl += float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)))
        nll -= float(jnp.mean(jnp.take_along_axis(log_q[:, :-1], tokens[:, 1:, None], -1)))
        n += 1
    return (square / n) ** 0.5 / (spread / n), kl / n, float(np.exp(nll / n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    assets = os.environ.get("FTJAX_TEST_ASSETS")
    default = f"{assets}/data/gsm8k/train.jsonl" if assets else None
    parser.add_argument("--data", type=Path, default=default, required=default is None)
    parser.add_argument("--model", help="default: the quickstart's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()

    source = hf.open_model(args.model or str(smollm2.fetch()))
    tokens = rows(args.data, hf.load_tokenizer(source), args.steps * B + HELD_OUT)
    held_out = tokens[-HELD_OUT:]
    model = models.from_config(source.config)
    logits = jax.jit(model.logits)
    published = hf.load_params(source, model, dtype=jnp.float32)
    wanted = [logits(published, jnp.asarray(held_out[i : i + B])) for i in range(0, HELD_OUT, B)]
    _, _, perplexity = compare(logits, published, wanted, held_out)
    del published

    tuned = model.with_options(dtype=jnp.bfloat16)
    plan = lora.plan(lora.LoraConfig(r=8), model.table)
    loss = sft_loss(
        tuned, lambda adapters, base, rng: lora.attach(base, adapters, plan), chunk=128, frozen_head=True
    )
    tx = optax.adamw(5e-4)
    step, evaluate = train.make_train_step(loss, tx, seed=0), train.make_eval_step(loss)
    lines = []
    for name, options in KINDS.items():
        clock = time.perf_counter()
        base = hf.load_params(source, model, dtype=jnp.bfloat16, quantise=options)
        loading = time.perf_counter() - clock
        linear = [path for path, row in model.table.rows.items() if row.role == "linear"]
        layers = quant.nbytes([flatten(base)[path] for path in linear])
        error, kl, ppl = compare(logits, base, wanted, held_out)
        state = train.init_state(lora.init(jax.random.key(0), plan, model.table), tx)
        losses = []
        for i in range(args.steps):
            rows_BT = batch(tokens[i * B : (i + 1) * B])
            state, metrics = step(state, base, {k: x[None] for k, x in rows_BT.items()})
            losses.append(float(metrics["loss"]))
        whole = batch(held_out)
        sums = jax.device_get(evaluate(state.trainable, base, {k: x[None] for k, x in whole.items()}))
        after = float(sums["loss"] / sums["weight"])
        last = np.mean(losses[-5:])
        cells = f"{layers / 1e6:.1f} | {error:.4f} | {kl:.5f} | {ppl:.3f} | {last:.4f} | {after:.4f}"
        lines.append(f"| {name} | {cells} | {loading:.1f} |")
        print(lines[-1], flush=True)

    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "numpy"))
    text = "\n".join(
        [
            "# A base in few bits",
            "",
            f"`python -m benchmarks.quant --data gsm8k/train.jsonl --steps {args.steps}` · "
            f"{datetime.date.today()} · {os.cpu_count()} CPUs, {platform.machine()}, "
            f"Python {platform.python_version()}, {versions}",
            "",
            f"{args.model or smollm2.MEMBER}; {HELD_OUT} rows of {T} tokens held out; perplexity of the "
            f"weights as they are: {perplexity:.3f}. LoRA r=8 on every linear layer, {args.steps} steps of "
            f"{B} × {T}.",
            "",
            "| linear layers held in | MB of them | logit error / spread | KL, nats | perplexity | loss of "
            "the last 5 steps | held-out loss after | loading, s |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    if args.results:
        args.results.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
