"""A teacher that follows the network: the exponential moving average of its weights."""

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedTeacher(nn.Module):
    """teacher ← β teacher + (1 - β) net after every step, β = min(decay, (1 + n) / (10 + n)).

    Called like the network, always in evaluation mode and without gradient; decay = 0 is the
    network itself.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.decay, self.updates = decay, 0
        self.train(False)

    def train(self, mode: bool = True) -> "AveragedTeacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.net(*args)

    @torch.no_grad()
    def follow(self, net: nn.Module) -> None:
        self.updates += 1
        beta = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [w.detach() for w in net.parameters()]
        get_ema_multi_avg_fn(beta)(list(self.net.parameters()), weights, self.updates)

    def get_extra_state(self) -> int:
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state


def attached(teacher: AveragedTeacher | None) -> Any:
    """The teacher, or a clear error where the objective was not told its network."""
    if teacher is None:
        raise RuntimeError("this objective has a teacher: call objective.attach(net) first")
    return teacher
