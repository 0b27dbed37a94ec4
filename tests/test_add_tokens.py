"""ftjax add-tokens: the model says the same, and the new rows begin at the mean."""

import pathlib

import numpy as np
import pytest

from ftjax import cli, hf, models, weights

ASSETS = pathlib.Path(__file__).parent / "assets"
pytestmark = pytest.mark.fast


def test_new_tokens(tmp_path, capsys):
    base, out = ASSETS / "tiny_model", tmp_path / "out"
    argv = ["add-tokens", str(base), "<call>", "</call>", "--special", "--output", str(out)]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    old, new = hf.open_model(base), hf.open_model(out)
    tokenizer = hf.load_tokenizer(new)
    ids = tokenizer.convert_tokens_to_ids(["<call>", "</call>"])
    assert f"lora.trainable_token_indices={ids}" in said and "re-opened: max |Δlogit| 0" in said
    assert tokenizer.encode("a<call>b", add_special_tokens=False)[1] == ids[0]
    model, larger = models.from_config(old.config), models.from_config(new.config)
    assert larger.config.vocab_size == max(model.config.vocab_size, ids[-1] + 1)
    before, after = hf.load_params(old, model), hf.load_params(new, larger)
    used = ids[0]
    tables = [path for path in model.table.rows if "V" in model.table.dims(path)]
    assert tables
    for path in model.table.rows:
        a, b = (np.asarray(weights.flatten(tree)[path]) for tree in (before, after))
        if path not in tables:
            np.testing.assert_array_equal(a, b)
            continue
        axis = model.table.dims(path).index("V")
        a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
        np.testing.assert_array_equal(a[:used], b[:used])
        for i in ids:
            np.testing.assert_allclose(b[i], a[:used].mean(0), atol=1e-6)
    assert cli.main(["add-tokens", str(out), "<call>", "--output", str(tmp_path / "again")]) == 2
    assert "its tokenizer has '<call>' already" in capsys.readouterr().err


def test_only_those_tokens_train(tmp_path):
    """From new tokens to a tuned adapter: of the embedding, nothing but their rows changes."""
    import json

    out = tmp_path / "base"
    assert (
        cli.main(
            ["add-tokens", str(ASSETS / "tiny_model"), "<call>", "--multiple-of", "8", "--output", str(out)]
        )
        == 0
    )
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "<call> ran"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    (new,) = hf.load_tokenizer(hf.open_model(out)).convert_tokens_to_ids(["<call>"])
    run = tmp_path / "run"
    settings = dict(
        model=out, output=run, train="{max_steps: 2, batch_size: 4, dtype: float32}", mesh="{fsdp: 4, tp: 2}",
        lora=f"{{r: 2, target_modules: [q_proj], trainable_token_indices: [{new}]}}",
        report="{tensorboard: false}", optim="{lr: 0.1}",
        data=f"{{train: {tmp_path / 'train.jsonl'}, max_length: 64, cache_dir: {tmp_path / 'cache'}}}",
    )  # fmt: skip
    assert cli.main(["sft", *(f"{k}={v}" for k, v in settings.items())]) == 0
    assert cli.main(["export", str(run), "--for", "hf"]) == 0
    a, b = (hf.open_model(x).get("model.embed_tokens.weight") for x in (out, run / "export/hf"))
    changed = np.flatnonzero(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max(1))
    assert changed.tolist() == [new]
