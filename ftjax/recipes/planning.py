"""A run as the planner sees it: its model and data without weights, on slices that are not at hand; what to
change where it does not fit, what is fastest, what is smallest."""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import re
import sys
import threading
import time as clock
from collections.abc import Iterator
from typing import Any

import jax

from ftjax import chips, config, estimate, flops, lora, mesh, plan, published
from ftjax.chips import Slice
from ftjax.errors import UserError
from ftjax.models import Model
from ftjax.ops.memory import LADDER
from ftjax.recipes import dpo, program, sft
from ftjax.report.progress import duration

LOSSES = {"sft": sft.make_loss, "dpo": dpo.make_loss}

SAMPLE = 64  # rows whose documents are taken for all
TRIED = 4  # programs that are compiled at most where train.remat is auto
OTHERS = ("up", "mlp", "attention", "full", "offload")  # rungs to offer where a run does not fit


@dataclasses.dataclass(frozen=True)
class Data:
    """What the run's data comes to, whatever the batch: the rows of all epochs (None: not known), the share
    of their positions that hold tokens, and what some of them hold where documents are known."""

    rows: float | None
    efficiency: float
    said: str
    some: tuple[flops.Work, ...] = ()

    def steps(self, cfg) -> int | None:
        if cfg.train.max_steps or self.rows is None:
            return cfg.train.max_steps
        return max(1, math.ceil(self.rows / cfg.train.batch_size))

    def work(self, cfg) -> flops.Work | None:
        """Of a step."""
        if not self.some:
            return None
        rows = [self.some[i % len(self.some)] for i in range(cfg.train.batch_size)]
        lengths = tuple(itertools.chain.from_iterable(row.lengths for row in rows))
        return flops.Work(lengths, sum(row.trained for row in rows), sum(row.positions for row in rows))


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run on a slice: `compiled` seconds where a compiler was asked, `refused` what it said."""

    on: Slice
    settings: dict[str, Any]  # what it was planned with, beyond the config
    parts: estimate.Parts
    traffic: estimate.Traffic
    time: estimate.Time
    tokens: int  # positions of a step
    compiled: float | None = None
    refused: str = ""

    @property
    def room(self) -> float:
        return self.on.chip.memory

    @property
    def fits(self) -> bool:
        if self.refused:
            return False
        return self.compiled is not None or self.parts.total <= plan.HEADROOM * self.room


class Run:
    """A config, its model and what its data comes to, to be planned for on slices."""

    def __init__(self, cfg, model: Model, data: Data):
        self.cfg, self.model, self.data = cfg, model, data
        self._held: dict[Any, tuple[estimate.Held, lora.Plan | None]] = {}
        self._chosen: dict[Any, Any] = {}  # of mesh: auto

    def with_settings(self, settings: dict[str, Any]) -> Any:
        """The config with `train.x`, `mesh.x`, `optim.x` and `quant.x` replaced."""
        cfg = self.cfg
        for section in ("train", "mesh", "quant", "optim"):
            changes = {k.partition(".")[2]: v for k, v in settings.items() if k.startswith(section + ".")}
            if changes and section == "quant" and cfg.quant is None:
                from ftjax.quant import QuantOptions

                cfg = dataclasses.replace(cfg, quant=QuantOptions(**changes))
            elif changes:
                before = getattr(cfg, section)
                before = mesh.MeshOptions() if before == "auto" else before
                cfg = dataclasses.replace(cfg, **{section: dataclasses.replace(before, **changes)})
        return cfg

    def config(self, on: Slice, settings: dict[str, Any]) -> Any:
        """`with_settings` on this slice, where `mesh: auto` is known."""
        cfg = self.with_settings(settings)
        if cfg.mesh == "auto":
            key = on, repr(settings)
            if key not in self._chosen:
                where = on.devices, on.copies, on.chip.memory
                self._chosen[key] = program.choose_mesh(cfg, self.model, *where)[0]
            cfg = dataclasses.replace(cfg, mesh=self._chosen[key])
        return cfg

    def quick(self, on: Slice, settings: dict[str, Any]) -> Planned:
        """By arithmetic. UserError where the mesh does not divide the model or the batch."""
        cfg = self.config(on, settings)
        if cfg.train.remat == "auto":
            return self._first(on, settings)
        devices = mesh.abstract(cfg.mesh, on.devices, on.copies)
        rows = cfg.train.batch_size // cfg.train.microbatches
        mesh.check(devices, self.model.table, rows, cfg.data.max_length)
        job, of = self._job(cfg, devices)
        moved = estimate.traffic(job, on.slices)
        parts = estimate.parts(job, of)
        seconds = estimate.time(job, on.chip, moved, of, self.data.work(cfg))
        return Planned(on, settings, parts, moved, seconds, cfg.train.batch_size * cfg.data.max_length)

    def _first(self, on: Slice, settings: dict[str, Any]) -> Planned:
        """Of the rungs the fastest that fits."""
        tries = [self.quick(on, settings | {"train.remat": rung}) for rung in LADDER]
        return next((one for one in tries if one.fits), min(tries, key=lambda one: one.parts.total))

    def job(self, on: Slice, settings: dict[str, Any] | None = None) -> tuple[estimate.Job, estimate.Held]:
        """What the arithmetic is about."""
        cfg = self.config(on, settings or {})
        return self._job(cfg, mesh.abstract(cfg.mesh, on.devices, on.copies))

    def _job(self, cfg, devices) -> tuple[estimate.Job, estimate.Held]:
        key = repr((cfg.mesh, cfg.quant, cfg.optim, tuple(devices.shape.items())))
        if key not in self._held:
            self._held[key] = program.held(cfg, self.model, devices)
        of, adapt = self._held[key]
        job = program.job(cfg, self.model, devices, adapt)
        batch = 4 * (4 * cfg.train.batch_size * cfg.data.max_length // job.layout.rows)  # leaves of 4 bytes
        return job, dataclasses.replace(of, batch=batch)

    def compiled(self, on: Slice, settings: dict[str, Any]) -> Planned:
        """By the compiler for TPUs: its memory and its collectives, our roofline. Of remat: auto the fastest
        rung that arithmetic finds and the compiler takes."""
        first = self.quick(on, settings).settings
        if self.cfg.train.remat != "auto":
            return self._compiled(on, first)
        rungs = list(LADDER)[list(LADDER).index(first["train.remat"]) :][:TRIED]
        tried: list[Planned] = []
        while not (tried and tried[-1].fits) and len(tried) < len(rungs):
            tried.append(self._compiled(on, first | {"train.remat": rungs[len(tried)]}))
        return tried[-1]

    def _compiled(self, on: Slice, settings: dict[str, Any]) -> Planned:
        cfg = self.config(on, settings)
        devices = mesh.make_mesh(cfg.mesh, plan.topology(on))
        mesh.check(devices, self.model.table, cfg.train.batch_size // cfg.train.microbatches)
        planned = self.quick(on, settings)
        job, of = self.job(on, settings)
        model = program.with_options(self.model, cfg)
        step = program.plan_step(cfg, model, LOSSES[cfg.recipe], devices, pairs=program.pairs(cfg))
        began = clock.perf_counter()
        try:
            with _ticking(f"compiling for {on.name}"):
                made = step.program
        except jax.errors.JaxRuntimeError as e:
            if (said := plan.too_large(e)) is None:
                raise
            needed = refused_bytes(str(e))
            parts = planned.parts
            if needed:
                more = max(needed - of.total - parts.activations, 0.0)
                parts = dataclasses.replace(parts, temporaries=more, results=0.0, code=0.0)
            took = clock.perf_counter() - began
            return dataclasses.replace(planned, parts=parts, compiled=took, refused=said)
        chunks = -(-job.tokens // min(job.loss_chunk, job.tokens))
        moved = measured(made.of_step(chunks), on)
        return dataclasses.replace(
            planned,
            parts=estimate.parts(job, of, made.memory),
            traffic=moved,
            time=estimate.time(job, on.chip, moved, of, self.data.work(cfg)),
            compiled=clock.perf_counter() - began,
        )


def refused_bytes(message: str) -> float | None:
    """What a program would have needed, its arguments included, by the compiler's refusal."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])", message)
    return float(found[1]) * scale[found[2]] if found else None


def measured(found, on: Slice) -> estimate.Traffic:
    """The collectives of a program, and what of them crosses from slice to slice."""
    kinds: dict[str, dict[str, float]] = {}
    received = across = 0.0
    a_slice = on.devices // on.slices
    for one in found:
        kind = kinds.setdefault(one.kind, {"count": 0.0, "bytes": 0.0, "received": 0.0})
        kind["count"] += one.count
        kind["bytes"] += one.bytes * one.count
        kind["received"] += one.received
        # between n devices of k slices every byte enters a slice once, and goes round in there
        k, n = len({d // a_slice for d in one.first}), max(one.group, 2)
        far = one.received * (k - 1) / (n - 1) if k > 1 else one.received * (one.kind == "recv")
        across, received = across + far, received + one.received - far
    return estimate.Traffic(kinds, received, across)


@contextlib.contextmanager
def _ticking(what: str) -> Iterator[None]:
    """Says now and then on stderr how long it has been going on."""
    stop = threading.Event()
    began, every = clock.monotonic(), 1.0 if sys.stderr.isatty() else 30.0

    def tick() -> None:
        while not stop.wait(every):
            said = f"{what}: {duration(clock.monotonic() - began)} (minutes, on a few cores)"
            print(said, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if sys.stderr.isatty():
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)


# -- Config, model and data


def read_run(words: list[str], tokens: int | None = None, quick: bool = False) -> Run:
    """The run of a command line's config and settings. data.train may be left out; nothing is written.
    `tokens` and `quick` are those of `count_data`."""
    words = list(words)
    path = words.pop(0) if words and "=" not in words[0] else None
    try:
        cfg = config.load(path, words)
    except UserError as e:
        if not re.search(r"\bdata(\.train)? is missing", str(e)):
            raise
        cfg = config.load(path, [*words, "data.train=none"])
    return Run(cfg, published.read(open_model(cfg.model, cfg.revision)), count_data(cfg, tokens, quick))


def open_model(name: str, revision: str | None) -> dict[str, Any]:
    """The config.json of a folder, of a published model that the package knows, or of the hub: no weights.
    UserError where there is none."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        from ftjax import quantised
        from ftjax.files import read_json

        return quantised.unquantised_config(read_json(path / "config.json"))
    if not path.exists() and revision is None and (found := published.config(name)) is not None:
        return found
    if path.exists():
        from ftjax import hf

        return hf.open_model(name).config  # a GGUF file, or what is wrong with the folder
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except Exception as e:  # offline, gated and unknown are a dozen classes of two libraries
        near = published.nearest(name)
        hint = f"; the package knows {', '.join(near)}" if near else ""
        raise UserError(
            f"{name}: no folder with a config.json, and the hub has none that can be read "
            f"({type(e).__name__}){hint}"
        ) from None
    return json.loads(pathlib.Path(file).read_text())


def count_data(cfg, tokens: int | None, quick: bool) -> Data:
    """Of a run's training data: `tokens` an epoch where given, else by its packing plan, or, `quick`, by the
    size of its files at four bytes a token."""
    epochs, length, fixed = cfg.train.epochs, cfg.data.max_length, cfg.train.max_steps
    if tokens is not None:
        rows = math.ceil(tokens / length)
        return Data(rows * epochs, tokens / (rows * length), f"{tokens:,} tokens (--tokens)")
    setting = cfg.data.train
    paths = [pathlib.Path(s.path) for s in ([_source(setting)] if isinstance(setting, str) else setting)]
    if not all(path.is_file() for path in paths):
        if fixed:
            return Data(None, 1.0, f"{fixed} steps (train.max_steps), every row full")
        return Data(None, 1.0, "its training data is not here: --tokens N says how much there is")
    if quick:
        size = sum(path.stat().st_size for path in paths)
        rows = math.ceil(size / 4 / length)
        said = f"about {size // 4:,} tokens, by its {size:,} bytes (without --quick it is tokenised)"
        return Data(rows * epochs, size / 4 / (rows * length) if rows else 1.0, said)
    from ftjax import hf
    from ftjax.data import dataset
    from ftjax.data.loader import Loader

    try:
        tokenizer = hf.load_tokenizer(hf.open_model(cfg.model, revision=cfg.revision))
    except (UserError, OSError) as e:
        said = str(e).partition("\n")[0]
        return Data(None, 1.0, f"its tokens can't be counted without the model's tokenizer ({said})")
    units = dataset.load(cfg.data, tokenizer).train
    assert units is not None
    loader = Loader(units, cfg.data, batch_size=1, microbatches=1, seed=cfg.seed)
    stats = loader.stats
    some = itertools.islice(loader.batches(0), min(SAMPLE, loader.rows_per_epoch))
    said = f"{stats['tokens']:,} tokens in {stats['rows']:,} rows, {stats['efficiency']:.0%} full, an epoch"
    return Data(loader.rows(epochs), stats["efficiency"], said, tuple(map(flops.Work.of, some)))


def _source(path: str) -> Any:
    from ftjax.data.options import DataSource

    return DataSource(path)


# -- What to change, what is best, what is smallest


def remedies(run: Run, planned: Planned) -> tuple[list[Planned], list[Planned]]:
    """(what would fit with other settings, larger slices that would do), by arithmetic times what the
    compiler was off it here. Of settings that come in steps the first step that fits; if none does alone,
    with a base in four bits besides, or of full tuning the moments in bfloat16."""
    cfg, on = run.config(planned.on, planned.settings), planned.on
    truth = planned.parts.total / max(run.quick(on, planned.settings).parts.total, 1.0)
    room = plan.HEADROOM * on.chip.memory / max(truth, 1.0)
    rungs = list(LADDER)
    after = [r for r in OTHERS if rungs.index(r) > rungs.index(cfg.train.remat)]
    leanest = {"train.remat": "full"} if "full" in after else {}
    rows = cfg.train.batch_size // cfg.train.microbatches
    few: dict[str, Any] = {}  # bits, of what there is most of
    if cfg.lora is None and cfg.optim.state_dtype == "float32":
        few = {"optim.state_dtype": "bfloat16"}
    elif cfg.lora is not None and cfg.quant is None:
        few = {"quant.kind": "nf4"}
    cuts = [{"train.microbatches": cfg.train.microbatches * n} for n in _powers(rows)]
    splits = [{"mesh.tp": n, "mesh.fsdp": -1} for n in _powers(on.devices) if cfg.mesh.tp == 1]
    steps: list[list[dict[str, Any]]] = [[{"train.remat": rung}] for rung in after]
    steps += [[leanest | one for one in some] for some in (cuts, splits, [few] if few else [])]
    steps.append([leanest | {"train.loss_chunk": 256}])
    steps_besides = [[leanest | few | one for one in some] for some in (cuts, splits)] if few else []

    def fitting(steps: list[list[dict[str, Any]]]) -> list[Planned]:
        out = []
        for step in steps:
            for change in step:
                try:
                    one = run.quick(on, planned.settings | change)
                except UserError:
                    continue
                if one.parts.total <= room:
                    out.append(dataclasses.replace(one, settings=change))
                    break
        return out

    larger: dict[Slice, Planned] = {}
    for settings in (leanest | few, {}):
        more = [one for one in chips.sizes(on.chip, 512) if one.total > on.total]
        tries = (_planned(run, one, any_count(run) | settings) for one in more)
        if one := next((one for one in tries if one and one.parts.total <= room), None):
            larger[one.on] = one
    on_host = lambda one: LADDER[one.settings.get("train.remat", "none")].host  # noqa: E731
    found = fitting(steps) or fitting(steps_besides)
    return sorted(found, key=lambda one: (on_host(one), one.time.seconds / one.tokens)), [*larger.values()]


def _powers(n: int) -> list[int]:
    """2, 4, … as far as they divide n."""
    return [2**i for i in range(1, n.bit_length()) if n % 2**i == 0]


def _planned(run: Run, on: Slice, settings: dict[str, Any]) -> Planned | None:
    """By arithmetic, with a batch of as many rows as there are devices to split it; None where nothing
    divides."""
    with contextlib.suppress(UserError):
        return run.quick(on, settings)
    with contextlib.suppress(UserError):
        cfg = run.config(on, settings)
        shape = mesh.sizes(cfg.mesh, on.devices, on.copies)
        rows = _row_devices(shape) * cfg.train.microbatches
        rows = math.ceil(cfg.train.batch_size / rows) * rows
        return run.quick(on, settings | {"train.batch_size": rows})
    return None


def _row_devices(shape: dict[str, int]) -> int:
    return estimate.Layout(shape, mesh.WEIGHT_RULES, mesh.ACTIVATION_RULES).over("B", mesh.ACTIVATION_RULES)


def search(run: Run, on: Slice) -> list[Planned]:
    """Meshes, batches, microbatches and rungs on a slice, those that fit by arithmetic, most tokens a second
    first. Rungs that keep something in the host's memory are left out: their copies' time is not known."""
    cfg, found = run.cfg, []
    for shape in _meshes(run, on):
        settings: dict[str, Any] = {f"mesh.{k}": v for k, v in shape.items() if v > 1 or k == "fsdp"}
        rows = _row_devices(shape)
        for batch in sorted({cfg.train.batch_size, rows, 2 * rows, 4 * rows}):
            for microbatches in (1, 2, 4, 8):
                if batch < cfg.train.batch_size or batch % (rows * microbatches):
                    continue
                for rung in (name for name, one in LADDER.items() if not one.host):
                    more = {
                        "train.batch_size": batch,
                        "train.microbatches": microbatches,
                        "train.remat": rung,
                    }
                    try:
                        one = run.quick(on, settings | more)
                    except UserError:
                        break
                    if one.fits:
                        found.append(one)
                        break  # a leaner rung is slower
    return sorted(found, key=rank)


def rank(planned: Planned) -> tuple:
    """The fastest first; of those within two percent the smaller batch, then what leaves less to hide."""
    speed = math.log(planned.time.seconds / planned.tokens) / 0.02
    batch = planned.settings["train.batch_size"], planned.settings["train.microbatches"]
    return round(speed), batch, planned.time.unhidden / planned.tokens


def _meshes(run: Run, on: Slice) -> Iterator[dict[str, int]]:
    """Shapes that divide the model, and the batch if it has rows enough; axes that the config sets stay."""
    cfg = run.cfg
    given = {} if cfg.mesh == "auto" else dataclasses.asdict(cfg.mesh)
    fixed = {k: n for k, n in given.items() if n != (-1 if k == "fsdp" else 1)}
    rows = cfg.train.batch_size * on.devices
    cut = not program.kept_whole(cfg, run.model)
    for one in mesh.shapes(on.devices, on.copies, run.model.table, rows, cfg.data.max_length, cut_rows=cut):
        shape = dataclasses.asdict(one)
        if all(shape[k] == n for k, n in fixed.items()):
            yield shape


def smallest(run: Run, chip: chips.Chip) -> Planned | None:
    """The smallest slice of a kind that the run fits by arithmetic."""
    found = (_planned(run, on, any_count(run)) for on in chips.sizes(chip))
    return next((one for one in found if one is not None and one.fits), None)


def any_count(run: Run) -> dict[str, Any]:
    """What a mesh that is meant for one count of devices needs to be planned for others."""
    options = run.cfg.mesh
    fixed = options != "auto" and -1 not in dataclasses.astuple(options)
    return {"mesh.fsdp": -1} if fixed else {}


def verified(run: Run, planned: Planned) -> Planned | None:
    """What arithmetic named, compiled; the next larger slice where the compiler refuses, None where it
    refuses all."""
    if not planned.on.is_tpu:
        return planned
    for on in chips.sizes(planned.on.chip):
        one = planned if on == planned.on else _planned(run, on, any_count(run))
        if on.total >= planned.on.total and one is not None:
            found = run.compiled(on, one.settings)
            if found.fits:
                return found
    return None
