"""Batches made ahead by a thread."""

import itertools
import threading
import time

import numpy as np
import pytest

from ftjax import train
from ftjax.data.ahead import Ahead
from ftjax.data.loader import Loader
from ftjax.data.options import DataOptions
from ftjax.errors import UserError

pytestmark = pytest.mark.fast


def threads():
    return [t for t in threading.enumerate() if t.name == "ftjax-input"]


@pytest.fixture(autouse=True)
def none_left():
    yield
    assert not threads()


def test_the_items_in_order_and_then_the_end():
    with Ahead(range(7), lambda x: x * x) as items:
        assert list(items) == [x * x for x in range(7)]
        with pytest.raises(StopIteration):
            next(items)


def test_only_so_many_are_made_ahead():
    made = []

    def source():
        for i in itertools.count():
            made.append(i)
            yield i

    with Ahead(source(), depth=2) as items:
        for i in range(3):
            assert next(items) == i
        time.sleep(0.2)
        assert len(made) <= 3 + 2 + 1  # taken, waiting, and one in the thread's hand


def test_an_error_comes_out_in_its_turn_with_its_message():
    def source():
        yield 1
        raise UserError("train.jsonl:7: no such column")

    with Ahead(source()) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(UserError, match="train.jsonl:7"):
                next(items)
    with Ahead([1], lambda x: x / 0) as items, pytest.raises(ZeroDivisionError):
        next(items)


def test_closing_ends_the_thread_and_the_source():
    ended = []

    def source():
        try:
            yield from itertools.count()
        finally:
            ended.append(True)

    items = Ahead(source())
    assert next(items) == 0
    items.close()
    assert ended and not threads()


def test_a_stopped_run_ends_its_threads(tmp_path):
    """Grain's too, which read for the loader."""
    from test_loader import LENGTHS, Fake, units

    before = set(threading.enumerate())
    loader = Loader(units(Fake(LENGTHS)), DataOptions("", max_length=32), batch_size=8)
    with Ahead(loader.batches(3)) as items:
        first = next(items)
        assert set(threading.enumerate()) - before
    np.testing.assert_array_equal(first["tokens"], next(iter(loader.batches(3)))["tokens"])
    deadline = time.time() + 10
    while (left := set(threading.enumerate()) - before) and time.time() < deadline:
        time.sleep(0.05)
    assert not left


def test_the_loop_says_how_long_it_waited():
    """Reading overlaps the step, so that only the longer of the two is waited for."""

    def slow(seconds):
        while True:
            time.sleep(seconds)
            yield {}

    def run(reading, stepping):
        reports = []

        def step(state, batch):
            time.sleep(stepping)
            return state, {"loss": 1.0, "finite": True}

        with Ahead(slow(reading)) as batches:
            state = train.TrainState(np.int32(0), {}, (), np.bool_(True))
            train.fit(
                state, step, batches, total_steps=8, save=lambda *_: None, save_every=100,
                report=lambda at, m: reports.append(m["input_wait"]), documents=lambda at: [],
            )  # fmt: skip
        return np.median(reports[2:])

    assert run(0.02, 0.08) < 0.01
    assert 0.02 < run(0.09, 0.03) < 0.09
