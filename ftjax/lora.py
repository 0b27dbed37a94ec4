"""LoRA and its kin as functions on a parameter tree. Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024,
arXiv:2402.09353; field names and meanings are PEFT's.

`plan` reads the config against a weight table, `init` makes the small trainable tree, `attach` puts it beside
the frozen one for a forward pass, `merge` folds it in for export. Models do not know of LoRA: ops.einsum and
ops.lookup do.

The trainable tree is {path of a row: leaves}: "a" and "b", an adapted weight's factors, with "m" (DoRA's
magnitudes) and "a0", "b0" (factors that are taken off, see lora_init); "full", a weight that is trained
whole; "rows", the trained rows of a look-up table or head. All are float32.

Where embedding and head are tied they are one weight, and whatever is trained of it acts in both places, as
PEFT has it with ensure_weight_tying."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import lora_init
from ftjax.errors import UserError
from ftjax.ops.dequant import dequantise
from ftjax.ops.linear import output_norm
from ftjax.weights import (
    LoraWeight,
    QuantWeight,
    RowsWeight,
    Table,
    flatten,
    is_leaf,
    module_of,
    path_key,
    unflatten,
)

INITS = ("gaussian", "pissa", "pissa_niter_N", "olora", "orthogonal", "eva", "loftq")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get low-rank factors, and of what rank; what is trained beside them."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    r: int = 16
    """Rank of the factors."""
    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: float = 0.0
    """Share of the low-rank branch's inputs zeroed in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """"all-linear" (every linear layer but the head), a list of module names ("q_proj", "embed_tokens",
    "lm_head"), or a regex that must match a whole module path ("model.layers.0.self_attn.q_proj")."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Module names, or a regex on whole module paths, that get no factors whatever target_modules says."""
    use_rslora: bool = False
    """Scale by 1/sqrt(r): Kalajdzievski 2023, arXiv:2312.03732."""
    use_dora: bool = False
    """Train the norm of each output of a weight apart from its direction (DoRA): better at low ranks, slower
    steps."""
    init_lora_weights: bool | str = True
    """How the factors begin: true (a random, b zero), "gaussian", "orthogonal", from the weights themselves
    ("pissa", "pissa_niter_16" which is faster, "olora") or from the data ("eva"); false: both random, for
    tests."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Regex on the end of a module path -> its rank instead of r."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Regex on the end of a module path -> its alpha instead of lora_alpha."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Layers that get factors; all where not given."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained whole and saved with the adapter: every module whose path ends so ("lm_head",
    "embed_tokens", "norm")."""
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    """Tokens whose rows of the embedding are trained, for new ones; or by module: {embed_tokens: [...]}."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained: none, all, or those of modules that have factors."""
    ensure_weight_tying: bool = True
    """Tied embedding and head stay tied, whichever of them is trained. False is an error where they would
    part."""

    def __post_init__(self):
        ranks = {"r": self.r} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if rank < 1:
                raise UserError(f"lora.{name}={rank}: a rank is at least 1 (`lora: null` tunes every weight)")
            if self.init_lora_weights == "orthogonal" and rank % 2:
                raise UserError(f"lora.{name}={rank}: orthogonal factors need an even rank")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora.lora_dropout={self.lora_dropout}: a share in [0, 1)")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                _compiled(pattern, f"lora.{name}")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                _compiled(getattr(self, name), f"lora.{name}")
        how = self.init_lora_weights
        known = isinstance(how, bool) or how in INITS or re.fullmatch(r"pissa_niter_\d+", how)
        if not known or how == "pissa_niter_N":
            raise UserError(f"lora.init_lora_weights={how!r}: one of true, false, {', '.join(INITS)}")

    @property
    def takes_off(self) -> bool:
        """Whether the factors begin at something that has to be taken off the published base again. LoftQ's
        stand in a run for what quantising took off, and so are not taken off there: `trained`."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(
            ("pissa", "olora", "loftq")
        )


def _compiled(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(f"{where}={pattern!r} is not a regular expression: {e}") from None


@dataclasses.dataclass(frozen=True)
class Adapted:
    """One adapted weight: rank and scale of each of its matrices (`lead` is their arrangement: layers,
    experts); one of rank 0 is left alone. Factors are stored at the largest rank, the rest zero. With `dora`
    the tree holds "m" too, with `origin` the factors "a0" and "b0" whose product is taken off."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    lead: tuple[int, ...]
    dora: bool = False
    origin: bool = False

    @property
    def rank(self) -> int:
        return max(self.ranks)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A weight trained whole; where `live` is given, of its matrices (arranged as `lead`) those where it is
    true."""

    live: tuple[bool, ...] = ()
    lead: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rows:
    """A look-up table (`axis` 0) or head (1) of which the rows of these tokens are trained, in this
    order."""

    indices: tuple[int, ...]
    axis: int = 0


Plan = dict[str, Adapted | Whole | Rows]  # path -> how it is trained


def plan(config: LoraConfig, table: Table, trainable: Sequence[str] = ()) -> Plan:
    """Match the config against the weights of `table`; `trainable` are regexes as of `plan_whole`, of weights
    trained whole beside the factors. UserError where something matches nothing, or a weight is to be trained
    in two ways."""
    chosen: Plan = dict(_plan_factors(config, table))
    adapted = {
        name
        for path, one in chosen.items()
        if isinstance(one, Adapted)
        for name, rank in zip(table.names(path), _apart(table, path, one.ranks), strict=True)
        if rank
    }
    whole = _plan_saved(config, table)
    for path, live in _plan_bias(config, table, adapted).items():
        whole[path] = _either(whole.get(path), live)
    for path, live in _matching(trainable, table, "train.trainable").items():
        whole[path] = _either(whole.get(path), live)
    for path, live in whole.items():
        if any(live):
            _add(chosen, path, _whole(table, path, live), table)
    for path, indices in _plan_rows(config, table).items():
        _add(chosen, path, Rows(indices, 0 if table.rows[path].role == "lookup" else 1), table)
    if not chosen:
        raise UserError("lora.target_modules is empty, and nothing else is trained")
    if not config.ensure_weight_tying and tied(table):
        both = [path for path, one in chosen.items() if table.rows[path].role == "lookup"]
        if both and not isinstance(chosen[both[0]], Rows):
            raise UserError(
                "lora.ensure_weight_tying=false: this model's embedding and head are one weight, and what is "
                "trained of it acts in both"
            )
    return chosen


def plan_run(
    config: LoraConfig | None, table: Table, trainable: Sequence[str] = (), freeze: Sequence[str] = ()
) -> Plan | None:
    """What a run trains, by its settings lora, train.trainable and train.freeze; None for every weight."""
    if config is not None:
        return plan(config, table, trainable)
    return plan_whole(table, trainable, freeze) if trainable or freeze else None


def plan_whole(table: Table, trainable: Sequence[str] = (), freeze: Sequence[str] = ()) -> Plan:
    """Full tuning of a part: the weights whose path in the checkpoint, less ".weight", has a match of one of
    the regexes `trainable` (all where none is given) and of none of `freeze`. UserError where a regex matches
    nothing, or nothing is left."""
    chosen = _matching(trainable or ("",), table, "train.trainable")
    for path, off in _matching(freeze, table, "train.freeze").items():
        if path in chosen:
            chosen[path] = [x and not y for x, y in zip(chosen[path], off, strict=True)]
    chosen = {path: _whole(table, path, live) for path, live in chosen.items() if any(live)}
    if not chosen:
        raise UserError(f"train.freeze={list(freeze)} leaves no weight to train")
    return dict(chosen)


def tied(table: Table) -> bool:
    """Whether the embedding is the head, too."""
    return all(row.role != "head" for row in table.rows.values())


def _modules(table: Table, path: str) -> list[str]:
    return [module_of(name) for name in table.names(path)]


def _apart(table: Table, path: str, values: tuple) -> tuple:
    """One for each tensor of the checkpoint, of values for each matrix."""
    return values[:: math.prod(table.together(path))] if values else values


def _whole(table: Table, path: str, live: Sequence[bool]) -> Whole:
    same = math.prod(table.together(path))
    if all(live):
        return Whole()
    return Whole(tuple(bool(x) for x in live for _ in range(same)), table.lead(path))


def _either(a: Sequence[bool] | None, b: Sequence[bool]) -> list[bool]:
    return list(b) if a is None else [x or y for x, y in zip(a, b, strict=True)]


def _add(chosen: Plan, path: str, one: Whole | Rows, table: Table) -> None:
    if path in chosen:
        what = {Adapted: "have factors", Whole: "be trained whole", Rows: "have rows trained"}
        raise UserError(
            f"lora: {table.rows[path].module} cannot both {what[type(chosen[path])]} and {what[type(one)]}"
            + ("" if table.layers(path) is None else ", in whichever layers")
        )
    chosen[path] = one


def _matching(patterns: Sequence[str], table: Table, where: str) -> dict[str, list[bool]]:
    """{path: whether each of its checkpoint tensors' path, less ".weight", has a match of some pattern}."""
    found: dict[str, list[bool]] = {}
    for pattern in patterns:
        regex = _compiled(pattern, where)
        hits = {path: [bool(regex.search(m)) for m in _modules(table, path)] for path in table.rows}
        hits = {path: live for path, live in hits.items() if any(live)}
        if not hits:
            few = [module_of(table.names(path)[0]) for path in list(table.rows)[:4]]
            raise UserError(f"{where}: {pattern!r} matches no weight; paths are like {', '.join(few)}")
        for path, live in hits.items():
            found[path] = _either(found.get(path), live)
    return found


def _plan_factors(config: LoraConfig, table: Table) -> dict[str, Adapted]:
    matrices = {path: row for path, row in table.rows.items() if row.ins}
    linear = {path: row for path, row in matrices.items() if row.role != "lookup"}
    layers = config.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else layers
    used_targets: set[str] = set()
    used_patterns: set[str] = set()
    saved = _plan_saved(config, table)
    chosen = {}
    for path in matrices:
        stack, names = table.layers(path), table.names(path)
        each = len(names) // len(stack or (0,))  # tensors a layer
        ranks, scales = [], []
        for index, name in enumerate(names):
            module = module_of(name)
            hit = matches(config.target_modules, module, matrices[path].role)
            if hit is None and tied(table) and matrices[path].role == "lookup":
                hit = matches(config.target_modules, "lm_head", "lookup")
            if _excluded(config, module) or (path in saved and saved[path][index]):
                used_targets |= {hit} if hit is not None else set()
                hit = None
            if hit is None or (layers is not None and (stack is None or stack[index // each] not in layers)):
                ranks.append(0)
                scales.append(0.0)
                continue
            used_targets.add(hit)
            rank_key, r = _pattern(config.rank_pattern, module, config.r)
            alpha_key, alpha = _pattern(config.alpha_pattern, module, config.lora_alpha)
            used_patterns |= {rank_key, alpha_key}
            ranks.append(r)
            scales.append(alpha / math.sqrt(r) if config.use_rslora else alpha / r)
        if any(ranks):
            same = math.prod(table.together(path))  # matrices in one tensor
            ranks, scales = (tuple(x for x in y for _ in range(same)) for y in (ranks, scales))
            # a look-up's factors begin at zero anyway
            origin = config.takes_off and matrices[path].role != "lookup"
            chosen[path] = Adapted(ranks, scales, table.lead(path), config.use_dora, origin)
    modules = sorted({row.module.rpartition(".")[2] for row in linear.values()})
    if layers is not None and any(i not in range(table.sizes["L"]) for i in layers):
        raise UserError(f"lora.layers_to_transform={layers}: the model's layers are 0…{table.sizes['L'] - 1}")
    if not chosen and config.target_modules != ():
        whole = next(iter(linear.values())).module.format(layer=0, expert=0)
        raise UserError(
            f"lora.target_modules={config.target_modules!r} matches no linear layer; the model's are "
            f"{', '.join(modules)} (full paths like {whole})"
        )
    if not isinstance(config.target_modules, str):
        for target in config.target_modules:
            if target not in used_targets:
                raise UserError(
                    f"lora.target_modules: {target!r} matches no linear layer; the model's are "
                    f"{', '.join(modules)}"
                )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if pattern not in used_patterns:
                raise UserError(f"lora.{field}: {pattern!r} matches no adapted module")
    return chosen


def matches(targets, module: str, role: str) -> str | None:
    """The target that `module` matches, by PEFT's rules (check_target_module_exists)."""
    if targets == "all-linear":
        return targets if role == "linear" else None
    if isinstance(targets, str):
        return targets if re.fullmatch(targets, module) else None
    return next((t for t in targets if module == t or module.endswith("." + t)), None)


def _excluded(config: LoraConfig, module: str) -> bool:
    return bool(config.exclude_modules) and matches(config.exclude_modules, module, "") is not None


def _pattern(patterns: Mapping, module: str, default):
    """(pattern, value) of the first regex that matches the end of `module`, by PEFT's rule
    (get_pattern_key)."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return key, value
    return "", default


def _plan_saved(config: LoraConfig, table: Table) -> dict[str, list[bool]]:
    """What modules_to_save chooses, by PEFT's rule: any module around the weight whose path ends so."""
    found: dict[str, list[bool]] = {}
    for target in config.modules_to_save or ():
        hits = {
            path: [_around(name, target, tied(table) and row.role == "lookup") for name in table.names(path)]
            for path, row in table.rows.items()
        }
        hits = {path: live for path, live in hits.items() if any(live)}
        if not hits:
            raise UserError(f"lora.modules_to_save: {target!r} matches no module of this model")
        for path, live in hits.items():
            found[path] = _either(found.get(path), live)
    return found


def _around(name: str, target: str, is_head: bool) -> bool:
    parts = name.split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(path.endswith(target) for path in paths) or (is_head and "lm_head".endswith(target))


def _plan_bias(config: LoraConfig, table: Table, adapted: set[str]) -> dict[str, list[bool]]:
    if config.bias == "none":
        return {}
    owners = {module_of(name) for name in adapted}

    def chosen(name: str) -> bool:
        if not name.endswith(".bias"):  # as PEFT: no parameter that is only called so (gate_up_proj_bias)
            return False
        return config.bias == "all" or name.removesuffix(".bias") in owners

    found = {path: [chosen(name) for name in table.names(path)] for path in table.rows}
    return {path: live for path, live in found.items() if any(live)}


def _plan_rows(config: LoraConfig, table: Table) -> dict[str, tuple[int, ...]]:
    given = config.trainable_token_indices
    if not given:
        return {}
    tables = {
        path: row
        for path, row in table.rows.items()
        if (row.role == "lookup" and row.ins + row.outs == "VD") or row.role == "head"
    }
    first = next(path for path, row in tables.items() if row.role == "lookup")
    if not isinstance(given, Mapping):
        given = {tables[first].module: given}
    found: dict[str, tuple[int, ...]] = {}
    for target, indices in given.items():
        path = next((p for p, row in tables.items() if matches((target,), row.module, "") is not None), None)
        if path is None and tied(table) and target == "lm_head":
            path = first
        if path is None:
            names = ", ".join(row.module for row in tables.values())
            raise UserError(f"lora.trainable_token_indices: {target!r} matches none of {names}")
        size = table.sizes["V"]
        indices = tuple(dict.fromkeys(int(i) for i in indices))
        wrong = [i for i in indices if not 0 <= i < size]
        if wrong or not indices:
            raise UserError(
                f"lora.trainable_token_indices: {wrong or 'no token'} for {target!r}; the vocabulary is 0…"
                f"{size - 1}"
            )
        if found.get(path, indices) != indices:
            raise UserError("lora.trainable_token_indices: tied embedding and head have the same tokens")
        found[path] = indices
    return found


# -- The trainable tree


def live(adapted: Adapted) -> np.ndarray:
    """[*lead, R]: 1 where a rank component is used, 0 where it pads."""
    live = np.arange(adapted.rank) < np.array(adapted.ranks)[:, None]
    return live.astype(np.float32).reshape(*adapted.lead, adapted.rank)


def _live_a(adapted: Adapted, ins: int) -> np.ndarray:
    return (x := live(adapted)).reshape(*adapted.lead, *(1,) * ins, x.shape[-1])


def _live_b(adapted: Adapted, outs: int) -> np.ndarray:
    return (x := live(adapted)).reshape(*x.shape, *(1,) * outs)


def _live_m(adapted: Adapted, outs: int) -> np.ndarray:
    return (np.array(adapted.ranks) > 0).astype(np.float32).reshape(*adapted.lead, *(1,) * outs)


def _scale(adapted: Adapted) -> jax.Array:
    return jnp.array(adapted.scales, jnp.float32).reshape(adapted.lead)


def init(key: jax.Array, plan: Plan, table: Table, base: dict | None = None, how: bool | str = True) -> dict:
    """The trainable tree, float32, so that training starts at the base. `how` is init_lora_weights.

    By default a is uniform in ±1/sqrt(fan_in) and b zero, of a look-up table a zero and b N(0, 1), both as
    PEFT draws them. DoRA's m is the norm of the base's outputs; whole weights and rows are the base's. Where
    `base` is not given, what begins as something of it is zeros: a tree to restore a checkpoint into. What
    begins as a decomposition of the base or with the data is made in lora_init from this tree.
    """
    weights_of = flatten(base) if base is not None else {}
    flat = {}
    for path, one in plan.items():
        lead, ins, outs = table.lead(path), table.ins(path), table.outs(path)
        if isinstance(one, Whole):
            w = weights_of.get(path)
            flat[path + "/full"] = (
                jnp.zeros(table.shape(path), jnp.float32) if w is None else jnp.array(w, jnp.float32)
            )
            continue
        if isinstance(one, Rows):
            w = weights_of.get(path)
            rows = jnp.zeros((len(one.indices), table.sizes["D"]), jnp.float32)
            flat[path + "/rows"] = rows if w is None else _take_rows(w, one)
            continue
        a_shape, b_shape = (*lead, *ins, one.rank), (*lead, one.rank, *outs)
        a, b = _draw(path_key(key, path), how, one, table.rows[path].role, a_shape, b_shape)
        w = weights_of.get(path)
        if one.origin and w is not None and how != "loftq":
            n, count = len(one.ranks), len(lead)
            w_N = jax.tree.map(lambda x, count=count, n=n: x.reshape(n, *x.shape[count:]), w)
            scales = jnp.array(one.scales, jnp.float32)
            a, b = lora_init.from_weight(str(how), w_N, len(ins), one.rank, scales, path_key(key, path))
        a = a.reshape(a_shape) * _live_a(one, len(ins))
        b = b.reshape(b_shape) * _live_b(one, len(outs))
        flat[path + "/a"], flat[path + "/b"] = a, b
        if one.origin:
            flat[path + "/a0"], flat[path + "/b0"] = jnp.array(a), jnp.array(b)
        if one.dora:
            m = jnp.zeros((*lead, *outs), jnp.float32)
            if w is not None:  # where a product is taken off, the two begin equal
                m = output_norm(w, a, b * 0 if one.origin else b, _scale(one)) * _live_m(one, len(outs))
            flat[path + "/m"] = m
    return unflatten(flat)


def _draw(key, how, adapted: Adapted, role: str, a_shape, b_shape):
    lead, R = len(adapted.lead), adapted.rank
    fan_in = math.prod(a_shape[lead:-1])
    bound = fan_in**-0.5
    key_b = jax.random.fold_in(key, 1)
    if how is False:
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
        return a, jax.random.uniform(key_b, b_shape, jnp.float32, -(R**-0.5), R**-0.5)
    if role == "lookup":
        return jnp.zeros(a_shape, jnp.float32), jax.random.normal(key, b_shape, jnp.float32)
    if how == "orthogonal":
        return _orthogonal(key, adapted, a_shape, b_shape)
    if how == "gaussian":
        rank = np.maximum(np.array(adapted.ranks, np.float32), 1).reshape(
            *adapted.lead, *(1,) * (len(a_shape) - lead)
        )
        a = jax.random.normal(key, a_shape, jnp.float32) / rank
    else:
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
    return a, jnp.zeros(b_shape, jnp.float32)


def _orthogonal(key, adapted: Adapted, a_shape, b_shape):
    """Both factors random, their product zero: a's components lie in half of a random basis of the R
    dimensions, b's in the other half. Of the size that PEFT draws (N(0, 1) / 10)."""
    keys = jax.random.split(key, 3)
    n, lead, R = math.prod(adapted.lead), len(adapted.lead), adapted.rank
    random = jax.random.normal(keys[0], (n, R, R), jnp.float32)
    # a matrix of lower rank has a basis of its own dimensions only
    bases = [
        jnp.linalg.qr(random[i, :r, :r])[0] if r else jnp.zeros((0, 0)) for i, r in enumerate(adapted.ranks)
    ]
    q = jnp.stack([jnp.pad(x, [(0, R - x.shape[0])] * 2) for x in bases])
    q = q.reshape(*adapted.lead, R, R)
    odd, even = q[..., 0::2, :], q[..., 1::2, :]
    ins, outs = math.prod(a_shape[lead:-1]), math.prod(b_shape[lead + 1 :])
    left = jax.random.normal(keys[1], (*adapted.lead, ins, odd.shape[-2]), jnp.float32) / 10
    right = jax.random.normal(keys[2], (*adapted.lead, even.shape[-2], outs), jnp.float32) / 10
    dot = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
    return dot(left, odd).reshape(a_shape), dot(even.mT, right).reshape(b_shape)


def _take_rows(w, one: Rows) -> jax.Array:
    rows = jnp.take(w, np.array(one.indices), axis=one.axis).astype(jnp.float32)
    return rows if one.axis == 0 else rows.T


def abstract(plan: Plan, table: Table) -> dict:
    """The trainable tree as jax.ShapeDtypeStruct leaves."""
    return jax.eval_shape(lambda key: init(key, plan, table), jax.random.key(0))


def axes(plan: Plan, table: Table) -> dict:
    """{path: axis letters} of the trainable tree, for sharding: "LDR" and "LRNH"."""
    flat = {}
    for path, one in plan.items():
        row, lead = table.rows[path], table.lead_dims(path)
        if isinstance(one, Whole):
            flat[path + "/full"] = table.dims(path)
        elif isinstance(one, Rows):
            flat[path + "/rows"] = "RD"
        else:
            for end in ("", "0") if one.origin else ("",):
                flat[path + "/a" + end] = lead + row.ins + "R"
                flat[path + "/b" + end] = lead + "R" + row.outs
            if one.dora:
                flat[path + "/m"] = lead + row.outs
    return flat


def attach(base: dict, adapters: dict, plan: Plan, *, rng: jax.Array | None = None, dropout: float = 0.0):
    """The base tree with what `plan` trains in place: leaf types of weights.py, and whole weights as they
    are. With `rng`, the dropout of training is on."""
    flat, leaves_of = flatten(base), flatten(adapters)
    for path, one in plan.items():
        if isinstance(one, Whole):
            full = leaves_of[path + "/full"]
            if one.live:
                live = np.array(one.live).reshape(*one.lead, *(1,) * (full.ndim - len(one.lead)))
                full = jnp.where(live, full, flat[path].astype(full.dtype))
            flat[path] = full
        elif isinstance(one, Rows):
            indices = jnp.array(one.indices, jnp.int32)
            flat[path] = RowsWeight(flat[path], leaves_of[path + "/rows"], indices, one.axis)
        else:
            key = None
            if rng is not None and dropout:
                key = path_key(rng, path)
                key = jax.random.split(key, one.lead[0]) if one.lead else key
            leaves = {name: leaves_of.get(f"{path}/{name}") for name in ("a", "b", "m", "a0", "b0")}
            a, b = _factors(one, jax.lax.stop_gradient(leaves) | {x: leaves[x] for x in "ab"}, (), jnp)
            m = leaves["m"] if one.dora else None
            if m is not None and 0 in one.ranks:
                m = jnp.where(_live_m(one, m.ndim - len(one.lead)), m, jnp.inf)
            flat[path] = LoraWeight(flat[path], a, b, _scale(one), key, dropout, m)
    return unflatten(flat)


def trained(plan: Plan) -> Plan:
    """The plan by which a run of LoftQ computes: its first factors are a part of its base."""
    return {
        path: dataclasses.replace(one, origin=False) if isinstance(one, Adapted) else one
        for path, one in plan.items()
    }


def _factors(one: Adapted, leaves: Mapping[str, Any], at: tuple[int, ...], xp):
    """(a, b) of the matrices at `at`, [a, a0] and [b, -b0] where a product is taken off."""
    a, b = leaves["a"][at], leaves["b"][at]
    if one.origin:
        a = xp.concatenate([a, leaves["a0"][at]], -1)
        b = xp.concatenate([b, -leaves["b0"][at]], len(one.lead) - len(at))
    return a, b


def delta(a, b, scale, xp: Any = jnp):
    """scale · a b in float32 with the axes of the weight; `scale` has the axes that count matrices. `xp` is
    numpy where the arrays are."""
    lead = scale.ndim
    ins, outs = a.shape[lead:-1], b.shape[lead + 1 :]
    a = a.reshape(*a.shape[:lead], -1, a.shape[-1]).astype(xp.float32)
    b = b.reshape(*b.shape[: lead + 1], -1).astype(xp.float32)
    ab = xp.matmul(a, b) if xp is np else jnp.matmul(a, b, precision="highest")
    return (ab * scale.reshape(scale.shape + (1, 1))).reshape(*a.shape[:lead], *ins, *outs)


def _merged(base, a, b, scale, m, xp):
    w = base.astype(xp.float32) + delta(a, b, scale, xp)
    if m is None:
        return w
    ins = tuple(range(scale.ndim, a.ndim - 1))
    norm = xp.sqrt(xp.maximum(xp.sum(xp.square(w), axis=ins), np.finfo(np.float32).tiny))
    gain = xp.where(xp.isinf(m), xp.ones_like(norm), m / norm)
    return w * xp.expand_dims(gain, ins)


def merged(w: LoraWeight | RowsWeight, base=None) -> jax.Array:
    """What an adapted weight computes with as one array, made in float32, in the dtype of `base` (w.base
    unless given), of a quantised one in float32."""
    base = w.base if base is None else base
    base = dequantise(base, jnp.float32) if isinstance(base, QuantWeight) else base
    if isinstance(w, RowsWeight):
        rows = w.rows.astype(base.dtype)
        return base.at[w.indices].set(rows) if w.axis == 0 else base.at[:, w.indices].set(rows.T)
    return _merged(base, w.a, w.b, w.scale, w.m, jnp).astype(base.dtype)


def merged_one(one: Adapted | Whole | Rows, leaves: Mapping[str, np.ndarray], base, at: tuple[int, ...] = ()):
    """In numpy, what `base` becomes: float32, the row's matrices at the index `at` of the axes that count
    them, in our layout. None where they are left as they are. `leaves` are the row's of the trainable tree,
    whole: {"a": …, "b": …}."""
    if isinstance(one, Rows):
        out = np.array(base, np.float32)
        np.moveaxis(out, one.axis, 0)[list(one.indices)] = leaves["rows"]
        return out
    if isinstance(one, Whole):
        alive = not one.live or np.array(one.live).reshape(one.lead)[at].any()
        return np.asarray(leaves["full"][at], np.float32) if alive else None
    ranks = np.array(one.ranks).reshape(one.lead)[at]
    if not ranks.any():
        return None
    a, b = _factors(one, leaves, at, np)
    scale = np.array(one.scales, np.float32).reshape(one.lead)[at]
    m = None
    if one.dora:
        m = leaves["m"][at]
        m = np.where((ranks > 0).reshape(*ranks.shape, *(1,) * (m.ndim - ranks.ndim)), m, np.inf)
    return _merged(base, a, b, scale, m, np)


def merge(tree) -> dict:
    """Plain weights again: every adapted leaf folded in, in its base's dtype."""

    def one(w):
        return merged(w) if isinstance(w, LoraWeight | RowsWeight) else w

    return jax.tree.map(one, tree, is_leaf=is_leaf)


def plain(config: LoraConfig, plan: Plan, adapters: dict) -> tuple[LoraConfig, Plan, dict]:
    """The same adapter with nothing to take off: where the tree holds "a0" and "b0", factors [a, a0] and
    [b, -b0] of twice the rank and alpha, so that it is plain LoRA on the published base (as PEFT converts
    PiSSA). Arrays may be numpy's."""
    if not any(isinstance(one, Adapted) and one.origin for one in plan.values()):
        return config, plan, adapters
    flat, out = dict(flatten(adapters)), {}
    for path, one in plan.items():
        if not isinstance(one, Adapted) or not one.origin:
            out[path] = one
            continue
        leaves = {name: flat.pop(f"{path}/{name}") for name in ("a", "b", "a0", "b0")}
        # a matrix of lower rank than the largest keeps its used components together
        R, ranks = one.rank, np.array(one.ranks)
        order = np.tile(np.arange(2 * R), (len(ranks), 1))
        for i, r in enumerate(ranks):
            order[i] = [*range(r), *range(R, R + r), *range(r, R), *range(R + r, 2 * R)]
        order = order.reshape(*one.lead, 2 * R)
        a, b = _factors(one, {k: np.asarray(v) for k, v in leaves.items()}, (), np)
        lead = len(one.lead)
        a_order = order.reshape(*one.lead, *(1,) * (a.ndim - lead - 1), 2 * R)
        b_order = order.reshape(*one.lead, 2 * R, *(1,) * (b.ndim - lead - 1))
        flat[path + "/a"] = np.take_along_axis(a, a_order, -1)
        flat[path + "/b"] = np.take_along_axis(b, b_order, lead)
        out[path] = dataclasses.replace(one, ranks=tuple(2 * r for r in one.ranks), origin=False)
    # the scale alpha / r stays with twice of both, alpha / sqrt(r) with sqrt(2) of alpha
    more = math.sqrt(2) if config.use_rslora else 2
    config = dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={k: 2 * v for k, v in config.rank_pattern.items()},
        alpha_pattern={k: more * v for k, v in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return config, out, unflatten(flat)
