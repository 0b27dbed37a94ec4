"""Batches from data that is read while training, for sources too large to tokenise first.

Examples go by a hash to as many lanes as the batch has rows (LANES at most), and each lane packs its own, as
they arrive, into its own rows of every batch. A host has some of the lanes, so that batches are the same
whatever the number of hosts. There is no plan, so nothing but reading says where row n begins: resuming at
step s reads and packs everything before it again.
"""

import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from ftjax.data.dataset import Report, check, effective_on_bad, make_renderer, sources
from ftjax.data.examples import BadExample, examples
from ftjax.data.loader import check_batch, fill_row
from ftjax.data.options import DataOptions
from ftjax.data.record import hash64
from ftjax.data.render import Rendered, Renderer
from ftjax.errors import UserError

log = logging.getLogger("ftjax")

LANES = 256
_SHUFFLE_BUFFER = 1024  # examples, of all lanes together; of one at least the next
_SHUFFLE_LANE = 16
_OPEN_ROWS = 8  # of a lane at least: with two, long documents would leave a sixth of each row empty
_CHUNK = 64
_REMEMBERED_STEPS = 256


@dataclass
class _OpenRow:
    space: int
    documents: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)


class StreamLoader:
    """Endless batches like Loader's; the data starts over when it ends.

    With weights, each example's source is drawn by its weight; without, they are read one after another.
    Every host reads all lines and renders the examples of its own lanes.
    """

    steps_per_epoch: int | None = None

    def __init__(
        self,
        options: DataOptions,
        tokenizer,
        *,
        batch_size: int,
        microbatches: int = 1,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        renderer: Renderer | None = None,
    ):
        check(options)
        check_batch(batch_size, microbatches, process_count)
        self.options, self.batch_size, self.microbatches = options, batch_size, microbatches
        self.renderer = renderer or make_renderer(options, tokenizer)
        self._sources = sources(options.train)
        self.seed = seed
        divide = (n for n in range(min(LANES, batch_size), 0, -1) if batch_size % n == 0)
        self.lanes = next((n for n in divide if n % process_count == 0), process_count)
        share = self.lanes // process_count
        self.here = range(process_index * share, (process_index + 1) * share)
        """The lanes of this host."""
        self.pairs_per_row: int | None = None
        self.shapes: list[int] = [options.max_length]
        self.reports: list[Report] = [Report(s.path) for s in self._sources]
        self.stats: dict[str, float] = {}
        """Of the rows made so far: rows, units, tokens, row_tokens and efficiency."""
        self._where: OrderedDict[int, list[str]] = OrderedDict()

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's batches from a step on, after reading again what came before."""
        if start_step:
            log.info("streamed data: reading again up to step %d", start_step)
        self.reports[:] = [Report(s.path) for s in self._sources]
        self.stats = {"rows": 0, "units": 0, "tokens": 0, "row_tokens": 0, "efficiency": 0.0}
        readers = [_Reader(self, index) for index in range(len(self._sources))]
        lanes = [self._packed(lane, readers) for lane in self.here]
        step = 0
        while True:
            rows = [next(lane) for lane in lanes for _ in range(self.batch_size // self.lanes)]
            self._where[step] = [w for r in rows for w in r.where]
            if len(self._where) > _REMEMBERED_STEPS:
                self._where.popitem(last=False)
            if step >= start_step:
                yield self._batch(rows)
            step += 1

    def documents_per_unit(self) -> int:
        """1, or 2 for preference pairs: of the first example."""
        units = self._units(self.here[0], [_Reader(self, index) for index in range(len(self._sources))])
        count = len(next(units)[0])
        self.pairs_per_row = self._pairs() if count == 2 else None
        units.close()
        self.reports[:] = [Report(s.path) for s in self._sources]
        return count

    def _pairs(self) -> int:
        """The shortest pair to come is not known: P allows for pairs of 16 tokens on average."""
        return max(1, self.options.max_length // 16)

    def steps(self, epochs: float) -> int:
        raise UserError("data.streaming: the length of the data is not known: set train.max_steps")

    def documents(self, step: int) -> list[str]:
        """The "file:line" of this host's documents in a recent step; empty for one long past."""
        return self._where.get(step, [])

    def _batch(self, rows: list[_OpenRow]) -> dict[str, np.ndarray]:
        per_unit = 1 if self.pairs_per_row is None else 2
        filled = [fill_row(r.documents, self.options.max_length, self.pairs_per_row, per_unit) for r in rows]
        # a lane's rows lie in the same place of neighbouring microbatches: hosts share each microbatch's rows
        return {
            name: np.stack([r[name] for r in filled])
            .reshape(len(rows) // self.microbatches, self.microbatches, -1)
            .swapaxes(0, 1)
            for name in filled[0]
        }

    def _packed(self, lane: int, readers: list["_Reader"]) -> Iterator[_OpenRow]:
        """A lane's rows in the order in which they close: each unit goes to the first open row with space."""
        length = self.options.max_length
        window = max(2 * self.batch_size // self.lanes, _OPEN_ROWS)
        opened: deque[_OpenRow] = deque()
        for unit, where in self._units(lane, readers):
            size = sum(len(d.tokens) for d in unit)
            if len(unit) == 2 and self.pairs_per_row is None:
                self.pairs_per_row = self._pairs()
            full = self.pairs_per_row is not None
            row = next(
                (
                    r
                    for r in opened
                    if r.space >= size and not (full and len(r.documents) >= 2 * (self.pairs_per_row or 0))
                ),
                None,
            )
            if row is None:
                if len(opened) == window:
                    yield self._closed(opened.popleft())
                row = _OpenRow(length)
                opened.append(row)
            row.space -= size
            row.documents += [(d.tokens, d.loss_weight) for d in unit]
            row.where.append(where)

    def _closed(self, row: _OpenRow) -> _OpenRow:
        stats, length = self.stats, self.options.max_length
        stats["rows"] += 1
        stats["units"] += len(row.where)
        stats["tokens"] += length - row.space
        stats["row_tokens"] += length
        stats["efficiency"] = stats["tokens"] / stats["row_tokens"]
        return row

    def _units(self, lane: int, readers: list["_Reader"]) -> Generator["_Unit", None, None]:
        weights = [s.weight for s in self._sources]
        if weights[0] is None:
            while True:
                for reader in readers:
                    yield from reader.one_pass(lane)
        random = np.random.default_rng([self.seed, 0, lane])
        shares = np.cumsum(np.array(weights, np.float64) / sum(w for w in weights if w is not None))
        endless = [reader.endless(lane) for reader in readers]
        while True:
            yield next(endless[min(int(np.searchsorted(shares, random.random(), "right")), len(endless) - 1)])


_Unit = tuple[tuple[Rendered, ...], str]  # the documents, and the place of their example


class _Reader:
    """A source, read pass after pass for the lanes of this host; what a lane has not taken yet waits."""

    def __init__(self, loader: StreamLoader, index: int):
        self._loader, self._index = loader, index
        self._source = loader._sources[index]
        self._waiting: dict[int, deque[_Unit | None]] = {lane: deque() for lane in loader.here}
        self._passes: dict[int, int] = defaultdict(int)
        self._reading = self._read()

    def endless(self, lane: int) -> Iterator[_Unit]:
        while True:
            yield from self.one_pass(lane)

    def one_pass(self, lane: int) -> Iterator[_Unit]:
        """The lane's examples of one pass over the source, shuffled in a buffer."""
        loader, waiting = self._loader, self._waiting[lane]
        random = np.random.default_rng([loader.seed, 1, self._index, lane, self._passes[lane]])
        self._passes[lane] += 1
        most = max(_SHUFFLE_BUFFER // loader.lanes, _SHUFFLE_LANE)
        buffer: list[_Unit] = []
        while True:
            while not waiting:
                next(self._reading)
            unit = waiting.popleft()
            if unit is None:
                break
            if not loader.options.shuffle:
                yield unit
            elif len(buffer) < most:
                buffer.append(unit)
            else:
                at = int(random.integers(most))
                buffer[at], unit = unit, buffer[at]
                yield unit
        for at in random.permutation(len(buffer)):
            yield buffer[at]

    def _read(self) -> Iterator[None]:
        """Lets the next examples wait in their lanes, and None at the end of a pass."""
        loader, source, report = self._loader, self._source, self._loader.reports[self._index]
        seen, number = [], 0
        while True:
            units, rows = report.units, report.rows
            chunk = []
            epoch = f"{loader.seed} {self._index} {number}"
            count = 0
            for row, example in examples(source, loader.options.format, True, seen):
                lane = hash64(f"{epoch} {count}") % loader.lanes
                count += 1
                if lane in self._waiting:
                    report.say(row)
                    chunk.append((example, f"{source.path}:{row.line}", lane))
                if len(chunk) == _CHUNK:
                    self._wait(chunk, report)
                    chunk = []
                    yield
            self._wait(chunk, report)
            report.format = seen[0]
            if report.units == units and (report.rows > rows or not count):
                raise UserError(f"{source.path}: every example of a whole pass was left out: {report.drops}")
            for waiting in self._waiting.values():
                waiting.append(None)
            number += 1
            yield

    def _wait(self, chunk: list[tuple], report: Report) -> None:
        loader = self._loader
        results = iter(loader.renderer.units([e for e, _, _ in chunk if not isinstance(e, BadExample)]))
        for example, where, lane in chunk:
            result = example if isinstance(example, BadExample) else next(results)
            for unit in report.add(result, effective_on_bad(loader.options, result)):
                self._waiting[lane].append((unit, where))
