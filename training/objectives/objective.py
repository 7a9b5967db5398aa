"""What an objective is, for whoever trains with it.

sample = objective.draw(x, y, null_label, draws)     every random draw of the step happens here
terms  = objective.loss(net, sample)                 a pure function of tensors: this is compiled
"""

from typing import Any, NamedTuple, Protocol

import torch

from training.randomness import Draws


class Terms(NamedTuple):
    loss: torch.Tensor  # (), with gradient
    metrics: dict[str, torch.Tensor]  # scalars without gradient; "error" is the unweighted error


class Net(Protocol):
    def __call__(
        self, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, y: torch.Tensor, /
    ) -> torch.Tensor: ...


class Objective(Protocol):
    def draw(self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws) -> Any: ...

    def loss(self, net: Net, sample: Any) -> Terms: ...


def drop_labels(
    y: torch.Tensor, share: float, null_label: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels with a random share replaced by the null label, and which ones were. (B,), (B,)"""
    dropped = torch.rand(y.shape, generator=generator, device=y.device) < share
    return torch.where(dropped, null_label, y), dropped
