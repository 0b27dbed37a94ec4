"""A gcloud of Cloud TPU VMs for tests: it records its calls, keeps slices in a file, runs what ssh is given
in a folder a worker, knows which flags there are, and fails where it is told to.

FAKE_TPU is its folder: state.json (nodes and requests), calls.jsonl, failures.json (a list of {"match": words
of the command, "stderr", "code", "times"}), homes/NODE-WORKER (each worker's home; a file `preempt` in one
takes the slice away)."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(os.environ["FAKE_TPU"])
# `gcloud compute tpus … --help` of Google Cloud SDK 528.0.0, without what no script could want
EVERYWHERE = {"zone", "project", "quiet", "format"}
CREATE = {
    "accelerator-type",
    "spot",
    "reserved",
    "network",
    "subnetwork",
    "labels",
    "metadata",
    "internal-ips",
}
QUEUED = CREATE | {"node-id", "node-count", "node-prefix", "runtime-version", "valid-until-duration"}
FLAGS = {
    "tpu-vm create": CREATE | {"version", "preemptible"},
    "tpu-vm describe": set(),
    "tpu-vm list": set(),
    "tpu-vm delete": {"async"},
    "tpu-vm ssh": {"worker", "command", "internal-ip", "ssh-flag", "ssh-key-file"},
    "tpu-vm scp": {"worker", "recurse", "internal-ip", "scp-flag"},
    "queued-resources create": QUEUED,
    "alpha queued-resources create": QUEUED | {"reservation", "provisioning-model"},
    "queued-resources describe": set(),
    "queued-resources list": set(),
    "queued-resources delete": {"async", "force"},
}
TERMINAL = 'This TPU has terminal state "PREEMPTED", so it cannot be used anymore.'


def fail(message: str, code: int = 1):
    print(f"ERROR: (gcloud.compute.tpus) {message}", file=sys.stderr)
    sys.exit(code)


def missing(kind: str, name: str):
    fail(f"NOT_FOUND: Resource 'projects/p/locations/z/{kind}/{name}' was not found")


def tell_runs(homes: str, number: int) -> bool:
    """A signal to the runs that have not ended and to all that is beside them; whether there are any."""
    found = False
    for file in ROOT.glob(f"homes/{homes}/ftjax/run/parent"):
        if not file.with_name("code").exists():
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(file.read_text()), number)
                found = True
    return found


def end_runs(homes: str, grace: float = 0.0) -> None:
    """As a machine does that goes off: every process is told to end, and what is left after `grace` seconds
    is killed."""
    end = time.monotonic() + grace
    if grace:
        tell_runs(homes, signal.SIGTERM)
    while time.monotonic() < end and tell_runs(homes, 0):
        time.sleep(0.02)
    tell_runs(homes, signal.SIGKILL)


def take_away() -> None:
    """The slices of which a worker says so."""
    taken = []
    with locked():
        state = json.loads((ROOT / "state.json").read_text())
        for name, node in state["nodes"].items():
            if list(ROOT.glob(f"homes/{name}-*/preempt")) and node["state"] == "READY":
                node["state"] = "PREEMPTED"
                taken.append(name)
                if name in state["queue"]:
                    state["queue"][name]["state"] = "SUSPENDED"
        (ROOT / "state.json").write_text(json.dumps(state))
    for name in taken:  # not locked: a run that ends may have something to copy
        end_runs(f"{name}-*", grace=30)


@contextlib.contextmanager
def locked():
    with open(ROOT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def workers_of(accelerator: str) -> int:
    kind, size = accelerator.rsplit("-", 1)
    chips = int(size) // (2 if kind in ("v4", "v5p") else 1)
    return max(1, chips // 4)


def add_node(state: dict, name: str, accelerator: str) -> None:
    state["nodes"][name] = {"state": "READY", "type": accelerator, "workers": workers_of(accelerator)}


def main(argv: list[str]) -> None:
    if argv[0] != "storage":
        take_away()
    with locked():
        with open(ROOT / "calls.jsonl", "a") as calls:
            calls.write(json.dumps(argv) + "\n")
        failures = json.loads((ROOT / "failures.json").read_text())
        for one in failures:
            if one["match"] in " ".join(argv) and one["times"]:
                one["times"] -= 1
                (ROOT / "failures.json").write_text(json.dumps(failures))
                fail(one["stderr"], one["code"])
        if argv[0] == "storage":
            storage(argv[1:])
            return
        alpha = argv[0] == "alpha"
        words = argv[alpha:]
        assert words[:2] == ["compute", "tpus"], argv
        verb, rest = " ".join(words[2:4]), words[4:]
        known = FLAGS[("alpha " if alpha else "") + verb]
        names, flags = [], {}
        for word in rest:
            if word.startswith("--"):
                key, _, value = word[2:].partition("=")
                if key not in known | EVERYWHERE:
                    fail(f"unrecognized arguments: {word}", 2)
                flags[key] = value
            else:
                names.append(word)
        state = json.loads((ROOT / "state.json").read_text())
        if verb == "tpu-vm ssh":
            run = ssh(state, names[0], flags)
        elif verb == "tpu-vm scp":
            run = scp(state, names, flags)
        else:
            run = None
            manage(state, verb, names, flags)
        (ROOT / "state.json").write_text(json.dumps(state))
    if run is not None:
        run()


def manage(state: dict, verb: str, names: list[str], flags: dict) -> None:
    nodes, queue = state["nodes"], state["queue"]
    name = names[0] if names else ""
    if verb == "tpu-vm create":
        if name in nodes:
            fail(f"ALREADY_EXISTS: Resource '{name}' already exists")
        add_node(state, name, flags["accelerator-type"])
    elif verb == "queued-resources create":
        if name in queue:
            fail(f"ALREADY_EXISTS: Resource '{name}' already exists")
        count = int(flags.get("node-count", 1))
        request = {"state": "WAITING_FOR_RESOURCES", "type": flags["accelerator-type"], "count": count}
        queue[name] = request | {"node": flags.get("node-id") or flags["node-prefix"]}
    elif verb == "queued-resources describe":
        one = queue.get(name) or missing("queuedResources", name)
        if "failedData" in flags["format"]:
            print(one.get("why", ""))
            return
        print(f"{one['state']},{one['count'] if one['count'] > 1 else ''}")
        then = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}
        if state["granted"]:  # one step on each time that somebody looks
            one["state"] = then.get(one["state"], one["state"])
        if one["state"] == "ACTIVE":
            for i in range(one["count"]):
                node = one["node"] + (f"-{i}" if one["count"] > 1 else "")
                if node not in nodes:
                    add_node(state, node, one["type"])
    elif verb == "tpu-vm describe":
        one = nodes.get(name) or missing("nodes", name)
        print(f"{one['state']},{one['type']},{one['workers']}")
    elif verb in ("tpu-vm delete", "queued-resources delete"):
        if verb.startswith("queued"):
            one = queue.pop(name, None) or missing("queuedResources", name)
            gone = [f"{one['node']}-{i}" for i in range(one["count"])] if one["count"] > 1 else [one["node"]]
            assert "force" in flags or not any(node in nodes for node in gone)
        else:
            gone = [name]
            if name not in nodes:
                missing("nodes", name)
        for node in gone:
            nodes.pop(node, None)
            end_runs(f"{node}-*")
            for home in ROOT.glob(f"homes/{node}-*"):
                shutil.rmtree(home)  # a slice's disks go with it
    elif verb.endswith("list"):
        print(*nodes)


def storage(argv: list[str]) -> None:
    """`gcloud storage ls FILE` and `rsync --recursive --exclude=REGEX FROM TO`, of buckets in a folder."""

    def at(url: str) -> pathlib.Path:
        return ROOT / "buckets" / url[5:] if url.startswith("gs://") else pathlib.Path(url)

    if argv[0] == "ls":
        if not at(argv[1]).exists():
            fail("One or more URLs matched no objects.")
        return
    verb, recursive, exclude, source, target = argv
    assert (verb, recursive) == ("rsync", "--recursive"), argv
    skip = re.compile(exclude.removeprefix("--exclude="))
    for path in sorted(at(source).rglob("*")):
        name = str(path.relative_to(at(source)))
        if path.is_file() and not skip.match(name):
            (at(target) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, at(target) / name)


def reach(state: dict, name: str, flags: dict) -> dict[int, pathlib.Path]:
    """The homes of the workers that are meant."""
    node = state["nodes"].get(name) or missing("nodes", name)
    if node["state"] == "PREEMPTED":
        fail(TERMINAL)
    which = range(node["workers"]) if flags.get("worker") == "all" else [int(flags.get("worker") or 0)]
    homes = {i: ROOT / "homes" / f"{name}-{i}" for i in which}
    for home in homes.values():
        home.mkdir(parents=True, exist_ok=True)
    return homes


def ssh(state: dict, name: str, flags: dict):
    homes = reach(state, name, flags)

    def run() -> None:
        started = []
        for i, home in homes.items():
            env = os.environ | {"HOME": str(home), "WORKER": str(i)}
            command = ["bash", "-c", flags["command"]]
            started.append(subprocess.Popen(command, cwd=home, env=env, start_new_session=True))
        try:
            while any(one.poll() is None for one in started):
                if any((home / "preempt").exists() for home in homes.values()):
                    fail("[/usr/bin/ssh] exited with return code [255].", 255)
                time.sleep(0.01)
        finally:  # what is still there ends with the connection; what has a session of its own does not
            for one in started:
                if one.poll() is None:
                    os.killpg(one.pid, signal.SIGKILL)
        sys.exit(next((one.returncode for one in started if one.returncode), 0))

    return run


def scp(state: dict, names: list[str], flags: dict):
    *sources, target = names
    if ":" in target:
        name, _, folder = target.partition(":")
        for home in reach(state, name, flags).values():
            for source in sources:
                shutil.copy(source, home / folder)
    else:
        name, _, path = sources[0].partition(":")
        (home,) = reach(state, name, flags).values()
        if not (home / path).exists():
            fail(f"scp: {path}: No such file or directory")
        shutil.copy(home / path, target)


signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
main(sys.argv[1:])
