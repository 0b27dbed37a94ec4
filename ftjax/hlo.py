"""What the text of an optimised program says of its collectives: how many, how large, between how many."""

import collections
import dataclasses
import re
from collections.abc import Iterator
from math import prod

ITEM_BITS = {"pred": 8} | {
    kind + str(bits): bits
    for kind, sizes in {"s": (2, 4, 8, 16, 32, 64), "u": (2, 4, 8, 16, 32, 64), "f": (16, 32, 64)}.items()
    for bits in sizes
}
ITEM_BITS |= {"bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "f4e2m1fn": 4, "c64": 64, "c128": 128}
_COLLECTIVE = re.compile(
    r"= (?P<type>\(?[^=\n]*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    r"collective-permute|collective-broadcast)(?P<start>-start)?\((?P<rest>.*)"
)
# What comes from other slices, by the host: a reduction over several is one within each and this.
_BETWEEN = re.compile(r"= \((?P<type>\w+\[[\d,]*\]).*? (?P<kind>recv)(?P<start>)\(.*xla_megascale")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations|called_computations)=\{?([^},]+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """`bytes` are those of one device's result, `count` its times in a step, `group` the devices it is
    between (0: not known), `first` a group of them by number. A "recv" is from other slices."""

    kind: str
    bytes: int
    count: int
    group: int
    first: tuple[int, ...] = ()

    @property
    def received(self) -> float:
        """Bytes that a device takes in, all its times together, where every byte goes its shortest way round
        a ring."""
        n = max(self.group, 2)
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1,  # `bytes` are one device's part
            "all-to-all": (n - 1) / n,
            "ragged-all-to-all": (n - 1) / n,
        }
        return share.get(self.kind, 1.0) * self.bytes * self.count


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of the collectives in an optimised program's text; bytes are those of one
    device's results. A loop's body is counted once: `of_step` multiplies."""
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for kind, size, _ in each(hlo):
        found[kind]["count"] += 1
        found[kind]["bytes"] += size
    return {kind: found[kind] for kind in sorted(found)}


def each(hlo: str) -> Iterator[tuple[str, int, str]]:
    """(kind, bytes, the operation's name in jax) of the collectives in the text. One that runs beside
    computations stands in the fusion of each, with the number of its chain, and is one."""
    chains = set()
    for computation, lines in _computations(_plain(hlo))[0].items():
        for line in lines:
            if not (match := _COLLECTIVE.search(line)):
                continue
            if chain := _CHAIN.search(line):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            name = _NAME.search(line)
            yield *_kind(match, computation, line), name[1] if name else ""


def _kind(match: re.Match, computation: str, line: str) -> tuple[str, int]:
    """(kind, bytes of a device's result). The compiler for TPUs writes a reduce-scatter as the fusion of an
    all-reduce and the slice of its result, which it names all-reduce-scatter."""
    kind, size = match["kind"], _bytes(match)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter", size // max(_group(line)[0], 1)
    return kind, size


def _plain(hlo: str) -> str:
    return re.sub(r"/\*.*?\*/", "", hlo)


def _bytes(match: re.Match) -> int:
    shapes = _SHAPE.findall(match["type"])
    # A started one's type is (operands, results, …): of a permutation two scalars follow.
    if match["start"] and match["kind"] != "all-reduce":
        shapes = [s for s in shapes if not (s[0] == "u32" and not s[1])]
        shapes = shapes[len(shapes) // 2 :]
    return sum(
        ITEM_BITS.get(item, 32) * prod(map(int, filter(None, dims.split(",")))) // 8 for item, dims in shapes
    )


def of_step(hlo: str, otherwise: int = 1) -> list[Collective]:
    """The collectives of one run of the program, a loop's body as often as it runs.

    A loop runs as often as its condition's constant says, over what its counter is raised by; where no
    constant says so (the loss's loop ends after the last trained token), `otherwise` times. One that is
    spread over several fusions, with the number of its chain, is one."""
    computations, entry = _computations(_plain(hlo))
    found: dict[str, tuple[str, int, int, int, tuple[int, ...]]] = {}

    def walk(name: str, times: int, path: str) -> None:
        for i, line in enumerate(computations.get(name, ())):
            if match := _COLLECTIVE.search(line) or _BETWEEN.search(line):
                chain = _CHAIN.search(line)
                key = f"chain {chain[1]}" if chain else f"{path}/{name}/{i}"
                before = found.get(key)
                if before is None or times < before[2]:  # where it begins: it may go on beside a loop
                    found[key] = *_kind(match, name, line), times, *_group(line)
                continue
            called = _CALLED.findall(line)
            if " while(" in line:
                parts = {kind: target.lstrip("%") for kind, target in called}
                trips = _trips(computations, parts.get("condition", ""), parts.get("body", ""))
                walk(parts.get("body", ""), times * (otherwise if trips is None else trips), path + name)
                continue
            for kind, target in called:
                if kind != "to_apply":
                    for one in target.split(","):
                        walk(one.strip().lstrip("%"), times, f"{path}/{name}/{i}")

    walk(entry, 1, "")
    merged: dict[tuple, int] = collections.Counter()
    for kind, size, times, group, first in found.values():
        merged[kind, size, group, first] += times
    return [Collective(kind, size, n, group, first) for (kind, size, group, first), n in merged.items()]


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    out: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            current = start[2]
            out[current] = []
            entry = current if start[1] else entry
        else:  # a kernel's settings may go over several lines, and end in a brace, too
            out.setdefault(current, []).append(line)
    return out, entry


def _trips(computations: dict[str, list[str]], condition: str, body: str) -> int | None:
    root = next((x for x in computations.get(condition, ()) if x.lstrip().startswith("ROOT")), "")
    compared = re.search(r" compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=(LT|GT)", root)
    if compared is None:
        return None
    names = (compared[1], compared[2]) if compared[3] == "LT" else (compared[2], compared[1])
    counter, most = names[0], _constant(computations[condition], names[1])
    index = re.search(rf"%?{re.escape(counter)} = .*index=(\d+)", "\n".join(computations[condition]))
    if most is None or index is None:
        return None
    return -(-most // _raised_by(computations.get(body, []), int(index[1])))


def _constant(lines: list[str], name: str) -> int | None:
    pattern = re.compile(rf"^\s*(?:ROOT )?%?{re.escape(name)} = [su]\d+\[\]\S* constant\((\d+)\)")
    return next((int(found[1]) for line in lines if (found := pattern.match(line))), None)


def _raised_by(lines: list[str], index: int) -> int:
    """What an iteration adds to that element of the carry, 1 where it can't be seen."""
    root = next((x for x in lines if x.lstrip().startswith("ROOT")), "")
    result = re.search(r" tuple\((.*?)\)", root)
    if result is None:
        return 1
    name = result[1].split(", ")[index].lstrip("%")
    added = re.search(rf"%?{re.escape(name)} = .* add\(%?([\w.\-]+), %?([\w.\-]+)\)", "\n".join(lines))
    values = [v for x in added.groups() if (v := _constant(lines, x)) is not None] if added else []
    return values[0] if values and values[0] > 0 else 1


def _group(line: str) -> tuple[int, tuple[int, ...]]:
    """(devices in a group, one group where they are listed or can be)."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'?([\w.]+)'?=(\d+)", found[1])}
        used = [name for name in re.findall(r"'?([\w.]+)'?", found[2]) if name in sizes]
        devices = [0]
        for name in used:
            after = list(sizes)[list(sizes).index(name) + 1 :]
            stride = prod(sizes[x] for x in after)
            devices = [d + i * stride for d in devices for i in range(sizes[name])]
        return len(devices), tuple(sorted(devices))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        first = tuple(map(int, found[1].split(",")))
        return len(first), first
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return int(found[2]), _iota(int(found[2]), found[3], found[4])
    if "source_target_pairs=" in line:
        pairs = re.findall(r"\{(\d+),(\d+)\}", line[line.index("source_target_pairs=") :])
        return len(pairs), tuple(map(int, pairs[0])) if pairs else ()
    return 0, ()


def _iota(size: int, dims: str, order: str | None) -> tuple[int, ...]:
    """The first group of XLA's short form: all numbers in `dims`, transposed by `order`, cut into groups."""
    shape = list(map(int, dims.split(",")))
    axes = list(map(int, order.split(","))) if order else list(range(len(shape)))
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    group = [0]
    for axis in axes:
        group = [g + i * strides[axis] for g in group for i in range(shape[axis])]
    return tuple(group[:size])
