"""A run that is hurt and goes on: the quick plan of benchmarks.faults, one fault of each of a few kinds, held
against a run of the command line that nothing hurt. The full plan is run on demand."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from ftjax import cli

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
faults = importlib.import_module("benchmarks.faults")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "benchmarks.faults", "--quick", "--folder", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_fault_is_survived(folder):
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == list(faults.QUICK) and len(records) >= 10
    came = {r["kind"]: r["outcome"] for r in records}
    assert all("died" in came[kind] for kind in came if kind.startswith("kill"))
    for kind in ("file size limit", "data file changed", "NaN in a batch", "SIGTERM"):
        assert "stopped; went on from" in came[kind]
    for kind in ("clock jump", "stopped for a while"):
        assert came[kind] == "went on"
    assert "damaged; went on from" in came["bit flipped"]


def test_the_run_is_the_one_that_nothing_hurt(folder):
    """The harness has compared them, too; this is the comparison in short."""
    one, other = (faults.rows(folder / name / "metrics.jsonl") for name in ("run", "reference"))
    assert one == other and len(one) > 300
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert 0 < summary["goodput"] < 1 and {"recomputed", "stopped", "restore"} < set(summary["time"])
    assert (folder / "run" / "report.html").exists()


def test_a_finished_or_different_run_is_not_started_over(folder, capsys):
    words = ["sft", str(folder / "config.yaml"), f"output={folder / 'run'}"]
    adapter = folder / "run" / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    assert cli.main(words) == 2 and "finished" in capsys.readouterr().err
    assert cli.main([*words, "optim.lr=0.01"]) == 2
    assert "optim.lr: 0.003 -> 0.01" in capsys.readouterr().err
    assert adapter.read_bytes() == before


@pytest.mark.fast
def test_the_plan_is_repeatable_and_has_every_kind():
    plan = faults.plan(220, 1)
    assert plan == faults.plan(220, 1) != faults.plan(220, 2) and len(plan) == 220
    assert {fault.kind for fault in plan} == {*faults.KINDS, *faults.FIRST, *faults.LAST}


@pytest.mark.fast
@pytest.mark.parametrize("harm", ["other loss", "twice", "missing"])
def test_the_harness_sees_what_is_wrong(tmp_path, harm):
    lines = [{"kind": "train", "step": step, "loss": 3.0 / step} for step in (1, 2, 3)]
    harness = faults.Harness(tmp_path, None, 1)
    harness.wants = {("train", line["step"]): {"loss": line["loss"]} for line in lines}
    harness.run.mkdir()

    def check(lines):
        (harness.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        harness.check()

    check(lines)
    bad = {
        "other loss": [lines[0], lines[1] | {"loss": 1.5000001}, lines[2]],
        "twice": [*lines, lines[2]],
        "missing": [lines[0], lines[2]],
    }
    with pytest.raises(faults.Failed):
        check(bad[harm])
