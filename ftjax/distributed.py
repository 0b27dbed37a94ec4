"""The processes of one run on several hosts: how they find one another, agree, and end together.

`start` connects them through jax.distributed; where there is one process, nothing here does anything. All
else goes through the key-value store that process 0 keeps for jax: small values as JSON, barriers, and a
heartbeat. Every call but `first` and `failed` has to be made by all processes, in the same order.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from ftjax.errors import UserError

T = TypeVar("T")

LOST = 75  # exit code where another process is gone: EX_TEMPFAIL of sysexits.h, try again
_FOREVER = 7 * 24 * 3600 * 1000  # ms: the heartbeat ends what waits, no timeout does
_JAX_SECONDS = 24 * 3600  # of jax's own heartbeat, which ends a process without a word of ours
MARK = ".ftjax-"  # begins the names of files that say nothing to a later run
AGAIN = "the same command, on as many hosts or on others, goes on from the last checkpoint"


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """The processes of a run on several hosts. TPU VMs, SLURM and Open MPI say all of it themselves."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    cluster: Literal["auto", "none", "tpu", "slurm", "openmpi", "kubernetes"] = "auto"
    """Who says what is not given here: found out, nobody (one process, or all three of the next), or this."""
    coordinator: str | None = None
    """HOST:PORT that process 0 listens at and the others reach it by; else JAX_COORDINATOR_ADDRESS."""
    processes: int | None = None
    """How many there are; else JAX_NUM_PROCESSES."""
    process: int | None = None
    """Which one this is, from 0; else JAX_PROCESS_ID."""
    local_devices: tuple[int, ...] | None = None
    """This process's GPUs, of those the host has; else JAX_LOCAL_DEVICE_IDS, else its share of them."""
    join_seconds: int = 300
    """How long to wait at the start until all processes are there."""
    silent_seconds: float = 30.0
    """A process that was not heard from for so long is taken to be lost, and the others stop."""
    behind_seconds: float = 60.0
    """A process that the others wait for in a step for so long, or for three usual steps if that is longer,
    is taken to hang, and all stop. Ten times as long while it saves, evaluates or compiles; and thirty times
    where all stand still. SIGTERM ends a process whose step does not end within it."""

    def __post_init__(self):
        seconds = (("silent_seconds", 2), ("behind_seconds", 2))
        for name, least in (("processes", 1), ("process", 0), *seconds, ("join_seconds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"distributed.{name}={value}: at least {least}")
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise UserError(f"distributed.coordinator={self.coordinator}: HOST:PORT, like 10.0.0.1:8476")
        if None not in (self.process, self.processes) and self.process >= self.processes:  # type: ignore
            raise UserError(
                f"distributed.process={self.process} of {self.processes}: they are counted from 0 to "
                f"{self.processes - 1}"  # type: ignore[operator]
            )


# -- Who is who


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among the others."""

    coordinator: str
    processes: int
    process: int
    local_devices: list[int] | None = None


def find(options: DistributedOptions) -> Place | None:
    """This process's place, from the options, the environment and the cluster; None where it is alone.

    UserError where the three say too little. Nothing is connected.
    """
    environ = os.environ
    coordinator = options.coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _given(options.processes, "JAX_NUM_PROCESSES")
    process = _given(options.process, "JAX_PROCESS_ID")
    devices = None if options.local_devices is None else list(options.local_devices)
    if processes == 1:
        return None
    if None in (coordinator, processes, process):
        name, cluster = _cluster(options.cluster)
        if cluster is None:
            if (processes, process) == (None, None):
                if options.coordinator is None:  # of the environment it may be meant for others
                    return None
            missing = {"coordinator": coordinator, "processes": processes, "process": process}
            said = " and ".join(f"distributed.{k}" for k, v in missing.items() if v is None)
            raise UserError(
                f"several processes need all of distributed.coordinator, .processes and .process (or "
                f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID): there is no {said}, and no "
                "TPU pod, SLURM step, Open MPI or Kubernetes job was found here that would say it"
            )
        try:
            processes = cluster.get_process_count() if processes is None else processes
            if processes == 1:
                return None
            process = cluster.get_process_id() if process is None else process
            if coordinator is None:
                port = environ.get("JAX_COORDINATOR_PORT")
                coordinator = cluster.get_coordinator_address(options.join_seconds, port)
        except UserError:
            raise
        except Exception as e:  # of other libraries: metadata servers, Kubernetes' API, their environment
            raise UserError(
                f"{name} does not say who the processes of this run are ({type(e).__name__}: {e}): set "
                "distributed.coordinator, .processes and .process, or distributed.cluster=none for a lone one"
            ) from e
        if devices is None and "JAX_LOCAL_DEVICE_IDS" not in environ and name in _TASKS:
            devices = _share_of_devices(*_TASKS[name]())
    assert coordinator is not None and processes is not None and process is not None
    if not 0 <= process < processes:
        raise UserError(f"process {process} of {processes}: they are counted from 0 to {processes - 1}")
    return Place(coordinator, processes, process, devices)


def _given(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    if not text.isdigit():
        raise UserError(f"{variable}={text}: a whole number")
    return int(text)


def _cluster(name: str) -> tuple[str, Any]:
    """(name, jax's class that asks it) of the cluster that this process was started by, else ("", None)."""
    found = {
        "openmpi": lambda: "OMPI_COMM_WORLD_SIZE" in os.environ and _open_mpi(),
        "slurm": lambda: _if_present(_jax_cluster("slurm")),
        "tpu": _tpu,
        "kubernetes": lambda: "JOB_COMPLETION_INDEX" in os.environ and _kubernetes(),
    }
    for one in found if name == "auto" else [name] if name != "none" else []:
        cluster = found[one]()
        if cluster:
            return one, cluster
    if name not in ("auto", "none"):
        raise UserError(
            f"distributed.cluster={name}: this process was not started by it; auto looks for others"
        )
    return "", None


def _jax_cluster(name: str, otherwise: Any = None) -> Any:
    from jax._src import clusters  # the only door to what jax.distributed.initialize() itself asks

    found = next((c for c in clusters.ClusterEnv._cluster_types if c.name == name), None)
    return found if found is not None and (otherwise is None or found.is_env_present()) else otherwise


def _if_present(cluster: Any) -> Any:
    return cluster if cluster is not None and cluster.is_env_present() else None


def _tpu() -> Any:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and "tpu" not in platforms.split(","):
        return None
    return _if_present(_jax_cluster("gketpu")) or _if_present(_jax_cluster("gcetpu"))


def _open_mpi() -> Any:
    """jax asks the launcher before version 5, and from jax 0.12 on mpi4py, where that is installed."""
    asked = "OMPI_MCA_orte_hnp_uri" in os.environ or importlib.util.find_spec("mpi4py")
    return _jax_cluster("ompi", _OpenMpi) if asked else _OpenMpi


class _OpenMpi:
    """Open MPI 5 and newer, whose environment no longer says where the launcher is."""

    get_process_count = staticmethod(lambda: int(os.environ["OMPI_COMM_WORLD_SIZE"]))
    get_process_id = staticmethod(lambda: int(os.environ["OMPI_COMM_WORLD_RANK"]))

    @staticmethod
    def get_coordinator_address(seconds: int, port: str | None) -> str:
        if os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == os.environ["OMPI_COMM_WORLD_SIZE"]:
            return f"localhost:{port or 8476}"
        raise UserError(
            "Open MPI 5 does not tell its processes where process 0 is: set "
            "distributed.coordinator=HOST:PORT, or JAX_COORDINATOR_ADDRESS with mpirun -x"
        )


def _kubernetes() -> Any:
    """Asks Kubernetes' API where its package is installed; without, JOB_COMPLETION_INDEX alone is known."""
    if importlib.util.find_spec("kubernetes"):
        return _if_present(_jax_cluster("k8s"))
    return _IndexedJob


class _IndexedJob:
    get_process_id = staticmethod(lambda: int(os.environ["JOB_COMPLETION_INDEX"]))

    @staticmethod
    def get_process_count() -> int:
        raise UserError(
            "Kubernetes does not tell a pod how many there are: set JAX_NUM_PROCESSES and "
            "JAX_COORDINATOR_ADDRESS in the job's template, or install the package kubernetes"
        )

    @staticmethod
    def get_coordinator_address(seconds: int, port: str | None) -> str:
        raise UserError(
            "Kubernetes does not tell a pod where the first is: set JAX_COORDINATOR_ADDRESS in the job's "
            "template (JobSet: JOBSET-JOB-0-0.JOBSET:8476), or install the package kubernetes"
        )


def _slurm_tasks() -> tuple[int, int]:
    """(this task among those of its node, how many those are)."""
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):  # "4(x2),3"
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found:
            counts += [int(found[1])] * int(found[2] or 1)
    node, local = int(os.environ.get("SLURM_NODEID", 0)), int(os.environ["SLURM_LOCALID"])
    return local, counts[node] if node < len(counts) else local + 1


def _mpi_tasks() -> tuple[int, int]:
    return int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]), int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])


_TASKS: dict[str, Callable[[], tuple[int, int]]] = {"slurm": _slurm_tasks, "openmpi": _mpi_tasks}


def _share_of_devices(task: int, tasks: int) -> list[int] | None:
    """Of the GPUs that the host shows: all (None) for its only process, where jax would take the first alone;
    else an even share, and one each where it is not known how many there are."""
    if tasks == 1:
        return None
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("ROCR_VISIBLE_DEVICES"))
    if shown is None:
        return [task]
    count = len([x for x in shown.split(",") if x])
    if count < tasks:  # the launcher bound each process to its own
        return None
    each = count // tasks
    return list(range(task * each, task * each + each))


# -- The run


class _Run:
    """The connection of this process to the others, and the two threads that watch over it."""

    def __init__(self, place: Place, options: DistributedOptions):
        self.place, self.options = place, options
        self.joined = False
        self.beat = min(2.0, options.silent_seconds / 5)
        self.stop = threading.Event()
        self.heard = time.monotonic()  # when the store last answered
        self.seen: dict[int, tuple[str, float]] = {}  # process -> (its last sign, when it was new)
        self.stands: dict[int, tuple[Any, float]] = {}  # process -> (where its loop stands, since when)
        self.calls = 0
        self.threads: list[threading.Thread] = []

    @property
    def client(self) -> Any:
        from jax._src import distributed

        return distributed.global_state.client

    @property
    def process(self) -> int:
        return self.place.process

    def key(self) -> str:
        progress()
        self.calls += 1
        return f"ftjax/call/{self.calls}"

    def put(self, key: str, value: Any) -> None:
        self.client.key_value_set(key, json.dumps(value), allow_overwrite=True)

    def get(self, key: str) -> Any:
        return json.loads(self.client.blocking_key_value_get(key, _FOREVER))

    def listing(self, folder: str) -> dict[str, Any]:
        found = self.client.key_value_dir_get(folder)
        return {key.rpartition("/")[2]: json.loads(value) for key, value in found}

    def watch(self) -> None:
        for work in (self._beat, self._listen):
            thread = threading.Thread(target=work, name=f"ftjax{work.__name__}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def _beat(self) -> None:
        """Say that this process lives, and read what is said of the others: process 0 looks after them all,
        they after process 0."""
        count = 0
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        while not self.stop.wait(self.beat):
            count += 1
            try:
                self.put(f"ftjax/alive/{self.process}", me | {"beat": count, "loop": _loop.said()})
                said = self.listing("ftjax/said")
                if self.process == 0:
                    self.put("ftjax/said/alive", me | {"beat": count})
                    alive = self.listing("ftjax/alive")
                else:
                    alive = {"0": said.get("alive")}
            except Exception:  # the store does not answer: _listen counts for how long
                continue
            self.heard = time.monotonic()
            if self.stop.is_set():
                return
            self._judge(said, alive)

    def _judge(self, said: dict[str, Any], alive: dict[str, Any]) -> None:
        now = time.monotonic()
        if "lost" in said:
            self.end(said["lost"]["text"], LOST, grace=True, stack=said["lost"]["stack"])
        failed = [int(k.removeprefix("failed-")) for k in said if k.startswith("failed-")]
        others = [p for p in failed if p != self.process]
        if others and self.process not in failed:
            first = min(others)
            why = said[f"failed-{first}"].strip().splitlines()[0]
            self.end(f"{self.name(first, alive)} failed: {why}", 1, grace=True)
        for p in range(self.place.processes) if self.process == 0 else [0]:
            sign = json.dumps(alive.get(str(p)))
            if p == self.process:
                continue
            if p not in self.seen or self.seen[p][0] != sign:
                self.seen[p] = sign, now
            elif now - self.seen[p][1] > self.options.silent_seconds:
                self.lost(p, alive)
        if self.process == 0:
            self._compare(alive, now)

    def _compare(self, alive: dict[str, Any], now: float) -> None:
        """Whether a process hangs, though its threads live: its loop stands still, and others are ahead."""
        loops = {p: sign["loop"] for p in range(self.place.processes) if (sign := alive.get(str(p)))}
        if len(loops) < self.place.processes or None in loops.values():
            self.stands.clear()
            return
        furthest = max(at for at, _ in loops.values())
        for p, (at, patience) in loops.items():
            where = at, patience, at < furthest
            if p not in self.stands or self.stands[p][0] != where:
                self.stands[p] = where, now
            stood = now - self.stands[p][1]
            if at < furthest and stood > patience:
                text = (
                    f"{self.name(p, alive)} came no further for {stood:.0f} s while others waited for it: it "
                )
                self.lost_by(f"{text}hangs. Its own log says where; {AGAIN}", stack=p)
        stood = now - max(since for _, since in self.stands.values())
        if stood > max(ALL_STAND * _loop.seconds, *(patience for _, patience in loops.values())):
            text = (
                f"no process came any further for {stood:.0f} s: a device hangs, or what they exchange does "
            )
            self.lost_by(f"{text}not arrive. Their logs say where each stands; {AGAIN}", stack=-1)

    def lost(self, process: int, alive: dict[str, Any]) -> None:
        text = (
            f"{self.name(process, alive)} was not heard from for {self.options.silent_seconds:.0f} s: it "
            f"died, hangs, or cannot be reached. Its own log may say why; {AGAIN}"
        )
        self.lost_by(text, tell=self.process == 0)

    def lost_by(self, text: str, stack: int | None = None, tell: bool = True, code: int = LOST) -> None:
        """End all processes; number `stack`, or for -1 each, says where its main thread is."""
        if tell:
            with contextlib.suppress(Exception):
                self.put("ftjax/said/lost", {"text": text, "stack": stack})
        self.end(text, code, grace=True, stack=stack)

    def name(self, process: int, alive: dict[str, Any]) -> str:
        who = alive.get(str(process)) or {}
        where = f" ({who['host']}, process id {who['pid']})" if who else ""
        return f"process {process} of {self.place.processes}{where}"

    def _listen(self) -> None:
        """End this process where the store does not answer; but not because it stood still itself."""
        last = time.monotonic()
        while not self.stop.wait(min(1.0, self.beat)):
            now = time.monotonic()
            if now - last > self.options.silent_seconds / 2:
                self.heard = now
                self.seen.clear()
                self.stands.clear()
            last = now
            if now - self.heard > self.options.silent_seconds:
                self.lost(0, self.last_of_first())

    def last_of_first(self) -> dict[str, Any]:
        sign = self.seen.get(0)
        return {"0": json.loads(sign[0])} if sign else {}

    def end(self, text: str, code: int, grace: bool = False, stack: int | None = None) -> None:
        """Say `text` and leave at once: what the others do not take part in any more cannot be finished."""
        if self.stop.is_set():
            return
        if stack in (self.process, -1):
            _say_where()
        _say(self.process, text)
        if grace and self.process == 0:  # which the others hear it from
            time.sleep(2.5 * self.beat)
        _leave(code)

    def on_abort(self, _signal: int) -> None:
        """jax aborts a process that cannot reach process 0, with a trace; this is the last word."""
        if not self.joined:
            text = (
                f"not all of the {self.place.processes} processes came to {self.place.coordinator} within "
                f"{self.options.join_seconds} s (distributed.join_seconds): see that each was started, that "
                "process 0 is there, and that no firewall is between"
            )
        else:
            who = self.name(0, self.last_of_first())
            text = f"{who} is gone, where the others meet. Its own log may say why; {AGAIN}"
        _say(self.process, text)
        _leave(LOST)


def _say(process: int | None, text: str) -> None:
    """On stderr, past all of Python's locks."""
    show_cursor = "\033[?25h" if sys.stderr.isatty() else ""
    who = "" if process is None else f"process {process}: "
    os.write(2, f"{show_cursor}\nerror: {who}{text}\n".encode())


def _say_where() -> None:
    """What the main thread does."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    os.write(2, "".join(["\n", *traceback.format_stack(frame)]).encode())


def _leave(code: int) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


# -- The loop over the steps, and those that hang in it


AT_LEISURE = 10  # times as long may what is slow take
ALL_STAND = 30  # times as long may all processes stand still


class _Loop:
    """How far the loop has come: what the others, and who sends a signal, wait for."""

    def __init__(self):
        self.seconds = DistributedOptions().behind_seconds
        self.reset()

    def reset(self, running: bool = False) -> None:
        self.running, self.leisure = running, False
        self.at = 0  # steps, and what else all do in the same order
        self.since = time.monotonic()
        self.steps, self.spent = 0, 0.0

    def patience(self) -> float:
        """Seconds that what it does now may take."""
        usual = 3 * self.spent / self.steps if self.steps else 0.0
        return max(self.seconds, usual) * (AT_LEISURE if self.leisure else 1)

    def said(self) -> tuple[int, float] | None:
        """For the others; None where it is not under way."""
        return (self.at, self.patience()) if self.at else None


_loop = _Loop()


def progress() -> None:
    """Called in the loop, by all processes, before each step or whatever they do together."""
    if _loop.running:
        now = time.monotonic()
        if _loop.at and not _loop.leisure:
            _loop.steps, _loop.spent = _loop.steps + 1, _loop.spent + now - _loop.since
        _loop.at, _loop.since = _loop.at + 1, now


@contextlib.contextmanager
def at_leisure() -> Iterator[None]:
    """Within it this process may take longer: it saves, evaluates, compiles."""
    before, _loop.leisure = _loop.leisure, True
    try:
        yield
    finally:
        _loop.leisure, _loop.since = before, time.monotonic()


@contextlib.contextmanager
def loop() -> Iterator[None]:
    """The loop over the steps. A process that hangs in it ends the run on all; and where SIGTERM or Ctrl-C
    came and nothing moves, this process ends: Python's own handlers wait for the main thread, which may hang
    in a driver or in what the processes exchange. In the main thread only."""
    told, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_heed, args=(told,), name="ftjax_signals", daemon=True).start()
    _loop.reset(running=True)
    try:
        yield
    finally:
        _loop.reset()
        signal.set_wakeup_fd(before)
        os.close(wakeup)


def _heed(told: int) -> None:
    """End this process where a signal came and its loop comes no further, until `told` is closed."""
    got: list[int] = []
    first = 0.0
    while True:
        if select.select([told], [], [], 0.5)[0]:
            numbers = os.read(told, 64)
            if not numbers:
                os.close(told)
                return
            got += [n for n in numbers if n in (signal.SIGTERM, signal.SIGINT)]
            first = first or time.monotonic()
        patience = _loop.patience() if got.count(signal.SIGINT) < 2 else 5.0
        stood = time.monotonic() - max(first, _loop.since)
        if got and stood > patience:
            text = (
                f"{signal.Signals(got[0]).name} came, but what is under way did not end in {stood:.0f} s: it "
                f"hangs, and nothing was saved now. What was saved is intact; {AGAIN}"
            )
            if _run is not None:
                who = f"process {_run.process} of {_run.place.processes}"
                _run.lost_by(f"{who}: {text}", stack=-1, code=128 + got[0])
            _say_where()
            _say(None, text)
            _leave(128 + got[0])


def _metadata_server() -> str | None:
    """Of Compute Engine, where this is one of its machines (a TPU VM is)."""
    with contextlib.suppress(OSError):
        if pathlib.Path("/sys/class/dmi/id/product_name").read_text().startswith("Google"):
            return os.environ.get("GCE_METADATA_IP", "169.254.169.254")
    return os.environ.get("GCE_METADATA_IP")


def _heed_notice(server: str) -> None:
    """SIGTERM to this process where its machine is about to be taken away, of which Compute Engine gives
    notice some 30 s before (https://cloud.google.com/compute/docs/instances/create-use-spot)."""
    import http.client
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    page = f"http://{server}/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=60&last_etag="
    etag, said = "0", ""
    while said != "TRUE":
        with contextlib.suppress(OSError, http.client.HTTPException):
            request = urllib.request.Request(page + etag, headers={"Metadata-Flavor": "Google"})
            with opener.open(request, timeout=90) as answer:  # once it has changed
                etag, said = answer.headers.get("ETag", "0"), answer.read().decode().strip()
        time.sleep(2)
    while not _loop.running:  # there is nothing to save yet, or the result is being written
        time.sleep(0.1)
    logging.getLogger("ftjax").warning("this machine is about to be taken away (a preemption notice)")
    os.kill(os.getpid(), signal.SIGTERM)


_run: _Run | None = None
_handler: Any = None  # held, since C calls it


def start(options: DistributedOptions) -> None:
    """Connect this process with those of the same run, before jax's devices are asked for; once.

    A process that is alone is left as it is. UserError where it is not clear who the others are. Where one of
    them does not come, or is lost later, this process ends with a message and the exit code LOST.
    """
    global _run, _handler
    import jax

    if _run is not None:
        return
    _loop.seconds = options.behind_seconds
    heeds = any(thread.name == "ftjax_notice" for thread in threading.enumerate())
    if not heeds and (server := _metadata_server()):
        threading.Thread(target=_heed_notice, args=(server,), name="ftjax_notice", daemon=True).start()
    place = find(options)
    if place is None:
        return
    _run = _Run(place, options)
    if place.process != 0:  # one progress bar is enough
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    libc = ctypes.CDLL(None)
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_run.on_abort)
    libc.signal(int(signal.SIGABRT), _handler)
    jax.config.update("jax_enable_preemption_service", False)  # train.signals hears SIGTERM, and all are told
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=options.join_seconds,
            heartbeat_timeout_seconds=_JAX_SECONDS,
            shutdown_timeout_seconds=_JAX_SECONDS,
        )
    except RuntimeError as e:
        _run = None
        if "before" in str(e):
            raise UserError(f"several processes have to be connected before jax is used: {e}") from e
        raise UserError(f"process {place.process} cannot meet the others at {place.coordinator}: {e}") from e
    _run.joined = True
    _run.watch()


@contextlib.contextmanager
def together(options: DistributedOptions) -> Iterator[None]:
    """`start`, and what has to follow: the others learn of an error of this process, and part where all have
    come to the end."""
    start(options)
    try:
        yield
    except BaseException as e:
        if hasattr(e, "signum"):  # all processes stopped at the same step
            finish()
        else:
            failed(e)
        raise
    finish()


def count() -> int:
    return 1 if _run is None else _run.place.processes


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return _run is None or _run.process == 0


def barrier() -> None:
    if _run is not None:
        _run.client.wait_at_barrier(_run.key(), _FOREVER)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, for all: of JSON's types."""
    if _run is None:
        return make()
    key = _run.key()
    if _run.process == 0:
        _run.put(key, make())
    return _run.get(key)


def from_all(value: T) -> list[T]:
    """The `value` of every process, of JSON's types, by process."""
    if _run is None:
        return [value]
    key = _run.key()
    _run.put(f"{key}/{_run.process}", value)
    return [_run.get(f"{key}/{p}") for p in range(_run.place.processes)]


def same(facts: Mapping[str, str]) -> None:
    """UserError in all processes, with both values, where `facts` are others in one than in process 0."""
    everyone = from_all(dict(facts))
    for process, theirs in enumerate(everyone):
        said = [
            f"{name} is {theirs.get(name, 'not set')} in process {process} and "
            f"{everyone[0].get(name, 'not set')} in process 0"
            for name in everyone[0] | theirs
            if theirs.get(name) != everyone[0].get(name)
        ]
        if said:
            raise UserError(f"the processes of a run have to be alike: {'; '.join(said[:5])}")


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of `items`, which all have."""
    return items if _run is None else items[_run.process :: _run.place.processes]


def unshare(mine: Sequence[T]) -> list[T]:
    """What all made of their parts, of JSON's types, in the order of the whole."""
    parts = from_all(list(mine))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def mark(folder: str | os.PathLike, name: str) -> pathlib.Path:
    """An empty file in the folder, which is made. UserError where that fails."""
    path = pathlib.Path(folder, MARK + name)
    try:
        with contextlib.suppress(FileExistsError):  # a file: what it is is said by writing below it
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    except OSError as e:
        raise UserError(f"cannot write to {path.parent}: {e.strerror}") from None
    return path


def sees(folder: str | os.PathLike) -> int:
    """The lowest process that has the same folder as this one: 0 for all where the disk is shared.

    Makes the folder and writes to it, in a lone process, too: UserError where that fails.
    """
    name = from_first(lambda: uuid.uuid4().hex)
    mine = mark(folder, f"{name}-{0 if _run is None else _run.process}")
    barrier()
    lowest = min(int(p.name.rpartition("-")[2]) for p in mine.parent.glob(f"{MARK}{name}-*"))
    barrier()
    mine.unlink(missing_ok=True)
    return lowest


@contextlib.contextmanager
def one_a_disk(folder: str | os.PathLike) -> Iterator[bool]:
    """Within it, the first process of each disk that holds `folder` goes before the others; yields whether
    this is such a one."""
    if _run is None:
        yield True
        return
    leads = sees(folder) == _run.process
    if not leads:
        barrier()
    yield leads
    if leads:
        barrier()


def fetch(tree: Any) -> Any:
    """The arrays of `tree` whole, in process 0's memory; None in the others. One array at a time is whole on
    the devices."""
    import jax

    if _run is None:
        return jax.device_get(tree)

    def one(x):
        if x.is_fully_addressable:
            return jax.device_get(x) if first() else None
        whole = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
        got = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=whole)(x))
        return jax.device_get(got) if first() else None

    out = jax.tree.map(one, tree)
    return out if first() else None


class Agreement:
    """What any process says becomes what all hear, a call later, at no wait of its own: the devices pass it
    on behind the step that they are at."""

    def __init__(self, devices: Any):
        """`devices` is the run's mesh."""
        self._pass: Callable[[int], Any] | None = None
        self._last: Any = None
        if _run is None:
            return
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        axes = tuple(devices.axis_names)
        each = NamedSharding(devices, PartitionSpec(axes))
        whole = NamedSharding(devices, PartitionSpec())
        highest = jax.jit(lambda x: x.max(), out_shardings=whole)
        size = devices.size

        def send(value: int):
            x = jax.make_array_from_callback((size,), each, lambda _: np.full(1, value, np.int32))
            return highest(x)

        self._pass = send

    def __call__(self, value: int) -> int:
        """The highest `value` of the call before, over all processes; alone, `value`."""
        if self._pass is None:
            return value
        from ftjax import train

        before, self._last = self._last, train.settled(self._pass(value))
        return 0 if before is None else int(before)


def failed(error: BaseException) -> None:
    """Tell the others that this process ends by `error`, and leave; alone, nothing.

    What another process's end brought about is left to that one's message, if it comes in time.
    """
    run = _run
    if run is None:
        return
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if not isinstance(error, UserError) and _OF_OTHERS.search(text):
        time.sleep(run.options.silent_seconds + 4 * run.beat)  # the heartbeat ends this process
    code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    said: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        run.put(f"ftjax/said/failed-{run.process}", text)
        time.sleep(2.5 * run.beat)  # until all have heard
        said = run.listing("ftjax/said")
    run.stop.set()
    if run.process == 0 or said.get("failed-0") != text:  # one of them is enough where all say the same
        if code == 1 or os.environ.get("FTJAX_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exception(error)
        _say(run.process, text)
    if run.process == 0:
        time.sleep(1.0)
    _leave(code)


_OF_OTHERS = re.compile(r"gloo|nccl|coordination|connection (reset|closed)|unavailable|heartbeat", re.I)


def finish() -> None:
    """Wait for the others and part from them: what all processes have done is done."""
    global _run
    if _run is None:
        return
    import jax

    barrier()
    _run.stop.set()
    for thread in _run.threads:
        thread.join()
    barrier()  # nobody leaves while another's threads still ask process 0
    jax.distributed.shutdown()
    ctypes.CDLL(None).signal(int(signal.SIGABRT), None)  # SIG_DFL
    _run = None
