"""Free runs: curves of the unweighted error, judged against two floors.

    A/A floor    the baseline run again, same seed: what the machine itself does not repeat
    seed floor   the standard deviation of the baseline over its seeds: what nobody calls a change

The loss is not compared: with the adaptive weight of MeanFlow (p = 1) it is about 1 whatever
happens.
"""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.comparison.arms import REPEAT, Run
from training.comparison.statistics import smooth, verdict

ERROR = "train/error"
TABLE = {  # column of metrics.csv -> title
    "train/error": "error (unweighted)",
    "train/loss": "loss",
    "train/dudt_rms": "du/dt RMS",
    "train/grad_norm": "gradient norm",
    "perf/step_ms": "ms a step",
}


class Curves(NamedTuple):
    steps: np.ndarray  # (n,), that all runs logged
    candidate: np.ndarray  # (seeds, n), errors, a row for each seed that both have
    baseline: np.ndarray  # (seeds, n)
    repeat: np.ndarray | None  # (n,), the baseline's first seed again
    seeds: list[int]
    smoothing: int  # steps of the mean that plots show


def curves(runs: Sequence[Run], candidate: str, baseline: str) -> Curves:
    steps = reduce(np.intersect1d, [run.steps for run in runs])
    errors = {(run.arm, run.seed): on(run, steps) for run in runs}
    seeds = sorted(s for arm, s in errors if arm == candidate and (baseline, s) in errors)
    if not seeds:
        arms = ", ".join(sorted({run.name for run in runs}))
        raise ValueError(
            f"runs: comparing {candidate} with {baseline} needs a run of each with the same seed;"
            f" there are {arms}"
        )
    mine, theirs = (
        np.stack([errors[arm, seed] for seed in seeds]) for arm in (candidate, baseline)
    )
    again = errors.get((baseline + REPEAT, seeds[0]))
    return Curves(steps, mine, theirs, again, seeds, max(1, len(steps) // 25))


def on(run: Run, steps: np.ndarray, metric: str = ERROR) -> np.ndarray:
    """A metric of a run at these steps. (n,)"""
    return run.metrics[metric][np.searchsorted(run.steps, steps)]


def final_verdict(found: Curves, window: float, alpha: float) -> dict[str, Any]:
    n = max(1, round(window * len(found.steps)))
    repeat = None if found.repeat is None else found.repeat[-n:]
    return verdict(found.candidate[:, -n:], found.baseline[:, -n:], repeat, alpha)


def differences(found: Curves) -> dict[str, Any]:
    """What the difference panel shows, smoothed. Each (n,) or (seeds, n)"""
    w = found.smoothing
    smoothed = np.stack([smooth(row, w) for row in found.baseline])
    return {
        "pairs": np.stack([smooth(row, w) for row in found.candidate - found.baseline]),
        "repeat": None if found.repeat is None else smooth(found.repeat - found.baseline[0], w),
        "seed_std": smoothed.std(0, ddof=1) if len(smoothed) > 1 else None,
    }


def final_rows(runs: Sequence[Run], steps: np.ndarray, window: float) -> list[dict[str, Any]]:
    """Means of every run over the final window."""
    last = steps[-max(1, round(window * len(steps))) :]
    rows = []
    for run in runs:
        row: dict[str, Any] = {"arm": run.arm, "seed": run.seed}
        for name in TABLE:
            if name in run.metrics:
                row[name] = float(np.nanmean(on(run, last, name)))
        row["skipped"] = run.summary.get("skipped", 0)
        for name in ("sample_accuracy", "energy_distance"):
            if name in run.summary:
                row[name] = run.summary[name]
        rows.append(row)
    return rows


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """arm, seed, step and the compared metrics of every logged step."""
    names = [name for name in TABLE if any(name in run.metrics for run in runs)]
    lines = [",".join(["arm", "seed", "step", *names])]
    for run in runs:
        for i, step in enumerate(run.steps):
            values = [run.metrics[n][i] if n in run.metrics else np.nan for n in names]
            lines.append(
                ",".join([run.arm, str(run.seed), str(step), *(f"{v:.9g}" for v in values)])
            )
    path.write_text("\n".join(lines) + "\n")
