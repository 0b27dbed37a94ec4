import itertools
import json
import logging
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import checkpoint, host, train
from ftjax.checkpoint import Checkpoints
from ftjax.errors import UserError

pytestmark = pytest.mark.fast
TX = optax.adamw(1e-2)


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)


def make(step: int, size: int = 5):
    state = train.init_state({"layers": {"q": {"a": jnp.arange(size, dtype=jnp.float32) + step}}}, TX)
    return state.replace(step=jnp.int32(step))


def saved(tmp_path, *steps, keep=2):
    c = Checkpoints(tmp_path / "checkpoints", keep)
    for step in steps:
        c.save(make(step), {"best": step / 3})
    c.wait()
    return c


def test_restores_the_newest_bit_for_bit_with_its_facts(tmp_path):
    saved(tmp_path, 3, 7).close()
    state, facts = Checkpoints(tmp_path / "checkpoints").restore(make(0))
    assert equal(state, make(7)) and facts == {"best": 7 / 3}
    assert jax.tree.structure(state) == jax.tree.structure(make(7))


def test_nothing_to_restore_is_none(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").restore(make(0)) is None


def test_saving_reads_the_state_before_its_buffers_are_donated(tmp_path):
    c = Checkpoints(tmp_path / "checkpoints")
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = make(4, size=200_000)
    want = jax.tree.map(np.array, state)
    c.save(state, {})
    bump(state)
    c.close()
    assert equal(Checkpoints(tmp_path / "checkpoints").restore(make(0, 200_000))[0], want)


def test_keeps_two_and_the_best(tmp_path):
    c = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3, 4, 5):
        if step == 2:
            c.best = 2
        c.save(make(step), {})
    c.close()
    assert c.steps() == [2, 4, 5]


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, caplog, harm):
    c = saved(tmp_path, 3, 7)
    victim = largest_file(c.directory / "7")
    data = bytearray(victim.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
    elif harm == "cut":
        victim.write_bytes(data[: len(data) // 2])
    else:
        victim.unlink()
    with caplog.at_level(logging.WARNING, "ftjax"):
        state, _ = Checkpoints(tmp_path / "checkpoints").restore(make(0))
    assert int(state.step) == 3
    assert "checkpoint 7 is damaged" in caplog.text and victim.name in caplog.text


def test_killed_before_sealing_and_cut_short_falls_back(tmp_path):
    c = saved(tmp_path, 3, 7)
    (c.directory / "seals" / "7.json").unlink()
    largest_file(c.directory / "7").write_bytes(b"")
    for p in (c.directory / "7").rglob("*"):
        if p.is_file():
            p.write_bytes(p.read_bytes()[:10])
    assert int(Checkpoints(tmp_path / "checkpoints").restore(make(0))[0].step) == 3


def unseal(c, step):
    (c.directory / "seals" / f"{step}.json").unlink()


def test_killed_before_sealing_and_a_bit_flipped_falls_back(tmp_path):
    """Orbax's formats do not notice a bit that flips in a value."""
    c = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 7):
        c.save(make(step, 3000), {"best": step / 3})
    c.close()
    unseal(c, 7)
    path = largest_file(c.directory / "7")
    whole = path.read_bytes()
    harmed = 0
    for at in range(0, len(whole), len(whole) // 10):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        state, facts = Checkpoints(tmp_path / "checkpoints").restore(make(0, 3000))
        step = int(state.step)
        assert step in (3, 7) and equal(state, make(step, 3000)) and facts == {"best": step / 3}
        harmed += step == 3
    assert harmed > 1
    path.write_bytes(whole)
    facts = c.directory / "7" / "facts" / "metadata"
    right = facts.read_text()
    facts.write_text(right.replace("2.3", "2.4"))
    assert Checkpoints(tmp_path / "checkpoints").restore(make(0, 3000))[1] == {"best": 1.0}
    facts.write_text(right)
    assert Checkpoints(tmp_path / "checkpoints").restore(make(0, 3000))[1] == {"best": 7 / 3}


def test_a_long_error_keeps_its_end():
    error = OSError("Error writing " + "some/folder/" * 60 + "file: File too large\nand more")
    assert checkpoint._first_line(error).endswith("folder/file: File too large")
    assert len(checkpoint._first_line(error)) < 420


def test_orbax_logs_no_tracebacks(caplog):
    logger = logging.getLogger("absl")
    logger.error("failed in a thread", exc_info=ValueError())
    logger.error("worth knowing")
    assert "failed" not in caplog.text and "worth knowing" in caplog.text


def test_late_callbacks_of_a_damaged_checkpoint_print_nothing(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    host.drop_late_callbacks()
    for said in ("Event loop is closed", "something else"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(said)))
    assert seen == ["something else"]


def test_a_cut_seal_leaves_its_checkpoint(tmp_path, caplog):
    c = saved(tmp_path, 3, 7)
    seal = c.directory / "seals" / "7.json"
    seal.write_text(seal.read_text()[:-9])
    with caplog.at_level(logging.WARNING, "ftjax"):
        assert int(Checkpoints(tmp_path / "checkpoints").restore(make(0))[0].step) == 7
    assert "the seal of checkpoint 7 is unreadable" in caplog.text


@pytest.mark.parametrize("saved_on, restored_on", [(8, 2), (2, 8), (1, 8), (8, 1)])
def test_an_unsealed_checkpoint_is_checked_on_another_mesh(tmp_path, saved_on, restored_on):
    def on(devices, state):
        mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda x: jax.device_put(x, sharding if x.ndim else whole), state)

    c = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 7):
        c.save(on(saved_on, make(step, 64)), {})
    c.close()
    unseal(c, 7)
    like = on(restored_on, make(0, 64))
    assert equal(Checkpoints(tmp_path / "checkpoints").restore(like)[0], make(7, 64))
    sums = c.directory / "seals" / "7.0.sums"
    facts = json.loads(sums.read_text())
    parts = next(parts for name, parts in facts["sums"].items() if "trainable" in name)
    parts[max(parts)] ^= 1
    sums.write_text(json.dumps(facts))
    assert equal(Checkpoints(tmp_path / "checkpoints").restore(like)[0], make(3, 64))


def test_a_clock_that_jumps_ends_no_save(tmp_path, monkeypatch):
    clock = itertools.count(1e9, 1e7)  # months, each time that it is read
    monkeypatch.setattr(time, "time", lambda: next(clock))
    saved(tmp_path, 3, 7).close()
    assert next(clock) > 1.01e9
    state, _ = Checkpoints(tmp_path / "checkpoints").restore(make(0))
    assert equal(state, make(7))


def test_set_aside_lets_a_run_pass_damaged_steps(tmp_path):
    c = saved(tmp_path, 3, 7)
    c.set_aside(after=3)
    c.save(make(7), {})
    c.close()
    assert c.steps() == [3, 7]


def test_all_damaged_is_an_error_that_loses_nothing(tmp_path):
    c = saved(tmp_path, 3, 7)
    for step in (3, 7):
        largest_file(c.directory / str(step)).write_bytes(b"x")
    with pytest.raises(UserError, match="no checkpoint is whole .tried 7, 3."):
        Checkpoints(tmp_path / "checkpoints").restore(make(0))


def test_other_weights_are_refused(tmp_path):
    saved(tmp_path, 3).close()
    with pytest.raises(UserError, match="other weights"):
        Checkpoints(tmp_path / "checkpoints").restore(make(0, size=6))


def test_full_disk_is_a_clear_error_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    c = saved(tmp_path, 3, 7)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(UserError, match="step 9 could not be written.*no space left.*3, 7 are intact"):
        c.save(make(9), {})
    monkeypatch.undo()
    assert int(Checkpoints(tmp_path / "checkpoints").restore(make(0))[0].step) == 7


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(make(1), {})


@pytest.mark.parametrize("harm", ["wrong values", "swapped", "wrong facts", "cut"])
def test_what_was_written_wrongly_is_not_sealed(tmp_path, monkeypatch, harm):
    """Whatever the disk or the writer made of it, the checkpoints before it stay."""
    c = saved(tmp_path, 3, 7)
    args = checkpoint.ocp.args
    with monkeypatch.context() as m:
        if harm == "wrong facts":
            real = args.JsonSave
            m.setattr(args, "JsonSave", lambda facts: real({"best": 4.0}))
        elif harm == "cut":
            done = c._manager.wait_until_finished

            def cut():
                done()
                for p in (c.directory / "9").rglob("*"):
                    if p.is_file() and p.stat().st_size > 100:
                        p.write_bytes(p.read_bytes()[:-50])

            m.setattr(c._manager, "wait_until_finished", cut)
        else:
            real = args.StandardSave
            change = (lambda x: x.at[2].add(1)) if harm == "wrong values" else (lambda x: x[::-1])
            m.setattr(
                args,
                "StandardSave",
                lambda tree: real({k: change(v) if "trainable" in k else v for k, v in tree.items()}),
            )
        c.save(make(9), {"best": 3.0})
        words = "step 9 could not be written.*read.* back.*checkpoints 3, 7 are intact"
        with pytest.raises(UserError, match=words):
            c.wait()
    c.close()
    assert c.steps() == [3, 7] and (c.directory / "damaged-9").is_dir()
    again = Checkpoints(tmp_path / "checkpoints")
    assert int(again.restore(make(0))[0].step) == 7
    again.save(make(9), {"best": 3.0})
    again.close()
    assert again.steps() == [7, 9]


def test_sharded_state_is_read_back(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    state = make(3, size=64)
    placed = jax.tree.map(lambda x: jax.device_put(x, sharding) if x.ndim else x, state)
    c = Checkpoints(tmp_path / "checkpoints")
    c.save(placed, {})
    c.close()
    assert equal(Checkpoints(tmp_path / "checkpoints").restore(placed)[0], state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "int32"])
def test_the_digest_sees_every_element_and_its_place(dtype):
    x = (jnp.arange(30).reshape(2, 3, 5) % 2).astype(dtype)

    def digest(x):
        return tuple(checkpoint._sums(x).items())

    digests = {digest(x)}
    for i in range(30):
        flipped = x.reshape(-1).at[i].set((1 - x.reshape(-1)[i].astype(jnp.int32)).astype(dtype))
        digests.add(digest(flipped.reshape(x.shape)))
    digests.add(digest(x[::-1]))
    assert len(digests) == 32
