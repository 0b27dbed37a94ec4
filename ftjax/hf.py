"""Hugging Face checkpoints in: folders, hub ids and GGUF files.

Reading is lazy. A source maps its files into memory and gives views; `load_params` copies each tensor once,
straight to where it will live, and lets go of its pages, so that the peak over the final size is a tensor
or two.
"""

import collections
import concurrent.futures
import difflib
import functools
import hashlib
import math
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import distributed, gguf, models, quant, quantised
from ftjax.errors import UserError
from ftjax.files import FLOATS, SafetensorsFile, copy, few, read_json
from ftjax.models import Model
from ftjax.quant import QuantOptions
from ftjax.quantised import Kept
from ftjax.weights import IN_OUT, LINEAR, QuantWeight, Table, flatten, from_hf, hf_shape, unflatten

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json "
    "vocab.json merges.txt vocab.txt chat_template.jinja chat_template.json"
).split()
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HOST = ("cpu",)  # platforms whose arrays lie in host memory
HEADS = {"lm_head.weight", "embed_out.weight"}  # which a tied model may have beside its embedding
THREADS = min(4, os.cpu_count() or 1)  # each may hold one tensor's float32 copy, so few


class Source(Protocol):
    """An opened base model: its config.json, and its tensors under the names of its family's weight table."""

    @property
    def source(self) -> str: ...  # as the user gave it

    @property
    def revision(self) -> str | None: ...

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> str: ...  # "hf" or "gguf"

    @property
    def config(self) -> dict[str, Any]: ...  # config.json, less how its weights were quantised

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def get(self, name: str) -> np.ndarray:
        """The tensor, read only; where the file has it as it is, a view whose pages are read when touched."""
        ...

    def kept(self, name: str) -> Kept | None:
        """How the tensor can be held in memory as it is stored, where it is stored quantised."""
        ...

    def get_kept(self, name: str) -> dict[str, np.ndarray]:
        """The arrays that Kept.read gives."""
        ...

    def release(self, name: str) -> None:
        """Give the pages of `name` back to the system; views of it stay valid, read again when touched."""
        ...

    def fingerprint(self) -> str:
        """sha256 over the names, shapes, dtypes and bytes of all tensors, whatever file each is in."""
        ...

    def stored_name(self, name: str) -> str:
        """What the checkpoint itself calls `name`."""
        ...

    def torch_name(self, name: str) -> str:
        """`name`, a parameter of transformers' text decoder, in the class that loads the whole checkpoint."""
        ...

    def others(self) -> list[str]:
        """Tensors that are no part of the text decoder (a vision tower's), by the checkpoint's names."""
        ...

    def tokenizer(self) -> Any: ...

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Put the tokenizer's files into `folder`, byte for byte where the source has them; their names."""
        ...

    @property
    def generation_config(self) -> dict[str, Any] | None: ...


class HfFolder:
    """A folder with config.json, safetensors and a tokenizer, as transformers saves it."""

    kind = "hf"

    def __init__(self, path: Path, source: str, revision: str | None = None):
        self.path, self.source, self.revision = path, source, revision
        config = read_json(path / "config.json")
        self.config = quantised.unquantised_config(config)
        self._files = _weight_files(path)
        self._where = {name: file for file in self._files for name in file.entries}
        entries = {name: file.entries[name][:2] for name, file in self._where.items()}
        self._tensors = quantised.Dequantised(str(path), config, entries, self._stored)
        renamed = models.table_names(self.config, self._tensors.names())
        self._names = {new: old for old, new in renamed.items() if new is not None}
        self._others = [old for old, new in renamed.items() if new is None]
        self._pieces = self._apart()
        self._digest: str | None = None

    def _apart(self) -> dict[str, tuple[str, int, int, int]]:
        """Where a family keeps its experts in a tensor each, but these files keep all in one: the names of
        the experts' tensors -> (stored tensor, expert, i, n), the i-th of n parts of its outputs."""
        config = models.text_config(self.config)
        if config.get("model_type") not in models.SPLITS_EXPERTS:
            return {}
        out = {}
        for name, stored in list(self._names.items()):
            found = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
            if found is None:
                continue
            parts = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
            del self._names[name]
            for e in range(self._tensors.shape(stored)[0]):
                for i, part in enumerate(parts):
                    piece = f"{found[1]}.{e}.{part}.weight"
                    out[piece] = stored, e, i, len(parts)
                    self._names[piece] = stored.removesuffix(found[2]) + f"{e}.{part}.weight"
        return out

    def _stored(self, name: str) -> np.ndarray:
        return self._where[name].view(name)

    def names(self) -> list[str]:
        return list(self._names)

    def others(self) -> list[str]:
        return list(self._others)

    def stored_name(self, name: str) -> str:
        return self._names.get(name, name)

    def torch_name(self, name: str) -> str:
        return models.torch_name(self.config, name)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._pieces:
            stored, _, _, n = self._pieces[name]
            _, rows, columns = self._tensors.shape(stored)
            return rows // n, columns
        return self._tensors.shape(self.stored_name(name))

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(self._pieces[name][0] if name in self._pieces else self.stored_name(name))

    def get(self, name: str) -> np.ndarray:
        if name in self._pieces:
            stored, e, i, n = self._pieces[name]
            return np.split(self._tensors.get(stored)[e], n)[i]
        return self._tensors.get(self.stored_name(name))

    def kept(self, name: str) -> Kept | None:
        if name not in self._pieces:
            return self._tensors.kept(self.stored_name(name))
        kept = self._tensors.kept(self._pieces[name][0])
        return kept if kept is not None and not kept.double and kept.inputs == -1 else None

    def get_kept(self, name: str) -> dict[str, np.ndarray]:
        if name in self._pieces:
            stored, e, i, n = self._pieces[name]
            return {k: np.split(x[e], n)[i] for k, x in self._tensors.get_kept(stored).items()}
        return self._tensors.get_kept(self.stored_name(name))

    def release(self, name: str) -> None:
        if name in self._pieces:  # its neighbours are read next, from the same pages
            return
        for part in self._tensors.parts(self.stored_name(name)):
            self._where[part].release(part)

    def fingerprint(self) -> str:
        if self._digest is None:
            names = sorted(self._where)
            # Each process of a run reads its part of the tensors.
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # sha256 lets go of the GIL
                mine = list(pool.map(self._tensor_digest, distributed.share(names)))
            lines = map(self._fingerprint_line, names, distributed.unshare(mine))
            self._digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        return self._digest

    def _tensor_digest(self, name: str) -> str:
        file = self._where[name]
        digest = hashlib.sha256(file.view(name).reshape(-1).view(np.uint8).data).hexdigest()
        file.release(name)
        return digest

    def _fingerprint_line(self, name: str, digest: str) -> str:
        dtype, shape, _ = self._where[name].entries[name]
        return f"{name} {dtype} {shape} {digest}\n"

    @property
    def generation_config(self) -> dict[str, Any] | None:
        path = self.path / "generation_config.json"
        return read_json(path) if path.is_file() else None

    def tokenizer(self):
        if not any((self.path / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(
                f"{self.path}: no tokenizer (tokenizer.json): copy the tokenizer files of the model that "
                "it was tuned from"
            )
        from transformers import AutoTokenizer  # slow to import

        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except Exception as e:  # the tokenizers library raises bare Exception
            raise UserError(f"{self.path}: the tokenizer cannot be read: {e}") from e

    def write_tokenizer(self, folder: Path) -> list[str]:
        names = [n for n in TOKENIZER_FILES if (self.path / n).is_file()]
        for name in names:
            shutil.copyfile(self.path / name, folder / name)
        return names


def _weight_files(folder: Path) -> list[SafetensorsFile]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map in it")
        shards = sorted(set(weight_map.values()))
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {few(missing)} of {len(shards)} shards named in {index.name} missing: "
                "the download was not complete"
            )
        files = {s: SafetensorsFile(folder / s) for s in shards}
        astray = [n for n, s in weight_map.items() if n not in files[s].entries]
        if astray:
            raise UserError(f"{index}: tensors that are not in the shard named for them: {few(astray)}")
        return list(files.values())
    found = sorted(p for p in folder.glob("*.safetensors") if p.name != "adapter_model.safetensors")
    if (folder / "model.safetensors").is_file():
        found = [folder / "model.safetensors"]
    if len(found) == 1:
        return [SafetensorsFile(found[0])]
    if found:
        raise UserError(
            f"{folder}: {len(found)} .safetensors files and no model.safetensors.index.json: {few(found)}"
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5"))
    hint = f"; {few(others)} would have to be saved as safetensors first" if others else ""
    raise UserError(f"{folder}: no weights (model.safetensors){hint}")


def open_model(source: str | os.PathLike, revision: str | None = None) -> Source:
    """Open a folder, a .gguf file (or a folder with one and no config.json), or a hub id.

    Only headers are read. UserError where there is none, or what is there is incomplete or damaged.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{source}: a model is a folder, a hub id or a .gguf file")
        return gguf.GgufFile(path, source)
    if not path.is_dir():
        path = _from_hub(source, revision)
    if (path / "config.json").is_file():
        return HfFolder(path, source, revision)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return gguf.GgufFile(ggufs[0], source)
    if ggufs:
        raise UserError(f"{path}: {len(ggufs)} .gguf files, name one of them: {few(ggufs)}")
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(f"{path}: an adapter, not a model: its base is {base!r}")
    raise UserError(f"{path}: no config.json: a model folder has config.json and model.safetensors")


def _from_hub(source: str, revision: str | None) -> Path:
    first = source.split("/")[0]
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", source) or ("/" in source and Path(first).is_dir()):
        raise UserError(_not_found(source))
    import huggingface_hub
    from huggingface_hub import errors

    try:
        with distributed.one_a_disk(huggingface_hub.constants.HF_HUB_CACHE):
            return Path(
                huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=HUB_PATTERNS)
            )
    except errors.GatedRepoError:
        raise UserError(
            f"{source}: gated: accept its licence on its page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{source}: the hub has no revision {revision!r} of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{_not_found(source)}, and the hub has no public model of that name") from None
    except Exception as e:  # offline shows as one of a dozen classes of two libraries
        raise UserError(
            f"{_not_found(source)}, and the hub cannot be reached for it ({type(e).__name__}): download it "
            "elsewhere and give the folder's path"
        ) from e


def _not_found(source: str) -> str:
    path = Path(source).expanduser()
    while not path.parent.is_dir():
        path = path.parent
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"{source}: no such folder or file" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def describe(source: Source) -> dict[str, Any]:
    """Which weights these are, as RUN/base.json and an adapter's ftjax.json keep it."""
    return {
        "source": source.source if _is_hub_id(source) else str(source.path.absolute()),
        "revision": source.revision,
        "kind": source.kind,
        "fingerprint": source.fingerprint(),
    }


def _is_hub_id(source: Source) -> bool:
    return not Path(source.source).expanduser().exists()


def load_tokenizer(source: Source, *, need_chat_template: bool = False):
    """The source's tokenizer (a transformers PreTrainedTokenizerFast).

    UserError where it has none, where its ids exceed the embedding's rows, and, if asked, where it has no
    template.
    """
    tokenizer = source.tokenizer()
    rows, top = (
        models.text_config(source.config).get("vocab_size"),
        max(tokenizer.get_vocab().values(), default=-1),
    )
    if rows is not None and top >= rows:
        token = tokenizer.convert_ids_to_tokens(top)
        raise UserError(
            f"{source.source}: the tokenizer does not fit the model: its id {top} ({token!r}) is beyond the "
            f"embedding's {rows} rows (config.json: vocab_size)"
        )
    if need_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"{source.source}: the tokenizer has no chat template, which conversations need: tune the "
            "instruct variant of the model, or put a chat_template.jinja beside tokenizer.json"
        )
    return tokenizer


def tokenizer_of(model: str):
    """The tokenizer of a model (folder, hub id or .gguf file), or of a folder that holds nothing else.
    Raises UserError."""
    folder = Path(model).expanduser()
    if (folder / "tokenizer.json").is_file() and not (folder / "config.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)
    return load_tokenizer(open_model(model))


def check_names(source: Source, table: Table, shapes: bool = True) -> None:
    """UserError where the checkpoint's tensors are not those of the table, by name, dtype or, if `shapes`,
    shape."""
    wanted = {name: path for path in table.rows for name in table.names(path)}
    have = set(source.names())
    missing = [n for n in wanted if n not in have]
    if missing:
        raise UserError(f"{source.source}: {len(missing)} tensors missing from the weights: {few(missing)}")
    extra = [n for n in source.names() if n not in wanted and not re.fullmatch(table.others, n)]
    for twin in HEADS & set(extra) if "lm_head" not in table.rows else ():
        embed = table.names("embed")[0]
        if not np.array_equal(source.get(twin), source.get(embed)):
            raise UserError(
                f"{source.source}: config.json says tie_word_embeddings=true, yet {twin} differs from {embed}"
            )
        extra.remove(twin)
    if extra:
        raise UserError(
            f"{source.source}: {len(extra)} tensors in the weights that a "
            f"{source.config.get('model_type')} model of "
            f"this config does not have: {few(extra)}"
        )
    for name, path in wanted.items():
        if source.dtype(name) not in FLOATS.values():
            raise UserError(
                f"{source.source}: {name} is {source.dtype(name)}: quantised weights are not supported"
            )
        if shapes and source.shape(name) != hf_shape(table, path):
            raise UserError(
                f"{source.source}: {name} has shape {list(source.shape(name))}, config.json makes it "
                f"{list(hf_shape(table, path))}"
            )


def load_params(
    source: Source,
    model: Model,
    dtype=None,
    shardings=None,
    progress: Callable[[str, int], None] | None = None,
    quantise: QuantOptions | None = None,
) -> dict:
    """The model's parameter tree, each leaf read straight into its sharding.

    Matrices get `dtype` (the checkpoint's unless given), norms and biases float32. `shardings` is a tree like
    the params' (`weights.shardings`); without it all is on the first device. `progress(path, bytes)` is
    called once a leaf. Over what stays on the host (on CPU all of it) its memory peaks at a few tensors.
    With `quantise`, linear layers are QuantWeight leaves, made a tensor at a time; those that the checkpoint
    stores so are taken as they are stored. UserError as `check_names` and `quant.plan`.
    """
    table = model.table
    check_names(source, table)
    specs = quant_specs(source, table, quantise) if quantise is not None else {}
    flat = flatten(shardings) if shardings is not None else {}
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def size(path: str) -> int:  # of one tensor
        return math.prod(table.shape(path)) // math.prod(table.apart(path))

    loading, params = {}, {}
    # A shard is put together on its own device, which under a mesh that is in use is an error.
    no_mesh = jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))
    with no_mesh, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            for path in sorted(table.rows, key=size, reverse=True):  # so that no large one is left to the end
                kind = np.float32 if not table.rows[path].ins else dtype or source.dtype(table.names(path)[0])
                sharding = flat.get(path, default)
                if path not in specs:
                    loading[path] = _load_leaf(source, table, path, np.dtype(kind), sharding, pool)
            for path in table.rows:
                if path in specs:
                    sharding = flat.get(path, default)
                    params[path] = _load_quantised(source, table, path, specs[path], sharding, pool)
                else:
                    params[path] = loading.pop(path)()
                if progress is not None:
                    progress(path, quant.nbytes(params[path]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return unflatten(params)


def quant_specs(source: Source, table: Table, options: QuantOptions) -> dict[str, quant.Spec]:
    """How `load_params` holds each weight that is quantised: as the checkpoint stores it where that is of the
    kind asked for, else as `quant.plan` says. UserError where one stack is stored in several ways."""
    layouts = {LINEAR: -1, IN_OUT: -2}

    def stored(path: str, name: str) -> quant.Spec | None:
        kept = source.kept(name)
        if kept is None or kept.kind != options.kind or layouts.get(table.rows[path].layout) != kept.inputs:
            return None
        return quant.Spec(kept.kind, kept.block, kept.double)

    out = {}
    for path in quant.chosen(options, table):
        found = {name: stored(path, name) for name in table.names(path)}
        kinds = set(found.values())
        if len(kinds) > 1:
            first = next(iter(found.values()))
            other = next(name for name, one in found.items() if one != first)
            module = table.rows[path].module.rpartition(".")[2]
            raise UserError(
                f"{source.source}: {other} is not stored quantised as {next(iter(found))} is, and layers of "
                f"one kind are held as one array: quant.exclude=[{module}] holds them unquantised"
            )
        one = kinds.pop()
        out[path] = one if one is not None else quant.spec(options, table, path)
    return out


def matrices(source: Source, table: Table, path: str) -> Iterator[np.ndarray]:
    """The matrices [*in, *out] at `path`, one after the other, as the checkpoint has them."""
    for name in table.names(path):
        x = from_hf(table, path, source.get(name))
        for at in np.ndindex(table.together(path)):
            yield np.array(x[at])
        source.release(name)


class _Shards:
    """The parts of one leaf on this process's devices. `apart` are its first axes, over which the checkpoint
    keeps separate tensors; `holds` and `inside` are of such an index and the bounds of a part."""

    def __init__(self, shape: tuple[int, ...], sharding, apart: int):
        self.shape, self.sharding, self.apart = shape, sharding, apart
        self.where = {
            device: tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }

    def holds(self, bounds, at: tuple[int, ...]) -> bool:
        return all(first <= x < last for x, (first, last) in zip(at, bounds[: self.apart], strict=True))

    def inside(self, bounds, at: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(x - first for x, (first, _) in zip(at, bounds[: self.apart], strict=True))

    def zeros(self, dtype) -> dict[Any, jax.Array]:
        return {
            device: jnp.zeros(_extent(bounds), dtype, device=device) for device, bounds in self.where.items()
        }

    def whole(self, parts: Sequence[jax.Array]) -> jax.Array:
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, list(parts))


def _load_leaf(
    source: Source, table: Table, path: str, dtype: np.dtype, sharding, pool
) -> Callable[[], jax.Array]:
    """Start loading, where all of it stays on the host; the result finishes it."""
    apart, names = table.apart(path), table.names(path)
    n = len(apart)
    at = list(np.ndindex(apart))  # where in the leaf each tensor goes
    shards = _Shards(table.shape(path), sharding, n)
    where = shards.where

    def read(i: int, outs) -> None:
        """Fill {bounds of a shard: its part of tensor i}."""
        x = from_hf(table, path, source.get(names[i]))
        for bounds, out in outs.items():
            part = x[tuple(slice(*b) for b in bounds[n:])]
            for matrix in np.ndindex(part.shape[: len(table.together(path))]):
                copy(out[matrix], part[matrix], len(table.ins(path)))
        source.release(names[i])

    def on_host() -> Callable[[], list[jax.Array]]:
        # On CPU device_put takes no copy: an aligned buffer that nobody else holds becomes the array.
        buffers = {bounds: aligned_empty(_extent(bounds), dtype) for bounds in set(where.values())}
        jobs = [
            pool.submit(
                read, i, {k: x[shards.inside(k, at[i])] for k, x in buffers.items() if shards.holds(k, at[i])}
            )
            for i in range(len(names))
        ]

        def finish() -> list[jax.Array]:
            for job in jobs:
                job.result()
            return [jax.device_put(buffers[bounds], device) for device, bounds in where.items()]

        return finish

    def elsewhere() -> list[jax.Array]:
        if n == 0:
            return on_host()()
        # The host holds a few tensors at a time, not the whole stack.
        parts = shards.zeros(dtype)
        jobs = collections.deque()
        for i in range(len(names) + THREADS):
            if i < len(names):
                outs = {
                    k: aligned_empty(_extent(k[n:]), dtype)
                    for k in set(where.values())
                    if shards.holds(k, at[i])
                }
                jobs.append((i, outs, pool.submit(read, i, outs)))
            if i >= THREADS - 1 and jobs:
                which, outs, job = jobs.popleft()
                job.result()
                for device, k in where.items():
                    if k in outs:
                        one = jax.device_put(outs[k], device)
                        parts[device] = _set_part(parts[device], one, shards.inside(k, at[which]))
                jax.block_until_ready(list(parts.values()))
        return list(parts.values())

    get = on_host() if all(device.platform in HOST for device in where) else elsewhere
    return lambda: shards.whole(get())


def _load_quantised(source: Source, table: Table, path: str, one: quant.Spec, sharding, pool) -> QuantWeight:
    """A quantised leaf, tensor by tensor, each quantised on this process's first device where it is not
    stored so."""
    apart, names = table.apart(path), table.names(path)
    leaf, outs = quant.abstract(table, path, one), len(table.outs(path))
    like, treedef = jax.tree.flatten(leaf)
    all_shards = [
        _Shards(x.shape, s, len(apart))
        for x, s in zip(like, jax.tree.leaves(quant.shardings(table, path, one, sharding)), strict=True)
    ]
    kept = [source.kept(name) for name in names]

    def read(i: int) -> Any:
        """The leaves of tensor i, or the tensor where it has yet to be quantised."""
        kind = kept[i]
        if kind is not None and kind.kind == one.kind:
            values = quant.leaves_of_stored(table, path, one, source.get_kept(names[i]))
        else:
            values = from_hf(table, path, source.get(names[i]))
            values = np.array(values)  # what the file holds may be let go
        source.release(names[i])
        return values

    def quantised_leaves(x: np.ndarray) -> list[Any]:
        matrices = [
            jax.tree.leaves(quant.quantise_one(jax.device_put(x[m], here), one, outs))
            for m in np.ndindex(table.together(path))
        ]
        if not table.together(path):
            return matrices[0]
        stacked = [jnp.stack(each) for each in zip(*matrices, strict=True)]
        return [s.reshape(*table.together(path), *s.shape[1:]) for s in stacked]

    here = jax.local_devices()[0]
    parts = [shards.zeros(x.dtype) for shards, x in zip(all_shards, like, strict=True)]
    jobs = collections.deque(pool.submit(read, i) for i in range(min(2, len(names))))
    for i, at in enumerate(np.ndindex(apart)):
        values = jobs.popleft().result()
        if i + 2 < len(names):
            jobs.append(pool.submit(read, i + 2))
        if not isinstance(values, list):
            values = quantised_leaves(values)
        for shards, held, value in zip(all_shards, parts, values, strict=True):
            if len(shards.where) > 1:
                value = np.asarray(value)
            for device, bounds in shards.where.items():
                if shards.holds(bounds, at):
                    cut = value[tuple(slice(*b) for b in bounds[len(apart) :])] if value.ndim else value
                    put = jax.device_put(cut, device)
                    held[device] = _set_part(held[device], put, shards.inside(bounds, at))
        jax.block_until_ready([list(held.values()) for held in parts])
    return jax.tree.unflatten(
        treedef, [shards.whole(list(held.values())) for shards, held in zip(all_shards, parts, strict=True)]
    )


def _extent(bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


@functools.partial(jax.jit, donate_argnums=0)
def _set_part(stack, part, at):
    part = part.reshape((1,) * len(at) + part.shape)
    return jax.lax.dynamic_update_slice(stack, part, (*at, *(0,) * (part.ndim - len(at))))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, at a 64-byte boundary: what XLA's CPU client needs to take an array without a copy.

    A large one is mapped by itself: np.empty asks for huge pages, whose first touch took 2 to 5 times as long
    as that of small ones on a virtual machine that hands free memory back to its host."""
    size = math.prod(shape) * dtype.itemsize
    if size >= 1 << 22 and hasattr(mmap, "MAP_ANONYMOUS"):
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(mapped, dtype).reshape(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
