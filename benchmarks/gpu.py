"""Comparisons with the fastest peers on one GPU, a part at a time; every row states its own bound first.

    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --part check
    python -m benchmarks.gpu --part 8b --peer-python ~/unsloth/bin/python

A part takes less than nine minutes with what it compiles and appends its rows to benchmarks/results/gpu.md.
Ours is `ftjax sft` itself (or ftjax.generate, or an op), with the settings that the part lists, in a process
of its own; the peer runs after it on the same card, in the environment whose python --peer-python (or
FTJAX_PEER_PYTHON) names: Unsloth's, or one with transformers, peft and liger-kernel. A peer that is missing,
or fails, or takes too long leaves its cells blank. Weights are random, of the shapes below, and lie with what
is compiled under --work. Ratios are of rates taken in one part on one card: docs/performance.md.

--device cpu --tiny takes every part through the same code at toy sizes: its figures mean nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "gpu.md"
LIMIT = 540  # seconds of a part
GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"
NF4 = 4.127  # bits a weight: blocks of 64, their scales in 8 bits with a float32 for 256 of them

LLAMA = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=128256,
    max_position_embeddings=524288,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    torch_dtype="bfloat16",
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
SHAPES = {
    # of Llama-3.2-1B and Llama-3.1-8B
    "1b": LLAMA
    | dict(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
    "8b": LLAMA
    | dict(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=14336,
        tie_word_embeddings=False,
    ),
    "tiny": LLAMA
    | dict(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        tie_word_embeddings=True,
    ),
}
RANK = 16


@dataclasses.dataclass
class Row:
    """A line of the table. Rates are in `unit`; what is None is a blank cell."""

    case: str
    unit: str = "tok/s"
    bound: float | None = None
    why: str = ""
    ours: float | None = None
    gib: float | None = None
    peer: str = ""
    theirs: float | None = None
    peer_gib: float | None = None
    goal: float | None = None
    note: str = ""


# -- What both sides read: a checkpoint with random weights, and rows of tokens


def shape_of(size: str, tiny: bool) -> dict:
    return SHAPES["tiny" if tiny else size]


def model_folder(work: pathlib.Path, size: str, tiny: bool) -> pathlib.Path:
    """A Hugging Face folder of this size: random bfloat16 weights, and a tokenizer of words t4, t5, …; made
    on first use."""
    folder = work / ("tiny" if tiny else size)
    if (folder / "tokenizer.json").exists():
        return folder
    import ml_dtypes
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ftjax import models as families
    from ftjax.weights import hf_shape

    config = shape_of(size, tiny)
    table = families.from_config(config).table
    noise = np.random.default_rng(0).standard_normal(2**22).astype(np.float32)
    header, at = {}, 0
    for path in table.rows:
        for name in table.names(path):
            shape = hf_shape(table, path)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * math.prod(shape)]}
            at += 2 * math.prod(shape)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, (path, row) in enumerate(table.rows.items()):
            std = 0.02 if row.role == "lookup" else max(math.prod(table.ins(path)), 1) ** -0.5
            block = np.ones_like(noise) if row.init == "ones" else np.roll(noise, 7919 * i) * std
            block = block.astype(ml_dtypes.bfloat16)
            for _ in table.names(path):
                for left in range(math.prod(hf_shape(table, path)), 0, -block.size):
                    file.write(block[: min(left, block.size)].tobytes())
    (folder / "config.json").write_text(json.dumps(config))
    names = ["<bos>", "<eos>", "<pad>", "<unk>", *(f"t{i}" for i in range(4, config["vocab_size"]))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def packed_pairs(tiny: bool) -> list[tuple[int, int]]:
    """[(prompt, answer)] lengths of real examples (benchmarks/lengths.py)."""
    pairs = json.loads((HERE / "packed_lengths.json").read_text())["pairs"]
    return [(1 + a // 20, 1 + b // 20) for a, b in pairs] if tiny else [tuple(pair) for pair in pairs]


def write_data(path: pathlib.Path, vocabulary: int, tokens: int, packed: bool, tiny: bool) -> None:
    """A .jsonl of random words, at least so many tokens: one long text, or prompts and completions of real
    lengths."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"t{draw.randrange(4, vocabulary)}" for _ in range(count))

    with open(path, "w") as file:
        if not packed:
            file.write(json.dumps({"text": words(tokens)}) + "\n")
            return
        pairs = packed_pairs(tiny)
        while tokens > 0:
            prompt, answer = draw.choice(pairs)
            tokens -= prompt + answer
            file.write(json.dumps({"prompt": words(prompt) + " ", "completion": words(answer)}) + "\n")


# -- Workers: each runs in a process of its own (--worker NAME JSON) and prints what it found as JSON


def device_facts() -> dict:
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {"kind": jax.local_devices()[0].device_kind, "gib": peak / GIB if peak else None}


def run_sft(spec: dict) -> dict:
    """`ftjax sft` with spec["settings"]: {"rate": trained tokens a second, "gib", "mfu", "tokens" a step, …}.
    The median of the steps after the first three, those that are traced left out."""
    from ftjax import cli

    work, tiny = pathlib.Path(spec["work"]), spec["tiny"]
    rows, length, steps = spec["rows"], spec["length"], spec["steps"]
    folder = model_folder(work, spec["size"], tiny)
    data = work / f"data-{'packed' if spec['packed'] else 'text'}-{rows}-{length}-{steps}-{int(tiny)}.jsonl"
    if not data.exists():
        tokens = (steps + 2) * rows * (length + 2)
        write_data(data, shape_of(spec["size"], tiny)["vocab_size"], tokens, spec["packed"], tiny)
    run = work / "runs" / spec["name"]
    settings = {
        "model": folder,
        "output": run,
        "data.train": data,
        "data.max_length": length,
        "data.cache_dir": work / "tokens",
        "train.batch_size": rows,
        "train.max_steps": steps,
        "lora.r": RANK,
        "lora.lora_alpha": 2 * RANK,
        "checkpoint.every": 10 * steps,
        "report.tensorboard": "false",
    }
    settings |= {"data.chat_template": "none"} if spec["packed"] else {"data.overlong": "split"}
    if spec["traced"]:
        settings |= {"profile.after": steps, "profile.steps": spec["traced"]}  # the last ones
    words = [f"{key}={value}" for key, value in settings.items()]
    code = cli.main(["sft", *words, *spec["settings"], *(["--overwrite"] if run.exists() else [])])
    if code:
        raise RuntimeError(f"ftjax sft ended with code {code}")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    train = [line for line in lines if line["kind"] == "train"]
    timed = train[min(3, len(train) - 1) : len(train) - spec["traced"]] or train[-1:]
    found = {
        "rate": statistics.median(line["weight"] / line["seconds"] for line in timed),
        "step_s": statistics.median(line["seconds"] for line in timed),
        "first_s": json.loads((run / "summary.json").read_text())["compile_seconds"] + train[0]["seconds"],
        "loss": train[-1]["loss"],
    }
    if spec["traced"]:
        profile = json.loads((run / "profile.json").read_text())
        shares = {row["name"]: round(row["share"], 3) for row in profile["rows"]}
        found |= {name: profile[name] for name in ("mfu", "tokens", "trained", "positions")} | {
            "where": shares
        }
    return found | device_facts()


def run_decode(spec: dict) -> dict:
    """Greedy decoding with ftjax.generate: new tokens a second of decoding, prefill apart."""
    import jax.numpy as jnp

    from ftjax import hf, models
    from ftjax.generate import GenerateOptions, Generator

    source = hf.open_model(str(model_folder(pathlib.Path(spec["work"]), spec["size"], spec["tiny"])))
    model = models.from_config(source.config).with_options(dtype=jnp.bfloat16)
    params = hf.load_params(source, model, dtype=jnp.bfloat16)
    draw, vocabulary = random.Random(0), model.config.vocab_size
    prompts = [[draw.randrange(4, vocabulary) for _ in range(spec["prompt"])] for _ in range(spec["batch"])]
    generator = Generator(model, params)  # without end tokens: every answer has its full length
    options = GenerateOptions(max_new_tokens=spec["new"])
    generator.generate(prompts, options)
    found = generator.generate(prompts, options)
    made = sum(one.new_tokens for one in found)
    assert made == spec["batch"] * spec["new"], made
    one = found[0]
    whole = made / (one.prefill_s + one.decode_s)
    return {"rate": made / one.decode_s, "whole": whole, "prefill_s": one.prefill_s, **device_facts()}


def timed(fn, *args, repeats: int) -> float:
    """Seconds of a call, the median of so many after two."""
    import jax

    for _ in range(2):
        jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        clock = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - clock)
    return statistics.median(seconds)


def packed_row(rows: int, length: int, documents: int):
    """(segments, positions) int32 [rows, length] of rows with so many equal documents."""
    import numpy as np

    each = length // documents
    segments = np.repeat(np.arange(documents) + 1, each)[None].repeat(rows, 0).astype(np.int32)
    positions = np.tile(np.arange(each), documents)[None].repeat(rows, 0).astype(np.int32)
    return segments, positions


def run_attention(spec: dict) -> dict:
    """{implementation: seconds forward and backward, or why it does not run} on one case."""
    import jax
    import jax.numpy as jnp

    from ftjax.errors import UserError
    from ftjax.ops.attention import IMPLEMENTATIONS, attention

    B, T, N, K, H = (spec[x] for x in ("rows", "length", "heads", "kv_heads", "head_dim"))
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (B, T, heads, H), jnp.bfloat16)
        for key, heads in zip(keys, (N, K, K), strict=True)
    )
    where = packed_row(B, T, spec["documents"])
    found = {}
    for name in IMPLEMENTATIONS:

        def loss(q, k, v, name=name):
            y = attention(q, k, v, where, scale=H**-0.5, implementation=name)
            return jnp.sum(y.astype(jnp.float32))

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        try:
            found[name] = timed(run, q, k, v, repeats=spec["repeats"])
        except UserError:
            continue  # it is another device's, or cannot take such heads
        except Exception as e:  # the other ones can still be told
            found[name] = f"{type(e).__name__}: {e}"[:120]

    def causal(q, k, v):
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=spec["peer"])
        return jnp.sum(y.astype(jnp.float32))

    if spec["documents"] == 1:
        peer = jax.jit(jax.grad(causal, argnums=(0, 1, 2)))
        found["jax.nn.dot_product_attention"] = timed(peer, q, k, v, repeats=spec["repeats"])
    return {"seconds": found, **device_facts()}


def run_matmul(spec: dict) -> dict:
    """{kind: seconds} of the product of an 8B layer's gate, forward, by how the base is held."""
    import jax
    import jax.numpy as jnp

    from ftjax import lora, models, quant, weights
    from ftjax.ops import einsum

    D, F, T = spec["D"], spec["F"], spec["tokens"]
    config = SHAPES["tiny"] | dict(hidden_size=D, intermediate_size=F, num_hidden_layers=1)
    table = models.from_config(config).table
    plan = lora.plan(lora.LoraConfig(r=RANK, target_modules=("gate_proj",)), table)
    base = jax.jit(lambda key: weights.init(key, table, jnp.bfloat16))(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, T, D), jnp.bfloat16)
    factors = lora.init(jax.random.key(2), plan, table, base=base)
    leaves = {"bfloat16": base, "bfloat16 and LoRA": lora.attach(base, factors, plan)}
    for kind in quant.BLOCKS:
        leaves[kind] = quant.quantise(base, table, quant.QuantOptions(kind=kind))  # type: ignore[arg-type]
    product = jax.jit(lambda x, leaf: einsum("BTD,DF->BTF", x, leaf))
    found = {}
    for name, tree in leaves.items():
        gate = jax.tree.map(lambda leaf: leaf[0], tree["layers"]["gate"])
        found[name] = timed(product, x, gate, repeats=spec["repeats"])
    return {"seconds": found, **device_facts()}


def run_check(spec: dict) -> dict:
    """{check: [error, the CPU's]} of the loss and the gradient of every factor of a LoRA step of a small
    model on packed rows: relative ones of bfloat16 on this device, and on the CPU, against float32 there. A
    case's "quant" is how the base is held, in all three; the rest are with_options of the model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ftjax import lora, models, quant, weights
    from ftjax.errors import UserError
    from ftjax.objectives.sft import sft_loss
    from ftjax.ops import target

    config = SHAPES["tiny"] | spec["shape"]
    table = models.from_config(config).table
    base = jax.jit(lambda key: weights.init(key, table, jnp.bfloat16))(jax.random.key(0))
    plan = lora.plan(lora.LoraConfig(r=8), table)
    # no factor is zero, so that every one has a gradient
    factors = jax.jit(lambda key: lora.init(key, plan, table, how=False))(jax.random.key(1))
    rows, length = 2, spec["length"]
    segments, positions = packed_row(rows, length, 4)
    tokens = jax.random.randint(jax.random.key(2), (rows, length), 4, config["vocab_size"])
    ones = jnp.ones((rows, length), jnp.float32)
    batch = {"tokens": tokens, "segments": segments, "positions": positions, "loss_weight": ones}

    def gradient(kind: str, dtype, settings: dict, held: str | None) -> dict:
        model = models.from_config(config).with_options(dtype=dtype, **settings)
        params = base
        if held is not None:
            params = quant.quantise(base, table, quant.QuantOptions(kind=held))  # type: ignore[arg-type]
        if dtype == jnp.float32:
            params = jax.tree.map(lambda x: x.astype(dtype), quant.dequantised(params, dtype))
        loss = sft_loss(model, lambda t, f, rng: lora.attach(f, t, plan), chunk=length, frozen_head=True)

        def mean(factors, params, batch):
            total, sums = loss(factors, params, batch)
            return total / sums["weight"]

        device = jax.devices("cpu")[0] if kind == "cpu" else jax.devices()[0]
        with target.use(kind), jax.default_device(device):
            args = jax.device_put((factors, params, batch), device)
            value, grads = jax.device_get(jax.jit(jax.value_and_grad(mean))(*args))
        return {"loss": np.float64(value)} | {k: np.float64(x) for k, x in weights.flatten(grads).items()}

    def error(found: dict, want: dict) -> float:
        each = [float(np.linalg.norm(found[k] - x) / np.linalg.norm(x)) for k, x in want.items()]
        return max(each) if np.isfinite(each).all() else math.inf

    @functools.cache
    def reference(held: str | None) -> tuple[dict, float]:
        with jax.default_matmul_precision("highest"):
            want = gradient("cpu", jnp.float32, {}, held)
        return want, error(gradient("cpu", jnp.bfloat16, {}, held), want)

    errors = {}
    for name, case in spec["cases"].items():
        held = case.get("quant")
        settings = {k: v for k, v in case.items() if k != "quant"}
        want, floor = reference(held)
        try:
            errors[name] = [error(gradient(target.kind(), jnp.bfloat16, settings, held), want), floor]
        except UserError:
            continue  # of an implementation that is another device's
        except Exception as e:  # the other cases can still be told
            errors[name] = f"{type(e).__name__}: {e}"[:200]
    return {"errors": errors, **device_facts()}


WORKERS: dict[str, Callable[[dict], dict]] = {
    "sft": run_sft,
    "decode": run_decode,
    "attention": run_attention,
    "matmul": run_matmul,
    "check": run_check,
}


# -- The parts


@dataclasses.dataclass
class Bench:
    """One call of the command: where things lie, what is left of the part's time, the peer's python."""

    work: pathlib.Path
    tiny: bool
    peer_python: str | None
    deadline: float = dataclasses.field(default_factory=lambda: time.monotonic() + LIMIT)
    card: str = ""
    in_process: bool = False

    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 1.0)

    def ask(self, worker: str, spec: dict, env: dict[str, str] | None = None) -> dict:
        """A worker's answer; {"error": text} where it failed or took too long."""
        spec = {"work": str(self.work), "tiny": self.tiny} | spec
        if self.in_process:
            try:
                found = WORKERS[worker](spec)
            except Exception as e:
                traceback.print_exc()
                return {"error": f"{type(e).__name__}: {e}"}
            self.card = found["kind"]
            return found
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", worker, json.dumps(spec)]
        found = self._run(command, {**os.environ, **(env or {})})
        self.card = found.get("kind", self.card)
        return found

    def peer(self, program: str, *arguments: str) -> dict:
        """A peer's answer, {} where there is none."""
        if not self.peer_python:
            return {}
        command = [self.peer_python, str(HERE / "peers" / program), *arguments]
        found = self._run(command, dict(os.environ))
        if "error" in found:
            print(f"peer: {found['error']}", file=sys.stderr, flush=True)
            return {}
        return found

    def _run(self, command: list[str], env: dict[str, str]) -> dict:
        try:
            done = subprocess.run(
                command, env=env, stdout=subprocess.PIPE, text=True, timeout=self.left(), check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": "took too long"}
        except OSError as e:
            return {"error": str(e)}
        for line in reversed(done.stdout.splitlines()):
            with contextlib.suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    return found
        return {"error": f"ended with code {done.returncode}: {done.stdout[-200:]}"}

    def device(self):
        """The card's peaks; None where they are not known. Toy runs take an H100's, so that the bounds are
        computed."""
        from ftjax import flops

        return flops.device(H100 if self.tiny else self.card)

    def model(self, size: str):
        from ftjax import models

        return models.from_config(shape_of(size, self.tiny))


# A CPU's memory is the host's: the rung that keeps the same.
TINY = {"train.remat=mlp_offload": "train.remat=mlp", "train.remat=offload": "train.remat=attention"}


@dataclasses.dataclass(frozen=True)
class Train:
    """A part that is `ftjax sft` beside a peer's step: a row for each of `variants` of the settings. `limit`
    is the memory that they allow themselves, in GiB; `ratio` the goal; `peers` are (program, its arguments);
    they have their turn after the first variant."""

    size: str
    settings: tuple[str, ...] = ()
    variants: tuple[tuple[str, ...], ...] = ((),)
    rows: int = 4
    length: int = 2048
    steps: int = 16
    traced: int = 2
    packed: bool = False
    limit: float | None = None
    bits: float = 16
    eight_bit: bool = False
    ratio: float | None = None
    peers: tuple[tuple[str, ...], ...] = ()

    def spec(self, name: str, tiny: bool, variant: tuple[str, ...] = ()) -> dict:
        if not tiny:
            small: dict = {}
        else:
            small = dict(rows=2, length=32, steps=min(self.steps, 4), traced=min(self.traced, 1))
        one = dataclasses.replace(self, **small)
        keep = ("size", "rows", "length", "steps", "traced", "packed")
        settings = [*self.settings, *variant]
        if tiny:
            settings = [TINY.get(x, "train.mlp_chunk=8" if "mlp_chunk" in x else x) for x in settings]
        return {k: getattr(one, k) for k in keep} | {"name": name, "settings": settings}

    def work(self, spec: dict, tiny: bool):
        """What a step holds."""
        from ftjax import flops

        rows, length = spec["rows"], spec["length"]
        if not self.packed:
            return flops.Work.rows(rows, length)
        pairs, draw = packed_pairs(tiny), random.Random(0)
        lengths, trained, room = [], 0, rows * length
        while True:
            prompt, answer = draw.choice(pairs)
            if (room := room - prompt - answer - 1) < 0:  # and the end token
                return flops.Work(tuple(lengths), trained, rows * length)
            lengths.append(prompt + answer + 1)
            trained += answer + 1

    def __call__(self, bench: Bench, name: str) -> list[Row]:
        first, *others = self.variants
        rows = [self.ours(bench, name, first)]
        spec = self.spec(name, bench.tiny)
        folder = model_folder(bench.work, self.size, bench.tiny) if bench.peer_python else None
        for program, *arguments in self.peers:
            size = ["--rows", str(spec["rows"]), "--length", str(spec["length"])]
            lengths = ["--lengths", str(HERE / "packed_lengths.json")] if self.packed else []
            found = bench.peer(program, "--model", str(folder), *size, *lengths, *arguments)
            if found:
                if rows[-1].peer:
                    rows.append(dataclasses.replace(rows[0], note=""))
                rows[-1].peer = " ".join([found["peer"], *arguments])
                rows[-1].theirs, rows[-1].peer_gib = found["rate"], found["gib"]
        for variant in others:
            row = self.ours(bench, name, variant)
            row.peer, row.theirs, row.peer_gib = rows[0].peer, rows[0].theirs, rows[0].peer_gib
            rows.append(row)
        return rows

    def ours(self, bench: Bench, name: str, variant: tuple[str, ...]) -> Row:
        from benchmarks import bounds
        from ftjax import lora

        spec = self.spec("-".join([name, *variant]), bench.tiny, variant)
        env = {}
        if self.limit and not bench.tiny:  # the allocator holds the run to it
            memory = card_memory()
            env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{self.limit * GIB / memory:.4f}" if memory else "0.9"
        found = bench.ask("sft", spec, env)
        model, work = bench.model(self.size), self.work(spec, bench.tiny)
        plan = lora.plan(lora.LoraConfig(r=RANK), model.table)
        room = None if self.limit is None else self.limit * GIB
        device, bound = bench.device(), None
        if device is not None:
            bound = bounds.train_step(
                model, plan, work, device, eight_bit=self.eight_bit, room=room, bits=self.bits
            )
        what = f"LoRA r={RANK}, {spec['rows']} × {spec['length']}"
        what += ", packed documents" if self.packed else ""
        what += f"; {' '.join(spec['settings'])}" if spec["settings"] else ""
        note = found.get("error", "")
        if found.get("mfu"):
            note = f"MFU {found['mfu']:.1%}; " + ", ".join(f"{k} {v:.0%}" for k, v in found["where"].items())
        return Row(
            case=f"{self.size}: {what}",
            unit="answer tok/s" if self.packed else "tok/s",
            bound=bound and work.trained / bound.total,
            why=str(bound or ""),
            ours=found.get("rate"),
            gib=found.get("gib"),
            goal=self.ratio,
            note=note,
        )


def card_memory() -> int | None:
    """Bytes of the first GPU, by nvidia-smi."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return None


def decode(bench: Bench, name: str, *, size: str) -> list[Row]:
    from benchmarks import bounds

    batch, prompt, new = (4, 8, 16) if bench.tiny else (64, 128, 512)
    ours = bench.ask("decode", dict(size=size, batch=batch, prompt=prompt, new=new))
    device, bound = bench.device(), None
    if device is not None:
        bound = bounds.decode_step(bench.model(size), device, batch, prompt + new / 2)
    case = f"{size}: greedy, batch {batch}, prompt {prompt}, {new} new tokens"
    alone = Row(
        case=f"{case}, without prefill",
        bound=bound and batch / bound.total,
        why=str(bound or ""),
        ours=ours.get("rate"),
        gib=ours.get("gib"),
        note=ours.get("error", f"prefill {ours.get('prefill_s', 0):.3g} s; the goal is 60% of the bound"),
    )
    row = Row(case=f"{case}, with prefill", ours=ours.get("whole"), gib=ours.get("gib"))
    if bench.peer_python:
        folder = str(model_folder(bench.work, size, bench.tiny))
        sizes = ["--batch", str(batch), "--prompt", str(prompt), "--new", str(new)]
        found = bench.peer("hf_generate.py", "--model", folder, *sizes)
        row.peer, row.theirs, row.peer_gib = found.get("peer", ""), found.get("rate"), found.get("gib")
    return [alone, row]


def attention_part(bench: Bench, name: str) -> list[Row]:
    from benchmarks import bounds
    from ftjax import flops

    rows = []
    heads = dict(heads=4, kv_heads=2, head_dim=16) if bench.tiny else dict(heads=32, kv_heads=8, head_dim=128)
    for batch, length, documents in ((4, 2048, 1), (1, 8192, 1), (1, 8192, 8)):
        if bench.tiny:
            batch, length = 1, 64
        peer = "xla" if bench.tiny else "cudnn"
        spec = dict(
            rows=batch, length=length, documents=documents, peer=peer, repeats=2 if bench.tiny else 20
        )
        found = bench.ask("attention", spec | heads)
        pairs = flops.pairs([length // documents] * documents * batch)
        count = 12 * heads["heads"] * heads["head_dim"] * pairs
        device = bench.device()
        share = bounds.ATTENTION if length // documents <= 4096 else bounds.LONG_ATTENTION
        seconds = dict(found.get("seconds", {"ftjax": None}))
        theirs = seconds.pop("jax.nn.dot_product_attention", None)
        for implementation, took in seconds.items():
            ok = isinstance(took, float)
            what = f"{batch} × {length}" + (f", {documents} documents a row" if documents > 1 else "")
            rows.append(
                Row(
                    case=f"attention forward and backward, {what}: {implementation}",
                    unit="TFLOP/s",
                    bound=device and share * device.bf16 / 1e12,
                    why=f"{count / 1e12:.3g} TFLOP at {share:.0%} of the peak",
                    ours=count / took / 1e12 if ok else None,
                    peer=f"jax.nn.dot_product_attention ({peer})" if theirs else "",
                    theirs=count / theirs / 1e12 if theirs else None,
                    note=found.get("error", "") or ("" if ok else str(took)),
                )
            )
    return rows


def matmul_part(bench: Bench, name: str) -> list[Row]:
    D, F, tokens = (64, 128, 32) if bench.tiny else (4096, 14336, 8192)
    found = bench.ask("matmul", dict(D=D, F=F, tokens=tokens, repeats=2 if bench.tiny else 30))
    count, plain = 2 * D * F * tokens, found.get("seconds", {}).get("bfloat16")
    rows, device = [], bench.device()
    for kind, took in found.get("seconds", {"": None}).items():
        rows.append(
            Row(
                case=f"product {tokens} × {D} × {F}: {kind}",
                unit="TFLOP/s",
                bound=device and device.bf16 / 1e12,
                why=f"{count / 1e12:.3g} TFLOP at the bfloat16 peak",
                ours=count / took / 1e12 if took else None,
                peer="the same in bfloat16" if kind != "bfloat16" else "",
                theirs=count / plain / 1e12 if plain and kind != "bfloat16" else None,
                note=found.get("error", ""),
            )
        )
    return rows


def compile_part(bench: Bench, name: str) -> list[Row]:
    """Compiling and the first step of a fresh process, with an empty cache and with a full one."""
    rows = []
    for unroll in ("1", "4", "true"):
        part = Train("8b", (f"train.unroll={unroll}", "train.remat=full"), steps=2, traced=0)
        cache = bench.work / "compile-caches" / f"{unroll}-{time.time_ns()}"
        took = [
            bench.ask(
                "sft", part.spec(f"{name}-{unroll}", bench.tiny), {"JAX_COMPILATION_CACHE_DIR": str(cache)}
            )
            for _ in range(2)
        ]
        cold, warm = (found.get("first_s") for found in took)
        rows.append(
            Row(
                case=f"8b: compiling and the first step, train.unroll={unroll}",
                unit="s (less is better)",
                ours=cold,
                note=took[0].get("error", "") or (f"{warm:.3g} s with a full cache" if warm else ""),
            )
        )
    return rows


def check_part(bench: Bench, name: str) -> list[Row]:
    """Right is an error of no more than twice that of the same step in bfloat16 on the CPU."""
    shape = dict(hidden_size=512, head_dim=64, num_attention_heads=8, intermediate_size=1024)
    spec = dict(shape=shape, length=1024, cases=checks())
    if bench.tiny:
        spec = dict(shape=dict(num_hidden_layers=1), length=64, cases={"layers scanned": {"unroll": 1}})
    found = bench.ask("check", spec)
    rows = []
    for case, errors in found.get("errors", {"": found.get("error", "")}).items():
        if isinstance(errors, list):
            error, floor = errors
            word = "right" if error <= 2 * floor else "WRONG"
            errors = f"{word}: relative error {error:.2g}, of the CPU's bfloat16 {floor:.2g}"
        rows.append(Row(case=f"numerics: {case}", unit="", note=errors))
    return rows


def checks() -> dict[str, dict]:
    """{case: as of run_check} that `check` runs."""
    from ftjax import quant
    from ftjax.ops.attention import IMPLEMENTATIONS

    cases: dict[str, dict] = {"layers scanned": {"unroll": 1}, "everything run again": {"remat": "full"}}
    cases |= {f"attention: {name}": {"attention": name, "unroll": True} for name in IMPLEMENTATIONS}
    return cases | {f"base held as {kind}": {"quant": kind} for kind in quant.BLOCKS}


def long(length: int, steps: int, remat: str = "full") -> Train:
    settings = (f"train.remat={remat}", "train.mlp_chunk=8192")
    return Train("8b", settings, rows=1, length=length, steps=steps, traced=0, limit=76)


UNSLOTH = ("unsloth_lora.py",)
FAST = ("train.unroll=true",)
# by the host's memory: products but the MLP's kept there, or attention's results alone
LEAN = (("train.remat=mlp_offload",), ("train.remat=offload", "train.mlp_chunk=512"))


@dataclasses.dataclass(frozen=True)
class Part:
    minutes: float
    what: str
    run: Callable[[Bench, str], list[Row]]


# worth most first
PARTS: dict[str, Part] = {
    "check": Part(6, "numerics of a LoRA step on this card, before anything else", check_part),
    "8b": Part(
        8,
        "LoRA on Llama-3.1-8B's shapes, bfloat16, 4 × 2048, beside Unsloth's fastest",
        Train("8b", (*FAST, "train.remat=act"), ratio=1.05, peers=(UNSLOTH,)),
    ),
    "1b": Part(
        6,
        "LoRA on Llama-3.2-1B's shapes, bfloat16, 4 × 2048, beside Unsloth and transformers + PEFT + Liger",
        Train("1b", (*FAST, "train.remat=act"), ratio=1.2, peers=(UNSLOTH, ("hf_lora.py",))),
    ),
    "8b-lean": Part(
        8,
        "the same in 17.8 GiB, beside Unsloth with its checkpointing",
        Train(
            "8b",
            (*FAST, "train.loss_chunk=512"),
            LEAN,
            limit=17.8,
            ratio=1.15,
            peers=((*UNSLOTH, "--checkpointing", "unsloth"),),
        ),
    ),
    "8b-nf4": Part(
        8,
        "the same with an NF4 base in 8.2 GiB, beside Unsloth's 4 bits with its checkpointing",
        Train(
            "8b",
            (*FAST, "train.loss_chunk=512", "quant.kind=nf4"),
            LEAN,
            limit=8.2,
            bits=NF4,
            ratio=1.15,
            peers=((*UNSLOTH, "--checkpointing", "unsloth", "--bits", "4"),),
        ),
    ),
    "8b-fp8": Part(
        8,
        "the same with an fp8 base and products of fp8, beside Unsloth's fastest in bfloat16",
        Train(
            "8b",
            (*FAST, "quant.kind=fp8_dynamic", "train.remat=act"),
            bits=8,
            eight_bit=True,
            ratio=1.3,
            peers=(UNSLOTH,),
        ),
    ),
    "packed": Part(
        6,
        "packed documents of real lengths (snips, gsm8k, mt_bench), 1B, one row of 8192 tokens",
        Train(
            "1b", (*FAST, "train.remat=act"), rows=1, length=8192, packed=True, ratio=1.5, peers=(UNSLOTH,)
        ),
    ),
    "decode-1b": Part(
        5, "greedy decoding beside transformers' static cache", functools.partial(decode, size="1b")
    ),
    "decode-8b": Part(7, "the same with 8B", functools.partial(decode, size="8b")),
    "attention": Part(4, "each implementation of attention, forward and backward", attention_part),
    "matmul": Part(2, "products with the base held in each way", matmul_part),
    "compile": Part(8, "seconds until the first step, by train.unroll", compile_part),
    "long-64k": Part(5, "an 8B LoRA step on one document of 65,536 tokens", long(65536, 4)),
    "long-128k": Part(6, "the same with 131,072", long(131072, 3)),
    "long-256k": Part(
        8.9, "the same with 262,144 (134 GiB of the host's memory)", long(262144, 2, "offload")
    ),
}


# -- The table

HEAD = [
    *("date", "card", "part", "case", "unit", "bound", "the bound is", "ftjax", "of the bound", "GiB"),
    *("peer", "peer's", "peer's GiB", "ratio", "goal", "notes", "versions", "command"),
]
INTRODUCTION = """# On a GPU

One line for each case that was run, by `python -m benchmarks.gpu --part NAME`; what has no line was not run.
[docs/performance.md](../../docs/performance.md) says what the parts and the bounds are.
"""
NOT_YET = "\nNot run yet.\n"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def versions() -> str:
    found = []
    for name in ("ftjax", "jax", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    for label, command in (
        ("commit", ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]),
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    ):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
            )
            found.append(f"{label} {done.stdout.split()[0]}")
    return ", ".join([f"python {sys.version.split()[0]}", *found])


def line(row: Row, part: str, card: str, said: str, command: str) -> str:
    """A line of the table."""
    share = f"{row.ours / row.bound:.0%}" if row.ours and row.bound else ""
    ratio = f"{row.ours / row.theirs:.2f}×" if row.ours and row.theirs else ""
    cells = [
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        card,
        part,
        row.case,
        row.unit,
        number(row.bound),
        row.why,
        number(row.ours),
        share,
        number(row.gib),
        row.peer,
        number(row.theirs),
        number(row.peer_gib),
        ratio,
        f"{row.goal}×" if row.goal else "",
        row.note,
        said,
        f"`{command}`",
    ]
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def append(results: pathlib.Path, lines: list[str]) -> None:
    """Add lines to the table; the first ones take the place of the words that it is empty."""
    text = results.read_text() if results.exists() else INTRODUCTION + NOT_YET
    if NOT_YET in text:
        head = f"\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}\n"
        text = text.replace(NOT_YET, head)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(text.rstrip("\n") + "\n" + "".join(one + "\n" for one in lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the parts and the minutes each takes")
    parser.add_argument("--part", action="append", choices=PARTS, help="run this one; may be given again")
    parser.add_argument("--peer-python", default=os.environ.get("FTJAX_PEER_PYTHON"))
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path.home() / ".cache/ftjax/gpu-benchmark"
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that a part runs")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.list or not (args.part or args.worker):
        for name, part in PARTS.items():
            print(f"{name:<12}{part.minutes:>4.3g} min  {part.what}")
        return 0
    if args.worker:
        name, spec = args.worker
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what is printed on the way does not mix with the answer
        try:
            found = WORKERS[name](json.loads(spec))
        except Exception as e:
            traceback.print_exc()
            found = {"error": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(found), file=answers, flush=True)
        return 0
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is for --tiny: the parts' sizes are a GPU's")
    if args.tiny and args.results == RESULTS:
        parser.error("--tiny measures nothing: give it --results of its own")
    # cpu too: `check` compares with it
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if args.device == "cuda" else "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.work / "jax-cache"))
    args.work.mkdir(parents=True, exist_ok=True)
    said, failed = versions(), False
    for name in args.part:
        bench = Bench(args.work, args.tiny, args.peer_python, in_process=args.tiny)
        clock = time.monotonic()
        rows = PARTS[name].run(bench, name)
        lines = [line(row, name, bench.card, said, f"python -m benchmarks.gpu --part {name}") for row in rows]
        append(args.results, lines)
        for row in rows:
            share = f" of {number(row.bound)} possible" if row.bound else ""
            theirs = f"; {row.peer} {number(row.theirs)}" if row.theirs else ""
            print(f"{name}: {row.case}: {number(row.ours)} {row.unit}{share}{theirs} {row.note}", flush=True)
        failed |= any(row.ours is None and not row.note.startswith("right") for row in rows)
        print(f"{name}: {time.monotonic() - clock:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
