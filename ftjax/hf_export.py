"""Hugging Face checkpoints out: written tensor by tensor into a folder beside the target that takes its name
when it is whole, re-opened, and compared with the tuned model by its logits."""

import collections
import dataclasses
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ftjax import lora
from ftjax.errors import UserError
from ftjax.files import FLOATS, read_json, write_json, write_shards, writing
from ftjax.hf import HOST, Source, check_names, load_params, open_model
from ftjax.lora import Plan
from ftjax.models import Model
from ftjax.weights import Table, flatten, from_hf, hf_shape, to_hf_one

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog. Then it",
    '{"name": "Ada Lovelace", "born": 1815, "field": "',
    "Question: what is 12 + 30?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n",
)
MAX_DRIFT = 0.1  # Drift.relative: rounding to bfloat16 makes it some 0.01, a wrong weight about 1


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a model says to a few prompts: logits float32 [B, T, V] on tokens and segments int32 [B, T]."""

    tokens: np.ndarray
    segments: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far a second model's logits are from a first's, over the real positions of a probe."""

    max_logit: float
    relative: float  # root mean square of the difference, over the logits' standard deviation
    kl: float  # mean KL(first || second), nats a token
    agree: float  # share of positions with the same most likely token

    def __str__(self):
        size = f"max |Δlogit| {self.max_logit:.2g}, {self.relative:.1g} of their spread"
        return f"{size}, KL {self.kl:.2g} nats a token, same top token {self.agree:.1%}"


@dataclasses.dataclass(frozen=True)
class Saved:
    folder: Path
    files: list[str]
    size: int  # bytes of weights
    drift: Drift | None  # of the re-opened folder against the probe
    rounding: float | None  # what the cast to the saved dtype changed, over what tuning changed (norms)


def probe(model: Model, tree, tokenizer=None, texts: Iterable[str] = PROBE_TEXTS, length: int = 24) -> Probe:
    """The logits of `model` with the parameters (plain, LoRA leaves or both) in `tree`, computed in float32.

    Without a tokenizer the tokens are arbitrary ids.
    """
    vocab, texts = model.config.vocab_size, list(texts)
    length = min(length, model.config.max_position_embeddings)
    tokens, segments = np.zeros((2, len(texts), length), np.int32)
    for row, text in enumerate(texts):
        if tokenizer is None:
            ids = [(i * 7919 + row * 104729 + 1) % vocab for i in range(length)]
        else:
            ids = tokenizer.encode(text, add_special_tokens=False)[:length]
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    return Probe(tokens, segments, _logits(model, tree, tokens, segments))


def _logits(model: Model, tree, tokens, segments) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    run = jax.jit(model.with_options(dtype=np.float32, remat="none").logits)
    return np.asarray(run(tree, tokens, positions, segments))


def drift(first: Probe, model: Model, tree) -> Drift:
    """How far `tree`'s logits are from those that `first` holds."""
    keep = first.segments > 0
    a = first.logits[keep].astype(np.float64)
    b = _logits(model, tree, first.tokens, first.segments)[keep].astype(np.float64)
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1).mean()
    return Drift(
        max_logit=float(np.abs(a - b).max()),
        relative=float(np.sqrt(np.square(a - b).mean()) / np.maximum(a.std(axis=-1).mean(), 1e-30)),
        kl=float(kl),
        agree=float((a.argmax(-1) == b.argmax(-1)).mean()),
    )


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def save_model(
    folder: str | os.PathLike,
    model: Model,
    params: dict | None,
    source: Source,
    *,
    plan: Plan | None = None,
    adapters: dict | None = None,
    dtype=None,
    max_shard_bytes: int = 5 * 10**9,
    chat_template: str | None = None,
    stop_ids: Iterable[int] = (),
    card: str | None = None,
    check: Probe | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
) -> Saved:
    """Write a Hugging Face folder of `params`, or of the base with `adapters` (of `plan`) merged in if given.

    A merge adds in float32 to the base's weights as `source` has them, one tensor at a time, and casts
    once: to `dtype`, or the dtype that each tensor has in the source (bfloat16 for a GGUF file). The folder
    gets the source's config.json with no key changed that need not be, its generation config (with
    `stop_ids` added to the end-of-sequence ids), its tokenizer files byte for byte (but for
    `chat_template`, where given), and `card` as README.md. It is written beside and renamed into place,
    then re-opened; given `check`, its logits are compared. Where `params` are of another shape than the
    source's (a larger vocabulary), `config` says what changes in config.json and `tokenizer` {file: content}
    takes the place of the source's tokenizer files. UserError where the folder exists (unless
    `overwrite`), the disk is full, or the logits are further off than MAX_DRIFT.
    """
    check_names(source, model.table, shapes=config is None)
    dtype = None if dtype is None else np.dtype(dtype)
    if dtype is None and source.kind == "gguf":
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dtype is not None and dtype not in FLOATS.values():
        raise UserError(f"dtype {dtype} cannot be saved; one of: float32, bfloat16, float16")
    noise = np.zeros(2)
    tuned = Tuned(model.table, source, plan=plan, adapters=adapters, params=params)
    shapes = tuned.shapes()
    own = {source.stored_name(n): n for n in shapes}
    entries = {stored: (shapes[name], dtype or source.dtype(name)) for stored, name in own.items()}
    # what is no part of the decoder goes out as it came in, but for a tied head's copy of the embedding
    carried = [n for n in source.names() if re.fullmatch(model.table.others, n) and n not in shapes]
    carried = {source.stored_name(n): n for n in carried} | {n: n for n in source.others()}
    entries |= {stored: (source.shape(n), source.dtype(n)) for stored, n in carried.items()}

    def tensor(name: str) -> np.ndarray:
        if name in carried:
            return source.get(carried[name])
        base, x = tuned(own[name])
        out = x.astype(entries[name][1], copy=False)
        if not _finite(x):
            raise UserError(f"{name} has values that are not finite: nothing was written")
        if base is not None:
            noise[:] += np.square(out.astype(np.float32) - x).sum(), np.square(x - base).sum()
        return out

    size = sum(math.prod(shape) * kind.itemsize for shape, kind in entries.values())
    with writing(folder, size, overwrite) as tmp:
        write_shards(tmp, entries, tensor, max_shard_bytes)
        _write_config(tmp, source, dtype, config or {})
        _write_generation_config(tmp, source, stop_ids)
        if tokenizer is None:
            source.write_tokenizer(tmp)
        for name, content in (tokenizer or {}).items():
            (tmp / name).write_bytes(content)
        if chat_template is not None:
            write_chat_template(tmp, chat_template)
        if card is not None:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        result = None
        if check is not None:
            again = open_model(tmp)
            result = drift(check, model, load_params(again, model))
            if not result.relative <= MAX_DRIFT:
                raise UserError(f"{folder}: what was written does not compute what was tuned ({result})")
        files = sorted(p.name for p in tmp.iterdir())
    rounding = float(np.sqrt(noise[0] / noise[1])) if noise[1] else None
    return Saved(Path(folder), files, size, result, rounding)


class Tuned:
    """A tuned model's tensors by their names in the table, each made when asked for: name -> (the base's
    float32 tensor where an adapter changed it, else None; the tuned tensor).

    `params` are all weights, or None: those of `source`, with the adapters of `plan` merged in if given.
    """

    def __init__(self, table: Table, source: Source, *, plan: Plan | None = None, adapters=None, params=None):
        self.table, self.source, self.plan = table, source, plan or {}
        self.leaves = collections.defaultdict(dict)
        for key, x in flatten(adapters or {}).items():
            self.leaves[key.rpartition("/")[0]][key.rpartition("/")[2]] = np.asarray(x)
        self.params = flatten(params) if params is not None else None
        self.where = {name: (path, i) for path in table.rows for i, name in enumerate(table.names(path))}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape}"""
        return {name: hf_shape(self.table, path) for name, (path, _) in self.where.items()}

    def __call__(self, name: str) -> tuple[np.ndarray | None, np.ndarray]:
        path, i = self.where[name]
        table, apart = self.table, self.table.apart(path)
        at = tuple(map(int, np.unravel_index(i, apart))) if apart else ()
        if self.params is not None:
            leaf = self.params[path]
            if isinstance(leaf, jax.Array) and all(d.platform in HOST for d in leaf.devices()):
                leaf = np.asarray(leaf)  # without a copy, where indexing takes one
            return None, to_hf_one(table, path, np.asarray(leaf[at]))
        if path not in self.plan:
            return None, self.source.get(name)
        base = self.source.get(name)
        tuned = lora.merged_one(self.plan[path], self.leaves[path], from_hf(table, path, base), at)
        return (None, base) if tuned is None else (base.astype(np.float32), to_hf_one(table, path, tuned))


def _finite(x: np.ndarray) -> bool:
    """Whether all of x is. The bits of positive floats are ordered as the floats are, those of negative ones
    by size with the sign as top bit; infinity and what is not a number are the largest of either."""
    if x.dtype.itemsize != 2 or not x.size:
        return bool(np.isfinite(x).all())
    top = int(np.array(np.inf, x.dtype).view(np.uint16))  # float16's and bfloat16's own isfinite are slow
    return bool(x.view(np.int16).max() < top and x.view(np.uint16).max() < top | 0x8000)


def _write_config(folder: Path, source: Source, dtype: np.dtype | None, changes: Mapping[str, Any]) -> None:
    key = "dtype" if "dtype" in source.config else "torch_dtype"
    new: dict[str, Any] = source.config | ({key: dtype.name} if dtype is not None else {})
    if "text_config" in new:
        new["text_config"] = dict(new["text_config"]) | dict(changes)
    else:
        new |= changes
    raw = source.path / "config.json"
    if raw.is_file() and read_json(raw) == new:
        shutil.copyfile(raw, folder / "config.json")
    else:
        write_json(folder / "config.json", new)


def _write_generation_config(folder: Path, source: Source, stop_ids: Iterable[int]) -> None:
    raw, config = source.path / "generation_config.json", source.generation_config
    now = (config or source.config).get("eos_token_id")
    now = [now] if isinstance(now, int) else list(now or [])
    ends = list(dict.fromkeys([*now, *map(int, stop_ids)]))
    if raw.is_file() and ends == now:
        shutil.copyfile(raw, folder / raw.name)
        return
    if config is None:
        config = {k: v for k, v in source.config.items() if k.endswith("_token_id") and v is not None}
    if ends:
        config = config | {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    if config:
        write_json(folder / raw.name, config)


def push(folder: str | os.PathLike, repository: str, *, private: bool = False) -> str:
    """Upload a folder's files to a repository of the hub, made if there is none; its address.

    UserError where the hub refuses: not logged in, no right to write there, not reachable.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if not re.fullmatch(r"[\w][\w.-]*/[\w.-]+", repository):
        raise UserError(f"--push {repository}: a repository is OWNER/NAME")
    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Tuned with ftjax")
    except errors.LocalTokenNotFoundError:
        raise UserError(f"--push {repository}: not logged in: `hf auth login`, or set HF_TOKEN") from None
    except Exception as e:  # offline shows as one of a dozen classes of two libraries
        status = getattr(getattr(e, "response", None), "status_code", None)
        why = (
            "no right to write there: `hf auth login` with a token that may write"
            if status in (401, 403)
            else f"the hub cannot be reached or refuses ({type(e).__name__}: {e})"
        )
        raise UserError(f"--push {repository}: {why}. {folder} stays as it is") from e
    return f"pushed to {url}"


def write_chat_template(folder: Path, template: str) -> None:
    """The one place that readers look first, and out of tokenizer_config.json, so that there are not two."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        write_json(path, config)
