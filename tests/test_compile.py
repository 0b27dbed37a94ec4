"""What a run compiles, counted: one program for each shape, none twice, and none anew in a second run."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest
from jax import monitoring
from test_training import MODEL, folder, ftjax, write  # noqa: F401  (fixtures)

COUNTED = collections.Counter()
ON = []


def _count(event, seconds, **facts):
    if ON and event.endswith("backend_compile_duration"):
        COUNTED[facts.get("fun_name", "").removeprefix("jit(").removesuffix(")")] += 1


monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture
def compiled():
    """Programs compiled (or read from the cache) since, by the name of their function."""
    COUNTED.clear()
    ON.append(True)
    yield COUNTED
    ON.clear()


SETTINGS = (
    "mesh.tp=2 data.eval_fraction=0.2 eval.every=2 train.microbatches=2 checkpoint.every=2 optim.lr=1e-3"
)


def test_one_program_to_train_and_one_to_evaluate(ftjax, compiled):  # noqa: F811
    """With microbatches, a mesh, evaluations, checkpoints and the best one read back."""
    code, said = ftjax("sft", "lora.r=4", "train.max_steps=6", *SETTINGS.split())
    assert code == 0 and "compiled in" in said, said
    assert (compiled["train_step"], compiled["eval_step"]) == (1, 1), compiled
    assert json.loads(pathlib.Path("run/summary.json").read_text())["compile_seconds"] > 0
    first = sum(compiled.values())
    compiled.clear()
    code, said = ftjax("sft", "lora.r=4", "train.max_steps=9", *SETTINGS.split(), "--resume")
    assert code == 0 and "going on from the checkpoint" in said, said
    assert (compiled["train_step"], compiled["eval_step"]) == (1, 1), compiled
    assert sum(compiled.values()) <= first + 5


@pytest.mark.parametrize("kept", ["optim.state_dtype=bfloat16", "optim.offload=true"])
def test_full_tuning_and_moments_kept_otherwise(ftjax, compiled, kept):  # noqa: F811
    code, said = ftjax("sft", "lora=null", kept, "train.max_steps=4", "mesh.tp=2", "optim.lr=1e-3")
    assert code == 0, said
    assert compiled["train_step"] == 1, compiled


def test_one_for_each_bucket_and_one_for_mixtures(ftjax, compiled):  # noqa: F811
    write("long.jsonl", [{"text": "the cat sat on a mat " * (1 + i % 6)} for i in range(32)])
    mix = "data.train=[{path: chat.jsonl, weight: 3}, {path: long.jsonl, weight: 1}]"
    code, said = ftjax("sft", mix, "train.max_steps=6")
    assert code == 0 and compiled["train_step"] == 1, (said, compiled)
    compiled.clear()
    buckets = ["data.packing=none", "data.buckets=[16, 32, 64]", "output=b", "train.max_steps=12"]
    code, said = ftjax("sft", mix, *buckets)
    assert code == 0 and 2 <= compiled["train_step"] <= 3, (said, compiled)


def test_preference_data(ftjax, compiled):  # noqa: F811
    code, said = ftjax("dpo", "train.max_steps=4", "data.eval_fraction=0.2", "eval.every=2")
    assert code == 0, said
    assert (compiled["train_step"], compiled["eval_step"]) == (1, 1), compiled


RUN = """
import collections, json, sys
from ftjax import cli
cli.environment_defaults()
from jax import monitoring
found = collections.Counter()
monitoring.register_event_listener(lambda event, **facts: found.update([event.rpartition("/")[2]]))
code = cli.main(sys.argv[1:])
print(json.dumps({"code": code} | found))
"""


def test_a_second_run_compiles_nothing_anew(folder):  # noqa: F811
    """In processes of their own, with the command line's own settings and an empty cache."""
    drop = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    env = {k: v for k, v in os.environ.items() if k not in drop} | {"FTJAX_CACHE": str(folder / "cache")}

    def run(output, **more):
        words = (
            f"sft model={MODEL} output={output} data.train=chat.jsonl data.max_length=64 train.max_steps=3 "
        )
        words += "train.dtype=float32 data.eval_fraction=0.2 report.tensorboard=false"
        command = [sys.executable, "-c", RUN, *words.split()]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["code"] == 0, done.stdout + done.stderr
        return found

    cold, warm = run("one"), run("two")
    assert cold["cache_misses"] > 5 and not cold.get("cache_hits", 0) > cold["cache_misses"]
    assert warm.get("cache_misses", 0) == 0 and warm["cache_hits"] > 5, warm
    assert any((folder / "cache" / "jax").iterdir())
