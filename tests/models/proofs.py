"""The README's table of families and proofs, from what a test run proved.

    pytest --junitxml=junit.xml && python tests/models/proofs.py junit.xml README.md [--check]

Writes the table between the README's markers; with --check fails where the two differ instead, or a proof of
a family is missing.
"""

import pathlib
import sys
import xml.etree.ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from cases import FAMILIES, PROOFS

BEGIN, END = "<!-- proofs: tests/models/proofs.py -->", "<!-- end of proofs -->"


def outcomes(junit: str) -> dict[tuple[str, str], str]:
    """{(family, proof): "passed", "failed" or why it was skipped}."""
    out = {}
    for case in xml.etree.ElementTree.parse(junit).iter("testcase"):
        test, _, family = case.get("name", "").rstrip("]").partition("[")
        if not case.get("classname", "").endswith("test_parity") or test not in PROOFS:
            continue
        skip = case.find("skipped")
        bad = case.find("failure") is not None or case.find("error") is not None
        out[family, test] = "failed" if bad else "passed" if skip is None else skip.get("message") or "?"
    return out


def table(found: dict[tuple[str, str], str]) -> str:
    """Markdown: a tick where a proof passed, a note's number where it was skipped and why below."""
    notes: list[str] = []

    def cell(family: str, test: str) -> str:
        result = found.get((family, test), "not run")
        if result == "passed":
            return "✓"
        if result not in notes:
            notes.append(result)
        return f"[{notes.index(result) + 1}]"

    lines = ["| `model_type` | " + " | ".join(PROOFS.values()) + " |", "|---" * (len(PROOFS) + 1) + "|"]
    for family in sorted(FAMILIES):
        lines.append(f"| {family} | " + " | ".join(cell(family, test) for test in PROOFS) + " |")
    lines += [f"\n[{i + 1}] {note}" for i, note in enumerate(notes)]
    return "\n".join(lines)


def main(junit: str, readme: str, *flags: str) -> int:
    path = pathlib.Path(readme)
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    found = outcomes(junit)
    new = f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}"
    if "--check" not in flags:
        path.write_text(new, encoding="utf-8")
        return 0
    if new != text:
        print(f"{readme}: the table of proofs is not what {junit} proved: run tests/models/proofs.py")
        return 1
    open_ = [f"{family} {test}" for family in FAMILIES for test in PROOFS if (family, test) not in found]
    if open_:
        print(f"not run: {', '.join(open_)}")
    return bool(open_)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
