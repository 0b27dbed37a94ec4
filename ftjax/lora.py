"""LoRA as functions on a parameter tree. Hu et al. 2021, arXiv:2106.09685; field names and meanings are
PEFT's.

`plan` reads the config against a weight table, `init` makes the small trainable tree, `attach` puts it beside
the frozen one for a forward pass, `merge` folds it in for export. Models do not know of LoRA: ops.einsum
does."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.weights import LoraWeight, Table, flatten, is_leaf, module_of, path_key, unflatten


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get low-rank factors, and of what rank."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    r: int = 16
    """Rank of the factors."""
    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: float = 0.0
    """Share of the low-rank branch's inputs zeroed in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """"all-linear" (every linear layer but the head), a list of module names ("q_proj"), or a regex that must
    match a whole module path ("model.layers.0.self_attn.q_proj")."""
    use_rslora: bool = False
    """Scale by 1/sqrt(r): Kalajdzievski 2023, arXiv:2312.03732."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Regex on the end of a module path -> its rank instead of r."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Regex on the end of a module path -> its alpha instead of lora_alpha."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Layers that get factors; all where not given."""

    def __post_init__(self):
        ranks = {"r": self.r} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if rank < 1:
                raise UserError(f"lora.{name}={rank}: a rank is at least 1 (`lora: null` tunes every weight)")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora.lora_dropout={self.lora_dropout}: a share in [0, 1)")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                _compiled(pattern, f"lora.{name}")
        if isinstance(self.target_modules, str):
            _compiled(self.target_modules, "lora.target_modules")


def _compiled(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(f"{where}={pattern!r} is not a regular expression: {e}") from None


@dataclasses.dataclass(frozen=True)
class Adapted:
    """One adapted weight: rank and scale of each of its matrices (`lead` is their arrangement: layers,
    experts); one of rank 0 is left alone. Factors are stored at the largest rank, the rest zero."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    lead: tuple[int, ...]

    @property
    def rank(self) -> int:
        return max(self.ranks)


Plan = dict[str, Adapted]  # path -> how it is adapted


def plan(config: LoraConfig, table: Table) -> Plan:
    """Match the config against every linear layer of `table`. UserError where something matches nothing."""
    linear = {path: row for path, row in table.rows.items() if row.ins and row.role != "lookup"}
    layers = config.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else layers
    used_targets: set[str] = set()
    used_patterns: set[str] = set()
    chosen = {}
    for path in linear:
        stack, names = table.layers(path), table.names(path)
        each = len(names) // len(stack or (0,))  # tensors a layer
        ranks, scales = [], []
        for index, name in enumerate(names):
            module = module_of(name)
            hit = _target(config.target_modules, module, linear[path].role)
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
            chosen[path] = Adapted(ranks, scales, table.lead(path))
    modules = sorted({row.module.rpartition(".")[2] for row in linear.values()})
    if layers is not None and any(i not in range(table.sizes["L"]) for i in layers):
        raise UserError(f"lora.layers_to_transform={layers}: the model's layers are 0…{table.sizes['L'] - 1}")
    if not chosen:
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


def _target(targets, module: str, role: str) -> str | None:
    """The target that `module` matches, by PEFT's rules (check_target_module_exists)."""
    if targets == "all-linear":
        return targets if role == "linear" else None
    if isinstance(targets, str):
        return targets if re.fullmatch(targets, module) else None
    return next((t for t in targets if module == t or module.endswith("." + t)), None)


def _pattern(patterns: Mapping, module: str, default):
    """(pattern, value) of the first regex that matches the end of `module`, by PEFT's rule
    (get_pattern_key)."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return key, value
    return "", default


def _live(adapted: Adapted) -> np.ndarray:
    """[*lead, R]: 1 where a rank component is used, 0 where it pads."""
    live = np.arange(adapted.rank) < np.array(adapted.ranks)[:, None]
    return live.astype(np.float32).reshape(*adapted.lead, adapted.rank)


def init(key: jax.Array, plan: Plan, table: Table) -> dict:
    """The trainable tree {path: {"a", "b"}}, float32: a uniform in ±1/sqrt(fan_in) as PEFT draws it, b
    zero."""
    flat = {}
    for path, adapted in plan.items():
        lead, ins, outs = table.lead(path), table.ins(path), table.outs(path)
        bound = math.prod(ins) ** -0.5
        a = jax.random.uniform(path_key(key, path), (*lead, *ins, adapted.rank), jnp.float32, -bound, bound)
        live = _live(adapted)
        live = live.reshape(*lead, *(1,) * len(ins), -1)
        flat[path + "/a"] = a * live
        flat[path + "/b"] = jnp.zeros((*lead, adapted.rank, *outs), jnp.float32)
    return unflatten(flat)


def abstract(plan: Plan, table: Table) -> dict:
    """The trainable tree as jax.ShapeDtypeStruct leaves."""
    return jax.eval_shape(lambda key: init(key, plan, table), jax.random.key(0))


def axes(plan: Plan, table: Table) -> dict:
    """{path: axis letters} of the trainable tree, for sharding: "LDR" and "LRNH"."""
    flat = {}
    for path in plan:
        row, lead = table.rows[path], table.lead_dims(path)
        flat[path + "/a"] = lead + row.ins + "R"
        flat[path + "/b"] = lead + "R" + row.outs
    return flat


def attach(base: dict, adapters: dict, plan: Plan, *, rng: jax.Array | None = None, dropout: float = 0.0):
    """The base tree with LoraWeight leaves where `plan` adapts. With `rng`, the dropout of training is on."""
    flat, factors = flatten(base), flatten(adapters)
    for path, adapted in plan.items():
        a, b = factors[path + "/a"], factors[path + "/b"]
        scale, key = jnp.array(adapted.scales, jnp.float32).reshape(adapted.lead), None
        if rng is not None and dropout:
            key = path_key(rng, path)
            key = jax.random.split(key, adapted.lead[0]) if adapted.lead else key
        flat[path] = LoraWeight(flat[path], a, b, scale, key, dropout)
    return unflatten(flat)


def delta(a, b, scale, xp: Any = jnp):
    """scale · a b in float32 with the axes of the weight; `scale` has the axes that count matrices. `xp` is
    numpy where the arrays are."""
    lead = scale.ndim
    ins, outs = a.shape[lead:-1], b.shape[lead + 1 :]
    a = a.reshape(*a.shape[:lead], -1, a.shape[-1]).astype(xp.float32)
    b = b.reshape(*b.shape[: lead + 1], -1).astype(xp.float32)
    ab = xp.matmul(a, b) if xp is np else jnp.matmul(a, b, precision="highest")
    return (ab * scale.reshape(scale.shape + (1, 1))).reshape(*a.shape[:lead], *ins, *outs)


def merged(w: LoraWeight, base=None) -> jax.Array:
    """base + scale · a b in float32, then in the dtype of `base` (w.base unless given)."""
    base = w.base if base is None else base
    return (base.astype(jnp.float32) + delta(w.a, w.b, w.scale)).astype(base.dtype)


def merge(tree) -> dict:
    """Plain weights again: every LoraWeight leaf folded in, in its base's dtype."""
    return jax.tree.map(lambda w: merged(w) if isinstance(w, LoraWeight) else w, tree, is_leaf=is_leaf)
