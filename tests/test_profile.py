"""profile=true: what a run traces and says, and that it changes nothing else."""

import json
import pathlib
import types

import jax
import pytest

from ftjax import cli, config, profile
from ftjax.errors import UserError
from ftjax.profile import ProfileOptions, window
from ftjax.recipes import folder
from ftjax.report import profile as page
from ftjax.report import write_report

MODEL = pathlib.Path(__file__).parent / "assets" / "tiny_model"


@pytest.fixture
def ftjax(tmp_path, monkeypatch, capfd):
    """ftjax(setting, …) -> (exit code, all that was said), one device."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    words = "the cat sat on a mat and the dog ran to it".split()
    rows = [
        [("user", " ".join(words[i % 5 : i % 5 + 3])), ("assistant", " ".join(words[i % 7 : i % 7 + 2]))]
        for i in range(40)
    ]
    chats = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in rows]
    pathlib.Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))

    def run(*settings):
        defaults = {
            "model": MODEL, "output": "run", "data.train": "chat.jsonl", "data.max_length": 64, "lora.r": 4,
            "train.max_steps": 5, "train.batch_size": 8, "train.dtype": "float32", "optim.lr": 1e-2,
            "optim.schedule": "constant", "report.tensorboard": "false",
        }  # fmt: skip
        given = {s.partition("=")[0] for s in settings}
        words = [f"{k}={v}" for k, v in defaults.items() if k not in given]
        try:
            code = cli.main(["sft", *words, *settings])
        except SystemExit as e:
            code = e.code
        out = capfd.readouterr()
        return code, out.out + out.err

    return run


def losses(run):
    rows = map(json.loads, pathlib.Path(run, "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"}


def test_a_profile_says_where_the_time_went_and_changes_nothing(ftjax):
    """Over a restart, too: each start traces steps of its own."""
    assert ftjax("output=plain", "train.max_steps=7")[0] == 0
    code, said = ftjax("profile.after=1", "profile.steps=2", "checkpoint.every=2", "train.max_steps=3")
    assert code == 0, said
    assert "profile: step 2, " in said  # after the second step a checkpoint would come between
    code, said = ftjax("profile=true", "checkpoint.every=100", "train.max_steps=7", "--resume")
    assert code == 0, said
    assert losses("run") == losses("plain")

    found = json.loads(pathlib.Path("run/profile.json").read_text())
    assert found["steps"] == [5, 7] and "profile: steps 5 to 7" in said
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["matmul", "attention", "collectives", "copies", "other", "idle"]
    assert abs(sum(row["share"] for row in rows.values()) - 1) < 1e-6
    assert abs(sum(row["ms"] for row in rows.values()) - found["step_ms"]) < 1e-3 * found["step_ms"]
    for name in ("matmul", "attention", "copies", "other"):
        assert rows[name]["ms"] > 0 and rows[name]["count"] >= 1, name
    assert found["devices"] == 8 and rows["collectives"]["count"] > 0
    assert found["flops"]["total"] == pytest.approx(sum(v for k, v in found["flops"].items() if k != "total"))
    assert 0 < found["mfu"] < 1.5 and found["peak_source"].startswith("measured")
    assert found["trained"] < found["tokens"] <= found["positions"]
    assert "4N" in found["formula"]
    # what a program executes is more than what the model needs: whole attention matrices, whole chunks
    assert found["executed_tflop"] * 1e12 > found["flops"]["total"]
    for name in found["files"]:
        assert (pathlib.Path("run") / name).stat().st_size > 100
    assert any(name.endswith("perfetto_trace.json.gz") for name in found["files"])
    assert "MFU" in said and "elementwise, other" in said
    html = pathlib.Path("run/report.html").read_text()
    assert "<h2>Profile</h2>" in html and "MFU" in html and "elementwise, other" in html

    # to profile or not is no other run, and --overwrite takes the trace away
    cfg = config.load("run/config.yaml", ["profile.steps=1"])
    changed = config.differences("run/config.yaml", cfg, ignore=folder.FREE_KEYS)
    assert not any("profile" in line for line in changed)
    assert {"profile", "profile.json"} <= set(folder.OURS)


def test_a_run_of_one_step_has_none_to_trace(ftjax):
    code, said = ftjax("profile=true", "train.max_steps=1")
    assert code == 2 and "profile: a run of one step has none to trace" in said
    assert not pathlib.Path("run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "after,steps,first,total,pauses,expected",
    [
        (5, 3, 0, 100, (), range(5, 8)),
        (5, 3, 40, 100, (), range(45, 48)),
        (5, 3, 0, 6, (), range(3, 6)),  # a short run: what is left at its end
        (5, 3, 0, 3, (), range(1, 3)),  # never the step that compiles
        (5, 3, 0, 2, (), range(1, 2)),
        (5, 3, 0, 1, (), None),
        (5, 3, 7, 8, (), None),
        (5, 3, 0, 100, (6,), range(6, 9)),  # after the sixth step something else happens
        (5, 3, 0, 100, (2, 0), range(6, 8)),
        (5, 3, 0, 100, (1,), range(5, 6)),
        (5, 3, 0, 8, (7, 3), range(5, 6)),
    ],
)
@pytest.mark.fast
def test_the_steps_that_are_traced(after, steps, first, total, pauses, expected):
    assert window(ProfileOptions(after, steps), first, total, pauses) == expected


@pytest.mark.fast
def test_the_setting():
    given = ["model=m", "data.train=d.jsonl"]
    of = lambda *words: ProfileOptions.of(config.load(None, [*given, *words]).profile)  # noqa: E731
    assert of() is None and of("profile=false") is None
    assert of("profile=true") == ProfileOptions() and of("profile.steps=2") == ProfileOptions(steps=2)
    assert of("profile=true", "profile.steps=2") == ProfileOptions(steps=2)
    with pytest.raises(UserError, match="profile.steps=0: at least 1"):
        of("profile.steps=0")
    with pytest.raises(UserError, match="did you mean profile.steps"):
        of("profile.step=1")
    with pytest.raises(UserError, match="profile: expected true or false or a section"):
        of("profile=yes")


RESULT = {
    "steps": [6, 8],
    "step_ms": 1234.5,
    "usual_step_ms": None,
    "device": "NVIDIA <H100>",
    "devices": 2,
    "rows": [
        {"name": "matmul", "share": 0.75, "ms": 925.9, "running_ms": 925.9, "count": 10, "tflops": 700.0},
        {"name": "collectives", "share": 0.05, "ms": 60.0, "running_ms": 400.0, "count": 4, "tflops": None},
        {"name": "idle", "share": 0.2, "ms": 246.9, "running_ms": None, "count": None},
    ],
    "flops": {"linear": 1e14, "total": 1e14},
    "formula": "4N",
    "tflops": 81.0,
    "peak_tflops": None,
    "peak_source": "no figure is known for it",
    "mfu": None,
    "executed_tflop": 120.0,
    "tokens": 8000,
    "trained": 7000,
    "positions": 8192,
    "top": [["BTD,DF->BTF/dot_general", "matmul", 100.0, 32]],
    "files": ["profile/x.xplane.pb"],
}


@pytest.mark.fast
def test_the_page(tmp_path):
    text = page.text(RESULT)
    assert "MFU unknown: no figure is known for it" in text and "collectives" in text and "2.3%" in text
    assert all(len(line) < 200 for line in text.splitlines())
    (tmp_path / "profile.json").write_text(json.dumps(RESULT))
    html = write_report(tmp_path).read_text()
    assert "NVIDIA &lt;H100&gt;" in html and "<H100>" not in html
    assert "400 with what others hide" in html and "BTD,DF-&gt;BTF" in html


@pytest.mark.fast
def test_a_trace_that_cannot_be_read_ends_no_training(tmp_path, monkeypatch):
    said = []
    model = types.SimpleNamespace(options=types.SimpleNamespace(dtype="float32"))
    monkeypatch.setattr(profile.Profiler, "result", lambda self, seconds: 1 / 0)
    step = profile.Profiler(
        lambda state, batch: (state, {}), tmp_path, range(1, 2), 0,
        model=model, plan=None, reference=False, done=said.append,  # type: ignore[arg-type]
    )  # fmt: skip
    batch = {"segments": [[[1, 1]]], "loss_weight": [[[1.0, 1.0]]]}
    for _ in range(3):
        step(jax.numpy.zeros(2), batch)
    assert len(said) == 1 and "could not be read: ZeroDivisionError" in said[0]
    step.close()


@pytest.mark.fast
def test_one_trace_at_a_time_is_said(tmp_path):
    said = []
    step = profile.Profiler(
        lambda state, batch: (state, {}), tmp_path / "run", range(0, 1), 0,
        model=None, plan=None, reference=False, done=said.append,  # type: ignore[arg-type]
    )  # fmt: skip
    with jax.profiler.trace(tmp_path / "other"):
        step(jax.numpy.zeros(2), {})
    assert len(said) == 1 and said[0].startswith("no profile:")
