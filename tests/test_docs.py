"""What the documents quote is what the code says."""

import pathlib
import re

import pytest

from ftjax.models import REGISTRY

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.fast


def test_porting_quotes_the_code():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/porting.md").read_text(), re.S)
    code = "\n".join(p.read_text() for p in sorted((ROOT / "ftjax/models").glob("*.py")))
    flat = re.sub(r"\s+", " ", code)
    assert len(blocks) == 2
    for block in blocks:
        assert re.sub(r"\s+", " ", block).strip() in flat, block


def test_no_text_holds_the_marks_of_a_merge():
    files = [p for folder in ("docs", "configs", "benchmarks") for p in (ROOT / folder).rglob("*.*")]
    texts = [p for p in [*ROOT.glob("*.md"), *files] if p.suffix in (".md", ".yaml", ".py")]
    marked = [str(p) for p in texts if re.search(r"^(<{7} |={7}$|>{7} )", p.read_text(), re.M)]
    assert texts and not marked


def test_the_registry_is_in_order_and_whole():
    files = {target.partition(":")[0] for target in REGISTRY.values()}
    shared = {"__init__", "common", "decoder", "moe"}
    assert {p.stem for p in (ROOT / "ftjax/models").glob("*.py")} == files | shared
    assert list(REGISTRY) == sorted(REGISTRY)
