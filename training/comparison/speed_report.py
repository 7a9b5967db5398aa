"""Speed matching, from the measured cells to the report."""

import csv
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from training.comparison import plots
from training.comparison.arms import Compose, pair_id
from training.comparison.crossover import crossings, ratios, verdict
from training.comparison.files import Found
from training.comparison.speed import CELL, MEASURED, compare_cells
from training.document import Block, Heading, Judgement, Pictures, Table, Text

COLUMNS = {
    "tokens": "tokens",
    "arm": "arm",
    "batch": "images",
    "ms": "ms",
    "ms_p10": "p10",
    "ms_p90": "p90",
    "images_per_s": "images/s",
    "forward_ms": "forward",
    "backward_ms": "backward",
    "optimizer_ms": "optimizer",
    "peak_mib": "peak MiB",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "first_step_s": "first step s",
    "status": "status",
}


def compare_speeds(config: DictConfig, compose: Compose, output: Path) -> Found:
    comparison = config.comparison
    names = candidate, baseline = comparison.candidate, comparison.baseline
    for key in ("candidate", "baseline"):
        if not comparison.arms.get(comparison[key]):
            given = ", ".join(arm for arm, overrides in comparison.arms.items() if overrides)
            raise ValueError(f"comparison.{key} must be one of {given}; got {comparison[key]!r}")
    rows = compare_cells(config, compose, output)
    _write_csv(rows, output / "speed.csv")
    others = [a for a in dict.fromkeys(r["arm"] for r in rows) if a not in names]
    found = [row for arm in (baseline, *others) for row in ratios(rows, candidate, arm)]
    pictures = _pictures(rows, [r for r in found if r["against"] == baseline], output / "plots")
    crossed = crossings(found)
    results = {
        "pair": pair_id(config, "speed"),
        "candidate": candidate,
        "baseline": baseline,
        "verdicts": {arm: verdict(crossed, candidate, arm) for arm in (baseline, *others)},
        "crossovers": crossed,
        "ratios": found,
    }
    title = f"Speed matching: {candidate} against {baseline}"
    return Found(title, results, _blocks(rows, results, pictures), pictures)


def _pictures(
    rows: list[dict[str, Any]], found: list[dict[str, Any]], folder: Path
) -> dict[str, Path]:
    measured = [row for row in rows if row["status"] == MEASURED]
    if not measured:
        return {}
    equal = [row for row in rows if row["batches"] == "equal" and row["status"] != "unsupported"]
    largest = [row for row in rows if row["batches"] == "largest" and row["status"] == MEASURED]
    drawn = {}
    if equal:
        drawn["speedup"] = plots.speedup(equal, [r for r in found if r["batches"] == "equal"])
        drawn["time"] = plots.over_tokens(equal, "ms", "ms a step")
        if any(row.get("peak_mib") for row in equal):
            drawn["memory"] = plots.over_tokens(equal, "peak_mib", "peak MiB")
        drawn["split"] = plots.split_bars(equal)
        drawn["mfu"] = plots.mfu_bars(equal)
    if largest:
        drawn["largest"] = plots.over_tokens(largest, "images_per_s", "images/s")
        drawn["largest_batch"] = plots.over_tokens(largest, "batch", "images that fit")
    drawn["distribution"] = plots.step_times(measured)
    return {name: plots.save(f, folder / f"{name}.png") for name, f in drawn.items()}


CAPTIONS = {
    "speedup": "How many times as fast as the baseline, equal batch, with 95% intervals",
    "time": "Time of a step, equal batch; a cross: out of memory",
    "memory": "Peak memory of a step, equal batch; a cross: out of memory",
    "split": "Forward, backward, optimizer; the equal batch has as many tokens in every cell",
    "mfu": "Useful work per second, equal batch",
    "largest": "Images per second with the largest batch that fits",
    "largest_batch": "The largest batch that fits",
    "distribution": "Distribution of step times",
}


def _blocks(
    rows: list[dict[str, Any]], results: dict[str, Any], pictures: dict[str, Path]
) -> list[Block]:
    candidate, baseline = results["candidate"], results["baseline"]
    blocks: list[Block] = [Heading("Verdict")]
    for arm, judged in results["verdicts"].items():
        passed = judged["passed"] if arm == baseline else None
        blocks.append(Judgement(f"{candidate} against {arm}", judged["words"], passed))
    crossed = [
        [
            row["against"],
            row["head_dim"],
            row["mode"],
            "compiled" if row["compiled"] else "eager",
            row["words"],
            row["best"],
            row["best_tokens"],
            ", ".join(map(str, row["only_candidate_fits"])),
        ]
        for row in results["crossovers"]
        if row["best"]
    ]
    columns = ("against", "head dim", "mode", "", candidate, "at best", "at tokens", "fits alone")
    blocks.append(Table(columns, crossed))
    blocks += [
        Heading("Over tokens"),
        Text(
            "The arms take turns on the same parameters, optimizer and batch. The equal batch holds"
            " the same number of tokens at every length, so that attention's share grows with it."
        ),
        *(Pictures([(path, CAPTIONS[name])]) for name, path in pictures.items()),
        Heading("Numbers"),
        Text(
            "Times in milliseconds: median, 10th and 90th percentile of a step, medians of its"
            " parts. The first step (compilation, tuning) in seconds, apart. MFU: useful operations"
            " of the objective, the same for all arms, over the published peak."
        ),
    ]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in CELL if name != "tokens"), []).append(row)
    for (dim, mode, compiled, batches), mine in groups.items():
        how = "compiled" if compiled else "eager"
        blocks.append(Text(f"Head dim {dim}, mode {mode}, {how}, {batches} batch:"))
        reasons = {row["reason"] for row in mine if row.get("reason")}
        if reasons and all(row["status"] != MEASURED for row in mine):
            blocks.append(Text(f"not measured: {'; '.join(sorted(reasons))}"))
            continue
        names = [c for c in COLUMNS if any(row.get(c) is not None for row in mine)]
        values = [[row.get(name) for name in names] for row in sorted(mine, key=_place)]
        blocks.append(Table([COLUMNS[name] for name in names], values))
        blocks += [Text(f"unsupported: {reason}") for reason in sorted(reasons)]
    return blocks


def _place(row: dict[str, Any]) -> tuple[int, str]:
    return row["tokens"], row["arm"]


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    names = [*CELL, *(name for name in COLUMNS if name not in CELL)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
