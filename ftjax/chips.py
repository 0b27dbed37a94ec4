"""Accelerators by the names that people rent them under: what a chip has, and which slices there are.

    parse("v5e-16")      16 chips, a 4×4 torus
    parse("v5p-8")       4 chips: of v4, v5p and tpu7x Google Cloud counts TensorCores, two a chip
    parse("v5e:4x8")     a slice by its shape
    parse("2xv5e-256")   two slices, joined by the data centre's network
    parse("h100x8")      eight GPUs; 2xh100x8 two nodes of eight

Compute and memory bandwidth are flops.DEVICES'; here is what joins them."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator

from ftjax import flops
from ftjax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """`memory` are the bytes of one jax device that a program may have; `link` the bytes/s that it takes in
    from the chips of its slice or node, over all of its links at once, `network` those from other slices or
    nodes. A name's count is in units of which a chip has `counted`; jax shows `devices` a chip."""

    name: str
    kind: str  # as flops.device knows it
    memory: float
    link: float
    network: float
    host: int  # chips of a host or node
    source: str
    dims: int = 0  # of its torus; 0: a GPU
    counted: int = 1
    devices: int = 1

    @property
    def peak(self) -> flops.Device:
        found = flops.device(self.kind)
        assert found is not None, self.kind
        return found


# Memory of TPUs: what their compiler (libtpu 0.0.42) says is there. Links: half of the bidirectional figure
# of the page, which counts what goes in and what comes out. v4's page has none: six links of 45 GB/s.
_PAGE = flops.CLOUD
_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"
_MACHINE = "NVIDIA's data sheet; a node's network of "
_SHEET = _MACHINE + "NVIDIA's DGX"
CHIPS: dict[str, Chip] = {
    one.name: one
    for one in (
        Chip("v4", "TPU v4", 30.75 * GIB, 270e9, 6.25e9, 4, _BOOK, 3, counted=2),
        Chip("v5e", "TPU v5e", 15.75 * GIB, 200e9, 3.125e9, 8, _PAGE + "v5e", 2),
        Chip("v5p", "TPU v5p", 95.74 * GIB, 600e9, 6.25e9, 4, _PAGE + "v5p", 3, counted=2),
        Chip("v6e", "TPU v6e", 31.25 * GIB, 400e9, 12.5e9, 8, _PAGE + "v6e", 2),
        Chip("tpu7x", "TPU7x", 94.75 * GIB, 300e9, 6.25e9, 4, _PAGE + "tpu7x", 3, counted=2, devices=2),
        Chip("h100", "H100", 80e9, 450e9, 50e9, 8, _SHEET),
        Chip("h100-pcie", "H100 PCIe", 80e9, 64e9, 25e9, 8, _SHEET),
        Chip("h200", "H200", 141e9, 450e9, 50e9, 8, _SHEET),
        Chip("b200", "B200", 180e9, 900e9, 50e9, 8, _SHEET),
        Chip("a100", "A100", 80e9, 300e9, 25e9, 8, _SHEET),
        Chip("a100-40", "A100-SXM4-40GB", 40e9, 300e9, 25e9, 8, _SHEET),
        Chip("l4", "L4", 24e9, 32e9, 1.5625e9, 8, _MACHINE + "Google's g2-standard-96"),
        Chip("l40s", "L40S", 48e9, 32e9, 6.25e9, 8, _MACHINE + "AWS's g6e.48xlarge"),
    )
}
ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
    "v7x": "tpu7x",
    "v7": "tpu7x",
    "ironwood": "tpu7x",
    "a100-80": "a100",
    "a100-80gb": "a100",
    "a100-40gb": "a100-40",
    "h100-sxm": "h100",
}
# The shapes of v5e and v6e (cloud.google.com/tpu/docs/v5e, v6e): chips -> torus
FLAT = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
# and of v4, v5p and tpu7x that are no whole number of cubes of 4×4×4
PARTS = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
_EXAMPLES = "v5e-16, v5p-8, v6e:4x8, 2xv5e-256, h100x8, a100"


@dataclasses.dataclass(frozen=True)
class Slice:
    """`slices` times a slice or node of `chips`; `shape` is a TPU's torus, () of GPUs."""

    chip: Chip
    chips: int
    slices: int = 1
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        times = f"{self.slices}x" if self.slices > 1 else ""
        if self.is_tpu:
            return f"{times}{self.chip.name}-{self.chips * self.chip.counted}"
        return f"{times}{self.chip.name}" + (f"x{self.chips}" if self.chips > 1 or times else "")

    @property
    def is_tpu(self) -> bool:
        return self.chip.dims > 0

    @property
    def devices(self) -> int:
        """jax devices, over all slices."""
        return self.chips * self.chip.devices * self.slices

    @property
    def total(self) -> int:
        """Chips, over all slices."""
        return self.chips * self.slices

    @property
    def copies(self) -> int:
        """Of the model, at the least: a TPU slice's own; nodes of GPUs may share one (mesh.count_slices)."""
        return self.slices if self.is_tpu else 1

    @property
    def topology(self) -> str:
        """As libtpu names one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def said(self) -> str:
        kind = self.chip.peak.kind if self.is_tpu else self.chip.name.upper()
        one = f"{self.chips} {kind} chip{'s' * (self.chips > 1)}" if self.is_tpu else f"{self.chips} {kind}"
        shape = f", {'×'.join(map(str, self.shape))}" if self.is_tpu else ""
        what = "slices" if self.is_tpu else "nodes"
        return f"{one}{shape}" if self.slices == 1 else f"{self.slices} {what} of {one}{shape}"


def parse(text: str) -> Slice:
    """The slice of a name (the module has examples). UserError for a kind that is not known, and for a count
    or a shape that is not rented, with those that are."""
    found = re.fullmatch(r"(?:(\d+)x)?(?:tpu[- ]?)?(.+?)", text.strip().lower().replace("_", "-"))
    assert found is not None
    slices, rest = int(found[1] or 1), found[2]
    if slices < 1:
        raise UserError(f"--on {text}: at least one slice")
    if rest.startswith("7x"):  # of tpu7x, which the prefix was taken from
        rest = "tpu" + rest
    if ":" in rest and (tpu := _tpu(rest.partition(":")[0])):
        sizes = rest.partition(":")[2].split("x")
        if len(sizes) != tpu.dims or not all(size.isdigit() and int(size) for size in sizes):
            example = "x".join(["4"] * tpu.dims)
            raise UserError(f"--on {text}: a slice of {tpu.name} has {tpu.dims} sizes: {tpu.name}:{example}")
        shape = tuple(map(int, sizes))
        if not _exists(tpu, shape):
            raise UserError(f"--on {text}: there is no such slice: {_sizes(tpu)}")
        return Slice(tpu, math.prod(shape), slices, shape)
    name, dash, count = rest.rpartition("-")
    if dash and count.isdigit() and (tpu := _tpu(name)):
        return _of_count(tpu, int(count), slices, text)
    if tpu := _tpu(rest):
        raise UserError(
            f"--on {text}: how many? {_sizes(tpu)}; or a shape, {tpu.name}:{'x'.join('4' * tpu.dims)}"
        )
    gpu = re.fullmatch(r"(.+?)(?:[x:](\d+))?", rest)
    assert gpu is not None
    chip = known(gpu[1])
    if chip is None or chip.dims:
        names = sorted({*CHIPS, *ALIASES})
        near = difflib.get_close_matches(re.sub(r"[-x:]\d+$", "", rest), names, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"--on {text}: no such accelerator{hint} (there are {', '.join(CHIPS)}, written like {_EXAMPLES})"
        )
    if gpu[2] is None:  # 8xh100
        return _gpus(chip, slices, text)
    return _gpus(chip, int(gpu[2]), text) if slices == 1 else Slice(chip, int(gpu[2]), slices)


def known(name: str) -> Chip | None:
    """The chip of a name or an alias."""
    name = name.lower()
    return CHIPS.get(ALIASES.get(name, name))


def _tpu(name: str) -> Chip | None:
    chip = known(name)
    return chip if chip is not None and chip.dims else None


def _gpus(chip: Chip, count: int, text: str) -> Slice:
    """`count` of them, in nodes."""
    if count < 1:
        raise UserError(f"--on {text}: at least one")
    if count > chip.host and count % chip.host:
        raise UserError(f"--on {text}: {count} {chip.name} are no whole nodes of {chip.host}")
    return Slice(chip, min(count, chip.host), max(1, count // chip.host))


def _of_count(chip: Chip, count: int, slices: int, text: str) -> Slice:
    shape = torus(chip, count // chip.counted) if count % chip.counted == 0 else None
    if shape is None:
        raise UserError(f"--on {text}: there is no such slice: {_sizes(chip)}")
    return Slice(chip, count // chip.counted, slices, shape)


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Of v5e and v6e the shapes of FLAT; of the others parts of a cube, and whole cubes of 4×4×4. One chip is
    what programs are compiled for that use one."""
    if chip.dims == 2:
        return shape in FLAT.values()
    return shape in {(1, 1, 1), *PARTS.values()} or all(size % 4 == 0 for size in shape)


def _sizes(chip: Chip) -> str:
    counts = ", ".join(f"{chip.name}-{n * chip.counted}" for n in (FLAT if chip.dims == 2 else [*PARTS, 64]))
    more = "" if chip.dims == 2 else " and further multiples of 64 chips"
    per = " (two TensorCores a chip are counted)" if chip.counted > 1 else ""
    return f"{chip.name} comes as {counts}{more}{per}"


@functools.cache
def torus(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """The usual shape of so many chips, None where there is none: of whole cubes the one that is most nearly
    a cube."""
    if chip.dims == 2:
        return FLAT.get(chips)
    if chips in PARTS:
        return PARTS[chips]
    cubes = chips // 64
    if chips % 64 or not cubes:
        return None
    sizes = [
        (a, b, cubes // a // b)
        for a in range(1, cubes + 1)
        for b in range(a, cubes + 1)
        if cubes % (a * b) == 0 and b <= cubes // a // b
    ]
    return tuple(4 * n for n in min(sizes, key=sum))


def sizes(chip: Chip, most: int = 256) -> Iterator[Slice]:
    """Slices of up to `most` chips, or of GPUs one to a node and whole nodes, from the smallest on."""
    count = 1
    while count <= most:
        if not chip.dims:
            yield Slice(chip, min(count, chip.host), max(1, count // chip.host))
        elif (shape := torus(chip, count)) is not None:
            yield Slice(chip, count, 1, shape)
        count *= 2
