"""Load a random model of a given size: seconds, and peak host memory over what the parameters take.

    python benchmarks/load.py [--gb 1] [--rounds 3] [--folder DIR]

Each measurement runs in its own process on CPU, the file in the page cache. "read" copies every tensor with
the safetensors library and keeps none: the least that reading can take. Peak memory is the process's
maximum resident set less what it is after importing; pages of the mapped file count while they are
resident.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

WAYS = {
    "read": "safetensors, nothing kept",
    "bfloat16": "load_params, dtype=bfloat16",
    "float32": "load_params, dtype=float32",
    "mesh": "load_params, bfloat16, 4 x 2 CPU devices",
}


def make(folder: pathlib.Path, gb: float) -> None:
    """A Llama-shaped checkpoint in bfloat16, sharded at 400 MB."""
    import ml_dtypes
    import numpy as np

    from ftjax import hf, models, weights

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
        torch_dtype="bfloat16",
    )
    one = models.from_config(config | {"num_hidden_layers": 1}).table
    two = models.from_config(config | {"num_hidden_layers": 2}).table
    layer = two.count() - one.count()
    config["num_hidden_layers"] = max(1, round((gb * 1e9 / 2 - one.count()) / layer) + 1)
    table = models.from_config(config).table
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    entries = {
        name: (weights.hf_shape(table, path), dtype) for path in table.rows for name in table.names(path)
    }
    folder.mkdir(parents=True)
    hf.write_json(folder / "config.json", config)
    hf._write_shards(
        folder, entries, lambda n: rng.standard_normal(entries[n][0], np.float32).astype(dtype), 4 * 10**8
    )


def measure(folder: pathlib.Path, way: str) -> dict:
    """In a process of its own: seconds, and peak bytes over the start."""
    import resource

    import jax
    import ml_dtypes
    import numpy as np

    from ftjax import hf, mesh, models, weights

    source = hf.open_model(folder)
    model = models.from_config(source.config)
    devices = mesh.make_mesh(mesh.MeshOptions(fsdp=4, tp=2)) if way == "mesh" else jax.devices()
    status = pathlib.Path("/proc/self/status").read_text()
    start = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    largest = max(int(np.prod(source.shape(n))) * source.dtype(n).itemsize for n in source.names())
    clock = time.perf_counter()
    if way == "read":
        from safetensors import safe_open

        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "numpy") as file:
                for name in file.keys():
                    file.get_tensor(name)
        kept = 0
    else:
        shardings = weights.shardings(model.table, mesh.WEIGHT_RULES, devices) if way == "mesh" else None
        dtype = np.float32 if way == "float32" else ml_dtypes.bfloat16
        params = hf.load_params(source, model, dtype=dtype, shardings=shardings)
        jax.block_until_ready(params)
        kept = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
    seconds = time.perf_counter() - clock
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
    return {"seconds": seconds, "peak": peak, "kept": kept, "largest": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0)
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
            make(folder, args.gb)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        print(f"checkpoint {size / 1e9:.2f} GB\n")
        print("| | seconds | GB/s | parameters GB | peak GB | peak over parameters, in largest tensors |")
        print("|---|---|---|---|---|---|")
        for way, what in WAYS.items():
            env = os.environ | {"JAX_PLATFORMS": "cpu"}
            if way == "mesh":
                env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
            command = [sys.executable, __file__, "--measure", way, "--folder", str(folder)]
            runs = []
            for _ in range(args.rounds):
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            m = min(runs, key=lambda run: run["seconds"])
            over = (m["peak"] - m["kept"]) / m["largest"]
            print(
                f"| {what} | {m['seconds']:.2f} | {size / 1e9 / m['seconds']:.2f} | {m['kept'] / 1e9:.2f} "
                f"| {m['peak'] / 1e9:.2f} | {over:.1f} ({m['largest'] / 1e6:.0f} MB) |"
            )


if __name__ == "__main__":
    main()
