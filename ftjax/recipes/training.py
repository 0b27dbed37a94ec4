"""What the training recipes share, top to bottom: from a config to a tuned, saved, reported run."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from ftjax import (
    checkpoint,
    config,
    distributed,
    hf,
    hf_export,
    host,
    lora,
    lora_init,
    mesh,
    models,
    optim,
    peft,
    profile,
    quant,
    report,
    train,
    weights,
)
from ftjax import (
    plan as planner,
)
from ftjax.data import dataset
from ftjax.data.ahead import Ahead
from ftjax.data.loader import Loader
from ftjax.data.stream import StreamLoader
from ftjax.errors import UserError
from ftjax.models import Model
from ftjax.recipes import card, folder, program
from ftjax.recipes.data.render import summary


def main(argv: list[str], recipe: str, make_loss, *, preference: bool = False) -> int:
    """The command line of a training recipe: config, overrides and flags in, a finished run folder out."""
    cfg, flags = config.parse_run_args(argv, recipe)
    with distributed.together(cfg.distributed):
        try:
            run = start(cfg, make_loss, preference=preference, since=host.began, **flags)
        except jax.errors.JaxRuntimeError as e:
            raise explained(e) from e
        if distributed.first():
            result = "adapter" if cfg.lora else "model"
            print(f"\n{run / result} holds the {result}, {run / 'report.html'} the report. Next:")
            print(f"  ftjax chat {run}")
            print(f"  ftjax export {run} --for hf")
    return 0


def explained(error: BaseException) -> BaseException:
    """The error, or where a device's memory was too small one that says what needs less."""
    if (said := planner.too_large(error)) is None:
        return error
    said = said.partition("RESOURCE_EXHAUSTED: ")[2].strip()
    return UserError(f"the device's memory is too small: {said} {planner.NEED_LESS}; what is saved is intact")


def start(
    cfg,
    make_loss: Callable[[program.Setup], train.LossFn],
    *,
    preference: bool = False,
    since: float | None = None,
    **flags: bool,
) -> pathlib.Path:
    """Train by `cfg` with the loss that `make_loss` builds; returns the run folder, finished.

    `since` is when the process began, by time.perf_counter(); `flags` are those of `folder.claim`.
    """
    with folder.claim(cfg, **flags) as run:
        return _train(run, cfg, make_loss, preference, since, flags.get("overwrite", False))


def _train(run: folder.RunFolder, cfg, make_loss, preference: bool, since, overwrite: bool) -> pathlib.Path:
    clock = time.perf_counter()
    since = clock if since is None else since
    traced = profile.ProfileOptions.of(cfg.profile)
    saver = checkpoint.Checkpoints(cfg.checkpoint.directory or run.path / "checkpoints", cfg.checkpoint.keep)
    saver.check(run.fresh, overwrite)

    # 1. the base model
    source = hf.open_model(cfg.model, revision=cfg.revision)
    tokenizer = hf.load_tokenizer(source)
    model = program.with_options(models.from_config(source.config), cfg, preference)
    devices, chosen = program.make_mesh(cfg, model)
    held = {"quant": folder.quant_facts(cfg)} if cfg.quant else {}
    run.pin("base.json", hf.describe(source) | held, f"the weights of {cfg.model}")

    # 2. the data, planned into rows
    context = model.config.max_position_embeddings
    if cfg.data.max_length > context:
        raise UserError(
            f"data.max_length={cfg.data.max_length} exceeds the model's context of {context} tokens"
        )
    data, eval_data, reports = open_data(run, cfg, tokenizer, preference, devices)
    total_steps = cfg.train.max_steps
    if total_steps is None:
        total_steps = data.steps(cfg.train.epochs)
    if traced and total_steps < 2:
        raise UserError(
            "profile: a run of one step has none to trace, as the first compiles; take two or more"
        )

    with mesh.use(devices):
        # 3. the frozen tree and the trainable one
        adapt = lora.plan_run(cfg.lora, model.table, cfg.train.trainable, cfg.train.freeze)
        shardings = weights.shardings(model.table, mesh.weight_rules(devices, model.table), devices)
        if cfg.quant:
            quant.check(quant.chosen(cfg.quant, model.table), adapt or {}, model.table)
        base = hf.load_params(
            source, model, dtype=program.base_dtype(cfg), shardings=shardings, quantise=cfg.quant
        )
        began = ""
        trainable, frozen, params_of = program.split(
            cfg, model, adapt, base, devices, keep_reference=preference
        )
        if cfg.lora and cfg.lora.init_lora_weights == "eva":
            trainable, began = by_data(model, base, trainable, adapt, data, devices)
        if cfg.lora and cfg.lora.init_lora_weights == "loftq":
            trainable = by_residual(cfg, source, model, base, trainable, adapt)
        base_bytes = quant.nbytes(base)
        del base

        # 4. the step
        tx, schedule = optim.make_optimizer(cfg.optim, trainable, total_steps, model.table)
        state = train.init_state(trainable, tx, mesh.state_shardings(devices, tx, trainable))
        setup = program.make_setup(cfg, program.on_mesh(model, cfg, devices), adapt, trainable, params_of)
        batch = program.batch_shapes(cfg, devices, max(data.shapes), data.pairs_per_row)

        def step_of(rung: str) -> planner.Step:
            one = dataclasses.replace(setup, model=setup.model.with_options(remat=rung))
            return program.make_step(one, make_loss, tx, state, frozen, batch, devices)

        eval_step = train.make_eval_step(make_loss(setup))
        put = functools.partial(mesh.put, devices)

        # 5. where a run that was stopped goes on
        run.clear()
        if run.fresh:
            saver.clear()
        progress = train.Progress()
        restoring = time.perf_counter()
        restored = saver.restore(state)
        if restored is not None:
            state, facts = restored
            progress = train.Progress(**facts)
            saver.set_aside(after=int(state.step))
        restoring = time.perf_counter() - restoring
        run.begin(cfg)
        first = int(state.step)
        reporter = report.Reporter(
            run.path,
            cfg.report,
            total_steps=total_steps,
            resume_step=first,
            unit="pair" if preference else "tok",
            began=since,
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
                "mesh": {axis: n for axis, n in devices.shape.items() if n > 1 or axis == "fsdp"},
                "setup_seconds": time.perf_counter() - clock,
            }
        )
        hosts = f", {distributed.count()} processes" if distributed.count() > 1 else ""
        where = f" on {mesh.said(devices.shape)}{hosts}"
        if restored is not None:
            reporter.spent("restore", restoring)
            reporter.event(first, f"going on from the checkpoint of step {first}{where}")
        elif began:
            reporter.event(first, began)
        if chosen:
            reporter.event(first, chosen)
        if cfg.lora and (why := peft.check(cfg.lora, adapt or {}, model.table)):
            reporter.event(first, f"the adapter will be kept in ftjax's own format, not PEFT's: {why}")
        share = count / model.table.count()
        if cfg.quant:
            was = model.table.count() * program.base_dtype(cfg).itemsize
            reporter.say(
                f"the base is held in {cfg.quant.kind}: {base_bytes / 1e6:,.1f} MB of {was / 1e6:,.1f}"
            )
        reporter.say(
            f"{total_steps} steps{where}; {count:,} weights are trained, {share:.2%} of the model's. "
            "Compiling …"
        )
        rows = getattr(data, "rows_per_epoch", None)  # streamed data has none
        if rows is not None and rows < cfg.train.batch_size:
            times = f"{cfg.train.batch_size / rows:.3g} times"
            reporter.event(
                first,
                f"the data is packed into {rows:,} of the rows of {cfg.data.max_length:,} tokens, and a step "
                f"takes {cfg.train.batch_size}: each goes over all of it {times}. train.batch_size={rows} or "
                "a smaller data.max_length makes steps as small as the data",
            )

        starting = time.perf_counter() - since
        reporter.spent("start", starting - (restoring if restored is not None else 0.0))

        # 6. the loop
        compiling = time.perf_counter()
        if cfg.train.remat == "auto":
            step = program.choose(run, step_of, devices, lambda said: reporter.event(first, said))
        else:
            step = step_of(cfg.train.remat)
        eval_every = cfg.eval.every or data.steps_per_epoch or 0
        run_step: Callable = lambda state, batch: step(state, frozen, batch)  # noqa: E731
        batches = Ahead(data.batches(first), put)
        took: dict[str, float] = {}

        def compiled_first() -> Iterable:
            """The batches, once the programs that they go through are compiled, side by side; with buckets,
            other lengths are compiled as they come."""
            began = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                if eval_data is not None:
                    with Ahead(eval_data.batches(), put, depth=1) as some:
                        lowered = eval_step.lower(state.trainable, frozen, next(some))
                    other = thread.submit(lowered.compile)
                seconds = step.program.seconds
                if eval_data is not None:
                    other.result()
            took["compile_seconds"] = max(seconds, time.perf_counter() - began)
            reporter.say(f"compiled in {took['compile_seconds']:.1f} s")
            reporter.spent("compile", time.perf_counter() - compiling)
            return batches

        profiler = None
        if traced and distributed.first():
            pauses = (cfg.checkpoint.every, eval_every if eval_data else 0)
            steps = profile.window(traced, first, total_steps, pauses)
            if steps is None:
                reporter.event(first, "no profile: too few steps are left, and the first of them compiles")
            profiler = run_step = profile.Profiler(
                run_step,
                run.path,
                steps,
                first,
                model=model,
                plan=adapt,
                reference=preference,
                done=lambda result: reporter.profile(steps.stop if steps else first, result),
            )

        def report_step(at: int, metrics: dict[str, float]) -> None:
            if profiler:
                metrics = metrics | {"seconds": profiler.take(metrics["seconds"])}
            reporter.train(at, metrics | {"learning_rate": float(schedule(at - 1))})

        def evaluate(state: train.TrainState) -> dict[str, float]:
            assert eval_data is not None
            sums: dict[str, float] = {}
            clock = time.perf_counter()
            found = []
            with Ahead(eval_data.batches(), put) as eval_batches:
                for batch in eval_batches:
                    distributed.progress()
                    found.append(train.settled(eval_step(state.trainable, frozen, batch)))
            for one in jax.device_get(found):
                for k, v in one.items():
                    sums[k] = sums.get(k, 0.0) + float(v)
            weight = sums.pop("weight")
            metrics = {k: v / max(weight, 1e-9) for k, v in sums.items()} | {"weight": weight}
            reporter.eval(int(state.step), metrics)
            reporter.spent("evaluate", time.perf_counter() - clock)
            return metrics

        def save(state: train.TrainState, progress: train.Progress) -> None:
            saver.best = progress.best_step if cfg.eval.keep_best else None
            with reporter.spending("save"):
                saver.save(state, dataclasses.asdict(progress))

        try:
            state, progress = train.fit(
                state,
                run_step,
                compiled_first() if first < total_steps else batches,
                total_steps=total_steps,
                save=save,
                save_every=cfg.checkpoint.every,
                report=report_step,
                documents=data.documents,
                evaluate=evaluate if eval_data else None,
                eval_every=eval_every,
                eval_options=cfg.eval,
                progress=progress,
                agree=distributed.Agreement(devices),
            )
            with reporter.spending("save"):
                saver.wait()
            finishing = time.perf_counter()
            last = int(state.step)
            if cfg.eval.keep_best and progress.best_step not in (None, last):
                best = saver.restore(state, step=progress.best_step)
                assert best is not None, "the best step is kept"
                state = best[0]
                reporter.event(last, best_said(progress))
            tuned = distributed.fetch(state.trainable)
        except BaseException as e:
            reporter.close()
            if not isinstance(e, train.Interrupted | train.NonFinite):  # which all processes come to at once
                distributed.failed(explained(e))
            raise
        finally:
            batches.close()
            if profiler:
                profiler.close()
            saver.close()

    # 7. what the user takes away
    scores = {"evaluation loss": progress.best_loss} if progress.best_step is not None else {}
    if isinstance(data, StreamLoader):
        for line in (line for one in data.reports for line in summary(one)):
            reporter.event(last, line)
    params = tuned
    if adapt is not None and not cfg.lora:
        params = distributed.fetch(params_of(state.trainable, frozen, None))
    if distributed.first():
        save_result(run.path, cfg, source, model, adapt, tuned, scores, params)
    reporter.spent("finish", time.perf_counter() - finishing)
    reporter.finish(
        {
            "steps": last,
            "kept_step": int(state.step),
            "scores": scores,
            **took,
            **(dataclasses.asdict(progress) if scores else {}),
        }
    )
    return run.path


def best_said(progress: train.Progress) -> str:
    if progress.best_step == 0:
        return (
            f"no evaluation was better than the one before training ({progress.best_loss:.4g}): the weights "
            "kept are the base's, nothing to use. Try a lower learning rate or more data"
        )
    return f"the best evaluation was after step {progress.best_step}: its weights are kept"


def open_data(run: folder.RunFolder, cfg, tokenizer, preference: bool, devices):
    """(training loader, evaluation loader or None, what became of each source's examples)."""
    cut: dict[str, Any] = dict(
        batch_size=cfg.train.batch_size,
        microbatches=cfg.train.microbatches,
        seed=cfg.seed,
    )
    rows = mesh.rows_here(devices, cfg.train.batch_size // cfg.train.microbatches)
    first = distributed.first()
    cache = dataset.cache_folder(cfg.data)
    with distributed.one_a_disk(cache), report.Bar("tokenise", 100, shown=first) as bar:

        def progress(path: str, done: float | None, examples: int) -> None:
            bar.update(int(100 * (done or 0)), f"{path}: {examples} examples")

        found = dataset.load(cfg.data, tokenizer, progress)
    if first:
        for line in (line for one in found.reports for line in summary(one)):
            print(line)
    if cfg.data.streaming:
        part, parts = mesh.part_here(devices)
        data = StreamLoader(
            cfg.data, tokenizer, renderer=found.renderer, process_index=part, process_count=parts, **cut
        )
        pairs = data.documents_per_unit() == 2
        facts = {"source": data_sources(cfg.data.train), "fingerprint": f"streamed in {data.lanes} lanes"}
        run.pin("data.json", facts, "the batch size, or the number of hosts that share the streamed data")
    else:
        assert found.train is not None
        data = Loader(found.train, cfg.data, rows=rows, **cut)
        pairs = found.train.documents_per_unit == 2
        facts = {"source": data_sources(cfg.data.train), "fingerprint": found.train.fingerprint()}
        run.pin("data.json", facts, "the training data")
    if pairs != preference:
        kind = "no preference pairs" if preference else "preference pairs"
        want = "pairs of a chosen and a rejected answer" if preference else "conversations or text"
        raise UserError(f"data.train holds {kind}; ftjax {cfg.recipe} trains on {want}")
    eval_data = None
    if found.eval is not None:
        eval_data = Loader(found.eval, cfg.data, train=False, rows=rows, **cut)
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


def by_residual(cfg, source, model: Model, base, trainable, plan):
    """The factors as LoftQ begins them, from what quantising took off the weights of `source`."""
    for path in quant.chosen(cfg.quant, model.table):
        name = model.table.names(path)[0]
        kept = source.kept(name)
        if kept is not None and kept.kind == cfg.quant.kind:
            raise UserError(
                f"lora.init_lora_weights=loftq: {source.source} is stored quantised ({name}), so what that "
                "took off is not known: give the unquantised model"
            )
    key = weights.path_key(jax.random.key(cfg.seed), "loftq")
    originals = functools.partial(hf.matrices, source, model.table)
    return lora_init.residual(base, trainable, plan, originals, key)


EVA_BATCHES = 16  # its directions hardly change after a few thousand tokens


def by_data(model: Model, base, trainable, plan, data, devices):
    """The factors as EVA begins them, from the first batches of the training data, and what to say of experts
    that too few tokens reached."""

    def microbatches():
        for batch in itertools.islice(data.batches(0), EVA_BATCHES):
            whole = mesh.put(devices, {k: batch[k] for k in ("tokens", "positions", "segments")})
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
