"""A run's step before anything is loaded: its mesh, its arrays as shapes, what it takes by arithmetic, its
program."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax import distributed, estimate, lora, mesh, optim, quant, report, train, weights
from ftjax import plan as planner
from ftjax.errors import UserError
from ftjax.models import Model
from ftjax.objectives.router import RouterLoss
from ftjax.ops.memory import LADDER
from ftjax.recipes import folder


@dataclasses.dataclass
class Setup:
    """Everything a recipe's loss is made of."""

    config: Any
    model: Model
    params_of: Callable  # (trainable, frozen, rng) -> params
    frozen_head: bool
    router: RouterLoss


def with_options(model: Model, cfg, preference: bool = False) -> Model:
    """As `cfg` computes it."""
    return model.with_options(
        dtype=jnp.dtype(cfg.train.dtype),
        remat="none" if cfg.train.remat == "auto" else cfg.train.remat,
        unroll=cfg.train.unroll,
        mlp_chunk=cfg.train.mlp_chunk,
        attention=cfg.train.attention,
        documents=1 + preference if cfg.data.packing == "none" else None,
    )


def on_mesh(model: Model, cfg, devices) -> Model:
    """The model of a loss, whose rows come in zig-zag order where a mesh splits them; with dropout or NEFTune
    in their own, because the noise of a token is drawn by its place."""
    noise = cfg.train.neftune_alpha or (cfg.lora and cfg.lora.lora_dropout)
    return model if noise else model.with_options(zigzag=devices.shape["cp"])


def choose_mesh(cfg, model: Model, count: int, slices: int, memory: float | None) -> tuple[Any, str]:
    """What `mesh: auto` is for this run on `count` devices of so much memory, and why: of the shapes that
    divide the first that fits by arithmetic, else the one that needs least."""
    rows, length = cfg.train.batch_size // cfg.train.microbatches, max(row_lengths(cfg))
    options = mesh.shapes(count, slices, model.table, rows, length, cut_rows=not kept_whole(cfg, model))
    if cfg.train.remat == "auto":  # which then keeps what there is room for
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, remat="full"))
    needs: list[float] = []
    for one in options:
        devices = mesh.abstract(one, count, slices)
        of, adapt = held(cfg, model, devices)
        needs.append(estimate.parts(job(cfg, model, devices, adapt), of).total)
        if fits := memory is None or needs[-1] <= planner.HEADROOM * memory:
            break
    took = len(needs) - 1 if fits else needs.index(min(needs))
    name = lambda i: mesh.said(dataclasses.asdict(options[i]))  # noqa: E731
    why = f"mesh: auto took {name(took)}: by arithmetic it needs {needs[took] / 2**30:.1f} GiB a device"
    if memory is not None:
        why += f" of {memory / 2**30:.1f}"
    if not fits:
        why += ", and no other shape needs less; more of train.microbatches would"
    if took:
        why += f"; {name(0)} would need {needs[0] / 2**30:.1f}"
    return options[took], why


def row_lengths(cfg) -> list[int]:
    return (cfg.data.packing == "none" and list(cfg.data.buckets)) or [cfg.data.max_length]


def kept_whole(cfg, model: Model) -> str:
    """Why a run's rows may not be split over cp; "" where they may."""
    if model.recurrent:
        return (
            f"layers of {model.config.model_type} read the row from left to right, so its positions cannot "
            "be split; mesh.fsdp or mesh.tp can use the devices"
        )
    if cfg.train.mlp_chunk and cfg.lora and cfg.lora.lora_dropout:
        return (
            "with train.mlp_chunk and lora.lora_dropout a chunk's dropout would depend on the mesh; leave "
            "one of the three out"
        )
    return ""


def make_mesh(cfg, model: Model, devices=None) -> tuple[jax.sharding.Mesh, str]:
    """(the mesh of a run on these devices, where it was chosen for it what and why). UserError where the run
    does not divide over the mesh, or the mesh cannot split what it should."""
    options, why = cfg.mesh, ""
    if options == "auto":
        some = jax.devices() if devices is None else list(devices)
        room = planner.limit(jax.make_mesh((len(some),), ("x",), devices=some), 0)
        memory = None if room is None else min(distributed.from_all(room.bytes))
        slices = mesh.count_slices(some)
        options, why = choose_mesh(cfg, model, len(some), slices, memory)
    made = mesh.make_mesh(options, devices)
    for length in row_lengths(cfg):
        mesh.check(made, model.table, cfg.train.batch_size // cfg.train.microbatches, length)
    if made.shape["cp"] > 1 and (why_not := kept_whole(cfg, model)):
        raise UserError(f"mesh.cp={made.shape['cp']}: {why_not}")
    return made, why


def base_dtype(cfg) -> Any:
    """Of the weights as loaded: full fine-tuning keeps float32 and computes in train.dtype."""
    return jnp.dtype(cfg.train.dtype) if cfg.lora else jnp.dtype(jnp.float32)


def make_setup(cfg, model: Model, adapt: lora.Plan | None, trainable, params_of) -> Setup:
    routers = [path for path, row in model.table.rows.items() if row.role == "router"]
    trained = {path for key in weights.flatten(trainable) for path in (key, key.rpartition("/")[0])}
    return Setup(
        cfg,
        model,
        params_of,
        frozen_head=adapt is not None and not {model.head_path, "lm_head_bias"} & set(adapt),
        router=RouterLoss.of(
            model,
            cfg.train.router_aux_loss_coef,
            cfg.train.router_z_loss_coef,
            router_trains=not trained.isdisjoint(routers),
        ),
    )


def batch_shapes(cfg, devices, length: int, pairs: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """A step's batch over all hosts; `pairs` a row of preference data."""
    A, sharding = cfg.train.microbatches, mesh.batch_sharding(devices)
    leaf = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    rows = (A, cfg.train.batch_size // A, length)
    batch = {name: leaf(rows, jnp.int32) for name in ("tokens", "segments", "positions")}
    batch["loss_weight"] = leaf(rows, jnp.float32)
    return batch if pairs is None else batch | {"pairs": leaf((*rows[:2], pairs), jnp.float32)}


def make_step(setup: Setup, make_loss, tx, state, frozen, batch, devices) -> planner.Step:
    """The step of a run whose state and frozen weights are `state` and `frozen`, arrays or shapes."""
    rung = setup.model.options.remat
    if LADDER[rung].host and devices.devices.flat[0].platform == "cpu":
        raise UserError(
            f"train.remat={rung}: a CPU's memory is the host's, so there is nowhere to offload to; "
            "train.remat=mlp, attention or full keep less"
        )
    like = mesh.state_shardings(devices, tx, state.trainable)
    fn = train.make_train_step(make_loss(setup), tx, setup.config.seed, like)
    sizes = setup.model.table.sizes
    return planner.Step(fn, planner.shapes(state), planner.shapes(frozen), batch, devices, sizes)


def choose(run: folder.RunFolder, step_of, devices, say: Callable[[str], None]) -> planner.Step:
    """The step of the rung that the run had before it was stopped, else of the fastest that fits: kept in
    RUN/program.json, so that the run goes on bit for bit. On other devices or with other batches it is chosen
    anew."""
    path, first = run.path / "program.json", devices.devices.flat[0]
    on_cpu = first.platform == "cpu"
    rungs = [name for name, rung in LADDER.items() if not (rung.host and on_cpu)]
    of_any = step_of(rungs[0])
    where: dict[str, Any] = {"device": first.device_kind, "mesh": dict(devices.shape)}
    where["batch"] = {name: list(x.shape) for name, x in of_any.batch.items()}

    def kept() -> dict | None:
        return json.loads(path.read_text()) if not run.fresh and path.exists() else None

    if before := distributed.from_first(kept):
        if before.get("where") == where:
            say(f"train.remat=auto stays at {before['remat']}, as before the run was stopped")
            return step_of(before["remat"])
        say(f"train.remat=auto was {before['remat']} on other devices or batches; it is chosen anew")
    room = planner.limit(devices, planner.bytes_held((of_any.state, of_any.frozen)))
    if room is not None:  # one program for all: it has to fit where there is least
        room = dataclasses.replace(room, bytes=min(distributed.from_all(room.bytes)))
    found = planner.choose(step_of, room, rungs)
    if distributed.first():
        facts = {"remat": found.rung, "said": found.said, "not": found.tried, "where": where}
        facts |= {"bytes": dataclasses.asdict(found.step.program.memory)}
        report.write_json(path, facts | {"compile_seconds": found.step.program.seconds})
    say(found.said)
    return found.step


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A run's arrays as shapes with shardings, and what a step is made of beside them."""

    adapt: lora.Plan | None
    trainable: Any
    frozen: Any
    state: train.TrainState
    batch: dict[str, Any]
    tx: Any
    params_of: Callable


def shapes(cfg, model: Model, devices, *, length: int | None = None, pairs: int | None = None) -> Shapes:
    """Those of the run that `start` would begin by `cfg` on `devices`, a mesh or an abstract one.

    `length` is that of a row, data.max_length where not given; `pairs` are those a row of preference data.
    """
    adapt = lora.plan_run(cfg.lora, model.table, cfg.train.trainable, cfg.train.freeze)
    params_of: Any = None

    def trees(base):
        nonlocal params_of
        trainable, frozen, params_of = split(
            cfg, model, adapt, base, devices, keep_reference=pairs is not None
        )
        return trainable, frozen

    places = weights.shardings(model.table, mesh.weight_rules(devices, model.table), devices)
    base = weights.flatten(weights.abstract(model.table, base_dtype(cfg)))
    of_weight = dict(weights.flatten(places))
    for path, one in (quant.plan(cfg.quant, model.table) if cfg.quant else {}).items():
        base[path] = quant.abstract(model.table, path, one)
        of_weight[path] = quant.shardings(model.table, path, one, of_weight[path])
    base = planner.shapes(weights.unflatten(base), weights.unflatten(of_weight))
    trainable, frozen = jax.eval_shape(trees, base)
    whole = {path: of_weight[path] for path in weights.flatten(frozen)}
    frozen = planner.shapes(frozen, weights.unflatten(whole))
    of_adapters = places if adapt is None else mesh.adapter_shardings(devices, adapt, model.table)
    trainable = planner.shapes(trainable, of_adapters)
    tx, _ = optim.make_optimizer(cfg.optim, trainable, cfg.train.max_steps or 100, model.table)
    like = mesh.state_shardings(devices, tx, trainable)
    state = planner.shapes(jax.eval_shape(functools.partial(train.init_state, tx=tx), trainable), like)
    batch = batch_shapes(cfg, devices, length or cfg.data.max_length, pairs)
    return Shapes(adapt, trainable, frozen, state, batch, tx, params_of)


def plan_step(
    cfg,
    model: Model,
    make_loss: Callable[[Setup], train.LossFn],
    devices: jax.sharding.Mesh,
    *,
    length: int | None = None,
    pairs: int | None = None,
) -> planner.Step:
    """The step that `start` would run by `cfg` on `devices`, a topology's or real ones, from shapes alone;
    `length` and `pairs` are those of `shapes`."""
    with mesh.use(devices):
        run = shapes(cfg, model, devices, length=length, pairs=pairs)
        setup = make_setup(cfg, on_mesh(model, cfg, devices), run.adapt, run.trainable, run.params_of)
        return make_step(setup, make_loss, run.tx, run.state, run.frozen, run.batch, devices)


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

    run_plan = lora.trained(plan) if how == "loftq" else plan

    def params_of(trainable, frozen, rng):
        attached = lora.attach(frozen, trainable, run_plan, rng=rng, dropout=dropout)
        return noisy(attached, rng)

    return adapters, base, params_of


def pairs(cfg) -> int | None:
    """Of a row of preference data, as planned: how many there are changes little."""
    return 1 if cfg.recipe == "dpo" else None


def held(cfg, model: Model, devices) -> tuple[estimate.Held, lora.Plan | None]:
    """The bytes that lie on a device of a mesh, abstract or not, and what the run trains."""
    found = shapes(cfg, model, devices, pairs=pairs(cfg))
    frozen, trainable = planner.bytes_held(found.frozen), planner.bytes_held(found.trainable)
    whole = found.adapt is None
    return estimate.Held(
        weights=trainable + frozen if whole else frozen,
        adapters=0 if whole else trainable,
        optimiser=planner.bytes_held(found.state.opt_state),
        batch=planner.bytes_held(found.batch),
        trainable=trainable,
    ), found.adapt


def job(cfg, model: Model, devices, adapt: lora.Plan | None) -> estimate.Job:
    """The run's step on a mesh, abstract or not, as arithmetic sees it."""
    return estimate.Job(
        with_options(model, cfg),
        adapt,
        estimate.Layout(dict(devices.shape), mesh.weight_rules(devices, model.table), mesh.ACTIVATION_RULES),
        cfg.train.batch_size,
        cfg.data.max_length,
        cfg.train.microbatches,
        cfg.train.loss_chunk,
        cfg.quant,
        reference=cfg.recipe == "dpo",
    )
