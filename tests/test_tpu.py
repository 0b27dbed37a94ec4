"""Programs compiled for TPUs that are not at hand."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ftjax import plan
from ftjax.errors import UserError
from ftjax.ops import target

pytestmark = [pytest.mark.fast, tpu.needs_libtpu]


def shape(*dims, dtype=jnp.bfloat16, sharding=None):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


@pytest.mark.parametrize(("name", "chips"), [("v5e:2x2", 4), ("v6e:2x4", 8), ("v5p:2x2x2", 8)])
def test_chips_of_a_topology(name, chips):
    found = tpu.devices(name)
    assert len(found) == chips and found[0].platform == "tpu" and not plan.at_hand(found[0])
    assert plan.at_hand(jax.devices()[0])


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:1x1"])
def test_what_is_no_topology_is_said(name):
    with pytest.raises(UserError, match=f"'{name}' is no TPU slice.*like v5e:2x2"):
        plan.topology(name)


def test_a_program_says_what_it_takes():
    kinds = []

    def fn(x):
        kinds.append(target.kind())
        return jnp.tanh(x @ x) @ x

    program = tpu.program(fn, shape(1024, 1024))
    assert kinds == ["tpu"]
    assert program.memory.arguments == program.memory.results == 1024 * 1024 * 2
    assert program.memory.total < 2**23
    assert 2 * 2 * 1024**3 <= program.flops < 2.1 * 2 * 1024**3
    assert program.bytes_accessed >= 2 * 2**21
    assert "ENTRY" in program.hlo and program.collectives == {}


def test_collectives_by_kind():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=tpu.devices())
    rows = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())

    def gathers(w):
        return jax.lax.with_sharding_constraint(w, whole)

    found = tpu.program(gathers, shape(512, 256, sharding=rows)).collectives
    assert found == {"all-gather": {"count": 1, "bytes": 512 * 256 * 2}}

    def sums(x):
        return jax.lax.with_sharding_constraint(jnp.sum(x, 0), whole)

    found = tpu.program(sums, shape(512, 256, dtype=jnp.float32, sharding=rows)).collectives
    assert found == {"all-reduce": {"count": 1, "bytes": 256 * 4}}


def test_more_than_the_chip_holds_is_an_error():
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        tpu.program(lambda x: jnp.sum(x @ x.T), shape(2**17, 2**16))


def test_many_processes_may_compile():
    """libtpu's own lock would stop the second one."""
    tpu.devices()
    code = "from ftjax import plan; print(len(plan.topology('v5e:2x2')))"
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "4", done.stderr
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD" not in os.environ  # nothing of it stays


def test_collectives_of_hlo_text():
    """Tuples, asynchronous pairs and comments."""
    text = """
  %ag = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) all-gather-start(%p), channel_id=1
  %agd = bf16[32,128]{1,0} all-gather-done(%ag)
  %ar = (f32[4]{0}, f32[4]{0}, f32[]{:T(128)}, f32[], f32[], /*index=5*/f32[2]{0}) all-reduce(%a, %b), foo=1
  %cp = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c), channel_id=3
"""
    assert plan.collectives(text) == {
        "all-gather": {"count": 1, "bytes": 32 * 128 * 2},
        "all-reduce": {"count": 1, "bytes": (4 + 4 + 3 + 2) * 4},
        "collective-permute": {"count": 1, "bytes": 64},
    }
