"""The rows of a run: what is recorded in a step, written by the loggers when the device has it.

rows.begin(step)                    at its start
rows.record("train/loss", loss)     in it, as often as one likes
rows.end(trainer)                   once it is made: writes the row before, and hands in its own

Lightning's ``log`` reads a number as soon as a row is due, and copies each one that is not a tensor
to the GPU. Both wait for all that is queued there, and then the GPU waits for the host: 44 ms a row
on an H100. These rows are read one step later, when the next step is queued.
"""

from typing import Any

import torch
from lightning import LightningModule, Trainer

from training.distributed import Later


def rows_of(module: LightningModule) -> "Rows":
    """Those of a run's module, for callbacks."""
    return module.rows  # type: ignore[return-value]


def is_due(trainer: Trainer, step: int) -> bool:
    """Whether so many steps end with a row."""
    return step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


class Rows:
    """``values``: of the step at hand, numbers and tensors of one element; ``known``: the last row
    that was written.
    """

    def __init__(self) -> None:
        self.step = -1  # optimizer steps made before the one at hand
        self.values: dict[str, Any] = {}
        self.known: dict[str, float] = {}
        self.unwritten = False  # the step at hand is in no row
        self.handed: tuple[int, dict[str, Any]] | None = None  # step and values of a row to be read
        self.later = Later()

    def begin(self, step: int) -> None:
        if step != self.step:  # not another batch of the same step
            self.step, self.values = step, {}

    def record(self, name: str, value: Any) -> None:
        self.values[name] = value.detach() if isinstance(value, torch.Tensor) else float(value)
        self.unwritten = True

    def end(self, trainer: Trainer, last: bool = False) -> None:
        """Nothing where the step is not made, as when an error ends it, or is in a row already."""
        if trainer.global_step != self.step + 1 or not self.unwritten:
            return
        self.flush(trainer)
        if last or is_due(trainer, trainer.global_step):
            self._hand_in(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Whatever the interval, the last step has a row."""
        self.end(trainer, last=True)
        self.flush(trainer)

    def flush(self, trainer: Trainer) -> None:
        """Writes the row that was handed in and not written yet."""
        for numbers in self.later.flush():
            self._write(trainer, numbers)

    def _hand_in(self, trainer: Trainer) -> None:
        self.handed, self.unwritten = (self.step, dict(self.values)), False
        tensors = [x.float() for x in self.values.values() if isinstance(x, torch.Tensor)]
        for numbers in self.later(torch.stack(tensors)) if tensors else [[]]:
            self._write(trainer, numbers)

    def _write(self, trainer: Trainer, numbers: list[float]) -> None:
        (step, values), self.handed = self.handed, None  # type: ignore[misc]
        read, tensor = iter(numbers), torch.Tensor
        self.known = {k: next(read) if isinstance(v, tensor) else v for k, v in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(dict(self.known), step)
            logger.save()
