import jax
import numpy as np
import pytest

from ftjax import mesh
from ftjax.ops import target

pytestmark = pytest.mark.fast


def test_a_function_is_traced_anew_for_each_kind_of_device():
    seen = []
    f = jax.jit(lambda x: (seen.append(target.kind()), x)[1])
    f(1.0)
    with target.use("tpu"):
        f(1.0)
    with target.use("gpu"):
        f(1.0)
    f(1.0)
    assert seen == ["cpu", "tpu", "gpu"]


def test_a_mesh_says_what_its_programs_are_for():
    class Chip:
        platform = "tpu"

    class Mesh:
        devices = np.array([Chip()])

    with mesh.use(mesh.make_mesh(mesh.MeshOptions())):
        assert target.kind() == "cpu"
    assert target.kind_of(Mesh.devices.flat[0].platform) == "tpu"
    assert target.kind_of("cuda") == "gpu"
