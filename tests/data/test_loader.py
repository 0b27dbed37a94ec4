import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.dataset import Units, load
from ftjax.data.loader import Loader
from ftjax.data.options import DataOptions, DataSource
from ftjax.data.stream import StreamLoader, _Reader
from ftjax.errors import UserError

pytestmark = pytest.mark.fast


class Fake:
    """A store of given unit lengths: document d's tokens are all d + 1, its weights 1 but for the first."""

    def __init__(self, lengths, name="s", documents_per_unit=1):
        self.documents_per_unit, self.name = documents_per_unit, name
        self.unit_lengths = np.array(lengths, np.int32) * documents_per_unit
        self._lengths = lengths

    def __len__(self):
        return len(self._lengths)

    def documents(self, unit):
        n, k = self._lengths[unit], self.documents_per_unit
        weight = np.r_[0, np.ones(n - 1)].astype(np.float32)
        return [(np.full(n, unit * k + i + 1, np.int32), weight) for i in range(k)]

    def where(self, unit):
        return f"{self.name}:{unit}"


def units(*stores, weights=None):
    return Units(list(stores), [np.arange(len(s)) for s in stores], weights)


def take(loader, count, start=0):
    return list(itertools.islice(loader.batches(start), count))


def same(a, b):
    return all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        for x, y in zip(a, b, strict=True)
    )


PACKINGS = [
    DataOptions("", max_length=32),
    DataOptions("", max_length=32, packing="first_fit"),
    DataOptions("", max_length=32, packing="none"),
    DataOptions("", max_length=32, packing="none", buckets=[8, 16, 32]),
    DataOptions("", max_length=32, shuffle=False),
]
LENGTHS = np.random.default_rng(0).integers(2, 33, 37).tolist()


@pytest.mark.parametrize("options", PACKINGS, ids=["best", "first", "none", "buckets", "in order"])
def test_resuming_and_hosts_do_not_change_the_batches(options):
    data = units(Fake(LENGTHS))
    whole = take(Loader(data, options, batch_size=8, microbatches=2, seed=3), 20)
    for batch in whole:
        assert {k: (v.dtype, v.shape[:2]) for k, v in batch.items()} == {
            "tokens": (np.int32, (2, 4)),
            "segments": (np.int32, (2, 4)),
            "positions": (np.int32, (2, 4)),
            "loss_weight": (np.float32, (2, 4)),
        }
    for start in (1, 7, 13):
        assert same(
            take(Loader(data, options, batch_size=8, microbatches=2, seed=3), 20 - start, start),
            whole[start:],
        )
    hosts = [
        take(
            Loader(data, options, batch_size=8, microbatches=2, seed=3, rows=rows),
            13,
            7,
        )
        for rows in ([0, 3], [1, 2])  # a mesh may lay a host's devices anywhere
    ]
    joined = [
        {k: np.stack([a[k][:, 0], b[k][:, 0], b[k][:, 1], a[k][:, 1]], axis=1) for k in a}
        for a, b in zip(*hosts, strict=True)
    ]
    assert same(joined, whole[7:])
    if options.shuffle:
        assert not same(take(Loader(data, options, batch_size=8, microbatches=2, seed=4), 20), whole)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 32), min_size=1, max_size=30),
    st.sampled_from(PACKINGS),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_each_epoch_has_every_document_once(lengths, options, batch, seed):
    loader = Loader(units(Fake(lengths)), options, batch_size=batch, seed=seed)
    epochs = 3
    rows = loader._rows.before(epochs)
    seen = [u for r in range(rows) for u in loader._rows.row(r)[0].tolist()]
    if options.packing == "none":  # whole batches cross the epochs' borders, where buckets may swap a few
        whole = len(seen) // batch * batch
        counts = np.bincount(seen[:whole], minlength=len(lengths)) if whole else np.zeros(len(lengths))
        assert counts.max() - counts.min() <= 2 and len(seen) == epochs * len(lengths)
    else:
        assert sorted(seen) == sorted(list(range(len(lengths))) * epochs)
        ends = [loader._rows.before(e) for e in range(epochs + 1)]
        for a, b in itertools.pairwise(ends):
            assert sorted(u for r in range(a, b) for u in loader._rows.row(r)[0].tolist()) == list(
                range(len(lengths))
            )


@pytest.mark.parametrize("options", PACKINGS, ids=["best", "first", "none", "buckets", "in order"])
def test_evaluation_sees_each_example_once(options):
    data = units(Fake(LENGTHS))
    loader = Loader(data, options, batch_size=4, microbatches=2, train=False)
    batches = list(loader.batches())
    assert len(batches) == loader.steps_per_epoch
    seen = []
    for batch in batches:
        for tokens, segments, positions, weight in zip(
            *(batch[k].reshape(4, -1) for k in ("tokens", "segments", "positions", "loss_weight")),
            strict=True,
        ):
            for s in range(1, segments.max() + 1):
                of = segments == s
                document = int(tokens[of][0]) - 1
                seen.append(document)
                assert of.sum() == LENGTHS[document] and (tokens[of] == document + 1).all()
                assert positions[of].tolist() == list(range(LENGTHS[document]))
                assert weight[of].tolist() == [0] + [1] * (LENGTHS[document] - 1)
            assert not tokens[segments == 0].any() and not weight[segments == 0].any()
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert sorted(w for s in range(len(batches)) for w in loader.documents(s)) == sorted(
        f"s:{i}" for i in range(len(LENGTHS))
    )


def test_buckets_have_one_shape_each():
    options = PACKINGS[3]
    loader = Loader(units(Fake(LENGTHS)), options, batch_size=4)
    lengths = [b["tokens"].shape[-1] for b in take(loader, 40)]
    assert set(lengths) == {8, 16, 32} == set(loader.shapes)


def test_documents_are_those_of_the_batch():
    loader = Loader(units(Fake(LENGTHS)), PACKINGS[0], batch_size=4, seed=1)
    for step, batch in enumerate(take(loader, 5)):
        ids = set(batch["tokens"][batch["segments"] > 0].tolist())
        assert {int(w.split(":")[1]) + 1 for w in loader.documents(step)} == ids


def test_pairs_stay_together():
    lengths = np.random.default_rng(1).integers(2, 12, 30).tolist()
    options = DataOptions("", max_length=32)
    loader = Loader(units(Fake(lengths, documents_per_unit=2)), options, batch_size=4, microbatches=2)
    assert loader.pairs_per_row is not None
    for batch in take(loader, 10):
        assert batch["pairs"].shape == (2, 2, loader.pairs_per_row) and batch["pairs"].dtype == np.float32
        for a, b in np.ndindex(2, 2):
            tokens, segments, pairs = (batch[k][a, b] for k in ("tokens", "segments", "pairs"))
            assert segments.max() == 2 * pairs.sum() and (np.diff(pairs) <= 0).all()
            for i in range(int(pairs.sum())):
                chosen, rejected = tokens[segments == 2 * i + 1], tokens[segments == 2 * i + 2]
                assert chosen[0] % 2 == 1 and rejected[0] == chosen[0] + 1
    none = Loader(units(Fake(lengths, documents_per_unit=2)), PACKINGS[2], batch_size=4)
    assert take(none, 1)[0]["pairs"].shape == (1, 4, 1)


def test_mixture_weights_are_shares_of_documents():
    data = units(Fake([4] * 30, "a"), Fake([4] * 10, "b"), weights=[1.0, 3.0])
    loader = Loader(data, DataOptions("", max_length=4), batch_size=40, seed=2)
    for epoch in range(3):
        drawn = loader.documents(epoch)
        assert sum(w.startswith("a") for w in drawn) == 10 and sum(w.startswith("b") for w in drawn) == 30
        b = [w for w in drawn if w.startswith("b")]
        assert all(b.count(w) == 3 for w in b)
    # All 30 of a are drawn once before any is drawn twice.
    assert len({w for e in range(3) for w in loader.documents(e) if w.startswith("a")}) == 30


def test_batches_that_do_not_divide():
    data = units(Fake(LENGTHS))
    with pytest.raises(
        UserError, match="8 rows does not divide into 3 microbatches; microbatches may be 1, 2, 4, 8"
    ):
        Loader(data, PACKINGS[0], batch_size=8, microbatches=3)
    streamed = DataOptions("nowhere.jsonl", streaming=True)
    with pytest.raises(UserError, match="on 2 hosts; microbatches may be 1, 2, 4"):
        StreamLoader(streamed, None, batch_size=8, microbatches=8, process_count=2)
    with pytest.raises(UserError, match="multiple of the 3 hosts"):
        StreamLoader(streamed, None, batch_size=8, microbatches=2, process_count=3)


def test_stats_measure_the_efficiency():
    loader = Loader(units(Fake([16, 16, 20, 12, 30])), PACKINGS[0], batch_size=1)
    assert loader.stats == {"rows": 3, "units": 5, "tokens": 94, "row_tokens": 96, "efficiency": 94 / 96}
    assert loader.steps_per_epoch == 3 and loader.steps(2) == 6 and loader.steps(0.5) == 2
    few = Loader(units(Fake([16, 8])), PACKINGS[2], batch_size=8)
    assert few.stats["efficiency"] == 24 / 64 and few.steps_per_epoch == 1 and len(take(few, 3)) == 3


# ── streamed ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def streamed(write):
    rows = [{"prompt": f"What is {i}?", "completion": "It is so. " * (i % 7 + 1)} for i in range(90)]
    return DataOptions(write(rows), max_length=128, streaming=True)


def test_streamed_batches_resume(tiny, streamed):
    assert load(streamed, tiny).train is None
    loader = StreamLoader(streamed, tiny, batch_size=4, microbatches=2, seed=1)
    whole = take(loader, 12)
    assert loader.stats["efficiency"] > 0.9 and whole[0]["tokens"].shape == (2, 2, 128)
    assert len(loader.documents(3)) == sum(int(r.max()) for r in whole[3]["segments"].reshape(4, -1))
    again = StreamLoader(streamed, tiny, batch_size=4, microbatches=2, seed=1)
    assert same(take(again, 5, 7), whole[7:])
    assert not same(take(StreamLoader(streamed, tiny, batch_size=4, microbatches=2, seed=2), 12), whole)


@pytest.mark.parametrize("shuffle", [False, True])
def test_streamed_batches_are_the_same_over_any_number_of_hosts(tiny, streamed, shuffle):
    options = DataOptions(streamed.train, max_length=128, streaming=True, shuffle=shuffle)

    def batches(hosts):
        loaders = [
            StreamLoader(options, tiny, batch_size=8, microbatches=2, process_index=host, process_count=hosts)
            for host in range(hosts)
        ]
        parts = zip(*(take(loader, 12) for loader in loaders), strict=True)
        where = [{w for s in range(12) for w in loader.documents(s)} for loader in loaders]
        return [{k: np.concatenate([p[k] for p in step], 1) for k in step[0]} for step in parts], where

    whole, _ = batches(1)
    for hosts in (2, 4):
        found, where = batches(hosts)
        assert same(found, whole) and all(where)


def test_streamed_rows_use_every_example_of_a_pass_once(tiny, streamed):
    """Also where a lane gets nothing of a pass: there are more lanes than examples."""
    loader = StreamLoader(streamed, tiny, batch_size=4)
    reader = _Reader(loader, 0)
    where = [w for lane in range(4) for _, w in reader.one_pass(lane)]
    assert len(where) == len(set(where)) == 90
    many = StreamLoader(DataOptions(streamed.train, max_length=64, streaming=True), tiny, batch_size=128)
    assert take(many, 1)[0]["tokens"].shape == (1, 128, 64) and many.lanes == 128


def test_streamed_weights_and_bad_rows(tiny, write):
    a = write([{"prompt": "a", "completion": "x"}] * 50 + [{"prompt": "", "completion": "x"}], "a.jsonl")
    b = write([{"prompt": "b", "completion": "x"}] * 50, "b.jsonl")
    both = [DataSource(a, weight=3), DataSource(b, weight=1)]
    options = DataOptions(both, max_length=64, streaming=True, on_bad="drop")
    loader = StreamLoader(options, tiny, batch_size=8)
    take(loader, 20)
    where = [w for s in range(20) for w in loader.documents(s)]
    assert 0.6 < sum("a.jsonl" in w for w in where) / len(where) < 0.9
    assert loader.reports[0].drops["empty_content"] >= 1
    nothing = DataOptions(write([{"prompt": "", "completion": "x"}]), streaming=True, on_bad="drop")
    with pytest.raises(UserError, match="every example of a whole pass"):
        take(StreamLoader(nothing, tiny, batch_size=1), 1)
