"""One long run on a tiny model, hurt on purpose again and again; after each fault it has to go on with the
losses of a run that was never hurt, or stop with a message that says what to do, and keep what it had saved.

    python -m benchmarks.faults [--faults 220 | --quick] [--seed 1] [--folder FOLDER] [--write]

The plan of faults is a function of (number, seed); --quick is the one of tests/test_faults.py. FOLDER keeps
the run, the log of every start and one line a fault (records.jsonl); the same command goes on with the next
fault after it was stopped itself. A fault that is not survived ends the command, and the folder is there to
be looked at. --write puts the table into benchmarks/results/faults.md.

The run that is never hurt is one of the command line's. Every start of the hurt one is a process of its own,
forked from this one, which has imported what the command line imports and has not touched jax's devices: a
start costs two seconds of CPU. Hooks that the fork installs before it calls `ftjax.cli.main` say where in its
work the run is and carry out the faults that come from inside (an audit hook sees every file that Python
opens, renames or removes; what tensorstore writes in C++ is met by timers). Other faults come from here:
signals, and changes to files. Nothing in ftjax knows of any of this.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import mmap
import os
import pathlib
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from typing import Any

from ftjax.report import goodput

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parent / "tests" / "assets" / "tiny_model"
EVERY = 10  # steps between checkpoints
STEPS_A_FAULT = 24  # of the run, so that it is still under way when the last fault comes
PATIENCE = 180  # seconds for what should take two

# How often each kind comes, of 100; the first and the last faults are chosen apart.
KINDS = {
    "kill at a step": 10,
    "kill at a moment of the start": 8,
    "kill in a save": 10,
    "kill while files are written": 6,
    "kill in reading back and sealing": 8,
    "kill in restore": 8,
    "bit flipped": 9,
    "file cut short": 6,
    "file removed": 3,
    "all checkpoints damaged": 2,
    "bit flipped before it was read back": 3,
    "disk full": 6,
    "file size limit": 4,
    "clock jump": 5,
    "data file changed": 3,
    "NaN in a batch": 3,
    "stopped for a while": 4,
    "slow disk": 3,
    "SIGTERM": 3,
    "Ctrl-C": 2,
}
DAMAGE = {"bit flipped": "flip", "file cut short": "cut", "file removed": "remove"}
FIRST = ("kill while the folder is begun",)
LAST = ("kill while the result is written", "disk full at the end")
QUICK = (  # what CI runs
    "kill while the folder is begun",
    "kill at a step",
    "kill in a save",
    "kill in restore",
    "bit flipped",
    "file size limit",
    "clock jump",
    "stopped for a while",
    "data file changed",
    "NaN in a batch",
    "SIGTERM",
    "kill while the result is written",
)


@dataclasses.dataclass(frozen=True)
class Fault:
    number: int
    kind: str
    u: tuple[float, ...]  # random numbers in [0, 1) that say where exactly


def plan(count: int | None, seed: int) -> list[Fault]:
    """The faults of a run, all kinds by their weights in random order; QUICK for None."""
    rng = random.Random(seed)
    kinds = list(QUICK)
    if count is not None:
        edge = max(1, count // 40)
        middle: list[str] = []
        while len(middle) < count - edge * (len(FIRST) + len(LAST)):  # what is furthest behind its share
            have = Counter(middle)
            middle.append(min(KINDS, key=lambda kind: ((have[kind] + rng.random()) / KINDS[kind], kind)))
        rng.shuffle(middle)
        kinds = [*FIRST * edge, *middle, *(kind for kind in LAST for _ in range(edge))]
    return [Fault(i + 1, kind, tuple(rng.random() for _ in range(4))) for i, kind in enumerate(kinds)]


# ── inside the run ──────────────────────────────────────────────────────────────────────────────────────────


class Shared:
    """A line each way between this process and a fork."""

    def __init__(self):
        self._map = mmap.mmap(-1, 2 * 4096)

    def _put(self, at: int, value: Any) -> None:
        data = json.dumps(value).encode()
        assert len(data) < 4094
        self._map[at + 2 : at + 2 + len(data)] = data
        self._map[at : at + 2] = len(data).to_bytes(2, "little")

    def _get(self, at: int) -> Any:
        size = int.from_bytes(self._map[at : at + 2], "little")
        return json.loads(self._map[at + 2 : at + 2 + size]) if size else None

    def arm(self, trap: dict[str, Any] | None) -> None:
        self._put(4096, None)
        self._put(0, trap)

    def armed(self) -> Any:
        return self._get(0)

    def hit(self, what: dict[str, Any]) -> None:
        self._put(4096, what)

    def was_hit(self) -> Any:
        return self._get(4096)


class Hooks:
    """Where the run is (its phase), and what is done to it there.

    A trap is {"phases", "do": "kill" | "full" | "limit" | "slow" | "clock" | "flip", "ops": fire at the
    so-many-th file operation in that phase, or "seconds": so long after the phase began, …}; one that counts
    operations fires at the latest when a phase ends that comes once.
    """

    ONCE = ("restore", "result", "finish")

    def __init__(self, shared: Shared, run: pathlib.Path):
        self.shared, self.run = shared, str(run)
        self.phase, self.step, self.count = "start", 0, 0
        self.full, self.slow, self.offset = False, 0.0, 0.0
        self.poisoned: int | None = None  # the step whose batch has a NaN
        self.mine = threading.local()  # what a hook itself does is not counted

    def install(self) -> None:
        from ftjax import checkpoint, report
        from ftjax.data import loader
        from ftjax.recipes import folder, training

        def within(owner, name: str, phase: str, after: str | None = None) -> None:
            whole = getattr(owner, name)

            def wrapped(*args, **kwargs):
                before, ended = self.phase, after
                self.enter(phase)
                try:
                    return whole(*args, **kwargs)
                except BaseException:
                    ended = None
                    raise
                finally:
                    if phase in self.ONCE:
                        self.operation(phase, "its end", last=True)
                    self.enter(ended if ended and before != "save" else before)

            setattr(owner, name, wrapped)

        within(folder, "claim", "begin")
        within(folder.RunFolder, "begin", "begin")
        within(report.Reporter, "start", "begin", after="steps")
        within(checkpoint.Checkpoints, "restore", "restore")
        within(checkpoint.Checkpoints, "save", "save", after="write")
        within(checkpoint.Checkpoints, "wait", "seal", after="steps")
        within(checkpoint.Checkpoints, "_read_back", "read")
        within(training, "save_result", "result")
        within(report.Reporter, "finish", "finish")
        report_step, batches, row = report.Reporter.train, loader.Loader.batches, loader.Loader._row

        def reported(reporter, step, metrics):
            self.step = step
            self.operation("steps", f"after step {step}")
            report_step(reporter, step, metrics)

        def begun(these, start_step=0):
            trap = self.shared.armed() or {}
            if these.train and trap.get("do") == "nan":
                self.poisoned = start_step + trap["ahead"]
                self.shared.hit({"phase": "steps", "at": f"step {self.poisoned + 1}"})
            yield from batches(these, start_step)

        def filled(these, number):
            found = row(these, number)
            if these.train and number // these.batch_size == self.poisoned:
                found["loss_weight"][found["loss_weight"] > 0] = float("nan")
            return found

        report.Reporter.train, loader.Loader.batches, loader.Loader._row = reported, begun, filled
        sys.addaudithook(self.audit)
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + self.offset
        time.time_ns = lambda: now_ns() + int(self.offset * 1e9)

    def enter(self, phase: str) -> None:
        self.phase = phase
        trap = self.shared.armed()
        if trap and phase in trap["phases"] and trap.get("ops") == 0:
            self.fire(trap, "its beginning")
        if trap and phase == trap["phases"][0] and "seconds" in trap:
            what = f"{trap['seconds']:.3f} s after its {phase} began"
            threading.Timer(trap["seconds"], self.fire, (trap, what)).start()

    def audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            path = args[0]
        else:
            return
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if not path.startswith(self.run) or getattr(self.mine, "busy", False):
            return
        self.operation(self.phase, f"{event} {path[len(self.run) + 1 :]}")
        if self.slow:
            time.sleep(self.slow)
        if self.full and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def operation(self, phase: str, what: str, last: bool = False) -> None:
        trap = self.shared.armed()
        if trap and phase in trap["phases"] and "ops" in trap:
            self.count += 1
            if self.count >= trap["ops"] or last:
                self.fire(trap, what)

    def fire(self, trap: dict[str, Any], what: str) -> None:
        if self.shared.armed() != trap:  # another thread was first
            return
        self.mine.busy, self.count = True, 0
        self.shared.arm(None)
        self.shared.hit({"phase": self.phase, "at": what})
        do = trap["do"]
        if do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10)
        elif do == "full":
            self.full = True
        elif do == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (trap["bytes"], resource.RLIM_INFINITY))
        elif do == "slow":
            self.slow = trap["each"]
            threading.Timer(trap["last"], lambda: setattr(self, "slow", 0.0)).start()
        elif do == "clock":
            self.offset += trap["jump"]
        elif do == "flip":
            root = pathlib.Path(self.run, "checkpoints")
            newest = max(int(p.name) for p in root.iterdir() if p.name.isdigit())
            damage("flip", root / str(newest), trap["u"])
        self.mine.busy = False


def damage(how: str, root: pathlib.Path, u: float) -> str:
    """Harm one file under `root`, chosen by `u` with every byte as likely; what was done."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    at = int(u * sum(p.stat().st_size for p in files))
    for path in files:
        size = path.stat().st_size
        if at < size:
            break
        at -= size
    name = str(path.relative_to(root.parent))
    if how == "remove":
        path.unlink()
        return f"{name} removed"
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[at] ^= 1 << int(u * 2**20) % 8
        path.write_bytes(data)
        return f"a bit of byte {at} of {name}"
    path.write_bytes(data[:at])
    return f"{name} cut from {size} to {at} bytes"


# ── outside of it ───────────────────────────────────────────────────────────────────────────────────────────


class Failed(Exception):
    """A fault was not survived as it has to be."""


def rows(path: pathlib.Path) -> dict[tuple[str, int], dict[str, Any]]:
    """{(kind, step): what has to be the same in every run} of a metrics.jsonl; a step twice is a failure."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short by a kill
        if row["kind"] in ("train", "eval"):
            key = row["kind"], row["step"]
            if key in found:
                raise Failed(f"{key} is in metrics.jsonl twice")
            found[key] = {k: row[k] for k in ("loss", "weight", "grad_norm", "learning_rate") if k in row}
    return found


@dataclasses.dataclass
class Start:
    """One start of the run."""

    pid: int
    log: pathlib.Path
    writer: subprocess.Popen  # of its log: a file size limit and a full disk must not meet that
    status: int | None = None  # as os.waitstatus_to_exitcode gives it

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.writer.wait()
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Harness:
    END = ("result", "finish")  # phases after the last step

    def __init__(self, folder: pathlib.Path, count: int | None, seed: int):
        self.folder = folder.absolute()
        self.plan, self.seed = plan(count, seed), seed
        self.how = "--quick" if count is None else f"--faults {count}"
        self.total = STEPS_A_FAULT * len(self.plan) + 50
        self.run, self.checkpoints = self.folder / "run", self.folder / "run" / "checkpoints"
        self.data, self.records_path = self.folder / "train.jsonl", self.folder / "records.jsonl"
        self.shared = Shared()
        self.child: Start | None = None
        self.starts = 0
        self.mark = 0  # the furthest step that the run has been seen at
        self.behind: int | None = None  # the step that it goes on from at the least; None: it may begin anew
        self.resumed: int | None = None  # the step that it went on from last
        self.records: list[dict[str, Any]] = []
        self.wants: dict[tuple[str, int], dict[str, Any]] = {}
        facts = {"count": count, "seed": seed}
        about = self.folder / "about.json"
        if about.exists() and json.loads(about.read_text()) != facts:
            raise SystemExit(f"{self.folder} holds faults of another plan: {about.read_text()}")
        if not about.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_inputs(random.Random(seed))
            about.write_text(json.dumps(facts))
        if self.records_path.exists():
            self.records = [json.loads(line) for line in self.records_path.read_text().splitlines()]
            self.starts = self.records[-1]["starts"] if self.records else 0

    def _write_inputs(self, rng: random.Random) -> None:
        words = "the cat dog sun big red ran sat and saw".split()
        with open(self.data, "w") as f:
            for _ in range(64):
                said = [" ".join(rng.choices(words, k=rng.randint(1, 7))) for _ in range(2)]
                roles = zip(("user", "assistant"), said, strict=True)
                f.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in roles]}) + "\n")
        (self.folder / "config.yaml").write_text(
            f"model: {MODEL}\n"
            f"data: {{train: {self.data}, eval_fraction: 0.1, max_length: 64,"
            f" cache_dir: {self.folder / 'cache'}}}\n"
            "lora: {r: 2, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}\n"
            f"train: {{max_steps: {self.total}, batch_size: 2, dtype: float32, neftune_alpha: 1.0}}\n"
            "eval: {every: 150}\n"
            "optim: {lr: 0.003, warmup_steps: 5}\n"
            f"checkpoint: {{every: {EVERY}}}\n"
            "report: {tensorboard: false}\n"
        )

    # ── starting and watching ──

    def start(self) -> Start:
        self.starts += 1
        log = self.folder / "logs" / f"{self.starts:04}.log"
        log.parent.mkdir(exist_ok=True)
        read, write = os.pipe()
        with open(log, "wb") as f:
            writer = subprocess.Popen(["cat"], stdin=read, stdout=f)
        os.close(read)
        pid = os.fork()
        if not pid:
            code = 70
            try:
                os.dup2(write, 1)
                os.dup2(write, 2)
                os.close(write)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                Hooks(self.shared, self.run).install()
                from ftjax import cli

                code = cli.main(self.words(self.run))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(write)
        self.child = Start(pid, log, writer)
        return self.child

    def until(self, done: Callable[[], Any], what: str) -> Any:
        """Wait for `done`; a run that neither does it nor ends in time is a failure."""
        deadline = time.monotonic() + PATIENCE
        while not (found := done()):
            if time.monotonic() > deadline:
                raise Failed(f"{what}: not in {PATIENCE} s\n{self._tail()}")
            time.sleep(0.003)
        return found

    def _tail(self) -> str:
        return self.child.text()[-3000:] if self.child else ""

    def step(self) -> int:
        """Of the last whole line of metrics.jsonl, by its last bytes."""
        try:
            with open(self.run / "metrics.jsonl", "rb") as f:
                f.seek(max(0, os.fstat(f.fileno()).st_size - 65536))
                lines = f.read().decode(errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return 0
        found = [re.match(r'{"kind": "train", "step": (\d+)', line) for line in lines]
        return max((int(m[1]) for m in found if m), default=0)

    def sealed(self) -> list[int]:
        """Steps of checkpoints that were written, read back and sealed."""
        seals = {p.stem for p in (self.checkpoints / "seals").glob("*.json")}
        return sorted(
            int(p.name) for p in self.checkpoints.glob("[0-9]*") if p.name.isdigit() and p.name in seals
        )

    def ended(self) -> int:
        """The exit code of the run, once it has ended."""
        child = self.child
        assert child is not None
        self.until(lambda: child.poll() is not None, "the run has to end")
        self.mark = max(self.mark, self.step())
        assert child.status is not None
        return child.status

    def alive(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def up(self) -> None:
        """A run under way that has passed every step seen before, with the losses that it must have."""
        if not self.alive():
            self.shared.arm(None)
            self.start()
        child = self.child
        assert child is not None
        said = "going on from the checkpoint of step "
        self.until(
            lambda: (
                self.step() > self.mark
                and (self.behind is None or said in child.text())
                or child.poll() is not None
            ),
            f"passing step {self.mark}",
        )
        if child.status is not None and not (self.run / "summary.json").exists():
            raise Failed(f"the run ended with {child.status} where it should go on:\n{self._tail()}")
        if self.behind is not None:
            self.resumed = int(child.text().split(said)[1].split()[0])
            if self.resumed < self.behind:
                raise Failed(f"it went on from step {self.resumed}, though {self.behind} was saved and whole")
            self.behind = None
        self.check()

    def check(self) -> None:
        """Every line of the metrics is that of the run that was never hurt, and none is missing."""
        found = rows(self.run / "metrics.jsonl")
        for key, values in found.items():
            if values != self.wants.get(key):
                raise Failed(f"{key}: {values}, and never hurt {self.wants.get(key)}")
        last = max((step for kind, step in found if kind == "train"), default=0)
        missing = [key for key in self.wants if key[1] < last and key not in found]
        if missing:
            raise Failed(f"lines missing from metrics.jsonl: {missing[:5]}")

    # ── faults ──

    def hurt(self, fault: Fault) -> dict[str, Any]:
        """Do it, and see the run die, stop or go on as it should; what happened."""
        kind, u = fault.kind, fault.u
        if kind == "kill while the folder is begun":
            return self.trap({"phases": ["begin"], "ops": 1 + int(u[0] * 13), "do": "kill"}, fresh=True)
        if kind == "kill in restore":
            when = {"ops": 1 + int(u[0] * 6)} if u[1] < 0.4 else {"seconds": u[0] * 0.4}
            return self.trap({"phases": ["restore"], "do": "kill", **when}, fresh=True)
        if kind == "kill while the result is written":
            phase, ops = ("result", 8) if u[1] < 0.5 else ("finish", 7)
            return self.trap({"phases": [phase], "ops": 1 + int(u[0] * ops), "do": "kill"}, fresh=True)
        if kind == "disk full at the end":
            phase, ops = ("result", 6) if u[1] < 0.5 else ("finish", 5)
            return self.full({"phases": [phase], "ops": 1 + int(u[0] * ops), "do": "full"})
        if kind == "kill at a moment of the start":
            self.down()
            self.start()
            time.sleep(0.05 + 2.5 * u[0])
            return self.kill("start")
        if kind in DAMAGE:
            return self.damaged(DAMAGE[kind], u)
        if kind == "all checkpoints damaged":
            return self.all_damaged(u)
        if kind == "data file changed":
            return self.data_changed(u)
        if kind == "NaN in a batch":
            return self.nan(u)
        self.up()
        if kind == "kill at a step":
            self.until(lambda: self.step() > self.mark + u[0] * 25 or not self.alive(), "steps")
            time.sleep(0.03 * u[1])
            return self.kill("steps")
        if kind == "kill in a save":
            return self.trap({"phases": ["save", "write", "seal"], "ops": 1 + int(u[0] * 24), "do": "kill"})
        if kind == "kill while files are written":
            return self.trap({"phases": ["save"], "seconds": u[0] * 0.15, "do": "kill"})
        if kind == "kill in reading back and sealing":
            when = {"ops": 1 + int(u[0] * 8)} if u[1] < 0.5 else {"seconds": u[0] * 0.1}
            return self.trap({"phases": ["seal"], "do": "kill", **when})
        if kind == "disk full":
            return self.full({"phases": ["save", "write", "seal"], "ops": 1 + int(u[0] * 24), "do": "full"})
        if kind == "file size limit":
            limit = {"do": "limit", "bytes": int(u[0] * 12 * 1024)}
            return self.full({"phases": ["steps"], "ops": 1 + int(u[1] * 20), **limit})
        if kind == "clock jump":
            jump = (1 if u[0] < 0.5 else -1) * 10 ** (7 * u[1])  # up to four months
            then = time.time() + jump
            found = self.trap({"phases": ["steps"], "ops": 1 + int(u[2] * 20), "do": "clock", "jump": jump})
            # os.walk passes over a folder that the run renames or removes meanwhile, as Path.rglob does not
            for root, _, names in os.walk(self.checkpoints) if u[3] < 0.5 else ():
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(pathlib.Path(root, name), (then, then))  # as if written by the other clock
            return found | {"at": f"{found['at']}: {jump:+.0f} s"} | self.goes_on()
        if kind == "slow disk":
            slow = {"do": "slow", "each": 0.02 + 0.1 * u[0], "last": 1 + u[1]}
            return self.trap({"phases": ["save", "write"], "ops": 1, **slow}) | self.goes_on()
        if kind == "stopped for a while":
            assert self.child is not None
            at, pause = self.step(), 0.2 + 2 * u[1]
            os.kill(self.child.pid, signal.SIGSTOP)
            time.sleep(pause)
            os.kill(self.child.pid, signal.SIGCONT)
            went = self.goes_on()
            lost = {"step": at, "seconds_lost": went["seconds_lost"] + pause}
            return {"phase": "any", "at": f"{pause:.1f} s"} | went | lost
        if kind == "bit flipped before it was read back":
            return self.flipped_in_flight({"phases": ["read"], "ops": 0, "do": "flip", "u": u[0]})
        if kind in ("SIGTERM", "Ctrl-C"):
            return self.signalled(signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT, u)
        raise AssertionError(kind)

    def down(self) -> None:
        """No run under way: where there is one, it is killed once it has made good what came before."""
        if self.alive():
            self.up()
            self.kill("steps")

    def kill(self, phase: str) -> dict[str, Any]:
        assert self.child is not None
        if self.child.poll() is None:
            os.kill(self.child.pid, signal.SIGKILL)
        return self.died({"phase": phase, "at": ""})

    def died(self, hit: dict[str, Any]) -> dict[str, Any]:
        if self.ended() != -signal.SIGKILL:
            raise Failed(
                f"it ended with {self.child and self.child.status} before it was killed:\n{self._tail()}"
            )
        self.behind = max(self.sealed(), default=None)
        return hit | {"step": self.step(), "outcome": "died"}

    def trap(self, trap: dict[str, Any], fresh: bool = False) -> dict[str, Any]:
        """Arm it in the run that is under way, or in one that starts, until it was sprung."""
        if fresh:
            self.down()
        self.shared.arm(trap)
        child = self.start() if fresh else self.child
        assert child is not None
        hit = self.until(lambda: self.shared.was_hit() or child.poll() is not None, f"{trap} has to be met")
        if hit is True:
            raise Failed(f"the run ended with {child.status} before {trap}:\n{self._tail()}")
        return self.died(hit) if trap["do"] == "kill" else hit

    def goes_on(self) -> dict[str, Any]:
        """The run, still under way, comes past more than another checkpoint."""
        at, begun = self.step(), time.monotonic()
        self.until(lambda: self.step() > at or not self.alive(), "another step")
        lost = time.monotonic() - begun
        self.mark = max(self.mark, at) + EVERY + 2
        self.up()
        return {"step": at, "outcome": "went on", "seconds_lost": lost}

    def stopped(self, codes: tuple[int, ...], *says: str) -> dict[str, Any]:
        """The run has ended by itself with one of `codes`, and its last words hold all of `says`."""
        code, text = self.ended(), self.child.text() if self.child else ""
        if code not in codes or "Traceback" in text or not all(re.search(s, text, re.S) for s in says):
            raise Failed(f"it ended with {code}, not {codes}, or did not say {says}:\n{text}")
        last = [line for line in text.splitlines() if line.startswith(("error:", "ftjax:"))]
        return {"outcome": "stopped", "said": last[-1] if last else ""}

    def full(self, trap: dict[str, Any]) -> dict[str, Any]:
        if trap["phases"][0] in self.END:
            self.down()
            self.shared.arm(trap)
            self.start()
        else:
            self.shared.arm(trap)
        kept = self.sealed()
        found = self.stopped(
            (1, 2),
            r"disk is full|disk full|may not grow|No space left|File too large",
            "intact|nothing was changed",
        )
        left = self.sealed()
        self.behind = max(left, default=None)
        if kept and (not left or left[-1] < kept[-1]):
            raise Failed(f"checkpoint {kept[-1]} was there and is gone: {left}")
        return {**(self.shared.was_hit() or {}), "step": self.step(), **found}

    def damaged(self, how: str, u: tuple[float, ...]) -> dict[str, Any]:
        """The run dies, and a file of its newest checkpoint is harmed, in one of three that of its seal."""
        self.up()  # with one before it to fall back to
        self.until(lambda: self.step() > self.mark + u[1] * 15 and len(self.sealed()) > 1, "steps")
        self.kill("steps")
        steps = sorted(int(p.name) for p in self.checkpoints.iterdir() if p.name.isdigit())
        sealed = self.sealed()
        newest = steps[-1]
        seal = self.checkpoints / "seals" / f"{newest}.json"
        if u[2] < 0.2 and seal.exists():
            whole = self.folder / "seal"
            whole.mkdir(exist_ok=True)
            shutil.copy(seal, whole / seal.name)
            said = damage(how, whole, u[0])
            if (whole / seal.name).exists():
                shutil.copy(whole / seal.name, seal)
            else:
                seal.unlink()
            shutil.rmtree(whole)
        else:
            said = damage(how, self.checkpoints / str(newest), u[0])
        self.behind = max((s for s in sealed if s != newest), default=None)
        unsealed = "" if newest in sealed else ", not yet sealed"
        return {
            "step": self.step(),
            "phase": "stopped",
            "at": said + unsealed,
            "outcome": f"{newest} damaged",
        }

    def all_damaged(self, u: tuple[float, ...]) -> dict[str, Any]:
        self.down()
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.checkpoints, copy)
        for p in sorted(self.checkpoints.iterdir()):
            if p.name.isdigit():
                for file in (f for f in p.rglob("*") if f.is_file()):
                    file.write_bytes(file.read_bytes()[: int(u[0] * file.stat().st_size)])
        self.start()
        found = self.stopped((2,), "no checkpoint is whole", "restore the folder from a copy")
        shutil.rmtree(self.checkpoints)
        copy.rename(self.checkpoints)
        self.behind = max(self.sealed(), default=None)
        return {"step": self.step(), "phase": "stopped", "at": "every file cut", **found}

    def data_changed(self, u: tuple[float, ...]) -> dict[str, Any]:
        """While the run is under way, which does not notice; started again it has to."""
        self.up()
        original = self.data.read_text()
        lines = original.splitlines(keepends=True)
        at = int(u[0] * len(lines))
        try:
            changed = lines[at].replace('"content": "', '"content": "moon ')
            self.data.write_text("".join([*lines[:at], changed, *lines[at + 1 :]]))
            self.goes_on()
            self.kill("steps")
            self.start()
            found = self.stopped((2,), "the training data changed since this run began", "--overwrite")
        finally:
            self.data.write_text(original)
        self.behind = max(self.sealed(), default=None)
        return {"step": self.step(), "phase": "any", "at": f"line {at + 1}", **found}

    def nan(self, u: tuple[float, ...]) -> dict[str, Any]:
        self.down()
        self.shared.arm({"phases": [""], "do": "nan", "ahead": int(u[0] * 30)})
        self.start()
        found = self.stopped((2,), r"step \d+: the loss is nan", r"train\.jsonl:\d+", "The state before")
        hit = self.shared.was_hit()
        bad = int(hit["at"].split()[1])
        if f"step {bad}: the loss" not in found["said"]:
            raise Failed(f"the batch of step {bad} was bad: {found['said']}")
        self.behind = bad - 1
        return {"step": bad, **hit, **found}

    def flipped_in_flight(self, trap: dict[str, Any]) -> dict[str, Any]:
        """What the disk gave back differs: the run says so at once, or the bit was one that nobody reads."""
        before = self.sealed()
        hit = self.trap(trap)
        child, mark = self.child, self.step() + EVERY + 2
        assert child is not None
        self.until(lambda: child.poll() is not None or self.step() > mark, "the flipped bit")
        if child.status is None:
            return hit | {"outcome": "went on, the bit being one that holds no value"} | self.goes_on()
        found = self.stopped((2,), "could not be written", "intact", "run the same command again")
        self.behind = before[-1] if before else None
        return {"step": self.step(), **hit, **found}

    def signalled(self, signum: int, u: tuple[float, ...]) -> dict[str, Any]:
        self.until(lambda: self.step() > self.mark + u[0] * 15, "steps")
        assert self.child is not None
        os.kill(self.child.pid, signum)
        found = self.stopped((128 + signum,), "stopped by SIG.*after step", "the same command goes on")
        self.behind = int(found["said"].split("after step ")[1].split(";")[0])
        if self.behind != self.step() or self.behind not in self.sealed():
            raise Failed(f"it said {self.behind}, wrote {self.step()} and saved {self.sealed()}")
        return {"step": self.behind, "phase": "steps", "at": "", **found}

    # ── all of it ──

    def reference(self) -> subprocess.Popen | None:
        """The run that nothing hurts, by a command line of its own; None where it was there already."""
        path = self.folder / "reference"
        if (path / "summary.json").exists():
            return None
        shutil.rmtree(path, ignore_errors=True)
        words = [sys.executable, "-m", "ftjax", *self.words(path), f"checkpoint.every={self.total}"]
        with open(self.folder / "reference.log", "wb") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **environment()})

    def words(self, output: pathlib.Path) -> list[str]:
        return ["sft", str(self.folder / "config.yaml"), f"output={output}"]

    def all(self) -> None:
        whole = self.reference()
        preload()
        if whole and whole.wait():
            raise Failed(f"the run that nothing hurts failed: see {self.folder / 'reference.log'}")
        self.wants = rows(self.folder / "reference" / "metrics.jsonl")
        assert len([1 for kind, _ in self.wants if kind == "train"]) == self.total
        if self.run.exists():
            self.mark, self.behind = self.step(), max(self.sealed(), default=None)
        for fault in self.plan[len(self.records) :]:
            begun = time.monotonic()
            ends = fault.kind in LAST
            if ends and (self.mark < self.total):
                self.to_the_end()
            print(f"{fault.number}/{len(self.plan)} {fault.kind}: ", end="", flush=True)
            found = self.hurt(fault)
            away = time.monotonic()
            hidden = ends or fault.kind in FIRST  # what comes next makes good both
            if not hidden:
                self.resumed = None
                self.up()
                if self.resumed is not None:
                    found["outcome"] += f"; went on from {self.resumed}"
            record = {"number": fault.number, "kind": fault.kind, **found}
            record.setdefault("seconds_lost", None if hidden else time.monotonic() - away)
            record |= {"seconds": time.monotonic() - begun, "starts": self.starts}
            self.records.append(record)
            with open(self.records_path, "a") as f:
                f.write(json.dumps(record) + "\n")
            where = f"step {found.get('step')}, {found.get('phase')}, {found.get('at')}"
            print(f"{where}: {found['outcome']} ({time.monotonic() - begun:.1f} s)", flush=True)
        self.last()

    def to_the_end(self) -> None:
        """The run is let go until its last step is saved, and killed before it writes its result."""
        if not self.alive():
            self.start()
        self.shared.arm({"phases": ["result"], "ops": 1, "do": "kill"})
        self.ended()
        self.behind = None
        self.check()
        if self.step() != self.total:
            raise Failed(f"it ended at step {self.step()}:\n{self._tail()}")

    def last(self) -> None:
        """Let it finish: the same losses, the same adapter."""
        self.shared.arm(None)
        if not self.alive():
            self.start()
        if self.ended() and "holds this very run, finished" not in self._tail():
            raise Failed(f"it could not finish:\n{self._tail()}")
        if rows(self.run / "metrics.jsonl") != self.wants:
            raise Failed("the finished run's metrics differ from those of the run that was never hurt")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            one, other = ((self.folder / r / "adapter" / name).read_bytes() for r in ("run", "reference"))
            if one != other:
                raise Failed(f"adapter/{name} differs from that of the run that was never hurt")


def table(harness: Harness) -> str:
    """What happened, by kind and fault by fault."""
    records = harness.records
    summary = json.loads((harness.run / "summary.json").read_text())
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "orbax-checkpoint", "numpy"))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    lines = [
        "# Faults",
        "",
        f"`python -m benchmarks.faults {harness.how} --seed {harness.seed} --write`, "
        f"{time.strftime('%F')}: {os.cpu_count()} cores ({platform.machine()}) shared with other work, "
        f"Python {platform.python_version()}, {versions}.",
        "",
        f"**{len(records)} faults in one run** of {harness.total} steps, started {records[-1]['starts']} "
        f"times in {sum(r['seconds'] for r in records) / 60:.0f} minutes; every line of its metrics and its "
        "adapter are, bit for bit, those of a run that was never hurt. After each fault the run went on from "
        "a checkpoint no older than the newest that was sealed (and not the one that was harmed), or stopped "
        "with the message that the fault asks for and went on once that was set right.",
        "",
        f"The run's own account: {goodput.text(summary['time'])}. A step takes milliseconds here and a start "
        "seconds, so this says nothing of the goodput of real runs.",
        "",
        "| fault | times | what came of it | seconds lost: middle, most |",
        "|---|---|---|---|",
    ]
    for kind, found in sorted(by_kind.items()):
        words = Counter(re.sub(r"\d+ |[,;].*", "", r["outcome"]) for r in found)
        came = ", ".join(f"{word} {times}" for word, times in words.items())
        lost = sorted(r["seconds_lost"] for r in found if r["seconds_lost"] is not None)
        middle = f"{statistics.median(lost):.1f}, {lost[-1]:.1f}" if lost else ""
        lines.append(f"| {kind} | {len(found)} | {came} | {middle} |")
    lines += [
        "",
        '"Seconds lost" is from the fault until the run had passed every step that it had reached before; '
        "where nothing died, until its next step.",
        "",
        "| | fault | after step | phase | where | outcome | lost, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lost = "" if r["seconds_lost"] is None else f"{r['seconds_lost']:.1f}"
        said = f": {r['said']}" if r.get("said") else ""
        cells = [r["number"], r["kind"], r["step"], r["phase"], r["at"], r["outcome"] + said, lost]
        line = " | ".join(str(c).replace("|", "/").replace(str(harness.folder), "FOLDER") for c in cells)
        lines.append(f"| {line} |")
    return "\n".join(lines) + "\n"


def environment() -> dict[str, str]:
    """One device, as most users have on a CPU."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TOKENIZERS_PARALLELISM": "false"}


def preload() -> None:
    """What every start would import, before there are threads or devices."""
    os.environ.update(environment())
    from ftjax import cli

    cli.environment_defaults()
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401

    import ftjax.recipes.training  # noqa: F401
    from ftjax import hf

    hf.load_tokenizer(hf.open_model(str(MODEL)))
    import jax._src.xla_bridge as bridge

    assert not bridge.backends_are_initialized() and threading.active_count() == 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=220)
    parser.add_argument("--quick", action="store_true", help="one fault of each of a few kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/faults"))
    parser.add_argument("--write", action="store_true", help="the table goes to benchmarks/results/faults.md")
    args = parser.parse_args(argv)
    harness = Harness(args.folder, None if args.quick else args.faults, args.seed)
    try:
        harness.all()
    except Failed as e:
        print(f"\nnot survived: {e}", file=sys.stderr)
        return 1
    finally:
        if harness.alive():
            assert harness.child is not None
            os.kill(harness.child.pid, signal.SIGKILL)
    said = table(harness)
    print(said[: said.index("| | fault")])
    if args.write:
        (HERE / "results" / "faults.md").write_text(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
