"""The least time that a device could take for what a part of benchmarks.gpu asks of it.

A training step is products (their FLOPs by ftjax.flops), attention, elementwise passes over activations, and
LoRA's reads of activations. Each goes at the rate that was reached on an H100 SXM by a bare JAX program, as
shares of the card's peaks: 751 TFLOP/s in the products of an 8B step; in causal attention, forward and
backward together, 307 TFLOP/s of the model's at 2,048 tokens and 409 at 8,192; 3.0 TB/s. The four do not
overlap. Copies to the host and back go beside them.

    python -m benchmarks.bounds
"""

import dataclasses
import math

from ftjax import flops, lora
from ftjax.models import Model

PRODUCTS, MEMORY = 0.76, 0.90  # shares of peak FLOP/s, bytes/s
ATTENTION, LONG_ATTENTION = 0.31, 0.41  # … of FLOP/s where the longest document has up to 4,096 tokens, more
EIGHT_BIT = 1.6  # products with an fp8 base over bfloat16 ones, through XLA's rewriter
HOST = 50e9  # bytes/s to the host and, at the same time, back: PCIe 5.0 × 16
ITEM = 2  # bytes of an activation
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds of one step, by what they are spent on; `saved`, the share of the forward pass that memory and
    offload save from being run again (1: nothing is)."""

    seconds: dict[str, float]
    saved: float = 1.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        return " + ".join(f"{name} {1e3 * s:,.3g}" for name, s in self.seconds.items() if s) + " ms"


def elementwise_bytes(model: Model, positions: int) -> tuple[int, int]:
    """(forward, backward) bytes that norms, rotary positions, the activation and residuals read and write at
    least, each pass reading its inputs and writing its outputs once."""
    s = model.table.sizes
    D, F, kv = s["D"], s["F"], s["K"] * s["H"]
    forward = 12 * D + 4 * kv + 3 * F
    backward = 16 * D + 4 * kv + 5 * F
    return tuple(ITEM * positions * s["L"] * x for x in (forward, backward))  # type: ignore[return-value]


def factor_bytes(model: Model, positions: int) -> tuple[int, int]:
    """(forward, backward) bytes of activations that LoRA's products on all linear layers read at least:
    forward the input once for all weights that share it; backward inputs again, and each output's gradient
    once for both factors."""
    s = model.table.sizes
    D, F, q, kv = s["D"], s["F"], s["N"] * s["H"], s["K"] * s["H"]
    inputs, outputs = 2 * D + q + F, 2 * D + q + 2 * kv + 2 * F
    return tuple(ITEM * positions * s["L"] * x for x in (inputs, inputs + outputs))  # type: ignore[return-value]


def base_bytes(model: Model, bits: float = 16) -> int:
    """Of the frozen base: `bits` a weight of a linear layer, 16 of all others."""
    sizes = flops.matrices(model)
    linear = sum(size for part, size in sizes.values() if part == "linear")
    return round(linear * bits / 8 + (model.table.count() - linear) * 2)


def train_step(
    model: Model,
    plan: lora.Plan | None,
    work: flops.Work,
    device: flops.Device,
    *,
    eight_bit: bool = False,
    room: float | None = None,
    bits: float = 16,
    host: float = HOST,
) -> Bound:
    """A LoRA step on one device. With `room`, bytes of memory, what does not fit beside the base (of `bits` a
    weight) and the trained state is copied to the host at `host` bytes/s during the forward pass, and back in
    the backward pass, which is longer; what is more than that is run again."""
    step = flops.step(model, plan, work)
    products = {
        part: (step.forward[part], step.backward[part])
        for part in ("linear", "experts", "head", "factors")
        if step.part(part)
    }
    rate = device.bf16 * PRODUCTS

    def seconds(part: str, count: float) -> float:
        return count / rate / (EIGHT_BIT if eight_bit and part in ("linear", "experts") else 1)

    passes = [elementwise_bytes(model, work.positions), factor_bytes(model, work.positions)]
    attention = device.bf16 * (ATTENTION if max(work.lengths) <= 4096 else LONG_ATTENTION)
    found = {
        "products": sum(seconds(part, sum(both)) for part, both in products.items()),
        "attention": step.part("attention") / attention,
        "elementwise": sum(passes[0]) / (device.bandwidth * MEMORY),
        "factors' reads": sum(passes[1]) / (device.bandwidth * MEMORY) if plan is not None else 0.0,
    }
    if room is None:
        return Bound(found)
    # what a pass over the layers makes that is not run again: the head's part is done chunk by chunk anyway
    forward = sum(seconds(part, both[0]) for part, both in products.items() if part != "head")
    forward += step.forward["attention"] / attention
    forward += (passes[0][0] + passes[1][0]) / (device.bandwidth * MEMORY)
    s = model.table.sizes
    kept = ITEM * work.positions * s["L"] * (2 * s["N"] * s["H"] + 2 * s["K"] * s["H"] + 2 * s["F"])
    ends = ITEM * work.positions * s["L"] * s["D"]  # the layers' inputs stay in any case
    trained = _trained_bytes(model, plan)
    free = max(room - base_bytes(model, bits) - trained - ends, 0.0)
    saved = min((free + host * forward) / kept, 1.0)
    return Bound(found | {"run again": (1 - saved) * forward}, saved)


def _trained_bytes(model: Model, plan: lora.Plan | None) -> int:
    """Of what is trained, AdamW's two moments and the gradient, all float32."""
    if plan is None:
        return 16 * model.table.count()
    count = 0
    for path, how in plan.items():
        if isinstance(how, lora.Adapted):
            sides = math.prod(model.table.ins(path)) + math.prod(model.table.outs(path))
            count += sum(how.ranks) * sides
    return 16 * count


def decode_step(model: Model, device: flops.Device, batch: int, length: float, bits: float = 16) -> Bound:
    """One token of each of `batch` rows that hold `length` tokens so far: every weight but the embedding's
    table, and all keys and values, are read once."""
    s = model.table.sizes
    read = base_bytes(model, bits)
    if model.head_path != "embed":
        read -= 2 * s["V"] * s["D"]
    cache = ITEM * 2 * s["L"] * s["K"] * s["H"] * batch * length
    rate = device.bandwidth * MEMORY
    return Bound({"weights": read / rate, "cache": cache / rate})


def main() -> None:
    """The table of docs/performance.md."""
    from benchmarks import gpu
    from ftjax import models

    card = flops.device(gpu.H100)
    assert card is not None
    print("| what | TFLOP a step | base GiB | ms | tok/s | saved |\n|---|---|---|---|---|---|")
    cases = {
        "1B": ("1b", {}),
        "8B": ("8b", {}),
        "8B in 17.8 GiB": ("8b", {"room": 17.8 * GIB}),
        "8B, everything run again": ("8b", {"room": 0.0, "host": 0.0}),
        "8B, NF4 base, in 8.2 GiB": ("8b", {"room": 8.2 * GIB, "bits": gpu.NF4}),
        "8B, fp8 base": ("8b", {"eight_bit": True, "bits": 8}),
    }
    for name, (size, how) in cases.items():
        model = models.from_config(gpu.SHAPES[size])
        plan = lora.plan(lora.LoraConfig(r=gpu.RANK), model.table)
        work = flops.Work.rows(4, 2048)
        bound = train_step(model, plan, work, card, **how)
        cells = (
            f"{flops.step(model, plan, work).total / 1e12:.1f}",
            f"{base_bytes(model, how.get('bits', 16)) / GIB:.1f}",
            str(bound).removesuffix(" ms") + f" = {1e3 * bound.total:.0f}",
            f"{work.tokens / bound.total:,.0f}",
            f"{bound.saved:.0%}" if "room" in how else "",
        )
        print(f"| {name} | {' | '.join(cells)} |")
    for length in (65536, 131072, 262144):
        model = models.from_config(gpu.SHAPES["8b"])
        plan = lora.plan(lora.LoraConfig(r=gpu.RANK), model.table)
        work = flops.Work.rows(1, length)
        bound = train_step(model, plan, work, card, room=76 * GIB)
        cells = (
            f"{flops.step(model, plan, work).total / 1e12:,.0f}",
            f"{base_bytes(model) / GIB:.1f}",
            str(bound).removesuffix(" ms") + f" = {1e3 * bound.total:,.0f}",
            f"{work.tokens / bound.total:,.0f}",
            f"{bound.saved:.0%}",
        )
        print(f"| 8B, one document of {length:,} | {' | '.join(cells)} |")
    for size in ("1b", "8b"):
        bound = decode_step(models.from_config(gpu.SHAPES[size]), card, 64, 128 + 256)
        print(f"| decoding, {size.upper()}, batch 64 | | | {bound} a token | {64 / bound.total:,.0f} | |")


if __name__ == "__main__":
    main()
