"""Teachers: one that follows the network, the exponential moving average of its weights, and one
that was trained before and stays as it is.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.objectives.paths import expand
from training.renamed import methods
from training.sharding import local


class AveragedTeacher(nn.Module):
    """teacher ← β teacher + (1 - β) net after every step, β = min(decay, (1 + n) / (10 + n)), or
    the decay itself where there is no ``warmup``.

    Called like the network, always in evaluation mode and without gradient; decay = 0 is the
    network itself.
    """

    def __init__(self, net: nn.Module, decay: float, warmup: bool = True) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.train(False)

    def train(self, mode: bool = True) -> "AveragedTeacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.net(*args)

    @torch.no_grad()
    def follow(self, net: nn.Module) -> None:
        self.updates += 1
        beta = self.decay
        if self.warmup:
            beta = min(beta, (1 + self.updates) / (10 + self.updates))
        ours = [local(w) for w in self.net.parameters()]
        weights = [local(w.detach()) for w in net.parameters()]
        get_ema_multi_avg_fn(beta)(ours, weights, self.updates)

    def get_extra_state(self) -> int:
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state


def attached(teacher: AveragedTeacher | None) -> Any:
    """The teacher, or a clear error where the objective was not told its network."""
    if teacher is None:
        raise RuntimeError("this objective has a teacher: call objective.setup(net) first")
    return teacher


class FixedTeacher:
    """For objectives that distil a network u of the linear path: its velocity is u(z, t, t).

    It is loaded before the run begins and kept in a list, so that it is no part of the checkpoint.
    """

    def distil(
        self,
        load: Callable[[], nn.Module] | None,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """``load`` None: there is no teacher. ``guidance`` acts for t in the interval."""
        self.load_teacher, self.teacher_guidance, self.interval = load, guidance, interval
        self.teacher: list[nn.Module] = []

    def prepare(self, shape: tuple[int, ...], num_classes: int) -> None:
        """Before the run writes anything: another kind of data is refused (``load_flow`` says what
        the teacher was trained on).
        """
        if self.load_teacher is None:
            return
        self.teacher = [self.load_teacher()]
        ours = (tuple(shape), num_classes)
        theirs: Any = getattr(self.teacher[0], "trained_on", ours)
        if theirs != ours:
            raise ValueError(
                "objective.teacher.ckpt must be of a network for the data that is trained on,"
                f" images {ours[0]} of {ours[1]} classes; it is for images {theirs[0]} of"
                f" {theirs[1]} classes"
            )

    def on_fit_start(self, weight: torch.Tensor) -> None:
        if self.load_teacher is not None:
            (teacher,) = self.teacher or [self.load_teacher()]
            self.teacher = [teacher.to(weight).eval().requires_grad_(False)]

    @torch.no_grad()
    def teacher_velocity(
        self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor, null_label: torch.Tensor
    ) -> torch.Tensor:
        """v_∅ + w (v_y - v_∅), v_∅ where the label is dropped. z: (B, ...), t, y: (B,)"""
        if not self.teacher:
            raise RuntimeError(
                "distillation needs its teacher: call objective.on_fit_start(weight) first"
            )
        (teacher,) = self.teacher
        v = teacher(z, t, t, y)
        if self.teacher_guidance == 1:
            return v
        start, end = self.interval
        w = torch.where((t >= start) & (t <= end), self.teacher_guidance, 1.0)
        null = teacher(z, t, t, null_label.expand_as(y))
        return torch.lerp(null, v, expand(w.to(v), v))


methods(FixedTeacher)
