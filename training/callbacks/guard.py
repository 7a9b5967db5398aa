"""Non-finite steps are skipped, counted and logged; too many in a row end the run."""

import torch
from lightning import Callback, LightningModule, Trainer

from training.validation import positive_integer


class Diverged(RuntimeError):
    """The loss or its gradient was not finite for too many steps in a row."""


class Guard(Callback):
    """Logs ``train/grad_norm`` and ``train/skipped``; stops after ``patience`` non-finite steps in
    a row.

    A skipped step leaves weights and optimizer as they were; the learning rate goes on. After
    gradient synchronisation every rank sees the same norm, so all ranks skip together.
    """

    def __init__(self, patience: int = 10) -> None:
        positive_integer("callbacks.guard.patience", patience)
        self.patience = patience
        self.skipped = self.in_a_row = 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parameters = [p for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if torch.isfinite(norm):
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            for p in parameters:
                p.grad = None  # the optimizer passes over parameters without gradient
            if self.in_a_row >= self.patience:
                raise Diverged(
                    f"the gradient was not finite (NaN or infinite) for {self.in_a_row} steps in a "
                    f"row, up to step {trainer.global_step}; lower optimizer.lr, set "
                    "trainer.gradient_clip_val, or use trainer.precision=32-true, then resume from "
                    "the last checkpoint"
                )
        pl_module.log("train/grad_norm", norm)
        pl_module.log("train/skipped", float(self.skipped))
