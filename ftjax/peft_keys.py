"""How PEFT sees an adapted model: by transformers' modules and parameters, which are not always ours.

Since transformers 5 the experts of a layer are one parameter of three axes, gate and up often in one. PEFT
adapts such a parameter whole: A [E·R, in], experts slowest, and B [out, R·E], experts fastest. Where our rows
are parts of one parameter, their A factors stand side by side along the rank and their B factors on a block
diagonal.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ftjax.errors import UserError
from ftjax.lora import Adapted, Plan, Rows, Whole, tied
from ftjax.weights import IN_OUT, Table, Weight, from_hf, hf_shape, module_of, to_hf_one

PREFIX = "base_model.model."
# PEFT takes these names in `target_modules` for those of experts wherever transformers fuses experts, so a
# layer of its own by such a name is given as a parameter there.
EXPERT_NAMES = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
# Experts kept [E, in, out] in a module that does not say so (Llama 4): PEFT takes inputs for outputs.
UNMARKED = re.compile(r".*\.feed_forward\.experts\.\w+")
FACTOR = re.compile(r"\.(lora_|token_adapter).*")


class Inexpressible(UserError):
    """The adapter has what the loader it is for does not take: a merged export has it all."""


@dataclasses.dataclass(frozen=True)
class View:
    """`base`, our table, as the other side names and joins its rows: `table` has those, `parts` our rows in
    each."""

    base: Table
    table: Table
    parts: Mapping[str, tuple[str, ...]]
    stored: bool  # by the checkpoint's names, every matrix a module of its own
    nested: bool  # in a class that has more than the text decoder
    head: str  # the head's module

    @functools.cached_property
    def fused(self) -> bool:
        """Whether experts are one parameter here."""
        return any(self.table.together(path) for path in self.matrices)

    @property
    def matrices(self) -> list[str]:
        """The rows that can have factors."""
        return [path for path, row in self.table.rows.items() if row.ins and row.role != "vector"]

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
        """{adapted path: the prefix of each tensor's keys in the file, None for one left alone}. Parameters
        of one module are wrapped in their order there: the last is outermost."""
        out: dict[str, list[str | None]] = {}
        outer: dict[str, int] = {}
        adapted = {path: one for path, one in plan.items() if isinstance(one, Adapted)}
        for path in reversed([path for path in self.parts if path in adapted]):
            names = self.table.names(path)
            out[path] = []
            for name, rank in zip(names, _by_tensor(adapted[path].ranks, len(names)), strict=True):
                module = name.removesuffix(".weight")
                if self.is_parameter(path) and module == name:
                    module = name.rpartition(".")[0]
                if not rank:
                    out[path].append(None)
                    continue
                out[path].append(PREFIX + module + ".base_layer" * outer.get(module, 0))
                outer[module] = outer.get(module, 0) + 1
        return {path: out[path] for path in self.parts if path in out}

    def matches(self, keys: Iterable[str]) -> int:
        """How many of a file's keys could be of this view."""
        names = {name for path in self.parts for name in self.table.names(path)}
        modules = {
            name.removesuffix(".weight")
            if self.stored or name.endswith(".weight")
            else name.rpartition(".")[0]
            for name in names
        }
        found = {key.removeprefix(PREFIX).replace(".base_layer", "") for key in keys}
        factors = {key for key in found if FACTOR.search(key)}
        return len({FACTOR.sub("", key) for key in factors} & modules) + len((found - factors) & names)


def view(table: Table, rename: Callable[[str], str] = str, *, stored: bool = False) -> View:
    """`table` as transformers' module has it, or (with `stored`) by the names of the checkpoint; `rename`
    gives a parameter's name in the class that is loaded."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, row in table.rows.items():
        groups.setdefault((path.rpartition("/")[0], row.hf if stored else row.torch), []).append(path)
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
            axes = axes[: len(axes) - len(row.outs)] + letter
        rows[paths[0]] = dataclasses.replace(row, axes=axes, hf=rename(name), torch="", part=(0, 1))
        parts[paths[0]] = tuple(paths)
    order = [path for path in table.rows if path in rows]
    return View(
        table,
        dataclasses.replace(table, rows={p: rows[p] for p in order}, sizes=sizes),
        {p: parts[p] for p in order},
        stored,
        any(rename(row.torch) != row.torch for row in table.rows.values()),
        module_of(rename("lm_head.weight")),
    )


# -- Between our rows and the view's


def fused_plan(view: View, plan: Plan) -> Plan:
    """The plan of the view's rows: one rank and scale for each tensor. Inexpressible where parts of one
    tensor are trained in different ways."""
    out: Plan = {}
    for path, parts in view.parts.items():
        ours = {part: plan[part] for part in parts if part in plan}
        if not ours:
            continue
        kinds = {type(one) for one in ours.values()}
        count = len(view.table.names(path))
        each = math.prod(view.table.together(path))
        lead = view.table.lead(path)
        adapted = [one for one in ours.values() if isinstance(one, Adapted)]
        if len(kinds) > 1 or (adapted and any(one.origin for one in adapted)):
            raise _one_tensor(view, path)
        if adapted:
            ranks = np.sum([_by_tensor(one.ranks, count) for one in adapted], axis=0)
            scales = np.max([_by_tensor(one.scales, count) for one in adapted], axis=0)
            dora = any(one.dora for one in adapted)
            some = [_matrix(one.ranks, count) > 0 for one in adapted]
            if dora and (len(adapted) < len(parts) or any((x.any(-1) != x.all(-1)).any() for x in some)):
                raise _one_tensor(view, path)
            ranks, scales = (tuple(np.repeat(x, each).tolist()) for x in (ranks, scales))
            out[path] = Adapted(ranks, scales, lead, dora)
        elif Whole in kinds:
            lives = {tuple(_lives(one, count * each)) for one in ours.values()}
            live = _matrix(next(iter(lives)), count)
            if len(lives) > 1 or len(ours) < len(parts) or (live.any(-1) != live.all(-1)).any():
                raise _one_tensor(view, path)
            out[path] = _whole(live.reshape(-1).tolist(), lead)
        else:
            out[path] = next(iter(ours.values()))
    return out


def _one_tensor(view: View, path: str) -> Inexpressible:
    names = [view.base.rows[part].module for part in view.parts[path]]
    return Inexpressible(
        f"{', '.join(names)} are one tensor to PEFT ({view.table.rows[path].module}) and can only be trained "
        "in one way: a merged export (--for hf) takes any"
    )


def _lives(one: Any, count: int) -> list[bool]:
    return list(one.live) or [True] * count


def _whole(live: list[bool], lead: tuple[int, ...]) -> Whole:
    return Whole() if all(live) else Whole(tuple(live), lead)


def _matrix(values, count: int) -> np.ndarray:
    return np.reshape(values, (count, -1))


def _by_tensor(ranks, count: int) -> np.ndarray:
    return _matrix(ranks, count).max(-1)


def _columns(view: View, path: str, plan: Mapping[str, Any], fused: Adapted):
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


def fuse(view: View, plan: Mapping[str, Any], fused: Plan, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Factors of the view's rows. A scale that differs from its tensor's goes into B."""
    out = {}
    for path, adapted in fused.items():
        table, count = view.table, len(view.table.names(path))
        parts = view.parts[path]
        if isinstance(adapted, Rows):
            out[path + "/rows"] = flat[path + "/rows"]
            continue
        if isinstance(adapted, Whole):
            out[path + "/full"] = _join(
                table, path, [flat[part + "/full"] for part in parts], table.ins(path)
            )
            continue
        if adapted.dora:
            out[path + "/m"] = _join(table, path, [flat[part + "/m"] for part in parts], ())
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


def _join(table: Table, path: str, arrays, ins: tuple[int, ...]) -> np.ndarray:
    """Parts [*lead, *ins, *outs] of one row, side by side."""
    shape = table.lead(path) + ins
    return np.concatenate([x.reshape(*shape, -1) for x in arrays], -1).reshape(*shape, *table.outs(path))


def _cut(view: View, path: str, x: np.ndarray, ins: tuple[int, ...]) -> list[np.ndarray]:
    """Inverse of _join."""
    shape = view.table.lead(path) + ins
    parts = view.parts[path]
    cut = np.split(x.reshape(*shape, -1), len(parts), -1)
    own = [view.base.lead(part) + ins + view.base.outs(part) for part in parts]
    return [y.reshape(to) for y, to in zip(cut, own, strict=True)]


def unfuse(
    view: View, plan: Mapping[str, Any], fused: Plan, flat: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our factors, of the shapes that `plan` has. Inverse of fuse where that lost nothing."""
    out = {}
    for path, adapted in fused.items():
        count = len(view.table.names(path))
        if isinstance(adapted, Rows):
            out[path + "/rows"] = flat[path + "/rows"]
            continue
        if isinstance(adapted, Whole) or adapted.dora:
            leaf, ins = ("full", view.table.ins(path)) if isinstance(adapted, Whole) else ("m", ())
            pieces = _cut(view, path, flat[f"{path}/{leaf}"], ins)
            out |= {f"{part}/{leaf}": x for part, x in zip(view.parts[path], pieces, strict=True)}
        if isinstance(adapted, Whole):
            continue
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
    """A plan of our rows for factors that came without one. Parts with B blocks of their own get their share
    of the rank, parts that share components all of it."""
    out: Plan = {}
    for path, adapted in fused.items():
        parts, count = view.parts[path], len(view.table.names(path))
        if isinstance(adapted, Rows):
            out[path] = adapted
            continue
        if isinstance(adapted, Whole):
            live = list(adapted.live) or [True]
            out |= {part: _whole(live, view.base.lead(part)) for part in parts}
            continue
        each = math.prod(view.table.together(path))
        ranks, scales = _by_tensor(adapted.ranks, count), _by_tensor(adapted.scales, count)
        _, b_all = _matrices(view, path, flat, path, len(adapted.lead))
        if len(parts) > 1 and not adapted.dora:
            ranks = [_share(b[:, :rank], rank, len(parts)) for b, rank in zip(b_all, ranks, strict=True)]
        lists = (tuple(x for x in y for _ in range(each)) for y in (map(int, ranks), scales.tolist()))
        ranks, scales = lists
        for part in parts:
            out[part] = Adapted(ranks, scales, view.base.lead(part), adapted.dora)
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
    """{key: array} of the view's trainable tree."""
    out = {}
    for path, keys in view.keys(plan).items():
        adapted: Any = plan[path]
        a_all, b_all = _matrices(view, path, flat, path, len(adapted.lead))
        m_all = flat[path + "/m"].reshape(len(keys), -1) if adapted.dora else None
        names = _factor_names(view, path)
        for t, (key, rank) in enumerate(zip(keys, _by_tensor(adapted.ranks, len(keys)), strict=True)):
            if key is not None:
                a = a_all[t][:, :, :rank].transpose(0, 2, 1)  # [matrices, R, in]
                b = b_all[t][:, :rank].transpose(2, 1, 0)  # [out, R, matrices]
                if view.swapped(path):
                    a, b = b.transpose(2, 1, 0), a.transpose(2, 1, 0)
                out[key + names[0]] = np.ascontiguousarray(a.reshape(-1, a.shape[-1]))
                out[key + names[1]] = np.ascontiguousarray(b.reshape(len(b), -1))
                if m_all is not None:
                    out[key + ".lora_magnitude_vector"] = m_all[t]
        if _is_tied(view, path):  # the same delta, of the head
            key = PREFIX + view.head
            out[key + ".lora_A.weight"] = np.ascontiguousarray(out[keys[0] + names[1]].T)  # type: ignore
            out[key + ".lora_B.weight"] = np.ascontiguousarray(out[keys[0] + names[0]].T)  # type: ignore
    for path, names in whole_keys(view, plan).items():
        tensors = flat[path + "/full"].reshape(len(names), *_tensor_shape(view.table, path))
        for name, x in zip(names, tensors, strict=True):
            if name is not None:
                out[name] = np.ascontiguousarray(to_hf_one(view.table, path, x))
        if _is_tied(view, path):
            out[f"{PREFIX}{view.head}.weight"] = out[names[0]]  # type: ignore
    for path, key in row_keys(view, plan).items():
        out[key] = np.ascontiguousarray(flat[path + "/rows"])
    return out


def _is_tied(view: View, path: str) -> bool:
    return view.table.rows[path].role == "lookup" and view.table.rows[path].ins == "V" and tied(view.table)


def _factor_names(view: View, path: str) -> tuple[str, str]:
    if view.table.rows[path].role == "lookup":
        return ".lora_embedding_A", ".lora_embedding_B"
    return ".lora_A.weight", ".lora_B.weight"


def _tensor_shape(table: Table, path: str) -> tuple[int, ...]:
    return table.together(path) + table.ins(path) + table.outs(path)


def whole_keys(view: View, plan: Plan) -> dict[str, list[str | None]]:
    """{path trained whole: the key of each of its tensors, None for one left alone}. A module is wrapped
    once for each of its adapted parameters, and its own tensors are innermost."""
    adapted = (key for keys in view.keys(plan).values() for key in keys if key is not None)
    wraps = collections.Counter(re.sub(r"(\.base_layer)+$", "", key) for key in adapted)
    out: dict[str, list[str | None]] = {}
    for path, one in plan.items():
        if isinstance(one, Whole):
            names = view.table.names(path)
            live: list = _matrix(_lives(one, len(names)), len(names)).any(-1).tolist()  # type: ignore
            out[path] = []
            for name, yes in zip(names, live, strict=True):
                module, _, last = (PREFIX + name).rpartition(".")
                inside = ".base_layer" * wraps[module]
                out[path].append(f"{module}{inside}.{last}" if yes else None)
    return out


def row_keys(view: View, plan: Plan) -> dict[str, str]:
    """{path of which rows are trained: their key}."""
    return {
        path: f"{PREFIX}{module_of(view.table.names(path)[0])}.token_adapter.trainable_tokens_delta"
        for path, one in plan.items()
        if isinstance(one, Rows)
    }


def decode(
    view: View, plan: Plan, get: Callable[[str, tuple[int, ...]], np.ndarray]
) -> dict[str, np.ndarray]:
    """The view's trainable tree from `get(key, shape)`. Inverse of encode, but for zeros in what is left
    alone."""
    flat, table = {}, view.table
    for path, keys in view.keys(plan).items():
        adapted: Any = plan[path]
        each = math.prod(table.together(path))
        n_in, n_out = math.prod(table.ins(path)), math.prod(table.outs(path))
        a_all = np.zeros((len(keys), each, n_in, adapted.rank), np.float32)
        b_all = np.zeros((len(keys), each, adapted.rank, n_out), np.float32)
        m_all = np.zeros((len(keys), each * n_out), np.float32)
        swapped, names = view.swapped(path), _factor_names(view, path)
        wide_a, wide_b = (n_out, n_in) if swapped else (n_in, n_out)
        ranks = _by_tensor(adapted.ranks, len(keys)).tolist()
        for t, (key, rank) in enumerate(zip(keys, ranks, strict=True)):
            if key is not None:
                a = get(key + names[0], (each * rank, wide_a)).reshape(each, rank, wide_a)
                b = get(key + names[1], (wide_b, each * rank)).reshape(wide_b, rank, each)
                if swapped:
                    a, b = b.transpose(2, 1, 0), a.transpose(2, 1, 0)
                a_all[t, :, :, :rank], b_all[t, :, :rank] = a.transpose(0, 2, 1), b.transpose(2, 1, 0)
                if adapted.dora:
                    m_all[t] = get(key + ".lora_magnitude_vector", (each * n_out,))
        flat[path + "/a"] = a_all.reshape(*adapted.lead, *table.ins(path), adapted.rank)
        flat[path + "/b"] = b_all.reshape(*adapted.lead, adapted.rank, *table.outs(path))
        if adapted.dora:
            flat[path + "/m"] = m_all.reshape(*adapted.lead, *table.outs(path))
    for path, keys in whole_keys(view, plan).items():
        full = np.zeros((len(keys), *_tensor_shape(table, path)), np.float32)
        for t, key in enumerate(keys):
            if key is not None:
                full[t] = from_hf(table, path, get(key, hf_shape(table, path)))
        flat[path + "/full"] = full.reshape(table.shape(path))
    for path, key in row_keys(view, plan).items():
        one: Any = plan[path]
        flat[path + "/rows"] = get(key, (len(one.indices), table.sizes["D"]))
    return flat


def expected(view: View, plan: Plan) -> tuple[set[str], set[str]]:
    """(keys that the file must have, others that it may have: copies of what is tied or of the base)."""
    must: set[str] = set()
    may: set[str] = set()
    for path, keys in view.keys(plan).items():
        one: Any = plan[path]
        ends = _factor_names(view, path) + ((".lora_magnitude_vector",) if one.dora else ())
        must |= {key + end for key in keys if key is not None for end in ends}
        may |= {key + ".base_layer.weight" for key in keys if key is not None}
    whole = {key for keys in whole_keys(view, plan).values() for key in keys if key is not None}
    saved = {key.rpartition(".")[0] for key in whole if key.endswith((".weight", ".bias"))}
    may |= {f"{module}.{last}" for module in saved for last in ("weight", "bias")}
    names = (PREFIX + name for path in view.parts for name in view.table.names(path))
    may |= {name for name in names if within(name, saved)}
    if any(_is_tied(view, path) for path in plan):
        head = PREFIX + view.head
        may |= {head + x for x in (".weight", ".base_layer.weight", ".lora_A.weight", ".lora_B.weight")}
        may.add(head + ".token_adapter.trainable_tokens_delta")
    must |= whole | set(row_keys(view, plan).values())
    return must, may - must


def within(name: str, modules: set[str]) -> bool:
    """Whether the tensor is in one of `modules`."""
    return any(name[: dot.start()] in modules for dot in re.finditer(r"\.", name))


# -- Settings


class Chosen(NamedTuple):
    rank: int
    scale: float
    parameter: bool


def adapted_names(view: View, plan: Plan) -> dict[str, Chosen]:
    """What is adapted, by its name in PEFT's settings."""
    out = {}
    for path, adapted in plan.items():
        if not isinstance(adapted, Adapted):
            continue
        names = view.names(path)
        ranks = _by_tensor(adapted.ranks, len(names)).tolist()
        scales = _by_tensor(adapted.scales, len(names)).tolist()
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
    every = {name: view.is_parameter(path) for path in view.matrices for name in view.names(path)}

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
        "exclude_modules": None,
        "layers_to_transform": None,
    } | {key: {re.escape(name): x for name, x in found.items()} for key, found in patterns.items()}


def _tidy(x: float) -> float:
    near = round(x)
    return near if abs(x - near) < 1e-9 * max(1, abs(x)) else x
