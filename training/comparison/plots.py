"""The pictures of a report. Figures are made without pyplot: no global state, no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from training.comparison.arms import REPEAT, Run
from training.comparison.curves import Curves, differences, on
from training.comparison.statistics import smooth

COLOURS = {"jvp": "#0b6e99", "sdpa": "#c1440e", "sdpa_fused": "#6b8e23", "double": "#7a5195"}
OTHERS = ("#444444", "#d4a017", "#008b8b", "#c71585")
SHADES = ("-", "--", ":", "-.")
LOST = ": out of memory"  # ends the name of a cross


def colour(arm: str, arms: Sequence[str]) -> str:
    name = arm.removesuffix(REPEAT)
    return COLOURS.get(name) or OTHERS[list(arms).index(arm) % len(OTHERS)]


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _legend(whole: Figure, columns: int) -> None:
    """One for all panels, below them."""
    lines = [line for axis in whole.axes for line in axis.get_lines()]
    named = {str(line.get_label()): line for line in lines}
    shown = [name for name in named if not name.startswith("_")]
    shown.sort(key=lambda name: name.endswith(LOST))  # the lines first
    where = {"loc": "outside lower center", "ncols": columns, "fontsize": 8}
    whole.legend([named[name] for name in shown], shown, **where)


def logarithmic(axes: Any) -> None:
    """A logarithmic ordinate with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    _plain(axes.yaxis)


def _plain(axis: Any, subs: Sequence[int] = (1, 2, 5)) -> None:
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def error_curves(runs: Sequence[Run], found: Curves, candidate: str, baseline: str) -> Figure:
    """Curves over each other; below, their difference between the floors, and its size, which is
    often far below both.
    """
    whole = figure(7.2, 8.2)
    above, below, size = whole.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    arms = list(dict.fromkeys(run.arm for run in runs))
    seeds = sorted({run.seed for run in runs})
    for run in runs:
        seed = seeds.index(run.seed)
        above.plot(
            found.steps,
            smooth(on(run, found.steps), found.smoothing),
            SHADES[seed % len(SHADES)],
            color=colour(run.arm, arms),
            lw=2.6 if run.arm == baseline else 1.2,
            alpha=0.45 if run.arm == baseline else 1,
            label=run.arm if seed == 0 else None,
        )
    for i, seed in enumerate(seeds):
        above.plot([], [], SHADES[i % len(SHADES)], color="black", lw=1, label=f"seed {seed}")
    logarithmic(above)
    above.set_ylabel("unweighted error")
    above.set_title(f"mean of {found.smoothing} steps", fontsize=9)
    above.legend(fontsize=8, ncols=2)

    parts = differences(found)
    floors = {"seed floor (±1 std)": ("#999999", parts["seed_std"])}
    if parts["repeat"] is not None:
        repeat = np.abs(parts["repeat"])
        floors["A/A floor" if repeat.any() else "A/A floor: 0"] = (COLOURS["sdpa"], repeat)
    for label, (shade, reach) in floors.items():
        if reach is not None:
            look = {"color": shade, "alpha": 0.3, "lw": 0}
            below.fill_between(found.steps, -reach, reach, label=label, **look)
            size.plot(found.steps, _positive(reach), color=shade, lw=2.5, alpha=0.5, label=label)
    for i, row in enumerate(parts["pairs"]):
        look = {"color": colour(candidate, arms), "lw": 1, "ls": SHADES[i % len(SHADES)]}
        label = f"{candidate} - {baseline}" if i == 0 else None
        below.plot(found.steps, row, label=label, **look)
        size.plot(found.steps, _positive(np.abs(row)), label=label, **look)
    below.axhline(0, color="black", lw=0.6)
    below.set_ylabel("difference of errors")
    if any(np.nanmax(line.get_ydata(), initial=0) > 0 for line in size.get_lines()):
        size.set_yscale("log")
    size.set_ylabel("its size (0 is not shown)")
    size.set_xlabel("step")
    for axis in (below, size):
        axis.legend(fontsize=8)
    return whole


def _positive(values: np.ndarray) -> np.ndarray:
    """Zeros as gaps, and what float64 leaves of them where differences cancel: a logarithmic axis
    has no place for them.
    """
    return np.where(values > 1e-12, values, np.nan)


def pairs(found: Curves, judged: dict[str, Any], candidate: str, baseline: str) -> Figure:
    """Left: the error of every step in one arm over that of the other, same seed and batch. Right:
    what the verdict rests on, the final differences, their interval and the margin.
    """
    whole = figure(7.2, 3.6)
    left, right = whole.subplots(1, 2)
    left.loglog(found.baseline.T, found.candidate.T, ".", ms=3, alpha=0.5)
    both = np.concatenate([found.baseline, found.candidate])
    ends = [both.min(), both.max()]
    left.plot(ends, ends, color="black", lw=0.7)
    for axis in (left.xaxis, left.yaxis):
        _plain(axis)
    left.set_xlabel(f"error, {baseline}")
    left.set_ylabel(f"error, {candidate}")
    left.legend([f"seed {seed}" for seed in found.seeds], fontsize=8)

    marks: list[tuple[str, float, Any]] = [
        (f"seed {s}", d, None) for s, d in zip(found.seeds, judged["differences"], strict=True)
    ]
    marks.append(("mean, bootstrap 95%", judged["difference"], judged["bootstrap_95"]))
    if test := judged["tost"]:
        level = f"mean, TOST {1 - 2 * test['alpha']:.0%}"
        marks.append((level, test["mean"], (test["low"], test["high"])))
        for end in (-test["margin"], test["margin"]):
            right.axvline(end, color="#c1440e", ls="--", lw=1)
    for place, (_, middle, interval) in enumerate(marks):
        right.plot([middle], [place], "o", ms=4, color="#0b6e99")
        if interval:
            right.hlines(place, *interval, color="#0b6e99", lw=2)
    right.axvline(0, color="black", lw=0.6)
    right.set_yticks(range(len(marks)), [name for name, *_ in marks], fontsize=7)
    right.tick_params(axis="x", labelsize=7)
    right.invert_yaxis()
    right.set_xlabel(f"{candidate} - {baseline}, final window; dashed: margin", fontsize=8)
    return whole


def lockstep_errors(rows: Sequence[dict[str, Any]], truth: str) -> Figure:
    """Errors against float64: over the steps for the whole network, over the layers inside it."""
    rows = [row for row in rows if row["against"] == truth]
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = -(-len(quantities) // 2)
    whole = figure(7.2, 2.3 * lines + 0.6)
    axes = whole.subplots(lines, 2, squeeze=False).flat
    for quantity, axis in zip(quantities, axes, strict=False):
        layered = any(row["layer"] for row in rows if row["quantity"] == quantity)
        where = "layer" if layered else "step"
        for i, arm in enumerate(arms):
            mine = [r for r in rows if (r["quantity"], r["arm"]) == (quantity, arm)]
            places = sorted({int(r[where]) for r in mine})
            values = [np.median([r["error"] for r in mine if int(r[where]) == p]) for p in places]
            marker = "ox+sd^v"[i % 7]
            axis.semilogy(
                places, values, marker + SHADES[i % 4], ms=4, lw=1, mfc="none",
                color=colour(arm, arms), label=arm,
            )  # fmt: skip
        positive = [r["error"] for r in rows if r["quantity"] == quantity and r["error"] > 0]
        if positive:  # whole powers of ten: small differences look small
            axis.set_yscale("log")
            axis.set_ylim(
                10 ** np.floor(np.log10(min(positive))), 10 ** np.ceil(np.log10(max(positive)))
            )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(f"{quantity}, by {where}", fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes:
        axis.set_axis_off()
    _legend(whole, 4)
    whole.supylabel("relative error against float64", fontsize=9)
    return whole


def _groups(rows: Sequence[dict[str, Any]], *names: str) -> dict[tuple, list[dict[str, Any]]]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def over_tokens(
    rows: Sequence[dict[str, Any]], quantity: str, label: str, unit: float = 1
) -> Figure:
    """A panel for each head dim and mode, a line for each arm; where memory ran out a cross above
    the frame, so that it is not taken for a value. Dashed, and upright crosses: compiled.

    unit: what is drawn as 1.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    dims = list(dict.fromkeys(row["head_dim"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    whole = figure(max(4.2, 2.9 * len(dims) + 0.6), 2.6 * len(modes) + 0.7)
    axes = whole.subplots(len(modes), len(dims), squeeze=False, sharex=True, sharey="row")
    lost_rows = [row for row in rows if row["status"] == "out of memory"]
    without_memory = list(_groups(lost_rows, "arm", "compiled"))  # a height for each
    for (mode, dim, arm, compiled), mine in _groups(
        rows, "mode", "head_dim", "arm", "compiled"
    ).items():
        axis = axes[modes.index(mode), dims.index(dim)]
        name = f"{arm}{', compiled' if compiled else ''}"
        points = sorted(
            (r["tokens"], r[quantity] / unit) for r in mine if r.get(quantity) is not None
        )
        shade = colour(arm, arms)
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, "o--" if compiled else "o-", lw=1.4, ms=4, color=shade, label=name)
        lost = [r["tokens"] for r in mine if r["status"] == "out of memory"]
        if not lost:
            continue
        height = (5 + 8 * without_memory.index((arm, compiled))) / 72  # inches
        axis.plot(
            lost, [1] * len(lost), "+" if compiled else "x", mew=2, ms=6, color=shade,
            transform=axis.get_xaxis_transform()
            + ScaledTranslation(0, height, whole.dpi_scale_trans),
            clip_on=False, label=f"{name}{LOST}",
        )  # fmt: skip
    ticks = sorted({row["tokens"] for row in rows})
    for i, mode in enumerate(modes):
        axes[i, 0].set_ylabel(f"{label}\n({mode})", fontsize=8)
        for j, dim in enumerate(dims):
            axis = axes[i, j]
            axis.set_xscale("log", base=2)
            if any(row["mode"] == mode and row.get(quantity) for row in rows):
                logarithmic(axis)
                low, high = axis.get_ylim()
                if high / low < 10:
                    _plain(axis.yaxis, (1, 2, 3, 4, 5, 6, 8))
            else:  # crosses alone
                axis.set_yticks([])
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.tick_params(labelsize=7)
            if i == 0:
                axis.set_title(f"head dim {dim}", fontsize=9, pad=6 + 8 * len(without_memory))
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=8)
    _legend(whole, 3 if len(dims) > 1 else 2)
    return whole


def step_times(rows: Sequence[dict[str, Any]]) -> Figure:
    """The distribution of step times over the median of their row, an arm a line: how steady the
    clock was, whatever the size.
    """
    whole = figure(6.4, 3.4)
    axis = whole.subplots()
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for arm in arms:
        ratios = [
            t / r["ms"] for r in rows if r["arm"] == arm and r.get("ms") for t in r["times_ms"]
        ]
        if ratios:
            ratios.sort()
            share = np.arange(1, len(ratios) + 1) / len(ratios)
            axis.step(ratios, share, where="post", color=colour(arm, arms), label=arm)
    axis.axvline(1, color="black", lw=0.6)
    axis.set_xlabel("step time / median of its cell")
    axis.set_ylabel("share of steps")
    if axis.get_lines()[:-1]:
        axis.legend(fontsize=8)
    return whole


def split_bars(rows: Sequence[dict[str, Any]]) -> Figure:
    """Forward, backward and optimizer of every cell of the equal batch, stacked."""
    parts = {"forward_ms": 1.0, "backward_ms": 0.65, "optimizer_ms": 0.3}
    return _bars(rows, parts, "ms: forward (full), backward, optimizer (light)")


def mfu_bars(rows: Sequence[dict[str, Any]]) -> Figure:
    """Share of the machine's peak; where the peak is not known, useful TFLOP/s."""
    known = any(row.get("mfu") for row in rows)
    return _bars(rows, {"mfu" if known else "tflops": 1.0}, "MFU" if known else "useful TFLOP/s")


def _bars(rows: Sequence[dict[str, Any]], parts: dict[str, float], label: str) -> Figure:
    """A panel for each mode, eager and compiled; in it the cells of the equal batch, an arm a bar,
    its ``parts`` (quantity -> opacity) on each other.
    """
    rows = [row for row in rows if row.get("ms") and row["batches"] == "equal"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    panels = _groups(rows, "mode", "compiled")
    whole = figure(7.2, 2.2 * len(panels) + 0.6)
    axes = whole.subplots(len(panels), 1, squeeze=False)[:, 0]
    width = 0.8 / len(arms)
    for axis, ((mode, compiled), mine) in zip(axes, panels.items(), strict=True):
        cells = sorted(_groups(mine, "head_dim", "tokens"))
        for row in mine:
            cell = cells.index((row["head_dim"], row["tokens"]))
            x, bottom = cell + width * (arms.index(row["arm"]) - (len(arms) - 1) / 2), 0.0
            for part, alpha in parts.items():
                look = {"color": colour(row["arm"], arms), "alpha": alpha}
                axis.bar(x, row[part] or 0, width, bottom=bottom, **look)
                bottom += row[part] or 0
        names = [f"{tokens}\nD {dim}" for dim, tokens in cells]
        axis.set_xticks(range(len(cells)), names, fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(f"{mode}, {'compiled' if compiled else 'eager'}", fontsize=9)
    whole.supylabel(label, fontsize=9)
    handles = [Patch(color=colour(arm, arms), label=arm) for arm in arms]
    whole.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return whole


def speedup(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> Figure:
    """Baseline's time over the candidate's, a line for each setting; above 1 the candidate wins.
    Vertical lines are 95 % intervals.
    """
    whole = figure(6.4, 3.8)
    axis = whole.subplots()
    for (dim, mode, compiled), mine in _groups(ratios, "head_dim", "mode", "compiled").items():
        points = sorted((r["tokens"], r["ratio"], r["low"], r["high"]) for r in mine if r["ratio"])
        if points:
            x, y, low, high = zip(*points, strict=True)
            name = f"D {dim}, {mode}{', compiled' if compiled else ''}"
            (line,) = axis.plot(x, y, "o--" if compiled else "o-", ms=4, lw=1.3, label=name)
            axis.vlines(x, low, high, color=line.get_color(), lw=1)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xscale("log", base=2)
    ticks = sorted({row["tokens"] for row in rows})
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set_xlabel("tokens")
    axis.set_ylabel("times faster than the baseline")
    if axis.get_lines()[:-1]:
        axis.legend(fontsize=7)
    return whole
