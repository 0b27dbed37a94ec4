"""Depth does not grow the program that is compiled: layers of a kind are one loop, and so are periods."""

import importlib.util
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[1] / "benchmarks" / "compile.py"
spec = importlib.util.spec_from_file_location("benchmarks_compile", FILE)
assert spec is not None and spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", bench.MODELS)
def test_the_training_step_of_64_layers_is_as_long_as_that_of_8(name):
    short, long = (len(bench.lower(bench.config(name, layers))[1].as_text()) for layers in (8, 64))
    assert abs(long - short) < 0.05 * short
