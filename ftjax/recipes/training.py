"""What the training recipes share, top to bottom: from a config to a tuned, saved, reported run."""

import collections
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import (
    checkpoint,
    config,
    hf,
    hf_export,
    lora,
    lora_init,
    mesh,
    models,
    optim,
    peft,
    report,
    train,
    weights,
)
from ftjax.data import dataset
from ftjax.data.loader import Loader
from ftjax.data.stream import StreamLoader
from ftjax.errors import UserError
from ftjax.models import Model
from ftjax.objectives.router import RouterLoss
from ftjax.recipes import card, folder
from ftjax.recipes.data import summary


@dataclasses.dataclass
class Setup:
    """Everything a recipe's loss is made of."""

    config: Any
    model: Model
    params_of: Callable  # (trainable, frozen, rng) -> params
    frozen_head: bool
    router: RouterLoss


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

    `flags` are those of `folder.claim`.
    """
    clock = time.perf_counter()
    if cfg.lora and cfg.lora.init_lora_weights == "loftq":
        raise UserError(
            "lora.init_lora_weights=loftq: from Python only, by ftjax.lora_init.loftq with your quantiser; "
            "runs keep no quantised base yet"
        )
    run = folder.claim(cfg, **flags)
    devices = mesh.make_mesh(cfg.mesh)

    # 1. the base model
    source = hf.open_model(cfg.model, revision=cfg.revision)
    tokenizer = hf.load_tokenizer(source)
    dtype = jnp.dtype(cfg.train.dtype)
    model = models.from_config(source.config).with_options(
        dtype=dtype, remat=cfg.train.remat, unroll=cfg.train.unroll
    )
    mesh.check(devices, model.table, cfg.train.batch_size // cfg.train.microbatches)
    run.pin("base.json", hf.describe(source), f"the weights of {cfg.model}")

    # 2. the data, planned into rows
    context = model.config.max_position_embeddings
    if cfg.data.max_length > context:
        raise UserError(
            f"data.max_length={cfg.data.max_length} exceeds the model's context of {context} tokens"
        )
    data, eval_data, reports = open_data(run, cfg, tokenizer, preference)
    total_steps = cfg.train.max_steps
    if total_steps is None:
        total_steps = data.steps(cfg.train.epochs)

    with mesh.use(devices):
        # 3. the frozen tree and the trainable one
        plan = lora.plan_run(cfg.lora, model.table, cfg.train.trainable, cfg.train.freeze)
        base_dtype = dtype if cfg.lora else jnp.float32  # full fine-tuning keeps float32, computes in dtype
        shardings = weights.shardings(model.table, mesh.WEIGHT_RULES, devices)
        base = hf.load_params(source, model, dtype=base_dtype, shardings=shardings)
        began = ""
        trainable, frozen, params_of = split(cfg, model, plan, base, devices, keep_reference=preference)
        if cfg.lora and cfg.lora.init_lora_weights == "eva":
            trainable, began = by_data(model, base, trainable, plan, data, devices)
        del base
        routers = [path for path, row in model.table.rows.items() if row.role == "router"]
        trained = {path for key in weights.flatten(trainable) for path in (key, key.rpartition("/")[0])}
        setup = Setup(
            cfg,
            model,
            params_of,
            frozen_head=plan is not None and not {model.head_path, "lm_head_bias"} & set(plan),
            router=RouterLoss.of(
                model,
                cfg.train.router_aux_loss_coef,
                cfg.train.router_z_loss_coef,
                router_trains=not trained.isdisjoint(routers),
            ),
        )

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
        run.clear()
        saver = checkpoint.Checkpoints(run.path / "checkpoints", cfg.checkpoint.keep)
        progress = train.Progress()
        restored = saver.restore(state)
        if restored is not None:
            state, facts = restored
            progress = train.Progress(**facts)
            saver.set_aside(after=int(state.step))
        run.begin(cfg)
        first = int(state.step)
        reporter = report.Reporter(
            run.path,
            cfg.report,
            total_steps=total_steps,
            resume_step=first,
            unit="pair" if preference else "tok",
        )
        count = sum(x.size for x in jax.tree.leaves(trainable))
        reporter.start(
            {
                "recipe": cfg.recipe,
                "model": cfg.model,
                "parameters": model.table.count(),
                "trainable": count,
                "train": describe(data, reports),
                "eval": describe(eval_data, []) if eval_data else None,
                "mesh": dict(devices.shape),
                "setup_seconds": time.perf_counter() - clock,
            }
        )
        if restored is not None:
            reporter.event(first, f"going on from the checkpoint of step {first}")
        elif began:
            reporter.event(first, began)
        if cfg.lora and (why := peft.check(cfg.lora, plan or {}, model.table)):
            reporter.event(first, f"the adapter will be kept in ftjax's own format, not PEFT's: {why}")
        share = count / model.table.count()
        reporter.say(
            f"{total_steps} steps; {count:,} weights are trained, {share:.2%} of the model's. Compiling …"
        )

        # 6. the loop
        def report_step(at: int, metrics: dict[str, float]) -> None:
            reporter.train(at, metrics | {"learning_rate": float(schedule(at - 1))})

        def evaluate(state: train.TrainState) -> dict[str, float]:
            assert eval_data is not None
            sums: dict[str, float] = {}
            for batch in eval_data.batches():
                for k, v in jax.device_get(eval_step(state.trainable, frozen, put(batch))).items():
                    sums[k] = sums.get(k, 0.0) + float(v)
            weight = sums.pop("weight")
            metrics = {k: v / max(weight, 1e-9) for k, v in sums.items()} | {"weight": weight}
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
            last = int(state.step)
            if cfg.eval.keep_best and progress.best_step not in (None, last):
                best = saver.restore(state, step=progress.best_step)
                assert best is not None, "the best step is kept"
                state = best[0]
                reporter.event(last, best_said(progress))
            tuned = jax.device_get(state.trainable)
        except BaseException:
            reporter.close()
            raise
        finally:
            saver.close()

    # 7. what the user takes away
    scores = {"evaluation loss": progress.best_loss} if progress.best_step is not None else {}
    if isinstance(data, StreamLoader):
        for line in (line for one in data.reports for line in summary(one)):
            reporter.event(last, line)
    params = tuned if plan is None or cfg.lora else params_of(state.trainable, frozen, None)
    save_result(run.path, cfg, source, model, plan, tuned, scores, params)
    reporter.finish(
        {"steps": last, "kept_step": int(state.step), "scores": scores, **dataclasses.asdict(progress)}
    )
    return run.path


def best_said(progress: train.Progress) -> str:
    if progress.best_step == 0:
        return (
            f"no evaluation was better than the one before training ({progress.best_loss:.4g}): the weights "
            "kept are the base's, nothing to use. Try a lower learning rate or more data"
        )
    return f"the best evaluation was after step {progress.best_step}: its weights are kept"


def open_data(run: folder.RunFolder, cfg, tokenizer, preference: bool):
    """(training loader, evaluation loader or None, what became of each source's examples)."""
    cut: dict[str, Any] = dict(
        batch_size=cfg.train.batch_size,
        microbatches=cfg.train.microbatches,
        seed=cfg.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with report.Bar("tokenise", 100) as bar:

        def progress(path: str, done: float | None, examples: int) -> None:
            bar.update(int(100 * (done or 0)), f"{path}: {examples} examples")

        found = dataset.load(cfg.data, tokenizer, progress)
    if jax.process_index() == 0:
        for line in (line for one in found.reports for line in summary(one)):
            print(line)
    if cfg.data.streaming:
        data = StreamLoader(cfg.data, tokenizer, renderer=found.renderer, **cut)
        pairs = data.documents_per_unit() == 2
    else:
        assert found.train is not None
        data = Loader(found.train, cfg.data, **cut)
        pairs = found.train.documents_per_unit == 2
        facts = {"source": data_sources(cfg.data.train), "fingerprint": found.train.fingerprint()}
        run.pin("data.json", facts, "the training data")
    if pairs != preference:
        kind = "no preference pairs" if preference else "preference pairs"
        want = "pairs of a chosen and a rejected answer" if preference else "conversations or text"
        raise UserError(f"data.train holds {kind}; ftjax {cfg.recipe} trains on {want}")
    eval_data = None
    if found.eval is not None:
        eval_data = Loader(found.eval, cfg.data, train=False, **cut)
    return data, eval_data, found.reports


def describe(data: Loader | StreamLoader, reports) -> dict[str, Any]:
    """For the report: what the rows hold, and of the files what was left out, by reason."""
    out: dict[str, Any] = {}
    if isinstance(data, Loader):
        stats = data.stats
        out = {
            "examples": stats["units"],
            "packed_rows": stats["rows"],
            "tokens": stats["tokens"],
            "efficiency": stats["efficiency"],
        }
    if reports:
        out["format"] = ", ".join(sorted({r.format for r in reports if r.format}))
        dropped = collections.Counter()
        for one in reports:
            dropped.update(one.drops)
        out["dropped"] = dict(dropped)
    return out


def data_sources(setting) -> list[str]:
    return [source.path for source in dataset.sources(setting)]


def save_result(
    run: pathlib.Path,
    cfg,
    source,
    model: Model,
    plan: lora.Plan | None,
    trainable,
    scores: dict[str, float],
    params=None,
) -> None:
    """RUN/adapter in PEFT's format, or in full fine-tuning RUN/model in Hugging Face's; of a part of the
    weights `params` is the whole tree."""
    template = cfg.data.chat_template
    text = pathlib.Path(template).read_text() if template and template != "none" else None
    readme = card.of_run(run, source.source, "peft" if cfg.lora else "transformers", scores)
    if cfg.lora:
        assert plan is not None
        peft.save_run(
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
        hf_export.save_model(
            run / "model",
            model,
            trainable if plan is None else None,
            source,
            plan=plan,
            adapters=trainable if plan else None,
            chat_template=text,
            card=readme,
            check=hf_export.probe(model, trainable if params is None else params),
            overwrite=True,
        )


def split(cfg, model: Model, plan: lora.Plan | None, base, devices, keep_reference: bool):
    """(trainable, frozen, params_of): what `plan` trains beside the base, or every weight.

    `params_of(trainable, frozen, rng)` is the parameter tree of a forward pass; `rng` turns on training's
    noise."""

    def noisy(params, rng):
        if rng is None or not cfg.train.neftune_alpha:
            return params
        key = weights.path_key(rng, "neftune")
        return params | {"embed": weights.NoisyEmbedding(params["embed"], key, cfg.train.neftune_alpha)}

    if plan is None:
        # A reference model has to stay as it was, so full preference tuning holds the weights twice.
        frozen = jax.tree.map(lambda x: x.astype(cfg.train.dtype).copy(), base) if keep_reference else {}
        return base, frozen, lambda trainable, frozen, rng: noisy(trainable, rng)

    how = cfg.lora.init_lora_weights if cfg.lora else True
    dropout = cfg.lora.lora_dropout if cfg.lora else 0.0
    make = functools.partial(lora.init, plan=plan, table=model.table, how=how)
    shardings = mesh.adapter_shardings(devices, plan, model.table)
    adapters = jax.jit(make, out_shardings=shardings)(
        weights.path_key(jax.random.key(cfg.seed), "lora"), base=base
    )
    if not cfg.lora:  # the frozen part of full tuning is kept in the precision of the products
        whole = set() if keep_reference else {p for p, one in plan.items() if one == lora.Whole()}
        flat = {p: x for p, x in weights.flatten(base).items() if p not in whole}
        matrix = {p: bool(model.table.rows[p].ins) for p in flat}
        base = weights.unflatten({p: x.astype(cfg.train.dtype) if matrix[p] else x for p, x in flat.items()})

    def params_of(trainable, frozen, rng):
        attached = lora.attach(frozen, trainable, plan, rng=rng, dropout=dropout)
        return noisy(attached, rng)

    return adapters, base, params_of


EVA_BATCHES = 16  # its directions hardly change after a few thousand tokens


def by_data(model: Model, base, trainable, plan, data, devices):
    """The factors as EVA begins them, from the first batches of the training data, and what to say of experts
    that too few tokens reached."""

    def microbatches():
        for batch in itertools.islice(data.batches(0), EVA_BATCHES):
            sharding = mesh.batch_sharding(devices)
            whole = {
                k: jax.make_array_from_process_local_data(sharding, batch[k])
                for k in ("tokens", "positions", "segments")
            }
            yield from ({k: x[i] for k, x in whole.items()} for i in range(whole["tokens"].shape[0]))

    out, missing = lora_init.eva(model, base, trainable, plan, model.table, microbatches())
    short = np.concatenate([*missing.values(), np.zeros(0, int)])
    said = ""
    if short.any():
        said = (
            f"EVA: the inputs of {np.count_nonzero(short)} of {len(short)} experts' weights in the first "
            f"{EVA_BATCHES} batches span less than their rank; {short.sum()} components begin at random "
            "directions instead"
        )
    return jax.device_put(out, jax.tree.map(lambda x: x.sharding, trainable)), said
