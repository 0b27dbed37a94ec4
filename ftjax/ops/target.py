"""The kind of device that a program is traced for, by which kernels and the order of products are chosen."""

import contextlib

import jax

KINDS = ("cpu", "gpu", "tpu")
# part of what jax.jit caches by, so that one function traced for two kinds is two programs
_chosen = jax.make_user_context(default_value=None)


def kind_of(platform: str) -> str:
    """The kind of a jax platform or backend name: "gpu" for "cuda" and "rocm"."""
    return platform if platform in KINDS else "gpu" if platform in ("cuda", "rocm") else "cpu"


def kind() -> str:
    """One of KINDS: that of the innermost `use`, else of jax's default backend."""
    return _chosen.value or kind_of(jax.default_backend())


def use(kind: str) -> contextlib.AbstractContextManager:
    """Within it, programs are traced for this kind, whatever devices are at hand: for compiling ahead of
    time."""
    assert kind in KINDS, kind
    return _chosen(kind)
