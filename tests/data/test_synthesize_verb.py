"""Sections to pairs, scores and a selection from the command line."""

import json

import pytest
from fake_endpoint import FakeEndpoint
from test_synthesize import BAD, COOKIE, LIMIT, SESSIONS, UPLOADS, Model, section

from ftjax.recipes.data import main

pytestmark = pytest.mark.fast


@pytest.fixture
def sections(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "sections.jsonl"
    rows = [section(UPLOADS), section(SESSIONS, 1)]
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return path


def reply(body, number):
    if '"complexity"' in body["messages"][0]["content"]:
        return json.dumps({"reason": "r", "complexity": 2, "quality": 5 if "cookie" in str(body) else 3})
    return Model({"Uploads": [LIMIT, BAD["S012"]], "Sessions": [COOKIE]})(body, number)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_synthesize(sections, tmp_path, capsys):
    out, report = tmp_path / "pairs.jsonl", tmp_path / "report.json"
    with FakeEndpoint(reply) as fake:
        command = ["synthesize", str(sections), "--writer", f"big@{fake.url}", "--base", f"small@{fake.url}"]
        command += ["--votes", "1", "--prices", "{big: [0.4, 1.6], small: [0, 0]}", "--max-cost", "1"]
        command += ["--to", "openai"]
        assert main([*command, "--output", str(out), "--report", str(report)]) == 0
        said = capsys.readouterr()
        assert "about " in said.err and "never more than max_cost=1" in said.err  # before
        assert "yield of qa: 2 requests → 3 written → quote 3 (100%) → facts 2 (67%)" in said.out
        assert "2 of 2 facts" in said.out and "are unknown to small" in said.out
        assert "cost: 0.000" in said.out  # after
        assert [r["messages"][0]["content"] for r in rows(out)] == [LIMIT["question"], COOKIE["question"]]
        found = json.loads(report.read_text())
        assert [v["code"] for v in found["verdicts"]] == ["S012"]
        assert BAD["S012"]["question"] in found["verdicts"][0]["text"]
        (stage,) = found["stages"]
        assert stage["rows"] == 2 and stage["kept"] == 2
        assert stage["summary"]["numbers"]["passed"]["qa"]["facts"] == 2
        count = len(fake.requests)
        main([*command, "--output", str(tmp_path / "again.jsonl")])
        assert len(fake.requests) == count and "0 requests" in capsys.readouterr().out
        assert (tmp_path / "again.jsonl").read_text() == out.read_text()


def test_recipe_from_documents_to_a_selection(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    guide, recipe = tmp_path / "guide.md", tmp_path / "recipe.yaml"
    guide.write_text(f"# Guide\n\n{UPLOADS}\n{SESSIONS}")
    with FakeEndpoint(reply) as fake:
        recipe.write_text(f"""
output: {tmp_path / "set"}
sources:
  - documents: [{guide}]
    license: BSD-3-Clause
    extract: {{min_tokens: 1}}
steps:
  - synthesize: {{writer: "big@{fake.url}", votes: 1, min_section: 100}}
  - score: {{judge: "big@{fake.url}"}}
  - select: {{k: 1}}
card: null
processes: 2
""")
        assert main(["prepare", str(recipe)]) == 0
    (file,) = (tmp_path / "set").glob("*.jsonl")
    (row,) = rows(file)
    assert row["messages"][0]["content"] == COOKIE["question"]
    assert row["meta"]["scores"] == {"length": 10, "complexity": 2.0, "quality": 5.0}
    meta = row["meta"]
    assert meta["evidence"]["quote"] == COOKIE["quote"] and meta["license"] == "BSD-3-Clause"
    assert meta["breadcrumb"][-1] == "Sessions" and meta["section"] and "guide.md" in meta["group"]
    # the section's offset leads to the quote in the document
    begin, end = meta["offset"]
    assert COOKIE["quote"] in guide.read_text()[begin:end]


def test_help_tells_of_inherited_options(capsys):
    for verb in ("synthesize", "score"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "Stop before the requests of this run cost more" in said
