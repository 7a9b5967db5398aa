"""Non-finite steps are skipped, counted and logged; too many in a row end the run."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from training.distributed import Later, over_ranks
from training.private import foreach_norm
from training.rows import rows_of
from training.sharding import beside, whole
from training.validation import positive_integer


class Diverged(RuntimeError):
    """The run does not recover: its loss or gradient was not finite for too many steps in a row, or
    its error has grown too far (`divergence.py`)."""


class NonFiniteGuard(Callback):
    """Logs ``train/grad_norm`` and ``train/skipped``; stops after ``patience`` non-finite steps in
    a row.

    A step counts as non-finite by its gradient or by its loss: an infinite error can have weight 0
    and then a gradient of 0. A skipped step leaves weights and optimizer as they were; the learning
    rate goes on. All ranks skip together. A fused optimizer skips on the device, which is not kept
    waiting: the host counts one step later.
    """

    def __init__(self, patience: int = 10) -> None:
        positive_integer("callbacks.non_finite_guard.patience", patience)
        self.patience = patience
        self.skipped = self.in_a_row = 0
        self.losses: list[torch.Tensor] = []  # of the batches since the last step
        self.later = Later()

    def state_dict(self) -> dict[str, Any]:
        self._count(self.later.flush())
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        self.losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = whole(total_norm(gradients))
        finite = torch.isfinite(torch.stack([norm, *self.losses])).all()
        self.losses.clear()
        skip = over_ranks(1.0 - finite.float(), "max")
        if skips_on_device(optimizer):
            optimizer.found_inf = beside(skip, optimizer.param_groups[0]["params"][0])  # type: ignore[attr-defined]
            self._count(self.later(skip[None]))
        elif self._count([[float(skip)]]):
            for p in pl_module.parameters():
                p.grad = None  # the optimizer passes over parameters without gradient
        if self.in_a_row >= self.patience:
            raise Diverged(
                "the loss or its gradient was not finite (NaN or infinite) for"
                f" {self.in_a_row} steps in a row, up to step {trainer.global_step}; lower"
                " optimizer.lr, set trainer.gradient_clip_val, or use trainer.precision=32-true,"
                " then resume from the last checkpoint, if there is one"
            )
        rows = rows_of(pl_module)
        rows.record("train/grad_norm", norm)
        rows.record("train/skipped", self.skipped)

    def _count(self, known: list[list[float]]) -> bool:
        """Whether the last of these steps was skipped."""
        for (skip,) in known:
            self.skipped += bool(skip)
            self.in_a_row = self.in_a_row + 1 if skip else 0
        return bool(known and known[-1][0])


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of gradients of any dtypes, in float32: in 16 bits it would be rounded."""
    narrow = [g for g in gradients if g.itemsize == 2]
    norms = foreach_norm(narrow, torch.float32) if narrow else []
    wide = [g for g in gradients if g.itemsize > 2]
    return torch.nn.utils.get_total_norm([*norms, *wide])


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``found_inf``, a tensor, makes the optimizer's step do nothing."""
    on_gpu = any(p.is_cuda for group in optimizer.param_groups for p in group["params"])
    return on_gpu and all(group.get("fused") for group in optimizer.param_groups)
