"""The report.json of `ftjax data prepare`, read without holding its verdicts, which may be as many as the
rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftjax.errors import UserError

_BEGIN = '"verdicts": ['


def head(path: Path) -> dict[str, Any]:
    """All but the verdicts: stages (name, rows, kept, changed, dropped, codes, summary) and outputs."""
    text = ""
    with open(path, encoding="utf-8", errors="surrogatepass") as file:
        for line in file:
            text += line
            if line.rstrip().endswith(_BEGIN):
                text += "]}"
                break
    try:
        values = json.loads(text)
        return {"stages": values["stages"], "outputs": values.get("outputs", [])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a report of `ftjax data`: it has no counts of stages") from None


def verdicts(path: Path) -> Iterator[dict[str, Any]]:
    """Every verdict: stage, code, text, path, source, line, fix, name, severity and outcome (kept, changed or
    dropped), in the order of the stages and, within one, of the rows."""
    with open(path, encoding="utf-8", errors="surrogatepass") as file:
        for line in file:
            if line.rstrip().endswith(_BEGIN):
                break
        else:  # written anew by another program, perhaps on one line
            file.seek(0)
            yield from json.load(file).get("verdicts", [])
            return
        for line in file:
            if not line.strip().startswith("{"):
                return
            yield json.loads(line.strip().rstrip(","))
