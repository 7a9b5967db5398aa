"""The run as one HTML page: result, curves, samples over time, configuration, environment."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from training.callbacks.summary import rows
from training.comparison import plots
from training.comparison.curves import TABLE
from training.comparison.statistics import smooth
from training.document import Block, Code, Heading, Pictures, Table, Text, page
from training.environment import environment
from training.validation import positive_integer

LOGARITHMIC = ("train/error", "train/grad_norm", "train/dudt_rms")
BY_TIMESTEP = "error_t/"  # the errors by time share a panel
Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (steps, values), (n,) each


class Page(Callback):
    """Writes ``directory/report.html`` at the end of a run, from the files that the run left there,
    and prints its path. ``pictures``: how many of the samples over time it shows at most.

    The page is one file: its pictures are inside, and it loads nothing.
    """

    def __init__(self, directory: str, pictures: int = 6) -> None:
        positive_integer("callbacks.page.pictures", pictures)
        self.directory, self.pictures = Path(directory), pictures

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(write_page(self.directory, self.pictures))


def write_page(run: Path, pictures: int = 6) -> Path:
    """The page of a run directory; what the run did not write is left out."""
    blocks: list[Block] = []
    summary = run / "summary.json"
    if summary.is_file():
        found = json.loads(summary.read_text())
        blocks += [Heading("Result"), Table(("what", "value"), rows(found))]
    if curves := read_curves(run / "metrics.csv"):
        text = "Faint: every logged step. Line: running mean."
        blocks += [Heading("Curves"), Text(text), Pictures(draw(curves, run / "curves"))]
    if over_time := evenly(sorted((run / "samples").glob("step_*.png")), pictures):
        shown = [(path, f"after {int(path.stem.split('_')[1])} steps") for path in over_time]
        text = "From the same noise, a class a column."
        blocks += [Heading("Samples"), Text(text), Pictures(shown)]
    blocks.append(Heading("Configuration"))
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    blocks.append(Text(f"Arguments: {' '.join(given) or 'none'}"))
    if (run / "config.yaml").is_file():
        blocks.append(Code("config.yaml", (run / "config.yaml").read_text(), "yaml"))
    about = [[name, "none" if value is None else value] for name, value in environment().items()]
    blocks += [Heading("Environment"), Table(("what", "value"), about)]
    path = run / "report.html"
    path.write_text(page(f"Run {run.name}", blocks))
    return path


def read_curves(path: Path) -> Curves:
    """Column -> (steps, values) where it has finite values."""
    if not path.is_file():
        return {}
    found: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name in TABLE or name.startswith(BY_TIMESTEP):
                    value = float(text) if text else math.nan
                    if math.isfinite(value):
                        found.setdefault(name, []).append((int(row["step"]) + 1, value))
    return {name: _arrays(points) for name, points in found.items()}


def _arrays(points: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values)


def draw(curves: Curves, folder: Path) -> list[tuple[Path, str]]:
    """A picture for each metric and one for the errors by time, each with its title."""
    by_timestep = {name: found for name, found in curves.items() if name.startswith(BY_TIMESTEP)}
    drawn = []
    for name, title in TABLE.items():
        if name in curves:
            figure = _panel({title: curves[name]}, name in LOGARITHMIC)
            drawn.append((plots.save(figure, folder / f"{name.split('/')[1]}.png"), title))
    if by_timestep:
        lines = {
            f"t {name.removeprefix(BY_TIMESTEP)}": found for name, found in by_timestep.items()
        }
        drawn.append(
            (plots.save(_panel(lines, True), folder / "error_by_time.png"), "error by time")
        )
    return drawn


def _panel(lines: Curves, logarithmic: bool) -> Figure:
    whole = plots.figure(4.2, 2.5)
    axis = whole.subplots()
    for label, (steps, values) in lines.items():
        mean = smooth(values, max(1, len(values) // 30))
        point = "o" if len(mean) == 1 else None  # a line through one is not seen
        (line,) = axis.plot(steps, mean, marker=point, lw=1.4, label=label)
        if len(lines) == 1:
            axis.plot(steps, values, color=line.get_color(), alpha=0.25, lw=0.8)
    if logarithmic and all((values > 0).any() for _, values in lines.values()):
        plots.logarithmic(axis)
    if len(lines) > 1:
        axis.legend(fontsize=7)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    return whole


def evenly(paths: list[Any], most: int) -> list[Any]:
    """At most so many of them, the last one included, at equal distances."""
    if len(paths) <= most:
        return paths
    places = np.linspace(len(paths) - 1, 0, most).round().astype(int)[::-1] if most > 1 else [-1]
    return [paths[i] for i in places]
