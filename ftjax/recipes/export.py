"""The verb `ftjax export`: what a run has tuned, as other tools load it, checked against the run's own
logits."""

import argparse
import contextlib
import dataclasses
from pathlib import Path

import numpy as np

from ftjax import hf, lora, models, peft
from ftjax.errors import UserError
from ftjax.recipes import card

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ftjax export",
        description="Write what a run has tuned for other tools, and check what was written.",
        epilog="--for peft: the adapter, for PEFT and for servers that load adapters (of a GGUF base the "
        "dequantised base too, beside it). --for hf: the adapter merged into the base, a folder for "
        "transformers "
        "and all that read its format.",
    )
    parser.add_argument("run", metavar="RUN", help="the output folder of a training run")
    parser.add_argument("--for", dest="target", required=True, choices=("peft", "hf"))
    parser.add_argument("--output", metavar="DIR", help="default: RUN/export/peft or RUN/export/hf")
    parser.add_argument("--dtype", choices=DTYPES, help="of merged weights; default: the base's")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument(
        "--checkpoint", metavar="best|last|STEP", help="default: the weights that the run ended with"
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="with --for peft: one rank and scale for all modules, for loaders without patterns or rsLoRA",
    )
    parser.add_argument("--base", metavar="MODEL", help="where the base is now, if it was moved")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="of a weights file (default 5)")
    args = parser.parse_args(argv)
    if args.portable and args.target != "peft":
        raise UserError("--portable is of --for peft: a merged model has no adapter")
    run = Path(args.run).expanduser()
    source = open_base(run, args.base)
    output = Path(args.output) if args.output else run / "export" / args.target
    if output.exists() and any(output.iterdir()) and not args.overwrite:
        raise UserError(f"{output} exists; --overwrite replaces it, --output names another folder")
    model = models.from_config(source.config)
    if (run / "adapter").is_dir():
        adapter = read_adapter(run, model, args.checkpoint)
        export = export_adapter if args.target == "peft" else export_merged
        export(run, output, source, model, adapter, args)
    elif (run / "model").is_dir():
        export_full(run, output, args)
    else:
        raise UserError(f"{run}: neither adapter/ nor model/ in it: the run has not finished yet")
    return 0


def open_base(run: Path, moved_to: str | None = None) -> hf.Source:
    """The base model of a run, with the very weights that it was trained on. UserError where they changed."""
    path = run / "base.json"
    if not path.is_file():
        raise UserError(f"{run}: no base.json: not the folder of a training run")
    facts = hf.read_json(path)
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


def read_adapter(run: Path, model: models.Model, which: str | None):
    """(config, plan, adapters) that the run ended with, or had at a checkpoint."""
    config, plan, adapters = peft.load(run / "adapter", model)
    return (
        (config, plan, adapters) if which is None else (config, plan, at_checkpoint(run, model, plan, which))
    )


def at_checkpoint(run: Path, model: models.Model, plan: lora.Plan, which: str):
    """The adapters in RUN/checkpoints at "best", "last" or a step."""
    import jax

    from ftjax import checkpoint, optim, train
    from ftjax import config as configs

    saver = checkpoint.Checkpoints(run / "checkpoints")
    steps = saver.steps()
    step = None
    if which == "best":
        summary = run / "summary.json"
        step = hf.read_json(summary).get("best_step") if summary.is_file() else None
        if step is None:
            raise UserError(f"{run}: no evaluation chose a best checkpoint; there are: {_list(steps)}")
    elif which != "last":
        if not which.isdigit() or int(which) not in steps:
            raise UserError(f"--checkpoint {which}: there are: best, last, {_list(steps)}")
        step = int(which)
    elif not steps:
        raise UserError(f"{run}: no checkpoints")
    cfg = configs.load(str(run / "config.yaml"))
    trainable = lora.init(jax.random.key(0), plan, model.table)
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


def export_adapter(run: Path, output: Path, source: hf.Source, model, adapter, args) -> None:
    config, plan, adapters = adapter
    base_name = None
    if source.kind == "gguf":  # PEFT cannot load it: the dequantised weights are this adapter's base
        folder = output.parent / "base"
        if not (folder / "config.json").is_file() or args.overwrite:
            params = hf.load_params(source, model)
            saved = hf.save_model(
                folder,
                model,
                None,
                source,
                dtype=args.dtype,
                max_shard_bytes=int(args.max_shard_gb * 1e9),
                check=hf.probe(model, params, hf.load_tokenizer(source)),
                overwrite=True,
            )
            hf.write_json(folder / "ftjax.json", {"base": hf.describe(source)})
            show(saved, "the dequantised base")
        base_name = str(folder.absolute())
    readme = card.of_run(run, base_name or source.source, "peft")
    folder = peft.save(
        output,
        plan,
        adapters,
        config,
        model.table,
        source,
        base_name=base_name,
        portable=args.portable,
        chat_template=chat_template(run / "adapter"),
        card=readme,
        overwrite=args.overwrite,
    )
    print(
        f"{folder}: the adapter of {sum(sum(r > 0 for r in a.ranks) for a in plan.values())} modules, "
        "read back"
    )


def export_merged(run: Path, output: Path, source: hf.Source, model, adapter, args) -> None:
    _, plan, adapters = adapter
    tokenizer = hf.load_tokenizer(source)
    params = hf.load_params(source, model)
    check = hf.probe(model, lora.attach(params, adapters, plan), tokenizer)
    del params
    saved = hf.save_model(
        output,
        model,
        None,
        source,
        plan=plan,
        adapters=adapters,
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        chat_template=chat_template(run / "adapter"),
        stop_ids=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        card=card.of_run(run, source.source, "transformers"),
        check=check,
        overwrite=args.overwrite,
    )
    show(saved, "the merged model")


def export_full(run: Path, output: Path, args) -> None:
    if args.target == "peft":
        raise UserError(f"{run} tuned every weight, so there is no adapter: --for hf")
    if args.checkpoint is not None:
        raise UserError("--checkpoint is for runs with an adapter; this run's weights are in its model/")
    source = hf.open_model(run / "model")
    model = models.from_config(source.config)
    tokenizer = hf.load_tokenizer(source)
    saved = hf.save_model(
        output,
        model,
        None,
        source,
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        chat_template=chat_template(run / "model"),
        card=card.of_run(run, hf.read_json(run / "base.json")["source"], "transformers"),
        check=hf.probe(model, hf.load_params(source, model), tokenizer),
        overwrite=args.overwrite,
    )
    show(saved, "the tuned model")


def chat_template(folder: Path) -> str | None:
    """The template that the run used, where it is not the tokenizer's own."""
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def show(saved: hf.Saved, what: str) -> None:
    print(f"{saved.folder}: {what}, {saved.size / 1e6:,.1f} MB, re-opened: {saved.drift}")
    if saved.rounding is not None:
        share = f"{saved.rounding:.1%}" if np.isfinite(saved.rounding) else "more than all"
        print(f"rounding to the saved dtype changed the weights by {share} of what tuning changed them by")
