"""Losses of a tiny run, kept in a file: a change that moves them says so in its commit.

python tests/test_golden.py writes the file anew.
"""

import json
import pathlib
import re

import jax
import numpy as np
import optax

import ftjax
from ftjax import lora, train
from ftjax.data import dataset, loader, options
from ftjax.objectives.sft import sft_loss

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden" / "sft.json"
WORDS = "the cat sat on a mat and the dog ran to it".split()


def rows():
    for i in range(24):
        question = " ".join(WORDS[i % 5 : i % 5 + 2 + i % 4])
        answer = " ".join(reversed(WORDS[i % 7 : i % 7 + 3]))
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def run(folder: pathlib.Path) -> list[float]:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    model, base, tokenizer = ftjax.load(HERE / "assets" / "tiny_model")
    data = options.DataOptions(train=str(path), max_length=64, cache_dir=str(folder / "cache"))
    batches = loader.Loader(dataset.load(data, tokenizer).train, data, batch_size=4, microbatches=2).batches()
    plan = lora.plan(lora.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1), model.table)

    def params_of(trainable, frozen, rng):
        return lora.attach(frozen, trainable, plan, rng=rng, dropout=0.1)

    tx = optax.adamw(1e-2)
    step = train.make_train_step(sft_loss(model, params_of, chunk=16, frozen_head=True), tx, seed=0)
    state = train.init_state(lora.init(jax.random.key(0), plan, model.table), tx)
    losses = []
    for _ in range(6):
        state, metrics = step(state, base, next(batches))
        losses.append(float(metrics["loss"]))
    return losses


def test_losses_are_the_golden_ones(tmp_path):
    # float32 sums are ordered differently on other processors, hence not bit for bit
    np.testing.assert_allclose(run(tmp_path), json.loads(GOLDEN.read_text()), rtol=2e-4)


def test_the_library_page_runs(tmp_path, monkeypatch):
    """docs/library.md as it stands, on the tiny model."""
    page = (HERE.parent / "docs" / "library.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(HERE / "assets" / "tiny_model"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    exec(compile(code, "docs/library.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 1000


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps([round(x, 7) for x in run(pathlib.Path(folder))]) + "\n")
