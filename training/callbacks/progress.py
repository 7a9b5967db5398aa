"""Progress on the terminal."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import Progress, TextColumn

from training.progress import bar_of
from training.rows import rows_of

EVERY = 100  # steps between two lines of a run whose end is not a number of steps
FIELDS = "loss {loss:.4f}  error {error:.4f}"


def _lines(last: int) -> int:
    """Steps between two lines."""
    return max(1, last // 10) if last > 0 else EVERY


class RichProgress(ProgressBar):
    """A bar with the time of a step, loss and unweighted error; a line every tenth of the run (or
    every hundred steps, if it has no last one) where the output is not a terminal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console = Console()
        self.bar: Progress | None = None
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step: Any = pl_module.step
        if self.enabled and step.compile:
            graphs = ", then recorded as a CUDA graph" if step.cuda_graphs else ""
            self.console.print(f"compiling a block: the first step takes up to a minute{graphs}")
        if not self.enabled:
            return
        last = trainer.max_steps
        if not self.console.is_terminal:
            end = f"{last} steps" if last > 0 else "until its time is over"
            self.console.print(f"training: {end}, a line every {_lines(last)}", highlight=False)
            return
        self.bar = bar_of("training", self.console, TextColumn("{task.fields[text]}"))
        total = last if last > 0 else None
        self.task = self.bar.add_task("", total=total, completed=trainer.global_step, text="")
        self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = trainer.global_step, trainer.max_steps
        every = 10 if self.bar else _lines(last)
        if not self.enabled or (step % every and step != last) or outputs["means"] is None:
            return
        rows = rows_of(pl_module)
        if self.bar and rows.known and step != last:  # it moves often, and waits for no GPU
            found = {name: rows.known[f"train/{name}"] for name in ("loss", "error")}
        else:
            found = {name: float(outputs["means"][name]) for name in ("loss", "error")}
        ms = rows.values.get("perf/step_ms")
        text = (f"step {ms:.1f} ms  " if ms is not None else "") + FIELDS.format(**found)
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        else:
            of = f"{step}/{last}" if last > 0 else f"{step}"
            self.console.print(f"{of}  {text}", highlight=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
