"""The prompts: Jinja files beside this one, used as they are and known by a hash of their text."""

import hashlib
from pathlib import Path
from typing import Any

import jinja2

from ftjax.errors import UserError

OWN = Path(__file__).with_name("prompts")


class Prompts:
    """The package's prompts, those of `folder` going before. UserError for a file that replaces none."""

    def __init__(self, folder: str | Path | None = None):
        folders = [OWN]
        if folder is not None:
            given = Path(folder).expanduser()
            files = sorted(p.name for p in given.glob("*.jinja"))
            own = sorted(p.name for p in OWN.glob("*.jinja"))
            if not files or not set(files) <= set(own):
                raise UserError(f"prompts: {folder} has {files or 'no .jinja file'}; to replace are {own}")
            folders.insert(0, given)
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folders),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def __call__(self, name: str, **values: Any) -> str:
        try:
            return self._environment.get_template(f"{name}.jinja").render(values)
        except jinja2.TemplateError as e:
            raise UserError(f"prompts: {name}.jinja: {e}") from None

    def hash(self, name: str) -> str:
        """12 hex digits of the SHA-256 of the file and of those that it includes."""
        from jinja2 import meta

        loader, digest, names = self._environment.loader, hashlib.sha256(), [f"{name}.jinja"]
        assert loader is not None
        for one in names:
            source = loader.get_source(self._environment, one)[0]
            digest.update(source.encode())
            names += [n for n in meta.find_referenced_templates(self._environment.parse(source)) if n]
        return digest.hexdigest()[:12]
