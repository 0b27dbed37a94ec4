"""Time of one LoRA training step of SmolLM2-135M on this machine's CPU, beside transformers + PEFT.

    python -m benchmarks.cpu_sft [--model FOLDER_OR_ID] [--rounds 5] [--results FILE]

Every contender is a process of its own, holds the same weights and gets the same tokens; they take turns a
step at a time (A B C A B C …), the others asleep meanwhile, so that a machine that changes pace changes it
for all. malloc is told to keep freed memory for all of them alike, which helps all of them.

Gradients are compared before anything is timed: ours in float32 with the peer's in float32 (not where torch
or peft is missing), each bfloat16 with its own float32. Without --model the weights and the tokens are random
and nothing is downloaded; with it the tokens are this file's text: random tokens throw a trained model so
far off that no two roundings agree on a gradient.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMOLLM2 = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    hidden_act="silu",
)
RANK, ALPHA, LR = 16, 32, 1e-4
# (rows, tokens a row, share of the tokens that is trained)
CASES = [(4, 256, 1.0), (2, 512, 1.0), (4, 256, 0.3)]
# name -> (program, dtype, environment): PEFT's threads either spin while they wait, torch's default, or sleep
# ("passive wait"), which is far faster where other programs want the cores
CONTENDERS = {
    "ftjax bfloat16": ("ours", "bfloat16", {}),
    "ftjax float32": ("ours", "float32", {}),
    "PEFT bfloat16": ("peft", "bfloat16", {}),
    "PEFT bfloat16, passive wait": ("peft", "bfloat16", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "PEFT float32": ("peft", "float32", {}),
    "PEFT float32, passive wait": ("peft", "float32", {"OMP_WAIT_POLICY": "PASSIVE"}),
}
MALLOC = dict(
    MALLOC_ARENA_MAX="1",
    MALLOC_MMAP_MAX_="0",
    MALLOC_TOP_PAD_="67108864",
    MALLOC_TRIM_THRESHOLD_="4294967296",
)
MAX_F32_ERROR = 1e-3  # relative, ours against the peer's float32 gradient
MIN_BF16_COSINE = 0.99


def write_tokens(folder: Path, model: str | None) -> None:
    import numpy as np

    if model is None:
        ids = np.random.default_rng(0).integers(0, SMOLLM2["vocab_size"], 4096)
    else:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(model)(Path(__file__).read_text())["input_ids"]
    np.save(folder / "tokens.npy", np.asarray(ids, np.int32))


def make_batch(B: int, T: int, share: float):
    """(tokens [B, T], trained [B, T] bool), the same in every process."""
    import numpy as np

    tokens = np.load(os.environ["TOKENS"])[: B * T].reshape(B, T)
    trained = np.zeros((B, T), bool)
    trained[:, T - round(share * T) :] = True  # prompt first, answer last
    return tokens, trained


def write_random(folder: Path) -> None:
    """A Hugging Face folder with random weights of SmolLM2's shape."""
    import jax
    from safetensors.numpy import save_file

    from ftjax import models, weights

    table = models.from_config(SMOLLM2).table
    flat = weights.flatten(jax.jit(lambda key: weights.init(key, table))(jax.random.key(0)))
    tensors = {k: v.copy() for path, x in flat.items() for k, v in weights.to_hf(table, path, x).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SMOLLM2 | {"torch_dtype": "float32"}))


def factors(names) -> dict:
    """{name: float32 [out, in]} factors, the same in every process; B is not 0, so that A has a gradient."""
    import numpy as np

    rng = np.random.default_rng(1)
    std = {"A": lambda shape: (3 * shape[1]) ** -0.5, "B": lambda shape: 0.01}
    return {
        name: rng.normal(0, std[name[-1]](shape), shape).astype(np.float32) for name, shape in sorted(names)
    }


class Ours:
    def __init__(self, folder: str, dtype: str):
        import jax.numpy as jnp
        import optax

        from ftjax import hf, lora, models, train
        from ftjax.objectives.sft import sft_loss

        source = hf.open_model(folder)
        self.model = models.from_config(source.config).with_options(dtype=jnp.dtype(dtype), unroll=True)
        self.base = hf.load_params(source, self.model, dtype=dtype)
        self.plan = lora.plan(lora.LoraConfig(r=RANK, lora_alpha=ALPHA), self.model.table)
        self.loss = sft_loss(
            self.model, lambda t, f, rng: lora.attach(f, t, self.plan), chunk=256, frozen_head=True
        )
        tx = optax.adamw(LR)
        self.step_fn = train.make_train_step(self.loss, tx, seed=0)
        self.compiled = {}
        abstract = lora.abstract(self.plan, self.model.table)
        self.state = train.init_state(self._to_tree(factors(self._names(abstract)), abstract), tx)

    def _names(self, abstract):
        """(PEFT name, [out, in]) of every factor, in PEFT's own layout."""
        return [(name, shape) for _, _, name, shape in self._walk(abstract)]

    def _walk(self, abstract):
        import numpy as np

        from ftjax.weights import flatten

        flat, table = flatten(abstract), self.model.table
        for path in self.plan:
            for i in table.layers(path):
                module = table.rows[path].module.format(layer=i)
                yield path + "/a", i, f"{module}.A", (RANK, int(np.prod(table.ins(path))))
                yield path + "/b", i, f"{module}.B", (int(np.prod(table.outs(path))), RANK)
        assert len(flat) == 2 * len(self.plan)

    def _to_tree(self, named, abstract):
        import jax.numpy as jnp
        import numpy as np

        from ftjax.weights import flatten, unflatten

        flat = {path: np.zeros(x.shape, np.float32) for path, x in flatten(abstract).items()}
        for path, i, name, _ in self._walk(abstract):
            flat[path][i] = named[name].T.reshape(flat[path][i].shape)
        return unflatten({path: jnp.asarray(x) for path, x in flat.items()})

    def _batch(self, B, T, share):
        import jax.numpy as jnp
        import numpy as np

        tokens, trained = make_batch(B, T, share)
        ones = np.ones((1, B, T), np.int32)
        return dict(
            tokens=jnp.asarray(tokens[None]),
            loss_weight=jnp.asarray(trained[None].astype(np.float32)),
            segments=jnp.asarray(ones),
            positions=jnp.asarray(ones.cumsum(2, dtype=np.int32) - 1),
        )

    def grads(self, B, T, share):
        import jax
        import numpy as np

        from ftjax.weights import flatten

        batch = jax.tree.map(lambda x: x[0], self._batch(B, T, share))

        def mean(trainable, frozen):
            loss, sums = self.loss(trainable, frozen, batch)
            return loss / sums["weight"]

        loss, tree = jax.jit(jax.value_and_grad(mean))(self.state.trainable, self.base)
        flat = {path: np.asarray(x) for path, x in flatten(tree).items()}
        out = {name: flat[path][i].reshape(shape[::-1]).T for path, i, name, shape in self._walk(tree)}
        return float(loss), out

    def prepare(self, B, T, share):
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
        self.batch = self._batch(B, T, share)
        if (B, T) not in self.compiled:
            self.compiled[B, T] = self.step_fn.lower(self.state, self.base, self.batch).compile()
        self.run = self.compiled[B, T]
        self.step()

    def step(self) -> float:
        self.state, metrics = self.run(self.state, self.base, self.batch)
        return float(metrics["loss"])


class Peft:
    def __init__(self, folder: str, dtype: str):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.torch = torch
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config).train()
        self.params = {
            name.replace("base_model.model.", "")
            .replace(".lora_A.default.weight", ".A")
            .replace(".lora_B.default.weight", ".B"): p
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        with torch.no_grad():
            for name, value in factors([(n, tuple(p.shape)) for n, p in self.params.items()]).items():
                self.params[name].copy_(torch.from_numpy(value))
        self.optimiser = torch.optim.AdamW(self.params.values(), lr=LR)

    def set_batch(self, B, T, share):
        tokens, trained = (self.torch.from_numpy(x) for x in make_batch(B, T, share))
        self.tokens, self.labels = tokens.long(), self.torch.where(trained, tokens.long(), -100)

    def prepare(self, B, T, share):
        self.set_batch(B, T, share)
        self.step()

    def _backward(self):
        loss = self.model(input_ids=self.tokens, labels=self.labels, use_cache=False).loss
        loss.backward()
        return loss.item()

    def grads(self, B, T, share):
        self.set_batch(B, T, share)
        loss = self._backward()
        out = {name: p.grad.float().numpy().copy() for name, p in self.params.items()}
        self.optimiser.zero_grad()
        return loss, out

    def step(self) -> float:
        loss = self._backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def worker(program: str, folder: str, dtype: str) -> None:
    """Serve one contender: commands as JSON lines on stdin, answers on the stdout it was started with."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    contender = (Ours if program == "ours" else Peft)(folder, dtype)
    for line in sys.stdin:
        command, *args = json.loads(line)
        start, before = time.perf_counter(), cpu_seconds()
        answer = {}
        if command == "grads":
            import numpy as np

            answer["loss"], grads = contender.grads(*args[1:])
            np.savez(args[0], **grads)
        elif command == "prepare":
            contender.prepare(*args)
        else:
            answer["loss"] = contender.step()
        answer |= {"wall": time.perf_counter() - start, "cpu": cpu_seconds() - before}
        answer["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(answer), file=answers, flush=True)


class Process:
    def __init__(self, name: str, folder: str, tokens: str, log):
        program, dtype, env = CONTENDERS[name]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu_sft", "--worker", program, dtype]
        self.name = name
        cpu_only = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [*command, "--model", folder],
            env=os.environ | MALLOC | env | cpu_only | {"TOKENS": tokens},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ask(self, *command) -> dict:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def check_gradients(processes: dict[str, Process], scratch: Path) -> list[str]:
    """Lines that say how far gradients are apart; AssertionError where ours are further than they may be."""
    import numpy as np

    flat, losses = {}, {}
    for name, process in processes.items():
        file = scratch / "grads.npz"
        losses[name] = process.ask("grads", str(file), 2, 128, 0.5)["loss"]
        with np.load(file) as arrays:
            flat[name] = {key: arrays[key].astype(np.float64) for key in arrays}

    def compare(name, reference):
        assert flat[name].keys() == flat[reference].keys(), "the two do not adapt the same modules"
        x, y = (np.concatenate([flat[n][k].ravel() for k in sorted(flat[n])]) for n in (name, reference))
        worst = min(
            float(np.vdot(flat[name][k], flat[reference][k]))
            / float(np.linalg.norm(flat[name][k]) * np.linalg.norm(flat[reference][k]))
            for k in flat[name]
        )
        error = float(np.linalg.norm(x - y) / np.linalg.norm(y))
        cosine = float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        text = (
            f"{name} against {reference}: relative error {error:.1e}, cosine {cosine:.6f} "
            f"(worst factor {worst:.6f}), loss {losses[name]:.5f} / {losses[reference]:.5f}"
        )
        return error, cosine, text

    lines = []
    first = {name.partition(",")[0]: name for name in reversed(flat)}  # however it waits
    pairs = [
        ("ftjax float32", "PEFT float32"),
        ("ftjax bfloat16", "ftjax float32"),
        ("PEFT bfloat16", "PEFT float32"),
    ]
    for name, reference in pairs:
        if name not in first or reference not in first:
            continue
        name, reference = first[name], first[reference]
        error, cosine, text = compare(name, reference)
        lines.append(text)
        print(text, flush=True)
        if name == "ftjax float32":
            assert error < MAX_F32_ERROR, text
        if name == "ftjax bfloat16":
            assert cosine > MIN_BF16_COSINE, text
    return lines


def measure(processes: dict[str, Process], case, rounds: int) -> tuple[dict, dict]:
    """({name: answer to prepare}, {name: [answer to each step]}), steps taken in turn."""
    prepared = {name: process.ask("prepare", *case) for name, process in processes.items()}
    steps = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            steps[name].append(process.ask("step"))
    return prepared, steps


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> str:
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().split()
        found = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
        return ", ".join(found)
    return ""


def versions() -> str:
    out = [f"python {platform.python_version()}"]
    for package in ("jax", "jaxlib", "flax", "torch", "transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(out)


def table(results: dict) -> list[str]:
    """Markdown rows; the ratio is the best of ours over the best of the peer's, by the median step."""
    lines = [
        "| batch | trained | who | step s, median (min) | tokens/s | CPU s | first call s | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (B, T, share), (prepared, steps) in results.items():
        for name in CONTENDERS:
            row = f"| {B}×{T} | {share:.0%} | {name} |"
            if name not in steps:
                lines.append(row + " | | | | |")
                continue
            wall = [s["wall"] for s in steps[name]]
            median = statistics.median(wall)
            cpu = statistics.median(s["cpu"] for s in steps[name])
            first, gib = prepared[name]["wall"], steps[name][-1]["gib"]
            lines.append(
                f"{row} {median:.2f} ({min(wall):.2f}) | {B * T / median:.0f} "
                f"| {cpu:.2f} | {first:.1f} | {gib:.1f} |"
            )
    lines.append("")
    for (B, T, share), (_, steps) in results.items():
        ours = [n for n in steps if n.startswith("ftjax")]
        peers = [n for n in steps if n.startswith("PEFT")]
        if peers:
            lines.append(f"- {B}×{T}, {share:.0%} trained: " + "; ".join(ratios(steps, ours, peers)))
    return lines


def ratios(steps, ours, peers) -> list[str]:
    def best(names, key, of):
        return min(of([s[key] for s in steps[n]]) for n in names)

    rounds = range(len(steps[ours[0]]))
    paired = [
        min(steps[n][i]["wall"] for n in peers) / min(steps[n][i]["wall"] for n in ours) for i in rounds
    ]

    def ratio(key, of):
        return f"{best(peers, key, of) / best(ours, key, of):.2f}×"

    return [
        f"**{ratio('wall', statistics.median)}** by median step",
        f"{ratio('wall', min)} by fastest step",
        f"{ratio('cpu', statistics.median)} by CPU time",
        f"{min(paired):.2f}–{max(paired):.2f}× over {len(rounds)} rounds",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder or hub id; random weights of SmolLM2's shape unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases to run")
    parser.add_argument("--results", type=Path, help="markdown file to append the table to")
    parser.add_argument("--skip", action="append", default=[], help="leave a contender out")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], args.model, args.worker[1])
        return
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "log", "w+") as log:
        folder = args.model
        if folder is None:
            folder = scratch
            write_random(Path(folder))
        write_tokens(Path(scratch), args.model)
        processes, lines = {}, []
        try:
            for name, (program, _, _) in CONTENDERS.items():
                missing = program == "peft" and not all(map(importlib.util.find_spec, ("torch", "peft")))
                if not missing and name not in args.skip:
                    processes[name] = Process(name, folder, str(Path(scratch) / "tokens.npy"), log)
            lines = check_gradients(processes, Path(scratch))
            results = {}
            for case in CASES[: args.cases]:
                results[case] = measure(processes, case, args.rounds)
                print("\n".join(table({case: results[case]})), flush=True)
        except RuntimeError:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            raise
        finally:
            for process in processes.values():
                with contextlib.suppress(Exception):
                    process.close()
    cores = len(os.sched_getaffinity(0))
    command = "python -m benchmarks.cpu_sft" + (f" --model {Path(args.model).name}" if args.model else "")
    command += f" --rounds {args.rounds}" + "".join(f' --skip "{name}"' for name in args.skip)
    report = [
        f"\n## {datetime.date.today()}: {cpu_name()}, {cores} cores ({cpu_features()})\n",
        f"`{command}`; {versions()}; load average over the last 15 minutes {os.getloadavg()[2]:.1f}.",
        f"LoRA r={RANK} on every linear layer, AdamW, one process each, steps in turn. Gradients:\n",
        *(f"- {line}" for line in lines),
        "",
        *table(results),
    ]
    if args.results:
        with open(args.results, "a") as f:
            f.write("\n".join(report) + "\n")
    print("\n".join(report))


if __name__ == "__main__":
    main()
