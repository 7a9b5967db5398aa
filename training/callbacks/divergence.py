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
        self.step = 0  # the last one of the window that was handed in

    def state_dict(self) -> dict[str, Any]:
        """A window that has just ended is judged before a checkpoint is written."""
        self._judge_known()
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs["means"] is not None:
            self.errors.append(outputs["means"]["error"])
        self._judge_known()
        if len(self.errors) < self.window:
            return
        errors, self.errors = over_ranks(torch.stack(self.errors), "mean"), []
        self.step = trainer.global_step
        for known in self.later(errors):
            self._judge(known)

    def _judge_known(self) -> None:
        """The window that ended with the step before, where a GPU computes."""
        for errors in self.later.flush():
            self._judge(errors)

    def _judge(self, errors: list[float]) -> None:
        finite = [error for error in errors if math.isfinite(error)]
        if not finite:
            return  # the guard's affair
        median = statistics.median(finite)
        if self.best is not None and median > self.factor * self.best:
            raise Diverged(
                f"the error (train/error) has grown to {median:.4g}, {median / self.best:.0f} times"
                f" its best, at step {self.step}; lower optimizer.lr, set"
                " trainer.gradient_clip_val, or raise callbacks.divergence.factor (now"
                f" {self.factor:g}), then resume from an earlier checkpoint"
            )
        self.best = median if self.best is None else min(self.best, median)
