"""Load and export a random model of a given size: seconds, and peak host memory over what is kept.

    python benchmarks/load.py [--gb 1] [--stored bfloat16|float32] [--rounds 3] [--folder DIR]

Each measurement runs in its own process on CPU, the file in the page cache, all of them in turn in every
round. "read" copies every tensor with the safetensors library into memory of its own, as load_params does;
a second row keeps none, so that one tensor's memory serves for the next: on a virtual machine the first touch
of memory can cost more than the copy. "write" is its save_file of tensors in memory, in the same shards.
Neither does anything to the numbers; load_params transposes every linear weight, and save_model transposes
them back and checks that all are finite. CPU seconds are those of all threads. The rows of writing leave out
os.fsync, which the library's save_file does not call and save_model does, but for those that say "fsync":
there both call it for each file.

Peak memory is the process's maximum resident set less what it is before the measured part; pages of the
mapped file count while they are resident.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata

# way: (what it is, the way that is the measure for it)
WAYS = {
    "read": ("safetensors, all kept", "read"),
    "drop": ("safetensors, nothing kept", "read"),
    "stored": ("load_params, dtype as stored", "read"),
    "other": ("load_params, dtype=OTHER", "read"),
    "mesh": ("load_params, 4 x 2 CPU devices", "read"),
    "write": ("safetensors save_file", "write"),
    "save": ("save_model of what was loaded", "write"),
    "carry": ("save_model of the source itself", "write"),
    "write+fsync": ("safetensors save_file, then fsync", "write+fsync"),
    "save+fsync": ("save_model, with its fsync", "write+fsync"),
}
SHARD = 4 * 10**8  # bytes


def make(folder: pathlib.Path, gb: float, stored: str) -> None:
    """A Llama-shaped checkpoint, sharded at 400 MB."""
    import numpy as np

    from ftjax import files, models, weights

    config = dict(
        model_type="llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        torch_dtype=stored,
    )
    one = models.from_config(config | {"num_hidden_layers": 1}).table
    two = models.from_config(config | {"num_hidden_layers": 2}).table
    layer = two.count() - one.count()
    dtype = np.dtype(stored)
    config["num_hidden_layers"] = max(1, round((gb * 1e9 / dtype.itemsize - one.count()) / layer) + 1)
    table = models.from_config(config).table
    rng = np.random.default_rng(0)
    entries = {
        name: (weights.hf_shape(table, path), dtype) for path in table.rows for name in table.names(path)
    }
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", config)
    files.write_shards(
        folder, entries, lambda n: rng.standard_normal(entries[n][0], np.float32).astype(dtype), SHARD
    )


def measure(folder: pathlib.Path, way: str) -> dict:
    """In a process of its own: seconds, CPU seconds, and peak bytes over the start."""
    import resource

    import jax
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from ftjax import hf, hf_export, mesh, models, weights

    source = hf.open_model(folder)
    model = models.from_config(source.config)
    devices = mesh.make_mesh(mesh.MeshOptions(fsdp=4, tp=2)) if way == "mesh" else jax.devices()
    files = sorted(folder.glob("*.safetensors"))
    largest = max(int(np.prod(source.shape(n))) * source.dtype(n).itemsize for n in source.names())
    stored = source.dtype(source.names()[0])
    other = np.dtype("float32" if stored != np.float32 else "bfloat16")
    out = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
    shardings = weights.shardings(model.table, mesh.WEIGHT_RULES, devices) if way == "mesh" else None
    held, kept = {}, 0
    if way.startswith("write"):
        for path in files:
            with safe_open(path, "numpy") as file:
                held[path.name] = {name: file.get_tensor(name) for name in file.keys()}
    elif way.startswith("save"):
        held = jax.block_until_ready(hf.load_params(source, model))
    fsync = os.fsync
    if not way.endswith("fsync"):
        os.fsync = lambda fd: None

    reset_peak()
    start = int(status("VmRSS"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    clock = time.perf_counter()
    if way in ("read", "drop"):
        for path in files:
            with safe_open(path, "numpy") as file:
                for name in file.keys():
                    x = file.get_tensor(name)
                    if way == "read":
                        held[path.name, name] = x
                        kept += x.nbytes
    elif way.startswith("write"):
        for name, tensors in held.items():
            save_file(tensors, out / name, {"format": "pt"})
            if way.endswith("fsync"):
                with open(out / name, "rb") as f:
                    fsync(f.fileno())
    elif way in ("carry", "save", "save+fsync"):
        hf_export.save_model(out / "model", model, held or None, source, max_shard_bytes=SHARD)
    else:
        dtype = other if way == "other" else stored
        params = jax.block_until_ready(hf.load_params(source, model, dtype=dtype, shardings=shardings))
        kept = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
    seconds = time.perf_counter() - clock
    after = resource.getrusage(resource.RUSAGE_SELF)
    peak = int(status("VmHWM")) - start
    shutil.rmtree(out)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return dict(seconds=seconds, cpu=cpu, peak=peak * 1024, kept=kept, largest=largest, other=other.name)


def reset_peak() -> None:
    """Make VmHWM start again from the present."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> str:
    text = pathlib.Path("/proc/self/status").read_text()
    return text.partition(key + ":")[2].split()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--stored", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, args.measure)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or pathlib.Path(scratch) / "model"
        if not folder.exists():
            make(folder, args.gb, args.stored)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        runs = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                env = os.environ | {"JAX_PLATFORMS": "cpu"}
                if way == "mesh":
                    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
                command = [sys.executable, __file__, "--measure", way, "--folder", str(folder)]
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
                runs[way].append(json.loads(done.stdout.splitlines()[-1]))
        packages = ("jax", "numpy", "ml_dtypes", "safetensors")
        versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
        print(
            f"{os.cpu_count()} cores; python {platform.python_version()}, {versions}; load average ", end=""
        )
        print(" ".join(f"{x:.1f}" for x in os.getloadavg()) + f"; {args.rounds} rounds")
        print(f"\n{args.stored} checkpoint of {size / 1e9:.2f} GB\n")
        print("| | s, best (each) | GB/s | speed beside safetensors | CPU s | kept GB | peak over kept |")
        print("|---|---|---|---|---|---|---|")
        for way, (what, beside) in WAYS.items():
            m = min(runs[way], key=lambda run: run["seconds"])
            each = ", ".join(f"{run['seconds']:.2f}" for run in runs[way])
            bare = min(run["seconds"] for run in runs[beside])
            rounds = [b["seconds"] / a["seconds"] for a, b in zip(runs[way], runs[beside], strict=True)]
            share = (
                ""
                if way == beside
                else f"**{bare / m['seconds']:.0%}** ({min(rounds):.0%}…{max(rounds):.0%})"
            )
            over = (m["peak"] - m["kept"]) / m["largest"]
            print(
                f"| {what.replace('OTHER', m['other'])} | {m['seconds']:.2f} ({each}) "
                f"| {size / 1e9 / m['seconds']:.2f} | {share} | {min(run['cpu'] for run in runs[way]):.2f} "
                f"| {m['kept'] / 1e9:.2f} | {over:.1f} × {m['largest'] / 1e6:.0f} MB |"
            )


if __name__ == "__main__":
    main()
