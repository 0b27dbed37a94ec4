"""Decoding on CPU beside what reading weights and cache allows, and beside transformers' generate.

    python -m benchmarks.decode [--model FILE_OR_FOLDER] [--rounds 3] [--batch 1 8 32]

The model is the quickstart's SmolLM2-135M unless said otherwise, in float32 on both sides, its answers
greedy and of a fixed length. A step's bound is `ftjax.generate.step_bytes` over the bandwidth that summing an
array much larger than the caches reaches on the same cores. Contenders take turns, a round each; seconds are
those of the fastest round, since other programs only add to them. Then answers of very unequal length: rows
that end are refilled, against batches that wait for their slowest row.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import time

import numpy as np

PROMPT, NEW = 32, 33


def bandwidth() -> float:
    """Bytes a second that summing 1 GiB of float32 reads."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**28, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    seconds = []
    for _ in range(7):
        clock = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - clock)
    return x.nbytes / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()

    # else torch's threads spin for each other, which on cores that others use costs it several times over
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import jax.numpy as jnp

    from ftjax import generate, hf, models
    from ftjax.generate import GenerateOptions, Generator
    from ftjax.quickstart import model as embedded

    source = hf.open_model(args.model or str(embedded.fetch()))
    model = models.from_config(source.config)
    params = hf.load_params(source, model, dtype=jnp.float32)
    generator = Generator(model, params)
    rng = np.random.default_rng(0)

    def prompts(count: int) -> list[list[int]]:
        return [list(map(int, rng.integers(5, model.config.vocab_size, PROMPT))) for _ in range(count)]

    try:
        import torch
        from transformers import AutoModelForCausalLM

        where = (
            dict(pretrained_model_name_or_path=source.path.parent, gguf_file=source.path.name)
            if source.path.is_file()
            else dict(pretrained_model_name_or_path=source.path)
        )
        peer = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    except ImportError:
        torch = peer = None

    def ours(asked: list[list[int]]) -> float:
        found = generator.generate(asked, GenerateOptions(max_new_tokens=NEW))
        assert all(one.new_tokens == NEW for one in found)
        return max(one.decode_s for one in found) / (NEW - 1)

    def theirs(asked: list[list[int]]) -> float:
        assert torch is not None and peer is not None
        ids, took = torch.tensor(asked), []
        for new in (NEW, 1):
            clock = time.perf_counter()
            with torch.inference_mode():
                more = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
                peer.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **more
                )
            took.append(time.perf_counter() - clock)
        return (took[0] - took[1]) / (NEW - 1)

    read = bandwidth()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "torch", "transformers")
        if name == "jax" or peer is not None
    )
    print(f"## {datetime.date.today()}: {platform.machine()}, {os.cpu_count()} cores\n")
    print(f"`python -m benchmarks.decode --rounds {args.rounds}`; python {platform.python_version()},")
    print(f"{versions}; load average over the last 15 minutes {os.getloadavg()[2]:.1f}.")
    print(f"A sum reads {read / 1e9:.1f} GB/s.\n")
    print("| batch | step ms | tokens/s | GB/s | of the bound | transformers' step ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    for batch in args.batch:
        asked = prompts(batch)
        ours(asked)
        rounds = [(ours(asked), theirs(asked) if peer else None) for _ in range(args.rounds)]
        step = min(one for one, _ in rounds)
        other = min((one for _, one in rounds if one is not None), default=None)
        size = generate.step_bytes(model, params, batch, 64 + PROMPT)
        row = [batch, f"{step * 1e3:.0f}", f"{batch / step:.1f}", f"{size / step / 1e9:.1f}"]
        row += [f"{size / read / step:.0%}"]
        row += ["", ""] if other is None else [f"{other * 1e3:.0f}", f"{other / step:.2f}×"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)

    # answers of unequal length, most of them short
    size, count = 8, 40
    most = [int(x) for x in np.clip(rng.lognormal(2.2, 0.9, count), 2, 64)]
    asked, options = prompts(count), GenerateOptions()

    def refilled() -> None:
        generator.generate_many(asked, options, batch_size=size, max_new_tokens=most)

    def waiting() -> None:
        for i in range(0, count, size):
            generator.generate(asked[i : i + size], options, max_new_tokens=most[i : i + size])

    seconds: dict[str, list[float]] = {"refilled": [], "waiting": []}
    for i in range(args.rounds + 1):
        for name, run in (("refilled", refilled), ("waiting", waiting)):
            compiled, clock = generator.compile_s, time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - clock - (generator.compile_s - compiled))
    rates = {name: sum(most) / min(took) for name, took in seconds.items()}
    short, long, middle = min(most), max(most), int(np.median(most))
    short, long, middle = min(most), max(most), int(np.median(most))
    print(f"\n{count} prompts of {PROMPT} tokens, answers of {short} to {long} tokens (median {middle}, mean")
    print(f"{np.mean(most):.0f}), {size} at a time, prefill included: {rates['refilled']:.1f} tokens/s where")
    print(f"rows that end are refilled, {rates['waiting']:.1f} where batches wait for their slowest row:")
    print(f"{rates['refilled'] / rates['waiting']:.2f}×.")


if __name__ == "__main__":
    main()
