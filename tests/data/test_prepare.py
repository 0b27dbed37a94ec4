"""Recipes: sources and steps to a finished set, every row accounted for, resumed, in any format."""

import fcntl
import json
import re
from pathlib import Path

import messy
import pytest
from fake_endpoint import FakeEndpoint

from ftjax import cli
from ftjax.data import pipeline
from ftjax.data.codes import CODES
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


def test_a_second_start_does_nothing_again_and_a_change_only_what_follows(tmp_path, raw, monkeypatch, capsys):
    path = recipe(tmp_path, raw)
    assert cli.main(["data", "prepare", str(path)]) == 0
    applied = []
    apply = pipeline._apply
    monkeypatch.setattr(pipeline, "_apply", lambda job: (applied.append(job.step.name), apply(job))[1])
    capsys.readouterr()
    assert cli.main(["data", "prepare", str(path)]) == 0 and not applied
    assert "validate: 7 rows; 7 go on, 0 end here (kept from before)" in capsys.readouterr().out
    assert cli.main(["data", "prepare", str(path), "--overwrite"]) == 0 and set(applied) == {
        "read",
        "validate",
    }
    applied.clear()
    path.write_text(path.read_text() + "  - personal\n")
    assert cli.main(["data", "prepare", str(path)]) == 0
    assert set(applied) == {"personal"}


def test_files_of_an_earlier_recipe_go(tmp_path, raw, capsys):
    path = recipe(tmp_path, raw, "  - split: {eval: 0.5}\n")
    assert cli.main(["data", "prepare", str(path)]) == 0
    assert (tmp_path / "set" / "eval.jsonl").exists()
    assert cli.main(["data", "prepare", str(recipe(tmp_path, raw))]) == 0
    assert [p.name for p in (tmp_path / "set").glob("*.jsonl")] == ["data.jsonl"]  # no eval row is trained
    assert "eval.jsonl: an earlier run wrote it" in capsys.readouterr().out


def test_what_is_wrong_with_the_whole_is_said_where_rows_begin(tmp_path, raw):
    (tmp_path / "none.jsonl").write_text(json.dumps({"prompt": "Say it", "completion": ""}) + "\n")
    path = recipe(tmp_path, raw)
    text = path.read_text().replace("sources:\n", f"sources:\n  - {{path: {tmp_path / 'none.jsonl'}}}\n")
    path.write_text(text.replace("- validate", "- validate: {target: openai}"))
    cli.main(["data", "prepare", str(path)])
    verdicts = json.loads((tmp_path / "set" / "report.json").read_text())["verdicts"]
    assert [v["text"] for v in verdicts if v["code"] == "E060"] == ["7 rows, and openai takes 10 at least"]


def test_the_output_is_a_folder_whatever_its_name(tmp_path, raw):
    for name in ("v1.2", "set.jsonl", "x{1}"):
        out = tmp_path / name
        assert cli.main(["data", "prepare", str(recipe(tmp_path, raw, "  - dedup\n")), f"output={out}"]) == 0
        assert len(rows(out / "data.jsonl")) == 7


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


def test_a_file_that_no_row_goes_to_is_empty(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Say it", "completion": "TODO"}) + "\n")
    for name in ("out.jsonl", "out.json", "out.csv", "out.parquet"):
        out = tmp_path / name
        out.write_text("of an earlier run")
        cli.main(["data", "filter", str(tmp_path / "in.jsonl"), "--language", "off", "-o", str(out)])
        assert "wrote 0 rows" in capsys.readouterr().out
        assert b"earlier" not in out.read_bytes()


def test_a_split_that_is_no_name_leads_nowhere(tmp_path):
    lines = [
        json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}.", "split": split})
        for i, split in enumerate(["../../out", ["a"], "", None, ".hidden", "dev"])
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    cli.main(["data", "personal", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "a" / "b")])
    made = [p for p in tmp_path.rglob("*.jsonl") if p.name != "in.jsonl"]
    assert {(str(p.relative_to(tmp_path)), len(rows(p))) for p in made} == {
        ("a/b/data.jsonl", 5),
        ("a/b/dev.jsonl", 1),
    }


def test_every_step_has_its_command(capsys):
    from ftjax.recipes.data import STEPS, load_step

    for name in STEPS:
        step = load_step(name)
        assert issubclass(step, Step) and step.name == name
        with pytest.raises(SystemExit) as stopped:
            cli.main(["data", name, "--help"])
        assert stopped.value.code == 0
        assert f"ftjax data {name}" in capsys.readouterr().out


# ── the shipped recipes ───────────────────────────────────────────────────────────────────────────

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
FLASK = Path("/usr/share/doc/python-flask-doc/html")


class Careless:
    """A model that writes of each section its first two sentences as answers, one of them with a quote that
    is not there, and judges everything to be good."""

    def __call__(self, body, number):
        prompt = body["messages"][-1]["content"]
        section = prompt.partition("<section>")[2].partition("</section>")[0]
        prose = re.sub(r"```[\s\S]*?```|^[#|].*$", " ", section, flags=re.M)
        found = [s.strip() for s in re.findall(r"[A-Z][^.!?`*_\[\]]{40,200}\.", prose)]
        if "Write up to" in prompt:
            items = [
                {"question": f"What is to be known of {' '.join(s.split()[:6]).lower()}, and why?",
                 "answer": s, "quote": s if i == 0 else f"Moreover, {s}"}
                for i, s in enumerate(found[:2])
            ]  # fmt: skip
            return json.dumps({"items": items})
        if '"supported"' in prompt:
            return json.dumps({"reason": "so it says", "supported": True, "complete": True, "useful": True})
        return json.dumps({"answerable": bool(found), "answer": found[0] if found else ""})


def documents(folder: Path) -> Path:
    """A few pages of documentation, one of them twice."""
    folder.mkdir()
    pages = {"cache": "store", "queue": "line", "mail": "letter", "copy": "store", "log": "entry"}
    for name, noun in pages.items():
        parts = (
            f"<h2>Part {i} of the {noun}</h2><p>The {noun} number {i} keeps what the worker of shelf {i * 7} "
            f"has handed to it until somebody asks for it again. Another sentence about {noun} {i}, which "
            f"nobody needs, follows here, as it would in any page.</p>"
            f"<pre>{noun}.open({i})\n{noun}.close()\n</pre>"
            for i in range(3)
        )
        (folder / f"{name}.html").write_text(f"<main><h1>The {noun}</h1>{''.join(parts)}</main>")
    return folder


@pytest.mark.parametrize(
    "source",
    [
        "made here",
        pytest.param(
            "Flask's",
            marks=pytest.mark.skipif(not FLASK.is_dir(), reason="Flask's documentation is not installed"),
        ),
    ],
)
def test_documents_to_grounded_pairs(tmp_path, source, capsys):
    """One command: validated, deduplicated, leak-free pairs, each of which leads back to its section."""
    docs = documents(tmp_path / "docs") if source == "made here" else FLASK
    out = tmp_path / "set"
    with FakeEndpoint(Careless()) as server:
        asking = {
            "writer": f"m@{server.url}", "key_env": "''", "prices": "{}", "max_cost": "null", "kinds": "[qa]",
            "answers_dir": tmp_path / "answers",
        }  # fmt: skip
        settings = [f"steps.0.synthesize.{key}={value}" for key, value in asking.items()]
        settings += [f"sources.0.documents=[{docs}]", "steps.4.split={test: 0.3, eval: 0.2}", f"output={out}"]
        code = cli.main(["data", "prepare", str(CONFIGS / "documents.yaml"), "processes=1", *settings])
        asked = server.requests
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    counts = {stage["name"]: stage for stage in report["stages"]}
    for before, after in zip(report["stages"][2:], report["stages"][3:], strict=False):
        assert before["kept"] == after["rows"] == after["kept"] + after["dropped"]
    assert counts["synthesize"]["kept"] > 0
    sides = {
        name: rows(out / f"{name}.jsonl")
        for name in ("train", "eval", "test")
        if (out / f"{name}.jsonl").exists()
    }
    groups = [{r["meta"]["group"] for r in side} for side in sides.values()]
    assert all(
        not one & other for i, one in enumerate(groups) for other in groups[:i]
    )  # no document on two sides
    read_stage = next((out / ".stages").glob("read-*"))
    sections = {r["meta"]["section"]: r for path in read_stage.glob("*.jsonl") for r in rows(path)}
    for row in (row for side in sides.values() for row in side):
        evidence = row["meta"]["evidence"]
        text = sections[row["meta"]["section"]]["text"]
        assert text[evidence["start"] : evidence["end"]].split() == evidence["quote"].split()
        assert row["meta"]["license"] == "BSD-3-Clause"
    refused = [v for v in report["verdicts"] if v["stage"] == "synthesize" and v["outcome"] == "dropped"]
    assert refused and all(v["code"].startswith("S") for v in refused)  # the quotes that are not there
    assert (out / "card.html").exists() and asked
    if source == "made here":
        assert counts["dedup"]["dropped"] or any(
            v["code"] == "X003" for v in report["verdicts"]
        )  # the page that is there twice


def test_a_mixed_file_to_a_clean_one(tmp_path):
    messy.write(tmp_path / "raw.jsonl")
    out = tmp_path / "set"
    settings = [f"sources.0.path={tmp_path / 'raw.jsonl'}", "steps.0.validate={target: openai}", "card=null"]
    code = cli.main(
        ["data", "prepare", str(CONFIGS / "mixed.yaml"), f"output={out}", "processes=1", *settings]
    )
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    kept = [r for path in out.glob("*.jsonl") for r in rows(path)]
    dropped = {v["line"] for v in report["verdicts"] if v["outcome"] == "dropped" and v["line"]}
    lines = {r["meta"]["line"] for r in kept}
    assert not lines & dropped
    assert lines | dropped == set(range(1, len(messy.LINES) + 1))


@pytest.mark.slow
def test_a_cluster_gives_the_same_files(tmp_path):
    """Row-wise steps and those that decide over the whole, in one process and on Ray."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    messy.write(tmp_path / "raw.jsonl")
    with open(tmp_path / "raw.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in GOOD * 2)
    made = {}
    try:
        for engine in ("local", "ray"):
            settings = [
                f"sources.0.path={tmp_path / 'raw.jsonl'}",
                f"output={tmp_path / engine}",
                "card=null",
            ]
            settings += [f"engine={engine}", "processes=2" if engine == "ray" else "processes=1"]
            code = cli.main(["data", "prepare", str(CONFIGS / "mixed.yaml"), "rows_per_part=9", *settings])
            assert code == 0
            made[engine] = {p.name: p.read_bytes() for p in (tmp_path / engine).glob("*.jsonl")}
    finally:
        ray.shutdown()
    assert made["local"] == made["ray"] and made["local"]
    local, remote = (json.loads((tmp_path / e / "report.json").read_text())["verdicts"] for e in made)
    assert local == remote


def test_stages_of_an_earlier_recipe_go_and_all_where_told(tmp_path, raw, capsys):
    path = recipe(tmp_path, raw, "  - personal: {mask: true}\n")
    assert cli.main(["data", "prepare", str(path)]) == 0
    assert "do not publish it" in capsys.readouterr().out

    def names():
        folders = (p for p in (tmp_path / "set" / ".stages").iterdir() if p.is_dir())
        return {p.name.partition("-")[0] for p in folders}

    assert names() == {"read", "validate", "personal"}
    assert cli.main(["data", "prepare", str(path), "steps=[validate]"]) == 0
    assert names() == {"read", "validate"}
    assert cli.main(["data", "prepare", str(path), "keep_stages=false"]) == 0
    assert not names() and len(rows(tmp_path / "set" / "data.jsonl")) == 7


def test_one_process_at_a_time(tmp_path, raw, capsys):
    (tmp_path / "set" / ".stages").mkdir(parents=True)
    with open(tmp_path / "set" / ".stages" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(["data", "prepare", str(recipe(tmp_path, raw))]) == 2
    assert "another process is preparing" in capsys.readouterr().err


def test_a_weight_is_for_mix(tmp_path, raw, capsys):
    assert cli.main(["data", "prepare", str(recipe(tmp_path, raw)), "sources.0.weight=0.5"]) == 2
    assert "sources[0].weight has no effect here" in capsys.readouterr().err


def test_what_is_no_recipe(tmp_path, raw, capsys):
    assert cli.main(["data", "prepare", str(raw)]) == 2
    assert "a recipe is a .yaml file" in capsys.readouterr().err
    path = tmp_path / "r.yaml"
    path.write_text(
        f"output: {tmp_path / 'set'}\nsources: [{raw}]\nsteps: [validate]\ncard: null\nformat: trl\n"
    )
    assert cli.main(["data", "prepare", str(path)]) == 2
    assert "TRL has a format for each of its types: chat" in capsys.readouterr().err
    assert cli.main(["data", "prepare", str(path), "format=chat"]) == 0
    assert len(rows(tmp_path / "set" / "data.jsonl")) == 7


@pytest.mark.parametrize("target", messy.OTHERS)
def test_messy_files_for_other_targets(tmp_path, target):
    messy.write(tmp_path / "raw.jsonl", messy.OTHERS[target])
    settings = [f"sources.0.path={tmp_path / 'raw.jsonl'}", f"sources.0.format={target}", "card=null"]
    settings += [f"output={tmp_path / 'set'}", f"steps=[{{validate: {{target: {target}}}}}]", "processes=1"]
    assert cli.main(["data", "prepare", str(CONFIGS / "mixed.yaml"), *settings]) == 0
    verdicts = json.loads((tmp_path / "set" / "report.json").read_text())["verdicts"]
    found: dict[int, set[str]] = {}
    for verdict in verdicts:
        if verdict["line"] and verdict["severity"] == "error":
            found.setdefault(verdict["line"], set()).add(verdict["code"])
    assert found == {n: codes for n, (_, codes) in enumerate(messy.OTHERS[target], 1) if codes}


def test_the_messy_files_have_every_code_of_form():
    """But for those of a whole file, of a model's template and length, and of writing."""
    lines = [*messy.LINES, *(line for lines in messy.OTHERS.values() for line in lines)]
    others = {"E060", "E061", "E070", "E071", "E008"}
    assert {code for _, codes in lines for code in codes if code[0] == "E"} == {
        code for code in CODES if code[0] == "E"
    } - others
