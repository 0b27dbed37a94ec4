"""The ahead-of-time planner: a run's programs from shapes alone, compiled for devices that need not be at
hand, and what their compiler says they take."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from ftjax import distributed, mesh
from ftjax.chips import Slice
from ftjax.errors import UserError
from ftjax.hlo import Collective, collectives, of_step
from ftjax.mesh import ACTIVATION_RULES
from ftjax.ops.memory import LADDER
from ftjax.weights import spec

# libtpu allows one process at a time because two cannot share a chip; compiling uses none. The rest keeps it
# from asking the cloud, and from saying that it could not.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
}


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Those of `settings` that are not set, for a while."""
    added = {k: v for k, v in settings.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def topology(name: str | Slice) -> list[Any]:
    """The devices of a TPU slice ("v5e:4x4", "v6e:2x2", "v5p:2x2x2"; or a Slice, of several), to compile for
    and not to run on.

    Any x86-64 Linux machine has them where libtpu is installed; the processes that ask for them may be many.
    UserError where it is not, or where there is no such slice."""
    from jax.experimental import topologies

    settings: dict[str, Any] = {}
    if isinstance(name, Slice):
        settings |= {"num_slices": name.slices} if name.slices > 1 else {}
        settings |= {"chips_per_host_bounds": (1, 1, 1)} if name.chips == 1 else {}
        name = name.topology
    if name.startswith("v4:"):
        settings["chip_config_name"] = "megacore"  # as its virtual machines are set: a chip is one device
    try:
        with _environment(_LIBTPU):
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices)
    except RuntimeError as e:  # jax's own errors are of this kind
        if "TPU support not installed" in str(e):
            raise UserError(
                f"compiling for {name} needs libtpu, which is not installed: pip install 'jax[tpu]' "
                "(x86-64 Linux)"
            ) from None
        if "INVALID_ARGUMENT" not in str(e):
            raise
        raise UserError(
            f"{name!r} is no TPU slice: a generation and its chips, in whole hosts of 2×2, like v5e:2x2, "
            f"v5e:4x8, v6e:4x4 or v5p:2x2x4 ({str(e).partition(': ')[2]})"
        ) from None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device that a program needs, by part. Donated arguments count as arguments, not as
    results; `host` is what it keeps in the host's memory, in arguments and temporaries.

    `temporaries` are all buffers that a compiler lays out; those for TPUs may be more than are there at any
    moment, and what such a compiler refuses is a `peak` (arguments and results in it) that the chip has not:
    one with 3.45 + 16.06 GiB and a peak of 15.54 is taken for a v5e's 15.75. It counts what lies in the
    cores' own memory, too, which small programs fill, and where something lies in the host's nothing else but
    that and the arguments, so that it says nothing then. 0 where it is not known."""

    arguments: int
    results: int
    temporaries: int
    code: int
    host: int
    peak: int = 0

    @property
    def total(self) -> int:
        """Of the device, at the moment when it is most."""
        there, temporaries = self.arguments + self.results, self.temporaries
        if self.peak and not self.host:
            temporaries = min(temporaries, max(self.peak - there, 0))
        return there + temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and what its compiler says of it: all of one device, a loop's body counted once in
    `flops`, `bytes_accessed` and `collectives`."""

    compiled: jax.stages.Compiled
    seconds: float  # that it took to compile
    kind: str = ""  # of the device that it is for, a jax platform

    @functools.cached_property
    def memory(self) -> Memory:
        m: Any = self.compiled.memory_analysis()
        return Memory(
            arguments=m.argument_size_in_bytes,
            results=m.output_size_in_bytes - m.alias_size_in_bytes,
            temporaries=m.temp_size_in_bytes,
            code=m.generated_code_size_in_bytes,
            host=m.host_argument_size_in_bytes + m.host_temp_size_in_bytes,
            peak=getattr(m, "peak_memory_in_bytes", 0) if self.kind == "tpu" else 0,
        )

    @functools.cached_property
    def cost(self) -> dict[str, float]:
        """The compiler's cost analysis: "flops", "bytes accessed" and more."""
        cost = self.compiled.cost_analysis()
        return dict(cost[0] if isinstance(cost, list) else cost or {})

    @property
    def flops(self) -> float:
        return self.cost.get("flops", 0.0)

    @property
    def bytes_accessed(self) -> float:
        return self.cost.get("bytes accessed", 0.0)

    @functools.cached_property
    def hlo(self) -> str:
        """The optimised program as text."""
        return self.compiled.as_text() or ""

    @property
    def collectives(self) -> dict[str, dict[str, int]]:
        return collectives(self.hlo)

    def of_step(self, otherwise: int = 1) -> list[Collective]:
        """The collectives of a whole run of it, loops multiplied out: hlo.of_step."""
        return of_step(self.hlo, otherwise)


def at_hand(device) -> bool:
    """Whether programs can run on it: not so of a topology's."""
    return device.client is jax.devices()[0].client


def too_large(error: BaseException) -> str | None:
    """The line in which a compiler or a device says that a program needs more memory than there is; None of
    other errors."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return str(error).splitlines()[0]


def compile_program(lowered: jax.stages.Lowered, device) -> Program:
    """Compile for `device` or a mesh that it is of. For one that is not at hand the persistent cache is not
    written: what such a compiler makes cannot be read back from there."""
    clock = time.perf_counter()
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    try:
        if not at_hand(device):
            jax.config.update(setting, float("inf"))
        compiled = lowered.compile()
    finally:
        jax.config.update(setting, before)
    return Program(compiled, time.perf_counter() - clock, device.platform)


def shapes(tree, shardings=None):
    """A tree of arrays or shapes as shapes, on the `shardings` of a tree like it or else on their own."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step, and the shapes (with shardings on `mesh`) that it is called with: what is planned is
    what runs. `fn` is jitted (state, frozen, batch) -> (state, metrics); `sizes` are what the model's axis
    letters stand for."""

    fn: Any
    state: Any
    frozen: Any
    batch: dict[str, Any]
    mesh: jax.sharding.Mesh
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def trace(self) -> jax.stages.Traced:
        with mesh.use(self.mesh):
            return self.fn.trace(self.state, self.frozen, self.batch)

    def lower(self) -> jax.stages.Lowered:
        with mesh.use(self.mesh):
            return self.trace().lower()

    @functools.cached_property
    def program(self) -> Program:
        """Compiled ahead of time, when first asked for. On a TPU or its topology an XlaRuntimeError,
        RESOURCE_EXHAUSTED, where it does not fit."""
        lowered = self.lower()
        with mesh.use(self.mesh):
            return compile_program(lowered, self.mesh.devices.flat[0])

    def __call__(self, state, frozen, batch):
        """One step, by the program that was compiled ahead of time. A batch of another shape (a row length
        of data.buckets) has a program of its own, compiled when the first one comes."""
        if all(x.shape == self.batch[k].shape for k, x in batch.items()):
            return self.program.compiled(state, frozen, batch)
        shapes = frozenset((k, x.shape) for k, x in batch.items())
        compiled = shapes in self._others
        self._others.add(shapes)
        with contextlib.nullcontext() if compiled else distributed.at_leisure():
            return self.fn(state, frozen, batch)

    @functools.cached_property
    def _others(self) -> set[Any]:
        return set()


# -- Which rung of the memory ladder


NEED_LESS = (
    "Fewer rows at a time (train.microbatches), shorter ones (data.max_length), train.remat, "
    "train.mlp_chunk, train.loss_chunk, a base in few bits (quant.kind) or more devices need less"
)
MOST_COMPILES = 4
HEADROOM = 0.95  # of a device's memory, for a step: allocators leave gaps, and the next batch is on its way


@dataclasses.dataclass(frozen=True)
class Limit:
    """Bytes of one device that a program may take, its arguments included, and where that is known from."""

    bytes: int
    source: str


def limit(devices: jax.sharding.Mesh, held: int) -> Limit | None:
    """Of the mesh's fullest device, of which `held` bytes are arguments that lie there already. None where
    nothing says so: of a topology's the compiler itself knows, and refuses what does not fit."""
    local = [d for d in devices.devices.flat if at_hand(d) and d.process_index == jax.process_index()]
    if not local:
        return None
    if local[0].platform == "cpu":
        free = _free_host_bytes()
        return None if free is None else Limit(held + free // len(local), "the host's free memory")
    stats = [stats for d in local if (stats := d.memory_stats()) and "bytes_limit" in stats]
    if not stats:
        return None
    others = max(max(s.get("bytes_in_use", 0) - held, 0) for s in stats)
    return Limit(min(int(s["bytes_limit"]) for s in stats) - others, "the device's memory")


def _free_host_bytes() -> int | None:
    """What this process may still take: what the kernel could free, or less where a control group says so."""
    free = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(1024 * int(line.split()[1]))
    group = pathlib.Path("/sys/fs/cgroup")
    most, used = (next(iter(_lines(group / f"memory.{name}")), "max") for name in ("max", "current"))
    if most.isdigit() and used.isdigit():
        cached = [int(x.split()[1]) for x in _lines(group / "memory.stat") if x.startswith("inactive_file ")]
        free.append(int(most) - int(used) + sum(cached))
    return min(free, default=None)


def _lines(path: str | os.PathLike) -> list[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def bytes_held(tree) -> int:
    """Of a tree of shapes with shardings, on one device."""
    return sum(
        prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
    )


def kept_bytes(step: Step) -> int:
    """What the layers keep on one device for their backward pass, by the traced program: what the forward
    loops over layers stack up for the backward ones. It is exact but for how the compiler lays arrays out; on
    a mesh each array is taken to be split as the rules have its axes, which are known by their sizes."""

    def on_one(aval) -> int:
        parts = (
            name
            for one in spec(_letters(aval.shape, step), ACTIVATION_RULES, step.mesh)
            for name in ((one,) if isinstance(one, str) else one or ())
        )
        return aval.size * aval.dtype.itemsize // prod(step.mesh.shape[name] for name in parts)

    return _stacked(step.trace().jaxpr.jaxpr, on_one)


def _letters(shape: tuple[int, ...], step: Step) -> str:
    """Of an array stacked over layers, [L, B, T, …] or with rows and positions as one axis; "_" for
    others."""
    B, T = step.batch["tokens"].shape[1:]
    letters = "L"
    for i, n in enumerate(shape[1:]):
        if i == 0 and n == B:
            letters += "B"
        elif i == 0 and n % (B * T) == 0:
            letters += "X"
        elif n == T and "T" not in letters:
            letters += "T"
        else:
            sizes = step.sizes.items()
            letters += next((x for x, size in sizes if size == n and x in "DNKFMI" and x not in letters), "_")
    return letters


def _stacked(jaxpr, on_one: Callable) -> int:
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    read = {v for eqn in loops for v in eqn.invars if not hasattr(v, "val")}
    outputs = (zip(eqn.outvars, eqn.params["jaxpr"].out_avals, strict=True) for eqn in loops)
    # what a loop carries has the rank that it has within; what it keeps of each turn is stacked
    kept = [v.aval for v, within in chain.from_iterable(outputs) if v.aval.ndim > within.ndim and v in read]
    here = sum(on_one(x) for x in kept if x.memory_space != jax.memory.Space.Host)
    return here + max((_stacked(inner, on_one) for eqn in jaxpr.eqns for inner in _inner(eqn)), default=0)


def _inner(eqn) -> Iterator[Any]:
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


@dataclasses.dataclass(frozen=True)
class Choice:
    """A rung, its step (compiled), and for each rung that was looked at what became of it."""

    rung: str
    step: Step
    tried: dict[str, str]
    limit: Limit | None

    @property
    def said(self) -> str:
        memory = self.step.program.memory
        room = f" of {_size(self.limit.bytes)} ({self.limit.source})" if self.limit else ""
        on_host = f", {_size(memory.host)} in the host's" if memory.host else ""
        before = "; ".join(f"{rung} {why}" for rung, why in self.tried.items())
        return (
            f"train.remat=auto took {self.rung} ({LADDER[self.rung].said}): it needs {_size(memory.total)}"
            f"{room}{on_host}" + (f". The others: {before}" if before else "")
        )


def _size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"


def choose(step_of: Callable[[str], Step], room: Limit | None, rungs: Sequence[str] | None = None) -> Choice:
    """The fastest rung of the memory ladder whose step fits, compiled ahead of time.

    `step_of(rung)` builds a step; `room` is `limit(...)`. What cannot fit by its arguments and what its
    layers keep alone is passed over. The first program is that of the fastest rung that leaves a sixth of the
    memory for the rest; from there faster ones are tried while they fit, or leaner ones until one does, at
    most MOST_COMPILES programs together. UserError where none fits."""
    tried: dict[str, str] = {}
    steps: dict[str, Step] = {}
    least: dict[str, int] = {}
    kept: dict[str, int] = {}
    most = float("inf") if room is None else room.bytes * HEADROOM
    for rung in rungs or LADDER:
        step = step_of(rung)
        bytes_kept = kept_bytes(step)
        if (same := next((r for r, n in kept.items() if n == bytes_kept), None)) is not None:
            tried[rung] = f"keeps as much as {same}"
            continue
        kept[rung], steps[rung] = bytes_kept, step
        least[rung] = bytes_held((step.state, step.frozen, step.batch)) + bytes_kept
        if least[rung] > most:
            tried[rung] = f"needs at least {_size(least[rung])}"
    left = [rung for rung in steps if rung not in tried]  # from the fastest on
    likely = [rung for rung in left if 1.2 * least[rung] <= most]
    rung, best = next(iter(likely or left[-1:]), None), None
    for _ in range(MOST_COMPILES):
        if rung is None:
            break
        try:
            taken = steps[rung].program.memory.total
            fits, why = taken <= most, f"needs {_size(taken)}"
        except jax.errors.JaxRuntimeError as e:
            if too_large(e) is None:
                raise
            fits, why = False, "does not fit, says its compiler"
        at = left.index(rung)
        if fits:
            best, left = rung, left[:at]
            rung = left[-1] if left else None
        else:
            tried[rung] = why
            tried |= {r: f"keeps more than {rung}" for r in left if kept[r] > kept[rung]}
            slower = left[at + 1 :] if best is None else []
            left = [r for r in left[:at] + slower if r not in tried]
            after = [r for r in slower if r not in tried]
            rung = next(iter(after), None) if best is None else (left[-1] if left else None)
    where = f" in {_size(room.bytes)} ({room.source})" if room else ""
    if best is None:
        found = "; ".join(f"{rung} {why}" for rung, why in tried.items())
        raise UserError(f"train.remat=auto: no rung fits{where}: {found}. {NEED_LESS}")
    tried |= {rung: "was not tried" for rung in left}
    return Choice(best, steps[best], {r: tried[r] for r in rungs or LADDER if r in tried}, room)
