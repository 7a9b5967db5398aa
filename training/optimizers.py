"""Optimizers with their learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR

from training.validation import between, one_of


def adamw(
    parameters: Iterable[torch.nn.Parameter],
    max_steps: int,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup_steps: int = 0,
    fused: bool = True,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW whose rate rises linearly for ``warmup_steps``, then stays or falls to 0 as a half
    cosine.
    """
    between("optimizer.lr", lr, 0, open_low=True)
    between("optimizer.weight_decay", weight_decay, 0)
    between("optimizer.warmup_steps", warmup_steps, 0)
    one_of("optimizer.schedule", schedule, ("constant", "cosine"))
    if schedule == "cosine" and max_steps < 1:
        raise ValueError(
            f"optimizer.schedule=cosine needs trainer.max_steps >= 1; got {max_steps}"
            " (or choose optimizer.schedule=constant)"
        )

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        if schedule == "constant":
            return rise
        share = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return rise * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))

    beta1, beta2 = betas
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, fused=fused
    )
    return optimizer, LambdaLR(optimizer, factor)
