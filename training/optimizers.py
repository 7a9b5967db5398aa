"""Optimizers with their learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from training.kernels.adamw import AdamW
from training.validation import between, one_of, positive_integer, switch

SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")


def adamw(
    parameters: Iterable[torch.nn.Parameter],
    max_steps: int,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
    decay_steps: int = 10_000,
    fused: bool | None = None,
    half_weights: bool = True,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW; for the schedule see ``factor``. ``fused`` None is true. Without weight decay it is
    Adam. ``half_weights``: where they can be, see ``training.half_weights``.
    """
    options = _checked(lr, betas, eps, weight_decay)
    switch("optimizer.half_weights", half_weights)
    optimizer = AdamW(parameters, **options, fused=fused is not False, half_weights=half_weights)
    rate = factor(max_steps, schedule, warmup_steps, min_lr_ratio, decay_steps)
    return optimizer, Rate(optimizer, rate)


def radam(
    parameters: Iterable[torch.nn.Parameter],
    max_steps: int,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
    decay_steps: int = 10_000,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """RAdam (arXiv 1908.03265), its weight decay decoupled; for the schedule see ``factor``."""
    options = _checked(lr, betas, eps, weight_decay)
    optimizer = torch.optim.RAdam(parameters, **options, decoupled_weight_decay=True)
    rate = factor(max_steps, schedule, warmup_steps, min_lr_ratio, decay_steps)
    return optimizer, Rate(optimizer, rate)


def _checked(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> dict[str, Any]:
    between("optimizer.lr", lr, 0, open_low=True)
    between("optimizer.eps", eps, 0, open_low=True)
    between("optimizer.weight_decay", weight_decay, 0)
    if isinstance(betas, str | float | int) or len(betas) != 2:
        raise ValueError(f"optimizer.betas must be two numbers, as [0.9,0.95]; got {betas}")
    beta1, beta2 = betas
    for beta in (beta1, beta2):
        between("optimizer.betas", beta, 0, 1, open_high=True)
    return {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}


class Rate(LambdaLR):
    """A resumed run takes the ``optimizer.lr`` of its configuration, not its checkpoint's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"base_lrs": self.base_lrs})
        parts = (self.optimizer.param_groups, self.base_lrs, self.lr_lambdas)
        for group, lr, rate in zip(*parts, strict=True):
            group["lr"] = lr * rate(self.last_epoch)


def factor(
    max_steps: int, schedule: str, warmup_steps: int, min_lr_ratio: float, decay_steps: int
) -> Callable[[int], float]:
    """What the rate is multiplied by at each step. After a linear rise of ``warmup_steps``:

    constant      1
    cosine        half a cosine from 1 to ``min_lr_ratio`` at max_steps
    linear        a line from 1 to ``min_lr_ratio`` at max_steps
    inverse_sqrt  1 / sqrt(max(1, step / decay_steps)) (EDM2, arXiv 2312.02696)
    """
    between("optimizer.warmup_steps", warmup_steps, 0)
    between("optimizer.min_lr_ratio", min_lr_ratio, 0, 1)
    positive_integer("optimizer.decay_steps", decay_steps)
    one_of("optimizer.schedule", schedule, SCHEDULES)
    if schedule in ("cosine", "linear") and max_steps < 1:
        raise ValueError(
            f"optimizer.schedule={schedule} needs trainer.max_steps >= 1; got {max_steps}"
            " (or choose optimizer.schedule=constant)"
        )

    def fall(step: int) -> float:
        if schedule == "constant":
            return 1.0
        if schedule == "inverse_sqrt":
            return max(1.0, step / decay_steps) ** -0.5
        share = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        share = min(max(share, 0.0), 1.0)
        left = 1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return min_lr_ratio + (1 - min_lr_ratio) * left

    return lambda step: min(1.0, (step + 1) / (warmup_steps + 1)) * fall(step)
