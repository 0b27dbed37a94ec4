"""Tiny programs compiled for TPUs: FLOPs, bytes, temporaries and collectives, kept in a file by the versions
of jax and libtpu. A change that moves them by more than 2% says so in its commit.

python tests/test_tpu_programs.py writes the file's entries for the versions installed anew.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import re

import pytest
import tpu

from ftjax import config, hlo, lora, mesh, models, plan
from ftjax.recipes import program, sft

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tpu.json"
DENSE = dict(
    model_type="llama",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
EXPERTS = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
# name: (config.json, topology, settings of the run)
PROGRAMS: dict[str, tuple[dict, str, tuple[str, ...]]] = {
    "dense": (DENSE, "v5e:2x2", ("mesh.fsdp=1",)),
    "dense, fsdp 4 x tp 2": (DENSE, "v5e:2x4", ("mesh.fsdp=4", "mesh.tp=2")),
    "dense, fsdp 2 x cp 4": (DENSE, "v5e:2x4", ("mesh.fsdp=2", "mesh.cp=4")),
    "experts, fsdp 2 x ep 4": (
        DENSE | EXPERTS,
        "v5e:2x4",
        ("mesh.fsdp=2", "mesh.ep=4", "train.batch_size=8"),
    ),
    "experts, on v6e": (DENSE | EXPERTS, "v6e:2x2", ("mesh.fsdp=1",)),
    "nf4, fsdp 2": (DENSE, "v5e:2x2", ("mesh.fsdp=2", "quant.kind=nf4")),
    "what is kept lies on the host, on v5p": (DENSE, "v5p:2x2x1", ("mesh.fsdp=1", "train.remat=offload")),
}


@functools.cache
def compiled(name: str) -> plan.Program:
    raw, topology, settings = PROGRAMS[name]
    given = ["model=random", "output=none", "data.train=none", "data.max_length=512", "train.batch_size=4"]
    cfg = config.load(None, [*given, *settings], "sft")
    chips = tpu.devices(topology)[: math.prod(dataclasses.asdict(cfg.mesh).values())]
    model = program.with_options(models.from_config(raw), cfg)
    step = program.plan_step(cfg, model, sft.make_loss, mesh.make_mesh(cfg.mesh, chips))
    with tpu.one_at_a_time():
        return step.program


def facts(name: str) -> dict:
    found = compiled(name)
    return {
        "flops": found.flops,
        "bytes accessed": found.bytes_accessed,
        "arguments": found.memory.arguments,
        "temporaries": found.memory.temporaries,
        "on the host": found.memory.host,
        "collectives": found.collectives,
    }


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


@tpu.needs_libtpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_the_golden_ones(name):
    golden = json.loads(GOLDEN.read_text()).get(versions())
    if golden is None:
        pytest.skip(f"no golden programs of {versions()}")
    found, kept = facts(name), golden[name]
    for what in ("flops", "bytes accessed", "arguments", "temporaries", "on the host"):
        assert found[what] == pytest.approx(kept[what], rel=0.02), what
    assert {k: v["count"] for k, v in found["collectives"].items()} == {
        k: v["count"] for k, v in kept["collectives"].items()
    }
    for kind, one in kept["collectives"].items():
        assert found["collectives"][kind]["bytes"] == pytest.approx(one["bytes"], rel=0.02), kind


@tpu.needs_libtpu
def test_what_is_offloaded_lies_on_the_host():
    whole, offloaded = compiled("dense"), compiled("what is kept lies on the host, on v5p")
    assert offloaded.memory.host >= 2 * 4 * 512 * (256 + 4 * 128) * 2  # inputs and attention's results
    assert whole.memory.host == 0  # at these sizes the temporaries are the loss's: what is saved is not seen


@tpu.needs_libtpu
@pytest.mark.parametrize("name", [name for name in PROGRAMS if " x " in name])
def test_a_layer_pays_what_it_must(name):
    """By docs/sharding.md's formulas, and nothing else: no reduction of a frozen weight, no all-to-all, no
    permutation. Beyond them are a few numbers a token: of the router."""
    raw, _, settings = PROGRAMS[name]
    model, given = models.from_config(raw), dict(x.rpartition(".")[2].split("=") for x in settings)
    fsdp, cp, ep, tp = (int(given.get(axis, 1)) for axis in ("fsdp", "cp", "ep", "tp"))
    table, T, D = model.table, 512, raw["hidden_size"]
    tokens = int(given.get("batch_size", 4)) // (fsdp * ep) * T // cp

    def on_device(path: str, letters: str) -> int:
        """Elements of a layer's weight or factor on one device, its hidden axis whole."""
        split = dict.fromkeys("NKFM", tp) | {"E": ep if table.rows[path].many else 1}
        return math.prod((table.sizes | {"R": 16})[x] // split.get(x, 1) for x in letters if x != "L")

    layer = [path for path in table.rows if table.layers(path) and table.rows[path].ins]
    weights = 2 * sum(on_device(path, table.dims(path)) for path in layer)
    adapters = {
        path: letters
        for path, letters in lora.axes(lora.plan(lora.LoraConfig(), table), table).items()
        if path.rpartition("/")[0] in layer
    }
    factors = {path: on_device(path.rpartition("/")[0], letters) for path, letters in adapters.items()}
    want = {
        "all-gather": 2 * weights + 2 * 2 * sum(n for path, n in factors.items() if "D" in adapters[path]),
        "all-reduce": 4 * sum(factors.values()),
    }
    if tp > 1:  # two sums of activations a pass, and those between the adapters' factors
        want["all-reduce"] += 4 * 2 * tokens * D + (2 * 4 + 5 * 2) * tokens * 16
    if cp > 1:
        both = 2 * 2 * tokens * 2 * 128
        want |= {"all-gather": want["all-gather"] + 2 * cp * both, "reduce-scatter": both}
    if ep > 1:
        want |= {
            "all-gather": want["all-gather"] + 2 * 2 * ep * tokens * D,
            "reduce-scatter": 2 * 2 * tokens * D,
        }
    found = collections.Counter()
    for kind, size, where in hlo.each(compiled(name).hlo):
        if "/closed_call/layers" in where:
            found[kind] += size
    assert set(found) == set(want)
    for kind, size in want.items():
        assert found[kind] == pytest.approx(size, rel=0.06), kind


@tpu.needs_libtpu
def test_splash_takes_a_part_of_the_row():
    """Over cp its kernels attend from a device's 128 queries to all 512 keys of its 2 rows."""
    text = compiled("dense, fsdp 2 x cp 4").hlo
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    forward = next(line for line in calls if "splash_mha_fwd" in line)
    assert "bf16[2,4,128,128]" in forward and len(calls) == 3


@tpu.needs_libtpu
def test_frozen_weights_are_gathered_and_never_reduced():
    """In bfloat16 as they are; what is summed over all devices is of the adapters, in float32."""
    hlo = compiled("dense, fsdp 4 x tp 2").hlo
    matrix = {"256,256", "256,512", "512,256", "256,2,128", "2,128,256"}  # one layer's, split over tp at most
    sums = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=\n]*? (?:all-reduce|reduce-scatter)(?:-start)?\(", hlo)
    assert sums and not [one for one in sums if one[1] in matrix], sums


if __name__ == "__main__":
    entries = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    entries[versions()] = {name: facts(name) for name in PROGRAMS}
    GOLDEN.write_text(json.dumps(entries, indent=1) + "\n")
