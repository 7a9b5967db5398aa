"""What a reader of README.md sees first: three lines and a picture of attention and of a training
step, ours beside SDPA's, all of one kind of GPU; and the tables of training steps."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import report
from .measure import OUT_OF_MEMORY
from .plots import COLOURS, Draw

TARGETS = Path("docs/results/targets_h100.json")
STEP = Path("docs/results/step_h100.json")
STEPS = (STEP, Path("docs/results/step_h200.json"))  # the columns of docs/training/performance.md
PICTURE = Path("docs/results/headline.png")
WORKLOADS = ("long_4k_128", "long_8k_64", "long_16k_128")
OURS, MATH = "ours", "sdpa-math"
HALF = "residual_in_fp32=false"
B2, XL2, LONG = (
    f"{name}, {HALF}"
    for name in ("DiT-B/2, 256 tokens", "DiT-XL/2, 256 tokens", "DiT-B/2, 1024 tokens")
)
B2_SDPA, XL2_SDPA, LONG_SDPA = (f"{name}, attention=sdpa" for name in (B2, XL2, LONG))


def lines(root: Path) -> list[str]:
    """The block's parts; none where a result file is absent."""
    if not (root / TARGETS).exists() or not (root / STEP).exists():
        return []
    targets, step = _load(root, TARGETS), _load(root, STEP)
    pairs = _pairs(targets)
    first, second = pairs[WORKLOADS[0]], pairs[WORKLOADS[1]]
    back = _pairs(targets, "full")[WORKLOADS[0]]
    b2, xl2, gpu = step[B2], step[XL2], targets["environment"]["gpu"]
    if b2["environment"]["gpu"] != gpu:
        raise ValueError(
            f"{TARGETS.name} is of one {gpu}, {STEP.name} of one {b2['environment']['gpu']}: the"
            " headline is of one kind of GPU; name a step file of the same in headline.py"
        )
    bullets = (
        f"**Attention, forward + JVP: {_ratio(first, 'ms')}x faster and"
        f" {_ratio(first, 'mib')}x less memory** than SDPA at (B, H, L, D) ="
        f" {report.shape(first[OURS])}, {_ratio(second, 'ms')}x and {_ratio(second, 'mib')}x at"
        f" {report.shape(second[OURS])}. The backward at the first: {_ratio(back, 'ms')}x and"
        f" {_ratio(back, 'mib')}x.",
        f"**A whole MeanFlow step of DiT-B/2: {_gain(step, B2, B2_SDPA)}x faster at 256"
        f" tokens, {_gain(step, LONG, LONG_SDPA)}x at 1024**, both in"
        f" this trainer, compiled and as a CUDA graph. {b2['images_per_s']:,.0f} images/s,"
        f" {b2['mfu']:.0%} of the GPU's peak (MFU). DiT-XL/2: {_gain(step, XL2, XL2_SDPA)}x,"
        f" {xl2['images_per_s']:.0f} images/s, {xl2['mfu']:.0%}. All with a residual stream in"
        " bfloat16, ours and SDPA's.",
    )
    return [
        f"![Time, memory and training throughput beside SDPA]({PICTURE})",
        f"On one {gpu}, in bfloat16 ([{TARGETS.name}]({TARGETS}), [{STEP.name}]({STEP})):",
        "\n".join(f"- {bullet}" for bullet in bullets),
        "SDPA is PyTorch's `MATH` backend, its only one with a forward derivative. It multiplies in"
        " float32. Memory is what a call takes beyond its inputs.",
    ]


def _gain(step: dict, ours: str, sdpa: str) -> str:
    return f"{step[sdpa]['step_ms'] / step[ours]['step_ms']:.2f}"


STEP_COLUMNS: report.Columns = {
    "step, bfloat16": lambda r: r["name"],
    "batch": lambda r: str(r["batch"]),
    "images/s": lambda r: f"{r['images_per_s']:,.0f}",
    "ms": lambda r: report.number(r["step_ms"]),
    "MFU": lambda r: f"{r['mfu']:.1%}",
    "first step, s": lambda r: report.number(r["first_step_s"]),
    "GiB reserved": lambda r: report.number(r["reserved_mib"] / 1024),
}


def steps(root: Path) -> list[str]:
    """README's table of training steps; none where the result file is absent."""
    if not (root / STEP).exists():
        return []
    rows = [row | {"name": name} for name, row in _load(root, STEP).items()]
    return [
        f"**A training step** on one {rows[0]['environment']['gpu']}: forward, backward and"
        " optimizer. Blocks are compiled and the step is a CUDA graph, except with"
        " `compile=false`. The objective is MeanFlow where the row names none."
        " `residual_in_fp32=false` keeps the residual stream in bfloat16"
        f" ([{STEP.name}]({STEP})).",
        report.markdown(report.cells(STEP_COLUMNS, rows)),
    ]


def steps_by_gpu(root: Path) -> list[str]:
    """The table of docs/training/performance.md: the steps of every file side by side."""
    files = {path: _load(root, path) for path in STEPS if (root / path).exists()}
    columns: report.Columns = {"step": lambda r: r["name"], "batch": lambda r: str(r["batch"])}
    for path, found in files.items():
        gpu = _short(next(iter(found.values()))["environment"]["gpu"])
        for title, key, write in (
            ("ms", "step_ms", report.number),
            ("images/s", "images_per_s", "{:,.0f}".format),
            ("MFU", "mfu", "{:.1%}".format),
        ):
            columns[f"{gpu}: {title}"] = partial(_cell, path, key, write)
    rows: dict[str, dict] = {}
    for path, found in files.items():
        for name, row in found.items():
            rows.setdefault(name, {"name": name, "batch": row["batch"]})[path] = row
    groups = [_group(name) for name in rows]
    ordered = sorted(rows.values(), key=lambda row: groups.index(_group(row["name"])))
    return [report.markdown(report.cells(columns, ordered))] if rows else []


def _group(name: str) -> list[str]:
    """Model and tokens."""
    return name.split(", ")[:2]


def _cell(path: Path, key: str, write: Callable[[float], str], row: dict) -> str:
    return write(row[path][key]) if path in row else ""


def _short(gpu: str) -> str:
    return gpu.removeprefix("NVIDIA ").split()[0]


def pictures(root: Path) -> dict[Path, Draw]:
    """path -> what draws it."""
    if not (root / TARGETS).exists() or not (root / STEP).exists():
        return {}
    return {root / PICTURE: partial(_draw, _load(root, TARGETS), _load(root, STEP))}


def _load(root: Path, path: Path) -> dict:
    return json.loads((root / path).read_text())


def _pairs(targets: dict, name: str = "jvp") -> dict[str, dict[str, dict]]:
    """workload -> implementation -> its row of this pass, by default the forward with JVP."""
    pairs: dict[str, dict[str, dict]] = {workload: {} for workload in WORKLOADS}
    for row in targets["rows"]:
        if row["workload"] in pairs and row["pass"] == name:
            pairs[row["workload"]][row["implementation"]] = row
    return pairs


def _ratio(pair: dict[str, dict], key: str) -> str:
    return f"{pair[MATH][key] / pair[OURS][key]:.0f}"


def _draw(targets: dict, step: dict, path: Path) -> None:
    """Three panels of bars; a bar that ran out of memory is said, not drawn."""
    from matplotlib.figure import Figure

    pairs = list(_pairs(targets).values())
    gpu = _short(targets["environment"]["gpu"])
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    times, memory, steps = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for axis, key, unit in ((times, "ms", "ms"), (memory, "mib", "MiB")):
        for offset, name, label in ((-0.2, OURS, "flash-jvp"), (0.2, MATH, "SDPA (MATH)")):
            heights = [pair[name].get(key) or 0 for pair in pairs]
            places = [i + offset for i in range(len(pairs))]
            bars = axis.bar(places, heights, 0.38, color=COLOURS[name], label=label)
            texts = [f"{height:,.3g}" if height < 1000 else f"{height:,.0f}" for height in heights]
            lost = [pair[name]["status"] == OUT_OF_MEMORY for pair in pairs]
            texts = ["" if gone else text for text, gone in zip(texts, lost, strict=True)]
            axis.bar_label(bars, texts, fontsize=7, padding=1)
            for place, gone in zip(places, lost, strict=True):
                if gone:
                    axis.annotate(
                        "out of memory",
                        (place, 0.02),
                        xycoords=("data", "axes fraction"),
                        rotation=90,
                        ha="center",
                        fontsize=7,
                        color=COLOURS[name],
                    )
        axis.set_yscale("log")
        unit += ", logarithmic"
        axis.margins(y=0.15)
        axis.set_xticks(range(len(pairs)), [report.shape(p[OURS]) for p in pairs], fontsize=7)
        axis.set_ylabel(unit, fontsize=8)
    times.set_title(f"attention, value + tangent: time, {gpu}", fontsize=9)
    memory.set_title(f"attention, value + tangent: memory, {gpu}", fontsize=9)
    rates = [step[B2]["images_per_s"], step[B2_SDPA]["images_per_s"]]
    bars = steps.bar([0, 1], rates, 0.6, color=[COLOURS[OURS], COLOURS[MATH]])
    steps.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=8)
    steps.set_xticks([0, 1], ["flash-jvp", "SDPA (MATH)"], fontsize=8)
    steps.set_ylabel("images/s", fontsize=8)
    steps.set_title(f"MeanFlow step, DiT-B/2, {gpu}", fontsize=9)
    steps.margins(y=0.12)
    for axis in (times, memory, steps):
        axis.tick_params(axis="y", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    times.legend(fontsize=7, frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)
