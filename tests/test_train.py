"""The loop: what is saved, when it stops, what it says."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import train

pytestmark = pytest.mark.fast
TX = optax.sgd(0.1)


def loss_fn(trainable, frozen, batch):
    loss = jnp.sum((trainable["w"] - batch["x"]) ** 2)
    return loss, {"loss": loss, "weight": jnp.float32(batch["x"].size)}


STEP = train.make_train_step(loss_fn, TX, 0)


def stream(step, poison=None):
    while True:
        x = np.full((2, 3), step, np.float32)
        yield {"x": x * np.nan if step == poison else x}
        step += 1


def run(state=None, poison=None, total=10, on_report=lambda s, m: None, **options):
    saved, reports = [], []

    def report(step, metrics):
        reports.append((step, metrics))
        on_report(step, metrics)

    state = state or train.init_state({"w": jnp.zeros(3)}, TX)
    defaults = dict(
        total_steps=total,
        save=lambda s, p: saved.append((int(s.step), jax.tree.map(np.array, s), p.worse)),
        save_every=4,
        report=report,
        documents=lambda step: [f"train.jsonl:{step + 1}"],
    )
    try:
        result = train.fit(
            state, lambda s, b: STEP(s, {}, b), stream(int(state.step), poison), **(defaults | options)
        )
    except Exception as e:
        return e, saved, reports
    return result, saved, reports


def test_reports_every_step_once_and_saves_on_time():
    (state, _), saved, reports = run()
    assert [step for step, _ in reports] == list(range(1, 11))
    assert [s[0] for s in saved] == [4, 8, 10]
    assert int(state.step) == 10


def test_a_steps_seconds_are_its_own():
    def step(state, batch):
        time.sleep(0.6 if int(state.step) % 2 else 0.0)
        return STEP(state, {}, batch)

    reports, begin = [], lambda: train.init_state({"w": jnp.zeros(3)}, TX)
    step(begin(), next(stream(0)))  # compiled
    train.fit(
        begin(), step, stream(0), total_steps=6, save=lambda s, p: None, save_every=4,
        report=lambda at, metrics: reports.append(metrics), documents=lambda at: [],
    )  # fmt: skip
    assert [m["seconds"] > 0.5 for m in reports] == [False, True] * 3
    assert all(m["input_wait"] <= m["seconds"] for m in reports)


def test_goes_on_exactly_where_it_stopped():
    whole = run()[0][0]
    half = run(total=4)[0][0]
    rest = run(state=half)[0][0]
    np.testing.assert_array_equal(rest.trainable["w"], whole.trainable["w"])


def test_non_finite_loss_names_step_and_documents_and_keeps_the_last_good_state():
    error, saved, _ = run(poison=5)
    assert isinstance(error, train.NonFinite)
    assert "step 6" in str(error) and "train.jsonl:6" in str(error) and "nan" in str(error)
    step, state, _ = saved[-1]
    good = run(total=5)[0][0]
    assert step == 5 and bool(state.finite)
    np.testing.assert_array_equal(state.trainable["w"], good.trainable["w"])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(signum):
    def on_report(step, _):
        if step == 5:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)  # a shell's background job starts with SIGINT ignored
    error, saved, _ = run(on_report=on_report)
    assert isinstance(error, train.Interrupted) and error.signum == signum
    assert saved[-1][0] == error.step and error.step < 10
    assert signal.getsignal(signum) == before


def test_early_stopping_and_best_step():
    losses = iter([5.0, 3.0, 4.0, 3.5, 9.0, 1.0])
    (state, progress), saved, _ = run(
        evaluate=lambda s: {"loss": next(losses)}, eval_every=1, eval_options=train.EvalOptions(patience=2)
    )
    assert progress.best_step == 1 and progress.best_loss == 3.0
    assert int(state.step) == 3 and saved[-1][0] == 3
    assert 1 in [s[0] for s in saved]  # the best was saved when it was seen


def test_the_state_before_training_may_be_the_best():
    losses = iter([1.0, 3.0, 4.0])
    (_, progress), saved, _ = run(evaluate=lambda s: {"loss": next(losses)}, eval_every=5)
    assert progress.best_step == 0 and [s[0] for s in saved][0] == 0
