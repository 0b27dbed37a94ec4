"""The memory ladder: every rung gives the same gradients, and costs less memory than the one before."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
import tiny

from ftjax import config, lora, mesh, models, plan, weights
from ftjax.errors import UserError
from ftjax.objectives.router import NO_ROUTER, RouterLoss
from ftjax.objectives.sft import sft_loss
from ftjax.ops import memory
from ftjax.recipes import folder, program, sft

pytestmark = pytest.mark.fast

DENSE = tiny.CONFIG | dict(
    hidden_size=32, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1
)
MIXTURE = dict(
    model_type="qwen2_moe",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=40,
    num_experts=4,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=3e-5,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


@functools.cache
def compiled(length: int = 256, dropout: float = 0.0, mixture: bool = False, **options):
    """(gradients, bytes of temporaries) of a step's loss on CPU."""
    model = models.from_config(MIXTURE if mixture else DENSE).with_options(**options)
    adapt = lora.plan(lora.LoraConfig(r=4, lora_alpha=8), model.table)
    base = weights.init(jax.random.key(0), model.table)
    rows = [tiny.documents(4), tiny.documents(4, seed=1)]
    batch = jax.tree.map(lambda x: x[0], tiny.pack(rows, length))

    def params_of(trainable, frozen, rng):
        return lora.attach(frozen, trainable, adapt, rng=rng, dropout=dropout)

    router = RouterLoss.of(model, 0.1, 0.1, router_trains=False) if mixture else NO_ROUTER
    loss = sft_loss(model, params_of, chunk=16, frozen_head=True, router=router)
    batch |= {"rng": jax.random.key(3)} if dropout else {}
    args = tiny.adapters(adapt, model.table), base, batch
    program = plan.compile_program(jax.jit(jax.grad(loss, has_aux=True)).lower(*args), jax.devices()[0])
    return jax.tree.map(np.asarray, program.compiled(*args)), program.memory.temporaries


def assert_same(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), one, two)


@pytest.mark.parametrize("rung", list(memory.LADDER)[1:])
def test_a_rung_changes_no_gradient(rung):
    assert_same(compiled(remat=rung)[0], compiled()[0])


def test_each_rung_takes_less_memory_than_the_one_before():
    rungs = [name for name, rung in memory.LADDER.items() if not rung.host]
    taken = {rung: compiled(remat=rung)[1] for rung in rungs}
    assert all(taken[a] > taken[b] for a, b in itertools.pairwise(rungs)), taken


def test_a_chunked_mlp_gives_the_same_in_less_memory():
    one, chunked = compiled(remat="act"), compiled(remat="act", mlp_chunk=48)  # 256 is no multiple of it
    assert_same(one[0], chunked[0])
    assert chunked[1] < compiled(remat="mlp")[1] < one[1]


def test_a_chunked_mixture_counts_every_router_choice_once():
    """The balance loss is made of sums over all chunks; what fills the last one up counts nowhere."""
    one, chunked = compiled(mixture=True, length=100), compiled(mixture=True, length=100, mlp_chunk=32)
    assert one[0][1]["router_balance"] > 0
    assert_same(one[0], chunked[0])


def test_chunks_draw_dropout_of_their_own():
    kept = compiled(dropout=0.5, mlp_chunk=64)[0]
    assert np.isfinite(kept[1]["loss"]) and kept[1]["loss"] != compiled(dropout=0.5)[0][1]["loss"]


# -- remat: auto


@functools.cache
def step_of(rung: str) -> plan.Step:
    given = ["model=x", "output=y", "data.train=z", "data.max_length=256", "train.batch_size=2"]
    cfg = config.load(None, [*given, "train.unroll=1"], "sft")
    model = program.with_options(models.from_config(DENSE), cfg).with_options(remat=rung)
    return program.plan_step(cfg, model, sft.make_loss, mesh.make_mesh(cfg.mesh, jax.devices()[:1]))


ON_CPU = [name for name, rung in memory.LADDER.items() if not rung.host]


def total(rung):
    return step_of(rung).program.memory.total


def room_for(rung) -> plan.Limit:
    return plan.Limit(int(total(rung) / 0.94), "the test")


def test_what_the_layers_keep_is_counted_beforehand():
    kept = {rung: plan.kept_bytes(step_of(rung)) for rung in ON_CPU}
    layers, tokens, D, F, N, K = 6, 2 * 256, 32, 128, 2 * 16, 16
    assert kept["full"] == layers * tokens * D * 2  # a layer's input in bfloat16
    assert kept["act"] - kept["up"] == kept["up"] - kept["mlp"] == layers * tokens * F * 2
    assert kept["mlp"] - kept["attention"] == layers * tokens * (N + K + K + D) * 2
    assert list(kept.values()) == sorted(kept.values(), reverse=True)


def test_the_fastest_rung_that_fits_is_taken_and_the_program_is_the_one_that_runs():
    found = plan.choose(step_of, room_for("none"), ON_CPU)
    assert found.rung == "none" and found.tried == {} and "took none (nothing is recomputed)" in found.said
    found = plan.choose(step_of, room_for("mlp"), ON_CPU)
    assert found.rung == "mlp" and total("up") > 0.95 * room_for("mlp").bytes
    assert found.step.program is step_of("mlp").program
    assert "took mlp (the MLP is recomputed): it needs" in found.said and "(the test)" in found.said


def test_a_run_keeps_its_rung(tmp_path):
    said, run = [], folder.RunFolder(tmp_path, fresh=True)
    here = step_of("none").mesh
    step = program.choose(run, step_of, here, said.append)
    facts = json.loads((tmp_path / "program.json").read_text())
    assert facts["remat"] == "none" and step is step_of("none") and said == [facts["said"]]
    (tmp_path / "program.json").write_text(json.dumps(facts | {"remat": "mlp"}))
    assert program.choose(folder.RunFolder(tmp_path, fresh=False), step_of, here, said.append) is step_of(
        "mlp"
    )
    assert said[-1] == "train.remat=auto stays at mlp, as before the run was stopped"


def test_there_is_nowhere_to_offload_to_on_a_cpu():
    with pytest.raises(UserError, match="train.remat=offload: a CPU's memory is the host's"):
        step_of("offload")


def test_free_memory_of_the_host_is_found():
    assert 2**28 < (plan._free_host_bytes() or 0) < 2**46


def test_what_cannot_fit_is_not_compiled():
    for step in map(step_of, ON_CPU):
        vars(step).pop("program", None)
    with pytest.raises(UserError, match=r"no rung fits in 1.0 MiB \(the test\): none needs at least"):
        plan.choose(step_of, plan.Limit(2**20, "the test"), ON_CPU)
    assert not any("program" in vars(step_of(rung)) for rung in ON_CPU)
