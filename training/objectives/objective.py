"""What an objective is, for whoever trains with it.

objective.prepare(shape, num_classes)                before a run writes anything: files are read
objective.setup(net)                                 once, before training: teachers are copied
objective.on_fit_start(weight)                       when training starts or resumes
sample = objective.sample(x, y, null_label, draws)   every random draw of the step happens here
terms  = objective.loss(net, sample)                 a pure function of tensors: this is compiled
objective.after_step(net)                            after the optimizer's step: teachers follow

What an objective keeps (a teacher, the number of steps) is part of the module's state and so of
every checkpoint.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from training.randomness import Draws
from training.renamed import methods
from training.validation import between

# Metrics of some samples of a batch only: NaN where it has none, and then in no mean.
OPTIONAL = ("v_loss", "consistency_error")


class Terms(NamedTuple):
    loss: torch.Tensor  # (), with gradient
    # Scalars without gradient: ``error`` is the unweighted error, ``v_loss`` that of the velocity,
    # ‖u(z, t, t) - v‖² with the sample's own v, where r = t.
    metrics: dict[str, torch.Tensor]
    errors: torch.Tensor | None = None  # (B,), of each sample, in the order of sample.t


class Net(Protocol):
    def __call__(
        self, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, y: torch.Tensor, /
    ) -> torch.Tensor: ...


class Objective(nn.Module):
    """A loss and the random numbers of its noisy batch. A subclass gives ``sample`` and ``loss``;
    the other methods are there to be overridden."""

    teaches_velocity = False  # u(z, t, t) becomes the velocity of the linear path
    one_pass = False  # the loss is differentiated through one pass of the network, no tangent

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        methods(cls)

    def prepare(self, shape: tuple[int, ...], num_classes: int) -> None:
        """Called once, before a run writes anything, with the shape (C, H, W) of the data: what
        comes from files is read, and refused where it does not fit.
        """

    def setup(self, net: nn.Module) -> None:
        """Called once, with the network at its initialisation."""

    def on_fit_start(self, weight: torch.Tensor) -> None:
        """Called when training starts (or resumes), not when a checkpoint is only sampled from;
        ``weight`` is one of the network's, on its device and in its precision.
        """

    def sample(self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws) -> Any:
        """The noisy batch of a loss.

        Args:
            x: images (B, C, H, W).
            y: labels (B,), integers; ``null_label`` is that of no class.
            draws: where all random numbers come from.

        Returns:
            A NamedTuple of tensors, which ``loss`` takes.
        """
        raise NotImplementedError

    def loss(self, net: Any, sample: Any) -> Terms:
        """A function of tensors alone, because it is compiled and captured in a CUDA graph.

        Args:
            net: (z (B, C, H, W), t (B,), r (B,), y (B,)) -> (B, C, H, W).
            sample: what ``sample`` returned.
        """
        raise NotImplementedError

    def after_step(self, net: nn.Module) -> None:
        """Called after every step of the optimizer."""


methods(Objective)


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
    y: torch.Tensor,
    share: float,
    null_label: int,
    generator: torch.Generator,
    first: int = 0,
    first_share: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B,) with a random share replaced by the null label, and which ones were, (B,). What
    else comes with a label, (B, 1 + n), is kept.

    ``first``: the dropped ones are among so many samples at the beginning, a share ``first_share``
    of all that are trained on, as long as these suffice. So do the official codes of MeanFlow and
    iMF: a sample without label teaches the velocity (r = t), no interval.
    """
    chance = torch.full((len(y),), share, device=y.device)
    if first_share < 1:
        chance[:first] = min(1.0, share / first_share) if first_share else 0.0
        chance[first:] = max(0.0, share - first_share) / (1 - first_share)
    dropped = torch.rand(len(y), generator=generator, device=y.device) < chance
    if y.ndim == 1:
        return torch.where(dropped, null_label, y), dropped
    label = torch.where(dropped, null_label, y[:, 0])
    return torch.cat([label[:, None], y[:, 1:]], dim=1), dropped
