"""Run configs: YAML and `key.sub=value` overrides in, one typed and strict dataclass out.

The options of each part are declared beside that part; here they are put together, checked by pydantic
without coercion, and every complaint says where the value stands and what would be right. YAML is read by the
1.2 core rules: 1e-4 is a number, `on` and 2024-01-01 are text. Relative paths in a config are relative to the
current directory, not to the file.

    config = load("run.yaml", ["optim.lr=1e-4"], "sft")
"""

import dataclasses
import difflib
import functools
import json
import os
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pydantic
import yaml

from ftjax import quant
from ftjax.checkpoint_options import CheckpointOptions
from ftjax.data.options import DataOptions
from ftjax.distributed import DistributedOptions
from ftjax.errors import UserError
from ftjax.lora import LoraConfig
from ftjax.mesh import MeshOptions
from ftjax.optim import OptimOptions
from ftjax.profile import ProfileOptions
from ftjax.quant import QuantOptions
from ftjax.report import ReportOptions
from ftjax.train import EvalOptions, TrainOptions

STRICT = {"extra": "forbid", "use_attribute_docstrings": True}


@dataclasses.dataclass(frozen=True)
class DpoOptions:
    """Direct preference optimisation: Rafailov et al. 2023, arXiv:2305.18290."""

    __pydantic_config__: ClassVar = STRICT

    beta: float = 0.1
    """How strongly the policy is held to the reference model."""
    label_smoothing: float = 0.0
    """Probability with which a pair's labels are taken to be flipped."""

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"dpo.beta={self.beta}: a positive number")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"dpo.label_smoothing={self.label_smoothing}: a number from 0 to below 0.5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every recipe that trains has in common."""

    __pydantic_config__: ClassVar = STRICT

    model: str
    """The base: a Hugging Face folder or hub id, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    output: str
    """The run folder; not given: runs/ and the name of the config file."""
    seed: int = 0
    """Every random number of the run follows from it."""
    data: DataOptions
    """The examples, and how they become rows of tokens."""
    lora: LoraConfig | None = dataclasses.field(default_factory=LoraConfig)
    """Low-rank factors; `lora: null` tunes every weight instead."""
    quant: QuantOptions | None = None
    """Hold the frozen base in few bits; null: in train.dtype."""
    optim: OptimOptions = dataclasses.field(default_factory=OptimOptions)
    """Optimiser and learning rate."""
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)
    """How long, in what batches and in what precision."""
    mesh: MeshOptions | Literal["auto"] = dataclasses.field(default_factory=MeshOptions)
    """How the devices share the work: the axes of a mesh, or `auto`, by what divides and fits."""
    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)
    """How the processes of a run on several hosts find one another; one host needs none of it."""
    eval: EvalOptions = dataclasses.field(default_factory=EvalOptions)
    """Evaluation while training."""
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)
    """What is saved to resume from."""
    report: ReportOptions = dataclasses.field(default_factory=ReportOptions)
    """What a run writes while it trains."""
    profile: bool | ProfileOptions = False
    """Trace a few steps and report where their time went; true, or a section that says which steps."""

    def __post_init__(self):
        if self.lora is not None and self.lora.init_lora_weights == "loftq":
            if self.quant is None:
                raise UserError(
                    "lora.init_lora_weights=loftq begins at what quantising takes off the base: set "
                    "quant.kind"
                )
            if getattr(self, "recipe", "") == "dpo":
                raise UserError(
                    "lora.init_lora_weights=loftq: the reference model of dpo is the base without the "
                    "factors, and so not what the policy begins at: use another"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning, of LoRA factors or of every weight: `ftjax sft`."""

    recipe: Literal["sft"] = "sft"
    """The verb this config is for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(RunConfig):
    """Direct preference optimisation on pairs of a chosen and a rejected answer: `ftjax dpo`."""

    recipe: Literal["dpo"] = "dpo"
    """The verb this config is for."""
    dpo: DpoOptions = dataclasses.field(default_factory=DpoOptions)
    """The objective."""


RECIPES: dict[str, type[RunConfig]] = {"sft": SftConfig, "dpo": DpoConfig}


# -- Settings without effect


def _source_formats(config) -> list[str | None]:
    settings = [config.data.train] + ([] if config.data.eval is None else [config.data.eval])
    return [f for one in settings for f in ([None] if isinstance(one, str) else [s.format for s in one])]


# (keys, whether they do nothing in this run, why and what to do). A key stands for its whole section.
NO_EFFECT: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("revision",),
        lambda c: os.path.exists(c.model),
        "{model} is a local path; only hub ids have revisions",
    ),
    (
        ("optim.momentum",),
        lambda c: c.optim.name not in ("sgd", "muon"),
        "{optim.name} has none (beta1 is its like)",
    ),
    (
        ("optim.beta1", "optim.beta2"),
        lambda c: c.optim.name not in ("adamw", "lion", "muon"),
        "{optim.name} does not use it",
    ),
    (("optim.eps",), lambda c: c.optim.name not in ("adamw", "muon"), "{optim.name} does not use it"),
    (
        ("optim.state_dtype", "optim.offload"),
        lambda c: c.optim.name == "adafactor",
        "adafactor's moments are factored: a few numbers a row and column",
    ),
    (
        ("train.mlp_chunk",),
        lambda c: c.train.mlp_chunk is not None and c.train.mlp_chunk >= c.data.max_length,
        "no row is longer than {data.max_length}",
    ),
    (
        ("optim.decay_ratio",),
        lambda c: c.optim.schedule != "wsd",
        "only schedule: wsd has it, not {optim.schedule}",
    ),
    (
        ("optim.final_lr_ratio",),
        lambda c: c.optim.schedule == "constant",
        "a constant schedule does not fall",
    ),
    (
        ("optim.warmup_ratio",),
        lambda c: c.optim.warmup_steps is not None,
        "warmup_steps is given, and decides",
    ),
    (("optim.lora_plus_ratio",), lambda c: c.lora is None, "lora is null: every weight is tuned"),
    (
        ("train.freeze",),
        lambda c: c.lora is not None,
        "lora trains nothing of the base; lora.exclude_modules leaves weights without factors",
    ),
    (
        ("train.label_smoothing", "train.z_loss_coef"),
        lambda c: c.recipe == "dpo",
        "the loss of ftjax dpo is of pairs; dpo.label_smoothing is its own",
    ),
    (("train.epochs",), lambda c: c.train.max_steps is not None, "train.max_steps is given, and decides"),
    (
        ("quant",),
        lambda c: c.lora is None,
        "lora is null: full tuning trains the base, which in few bits cannot be trained",
    ),
    (
        ("quant.double",),
        lambda c: c.quant is not None and c.quant.kind not in quant.DOUBLE,
        "the scales of {quant.kind} are not quantised",
    ),
    (
        ("data.buckets",),
        lambda c: c.data.packing != "none",
        "packing is {data.packing}; buckets are for `none`",
    ),
    (("data.eval_fraction",), lambda c: c.data.eval is not None, "data.eval is given"),
    (
        ("data.format",),
        lambda c: bool(_source_formats(c)) and all(_source_formats(c)),
        "every source names its own format",
    ),
    (
        ("data.chat_template", "data.template_args", "data.train_on"),
        lambda c: c.data.format == "text",
        "plain text (data.format: text) is not rendered as a chat",
    ),
    (
        ("data.cache_dir",),
        lambda c: c.data.streaming and c.data.eval is None,
        "streamed data is not cached, and there is no data.eval",
    ),
    (
        ("eval",),
        lambda c: c.data.eval is None and not c.data.eval_fraction,
        "there is no evaluation data; set data.eval or data.eval_fraction",
    ),
    (("report.project", "report.name"), lambda c: not c.report.to, "report.to names no tracker"),
)


def without_effect(config: RunConfig) -> dict[str, str]:
    """{key: why it does nothing in this run}."""

    def lookup(match):
        return str(functools.reduce(getattr, match[1].split("."), config))

    return {
        key: re.sub(r"\{([\w.]+)\}", lookup, why)
        for keys, dead, why in NO_EFFECT
        if dead(config)
        for key in keys
    }


# -- Reading YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core rules for plain scalars."""

    yaml_implicit_resolvers: ClassVar = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what _Loader would not read as text."""

    yaml_implicit_resolvers: ClassVar = {}

    def ignore_aliases(self, data):
        return True


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
        )


def _construct_int(loader, node):
    return int(node.value, 16 if node.value.lower().startswith("0x") else 10)  # 010 is ten: YAML 1.2


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text))

Path = tuple[str | int, ...]


def _dotted(path: Path) -> str:
    return re.sub(r"\.(\d+)(?=\.|\[|$)", r"[\1]", ".".join(map(str, path)))


@dataclasses.dataclass
class _Document:
    """Plain values, and where each was written."""

    value: dict
    places: dict[Path, str]

    def place(self, path: Path) -> str:
        """Of the value, or of the nearest section around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")


def _parse(text: str, name: str, places: dict[Path, str], root: Path = (), lines: bool = True) -> Any:
    loader = _Loader(text)

    def where(mark) -> str:
        return f"{name}:{mark.line + 1}" if lines and mark else name

    def read(node, path: Path):
        places[path] = where(node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [read(child, (*path, i)) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        result = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{where(key.start_mark)}: a key must be text")
            if key.value in result:
                raise UserError(
                    f"{where(key.start_mark)}: {_dotted((*path, key.value))} is given twice, first at "
                    f"{places[*path, key.value]}"
                )
            result[key.value] = read(child, (*path, key.value))
            places[*path, key.value] = where(key.start_mark)
        return result

    try:
        node = loader.get_single_node()
        return None if node is None else read(node, root)
    except yaml.MarkedYAMLError as e:
        what = " ".join(filter(None, (e.context, e.problem)))
        raise UserError(f"{where(e.problem_mark or e.context_mark)}: not valid YAML: {what}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{name}: not valid YAML: {e}") from None
    except RecursionError:
        raise UserError(f"{name}: an alias that holds itself") from None
    finally:
        loader.dispose()


def _read_file(path: str) -> _Document:
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        folder = pathlib.Path(path).parent
        names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        near = difflib.get_close_matches(pathlib.Path(path).name, names, 1, 0.5)
        hint = f"; did you mean {folder / near[0]}?" if near else f" (current directory: {os.getcwd()})"
        raise UserError(f"the config {path} does not exist{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a config is a YAML file") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from None
    except OSError as e:
        raise UserError(f"cannot read the config {path}: {e.strerror}") from None
    places: dict[Path, str] = {}
    value = _parse(text, path, places)
    if value is None:
        raise UserError(f"{path} is empty; a config of a run needs at least `model` and `data.train`")
    if not isinstance(value, dict):
        raise UserError(f"{places[()]}: a config is a mapping of keys to values, this is {_given(value)}")
    return _Document(value, places)


def _override(document: _Document, text: str) -> None:
    key, equals, raw = text.partition("=")
    if text.startswith("-") or not equals or not re.fullmatch(r"[\w.]+", key):
        raise UserError(f"{text!r}: a setting is written key.sub=value, like optim.lr=1e-4")
    path: Path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    name = f"command line ({text})"
    for known in [p for p in document.places if p[: len(path)] == path]:
        del document.places[known]
    value = _parse(raw, name, document.places, path, lines=False)
    document.places[path] = name
    parent: Any = document.value
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(parent, list) and isinstance(part, int):
            if part >= len(parent):
                raise UserError(f"{name}: {_dotted(path[:depth])} has {len(parent)} entries, counted from 0")
            if last:
                parent[part] = value
        elif isinstance(parent, dict):
            part = str(part)
            if last:
                parent[part] = value
            elif parent.get(part) is None or parent[part] is True:  # true: a section's defaults
                parent[part] = {}
                document.places[path[: depth + 1]] = name
        else:
            given = _dotted(path[:depth])
            raise UserError(
                f"{name}: {given} is {_given(parent)} ({document.place(path[:depth])}), not a section"
            )
        parent = parent[part]  # type: ignore[index]


# -- Types, in words


def _fields(cls) -> dict[str, Any]:
    hints = _hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@functools.cache
def _hints(cls):
    return typing.get_type_hints(cls)


def _options(tp) -> tuple:
    """The members of a union, or the type itself."""
    return (
        typing.get_args(tp)
        if isinstance(tp, types.UnionType) or typing.get_origin(tp) is typing.Union
        else (tp,)
    )


def _types_at(tp, path: Path) -> list:
    """The types that a value at `path` below `tp` may have."""
    found = list(_options(tp))
    for part in path:
        inner = []
        for one in found:
            origin, args = typing.get_origin(one), typing.get_args(one)
            if dataclasses.is_dataclass(one):
                inner += _options(_fields(one)[part]) if part in _fields(one) else ()
            elif origin in (list, tuple, Sequence) and isinstance(part, int):
                inner += _options(args[0])
            elif origin in (dict, Mapping):
                inner += _options(args[1])
        found = inner
    return found


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _in_words(tp) -> str:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if len(_options(tp)) > 1:
        return _list([_in_words(one) for one in _options(tp)], "or")
    if tp in _WORDS:
        return _WORDS[tp]
    if origin is Literal:
        return (
            _list([str(a) for a in args], "or") if len(args) == 1 else "one of " + ", ".join(map(str, args))
        )
    if dataclasses.is_dataclass(tp):
        return f"a section with keys like {', '.join(list(_fields(tp))[:4])}"
    if origin in (list, tuple, Sequence):
        return f"a list ({_in_words(args[0])} each)"
    if origin in (dict, Mapping):
        return f"a mapping of names to {_in_words(args[1])}"
    return "any value"


def _list(words: list[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _given(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, dict):
        return f"a section with keys {', '.join(map(str, list(value)[:4]))}" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{value}"


# -- Checking


@functools.cache
def _adapter(cls: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(cls)


def _all_keys(tp, prefix: Path = ()) -> list[Path]:
    keys = []
    for one in _options(tp):
        if dataclasses.is_dataclass(one):
            for name, hint in _fields(one).items():
                keys += [(*prefix, name), *_all_keys(hint, (*prefix, name))]
    return keys


def _unknown(cls: type, path: Path) -> str:
    """Message for a key that the section does not have."""
    *section, key = path
    valid = [
        name for tp in _types_at(cls, tuple(section)) if dataclasses.is_dataclass(tp) for name in _fields(tp)
    ]
    trains = cls in RECIPES.values()
    recipe = next(
        (r for r, other in RECIPES.items() if trains and not section and key in _fields(other)), None
    )
    near = difflib.get_close_matches(str(key), valid, 1, 0.6)
    known = _all_keys(cls)
    exact = [p for p in known if p[-1] == key]
    names = difflib.get_close_matches(str(key), [str(p[-1]) for p in known], 1, 0.8)
    elsewhere = exact or [p for p in known if p[-1] in names]
    hint = ""
    if recipe:
        hint = f"; it belongs to ftjax {recipe}, this is a config for ftjax {_recipe_of(cls)}"
    elif near and not exact:
        hint = f"; did you mean {_dotted((*section, near[0]))}?"
    elif elsewhere:
        hint = f"; did you mean {_dotted(elsewhere[0])}?"
    where = f"{_dotted(tuple(section))} has" if section else "a config has"
    return f"unknown key {_dotted(path)}{hint} ({where}: {', '.join(valid)})"


def _recipe_of(cls: type) -> str:
    return next(name for name, other in RECIPES.items() if other is cls)


def _data_path(value, loc: Path) -> Path:
    """Pydantic's location without the names of union members."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _value_at(value, path: Path):
    return functools.reduce(lambda v, part: v[part], path, value)


def _explain(cls: type, document: _Document, error: pydantic.ValidationError) -> UserError:
    complaints: dict[Path, str] = {}
    for one in error.errors(include_url=False):
        loc, kind = one["loc"], one["type"]
        path = _data_path(document.value, loc)
        if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
            path = (*path, loc[-1])
            complaints[path] = f"{_dotted(path)} is missing: {_in_words_at(cls, path)}. {_doc(cls, path)}"
        elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
            complaints[path] = _unknown(cls, path)
        elif kind == "value_error":
            message = str(one.get("ctx", {})["error"])
            name = re.match(r"([\w.\[\]]+)=", message)
            if name:  # our own messages begin with the key they are about
                deeper = tuple(int(x) if x.isdigit() else x for x in re.findall(r"\w+", name[1]))
                path = deeper if deeper in document.places else path
            complaints[path] = message
        else:
            given = _given(_value_at(document.value, path))
            complaints[path] = f"{_dotted(path) or 'config'}: expected {_in_words_at(cls, path)}, got {given}"
    # of a union, only the member that the value was meant for is of interest
    shown = {p: m for p, m in complaints.items() if not any(q != p and q[: len(p)] == p for q in complaints)}
    lines = []
    for path, message in shown.items():
        place = document.place(path)
        lines.append(f"{place}: {message}" if place else message)
    return UserError("\n".join(lines))


def _in_words_at(cls, path: Path) -> str:
    found = dict.fromkeys(_in_words(tp) for tp in _types_at(cls, path))
    return _list(list(found), "or") if found else "another type"


def _described(cls) -> dict[str, Any]:
    """Its JSON Schema. Pydantic finds the docstrings of a class's own fields only, so add its parents'."""
    tree = _adapter(cls).json_schema()
    for parent in filter(dataclasses.is_dataclass, cls.__bases__):
        for name, field in _described(parent)["properties"].items():
            if "description" in field:
                tree["properties"][name].setdefault("description", field["description"])
    return tree


def _doc(cls, path: Path) -> str:
    """The docstring under the field, from its section's schema."""
    for tp in _types_at(cls, path[:-1]):
        if dataclasses.is_dataclass(tp):
            fields = _described(tp)["properties"]
            return " ".join(fields.get(path[-1], {}).get("description", "").split())
    return ""


def _checked(cls, document: _Document) -> Any:
    try:
        # from JSON, because in strict mode pydantic takes a list for a tuple only there
        return _adapter(cls).validate_json(json.dumps(document.value, default=str), strict=True)
    except pydantic.ValidationError as e:
        raise _explain(cls, document, e) from None


# -- The public functions


def load_as(
    cls: type, path: str | os.PathLike, overrides: Sequence[str] = (), prepared=lambda values: values
):
    """The options of a dataclass from a YAML file and `key.sub=value` overrides, checked as configs are;
    `prepared` may rewrite the plain values before that, and once more with the overrides."""
    document = _read_file(os.fspath(path))
    document.value = prepared(document.value)
    for text in overrides:
        _override(document, text)
    document.value = prepared(document.value)
    return _checked(cls, document)


def from_flags(cls: type, given: Mapping[str, Any]):
    """The options of a dataclass from command-line flags {field: text, list of texts or bool}, checked as
    configs are. Text is read as YAML where the field is not text."""
    values, places = {}, {}
    for name, value in given.items():
        flag = flag_of(name)
        types = _options(_fields(cls)[name])

        def scalar(text, types, flag=flag):
            is_text = isinstance(text, str) and str in types
            return _parse(text, flag, {}, lines=False) if isinstance(text, str) and not is_text else text

        if isinstance(value, list):
            inner = [i for tp in types for arg in typing.get_args(tp)[:1] for i in _options(arg)]
            values[name] = [scalar(one, inner) for one in value]
        else:
            values[name] = scalar(value, types)
        places[(name,)] = flag
    return _checked(cls, _Document(values, places))


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def described(cls: type) -> Iterator[tuple[str, tuple, str, Any]]:
    """(name, types, docstring, default or dataclasses.MISSING) of each field of a dataclass of options."""
    for one in dataclasses.fields(cls):
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        yield one.name, _options(_fields(cls)[one.name]), _doc(cls, (one.name,)), default


def load(
    path: str | os.PathLike | None, overrides: Sequence[str] = (), recipe: str | None = None
) -> RunConfig:
    """The config of a YAML file and `key.sub=value` overrides, later ones winning; without a file, of these
    alone.

    `recipe` is the verb; without it the file's own `recipe` decides, or its sections. UserError, with every
    complaint and its place, for unknown or repeated keys, wrong types, and keys that have no effect in this
    run.
    """
    document = _Document({}, {}) if path is None else _read_file(os.fspath(path))
    for text in overrides:
        _override(document, text)
    written = document.value.get("recipe")
    of_keys = (name for name, one in RECIPES.items() if set(document.value) <= set(_fields(one)))
    recipe = recipe or written or next(of_keys, "sft")
    if recipe not in RECIPES or (written or recipe) != recipe:
        if written in RECIPES:
            raise UserError(
                f"{document.place(('recipe',))}: this config is for ftjax {written}, not ftjax {recipe}"
            )
        expected = _list(sorted(RECIPES), "or")
        raise UserError(f"{document.place(('recipe',))}: recipe: expected {expected}, got {_given(written)}")
    cls = RECIPES[recipe]
    document.value.setdefault("output", f"runs/{pathlib.Path(path).stem if path else recipe}")
    config = _checked(cls, document)
    dead = without_effect(config)
    lines = []
    for at, place in document.places.items():
        key = next((k for k in dead if _dotted(at) == k or _dotted(at).startswith(k + ".")), None)
        value = _value_at(document.value, at)
        if key and value is not None and not isinstance(value, dict) and not isinstance(at[-1], int):
            lines.append(f"{place}: {_dotted(at)} has no effect in this run: {dead[key]}")
    if lines:
        raise UserError("\n".join(lines))
    return config


def resolved(config: RunConfig) -> dict:
    """Plain values of every setting that has an effect in this run, defaults included."""
    dead = without_effect(config)

    def plain(value, path: str):
        if dataclasses.is_dataclass(value):
            items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            keys = {name: f"{path}.{name}" if path else name for name in items}
            return {name: plain(x, keys[name]) for name, x in items.items() if keys[name] not in dead}
        if isinstance(value, Mapping):
            return {k: plain(v, f"{path}.{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v, f"{path}[{i}]") for i, v in enumerate(value)]
        return value

    values: Any = plain(config, "")
    return {"recipe": values.pop("recipe")} | values


def dump(config: RunConfig) -> str:
    """YAML of `resolved`, which `load` reads back to the same run."""
    return yaml.dump(resolved(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def schema(recipe: str) -> dict:
    """The JSON Schema of a recipe's configs, for editors. UserError for a recipe that does not exist."""
    if recipe not in RECIPES:
        raise UserError(f"there is no recipe {recipe!r}; there are {_list(sorted(RECIPES), 'and')}")
    tree = _described(RECIPES[recipe])
    tree["required"] = [name for name in tree.get("required", []) if name != "output"]  # load fills it in
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | tree


def differences(saved: str | os.PathLike, config: RunConfig, ignore: Sequence[str] = ()) -> list[str]:
    """ "optim.lr: 0.0002 -> 0.0001" for each setting in which `config` differs from a dumped one.

    `ignore` names sections or keys that may differ; where the output lies always may.
    """

    old, new = _flat(_read_file(os.fspath(saved)).value, ignore), _flat(resolved(config), ignore)
    return [
        f"{key}: {_shown(old, key)} -> {_shown(new, key)}" for key in old | new if not _same(old, new, key)
    ]


def settings(config: RunConfig, ignore: Sequence[str] = ()) -> dict[str, str]:
    """{"optim.lr": "0.0001", …} of all that has an effect, less those that `differences` ignores."""
    values = _flat(resolved(config), ignore)
    return {key: _shown(values, key) for key in values}


def _flat(value: Any, ignore: Sequence[str], path: str = "") -> dict[str, Any]:
    if path in ("output", *ignore):
        return {}
    if not isinstance(value, dict) or not value:
        return {path: value}
    parts = (_flat(x, ignore, f"{path}.{name}".strip(".")) for name, x in value.items())
    return {k: v for part in parts for k, v in part.items()}


def _same(old: dict, new: dict, key: str) -> bool:
    """A number may be written as 32 or 32.0; true is not 1."""
    one, other = old.get(key), new.get(key)
    if isinstance(one, float) or isinstance(other, float):
        return one == other
    return _shown(old, key) == _shown(new, key)


def _shown(values: dict, key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "not set"


FLAGS = {"overwrite": "--overwrite", "resume": "--resume"}


def parse_run_args(argv: Sequence[str], recipe: str) -> tuple[RunConfig, dict[str, bool]]:
    """(config, flags) of `ftjax VERB [CONFIG.yaml] [key.sub=value …] [--overwrite] [--resume]`."""
    flags = {name: flag in argv for name, flag in FLAGS.items()}
    if all(flags.values()):
        raise UserError("--overwrite starts anew and --resume goes on: give one of them")
    words = [word for word in argv if word not in FLAGS.values()]
    path = words.pop(0) if words and "=" not in words[0] and not words[0].startswith("-") else None
    if path is None and not words:
        examples = f"  ftjax {recipe} config.yaml\n  ftjax {recipe} model=MODEL data.train=FILE"
        raise UserError(f"ftjax {recipe} needs a config, or settings:\n{examples}")
    return load(path, words, recipe), flags
