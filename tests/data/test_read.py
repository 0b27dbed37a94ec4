import gzip
import hashlib
import json
import tracemalloc

import pytest

from ftjax.data import read
from ftjax.data.options import DataSource
from ftjax.data.read import parts, rows
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

TEXTS = [{"text": f"row {i}, “é”"} for i in range(1, 24)]


def judged(path, rows_per_part=1000, **kw):
    return [j for part in parts(DataSource(str(path), **kw), rows_per_part) for j in part.judged()]


def said(path, **kw):
    """(line, code, whether the row goes on) of each verdict."""
    return [(v.line, v.code, j.record is not None) for j in judged(path, **kw) for v in j.verdicts]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n"])
@pytest.mark.parametrize("per_part", [1, 4, 5, 22, 23, 24, 100])
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_a_file_of_lines_is_cut_between_lines(tmp_path, monkeypatch, per_part, chunk, ending, last):
    monkeypatch.setattr(read, "_CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    lines = ending.join(json.dumps(r, ensure_ascii=False) for r in TEXTS) + (last and ending)
    path.write_bytes(lines.encode())
    found = parts(str(path), per_part)
    assert len(found) == -(-23 // per_part) and len({p.key() for p in found}) == len(found)
    records = [j.record for p in found for j in p.judged()]
    assert [(r.text, r.meta["line"]) for r in records] == [(t["text"], i) for i, t in enumerate(TEXTS, 1)]
    assert [r.where for r in records] == [f"{path}:{i}" for i in range(1, 24)]


def test_a_change_in_one_part_is_a_change_of_that_parts_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in TEXTS))
    before = [p.key() for p in parts(str(path), 10)]
    path.write_text(path.read_text().replace("row 12,", "row xx,"))
    assert [a == b for a, b in zip(before, (p.key() for p in parts(str(path), 10)), strict=True)] == [
        True,
        False,
        True,
    ]


def test_row_groups_of_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(TEXTS), tmp_path / "a.parquet", row_group_size=5)
    found = parts(str(tmp_path / "a.parquet"), 10)
    assert [(p.begin, p.end, p.line) for p in found] == [(0, 2, 1), (2, 4, 11), (4, 5, 21)]
    records = [j.record for p in found for j in p.judged()]
    assert [(r.text, r.meta["line"]) for r in records] == [(t["text"], i) for i, t in enumerate(TEXTS, 1)]


def test_arguments_as_text_are_openais_way(tmp_path):
    path = tmp_path / "a.jsonl"
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

    def called(arguments):
        call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [user, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    for arguments, name in (("{}", "openai"), ({}, "chat")):
        rows_ = [{"messages": [user, answer]}, called(arguments), {"text": "t"}]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows_))
        (part,) = parts(str(path))
        assert part.format == name
        assert [(v.line, v.code) for j in part.judged() for v in j.verdicts] == [(3, "E004")]


def test_what_can_not_be_cut_is_one_part(tmp_path):
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in TEXTS))
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    for name in ("z.jsonl.gz", "a.json"):
        (part,) = parts(str(tmp_path / name), 5)
        assert [j.record.text for j in part.judged()] == [r["text"] for r in TEXTS]


def test_broken_lines_are_judged_and_the_next_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "a"}',
        b'{"text": "caf\xe9"}',
        b'{"text": }',
        b'{"text": NaN}',
        b'{"text": -Infinity}',
        b'{"text": "a"} {"text": "b"}',
        b"[1]",
        b"null",
        b"",
        b"  ",
        b'{"text": "a", "text": "b"}',
        b'{"text": "a", "meta": {"k": 1, "k": 2}}',
        b'{"text": "half \\ud83d"}',
        b'{"text": "\\ud83d\\ude00 whole"}',
        b'{"text": "nul \\u0000"}',
        b'{"other": 1}',
        b'{"messages": []}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert said(path) == [
        (1, "W110", True),
        (2, "E001", False),
        (3, "E002", False),
        (4, "E002", False),
        (5, "E002", False),
        (6, "E002", False),
        (7, "E003", False),
        (8, "E003", False),
        (9, "W115", False),
        (10, "W115", False),
        (11, "E005", False),
        (12, "E005", False),
        (13, "E006", False),
        (15, "E006", False),
        (16, "E004", False),
        (17, "E004", False),
        (18, "E002", False),
    ]
    kept = [j.record.text for j in judged(path) if j.record]
    assert kept == ["a", "\U0001f600 whole"]
    # training stops at the first of them, as before
    with pytest.raises(UserError, match="a.jsonl:2: not UTF-8 text"):
        list(rows(DataSource(str(path))))


def test_the_format_is_the_first_readable_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{broken\n\n{"question": "q", "answer": "a"}\n{"text": "t"}\n')
    assert said(path) == [(1, "E002", False), (2, "W115", False), (4, "E004", False)]
    path.write_text('{"messages": [], "text": "t"}\n')
    with pytest.raises(UserError, match="could be chat or text .*name its format"):
        parts(str(path))
    path.write_text('{"ask": "q"}\n')
    with pytest.raises(UserError, match="unknown format, with the keys ask"):
        parts(str(path))
    path.write_text("{\n[\n")
    with pytest.raises(UserError, match="none of its 2 lines can be read"):
        parts(str(path))
    path.write_text("")
    with pytest.raises(UserError, match="holds no examples"):
        parts(str(path))


@pytest.mark.parametrize("chunk", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_through_a_window(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(read, "_CHUNK", chunk)
    data = [*TEXTS, {"text": 'a \\ " ] [ } {', "n": [1.5e3, {"x": None}], "b": True}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False))
    got = list(rows(DataSource(str(path))))
    assert [r.values for r in got] == data
    if indent:
        assert [r.line for r in got][:3] == [2, 5, 8]
    whole = path.read_text()
    for cut in (2, len(whole) // 2, len(whole) - 2):
        path.write_text(whole[:cut])
        with pytest.raises(UserError, match=r"a\.json:\d+: broken JSON at column \d+"):
            list(rows(DataSource(str(path))))


def test_an_array_takes_no_more_memory_than_its_elements(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": "x" * 1000}) for _ in range(8_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in rows(DataSource(str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8_000 and path.stat().st_size > 8e6 and peak < 5e6


def test_a_broken_array_says_where_and_that_the_rest_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n 3,\n {"text": "a", "text": "b"},\n {"text": b},\n {"text": "c"}\n]')
    assert said(path) == [(3, "E003", False), (4, "E005", False), (5, "E002", False)]
    (last,) = judged(path)[-1].verdicts
    assert last.text == "broken JSON at column 11: Expecting value; the rest of the file is not read"


def test_csv_rows_that_do_not_fit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('prompt,completion\n"a\nb",c\nd\ne,f,g\nh,\xe9\n'.encode("latin-1") + "é,k\n".encode())
    assert said(path) == [(4, "E007", False), (5, "E007", False), (6, "E001", False)]
    assert [j.record.raw for j in judged(path) if j.record] == [("a\nb", "c"), ("é", "k")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json.gz"])
def test_gzip_that_is_cut_off(tmp_path, name):
    noise = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
    texts = {
        "a.jsonl.gz": "\n".join(json.dumps({"text": t}) for t in noise),
        "a.json.gz": json.dumps([{"text": t} for t in noise], indent=1),
        "a.csv.gz": "text\n" + "\n".join(noise),
    }
    whole = gzip.compress(texts[name].encode())
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    *good, last = judged(tmp_path / name, format="text")
    assert [j.record.text for j in good] == noise[: len(good)]
    assert last.record is None and "cut off or damaged" in last.verdicts[0].text
    with pytest.raises(UserError, match="cut off or damaged"):
        list(rows(DataSource(str(tmp_path / name))))


def test_a_row_without_a_renamed_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q"}\n{"ask": "q"}\n{"question": "r"}\n')
    assert said(path, columns={"prompt": "question"}) == [(2, "E007", False)]
    with pytest.raises(UserError, match="did you mean"):
        said(path, columns={"prompt": "questoin"})


def test_numbers_that_json_has_not(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = [1.5, float("nan"), float("inf")]
    pq.write_table(pa.table({"text": ["a", "b", "c"], "score": scores}), tmp_path / "a.parquet")
    assert said(tmp_path / "a.parquet") == [(3, "E007", False)]
    metas = [j.record.meta for j in judged(tmp_path / "a.parquet") if j.record]
    assert [m.get("score") for m in metas] == [1.5, None]


def test_provenance_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"task": "lm", "text": "t", "meta": {"source": "first.txt", "line": 7, "license": "MIT"}})
        + "\n"
        + json.dumps({"task": "lm", "text": "u"})
        + "\n"
    )
    a, b = (j.record for j in judged(path))
    assert a.meta == {"source": "first.txt", "line": 7, "license": "MIT"}
    assert b.meta == {"source": str(path), "line": 2} and b.given == ("ftjax", {"task": "lm", "text": "u"})


def test_a_first_row_of_no_format_does_not_refuse_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"foo": 1}\n{"prompt": "a", "completion": "b"}\n')
    [part] = read.parts(str(path))
    first, second = part.judged()
    assert first.record is None and [v.code for v in first.verdicts] == ["E004"]
    assert second.record is not None and part.format == "prompt_completion"
    path.write_text('{"foo": 1}\n{"bar": 2}\n')
    with pytest.raises(UserError, match="x.jsonl:1: unknown format, with the keys foo"):
        read.parts(str(path))
