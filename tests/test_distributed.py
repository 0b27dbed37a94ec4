"""Runs of several processes on this machine: the real command line, over jax.distributed and gloo."""

import http.server
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax import distributed
from ftjax.distributed import DistributedOptions, Place, find
from ftjax.errors import UserError

HERE = pathlib.Path(__file__).parent
STEPS = 40
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compile in half the time
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


# Of a process that gets SIGUSR1 the main thread waits for its next batch for ever; its other threads live.
COMMAND = """
import signal, sys, time
from ftjax import cli
from ftjax.data import ahead

def hang(*_):
    ahead.Ahead.__next__ = lambda batches: time.sleep(600)

signal.signal(signal.SIGUSR1, hang)
sys.exit(cli.main(sys.argv[1:]))
"""


class Processes:
    """`ftjax sft`, or another verb, in n processes, of `devices` CPU devices each; what each said is kept."""

    def __init__(
        self, output: pathlib.Path, n: int, devices: int, *overrides, only: dict | None = None, verb="sft"
    ):
        self.output, self.started = output, time.time()
        meeting = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(n)}
        base = {k: v for k, v in os.environ.items() if not k.startswith("FTJAX_TRACEBACK")}
        base |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
        }
        self.logs = [output.parent / f"{output.name}.{n}.{i}.log" for i in range(n)]
        self.all = []
        for i, log in enumerate(self.logs):
            env = base | (meeting | {"JAX_PROCESS_ID": str(i)} if n > 1 else {})
            words = [str(output.parent / "config.yaml"), f"output={output}", *overrides]
            words += (only or {}).get(i, [])
            with open(log, "w") as file:
                command = [sys.executable, "-c", COMMAND, verb, *words]
                self.all.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))

    def said(self, i: int) -> str:
        """Less what gloo prints of itself."""
        return "".join(x for x in self.logs[i].read_text().splitlines(True) if not x.startswith("[Gloo]"))

    def until(self, step: int) -> None:
        metrics, deadline = self.output / "metrics.jsonl", time.time() + 240
        while time.time() < deadline and all(p.poll() is None for p in self.all):
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                return
            time.sleep(0.02)
        self.kill()
        raise AssertionError(
            f"never came to step {step}:\n" + "\n".join(map(self.said, range(len(self.all))))
        )

    def end(self, *but: int, timeout: float = 240) -> list[int]:
        """The exit codes, once all `but` those have ended; those are killed then."""
        try:
            for i, p in enumerate(self.all):
                if i not in but:
                    p.wait(timeout)
        finally:
            self.kill()
        return [p.returncode for p in self.all]

    def kill(self) -> None:
        for p in self.all:
            p.kill()
            p.wait()


def losses(output) -> dict[int, float]:
    """{step: loss}; a step that was written twice fails."""
    found = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "train":
            assert row["step"] not in found
            found[row["step"]] = row["loss"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    rng = random.Random(0)
    words = "the cat dog sun big red ran sat and saw".split()
    with open(folder / "train.jsonl", "w") as f:
        for _ in range(64):
            messages = [
                {"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(2, 8)))},
                {"role": "assistant", "content": " ".join(rng.choices(words, k=rng.randint(1, 6)))},
            ]
            f.write(json.dumps({"messages": messages}) + "\n")
    (folder / "config.yaml").write_text(f"""
model: {HERE / "assets" / "tiny_model"}
data: {{train: {folder / "train.jsonl"}, max_length: 64, cache_dir: {folder / "cache"}}}
lora: {{r: 4, lora_dropout: 0.1}}
train: {{max_steps: {STEPS}, batch_size: 8, dtype: float32}}
optim: {{lr: 0.003, warmup_steps: 5}}
checkpoint: {{every: 4}}
report: {{tensorboard: false}}
distributed: {{silent_seconds: 10}}
""")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run of one process over four devices, that nothing disturbs."""
    run = Processes(folder / "whole", 1, 4)
    assert run.end() == [0], run.said(0)
    assert sorted(losses(run.output)) == list(range(1, STEPS + 1))
    return run.output


def close(output, whole, count=None):
    """Sums over devices are taken in another order where they are of other processes."""
    a, b = losses(output), losses(whole)
    assert list(a) == list(b)[:count]
    np.testing.assert_allclose([a[s] for s in a], [b[s] for s in a], rtol=2e-5)


def test_a_run_goes_on_over_other_processes_and_meshes(folder, whole):
    """Two processes, one of which gets a SIGTERM; then four, one of which is killed; then two and another
    mesh, the main thread of one of which hangs; then one alone."""
    output = folder / "moved"
    run = Processes(output, 2, 2)
    run.until(3)
    run.all[1].send_signal(signal.SIGTERM)
    assert run.end() == [128 + signal.SIGTERM] * 2, run.said(0) + run.said(1)
    stopped = max(losses(output))
    for i in range(2):
        assert f"stopped by SIGTERM after step {stopped}" in run.said(i)
    close(output, whole, stopped)
    assert str(stopped) in os.listdir(output / "checkpoints")
    assert "loss" in run.said(0) and "loss" not in run.said(1)  # one alone prints

    run = Processes(output, 4, 1)
    run.until(stopped + 6)
    run.all[2].kill()
    began = time.time()
    codes = run.end()
    assert time.time() - began < 60
    assert codes == [distributed.LOST] * 2 + [-signal.SIGKILL] + [distributed.LOST]
    for i in (0, 1, 3):
        assert (
            f"process 2 of 4 ({socket.gethostname()}, process id {run.all[2].pid}) was not heard"
            in run.said(i)
        )
        assert "goes on from the last checkpoint" in run.said(i)
    assert f"going on from the checkpoint of step {stopped}" in run.said(0)

    run = Processes(output, 2, 2, "mesh.tp=2", "distributed.behind_seconds=8", "--resume")
    run.until(max(losses(output)) + 1)
    run.all[1].send_signal(signal.SIGUSR1)
    began = time.time()
    assert run.end() == [distributed.LOST] * 2 and time.time() - began < 60, run.said(0) + run.said(1)
    hung = f"process 1 of 2 ({socket.gethostname()}, process id {run.all[1].pid}) came no further for "
    for i in range(2):
        assert hung in run.said(i) and "while others waited for it: it hangs" in run.said(i)
    assert "lambda batches: time.sleep" in run.said(1) or "in <lambda>" in run.said(1)  # where it does

    run = Processes(output, 1, 4, "--resume")
    assert run.end() == [0], run.said(0)
    close(output, whole)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_preferences_full_tuning_and_evaluation_over_two_processes(folder):
    """As of one process: losses, evaluations, and every weight that is taken away."""
    rng = random.Random(1)
    say = lambda: " ".join(rng.choices("the cat dog sun big red ran".split(), k=rng.randint(1, 6)))  # noqa: E731
    with open(folder / "pairs.jsonl", "w") as f:
        for _ in range(48):
            f.write(json.dumps({"prompt": say(), "chosen": say(), "rejected": say()}) + "\n")
    given = [f"data.train={folder / 'pairs.jsonl'}", "data.eval_fraction=0.2", "lora=null", "eval.every=2"]
    given += ["train.max_steps=4", "mesh={fsdp: 2, tp: 2}", "data.max_length=128", "optim.name=sgd"]
    given += ["optim.warmup_steps=0", "optim.lr=0.1"]
    runs = [
        Processes(folder / name, n, 4 // n, *given, verb="dpo") for name, n in (("together", 2), ("alone", 1))
    ]
    for run in runs:
        assert run.end() == [0] * len(run.all), run.said(0)
    together, alone = (run.output for run in runs)
    close(together, alone)
    evaluated = [
        [r["loss"] for r in map(json.loads, open(output / "metrics.jsonl")) if r["kind"] == "eval"]
        for output in (together, alone)
    ]
    assert len(evaluated[0]) >= 2
    np.testing.assert_allclose(*evaluated, rtol=2e-5)
    ours, theirs = (load_file(next((output / "model").glob("*.safetensors"))) for output in (together, alone))
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4, atol=2e-5, err_msg=name)


WAYS = {
    "streamed data, a base in four bits, memory chosen by compiling": [
        *("data.streaming=true", "data.cache_dir=null", "quant.kind=nf4", "quant.block_size=32"),
        *("train.remat=auto", "mesh={fsdp: 2, cp: 2}"),
    ],
    "adapters begun from the data, a profile, evaluation": [
        *("lora.init_lora_weights=eva", "profile=true", "data.eval_fraction=0.2", "eval.every=4"),
        *("train.max_steps=10", "mesh={fsdp: 4}"),
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_as_one(folder, way):
    output = folder / way.partition(",")[0].replace(" ", "-")
    given = ["train.max_steps=6", "checkpoint.every=100", *WAYS[way]]
    runs = [Processes(output.with_name(f"{output.name}-{n}"), n, 4 // n, *given) for n in (2, 1)]
    for run in runs:
        assert run.end() == [0] * len(run.all), run.said(0)
    together, alone = (run.output for run in runs)
    close(together, alone)
    assert len(losses(together)) >= 6
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())


def test_an_error_of_one_process_ends_all_and_is_seen(folder):
    run = Processes(folder / "failed", 2, 1, only={1: ["data.cache_dir=/proc/x"]})
    assert run.end(timeout=60) == [1, 2]
    assert "error: process 1: cannot write to /proc/x" in run.said(1)
    assert "process 1 of 2" in run.said(0) and "failed: cannot write to /proc/x" in run.said(0)


def test_processes_with_other_settings_are_told_which(folder):
    run = Processes(folder / "unlike", 2, 1, only={1: ["optim.lr=0.1", "seed=1"]})
    assert run.end(timeout=60) == [2, 2]
    assert "have to be alike: seed is 1 in process 1 and 0 in process 0; optim.lr is 0.1 in" in run.said(0)
    assert not run.output.exists()


MEET = """
import sys, time
from ftjax import distributed
with distributed.together(distributed.DistributedOptions(join_seconds=3, silent_seconds=5)):
    assert distributed.from_all(distributed.count() * 10) == [20, 20]
    assert distributed.from_first(lambda: [distributed.first()]) == [True]
    print("met", flush=True)
    time.sleep(float(sys.argv[1]))
"""


def meet(port: int, i: int, seconds: float) -> subprocess.Popen:
    env = os.environ | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-c", MEET, str(seconds)]
    pipes: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}, **pipes)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_where_process_0_is_killed_or_stopped_or_never_comes(blow):
    port = free_port()
    both = [meet(port, i, 60) for i in range(2)]
    for p in both:
        assert p.stdout is not None
        for line in p.stdout:
            if line == "met\n":
                break
    time.sleep(2.5)  # it has to have been heard from
    both[0].send_signal(blow)
    said = both[1].communicate(timeout=60)[0]
    both[0].kill()
    assert both[1].returncode == distributed.LOST and f"process 0 of 2 ({socket.gethostname()}" in said
    if blow == signal.SIGSTOP:
        return
    alone = meet(free_port(), 1, 0)
    said = alone.communicate(timeout=60)[0]
    assert alone.returncode == distributed.LOST and "not all of the 2 processes came to localhost" in said


@pytest.mark.fast
def test_who_is_behind_and_for_too_long():
    run = distributed._Run(Place("h:1", 2, 0), DistributedOptions())
    ended = []
    run.lost_by = lambda text, stack=None, **_: ended.append((stack, text))

    def signs(now, *loops):
        run._compare({str(p): {"host": "h", "pid": p, "loop": x} for p, x in enumerate(loops)}, now)
        return len(ended)

    assert not signs(0, (7, 60), None)  # it has not come to the loop: it may compile
    assert not signs(900, (7, 60), (6, 60))
    assert not signs(950, (8, 60), (7, 60))  # behind, but it moves
    assert not signs(1009, (8, 60), (7, 60))
    assert not signs(1100, (8, 60), (7, 600)) and not signs(1690, (8, 60), (7, 600))  # it saves
    assert not signs(1710, (8, 60), (7, 60)) and not signs(1769, (8, 60), (7, 60))
    assert signs(1771, (8, 60), (7, 60)) == 1
    assert ended[0][0] == 1 and ended[0][1].startswith(
        "process 1 of 2 (h, process id 1) came no further for 61"
    )
    assert signs(1800, (8, 60), (8, 60)) == 1 and signs(3590, (8, 60), (8, 60)) == 1
    assert signs(3601, (8, 60), (8, 60)) == 2 and ended[1][1].startswith("no process came any further")


@pytest.mark.fast
def test_slow_steps_and_what_is_done_at_leisure_may_take_longer(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    distributed.progress()  # outside of a loop
    with distributed.loop():
        at = distributed._loop
        assert at.said() is None and at.patience() == 60
        for _ in range(3):
            clock[0] += 40
            with distributed.at_leisure():
                assert at.patience() >= 600
                clock[0] += 500
            clock[0] += 50
            distributed.progress()
        assert at.said() == (3, 3 * 50)
    assert at.said() is None


STUCK = """
import ctypes, os, signal, sys
from ftjax import distributed, train
distributed.start(distributed.DistributedOptions(behind_seconds=2))
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with train.signals():
    distributed.progress()
    print("in a step", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever; no handler of Python's runs
"""


@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_whose_step_hangs(blow):
    pipes: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    one = subprocess.Popen([sys.executable, "-c", STUCK], **pipes)
    assert one.stdout is not None
    while "in a step" not in one.stdout.readline():
        assert one.poll() is None
    one.send_signal(blow)
    said = one.communicate(timeout=60)[0]
    assert one.returncode == 128 + blow
    assert f"error: {blow.name} came, but what is under way did not end" in said and "line 10, in" in said


def test_processes_part_in_good_order():
    port = free_port()
    both = [meet(port, i, 6 * i) for i in range(2)]  # the first waits for the second
    said = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said


@pytest.mark.fast
def test_a_process_reads_its_shards_of_the_weights_and_no_more(monkeypatch):
    """Of eight devices the first two stand for this process's: what is copied out of the file is counted."""
    import jax

    from ftjax import files, hf, mesh, models, weights

    source = hf.open_model(HERE / "assets" / "tiny_model")
    model = models.from_config(source.config)
    devices = mesh.make_mesh(mesh.MeshOptions(fsdp=4, tp=2))
    shardings = weights.shardings(model.table, mesh.weight_rules(devices, model.table), devices)
    mine = set(devices.devices.flat[:2])
    read: list[int] = []

    class Shards(hf._Shards):
        def __init__(self, shape, sharding, apart):
            super().__init__(shape, sharding, apart)
            self.where = {device: bounds for device, bounds in self.where.items() if device in mine}

        def whole(self, parts):
            return parts

    def counted(out, x, split):
        assert x.base is not None  # a view of the mapped file
        read.append(x.nbytes)
        files.copy(out, x, split)

    monkeypatch.setattr(hf, "_Shards", Shards)
    monkeypatch.setattr(hf, "copy", counted)
    held = hf.load_params(source, model, shardings=shardings)
    distinct = {}
    for path, parts in weights.flatten(held).items():
        where = {str(shardings_of(shardings, path, x)): x.nbytes for x in parts}
        distinct[path] = sum(where.values())
    whole = sum(source.get(name).nbytes for name in source.names())
    assert sum(read) == sum(distinct.values()) < 0.3 * whole
    assert jax.process_count() == 1


def shardings_of(shardings, path, x):
    from ftjax import weights

    sharding = weights.flatten(shardings)[path]
    (device,) = x.devices()
    spread = [1 if a is None else sharding.mesh.shape[a] for a in sharding.spec]
    shape = tuple(n * s for n, s in zip(x.shape, [*spread, *[1] * (x.ndim - len(spread))], strict=True))
    return sharding.devices_indices_map(shape)[device]


# -- Who is who


@pytest.fixture
def environ(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JOB_", "KUBERNETES_", "CUDA_")):
            monkeypatch.delenv(name)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return put


@pytest.mark.fast
def test_a_lone_process_stays_alone(environ):
    assert find(DistributedOptions()) is None
    assert find(DistributedOptions(processes=1, coordinator="a:1")) is None
    environ(JAX_COORDINATOR_ADDRESS="a:1")  # meant for another program, perhaps
    assert find(DistributedOptions()) is None
    distributed.start(DistributedOptions())
    assert distributed.count() == 1 and distributed.first()
    assert distributed.from_first(lambda: 3) == 3 and distributed.from_all(3) == [3]


@pytest.mark.fast
def test_given_by_hand(environ):
    options = DistributedOptions(coordinator="h:1", processes=4, process=3, local_devices=(0, 1))
    assert find(options) == Place("h:1", 4, 3, [0, 1])
    environ(JAX_COORDINATOR_ADDRESS="e:2", JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=1)
    assert find(DistributedOptions()) == Place("e:2", 2, 1)
    assert find(DistributedOptions(process=0)) == Place("e:2", 2, 0)


@pytest.mark.fast
def test_bad_places(environ):
    with pytest.raises(UserError, match="no distributed.process, "):
        find(DistributedOptions(coordinator="h:1", processes=4))
    with pytest.raises(UserError, match="no distributed.coordinator and distributed.processes"):
        find(DistributedOptions(process=1))
    with pytest.raises(UserError, match="process=4 of 4: they are counted from 0 to 3"):
        DistributedOptions(coordinator="h:1", processes=4, process=4)
    with pytest.raises(UserError, match="HOST:PORT"):
        DistributedOptions(coordinator="h")
    with pytest.raises(UserError, match="cluster=slurm: this process was not started by it"):
        find(DistributedOptions(cluster="slurm"))
    environ(JAX_NUM_PROCESSES="two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=two: a whole number"):
        find(DistributedOptions())


@pytest.mark.fast
def test_slurm(environ):
    environ(
        SLURM_JOB_ID=4097,
        SLURM_STEP_NODELIST="gpu[003-004,9]",
        SLURM_NTASKS=3,
        SLURM_PROCID=2,
        SLURM_LOCALID=0,
    )
    environ(SLURM_NODEID=2, SLURM_STEP_TASKS_PER_NODE="1(x3)", CUDA_VISIBLE_DEVICES="0,1,2,3")
    # a node's only task has all of its GPUs, where jax would take the first
    assert find(DistributedOptions()) == Place("gpu003:61441", 3, 2, None)
    environ(
        SLURM_NTASKS=6, SLURM_PROCID=3, SLURM_NODEID=1, SLURM_LOCALID=1, SLURM_STEP_TASKS_PER_NODE="2(x3)"
    )
    assert find(DistributedOptions()) == Place("gpu003:61441", 6, 3, [2, 3])
    environ(CUDA_VISIBLE_DEVICES="1")  # bound by --gpus-per-task
    assert find(DistributedOptions()) == Place("gpu003:61441", 6, 3, None)
    environ(JAX_COORDINATOR_PORT=1234)
    assert find(DistributedOptions()) == Place("gpu003:1234", 6, 3, None)
    assert find(DistributedOptions(cluster="none")) is None
    environ(SLURM_NTASKS=1, SLURM_PROCID=0)
    assert find(DistributedOptions()) is None


@pytest.mark.fast
def test_open_mpi(environ):
    environ(OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=3)
    environ(OMPI_COMM_WORLD_LOCAL_SIZE=2, OMPI_COMM_WORLD_LOCAL_RANK=1)
    with pytest.raises(
        UserError, match="does not tell its processes where process 0 is: set distributed.coord"
    ):
        find(DistributedOptions())  # version 5
    assert find(DistributedOptions(coordinator="n1:7")) == Place("n1:7", 4, 3, [1])
    environ(OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    assert find(DistributedOptions()) == Place("10.96.0.1:62624", 4, 3, [1])


@pytest.mark.fast
def test_kubernetes(environ):
    environ(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX=2)
    environ(JAX_COORDINATOR_ADDRESS="run-workers-0-0.run:8476", JAX_NUM_PROCESSES=4)
    assert find(DistributedOptions()) == Place("run-workers-0-0.run:8476", 4, 2)


@pytest.mark.fast
def test_a_preemption_notice_is_heard_as_sigterm(environ):
    from ftjax import train

    taken = threading.Event()

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert "instance/preempted?wait_for_change=true" in self.path
            if self.path.endswith("last_etag=first"):
                taken.wait(30)
            self.send_response(200)
            self.send_header("ETag", "second" if taken.is_set() else "first")
            self.end_headers()
            self.wfile.write(b"TRUE" if taken.is_set() else b"FALSE")

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environ(GCE_METADATA_IP=f"127.0.0.1:{server.server_port}")
    try:
        distributed.start(DistributedOptions())
        with train.signals() as caught:
            time.sleep(0.5)
            assert not caught
            taken.set()
            deadline = time.time() + 20
            while not caught and time.time() < deadline:
                time.sleep(0.05)
            assert caught == [signal.SIGTERM]
    finally:
        server.shutdown()


@pytest.mark.fast
def test_tpu_vms(environ, monkeypatch):
    """Two slices of two hosts, by a metadata server like Compute Engine's."""
    from jax._src.clusters import cloud_tpu_cluster

    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.2",
        "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1:8080'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = answers[self.path.rpartition("/")[2]].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    environ(GCE_METADATA_IP=f"127.0.0.1:{server.server_port}")
    try:
        assert find(DistributedOptions()) == Place("127.0.0.1:8482", 4, 3)
        environ(JAX_PLATFORMS="cpu")
        assert find(DistributedOptions()) is None
        environ(JAX_PLATFORMS="tpu,cpu", TPU_WORKER_HOSTNAMES="localhost,b,c", TPU_WORKER_ID=2)  # GKE
        environ(MEGASCALE_NUM_SLICES=1, MEGASCALE_SLICE_ID=0, MEGASCALE_COORDINATOR_ADDRESS="localhost")
        assert find(DistributedOptions()) == Place("localhost:8482", 3, 2)
    finally:
        server.shutdown()
