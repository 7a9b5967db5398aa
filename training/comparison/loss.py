"""Loss matching: runs of every arm, the lock-step, the judgement, and what is written of them."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from training.comparison import lockstep, plots
from training.comparison.arms import (
    REPEAT,
    Compose,
    Run,
    check_arms,
    check_comparable,
    check_fingerprints,
    name_arms,
    pair_id,
    placed,
    plan,
    read_run,
    run_config,
)
from training.comparison.curves import TABLE, curves, final_rows, final_verdict, write_csv
from training.comparison.files import Found, write_jsonl
from training.comparison.parallel_runs import Train, train_in_parallel
from training.config_checks import precision
from training.document import Block, Heading, Judgement, Pictures, Table, Text
from training.validation import between, positive_integer


def compare_losses(config: DictConfig, compose: Compose, train: Train, output: Path) -> Found:
    comparison = config.comparison
    positive_integer("comparison.seeds", comparison.seeds)
    positive_integer("comparison.parallel", comparison.parallel)
    between("comparison.window", comparison.window, 0, 1, open_low=True)
    between("comparison.alpha", comparison.alpha, 0, 0.5, open_low=True)
    notes: list[str] = []
    if config.runs:
        runs = name_arms([read_run(Path(path)) for path in config.runs])
    else:
        runs, notes = _train_arms(config, compose, train, output)
    check_comparable(runs)
    found = curves(runs, comparison.candidate, comparison.baseline)
    fingerprints = check_fingerprints(runs)
    judgement = final_verdict(found, comparison.window, comparison.alpha)
    rows = _lockstep(runs, comparison, found.seeds[0], output)
    step_verdict = lockstep.verdict(
        rows, comparison.candidate, comparison.baseline, comparison.lockstep.factor
    )
    finals = final_rows(runs, found.steps, comparison.window)

    write_csv(runs, output / "curves.csv")
    write_jsonl(rows, output / "lockstep.jsonl")
    folder, names = output / "plots", (comparison.candidate, comparison.baseline)
    pictures = {
        "curves": plots.save(plots.error_curves(runs, found, *names), folder / "curves.png"),
        "pairs": plots.save(plots.pairs(found, judgement, *names), folder / "pairs.png"),
    }
    if rows:
        drawn = plots.lockstep_errors(rows, lockstep.TRUTH)
        pictures["lockstep"] = plots.save(drawn, folder / "lockstep.png")
    results = {
        "pair": pair_id(runs[0].config if config.runs else config, "loss"),
        "candidate": comparison.candidate,
        "baseline": comparison.baseline,
        "free_run": judgement,
        "lockstep": step_verdict,
        "lockstep_errors": lockstep.summary(rows),
        "runs": finals,
        "notes": notes,
        "fingerprints": fingerprints,
    }
    grids = _grids(runs, found.seeds[0], output / "samples")
    title = f"Loss matching: {names[0]} against {names[1]}"
    return Found(title, results, _blocks(results, config, pictures, grids), pictures | dict(grids))


def _train_arms(
    config: DictConfig, compose: Compose, train: Train, output: Path
) -> tuple[list[Run], list[str]]:
    """The finished runs, and what was left out."""
    pair = pair_id(config, "loss")
    arms, jobs, notes = [], [], []
    planned = plan(config.comparison, config.seed)
    pair_of_arms = (config.comparison.candidate, config.comparison.baseline)
    check_arms(compose, [(arm, overrides) for arm, _, overrides in planned])
    base = compose(config.comparison.arms[config.comparison.baseline])
    for number, (arm, seed, overrides) in enumerate(planned, 1):
        composed = compose(overrides)
        asked_for = arm in pair_of_arms or arm.endswith(REPEAT)
        if not asked_for and _same(composed, base):
            notes.append(f"The arm {arm} is left out: here it is {config.comparison.baseline}.")
            print(notes[-1], flush=True)
            continue
        directory = output / "runs" / f"{arm.replace(' ', '_')}_seed{seed}"
        print(f"run {number} of {len(planned)}: {arm}, seed {seed} -> {directory}", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        job = run_config(compose, arm, seed, overrides, directory, pair), directory
        arms.append(arm)
        jobs.append(job)
        if config.comparison.parallel == 1:
            train(*job)
            gc.collect()  # a trainer is a circle, and holds the memory of its device
    if config.comparison.parallel > 1:
        train_in_parallel(train, jobs, config.comparison.parallel)
    runs = [read_run(directory, arm) for arm, (_, directory) in zip(arms, jobs, strict=True)]
    return runs, notes


def _same(a: DictConfig, b: DictConfig) -> bool:
    """Whether two arms compute the same thing."""
    keys = ("attention", "objective", "compile")
    same = all(a[key] == b[key] for key in keys)
    return same and precision(a.trainer) == precision(b.trainer)


def _lockstep(
    runs: Sequence[Run], comparison: DictConfig, seed: int, output: Path
) -> list[dict[str, Any]]:
    """Of every arm that ran with the first seed, from the configurations of the runs."""
    if not comparison.lockstep.steps:
        return []
    configs = {run.arm: placed(run.config, output) for run in runs if run.seed == seed}
    for config in configs.values():
        config.compile = config.cuda_graphs = (
            False  # what is measured inside would be compiled away
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"lock-step: {comparison.lockstep.steps} steps of {', '.join(configs)}", flush=True)
    steps = comparison.lockstep
    return lockstep.lockstep(configs, comparison.baseline, steps.steps, steps.every, device)


def _grids(runs: Sequence[Run], seed: int, folder: Path) -> list[tuple[str, Path]]:
    """The last sample grid of every arm with the first seed, all drawn from the same noise."""
    found = []
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        pictures = sorted((run.directory / "samples").glob("step_*.png"))
        if run.seed == seed and pictures:
            copy = folder / f"{run.arm.replace(' ', '_')}.png"
            copy.write_bytes(pictures[-1].read_bytes())
            found.append((run.arm, copy))
    return found


def _blocks(
    results: dict[str, Any],
    config: DictConfig,
    pictures: dict[str, Path],
    grids: list[tuple[str, Path]],
) -> list[Block]:
    free, step = results["free_run"], results["lockstep"]
    candidate, baseline = results["candidate"], results["baseline"]
    prints = results["fingerprints"]
    agree = all(row["same_weights"] and row["same_batches"] for row in prints)
    state = "agree" if agree else "DO NOT agree: these runs did not see the same"
    seeds = f"Initial weights and batches of the arms of each seed {state}"
    kinds = ", ".join(sorted({row["source"] for row in prints}))
    blocks: list[Block] = [
        Heading("Verdict"),
        Judgement("Free run", free["words"], free["equivalent"]),
        Judgement("Lock-step", step["words"], step["passed"]),
        Judgement("Same input", f"{seeds} (hashes {kinds}).", agree),
        Heading("Curves"),
        Text(
            "The unweighted error of every run, and below the difference of the two arms at the"
            " same seed and step between the floors: what the baseline itself does not repeat (A/A)"
            " and what another seed changes."
        ),
        Pictures([(pictures["curves"], f"Unweighted error; {candidate} minus {baseline}")]),
        Pictures(
            [
                (
                    pictures["pairs"],
                    "Left: every step of both arms, same seed and batch. Right: what the verdict"
                    " rests on.",
                )
            ]
        ),
        Table(*_free_table(free)),
        Heading("Final window"),
        Text(f"Means over the last {free['window']} logged steps of every run."),
        Table(*_finals(results["runs"])),
        *(Text(note) for note in results["notes"]),
    ]
    if results["lockstep_errors"]:
        blocks += [
            Heading("Lock-step"),
            Text(
                f"All arms at the same parameters on the same batch; {baseline} drives. Relative"
                " errors against float64 and against the driver, over measured steps and layers."
            ),
            Pictures([(pictures["lockstep"], "Relative errors against float64")]),
            *_lockstep_tables(results["lockstep_errors"], baseline),
        ]
    if grids:
        blocks += [
            Heading("Samples"),
            Text("From the same noise, a class a column."),
            Pictures([(path, arm) for arm, path in grids]),
        ]
    blocks += [
        Heading("Fingerprints"),
        Table(
            ("arm", "seed", "source", "weights", "batches", "same weights", "same batches"),
            [list(row.values()) for row in prints],
        ),
    ]
    return blocks


def _free_table(free: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    low, high = free["bootstrap_95"]
    test = free["tost"] or {}
    rows = [
        ["error of the baseline", free["baseline_mean"]],
        ["error of the candidate", free["candidate_mean"]],
        ["difference", free["difference"]],
        ["... relative", f"{free['relative_difference']:+.3%}"],
        ["... by seed", ", ".join(f"{d:+.4g}" for d in free["differences"])],
        ["95% interval, paired block bootstrap", f"[{low:+.4g}, {high:+.4g}]"],
        ["A/A: baseline again minus baseline", free["repeat_difference"]],
        ["margin: std of the baseline over seeds", free["seed_std"]],
        ["TOST p", test.get("p")],
        ["TOST interval", f"[{test['low']:+.4g}, {test['high']:+.4g}]" if test else None],
    ]
    return ["final window", "value"], rows


def _lockstep_tables(rows: Sequence[dict[str, Any]], baseline: str) -> list[Block]:
    """Median and largest error: a line for each quantity, a column for each arm."""
    blocks: list[Block] = []
    for against in (lockstep.TRUTH, baseline):
        mine = {
            (row["quantity"], row["arm"]): f"{row['median']:.2g} ({row['largest']:.2g})"
            for row in rows
            if row["against"] == against
        }
        arms = list(dict.fromkeys(arm for _, arm in mine))
        quantities = list(dict.fromkeys(quantity for quantity, _ in mine))
        blocks.append(Text(f"Against {against}, median (largest):"))
        cells = [[q, *(mine.get((q, arm)) for arm in arms)] for q in quantities]
        blocks.append(Table(["quantity", *arms], cells))
    return blocks


def _finals(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    titles = [TABLE.get(name, name.replace("_", " ")) for name in names]
    return titles, [[row.get(name) for name in names] for row in rows]
