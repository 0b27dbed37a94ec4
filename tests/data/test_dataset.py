import dataclasses
import errno
import json
import logging
import os

import numpy as np
import pytest

from ftjax.data import dataset
from ftjax.data.dataset import load
from ftjax.data.options import DataOptions, DataSource
from ftjax.errors import UserError

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def pairs(n, start=0):
    return [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(start, start + n)]


def texts(tokenizer, units):
    return [tokenizer.decode(units.documents(u)[0][0]) for u in range(len(units))]


def test_tokenised_once_then_read_from_the_cache(tiny, write, cache):
    options = DataOptions(write(pairs(300)))
    seen = []
    first = load(options, tiny, lambda path, done, n: seen.append((done, n)))
    assert seen[-1] == (1.0, 300) and len(seen) > 1
    second = load(options, tiny, lambda *a: pytest.fail("tokenised again"))
    assert [d.reports[0].cached for d in (first, second)] == [False, True]
    report = second.reports[0]
    assert (report.format, report.rows, report.units) == ("prompt_completion", 300, 300)
    assert report.tokens == sum(first.train.lengths) and report.longest == max(first.train.lengths)
    for data in (first, second):
        assert texts(tiny, data.train)[7] == (
            "<|im_start|>user\nWhat is 7?<|im_end|>\n<|im_start|>assistant\nIt is 7.<|im_end|>\n"
        )
        assert data.train.where(7) == f"{options.train}:8"
        tokens, weight = data.train.documents(7)[0]
        assert tiny.decode(tokens[weight > 0]) == "It is 7.<|im_end|>"
    assert len(list(cache.iterdir())) == 1


def test_the_cache_key_covers_data_tokenizer_template_and_options(
    tiny, write, cache, generation_template, tmp_path
):
    path = write(pairs(3))
    (tmp_path / "t.jinja").write_text(generation_template)
    options = DataOptions(path)
    load(options, tiny)
    changes = [{"max_length": 99}, {"train_on": "all"}, {"on_bad": "drop"}, {"template_args": {"a": 1}},
               {"chat_template": str(tmp_path / "t.jinja")}, {"format": "prompt_completion"}]  # fmt: skip
    for i, change in enumerate(changes):
        assert not load(dataclasses.replace(options, **change), tiny).reports[0].cached
        assert len(list(cache.iterdir())) == i + 2
    for change in ({"packing": "none"}, {"shuffle": False}, {"eval": path}):
        assert load(dataclasses.replace(options, **change), tiny).reports[0].cached
    write(pairs(3, start=1))
    assert not load(options, tiny).reports[0].cached


def test_damaged_cache_is_made_again(tiny, write, cache, caplog):
    options = DataOptions(write(pairs(3)))
    load(options, tiny)
    (folder,) = cache.iterdir()
    with open(folder / "tokens.bin", "r+b") as f:
        f.truncate(8)
    with caplog.at_level(logging.WARNING, "ftjax"):
        data = load(options, tiny)
    assert "damaged" in caplog.text and len(texts(tiny, data.train)) == 3


def test_no_half_made_cache_is_left(tiny, write, cache, monkeypatch):
    options = DataOptions(write(pairs(3)))

    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(dataset, "_write", full)
        with pytest.raises(UserError, match="is full"):
            load(options, tiny)
    assert not list(cache.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission(tiny, write, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="set FTJAX_CACHE"):
        load(DataOptions(write(pairs(1)), cache_dir=str(tmp_path / "locked")), tiny)


def test_a_cache_folder_that_is_a_file(tiny, write, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write to .* set FTJAX_CACHE"):
        load(DataOptions(write(pairs(1)), cache_dir=str(tmp_path / "file")), tiny)


def test_bad_examples_stop_or_are_counted(tiny, write):
    rows = pairs(4)
    rows[1]["completion"] = ""
    rows[2]["completion"] = "word " * 500
    path = write(rows)
    with pytest.raises(UserError, match=r"data.jsonl:2: completion is empty\n.*on_bad: drop"):
        load(DataOptions(path), tiny)
    report = load(DataOptions(path, on_bad="drop", max_length=100), tiny).reports[0]
    assert report.drops == {"empty_content": 1, "overlong": 1} and report.units == 2
    assert report.first_drop["overlong"].startswith(f"{path}:3: the example has")
    with pytest.raises(UserError, match="every example was left out"):
        load(DataOptions(write(rows[1:2]), on_bad="drop"), tiny)
    rows[1] = rows[0]
    assert load(DataOptions(write(rows), overlong="drop", max_length=100), tiny).reports[0].drops == {
        "overlong": 1
    }


def test_eval_split_stays_when_rows_are_added(tiny, write):
    options = DataOptions(write(pairs(200)), eval_fraction=0.2)
    before = load(options, tiny)
    write(pairs(50, start=1000) + pairs(200))
    after = load(options, tiny)
    old = set(texts(tiny, before.eval))
    assert 20 < len(old) < 60 and not old & set(texts(tiny, before.train))
    assert len(before.train) + len(before.eval) == 200
    assert old <= set(texts(tiny, after.eval))
    assert not old & set(texts(tiny, after.train))


def test_eval_settings(tiny, write):
    path = write(pairs(2))
    other = write(pairs(2, 5), "eval.jsonl")
    assert len(load(DataOptions(path, eval=other), tiny).eval) == 2
    for options, says in [
        (DataOptions(path, eval=other, eval_fraction=0.1), "not both"),
        (DataOptions(path, eval_fraction=1e-9), "leaves none"),
        (DataOptions(path, eval_fraction=0.1, streaming=True), "streaming"),
        (DataOptions(path, buckets=[8, 2048]), "no effect"),
        (DataOptions(path, packing="none", buckets=[8, 16]), "have to be equal"),
        (DataOptions([DataSource(path, weight=1), DataSource(other)]), "every source or for none"),
        (DataOptions([DataSource(path, weight=0), DataSource(other, weight=1)]), "above 0"),
        (DataOptions([]), "empty"),
        (DataOptions(path, max_length=1), "at least 2"),
    ]:
        with pytest.raises(UserError, match=says):
            load(options, tiny)


def test_preference_pairs_are_units_of_two(tiny, write):
    path = write([{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(3)])
    data = load(DataOptions(path), tiny)
    assert data.train.documents_per_unit == 2 and len(data.train) == 3
    chosen, rejected = data.train.documents(1)
    assert tiny.decode(chosen[0][chosen[1] > 0]) == "good 1<|im_end|>"
    assert tiny.decode(rejected[0][rejected[1] > 0]) == "bad<|im_end|>"
    assert data.train.lengths[1] == len(chosen[0]) + len(rejected[0])
    with pytest.raises(UserError, match="can't be mixed"):
        load(DataOptions([DataSource(path), DataSource(write(pairs(2), "b.jsonl"))]), tiny)


def test_fractional_weights_survive_the_cache(tiny, write):
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.25}]
    }
    tokens, weight = load(DataOptions(write([row])), tiny).train.documents(0)[0]
    assert set(np.asarray(weight).tolist()) == {0.0, 0.25} and tokens.dtype == np.int32


def test_long_text_is_split(tiny, tmp_path):
    (tmp_path / "book.txt").write_text("Once upon a time there was a small model. " * 50)
    data = load(DataOptions(str(tmp_path / "book.txt"), max_length=64, overlong="split"), tiny)
    assert len(data.train) > 5 and max(data.train.lengths) == 64
    assert data.reports[0].format == "text" and json.dumps(data.reports[0].drops) == "{}"


@pytest.mark.parametrize("streaming", [False, True])
def test_settings_without_effect_on_what_the_data_is(tiny, write, streaming):
    """Detected formats count as named ones do."""
    text = write([{"text": "Once upon a time."}] * 3, "text.jsonl")
    chats = write(pairs(3))
    preference = write([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3, "preference.jsonl")

    def refused(words, train, **settings):
        with pytest.raises(UserError, match=words):
            load(DataOptions(train, streaming=streaming, **settings), tiny)

    refused("data.train_on: no effect on plain text", text, train_on="all")
    refused("data.chat_template, data.template_args: no effect", text, chat_template="none",
            template_args={"a": 1})  # fmt: skip
    refused("split cuts only plain text, and this data is prompt_completion", chats, overlong="split")
    refused("and this data is preference", preference, overlong="split", train_on="all")
    for settings in (
        dict(train=chats, train_on="all", overlong="split"),
        dict(train=[DataSource(text), DataSource(chats)], train_on="last", overlong="split"),
        dict(train=text, eval=chats, train_on="last"),
        dict(train=text, overlong="split"),
    ):
        load(DataOptions(streaming=streaming, **settings), tiny)
