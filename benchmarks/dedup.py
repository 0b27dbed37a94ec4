"""Duplicates among 100,000 short rows with planted copies, and among 10,000 unique rows of templates.

    python -m benchmarks.dedup [--texts FILE] [--rows 100000] [--peers PYTHON] [--write]
    python -m benchmarks.dedup --size 10000000 --folder FOLDER

80 of 100 rows are made of texts that people wrote (docstrings of the installed packages, or the lines of
FILE) in eight wordings of a prompt, nearly alike ones among them as they come; 20 are copies of some of them
in eight kinds (benchmarks/dedup_rows.py). A copy is found if it or its origin goes. A row that goes is wrong
if the one that it names is not of the same origin, and neither their whole texts nor their answers have a
Jaccard similarity of 0.5 (of sequences of five characters). Every measurement has a process of its own, which
reads a file; its peak memory is its maximum resident set. PYTHON is an interpreter that has gaoya and rensa:
both are given the normalised texts: sets of five characters, 128 hashes, threshold 0.7, estimated.
--write puts the tables into results/dedup.md.

--size measures one file of so many rows of another kind, for they cannot all be real: words of the same texts
in random order, each tenth row a copy of one of the kinds of any row before. It is made in FOLDER, as is all
that the search leaves on disk; two processes, precision of a sample of 20,000 rows that go.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

WAYS = {
    "ftjax": "`ftjax data dedup`, file to file",
    "ftjax-2": "the same, `--processes 2`",
    "search": "its search alone, rows in memory",
    "gaoya": "gaoya MinHash index",
    "rensa": "rensa R-MinHash LSH",
}
PEERS = ("gaoya", "rensa")


# ── one measurement, in a process of its own ──────────────────────────────────────────────────────


def measure(way: str, path: Path) -> dict:
    """Seconds, and [row, the row that it is said to be a copy of] of each that would go, from 0."""
    if way in PEERS:
        texts = json.loads(path.with_suffix(".texts").read_text())
        start, cpu = time.perf_counter(), _cpu()
        gone = _gaoya(texts) if way == "gaoya" else _rensa(texts)
    else:
        from ftjax.data import engine, pipeline, read
        from ftjax.data.dedup import Dedup, DedupOptions

        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            step = Dedup(DedupOptions())
            if way == "search":
                step.folder = Path(folder)
                records = [j.record for part in read.parts(str(path)) for j in part.judged() if j.record]
                start, cpu = time.perf_counter(), _cpu()
                found = step.decide([step.facts(records, 0)]).found
                seconds, cpu = time.perf_counter() - start, _cpu() - cpu
            else:
                start, cpu = time.perf_counter(), _cpu()
                where = engine.open_engine(processes=2 if way == "ftjax-2" else 1)
                stage = pipeline.run(step, read.parts(str(path)), Path(folder), where)
                found = pipeline._unpickled(stage.folder / "decision").found
                seconds, cpu = time.perf_counter() - start, _cpu() - cpu
        gone = [[int(f["row"]), int(f["kept"])] for f in found if f["row"] != f["kept"]]
        return {"seconds": seconds, "cpu": cpu, "gone": gone, "peak": _peak()}
    return {"seconds": time.perf_counter() - start, "cpu": _cpu() - cpu, "gone": gone, "peak": _peak()}


def _cpu() -> float:
    """Seconds of all threads and of processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _gaoya(texts: list[str]) -> list[list[int]]:
    from gaoya.minhash import MinHashStringIndex

    index = MinHashStringIndex(32, 0.7, 16, 8, None, "char", True, (5, 5))
    gone = []
    for k, text in enumerate(texts):
        if found := index.query(text):
            gone.append([k, min(found)])
        else:
            index.insert_document(k, text)
    return gone


def _rensa(texts: list[str]) -> list[list[int]]:
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=0.7, num_perm=128, num_bands=16)
    gone, sketches = [], {}
    for k, text in enumerate(texts):
        sketch = RMinHash(num_perm=128, seed=42)
        sketch.update([text[i : i + 5] for i in range(max(1, len(text) - 4))])
        found = [other for other in index.query(sketch) if sketch.jaccard(sketches[other]) >= 0.7]
        if found:
            gone.append([k, min(found)])
        else:
            index.insert(k, sketch)
            sketches[k] = sketch
    return gone


def _peak() -> float:
    """MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


# ── what is right ─────────────────────────────────────────────────────────────────────────────────


def judged(rows: list, gone: list[list[int]]) -> dict:
    """Recall of each kind of copy, and precision."""
    left = [True] * len(rows)
    for row, _ in gone:
        left[row] = False
    origin = {r.meta["origin"]: k for k, r in enumerate(rows) if r.meta["kind"] == "base"}
    planted, hit = Counter(), Counter()
    for k, row in enumerate(rows):
        if row.meta["kind"] != "base":
            planted[row.meta["kind"]] += 1
            hit[row.meta["kind"]] += not (left[k] and left[origin[row.meta["origin"]]])
    recall = {kind: hit[kind] / n for kind, n in sorted(planted.items())}
    return {"recall": recall, **_precision((rows[a], rows[b]) for a, b in gone)}


def _precision(pairs) -> dict[str, float]:
    """Of rows that go, each with the one that it is said to be a copy of."""
    count = wrong = whole = 0
    for a, b in pairs:
        count += 1
        if a.meta["origin"] != b.meta["origin"]:
            likeness = [_jaccard(a, b, on) for on in ("both", "answer")]
            wrong += max(likeness) < 0.5
            whole += likeness[0] < 0.5
    return {"precision": 1 - wrong / max(1, count), "of whole texts": 1 - whole / max(1, count)}


def _jaccard(one, other, on: str) -> float:
    from ftjax.data.dedup import compared_text
    from ftjax.data.minhash import normalise

    texts = [normalise(compared_text(row, on)) for row in (one, other)]
    a, b = ({text[k : k + 5] for k in range(max(1, len(text) - 4))} for text in texts)
    return len(a & b) / len(a | b)


# ── the tables ────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, help="a file of short texts, one a line")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--peers", help="a Python that has gaoya and rensa")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="the tables to results/dedup.md")
    parser.add_argument("--size", type=int, help="only this: one file of so many rows")
    parser.add_argument("--folder", type=Path, default=Path("runs/dedup"), help="where --size works")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    if args.size:
        args.folder.mkdir(parents=True, exist_ok=True)
        print("\n".join(sized(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = list(report(args, Path(folder)))
    print("\n".join(lines))
    if args.write:
        path = Path(__file__).parent / "results" / "dedup.md"  # what was written there by hand is lost
        path.write_text("\n".join(["# Finding duplicates", "", *lines, ""]), encoding="utf-8")


def report(args: argparse.Namespace, folder: Path):
    from benchmarks import dedup_rows
    from ftjax.data.dedup import compared_text

    bases = args.rows * 4 // 5
    if args.texts:
        texts, of = dedup_rows.texts_of(args.texts, bases, args.seed), "the lines of a file"
    else:
        texts, of = dedup_rows.docstrings(bases), "docstrings of the installed packages"
    sets = {
        "planted": dedup_rows.planted(texts, len(texts) // 4, args.seed),
        "templates, system prompt": dedup_rows.templated(10_000, args.seed),
        "templates, none": dedup_rows.templated(10_000, args.seed, system=""),
    }
    paths = {name: _written(rows, folder / f"{k}.jsonl") for k, (name, rows) in enumerate(sets.items())}
    rows = sets["planted"]
    characters = sum(len(compared_text(r, "both")) for r in rows) / len(rows)
    results = {}
    for way in WAYS:
        python = args.peers if way in PEERS else sys.executable
        if python is not None:
            results[way] = {name: _run(python, way, path) for name, path in paths.items()}
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    yield f"## {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores, {memory:.0f} GB"
    yield ""
    yield f"python {platform.python_version()}, numpy {metadata.version('numpy')}; load average at the end"
    yield " ".join(f"{x:.1f}" for x in os.getloadavg()) + ", so that CPU seconds say more than seconds where"
    yield "it is above the cores."
    yield f"{len(rows):,} rows of {characters:.0f} characters (prompt and answer) of {of},"
    yield f"{len(texts) // 4:,} of them copies; seed {args.seed}."
    if not all(way in results for way in PEERS):
        yield "gaoya and rensa: not measured."
    yield ""
    kinds = sorted(dedup_rows.KINDS)
    columns = "rows/s", "seconds", "CPU s", "peak MB", "recall", "precision", "by whole texts"
    yield "| | " + " | ".join((*columns, "wrongly gone, system prompt", "without it")) + " |"
    yield "|" + "---|" * 10
    quality = {}
    for way, measured in results.items():
        planted = measured["planted"]
        quality[way] = found = judged(rows, planted["gone"])
        recall = sum(found["recall"].values()) / len(kinds)
        shares = [len(measured[n]["gone"]) / len(sets[n]) for n in list(sets)[1:]]
        yield (
            f"| {WAYS[way]} | {len(rows) / planted['seconds']:,.0f} | {planted['seconds']:.1f} "
            f"| {planted['cpu']:.1f} | {planted['peak']:.0f} "
            f"| {recall:.3f} | {found['precision']:.4f} | {found['of whole texts']:.4f} "
            f"| {shares[0]:.2%} | {shares[1]:.2%} |"
        )
    yield ""
    yield "Recall by kind:"
    yield ""
    yield "| | " + " | ".join(kinds) + " |"
    yield "|" + "---|" * (len(kinds) + 1)
    for way in results:
        if way not in ("ftjax-2", "search"):
            yield f"| {WAYS[way]} | " + " | ".join(f"{quality[way]['recall'][k]:.3f}" for k in kinds) + " |"


def sized(args: argparse.Namespace):
    import numpy as np

    from benchmarks import dedup_rows

    row = dedup_rows.Sized(dedup_rows.docstrings(100_000), args.seed)
    path = args.folder / f"{args.size}-{args.seed}.jsonl"
    if not path.exists():
        beside = path.with_suffix(".part")
        with open(beside, "wb") as file, multiprocessing.Pool() as pool:
            chunks = [range(n, min(n + 100_000, args.size)) for n in range(0, args.size, 100_000)]
            file.writelines(pool.imap(row.lines, chunks))
        beside.replace(path)
    found = _run(sys.executable, "ftjax-2", path)
    gone = np.zeros(args.size, bool)
    gone[[number for number, _ in found["gone"]]] = True
    planted, hit = Counter(), Counter()
    for number in range(10, args.size, 10):
        planted[row.kind(number)] += 1
        hit[row.kind(number)] += bool(gone[number] or gone[row.origin(number)])
    sample = random.Random(args.seed).sample(found["gone"], min(20_000, len(found["gone"])))
    right = _precision((row(a), row(b)) for a, b in sample)
    recall = {kind: hit[kind] / planted[kind] for kind in sorted(planted)}
    seconds, gigabytes = found["seconds"], path.stat().st_size / 1e9
    yield f"{time.strftime('%Y-%m-%d')}, {args.size:,} rows ({gigabytes:.1f} GB), 2 processes:"
    yield f"{seconds:,.0f} s ({args.size / seconds:,.0f} rows/s, {found['cpu']:,.0f} CPU s);"
    yield f"peak {found['peak']:,.0f} MB of the process that decides;"
    yield f"{len(found['gone']):,} rows go; precision {right['precision']:.4f}"
    yield f"({right['of whole texts']:.4f} by whole texts);"
    yield f"recall {np.mean(list(recall.values())):.3f}:"
    yield ", ".join(f"{kind} {share:.3f}" for kind, share in recall.items())


def _written(rows: list, path: Path) -> Path:
    from ftjax.data.dedup import compared_text
    from ftjax.data.minhash import normalise

    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
    texts = [normalise(compared_text(row, "both")) for row in rows]
    path.with_suffix(".texts").write_text(json.dumps(texts))
    return path


def _run(python: str, way: str, path: Path) -> dict:
    command = [python, "-m", "benchmarks.dedup", "--measure", way, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
