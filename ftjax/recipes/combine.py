"""The verb `ftjax combine`: several adapters of one base made into one."""

import argparse
import re
from pathlib import Path
from typing import get_args

from ftjax import adapters, files, hf, models, peft
from ftjax.errors import UserError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ftjax combine",
        description="Make one adapter of several of the same base, each times its weight.",
        epilog="linear: the factors are added; cat: the updates are, at the sum of the ranks; svd: the "
        "updates are, and cut to a rank. ties and dare trim them first (arXiv:2306.01708, arXiv:2311.03099). "
        "As PEFT's add_weighted_adapter computes it.",
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[=WEIGHT]", help="a run, or an adapter's folder; weight 1"
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--method", choices=get_args(adapters.Method), default="svd", help="default: svd")
    parser.add_argument("--rank", type=int, help="of the svd methods; default: the largest")
    parser.add_argument("--density", type=float, help="share that ties and dare keep, 0 to 1")
    parser.add_argument(
        "--majority", choices=("total", "frequency"), default="total", help="of the ties methods"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the dare methods")
    parser.add_argument("--base", metavar="MODEL", help="default: the one that the first adapter names")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    args = parser.parse_args(argv)
    given = [_parse(text) for text in args.adapters]
    if len(given) < 2:
        raise UserError("ftjax combine: two adapters at least")
    source = hf.open_model(args.base or _base_of(given[0][0]))
    model = models.from_config(source.config)
    loaded = [peft.load(folder, model, source=source)[1:] for folder, _ in given]
    plan, tree, config = adapters.combine(
        loaded,
        [weight for _, weight in given],
        args.method,
        model.table,
        rank=args.rank,
        density=args.density,
        majority=args.majority,
        seed=args.seed,
    )
    folder = peft.save(args.output, plan, tree, config, model.table, source, overwrite=args.overwrite)
    parts = " + ".join(f"{weight:g} × {path}" for path, weight in given)
    print(f"{folder}: {args.method} of {parts}; the largest rank is {config.r}")
    return 0


def _parse(text: str) -> tuple[Path, float]:
    """(the adapter's folder, its weight)"""
    found = re.fullmatch(r"(.+)=([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)", text)
    path, weight = (text, 1.0) if found is None else (found[1], float(found[2]))
    folder = Path(path).expanduser()
    for each in (folder, folder / "adapter"):
        if (each / peft.CONFIG).is_file():
            return each, weight
    raise UserError(f"{path}: neither an adapter ({peft.CONFIG}) nor a run with one in adapter/")


def _base_of(folder: Path) -> str:
    own = folder / peft.OWN
    name = files.read_json(own)["base"]["source"] if own.is_file() else None
    name = name or files.read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder}: it does not say which model is its base: --base does")
    return name
