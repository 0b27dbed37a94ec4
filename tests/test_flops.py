"""FLOPs counted from the weight table against what XLA counts in programs compiled without loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import cases

from ftjax import flops, lora, models, weights
from ftjax.models import decoder
from ftjax.objectives.sft import sft_loss

pytestmark = pytest.mark.fast
# wide enough that elementwise work is a few per cent
WIDE = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=3, vocab_size=512, head_dim=32,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, rope_theta=12345.0,
    rms_norm_eps=3e-5,
)  # fmt: skip
B, T = 2, 128
MIXTRAL = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=256)


def model(**changes):
    return models.from_config(WIDE | dict(model_type="llama", tie_word_embeddings=False) | changes)


def counted(model, plan) -> float:
    """XLA's count of the loss and its gradient on B rows of one document of T tokens."""
    table = model.table
    base = weights.abstract(table, jnp.float32)
    batch = {k: jax.ShapeDtypeStruct((B, T), jnp.int32) for k in ("tokens", "segments", "positions")}
    batch["loss_weight"] = jax.ShapeDtypeStruct((B, T), jnp.float32)
    if plan is None:
        trainable, frozen, params_of = base, {}, lambda t, f, rng: t
    else:
        trainable, frozen = lora.abstract(plan, table), base
        params_of = lambda t, f, rng: lora.attach(f, t, plan)  # noqa: E731
    whole = model.with_options(unroll=True)
    frozen_head = plan is not None and model.head_path not in plan
    loss = sft_loss(whole, params_of, chunk=B * T, frozen_head=frozen_head)
    lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(trainable, frozen, batch)
    return lowered.compile().cost_analysis()["flops"]


def expected(model, plan) -> float:
    """Ours for the same program, which multiplies whole attention matrices, predicts from every position and,
    on CPU, multiplies every row with every expert."""
    ours = flops.step(model, plan, flops.Work((T,) * B, B * T, B * T))
    more = {"attention": T * T / flops.pairs([T]), "experts": model.table.sizes.get("E", 1)}
    return sum(ours.part(name) * more.get(name, 1) for name in flops.PARTS)


@pytest.mark.parametrize("how", ["lora", "full", "part", "experts"])
def test_a_step_is_what_xla_counts(how):
    m = model(**(MIXTRAL if how == "experts" else {}))
    plan = {
        "lora": lambda: lora.plan(lora.LoraConfig(r=8), m.table),
        "part": lambda: lora.plan_whole(m.table, freeze=["mlp", "embed_tokens"]),
    }.get(how, lambda: None)()
    ours, xla = expected(m, plan), counted(m, plan)
    if how == "lora":  # nothing below the first layer's q, k and v needs the gradient of their input
        ours -= 2 * B * T * m.config.hidden_size * 32 * (8 + 4 + 4)
    # what is left is elementwise: norms, softmax, the optimiser has no part in it
    assert 0.975 < ours / xla < 1.001, ours / xla


def test_lora_is_four_n_and_full_tuning_six():
    m = model(num_hidden_layers=2)
    work = flops.Work.rows(3, 64)
    sizes = flops.matrices(m)
    n = sum(size for part, size in sizes.values() if part == "linear")
    head = sum(size for part, size in sizes.values() if part == "head")
    plan = lora.plan(lora.LoraConfig(r=8), m.table)
    assert n + head + 2 * 256 + 2 * 256 * 2 + 256 == m.table.count() - 512 * 256 + 512
    for how, factor in ((plan, 4), (None, 6)):
        got = flops.step(m, how, work)
        assert got.part("linear") == factor * n * work.tokens
        assert got.part("head") == factor * head * work.trained
        assert got.part("attention") == 6 * 2 * 256 * sum(i + 1 for i in range(64)) * 2 * 3
    per_layer = 8 * (256 * 2 + 2 * (256 + 128) + 256 * 2 + 3 * (256 + 512))
    assert flops.step(m, plan, work).part("factors") == 6 * 2 * per_layer * work.tokens


def test_ranks_count_as_they_are_not_as_they_are_stored():
    m = model(num_hidden_layers=2)
    config = lora.LoraConfig(r=8, target_modules=("q_proj",), rank_pattern={"layers.1.self_attn.q_proj": 2})
    plan = lora.plan(config, m.table)
    got = flops.step(m, plan, flops.Work.rows(1, 10))
    assert got.part("factors") == 6 * (8 + 2) * (256 + 256) * 10


def test_a_reference_model_adds_a_forward_pass():
    m = model(num_hidden_layers=1)
    plan = lora.plan(lora.LoraConfig(r=8), m.table)
    work = flops.Work.rows(1, 32)
    one, two = (flops.step(m, plan, work, reference=x) for x in (False, True))
    assert two.total - one.total == sum(one.forward.values()) - one.forward["factors"]
    assert two.backward == one.backward


def test_experts_count_for_the_tokens_they_get():
    m = model(**MIXTRAL)
    got = flops.step(m, None, flops.Work.rows(1, 10))
    assert got.part("experts") == 6 * 10 * 2 * 3 * (3 * 256 * 256)


@pytest.mark.parametrize("window,chunk", [(None, None), (5, None), (None, 4), (100, None), (1, None)])
def test_pairs_are_those_of_the_mask(window, chunk):
    lengths = [1, 9, 4, 13]
    total = 0
    for n in lengths:
        t, s = np.arange(n)[:, None], np.arange(n)[None]
        seen = (s <= t) & (t - s < (window or n + 1))
        if chunk:
            seen &= t // chunk == s // chunk
        total += int(seen.sum())
    assert flops.pairs(lengths, window, chunk) == total


def test_what_a_batch_holds():
    rows = [tiny.documents(3, seed=1), tiny.documents(2, seed=2)]
    batch = tiny.pack(rows, 48)
    work = flops.Work.of(batch)
    assert sorted(work.lengths) == sorted(len(tokens) for row in rows for tokens, _ in row)
    assert work.trained == sum(int((trained[1:] != 0).sum()) for row in rows for _, trained in row)
    assert work.positions == 96 and work.tokens < 96
    assert (work + work).tokens == 2 * work.tokens
    assert flops.Work.rows(2, 8) == flops.Work((8, 8), 14, 16)


FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "phi3",
    "gptj",
    "deepseek_v3",
    "gemma4_text",
    "qwen3_next",
    "llama4_text",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_as_wide_as_attention_sees_them(family, monkeypatch):
    """What a family's blocks say of their attention, against the shapes that attention gets."""
    m = models.from_config(cases.config(family)).with_options(unroll=True)
    seen = []

    def record(q_BTNH, k_BSKH, v_BSKH, *args, **facts):
        seen.append(2 * q_BTNH.shape[2] * (q_BTNH.shape[3] + v_BSKH.shape[3]))
        return jnp.zeros((*q_BTNH.shape[:3], v_BSKH.shape[3]), q_BTNH.dtype)

    monkeypatch.setattr(decoder, "attention", record)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    jax.eval_shape(m, weights.abstract(m.table), ids, ids, ids)
    kinds = [m.module_type.block(kind) for run in m.table.runs for _, kind in run.blocks]
    assert {block.mixing_flops(m.config, 1, 0) for block in kinds} - {0} == set(seen)


@pytest.mark.parametrize(
    "kind,bf16",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(kind, bf16):
    found = flops.device(kind)
    assert found is not None and found.bf16 == bf16


def test_an_unknown_device_has_no_peak():
    assert flops.device("cpu") is None and flops.device("NVIDIA L400") is None
