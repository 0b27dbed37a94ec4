"""ftjax chat RUN|MODEL: talk to a tuned model, or to any base, in the terminal."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import yaml

from ftjax import files, generate, hf, lora, models, peft
from ftjax.errors import UserError
from ftjax.generate import GenerateOptions, Generator
from ftjax.recipes.folder import quant_options

HELP = """\
/reset          forget the conversation
/system [TEXT]  set the system prompt and start anew; without TEXT, take it away
/help           this
/quit           leave (or Ctrl-D); Ctrl-C stops an answer"""

EPILOG = """\
RUN is the output folder of `ftjax sft` or `ftjax dpo`, MODEL a folder, a hub id or a .gguf file; a folder
with a PEFT adapter will do too. What you say is read from the terminal, from a pipe (a line a turn) or from
--prompt.

Examples:
  ftjax chat runs/support
  ftjax chat runs/support --prompt "My order 4711 has not arrived." --system "Answer in JSON."
  ftjax chat HuggingFaceTB/SmolLM2-135M-Instruct --temperature 0.7 --top-p 0.9
"""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        "ftjax chat", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("model", metavar="RUN|MODEL", help="a run folder, or a model")
    out.add_argument("--prompt", help="answer this and leave")
    out.add_argument("--system", help="the system prompt")
    out.add_argument("--base", action="store_true", help="talk to the base that RUN was tuned from")
    d = GenerateOptions()
    out.add_argument(
        "--max-new-tokens", type=int, default=512, help="the longest answer (default %(default)s)"
    )
    out.add_argument(
        "--temperature", type=float, default=d.temperature, help="0 (default) takes the likeliest token"
    )
    out.add_argument("--top-k", type=int, default=d.top_k, help="sample among the k likeliest tokens")
    out.add_argument("--top-p", type=float, default=d.top_p, help="… among the likeliest that sum to this")
    out.add_argument(
        "--min-p", type=float, default=d.min_p, help="… at least this share as likely as the likeliest"
    )
    out.add_argument(
        "--repetition-penalty", type=float, default=d.repetition_penalty, help="above 1 repeats less"
    )
    out.add_argument("--seed", type=int, default=d.seed, help="of the sampling (default %(default)s)")
    out.add_argument(
        "--stop", action="append", default=[], help="end an answer before this text; may be repeated"
    )
    out.add_argument(
        "--no-merge", action="store_true", help="apply the adapter beside the weights, not folded into them"
    )
    return out


class Speaker:
    """A model with what it takes to hold a conversation with it."""

    def __init__(self, generator: Generator, name: str, template_args: dict[str, Any]):
        self.generator, self.name, self.template_args = generator, name, template_args
        self.chats = bool(getattr(generator.tokenizer, "chat_template", None))

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        if self.chats:
            return generate.chat_prompt(self.generator.tokenizer, messages, **self.template_args)
        return self.generator.encode([messages[-1]["content"]])[0]


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    options = GenerateOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        merge=not args.no_merge,
    )
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty")
    speaker = load(args.model, base=args.base, merge=options.merge)
    if not speaker.chats:
        if args.system:
            raise UserError(f"--system: {speaker.name} has no chat template, so it takes no system prompt")
        _say(f"{speaker.name} has no chat template: your text is continued, and each one stands alone")
    if args.prompt is not None:
        return 0 if Conversation(speaker, options, args.system).turn(args.prompt) else 130
    return Conversation(speaker, options, args.system).run()


class Conversation:
    """What was said so far, and the loop that goes on with it."""

    def __init__(self, speaker: Speaker, options: GenerateOptions, system: str | None):
        self.speaker, self.options, self.system = speaker, options, system
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def run(self) -> int:
        """Until the input ends or /quit."""
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  arrow keys and history in input()
            _say(f"{self.speaker.name}: /help for commands, Ctrl-D leaves")
        while True:
            try:
                text = input("> " if terminal else "").strip()
            except EOFError:
                if terminal:
                    print()
                return 0
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print()
                _say("Ctrl-D or /quit leaves")
                continue
            if text == "/quit":
                return 0
            if text.startswith("/") and self._command(text):
                continue
            if not text:
                continue
            try:
                self.turn(text)
            except UserError as e:  # a turn that does not fit or that the template refuses: the talk goes on
                self.messages.pop()
                _say(f"{e}. /reset starts anew" if len(self.messages) > 1 else str(e))

    def _command(self, text: str) -> bool:
        """Whether `text` was a command."""
        name, _, rest = text.partition(" ")
        if name == "/help":
            _say(HELP)
        elif name == "/reset":
            self.reset()
            _say("forgotten")
        elif name == "/system":
            if not self.speaker.chats:
                _say("without a chat template there is no system prompt")
                return True
            self.system = rest.strip() or None
            self.reset()
            _say("a new conversation with this system prompt" if self.system else "no system prompt")
        elif name.count("/") > 1:  # a path, say
            return False
        else:
            _say(f"no command {name}\n{HELP}")
        return True

    def turn(self, text: str) -> bool:
        """Say `text`, print the answer as it comes; False if Ctrl-C stopped it. What was said is kept."""
        self.messages.append({"role": "user", "content": text})
        prompt = self.speaker.prompt(self.messages)
        pieces: list[str] = []

        def show(_, piece: str) -> None:
            piece = piece if pieces or not self.speaker.chats else piece.lstrip()
            if piece:
                pieces.append(piece)
                print(piece, end="", flush=True)

        finished = True
        try:
            (answer,) = self.speaker.generator.generate(
                [prompt], self.options, ids=[self.turns], on_text=show
            )
            cut = answer.finish == "length"
        except KeyboardInterrupt:
            finished = cut = False
        print(flush=True)
        if not finished:
            _say("stopped")
        if cut:
            _say(f"cut off after {answer.new_tokens} tokens (--max-new-tokens)")
        self.turns += 1
        if pieces:
            self.messages.append({"role": "assistant", "content": "".join(pieces).strip()})
        else:
            self.messages.pop()
        return finished


def load(name: str, *, base: bool = False, merge: bool = True) -> Speaker:
    """A run folder, an adapter folder or a model, ready to speak, its adapter folded in if `merge`. UserError
    where it is none of them."""
    folder = Path(name).expanduser()
    adapter: Path | None = None
    template, template_args, held = None, {}, None
    if (folder / "base.json").is_file():
        described = files.read_json(folder / "base.json")
        template, template_args = _template(folder / "config.yaml")
        held = quant_options(described)
        if base:
            source = _open_base(folder, described)
        elif (folder / "adapter").is_dir():
            source, adapter = _open_base(folder, described), folder / "adapter"
        elif (folder / "model").is_dir():
            source = hf.open_model(str(folder / "model"))
        else:
            raise UserError(
                f"{folder}: the run has no adapter/ or model/ yet: start its command again to finish it, or "
                "talk to its base with --base"
            )
    elif (folder / peft.CONFIG).is_file():
        source, adapter = _open_base(folder, _adapter_base(folder)), None if base else folder
    elif base:
        raise UserError(f"--base: {name} is no run folder: there is no base beside it")
    else:
        source = hf.open_model(name)
    if not merge and adapter is None:
        raise UserError(f"--no-merge: nothing of {name} is an adapter")
    tokenizer = hf.load_tokenizer(source)
    if template is None and adapter is not None and (adapter / "chat_template.jinja").is_file():
        template = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    if template is not None:
        tokenizer.chat_template = None if template == "none" else template
    dtype = generate.default_dtype()
    model = models.from_config(source.config).with_options(dtype=dtype)
    _say(f"loading {name}" + (f" (its base {source.source})" if base else ""))
    params = hf.load_params(source, model, dtype=None if adapter else dtype, quantise=held)
    if adapter is not None:
        _, plan, factors = peft.load(adapter, model, source)
        params = lora.attach(params, factors, plan)
    params = generate.prepare(params, dtype, merge=merge)
    ends = generate.end_tokens(source.config, source.path if source.path.is_dir() else None, tokenizer)
    return Speaker(Generator(model, params, tokenizer, eos=ends), name, template_args)


def _open_base(folder: Path, described: dict[str, Any]) -> hf.Source:
    """The base that a run or an adapter names. UserError where it is gone or no longer the same weights."""
    try:
        source = hf.open_model(described["source"], revision=described.get("revision"))
    except UserError as e:
        raise UserError(f"{folder}: its base cannot be opened: {e}") from None
    want = described.get("fingerprint")
    if want is not None and source.fingerprint() != want:
        raise UserError(
            f"{folder}: its base {described['source']} has other weights than when it was tuned; the adapter "
            "fits only those"
        )
    return source


def _adapter_base(folder: Path) -> dict[str, Any]:
    if (folder / "ftjax.json").is_file():
        found = files.read_json(folder / "ftjax.json").get("base")
        if isinstance(found, dict) and "source" in found:
            return found
    name = files.read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder / peft.CONFIG}: no base_model_name_or_path, so its base is not known")
    return {"source": name, "revision": files.read_json(folder / peft.CONFIG).get("revision")}


def _template(path: Path) -> tuple[str | None, dict[str, Any]]:
    """(the chat template that the run was trained with where its config names one, its arguments)."""
    if not path.is_file():
        return None, {}
    try:
        data = (yaml.safe_load(path.read_text()) or {}).get("data") or {}
    except (yaml.YAMLError, AttributeError) as e:
        raise UserError(f"{path} is damaged: {e}") from None
    template = data.get("chat_template")
    if template and template != "none":
        file = Path(template)
        # The run folder keeps a copy beside its result, for when the file has moved.
        copies = [path.parent / part / "chat_template.jinja" for part in ("adapter", "model")]
        file = next((p for p in (*copies, file) if p.is_file()), None)
        if file is None:
            raise UserError(f"{path}: data.chat_template: {template} is gone")
        template = file.read_text(encoding="utf-8")
    return template or None, data.get("template_args") or {}


def _say(text: str) -> None:
    """A note to the user: on stderr, so that stdout holds the answers and nothing else."""
    dim = sys.stderr.isatty()
    print(f"\033[2m{text}\033[0m" if dim else text, file=sys.stderr, flush=True)
