"""Meshes, and the two dicts that say over which mesh axes each axis letter is split. docs/sharding.md says
when to use which."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ftjax import lora, optim
from ftjax.errors import UserError
from ftjax.ops import target
from ftjax.train import TrainState
from ftjax.weights import Rules, Table, spec, unflatten, weight_sharding

# In their order letters take those of their axes that are left (`weights.spec`): an expert's weight is split
# by experts over ep and by its hidden axis over fsdp and cp, every other by its hidden axis over all three.
WEIGHT_RULES: Rules = {
    "E": ("ep",),
    **dict.fromkeys("NKFMIV", ("sp", "tp")),
    "D": ("fsdp", "ep", "cp"),
}
# T comes after what sp splits inside a layer: between the layers, where nothing else takes sp, it splits T; S
# is T where it does not. X is what is together on a device (`ops.layers.by_device`), E which mesh axis the
# experts are on; O and Z are the tokens and the hidden axis of what is looked up (`ops.embed`).
ACTIVATION_RULES: Rules = {
    **dict.fromkeys("NKFV", ("sp", "tp")),
    "B": ("dp", "fsdp", "ep"),
    "T": ("cp", "sp"),
    "S": ("cp",),
    "X": ("dp", "fsdp", "ep", "cp"),
    "E": ("ep",),
    "O": ("dp",),
    "Z": WEIGHT_RULES["D"],
}


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """The shape of the device mesh; one axis may be -1, which takes the devices that are left."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    dp: int = 1
    """Copies of the model, over which rows of the batch are split; of several slices, at least one a
    slice."""
    fsdp: int = -1
    """Devices over which rows of the batch, and each weight's hidden axis, are split."""
    ep: int = 1
    """Devices over which the experts of each layer are split; for all else as fsdp."""
    cp: int = 1
    """Devices over which each row's positions are split, attention's queries with them; weights as fsdp."""
    sp: int = 1
    """As tp, and between attention and MLP each row's positions are split as well, which saves memory."""
    tp: int = 1
    """Devices over which heads, the MLP's inner axis and the vocabulary are split."""


AXES = tuple(field.name for field in dataclasses.fields(MeshOptions))  # from the slowest links to the fastest
AUTO = (AxisType.Auto,) * len(AXES)


def sizes(options: MeshOptions, n: int, slices: int = 1) -> dict[str, int]:
    """{axis: its size} of a mesh of n devices. UserError where the shape does not divide them, or where
    slices would hold parts of one copy of the model."""
    shape = dataclasses.asdict(options)
    given = {k: v for k, v in shape.items() if v != -1}
    if len(given) < len(shape) - 1 or any(v < 1 for v in given.values()):
        raise UserError(f"mesh: {said(shape)}: each axis is a count of devices, and at most one is -1")
    used = math.prod(given.values())
    if len(given) < len(shape):
        if n % used:
            raise UserError(
                f"{_parts(given, tuple(given))[1]} does not divide the {n} devices; {_divisors(n)} would"
            )
        shape |= {k: n // used for k in shape if k not in given}
    elif used != n:
        raise UserError(
            f"mesh: {said(shape)} is {used} devices, there are {n}: one set to -1 takes what is left"
        )
    if shape["dp"] % slices:
        raise UserError(
            f"mesh.dp={shape['dp']}: the {n} devices are {slices} slices, and only copies of the model "
            f"go over several: dp must be {slices} or a multiple"
        )
    return shape


def make_mesh(options: MeshOptions, devices=None) -> Mesh:
    """A mesh with AXES over all devices, `dp` over slices first. UserError as `sizes`."""
    devices = jax.devices() if devices is None else devices
    slices = count_slices(devices)
    shape = sizes(options, len(devices), slices)
    if slices == 1:
        return jax.make_mesh(tuple(shape.values()), AXES, axis_types=AUTO, devices=devices)
    inner = tuple((shape | {"dp": shape["dp"] // slices}).values())
    outer = tuple((dict.fromkeys(AXES, 1) | {"dp": slices}).values())
    return Mesh(mesh_utils.create_hybrid_device_mesh(inner, outer, devices), AXES, axis_types=AUTO)


def count_slices(devices) -> int:
    """Of TPUs; nodes of GPUs are joined by links that are fast enough for any axis."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})  # topologies of one have none


def abstract(options: MeshOptions, n: int, slices: int = 1) -> AbstractMesh:
    """The mesh without its devices: to say how arrays would lie on so many."""
    return AbstractMesh(tuple(sizes(options, n, slices).values()), AXES, axis_types=AUTO)


def said(shape) -> str:
    """ "fsdp=4 × tp=2": the axes of more than one device."""
    return " × ".join(f"{k}={v}" for k, v in shape.items() if v != 1) or "one device"


def _divisors(n: int) -> str:
    return ", ".join(map(str, _factors(n)))


def _parts(shape: Mapping[str, int], names: tuple[str, ...]) -> tuple[int, str]:
    """(the product of these axes, what of the config makes it)."""
    used = {name: shape[name] for name in names if shape[name] > 1}
    return math.prod(used.values()), " · ".join(f"mesh.{k}={v}" for k, v in used.items())


def check(mesh: Mesh | AbstractMesh, table: Table, rows: int, length: int | None = None) -> None:
    """UserError where an axis of the model, the rows of a microbatch or their length do not divide over the
    mesh."""
    if why := _refused(mesh.shape, table, rows, length):
        raise UserError(why)


def _refused(shape: Mapping[str, int], table: Table, rows: int, length: int | None) -> str | None:
    fields = {
        "D": "hidden_size",
        "N": "num_attention_heads",
        "K": "num_key_value_heads",
        "F": "intermediate_size",
        "M": "moe_intermediate_size",
        "I": "shared experts' inner size",
        "E": "number of experts",
    }
    used = {letter for path in table.rows for letter in table.dims(path)}
    for letter, names in WEIGHT_RULES.items():
        if letter not in used or letter not in fields:
            continue
        size, (parts, which) = table.sizes[letter], _parts(shape, names)
        if size % parts:
            return f"{which} does not divide the model's {fields[letter]}={size}; {_divisors(size)} would"
    parts, which = _parts(shape, ACTIVATION_RULES["B"])
    if rows % parts:
        return (
            f"{which} does not divide the {rows} rows of a microbatch (train.batch_size / "
            f"train.microbatches): {parts} rows or a multiple would, or mesh: auto, or {_divisors(rows)} "
            "devices for them"
        )
    if shape["ep"] > 1 and "E" not in used:
        return f"mesh.ep={shape['ep']}: the model has no experts; mesh.fsdp would split it"
    parts, which = _parts(shape, ACTIVATION_RULES["T"])
    parts *= 2 if shape["cp"] > 1 else 1  # for the zig-zag order
    if length is not None and length % parts:
        return (
            f"{which} needs rows of a multiple of {parts} tokens, not {length}: data.max_length="
            f"{-(-length // parts) * parts} (and every one of data.buckets) would do"
        )


LONG = 2048  # positions of a row on a device that keep it as busy as rows of their own would


def shapes(
    count: int, slices: int, table: Table, rows: int, length: int, *, cut_rows: bool
) -> list[MeshOptions]:
    """The meshes of `count` devices in so many `slices` that divide the model and a microbatch of `rows`, the
    one to be preferred first; UserError where none does.

    Copies of the model go over slices only. Within one it is fsdp, as far as rows and memory allow; then cp
    for long rows (where `cut_rows`), ep for experts, and sp, or tp where the rows do not divide over sp."""
    found: list[tuple[tuple, MeshOptions]] = []
    each, why = count // slices, ""
    for cut in _factors(each):
        for ep in _factors(cut):
            for inner, axis in itertools.product(_factors(cut // ep), ("sp", "tp")):
                shape = dict.fromkeys(AXES, 1) | dict(dp=slices, fsdp=each // cut, ep=ep)
                shape |= {"cp": cut // ep // inner, axis: inner}
                refused = "" if cut_rows or shape["cp"] == 1 else "rows that may not be cut"
                refused = refused or _refused(shape, table, rows, length)
                why = why or refused or ""
                if not refused and (inner > 1 or axis == "sp"):
                    long = length // shape["cp"] >= LONG  # what is left of a row is still one
                    order = (cut, shape["cp"] > 1 and not long, inner, axis, ep)
                    found.append((order, MeshOptions(**shape)))
    if not found:
        raise UserError(f"mesh: auto finds no shape of {count} devices that divides: {why}")
    return [shape for _, shape in sorted(found, key=lambda one: one[0])]


def _factors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def weight_rules(mesh: Mesh, table: Table) -> Rules:
    """WEIGHT_RULES; a vocabulary that tp does not divide is whole on every device (its logits are split even
    so)."""
    whole = "V" in table.sizes and table.sizes["V"] % _parts(mesh.shape, WEIGHT_RULES["V"])[0]
    return {k: names for k, names in WEIGHT_RULES.items() if k != "V" or not whole}


def adapter_shardings(mesh: Mesh, plan: lora.Plan, table: Table) -> dict:
    rules = weight_rules(mesh, table)
    return unflatten(
        {path: weight_sharding(axes, rules, mesh) for path, axes in lora.axes(plan, table).items()}
    )


def state_shardings(mesh: Mesh, tx, trainable) -> TrainState:
    """Shardings of `tx`'s state: moments as their weights, all else on every device. `trainable` may be of
    arrays or of shapes with shardings."""
    like, whole = jax.tree.map(lambda x: x.sharding, trainable), sharding(mesh, "")
    moments = optim.state_shardings(tx, trainable, like, whole)
    return TrainState(step=whole, trainable=like, opt_state=moments, finite=whole)  # type: ignore[arg-type]


def sharding(mesh: Mesh, axes: str, rules: Rules = WEIGHT_RULES) -> NamedSharding:
    """An array whose axes are `axes`, each where the rules have it; "" is whole on every device."""
    return NamedSharding(mesh, spec(axes, rules, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every batch leaf [A, B, …]: by rows; the devices of cp all have the whole of theirs, a few
    integers."""
    return sharding(mesh, "AB", ACTIVATION_RULES)


def rows_here(mesh: Mesh, count: int) -> list[int]:
    """Of the `count` rows of a microbatch, those of which this process's devices hold a part."""
    return sorted(_rows_by_process(mesh, count)[jax.process_index()])


def part_here(mesh: Mesh) -> tuple[int, int]:
    """(i, n): n groups of processes hold different rows, and this process is in the i-th."""
    held = {process: sorted(rows) for process, rows in _rows_by_process(mesh, mesh.size).items()}
    groups = sorted({tuple(rows) for rows in held.values()})
    return groups.index(tuple(held[jax.process_index()])), len(groups)


def _rows_by_process(mesh: Mesh, count: int) -> dict[int, set[int]]:
    rows = NamedSharding(mesh, PartitionSpec(batch_sharding(mesh).spec[1]))
    held: dict[int, set[int]] = {}
    for device, index in rows.devices_indices_map((count,)).items():
        assert index is not None
        held.setdefault(device.process_index, set()).update(range(count)[index[0]])
    return held


def put(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A step's batch over all processes, of the rows that each has: `rows_here`, in order."""
    here, all_rows = batch["tokens"].shape[1], mesh.size
    held = len(rows_here(mesh, all_rows))
    count = here * all_rows // held
    at = {row: i for i, row in enumerate(rows_here(mesh, count))}
    sharding = batch_sharding(mesh)

    def one(x: np.ndarray) -> jax.Array:
        def part(index):
            rows = range(count)[index[1]]
            first = at[rows[0]]
            return x[(index[0], slice(first, first + len(rows)), *index[2:])]

        return jax.make_array_from_callback((x.shape[0], count, *x.shape[2:]), sharding, part)

    return {name: one(x) for name, x in batch.items()}


@contextlib.contextmanager
def use(mesh: Mesh):
    """Within it, `ops.shard` constrains activations by ACTIVATION_RULES, and programs are traced for the
    mesh's kind of device, which may be that of a topology that is not at hand."""
    kind = target.kind_of(mesh.devices.flat[0].platform)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(ACTIVATION_RULES.items())), target.use(kind):
        yield mesh
