"""Compile the LoRA training step of models that differ in depth alone: seconds, and the program's size.

    python -m benchmarks.compile [--rounds 5] [--layers 8 64]

The layers of a run are one loop (train.unroll=1), so neither should grow with depth. The step is the
recipe's (ftjax.train.make_train_step, AdamW, LoRA on every linear layer, bfloat16) on a narrow model, from
shapes alone. Every measurement is a process of its own without a compilation cache, the depths in turn.
"lower" is tracing and writing StableHLO, "compile" what XLA makes of it; CPU seconds are of all threads.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata

SMALL = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)
MODELS = {
    "llama": dict(model_type="llama"),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    # every fourth layer attends to all, the others to a window: a run of period four
    "olmo3": dict(model_type="olmo3", sliding_window=16, head_dim=16),
}


def lower(raw: dict, *settings: str):
    """The traced step of a model with the config.json `raw`, and its lowering; `settings` are a run's."""
    import jax

    from ftjax import config, mesh, models
    from ftjax.recipes import program, sft

    given = ["model=random", "output=none", "data.train=none", "train.unroll=1", "train.loss_chunk=32"]
    cfg = config.load(None, [*given, "data.max_length=64", "train.batch_size=2", *settings], "sft")
    model = program.with_options(models.from_config(raw), cfg)
    step = program.plan_step(cfg, model, sft.make_loss, mesh.make_mesh(cfg.mesh, jax.devices()[:1]))
    return step.trace(), step.lower()


def config(name: str, layers: int) -> dict:
    kinds = {}
    if name == "olmo3":
        period = ["sliding_attention"] * 3 + ["full_attention"]
        kinds["layer_types"] = [period[i % 4] for i in range(layers)]
    return SMALL | MODELS[name] | {"num_hidden_layers": layers} | kinds


def measure(name: str, layers: int) -> dict:
    """In a process of its own."""
    import jax

    jax.jit(lambda x: x + 1)(1.0)  # the backend's start
    clock = time.perf_counter()
    traced, lowered = lower(config(name, layers))
    between = time.perf_counter()
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    compiled = lowered.compile()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "lower": between - clock,
        "compile": time.perf_counter() - between,
        "cpu": after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime,
        "jaxpr": len(str(traced.jaxpr)),
        "stablehlo": len(lowered.as_text()),
        "hlo": sum(len(m.to_string()) for m in compiled.runtime_executable().hlo_modules()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]))))
        return
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    cases = [(name, layers) for name in args.models for layers in args.layers]
    runs = {case: [] for case in cases}
    for _ in range(args.rounds):
        for name, layers in cases:
            command = [sys.executable, "-m", "benchmarks.compile", "--measure", name, str(layers)]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            runs[name, layers].append(json.loads(done.stdout.splitlines()[-1]))
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "jaxlib", "flax", "optax"))
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{os.cpu_count()} cores; python {platform.python_version()}, {versions}")
    print(f"load average {load}; {args.rounds} rounds; best (median)\n")
    print("| model | layers | lower s | compile s | compile CPU s | jaxpr KB | StableHLO KB | final HLO KB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, layers in cases:
        rows = runs[name, layers]
        times = (
            f"{min(r[k] for r in rows):.2f} ({statistics.median(r[k] for r in rows):.2f})"
            for k in ("lower", "compile", "cpu")
        )
        sizes = (f"{rows[0][k] / 1e3:.0f}" for k in ("jaxpr", "stablehlo", "hlo"))
        print(f"| {name} | {layers} | {' | '.join(times)} | {' | '.join(sizes)} |")
    first, last = args.layers[0], args.layers[-1]
    print()
    for name in args.models:
        a, b = runs[name, first], runs[name, last]
        best = {k: min(r[k] for r in b) / min(r[k] for r in a) for k in ("lower", "compile", "cpu")}
        print(
            f"- {name}, {last} layers over {first}: lower {best['lower']:.2f}×, compile "
            f"**{best['compile']:.2f}×** by the best, {best['cpu']:.2f}× by CPU time"
        )


if __name__ == "__main__":
    main()
