"""Goodput: the share of a run's wall time, from its first start to now, that went into steps whose results it
kept.

    goodput = productive / wall
    wall = productive + input_wait + recomputed + start + restore + compile + save + evaluate + finish
           + stopped + other

In seconds: `productive` are the steps that the run still has, less `input_wait`, what they had no batch to go
on with; `recomputed` the steps after a checkpoint that the run later went on from, so that it did them again;
`start` a process's way to its first step, imports and data included, but for `restore` (finding the newest
whole checkpoint and reading it) and `compile`; `save` what the loop waited for checkpoints; `finish` what
comes after the last step; `stopped` from the last line that a process wrote until the next one began; `other`
the rest. A process is timed by its monotonic clock; only `stopped` is a difference of wall clocks (never
below 0), so that a clock that jumps while a run is under way changes nothing.

All of it is in metrics.jsonl, whose lines say `wall`: train lines have the sums `elapsed` (seconds of steps)
and `waited` (those of them in input_wait), and lines of kind "time" have "part" and "seconds". Lines that a
restart drops are folded into such lines first.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.report.progress import duration

NAMES = {
    "productive": "steps that were kept",
    "recomputed": "steps that were lost and done again",
    "input_wait": "waiting for input",
    "start": "starting",
    "restore": "restoring",
    "compile": "compiling",
    "save": "saving",
    "evaluate": "evaluating",
    "finish": "writing the result",
    "stopped": "stopped",
    "other": "other",
}


def fold(kept: Sequence[Mapping], dropped: Sequence[Mapping], step: int) -> list[dict[str, Any]]:
    """Lines at `step` for the time of lines that are dropped because the run goes on from there."""
    parts: defaultdict[str, float] = defaultdict(float)
    for record in dropped:
        if record.get("kind") == "time":
            parts[record["part"]] += record["seconds"]
    parts["recomputed"] += _last(dropped, "elapsed") - (_last(kept, "elapsed") if dropped else 0)
    about: dict[str, Any] = {"kind": "time", "step": step}
    about |= {key: _last([*kept, *dropped], key) for key in ("time", "wall")}
    return [about | {"part": part, "seconds": round(s, 3)} for part, s in parts.items() if s > 0]


def _last(records: Sequence[Mapping], key: str) -> float:
    return next((r[key] for r in reversed(records) if r.get(key)), 0.0)


def account(parts: Mapping[str, float], elapsed: float, waited: float, wall: float) -> dict[str, float]:
    """Seconds by part, those of NAMES that are not 0, which together are `wall`."""
    found = {"productive": elapsed - waited, "input_wait": waited, **parts}
    found["other"] = max(0.0, wall - sum(found.values()))
    return {name: round(found[name], 3) for name in NAMES if round(found.get(name, 0.0), 3) > 0}


def text(account: Mapping[str, float]) -> str:
    """One line: the share, and what the rest of the time went into, the most first."""
    wall = sum(account.values())
    rest = sorted((s, name) for name, s in account.items() if name != "productive")
    said = ", ".join(f"{NAMES[name]} {duration(s)}" for s, name in reversed(rest) if s >= 0.005 * wall)
    share = account.get("productive", 0.0) / wall if wall else 0.0
    return f"goodput {share:.1%} of {duration(wall)}" + (f" ({said})" if said else "")
