"""Batches from tokenised data: any step's batch is a function of the data, the seed and the step alone.

Training reads one endless stream of rows. An epoch is a plan (pack.py) made from the lengths and (seed,
epoch); epochs follow one another without a gap, so an epoch's last rows share a batch with the next one's
first. Step s has the rows [s·R, (s+1)·R) of the stream, R rows a batch; a run resumes from s, on any number
of hosts.

In a mixture with weights, an epoch draws as many units as the sources have together, source i its share by
weight (the largest remainders rounded up). It takes them from an endless sequence of permutations of the
source, beginning where the epoch before stopped, so that no unit is drawn twice before all of its source
were drawn once.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ftjax.data.dataset import Units
from ftjax.data.options import DataOptions
from ftjax.data.pack import Plan, bucketed, pack
from ftjax.errors import UserError

_ENDLESS = 2**48  # rows that a training stream claims to have
_ORDER, _SOURCE, _PACK = 0, 1, 2  # purposes of random numbers


class Loader:
    """Batches {tokens, segments, positions int32, loss_weight float32 [A, B, T]}, and `pairs` float32 [A,
    B, P] for preference data: 1 where pair i exists, whose chosen and rejected are segments 2i+1 and 2i+2
    of the row.

    `batch_size` counts the rows of a step over all hosts, A·B; `rows` are those of a microbatch's B that this
    host reads, in order, all where not given. Without `train` the data passes once, in order, and empty rows
    fill the last batch. Raises UserError where microbatches do not divide the batch. `prefetch` batches are
    read ahead, `threads` of them at a time: slow disks are waited for side by side.
    """

    def __init__(
        self,
        units: Units,
        options: DataOptions,
        *,
        batch_size: int,
        microbatches: int = 1,
        seed: int = 0,
        train: bool = True,
        rows: Sequence[int] | None = None,
        threads: int = 16,
        prefetch: int = 16,
    ):
        check_batch(batch_size, microbatches, 1)
        self.units, self.batch_size, self.microbatches, self.train = units, batch_size, microbatches, train
        self._here = range(batch_size // microbatches) if rows is None else list(rows)
        self._threads, self._prefetch = threads, prefetch
        self._rows = _Rows(units, options, batch_size, seed, train)
        self.pairs_per_row: int | None = None
        if units.documents_per_unit == 2:
            fitting = np.searchsorted(
                np.cumsum(np.sort(units.lengths), dtype=np.int64), options.max_length, "right"
            )
            self.pairs_per_row = 1 if options.packing == "none" else max(1, int(fitting))
            """P: no row of any epoch can hold more."""
        self.shapes: list[int] = list(options.buckets) or [options.max_length]
        """The row lengths T that batches may have."""
        self.rows_per_epoch: int = self._rows.count(0)
        """Rows of the first epoch; with packing later ones may have a few more or less."""
        self.steps_per_epoch: int = self.steps(1)
        """Steps that see all of the first epoch, the last one perhaps with rows of the next."""
        self.stats: dict[str, Any] = self._rows.stats()
        """Of the first epoch: rows, units, tokens, row_tokens (padding included) and efficiency."""

    def steps(self, epochs: float) -> int:
        """Steps that see that many epochs, at least one."""
        return max(1, int(-(-self.rows(epochs) // self.batch_size)))

    def rows(self, epochs: float) -> float:
        """Of so many epochs."""
        whole = int(epochs)
        rows = self._rows.before(whole)
        return rows + (epochs - whole) * self._rows.count(whole) if epochs > whole else rows

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's batches from a step on; endless in training."""
        import grain  # slow to import, and not needed to plan

        per_host = self.microbatches * len(self._here)
        rows = grain.MapDataset.source(_HostRows(self, per_host))
        if start_step:
            rows = rows[start_step * per_host :]
        shape = (self.microbatches, per_host // self.microbatches)
        batched = rows.batch(per_host, drop_remainder=True, batch_fn=lambda rows: _stack(rows, shape))
        read = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
        yield from batched.to_iter_dataset(read)

    def documents(self, step: int) -> list[str]:
        """The "file:line" of every document in a step's batch, on all hosts."""
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.units.where(int(u)) for r in rows for u in self._rows.row(r)[0]]

    def _row(self, number: int) -> dict[str, np.ndarray]:
        units, length = self._rows.row(number)
        documents = [d for u in units for d in self.units.documents(int(u))]
        return fill_row(documents, length, self.pairs_per_row, self.units.documents_per_unit)


def check_batch(batch_size: int, microbatches: int, hosts: int) -> None:
    if batch_size < 1 or microbatches < 1:
        raise UserError(f"batch size {batch_size} and microbatches {microbatches} have to be at least 1")
    if batch_size % (microbatches * hosts):
        divisors = [d for d in range(1, batch_size + 1) if batch_size % (d * hosts) == 0]
        hint = (
            f"microbatches may be {', '.join(map(str, divisors))}"
            if divisors
            else f"make the batch a multiple of the {hosts} hosts"
        )
        over = f" on {hosts} hosts" if hosts > 1 else ""
        raise UserError(
            f"a batch of {batch_size} rows does not divide into {microbatches} microbatches{over}; {hint}"
        )


def fill_row(
    documents: list[tuple[np.ndarray, np.ndarray]],
    length: int,
    pairs: int | None,
    documents_per_unit: int = 1,
) -> dict[str, np.ndarray]:
    """Documents (tokens, loss_weight) one after another in arrays [length], padded with zeros."""
    row: dict[str, np.ndarray] = {
        name: np.zeros(length, np.int32) for name in ("tokens", "segments", "positions")
    }
    weight = np.zeros(length, np.float32)
    at = 0
    for number, (tokens, weights) in enumerate(documents, 1):
        span = slice(at, at + len(tokens))
        row["tokens"][span], weight[span], row["segments"][span] = tokens, weights, number
        row["positions"][span] = np.arange(len(tokens))
        at = span.stop
    row["loss_weight"] = weight
    if pairs is not None:
        row["pairs"] = (np.arange(pairs) < len(documents) // documents_per_unit).astype(np.float32)
    return row


def _stack(rows, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    return {name: np.stack([r[name] for r in rows]).reshape(*shape, -1) for name in rows[0]}


class _HostRows:
    """This host's rows of the stream in the order it takes them, as Grain wants a source."""

    def __init__(self, loader: Loader, per_host: int):
        self._loader, self._per_host = loader, per_host

    def __len__(self) -> int:
        loader = self._loader
        return _ENDLESS if loader.train else loader.steps_per_epoch * self._per_host

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        loader = self._loader
        step, within = divmod(int(index), self._per_host)
        microbatch, row = divmod(within, self._per_host // loader.microbatches)
        a_rows = loader.batch_size // loader.microbatches
        return loader._row(step * loader.batch_size + microbatch * a_rows + loader._here[row])


class _Rows:
    """The stream: row number -> (units, row length)."""

    def __init__(self, units: Units, options: DataOptions, batch: int, seed: int, train: bool):
        self._units, self._batch, self._seed, self._train = units, batch, seed, train
        self._packing, self._capacity = options.packing, options.max_length
        self._buckets = list(options.buckets) or [options.max_length]
        self._shuffle = options.shuffle and train
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._ends: list[int] = []  # rows up to the end of each epoch planned so far
        self._lock = threading.RLock()
        if int(units.lengths.max()) > options.max_length:
            raise UserError(
                f"a unit of {units.lengths.max()} tokens does not fit max_length {options.max_length}"
            )

    def row(self, number: int) -> tuple[np.ndarray, int]:
        if not self._train and number >= self.count(0):
            return np.empty(0, np.int64), self._capacity
        if self._packing == "none" and self._train:
            # Rows are units here, so the epoch and the row in it follow without planning the epochs before.
            epoch = -(-(number // self._batch + 1) * self._batch // len(self._units)) - 1
            plan, local = self._plan(epoch), number - self._first(epoch)
        else:
            epoch = self._epoch_of(number)
            plan, local = self._plan(epoch), number - self.before(epoch)
        return plan.row(local), int(plan.lengths[local])

    def count(self, epoch: int) -> int:
        if self._packing == "none" and self._train:
            return len(self._units)
        return self.before(epoch + 1) - self.before(epoch)

    def before(self, epoch: int) -> int:
        """Rows of the epochs before this one."""
        if self._packing == "none" and self._train:
            return epoch * len(self._units)
        with self._lock:
            while len(self._ends) < epoch:
                self._plan(len(self._ends))
            return self._ends[epoch - 1] if epoch else 0

    def stats(self) -> dict[str, Any]:
        if self._packing == "none" and self._train and len(self._units) < self._batch:
            # No batch ends in the first epoch, so it has no plan of its own.
            plan = bucketed(
                np.arange(len(self._units)), self._units.lengths, self._buckets, self._batch, None
            )
        else:
            plan = self._plan(0)
        tokens = int(self._units.lengths[plan.units].sum())
        room = int(plan.lengths.sum())
        return {
            "rows": len(plan),
            "units": len(plan.units),
            "tokens": tokens,
            "row_tokens": room,
            "efficiency": tokens / max(1, room),
        }

    def _epoch_of(self, number: int) -> int:
        with self._lock:
            while not self._ends or self._ends[-1] <= number:
                self._plan(len(self._ends))
            return bisect_right(self._ends, number)

    def _first(self, epoch: int) -> int:
        """With one unit a row: where the stream's whole batches that end in this epoch begin."""
        return epoch * len(self._units) // self._batch * self._batch

    def _plan(self, epoch: int) -> Plan:
        with self._lock:
            if epoch in self._plans:
                self._plans.move_to_end(epoch)
                return self._plans[epoch]
            plan = self._make(epoch)
            self._plans[epoch] = plan
            if len(self._plans) > 3:
                self._plans.popitem(last=False)
            if epoch == len(self._ends):
                self._ends.append((self._ends[-1] if self._ends else 0) + len(plan))
            return plan

    def _make(self, epoch: int) -> Plan:
        lengths = self._units.lengths
        random = self._random(_PACK, epoch) if self._shuffle else None
        if not self._train:
            order = np.arange(len(self._units))
            if self._packing == "none":
                return bucketed(order, lengths, self._buckets, self._batch, None, pad=True)
            order = order[np.argsort(-lengths, kind="stable")]
            return pack(order, lengths, self._capacity, self._packing, None)
        if self._packing != "none":
            return pack(self._draws(epoch), lengths, self._capacity, self._packing, random)
        first, last = self._first(epoch), self._first(epoch + 1)
        count = len(self._units)
        drawn = [
            self._draws(e)[max(0, first - e * count) : max(0, last - e * count)]
            for e in range(first // count, -(-last // count))
        ]
        order = np.concatenate(drawn) if drawn else np.empty(0, np.int64)
        return bucketed(order, lengths, self._buckets, self._batch, random)

    def _draws(self, epoch: int) -> np.ndarray:
        """The units of an epoch, in random order."""
        units = self._units
        if units.weights is None:
            order = np.arange(len(units))
        else:
            shares = np.array(units.weights) / sum(units.weights) * len(units)
            counts = np.floor(shares).astype(np.int64)
            short = len(units) - int(counts.sum())
            counts[np.argsort(counts - shares, kind="stable")[:short]] += 1
            order = np.concatenate([self._stream(i, epoch * int(k), int(k)) for i, k in enumerate(counts)])
        return self._random(_ORDER, epoch).permutation(order) if self._shuffle else order

    def _stream(self, source: int, first: int, count: int) -> np.ndarray:
        """Items [first, first + count) of the source's endless sequence of permutations."""
        start, size = int(self._units.starts[source]), len(self._units.selections[source])
        parts = []
        for cycle in range(first // size, -(-(first + count) // size)):
            items = np.arange(size)
            if self._shuffle:
                items = self._random(_SOURCE, source, cycle).permutation(size)
            parts.append(items[max(0, first - cycle * size) : first + count - cycle * size])
        return start + (np.concatenate(parts) if parts else np.empty(0, np.int64))

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *purpose])
