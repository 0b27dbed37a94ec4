"""The run folder: a run that is killed while it begins, or while it deletes what was there, can be started
again."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from ftjax import config, distributed
from ftjax.errors import UserError
from ftjax.recipes import folder

pytestmark = pytest.mark.fast


class Killed(BaseException):
    pass


@pytest.fixture
def killed(monkeypatch):
    """killed(k, action): the action, cut off at its k-th change to a file; whether it came that far."""

    def run(at, action):
        count = 0

        def counting(real):
            def wrapped(*args, **kwargs):
                nonlocal count
                count += 1
                if count == at:
                    raise Killed
                return real(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as m:
            m.setattr(os, "replace", counting(os.replace))
            for name in ("write_text", "unlink"):
                m.setattr(pathlib.Path, name, counting(getattr(pathlib.Path, name)))
            try:
                action()
            except Killed:
                return True
        return False

    return run


def begin(cfg, **flags):
    run = folder.claim(cfg, **flags)
    for name in ("base.json", "data.json"):
        run.pin(name, {"fingerprint": name}, name)
    run.clear()
    run.begin(cfg)
    return run


@pytest.fixture
def cfg(tmp_path):
    return config.load(None, ["model=m", "data.train=d.jsonl", f"output={tmp_path / 'run'}"], "sft")


def test_killed_while_it_begins(cfg, killed):
    at = 1
    while killed(at, lambda: begin(cfg)):
        at += 1
    assert at > 8 and not begin(cfg).fresh


def test_killed_while_it_goes_on(cfg, killed):
    begin(cfg)
    at = 1
    while killed(at, lambda: begin(cfg)):
        assert not folder.claim(cfg).fresh
        at += 1
    assert at > 6


def test_killed_while_it_deletes_an_earlier_run(cfg, killed):
    begin(cfg)
    at = 1
    while killed(at, lambda: begin(cfg, overwrite=True)):
        at += 1
    assert at > 20 and not begin(cfg).fresh


def test_a_config_of_the_users_alone_is_not_ours(cfg):
    path = pathlib.Path(cfg.output)
    path.mkdir()
    (path / "config.yaml").write_text("model: mine\n")
    with pytest.raises(UserError, match="not empty"):
        folder.claim(cfg)


def test_checkpoints_alone_are_not_ours_if_there_are_any(cfg):
    steps = pathlib.Path(cfg.output, "checkpoints")
    steps.mkdir(parents=True)
    (steps / f"{distributed.MARK}x").write_text("")  # of a start that was killed
    assert folder.claim(cfg).fresh
    (steps / "5").mkdir()
    with pytest.raises(UserError, match="not empty"):
        folder.claim(cfg)


CLAIM = """
import sys, time
from ftjax import config
from ftjax.recipes import folder
run = folder.claim(config.load(None, sys.argv[1:], "sft"))
print("at it", flush=True)
time.sleep(600)
"""


def test_one_process_at_a_time_and_none_that_is_dead(cfg, monkeypatch):
    words = ["model=m", "data.train=d.jsonl", f"output={cfg.output}"]
    other = subprocess.Popen([sys.executable, "-c", CLAIM, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "at it\n"
        since = rf"\(process id {other.pid} on {socket.gethostname()}, since 2.*\): wait for it or end"
        for flags in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match=f"another process is at the run in .*run {since}"):
                folder.claim(cfg, **flags)
        monkeypatch.setattr(folder, "LEASE_SECONDS", 0.5)
        lock = pathlib.Path(cfg.output, f"{distributed.MARK}lock")
        lock.write_text("process id 1 on elsewhere, since then")
        with pytest.raises(
            UserError, match=r"elsewhere.*; if that machine is gone, delete .*/run/\.ftjax-lock"
        ):
            folder.claim(cfg)
    finally:
        other.kill()
        other.wait()
    with folder.claim(cfg) as run:
        assert run.fresh and run.lock is not None
    assert run.lock.closed


def test_half_written_results_go(cfg):
    run = begin(cfg)
    for name in (".adapter.x.partial", ".mine.x.partial"):
        (run.path / name).mkdir()
    begin(cfg)
    assert not (run.path / ".adapter.x.partial").exists() and (run.path / ".mine.x.partial").exists()
