"""Several adapters of one base: combined into one, or stacked so that each row of a batch has its own."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.lora import Adapted, LoraConfig, Plan
from ftjax.lora import plain as _plain
from ftjax.lora_init import module_at
from ftjax.ops.linear import output_norm
from ftjax.weights import StackedLora, Table, flatten, is_leaf, module_of, unflatten

Method = Literal["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties"]


def combine(
    adapters: Sequence[tuple[Plan, dict]],
    weights: Sequence[float],
    method: Method,
    table: Table,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> tuple[Plan, dict, LoraConfig]:
    """One adapter, of scale 1, of several of one base, each times its weight; as PEFT's add_weighted_adapter
    computes it. Arrays are numpy's.

    "cat" puts the factors side by side and is exact, the ranks adding up. "svd" is the best approximation of
    that sum of rank `rank` (the largest of them unless given). "linear" adds the factors, each times the root
    of its weight and scale: what tasks share is kept, a product of sums being no sum of products. "ties"
    (Yadav et al. 2023, arXiv:2306.01708) keeps of each factor the `density` largest entries, and of each
    entry the tasks that agree with the `majority` in sign, and takes their mean; "ties_svd" does so with
    the products. "dare_linear" and "dare_ties" (Yu et al. 2023, arXiv:2311.03099) keep a random share
    `density` and divide by it instead. UserError where methods and adapters do not fit.
    """
    if method not in get_args(Method):
        raise UserError(f"method={method!r}: one of {', '.join(get_args(Method))}")
    if len(adapters) != len(weights) or not adapters:
        raise UserError(f"{len(adapters)} adapters and {len(weights)} weights: each adapter has one")
    thin = method not in ("linear", "cat", "svd")
    if thin and (density is None or not 0 < density <= 1):
        raise UserError(
            f"density={density}: {method} needs the share of entries to keep, above 0 and up to 1"
        )
    if not thin and density is not None:
        raise UserError(f"density={density} has no effect with {method}")
    if rank is not None and (rank < 1 or not method.endswith("svd")):
        raise UserError(f"rank={rank}: for svd and ties_svd, at least 1")
    plain = [_factors_only(plan, tree) for plan, tree in adapters]
    thinned = _thinning(method, density, seed)
    elect = majority if "ties" in method else None

    plan: Plan = {}
    flat: dict[str, np.ndarray] = {}
    for path in dict.fromkeys(path for p, _ in plain for path in p):
        ones = [
            (p[path], {k: t[f"{path}/{k}"] for k in "ab"}, w)
            for (p, t), w in zip(plain, weights, strict=True)
            if path in p
        ]
        lead, ins, outs = table.lead(path), table.ins(path), table.outs(path)
        pairs = []
        for i in range(math.prod(lead)):
            given = [_matrix(one, leaves, i, w) for one, leaves, w in ones if one.ranks[i]]
            pairs.append(
                _one(given, method, rank, thinned, elect, module_at(table, path, i)) if given else None
            )
        R = max(a.shape[1] for a, _ in filter(None, pairs))
        a = np.zeros((len(pairs), math.prod(ins), R), np.float32)
        b = np.zeros((len(pairs), R, math.prod(outs)), np.float32)
        for i, pair in enumerate(pairs):
            if pair is not None:
                a[i, :, : pair[0].shape[1]], b[i, : pair[1].shape[0]] = pair
        ranks = tuple(0 if pair is None else pair[0].shape[1] for pair in pairs)
        plan[path] = Adapted(ranks, tuple(float(r > 0) for r in ranks), lead)
        flat[path + "/a"] = a.reshape(*lead, *ins, R)
        flat[path + "/b"] = b.reshape(*lead, R, *outs)
    return plan, unflatten(flat), _config(plan, table)


def _factors_only(plan: Plan, tree) -> tuple[dict[str, Adapted], dict[str, np.ndarray]]:
    """The plan, and numpy factors by path, of an adapter that is nothing but LoRA."""
    _, plan, tree = _plain(LoraConfig(), plan, tree)
    out = {}
    for path, one in plan.items():
        if not isinstance(one, Adapted) or one.dora:
            what = "DoRA" if isinstance(one, Adapted) else "weights trained whole, or rows of tokens"
            raise UserError(f"adapters with {what} ({path}) cannot be combined: merge one, then add others")
        out[path] = one
    return out, {k: np.asarray(v, np.float32) for k, v in flatten(tree).items()}


def _matrix(one: Adapted, leaves, i: int, weight: float):
    """(a [I, r], b [r, O], weight, scale) of the i-th matrix."""
    n, r, lead = len(one.ranks), one.ranks[i], len(one.lead)
    a = leaves["a"].reshape(n, -1, one.rank)[i, :, :r]
    b = leaves["b"].reshape(n, one.rank, math.prod(leaves["b"].shape[lead + 1 :]))[i, :r]
    return a, b, weight, one.scales[i]


def _thinning(method: Method, density: float | None, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """What becomes of each tensor before they are joined."""
    if density is None:
        return lambda x: x
    if not method.startswith("dare"):
        return lambda x: trim(x, density)
    rng = np.random.default_rng(seed)
    return lambda x: random_drop(x, density, rng)


def _one(given, method: Method, rank: int | None, thinned: Callable, elect, module: str):
    ranks = [a.shape[1] for a, *_ in given]
    if method == "cat":
        a = np.concatenate([a * np.float32(w * scale) for a, _, w, scale in given], 1)
        return a, np.concatenate([b for _, b, *_ in given], 0)
    if method.endswith("svd"):
        deltas = [thinned((a @ b) * np.float32(scale)) for a, b, _, scale in given]
        u, s, vt = np.linalg.svd(_joined(deltas, elect, [w for *_, w, _ in given]), full_matrices=False)
        size = min(rank or max(ranks), len(s))
        root = np.sqrt(s[:size])
        return u[:, :size] * root, root[:, None] * vt[:size]
    if len(set(ranks)) > 1:
        raise UserError(
            f"{method}: the adapters of {module} have ranks {ranks} (one that began by PiSSA or OLoRA "
            "has twice its r); cat, svd and ties_svd take any"
        )
    # the root of the weight goes to each factor, its sign to a
    both = [w * scale for *_, w, scale in given]
    roots = [math.sqrt(abs(x)) for x in both]
    a = [thinned(a) for a, *_ in given]
    b = [thinned(b) for _, b, *_ in given]
    signed = [root if x >= 0 else -root for root, x in zip(roots, both, strict=True)]
    return _joined(a, elect, signed), _joined(b, elect, roots)


def trim(x: np.ndarray, density: float) -> np.ndarray:
    """x with all but its int(density · size) largest entries zero."""
    keep = int(density * x.size)
    out = np.zeros_like(x).reshape(-1)
    largest = np.argsort(-np.abs(x), axis=None, kind="stable")[:keep]
    out[largest] = x.reshape(-1)[largest]
    return out.reshape(x.shape)


def random_drop(x: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """x with a random share 1 - density of its entries zero, the rest divided by density."""
    return np.where(rng.random(x.shape) < density, x / np.float32(density), np.float32(0))


def _joined(tensors, elect: str | None, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum; with `elect`, at each entry over the tensors that have the majority's sign alone, and
    divided by how many have."""
    x = np.stack(tensors)
    weighted = x * np.array(weights, np.float32).reshape(-1, *(1,) * (x.ndim - 1))
    if elect is None:
        return weighted.sum(0)
    total = x.sum(0) if elect == "total" else np.sign(x).sum(0)
    agree = np.sign(x) == np.where(total >= 0, 1, -1)
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1).astype(np.float32)


def _config(plan: Plan, table: Table) -> LoraConfig:
    """What PEFT needs to be told of a plan of scale 1: every module by its path, ranks and alphas alike."""
    ranks = {}
    for path, one in plan.items():
        assert isinstance(one, Adapted)
        same = math.prod(table.together(path))
        for name, r in zip(table.names(path), one.ranks[::same], strict=True):
            if r:
                ranks[module_of(name)] = r
    top = max(ranks.values())
    other = {re.escape(module): r for module, r in ranks.items() if r != top}
    return LoraConfig(
        r=top,
        lora_alpha=top,
        target_modules=tuple(ranks),
        rank_pattern=other,
        alpha_pattern={module: float(r) for module, r in other.items()},
    )


# -- Another adapter for each row


def stack(base: dict, adapters: Sequence[tuple[Plan, dict]]) -> dict:
    """The base tree with all `adapters` in place at once (weights.StackedLora); `select` says which row of
    the batch has which. For generation: nothing of it is trained. UserError for what cannot differ between
    rows: weights trained whole, rows of tokens, experts."""
    flat = flatten(base)
    trees = [_stackable(plan, tree) for plan, tree in adapters]
    for path in dict.fromkeys(path for plan, _ in trees for path in plan):
        some = next(plan[path] for plan, _ in trees if path in plan)
        like = next(tree for plan, tree in trees if path in plan)
        R, lead = max(plan[path].rank for plan, _ in trees if path in plan), len(some.lead)
        a_s, b_s, gains = [], [], []
        for plan, tree in trees:
            if path not in plan:
                a, b = (jnp.zeros_like(like[f"{path}/{k}"]) for k in "ab")
                one = None
            else:
                one, a, b = plan[path], tree[path + "/a"], tree[path + "/b"]
            gain = jnp.ones(b.shape[:lead] + b.shape[lead + 1 :], jnp.float32)
            if one is not None:
                scale = jnp.array(one.scales, jnp.float32).reshape(one.lead)
                if one.dora:
                    live = np.array(one.ranks).reshape(*one.lead, *(1,) * (gain.ndim - lead)) > 0
                    norm = output_norm(flat[path], a, b, scale)
                    gain = jnp.where(live, tree[path + "/m"] / norm, gain)
                b = b * scale.reshape(*one.lead, *(1,) * (b.ndim - lead))
            a_s.append(_pad(a, -1, R))
            b_s.append(_pad(b, lead, R))
            gains.append(gain)
        dora = any(path in plan and plan[path].dora for plan, _ in trees)
        which = jnp.full((*some.lead, 1), -1, jnp.int32)
        flat[path] = StackedLora(
            flat[path],
            jnp.stack(a_s, lead),
            jnp.stack(b_s, lead),
            which,
            jnp.stack(gains, lead) if dora else None,
        )
    return unflatten(flat)


def _stackable(plan: Plan, tree) -> tuple[dict[str, Adapted], dict[str, jax.Array]]:
    _, plan, tree = _plain(LoraConfig(), plan, tree)
    out = {}
    for path, one in plan.items():
        if not isinstance(one, Adapted) or len(one.lead) > 1:
            what = "experts" if isinstance(one, Adapted) else "weights trained whole, or rows of tokens,"
            raise UserError(f"adapters with {what} ({path}) cannot differ from row to row: merge one instead")
        out[path] = one
    return out, {k: jnp.asarray(v) for k, v in flatten(tree).items()}


def _pad(x, axis: int, size: int):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad)


def select(params: dict, which) -> dict:
    """A stacked tree in which row i of the batch has adapter which[i], or none where that is -1."""
    which = jnp.asarray(which, jnp.int32)

    def one(w):
        if not isinstance(w, StackedLora):
            return w
        return w.replace(which=jnp.broadcast_to(which, w.which.shape[:-1] + which.shape))

    return jax.tree.map(one, params, is_leaf=is_leaf)


def count(params: dict) -> int:
    """How many adapters are stacked in a tree."""
    leaves = [w for w in jax.tree.leaves(params, is_leaf=is_leaf) if isinstance(w, StackedLora)]
    return leaves[0].a.shape[leaves[0].which.ndim - 1] if leaves else 0
