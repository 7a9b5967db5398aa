"""The end of a run, on the terminal and in summary.json."""

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from training.callbacks.sample_quality import SampleQuality
from training.callbacks.throughput import Throughput
from training.objectives.objective import OPTIONAL
from training.rows import rows_of
from training.whole_files import replaced

# summary.json's name of a metric -> its row in the table; LAST is of how many steps
LAST = "{last}"
ROWS = {
    "steps": "steps",
    "seconds": "seconds",
    "loss": "loss",
    "error": "error (unweighted)",
    "dudt_rms": "du/dt RMS",
    "step_ms": f"ms per step (median of the last {LAST})",
    "step_ms_p10": "... 10th percentile",
    "step_ms_p90": "... 90th percentile",
    "samples_per_s": f"samples per second (the last {LAST} steps)",
    "tflops": "useful TFLOP/s a device",
    "mfu": "... share of its peak (MFU)",
    "skipped": "steps skipped (not finite)",
    "sample_accuracy": "accuracy of samples (SVM)",
    "real_accuracy": "accuracy of held-out images (SVM)",
    "energy_distance": "energy distance of samples",
    "real_energy_distance": "energy distance of other data",
}


FROM_THE_LOG = (
    "perf/step_ms",
    "perf/step_ms_p10",
    "perf/step_ms_p90",
    "perf/samples_per_s",
    "perf/tflops",
    "perf/mfu",
    "train/skipped",
)


class Summary(Callback):
    """Means of loss and metrics over the last ``window`` steps, throughput and accuracy; seconds
    since the script began, those up to the checkpoint of a resumed run included.
    """

    def __init__(self, directory: str, window: int = 100) -> None:
        self.directory = Path(directory)
        self.history: deque[dict[str, torch.Tensor]] = deque(maxlen=window)
        self.start, self.before = time.perf_counter(), 0.0

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def state_dict(self) -> dict[str, Any]:
        history = [{k: float(v) for k, v in terms.items()} for terms in self.history]
        return {"history": history, "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict.get("seconds", 0.0)
        for terms in state_dict["history"]:
            self.history.append({name: torch.tensor(value) for name, value in terms.items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs["means"] is not None:  # a step, not one of the batches that it accumulates
            self.history.append(outputs["means"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.history:
            return
        now = rows_of(pl_module).known
        summary: dict[str, Any] = {
            "steps": trainer.global_step,
            "seconds": round(self.seconds(), 1),
        }
        for name in self.history[-1]:
            values = [float(terms[name]) for terms in self.history if name in terms]
            if name in OPTIONAL:
                values = [value for value in values if not math.isnan(value)] or [math.nan]
            summary[name] = sum(values) / len(values)
        for name in FROM_THE_LOG:
            if name in now:
                summary[name.split("/")[1]] = now[name]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SampleQuality):
                summary |= callback.result
            elif isinstance(callback, Throughput):
                summary["steps_timed"] = len(callback.durations)
        summary["seed"] = pl_module.seed
        summary["torch"] = torch.__version__
        summary["run_dir"] = str(self.directory)
        with replaced(self.directory / "summary.json") as temporary:
            temporary.write_text(strict_json(summary))

        table = Table(show_header=False)
        for row in rows(summary):
            table.add_row(*row)
        Console().print(table)
        print(f"written to {self.directory}")  # whole, however narrow the terminal


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, value) of what a summary has."""
    found, last = [], str(summary.get("steps_timed", "steps"))
    for name, title in ROWS.items():
        value = summary.get(name)
        if value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            text = f"{value:.1%}" if name.endswith("_accuracy") else text
            found.append((title.replace(LAST, last), text))
    return found


def strict_json(values: dict[str, Any]) -> str:
    """JSON that every reader takes: a number that is not finite is null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(finite, indent=2, allow_nan=False) + "\n"
