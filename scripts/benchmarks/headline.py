"""What a reader of README.md sees first: three lines and a picture of attention and of a training
step, ours beside SDPA's, from targets_h100.json and step_h200.json."""

import json
from functools import partial
from pathlib import Path

from . import report
from .measure import OUT_OF_MEMORY
from .plots import COLOURS, Draw

TARGETS = Path("docs/results/targets_h100.json")
STEP = Path("docs/results/step_h200.json")
PICTURE = Path("docs/results/headline.png")
WORKLOADS = ("long_4k_128", "long_8k_64", "long_16k_128")
OURS, MATH = "ours", "sdpa-math"
B2, XL2 = "DiT-B/2, 256 tokens", "DiT-XL/2, 256 tokens"
B2_SDPA = "DiT-B/2, 256 tokens, attention=sdpa"
LONG, LONG_SDPA = "DiT-B/2, 1024 tokens", "DiT-B/2, 1024 tokens, attention=sdpa"


def lines(root: Path) -> list[str]:
    """The block's parts; none where a result file is absent."""
    if not (root / TARGETS).exists() or not (root / STEP).exists():
        return []
    targets, step = _load(root, TARGETS), _load(root, STEP)
    pairs = _pairs(targets)
    first, second = pairs[WORKLOADS[0]], pairs[WORKLOADS[1]]
    back = _pairs(targets, "full")[WORKLOADS[0]]
    b2, xl2, sdpa = step[B2], step[XL2], step[B2_SDPA]
    bullets = (
        f"**Attention, forward + JVP: {_ratio(first, 'ms')}x faster and"
        f" {_ratio(first, 'mib')}x less memory** than SDPA at (B, H, L, D) ="
        f" {report.shape(first[OURS])}, {_ratio(second, 'ms')}x and {_ratio(second, 'mib')}x at"
        f" {report.shape(second[OURS])}. The backward at the first: {_ratio(back, 'ms')}x and"
        f" {_ratio(back, 'mib')}x.",
        f"**A whole MeanFlow step of DiT-B/2: {sdpa['step_ms'] / b2['step_ms']:.2f}x faster at 256"
        f" tokens, {step[LONG_SDPA]['step_ms'] / step[LONG]['step_ms']:.2f}x at 1024**, both in"
        f" this trainer, compiled and as a CUDA graph. {b2['images_per_s']:,.0f} images/s,"
        f" {b2['mfu']:.0%} of the GPU's peak (MFU). DiT-XL/2: {xl2['images_per_s']:.0f} images/s,"
        f" {xl2['mfu']:.0%}.",
    )
    return [
        f"![Time, memory and training throughput beside SDPA]({PICTURE})",
        f"In bfloat16, attention on one {targets['environment']['gpu']}"
        f" ([{TARGETS.name}]({TARGETS})), the step on one {b2['environment']['gpu']}"
        f" ([{STEP.name}]({STEP})):",
        "\n".join(f"- {bullet}" for bullet in bullets),
        "SDPA is PyTorch's `MATH` backend, its only one with a forward derivative. Memory is what"
        " a call takes beyond its inputs.",
    ]


STEP_COLUMNS: report.Columns = {
    "MeanFlow step, bfloat16": lambda r: r["name"],
    "batch": lambda r: str(r["batch"]),
    "images/s": lambda r: f"{r['images_per_s']:,.0f}",
    "ms": lambda r: report.number(r["step_ms"]),
    "MFU": lambda r: f"{r['mfu']:.1%}",
    "first step, s": lambda r: report.number(r["first_step_s"]),
    "GiB": lambda r: report.number(r["reserved_mib"] / 1024),
}


def steps(root: Path) -> list[str]:
    """The table of training steps; none where the result file is absent."""
    if not (root / STEP).exists():
        return []
    rows = [row | {"name": name} for name, row in _load(root, STEP).items()]
    return [
        f"**A training step** on one {rows[0]['environment']['gpu']}, blocks compiled and the step"
        " a CUDA graph, forward, backward and optimizer. `residual_in_fp32=false` keeps the"
        f" residual stream in bfloat16 ([{STEP.name}]({STEP})).",
        report.markdown(report.cells(STEP_COLUMNS, rows)),
    ]


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
    names = [x["environment"]["gpu"] for x in (targets, step[B2])]
    gpus = [name.removeprefix("NVIDIA ").split()[0] for name in names]
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
    times.set_title(f"attention, value + tangent: time, {gpus[0]}", fontsize=9)
    memory.set_title(f"attention, value + tangent: memory, {gpus[0]}", fontsize=9)
    rates = [step[B2]["images_per_s"], step[B2_SDPA]["images_per_s"]]
    bars = steps.bar([0, 1], rates, 0.6, color=[COLOURS[OURS], COLOURS[MATH]])
    steps.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=8)
    steps.set_xticks([0, 1], ["flash-jvp", "SDPA (MATH)"], fontsize=8)
    steps.set_ylabel("images/s", fontsize=8)
    steps.set_title(f"MeanFlow step, DiT-B/2, {gpus[1]}", fontsize=9)
    steps.margins(y=0.12)
    for axis in (times, memory, steps):
        axis.tick_params(axis="y", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    times.legend(fontsize=7, frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)
