"""Runs of real sizes planned for TPU slices that need not be at hand: the planner's table.

    python -m benchmarks.plan [--list] [--only TEXT] [--results FILE] [--render]

Each row is what `ftjax plan` compiles: a run's own step (LoRA r=16 on every linear layer, or every weight;
AdamW, bfloat16 products) from shapes alone, for the slice that it names. What the compiler said goes into
results/plan.jsonl, a line a row, as soon as it is there; rows that have a line are passed over, so the
command goes on where it was stopped. results/plan.md is written from that file, with the arithmetic's error
beside each row (--render does only this). Needs libtpu (jax[tpu], x86-64 Linux). Nothing is run: times are
the roofline's.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "plan.jsonl"
HUB = {
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "Qwen3-32B": "Qwen/Qwen3-32B",
    "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
    "Mixtral-8x7B": "mistralai/Mixtral-8x7B-v0.1",
    "Gemma-3-27B": "google/gemma-3-27b-pt",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A run: `rows` of `length` tokens a step, FSDP over all chips unless `settings` say otherwise. One with
    `fitted` was used to fit the arithmetic's constants; the others test it."""

    model: str
    on: str
    rows: int
    length: int
    settings: str
    fitted: bool = False

    @property
    def name(self) -> str:
        how = "full" if "lora=null" in self.settings else "LoRA"
        rest = " ".join(x for x in self.settings.split() if x != "lora=null")
        return f"{self.model} {how}, {self.on}, {self.rows}×{self.length:,}, {rest}"

    @property
    def words(self) -> list[str]:
        """As of `ftjax plan`."""
        given = [
            f"model={HUB[self.model]}",
            f"data.max_length={self.length}",
            f"train.batch_size={self.rows}",
        ]
        return [*given, *self.settings.split()]


FULL = "lora=null"
TABLE = (
    Row("Llama-3.1-8B", "v5e-16", 16, 2048, "train.remat=mlp", fitted=True),
    Row("Llama-3.1-8B", "v6e-8", 8, 4096, "train.remat=act"),
    Row("Llama-3.1-8B", "v5p-8", 8, 2048, "train.remat=act", fitted=True),
    Row("Llama-3.1-8B", "v5e-64", 64, 2048, f"train.remat=attention {FULL}", fitted=True),
    Row("Llama-3.1-8B", "v6e-32", 32, 2048, f"train.remat=mlp {FULL}"),
    Row("Llama-3.1-8B", "v5p-16", 8, 4096, f"train.remat=act {FULL}"),
    Row("Llama-3.1-70B", "v5e-64", 64, 2048, "train.remat=full"),
    Row("Llama-3.1-70B", "v6e-64", 64, 2048, "train.remat=attention"),
    Row("Llama-3.1-70B", "v5p-32", 16, 4096, "train.remat=attention"),
    Row("Llama-3.1-70B", "v5e-256", 256, 2048, f"train.remat=full {FULL}"),
    Row("Llama-3.1-70B", "v6e-256", 256, 2048, f"train.remat=attention {FULL}"),
    Row("Llama-3.1-70B", "v5p-128", 64, 4096, f"train.remat=full {FULL}"),
    Row("Qwen3-32B", "v5e-32", 32, 2048, "train.remat=full"),
    Row("Qwen3-32B", "v6e-16", 16, 2048, "train.remat=attention"),
    Row("Qwen3-32B", "v5e-128", 128, 2048, f"train.remat=full {FULL}"),
    Row("Qwen3-32B", "v5p-64", 32, 4096, f"train.remat=attention {FULL}"),
    Row("Gemma-3-27B", "v5e-32", 32, 2048, "train.remat=full", fitted=True),
    Row("Gemma-3-27B", "v6e-16", 16, 2048, "train.remat=full"),
    Row("Gemma-3-27B", "v5e-256", 256, 2048, f"train.remat=full {FULL}"),
    Row("Gemma-3-27B", "v5p-64", 32, 4096, f"train.remat=attention {FULL}"),
    Row("Mixtral-8x7B", "v5e-64", 64, 2048, "train.remat=full mesh.ep=1", fitted=True),
    Row("Mixtral-8x7B", "v5p-16", 8, 4096, "train.remat=attention mesh.ep=8", fitted=True),
    Row("Mixtral-8x7B", "v6e-128", 128, 2048, f"train.remat=full mesh.ep=1 {FULL}", fitted=True),
    Row("Mixtral-8x7B", "v5p-64", 32, 2048, f"train.remat=full mesh.ep=8 {FULL}", fitted=True),
)
# One chip, rows as long as they get (of what lies on the host the compiler takes 128 GiB), and other experts
LONG = "train.mlp_chunk=8192"
ONE = "v5p:1x1x1"
SMALL = (
    Row("Llama-3.1-8B", ONE, 1, 253_952, f"train.remat=offload {LONG} quant.kind=nf4"),
    Row("Llama-3.1-8B", ONE, 1, 253_952, f"train.remat=offload {LONG}"),
    Row("Llama-3.1-8B", "v6e-1", 4, 2048, "train.remat=full quant.kind=nf4"),
    Row("Llama-3.1-8B", ONE, 4, 2048, "train.remat=act"),
    Row("Llama-3.1-8B", ONE, 1, 65_536, f"train.remat=full {LONG}"),
    Row("Llama-3.2-1B", ONE, 4, 2048, "train.remat=act"),
    Row("Llama-3.2-1B", "v6e-1", 4, 2048, "train.remat=act"),
    Row("Llama-3.2-1B", "v5e-4", 4, 2048, "train.remat=act"),
    Row("Qwen3-30B-A3B", "v5e-32", 32, 2048, "train.remat=full mesh.ep=1", fitted=True),
    Row("Qwen3-30B-A3B", "v5p-16", 8, 4096, "train.remat=attention mesh.ep=8", fitted=True),
    Row("Qwen3-30B-A3B", "v6e-64", 64, 2048, f"train.remat=full mesh.ep=8 {FULL}", fitted=True),
    Row("Mixtral-8x7B", "v6e-32", 32, 2048, "train.remat=attention mesh.ep=4"),
    Row("Qwen3-30B-A3B", "v6e-32", 32, 2048, "train.remat=mlp mesh.ep=4"),
)
ROWS = (*TABLE, *SMALL)


def measure(row: Row) -> dict:
    """What the compiler said of the row's step."""
    import jax

    from ftjax import chips, mesh, plan
    from ftjax.recipes import planning, program

    on = chips.parse(row.on)
    run = planning.read_run(row.words)
    devices = mesh.make_mesh(run.cfg.mesh, plan.topology(on))
    model = program.with_options(run.model, run.cfg)
    began = time.perf_counter()
    step = program.plan_step(run.cfg, model, planning.LOSSES[run.cfg.recipe], devices)
    out: dict = {"name": row.name}
    try:
        out |= described(step.program, on, run)
    except jax.errors.JaxRuntimeError as e:
        if (said := plan.too_large(e)) is None:
            raise
        out |= {"refused": said, "needed": planning.refused_bytes(said)}
    out["seconds"] = round(time.perf_counter() - began)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return out | {"date": str(datetime.date.today()), "versions": versions}


def described(program, on, run) -> dict:
    from ftjax.recipes import planning

    tokens = run.cfg.train.batch_size * run.cfg.data.max_length // on.devices
    moved = planning.measured(program.of_step(-(-tokens // run.cfg.train.loss_chunk)), on)
    return {
        "memory": dataclasses.asdict(program.memory),
        "collectives": {
            kind: {k: round(v) for k, v in one.items()} for kind, one in sorted(moved.kinds.items())
        },
        "received": round(moved.received),
        "across": round(moved.across),
    }


HEAD = (
    "# Runs planned for TPU slices\n\n"
    "`python -m benchmarks.plan`. Steps compiled for slices that were not at hand, and never run.\n"
    "Memory and collectives are what the compiler made; `arithmetic` is the error of `ftjax plan --quick`\n"
    "in what is needed, rows with an asterisk having been used to fit it. Seconds, MFU and tokens/s are the\n"
    "roofline's of docs/planning.md, of these collectives. GiB of one chip; ≤: where something lies in the\n"
    "host's memory the compiler says no peak, and this is all of the chip's buffers.\n\n"
    "| run | fits | needs | of | arithmetic | arguments | temporaries | received GB a step | s a step | MFU "
    "| tokens/s | compile s | when, with what |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def render(records: dict[str, dict]) -> str:
    from ftjax import chips, estimate
    from ftjax.recipes import planning

    lines = []
    for row in ROWS:
        if (one := records.get(row.name)) is None:
            continue
        on, run = chips.parse(row.on), planning.read_run(row.words)
        quick = run.quick(on, {})
        cells = [row.name + (" *" if row.fitted else "")]
        needed, gib = needs(one), lambda n: f"{n / 2**30:.2f}"
        most = "" if peaks(one) else "≤ "
        cells += ["yes" if "memory" in one else "no", most + gib(needed) if needed else ""]
        cells += [gib(on.chip.memory), f"{quick.parts.total / needed - 1:+.1%}" if peaks(one) else ""]
        time = quick.time
        if "memory" in one:
            moved = estimate.Traffic(one["collectives"], one["received"], one["across"])
            job, held = run.job(on)
            time = estimate.time(job, on.chip, moved, held)
            memory = one["memory"]
            cells += [gib(memory["arguments"]), gib(memory["temporaries"]), f"{one['received'] / 1e9:.1f}"]
        else:
            cells += ["", "", ""]
        cells += [f"{time.seconds:.2f}", f"{time.mfu:.0%}", f"{quick.tokens / time.seconds:,.0f}"]
        versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
        cells += [str(one["seconds"]), f"{one['date']}, {versions}"]
        lines.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(lines)


def needs(record: dict) -> float | None:
    """Bytes of a chip that the row's program takes, or would."""
    from ftjax import plan

    return float(plan.Memory(**record["memory"]).total) if "memory" in record else record["needed"]


def peaks(record: dict) -> bool:
    """Whether the compiler has said what a chip needs at once: of programs that keep something in the host's
    memory it does not."""
    return not record["memory"]["host"] if "memory" in record else bool(record["needed"])


def read(path: Path = RESULTS) -> dict[str, dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {one["name"]: one for one in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--only", default="", help="rows with this text in their name")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="only write the .md anew")
    args = parser.parse_args()
    records = read(args.results)
    for row in ROWS:
        if args.only not in row.name or args.render:
            continue
        if args.list or row.name in records:
            print(row.name, "| in the table" if row.name in records else "")
            continue
        print(row.name, "compiling …", file=sys.stderr, flush=True)
        records[row.name] = measure(row)
        with open(args.results, "a") as file:
            file.write(json.dumps(records[row.name]) + "\n")
    if not args.list:
        args.results.with_suffix(".md").write_text(render(records))


if __name__ == "__main__":
    main()
