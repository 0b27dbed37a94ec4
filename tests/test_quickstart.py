"""The quickstart as a user runs it, on the real model: the gain must be there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

MODEL = os.environ.get("FTJAX_TEST_SMOLLM2", "")


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path(MODEL).is_file(), reason="FTJAX_TEST_SMOLLM2 names no GGUF file")
def test_quickstart_shows_the_gain(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "ftjax", "quickstart", "--model", MODEL, "--output", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    scores = json.loads((run / "scores.json").read_text())
    instructed, few_shot, tuned = (row["cells"][0] for row in scores["rows"])
    assert tuned["low"] > few_shot["high"] and tuned["value"] > 0.5, scores
    assert "Tuning helps here" in scores["notes"][0]  # the paired interval excludes zero
    for name in ("report.html", "loss.png", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (run / name).stat().st_size > 1000
    report = (run / "report.html").read_text()
    assert "Held-out test" in report and 'src="http' not in report
