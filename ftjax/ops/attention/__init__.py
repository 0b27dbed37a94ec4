"""Attention over packed rows: one function, an implementation for each kind of device.

dense        plain jax, all logits of a block of queries at once: any facts, anywhere; for short rows
blockwise    plain jax, memory linear in the row, skips what nothing sees: any facts, anywhere
splash       jax's kernel for TPUs: a row that attends to itself, windows of values that are known
cudnn        cuDNN's: a row that attends to itself, in half precision, without soft-cap and sinks
pallas       a kernel of our own for GPUs: any facts
decode       plain jax, one new token a row over a cache in its own layout: a function beside this one

A kernel is a module with `forward`, `backward` and `refuses`; what they share (sinks, what is kept for the
backward pass, the mesh, chunks) is here, and `choose` is where one is chosen.
"""

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from ftjax.errors import UserError
from ftjax.ops import target
from ftjax.ops.attention import dense, proof
from ftjax.ops.attention.facts import Context, Facts, reorder
from ftjax.ops.attention.facts import zigzag as order_of
from ftjax.ops.layers import places, shards

KERNELS = {"blockwise": "blockwise", "splash": "splash", "cudnn": "cudnn", "pallas": "pallas_gpu"}
IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn", "pallas")  # what a run may say
# What `auto` tries on each kind of device, in this order, before XLA's.
PREFERRED: dict[str, tuple[str, ...]] = {"cpu": (), "gpu": ("cudnn", "pallas"), "tpu": ("splash",)}
# Rows of up to so many logits are dense: benchmarks/results/attention.md has the measurement on a CPU.
DENSE = 2**15


def kernel(name: str) -> ModuleType:
    """The module of one of KERNELS, imported when it is asked for: Pallas takes a quarter of a second."""
    return importlib.import_module(f"{__name__}.{KERNELS[name]}")


def attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    queries,
    keys=None,
    *,
    scale: float,
    window=None,
    windows: tuple[int | None, ...] = (),
    softcap: float | None = None,
    sinks=None,
    chunk=None,
    documents: int | None = None,
    zigzag: int = 1,
    implementation: str = "auto",
) -> Any:
    """Grouped-query causal attention within segments, softmax in float32. Ainslie et al., arXiv:2305.13245.

    `queries` and `keys` are (segments, positions), int32 [B, T] and [B, S]. Query t sees key s where both are
    in the same segment, s is not later, and, given `window`, less than `window` positions before; given
    `chunk`, where both positions lie in the same run of `chunk` positions (Llama 4). Both may be traced int32
    scalars; `windows` are then all values that the window may have (None: of all the past), without which
    kernels that must know it are left out. `sinks` [N] adds one logit a head to the softmax that carries no
    value (gpt-oss; arXiv:2309.17453); neither `scale` nor `softcap` applies to it. A query that sees no key
    (padding) returns a finite value that means nothing. v's head size may differ from q's and k's (MLA).

    Without `keys` the row attends to itself, as in training: each segment is a run of neighbours whose
    positions rise by one, which kernels that go by a token's place in the row rely on; `documents` promises
    that a row has no more than so many of them, padding aside.

    Where the mesh splits T, each device attends from its own part of the row to the whole of it, whose keys
    and values it gathers. `zigzag` > 1 says that the row's tokens come in that order over so many devices
    (`facts.zigzag`), which makes causal attention as much work on each.

    `implementation`, one of IMPLEMENTATIONS, forces one for rows that attend to themselves; UserError where
    it cannot take these facts. Result [B, T, N, H], H that of v.
    """
    own_row = keys is None
    keys = queries if keys is None else keys
    context = None
    if own_row and (axes := places("BTNH")["T"]) and q_BTNH.shape[1] % (parts := shards("T", "BTNH")) == 0:
        own_row, context = False, Context(axes, parts, zigzag > 1)
    if chunk is not None:  # attention within chunks is attention within segments that end with each chunk
        queries, keys, documents = _cut(queries, chunk), _cut(keys, chunk), None
    if window is None or isinstance(window, int):
        windows = (window,)
    elif len(windows) == 1:
        window = windows[0]
    if zigzag > 1:
        assert context is None or zigzag == context.parts, (zigzag, context)
        own_row, documents = False, None
        if context:
            keys = jax.tree.map(lambda x: reorder(x, np.argsort(order_of(zigzag))), keys)
    facts = Facts(scale, softcap, windows, own_row, documents, sinks is not None, context)
    name = choose(implementation, facts, q_BTNH, k_BSKH, v_BSKH)
    if name == "dense":
        out = dense.attention(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts)
        return checkpoint_name(out, "attention")
    return _attend(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts, name)


def _cut(where, chunk):
    segments, positions = where
    return segments * 65536 + positions // chunk, positions


def choose(implementation: str, facts: Facts, q_BTNH, k_BSKH, v_BSKH) -> str:
    """The name of what computes an attention with these facts; UserError where the one that is forced can
    not."""
    kind = target.kind()
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    xla = "dense" if T == 1 or T * S <= DENSE and not facts.context else "blockwise"
    if implementation in ("dense", "blockwise"):
        return implementation
    if implementation == "auto" or not (facts.own_row or facts.context):
        if xla == "dense":
            return xla
        able = (name for name in PREFERRED[kind] if not refusal(name, facts, q_BTNH, k_BSKH, v_BSKH))
        return next(able, xla)
    if implementation == "xla":
        return xla
    why = refusal(implementation, facts, q_BTNH, k_BSKH, v_BSKH)
    if why:
        able = [name for name in KERNELS if not refusal(name, facts, q_BTNH, k_BSKH, v_BSKH)]
        could = ["xla" if name == "blockwise" else name for name in able]
        raise UserError(f"train.attention={implementation}: {why}; {' and '.join(could)} could take it")
    return implementation


def refusal(name: str, facts: Facts, q_BTNH, k_BSKH, v_BSKH) -> str | None:
    """Why this kernel cannot take such an attention on the kind of device that is traced for."""
    module = kernel(name)
    if module.DEVICE not in (None, target.kind()) and not module.INTERPRET:
        return f"that is a kernel for {module.DEVICE.upper()}s, and this runs on a {target.kind().upper()}"
    why = module.refuses(facts, q_BTNH, k_BSKH, v_BSKH)
    if why or module.DEVICE != "gpu" or target.kind_of(jax.default_backend()) != "gpu":
        return why
    heads, dims = (q_BTNH.shape[2], k_BSKH.shape[2]), (q_BTNH.shape[3], v_BSKH.shape[3])
    return proof.failure(module, facts, heads, dims, q_BTNH.dtype)


# -- One rule of differentiation for all kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attend(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts: Facts, name: str):
    return _attend_fwd(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts, name)[0]


def _attend_fwd(q_BTNH, k_BSKH, v_BSKH, sinks, queries, keys, window, facts: Facts, name: str):
    # jitted, for jax drops a call whose results nobody reads, but never a bare Pallas kernel
    forward = jax.jit(functools.partial(kernel(name).forward, facts))
    args = q_BTNH, k_BSKH, v_BSKH, queries, keys, window
    axes = ("BTNH", "BNT", *_rest(name, facts))
    out, lse_BNT, *rest = _per_device(forward, facts, args, INPUTS, axes)
    if sinks is not None:
        # one more term in the softmax's sum, whose value is zero
        sinks_N1 = sinks.astype(jnp.float32)[:, None]
        share_BNT = jax.nn.sigmoid(lse_BNT - sinks_N1)
        out = (out.astype(jnp.float32) * share_BNT.transpose(0, 2, 1)[..., None]).astype(out.dtype)
        lse_BNT = jnp.logaddexp(lse_BNT, sinks_N1)
    # what the backward pass needs beside its inputs: kept together, or the forward pass is run again
    out, lse_BNT, *rest = (checkpoint_name(x, "attention") for x in (out, lse_BNT, *rest))
    return out, (args, sinks, out, lse_BNT, rest)


def _attend_bwd(facts: Facts, name: str, residuals, g_BTNH):
    args, sinks, out_BTNH, lse_BNT, rest = residuals
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * g_BTNH.astype(jnp.float32), axis=-1)
    delta_BNT = delta_BTN.transpose(0, 2, 1)
    backward = functools.partial(kernel(name).backward, facts)
    more = out_BTNH, lse_BNT, delta_BNT, g_BTNH, *rest
    axes = (*INPUTS, "BTNH", "BNT", "BNT", "BTNH", *_rest(name, facts))
    dq, dk, dv = _per_device(backward, facts, (*args, *more), axes, ("BTNH", "BSKH", "BSKH"))
    d_sinks = None
    if sinks is not None:
        # a sink is a key whose value is zero, so of its logit's gradient only -delta is left
        p_BNT = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse_BNT)
        d_sinks = -jnp.sum(p_BNT * delta_BNT, axis=(0, 2)).astype(sinks.dtype)
    none = jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), args[3:])
    return dq, dk, dv, d_sinks, *none


_attend.defvjp(_attend_fwd, _attend_bwd)


def _rest(name: str, facts: Facts) -> tuple[str, ...]:
    """The axes of what a kernel keeps for its backward pass beyond out and log-sum-exp."""
    return kernel(name).rest(facts) if name == "cudnn" else ()


# -- A kernel on a mesh

INPUTS = ("BTNH", "BSKH", "BSKH", "BT", "B_", "")  # q, k, v, queries, keys, window


def _per_device(run, facts: Facts, args, axes, out_axes):
    """`run(*args)`, each device of the mesh on its own rows, heads and queries: the compiler cannot split
    a kernel itself, nor a loop over rows. An axis that does not divide is worked on whole, by every
    device."""
    mesh, on = jax.sharding.get_abstract_mesh(), places("BTNH")
    on |= {"K": on["N"], "T": facts.context.axes if facts.context else ()}
    on["S"] = on["T"]  # k and v come, and their gradients go, split as the queries are
    sizes = {"B": args[0].shape[0], "N": args[0].shape[2], "K": args[1].shape[2]}
    for letters in ("B", "NK"):
        if any(sizes[x] % math.prod(mesh.shape[name] for name in on[x]) for x in letters):
            on |= dict.fromkeys(letters, ())
    if not any(on.values()):
        return run(*args)

    def spec(letters):
        return PartitionSpec(*(on.get(x) or None for x in letters))

    in_specs = jax.tree.map(lambda letters, x: jax.tree.map(lambda _: spec(letters), x), tuple(axes), args)
    out_specs = tuple(map(spec, out_axes))
    if facts.context:
        run = functools.partial(_on_whole_rows, run, facts.context, axes, out_axes)
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def _on_whole_rows(run, context: Context, axes, out_axes, *args):
    """A kernel on this device's queries and the keys and values of the whole row, in their order; gradients
    of those are summed over the devices."""
    there = order_of(context.parts)
    back = np.argsort(there)

    def gather(letters, x):
        if "S" not in letters:
            return x
        x = jax.lax.all_gather(x, context.axes, axis=1, tiled=True)
        return reorder(x, back) if context.zigzag else x

    def scatter(letters, x):
        if "S" not in letters:
            return x
        x = reorder(x, there) if context.zigzag else x
        return jax.lax.psum_scatter(x, context.axes, scatter_dimension=1, tiled=True)

    out = run(*map(gather, axes, args))
    return tuple(map(scatter, out_axes, out))
