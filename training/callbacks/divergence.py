"""A run whose error explodes without ever being infinite is ended, not paid for."""

import math
import statistics
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from training.callbacks.non_finite_guard import Diverged
from training.distributed import Later, over_ranks
from training.validation import between, positive_integer


class Divergence(Callback):
    """Ends the run when the median unweighted error of ``window`` steps is more than ``factor``
    times the smallest such median so far.

    The weighted loss cannot tell: with p = 1 it is about 1 whatever happens.
    """

    def __init__(self, factor: float = 100.0, window: int = 50) -> None:
        between("callbacks.divergence.factor", factor, 1, open_low=True)
        positive_integer("callbacks.divergence.window", window)
        self.factor, self.window = factor, window
        self.best: float | None = None
        self.errors: list[torch.Tensor] = []  # of the window so far
        self.later = Later()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs["means"] is not None:
            self.errors.append(outputs["means"]["error"])
        self._judge_flushed(trainer)
        if len(self.errors) < self.window:
            return
        errors, self.errors = over_ranks(torch.stack(self.errors), "mean"), []
        for known in self.later(errors):
            self._judge(known, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Weights that diverged replace none that did not."""
        self._judge_flushed(trainer)

    def _judge_flushed(self, trainer: Trainer) -> None:
        for errors in self.later.flush():  # of the step before
            self._judge(errors, trainer.global_step)

    def _judge(self, errors: list[float], step: int) -> None:
        finite = [error for error in errors if math.isfinite(error)]
        if not finite:
            return  # the guard's affair
        median = statistics.median(finite)
        if self.best is not None and median > self.factor * self.best:
            raise Diverged(
                f"the error (train/error) has grown to {median:.4g}, {median / self.best:.0f} times"
                f" its best, at step {step}; lower optimizer.lr, set"
                " trainer.gradient_clip_val, or raise callbacks.divergence.factor (now"
                f" {self.factor:g}), then resume from an earlier checkpoint"
            )
        self.best = median if self.best is None else min(self.best, median)
