"""Eight CPU devices for every test, one compilation cache for all of them."""

import gc
import os
import pathlib
import sys

import pytest

# `benchmarks` is tested too; last, so that an installed ftjax goes before the one beside the tests
sys.path.append(str(pathlib.Path(__file__).parent.parent))

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "ftjax" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(items):
    """Long tests first, so that the workers end together; a file's tests run on one worker, those of the
    parity tests a family a worker, so that what they compile is shared."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        group = item.nodeid.partition("::")[0]
        if "callspec" in dir(item):
            params = item.callspec.params
            group += str(params.get("case", params.get("family", "")))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def few_maps():
    """Compiled programs map memory and are kept; a process has 65,530 maps, beyond which a compilation ends
    in a crash. So they go when there are many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
        gc.collect()
