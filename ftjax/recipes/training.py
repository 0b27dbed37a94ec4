"""What the training recipes share, top to bottom: from a config to a tuned, saved, reported run."""

import collections
import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import checkpoint, config, hf, lora, mesh, models, optim, peft, report, train, weights
from ftjax.data import dataset
from ftjax.data.loader import Loader
from ftjax.data.stream import StreamLoader
from ftjax.errors import UserError
from ftjax.models import Model
from ftjax.recipes import card

# A change of these changes nothing that a run computes, so it goes on with the new value.
FREE_KEYS = ("report", "checkpoint", "data.cache_dir")


@dataclasses.dataclass
class Setup:
    """Everything a recipe's loss is made of."""

    config: Any
    model: Model
    params_of: Callable  # (trainable, frozen, rng) -> params
    frozen_head: bool


def main(argv: list[str], recipe: str, make_loss, *, preference: bool = False) -> int:
    """The command line of a training recipe: config, overrides and flags in, a finished run folder out."""
    cfg, flags = config.parse_run_args(argv, recipe)
    run = start(cfg, make_loss, preference=preference, **flags)
    if jax.process_index() == 0:
        result = "adapter" if cfg.lora else "model"
        print(f"\n{run / result} holds the {result}, {run / 'report.html'} the report. Next:")
        print(f"  ftjax chat {run}")
        print(f"  ftjax export {run} --for hf")
    return 0


def start(
    cfg, make_loss: Callable[[Setup], train.LossFn], *, preference: bool = False, **flags: bool
) -> pathlib.Path:
    """Train by `cfg` with the loss that `make_loss` builds; returns the run folder, finished.

    `flags` are those of `claim`.
    """
    run = claim(cfg, **flags)
    devices = mesh.make_mesh(cfg.mesh)
    with mesh.use(devices):
        return _train(run, cfg, make_loss, preference, devices)


def claim(cfg, overwrite: bool = False, resume: bool = False) -> pathlib.Path:
    """The run folder, ours to write to: new, or that of the same run, stopped.

    UserError where it holds a finished or a different run. `overwrite` deletes what is there; `resume` goes
    on though settings changed."""
    run = pathlib.Path(cfg.output)
    saved = run / "config.yaml"
    if saved.exists() and (overwrite or not (run / "metrics.jsonl").exists()):
        shutil.rmtree(run)  # told to, or it ended before it began: bad data, say
    elif saved.exists():
        changed = config.differences(saved, cfg, ignore=FREE_KEYS)
        if changed and not resume:
            raise UserError(
                f"{run} holds a run with other settings ({'; '.join(changed[:5])}). Choose another output; "
                "or "
                "--resume goes on with the new ones, --overwrite deletes that run and starts anew"
            )
        if (run / "summary.json").exists() and not changed:
            raise UserError(
                f"{run} holds this very run, finished: `ftjax chat {run}` talks to it. Choose another "
                "output, or "
                "--overwrite to delete it and run again"
            )
    elif run.is_dir() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run of ours; choose another output")
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "summary.json").unlink(missing_ok=True)
        saved.write_text(config.dump(cfg))
    except OSError as e:
        raise UserError(f"cannot write to {run}: {e.strerror}") from None
    return run


def _train(run: pathlib.Path, cfg, make_loss, preference: bool, devices) -> pathlib.Path:
    clock = time.perf_counter()
    # 1. the base model
    source = hf.open_model(cfg.model, revision=cfg.revision)
    tokenizer = hf.load_tokenizer(source)
    dtype = jnp.dtype(cfg.train.dtype)
    model = models.from_config(source.config).with_options(
        dtype=dtype, remat=cfg.train.remat, unroll=cfg.train.unroll
    )
    mesh.check(devices, model.table, cfg.train.batch_size // cfg.train.microbatches)
    pin(run / "base.json", hf.describe(source), "fingerprint", f"the weights of {cfg.model}")

    # 2. the data, planned into rows
    context = model.config.max_position_embeddings
    if cfg.data.max_length > context:
        raise UserError(
            f"data.max_length={cfg.data.max_length} exceeds the model's context of {context} tokens"
        )
    data, eval_data, reports = open_data(run, cfg, tokenizer, preference)
    total_steps = cfg.train.max_steps or data.steps(cfg.train.epochs)

    # 3. the frozen tree and the trainable one
    plan = lora.plan(cfg.lora, model.table) if cfg.lora else None
    base_shardings = weights.shardings(model.table, mesh.WEIGHT_RULES, devices)
    base_dtype = (
        dtype if plan else jnp.float32
    )  # full fine-tuning keeps float32 weights and computes in dtype
    base = hf.load_params(source, model, dtype=base_dtype, shardings=base_shardings)
    trainable, frozen, params_of = split(cfg, model, plan, base, devices, keep_reference=preference)
    del base
    setup = Setup(cfg, model, params_of, frozen_head=plan is not None and model.head_path not in plan)

    # 4. the step
    tx, schedule = optim.make_optimizer(cfg.optim, trainable, total_steps, model.table)
    state = train.init_state(trainable, tx, mesh.state_shardings(devices, tx, trainable))
    loss_fn = make_loss(setup)
    step = train.make_train_step(loss_fn, tx, cfg.seed)
    eval_step = train.make_eval_step(loss_fn)
    sharding = mesh.batch_sharding(devices)

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

    # 5. where a run that was stopped goes on
    saver = checkpoint.Checkpoints(run / "checkpoints", cfg.checkpoint.keep)
    progress = train.Progress()
    restored = saver.restore(state)
    if restored is not None:
        state, facts = restored
        progress = train.Progress(**facts)
        saver.set_aside(after=int(state.step))
    first = int(state.step)
    reporter = report.Reporter(
        run, cfg.report, total_steps=total_steps, resume_step=first, unit="pair" if preference else "tok"
    )
    reporter.start(
        {
            "recipe": cfg.recipe,
            "model": cfg.model,
            "parameters": model.table.count(),
            "trainable": sum(x.size for x in jax.tree.leaves(trainable)),
            "train": describe(reports[: len(data_sources(cfg.data.train))]) | data.stats,
            "eval": eval_data.stats if eval_data else None,
            "mesh": dict(devices.shape),
            "setup_seconds": time.perf_counter() - clock,
        }
    )
    if restored is not None:
        reporter.event(first, f"going on from the checkpoint of step {first}")

    # 6. the loop
    def report_step(at: int, metrics: dict[str, float]) -> None:
        reporter.train(at, metrics | {"learning_rate": float(schedule(at - 1))})

    def evaluate(state: train.TrainState) -> dict[str, float]:
        assert eval_data is not None
        sums: dict[str, float] = {}
        for batch in eval_data.batches():
            for k, v in jax.device_get(eval_step(state.trainable, frozen, put(batch))).items():
                sums[k] = sums.get(k, 0.0) + float(v)
        metrics = {k: v / max(sums["weight"], 1e-9) for k, v in sums.items()} | {"weight": sums["weight"]}
        reporter.eval(int(state.step), metrics)
        return metrics

    def save(state: train.TrainState, progress: train.Progress) -> None:
        saver.best = progress.best_step if cfg.eval.keep_best else None
        saver.save(state, dataclasses.asdict(progress))

    try:
        state, progress = train.fit(
            state,
            lambda state, batch: step(state, frozen, put(batch)),
            data.batches(first),
            total_steps=total_steps,
            save=save,
            save_every=cfg.checkpoint.every,
            report=report_step,
            documents=data.documents,
            evaluate=evaluate if eval_data else None,
            eval_every=cfg.eval.every or data.steps_per_epoch or 0,
            eval_options=cfg.eval,
            progress=progress,
        )
        saver.wait()

        # 7. what the user takes away
        last = int(state.step)
        if cfg.eval.keep_best and progress.best_step is not None and progress.best_step != last:
            best = saver.restore(state, step=progress.best_step)
            assert best is not None, "the best step is kept"
            state = best[0]
            reporter.event(
                last, f"the best evaluation was after step {progress.best_step}: its weights are kept"
            )
        save_result(run, cfg, source, model, plan, state.trainable)
        reporter.finish({"steps": last, "kept_step": int(state.step), **dataclasses.asdict(progress)})
    finally:
        saver.close()
        reporter.close()
    return run


def open_data(run: pathlib.Path, cfg, tokenizer, preference: bool):
    """(training loader, evaluation loader or None, what became of each source's examples)."""
    cut: dict[str, Any] = dict(
        batch_size=cfg.train.batch_size,
        microbatches=cfg.train.microbatches,
        seed=cfg.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    found = dataset.load(cfg.data, tokenizer)
    if cfg.data.streaming:
        data = StreamLoader(cfg.data, tokenizer, renderer=found.renderer, **cut)
    else:
        assert found.train is not None
        if (found.train.documents_per_unit == 2) != preference:
            kind = "preference pairs" if not preference else "no preference pairs"
            want = "pairs of a chosen and a rejected answer" if preference else "conversations or text"
            raise UserError(f"data.train holds {kind}; ftjax {cfg.recipe} trains on {want}")
        data = Loader(found.train, cfg.data, **cut)
        facts = {"source": data_sources(cfg.data.train), "fingerprint": found.train.fingerprint()}
        pin(run / "data.json", facts, "fingerprint", "the training data")
    eval_data = None
    if found.eval is not None:
        eval_data = Loader(found.eval, cfg.data, train=False, **cut)
    return data, eval_data, found.reports


def describe(reports) -> dict[str, Any]:
    """Counts over all sources, for the report; "dropped" by reason."""
    counted = ("rows", "documents", "tokens", "trained", "truncated")
    out: dict[str, Any] = {name: sum(getattr(r, name) for r in reports) for name in counted}
    out["format"] = ", ".join(sorted({r.format for r in reports if r.format}))
    for name in ("drops", "notes"):
        found = collections.Counter()
        for r in reports:
            found.update(getattr(r, name))
        out["dropped" if name == "drops" else name] = dict(found)
    return out


def data_sources(setting) -> list[str]:
    return [source.path for source in dataset.sources(setting)]


def save_result(run: pathlib.Path, cfg, source, model: Model, plan: lora.Plan | None, trainable) -> None:
    """RUN/adapter in PEFT's format, or in full fine-tuning RUN/model in Hugging Face's."""
    template = cfg.data.chat_template
    text = pathlib.Path(template).read_text() if template and template != "none" else None
    readme = card.of_run(run, source.source, "peft" if plan else "transformers")
    if plan:
        peft.save(
            run / "adapter",
            plan,
            trainable,
            cfg.lora,
            model.table,
            source,
            chat_template=text,
            card=readme,
            overwrite=True,
        )
    else:
        hf.save_model(
            run / "model",
            model,
            trainable,
            source,
            chat_template=text,
            card=readme,
            check=hf.probe(model, trainable),
            overwrite=True,
        )


def split(cfg, model: Model, plan: lora.Plan | None, base, devices, keep_reference: bool):
    """(trainable, frozen, params_of): LoRA factors beside the base, or in full fine-tuning every weight.

    `params_of(trainable, frozen, rng)` is the parameter tree of a forward pass; `rng` turns on training's
    noise."""

    def noisy(params, rng):
        if rng is None or not cfg.train.neftune_alpha:
            return params
        key = weights.path_key(rng, "neftune")
        return params | {"embed": weights.NoisyEmbedding(params["embed"], key, cfg.train.neftune_alpha)}

    if plan is None:
        # A reference model has to stay as it was, so full preference tuning holds the weights twice.
        frozen = jax.tree.map(lambda x: x.astype(jnp.dtype(cfg.train.dtype)), base) if keep_reference else {}
        return base, frozen, lambda trainable, frozen, rng: noisy(trainable, rng)

    make = functools.partial(lora.init, plan=plan, table=model.table)
    shardings = mesh.adapter_shardings(devices, plan, model.table)
    adapters = jax.jit(make, out_shardings=shardings)(weights.path_key(jax.random.key(cfg.seed), "lora"))

    def params_of(trainable, frozen, rng):
        attached = lora.attach(frozen, trainable, plan, rng=rng, dropout=cfg.lora.lora_dropout)
        return noisy(attached, rng)

    return adapters, base, params_of


def pin(path: pathlib.Path, facts: dict[str, Any], key: str, what: str) -> None:
    """Write `facts` for later verbs, and for a resumed run: UserError where it finds another facts[key]
    there."""
    if path.exists() and json.loads(path.read_text()).get(key) != facts[key]:
        raise UserError(
            f"{what} changed since this run began, so it cannot go on as it was: choose another output, or "
            f"--overwrite to start anew (see {path})"
        )
    path.write_text(json.dumps(facts, indent=1))
