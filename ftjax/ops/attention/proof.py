"""A kernel is tried on the device at hand before it is used there.

What a GPU kernel does depends on the card, the driver and cuDNN's version as well as on this code. So the
first time a program wants one, with head sizes and facts of some kind, a small packed batch goes through it
and through the plain implementation; one that fails or disagrees is not used, and the log says so."""

import concurrent.futures
import dataclasses
import functools
import logging
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.ops import target
from ftjax.ops.attention import blockwise
from ftjax.ops.attention.facts import Facts

log = logging.getLogger("ftjax")
# Both round their inputs, softmax and results to 8 bits: a few times 2⁻⁹ of the norm.
TOLERANCE = 0.02


@functools.cache
def failure(
    kernel: ModuleType, facts: Facts, heads: tuple[int, int], dims: tuple[int, int], dtype
) -> str | None:
    """Why `kernel` is not to be used for such an attention on this machine's first device; None where it is.
    `heads` are of queries and keys, `dims` the sizes of q's and v's."""
    windows = tuple({None if w is None else 50 for w in facts.windows})
    facts = dataclasses.replace(facts, windows=windows)
    # a thread of its own is outside whatever is being traced here, and outside its mesh
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        why = thread.submit(_failure, kernel, facts, heads, dims, dtype).result()
    if why:
        log.warning("attention by %s is not used here: %s", kernel.__name__.rpartition(".")[2], why)
    return why


def _failure(kernel, facts: Facts, heads, dims, dtype) -> str | None:
    (N, K), (H, U) = heads, dims
    rng, T = np.random.default_rng(0), 192
    q, k, v, g = (jnp.asarray(rng.normal(size=(2, T, *x)), dtype) for x in ((N, H), (K, H), (K, U), (N, U)))
    lengths = [[T - 20, 0, 20], [T - 20, 0, 20]] if facts.documents == 1 else [[100, 50, 42], [7, 165, 20]]
    segments, positions = np.zeros((2, 2, T), np.int32)
    for row, (first, second, _) in enumerate(lengths):
        segments[row, : first + second] = 1 + (np.arange(first + second) >= first)
        positions[row, : first + second] = [*range(first), *range(second)]
    where, real = (segments, positions), segments > 0
    g = g * real[..., None, None].astype(g.dtype)

    def passes(module, window):
        args = q, k, v, where, where, window
        out, lse, *rest = module.forward(facts, *args)
        delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1).transpose(0, 2, 1)
        return out, *module.backward(facts, *args, out, lse, delta, g, *rest)

    try:
        with target.use(kernel.DEVICE):
            for window in facts.windows:
                want = jax.jit(functools.partial(passes, blockwise, window))()
                got = jax.jit(functools.partial(passes, kernel, window))()
                for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
                    x, y = (np.asarray(z, np.float32)[real] for z in (x, y))
                    error = np.linalg.norm(x - y) / np.linalg.norm(y)
                    if not error < TOLERANCE:
                        return f"its {name} is {error:.3g} of the norm away from the plain implementation's"
    except Exception as e:  # whatever the compiler or the driver says
        return f"it fails: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
