"""How LoRA's factors may begin: from the base's weights (PiSSA, OLoRA, LoftQ) or from the activations of some
data (EVA). Matrices are [I, O] here, inputs first, and factors a [I, R], b [R, O].

PiSSA and OLoRA begin at a part of the weight itself, which PEFT takes off the base. Here the base stays the
published one: the tree keeps the first factors as "a0" and "b0", and `lora.attach` computes with
base + scale (a b - a0 b0). `lora.plain` turns that into plain LoRA of twice the rank, exactly. LoRA's dropout
then falls on the difference, which is zero at the start, and not on a part of the weight."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.ops.dequant import dequantise
from ftjax.weights import ObservedWeight, QuantWeight, Table, flatten, module_of, path_key, unflatten


def _svd_factors(w_IO, rank: int, scale, iterations: int | None = None, key: Any = None):
    """Factors of scale · a b ≈ w, the singular values shared evenly; by a randomised range finder (Halko et
    al. 2011, arXiv:0909.4061) with `iterations` of the power method where given."""
    if iterations is None:
        u, s, vt = jnp.linalg.svd(w_IO, full_matrices=False)
    else:
        dot: Any = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
        probe = jax.random.normal(key, (w_IO.shape[1], min(rank + 10, *w_IO.shape)), jnp.float32)
        q = jnp.linalg.qr(dot(w_IO, probe))[0]
        for _ in range(iterations):
            q = jnp.linalg.qr(dot(w_IO, jnp.linalg.qr(dot(w_IO.T, q))[0]))[0]
        u, s, vt = jnp.linalg.svd(dot(q.T, w_IO), full_matrices=False)
        u = dot(q, u)
    root = jnp.sqrt(s[:rank] / scale)
    return _wide(u[:, :rank] * root, rank, 1), _wide(root[:, None] * vt[:rank], rank, 0)


def _wide(x, rank: int, axis: int):
    """With zeros up to `rank`, where the matrix has fewer dimensions than that."""
    pad = [(0, 0), (0, 0)]
    pad[axis] = (0, rank - x.shape[axis])
    return jnp.pad(x, pad)


def _qr_factors(w_IO, rank: int):
    q, r = jnp.linalg.qr(w_IO.T)
    return _wide(r[:rank].T, rank, 1), _wide(q[:, :rank].T, rank, 0)


def from_weight(how: str, w_N, ins: int, rank: int, scale_N, key):
    """(a [N, I, rank], b [N, rank, O]) of N weights [N, *in, *out] with `ins` input axes, which may be
    quantised, float32, in one of these ways.

    "pissa": the largest singular vectors, scale · a b being W's best approximation of that rank (Meng et al.
    2024, arXiv:2404.02948); "pissa_niter_N" finds them by N rounds of the power method. "olora": the first
    columns of Q and rows of R of Wᵀ = Q R (Büyükakyüz 2024, arXiv:2406.01775).
    """
    scale_N = jnp.where(scale_N > 0, scale_N, 1.0)  # of one without factors; what it gets is masked

    def one(args):
        w, scale, key = args
        w = dequantise(w, jnp.float32) if isinstance(w, QuantWeight) else w.astype(jnp.float32)
        w_IO = w.reshape(int(np.prod(w.shape[:ins])), -1)
        if how == "olora":
            return _qr_factors(w_IO, rank)
        rounds = how.removeprefix("pissa").removeprefix("_niter_")
        return _svd_factors(w_IO, rank, scale, int(rounds) if rounds else None, key)

    return jax.lax.map(one, (w_N, scale_N, jax.random.split(key, w_N.shape[0])))


def loftq(base: dict, adapters: dict, plan: Mapping, quantise: Callable, steps: int = 1):
    """(base, adapters) that begin near the unquantised weights: LoftQ, Li et al. 2023, arXiv:2310.08659.

    In turns, W_q = quantise(W - s a b) and a b = the best approximation of (W - W_q) / s. `quantise` takes
    and returns a float32 [I, O], rounded to what it can represent. The adapter fits the base returned here,
    which has W_q in place of W, and not the published one.
    """
    flat, out = flatten(base), dict(flatten(adapters))
    for path, one in plan.items():
        if not hasattr(one, "ranks"):
            continue
        w, a, b = flat[path], out[path + "/a"], out[path + "/b"]
        lead, R = len(one.lead), one.rank
        matrices = np.asarray(w, np.float32).reshape(len(one.ranks), -1, int(np.prod(b.shape[lead + 1 :])))
        new_w, new_a, new_b = [], [], []
        for w_IO, rank, scale in zip(matrices, one.ranks, one.scales, strict=True):
            a_IR, b_RO = jnp.zeros((w_IO.shape[0], R)), jnp.zeros((R, w_IO.shape[1]))
            w_q = quantise(jnp.asarray(w_IO))
            for step in range(steps if rank else 0):
                if step:
                    w_q = quantise(w_IO - scale * jnp.matmul(a_IR, b_RO, precision="highest"))
                a_IR, b_RO = _svd_factors(w_IO - w_q, rank, scale)
                a_IR, b_RO = _wide(a_IR, R, 1), _wide(b_RO, R, 0)
            new_w.append(w_q)
            new_a.append(a_IR)
            new_b.append(b_RO)
        flat[path] = jnp.stack(new_w).reshape(w.shape).astype(w.dtype)
        out[path + "/a"] = jnp.stack(new_a).reshape(a.shape)
        out[path + "/b"] = jnp.stack(new_b).reshape(b.shape)
    return unflatten(flat), unflatten(out)


def residual(base: dict, adapters: dict, plan: Mapping, originals: Callable, key) -> dict:
    """The tree whose factors begin at what quantising took off each weight, which is taken off again on the
    published base ("a0", "b0"): LoftQ of one step, arXiv:2310.08659.

    `originals(path)` yields the matrices [*in, *out] of a path in order, as they were. The approximation is
    found by eight rounds of the power method.
    """
    flat, out = flatten(base), dict(flatten(adapters))

    @functools.partial(jax.jit, static_argnums=3)
    def factors(w_q, w, args, rank):
        size = int(np.prod(w.shape[: w.ndim - w_q.outs]))
        off = w.astype(jnp.float32) - dequantise(w_q, jnp.float32)
        return _svd_factors(off.reshape(size, -1), rank, args[0], 8, args[1])

    for path, one in plan.items():
        leaf = flat[path]
        if not hasattr(one, "ranks") or not isinstance(leaf, QuantWeight):
            continue
        like = {end: out[f"{path}/{end}"] for end in "ab"}
        new = {
            end: np.zeros((len(one.ranks), *x.shape[len(one.lead) :]), np.float32) for end, x in like.items()
        }
        for i, (at, w) in enumerate(zip(np.ndindex(one.lead), originals(path), strict=True)):
            if rank := one.ranks[i]:
                w_q = jax.tree.map(lambda x, at=at: x[at], leaf)
                args = jnp.float32(one.scales[i]), jax.random.fold_in(path_key(key, path), i)
                a_IR, b_RO = factors(w_q, w, args, rank)
                new["a"][i, ..., :rank] = np.asarray(a_IR).reshape(*new["a"].shape[1:-1], rank)
                new["b"][i, :rank] = np.asarray(b_RO).reshape(rank, *new["b"].shape[2:])
        for end, x in new.items():
            x = x.reshape(like[end].shape)
            for name in (f"{path}/{end}", f"{path}/{end}0"):
                out[name] = jax.device_put(x, out[name].sharding)
    return unflatten(out)


def second_moments(model, base: dict, plan: Mapping, table: Table, batches: Iterable[Mapping]) -> dict:
    """{path: Σ x xᵀ, float32 [*lead, I, I]} of what goes into each weight that gets factors, over the live
    tokens (segment > 0) of `batches` with "tokens", "positions" and "segments" [B, T].

    Models know nothing of it: an ObservedWeight computes as its base, and its gradient is this sum, taken
    over the rows that a gradient reaches.
    """
    paths = [
        path for path, one in plan.items() if hasattr(one, "ranks") and table.rows[path].role != "lookup"
    ]
    flat = flatten(base)
    sizes = {path: int(np.prod(table.ins(path))) for path in paths}
    zeros = {path: jnp.zeros((*table.lead(path), n, n), jnp.float32) for path, n in sizes.items()}

    @jax.jit
    def of_batch(zeros, flat, tokens, positions, segments):
        def score(zeros):
            observed = {path: ObservedWeight(flat[path], z) for path, z in zeros.items()}
            params = unflatten(flat | observed)
            hidden, _, _ = model(params, tokens, positions, segments)
            logits = model.unembed(model.head(params), hidden)
            # any function of all live outputs does
            nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
            return jnp.sum(jnp.where(segments > 0, nll, 0.0))

        return jax.grad(score)(zeros)

    total = zeros
    for batch in batches:
        one = of_batch(zeros, flat, *(jnp.asarray(batch[k]) for k in ("tokens", "positions", "segments")))
        total = jax.tree.map(jnp.add, total, one)
    return total


def eva(
    model, base: dict, adapters: dict, plan: Mapping, table: Table, batches: Iterable[Mapping]
) -> tuple[dict, dict[str, np.ndarray]]:
    """(The tree with a's components the directions in which each layer's inputs vary most, b zero; {path: how
    many components of each adapted expert's matrix the data do not give}): EVA, Paischer et al. 2024,
    arXiv:2410.07170, without its redistribution of ranks.

    They are the eigenvectors of Σ x xᵀ, which are the right singular vectors of the stacked inputs: exact, in
    memory of I² a matrix. An expert that few tokens reach gets the rest from the random a of `adapters`, made
    orthogonal to them and each other. UserError where the inputs of another module span less than its rank.
    """
    moments = second_moments(model, base, plan, table, batches)
    out, missing = dict(flatten(adapters)), {}
    for path, moment in moments.items():
        one, a = plan[path], out[path + "/a"]
        I, R = moment.shape[-1], one.rank  # noqa: E741

        def top(args, R=R):
            moment_II, random_IR = args
            values, vectors = jnp.linalg.eigh(moment_II)
            values, vectors = values[::-1][:R], vectors[:, ::-1][:, :R]
            seen = values > 1e-6 * values[0]
            # those found come first, so that QR leaves them as they are, but for their sign
            q = jnp.linalg.qr(jnp.where(seen, vectors, random_IR[:, : len(seen)]))[0]
            return jnp.pad(seen, (0, R - len(seen))), _wide(jnp.where(seen, vectors, q), R, 1)

        seen, vectors = jax.lax.map(top, (moment.reshape(-1, I, I), a.reshape(-1, I, R)))
        live = np.arange(R) < np.array(one.ranks)[:, None]
        short = np.sum(live & ~np.asarray(seen), axis=1)
        experts = bool(table.rows[path].many)
        for i in np.flatnonzero(short):
            if not experts or one.ranks[i] > I:
                name = module_at(table, path, int(i))
                raise UserError(
                    f"lora.init_lora_weights=eva: the inputs of {name} in the data span fewer than "
                    f"{one.ranks[i]} dimensions: give more data, or a lower rank"
                )
        if experts:
            missing[path] = short[np.array(one.ranks) > 0]
        out[path + "/a"] = (vectors * live[:, None, :].astype(np.float32)).reshape(a.shape)
    return unflatten(out), missing


def module_at(table: Table, path: str, i: int) -> str:
    """The module in the checkpoint whose weight is the i-th matrix at `path`; where it holds several experts,
    which of them."""
    names, together = table.names(path), int(np.prod(table.together(path)))
    module = module_of(names[i // together])
    return f"{module} (expert {i % together})" if together > 1 else module
