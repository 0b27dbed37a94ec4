"""The GPU comparisons, where there is no GPU: every part's settings are a run's, its bound can be computed,
and the parts run at toy sizes on the CPU. That says nothing of their speed on a card."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
gpu = importlib.import_module("benchmarks.gpu")
bounds = importlib.import_module("benchmarks.bounds")

import tpu  # noqa: E402

from ftjax import config, flops, lora, mesh, models, plan  # noqa: E402
from ftjax.recipes import program, sft  # noqa: E402

H100 = flops.device(gpu.H100)
assert H100 is not None
TRAIN = {name: part.run for name, part in gpu.PARTS.items() if isinstance(part.run, gpu.Train)}


def run(*words, **env):
    """The command, in a process with one CPU device."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "FTJAX_PEER_PYTHON")}
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(
        command, cwd=ROOT, env=clean | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.fast
def test_the_list_says_what_each_part_takes(capsys):
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PARTS)
    assert all(part.minutes < 9 for part in gpu.PARTS.values()) and gpu.LIMIT <= 9 * 60


@pytest.mark.fast
@pytest.mark.parametrize("name", TRAIN)
def test_a_part_is_a_run_that_can_be_asked_for(name):
    """With the settings that run_sft adds."""
    part = TRAIN[name]
    for variant in part.variants:
        assert settings_of(part, variant).lora is not None


def settings_of(part, variant):
    how = ["data.chat_template=none"] if part.packed else ["data.overlong=split"]
    given = [
        "model=m",
        "data.train=d.jsonl",
        f"data.max_length={part.length}",
        f"train.batch_size={part.rows}",
    ]
    return config.load(None, [*given, *how, *part.settings, *variant], "sft")


@tpu.needs_libtpu
@pytest.mark.parametrize("name", ["8b-lean", "8b-nf4", "long-256k"])
def test_a_part_that_is_held_to_a_memory_leaves_room_in_it(name):
    """By count: what is there before the step, what the layers keep, the logits of a chunk, one layer's work
    (twice the MLP's three wide arrays, of as many tokens as go through it at a time)."""
    part = TRAIN[name]
    for variant in part.variants:
        cfg = settings_of(part, variant)
        model = program.with_options(models.from_config(gpu.SHAPES[part.size]), cfg)
        device = mesh.make_mesh(mesh.MeshOptions(fsdp=1), tpu.devices("v5p:2x2x1")[:1])
        step = program.plan_step(cfg, model, sft.make_loss, device)
        held = plan.bytes_held((step.state, step.frozen, step.batch))
        logits = 6 * cfg.train.loss_chunk * model.config.vocab_size
        tokens = part.rows * min(part.length, cfg.train.mlp_chunk or part.length)
        work = 2 * 3 * 2 * tokens * model.config.intermediate_size
        assert (held + plan.kept_bytes(step) + logits + work) / 2**30 < part.limit, variant


def bound(size: str, rows: int, length: int, **more):
    model = models.from_config(gpu.SHAPES[size])
    plan = lora.plan(lora.LoraConfig(r=16), model.table)
    work = flops.Work.rows(rows, length)
    return work.trained / bounds.train_step(model, plan, work, H100, **more).total


@pytest.mark.fast
def test_bounds_of_an_h100():
    """By arithmetic done apart: 4 · 6.98e9 weights · 8192 tokens and so on at 751 TFLOP/s is 330 ms,
    attention 43, 125 GB of elementwise passes 41, 50 GB of LoRA's reads 17."""
    assert bound("8b", 4, 2048) == pytest.approx(19_000, rel=0.01)
    assert bound("1b", 4, 2048) == pytest.approx(101_150, rel=0.01)
    assert bound("8b", 4, 2048, eight_bit=True) == pytest.approx(25_850, rel=0.01)
    # everything run again: the forward pass of the layers, 187 ms, once more; with memory for all, nothing
    none, lots = (bound("8b", 4, 2048, room=x * bounds.GIB) for x in (0, 200))
    assert lots == bound("8b", 4, 2048) and none < lots
    lean = bound("8b", 4, 2048, room=17.8 * bounds.GIB)
    assert none < lean < lots
    model = models.from_config(gpu.SHAPES["8b"])
    step = bounds.decode_step(model, H100, 64, 128 + 256)
    # 7.5e9 weights and 64 · 384 · 131,072 bytes of cache at 3.0 TB/s
    assert 64 / step.total == pytest.approx(64 / ((15.01e9 + 3.22e9) / 3.015e12), rel=0.01)


@pytest.mark.fast
def test_lengths_are_of_real_examples():
    pairs = gpu.packed_pairs(tiny=False)
    total = [a + b for a, b in pairs]
    assert len(pairs) == 760 and min(min(pair) for pair in pairs) > 0 and 800 < max(total) < 2048
    work = TRAIN["packed"].work({"rows": 1, "length": 8192}, tiny=False)
    assert 0.9 < work.tokens / work.positions <= 1 and 0.3 < work.trained / work.tokens < 0.9


@pytest.mark.fast
def test_the_table(tmp_path):
    assert gpu.NOT_YET in gpu.RESULTS.read_text() or "| date |" in gpu.RESULTS.read_text()
    file = tmp_path / "gpu.md"
    row = gpu.Row("a | case", bound=200.0, ours=100.0, peer="Unsloth", theirs=80.0, goal=1.2)
    blank = gpu.Row("another", note="failed")
    gpu.append(file, [gpu.line(row, "1b", "H100", "jax 1", "python -m x")])
    gpu.append(file, [gpu.line(blank, "1b", "H100", "jax 1", "python -m x")])
    lines = file.read_text().splitlines()
    assert gpu.NOT_YET.strip() not in lines
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [len(cells) for cells in table] == [len(gpu.HEAD)] * 4
    first, second = (dict(zip(gpu.HEAD, cells, strict=True)) for cells in table[2:])
    assert (first["of the bound"], first["ratio"], first["goal"]) == ("50%", "1.25×", "1.2×")
    assert second["ftjax"] == second["ratio"] == second["peer"] == "" and second["notes"] == "failed"


@pytest.mark.fast
def test_a_peer_that_is_missing_or_fails_is_blank(tmp_path):
    for python in (None, str(tmp_path / "no-python"), sys.executable):
        bench = gpu.Bench(tmp_path, True, python)
        assert bench.peer("no_such_program.py") == {}
    slow = gpu.Bench(tmp_path, True, sys.executable, deadline=0.0)
    assert slow._run([sys.executable, "-c", "import time; time.sleep(60)"], {}) == {"error": "took too long"}


@pytest.mark.fast
def test_sizes_of_a_gpu_are_refused_without_one():
    for words in (["--device", "cpu", "--part", "1b"], ["--device", "cpu", "--tiny", "--part", "1b"]):
        with pytest.raises(SystemExit):
            gpu.main(words)


def test_parts_run_at_toy_sizes(tmp_path):
    parts = ["check", "1b", "8b-lean", "packed", "decode-1b", "attention", "matmul"]
    words = [word for name in parts for word in ("--part", name)]
    results = tmp_path / "gpu.md"
    where = ["--work", str(tmp_path), "--results", str(results)]
    done = run("--device", "cpu", "--tiny", *where, *words, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stdout[-4000:]
    lines = [line for line in results.read_text().splitlines() if line.startswith("| 2")]
    rows = [dict(zip(gpu.HEAD, (c.strip() for c in line.split("|")[1:-1]), strict=True)) for line in lines]
    assert {row["part"] for row in rows} == set(parts)
    for row in rows:
        if row["part"] == "check":
            assert row["notes"].startswith("right: relative error"), row
        else:
            assert row["ftjax"], row
            assert (row["bound"] and row["the bound is"]) or "with prefill" in row["case"], row
    profile = json.loads((tmp_path / "runs" / "1b" / "profile.json").read_text())
    assert profile["tokens"] == profile["positions"] == 64  # rows are full
