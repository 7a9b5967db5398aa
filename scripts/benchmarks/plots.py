"""Time and memory over the length, log-log, with a mark where memory ran out."""

from collections.abc import Sequence
from pathlib import Path

from .measure import OUT_OF_MEMORY

COLOURS = {"ours": "#0b6e99", "sdpa-math": "#c1440e", "flash": "#6b8e23", "cudnn": "#7a5195"}
OTHERS = ("#444444", "#d4a017", "#008b8b", "#c71585")
QUANTITIES = {"ms": "time (ms)", "mib": "peak memory (MiB)"}


def pictures(result: dict, stem: Path) -> dict[Path, tuple[str, list[dict]]]:
    """path -> (title, rows) for every (B, H, D) and dtype with three lengths or more."""
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        B, H, _, D = row["shape"]
        groups.setdefault((B, H, D, row["dtype"]), []).append(row)
    groups = {key: rows for key, rows in groups.items() if len(_lengths(rows)) >= 3}
    machine = result["environment"]["gpu"] or "CPU"
    found = {}
    for (B, H, D, dtype), rows in groups.items():
        suffix = "" if len(groups) == 1 else f"_{B}x{H}x{D}_{dtype}"
        title = f"B = {B}, H = {H}, D = {D}, {dtype}, {machine}"
        found[stem.with_name(f"{stem.name}{suffix}.png")] = (title, rows)
    return found


def draw(result: dict, stem: Path) -> list[Path]:
    """Draws all pictures of a result; the paths written."""
    found = pictures(result, stem)
    for path, (title, rows) in found.items():
        over_length(rows, path, title)
    return list(found)


def over_length(rows: Sequence[dict], path: Path, title: str) -> None:
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
    for column, (name, group) in enumerate(panels.items()):
        for line, quantity in enumerate(known):
            _lines(axes[line, column], group, quantity)
            axes[line, 0].set_ylabel(QUANTITIES[quantity])
        axes[0, column].set_title(name, fontsize=10)
        axes[-1, column].set_xlabel("length L")
    handles = {}
    for axis in axes.flat:
        handles |= {
            label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _lengths(rows: Sequence[dict]) -> list[int]:
    return sorted({row["shape"][2] for row in rows})


def _lines(axis, rows: Sequence[dict], quantity: str) -> None:
    """One line an implementation; a cross at the top edge over the lengths that did not fit."""
    lengths = _lengths(rows)
    for i, name in enumerate(dict.fromkeys(row["implementation"] for row in rows)):
        mine = [row for row in rows if row["implementation"] == name]
        points = sorted((r["shape"][2], r[quantity]) for r in mine if r.get(quantity) is not None)
        colour = COLOURS.get(name, OTHERS[i % len(OTHERS)])
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, lw=1.5, label=name)
        lost = [row["shape"][2] for row in mine if row["status"] == OUT_OF_MEMORY]
        if lost:
            axis.plot(
                lost,
                [0.96] * len(lost),
                "x",
                color=colour,
                ms=8,
                mew=2,
                transform=axis.get_xaxis_transform(),
                label=f"{name}: out of memory",
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(length) for length in lengths], rotation=45, fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
