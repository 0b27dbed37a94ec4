"""LoRA adapters in PEFT's format, out and in: adapter_model.safetensors and adapter_config.json.

Keys are `base_model.model.` + the torch module's path + `.lora_A.weight` [r, in], `.lora_B.weight` [out, r].
"""

import dataclasses
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax import hf, lora
from ftjax.errors import UserError
from ftjax.lora import LoraConfig, Plan
from ftjax.models import Model
from ftjax.weights import Table, flatten, module_of, unflatten

log = logging.getLogger("ftjax")
WEIGHTS, CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "ftjax.json"
PREFIX = "base_model.model."
# Fields of adapter_config.json that change what the adapter computes and are not implemented, with their
# neutral values. Initialisations that alter the base (PiSSA and the like) fit no published base afterwards.
NEUTRAL: Mapping[str, tuple] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def save(
    folder: str | os.PathLike,
    plan: Plan,
    adapters: dict,
    config: LoraConfig,
    table: Table,
    source: hf.Source,
    *,
    base_name: str | None = None,
    portable: bool = False,
    chat_template: str | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter that PEFT loads: float32, its own rank for each module, PEFT's fields in its config.

    `base_name` (where the source is, unless given: for a GGUF file name the exported base) becomes
    base_model_name_or_path; the source and its fingerprint are kept in ftjax.json beside. With `portable`,
    for loaders that read neither patterns nor use_rslora, scales are folded into B and every rank is the
    largest. The folder is re-opened and compared before it takes its name. UserError where a factor is not
    finite, or as `hf.writing`.
    """
    factors = {path: np.asarray(x, np.float32) for path, x in flatten(adapters).items()}
    for path, x in factors.items():
        if not np.isfinite(x).all():
            raise UserError(f"the adapter of {path} has values that are not finite: it was not saved")
    if portable:
        config, plan, factors = _portable(config, plan, factors)
    tensors = _to_peft(plan, factors, table)
    assert tensors and all(x.size for x in tensors.values())
    base = hf.describe(source)
    fields = _config_fields(config, plan, table) | {
        "base_model_name_or_path": base_name or base["source"],
        "revision": None if base_name else source.revision,
    }
    entries = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    with hf.writing(folder, sum(x.nbytes for x in tensors.values()), overwrite) as tmp:
        hf.write_safetensors(tmp / WEIGHTS, entries, tensors.__getitem__)
        hf.write_json(tmp / CONFIG, fields)
        hf.write_json(tmp / OWN, {"base": base})
        if chat_template is not None:
            (tmp / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        if card is not None:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        _, plan_again, again = read(tmp, table)
        assert plan_again == plan, "the adapter's config does not say what was trained"
        for path, x in flatten(again).items():
            assert np.array_equal(x, factors[path]), path
    return Path(folder)


def _portable(config: LoraConfig, plan: Plan, factors):
    rank = max(adapted.rank for adapted in plan.values())
    flat, out = {}, {}
    for path, adapted in plan.items():
        a, b = factors[path + "/a"], factors[path + "/b"]
        scale = np.array(adapted.scales, np.float32)
        axis = len(adapted.lead)
        b = b * scale.reshape(*adapted.lead, *(1,) * (b.ndim - axis))
        pad = rank - adapted.rank
        flat[path + "/a"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, pad)])
        flat[path + "/b"] = np.pad(b, [(0, pad) if i == axis else (0, 0) for i in range(b.ndim)])
        ranks = tuple(rank if r else 0 for r in adapted.ranks)
        out[path] = dataclasses.replace(adapted, ranks=ranks, scales=tuple(float(r > 0) for r in ranks))
    config = dataclasses.replace(
        config, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}
    )
    return config, out, flat


def _to_peft(plan: Plan, factors, table: Table) -> dict[str, np.ndarray]:
    out = {}
    for path, adapted in plan.items():
        a, b = factors[path + "/a"], factors[path + "/b"]
        a, b = (x.reshape(-1, *x.shape[len(adapted.lead) :]) for x in (a, b))
        for name, rank, a_l, b_l in zip(table.names(path), adapted.ranks, a, b, strict=True):
            if rank:
                key = PREFIX + module_of(name)
                out[key + ".lora_A.weight"] = np.ascontiguousarray(a_l.reshape(-1, a_l.shape[-1]).T[:rank])
                out[key + ".lora_B.weight"] = np.ascontiguousarray(b_l.reshape(len(b_l), -1)[:rank].T)
    return out


def _config_fields(config: LoraConfig, plan: Plan, table: Table) -> dict[str, Any]:
    """adapter_config.json. PEFT takes layers_to_transform with a list of names only, and other loaders know
    "all-linear" not at all, so both become lists."""
    layers = config.layers_to_transform
    layers = list(layers) if isinstance(layers, tuple | list) else layers
    targets: Any = config.target_modules
    if targets == "all-linear":
        targets = sorted({table.rows[path].module.rpartition(".")[2] for path in plan})
    elif isinstance(targets, str) and layers is not None:
        targets, layers = _modules(plan, table), None
    elif not isinstance(targets, str):
        targets = list(targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "exclude_modules": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "auto_mapping": None,
    }


def _modules(plan: Plan, table: Table) -> list[str]:
    """Full paths of the adapted modules."""
    return [
        module_of(name)
        for path, adapted in plan.items()
        for name, rank in zip(table.names(path), adapted.ranks, strict=True)
        if rank
    ]


def load(folder: str | os.PathLike, model: Model) -> tuple[LoraConfig, Plan, dict]:
    """An adapter in PEFT's format as (config, plan, adapters tree of float32 arrays), for this model.

    UserError where it is not a plain LoRA adapter, its tensors are not those that its config promises, or
    their shapes are another model's.
    """
    config, plan, factors = read(folder, model.table)
    return config, plan, jax.tree.map(jax.numpy.asarray, factors)


def read(folder: str | os.PathLike, table: Table) -> tuple[LoraConfig, Plan, dict]:
    """`load` in numpy, for a weight table."""
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG}: not an adapter in PEFT's format")
    config = _read_config(folder / CONFIG, table)
    try:
        plan = lora.plan(config, table)
    except UserError as e:
        raise UserError(f"{folder / CONFIG}: {e}") from None
    return config, plan, _read_weights(folder, plan, table)


def _read_config(path: Path, table: Table) -> LoraConfig:
    raw = hf.read_json(path)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={raw.get('peft_type')!r} is not supported; supported: LORA")
    for key, allowed in NEUTRAL.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported; supported: {allowed[0]!r}")
    modules = [
        module_of(name)
        for name_path, row in table.rows.items()
        if row.ins and row.role != "lookup"
        for name in table.names(name_path)
    ]
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    if not targets:
        raise UserError(f"{path}: target_modules={targets!r}: names of modules, or a regex, were expected")
    if not isinstance(targets, str):
        targets = _known("target_modules", tuple(targets), modules, _ends_with) or tuple(targets)
    layers = tuple(layers) if isinstance(layers, list) else layers
    if raw.get("exclude_modules"):
        targets, layers = _without(raw["exclude_modules"], targets, layers, modules, table), None
    patterns = {
        key: {p: raw[key][p] for p in _known(key, tuple(raw.get(key) or ()), modules, _matches)}
        for key in ("rank_pattern", "alpha_pattern")
        if raw.get(key)
    }
    try:
        return LoraConfig(
            r=int(raw.get("r", 8)),
            lora_alpha=raw.get("lora_alpha", 8),
            lora_dropout=float(raw.get("lora_dropout") or 0.0),
            target_modules=targets,
            use_rslora=bool(raw.get("use_rslora")),
            layers_to_transform=layers if layers != () else None,
            **patterns,
        )
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f"{path}: {e}") from None


def _ends_with(target: str, module: str) -> bool:
    return module == target or module.endswith("." + target)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _known(field: str, given: tuple[str, ...], modules: list[str], match) -> tuple[str, ...]:
    """Those of `given` that match a module. PEFT lets one match nothing, so that is no error here either."""
    known = tuple(g for g in given if any(match(g, m) for m in modules))
    if known != given:
        log.warning("adapter_config.json: %s: %s match no module", field, sorted(set(given) - set(known)))
    return known


def _without(exclude, targets, layers, modules: list[str], table: Table) -> tuple[str, ...]:
    """The modules that `targets` and `layers` choose less those that exclude_modules names, as full paths."""
    plan = lora.plan(LoraConfig(target_modules=targets, layers_to_transform=layers), table)
    if isinstance(exclude, str):
        return tuple(m for m in _modules(plan, table) if not re.fullmatch(exclude, m))
    return tuple(m for m in _modules(plan, table) if not any(_ends_with(x, m) for x in exclude))


def _read_weights(folder: Path, plan: Plan, table: Table) -> dict:
    path = folder / WEIGHTS
    if not path.is_file():
        others = [p for p in folder.glob("adapter_model.*")]
        hint = f"; {hf.few(others)} would have to be saved as safetensors first" if others else ""
        raise UserError(f"{folder}: no {WEIGHTS}{hint}")
    file = hf.SafetensorsFile(path)
    wanted = {f"{PREFIX}{m}.lora_{x}.weight" for m in _modules(plan, table) for x in "AB"}
    missing, extra = sorted(wanted - set(file.entries)), sorted(set(file.entries) - wanted)
    if missing:
        raise UserError(f"{path}: missing {len(missing)} tensors that {CONFIG} promises: {hf.few(missing)}")
    if extra:
        raise UserError(f"{path}: {len(extra)} tensors that {CONFIG} does not account for: {hf.few(extra)}")

    def get(name: str, shape: tuple[int, int]) -> np.ndarray:
        x = file.view(name)
        if x.shape != shape:
            raise UserError(
                f"{path}: {name} has shape {list(x.shape)}, this base and {CONFIG} make it {list(shape)}: "
                "the adapter is of another base model or rank"
            )
        return x.astype(np.float32)

    flat = {}
    for row, adapted in plan.items():
        ins, outs = table.ins(row), table.outs(row)
        layers = len(adapted.ranks)
        a = np.zeros((layers, math.prod(ins), adapted.rank), np.float32)
        b = np.zeros((layers, adapted.rank, math.prod(outs)), np.float32)
        for i, (name, rank) in enumerate(zip(table.names(row), adapted.ranks, strict=True)):
            if rank:
                key = PREFIX + module_of(name)
                a[i, :, :rank] = get(key + ".lora_A.weight", (rank, math.prod(ins))).T
                b[i, :rank] = get(key + ".lora_B.weight", (math.prod(outs), rank)).T
        flat[row + "/a"] = a.reshape(*adapted.lead, *ins, adapted.rank)
        flat[row + "/b"] = b.reshape(*adapted.lead, adapted.rank, *outs)
    return unflatten(flat)
