"""Programs compiled ahead of time for TPUs that are not at hand. A test file that uses this needs libtpu,
which the `test` extra brings on x86-64 Linux; elsewhere its tests skip and say so."""

import contextlib
import fcntl
import functools
import importlib.util
import pathlib
import tempfile

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from ftjax import plan
from ftjax.ops import target

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no libtpu here: pip install 'jax[tpu]' on x86-64 Linux",
)


@functools.cache
def devices(topology: str = "v5e:2x2") -> list:
    """The chips of a topology; skips the test where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip(needs_libtpu.kwargs["reason"])
    return plan.topology(topology)


@contextlib.contextmanager
def one_at_a_time():
    """A TPU compilation takes all cores and much memory: one of them at a time over all test workers."""
    with open(pathlib.Path(tempfile.gettempdir()) / "ftjax-tests-tpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def program(fn, *args, topology: str = "v5e:2x2", **jit) -> plan.Program:
    """`fn` (jitted with `jit`, or already) compiled for a TPU: its memory, cost, collectives and HLO text.

    `args` are arrays or shapes; those without a sharding go to the topology's first chip, so that without
    meshes it is a program of one chip. `fn` is traced with target.kind() == "tpu"; under a mesh of
    `devices(topology)` enter mesh.use(...) around the call."""
    chips = devices(topology)
    here = SingleDeviceSharding(chips[0])

    def shape(x):
        sharding = getattr(x, "sharding", None) if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or here)

    fn = fn if isinstance(fn, jax.stages.Wrapped) and not jit else jax.jit(fn, **jit)
    with target.use("tpu"):
        lowered = fn.trace(*jax.tree.map(shape, args)).lower()
    with one_at_a_time():
        return plan.compile_program(lowered, chips[0])
