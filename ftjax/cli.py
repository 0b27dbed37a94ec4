"""`ftjax VERB …`: finds the recipe, imports it only then, and turns its errors into messages and exit codes.

Exit codes: 0 done, 1 a bug or something of the machine's (disk full, no permission), 2 something the user can
set right, 130 stopped by Ctrl-C, 143 by SIGTERM. FTJAX_TRACEBACK=1 shows every traceback.
"""

import importlib
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from ftjax import __version__, host
from ftjax.errors import UserError


class Verb(NamedTuple):
    about: str
    usage: str
    help: str
    module: str


_SETTINGS = """\
CONFIG.yaml holds the settings; key.sub=value after it overrides them, later ones
winning. `ftjax schema {verb}` lists every key with its meaning. Starting the same
command again goes on from the last checkpoint; a finished or different run in the
output folder is left alone unless one of these is given:
  --overwrite   delete it and start anew
  --resume      go on with it though settings differ"""

VERBS = {
    "quickstart": Verb(
        "tune a small model on a shipped data set and see what it gains",
        "ftjax quickstart [--help for its options]",
        "Example:\n  ftjax quickstart",
        "ftjax.recipes.quickstart",
    ),
    "sft": Verb(
        "supervised fine-tuning: LoRA or every weight",
        "ftjax sft [CONFIG.yaml] [key.sub=value …] [--overwrite|--resume]",
        _SETTINGS.format(verb="sft") + "\n\nExamples:\n"
        "  ftjax sft config.yaml\n"
        "  ftjax sft config.yaml optim.lr=1e-4 output=runs/lower\n"
        "  ftjax sft model=Qwen/Qwen3-0.6B data.train=examples.jsonl\n"
        "  ftjax sft config.yaml lora=null        tunes every weight",
        "ftjax.recipes.sft",
    ),
    "dpo": Verb(
        "preference tuning on pairs of a chosen and a rejected answer",
        "ftjax dpo [CONFIG.yaml] [key.sub=value …] [--overwrite|--resume]",
        _SETTINGS.format(verb="dpo") + "\n\nExample:\n  ftjax dpo config.yaml dpo.beta=0.1",
        "ftjax.recipes.dpo",
    ),
    "chat": Verb(
        "talk to a base or tuned model",
        "ftjax chat RUN|MODEL [--help for its options]",
        "Example:\n  ftjax chat runs/support",
        "ftjax.recipes.chat",
    ),
    "export": Verb(
        "write a run's result for other tools",
        "ftjax export RUN --for peft|vllm|hf|gguf [--help for its options]",
        "Example:\n  ftjax export runs/support --for hf",
        "ftjax.recipes.export",
    ),
    "add-tokens": Verb(
        "write a base model with more tokens, to be tuned",
        "ftjax add-tokens MODEL TOKEN… --output DIR [--help for its options]",
        "Example:\n  ftjax add-tokens Qwen/Qwen3-0.6B '<call>' '</call>' --special --output qwen3-calls",
        "ftjax.recipes.add_tokens",
    ),
    "combine": Verb(
        "make one adapter of several of the same base",
        "ftjax combine ADAPTER[=WEIGHT] ADAPTER[=WEIGHT]… --output DIR [--help for its options]",
        "Example:\n  ftjax combine runs/support=0.7 runs/tone=0.3 --method ties --density 0.5 --output both",
        "ftjax.recipes.combine",
    ),
    "data": Verb(
        "prepare training data: check, convert, clean, split, extract, synthesise, describe",
        "ftjax data VERB … [--help for its verbs]",
        "Examples:\n  ftjax data render examples.jsonl --model Qwen/Qwen3-0.6B\n"
        "  ftjax data prepare recipe.yaml",
        "ftjax.recipes.data",
    ),
    "plan": Verb(
        "what a run would take on a TPU slice or GPUs, before it is rented",
        "ftjax plan CONFIG.yaml --on v5e-16 [--help for its options]",
        "Example:\n  ftjax plan config.yaml --on v5e-16",
        "ftjax.recipes.plan",
    ),
    "schema": Verb(
        "print the JSON Schema of a recipe's config, for editors",
        "ftjax schema sft|dpo",
        "Example:\n  ftjax schema sft > schema.json\n"
        "and as the first line of a config:\n  # yaml-language-server: $schema=schema.json",
        "",
    ),
}
# These have flags, and print their own --help
OWN_HELP = ("quickstart", "plan", "chat", "export", "add-tokens", "combine", "data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    from_shell = argv is None
    host.began = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except UserError as e:
        _maybe_traceback()
        _complain(str(e))
        return 2
    except KeyboardInterrupt:
        _maybe_traceback()
        print("\nftjax: stopped by Ctrl-C", file=sys.stderr)
        if from_shell and "jax" in sys.modules:
            # a compilation that was cut off makes the interpreter's own way out crash
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130
    except BrokenPipeError:  # `ftjax … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (OSError, MemoryError) as e:
        message = _of_the_machine(e)
        if message is None:
            raise
        _maybe_traceback()
        _complain(message)
        return 1
    except Exception as e:
        signum = getattr(e, "signum", None)  # train.Interrupted, which nothing here may import
        if signum is None:
            raise
        _maybe_traceback()
        print(f"ftjax: {e}; the same command goes on from there", file=sys.stderr)
        return 128 + signum


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"ftjax {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        import difflib

        near = difflib.get_close_matches(name, VERBS, 1, 0.5)
        hint = f"; did you mean ftjax {near[0]}?" if near else ""
        raise UserError(f"there is no verb {name!r}{hint} (verbs: {', '.join(VERBS)})")
    verb = VERBS[name]
    if name not in OWN_HELP and any(word in ("-h", "--help") for word in rest):
        print(f"{verb.about[0].upper()}{verb.about[1:]}.\n\nUsage: {verb.usage}\n\n{verb.help}")
        return 0
    if name == "schema":
        return _schema(rest)
    environment_defaults()
    recipe = importlib.import_module(verb.module)
    return recipe.main(rest) or 0


def _schema(argv: list[str]) -> int:
    import json

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # imported, never used
    from ftjax import config

    if len(argv) != 1:
        raise UserError(f"usage: {VERBS['schema'].usage}")
    print(json.dumps(config.schema(argv[0]), indent=2, ensure_ascii=False))
    return 0


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.about}" for name, verb in VERBS.items())
    return (
        f"ftjax {__version__}: fine-tuning for JAX, from a file of examples to a proven, exported model.\n\n"
        f"Usage: ftjax VERB …\n\n{verbs}\n\n"
        "First steps:\n"
        "  ftjax quickstart                                 see the whole of it on a small model\n"
        "  ftjax sft model=MODEL data.train=examples.jsonl  tune on your own examples\n\n"
        "`ftjax VERB --help` says more; `ftjax --version` says which this is."
    )


def environment_defaults() -> None:
    """What the command line sets before JAX is imported; a program that imports ftjax sets its own.

    Compiled programs, all of them, are kept in ~/.cache/ftjax/jax (JAX_COMPILATION_CACHE_DIR; off by
    JAX_ENABLE_COMPILATION_CACHE=0), since compiling is most of a short run's time; XLA's informational log
    lines are off (TF_CPP_MIN_LOG_LEVEL), and so is transformers' advice to install PyTorch; freed memory is
    kept.
    """
    if "jax" not in sys.modules:  # its threads must not run yet
        host.keep_freed_memory()
        host.drop_late_callbacks()
    cache = pathlib.Path(os.environ.get("FTJAX_CACHE") or "~/.cache/ftjax").expanduser() / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _complain(message: str) -> None:
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    start, end = ("\033[31m", "\033[0m") if color else ("", "")
    print(f"{start}error: {message}{end}", file=sys.stderr)


def _maybe_traceback() -> None:
    if os.environ.get("FTJAX_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exc()


def _of_the_machine(error: OSError | MemoryError) -> str | None:
    """A line for what a full disk and the like do; None for errors that may well be bugs."""
    import errno

    if isinstance(error, MemoryError):
        return "out of memory; a smaller data.max_length or more train.microbatches needs less"
    where = f": {error.filename}" if error.filename else ""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file may not grow any more (a limit of this process)",
        errno.EACCES: "no permission",
        errno.EPERM: "no permission",
        errno.EROFS: "the file system is read-only",
        errno.EMFILE: "too many open files",
    }
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = reasons.get(error.errno or 0)
    if reason is None:
        return None
    later = "; what was saved before is intact, and the same command goes on from it" * (error.errno in full)
    return f"{reason}{where}{later}"


if __name__ == "__main__":
    sys.exit(main())
