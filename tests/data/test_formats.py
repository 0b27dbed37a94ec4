import gzip
import json

import pytest

from ftjax.data.examples import BadExample, content_hash, examples, to_record
from ftjax.data.formats import detect
from ftjax.data.options import DataSource
from ftjax.data.read import rows
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def read(path, **kw):
    return [e for _, e in examples(DataSource(str(path), **kw))]


def fails(path, **kw):
    with pytest.raises(UserError) as e:
        for _, example in examples(DataSource(str(path), **kw)):
            if isinstance(example, BadExample):
                raise example
    return str(e.value)


@pytest.mark.parametrize(
    "row, name",
    [
        (CHAT, "chat"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "response": "b"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": CHAT["messages"], "rejected": CHAT["messages"]}, "preference"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "openai_preference"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "hh"),
    ],
)
def test_format_is_detected(row, name):
    assert detect(row, "f:1") == name


def test_the_same_rows_from_every_kind_of_file(tmp_path, write):
    data = [{"prompt": f"say {i}, or “{i}”", "completion": f"line one\nline {i}"} for i in range(5)]
    paths = [write(data)]
    (tmp_path / "a.json").write_text(json.dumps(data, indent=2))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(r) for r in data))
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as f:
        f.write("\n".join(json.dumps(r) for r in data))
    import csv

    with open(tmp_path / "c.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(data)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(data), tmp_path / "p.parquet")
    paths += [str(tmp_path / n) for n in ("a.json", "lines.json", "z.jsonl.gz", "c.csv", "p.parquet")]
    for path in paths:
        got = [row.values for row in rows(DataSource(path))]
        assert got == data, path
    assert [r.line for r in rows(DataSource(paths[0]))] == [1, 2, 3, 4, 5]
    assert [r.line for r in rows(DataSource(str(tmp_path / "a.json")))] == [2, 6, 10, 14, 18]
    assert [r.line for r in rows(DataSource(str(tmp_path / "c.csv")))] == [2, 4, 6, 8, 10]


def test_a_saved_dataset_and_its_split(tmp_path):
    import datasets

    data = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])})
    data["test"] = datasets.Dataset.from_list([{"prompt": "c", "completion": "d"}])
    data.save_to_disk(str(tmp_path / "saved"))
    (example,) = read(tmp_path / "saved", split="test")
    assert example.raw == ("c", "d")
    assert "no split 'dev'" in fails(tmp_path / "saved", split="dev")
    streamed = [e for _, e in examples(DataSource(str(tmp_path / "saved")), streaming=True)]
    assert streamed[0].raw == ("a", "b")


def test_columns_are_renamed(tmp_path):
    (tmp_path / "b.csv").write_text("question,answer\nwhy?,because\n")
    (example,) = read(tmp_path / "b.csv", columns={"prompt": "question", "completion": "answer"})
    assert example.raw == ("why?", "because")
    assert "did you mean 'question'" in fails(tmp_path / "b.csv", columns={"prompt": "questoin"})


def test_file_errors_name_file_and_line(tmp_path, write):
    write([CHAT], "train.jsonl")
    assert "did you mean" in (m := fails(tmp_path / "trian.jsonl")) and "train.jsonl" in m
    assert "no folder" in fails(tmp_path / "no" / "x.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "holds no examples" in fails(tmp_path / "empty.jsonl")
    (tmp_path / "empty.json").write_text("[ ]")
    assert "holds no examples" in fails(tmp_path / "empty.json")
    (tmp_path / "broken.jsonl").write_text(json.dumps(CHAT) + "\n\n" + '{"messages": [}\n')
    assert "broken.jsonl:3: broken JSON at column 15" in fails(tmp_path / "broken.jsonl")
    (tmp_path / "broken.json").write_text('[\n {"text": "a"},\n {"text": b}\n]')
    assert "broken.json:3: broken JSON at column 11" in fails(tmp_path / "broken.json")
    (tmp_path / "cut.json").write_text('[\n {"text": "a"}\n {"text": "b"}]')
    assert "cut.json:3: broken JSON" in fails(tmp_path / "cut.json")
    (tmp_path / "array.jsonl").write_text(json.dumps(CHAT) + "\n[1]\n")
    assert "array.jsonl:2: each example has to be a JSON object" in fails(tmp_path / "array.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "latin.jsonl:1: not UTF-8" in fails(tmp_path / "latin.jsonl")
    (tmp_path / "short.csv").write_text("prompt,completion\na,b\nc\n")
    assert "short.csv:3" in fails(tmp_path / "short.csv")
    (tmp_path / "not.parquet").write_text("x")
    assert "not a readable Parquet file" in fails(tmp_path / "not.parquet")
    (tmp_path / "x.docx").write_text("x")
    assert "unknown kind of file" in fails(tmp_path / "x.docx")


def test_unknown_and_mixed_formats(write):
    message = fails(write([{"ask": "a", "reply": "b"}]))
    assert "data.jsonl:1: unknown format, with the keys ask, reply" in message and "columns" in message
    message = fails(write([CHAT, CHAT, {"text": "a"}]))
    assert "data.jsonl:3: mixed formats: this row is text" in message and "began as chat" in message
    assert "did you mean 'alpaca'" in fails(write([CHAT]), format="alpacca")
    assert "messages missing" in fails(write([{"text": "a"}]), format="chat")


@pytest.mark.parametrize(
    "messages, reason, says",
    [
        ([{"role": "user", "content": "a"}], "no_assistant", "nothing to train on"),
        ([{"role": "asistant", "content": "a"}], "wrong_role", "did you mean 'assistant'"),
        ([{"role": "human", "content": "a"}], "wrong_role", "did you mean 'user'"),
        ([{"role": "user", "content": ""}], "empty_content", "messages[0] (user)"),
        ([{"role": "assistant", "content": None}], "empty_content", "no tool_calls"),
        ([], "format", "not empty"),
        ([{"role": "assistant", "content": "a", "weight": -1}], "format", "weight is -1"),
        ([{"role": "user", "content": "a", "weight": 1}], "wrong_role", "only assistant"),
        ([{"role": "assistant", "content": [{"type": "image_url"}]}], "format", "image_url"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "format",
            "is no JSON",
        ),
    ],
)
def test_bad_messages(messages, reason, says):
    with pytest.raises(BadExample, match="^f.jsonl:7: ") as e:
        to_record({"messages": messages}, "chat", "f.jsonl:7")
    assert e.value.reason == reason and says in str(e.value)


def test_messages_come_in_one_form():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"z": 1, "a": {"y": null}}'}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "hm", "weight": 0.5},
        ],
        "tools": '[{"type": "function"}]',
    }
    example = to_record(row, "chat", "f:1")
    user, answer = example.messages
    assert user["content"] == "ab" and example.tools == [{"type": "function"}]
    assert list(answer["tool_calls"][0]["function"]["arguments"]) == ["z", "a"]
    assert answer["reasoning_content"] == "hm" and answer["weight"] == 0.5 and answer["content"] == ""


def test_preference_rows_share_their_prompt():
    asked, good, bad = "q", "good", "bad"
    chats = [{"role": "user", "content": asked}], {"role": "assistant"}
    openai = {
        "input": {"messages": chats[0]},
        "preferred_output": [{**chats[1], "content": good}],
        "non_preferred_output": [{**chats[1], "content": bad}],
    }
    whole = [chats[0] + openai[k] for k in ("preferred_output", "non_preferred_output")]
    rows_ = [
        ({"prompt": asked, "chosen": good, "rejected": bad}, "preference"),
        ({"prompt": chats[0], "chosen": good, "rejected": bad}, "preference"),
        ({"chosen": whole[0], "rejected": whole[1]}, "preference"),
        (openai, "openai_preference"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, "hh"),
    ]
    for row, name in rows_:
        assert detect(row, "") == name
        example = to_record(row, name, "f:1")
        assert [m["content"] for m in example.messages] == ["q"]
        assert [m["content"] for m in example.chosen + example.rejected] == ["good", "bad"]


def test_hh_dialogues_of_several_turns():
    chosen = "\n\nHuman: a\n\nmore\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    example = to_record({"chosen": chosen, "rejected": chosen[:-1] + "e"}, "hh", "f:1")
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("user", "a\n\nmore"), ("assistant", "b"), ("user", "c")]  # fmt: skip
    assert example.messages[1]["weight"] == 0  # context
    with pytest.raises(BadExample, match="the same"):
        to_record({"chosen": chosen, "rejected": chosen}, "hh", "f:1")


def test_arrow_nulls_do_not_reach_arguments(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def row(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}

    pq.write_table(pa.Table.from_pylist([row({"a": 1}), row({"b": 2})]), tmp_path / "p.parquet")
    assert "nulls, which Arrow adds" in fails(tmp_path / "p.parquet")
    pq.write_table(pa.Table.from_pylist([row('{"a": 1}'), row('{"b": 2}')]), tmp_path / "s.parquet")
    got = [e.messages[1]["tool_calls"][0]["function"]["arguments"] for e in read(tmp_path / "s.parquet")]
    assert got == [{"a": 1}, {"b": 2}]


def test_rows_labelled_good_or_bad_are_not_taken_for_good(write):
    assert "data.jsonl:1: the key `label`" in fails(write([{**CHAT, "label": False}]))
    assert read(write([{**CHAT, "label": False}]), format="chat")
    assert read(write([{**CHAT, "label": "greeting"}]))


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "q"}, "data.jsonl:1: this row is prompt_only"),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, "data.jsonl:1: this row is stepwise"),
        ({"instruction": "q", "output": "a", "kto_tag": True}, "data.jsonl:1: this row is unpaired"),
        ({"task": "prompt_only", "messages": [{"role": "user", "content": "q"}]}, "is prompt_only"),
    ],
)
def test_rows_that_ask_for_other_training_are_refused(write, row, says):
    assert says in fails(write([row]))


def test_canonical_rows_are_examples(write):
    (example,) = read(write([{"task": "sft", **CHAT, "sample_weight": 2, "meta": {"license": "MIT"}}]))
    assert (example.task, example.weight, example.meta) == ("sft", 2.0, {"license": "MIT"})
    pair = {"task": "preference", "messages": CHAT["messages"][:1], "chosen": CHAT["messages"][1:],
            "rejected": [{"role": "assistant", "content": "No"}]}  # fmt: skip
    assert [e.task for e in read(write([pair, pair]))] == ["preference"] * 2
    assert "pairs can't be mixed" in fails(write([{"task": "sft", **CHAT}, pair]))


def test_images_are_kept_and_not_trained(write):
    shown = {"type": "image_url", "image_url": {"url": "https://e.org/a.png"}}
    user = {"role": "user", "content": [{"type": "text", "text": "what?"}, shown]}
    assert "messages[0].content has a part of type 'image_url'; only text can be trained" in fails(
        write([{"messages": [user, CHAT["messages"][1]]}])
    )


def test_content_hash_is_fixed():
    assert content_hash({"b": 1, "a": "é"}) == content_hash({"a": "é", "b": 1}) == 6376171686559587705
