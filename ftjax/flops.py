"""Arithmetic that a training step asks for, counted from the weight table, and what devices can do.

What is counted is what the model needs, not what a program executes: nothing for recomputation, padding,
positions that predict nothing, masked parts of the attention matrix, or elementwise work. So MFU, the share
of a device's peak that these FLOPs are (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), falls with
every waste, and two ways of computing the same step compare by it.

A product with a matrix [I, O] costs 2·I·O FLOPs a token forward, as many for the gradient of its input, and
as many again for the gradient of the matrix where that is trained. Over N weights in such products a token
therefore costs 6N in full tuning and 4N under LoRA, whose base gets no gradient; rank-R factors add
2·R·(I + O) forward and twice that backward. An expert's matrix counts for the tokens that it gets, a look-up
not at all, the head for trained positions alone. Attention costs 2·(Dq + Dv) for each pair of a query and a
key that it sees, Dq and Dv being all heads' widths of queries and of values, and twice that backward.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ftjax import lora
from ftjax.models import Model

PARTS: tuple[str, ...] = ("linear", "experts", "attention", "head", "factors")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch holds: its documents' lengths, and how many of its positions predict a trained token.
    `positions` counts padding too."""

    lengths: tuple[int, ...]
    trained: int
    positions: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @classmethod
    def rows(cls, count: int, length: int) -> "Work":
        """Rows of one document each, of which every token that has one before it is trained."""
        return cls((length,) * count, count * (length - 1), count * length)

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Work":
        """Of a batch (or of several: leaves may lead with any axes) as the data loader gives it."""
        segments = np.asarray(batch["segments"]).reshape(-1, np.shape(batch["segments"])[-1])
        weight = np.asarray(batch["loss_weight"]).reshape(segments.shape)
        lengths = [int(n) for row in segments for n in np.bincount(row)[1:] if n]
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        return cls(tuple(lengths), int(np.sum(same & (weight[:, 1:] != 0))), segments.size)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.lengths + other.lengths, self.trained + other.trained, self.positions + other.positions
        )


def pairs(lengths: Iterable[int], window: int | None = None, chunk: int | None = None) -> int:
    """Pairs of a query and a key that it sees, over documents of these lengths: causal, at most `window`
    positions back, within runs of `chunk` positions."""
    if chunk is not None:
        lengths = [x for n in lengths for x in [chunk] * (n // chunk) + [n % chunk]]
    total = 0
    for n in lengths:
        w = min(n, window or n)
        total += w * (w + 1) // 2 + (n - w) * w
    return total


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by part (PARTS), forward and backward. "factors" are LoRA's."""

    forward: dict[str, int]
    backward: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.forward.values()) + sum(self.backward.values())

    def part(self, name: str) -> int:
        return self.forward.get(name, 0) + self.backward.get(name, 0)


def active_experts(model: Model) -> int:
    """Experts that each token goes to."""
    cfg = model.config
    found = getattr(cfg, "num_experts_per_tok", None) or getattr(cfg, "top_k_experts", None)
    assert found, f"{cfg.model_type} has experts and does not say how many a token goes to"
    return found


def matrices(model: Model) -> dict[str, tuple[str, float]]:
    """{path: (part, weights that a token is multiplied with)} of all rows that are matrices in a product: the
    N of the formula is their sum. The head's is by trained position."""
    found = {}
    for path, row in model.table.rows.items():
        size = math.prod(model.table.shape(path))
        if path == model.head_path:
            found[path] = "head", size
        elif row.many and row.ins:
            count = math.prod(model.table.sizes[x] for x in row.many)
            found[path] = "experts", size * active_experts(model) / count
        elif row.ins and row.role in ("linear", "router"):
            found[path] = "linear", size
    return found


def step(model: Model, plan: lora.Plan | None, work: Work, *, reference: bool = False) -> Flops:
    """FLOPs of one optimiser step on `work` (the module's docstring has the formula); `plan` says what is
    trained, None that every weight is. With `reference` the frozen model's forward pass is added (DPO).

    The gradient of the input counts for every matrix, though nothing below the lowest trained one needs it.
    Not counted: optimiser, norms, biases, convolutions, DoRA's norms.
    """
    forward = dict.fromkeys(PARTS, 0.0)
    backward = dict.fromkeys(PARTS, 0.0)
    for path, (part, size) in matrices(model).items():
        rows = work.trained if part == "head" else work.tokens
        how = lora.Whole() if plan is None else plan.get(path)
        forward[part] += 2 * size * rows
        backward[part] += 2 * size * rows * (1 + _trained_share(how, model, path))
        if isinstance(how, lora.Adapted):
            factors = sum(how.ranks) * (math.prod(model.table.ins(path)) + math.prod(model.table.outs(path)))
            if part == "experts":
                factors *= active_experts(model) / math.prod(
                    model.table.sizes[x] for x in model.table.rows[path].many
                )
            forward["factors"] += 2 * factors * rows
            backward["factors"] += 4 * factors * rows
    forward["attention"] = float(mixing(model, work.lengths))
    backward["attention"] = 2 * forward["attention"]
    if reference:
        forward |= {part: forward[part] * 2 for part in PARTS if part != "factors"}
    return Flops(*({k: round(v) for k, v in each.items()} for each in (forward, backward)))


def _trained_share(how, model: Model, path: str) -> float:
    """The share of a weight's outputs or matrices whose own gradient is formed."""
    if isinstance(how, lora.Whole):
        return sum(how.live) / len(how.live) if how.live else 1.0
    if isinstance(how, lora.Rows):
        return len(how.indices) / model.config.vocab_size
    return 0.0


def mixing(model: Model, lengths: Iterable[int]) -> int:
    """Forward FLOPs between tokens (attention, recurrences) of documents of these lengths, in all layers."""
    lengths = list(lengths)
    windows = model.config.windows or (None,) * model.config.num_hidden_layers
    chunks = getattr(model.config, "chunks", None) or (None,) * model.config.num_hidden_layers
    cached: dict[Any, int] = {}
    total = 0
    for run in model.table.runs:
        for (_, kind), layers in zip(run.blocks, run.layers, strict=True):
            block = model.module_type.block(kind)  # type: ignore[attr-defined]
            for layer in layers:
                seen = windows[layer], chunks[layer]
                if seen not in cached:
                    cached[seen] = pairs(lengths, *seen)
                total += block.mixing_flops(model.config, cached[seen], sum(lengths))
    return total


def formula(plan: lora.Plan | None) -> str:
    """What `step` counts, in a sentence or two for people."""
    if plan is None:
        factor, name = "6N", "N all weights in products"
    elif any(isinstance(how, lora.Adapted) for how in plan.values()):
        factor, name = "4N + 6·R·(I + O) of the factors", "N the base's weights in products (no dW)"
    else:
        factor, name = "4N, 6N where the weight is trained", "N the weights in products"
    return (
        f"model FLOPs a token: {factor} + attention; {name}; look-ups count nothing, the head only at "
        "trained positions, attention 6·(Dq + Dv) for each pair of a query and a key that it sees, experts "
        "for the tokens they get. Recomputation, padding and elementwise work count nothing"
    )


# -- Devices


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates of one jax device: dense bfloat16 FLOP/s, 8-bit ones (int8 where it has no fp8; None where
    neither), memory bytes/s; `source` says whose figures."""

    kind: str
    bf16: float
    eight_bit: float | None
    bandwidth: float
    source: str


CLOUD = "https://cloud.google.com/tpu/docs/"
# Manufacturers' peaks, without sparsity. Where a kind contains several keys the longest decides.
DEVICES = {
    "B200": Device("B200", 2250e12, 4500e12, 8.0e12, "NVIDIA HGX B200 data sheet"),
    "H200": Device("H200", 989e12, 1979e12, 4.8e12, "NVIDIA H200 data sheet"),
    "H100": Device("H100 SXM", 989e12, 1979e12, 3.35e12, "NVIDIA H100 data sheet"),
    "H100 PCIe": Device("H100 PCIe", 756e12, 1513e12, 2.0e12, "NVIDIA H100 data sheet"),
    "H100 NVL": Device("H100 NVL", 835e12, 1671e12, 3.9e12, "NVIDIA H100 NVL product brief"),
    "A100": Device("A100", 312e12, 624e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet"),
    "A100 SXM4 40GB": Device("A100 40GB", 312e12, 624e12, 1.555e12, "NVIDIA A100 40GB SXM data sheet"),
    "L4": Device("L4", 121e12, 242e12, 0.3e12, "NVIDIA L4 data sheet"),
    "L40S": Device("L40S", 362e12, 733e12, 0.864e12, "NVIDIA L40S data sheet"),
    "TPU v4": Device("TPU v4", 275e12, None, 1.2e12, CLOUD + "v4"),
    "TPU v5 lite": Device("TPU v5e", 197e12, 393e12, 0.819e12, CLOUD + "v5e"),
    "TPU v5e": Device("TPU v5e", 197e12, 393e12, 0.819e12, CLOUD + "v5e"),
    "TPU v5": Device("TPU v5p", 459e12, 918e12, 2.765e12, CLOUD + "v5p"),
    "TPU v5p": Device("TPU v5p", 459e12, 918e12, 2.765e12, CLOUD + "v5p"),
    "TPU v6 lite": Device("TPU v6e", 918e12, 1836e12, 1.64e12, CLOUD + "v6e"),
    "TPU v6e": Device("TPU v6e", 918e12, 1836e12, 1.64e12, CLOUD + "v6e"),
    # a chip is two devices, each with half of it
    "TPU7x": Device("TPU7x (half a chip)", 1153.5e12, 2307e12, 3.69e12, CLOUD + "tpu7x"),
}


def device(kind: str) -> Device | None:
    """The peaks of a jax device by its `device_kind`; None for one that is not in the table."""
    words = kind.lower().replace("-", " ").replace("_", " ")
    found = [key for key in DEVICES if f" {key.lower()} " in f" {words} "]
    return DEVICES[max(found, key=len)] if found else None
