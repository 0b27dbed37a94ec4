"""Meshes, and the two dicts that say on which mesh axis each axis letter lies."""

import contextlib
import dataclasses
from typing import ClassVar

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ftjax import lora, optim
from ftjax.errors import UserError
from ftjax.weights import Table, unflatten

WEIGHT_RULES = {"D": "fsdp", "N": "tp", "K": "tp", "F": "tp", "M": "tp", "I": "tp", "V": "tp"}
ACTIVATION_RULES = {"B": "fsdp", "N": "tp", "K": "tp", "F": "tp", "V": "tp"}


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """The shape of the device mesh; -1 takes the devices that are left."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    fsdp: int = -1
    """Devices over which rows of the batch, and each weight's hidden axis, are split."""
    tp: int = 1
    """Devices over which heads, the MLP's inner axis and the vocabulary are split."""


def make_mesh(options: MeshOptions, devices=None) -> Mesh:
    """A mesh with axes ("fsdp", "tp") over all devices. UserError where the shape does not divide them."""
    devices = jax.devices() if devices is None else devices
    n, shape = len(devices), {"fsdp": options.fsdp, "tp": options.tp}
    given = {k: v for k, v in shape.items() if v != -1}
    if len(given) == 0 or any(v < 1 for v in given.values()):
        raise UserError(f"mesh: {shape}: each axis is a count of devices, and at most one is -1")
    if len(given) == 1:
        ((name, size),) = given.items()
        other = "tp" if name == "fsdp" else "fsdp"
        if n % size:
            raise UserError(f"mesh.{name}={size} does not divide the {n} devices; {_divisors(n)} would")
        shape[other] = n // size
    elif shape["fsdp"] * shape["tp"] != n:
        raise UserError(
            f"mesh: fsdp={shape['fsdp']} × tp={shape['tp']} is {shape['fsdp'] * shape['tp']} devices, there "
            "are "
            f"{n}: set one of them to -1 to take what is left"
        )
    return jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def check(mesh: Mesh, table: Table, rows: int) -> None:
    """UserError where an axis of the model or the rows of a microbatch do not divide over the mesh."""
    fields = {
        "D": "hidden_size",
        "N": "num_attention_heads",
        "K": "num_key_value_heads",
        "F": "intermediate_size",
        "M": "moe_intermediate_size",
        "I": "shared experts' inner size",
        "V": "vocab_size",
    }
    used = {letter for path in table.rows for letter in table.dims(path)}
    for letter, axis in WEIGHT_RULES.items():
        if letter not in used:
            continue
        size, parts = table.sizes[letter], mesh.shape[axis]
        if size % parts:
            raise UserError(
                f"mesh.{axis}={parts} does not divide the model's {fields[letter]}={size}; {_divisors(size)} "
                "would"
            )
    if rows % mesh.shape["fsdp"]:
        raise UserError(
            f"mesh.fsdp={mesh.shape['fsdp']} does not divide the {rows} rows of a microbatch "
            "(train.batch_size / train.microbatches)"
        )


def sharding(mesh: Mesh, axes: str, rules=WEIGHT_RULES) -> NamedSharding:
    """An array whose axes are `axes`, each on the mesh axis that the rules give it, else replicated."""
    return NamedSharding(mesh, PartitionSpec(*map(rules.get, axes)))


def adapter_shardings(mesh: Mesh, plan: lora.Plan, table: Table) -> dict:
    return unflatten({path: sharding(mesh, axes) for path, axes in lora.axes(plan, table).items()})


def state_shardings(mesh: Mesh, tx, trainable):
    """Shardings of `tx`'s state: moments as their weights, all else on every device."""
    like = jax.tree.map(lambda x: x.sharding, trainable)
    return optim.state_shardings(tx, trainable, like, sharding(mesh, ""))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every batch leaf [A, B, …]."""
    return sharding(mesh, "AB", ACTIVATION_RULES)


@contextlib.contextmanager
def use(mesh: Mesh):
    """Within it, `ops.shard` constrains activations by ACTIVATION_RULES."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(ACTIVATION_RULES.items())):
        yield mesh
