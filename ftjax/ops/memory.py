"""What the forward pass of a layer keeps for its backward pass: a ladder from everything to nothing.

A layer names what it computes: its products by their weights' names, its attention's output and statistics,
what is small and dear, and what is elementwise. A rung says which of these are kept, and where. What is not
kept is computed again from what is. docs/memory.md has what each rung costs.
"""

import dataclasses
from collections.abc import Collection

import jax

INPUT = "input"  # of the layer: what full recomputation begins from
ATTENTION = "attention"  # the output of attention, and the statistics that its backward pass needs
SMALL = ("lora", "router", "route")  # a few bytes a token
# Products that are as wide as the MLP is inside, or of which a token has many.
UP = ("up", "shared_up", "experts_up")
GATE = ("gate", "gate_up", "shared_gate", "shared_gate_up", "experts_gate", "experts_gate_up")
INNER = (*UP, *GATE, "experts_down")


@dataclasses.dataclass(frozen=True)
class Rung:
    """What is kept, and what its going costs."""

    drop: tuple[str, ...] | None  # names of products that are computed again; None: all
    attention: bool  # whether attention's output is kept
    small: bool  # whether SMALL is, on the device
    host: bool  # whether what is kept lies in the host's memory, the layer's input too
    said: str


# From the fastest to the leanest, but for `full`, which needs no bus to the host. "none" is autodiff's own
# choice: it keeps all that some gradient reads.
LADDER: dict[str, Rung] = {
    "none": Rung((), True, True, False, "nothing is recomputed"),
    "act": Rung((), True, True, False, "norms, activations and other elementwise work are recomputed"),
    "up": Rung(UP, True, True, False, "of the MLP's two wide products one is recomputed"),
    "mlp": Rung(INNER, True, True, False, "the MLP is recomputed"),
    "mlp_offload": Rung(INNER, True, True, True, "as mlp, with what is kept in the host's memory"),
    "attention": Rung(None, True, True, False, "all is recomputed but attention"),
    "full": Rung(None, False, False, False, "all is recomputed from the layer's input"),
    "offload": Rung(None, True, False, True, "as attention, with what is kept in the host's memory"),
}


def kept(rung: str, products: Collection[str]) -> tuple[list[str], list[str]]:
    """(names kept on the device, names kept on the host) of a layer with these `products`."""
    one = LADDER[rung]
    names = [] if one.drop is None else sorted(set(products) - set(one.drop))
    names += [ATTENTION] if one.attention else []
    small: list[str] = [*SMALL] if one.small else []
    return (small, [*names, INPUT]) if one.host else (names + small, [])


def remat(fn, rung: str, products: Collection[str], *, looped: bool):
    """`fn`, one layer, with the rung's gradient. `looped`: its backward pass is another loop than its forward
    pass, so that the compiler cannot take the one's results for the other."""
    if rung == "none":
        return fn
    device, host = kept(rung, products)
    if host:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=device,
            names_which_can_be_offloaded=host,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*device)
    return jax.checkpoint(fn, prevent_cse=not looped, policy=policy)
