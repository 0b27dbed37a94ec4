"""ftjax plan CONFIG.yaml --on v5e-16: what a run would take, before anything is rented."""

import argparse
import dataclasses
import json
import re

from ftjax import chips, estimate, mesh, prices
from ftjax.chips import GIB, Slice
from ftjax.errors import UserError
from ftjax.recipes import planning
from ftjax.recipes.planning import Planned, Run

DOES_NOT_FIT = 3  # the exit code
COMPILED = 3  # of the best that --search finds, so many are compiled


def facts(run: Run, planned: Planned, table: dict[str, prices.Price], spot: bool) -> dict:
    """A plan as plain values: what --json prints."""
    cfg, on, t, data = run.config(planned.on, planned.settings), planned.on, planned.time, run.data
    seconds, tokens, steps = t.seconds, planned.tokens * data.efficiency, data.steps(cfg)
    hours = steps * seconds / 3600 if steps else None
    price = table.get(on.chip.name)
    rate = (price.spot if spot else price.on_demand) if price else None
    shape = mesh.sizes(cfg.mesh, on.devices, on.copies)
    return {
        "model": cfg.model,
        "parameters": run.model.table.count(),
        "trains": f"LoRA r={cfg.lora.r}" if cfg.lora else "every weight",
        "on": on.name,
        "chips": on.total,
        "devices": on.devices,
        "tpu": on.is_tpu,
        "mesh": {k: v for k, v in shape.items() if v > 1} or {"fsdp": 1},
        "batch": {
            "rows": cfg.train.batch_size,
            "length": cfg.data.max_length,
            "microbatches": cfg.train.microbatches,
        },
        "remat": cfg.train.remat,
        "quant": cfg.quant.kind if cfg.quant else None,
        "settings": planned.settings,
        "how": "arithmetic" if planned.compiled is None else "compiled",
        "compile_seconds": planned.compiled,
        "fits": planned.fits,
        "refused": planned.refused or None,
        "memory": dataclasses.asdict(planned.parts)
        | {
            "total": planned.parts.total,
            "room": planned.room,
            "headroom": planned.room - planned.parts.total,
        },
        "collectives": planned.traffic.kinds,
        "received": planned.traffic.received,
        "received_from_other_slices": planned.traffic.across,
        "step_seconds": seconds,
        "step_seconds_unhidden": t.unhidden,
        "seconds_by_part": {
            k: getattr(t, k) for k in ("products", "attention", "elementwise", "links", "network")
        },
        "bound": t.bound,
        "mfu": t.mfu if data.some else t.mfu * data.efficiency,
        "model_flops": t.model_flops,
        "tokens_per_second": tokens / seconds,
        "data": data.said,
        "steps": steps,
        "hours": hours,
        "spot": spot,
        "dollars_per_chip_hour": rate,
        "price": price.said if price else None,
        "dollars": None if hours is None or rate is None else hours * rate * on.total,
        "formula": estimate.FORMULA,
    }


def text(found: dict) -> str:
    """A plan for people."""
    m, batch = found["memory"], found["batch"]
    axes = " × ".join(f"{k} {v}" for k, v in found["mesh"].items())
    cut = f" in {batch['microbatches']} microbatches" if batch["microbatches"] > 1 else ""
    held = f", base in {found['quant']}" if found["quant"] else ""
    unit = ("chip" if found["tpu"] else "GPU") + "s" * (found["chips"] > 1)
    lines = [
        f"{found['model']} ({found['parameters'] / 1e9:.2f} B), {found['trains']}{held}, on {found['on']}: "
        f"{found['chips']} {unit}, mesh {axes}, {batch['rows']} rows of "
        f"{batch['length']:,} tokens a step{cut}, remat {found['remat']}",
        "",
    ]
    how = (
        f"compiled, {found['compile_seconds']:.0f} s"
        if found["how"] == "compiled"
        else "by arithmetic" + ("; without --quick it is compiled" if found["tpu"] else "")
    )
    verdict = "It fits" if found["fits"] else "IT DOES NOT FIT"
    if found["how"] == "arithmetic":
        verdict = "It should fit" if found["fits"] else "IT SHOULD NOT FIT"
    lines.append(f"{verdict}: {m['total'] / GIB:.2f} of {m['room'] / GIB:.2f} GiB a device ({how})")
    if found["refused"]:
        lines.append(f"  the compiler: {found['refused'][:200]}")
    rows = [(k, m[k]) for k in ("weights", "adapters", "optimiser", "activations", "temporaries")]
    rows.append(("batch, results, code", m["batch"] + m["results"] + m["code"]))
    rows.append(("headroom", m["headroom"]))
    lines += [f"  {name:<22}{size / GIB:>8.2f} GiB" for name, size in rows]
    if m["host"]:
        lines.append(f"  {'in the host memory':<22}{m['host'] / GIB:>8.2f} GiB")
    lines.append("")
    lines.append("collectives of a step, a device:" if found["collectives"] else "no collectives")
    for kind, one in sorted(found["collectives"].items()):
        lines.append(
            f"  {kind:<22}{one['count']:>8,.0f} ×, {one['bytes'] / 1e9:,.2f} GB of results, "
            f"{one['received'] / 1e9:,.2f} GB received"
        )
    if found["received_from_other_slices"]:
        others = "slices" if found["tpu"] else "nodes"
        lines.append(f"  from other {others}: {found['received_from_other_slices'] / 1e9:.2f} GB")
    by = found["seconds_by_part"]
    each = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in by.items() if seconds)
    lines += [
        "",
        f"a step: {found['step_seconds']:.3g} s, bound by {found['bound']} ({each}); "
        f"{found['step_seconds_unhidden']:.3g} s if no communication hides behind computation",
        f"  MFU {found['mfu']:.0%}, {found['tokens_per_second']:,.0f} tokens/s. Estimated, not measured:",
        f"  {found['formula']}",
        f"data: {found['data']}",
    ]
    if found["hours"] is not None:
        lines.append(f"  {found['steps']:,} steps: {_hours(found['hours'])}")
        if found["dollars"] is not None:
            lines.append(
                f"  ${found['dollars']:,.2f} at ${found['dollars_per_chip_hour']:.2f} a chip and hour "
                f"({found['price']})"
            )
    if found["dollars_per_chip_hour"] is None:
        kind = "no spot price" if found["spot"] else "no price"
        lines.append(f"  {kind} for it in the table: --prices FILE, or ~/.config/ftjax/prices.yaml")
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def said(planned: Planned) -> str:
    return " ".join(f"{k}={v}" for k, v in planned.settings.items())


def row(planned: Planned) -> str:
    return (
        f"  {planned.parts.total / GIB:6.2f} GiB  {planned.tokens / planned.time.seconds:>10,.0f} tokens/s  "
        f"{said(planned) or 'as it is'}"
    )


# -- The verb


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ftjax plan", description="What a run would take on an accelerator: memory, time, money."
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key.sub=value")
    parser.add_argument("--on", help="v5e-16, v5p-8, v6e:4x8, 2xv5e-256, h100x8, a100, …; with --fit kinds")
    parser.add_argument("--quick", action="store_true", help="by arithmetic, in seconds; GPUs always are")
    parser.add_argument("--search", action="store_true", help="the best mesh, batch and remat for it")
    parser.add_argument("--fit", action="store_true", help="the smallest slice that the run fits")
    parser.add_argument("--tokens", help="of an epoch (5e7, 50M), where the data is not here")
    parser.add_argument("--prices", help="a YAML file like the package's prices.yaml")
    parser.add_argument("--spot", action="store_true", help="money by spot prices")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_intermixed_args(argv)
    if not args.on and not args.fit:
        raise UserError("ftjax plan needs --on, like --on v5e-16 or --on h100x8; or --fit")
    if args.fit and args.search:
        raise UserError("--fit finds a slice, --search settings for one: give one of them")
    table = prices.load(args.prices)
    on = None if args.fit else chips.parse(args.on)
    run = planning.read_run(args.settings, args.tokens and _count(args.tokens), args.quick)
    if on is None:
        return _fit(run, args, table)
    if args.search:
        return _search(run, on, args, table)
    quick = args.quick or not on.is_tpu
    planned = (run.quick if quick else run.compiled)(on, {})
    found = facts(run, planned, table, args.spot)
    changes, larger = ([], []) if planned.fits else planning.remedies(run, planned)
    if not planned.fits:
        found |= {"changes": list(map(said, changes))}
        found |= {"larger": [{"on": one.on.name, "settings": one.settings} for one in larger]}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(text(found))
        if not planned.fits:
            print("\nwhat would fit, by arithmetic:")
            print("\n".join(map(row, changes[:6])) or "  none of the settings that were tried")
            for one in larger:
                print(f"  or on {one.on.name}, {said(one) or 'as it is'}")
    return 0 if planned.fits else DOES_NOT_FIT


def _count(text: str) -> int:
    """Of tokens: 50000000, 50_000_000, 5e7, 50M, 2B."""
    found = re.fullmatch(r"([\d_]+(?:\.\d+)?(?:e\d+)?)([kmbt]?)", text.strip().lower())
    if not found or (count := round(float(found[1]) * _SCALES[found[2]])) < 1:
        raise UserError(f"--tokens {text}: a number of tokens, at least one, like 50000000, 5e7 or 50M")
    return count


_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def _search(run: Run, on: Slice, args, table) -> int:
    found = planning.search(run, on)
    if not found:
        why = (
            f"nothing fits on {on.name} with this optimiser and base: not the leanest rung on any mesh that "
            "divides. --fit finds a slice that is large enough, without --search it says what else would do"
        )
        print(json.dumps({"on": on.name, "fits": False}) if args.json else why)
        return DOES_NOT_FIT
    best = found[0]
    if not args.quick and on.is_tpu:
        tried = [run.compiled(on, one.settings) for one in found[:COMPILED]]
        best = min((one for one in tried if one.fits), key=planning.rank, default=tried[0])
    out = facts(run, best, table, args.spot)
    if args.json:
        print(json.dumps(out | {"found": [one.settings for one in found[:10]]}, indent=1))
    else:
        print(f"{len(found)} ways fit {on.name} by arithmetic; the fastest:")
        print("\n".join(map(row, found[:5])))
        print(f"\n{text(out)}\n\nsettings: {said(best)}")
    return 0 if best.fits else DOES_NOT_FIT


def _fit(run: Run, args, table) -> int:
    names = [name.strip() for name in args.on.split(",")] if args.on else ["v5e", "v6e", "v5p"]
    kinds = []
    for name in names:
        chip = chips.known(name)
        if chip is None:
            raise UserError(f"--fit --on {name}: a kind, without a count: {', '.join(chips.CHIPS)}")
        kinds.append(chip)
    found = {chip.name: planning.smallest(run, chip) for chip in kinds}
    if not args.quick:
        found = {name: one and planning.verified(run, one) for name, one in found.items()}
    fits = {name: facts(run, one, table, args.spot) for name, one in found.items() if one}
    if args.json:
        print(json.dumps(list(fits.values()), indent=1))
    for name, planned in found.items():
        if args.json:
            break
        if planned is None:
            print(f"{name:<10} none of up to 256 chips")
            continue
        one = fits[name]
        money = f", ${one['dollars']:,.2f}" if one["dollars"] is not None else ""
        hours = f", {_hours(one['hours'])}{money}" if one["hours"] is not None else ""
        settings = f", {said(planned)}" if planned.settings else ""
        print(
            f"{one['on']:<10} {one['memory']['total'] / GIB:6.2f} of {one['memory']['room'] / GIB:.2f} GiB "
            f"({one['how']}), {one['tokens_per_second']:,.0f} tokens/s{hours}{settings}"
        )
    if not fits and not args.json:
        print("A leaner rung (train.remat=full), fewer rows at a time or quant.kind=nf4 need less")
    return 0 if fits else DOES_NOT_FIT
