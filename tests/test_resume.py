"""Runs that are killed and go on: the real command line in its own process, on a tiny model."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
STEPS = 240


def command(output, *overrides):
    return [
        sys.executable,
        "-m",
        "ftjax",
        "sft",
        str(output.parent / "config.yaml"),
        f"output={output}",
        *overrides,
    ]


def environment():
    """One device, as a user has; the compilation cache of the test session."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return env | {"JAX_PLATFORMS": "cpu", "FTJAX_TRACEBACK": "1"}


def run(output, *overrides, expect=0, **options):
    done = subprocess.run(
        command(output, *overrides), env=environment(), capture_output=True, text=True, timeout=240, **options
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(output) -> dict[int, float]:
    """{step: loss}; a step that was written twice fails."""
    found = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "train":
            assert row["step"] not in found
            found[row["step"]] = row["loss"]
    return found


def weights(output) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    rng = random.Random(0)
    words = "the cat dog sun big red ran sat and saw".split()
    with open(folder / "train.jsonl", "w") as f:
        for _ in range(64):
            messages = [
                {"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(2, 8)))},
                {"role": "assistant", "content": " ".join(rng.choices(words, k=rng.randint(1, 6)))},
            ]
            f.write(json.dumps({"messages": messages}) + "\n")
    (folder / "config.yaml").write_text(f"""
model: {HERE / "assets" / "tiny_model"}
data: {{train: {folder / "train.jsonl"}, eval_fraction: 0.1, max_length: 64, cache_dir: {folder / "cache"}}}
lora: {{r: 4, lora_dropout: 0.1}}
train: {{max_steps: {STEPS}, batch_size: 4, microbatches: 2, dtype: float32, neftune_alpha: 1.0}}
eval: {{every: 60}}
optim: {{lr: 0.003, warmup_steps: 5}}
checkpoint: {{every: 15}}
report: {{tensorboard: false}}
""")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing disturbs."""
    output = folder / "whole"
    run(output)
    assert sorted(losses(output)) == list(range(1, STEPS + 1))
    return output


def same(output, whole):
    assert losses(output) == losses(whole), "losses differ from those of the run that was never stopped"
    assert weights(output) == weights(whole)


def start_and_wait_for(output, step, *overrides):
    """A running process whose metrics have passed `step`."""
    process = subprocess.Popen(
        command(output, *overrides),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 200
    metrics = output / "metrics.jsonl"
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return process
        time.sleep(0.005)
    raise AssertionError(f"never came to step {step}: {process.communicate()[0]}")


def test_sigkill_at_random_steps(folder, whole):
    output = folder / "killed"
    rng = random.Random(int.from_bytes(os.urandom(2)))
    for step in sorted(rng.sample(range(20, STEPS - 40), 2)):
        process = start_and_wait_for(output, step)
        process.kill()
        process.wait()
    assert "going on from the checkpoint of step" in run(output)
    same(output, whole)


def test_sigterm_saves_first(folder, whole):
    output = folder / "terminated"
    process = start_and_wait_for(output, 40)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    stopped = max(losses(output))
    assert f"stopped by SIGTERM after step {stopped}" in said
    assert f"going on from the checkpoint of step {stopped}" in run(output)
    same(output, whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder, whole):
    output = folder / "damaged"
    process = start_and_wait_for(output, 70)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    steps = sorted(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())
    largest = max(
        (p for p in (output / "checkpoints" / str(steps[-1])).rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[:-7])
    said = run(output)
    assert f"checkpoint {steps[-1]} is damaged" in said
    assert f"going on from the checkpoint of step {steps[-2]}" in said
    same(output, whole)


def test_a_full_disk_is_said_and_costs_nothing_saved(folder, whole):
    """A file-size limit makes every write of a checkpoint fail as a full disk does: in the middle."""
    output = folder / "full"
    process = start_and_wait_for(output, 40)
    process.kill()
    process.wait()
    limited = f"ulimit -f 12; exec {' '.join(command(output))}"
    done = subprocess.run(
        ["bash", "-c", "trap '' XFSZ; " + limited],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    # whichever came to the limit first: a checkpoint, or the file of metrics
    assert done.returncode in (1, 2) and "Traceback" in done.stderr, (
        done.stderr
    )  # asked for by the environment
    assert "could not be written" in done.stderr or "may not grow" in done.stderr, done.stderr
    assert "intact" in done.stderr
    run(output)
    same(output, whole)


def test_a_finished_or_different_run_is_not_started_over(folder, whole):
    before = weights(whole)
    assert "finished" in run(whole, expect=2)
    assert "optim.lr: 0.003 -> 0.01" in run(whole, "optim.lr=0.01", expect=2)
    assert weights(whole) == before


def test_changed_data_is_refused(folder, whole):
    output = folder / "changed"
    process = start_and_wait_for(output, 30)
    process.kill()
    process.wait()
    data = folder / "train.jsonl"
    original = data.read_text()
    try:
        data.write_text(original + original.splitlines()[0].replace("the", "sun") + "\n")
        assert "the training data changed since this run began" in run(output, expect=2)
    finally:
        data.write_text(original)
    shutil.rmtree(output)
