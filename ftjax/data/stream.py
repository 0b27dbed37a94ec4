"""Batches from data that is read while training, for sources too large to tokenise first.

Rows are packed as examples arrive. There is no plan, so nothing but reading says where row n begins: resuming
at step s reads and packs everything before it again, and only as many hosts as before get the same rows.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from ftjax.data.dataset import Report, check, effective_on_bad, make_renderer, sources
from ftjax.data.examples import BadExample, examples
from ftjax.data.loader import check_batch, fill_row
from ftjax.data.options import DataOptions, DataSource
from ftjax.data.render import Rendered, Renderer
from ftjax.errors import UserError

log = logging.getLogger("ftjax")

_SHUFFLE_BUFFER = 1024
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
    Example i of a source goes to host i mod hosts.
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
        self._seed, self._host, self._hosts = seed, process_index, process_count
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
        per_host = self.batch_size // self._hosts
        step, rows = 0, []
        for row in self._packed():
            rows.append(row)
            if len(rows) < per_host:
                continue
            self._where[step] = [w for r in rows for w in r.where]
            if len(self._where) > _REMEMBERED_STEPS:
                self._where.popitem(last=False)
            if step >= start_step:
                yield self._batch(rows)
            step, rows = step + 1, []

    def documents_per_unit(self) -> int:
        """1, or 2 for preference pairs: of the first example."""
        units = self._units()
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
        return {
            name: np.stack([r[name] for r in filled]).reshape(
                self.microbatches, len(rows) // self.microbatches, -1
            )
            for name in filled[0]
        }

    def _packed(self) -> Iterator[_OpenRow]:
        """Rows in the order in which they close: each unit goes to the first open row with space."""
        length = self.options.max_length
        opened: deque[_OpenRow] = deque()
        for unit, where in self._units():
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
                if len(opened) == 2 * self.batch_size:
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

    def _units(self) -> Generator[tuple[tuple[Rendered, ...], str], None, None]:
        weights = [s.weight for s in self._sources]
        if weights[0] is None:
            epoch = 0
            while True:
                for index, source in enumerate(self._sources):
                    yield from self._read(index, source, epoch)
                epoch += 1
        random = np.random.default_rng([self._seed, 0])
        shares = np.cumsum(np.array(weights, np.float64) / sum(w for w in weights if w is not None))
        readers = [self._endless(i, s) for i, s in enumerate(self._sources)]
        while True:
            yield next(readers[min(int(np.searchsorted(shares, random.random(), "right")), len(readers) - 1)])

    def _endless(self, index: int, source: DataSource):
        epoch = 0
        while True:
            yield from self._read(index, source, epoch)
            epoch += 1

    def _read(self, index: int, source: DataSource, epoch: int) -> Iterator[tuple[tuple[Rendered, ...], str]]:
        """One pass over this host's examples of a source, shuffled in a buffer."""
        report, seen = self.reports[index], []
        random = np.random.default_rng([self._seed, 1, index, epoch])
        before = report.units
        buffer: list[tuple[tuple[Rendered, ...], str]] = []
        chunk = []

        def rendered():
            results = iter(self.renderer.units([e for e, _ in chunk if not isinstance(e, BadExample)]))
            for example, where in chunk:
                result = example if isinstance(example, BadExample) else next(results)
                for unit in report.add(result, effective_on_bad(self.options, result)):
                    yield unit, where
            chunk.clear()

        def passed():
            for number, (row, example) in enumerate(examples(source, self.options.format, True, seen)):
                if number % self._hosts == self._host:
                    report.say(row)
                    chunk.append((example, f"{source.path}:{row.line}"))
                if len(chunk) == _CHUNK:
                    yield from rendered()
            yield from rendered()
            report.format = seen[0]

        for unit in passed():
            if not self.options.shuffle:
                yield unit
                continue
            if len(buffer) == _SHUFFLE_BUFFER:
                at = int(random.integers(_SHUFFLE_BUFFER))
                buffer[at], unit = unit, buffer[at]
                yield unit
            else:
                buffer.append(unit)
        for at in random.permutation(len(buffer)):
            yield buffer[at]
        if report.units == before:
            raise UserError(f"{source.path}: every example of a whole pass was left out: {report.drops}")
