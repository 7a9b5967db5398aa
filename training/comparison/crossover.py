"""From how many tokens on is one arm faster than another, and how sure is that?

The arms take turns, so that their steps are paired: the interval of a ratio is the exponential of a
paired block bootstrap of log(time of the baseline / time of the candidate).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.comparison.speed import CELL, OUT_OF_MEMORY
from training.comparison.statistics import block_bootstrap


def ratios(rows: Sequence[dict[str, Any]], candidate: str, baseline: str) -> list[dict[str, Any]]:
    """How many times as fast the candidate is as the baseline, for every cell. Of the equal batch
    the geometric mean over paired steps, with the ends ``low`` and ``high`` of its 95 % interval;
    of the largest batches, which differ, images per second at the medians.
    """
    by_cell: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault(tuple(row[name] for name in CELL), {})[row["arm"]] = row
    found = []
    for cell, arms in by_cell.items():
        mine, theirs = arms.get(candidate, {}), arms.get(baseline, {})
        ratio, low, high = _over(mine.get("images_per_s"), theirs.get("images_per_s")), None, None
        if cell[-1] == "equal" and ratio:
            pairs = np.log(theirs["times_ms"]) - np.log(mine["times_ms"])
            ratio = math.exp(pairs.mean())
            low, high = (math.exp(end) for end in block_bootstrap(pairs))
        found.append(
            dict(zip(CELL, cell, strict=True))
            | {
                "against": baseline,
                "ratio": ratio,
                "low": low,
                "high": high,
                "memory_ratio": _over(theirs.get("peak_mib"), mine.get("peak_mib")),
                "baseline_fits": theirs.get("status") != OUT_OF_MEMORY,
                "candidate_fits": mine.get("status") != OUT_OF_MEMORY,
            }
        )
    return found


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def crossover(points: Sequence[tuple[int, float]]) -> tuple[float | None, str]:
    """Where the candidate begins to win for good: tokens, and in words.

    points: (tokens, ratio), of the lengths measured in both arms. Between two lengths log ratio is
    taken as linear in log tokens.
    """
    points = sorted(points)
    if not points:
        return None, "not measured"
    first, longest = points[0][0], points[-1][0]
    if all(ratio >= 1 for _, ratio in points):
        if len(points) == 1:
            return float(first), f"faster at the only length measured, {first} tokens"
        return float(first), f"faster at every length measured, {first} to {longest} tokens"
    if points[-1][1] < 1:
        which = "only" if len(points) == 1 else "longest"
        return None, f"not faster at the {which} length measured, {longest} tokens"
    last = max(i for i, (_, ratio) in enumerate(points) if ratio < 1)
    (n0, r0), (n1, r1) = points[last], points[last + 1]
    share = -math.log(r0) / (math.log(r1) - math.log(r0))
    tokens = math.exp(math.log(n0) + share * (math.log(n1) - math.log(n0)))
    return tokens, f"faster from about {tokens:.0f} tokens on (between {n0} and {n1})"


def crossings(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every setting of the equal batch, where the candidate begins to win, and its best."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in found:
        if row["batches"] == "equal":
            key = (row["against"], row["head_dim"], row["mode"], row["compiled"])
            groups.setdefault(key, []).append(row)
    rows = []
    for (against, dim, mode, compiled), mine in groups.items():
        measured = [row for row in mine if row["ratio"]]
        tokens, words = crossover([(row["tokens"], row["ratio"]) for row in measured])
        best = max(measured, key=lambda row: row["ratio"], default=None)
        alone = sorted(r["tokens"] for r in mine if r["candidate_fits"] and not r["baseline_fits"])
        rows.append(
            {
                "against": against,
                "head_dim": dim,
                "mode": mode,
                "compiled": compiled,
                "from_tokens": tokens,
                "words": words,
                "best": best and best["ratio"],
                "best_low": best and best["low"],
                "best_high": best and best["high"],
                "best_tokens": best and best["tokens"],
                "only_candidate_fits": alone,
            }
        )
    return rows


def _setting(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """What tells a setting from the others of ``rows``."""
    names = {
        "head_dim": f"head dim {row['head_dim']}",
        "mode": row["mode"],
        "compiled": "compiled" if row["compiled"] else "eager",
    }
    differing = [n for key, n in names.items() if len({other[key] for other in rows}) > 1]
    return ", ".join(differing) or names["head_dim"]


def verdict(rows: Sequence[dict[str, Any]], candidate: str, against: str) -> dict[str, Any]:
    """All settings against one arm in one sentence; of those that win, what was measured."""
    rows = [row for row in rows if row["against"] == against and row["best"]]
    if not rows:
        return {"passed": None, "words": "No verdict: nothing was measured in both arms."}
    winning = [row for row in rows if row["from_tokens"] is not None]
    words = f"{candidate} is faster than {against} in {len(winning)} of {len(rows)} settings"
    places: dict[str, list[str]] = {}  # where it is faster -> the settings of which this is so
    for row in winning:
        places.setdefault(row["words"].removeprefix("faster "), []).append(_setting(row, rows))
    if len(places) == 1 and len(winning) == len(rows):
        words += f", {next(iter(places))}"
    elif places:
        told = [f"{where} ({' and '.join(settings)})" for where, settings in places.items()]
        words += f": {', and '.join(told)}"
    if not winning:
        words = (
            f"{candidate} is not faster than {against} at the longest length measured, in any of"
            f" {len(rows)} settings"
        )
    elif len(winning) < len(rows):
        words += "; in the others it is not, at the longest length measured"
    best = max(rows, key=lambda row: row["best"])
    words += f"; at best {best['best']:.2f} times as fast"
    if best["best_low"]:
        words += f" (95% interval {best['best_low']:.2f} to {best['best_high']:.2f})"
    how = "compiled" if best["compiled"] else "eager"
    words += (
        f", at {best['best_tokens']} tokens, head dim {best['head_dim']}, {best['mode']}, {how}"
    )
    alone = sorted({n for row in rows for n in row["only_candidate_fits"]})
    if alone:
        words += f"; at {', '.join(map(str, alone))} tokens only {candidate} fits into memory"
    return {"passed": len(winning) == len(rows), "words": words + "."}
