"""Recipes: sources and steps to a finished set, every row accounted for, resumed, in any format."""

import json
import re
from pathlib import Path

import pytest

from ftjax import cli
from ftjax.data import pipeline
from ftjax.data.steps import Step

GOOD = [
    {
        "messages": [
            {"role": "user", "content": f"How far is {i} km in metres?"},
            {"role": "assistant", "content": f"{i} kilometres are {i * 1000} metres."},
        ]
    }
    for i in range(1, 8)
]
BAD = [
    "{broken",
    json.dumps({"messages": [{"role": "user", "content": "and now?"}]}),
    json.dumps(
        {"messages": [{"role": "king", "content": "and now?"}, {"role": "assistant", "content": "x"}]}
    ),
    json.dumps({"prompt": "another", "completion": "format"}),
]


@pytest.fixture
def raw(tmp_path):
    lines = [json.dumps(row) for row in GOOD]
    lines[2:2] = BAD[:2]
    lines += BAD[2:]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "raw.jsonl"


def recipe(folder: Path, raw: Path, more: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder / 'set'}\nprocesses: 1\nrows_per_part: 3\n"
        f"sources:\n  - {{path: {raw}, license: MIT, tags: {{team: maps}}}}\nsteps:\n  - validate\n{more}"
    )
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_kept_or_has_its_reason(tmp_path, raw, capsys):
    assert cli.main(["data", "prepare", str(recipe(tmp_path, raw))]) == 0
    kept = rows(tmp_path / "set" / "data.jsonl")
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    dropped = [v for v in report["verdicts"] if v["outcome"] == "dropped"]
    assert [r["messages"][0]["content"] for r in kept] == [r["messages"][0]["content"] for r in GOOD]
    assert sorted([r["meta"]["line"] for r in kept] + [v["line"] for v in dropped]) == list(range(1, 12))
    assert {v["line"]: v["code"] for v in dropped} == {3: "E002", 4: "E014", 10: "E011", 11: "E004"}
    assert all(r["meta"]["license"] == "MIT" and r["meta"]["team"] == "maps" for r in kept)
    assert all(v["fix"] and v["text"] for v in dropped)
    [output] = report["outputs"]
    assert output["rows"] == 7 and output["sha256"] == pipeline.file_digest(tmp_path / "set" / "data.jsonl")
    assert (tmp_path / "set" / "card.md").exists()
    printed = capsys.readouterr().out
    assert "read: 11 rows; 7 go on, 4 end here" in printed


def test_a_second_start_does_nothing_again_and_a_change_only_what_follows(tmp_path, raw, monkeypatch):
    path = recipe(tmp_path, raw)
    assert cli.main(["data", "prepare", str(path)]) == 0
    applied = []
    apply = pipeline._apply
    monkeypatch.setattr(pipeline, "_apply", lambda job: (applied.append(job.step.name), apply(job))[1])
    assert cli.main(["data", "prepare", str(path)]) == 0 and not applied
    path.write_text(path.read_text() + "  - personal\n")
    assert cli.main(["data", "prepare", str(path)]) == 0
    assert set(applied) == {"personal"}


def test_what_was_prepared_trains_and_comes_back(tmp_path, raw):
    path = recipe(tmp_path, raw)
    assert cli.main(["data", "prepare", str(path), "format=chat", f"output={tmp_path / 'chat'}"]) == 0
    back = [
        [{k: m[k] for k in ("role", "content")} for m in r["messages"]]
        for r in rows(tmp_path / "chat" / "data.jsonl")
    ]
    assert back == [row["messages"] for row in GOOD]


@pytest.mark.parametrize(
    "text, said",
    [
        ("steps: [{validate: {taget: openai}}]", "did you mean .*target"),
        ("steps: [dedupe]", "unknown key"),
        ("steps: [{validate: {}, filter: {}}]", "one entry has validate, filter"),
        ("steps: [validate]\nsource: x", "did you mean sources"),
        ("steps: [validate]\nformat: opnai", "unknown data format 'opnai'"),
        ("steps: [validate]\nengine: spark", "there is no 'spark'"),
    ],
)
def test_recipes_that_are_wrong_say_where(tmp_path, raw, capsys, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output: {tmp_path / 'set'}\nsources: [{{path: {raw}}}]\n{text}\n")
    assert cli.main(["data", "prepare", str(path)]) == 2
    assert re.search(said, capsys.readouterr().err), said
    assert not (tmp_path / "set").exists()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path, raw, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("mine")
    assert cli.main(["data", "prepare", str(recipe(tmp_path, raw))]) == 2
    assert "holds thesis.tex and nothing of `ftjax data prepare`" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["thesis.tex"]


def test_one_step_over_a_file(tmp_path, raw, capsys):
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    code = cli.main(
        ["data", "validate", str(raw), "--target", "openai", "-o", str(out), "--report", str(report)]
    )
    assert code == 3  # some rows were in error
    kept = rows(out)
    assert [r["messages"] for r in kept] == [row["messages"] for row in GOOD]  # as the file: OpenAI's rows
    assert "meta" not in kept[0]
    verdicts = json.loads(report.read_text())["verdicts"]
    assert {v["line"] for v in verdicts if v["outcome"] == "dropped"} == {3, 4, 10, 11}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".ftjax")]


def test_every_step_has_its_command(capsys):
    from ftjax.recipes.data import STEPS, load_step

    for name in STEPS:
        step = load_step(name)
        assert issubclass(step, Step) and step.name == name
        with pytest.raises(SystemExit) as stopped:
            cli.main(["data", name, "--help"])
        assert stopped.value.code == 0
        assert f"ftjax data {name}" in capsys.readouterr().out
