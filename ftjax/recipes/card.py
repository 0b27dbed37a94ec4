"""The model card of a run, from what its folder tells."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml


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
    return model_card(
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


USE = {
    "transformers": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```""",
    "peft": """```python
from transformers import AutoModelForCausalLM
from peft import PeftModel

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "PATH")
```""",
    "gguf": """```
ollama create NAME -f Modelfile
```""",
}


def model_card(
    *,
    name: str,
    base: str,
    library: str,
    data: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    notes: str = "",
) -> str:
    """README.md of a tuned model or adapter: front matter for the hub, then tables of what is given.

    `library` is "transformers", "peft" or "gguf".
    """
    front = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- ftjax"]
    if library == "peft":
        front.append("- lora")
    if re.fullmatch(r"[\w][\w.-]*/[\w.-]+", base) and not pathlib.Path(base).exists():
        front.append(f"base_model: {base}")  # the hub wants an id here, never a path
    front.append("---")
    parts = [
        "\n".join(front),
        f"# {name}",
        f"Tuned from `{base}` with ftjax." + (f" {notes}" if notes else ""),
        USE[library].format(base=base),
    ]
    for title, rows in (("Scores", scores), ("Data", data), ("Settings", settings)):
        if rows:
            lines = [f"| {k} | {_cell(v)} |" for k, v in rows.items()]
            parts.append(f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
