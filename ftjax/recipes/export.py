"""The verb `ftjax export`: what a run has tuned, as other tools load it, checked against the run's own
logits."""

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from ftjax import files, generate, gguf_export, hf, hf_export, lora, models, peft
from ftjax.errors import UserError
from ftjax.recipes import card
from ftjax.recipes.folder import quant_options

DTYPES = ("float32", "bfloat16", "float16")
MAX_ADAPTER_DRIFT = 1e-3  # Drift.relative of an adapter, whose factors are written in float32


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ftjax export",
        description="Write what a run has tuned for other tools, and check what was written.",
        epilog="--for peft: the adapter as PEFT writes it (of a GGUF base the dequantised base too, beside "
        "it). --for vllm: the adapter as vLLM's loader takes it, scales folded in and one rank; merged where "
        "it takes none such. --for hf: the adapter merged into the base, a folder for transformers and all "
        "that read its format. --for gguf: merged, one file for llama.cpp and a Modelfile for Ollama.",
    )
    parser.add_argument("run", metavar="RUN", help="the output folder of a training run")
    parser.add_argument("--for", dest="target", required=True, choices=tuple(TARGETS))
    parser.add_argument("--output", metavar="DIR", help="default: RUN/export/ and what it is for")
    parser.add_argument("--dtype", choices=DTYPES, help="of merged weights; default: the base's")
    parser.add_argument(
        "--quantise", choices=tuple(gguf_export.TYPES), default=None, help="of --for gguf; default: F16"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument(
        "--checkpoint", metavar="best|last|STEP", help="default: the weights that the run ended with"
    )
    parser.add_argument("--base", metavar="MODEL", help="where the base is now, if it was moved")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="of a weights file (default 5)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload it to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="with --push: make the repository private")
    args = parser.parse_args(argv)
    if args.quantise and args.target != "gguf":
        raise UserError(f"--quantise is of --for gguf; --dtype sets the type of --for {args.target}")
    if args.dtype and args.target == "gguf":
        raise UserError("--dtype is of safetensors; --quantise sets the type of --for gguf")
    if args.private and not args.push:
        raise UserError("--private is of --push")
    run = Path(args.run).expanduser()
    output = Path(args.output) if args.output else run / "export" / args.target
    tuned = open_run(run, args)
    if output.exists() and any(output.iterdir()) and not args.overwrite:
        raise UserError(f"{output} exists; --overwrite replaces it, --output names another folder")
    TARGETS[args.target](tuned, output, args)
    if args.push:
        print(hf_export.push(output, args.push, private=args.private))
    return 0


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a run has tuned: an adapter of `source`, or all of its weights (`params`, or None where `source`
    already holds them)."""

    run: Path
    source: hf.Source
    model: models.Model
    template_from: Path
    config: lora.LoraConfig | None = None
    plan: lora.Plan | None = None
    adapters: dict | None = None
    params: dict | None = None

    def tree(self) -> dict:
        """The parameters that the run ended with, adapters beside their weights."""
        if self.params is not None:
            return self.params
        params = hf.load_params(self.source, self.model)
        return params if self.plan is None else lora.attach(params, self.adapters or {}, self.plan)

    def weights(self) -> dict:
        """What hf's writers take."""
        return dict(params=self.params, plan=self.plan, adapters=self.adapters)

    def card(self, library: str, base: str | None = None) -> str:
        base = base or files.read_json(self.run / "base.json")["source"]
        return card.of_run(self.run, base, library)

    def chat_template(self) -> str | None:
        """The template that the run used, where it is not the tokenizer's own."""
        path = self.template_from / "chat_template.jinja"
        return path.read_text(encoding="utf-8") if path.is_file() else None


def open_run(run: Path, args) -> Tuned:
    base = open_base(run, args.base)
    model = models.from_config(base.config)
    kept = run / ("adapter" if (run / "adapter").is_dir() else "model")
    if not kept.is_dir():
        raise UserError(f"{run}: neither adapter/ nor model/ in it: the run has not finished yet")
    if args.checkpoint is not None:
        return open_checkpoint(run, base, model, kept, args.checkpoint)
    if kept.name == "adapter":
        return Tuned(run, base, model, kept, *peft.load(kept, model))
    own = hf.open_model(kept)
    return Tuned(run, own, models.from_config(own.config), kept)


def open_checkpoint(run: Path, base: hf.Source, model: models.Model, kept: Path, which: str) -> Tuned:
    from ftjax import config as configs

    cfg = configs.load(str(run / "config.yaml"))
    plan = lora.plan_run(cfg.lora, model.table, cfg.train.trainable, cfg.train.freeze)
    if plan is None:
        trainable = hf.load_params(base, model, dtype=np.float32)
        return Tuned(run, base, model, kept, params=at_checkpoint(run, cfg, model, trainable, which))
    trainable = lora.init(jax.random.key(0), plan, model.table)
    adapters = at_checkpoint(run, cfg, model, trainable, which)
    return Tuned(run, base, model, kept, cfg.lora, plan, adapters)


def open_base(run: Path, moved_to: str | None = None) -> hf.Source:
    """The base model of a run, with the very weights that it was trained on. UserError where they changed."""
    path = run / "base.json"
    if not path.is_file():
        raise UserError(f"{run}: no base.json: not the folder of a training run")
    facts = files.read_json(path)
    try:
        source = hf.open_model(moved_to or facts["source"], None if moved_to else facts.get("revision"))
    except UserError as e:
        raise UserError(f"the base of this run: {e}. If it was moved, --base says where to") from None
    if source.fingerprint() != facts["fingerprint"]:
        raise UserError(
            f"{source.source}: these are not the weights that the run was trained on (fingerprint "
            f"{source.fingerprint()[:12]}, the run's {facts['fingerprint'][:12]}): --base names those"
        )
    return source


def at_checkpoint(run: Path, cfg, model: models.Model, trainable: dict, which: str):
    """The trained weights, arranged as `trainable`, in RUN/checkpoints at "best", "last" or a step."""
    from ftjax import checkpoint, optim, train

    saver = checkpoint.Checkpoints(cfg.checkpoint.directory or run / "checkpoints")
    steps = saver.steps()
    step = None
    if which == "best":
        summary = run / "summary.json"
        step = files.read_json(summary).get("best_step") if summary.is_file() else None
        if step is None:
            raise UserError(f"{run}: no evaluation chose a best checkpoint; there are: {_list(steps)}")
    elif which != "last":
        if not which.isdigit() or int(which) not in steps:
            raise UserError(f"--checkpoint {which}: there are: best, last, {_list(steps)}")
        step = int(which)
    elif not steps:
        raise UserError(f"{run}: no checkpoints")
    # What a checkpoint holds of the optimiser does not depend on the schedule, which needs the run's length.
    options = dataclasses.replace(cfg.optim, schedule="constant")
    tx, _ = optim.make_optimizer(options, trainable, 1, model.table)
    with contextlib.closing(saver):
        restored = saver.restore(train.init_state(trainable, tx), step=step)
    if restored is None:
        raise UserError(f"{run}: no checkpoint of step {step}; there are: {_list(steps)}")
    print(f"weights of the checkpoint after step {int(restored[0].step)}")
    return restored[0].trainable


def _list(steps) -> str:
    return ", ".join(map(str, steps)) or "none"


def say_base(tuned: Tuned, check: hf_export.Probe) -> None:
    """Where the run held its base in few bits: how far what it trained is from what goes out, which is for
    the base as it is published."""
    facts = files.read_json(tuned.run / "base.json")
    held = quant_options(facts)
    if held is None or tuned.plan is None:
        return
    params = hf.load_params(tuned.source, tuned.model, quantise=held)
    tree = lora.attach(params, tuned.adapters or {}, tuned.plan)
    drift = hf_export.drift(check, tuned.model, tree)
    print(
        f"note: the run held its base in {held.kind}; this goes with the unquantised one, whose logits "
        f"differ from the run's by: {drift}"
    )


# -- One function a target


def to_peft(tuned: Tuned, output: Path, args, layout: str = "peft") -> None:
    if tuned.plan is None or tuned.config is None:
        raise UserError(f"{tuned.run} tuned every weight, so there is no adapter: --for hf")
    source, base_name = tuned.source, None
    if source.kind == "gguf":  # PEFT cannot load it: the dequantised weights are this adapter's base
        base_name = str(write_base(tuned, output.parent / "base", args).absolute())
    out = peft.save(
        output,
        tuned.plan,
        tuned.adapters or {},
        tuned.config,
        tuned.model.table,
        source,
        base_name=base_name,
        layout=layout,
        chat_template=tuned.chat_template(),
        card=tuned.card("peft", base_name),
        overwrite=args.overwrite,
    )
    _, plan, again = peft.load(out, tuned.model)
    params = hf.load_params(source, tuned.model)
    tokenizer = hf.load_tokenizer(source)
    check = hf_export.probe(tuned.model, lora.attach(params, tuned.adapters or {}, tuned.plan), tokenizer)
    drift = hf_export.drift(check, tuned.model, lora.attach(params, again, plan))
    if not drift.relative <= MAX_ADAPTER_DRIFT:
        raise UserError(f"{out}: what was written does not compute what was tuned ({drift})")
    size = sum(x.size for x in jax.tree.leaves(again))
    print(f"{out}: an adapter of {size:,} weights, re-opened: {drift}")
    say_base(tuned, check)


def to_vllm(tuned: Tuned, output: Path, args) -> None:
    try:
        to_peft(tuned, output, args, layout="vllm")
    except peft.Inexpressible as e:
        print(f"vLLM does not load such an adapter ({e}): the merged model is written instead")
        to_hf(tuned, output, args)


def to_hf(tuned: Tuned, output: Path, args) -> None:
    tokenizer = hf.load_tokenizer(tuned.source)
    check = hf_export.probe(tuned.model, tuned.tree(), tokenizer)
    saved = hf_export.save_model(
        output,
        tuned.model,
        source=tuned.source,
        **tuned.weights(),
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        chat_template=tuned.chat_template(),
        stop_ids=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        card=tuned.card("transformers"),
        check=check,
        overwrite=args.overwrite,
    )
    show(saved, "the tuned model" if tuned.plan is None else "the merged model")
    say_base(tuned, check)


def to_gguf(tuned: Tuned, output: Path, args) -> None:
    """One .gguf file and a Modelfile in a folder."""
    quantise = args.quantise or "F16"
    tokenizer = hf.load_tokenizer(tuned.source)
    template = tuned.chat_template()
    if template is not None:
        tokenizer.chat_template = template
    check = hf_export.probe(tuned.model, tuned.tree(), tokenizer)
    tensors = hf_export.Tuned(tuned.model.table, tuned.source, **tuned.weights())
    slug = re.sub(r"[^\w.-]+", "-", tuned.run.absolute().name) or "model"
    ends = generate.end_tokens(tuned.source.config, tuned.source.path, tokenizer)
    with files.writing(output, overwrite=args.overwrite) as tmp, tokenizer_folder(tuned.source) as folder:
        done = gguf_export.export_gguf(
            tmp / f"{slug}-{quantise}.gguf",
            tuned.source.config,
            tensors.shapes(),
            lambda name: tensors(name)[1],
            folder,
            quantise=quantise,
            chat_template=template,
            stop_ids=list(ends),
            name=slug,
        )
        said = gguf_export.modelfile(done.path.name, tokenizer, stop=[tokenizer.decode([i]) for i in ends])
        (tmp / "Modelfile").write_text(said, encoding="utf-8")
        (tmp / "README.md").write_text(tuned.card("gguf"), encoding="utf-8")
        result = check_gguf(done, tuned, tensors, check, quantise)
    for note in done.notes:
        print(f"note: {note}")
    print(f"{output}: {done.path.name}, {done.size / 1e6:,.1f} MB, and a Modelfile; re-opened: {result}")
    say_base(tuned, check)
    print(f"ollama create {slug} -f {output / 'Modelfile'}")


def check_gguf(done, tuned: Tuned, tensors, check: hf_export.Probe, quantise: str) -> str:
    """What comparing the file with the tuned model found: logits where its architecture is one that we read,
    else every tensor. UserError where it is further off than its type explains."""
    try:
        again = hf.open_model(done.path)
        params = hf.load_params(again, models.from_config(again.config))
    except UserError:
        error = gguf_export.check_file(
            done.path, tuned.source.config, tensors.shapes(), lambda name: tensors(name)[1], quantise
        )
        return f"its tensors are within {error:.2g} of the tuned ones (llama.cpp's own logits: not run)"
    drift = hf_export.drift(check, tuned.model, params)
    if not drift.relative <= hf_export.MAX_DRIFT:
        raise UserError(f"{done.path.name}: what was written does not compute what was tuned ({drift})")
    return str(drift)


@contextlib.contextmanager
def tokenizer_folder(source: hf.Source) -> Iterator[Path]:
    """A folder with the source's tokenizer files."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source.write_tokenizer(Path(folder))
        yield Path(folder)


def write_base(tuned: Tuned, folder: Path, args) -> Path:
    """The dequantised weights of a GGUF base, as the folder that an adapter of it names."""
    if not (folder / "config.json").is_file() or args.overwrite:
        source, model = tuned.source, tuned.model
        check = hf_export.probe(model, hf.load_params(source, model), hf.load_tokenizer(source))
        size = int(args.max_shard_gb * 1e9)
        saved = hf_export.save_model(
            folder,
            model,
            None,
            source,
            dtype=args.dtype,
            max_shard_bytes=size,
            check=check,
            overwrite=True,
        )
        files.write_json(folder / "ftjax.json", {"base": hf.describe(source)})
        show(saved, "the dequantised base")
    return folder


def show(saved: hf_export.Saved, what: str) -> None:
    print(f"{saved.folder}: {what}, {saved.size / 1e6:,.1f} MB, re-opened: {saved.drift}")
    if saved.rounding is not None:
        share = f"{saved.rounding:.1%}" if np.isfinite(saved.rounding) else "more than all"
        print(f"rounding to the saved dtype changed the weights by {share} of what tuning changed them by")


TARGETS = {"peft": to_peft, "vllm": to_vllm, "hf": to_hf, "gguf": to_gguf}
