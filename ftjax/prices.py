"""What accelerators cost an hour: a table with dates and sources (prices.yaml), and the user's over it."""

import dataclasses
import datetime
import os
import pathlib
from typing import Any

import yaml

from ftjax import chips
from ftjax.errors import UserError

TABLE = pathlib.Path(__file__).with_name("prices.yaml")
_FIELDS = ("on_demand", "spot", "region", "looked_up", "source")


@dataclasses.dataclass(frozen=True)
class Price:
    """Dollars an hour for a chip, and whose figure that is."""

    on_demand: float | None
    spot: float | None
    said: str


def user_file() -> pathlib.Path:
    """$XDG_CONFIG_HOME/ftjax/prices.yaml, else ~/.config/ftjax/prices.yaml."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return pathlib.Path(base).expanduser() / "ftjax" / "prices.yaml"


def load(given: str | os.PathLike | None = None) -> dict[str, Price]:
    """{chip's name: its price}: ours, over them the user's file where there is one, over them `given`.
    UserError for a file that is not in their form."""
    files = [TABLE, *([user_file()] if user_file().is_file() else []), *([given] if given else [])]
    out: dict[str, Price] = {}
    for file in map(pathlib.Path, files):
        try:
            raw = yaml.safe_load(file.read_text()) or {}
        except OSError as e:
            raise UserError(f"cannot read the prices in {file}: {e.strerror}") from None
        except yaml.YAMLError as e:
            raise UserError(f"{file}: not valid YAML: {e}") from None
        if not isinstance(raw, dict):
            raise UserError(f"{file}: prices are a mapping, like v5e: {{on_demand: 1.2}}")
        out |= {_kind(file, name): _price(file, name, one) for name, one in raw.items()}
    return out


def _kind(file: pathlib.Path, name: Any) -> str:
    chip = chips.known(str(name))
    if chip is None:
        raise UserError(f"{file}: {name}: no such accelerator; there are {', '.join(chips.CHIPS)}")
    return chip.name


def _price(file: pathlib.Path, name: Any, one: Any) -> Price:
    if isinstance(one, int | float):
        one = {"on_demand": one}
    if not isinstance(one, dict) or set(one) - set(_FIELDS):
        raise UserError(f"{file}: {name}: a number, or some of {', '.join(_FIELDS)}; got {one!r}")
    for key in ("on_demand", "spot"):
        value = one.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise UserError(f"{file}: {name}.{key}={value!r}: dollars an hour for a chip")
    when = one.get("looked_up")
    when = when.isoformat() if isinstance(when, datetime.date) else when
    said = [str(x) for x in (one.get("region"), when) if x]
    said.append(str(one["source"]) if one.get("source") else str(file))
    return Price(one.get("on_demand"), one.get("spot"), ", ".join(said))
