"""What a run writes: metrics, progress, trackers, chart, page."""

import html
import html.parser
import importlib
import io
import json
import math
import sys
import types

import pytest

from ftjax.errors import UserError
from ftjax.report import Bar, Reporter, ReportOptions, chart, files, write_report
from ftjax.report.progress import count, duration, size

pytestmark = pytest.mark.fast

INFO = {
    "recipe": "sft",
    "model": "tiny",
    "parameters": 1000,
    "trainable": 100,
    "total_steps": 6,
    "train": {
        "examples": 12,
        "dropped": {"longer than 8 tokens": 3},
        "efficiency": 0.914,
        "trained_tokens": 12345,
    },
    "eval": {"examples": 4},
}


def reporter(run, **fields):
    options = fields.pop("options", ReportOptions(tensorboard=False))
    return Reporter(run, options, **{"total_steps": 6, "writes": True, "stream": io.StringIO(), **fields})


def metrics(step, **more):
    return {
        "loss": 3.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "weight": 10.0,
        "seconds": 0.5,
    } | more


def run_steps(report, first, last):
    report.start(INFO)
    for step in range(first, last + 1):
        report.train(step, metrics(step))
        if step % 2 == 0:
            report.eval(step, {"loss": 3.5 / step, "weight": 5.0})


def test_metrics_are_one_object_a_line_and_flushed(tmp_path):
    report = reporter(tmp_path)
    run_steps(report, 1, 2)
    report.event(2, "hello")
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]  # not closed yet
    assert [(x["kind"], x["step"]) for x in lines] == [("train", 1), ("train", 2), ("eval", 2), ("event", 2)]
    assert lines[1]["rate"] == 20.0 and lines[1]["trained"] == 20.0 and lines[1]["elapsed"] == 1.0
    assert lines[1]["memory_bytes"] > 1e6
    report.close()
    report.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
    report = reporter(tmp_path)
    run_steps(report, 1, 5)
    report.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "st')  # the kill came while it wrote
    again = reporter(tmp_path, resume_step=4)
    run_steps(again, 5, 6)
    again.finish({})
    records = files.read_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [2, 4, 6]
    assert records[-2]["trained"] == 60.0
    assert files.read_json(tmp_path / "summary.json")["trained"] == 60.0


@pytest.mark.parametrize(
    ("every", "done", "first", "lost"),
    [(1, 2, 5, "3–5"), (1, 0, 3, "1–3"), (1, 5, 5, None), (1, 5, 3, None), (4, 5, 7, None), (4, 5, 8, "5–8")],
)
def test_a_resumed_run_says_which_lines_are_lost(every, done, first, lost, tmp_path):
    options = ReportOptions(tensorboard=False, every=every)
    for resume_step, last in ((0, done), (first, first + 1), (first + 1, first + 2)):
        report = reporter(tmp_path, resume_step=resume_step, options=options, total_steps=20)
        run_steps(report, resume_step + 1, last)
        report.close()
    said = [r["message"] for r in files.read_lines(tmp_path / "metrics.jsonl") if r["kind"] == "event"]
    assert [m.partition(":")[0] for m in said] == (
        [f"metrics.jsonl has no lines of steps {lost}"] if lost else []
    )  # once


def test_a_run_started_anew_forgets_what_was_there(tmp_path):
    for _ in range(2):
        report = reporter(tmp_path)
        run_steps(report, 1, 2)
        report.close()
    records = [r for r in files.read_lines(tmp_path / "metrics.jsonl") if r["kind"] != "time"]
    assert [r["step"] for r in records] == [1, 2, 2]


class Clock:
    """Both clocks of this machine; the wall's jumps."""

    def __init__(self):
        self.now, self.jumped = 100.0, 0.0

    def perf_counter(self):
        return self.now

    def time(self):
        return 1e9 + self.now + self.jumped


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(importlib.import_module("ftjax.report.reporter"), "time", clock)
    return clock


def process(run, clock, first, last, killed=False):
    """One that goes on from `first`: 4 s to begin, 1 s to restore, 5 s to compile, steps of 2 s with a wait
    of half a second, 3 s for the save after step 3, an evaluation of 1 s at the end."""
    began = clock.now
    clock.now += 4
    report = reporter(run, resume_step=first, began=began)
    report.start(INFO)
    if first:
        clock.now += 1
        report.spent("restore", 1)
    report.spent("start", 4)
    for part, seconds in (("compile", 5),):
        clock.now += seconds
        report.spent(part, seconds)
    for step in range(first + 1, last + 1):
        clock.now += 2
        report.train(step, metrics(step, seconds=2.0, input_wait=0.5))
        if step == 3:
            with report.spending("save"):
                clock.now += 3
    if killed:
        report.close()
    else:
        with report.spending("evaluate"):
            clock.now += 1
        report.finish({})
    return report


def test_goodput_of_a_run_that_was_killed_and_went_on(tmp_path, clock):
    process(tmp_path, clock, 0, 2, killed=True)  # before anything was saved
    clock.now += 20
    process(tmp_path, clock, 0, 5, killed=True)
    clock.now += 30
    process(tmp_path, clock, 3, 4, killed=True)
    clock.now += 10
    process(tmp_path, clock, 3, 6)
    wall = clock.now - 100
    summary = files.read_json(tmp_path / "summary.json")
    assert summary["time"] == {
        "productive": 6 * 1.5,
        "recomputed": 2 * (2 + 2 + 1),  # 2 steps of the first process, 2 of the second, 1 of the third
        "input_wait": 6 * 0.5,
        "start": 16,
        "restore": 2,
        "compile": 20,
        "save": 3,
        "evaluate": 1,
        "stopped": 60,
    }
    assert sum(summary["time"].values()) == wall and summary["goodput"] == 9 / wall
    last = files.read_lines(tmp_path / "metrics.jsonl")[-1]
    assert last["kind"] == "time" and last["wall"] == wall
    assert f"{9 / wall:.1%} of 2:04" in (tmp_path / "report.html").read_text()


def test_a_clock_that_jumps_does_not_change_goodput(tmp_path, clock):
    process(tmp_path, clock, 0, 3, killed=True)
    clock.jumped = -1e6
    process(tmp_path, clock, 3, 6)
    spent = files.read_json(tmp_path / "summary.json")["time"]
    assert sum(spent.values()) == clock.now - 100 and "stopped" not in spent


def test_only_the_first_process_writes(tmp_path):
    report = reporter(tmp_path / "run", writes=False)
    run_steps(report, 1, 6)
    report.event(6, "x")
    report.finish({})
    assert not (tmp_path / "run").exists()


def test_values_that_are_not_finite_are_null(tmp_path):
    report = reporter(tmp_path)
    report.start({})
    report.train(1, metrics(1, loss=float("nan")))
    report.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None


def test_every_thins_the_lines_but_not_the_sums(tmp_path):
    report = reporter(tmp_path, options=ReportOptions(tensorboard=False, every=4))
    run_steps(report, 1, 6)
    report.finish({})
    train = [r for r in files.read_lines(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 4, 6] and train[-1]["trained"] == 60.0


def test_plain_lines_where_the_output_is_no_terminal(tmp_path):
    stream = io.StringIO()
    report = reporter(tmp_path, stream=stream)
    run_steps(report, 1, 6)
    report.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/6  loss 3  lr 1.0e-03  20 tok/s  ")  # the first at once,
    assert [x.split("  ")[0] for x in lines if x.startswith("step")] == [
        "step 1/6",
        "step 6/6",
    ]  # then by the clock
    assert "evaluation after step 2: loss 1.75" in lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(tmp_path):
    stream = Terminal()
    report = reporter(tmp_path, stream=stream)
    run_steps(report, 1, 6)
    report.close()
    assert "6/6" in stream.getvalue() and "evaluation after step 2" in stream.getvalue()


def test_a_bar_for_any_work():
    stream = io.StringIO()
    with Bar("reading", 3, stream=stream, line_seconds=0) as bar:
        for _ in range(3):
            bar.advance()
    assert [x.split("  ")[0] for x in stream.getvalue().splitlines()] == [
        "reading 1/3",
        "reading 2/3",
        "reading 3/3",
    ]


def test_numbers_in_words():
    assert [duration(42), duration(725), duration(11040)] == ["0:42", "12:05", "3:04:00"]
    assert [count(812), count(4100), count(135e6), count(999.7)] == ["812", "4.1 K", "135 M", "1 K"]
    assert [size(912e6), size(1.92e9)] == ["912 MB", "1.92 GB"]


def test_tensorboard_event_files(tmp_path):
    report = reporter(tmp_path, options=ReportOptions())
    run_steps(report, 1, 2)
    report.finish({})
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in path.read_bytes() and b"eval/loss" in path.read_bytes()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_trackers_get_the_metrics(tmp_path, monkeypatch, name):
    seen = []

    def note(what):
        return lambda *args, **kwargs: seen.append((what, args, kwargs)) or fake

    fake = types.SimpleNamespace()
    for call in ("init", "define_metric", "log", "finish", "set_experiment", "start_run", "log_params"):
        setattr(fake, call, note(call))
    fake.log_metrics, fake.end_run = note("log"), note("finish")
    monkeypatch.setitem(sys.modules, name, fake)
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.1\n")
    report = reporter(tmp_path, options=ReportOptions(to=(name,), tensorboard=False, project="p", name="n"))
    run_steps(report, 1, 1)
    report.close()
    logged = [args[0] for what, args, _ in seen if what == "log"]
    assert logged[0]["train/loss"] == 3.0
    assert seen[-1][0] == "finish"
    assert "p" in str(seen) and "n" in str(seen) and "lr" in str(seen)


def test_a_tracker_that_is_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="report.to: trackio cannot be imported .*; pip install trackio"):
        reporter(tmp_path, options=ReportOptions(to=("trackio",)))


class Balanced(html.parser.HTMLParser):
    """Checks that tags close in order, and collects what a page would load."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_shows_everything_and_loads_nothing(tmp_path):
    run = tmp_path / "my <run>"
    run.mkdir()
    (run / "config.yaml").write_text("model: <i>x</i>\n")
    (run / "base.json").write_text('{"source": "hub/tiny", "fingerprint": "abc123"}')
    cell = {"text": "90% [80, 95]", "value": 0.9, "low": 0.8, "high": 0.95}
    row = {"name": "tuned & short", "cells": [cell, 41], "best": True}
    scores = {"title": "Test", "columns": ["exact", "tokens"], "rows": [row], "notes": ["80 items"]}
    (run / "scores.json").write_text(json.dumps(scores))
    sample = {"prompt": "<script>alert(1)</script>", "before": "</pre>bad", "after": "good", "after_ok": True}
    (run / "samples.json").write_text(json.dumps([sample]))
    report = reporter(run)
    run_steps(report, 1, 6)
    report.event(4, "a <b>note</b>")
    report.finish({"best_step": 6})
    page = (run / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == [] and parser.loads == [] and "<script" not in page
    escaped = ("my &lt;run&gt;", "&lt;script&gt;alert(1)", "&lt;/pre&gt;bad", "&lt;i&gt;x", "a &lt;b&gt;note")
    facts = (
        "abc123",
        "tuned &amp; short",
        "90% [80, 95]",
        "80 items",
        "longer than 8 tokens",
        "91.4%",
        "hub/tiny",
    )
    command = "ftjax export " + html.escape(f"'{run}'") + " --for hf"
    for text in (*escaped, *facts, command, "12\u202f345", "prefers-color-scheme"):
        assert text in page, text
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_of_a_run_that_has_just_begun(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "has not finished" in page and not (tmp_path / "loss.png").exists()
    report = reporter(tmp_path)
    run_steps(report, 1, 1)
    report.close()
    assert "<svg" in write_report(tmp_path).read_text()


def test_a_flat_loss_can_be_drawn():
    flat = [{"kind": "train", "step": i, "loss": 0.0} for i in (1, 2)]
    assert "NaN" not in chart.loss_svg(chart.curves(flat))


def test_ticks_are_round():
    assert chart.ticks(0.0, 2.7, 6) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert chart.ticks(0, 300, 8) == [0, 50, 100, 150, 200, 250, 300]


def test_thinning_keeps_the_extremes():
    n = 10_000
    y = [math.sin(i) for i in range(n)]
    y[5000] = 9.0
    few = chart.thinned(chart.Series([float(i) for i in range(n)], y))
    assert len(few.x) <= 802 and max(few.y) == 9.0 and few.x[0] == 0 and few.x[-1] == n - 1


def test_smoothing_does_not_lag():
    line = chart.Series([float(i) for i in range(100)], [float(i) for i in range(100)])
    assert chart.smoothed(line).y[50] == pytest.approx(50.0)
