"""Which attention a program holds: by device and facts, on a mesh, under remat; what memory it takes."""

import functools
import importlib.util
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tpu

from ftjax import lora, mesh, models, optim, train, weights
from ftjax.errors import UserError
from ftjax.ops import attention, target
from ftjax.ops.attention import IMPLEMENTATIONS, Facts, choose
from ftjax.ops.memory import LADDER

pytestmark = pytest.mark.fast


def shapes(B=1, T=256, N=4, K=2, H=16, dtype=jnp.bfloat16, U=None):
    """q, k, v and (segments, positions)."""
    heads = (N, H), (K, H), (K, U or H)
    integers = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return *(jax.ShapeDtypeStruct((B, T, *x), dtype) for x in heads), (integers, integers)


def gradient(**facts):
    """A function of `shapes` that holds attention's forward and backward pass."""

    def loss(q, k, v, where):
        return attention(q, k, v, where, scale=0.25, **facts).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def lowered(fn, *args, kind="gpu", platform="cuda") -> str:
    if importlib.util.find_spec("jax._src.pallas.triton.gpu_info"):  # jax 0.12 asks which card; here is none
        gpu_info = importlib.import_module("jax._src.pallas.triton.gpu_info")
        version = gpu_info.gpu_version_from_device_kind("NVIDIA H100 80GB HBM3")
        gpu_info.registry["cpu"] = functools.partial(gpu_info.get_gpu_info_from_version, version)
    with target.use(kind):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def triton_calls(text: str) -> list[str]:
    return re.findall(r'xla\.gpu\.triton.*?name = "(\w+)"', text)


PASSES = ["attention_forward", "attention_dq", "attention_dkv"]


def test_the_options_of_a_run_are_the_implementations():
    hint = typing.get_type_hints(train.TrainOptions)["attention"]
    assert typing.get_args(hint) == IMPLEMENTATIONS


@pytest.mark.parametrize(
    "args, facts",
    [
        (dict(H=64), dict(softcap=50.0)),
        (dict(H=80, T=300), dict(softcap=50.0, window=100)),  # no power of two, no multiple of a block
        (dict(H=192, U=128), dict(softcap=50.0)),
        (dict(H=512), {}),
        (dict(dtype=jnp.float32), {}),
    ],
    ids=str,
)
def test_our_kernels_lower_for_cuda(args, facts):
    text = lowered(gradient(implementation="pallas", **facts), *shapes(**args))
    assert sorted(triton_calls(text)) == sorted(PASSES)


@pytest.mark.parametrize("remat", LADDER)
def test_the_forward_kernel_runs_once_under_every_policy_but_full(remat):
    """Its log-sum-exp is kept with its result."""
    model = tiny.model(num_hidden_layers=2).with_options(remat=remat, attention="pallas")
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def loss(params, tokens, positions, segments):
        return model(params, tokens, positions, segments)[0].sum()

    params = weights.abstract(model.table, jnp.float32)
    calls = triton_calls(lowered(jax.grad(loss), params, tokens, tokens, tokens))
    assert sorted(calls) == sorted(PASSES + PASSES[:1] * (remat == "full"))


def test_the_choice():
    def chosen(kind, own_row=True, implementation="auto", softcap=None, **args):
        q, k, v, _ = shapes(**args)
        with target.use(kind):
            return choose(implementation, Facts(0.25, softcap, own_row=own_row), q, k, v)

    assert chosen("cpu") == "blockwise"
    assert chosen("cpu", T=128) == "dense"
    assert chosen("gpu", softcap=50.0) == "pallas"
    assert chosen("tpu") == "splash"
    assert chosen("tpu", own_row=False) == "blockwise"
    assert chosen("gpu", T=1, own_row=False) == "dense"
    assert chosen("gpu", softcap=50.0, implementation="xla") == "blockwise"
    # what a run forces is for its training; the same model also generates
    assert chosen("gpu", own_row=False, T=1, implementation="pallas") == "dense"
    with pytest.raises(UserError, match="train.attention=pallas: .* GPUs, .* CPU; xla could take it"):
        chosen("cpu", implementation="pallas")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(UserError, match="attention='flash' is unknown; one of: auto, xla"):
        tiny.model().with_options(attention="flash")


def test_a_row_of_more_documents_than_promised_is_no_number():
    model, params = tiny.model(num_hidden_layers=1), tiny.model(num_hidden_layers=1).table
    params = weights.init(jax.random.key(0), params)
    tokens, places = jnp.ones((1, 8), jnp.int32), jnp.array([[0, 1, 2, 3, 0, 1, 2, 0]])
    packed, one = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]]), jnp.array([[1, 1, 1, 1, 0, 0, 0, 0]])

    def hidden(segments, documents):
        return model.with_options(documents=documents)(params, tokens, places, segments)[0]

    assert jnp.isnan(hidden(packed, 1)).all()
    np.testing.assert_array_equal(hidden(packed, 2), hidden(packed, None))
    np.testing.assert_array_equal(hidden(one, 1), hidden(one, None))


def test_memory_is_linear_in_the_row():
    """The compiled program's temporaries, forward and backward."""

    def temporaries(T):
        compiled = jax.jit(gradient(implementation="blockwise")).lower(*shapes(T=T)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(16384)
    assert long < 8.8 * short
    # far less than one [T, T] array
    assert long < 16384**2


# -- TPUs

GEMMA = dict(
    model_type="gemma2",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    sliding_window=100,
    query_pre_attn_scalar=32,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)


@tpu.needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_a_lora_step_for_tpus_holds_splash(topology):
    """On a mesh of rows and heads, layers with and without a window in one loop, soft-capped: a kernel for
    each of the two masks, whose forward pass runs once."""
    model = models.from_config(GEMMA).with_options(dtype=jnp.bfloat16, remat="mlp")
    plan = lora.plan(lora.LoraConfig(), model.table)

    def loss(trainable, frozen, batch):
        params = lora.attach(frozen, trainable, plan)
        where = batch["tokens"], batch["positions"], batch["segments"]
        hidden = model(params, *where)[0].astype(jnp.float32)
        return jnp.sum(hidden**2), {"loss": jnp.sum(hidden), "weight": jnp.float32(1)}

    trainable = lora.abstract(plan, model.table)
    tx, _ = optim.make_optimizer(optim.OptimOptions(), trainable, 100, model.table)
    opt_state = jax.eval_shape(tx.init, trainable)
    with mesh.use(mesh.make_mesh(mesh.MeshOptions(fsdp=2, tp=2), tpu.devices(topology))) as devices:
        places = weights.shardings(model.table, mesh.WEIGHT_RULES, devices)
        base = weights.abstract(model.table, jnp.bfloat16)
        frozen = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), base, places)
        of_adapters = mesh.adapter_shardings(devices, plan, model.table)
        trainable = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), trainable, of_adapters
        )
        whole = mesh.sharding(devices, "")

        def everywhere(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

        state = train.TrainState(
            everywhere(jax.ShapeDtypeStruct((), jnp.int32)),
            trainable,
            jax.tree.map(everywhere, opt_state),
            everywhere(jax.ShapeDtypeStruct((), jnp.bool_)),
        )
        tokens = jax.ShapeDtypeStruct((1, 4, 256), jnp.int32, sharding=mesh.batch_sharding(devices))
        batch = dict.fromkeys(("tokens", "segments", "positions"), tokens)
        text = tpu.program(train.make_train_step(loss, tx, 0), state, frozen, batch, topology=topology).hlo
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    counts = {name: sum(f"splash_mha_{name}" in line for line in calls) for name in ("fwd", "dq", "dkv")}
    assert counts == {"fwd": 2, "dq": 2, "dkv": 2}
    # each chip has half the rows and half the heads
    forward = next(line for line in calls if "splash_mha_fwd" in line)
    assert "bf16[2,2,256,32]" in forward
