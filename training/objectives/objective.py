"""What an objective is, for whoever trains with it.

objective.prepare(shape, num_classes)                before a run writes anything: files are read
objective.attach(net)                                once, before training: teachers are copied
sample = objective.draw(x, y, null_label, draws)     every random draw of the step happens here
terms  = objective.loss(net, sample)                 a pure function of tensors: this is compiled
objective.after_step(net)                            after the optimizer's step: teachers follow

What an objective keeps (a teacher, the number of steps) is part of the module's state and so of
every checkpoint.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from training.randomness import Draws
from training.validation import between


class Terms(NamedTuple):
    loss: torch.Tensor  # (), with gradient
    metrics: dict[str, torch.Tensor]  # scalars without gradient; "error" is the unweighted error
    errors: torch.Tensor | None = None  # (B,), of each sample, in the order of sample.t


class Net(Protocol):
    def __call__(
        self, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, y: torch.Tensor, /
    ) -> torch.Tensor: ...


class Objective(nn.Module):
    teaches_velocity = False  # u(z, t, t) becomes the velocity of the linear path

    def prepare(self, shape: tuple[int, ...], num_classes: int) -> None:
        """Called once, before a run writes anything, with the shape (C, H, W) of the data: what
        comes from files is read, and refused where it does not fit.
        """

    def attach(self, net: nn.Module) -> None:
        """Called once, with the network at its initialisation."""

    def start(self, weight: torch.Tensor) -> None:
        """Called when training starts (or resumes), not when a checkpoint is only sampled from;
        ``weight`` is one of the network's, on its device and in its precision.
        """

    def draw(self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws) -> Any:
        """The noisy batch of images x (B, C, H, W) and labels y (B,)."""
        raise NotImplementedError

    def loss(self, net: Any, sample: Any) -> Terms:
        raise NotImplementedError

    def after_step(self, net: nn.Module) -> None:
        """Called after every step of the optimizer."""


class ScheduledObjective(Objective):
    """An objective that changes with the number of optimizer steps taken, ``steps``."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def after_step(self, net: nn.Module) -> None:
        self.steps += 1

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state


def check_label_dropout(share: float, guidance: str = "") -> None:
    """``guidance``: the setting that asks the network without a label, if there is one."""
    between("objective.label_dropout", share, 0, 1)
    if guidance and share == 0:
        raise ValueError(
            f"objective.label_dropout must be > 0 with {guidance}: the network is asked without a"
            " label, which it does not learn otherwise; got 0 (0.1 is usual)"
        )


def drop_labels(
    y: torch.Tensor, share: float, null_label: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B,) with a random share replaced by the null label, and which ones were, (B,). What
    else comes with a label, (B, 1 + n), is kept.
    """
    dropped = torch.rand(len(y), generator=generator, device=y.device) < share
    if y.ndim == 1:
        return torch.where(dropped, null_label, y), dropped
    label = torch.where(dropped, null_label, y[:, 0])
    return torch.cat([label[:, None], y[:, 1:]], dim=1), dropped
