"""Shortcut models (arXiv 2410.12557): long jumps learn from two short ones. No derivative at all.

    z_t = (1 - t) x + t e,   v = e - x                                         (linear path)
    flow matching, most of the batch:      error = ‖u(z, t, t) - v‖²
    self-consistency, a jump of 2d:
        z' = z - d ū(z, t, t - d)
        error = ‖u(z, t, t - 2d) - (ū(z, t, t - d) + ū(z', t - d, t - 2d)) / 2‖²

2d is one of 1, 1/2, ..., 2/M, and t a multiple of it. Jumps of 1/M are taken along the velocity
u(z, t, t). ū is an average of the network's weights. z' and the targets are clipped.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from training.objectives.objective import Net, Objective, Terms, check_label_dropout, drop_labels
from training.objectives.paths import expand, linear_path
from training.objectives.teachers import AveragedTeacher, attached
from training.objectives.times import Times
from training.objectives.weighting import squared_error, velocity_error
from training.randomness import Draws
from training.renamed import keywords
from training.validation import between, one_of, positive_integer, switch


class ShortcutSample(NamedTuple):
    z: torch.Tensor  # (B, C, H, W)
    v: torch.Tensor  # (B, C, H, W)
    t: torch.Tensor  # (B,)
    r: torch.Tensor  # (B,), t - 2d for the first ``jumps`` samples, else t
    y: torch.Tensor  # (B,), dropped labels already replaced by the null label
    jumps: int  # of this batch: see ``randomness.Draws.count``


class Shortcut(Objective):
    """The shortcut objective.

    Args:
        consistency_share: share of the samples that learn long jumps, exact over batches,
            processes and accumulation (``randomness.Draws.count``).
        denoise_timesteps: M, a power of two: the number of the shortest jumps, by the name of the
            official code.
        teacher_decay: of the average ū.
        teacher_warmup: the average begins short; if false, with this decay, as published.
        reduce: ``sum`` or ``mean`` over the elements of a sample.
        time_sampler, time_mean, time_std: of flow matching, see ``times.Times``.
        label_dropout: share of the flow matching samples without label.
        clip: where a jump of the teacher arrives, and the target of a long jump, are kept within
            ± ``clip``, as in the official code; None does not.
    """

    teaches_velocity = True

    @keywords(finest="denoise_timesteps")
    def __init__(
        self,
        consistency_share: float = 0.125,
        denoise_timesteps: int = 128,
        teacher_decay: float = 0.999,
        reduce: str = "mean",
        time_sampler: str = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        label_dropout: float = 0.1,
        clip: float | None = 4.0,
        teacher_warmup: bool = False,
    ) -> None:
        super().__init__()
        between("objective.consistency_share", consistency_share, 0, 1)
        positive_integer("objective.denoise_timesteps", denoise_timesteps)
        if denoise_timesteps < 2 or denoise_timesteps & (denoise_timesteps - 1):
            raise ValueError(
                f"objective.denoise_timesteps must be a power of two >= 2; got {denoise_timesteps}"
            )
        between("objective.teacher_decay", teacher_decay, 0, 1, open_high=True)
        one_of("objective.reduce", reduce, ("sum", "mean"))
        check_label_dropout(label_dropout)
        if clip is not None:
            between("objective.clip", clip, 0, open_low=True)
        self.clip = math.inf if clip is None else clip
        self.consistency_share, self.reduce = consistency_share, reduce
        self.denoise_timesteps = denoise_timesteps
        self.times = Times(time_sampler, time_mean, time_std)
        self.teacher_decay, self.label_dropout = teacher_decay, label_dropout
        switch("objective.teacher_warmup", teacher_warmup)
        self.teacher_warmup = teacher_warmup
        self.teacher: AveragedTeacher | None = None

    def setup(self, net: nn.Module) -> None:
        self.teacher = AveragedTeacher(net, self.teacher_decay, self.teacher_warmup)

    def after_step(self, net: nn.Module) -> None:
        attached(self.teacher).follow(net)

    def sample(
        self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws
    ) -> ShortcutSample:
        n = draws.count(self.consistency_share, len(x))
        t = self.times.draw(len(x), generator=draws("times"))
        r = t.clone()
        jump, place = torch.rand(2, n, generator=draws("jumps"), device=x.device)
        halvings = self.denoise_timesteps.bit_length() - 1
        jumps = 2 ** (jump * halvings).floor()  # in a whole: 1 ... M/2
        t[:n] = (1 + (place * jumps).floor()) / jumps
        r[:n] = t[:n] - 1 / jumps
        e = torch.randn(x.shape, generator=draws("noise"), device=x.device)
        z, v = linear_path(x, e, t)
        null, _ = drop_labels(y, self.label_dropout, null_label, draws("labels"))
        return ShortcutSample(z, v, t, r, torch.cat([y[:n], null[n:]]), n)

    def loss(self, net: Net, sample: ShortcutSample) -> Terms:
        z, v, t, r, y, n = sample
        target = torch.cat([self._two_jumps(z[:n], t[:n], r[:n], y[:n]), v[n:]])
        prediction = net(z, t, r, y)
        error = squared_error(prediction, target, self.reduce)  # (B,)
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "v_loss": velocity_error(prediction[n:], v[n:], self.reduce),
                "consistency_error": error[:n].mean(),
            }
        return Terms(error.mean(), metrics, error.detach())

    @torch.no_grad()
    def _two_jumps(
        self, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """The average velocity over [r, t] of two jumps of the teacher."""
        teacher = attached(self.teacher)
        d = (t - r) / 2
        shortest = d < 1.5 / self.denoise_timesteps  # they are along the velocity
        seen = torch.where(shortest, 0, d)
        first = teacher(z, t, t - seen, y)
        arrival = (z - expand(d, z) * first).clamp(-self.clip, self.clip)
        second = teacher(arrival, t - d, t - d - seen, y)
        return ((first + second) / 2).clamp(-self.clip, self.clip)
