"""cuDNN's attention: the programs for CUDA hold the calls meant; what is around the calls is exact.

cuDNN itself is not to be had on a CPU. For values, its call is replaced by plain jax that does what its
documentation says of offsets and lengths; on a GPU `ops.attention.proof` tries the real one before use."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import SCALE, inputs, packed, reference, reference_grads, rows
from test_attention_programs import PASSES, gradient, lowered, shapes, triton_calls

from ftjax import mesh
from ftjax.errors import UserError
from ftjax.ops import attention, target
from ftjax.ops.attention import Facts, blockwise, choose, cudnn, pallas_gpu, proof
from ftjax.ops.attention import _attend as attend
from ftjax.ops.attention.facts import keeps_promise

pytestmark = pytest.mark.fast


@pytest.fixture
def hopper(monkeypatch):
    """As on a machine with such a GPU and cuDNN, for tracing."""
    monkeypatch.setattr(cudnn, "installed", lambda: True)
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn.fused, "is_cuda_compute_capability_equal", lambda _: False)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("documents", [None, 1, 3])
def test_the_calls_for_cuda(documents, window, hopper):
    """One forward and one backward; our own kernel beside them only where no bound is promised."""
    text = lowered(gradient(documents=documents, window=window), *shapes(B=2, H=64))
    calls = re.findall(r"custom_call @(__cudnn\S+?)\(", text)
    assert sorted(calls) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert sorted(triton_calls(text)) == (sorted(PASSES) if documents is None else [])

    def said(name):
        return set(re.findall(rf"\\22{name}\\22: (?:\\22)?(\w+)", text))

    assert said("mask_type") == {"CAUSAL" if documents == 1 else "PADDING_CAUSAL"}
    assert said("sliding_window_length") == {str(window or 0)}
    assert said("max_seg_per_batch") == {{None: "32", 1: "1", 3: "8"}[documents]}
    # packed rows are one row
    tokens = 256 if documents == 1 else 512
    assert re.search(rf"@__cudnn\$fmhaSoftmax\(.*tensor<{512 // tokens}x{tokens}x4x64xbf16>", text)


@pytest.mark.parametrize("documents", [None, 1])
def test_on_a_mesh_each_device_calls_for_its_part(documents, hopper):
    with mesh.use(mesh.make_mesh(mesh.MeshOptions(fsdp=4, tp=2))):
        text = lowered(gradient(documents=documents), *shapes(B=8, H=64))
    calls = re.findall(r"custom_call @__cudnn\$fmhaSoftmax(?:Backward)?\(.*", text)
    assert len(calls) == 2
    part = "1x512x2x64" if documents is None else "2x256x2x64"  # 2 of 8 rows and 2 of 4 heads
    assert all(f"tensor<{part}xbf16>" in call for call in calls)


@pytest.mark.parametrize(
    "args, facts, why",
    [
        (dict(), dict(softcap=50.0), "no soft-cap; xla and pallas could"),
        (dict(), dict(sinks=jnp.zeros(4)), "no sinks"),
        (dict(dtype=jnp.float32), {}, "half precision, not float32"),
        (dict(H=192, U=128), {}, "one head size, not 192 of q and k and 128 of v"),
        (dict(H=20), {}, "multiple of 8 up to 256, not 20"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_cudnn_cannot_is_said(args, facts, why, hopper):
    q, k, v, where = shapes(**args)

    def forced(q, k, v, where):
        return attention(q, k, v, where, scale=0.25, implementation="cudnn", **facts)

    with target.use("gpu"), pytest.raises(UserError, match=f"train.attention=cudnn: .*{why}"):
        jax.eval_shape(forced, q, k, v, where)


def test_without_hopper_packed_rows_go_to_our_kernel(hopper, monkeypatch):
    q, k, v, _ = shapes()
    with target.use("gpu"):
        assert choose("auto", Facts(0.25, own_row=True), q, k, v) == "cudnn"
        monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda _: False)
        assert choose("auto", Facts(0.25, own_row=True), q, k, v) == "pallas"
        assert choose("auto", Facts(0.25, own_row=True, documents=1), q, k, v) == "cudnn"


def seen_by(q, window, lengths, offsets):
    """The mask [M, T, T] of places in the row laid end to end that each document's part may have."""
    place = jnp.arange(q.shape[1])
    if lengths is None:
        within = jnp.ones((1, q.shape[1]), bool)
    else:
        start, n = offsets[0, :-1, None], lengths[0, :, None]
        within = (place >= start) & (place < start + n)
    distance = place[:, None] - place
    return within[:, :, None] & within[:, None] & (distance >= 0) & (distance < (window or 10**6))


@jax.custom_vjp
def documented(scale, q, k, v, mask):
    return documented_fwd(scale, q, k, v, mask)[0]


def logits(scale, q, k, mask):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    return jnp.where(mask[None, :, None], jnp.einsum("btnh,bsnh->bnts", q, k)[:, None] * scale, -jnp.inf)


def documented_fwd(scale, q, k, v, mask):
    x = logits(scale, q, k, mask)  # [B, M, N, T, S]
    lse = jax.nn.logsumexp(x, -1)
    p = jnp.exp(x - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]).sum(1)
    out = jnp.einsum("bnts,bsnh->btnh", p, jnp.repeat(v, q.shape[2] // v.shape[2], 2))
    kept = lse.reshape(-1, *lse.shape[2:])
    return (out, kept), (scale, q, k, v, mask, out, kept)


def documented_bwd(residuals, gs):
    scale, q, k, v, mask, out, kept = residuals
    lse = kept.reshape(q.shape[0], -1, *kept.shape[1:])
    x = logits(scale, q, k, mask)
    p = jnp.exp(x - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]).sum(1)
    G = q.shape[2] // k.shape[2]
    group = lambda x: x.reshape(*x.shape[:2], -1, G, x.shape[3]).sum(3)  # noqa: E731
    d = jnp.einsum("btnh,bsnh->bnts", gs[0], jnp.repeat(v, G, 2))
    d = p * (d - jnp.sum(out * gs[0], -1).transpose(0, 2, 1)[..., None]) * scale
    dq = jnp.einsum("bnts,bsnh->btnh", d, jnp.repeat(k, G, 2))
    dk = group(jnp.einsum("bnts,btnh->bsnh", d, q))
    return None, dq, dk, group(jnp.einsum("bnts,btnh->bsnh", p, gs[0])), None


documented.defvjp(documented_fwd, documented_bwd)


@pytest.fixture
def described(monkeypatch):
    """cuDNN's call done in plain jax."""

    def call(facts, window, q, k, v, lengths=None, offsets=None):
        return documented(facts.scale, q, k, v, seen_by(q, window, lengths, offsets))

    def gradients(facts, window, q, k, v, places, out, kept, g):
        mask = seen_by(q, window, *(places or (None, None)))
        return documented_bwd((facts.scale, q, k, v, mask, out, kept), (g, None))[1:4]

    monkeypatch.setattr(cudnn, "_call", call)
    monkeypatch.setattr(cudnn, "_gradients", gradients)
    monkeypatch.setattr(pallas_gpu, "INTERPRET", True)


@pytest.mark.parametrize(
    "documents, T, facts",
    [
        ([[9, 1, 7], [1, 1, 19]], 24, {}),
        ([[9, 15], [20, 3]], 24, dict(windows=(5,))),
        ([[9, 15], [20]], 24, dict(documents=2)),
        ([[20], [24]], 24, dict(documents=1)),
        ([[1] * 21, [24]], 24, {}),  # more than the bound
    ],
    ids=str,
)
def test_rows_laid_end_to_end(documents, T, facts, described, monkeypatch):
    monkeypatch.setattr(cudnn, "bound", lambda facts, B, *_: 8)
    where, args = rows(documents, T), inputs(B=2, T=T)
    facts = Facts(SCALE, own_row=True, **facts)
    (window,) = facts.windows
    real = where[0] > 0
    g = np.random.default_rng(1).normal(size=args[0].shape).astype(np.float32) * real[..., None, None]

    @jax.jit
    def both(q, k, v, g):
        def ours(q, k, v):
            return attend(q, k, v, None, where, where, window, facts, "cudnn")

        out, pull = jax.vjp(ours, q, k, v)
        return out, pull(g)

    out, grads = both(*args, g)
    want = reference(*args, where, where, window=window)
    np.testing.assert_allclose(np.asarray(out)[real], want[real], rtol=0, atol=1e-6)
    for ours, want in zip(grads, reference_grads(g, *args, where, where, window=window), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=3e-6)


def test_runs_of_one_segment():
    """Padding is a run, too, and a document ends with its row."""
    segments = np.array([[1, 1, 2, 0], [1, 1, 1, 1]], np.int32)
    lengths, offsets, count = cudnn.runs(segments, 6)
    assert lengths.tolist() == [[2, 1, 1, 4, 0, 0]] and offsets.tolist() == [[0, 2, 3, 4, 8, 8, 8]]
    assert count == 4
    assert cudnn.runs(segments, 3)[2] == 4  # more than fit are seen


def test_a_broken_promise_is_seen():
    one = packed([5], 8)[0]
    assert keeps_promise(one, 1) and keeps_promise(one, 2)
    assert not keeps_promise(np.roll(one, 2), 1)  # padding first: the document would see it
    two = packed([3, 4], 8)[0]
    assert not keeps_promise(two, 1) and keeps_promise(two, 2)


def test_a_kernel_that_is_wrong_or_fails_is_not_used():
    def like(**changes):
        passes = dict(forward=blockwise.forward, backward=blockwise.backward)
        return types.SimpleNamespace(__name__="ftjax.kernel", DEVICE="cpu", **(passes | changes))

    def failure(kernel, **facts):
        facts = Facts(0.3, own_row=True, **facts)
        return proof._failure(kernel, facts, (4, 2), (8, 8), jnp.dtype(jnp.bfloat16))

    assert failure(like(), windows=(None, 50)) is None
    plain = lambda facts, q, k, v, queries, *rest: blockwise.forward(  # noqa: E731
        facts, q, k, v, (jnp.ones_like(queries[0]), queries[1]), *rest
    )
    assert re.match(r"its out is \d\.\d+ of the norm away", failure(like(forward=plain)) or "")
    wrong = lambda *args: (x * 1.1 for x in blockwise.backward(*args))  # noqa: E731
    assert (failure(like(backward=wrong)) or "").startswith("its dq is 0.1")

    def broken(*args):
        raise RuntimeError("no such kernel\nfor this card")

    assert failure(like(forward=broken)) == "it fails: no such kernel"
