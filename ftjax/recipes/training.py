"""What the training recipes share, top to bottom: from a config to a tuned, saved, reported run."""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import checkpoint, config, hf, lora, mesh, models, optim, peft, report, train, weights
from ftjax.data import loader
from ftjax.errors import UserError
from ftjax.models import Model

log = logging.getLogger("ftjax")

# A change of these does not change what a run computes, so a run may go on with another value.
FREE_KEYS = ("report", "checkpoint", "export")


@dataclasses.dataclass
class Setup:
    """Everything a recipe's loss is made of."""

    config: Any
    model: Model
    params_of: Callable  # (trainable, frozen, rng) -> params
    frozen_head: bool


def start(cfg, make_loss: Callable[[Setup], train.LossFn], *, preference: bool = False, **flags) -> pathlib.Path:
    """Train by `cfg` with the loss that `make_loss` builds; returns the run folder, finished.

    `flags`: overwrite (start anew over what is there), resume (go on though the config changed).
    """
    run = claim(cfg, **flags)
    devices = mesh.make_mesh(cfg.mesh)
    with mesh.use(devices):
        return _train(run, cfg, make_loss, preference, devices)


def claim(cfg, overwrite: bool = False, resume: bool = False) -> pathlib.Path:
    """The run folder, ours to write to. UserError where it holds a finished or another run."""
    run = pathlib.Path(cfg.output)
    text = config.dump(cfg)
    saved = run / "config.yaml"
    if saved.exists() and overwrite:
        shutil.rmtree(run)
    elif saved.exists():
        changed = config.differences(saved, cfg, ignore=FREE_KEYS)
        if changed and not resume:
            raise UserError(
                f"{run} holds a run with another config ({'; '.join(changed[:5])}). Choose another output, or add "
                "--resume to go on with the new values, or --overwrite to start anew"
            )
        if (run / "summary.json").exists() and not changed:
            raise UserError(
                f"{run} holds this very run, finished. Choose another output, or --overwrite to run it again, or "
                f"use it: ftjax chat {run}"
            )
    elif run.is_dir() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run of ours; choose another output folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
        saved.write_text(text)
    except OSError as e:
        raise UserError(f"cannot write to {run}: {e.strerror}") from None
    return run


def _train(run: pathlib.Path, cfg, make_loss, preference: bool, devices) -> pathlib.Path:
    clock = time.perf_counter()
    # 1. the base model, and what is trained of it
    source = hf.open_model(cfg.model, revision=cfg.revision)
    tokenizer = hf.load_tokenizer(source)
    dtype = jnp.dtype(cfg.train.dtype)
    model = models.from_config(source.config).with_options(
        dtype=dtype, remat=cfg.train.remat, unroll=cfg.train.unroll
    )
    hf.check_vocabulary(source, model, tokenizer)
    rows = cfg.train.batch_size // cfg.train.microbatches
    mesh.check(devices, model.table, rows)
    write_base(run, source)

    # 2. the data, planned into rows
    data, eval_data = loader.open_data(
        cfg.data,
        tokenizer,
        batch_size=cfg.train.batch_size,
        microbatches=cfg.train.microbatches,
        seed=cfg.seed,
        preference=preference,
        context=model.config.max_position_embeddings,
    )
    total_steps = cfg.train.max_steps or max(1, round(cfg.train.epochs * data.steps_per_epoch))

    # 3. trees: frozen and trainable
    plan = lora.plan(cfg.lora, model.table) if cfg.lora else None
    base_shardings = weights.shardings(model.table, mesh.WEIGHT_RULES, devices)
    base_dtype = dtype if plan else jnp.float32  # full fine-tuning keeps float32 weights and computes in dtype
    base = hf.load_params(source, model, dtype=base_dtype, shardings=base_shardings)
    trainable, frozen, params_of = split(cfg, model, plan, base, devices, keep_reference=preference)
    setup = Setup(cfg, model, params_of, frozen_head=plan is not None and model.head_path not in plan)

    # 4. the step
    tx, schedule = optim.make_optimizer(cfg.optim, trainable, total_steps)
    state = jax.jit(functools.partial(train.init_state, tx=tx))(trainable)
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
    reporter = report.Reporter(run, cfg.report, total_steps=total_steps, resume_step=int(state.step))
    reporter.start(
        {
            "model": cfg.model,
            "parameters": model.table.count(),
            "trainable": sum(x.size for x in jax.tree.leaves(trainable)),
            "train": data.stats,
            "eval": eval_data.stats if eval_data else None,
            "total_steps": total_steps,
            "setup_seconds": time.perf_counter() - clock,
        }
    )
    if restored is not None:
        reporter.event(int(state.step), f"going on from the checkpoint of step {int(state.step)}")

    # 6. the loop
    def report_step(at: int, metrics: dict[str, float]) -> None:
        reporter.train(at, metrics | {"learning_rate": float(schedule(at - 1))})

    def evaluate(state: train.TrainState) -> dict[str, float]:
        assert eval_data is not None
        sums: dict[str, float] = {}
        for batch in eval_data.batches(0, epochs=1):
            for k, v in jax.device_get(eval_step(state.trainable, frozen, put(batch))).items():
                sums[k] = sums.get(k, 0.0) + float(v)
        metrics = {k: v / max(sums["weight"], 1e-9) for k, v in sums.items() if k != "weight"}
        reporter.eval(int(state.step), metrics | {"weight": sums["weight"]})
        return metrics

    def save(state: train.TrainState, progress: train.Progress) -> None:
        saver.best = progress.best_step
        saver.save(state, dataclasses.asdict(progress))

    try:
        state, progress = train.fit(
            state,
            lambda state, batch: step(state, frozen, put(batch)),
            data.batches(int(state.step)),
            total_steps=total_steps,
            save=save,
            save_every=cfg.checkpoint.every,
            report=report_step,
            documents=data.documents,
            evaluate=evaluate if eval_data else None,
            eval_every=cfg.eval.every or data.steps_per_epoch,
            eval_options=cfg.eval,
            progress=progress,
        )
    finally:
        saver.close()
        reporter.close()

    # 7. what the user takes away
    if cfg.eval.keep_best and progress.best_step not in (None, int(state.step)):
        state, _ = saver.restore(state, step=progress.best_step)  # type: ignore[misc]
    if plan:
        peft.save(run / "adapter", plan, state.trainable, cfg.lora, model.table, source)
    else:
        hf.save_model(run / "model", model, state.trainable, source, dtype=dtype)
    finish(run, reporter, {"step": int(state.step), **dataclasses.asdict(progress)})
    return run


def split(cfg, model: Model, plan: lora.Plan | None, base, devices, keep_reference: bool):
    """(trainable, frozen, params_of): LoRA factors beside the base, or in full fine-tuning every weight.

    `params_of(trainable, frozen, rng)` is the parameter tree of a forward pass; `rng` turns on training's noise.
    """

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


def write_base(run: pathlib.Path, source) -> None:
    """RUN/base.json: which weights the run stands on. UserError where a resumed run finds others there."""
    facts = {
        "source": str(source.path),
        "revision": source.revision,
        "kind": source.kind,
        "fingerprint": source.fingerprint(),
    }
    path = run / "base.json"
    if path.exists() and json.loads(path.read_text())["fingerprint"] != facts["fingerprint"]:
        raise UserError(f"{source.path} holds other weights than when this run began; use them in a new output folder")
    path.write_text(json.dumps(facts, indent=1))


def finish(run: pathlib.Path, reporter, summary: dict[str, Any]) -> None:
    """Write summary.json, which marks the run finished, and the report."""
    reporter.finish(summary)
