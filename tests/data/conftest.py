import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture(scope="session")
def tiny():
    """A tokenizer of 400 tokens with a ChatML-like template."""
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_tokenizer")


@pytest.fixture(scope="session")
def generation_template():
    """The same template with {% generation %} around what the assistant writes."""
    return (ASSETS / "generation_template.jinja").read_text()


@pytest.fixture(scope="session")
def real_tokenizer():
    """Loads one of the real tokenizers, or skips where they are not at hand."""
    loaded = {}

    def load(name):
        folder = Path(os.environ.get("FTJAX_TEST_ASSETS", "")) / "tokenizers" / name
        if "FTJAX_TEST_ASSETS" not in os.environ or not folder.is_dir():
            pytest.skip(f"the {name} tokenizer is not at hand (FTJAX_TEST_ASSETS)")
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(folder)
        return loaded[name]

    return load


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines and gives the path."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        return str(path)

    return write
