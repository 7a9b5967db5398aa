"""The error by time: where on the path from noise to data a network is good or bad."""

from itertools import pairwise
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from training.distributed import over_ranks
from training.rows import is_due, rows_of
from training.validation import between, positive_integer


class LossByTimestep(Callback):
    """Logs ``error_t/0.00-0.25`` and so on: the mean unweighted error of the samples whose time t
    is in the interval, over the steps since the row before; NaN where there was none.

    Args:
        number: of equal intervals of [0, end]; a time beyond ``end`` counts in the last one.
        end: the largest time, 1 on the linear path.

    An objective that does not give its errors and times sample by sample has none of these.
    """

    def __init__(self, number: int = 4, end: float = 1.0) -> None:
        positive_integer("callbacks.loss_by_timestep.number", number)
        between("callbacks.loss_by_timestep.end", end, 0, open_low=True)
        self.number, self.end = number, end
        edges = [end * i / number for i in range(number + 1)]
        self.names = [f"error_t/{a:.2f}-{b:.2f}" for a, b in pairwise(edges)]
        self.sums: torch.Tensor | None = None  # (2, number): errors and how many they are

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        errors, t = outputs["errors"], outputs["times"]
        if errors is None or t is None:
            return
        if self.sums is None:
            self.sums = torch.zeros(2, self.number, device=errors.device)
        interval = (t / self.end * self.number).long().clamp(0, self.number - 1)
        self.sums[0].index_add_(0, interval, errors.float())
        self.sums[1].index_add_(0, interval, torch.ones_like(errors, dtype=torch.float))
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and is_due(trainer, trainer.global_step):
            sums, counts = over_ranks(self.sums, "mean")
            rows = rows_of(pl_module)
            for name, mean in zip(self.names, sums / counts, strict=True):  # 0 / 0 is NaN
                rows.record(name, mean)
            self.sums.zero_()
