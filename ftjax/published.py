"""Published models whose config.json is in the package (published.json), so that they can be planned for
without a download; and configs read before, so that reading one again needs no transformers.

`python -m ftjax.published` writes what transformers makes of each config into published.json anew."""

import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ftjax import __version__, models
from ftjax.models.common import Model, ModelConfig, hashable, text_config
from ftjax.report.files import write_text

TABLE = pathlib.Path(__file__).with_name("published.json")


@functools.cache
def table() -> list[dict[str, Any]]:
    """[{"names": hub ids, "config": the config.json, "read": the fields of our config}]."""
    return json.loads(TABLE.read_text())


def config(name: str) -> dict[str, Any] | None:
    """The config.json of a hub id that the package knows."""
    return next((one["config"] for one in table() if name in one["names"]), None)


def nearest(name: str) -> list[str]:
    names = [x for one in table() for x in one["names"]]
    return difflib.get_close_matches(name, names, 3, 0.5)


def read(raw: Mapping[str, Any]) -> Model:
    """As models.from_config; fast where the package knows the config or it was read before by this version
    of ftjax and of transformers (it is kept in FTJAX_CACHE, else ~/.cache/ftjax)."""
    for one in table():
        if one["config"] == raw and "read" in one:
            return _model(raw, one["read"])
    versions = [__version__, importlib.metadata.version("transformers")]
    key = hashlib.sha256(json.dumps([raw, versions, _fields(raw)], sort_keys=True).encode()).hexdigest()[:32]
    folder = pathlib.Path(os.environ.get("FTJAX_CACHE") or "~/.cache/ftjax").expanduser() / "configs"
    path = folder / f"{key}.json"
    try:
        return _model(raw, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        model = models.from_config(dict(raw))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(dataclasses.asdict(model.config)))
    except OSError:  # nowhere to keep it: then it is read again the next time
        pass
    return model


def _fields(raw: Mapping[str, Any]) -> list[str]:
    kind = text_config(raw).get("model_type")
    if kind not in models.REGISTRY:
        return []
    return [field.name for field in dataclasses.fields(models.family(kind).Config)]


def _model(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> Model:
    decoder = models.family(text_config(raw).get("model_type"))
    found: ModelConfig = decoder.Config(**{k: hashable(v) for k, v in fields.items()})
    return Model(found, decoder.make_table(found), decoder)


def write() -> None:
    entries = [{k: v for k, v in one.items() if k != "read"} for one in table()]
    for one in entries:
        one["read"] = dataclasses.asdict(models.from_config(one["config"]).config)
    TABLE.write_text("[\n" + ",\n".join(json.dumps(one) for one in entries) + "\n]\n")


if __name__ == "__main__":
    write()
