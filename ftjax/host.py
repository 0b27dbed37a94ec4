"""Settings of this process on its host."""

import ctypes
import gc
import os
import sys

began: float | None = None  # when the command line did, by time.perf_counter()

# mallopt's parameters, from glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def _is_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed, for the next training step; True where it was done.

    XLA on CPU allocates a step's temporaries anew each time. Left alone, glibc takes blocks of that size from
    the kernel and gives them back at once, so every step pays for its pages again: a quarter of the CPU time
    of a SmolLM2-135M step. Call it before jax starts its threads: those that have an arena keep it.
    """
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20, M_ARENA_MAX: 1}
    return all([mallopt(key, value) == 1 for key, value in settings.items()])


def return_freed_memory() -> None:
    """Give the system what was freed and kept: between phases of a program that need different arrays."""
    gc.collect()
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def drop_late_callbacks() -> None:
    """Print no traceback for each read of a damaged checkpoint that ends after the first one failed: its
    thread, tensorstore's, calls an event loop that is closed. What failed is said by who reads."""
    report = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook
