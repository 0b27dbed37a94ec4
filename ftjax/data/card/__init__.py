"""What a data set is, told from its records: facts, pictures, a dataset card and a page to browse it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ftjax import __version__
from ftjax.data.record import Record
from ftjax.errors import UserError


@dataclass(frozen=True)
class CardOptions:
    """What the card of a set holds."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    model: str | None = None
    """Whose tokenizer and template count the tokens and show the mask: a folder, hub id or .gguf file;
    without it tokens are an estimate, characters / 4, and said to be one."""
    chat_template: str | None = None
    """A Jinja file instead of the tokenizer's template, or "none"."""
    html: bool = False
    """Write card.html too, a page to browse, search and filter the rows in."""
    html_rows: int = 50_000
    """Rows that the page holds at most; of more, it holds evenly spaced ones and says so."""
    title: str | None = None
    """Of the set; the folder's name if absent."""


def make(
    records: Iterable[Record],
    folder: str | Path,
    options: CardOptions,
    report: str | Path | None = None,
    unreadable: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Writes card.md, card.json, pictures and, if asked for, card.html into a folder; the facts.

    `report` is the report.json of `ftjax data prepare`, for the yield of each stage and the rows that were
    left out. `unreadable` counts rows that are not among the records by the code of what is wrong with them,
    and may grow until the last record. Raises UserError for a set without records and for a report that is
    none.
    """
    from ftjax.data.card import facts as found
    from ftjax.data.card import markdown, page, pictures, prepared
    from ftjax.data.codes import CODES
    from ftjax.report import files
    from ftjax.report.progress import Bar

    if options.html_rows < 1:
        raise UserError(f"card: html_rows {options.html_rows}: the page holds at least one row")
    folder = Path(folder).expanduser()
    head = prepared.head(Path(report)) if report else {"stages": [], "outputs": []}
    renderer = _renderer(options)
    tokenizer = renderer.tokenizer if renderer else None
    facts, rows = (
        found.Facts(found.shown_path(options.model) if options.model else None),
        page.Sample(options.html_rows),
    )
    with Bar("card: rows", None) as bar:
        for m in found.measured(records, renderer):
            facts.add(m)
            if options.html:
                page.put_row(rows, m, tokenizer)
            if facts.rows % 256 == 0:
                bar.advance(256)
    if not facts.rows:
        raise UserError(f"there are no rows to make a card of.{markdown.unreadable(unreadable or {})}")
    folder.mkdir(parents=True, exist_ok=True)
    histograms = pictures.of_facts(facts.spreads, facts.scores, options.model is None)
    codes = {code for stage in head["stages"] for code in stage["codes"]}
    outputs = [{**o, "path": Path(o["path"]).name} for o in head["outputs"] if _beside(o["path"], folder)]
    values: dict[str, Any] = {
        "title": options.title or folder.resolve().name,
        "ftjax": __version__,
        **facts.to_json(),
        "unreadable": dict(unreadable or {}),
        "no_languages": "not told: pip install 'ftjax[data]'",
        "histograms": {name: h.to_json() for name, h in histograms.items()},
        "stages": head["stages"],
        "codes": {code: CODES[code].name for code in sorted(codes) if code in CODES},
        "outputs": outputs,
        "masked": any(stage["name"] == "personal" for stage in head["stages"]),
        "page": {"rows": len(rows.kept), "every": rows.every} if options.html else None,
    }
    if outputs:
        values["files"] = [{"name": o["path"], "rows": o["rows"], "sha256": o["sha256"]} for o in outputs]
    for name, h in histograms.items():
        pictures.histogram_png(h, folder / f"{name}.png")
    shown = [(f"{name}.png", h.title) for name, h in histograms.items()]
    if head["stages"]:
        pictures.stages_png(head["stages"], folder / "stages.png")
        shown.append(("stages.png", "Rows that go on from each stage"))
    if options.html:
        said, left = page.judge(rows, Path(report), options.html_rows) if report else ({}, page.Sample(0))
        if not values["masked"]:
            page.find_rows(left)
        page.write(folder / "card.html", values, histograms, rows, said, left)
    files.write_json(folder / "card.json", values)
    files.write_text(folder / "card.md", markdown.markdown(values, shown))
    return values


def _renderer(options: CardOptions) -> Any:
    if options.model is None:
        if options.chat_template is not None:
            raise UserError("card: chat_template has no effect without a model; name one (--model)")
        return None
    from ftjax.data.render import Renderer, read_template
    from ftjax.hf import tokenizer_of

    return Renderer(tokenizer_of(options.model), chat_template=read_template(options.chat_template))


def _beside(path: str, folder: Path) -> bool:
    return Path(path).expanduser().resolve().parent == folder.resolve()
