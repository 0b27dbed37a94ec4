"""The model card of a run, from what its folder tells."""

import json
import pathlib

import yaml

from ftjax import hf


def of_run(run: pathlib.Path, base: str, library: str, scores: dict[str, float] | None = None) -> str:
    """README.md for a tuned model or adapter: settings from config.yaml; `scores`, else those in the folder.

    `library` is "transformers", "peft" or "gguf".
    """
    path = run / "config.yaml"
    values = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    train = (values.get("data") or {}).get("train")
    settings = {
        f"{part}.{key}": value
        for part in ("lora", "optim", "train")
        for key, value in (values.get(part) or {}).items()
        if value not in (None, [], {})
    }
    return hf.model_card(
        name=run.resolve().name,
        base=base,
        library=library,
        data={"train": train if isinstance(train, str) else json.dumps(train)} if train else None,
        settings=settings,
        scores=scores or _scores(run),
    )


def _scores(run: pathlib.Path) -> dict[str, str] | None:
    """{row: its first score} of the report's table of scores, else the evaluation losses of the summary."""
    if (run / "scores.json").is_file():
        table = json.loads((run / "scores.json").read_text())
        column = table["columns"][0]
        cells = {row["name"]: row["cells"][0] for row in table["rows"]}
        return {f"{column}: {k}": c["text"] if isinstance(c, dict) else str(c) for k, c in cells.items()}
    if (run / "summary.json").is_file():
        return json.loads((run / "summary.json").read_text()).get("scores")
    return None
