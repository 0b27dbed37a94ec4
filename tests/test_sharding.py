"""Every axis of the mesh, and what goes together: losses and adapters' gradients of one device.

`python tests/test_sharding.py` runs the whole matrix, every pair and triple of axes on 8 devices and some
shapes on 16, and writes benchmarks/results/sharding.md."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import platform
import subprocess
import sys
import time

if __name__ == "__main__":
    # What XLA partitions is the same; LLVM makes less of it, in a third of the time.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    devices = "--xla_force_host_platform_device_count=16"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{devices} {quick}"}

import jax
import numpy as np
import optax
import pytest
import tiny
import tpu
from jax.experimental import topologies

from ftjax import checkpoint, config, lora, mesh, models, plan, quant, train, weights
from ftjax.errors import UserError
from ftjax.objectives.preference import dpo_loss
from ftjax.objectives.router import RouterLoss
from ftjax.objectives.sft import sft_loss
from ftjax.recipes import program, sft

SIZES = tiny.CONFIG | dict(hidden_size=64, num_hidden_layers=2)
GEMMA2 = dict(model_type="gemma2", sliding_window=9, query_pre_attn_scalar=16, attn_logit_softcapping=3.0)
MIXTRAL = dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)
FAMILIES = {
    "dense": SIZES,
    "window": SIZES
    | GEMMA2
    | dict(final_logit_softcapping=3.0, layer_types=["sliding_attention", "full_attention"]),
    "experts": SIZES | MIXTRAL,
}
ROWS, LENGTH = 8, 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A family on a mesh, with settings of the run."""

    family: str
    shape: tuple[tuple[str, int], ...]
    remat: str = "none"
    dropout: float = 0.0
    quant: str = ""
    whole: bool = False  # every weight is trained
    mlp_chunk: int | None = None
    pairs: bool = False  # dpo

    def __str__(self):
        rest = [f"{k}={v}" for k, v in dataclasses.asdict(self).items() if v and k not in ("family", "shape")]
        return " ".join(
            [self.family, *(f"{k}{v}" for k, v in self.shape), *(x for x in rest if x != "remat=none")]
        )


def case(family: str, remat: str = "none", **settings) -> Case:
    fields = {f.name for f in dataclasses.fields(Case)}
    shape = tuple((axis, settings[axis]) for axis in mesh.AXES if axis in settings)
    return Case(family, shape, remat, **{k: v for k, v in settings.items() if k in fields})


CASES = [
    case("dense", fsdp=2, cp=2, tp=2),
    case("dense", "attention", dp=2, cp=4),
    case("dense", dp=2, fsdp=2, sp=2, whole=True),
    case("dense", "mlp", fsdp=2, cp=2, sp=2, dropout=0.3),
    case("dense", fsdp=4, cp=2, pairs=True),
    case("window", cp=4, sp=2),
    case("window", "full", dp=2, fsdp=2, cp=2, mlp_chunk=16),
    case("experts", "mlp", ep=2, cp=2, tp=2),
    case("experts", dp=2, ep=4),
    case("experts", fsdp=2, ep=2, sp=2, dropout=0.3),
    case("experts", fsdp=2, ep=2, cp=2, quant="nf4"),
]


@functools.cache
def setup(family: str, remat: str, dropout: float, quantised: str, whole: bool, mlp_chunk: int | None):
    """(model, what is trained of it, base, trainable, batch)."""
    model = models.from_config(FAMILIES[family]).with_options(remat=remat, mlp_chunk=mlp_chunk)
    adapt = lora.plan(lora.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout), model.table)
    base = weights.init(jax.random.key(0), model.table)
    if quantised:
        base = quant.quantise(base, model.table, quant.QuantOptions(kind=quantised, block_size=8))
    batch = tiny.pack([tiny.documents(3, seed=i, low=5, high=11) for i in range(ROWS)], LENGTH)
    return model, adapt, base, base if whole else tiny.adapters(adapt, model.table), batch


def after_step(one: Case, devices=None):
    """(what is trained after a step of SGD at rate 1, metrics), on a mesh or on one device."""
    model, adapt, base, trainable, batch = setup(
        one.family, one.remat, one.dropout, one.quant, one.whole, one.mlp_chunk
    )
    if devices is not None and not one.dropout:
        model = model.with_options(zigzag=devices.shape["cp"])
    router = RouterLoss(0.1, 0.01) if one.family == "experts" else RouterLoss()

    def params_of(trainable, frozen, rng):
        return trainable if one.whole else lora.attach(frozen, trainable, adapt, rng=rng, dropout=one.dropout)

    how: dict = dict(chunk=8, frozen_head=not one.whole, router=router)
    loss = sft_loss(model, params_of, **how)
    if one.pairs:
        loss = dpo_loss(model, params_of, beta=0.1, label_smoothing=0.1, **how)
        batch = batch | {"pairs": np.ones((1, ROWS, 1), np.float32)}
    step = train.make_train_step(loss, optax.sgd(1.0), 0)
    trainable, frozen = jax.tree.map(lambda x: x.copy(), trainable), {} if one.whole else base
    if devices is None:
        state, metrics = step(train.init_state(trainable, optax.sgd(1.0)), frozen, batch)
    else:
        mesh.check(devices, model.table, ROWS, LENGTH)
        with mesh.use(devices):
            places = weights.flatten(
                weights.shardings(model.table, mesh.weight_rules(devices, model.table), devices)
            )
            of_adapters = mesh.adapter_shardings(devices, adapt, model.table)
            trainable = jax.device_put(trainable, weights.unflatten(places) if one.whole else of_adapters)
            if one.quant:
                options = quant.QuantOptions(kind=one.quant, block_size=8)
                for path, spec in quant.plan(options, model.table).items():
                    places[path] = quant.shardings(model.table, path, spec, places[path])
            frozen = {} if one.whole else jax.device_put(frozen, weights.unflatten(places))
            batch = jax.device_put(batch, mesh.batch_sharding(devices))
            state, metrics = step(train.init_state(trainable, optax.sgd(1.0)), frozen, batch)
    return jax.tree.map(np.asarray, state.trainable), jax.device_get(metrics)


@functools.cache
def alone(one: Case):
    return after_step(one)


def differences(one: Case) -> tuple[float, float]:
    """(of the losses, relative; of the gradients, the greatest over their greatest)."""
    devices = jax.devices()[: math.prod(n for _, n in one.shape)]
    (ours, metrics), (theirs, want) = (
        after_step(one, mesh.make_mesh(mesh.MeshOptions(**{"fsdp": 1} | dict(one.shape)), devices)),
        alone(dataclasses.replace(one, shape=())),
    )
    loss = max(abs(metrics[k] / want[k] - 1) for k in ("loss", "grad_norm"))
    before = jax.tree.leaves(
        setup(one.family, one.remat, one.dropout, one.quant, one.whole, one.mlp_chunk)[3]
    )
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), before, strict=True))
    greatest = max(np.abs(b - x).max() for _, b, x in pairs)
    return float(loss), float(max(np.abs(a - b).max() for a, b, _ in pairs) / greatest)


TOLERANCE = 2e-5  # float32, sums in another order


@pytest.mark.parametrize("one", CASES, ids=str)
def test_a_mesh_equals_one_device(one):
    assert max(differences(one)) < TOLERANCE


def test_four_axes_on_sixteen_devices():
    """Where the compiler gathered a weight over the wrong devices, and every loss was wrong."""
    command = [sys.executable, __file__, "dense dp2 fsdp2 cp2 sp2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "| 16 |" in done.stdout, done.stdout + done.stderr


MODEL = models.from_config(FAMILIES["experts"])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (dict(fsdp=4, ep=3, cp=1), "mesh: fsdp=4 × ep=3 is 12 devices, there are 8: one set to -1"),
        (dict(fsdp=-1, cp=3), "mesh.cp=3 does not divide the 8 devices; 1, 2, 4, 8 would"),
        (dict(fsdp=-1, dp=-1), "at most one is -1"),
        (
            dict(fsdp=1, tp=4, sp=2),
            "mesh.sp=2 · mesh.tp=4 does not divide the model's num_attention_heads=4; 1, 2, 4",
        ),
        (dict(fsdp=2, tp=4), "mesh.tp=4 does not divide the model's num_key_value_heads=2; 1, 2 would"),
        (dict(fsdp=1, dp=8), "mesh.dp=8 does not divide the 4 rows of a microbatch"),
        (dict(fsdp=1, cp=8), "mesh.cp=8 needs rows of a multiple of 16 tokens, not 40: data.max_length=48"),
    ],
    ids=str,
)
def test_what_does_not_divide_says_what_would(shape, said):
    with pytest.raises(UserError) as e:
        mesh.check(mesh.make_mesh(mesh.MeshOptions(**shape), jax.devices()[:8]), MODEL.table, 4, 40)
    assert said in str(e.value)


LLAMA = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
V5E = 16 * 2**30


@pytest.mark.fast
@pytest.mark.parametrize(
    ("devices", "rows", "length", "memory", "want"),
    [
        (8, 8, 2048, V5E, dict(fsdp=8)),
        (8, 8, 2048, None, dict(fsdp=8)),
        (32, 16, 2048, V5E, dict(dp=2, fsdp=8, sp=2)),  # two slices of 16; a row of 2,048 is not cut
        (8, 2, 32768, V5E, dict(fsdp=2, cp=4)),
        (8, 2, 2048, V5E, dict(fsdp=2, sp=4)),
        (8, 8, 32768, V5E, dict(fsdp=8)),  # does not fit, and no mesh would help
        (16, 16, 1024, 0.6 * V5E, dict(fsdp=8, ep=2)),  # experts: a layer does not fit gathered
    ],
)
def test_the_automatic_choice(devices, rows, length, memory, want):
    experts = dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, num_hidden_layers=16)
    model = models.from_config(LLAMA | (experts if length == 1024 else {}))
    given = ["model=m", "output=o", "data.train=d", "mesh=auto", "train.remat=auto"]
    cfg = config.load(None, [*given, f"data.max_length={length}", f"train.batch_size={rows}"])
    found, why = program.choose_mesh(cfg, model, devices, want.get("dp", 1), memory)
    assert {k: n for k, n in dataclasses.asdict(found).items() if n > 1} == want, why
    assert "auto took" in why and ("train.microbatches" in why) == (rows * length // devices > 20000)


@pytest.mark.fast
def test_auto_in_a_config():
    given = ["model=m", "output=o", "data.train=d", "mesh=auto", "data.max_length=128", "train.batch_size=4"]
    cfg = config.load(None, given)
    made, why = program.make_mesh(cfg, MODEL)
    assert made.size == 8 and made.shape["fsdp"] == 4 and f"sp={made.shape['sp']}" in why
    with pytest.raises(UserError, match="leave one of the three out"):
        more = ["mesh={fsdp: 4, cp: 2}", "train.mlp_chunk=8", "lora.lora_dropout=0.1"]
        program.make_mesh(config.load(None, [*given, *more]), MODEL)


@pytest.mark.fast
@tpu.needs_libtpu
def test_slices_hold_copies_and_hosts_of_a_copy_its_rows():
    with plan._environment(plan._LIBTPU):
        get = functools.partial(topologies.get_topology_desc, platform="tpu", topology_name="v5e:2x4")
        devices = list(get(num_slices=2).devices)  # of a host each
    made = mesh.make_mesh(mesh.MeshOptions(dp=4, fsdp=2, tp=2), devices)
    assert [{x.slice_index for x in copy.flat} for copy in made.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="the 16 devices are 2 slices, .* dp must be 2 or a multiple"):
        mesh.make_mesh(mesh.MeshOptions(), devices)
    whole = mesh.make_mesh(mesh.MeshOptions(dp=2, fsdp=1, cp=8), devices)
    assert {tuple(sorted(rows)) for rows in mesh._rows_by_process(whole, 4).values()} == {(0, 1), (2, 3)}


@pytest.mark.fast
def test_what_layers_keep_follows_the_rules():
    given = ["model=m", "output=o", "data.train=d", "data.max_length=64", "train.batch_size=8"]
    model = models.from_config(FAMILIES["dense"])

    def kept(**shape):
        cfg = config.load(None, [*given, "train.remat=attention"])
        devices = jax.devices()[: math.prod(shape.values())]
        made = mesh.make_mesh(mesh.MeshOptions(**{"fsdp": 1} | shape), devices)
        step = program.plan_step(cfg, program.with_options(model, cfg), sft.make_loss, made)
        return plan.kept_bytes(step)

    whole = kept(fsdp=1)
    assert kept(fsdp=8) == pytest.approx(whole / 8, rel=0.1)
    assert kept(fsdp=4, cp=2) == pytest.approx(whole / 8, rel=0.1)
    assert whole / 2 < kept(tp=2) < whole and kept(sp=2) == pytest.approx(whole / 2, rel=0.1)


@pytest.mark.fast
def test_a_checkpoint_is_read_back_on_another_mesh(tmp_path):
    model, adapt, _, trainable, _ = setup("experts", "none", 0.0, "", False, None)
    tx = optax.adam(1e-3)

    def state(**shape):
        devices = mesh.make_mesh(mesh.MeshOptions(**shape), jax.devices()[:8])
        on = jax.device_put(trainable, mesh.adapter_shardings(devices, adapt, model.table))
        return train.init_state(on, tx, mesh.state_shardings(devices, tx, on))

    saver = checkpoint.Checkpoints(tmp_path, 2)
    saver.save(state(fsdp=2, cp=2, tp=2), {})
    saver.wait()
    like = state(dp=2, fsdp=1, ep=2, sp=2)
    found, _ = saver.restore(like)
    saver.close()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.sharding == y.sharding


# -- The whole matrix, on demand


def matrix():
    """Each axis alone, every pair and every triple on 8 devices; on 16, shapes of four axes."""
    for family in FAMILIES:
        axes = [axis for axis in mesh.AXES if axis != "ep" or family == "experts"]
        for count in (1, 2, 3):
            for some in itertools.combinations(axes, count):
                if {"sp", "tp"} <= set(some):
                    continue  # two key heads are split once
                sizes = {1: (8,), 2: (4, 2), 3: (2, 2, 2)}[count]
                wide = dict(zip(some, sizes, strict=True))
                for axis in ("sp", "tp"):
                    if wide.get(axis, 1) > 2:
                        wide = {a: 2 if a == axis else 4 for a in some}
                yield case(family, **wide)
        yield case(family, dp=2, fsdp=2, cp=2, tp=2)
        yield case(family, dp=2, fsdp=2, cp=2, sp=2)
        yield case(family, dp=2, fsdp=4, sp=2)
        yield case(family, dp=4, cp=2, sp=2)
        yield case(family, fsdp=4, cp=2, tp=2)
        yield case(family, fsdp=2, cp=8)
    yield case("experts", fsdp=2, ep=2, cp=2, tp=2)
    yield case("experts", dp=2, ep=4, sp=2)
    yield case("experts", fsdp=2, ep=2, cp=2, sp=2, whole=True)
    yield case("window", dp=2, fsdp=2, cp=2, sp=2, whole=True)


RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "sharding.md"


def main(*names: str):
    """The cases of these names; without any, all, each with its row in the results: it goes on where it was
    stopped."""
    if names:
        for one in (one for one in [*CASES, *matrix()] if str(one) in names):
            loss, gradients = differences(one)
            print(f"| {one} | {math.prod(n for _, n in one.shape)} | {loss:.1e} | {gradients:.1e} |")
            assert max(loss, gradients) < TOLERANCE, one
        return
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and "e-" in line}
    cases = list(dict.fromkeys([*CASES, *matrix()]))
    cpu = next(x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name"))
    for one in cases:
        if str(one) in rows:
            continue
        clock = time.perf_counter()
        loss, gradients = differences(one)
        devices = math.prod(n for _, n in one.shape)
        rows[str(one)] = f"| {one} | {devices} | {loss:.1e} | {gradients:.1e} |"
        print(rows[str(one)], f"{time.perf_counter() - clock:.0f} s", flush=True)
        assert max(loss, gradients) < TOLERANCE, one
        text = f"""# Meshes of every kind against one device

`python tests/test_sharding.py`: a step of SGD in float32 on {ROWS} packed rows of {LENGTH} tokens; its loss
and its gradient norm (the greater relative difference) and its gradients (the greatest difference over the
greatest gradient) against the same step on one device. {len(rows)} of {len(cases)} cases have run, on CPU
devices of one process ({cpu}), Python {platform.python_version()}, jax {jax.__version__}. A case fails at
{TOLERANCE:.0e}.

| family, mesh, settings | devices | loss | gradients |
|---|---|---|---|
"""
        RESULTS.write_text(text + "\n".join(rows.values()) + "\n")
        jax.clear_caches()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
