"""Reading a profiler's trace (xplane.pb): what each operation was, and where the time of the steps went.

A trace holds the compiled programs (HLO protos, in the plane "/host:metadata") and, by device, when each of
their operations ran. What an operation is comes from its program, by name; a kernel that no program knows (in
a CUDA graph, of a library) is judged by its own name. The programs are read field by field (protobuf's wire
format; numbers from openxla/xla's hlo.proto and tsl's xplane.proto), so neither TensorFlow nor a protobuf
package is needed.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

# Where several run at once on a device, the instant counts for the first of these: what is left to the others
# is the time that they hold the device up.
CATEGORIES: tuple[str, ...] = ("matmul", "attention", "other", "collectives", "copies")

COLLECTIVES = (
    "all-reduce all-gather reduce-scatter all-to-all ragged-all-to-all collective-permute "
    "collective-broadcast"
).split()
PRODUCTS = ("dot", "convolution", "ragged-dot", "scaled-dot")
CONTAINERS = ("while", "conditional", "call")  # their parts are in the trace, too
# Instructions that only move data. In a fusion the free ones beside them do not make it more than that.
MOVES = (
    "copy copy-start copy-done transpose slice dynamic-slice dynamic-update-slice concatenate pad reverse "
    "send send-done recv recv-done infeed outfeed slice-start slice-done"
).split()
FREE = "parameter constant bitcast reshape tuple get-tuple-element broadcast iota convert".split()

_KERNELS = (  # of NVIDIA's, AMD's and XLA's own; the first that matches decides
    ("collectives", re.compile(r"nccl|rccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|nvshmem")),
    (
        "copies",
        re.compile(r"memcpy|memset|^copy|wrapped_copy|(wrapped|input|loop)_transpose|transpose_fusion"),
    ),
    ("copies", re.compile(r"(dynamic_update_slice|dynamic_slice|concatenate|pad|copy)_fusion")),
    ("attention", re.compile(r"fmha|flash|sdpa|mha_|attention|attn|splash")),
    (
        "matmul",
        re.compile(
            r"gemm|cutlass|cublas|nvjet|wgmma|xmma|s16816|s1688|matmul|gemv|splitk|cijk_|\bdot\b|_dot_|ynn_fusion"
        ),
    ),
)
_CALLS = (  # custom_call_target
    ("attention", re.compile(r"fmha|cudnn\$.*attention|flash|splash", re.I)),
    ("matmul", re.compile(r"gemm|cublas|matmul|\$dot", re.I)),
    ("collectives", re.compile(r"nccl|collective|all_reduce", re.I)),
)
_ATTENTION = re.compile(r"\battention\b")  # the scope that models.decoder names


def by_kernel(name: str) -> str:
    """The category that a kernel's own name speaks of."""
    name = name.lower()
    return next((category for category, pattern in _KERNELS if pattern.search(name)), "other")


# -- Protobuf's wire format


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, int or bytes) of a message."""
    i, end = 0, len(data)

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            byte = data[i]
            i += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while i < end:
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, data[i : i + size]
        i += size


def _message(data) -> dict[int, list]:
    """{field number: [value, …]}."""
    found: dict[int, list] = collections.defaultdict(list)
    for number, value in _fields(data):
        found[number].append(value)
    return found


def _text(message: Mapping[int, list], number: int) -> str:
    return bytes(message[number][0]).decode(errors="replace") if message.get(number) else ""


def _numbers(message: Mapping[int, list], number: int) -> list[int]:
    """A repeated integer, packed or not."""
    out = []
    for value in message.get(number, ()):
        if isinstance(value, int):
            out.append(value)
            continue
        wrapped, shift = 0, 0
        for byte in value:
            wrapped |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                out.append(wrapped)
                wrapped = shift = 0
    return out


# -- Programs


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction of a program: its category, None where it only contains others; FLOPs of the products in
    it that are known from shapes; `label`, where in the model it stands."""

    category: str | None
    flops: int
    label: str


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """Axes of a convolution, and of each spatial one its window (size, stride, padding before, dilation of
    the window, of the base): what a TPU makes of a product with several axes."""

    kernel_in: int
    batch_out: int
    feature_out: int
    spatial_in: list[int]
    spatial_out: list[int]
    window: list[tuple[int, int, int, int, int]]

    @classmethod
    def read(cls, instruction: Mapping[int, list]) -> "_Convolution":
        m = _message(instruction[16][0])
        window = _message(instruction[15][0]) if instruction.get(15) else {}
        rows = []
        for one in map(_message, window.get(1, ())):
            size, stride, low, dilation, base = ((one.get(i) or [0])[0] for i in (1, 2, 3, 5, 6))
            low -= (low >> 63) << 64  # a negative int64
            rows.append((size, stride or 1, low, dilation or 1, base or 1))
        first = lambda number: (m.get(number) or [0])[0]  # noqa: E731
        return cls(first(3), first(9), first(10), _numbers(m, 11), _numbers(m, 12), rows)

    def flops(self, dims: list[int], base: list[int], kernel: list[int]) -> int:
        """Without the taps that fall on padding."""
        total = 2 * dims[self.batch_out] * dims[self.feature_out] * kernel[self.kernel_in]
        for i, o, window in zip(self.spatial_in, self.spatial_out, self.window, strict=True):
            total *= _taps(dims[o], base[i], window)
        return total


@functools.lru_cache(4096)
def _taps(outputs: int, inputs: int, window: tuple[int, int, int, int, int]) -> int:
    """Pairs of an output and a tap of the window that falls on an input."""
    size, stride, low, dilation, base = window
    at = np.arange(outputs)[:, None] * stride + np.arange(size)[None] * dilation - low
    return int(np.sum((at >= 0) & (at % base == 0) & (at // base < inputs)))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    dims: list[int]
    op_name: str
    target: str
    config: str
    contracting: list[int]  # of a dot's left side
    convolution: "_Convolution | None"
    operands: list[int]
    called: list[int]

    @classmethod
    def read(cls, data) -> "tuple[int, _Instruction]":
        m = _message(data)
        shape = _message(m[3][0]) if m.get(3) else {}
        metadata = _message(m[7][0]) if m.get(7) else {}
        dot = _message(m[30][0]) if m.get(30) else {}
        return (m.get(35) or [0])[0], cls(
            name=_text(m, 1),
            opcode=_text(m, 2),
            dims=_numbers(shape, 3),
            op_name=_text(metadata, 2),
            target=_text(m, 28),
            config=_text(m, 43),
            contracting=_numbers(dot, 1),
            convolution=_Convolution.read(m) if m.get(16) else None,
            operands=_numbers(m, 36),
            called=_numbers(m, 38),
        )


def read_program(proto: bytes | memoryview) -> dict[str, Op]:
    """{instruction's name: what it is} of an HloProto."""
    module = _message(_message(memoryview(proto))[1][0])
    computations: dict[int, dict[int, _Instruction]] = {}
    for data in module.get(3, ()):
        message = _message(data)
        rows = dict(_Instruction.read(x) for x in message.get(2, ()))
        computations[message[5][0]] = rows

    def inside(one: _Instruction) -> Iterator[tuple[_Instruction, dict[int, _Instruction]]]:
        for at in one.called:
            for inner in computations.get(at, {}).values():
                yield inner, computations[at]
                yield from inside(inner)

    found = {}
    for rows in computations.values():
        for one in rows.values():
            parts = [(one, rows)]
            if one.opcode not in CONTAINERS:
                parts += inside(one)
            found[one.name] = _classify(one, parts)
    return found


def _classify(one: _Instruction, parts: list[tuple[_Instruction, dict[int, _Instruction]]]) -> Op:
    flops = sum(_flops(inner, rows) for inner, rows in parts)
    label = _label(one)
    if one.opcode in CONTAINERS:
        return Op(None, 0, label)
    opcodes = [inner.opcode for inner, _ in parts]
    products = [inner for inner, _ in parts if inner.opcode in PRODUCTS]
    # a TPU's product may hold a collective that it hides
    talks = any(code.removesuffix("-start").removesuffix("-done") in COLLECTIVES for code in opcodes)
    if talks and not products:
        return Op("collectives", flops, label)
    for inner, _ in parts:
        named = next((c for c, p in _CALLS if inner.target and p.search(inner.target)), None)
        if named == "matmul":
            products.append(inner)
        elif named:
            return Op(named, flops, label)
    if products or _gemm_fusion(one):
        of = products or [one]
        attends = all(_ATTENTION.search(inner.op_name or one.op_name) for inner in of)
        return Op("attention" if attends else "matmul", flops, label)
    if _ATTENTION.search(one.op_name):
        return Op("attention", flops, label)
    # scalars (a slice's bounds) do not make a move more than that
    rest = {
        inner.opcode
        for inner, _ in (parts[1:] or parts)
        if math.prod(inner.dims) > 1 and inner.opcode not in FREE
    }
    if rest <= set(MOVES) and (rest or one.opcode in MOVES):
        return Op("copies", flops, label)
    return Op("other", flops, label)


def _gemm_fusion(one: _Instruction) -> bool:
    return "__triton_gemm" in one.config or "__triton_nested_gemm" in one.config


def _label(one: _Instruction) -> str:
    """The last parts of its path in the traced program, or its own name without number."""
    parts = [p for p in one.op_name.split("/") if p]
    path = "/".join(parts[-2:]) if parts else re.sub(r"[._]\d+$", "", one.name)
    return path[-70:]


def _flops(one: _Instruction, rows: Mapping[int, _Instruction]) -> int:
    """2 · outputs · contracted, for a product whose operands' shapes are known."""
    sides = [rows[i].dims for i in one.operands[:2] if i in rows]
    if len(sides) < 2:
        return 0
    if one.opcode == "dot":
        return 2 * math.prod(one.dims) * math.prod(sides[0][i] for i in one.contracting)
    if one.convolution is not None:
        return one.convolution.flops(one.dims, *sides)
    if one.opcode == "custom-call" and "gemm" in one.target:
        try:
            config = json.loads(one.config)
            gemm = config.get("gemm_backend_config", config)
            axes = gemm["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        except (ValueError, KeyError, TypeError):
            return 0
        contracted = math.prod(sides[0][int(i)] for i in axes)
        batch = gemm["dot_dimension_numbers"].get("lhs_batch_dimensions", ())
        outer = [n for i, n in enumerate(sides[0]) if str(i) not in map(str, (*axes, *batch))]
        right = math.prod(sides[1]) // contracted
        return 2 * math.prod(outer) * right * contracted
    return 0


def programs(file: str | os.PathLike) -> dict[str, dict[str, Op]]:
    """{module: its instructions} of the programs that a trace holds."""
    found = {}
    for number, plane in _fields(memoryview(pathlib.Path(file).read_bytes())):
        message = _message(plane) if number == 1 else {}
        if _text(message, 2) != "/host:metadata":
            continue
        for entry in message.get(4, ()):
            event = _message(_message(entry)[2][0])
            name = re.sub(r"\(\d+\)$", "", _text(event, 2))
            for stat in map(_message, event.get(5, ())):
                if 6 in stat:
                    found.setdefault(name, {}).update(read_program(stat[6][0]))
    return found


# -- Events


@dataclasses.dataclass(frozen=True)
class Event:
    """An operation at work: nanoseconds of the trace's clock."""

    start: float
    end: float
    name: str
    module: str = ""
    kernel: str = ""


def events(data: Any) -> dict[str, list[Event]]:
    """{device: its operations} of a jax.profiler.ProfileData: of CPUs those that ran on any thread."""
    found: dict[str, list[Event]] = collections.defaultdict(list)
    for plane in data.planes:
        if re.match(r"/device:(GPU|TPU):\d+$", plane.name):
            lines = list(plane.lines)
            streams = [x for x in lines if x.name.startswith("Stream")]
            for line in streams or [x for x in lines if x.name in ("XLA Ops", "Async XLA Ops")]:
                for event in line.events:
                    stats = dict(event.stats)
                    name = str(stats.get("hlo_op") or event.name)
                    if not streams and (written := re.match(r"%?([\w.\-]+) =", event.name)):
                        name = written[1]
                    found[plane.name].append(
                        Event(
                            event.start_ns,
                            event.end_ns,
                            name,
                            str(stats.get("hlo_module", "")),
                            event.name if streams else "",
                        )
                    )
        elif plane.name == "/host:CPU":
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if "hlo_op" not in stats:
                        continue
                    device = f"/device:CPU:{stats.get('device_ordinal', 0)}"
                    found[device].append(
                        Event(
                            event.start_ns,
                            event.end_ns,
                            str(stats["hlo_op"]),
                            str(stats.get("hlo_module", "")),
                        )
                    )
    return dict(found)


def find(event: Event, known: Mapping[str, Mapping[str, Op]]) -> Op:
    """What an event is: by its program, else by its name."""
    modules = [known[event.module]] if event.module in known else list(known.values())
    by_name = by_kernel(event.kernel) if event.kernel else "other"
    for name in (event.name, event.name.replace("_", ".")):
        for module in modules:
            if name not in module:
                continue
            op = module[name]
            # of the kernels that an operation runs, some only prepare (transposes, resets)
            if op.category and by_name in ("collectives", "copies") and event.kernel != event.name:
                return dataclasses.replace(op, category=by_name)
            return op
    label = re.sub(r"[._]\d+$", "", event.name)[:70]
    return Op(by_kernel(event.kernel or event.name), 0, label)


# -- The breakdown


@dataclasses.dataclass
class Part:
    """Of a category, a device's mean: milliseconds that count for it, those in which it ran at all, runs."""

    milliseconds: float = 0.0
    running: float = 0.0
    count: float = 0.0


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Where the time of the traced steps went, by category and a device's mean; `flops` are those of the
    products executed, recomputation included, as far as shapes say them; `top` [(label, category,
    milliseconds, count), …] the operations that took longest."""

    devices: int
    parts: dict[str, Part]
    flops: float
    top: list[tuple[str, str, float, float]]


def breakdown(file: str | os.PathLike, top: int = 12) -> Breakdown:
    """Of a trace file. ValueError where it holds no operation of any device."""
    return of_events(events(jax.profiler.ProfileData.from_file(os.fspath(file))), programs(file), top)


def of_events(
    by_device: Mapping[str, Iterable[Event]], known: Mapping[str, Mapping[str, Op]], top: int = 12
) -> Breakdown:
    parts = {name: Part() for name in CATEGORIES}
    longest: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    flops, devices = 0.0, max(len(by_device), 1)
    for listed in by_device.values():
        spans: list[tuple[float, float, str]] = []
        for event in listed:
            op = find(event, known)
            if op.category is None:
                continue
            spans.append((event.start, event.end, op.category))
            flops += op.flops / devices
            parts[op.category].count += 1 / devices
            record = longest[op.label, op.category]
            record[0] += (event.end - event.start) / 1e6 / devices
            record[1] += 1 / devices
        for category, (counted, running) in _sweep(spans).items():
            parts[category].milliseconds += counted / 1e6 / devices
            parts[category].running += running / 1e6 / devices
    if not longest:
        raise ValueError("the trace holds no operation of a device")
    ranked = sorted(longest.items(), key=lambda item: -item[1][0])[:top]
    rows = [(label, category, *record) for (label, category), record in ranked]
    return Breakdown(devices, parts, flops, rows)  # type: ignore[arg-type]


def _sweep(spans: list[tuple[float, float, str]]) -> dict[str, tuple[float, float]]:
    """{category: (ns that count for it, ns in which it ran at all)} of possibly overlapping spans."""
    edges = sorted([(start, 1, c) for start, _, c in spans] + [(end, -1, c) for _, end, c in spans])
    running = dict.fromkeys(CATEGORIES, 0)
    counted, ran = dict.fromkeys(CATEGORIES, 0.0), dict.fromkeys(CATEGORIES, 0.0)
    before = edges[0][0] if edges else 0.0
    for at, change, category in edges:
        if at > before:
            first = next((c for c in CATEGORIES if running[c]), None)
            if first:
                counted[first] += at - before
            for c in CATEGORIES:
                if running[c]:
                    ran[c] += at - before
        before = at
        running[category] += change
    return {c: (counted[c], ran[c]) for c in CATEGORIES}
