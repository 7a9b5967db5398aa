"""Time and memory over the length, log-log, with a mark where memory ran out; the rates of the
targets beside the peers' and a matrix product's."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import report, targets
from .measure import OUT_OF_MEMORY

COLOURS = {"ours": "#0b6e99", "sdpa-math": "#c1440e", "flash": "#6b8e23", "cudnn": "#7a5195"}
OTHERS = ("#444444", "#d4a017", "#008b8b", "#c71585")
QUANTITIES = {"ms": "time (ms)", "mib": "peak memory (MiB)"}


Draw = Callable[[Path], None]


def pictures(result: dict, stem: Path) -> dict[Path, tuple[str, Draw]]:
    """path -> (title, what draws it): for the targets one, else one for every (B, H, D) and dtype
    with three lengths or more."""
    machine = result["environment"]["gpu"] or "CPU"
    if result.get("suite") == "targets":
        title = f"TFLOP/s, {targets.DTYPE}, {machine}"
        return {stem.with_name(f"{stem.name}.png"): (title, partial(rates, result, title))}
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        B, H, _, D = row["shape"]
        groups.setdefault((B, H, D, row["dtype"]), []).append(row)
    groups = {key: rows for key, rows in groups.items() if len(_lengths(rows)) >= 3}
    found = {}
    for (B, H, D, dtype), rows in groups.items():
        suffix = "" if len(groups) == 1 else f"_{B}x{H}x{D}_{dtype}"
        title = f"B = {B}, H = {H}, D = {D}, {dtype}, {machine}"
        path = stem.with_name(f"{stem.name}{suffix}.png")
        found[path] = (title, partial(over_length, rows, title))
    return found


def draw(result: dict, stem: Path) -> list[Path]:
    """Draws all pictures of a result; the paths written."""
    found = pictures(result, stem)
    for path, (_, drawn) in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn(path)
    return list(found)


def rates(result: dict, title: str, path: Path) -> None:
    """Draws a bar for each of our rows and a point for each of its peers', over a line at the rate
    of a large matrix product. The names are those of the tables."""
    from matplotlib.figure import Figure

    groups: dict[tuple, dict[str, dict]] = {}
    for row in result["rows"]:
        groups.setdefault((row["workload"], row["pass"]), {})[row["implementation"]] = row
    figure = Figure(figsize=(7.5, 0.28 * len(groups) + 1.3), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axis = figure.subplots()
    gemm = result["peak"]["gemm_tflops"][targets.DTYPE]
    size = result["peak"]["gemm_size"]
    behind = {"color": "#444444", "ls": "--", "lw": 1, "zorder": 0.9}
    axis.axvline(gemm, label=f"product of {size}³: {gemm:.0f}", **behind)
    marks = {"cudnn": "D", "flash": "o", "sdpa-math": "s"}
    for name in ("ours", *marks):
        found = [
            (i, rows[name]["tflops"])
            for i, rows in enumerate(groups.values())
            if rows.get(name, {}).get("tflops")
        ]
        if not found:
            continue
        places, values = zip(*found, strict=True)
        if name == "ours":
            bars = axis.barh(places, values, color=COLOURS[name], height=0.7, label=name)
            axis.bar_label(bars, fmt="%.0f", padding=-24, fontsize=8, color="white")
        else:
            style = {"color": COLOURS[name], "edgecolors": "white", "zorder": 3}
            axis.scatter(values, places, marker=marks[name], s=36, label=name, **style)
    firsts = [next(iter(rows.values())) for rows in groups.values()]
    names = [f"{report.shape(row)}, {report.pass_in_words(row)}" for row in firsts]
    axis.set_yticks(range(len(groups)), names, fontsize=8)
    axis.set_ylabel("(B, H, L, D) mask, pass", fontsize=8)
    axis.margins(x=0.08, y=0.02)
    axis.invert_yaxis()
    axis.set_xlabel("TFLOP/s")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)


def over_length(rows: Sequence[dict], title: str, path: Path) -> None:
    """Draws a column of plots for every pass and mask, a line for every implementation."""
    # not pyplot: no global state, no display
    from matplotlib.figure import Figure

    panels: dict[str, list[dict]] = {}
    for row in rows:
        mask = "" if row["mask"] == "none" else f", {row['mask']}"
        panels.setdefault(row["pass"] + mask, []).append(row)
    known = [q for q in QUANTITIES if any(row.get(q) is not None for row in rows)]
    size = (3.6 * len(panels) + 0.6, 3.0 * len(known) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(known), len(panels), squeeze=False, sharex=True, sharey="row")
    heights = {}
    for row in rows:
        if row["status"] == OUT_OF_MEMORY:
            heights.setdefault(row["implementation"], 6 + 9 * len(heights))
    for column, (name, group) in enumerate(panels.items()):
        for line, quantity in enumerate(known):
            _lines(axes[line, column], group, quantity, heights)
            axes[line, 0].set_ylabel(QUANTITIES[quantity])
        axes[0, column].set_title(name, fontsize=10, pad=6 + 9 * len(heights))
        axes[-1, column].set_xlabel("length L")
    handles = {}
    for axis in axes.flat:
        handles |= {
            label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    columns = 4 if len(panels) > 1 else 2
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(path, dpi=120)


def _lengths(rows: Sequence[dict]) -> list[int]:
    return sorted({row["shape"][2] for row in rows})


def _lines(axis, rows: Sequence[dict], quantity: str, heights: dict[str, int]) -> None:
    """One line an implementation; over the lengths that did not fit a cross above the frame, by
    the implementation's height in points, so that it is not taken for a value."""
    from matplotlib.transforms import ScaledTranslation

    lengths = _lengths(rows)
    for i, name in enumerate(dict.fromkeys(row["implementation"] for row in rows)):
        mine = [row for row in rows if row["implementation"] == name]
        points = sorted((r["shape"][2], r[quantity]) for r in mine if r.get(quantity) is not None)
        colour = COLOURS.get(name, OTHERS[i % len(OTHERS)])
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, lw=1.5, label=name)
        lost = [row["shape"][2] for row in mine if row["status"] == OUT_OF_MEMORY]
        if lost:
            scale = axis.figure.dpi_scale_trans
            axis.plot(
                lost,
                [1] * len(lost),
                "x",
                color=colour,
                ms=6,
                mew=2,
                clip_on=False,
                transform=axis.get_xaxis_transform()
                + ScaledTranslation(0, heights[name] / 72, scale),
                label=f"{name}: out of memory",
            )
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths], rotation=45, fontsize=8)
    _plain(axis)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _plain(axis) -> None:
    """A logarithmic ordinate with plain numbers at 1, 2 and 5; over many decades at 1 alone, within
    one at more."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    within = (1, 2, 3, 4, 5, 6, 8)
    subs = within if high / low < 10 else (1, 2, 5) if high / low < 1e6 else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(axis="y", labelsize=8)
