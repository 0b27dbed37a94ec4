"""Attention's forward and backward pass by each implementation that this machine has.

    python -m benchmarks.attention [--tokens 4096] [--lengths 256 512 1024 2048 4096] [--heads 9 3 64]

Rows are packed with documents of log-normal lengths (about 200 tokens), or hold one document each; a batch
has the same number of tokens whatever its rows' length. Best of several runs, the implementations in turn;
CPU seconds are of all threads, which another program's load moves less than the clock.
"""

import argparse
import os
import platform
import time
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.ops import attention


def packed(rows: int, length: int, mean: float, seed: int = 0):
    """(segments, positions) int32 [rows, length]."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        at = document = 0
        while at < length:
            n = min(length - at, max(1, int(rng.lognormal(np.log(mean), 0.6))))
            document += 1
            segments[row, at : at + n], positions[row, at : at + n] = document, np.arange(n)
            at += n
    return jnp.asarray(segments), jnp.asarray(positions)


def make(name: str, dim: int):
    def loss(q, k, v, segments, positions):
        out = attention(q, k, v, (segments, positions), scale=dim**-0.5, implementation=name)
        return out.astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], help="of queries, of keys, size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--names", nargs="+", default=["dense", "blockwise", "splash", "cudnn", "pallas"])
    options = parser.parse_args()
    N, K, H = options.heads
    print(f"`python -m benchmarks.attention`; {jax.devices()[0].device_kind}, {os.cpu_count()} cores, python "
          f"{platform.python_version()}, jax {metadata.version('jax')}; {N}/{K} heads of {H}, bfloat16, "
          f"{options.tokens} tokens a call; load average {os.getloadavg()[0]:.1f}\n")  # fmt: skip
    print("| row | documents | " + " | ".join(f"{name} ms (CPU ms)" for name in options.names) + " |")
    print("|---|---|" + "---|" * len(options.names))
    for mean in (200, 10**9):
        for length in options.lengths:
            rows = max(1, options.tokens // length)
            keys = jax.random.split(jax.random.key(0), 3)
            shapes = ((rows, length, heads, H) for heads in (N, K, K))
            args = [jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True)]
            args += packed(rows, length, mean)
            steps = {name: make(name, H) for name in options.names}
            best = {}
            for name in options.names:
                try:
                    jax.block_until_ready(steps[name](*args))
                except UserError:
                    continue  # not on this machine: a blank cell
                best[name] = (np.inf, np.inf)
            for _ in range(options.rounds):
                for name in best:
                    wall, cpu = time.perf_counter(), time.process_time()
                    jax.block_until_ready(steps[name](*args))
                    took = time.perf_counter() - wall, time.process_time() - cpu
                    best[name] = tuple(map(min, best[name], took))
            cells = (
                f"{best[name][0] * 1e3:.1f} ({best[name][1] * 1e3:.0f})" if name in best else ""
                for name in options.names
            )
            said = "about 200 tokens" if mean == 200 else "one a row"
            print(f"| {length} | {said} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
