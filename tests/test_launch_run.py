"""A real run, on a tiny model, through the launch scripts: its slice is taken away and it goes on on the next
one. The cloud is that of test_launch, a bucket a folder."""

import json
import pathlib
import sys

from test_launch import Cloud, script

ROOT = pathlib.Path(__file__).parent.parent
# The command line itself; the first slice is taken away when the bucket has the checkpoint of step 10.
FTJAX = """#!/bin/bash
if [[ $1 != --version && ! -e $FAKE_TPU/taken ]]; then
    (until [[ -d $FAKE_TPU/buckets/b/r/checkpoints/10 ]]; do sleep 0.05; done
     touch "$FAKE_TPU/taken" ~/preempt) &
fi
export PYTHONPATH={root} JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR={cache}
exec {python} -m ftjax "${{@//gs:\\/\\//$FAKE_TPU/buckets/}}"
"""
CONFIG = """
model: {root}/tests/assets/tiny_model
data: {{train: data/train.jsonl, max_length: 64}}
lora: {{r: 4, lora_dropout: 0.1}}
train: {{max_steps: 40, batch_size: 4, dtype: float32}}
checkpoint: {{every: 5}}
report: {{tensorboard: false}}
"""


def test_a_real_run_goes_on_on_another_slice(tmp_path):
    cloud = Cloud(tmp_path)
    cloud.patience = 500
    del cloud.env["FTJAX_KEEP_TICKS"]  # the copies of the run folder are as far apart as they are
    cache = pathlib.Path.home() / ".cache/ftjax/jax"
    script(FTJAX.format(root=ROOT, python=sys.executable, cache=cache), tmp_path / "ftjax")
    (tmp_path / "run.yaml").write_text(CONFIG.format(root=ROOT))
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data/train.jsonl", "w") as f:
        for i in range(32):
            asks, says = (
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{i} it is"},
            )
            f.write(json.dumps({"messages": [asks, says]}) + "\n")
    words = ["demo", "--type=v5e-4", "--spot", "--queued", "--commit=HEAD", "--send=run.yaml", "--send=data"]
    text = cloud.run("keep_running", *words, "--bucket", "gs://b/r", "--delete", "--", "sft", "run.yaml")
    assert "try 1 of 20 ended (run.sh: 4)" in text and "try 2" not in text
    assert "the run folder is as it was kept in gs://b/r" in text
    assert "going on from the checkpoint of step " in text and "The run is done." in text
    kept = tmp_path / "buckets/b/r"
    rows = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [*range(1, 41)]  # none lost, none twice
    assert (kept / "adapter/adapter_model.safetensors").is_file() and (kept / "report.html").is_file()
    assert not cloud.state()["nodes"] and not list((tmp_path / "homes").glob("*"))
