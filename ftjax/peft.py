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

from ftjax import files, hf, lora
from ftjax import peft_keys as keys
from ftjax.errors import UserError
from ftjax.lora import Adapted, LoraConfig, Plan, Rows, Whole
from ftjax.models import Model
from ftjax.peft_keys import PREFIX, Inexpressible
from ftjax.weights import IN_OUT, Table, Weight, flatten, module_of, unflatten

log = logging.getLogger("ftjax")
WEIGHTS, CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "ftjax.json"
OWN_TYPE = "FTJAX"  # in place of PEFT's "LORA", of adapters that PEFT cannot say
# Fields of adapter_config.json that change what the adapter computes and are not implemented, with their
# neutral values. Initialisations that alter the base (PiSSA and the like) fit no published base afterwards.
NEUTRAL: Mapping[str, tuple] = {
    "lora_bias": (False, None),
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
# Classes whose experts are one tensor that vLLM adapts as PEFT does (`is_3d_moe_weight` in its models)
VLLM_FUSED = frozenset(("GptOssForCausalLM", "Qwen3_5MoeForConditionalGeneration"))


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
    own tensors, scales are folded into B, and all have one rank that vLLM allows; experts that the checkpoint
    keeps in one tensor go out as PEFT has them, for the models of which vLLM takes that. "ftjax" says all
    that can be tuned, by the checkpoint's names, and is read by nothing but `load`.

    `base_name` (where the source is, unless given: for a GGUF file name the exported base) becomes
    base_model_name_or_path; the source and its fingerprint are kept in ftjax.json beside. The folder is
    re-opened and compared before it takes its name. Inexpressible where the layout cannot say what was
    tuned; UserError where a factor is not finite, or as `files.writing`.
    """
    config, plan, adapters = lora.plain(config, plan, adapters)
    factors = {path: np.asarray(x, np.float32) for path, x in flatten(adapters).items()}
    for path, x in factors.items():
        if not np.isfinite(x).all():
            raise UserError(f"the adapter of {path} has values that are not finite: it was not saved")
    base = hf.describe(source)
    own: dict[str, Any] = {"base": base}
    together = layout == "vllm" and _vllm_fuses(plan, table, source)
    view = keys.view(table, source.torch_name, stored=layout != "peft" and not together)
    fused = keys.fused_plan(view, plan)
    tree = keys.fuse(view, plan, fused, factors)
    if layout == "vllm":
        config, fused, tree = _uniform(config, fused, tree)
        if together:
            _check_vllm_experts(fused, view)
    else:
        own |= {"lora": dataclasses.asdict(config), "whole": _whole_names(plan, table)}
    tensors = keys.encode(view, fused, tree)
    if layout == "ftjax":
        fields = {"peft_type": OWN_TYPE}
    else:
        fields = _config_fields(config, fused, view)
        tensors |= _rest(fused, view, source, set(tensors))
    assert tensors and all(x.size for x in tensors.values())
    fields |= {
        "base_model_name_or_path": base_name or base["source"],
        "revision": None if base_name else source.revision,
    }
    entries = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    with files.writing(folder, sum(x.nbytes for x in tensors.values()), overwrite) as tmp:
        files.write_safetensors(tmp / WEIGHTS, entries, tensors.__getitem__)
        files.write_json(tmp / CONFIG, fields)
        files.write_json(tmp / OWN, own)
        if chat_template is not None:
            (tmp / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        if card is not None:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        _, plan_again, again = read(tmp, table)
        if layout == "vllm":  # parts of one tensor may come back with more of the rank than each had
            _check_same(plan, factors, plan_again, flatten(again))
            return Path(folder)
        assert plan_again == plan, "the adapter's config does not say what was trained"
        again = keys.fuse(view, plan, fused, flatten(again))
        again = keys.encode(view, fused, again)
        for name, x in again.items():  # a scale folded in and out rounds
            assert np.allclose(x, tensors[name], rtol=1e-6, atol=0), name
    return Path(folder)


def check(config: LoraConfig, plan: Plan, table: Table) -> str | None:
    """Why PEFT's format cannot say what `plan` trains, known before it is trained; None where it can."""
    plan = {
        path: dataclasses.replace(one, origin=False) if isinstance(one, Adapted) else one
        for path, one in plan.items()
    }
    view = keys.view(table)
    try:
        _config_fields(config, keys.fused_plan(view, plan), view)
    except Inexpressible as e:
        return str(e)
    return None


def save_run(folder: str | os.PathLike, *args, **options) -> Path:
    """`save` as PEFT writes it where PEFT can say what was tuned, else in our own layout with a warning, so
    that no run ends without its adapter."""
    try:
        return save(folder, *args, **options)
    except Inexpressible as e:
        log.warning("%s: kept in ftjax's own format, which PEFT does not read: %s", folder, e)
        return save(folder, *args, **options, layout="ftjax")


def _whole_names(plan: Plan, table: Table) -> list[str]:
    """The checkpoint's names of what is trained whole."""
    out = []
    for path, one in plan.items():
        if isinstance(one, Whole):
            names = table.names(path)
            live: Any = np.reshape(one.live or [True] * len(names), (len(names), -1)).any(-1)
            out += [name for name, yes in zip(names, live, strict=True) if yes]
    return out


def _rest(plan: Plan, view: keys.View, source: hf.Source, written: set[str]) -> dict[str, np.ndarray]:
    """What PEFT saves with a module that is trained in part: its other tensors, as the base has them."""
    _, may = keys.expected(view, plan)
    whole = {key for row in keys.whole_keys(view, plan).values() for key in row if key is not None}
    saved = {key.rpartition(".")[0] for key in whole if ".base_layer." not in key}
    out = {}
    for path, parts in view.parts.items():
        stored = [view.base.names(part) for part in parts]
        for i, name in enumerate(view.table.names(path)):
            key = PREFIX + name
            if key in may and key not in written and keys.within(key, saved) and len(parts) == 1:
                out[key] = source.get(stored[0][i]).astype(np.float32)
    return out


def _vllm_fuses(plan: Plan, table: Table, source: hf.Source) -> bool:
    """Whether vLLM adapts the plan's experts in one tensor, as PEFT does. Inexpressible where the checkpoint
    has them so and vLLM is not known to."""
    tuned = {path for path, one in plan.items() if isinstance(one, Adapted) and table.rows[path].many}
    if tuned and VLLM_FUSED & set(source.config.get("architectures") or ()):
        return True
    if any(table.together(path) for path in tuned):
        names = sorted({table.rows[path].module for path in tuned if table.together(path)})
        raise Inexpressible(
            f"vLLM is not known to adapt this model's experts, which are one tensor ({', '.join(names)}): a "
            "merged export has them"
        )
    return False


def _check_vllm_experts(plan: Plan, view: keys.View) -> None:
    """vLLM takes the adapter of `experts.base_layer` for that of gate and up, of `experts` for that of down,
    and asks for both. Inexpressible where a layer's experts have one of them only."""
    found = view.keys(plan).items()
    prefixes = {key for path, row in found if view.table.together(path) for key in row if key is not None}
    outer = {key for key in prefixes if not key.endswith(".base_layer")}
    if prefixes != outer | {key + ".base_layer" for key in outer}:
        raise Inexpressible(
            "vLLM takes adapters of both of a layer's expert tensors or of neither: a merged export takes any"
        )


def _check_same(plan: Plan, factors, plan_again: Plan, again) -> None:
    """Assert that two adapters do the same to random inputs, matrix by matrix."""

    def acts(one: Any, flat, path: str) -> np.ndarray:
        each = len(one.ranks)
        a = flat[path + "/a"].reshape(each, -1, one.rank)
        b = flat[path + "/b"].reshape(each, one.rank, -1)
        x = np.random.default_rng(0).normal(size=(each, 1, a.shape[1])).astype(np.float32)
        return x @ a @ b * np.array(one.scales, np.float32)[:, None, None]

    for path, one in plan.items():
        mine, theirs = acts(one, factors, path), acts(plan_again[path], again, path)
        worst = np.abs(mine - theirs).max()  # a scale folded in and out rounds
        assert worst <= 1e-5 * np.abs(mine).max(), (path, worst)


def _uniform(config: LoraConfig, plan: Plan, factors):
    """The same adapter with its scales in B and one rank."""
    refused = {
        "DoRA": any(isinstance(one, Adapted) and one.dora for one in plan.values()),
        "weights trained whole": any(isinstance(one, Whole) for one in plan.values()),
        "trained token rows": any(isinstance(one, Rows) for one in plan.values()),
    }
    for what, found in refused.items():
        if found:
            raise Inexpressible(f"vLLM's loader of adapters does not take {what}: a merged export does")
    largest = max(one.rank for one in plan.values() if isinstance(one, Adapted))
    if largest > VLLM_RANKS[-1]:
        raise Inexpressible(f"rank {largest}: vLLM takes at most {VLLM_RANKS[-1]}; a merged export takes any")
    rank = min(r for r in VLLM_RANKS if r >= largest)
    flat, out = {}, {}
    for path, one in plan.items():
        adapted: Any = one
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


def _config_fields(config: LoraConfig, fused: Plan, view: keys.View) -> dict[str, Any]:
    """adapter_config.json for a plan of the view's rows. Where PEFT's names are ours, the user's own settings
    are kept. Inexpressible where PEFT has no setting for what is trained."""
    chosen = keys.adapted_names(view, fused)
    same = not (view.fused or view.nested or any(x.parameter for x in chosen.values()))
    if not chosen:
        raise Inexpressible("PEFT wants factors on one module at least: a merged export (--for hf) does not")
    if same and set(chosen) == set(_modules(fused, view.base)):
        chooses = _own_settings(config, fused, view.base)
    else:
        chooses = keys.settings(view, fused, config.r, config.lora_alpha, config.use_rslora)
    if chooses["target_parameters"] and any(isinstance(x, Adapted) and x.dora for x in fused.values()):
        raise Inexpressible(
            f"PEFT has no DoRA for parameters ({', '.join(chooses['target_parameters'])}): a merged export "
            "(--for hf) has it, and target_modules without them can be exported"
        )
    tie = any(view.table.rows[path].role == "lookup" for path in fused) and lora.tied(view.table)
    if tie and any(
        isinstance(x, Adapted) and x.dora and view.table.rows[p].role == "lookup" for p, x in fused.items()
    ):
        raise Inexpressible("PEFT's DoRA of a tied embedding and head has two norms: merge it (--for hf)")
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
        "use_dora": config.use_dora,
        "bias": config.bias,
        "lora_bias": False,
        "fan_in_fan_out": any(_in_out(view.base.rows[path]) for path in fused),
        "init_lora_weights": True,
        "modules_to_save": _saved_modules(config, fused, view),
        "trainable_token_indices": {
            module_of(view.table.names(path)[0]): list(one.indices)
            for path, one in fused.items()
            if isinstance(one, Rows)
        }
        or None,
        "ensure_weight_tying": tie,
        "auto_mapping": None,
    } | chooses


def _saved_modules(config: LoraConfig, plan: Plan, view: keys.View) -> list[str] | None:
    """Full paths of the modules that PEFT has to save whole."""
    out = set()
    wrapped = {key for row in view.keys(plan).values() for key in row if key is not None}
    whole = {
        name: key
        for path, row in keys.whole_keys(view, plan).items()
        for key, name in zip(row, view.table.names(path), strict=True)
        if key is not None
    }
    every = [name for path in view.parts for name in view.table.names(path)]
    for name, key in whole.items():
        inside = ".base_layer." in key and config.bias == "lora_only"
        if inside or (config.bias == "all" and name.endswith(".bias")):
            continue
        module, _, last = name.rpartition(".")
        plain = last in ("weight", "bias") and PREFIX + module not in wrapped
        if not plain and not all(x in whole for x in every if x.startswith(module + ".")):
            raise Inexpressible(
                f"PEFT saves modules, and {name} is part of one that is not trained whole: a merged export "
                "(--for hf) has it"
            )
        out.add(module)
    return sorted(m for m in out if not any(m.startswith(other + ".") for other in out)) or None


def _in_out(row: Weight) -> bool:
    """Whether the row is a module that keeps its weight [in, out]: PEFT's fan_in_fan_out."""
    return row.layout is IN_OUT and not row.many


def _own_settings(config: LoraConfig, plan: Plan, table: Table) -> dict[str, Any]:
    """PEFT takes layers_to_transform with a list of names only, and other loaders know "all-linear" not at
    all, so both become lists."""
    layers = config.layers_to_transform
    layers = list(layers) if isinstance(layers, tuple | list) else layers
    targets: Any = config.target_modules
    excluded = config.exclude_modules
    if excluded:  # where it shuts out what is trained in another way, PEFT has not to know
        targets, layers, excluded = _modules(plan, table), None, None
    elif targets == "all-linear":
        targets = sorted({m.rpartition(".")[2] for m in _modules(plan, table)})
    elif isinstance(targets, str) and layers is not None:
        targets, layers = _modules(plan, table), None
    elif not isinstance(targets, str):
        targets = list(targets)
    return {
        "target_modules": targets,
        "target_parameters": None,
        "exclude_modules": list(excluded) if isinstance(excluded, tuple) else excluded,
        "layers_to_transform": layers,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }


def _modules(plan: Plan, table: Table) -> list[str]:
    """Full paths of the adapted modules, by the checkpoint's names."""
    out = []
    for path, adapted in plan.items():
        if not isinstance(adapted, Adapted):
            continue
        names = table.names(path)
        ranks = np.reshape(adapted.ranks, (len(names), -1)).max(-1)
        out += [module_of(name) for name, rank in zip(names, ranks, strict=True) if rank]
    return out


def load(
    folder: str | os.PathLike, model: Model, source: hf.Source | None = None
) -> tuple[LoraConfig, Plan, dict]:
    """An adapter in PEFT's format as (config, plan, adapters tree of float32 arrays), for this model.

    UserError where it is no LoRA adapter, its tensors are not those that its config promises, their shapes
    are another model's, or it was trained on other weights than those of `source`.
    """
    if source is not None:
        _check_base(Path(folder).expanduser(), source)
    config, plan, factors = read(folder, model.table)
    return config, plan, jax.tree.map(jax.numpy.asarray, factors)


def _check_base(folder: Path, source: hf.Source) -> None:
    if not (folder / OWN).is_file():
        return
    base = files.read_json(folder / OWN).get("base") or {}
    mine: set[str | None] = {source.fingerprint()}
    if (source.path / OWN).is_file():  # the weights of a GGUF file, dequantised
        mine.add((files.read_json(source.path / OWN).get("base") or {}).get("fingerprint"))
    if base.get("fingerprint") and base["fingerprint"] not in mine:
        raise UserError(
            f"{folder}: trained on {base.get('source')} (fingerprint {base['fingerprint'][:12]}), not on "
            f"{source.source} (fingerprint {source.fingerprint()[:12]}): an adapter fits its own base only"
        )


def read(folder: str | os.PathLike, table: Table) -> tuple[LoraConfig, Plan, dict]:
    """`load` in numpy, for a weight table."""
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG}: not an adapter in PEFT's format")
    raw = files.read_json(folder / CONFIG)
    mine = raw.get("peft_type") == OWN_TYPE
    given = LoraConfig() if mine else _read_config(folder / CONFIG, raw)
    file = _open_weights(folder)
    view = _find_view(file, table, mine)
    own = _own_config(folder, raw, view)
    if mine and own is None:
        raise UserError(f"{folder / OWN} does not say how the adapter was made")
    if own is not None:
        config, plan = own
        fused = keys.fused_plan(view, plan)
        flat = _read_weights(folder / WEIGHTS, file, fused, view)
        ours = keys.unfuse(view, plan, fused, flat)
        again = keys.fuse(view, plan, fused, ours)
        if mine or all(np.allclose(again[path], x, rtol=1e-5, atol=0) for path, x in flat.items()):
            return config, plan, unflatten(ours)
    untied = not given.ensure_weight_tying and lora.tied(table)
    try:
        config = _known_names(given, raw, view)
        fused = lora.plan(dataclasses.replace(config, ensure_weight_tying=True), view.table)
    except UserError as e:
        raise UserError(f"{folder / CONFIG}: {e}") from None
    if untied:
        _check_tied(folder, file, fused, view)
    flat = _read_weights(folder / WEIGHTS, file, fused, view)
    plan = keys.guess_plan(view, fused, flat)
    flat = keys.unfuse(view, plan, fused, flat)
    if not _plans(config, table, plan):
        config = _config_of(config, plan, table)
        assert lora.plan(config, table).keys() == plan.keys()
    return config, plan, unflatten(flat)


def _check_tied(folder: Path, file: files.SafetensorsFile, plan: Plan, view: keys.View) -> None:
    """UserError where the adapter parts what is one weight here, after all else of it was found to fit."""
    one = {p for p, x in plan.items() if view.table.rows[p].role == "lookup" and not isinstance(x, Rows)}
    if not one:
        return
    modules = [view.head, *(module_of(name) for path in one for name in view.table.names(path))]
    rest = {path: x for path, x in plan.items() if path not in one}
    _read_weights(folder / WEIGHTS, file, rest, view, tuple(f"{PREFIX}{module}." for module in modules))
    raise UserError(
        f"{folder / CONFIG}: ensure_weight_tying=false, PEFT's default: {modules[1]} or {modules[0]} was "
        "saved untied, and in this model they are one weight: train it with ensure_weight_tying=true, or "
        "merge it in PEFT into a base with tie_word_embeddings=false"
    )


def _plans(config: LoraConfig, table: Table, plan: Plan) -> bool:
    try:
        return lora.plan(config, table) == plan
    except UserError:
        return False


def _config_of(config: LoraConfig, plan: Plan, table: Table) -> LoraConfig:
    """`config` with settings by our names that come to `plan`."""
    view = keys.view(table, stored=True)
    found = keys.settings(view, plan, config.r, config.lora_alpha, config.use_rslora)
    whole = [n for n in _whole_names(plan, table) if config.bias == "none" or not n.endswith("bias")]
    return dataclasses.replace(
        config,
        modules_to_save=tuple(sorted({name.rpartition(".")[0] for name in whole})) or None,
        target_modules=tuple(found["target_modules"]),
        exclude_modules=None,
        layers_to_transform=None,
        rank_pattern=found["rank_pattern"],
        alpha_pattern=found["alpha_pattern"],
    )


# Classes that hold the text decoder keep it under one of these
NESTINGS = (("", ""), ("model.", "model.language_model."), ("", "language_model."))


def _find_view(file: files.SafetensorsFile, table: Table, mine: bool) -> keys.View:
    """The names, of those that the model's modules may have, that fit the most tensors of the file; of our
    own layout the checkpoint's."""
    best, most = keys.view(table), -1
    for stored in (True,) if mine else (False, True):
        for old, new in NESTINGS:
            view = keys.view(table, lambda name, old=old, new=new: _nested(name, old, new), stored=stored)
            count = view.matches(file.entries)
            if count > most:
                best, most = view, count
    return best


def _nested(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


CHOOSES = ("r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "layers_to_transform")
CHOOSES += ("rank_pattern", "alpha_pattern", "exclude_modules", "use_dora", "bias", "modules_to_save")
CHOOSES += ("trainable_token_indices", "ensure_weight_tying")


def _own_config(folder: Path, raw: dict, view: keys.View) -> tuple[LoraConfig, Plan] | None:
    """What ftjax.json says of an adapter that we wrote, if adapter_config.json still says the same."""
    if not (folder / OWN).is_file():
        return None
    try:
        own = files.read_json(folder / OWN)
        values: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in own["lora"].items()
        }
        config = LoraConfig(**values)
        chosen = [f"^{re.escape(module_of(name))}$" for name in own.get("whole", ())]
        plan = lora.plan(config, view.base, chosen)
        if raw["peft_type"] == OWN_TYPE:
            return config, plan
        fields = _config_fields(config, keys.fused_plan(view, plan), view)
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
    tokens, excluded = raw.get("trainable_token_indices"), raw.get("exclude_modules")
    try:
        return LoraConfig(
            use_dora=bool(raw.get("use_dora")),
            bias=raw.get("bias") or "none",
            modules_to_save=tuple(raw.get("modules_to_save") or ()) or None,
            trainable_token_indices=tuple(tokens) if isinstance(tokens, list) else tokens or None,
            exclude_modules=tuple(excluded) if isinstance(excluded, list) else excluded,
            ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
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
        if table.rows[path].ins:
            names[view.is_parameter(path)] += map(module_of, table.names(path))
    modules = names[True] + names[False] + [view.head]
    targets = config.target_modules
    parameters = tuple(module_of(name) for name in raw.get("target_parameters") or ())
    bare = {
        name
        for path in view.matrices
        if not view.stored
        for name in table.names(path)
        if table.together(path) or not name.endswith(".weight")
    }
    bare = set(map(module_of, bare))
    if any(lora.matches(targets, m, "") for m in bare):  # PEFT's target_modules are modules, not parameters
        targets = tuple(m for m in modules if m not in bare and lora.matches(targets, m, ""))
    if isinstance(targets, str):
        if parameters:
            targets = tuple(m for m in names[False] if re.fullmatch(targets, m))
    else:
        targets = _known("target_modules", targets, modules, _ends_with) or targets
        used = {lora.matches(targets, module, "") for module in modules}
        targets = tuple(t for t in targets if t in used) or targets  # less what another already names
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
    if config.modules_to_save:
        paths = [n for path in view.parts for n in table.names(path)] + [view.head + ".weight"]
        around = sorted({n.rsplit(".", i)[0] for n in paths for i in range(1, n.count(".") + 1)})
        saved = _known("modules_to_save", config.modules_to_save, around, lambda x, m: m.endswith(x))
        config = dataclasses.replace(config, modules_to_save=saved or None)
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


def _open_weights(folder: Path) -> files.SafetensorsFile:
    path = folder / WEIGHTS
    if not path.is_file():
        others = [p for p in folder.glob("adapter_model.*")]
        hint = f"; {files.few(others)} would have to be saved as safetensors first" if others else ""
        raise UserError(f"{folder}: no {WEIGHTS}{hint}")
    return files.SafetensorsFile(path)


def _read_weights(
    path: Path, file: files.SafetensorsFile, plan: Plan, view: keys.View, others: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Factors of the view's rows. UserError where the file has others than `plan` asks for, but for names
    that begin with one of `others`, or they are not finite."""
    wanted, allowed = keys.expected(view, plan)
    found = {name for name in file.entries if not name.startswith(others)}
    missing, extra = sorted(wanted - found), sorted(found - wanted - allowed)
    if missing:
        raise UserError(
            f"{path}: missing {len(missing)} tensors that {CONFIG} promises: {files.few(missing)}; the file "
            "is incomplete or of another base model"
        )
    if extra:
        raise UserError(
            f"{path}: {len(extra)} tensors that {CONFIG} does not account for in this model: "
            f"{files.few(extra)}; the adapter is of another base model, or {CONFIG} was changed"
        )

    def get(name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = file.view(name)
        if x.shape != shape:
            raise UserError(
                f"{path}: {name} has shape {list(x.shape)}, this base and {CONFIG} make it {list(shape)}: "
                "the adapter is of another base model or rank"
            )
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise UserError(f"{path}: {name} has values that are not finite")
        return x

    return keys.decode(view, plan, get)
