"""The command line: what it imports, what it prints, how it ends."""

import errno
import json
import os
import subprocess
import sys
import time
import types

import pytest

from ftjax import __version__, cli
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

HEAVY = (
    "jax",
    "flax",
    "optax",
    "transformers",
    "grain",
    "datasets",
    "torch",
    "tensorflow",
    "pydantic",
    "numpy",
    "yaml",
)


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, **env}
    )


@pytest.mark.parametrize(
    "code", ["import ftjax", "from ftjax.cli import main; main(['--help']); main(['sft', '-h'])"]
)
def test_nothing_heavy_is_imported(code):
    done = python(f"import sys\n{code}\nprint([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)")
    assert done.stderr.strip() == "[]"


def test_help_is_quick():
    def once():
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "ftjax", "--help"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and "ftjax quickstart" in done.stdout
        return time.perf_counter() - begun

    assert min(once() for _ in range(3)) < 0.5


def test_help_and_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ftjax {__version__}\n"
    for argv in ([], ["help"], ["-h"]):
        assert cli.main(argv) == 0
        shown = capsys.readouterr().out
        assert all(verb in shown for verb in cli.VERBS)
    for verb in ("sft", "dpo", "schema"):
        assert cli.main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"Usage: ftjax {verb}" in shown and f"\n  ftjax {verb}" in shown
        assert max(map(len, shown.splitlines())) <= 100


@pytest.fixture
def recipe(monkeypatch):
    """Stands in for ftjax.recipes.sft; set `main`."""
    module = types.ModuleType("ftjax.recipes.sft")
    monkeypatch.setitem(sys.modules, "ftjax.recipes.sft", module)
    for name in list(os.environ):  # what environment_defaults sets is undone
        if name.startswith(("JAX_", "TF_")):
            monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setattr(cli, "environment_defaults", lambda: None)
    return module


def raises(error):
    def main(argv):
        raise error

    return main


def test_a_recipe_gets_the_rest_of_the_line(recipe):
    recipe.main = lambda argv: seen.extend(argv)
    seen: list[str] = []
    assert cli.main(["sft", "a.yaml", "b=1"]) == 0 and seen == ["a.yaml", "b=1"]
    recipe.main = lambda argv: 7
    assert cli.main(["sft"]) == 7


class Stopped(Exception):
    signum = 15


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("lora.r=0: no"), 2, "error: lora.r=0: no\n"),
        (KeyboardInterrupt(), 130, "ftjax: stopped by Ctrl-C\n"),
        (
            OSError(errno.ENOSPC, "x", "/run/ck"),
            1,
            "error: the disk is full: /run/ck; what was saved before is intact, and the same command goes on "
            "from it\n",
        ),
        (PermissionError(errno.EACCES, "x", "/run"), 1, "error: no permission: /run\n"),
        (MemoryError(), 1, "error: out of memory; a smaller"),
        (
            Stopped("stopped by SIGTERM after step 3"),
            143,
            "stopped by SIGTERM after step 3; the same command goes on",
        ),
    ],
)
def test_errors_are_messages_without_traceback(recipe, capsys, error, code, words):
    recipe.main = raises(error)
    assert cli.main(["sft"]) == code
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown and "\033" not in shown  # no colour: not a terminal


def test_a_traceback_on_request(recipe, capsys, monkeypatch):
    monkeypatch.setenv("FTJAX_TRACEBACK", "1")
    recipe.main = raises(UserError("no"))
    assert cli.main(["sft"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("ours"), FileNotFoundError(errno.ENOENT, "x"), ZeroDivisionError()]
)
def test_bugs_keep_their_traceback(recipe, error):
    recipe.main = raises(error)
    with pytest.raises(type(error)):
        cli.main(["sft"])


def test_errors_are_red_on_a_terminal(recipe, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    recipe.main = raises(UserError("no"))
    cli.main(["sft"])
    assert "\033[31merror: no\033[0m" in capsys.readouterr().err


def test_an_unknown_verb(capsys):
    assert cli.main(["stf"]) == 2
    assert "there is no verb 'stf'; did you mean ftjax sft? (verbs: quickstart, " in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m ftjax schema sft | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "{\n" and done.stderr == ""


def test_schema(capsys):
    assert cli.main(["schema", "dpo"]) == 0
    assert "beta" in json.loads(capsys.readouterr().out)["$defs"]["DpoOptions"]["properties"]
    assert cli.main(["schema"]) == 2 and cli.main(["schema", "nope"]) == 2


def test_environment_defaults_are_only_defaults():
    code = (
        "import os; from ftjax import cli; cli.environment_defaults(); import jax;"
        "print(jax.config.jax_compilation_cache_dir, os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    )
    env = {k: "" for k in ("JAX_COMPILATION_CACHE_DIR", "TF_CPP_MIN_LOG_LEVEL", "FTJAX_CACHE")}
    drop = "import os; [os.environ.pop(k) for k in " + repr(tuple(env)) + "];"
    home = python(drop + code, HOME="/nowhere", **env).stdout.split()
    assert home == ["/nowhere/.cache/ftjax/jax", "2"]
    off = ";print(jax.config.jax_enable_compilation_cache)"
    assert python(drop + code + off, JAX_ENABLE_COMPILATION_CACHE="0", **env).stdout.split()[-1] == "False"
    assert python(code, JAX_COMPILATION_CACHE_DIR="/mine", TF_CPP_MIN_LOG_LEVEL="0").stdout.split() == [
        "/mine",
        "0",
    ]
