"""Steps over parts: every row accounted for, resumed after a kill, the same in any engine."""

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ftjax.data import pipeline
from ftjax.data.engine import Here, Processes, open_engine
from ftjax.data.record import Judged, Record, Verdict
from ftjax.data.steps import Step
from ftjax.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Rows first … last-1, each third of which cannot be read."""

    first: int
    last: int

    def key(self):
        return f"rows {self.first} {self.last}"

    def judged(self):
        for i in range(self.first, self.last):
            if i % 3 == 2:
                yield Judged(None, [Verdict("E002", "broken", source="rows", line=i)])
            else:
                yield Judged(Record("lm", text=f"row {i}", meta={"source": "rows", "line": i}))


@dataclass(frozen=True)
class Options:
    log: str = ""
    fail_at: int = -1


class Halve(Step):
    """Drops the records above the mean length of all of them, and writes to each which part it was of."""

    name = "halve"
    gathers = True

    def facts(self, records, part):
        return [len(r.text) for r in records]

    def decide(self, facts):
        lengths = [n for part in facts for n in part]
        return sum(lengths) / len(lengths)

    def apply(self, records, decision, part):
        if self.options.log:
            with open(self.options.log, "a") as file:
                file.write(f"{part}\n")
        if part == self.options.fail_at and not Path(self.options.log + ".mended").exists():
            raise OSError("the disk is full")
        for record in records:
            if len(record.text) > decision:
                yield Judged(None, [record.verdict("E003", "too long")])
            else:
                record.meta["part"] = part
                yield Judged(record, changed=True)

    def summary(self, decision):
        return {"mean": decision}


PARTS = [Rows(0, 7), Rows(7, 20), Rows(20, 20), Rows(20, 31)]


def whole(stage):
    return [r.to_json() for r in stage.records()], list(stage.verdicts()), stage.counts, stage.summary


def test_every_row_is_accounted_for(tmp_path):
    stage = pipeline.run(Halve(Options()), PARTS, tmp_path)
    records, verdicts, counts, summary = whole(stage)
    # of 0 … 30, ten are unreadable (2, 5, … 29); "row 0" to "row 9" are shorter than the mean
    kept = [i for i in range(10) if i % 3 != 2]
    assert [r["text"] for r in records] == [f"row {i}" for i in kept]
    assert (counts.rows, counts.kept, counts.changed, counts.dropped) == (31, 7, 7, 24)
    assert counts.codes == {"E002": 10, "E003": 14}
    accounted = sorted([r["meta"]["line"] for r in records] + [v["line"] for v in verdicts])
    assert accounted == list(range(31))
    assert summary == {"mean": pytest.approx((7 * 5 + 14 * 6) / 21)}
    assert {v["outcome"] for v in verdicts} == {"dropped"}


def test_a_stage_goes_on_where_it_stopped(tmp_path):
    options = Options(log=str(tmp_path / "log"), fail_at=1)
    with pytest.raises(OSError):
        pipeline.run(Halve(options), PARTS, tmp_path / "work")
    Path(options.log + ".mended").touch()
    stage = pipeline.run(Halve(options), PARTS, tmp_path / "work")
    assert Path(options.log).read_text().split() == ["0", "1", "1", "2", "3"]  # part 0 was not done again
    assert whole(stage)[0] == whole(pipeline.run(Halve(Options()), PARTS, tmp_path / "other"))[0]
    pipeline.run(Halve(options), PARTS, tmp_path / "work")
    assert len(Path(options.log).read_text().split()) == 5  # nothing at all
    assert not list((tmp_path / "work").rglob("*.part"))


def test_other_input_or_options_are_another_stage(tmp_path):
    one = pipeline.run(Halve(Options()), PARTS, tmp_path)
    assert pipeline.run(Halve(Options()), PARTS[:2], tmp_path).folder != one.folder
    assert pipeline.run(Halve(Options(log=str(tmp_path / "l"))), PARTS, tmp_path).folder != one.folder


def test_the_next_step_reads_what_the_last_wrote(tmp_path):
    first = pipeline.run(Halve(Options()), PARTS, tmp_path)
    second = pipeline.run(Halve(Options()), first.parts, tmp_path)
    assert second.counts.rows == 7 and second.counts.codes == {}
    assert [r.meta["line"] for r in second.records()] == [0, 1, 3, 4, 6, 7, 9]


def test_processes_give_the_same(tmp_path):
    here = whole(pipeline.run(Halve(Options()), PARTS, tmp_path / "a", Here()))
    assert whole(pipeline.run(Halve(Options()), PARTS, tmp_path / "b", Processes(2))) == here


@pytest.mark.slow
def test_ray_gives_the_same(tmp_path):
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    here = whole(pipeline.run(Halve(Options()), PARTS, tmp_path / "a", Here()))
    try:
        assert whole(pipeline.run(Halve(Options()), PARTS, tmp_path / "b", open_engine("ray", 2))) == here
        failing = Halve(Options(log=str(tmp_path / "log"), fail_at=1))
        with pytest.raises(OSError, match="the disk is full"):
            pipeline.run(failing, PARTS, tmp_path / "c", open_engine("ray", 2))
    finally:
        ray.shutdown()


def test_engines_that_do_not_exist():
    with pytest.raises(UserError, match="there is no 'spark'; there are local, ray"):
        open_engine("spark")
    with pytest.raises(UserError, match="processes=-1"):
        open_engine(processes=-1)


def test_records_keep_their_content_and_their_id():
    record = Record(
        "preference",
        [{"role": "user", "content": "x"}],
        chosen=[{"role": "assistant", "content": "y", "weight": 1.0}],
        rejected=[{"role": "assistant", "content": "z", "weight": 1.0}],
        weight=0.5,
        raw=("x", "y", "z"),
        meta={"source": "a.jsonl", "line": 3},
    )
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record and again.id == record.id
    assert (
        Record("lm", text="a", meta={"line": 1}).id == Record("lm", text="a").id != Record("lm", text="b").id
    )


def test_workers_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "holding.py").write_text(
        "import fcntl, time\n"
        "def hold(path):\n"
        "    file = open(path, 'w')\n"
        "    fcntl.flock(file, fcntl.LOCK_EX)\n"
        "    open(path + '.held', 'w')\n"
        "    time.sleep(120)\n"
    )
    paths = [str(tmp_path / name) for name in "ab"]
    code = f"import holding, ftjax.data.engine as e\nlist(e.Processes(2).map(holding.hold, {paths}))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    started = subprocess.Popen([sys.executable, "-c", code], env=env)
    until = time.monotonic() + 60
    while not all(Path(path + ".held").exists() for path in paths):
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.05)
    started.kill()
    started.wait()
    for path in paths:  # a lock goes with its process
        with open(path) as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < until
                    time.sleep(0.05)


def test_a_worker_that_is_killed_is_said():
    with pytest.raises(UserError, match="worker process was ended from outside"):
        list(Processes(1).map(os._exit, [9]))


def test_progress_by_parts_and_of_one_part_by_rows(tmp_path):
    told = []
    pipeline.run(Halve(Options()), PARTS, tmp_path / "a", progress=lambda *said: told.append(said))
    assert told[-1] == ("halve", 4, 4) and ("halve: looking", 4, 4) in told
    told.clear()
    pipeline.run(Halve(Options()), [Rows(0, 4500)], tmp_path / "b", progress=lambda *said: told.append(said))
    assert [said for said in told if said[2] is None] == [
        ("halve: looking, rows", 2000, None), ("halve: looking, rows", 4000, None),
        ("halve, rows", 2000, None), ("halve, rows", 4000, None),
    ]  # fmt: skip
