"""card.md: the facts as a dataset card of the Hugging Face hub, its front matter such as the hub reads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ftjax.data.card.facts import OTHERS, UNKNOWN
from ftjax.data.codes import CODES

_SIZES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12)
_LICENSES = frozenset(  # the hub's identifiers: https://huggingface.co/docs/hub/repositories-licenses
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m afl-3.0 "
    "artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 "
    "eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research "
    "intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 "
    "postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "gemma".split()
)
_SHOWN = 20  # names in a table
_LANGUAGE_SHARE = 0.01  # of the rows, for a language to be named in the front matter


def front_matter(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads: license, language, size, task, and the file of each split."""
    out: dict[str, Any] = {"pretty_name": facts["title"]}
    names = [name for name in facts["licenses"] if name != OTHERS]
    licenses = [n for n in (_license(name) for name in names) if n]
    if licenses:
        out["license"] = licenses[0] if len(licenses) == 1 else sorted(set(licenses))
    if "other" in licenses:
        out["license_name"] = ", ".join(n for n in names if _license(n) == "other")
    least = _LANGUAGE_SHARE * facts["rows"]
    if languages := [
        n for n, k in (facts["languages"] or {}).items() if k >= least and n not in (UNKNOWN, OTHERS)
    ]:
        out["language"] = languages
    out["size_categories"] = [size_category(facts["rows"])]
    out["task_categories"] = ["text-generation"]
    models = [name for name in facts["models"] if name != OTHERS]
    out["tags"] = ["ftjax", *sorted(facts["tasks"]), *(["synthetic"] if models else [])]
    if facts["outputs"]:
        files = [{"split": _split(f["path"]), "path": f["path"]} for f in facts["outputs"]]
        out["configs"] = [{"config_name": "default", "data_files": files}]
    return out


def size_category(rows: int) -> str:
    """As the hub names them: "n<1K", "1K<n<10K", …"""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    for i, limit in enumerate(_SIZES):
        if rows < limit:
            return f"{names[i - 1]}<n<{names[i]}" if i else "n<1K"
    return "n>1T"


def _split(path: str) -> str:
    """The hub's name of a split; what is not split is for training."""
    name = path.partition(".")[0]
    return "train" if name == "data" else name


def _license(name: str) -> str:
    if name == UNKNOWN:
        return "unknown"
    near = re.sub(r"[\s_]+", "-", name.strip().lower())
    return near if near in _LICENSES else "other"


def markdown(facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    """The whole card; `pictures` are (file, what it shows)."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    shown = dict(pictures)
    parts = [f"---\n{front}---", f"# {_cell(facts['title'])}", summary(facts)]
    if facts["page"]:
        page = facts["page"]
        extent = (
            f"all {page['rows']:,} rows"
            if page["rows"] == facts["rows"]
            else f"{page['rows']:,} of the {facts['rows']:,} rows, evenly spaced"
        )
        parts.append(f"The rows can be browsed in [card.html](card.html) ({extent}).")

    rows = [
        [name, f"{s['rows']:,}", f"{s['tokens']:,}", f"{s['trained']:,}", f"`{s['hash'][:16]}`"]
        for name, s in facts["splits"].items()
    ]
    parts += [
        "## Splits",
        _table(["split", "rows", "tokens", "trained", "content"], rows),
        _how_hashed(facts),
    ]
    parts += ["## What it holds", _table(["", ""], contents(facts))]
    lengths = [
        [what, *(f"{spread[k]:,.6g}" for k in ("min", "p5", "median", "mean", "p95", "max"))]
        for what, spread in distributions(facts)
    ]
    if lengths:
        head = ["", "least", "5%", "median", "mean", "95%", "most"]
        parts += ["## Lengths" + (" and scores" if facts["scores"] else ""), _table(head, lengths)]
    parts += [f"![{alt}]({file})" for file, alt in pictures if file != "stages.png"]
    if facts["stages"]:
        parts.append("## How it was made")
        if "stages.png" in shown:
            parts.append(f"![{shown['stages.png']}](stages.png)")
        rows = [
            [
                s["name"],
                f"{s['rows']:,}",
                f"{s['kept']:,}",
                f"{s['changed']:,}",
                f"{s['dropped']:,}",
                ", ".join(f"{code} {facts['codes'].get(code, '')} {n:,}" for code, n in s["codes"].items()),
            ]
            for s in facts["stages"]
        ]
        parts.append(_table(["stage", "rows", "go on", "changed", "end", "verdicts"], rows))
    parts += ["## Where it comes from", _sources("source", facts["sources"])]
    for title, key in (("pages and documents", "urls"), ("models", "models"), ("prompts", "prompts")):
        if facts[key]:
            parts.append(_table([title, "rows"], [[n, f"{k:,}"] for n, k in _first(facts[key])]))
    if facts["files"] and [f["name"] for f in facts["files"]] != [s["name"] for s in facts["sources"]]:
        parts += ["## Files", _sources("file", facts["files"])]
    parts.append(
        f"Written by ftjax {facts['ftjax']} from all {facts['rows']:,} rows; every fact is in card.json."
    )
    return "\n\n".join(parts) + "\n"


def summary(facts: Mapping[str, Any]) -> str:
    """The set in a sentence or two."""
    tokens = facts["tokens"]
    how = "an estimate, characters / 4" if tokens["estimate"] else f"tokenizer of {tokens['tokenizer']}"
    text = (
        f"{facts['rows']:,} examples, {tokens['total']:,} tokens ({how}), of which {tokens['trained']:,} are "
        "trained on."
    )
    for reason, said in tokens["not_rendered"].items():
        text += f" {said['rows']:,} could not be rendered ({reason}) and are not in these counts."
    return text + unreadable(facts["unreadable"])


def unreadable(codes: Mapping[str, int]) -> str:
    """A sentence on the rows that are missing here since they could not be read."""
    if not codes:
        return ""
    found = ", ".join(f"{n:,} {code} {CODES[code].name}" for code, n in codes.items())
    return f" {sum(codes.values()):,} more rows could not be read: {found}."


def contents(facts: Mapping[str, Any]) -> list[list[str]]:
    """The short facts, as rows of name and value."""
    said = [
        ["tasks", _counts(facts["tasks"])],
        ["formats", _counts(facts["formats"])],
        ["languages", _counts(facts["languages"]) if facts["languages"] else facts["no_languages"]],
        ["licenses", _counts(facts["licenses"])],
        ["roles", _counts(facts["roles"])],
        ["tools offered", _counts(facts["tools"]["defined"])],
        ["tools called", _counts(facts["tools"]["called"])],
        ["characters", f"{facts['characters']:,}"],
        ["repeated rows", repeated(facts)],
        ["content", facts["hash"]],
    ]
    return [[name, value] for name, value in said if value]


def repeated(facts: Mapping[str, Any]) -> str:
    found = facts["duplicates"]
    if not found["rows"]:
        return "none (by content)"
    return f"{found['rows']:,} repeat one of {found['contents']:,} others exactly"


def distributions(facts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    names = {"tokens": "tokens", "answer": "characters trained on", "turns": "turns"}
    if facts["tokens"]["estimate"]:
        names["tokens"] = "tokens (estimate)"
    found = [(names[k], s) for k, s in facts["spreads"].items()]
    found += [(f"score {k}", s) for k, s in facts["scores"].items()]
    return [(name, spread) for name, spread in found if spread["rows"]]


def _how_hashed(facts: Mapping[str, Any]) -> str:
    return (
        f"The content of the whole set is `{facts['hash']}`: the sha256 of the rows' ids, sorted, one a "
        "line, so it is the same in any order."
    )


def _sources(what: str, files: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [f["name"], f"{f['rows']:,}", f"`{f['sha256']}`" if "sha256" in f else ""] for f in files[:_SHOWN]
    ]
    if len(files) > _SHOWN:
        rest = files[_SHOWN:]
        rows.append([f"{len(rest):,} more, in card.json", f"{sum(f['rows'] for f in rest):,}", ""])
    return _table([what, "rows", "sha256"], rows)


def _first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    items = list(counts.items())
    if len(items) <= _SHOWN:
        return items
    rest = items[_SHOWN:]
    return [*items[:_SHOWN], (f"{len(rest):,} more, in card.json", sum(k for _, k in rest))]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in _first(counts))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """One line that Markdown shows as it is, whatever the data is called."""
    text = " ".join(str(value).split())
    text = text if len(text) <= 300 else text[:299] + "…"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
