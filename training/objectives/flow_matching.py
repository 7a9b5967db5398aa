"""Flow matching (arXiv 2210.02747; SiT, arXiv 2401.08740) on the linear path.

    z_t = (1 - t) x + t e,   v = e - x,   loss = ‖u(z_t, t, t | y) - v‖²

The network sees r = t: no interval, hence no derivative along the time, hence no JVP.
"""

from typing import NamedTuple

import torch

from training.objectives.objective import Net, Objective, Terms, check_label_dropout, drop_labels
from training.objectives.paths import linear_path
from training.objectives.times import Times
from training.objectives.weighting import squared_error
from training.randomness import Draws
from training.validation import one_of


class FlowMatchingSample(NamedTuple):
    z: torch.Tensor  # (B, C, H, W)
    v: torch.Tensor  # (B, C, H, W)
    t: torch.Tensor  # (B,)
    y: torch.Tensor  # (B,)


class FlowMatching(Objective):
    """Args: ``reduce`` sum or mean over the elements of a sample; ``time_*`` see ``Times``."""

    teaches_velocity = one_pass = True

    def __init__(
        self,
        reduce: str = "mean",
        time_sampler: str = "logit_normal",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        one_of("objective.reduce", reduce, ("sum", "mean"))
        check_label_dropout(label_dropout)
        self.reduce, self.label_dropout = reduce, label_dropout
        self.times = Times(time_sampler, time_mean, time_std)

    def sample(
        self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws
    ) -> FlowMatchingSample:
        t = self.times.draw(len(x), generator=draws("times"))
        e = torch.randn(x.shape, generator=draws("noise"), device=x.device)
        z, v = linear_path(x, e, t)
        y, _ = drop_labels(y, self.label_dropout, null_label, draws("labels"))
        return FlowMatchingSample(z, v, t, y)

    def loss(self, net: Net, sample: FlowMatchingSample) -> Terms:
        z, v, t, y = sample
        errors = squared_error(net(z, t, t, y), v, self.reduce)
        loss = errors.mean()
        error = loss.detach()
        return Terms(loss, {"error": error, "v_loss": error}, errors.detach())
