"""LoRA adapters in PEFT's format, out and in: adapter_model.safetensors and adapter_config.json.

Keys are `base_model.model.` + the torch module's path + `.lora_A.weight` [r, in], `.lora_B.weight` [out, r].
"""

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax import hf, lora
from ftjax import peft_keys as keys
from ftjax.errors import UserError
from ftjax.lora import LoraConfig, Plan
from ftjax.models import Model
from ftjax.peft_keys import PREFIX
from ftjax.weights import IN_OUT, Table, Weight, flatten, module_of, unflatten

log = logging.getLogger("ftjax")
WEIGHTS, CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "ftjax.json"
# Fields of adapter_config.json that change what the adapter computes and are not implemented, with their
# neutral values. Initialisations that alter the base (PiSSA and the like) fit no published base afterwards.
NEUTRAL: Mapping[str, tuple] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
    "fan_in_fan_out": (True, False, None),  # PEFT sets it by the modules that it finds
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank can be


class Inexpressible(UserError):
    """The adapter has what the loader it is for does not take: a merged export has it all."""


def save(
    folder: str | os.PathLike,
    plan: Plan,
    adapters: dict,
    config: LoraConfig,
    table: Table,
    source: hf.Source,
    *,
    base_name: str | None = None,
    layout: str = "peft",
    chat_template: str | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter in PEFT's format: float32, as PEFT itself would write it, or for vLLM.

    With layout "peft", experts that transformers fuses go out as `target_parameters`. With "vllm", for
    loaders that read neither patterns nor use_rslora, every module has the checkpoint's name, each expert its
    own tensors, scales are folded into B, and all have one rank that vLLM allows.

    `base_name` (where the source is, unless given: for a GGUF file name the exported base) becomes
    base_model_name_or_path; the source and its fingerprint are kept in ftjax.json beside. The folder is
    re-opened and compared before it takes its name. Inexpressible where the layout cannot say what was
    tuned; UserError where a factor is not finite, or as `hf.writing`.
    """
    factors = {path: np.asarray(x, np.float32) for path, x in flatten(adapters).items()}
    for path, x in factors.items():
        if not np.isfinite(x).all():
            raise UserError(f"the adapter of {path} has values that are not finite: it was not saved")
    base = hf.describe(source)
    own: dict[str, Any] = {"base": base}
    if layout == "vllm":
        config, plan, factors = _uniform(config, plan, factors)
    else:
        own["lora"] = dataclasses.asdict(config)
    view = keys.view(table, source.torch_name, stored=layout == "vllm")
    fused = keys.fused_plan(view, plan)
    tensors = keys.encode(view, fused, keys.fuse(view, plan, fused, factors))
    assert tensors and all(x.size for x in tensors.values())
    fields = _config_fields(config, plan, view) | {
        "base_model_name_or_path": base_name or base["source"],
        "revision": None if base_name else source.revision,
    }
    entries = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    with hf.writing(folder, sum(x.nbytes for x in tensors.values()), overwrite) as tmp:
        hf.write_safetensors(tmp / WEIGHTS, entries, tensors.__getitem__)
        hf.write_json(tmp / CONFIG, fields)
        hf.write_json(tmp / OWN, own)
        if chat_template is not None:
            (tmp / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        if card is not None:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        _, plan_again, again = read(tmp, table)
        assert plan_again == plan, "the adapter's config does not say what was trained"
        for path, x in flatten(again).items():
            assert np.allclose(x, factors[path], rtol=1e-6, atol=0), path  # a scale folded in and out rounds
    return Path(folder)


def _uniform(config: LoraConfig, plan: Plan, factors):
    """The same adapter with its scales in B and one rank."""
    largest = max(adapted.rank for adapted in plan.values())
    if largest > VLLM_RANKS[-1]:
        raise Inexpressible(f"rank {largest}: vLLM takes at most {VLLM_RANKS[-1]}; a merged export takes any")
    rank = min(r for r in VLLM_RANKS if r >= largest)
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


def to_peft(plan: Plan, factors, table: Table) -> dict[str, np.ndarray]:
    """{key in PEFT's file: array} of factors by path, where no name differs by the class that is loaded."""
    view = keys.view(table)
    fused = keys.fused_plan(view, plan)
    return keys.encode(view, fused, keys.fuse(view, plan, fused, factors))


def _config_fields(config: LoraConfig, plan: Plan, view: keys.View) -> dict[str, Any]:
    """adapter_config.json. Where PEFT's names are ours, the user's own settings are kept."""
    fused = keys.fused_plan(view, plan)
    chosen = keys.adapted_names(view, fused)
    same = not view.fused and set(chosen) == set(_modules(plan, view.base))
    if same and not any(x.parameter for x in chosen.values()):
        chooses = _own_settings(config, plan, view.base)
    else:
        chooses = keys.settings(view, fused, config.r, config.lora_alpha, config.use_rslora)
    # PEFT has no dropout for parameters, and refuses a config that asks for it
    dropout = 0.0 if chooses["target_parameters"] else config.lora_dropout
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": dropout,
        "layers_pattern": None,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": any(_in_out(view.base.rows[path]) for path in plan),
        "init_lora_weights": True,
        "modules_to_save": None,
        "exclude_modules": None,
        "trainable_token_indices": None,
        "auto_mapping": None,
    } | chooses


def _in_out(row: Weight) -> bool:
    """Whether the row is a module that keeps its weight [in, out]: PEFT's fan_in_fan_out."""
    return row.layout is IN_OUT and not row.many


def _own_settings(config: LoraConfig, plan: Plan, table: Table) -> dict[str, Any]:
    """PEFT takes layers_to_transform with a list of names only, and other loaders know "all-linear" not at
    all, so both become lists."""
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
        "target_modules": targets,
        "target_parameters": None,
        "layers_to_transform": layers,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }


def _modules(plan: Plan, table: Table) -> list[str]:
    """Full paths of the adapted modules, by the checkpoint's names."""
    out = []
    for path, adapted in plan.items():
        names = table.names(path)
        ranks = np.reshape(adapted.ranks, (len(names), -1)).max(-1)
        out += [module_of(name) for name, rank in zip(names, ranks, strict=True) if rank]
    return out


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
    raw = hf.read_json(folder / CONFIG)
    given = _read_config(folder / CONFIG, raw)
    file = _open_weights(folder)
    view = _find_view(file, table)
    own = _own_config(folder, raw, view)
    if own is not None:
        config, plan = own
        fused = keys.fused_plan(view, plan)
        flat = _read_weights(folder / WEIGHTS, file, fused, view)
        ours = keys.unfuse(view, plan, fused, flat)
        again = keys.fuse(view, plan, fused, ours)
        if all(np.allclose(again[path], x, rtol=1e-5, atol=0) for path, x in flat.items()):
            return config, plan, unflatten(ours)
    try:
        config = _known_names(given, raw, view)
        fused = lora.plan(config, view.table)
    except UserError as e:
        raise UserError(f"{folder / CONFIG}: {e}") from None
    flat = _read_weights(folder / WEIGHTS, file, fused, view)
    plan = keys.guess_plan(view, fused, flat)
    flat = keys.unfuse(view, plan, fused, flat)
    if not _plans(config, table, plan):
        config = _config_of(config, plan, table)
        assert lora.plan(config, table).keys() == plan.keys()
    return config, plan, unflatten(flat)


def _plans(config: LoraConfig, table: Table, plan: Plan) -> bool:
    try:
        return lora.plan(config, table) == plan
    except UserError:
        return False


def _config_of(config: LoraConfig, plan: Plan, table: Table) -> LoraConfig:
    """`config` with settings by our names that come to `plan`."""
    view = keys.view(table, stored=True)
    found = keys.settings(view, plan, config.r, config.lora_alpha, config.use_rslora)
    return dataclasses.replace(
        config,
        target_modules=tuple(found["target_modules"]),
        layers_to_transform=None,
        rank_pattern=found["rank_pattern"],
        alpha_pattern=found["alpha_pattern"],
    )


# Classes that hold the text decoder keep it under one of these
NESTINGS = (("", ""), ("model.", "model.language_model."), ("", "language_model."))


def _find_view(file: hf.SafetensorsFile, table: Table) -> keys.View:
    """The names, of those that the model's modules may have, that fit the most tensors of the file."""
    found = {re.sub(r"(\.base_layer)*\.lora_.*", "", key.removeprefix(PREFIX)) for key in file.entries}
    best, most = keys.view(table), -1
    for stored in (False, True):
        for old, new in NESTINGS:
            view = keys.view(table, lambda name, old=old, new=new: _nested(name, old, new), stored=stored)
            count = len(found & view.modules())
            if count > most:
                best, most = view, count
    return best


def _nested(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


CHOOSES = ("r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "layers_to_transform")
CHOOSES += ("rank_pattern", "alpha_pattern", "exclude_modules")


def _own_config(folder: Path, raw: dict, view: keys.View) -> tuple[LoraConfig, Plan] | None:
    """What ftjax.json says of an adapter that we wrote, if adapter_config.json still says the same."""
    if not (folder / OWN).is_file():
        return None
    try:
        own = hf.read_json(folder / OWN)["lora"]
        own = {key: tuple(x) if isinstance(x, list) else x for key, x in own.items()}
        config = LoraConfig(**own)
        plan = lora.plan(config, view.base)
        fields = _config_fields(config, plan, view)
    except (UserError, KeyError, TypeError, AttributeError):
        return None
    return (config, plan) if all(raw.get(x) == fields[x] for x in CHOOSES) else None


def _read_config(path: Path, raw: dict) -> LoraConfig:
    """The settings as given. UserError where they say what is not implemented."""
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={raw.get('peft_type')!r} is not supported; supported: LORA")
    for key, allowed in NEUTRAL.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported; supported: {allowed[0]!r}")
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    if not targets and not raw.get("target_parameters"):
        raise UserError(f"{path}: target_modules={targets!r}: names of modules, or a regex, were expected")
    layers = tuple(layers) if isinstance(layers, list) else layers
    try:
        return LoraConfig(
            r=int(raw.get("r", 8)),
            lora_alpha=raw.get("lora_alpha", 8),
            lora_dropout=float(raw.get("lora_dropout") or 0.0),
            target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
            use_rslora=bool(raw.get("use_rslora")),
            layers_to_transform=layers if layers != () else None,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f"{path}: {e}") from None


def _known_names(config: LoraConfig, raw: dict, view: keys.View) -> LoraConfig:
    """`config` less what matches nothing, its parameters among the modules, nothing excluded."""
    table = view.table
    names = {True: [], False: []}
    for path in view.parts:
        if table.rows[path].role != "lookup":
            names[view.is_parameter(path)] += map(module_of, table.names(path))
    modules = names[True] + names[False]
    targets = config.target_modules
    parameters = tuple(module_of(name) for name in raw.get("target_parameters") or ())
    if isinstance(targets, str):
        if parameters:
            targets = tuple(m for m in names[False] if re.fullmatch(targets, m))
    else:
        targets = _known("target_modules", targets, modules, _ends_with) or targets
    if parameters:
        chosen = [m for m in names[True] if any(_ends_with(x, m) for x in parameters)]
        if config.layers_to_transform is None:
            known = _known("target_parameters", parameters, modules, _ends_with)
            targets = (*targets, *known)
        else:  # which PEFT applies to modules only
            plain = lora.plan(dataclasses.replace(config, target_modules=targets), table) if targets else {}
            targets = (*_modules(plain, table), *chosen)
            config = dataclasses.replace(config, layers_to_transform=None)
    config = dataclasses.replace(config, target_modules=targets)
    if raw.get("exclude_modules"):
        left = _without(raw["exclude_modules"], config, modules, table)
        config = dataclasses.replace(config, target_modules=left, layers_to_transform=None)
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        found = {re.sub(r"\\?\.weight$", "", p): x for p, x in getattr(config, key).items()}
        known = _known(key, tuple(found), modules, _matches)
        patterns[key] = {p: found[p] for p in known}
    return dataclasses.replace(config, **patterns)


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


def _without(exclude, config: LoraConfig, modules: list[str], table: Table) -> tuple[str, ...]:
    """The modules that `config` chooses less those that exclude_modules names, as full paths."""
    plan = lora.plan(dataclasses.replace(config, rank_pattern={}, alpha_pattern={}), table)
    if isinstance(exclude, str):
        return tuple(m for m in _modules(plan, table) if not re.fullmatch(exclude, m))
    return tuple(m for m in _modules(plan, table) if not any(_ends_with(x, m) for x in exclude))


def _open_weights(folder: Path) -> hf.SafetensorsFile:
    path = folder / WEIGHTS
    if not path.is_file():
        others = [p for p in folder.glob("adapter_model.*")]
        hint = f"; {hf.few(others)} would have to be saved as safetensors first" if others else ""
        raise UserError(f"{folder}: no {WEIGHTS}{hint}")
    return hf.SafetensorsFile(path)


def _read_weights(path: Path, file: hf.SafetensorsFile, plan: Plan, view: keys.View) -> dict[str, np.ndarray]:
    """Factors of the view's rows. UserError where the file has others than `plan` asks for."""
    modules = [key for row in view.keys(plan).values() for key in row if key is not None]
    wanted = {f"{key}.lora_{x}.weight" for key in modules for x in "AB"}
    missing, extra = sorted(wanted - set(file.entries)), sorted(set(file.entries) - wanted)
    if missing:
        raise UserError(f"{path}: missing {len(missing)} tensors that {CONFIG} promises: {hf.few(missing)}")
    if extra:
        raise UserError(f"{path}: {len(extra)} tensors that {CONFIG} does not account for: {hf.few(extra)}")

    def get(name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = file.view(name)
        if x.shape != shape:
            raise UserError(
                f"{path}: {name} has shape {list(x.shape)}, this base and {CONFIG} make it {list(shape)}: "
                "the adapter is of another base model or rank"
            )
        return x.astype(np.float32)

    return keys.decode(view, plan, get)
