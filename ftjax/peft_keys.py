"""How PEFT sees an adapted model: by transformers' modules and parameters, which are not always ours.

Since transformers 5 the experts of a layer are one parameter of three axes, gate and up often in one. PEFT
adapts such a parameter whole: A [E·R, in], experts slowest, and B [out, R·E], experts fastest. Where our rows
are parts of one parameter, their A factors stand side by side along the rank and their B factors on a block
diagonal.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ftjax.lora import Adapted, Plan
from ftjax.weights import IN_OUT, Table, Weight, module_of

PREFIX = "base_model.model."
# PEFT takes these names in `target_modules` for those of experts wherever transformers fuses experts, so a
# layer of its own by such a name is given as a parameter there.
EXPERT_NAMES = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
# Experts kept [E, in, out] in a module that does not say so (Llama 4): PEFT takes inputs for outputs.
UNMARKED = re.compile(r".*\.feed_forward\.experts\.\w+")


@dataclasses.dataclass(frozen=True)
class View:
    """`base`, our table, as the other side names and joins its rows: `table` has those, `parts` our rows in
    each."""

    base: Table
    table: Table
    parts: Mapping[str, tuple[str, ...]]
    stored: bool  # by the checkpoint's names, every matrix a module of its own
    nested: bool  # in a class that has more than the text decoder

    @functools.cached_property
    def fused(self) -> bool:
        """Whether experts are one parameter here."""
        return any(self.table.together(path) for path in self.parts)

    def is_parameter(self, path: str) -> bool:
        """Whether the tensors of `path` are given to PEFT as parameters, not as modules."""
        row = self.table.rows[path]
        if self.stored:
            return False
        bare = not row.hf.endswith(".weight") or bool(self.table.together(path))
        return bare or row.role == "router" or (self.fused and row.module.rpartition(".")[2] in EXPERT_NAMES)

    def names(self, path: str) -> list[str]:
        """What each tensor of `path` is called in PEFT's settings: its module, or the parameter itself."""
        names = self.table.names(path)
        return names if self.is_parameter(path) else list(map(module_of, names))

    def swapped(self, path: str) -> bool:
        """Whether PEFT takes the inputs of `path` for its outputs."""
        row = self.table.rows[path]
        return not self.stored and row.layout is IN_OUT and UNMARKED.fullmatch(row.hf) is not None

    def keys(self, plan: Plan) -> dict[str, list[str | None]]:
        """{path: the prefix of each tensor's keys in the file, None for one left alone}. Parameters of one
        module are wrapped in their order there: the last is outermost."""
        out: dict[str, list[str | None]] = {}
        outer: dict[str, int] = {}
        for path in reversed([path for path in self.parts if path in plan]):
            ranks = np.reshape(plan[path].ranks, (len(self.table.names(path)), -1)).max(-1)
            out[path] = []
            for name, rank in zip(self.table.names(path), ranks, strict=True):
                module = name.removesuffix(".weight")
                if self.is_parameter(path) and module == name:
                    module = name.rpartition(".")[0]
                if not rank:
                    out[path].append(None)
                    continue
                out[path].append(PREFIX + module + ".base_layer" * outer.get(module, 0))
                outer[module] = outer.get(module, 0) + 1
        return {path: out[path] for path in self.parts if path in plan}

    def modules(self) -> set[str]:
        """Every module that could have keys."""
        return {
            name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]
            for path in self.parts
            for name in self.table.names(path)
        }


def view(table: Table, rename: Callable[[str], str] = str, *, stored: bool = False) -> View:
    """`table` as transformers' module has it, or (with `stored`) by the names of the checkpoint; `rename`
    gives a parameter's name in the class that is loaded."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, row in table.rows.items():
        if row.ins:
            name = row.hf if stored else row.torch
            groups.setdefault((path.rpartition("/")[0], name), []).append(path)
    rows: dict[str, Weight] = {}
    parts: dict[str, tuple[str, ...]] = {}
    sizes = dict(table.sizes)
    for (_, name), paths in groups.items():
        paths = sorted(paths, key=lambda path: table.rows[path].part)
        row = table.rows[paths[0]]
        axes = row.axes
        if len(paths) > 1:
            assert [table.rows[p].part for p in paths] == [(i, len(paths)) for i in range(len(paths))], name
            letter = chr(0x100 + len(sizes))
            sizes[letter] = len(paths) * math.prod(table.outs(paths[0]))
            axes = axes.rpartition("->")[0] + "->" + letter
        rows[paths[0]] = dataclasses.replace(row, axes=axes, hf=rename(name), torch="", part=(0, 1))
        parts[paths[0]] = tuple(paths)
    order = [path for path in table.rows if path in rows]
    return View(
        table,
        dataclasses.replace(table, rows={p: rows[p] for p in order}, sizes=sizes),
        {p: parts[p] for p in order},
        stored,
        any(rename(row.torch) != row.torch for row in table.rows.values()),
    )


# -- Between our rows and the view's


def fused_plan(view: View, plan: Plan) -> Plan:
    """The plan of the view's rows: one rank and scale for each tensor."""
    out = {}
    for path, parts in view.parts.items():
        ours = [plan[part] for part in parts if part in plan]
        if ours:
            count = len(view.table.names(path))
            each = math.prod(view.table.together(path))
            ranks = sum(_by_tensor(x.ranks, count) for x in ours)
            scales = np.max([np.reshape(x.scales, (count, -1)).max(-1) for x in ours], axis=0)
            lists = (tuple(x for x in y.tolist() for _ in range(each)) for y in (ranks, scales))
            out[path] = Adapted(*lists, view.table.lead(path))
    return out


def _by_tensor(ranks, count: int) -> np.ndarray:
    return np.reshape(ranks, (count, -1)).max(-1)


def _columns(view: View, path: str, plan: Plan, fused: Adapted):
    """(our row, its outputs, [(tensor, the slice of its rank components)]) for each part of `path`."""
    count = len(view.table.names(path))
    whole = _by_tensor(fused.ranks, count)
    parts = view.parts[path]
    width = math.prod(view.table.outs(path)) // len(parts)
    ranks = {p: _by_tensor(plan[p].ranks, count) for p in parts if p in plan}
    start = np.zeros(count, int)
    apart = sum(ranks.values()) == whole  # else the parts share all components
    for i, part in enumerate(parts):
        if part in ranks:
            end = start + ranks[part]
            yield part, slice(i * width, (i + 1) * width), [slice(*x) for x in zip(start, end, strict=True)]
            start = np.where(apart, end, start)


def _matrices(view: View, path: str, flat, row: str, lead: int) -> tuple[np.ndarray, np.ndarray]:
    """(a [tensors, matrices in each, in, R], b [tensors, matrices in each, R, out])."""
    count = len(view.table.names(path))
    a, b = flat[row + "/a"], flat[row + "/b"]
    each = math.prod(a.shape[:lead]) // count
    return a.reshape(count, each, -1, a.shape[-1]), b.reshape(count, each, b.shape[lead], -1)


def fuse(view: View, plan: Plan, fused: Plan, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Factors of the view's rows. A scale that differs from its tensor's goes into B."""
    out = {}
    for path, adapted in fused.items():
        table, count = view.table, len(view.table.names(path))
        each, wide = math.prod(table.together(path)), math.prod(table.outs(path))
        a_all = np.zeros((count, each, math.prod(table.ins(path)), adapted.rank), np.float32)
        b_all = np.zeros((count, each, adapted.rank, wide), np.float32)
        for part, outs, columns in _columns(view, path, plan, adapted):
            a, b = _matrices(view, path, flat, part, len(plan[part].lead))
            ratio = _ratio(plan[part], adapted, count)
            for t, where in enumerate(columns):
                rank = where.stop - where.start
                a_all[t, :, :, where] = a[t, :, :, :rank]
                b_all[t, :, where, outs] = b[t, :, :rank] * ratio[t, :, None, None]
        out[path + "/a"] = a_all.reshape(*adapted.lead, *table.ins(path), adapted.rank)
        out[path + "/b"] = b_all.reshape(*adapted.lead, adapted.rank, *table.outs(path))
    return out


def unfuse(view: View, plan: Plan, fused: Plan, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our factors, of the shapes that `plan` has. Inverse of fuse where that lost nothing."""
    out = {}
    for path, adapted in fused.items():
        count = len(view.table.names(path))
        a_all, b_all = _matrices(view, path, flat, path, len(adapted.lead))
        for part, outs, columns in _columns(view, path, plan, adapted):
            mine = plan[part]
            ins, width = view.table.ins(path), outs.stop - outs.start
            a = np.zeros((*a_all.shape[:3], mine.rank), np.float32)
            b = np.zeros((*b_all.shape[:2], mine.rank, width), np.float32)
            ratio = _ratio(mine, adapted, count)
            ratio = np.where(ratio == 0, 1, ratio)
            for t, where in enumerate(columns):
                rank = where.stop - where.start
                a[t, :, :, :rank] = a_all[t, :, :, where]
                b[t, :, :rank] = b_all[t, :, where, outs] / ratio[t, :, None, None]
            out[part + "/a"] = a.reshape(*mine.lead, *ins, mine.rank)
            out[part + "/b"] = b.reshape(*mine.lead, mine.rank, *view.base.outs(part))
    return out


def _ratio(mine: Adapted, whole: Adapted, count: int) -> np.ndarray:
    """[tensors, matrices in each]: our scale over the tensor's; 1 exactly where they are equal."""
    ours, theirs = (np.reshape(x.scales, (count, -1)) for x in (mine, whole))
    theirs = np.broadcast_to(theirs.max(-1, keepdims=True), ours.shape)
    return np.divide(ours, theirs, out=np.ones_like(ours), where=theirs > 0).astype(np.float32)


def guess_plan(view: View, fused: Plan, flat: Mapping[str, np.ndarray]) -> Plan:
    """A plan of our rows for factors that came without one. Parts with B blocks of their own get their share of
    the rank, parts that share components all of it."""
    out = {}
    for path, adapted in fused.items():
        parts, count = view.parts[path], len(view.table.names(path))
        each = math.prod(view.table.together(path))
        ranks, scales = _by_tensor(adapted.ranks, count), np.reshape(adapted.scales, (count, -1)).max(-1)
        _, b_all = _matrices(view, path, flat, path, len(adapted.lead))
        if len(parts) > 1:
            ranks = [_share(b[:, :rank], rank, len(parts)) for b, rank in zip(b_all, ranks, strict=True)]
        lists = (tuple(x for x in y for _ in range(each)) for y in (map(int, ranks), scales.tolist()))
        ranks, scales = lists
        for part in parts:
            out[part] = Adapted(ranks, scales, view.base.lead(part))
    return out


def _share(b, rank: int, parts: int) -> int:
    """The rank of each part of b [matrices, R, out]: a block's if b is block-diagonal, else R."""
    if rank % parts or not b.any():
        return rank
    blocks = np.reshape(b, (len(b), parts, rank // parts, parts, -1))
    diagonal = all(not blocks[:, i, :, j].any() for i in range(parts) for j in range(parts) if i != j)
    return rank // parts if diagonal else rank


# -- Tensors of the file


def encode(view: View, plan: Plan, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{key: array} of the view's factors."""
    out = {}
    for path, keys in view.keys(plan).items():
        a_all, b_all = _matrices(view, path, flat, path, len(plan[path].lead))
        ranks = _by_tensor(plan[path].ranks, len(keys))
        for key, rank, a, b in zip(keys, ranks, a_all, b_all, strict=True):
            if key is not None:
                a, b = (
                    a[:, :, :rank].transpose(0, 2, 1),
                    b[:, :rank].transpose(2, 1, 0),
                )  # [m, R, in], [out, R, m]
                if view.swapped(path):
                    a, b = b.transpose(2, 1, 0), a.transpose(2, 1, 0)
                out[key + ".lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, a.shape[-1]))
                out[key + ".lora_B.weight"] = np.ascontiguousarray(b.reshape(len(b), -1))
    return out


def decode(
    view: View, plan: Plan, get: Callable[[str, tuple[int, ...]], np.ndarray]
) -> dict[str, np.ndarray]:
    """The view's factors from `get(key, shape)`. Inverse of encode."""
    flat = {}
    for path, keys in view.keys(plan).items():
        adapted, table = plan[path], view.table
        each = math.prod(table.together(path))
        n_in, n_out = math.prod(table.ins(path)), math.prod(table.outs(path))
        a_all = np.zeros((len(keys), each, n_in, adapted.rank), np.float32)
        b_all = np.zeros((len(keys), each, adapted.rank, n_out), np.float32)
        swapped = view.swapped(path)
        wide_a, wide_b = (n_out, n_in) if swapped else (n_in, n_out)
        for t, (key, rank) in enumerate(
            zip(keys, _by_tensor(adapted.ranks, len(keys)).tolist(), strict=True)
        ):
            if key is not None:
                a = get(key + ".lora_A.weight", (each * rank, wide_a)).reshape(each, rank, wide_a)
                b = get(key + ".lora_B.weight", (wide_b, each * rank)).reshape(wide_b, rank, each)
                if swapped:
                    a, b = b.transpose(2, 1, 0), a.transpose(2, 1, 0)
                a_all[t, :, :, :rank], b_all[t, :, :rank] = a.transpose(0, 2, 1), b.transpose(2, 1, 0)
        flat[path + "/a"] = a_all.reshape(*adapted.lead, *table.ins(path), adapted.rank)
        flat[path + "/b"] = b_all.reshape(*adapted.lead, adapted.rank, *table.outs(path))
    return flat


# -- Settings


class Chosen(NamedTuple):
    rank: int
    scale: float
    parameter: bool


def adapted_names(view: View, plan: Plan) -> dict[str, Chosen]:
    """What is adapted, by its name in PEFT's settings."""
    out = {}
    for path, adapted in plan.items():
        names = view.names(path)
        ranks = _by_tensor(adapted.ranks, len(names)).tolist()
        scales = np.reshape(adapted.scales, (len(names), -1)).max(-1).tolist()
        for name, rank, scale in zip(names, ranks, scales, strict=True):
            if rank:
                out[name] = Chosen(rank, scale, view.is_parameter(path))
    return out


def shorten(chosen: Mapping[str, Any], every: Iterable[str]) -> dict[str, Any]:
    """{the end of a name that fits no other of `every`, or the whole name: value}."""
    values: dict[str, list] = {}
    for name in every:
        values.setdefault(_end(name), []).append(chosen.get(name))
    out = {}
    for name, value in chosen.items():
        same = all(x == value for x in values[_end(name)])
        out[_end(name) if same else name] = value
    return out


def _end(name: str) -> str:
    """A module's last name; of a parameter all that follows the layer's index."""
    if name.endswith(".weight") or re.fullmatch(r".*\.experts\.\w+", name):
        return re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return name.rpartition(".")[2]


def settings(view: View, plan: Plan, r: int, alpha: float, rslora: bool) -> dict[str, Any]:
    """Fields of adapter_config.json that choose what `plan` adapts, with these defaults. Whole paths where
    the text decoder is not alone."""
    chosen = adapted_names(view, plan)
    every = {name: view.is_parameter(path) for path in view.parts for name in view.names(path)}

    def targets(parameter: bool) -> list[str] | None:
        mine = {name: True for name, x in chosen.items() if x.parameter == parameter}
        if view.nested:
            return sorted(mine)
        return sorted(shorten(mine, [name for name, kind in every.items() if kind == parameter]))

    ranks = {name: rank for name, (rank, _, _) in chosen.items()}
    alphas = {
        name: _tidy(scale * (math.sqrt(rank) if rslora else rank))
        for name, (rank, scale, _) in chosen.items()
    }
    patterns = {
        "rank_pattern": {name: x for name, x in shorten(ranks, ranks).items() if x != r},
        "alpha_pattern": {name: x for name, x in shorten(alphas, alphas).items() if x != _tidy(alpha)},
    }
    return {
        "target_modules": targets(False),
        "target_parameters": targets(True) or None,
        "layers_to_transform": None,
    } | {key: {re.escape(name): x for name, x in found.items()} for key, found in patterns.items()}


def _tidy(x: float) -> float:
    near = round(x)
    return near if abs(x - near) < 1e-9 * max(1, abs(x)) else x
