"""Are two attentions equivalent? Paired statistics of training curves.

Two runs of one seed see the same weights at the start, the same batches and the same noise, so that
what is compared is the difference d of their unweighted errors, step by step.

Two one-sided tests (TOST; Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657). That a test finds
no difference shows nothing; equivalence is shown by rejecting both d <= -δ and d >= δ. With n
seeds, mean d̄ and standard deviation s of their differences,

    t₁ = (d̄ + δ) / (s/√n),   t₂ = (d̄ - δ) / (s/√n),   p = max(P(T > t₁), P(T < t₂)),   T ~ t(n - 1)

which is below α exactly when the 1 - 2α confidence interval of d̄ lies inside (-δ, δ). The margin δ
is the standard deviation of the baseline over its seeds: what nobody would call a different result.

Moving-block bootstrap (Künsch 1989, Ann. Statist. 17:1217). Errors of neighbouring steps depend
on each other, so whole blocks of l steps are drawn with replacement; l = n^(1/3), the optimal order
for a variance (Hall, Horowitz & Jing 1995, Biometrika 82:561). The interval, by percentiles, is
that of the mean difference of these seeds; TOST speaks of seeds that were not run.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from training.randomness import key
from training.validation import between

LEAST_SEEDS = 3


@dataclass(frozen=True)
class Tost:
    """What the two one-sided tests say of paired differences."""

    n: int
    mean: float  # d̄
    std: float  # s
    margin: float  # δ
    p: float
    alpha: float
    low: float  # ends of the 1 - 2α interval of d̄
    high: float

    @property
    def equivalent(self) -> bool:
        return self.p < self.alpha

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"equivalent": self.equivalent}


def tost(differences: np.ndarray, margin: float, alpha: float = 0.05) -> Tost:
    """Two one-sided paired t tests. (n,), n >= 2"""
    d = np.asarray(differences, dtype=np.float64)
    between("margin", float(margin), 0, open_low=True)
    between("comparison.alpha", alpha, 0, 0.5, open_low=True)
    if d.ndim != 1 or len(d) < 2 or not np.isfinite(d).all():
        raise ValueError(f"differences must be two or more finite numbers; got {d.tolist()}")
    n, mean, std = len(d), float(d.mean()), float(d.std(ddof=1))
    error = std / math.sqrt(n)
    if error == 0:  # bit for bit the same difference in every seed
        p = 0.0 if abs(mean) < margin else 1.0
        return Tost(n, mean, std, margin, p, alpha, mean, mean)
    above = stats.t.sf((mean + margin) / error, n - 1)
    below = stats.t.cdf((mean - margin) / error, n - 1)
    reach = float(stats.t.ppf(1 - alpha, n - 1)) * error
    p = float(max(above, below))
    return Tost(n, mean, std, margin, p, alpha, mean - reach, mean + reach)


def block_bootstrap(
    differences: np.ndarray,
    level: float = 0.95,
    draws: int = 2000,
    block: int | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences, blocks of steps drawn anew for every
    seed. (seeds, steps) -> (low, high)
    """
    d = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    seeds, n = d.shape
    block = block or max(1, round(n ** (1 / 3)))
    if block > n:
        raise ValueError(f"block must be at most the number of steps, {n}; got {block}")
    random = np.random.Generator(np.random.Philox(key=key(seed, 0, 0, "bootstrap")))
    blocks = -(-n // block)
    # Sums of all windows of ``block`` steps: a resampled mean is a mean of drawn windows.
    padded = np.concatenate([np.zeros((seeds, 1)), d.cumsum(1)], axis=1)
    windows = (padded[:, block:] - padded[:, :-block]) / block  # (seeds, n - block + 1)
    means = np.zeros(draws)
    for row in windows:
        means += row[random.integers(len(row), size=(draws, blocks))].mean(1) / seeds
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the ``window`` values up to each one (over what there is, at the start). (n,)"""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    end = np.arange(1, len(total))
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def verdict(
    candidate: np.ndarray, baseline: np.ndarray, repeat: np.ndarray | None, alpha: float = 0.05
) -> dict[str, Any]:
    """The judgement over final windows, in numbers and in words.

    candidate, baseline: (seeds, steps), paired by row; repeat: (steps,), the baseline's first seed
    run again, the floor of what a machine repeats.
    """
    differences = candidate - baseline
    means, per_seed = baseline.mean(1), differences.mean(1)
    low, high = block_bootstrap(differences)
    found: dict[str, Any] = {
        "seeds": len(means),
        "window": baseline.shape[1],
        "baseline_mean": float(means.mean()),
        "candidate_mean": float(candidate.mean()),
        "difference": float(per_seed.mean()),
        "relative_difference": float(per_seed.mean() / means.mean()),
        "differences": per_seed.tolist(),
        "bootstrap_95": [low, high],
        "repeat_difference": None if repeat is None else float((repeat - baseline[0]).mean()),
        "seed_std": None,
        "tost": None,
        "equivalent": None,
    }
    if len(means) >= LEAST_SEEDS:
        margin = found["seed_std"] = float(means.std(ddof=1))
        if margin > 0:
            test = tost(per_seed, margin, alpha)
            found |= {"tost": test.as_dict(), "equivalent": test.equivalent}
    found["words"] = in_words(found)
    return found


def in_words(found: dict[str, Any]) -> str:
    """The judgement as two or three sentences, in percent of the baseline's error."""
    if found["tost"] is None and found["seed_std"] is None:
        return (
            f"No verdict: a margin needs at least {LEAST_SEEDS} seeds of both arms, there are"
            f" {found['seeds']}. The final errors differ by {found['relative_difference']:+.2%}."
        )
    if found["tost"] is None:
        return "No verdict: the seeds of the baseline do not differ at all."
    test, percent = found["tost"], 100 / found["baseline_mean"]
    mean, low, high = (test[key] * percent for key in ("mean", "low", "high"))
    head = "Equivalent" if test["equivalent"] else "Equivalence is not shown"
    where = "within" if test["equivalent"] else "beyond"
    sentences = [
        f"{head} (TOST, {test['n']} seeds, p = {test['p']:.2g}): {mean:+.2f} %,"
        f" 90 % CI [{low:+.2f}, {high:+.2f}] %, {where} ±1 standard deviation of a seed"
        f" ({test['margin'] * percent:.2f} %).",
        f"A paired t test of a difference has p = {paired_p(test):.2g}.",
    ]
    if not test["equivalent"]:
        sentences.append("This proves no difference: more seeds or steps narrow the interval.")
    if found.get("repeat_difference") is not None:
        repeat = found["repeat_difference"] * percent
        sentences.append(f"The baseline repeated with the same seed differs by {repeat:+.2g} %.")
    return " ".join(sentences)


def paired_p(test: dict[str, Any]) -> float:
    """Two-sided p of a t test that the mean of the paired differences is zero."""
    if test["std"] == 0:
        return 1.0 if test["mean"] == 0 else 0.0
    standard = test["std"] / math.sqrt(test["n"])
    return float(2 * stats.t.sf(abs(test["mean"]) / standard, test["n"] - 1))
