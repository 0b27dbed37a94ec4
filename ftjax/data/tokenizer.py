"""The tokenizer of a model, wherever that is."""

from pathlib import Path


def load(model: str):
    """The tokenizer of a model (a folder, a hub id or a .gguf file), or of a folder that holds nothing
    else. Raises UserError."""
    folder = Path(model).expanduser()
    if (folder / "tokenizer.json").is_file() and not (folder / "config.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)
    from ftjax.hf import load_tokenizer, open_model

    return load_tokenizer(open_model(model))
