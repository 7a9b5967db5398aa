"""Terminal velocity matching, TVM (arXiv 2511.19797): the velocity with which a jump ends.

    f(z, t, s) = z + (s - t) u(z, t, s)                     the jump from t to s <= t
    df/ds      = u + (s - t) du/ds,   u, du/ds = jvp(u, s, 1)
    terminal   = ‖df/ds - sg(ū(f, s, s))‖²                  it arrives with the marginal velocity,
    flow       = ‖u(z_s', s', s') - v‖²                     which flow matching teaches
    loss       = terminal + flow

The derivative is along the terminal time alone. The loss differentiates **through** it
(``jvp.mode=tangent_grad``); the other modes leave that gradient out, an ablation. ū is an average
of the network's weights.

With guidance ω, where the label was kept: flow matching is towards
ω v + (1 - ω) ū(z_s', s', s' | ∅), and both errors are divided by ω². Where it was dropped, ω is 1.
As published, the network is told ω (``told``, with ``model.guided=inverse``: it sees 1/ω, and u is
ω times what it gives); the unconditional velocity is asked with ω = 1.
"""

from typing import NamedTuple

import torch
from torch import nn

from training.objectives.objective import Net, Objective, Terms, check_label_dropout, drop_labels
from training.objectives.paths import expand, linear_path
from training.objectives.tangents import Jvp
from training.objectives.teachers import AveragedTeacher, attached
from training.objectives.times import Times
from training.objectives.weighting import squared_error
from training.randomness import Draws
from training.validation import between, one_of, switch


class TVMSample(NamedTuple):
    z: torch.Tensor  # (B, C, H, W), at t
    t: torch.Tensor  # (B,)
    s: torch.Tensor  # (B,), s <= t
    z_flow: torch.Tensor  # (B, C, H, W), at s'
    s_flow: torch.Tensor  # (B,)
    v: torch.Tensor  # (B, C, H, W)
    y: torch.Tensor  # (B,), dropped labels already replaced by the null label
    dropped: torch.Tensor  # (B,), which labels were dropped
    null_label: torch.Tensor  # ()
    guidance: torch.Tensor  # (B, 3): ω, 0, 1, as a network is told


class TVM(Objective):
    """The TVM objective.

    Args:
        jvp: how du/ds is computed (``tangents.Jvp``).
        reduce: ``sum`` or ``mean`` over the elements of a sample.
        time_sampler, time_mean, time_std: of s and s', see ``times.Times``.
        gap_sampler, gap_mean, gap_std: of t - s; s is drawn below 1 - gap.
        teacher_decay: of the average ū.
        teacher_warmup: the average begins short; if false, with this decay, as published.
        omega: guidance built into the target; 1 is none.
        told: the network has ω as a condition (``model.guided``), and sampling must name it.
        label_dropout: share of samples without label.
    """

    teaches_velocity = True

    def __init__(
        self,
        jvp: Jvp | None = None,
        reduce: str = "mean",
        time_sampler: str = "logit_normal",
        time_mean: float = -0.4,
        time_std: float = 1.0,
        gap_sampler: str = "logit_normal",
        gap_mean: float = -0.8,
        gap_std: float = 1.0,
        teacher_decay: float = 0.99,
        omega: float = 1.0,
        told: bool = False,
        label_dropout: float = 0.1,
        teacher_warmup: bool = False,
    ) -> None:
        super().__init__()
        one_of("objective.reduce", reduce, ("sum", "mean"))
        one_of("objective.gap_sampler", gap_sampler, ("uniform", "logit_normal"))
        between("objective.gap_mean", gap_mean, float("-inf"))
        between("objective.gap_std", gap_std, 0, open_low=True)
        between("objective.teacher_decay", teacher_decay, 0, 1, open_high=True)
        between("objective.omega", omega, 0, open_low=True)
        check_label_dropout(label_dropout, f"objective.omega={omega}" if omega != 1 else "")
        self.jvp, self.reduce = jvp or Jvp("tangent_grad"), reduce
        self.times = Times(time_sampler, time_mean, time_std)
        self.gap = Times(gap_sampler, gap_mean, gap_std)
        self.teacher_decay, self.omega, self.label_dropout = teacher_decay, omega, label_dropout
        switch("objective.teacher_warmup", teacher_warmup)
        switch("objective.told", told)
        self.told = told
        self.teacher_warmup = teacher_warmup
        self.teacher: AveragedTeacher | None = None

    def setup(self, net: nn.Module) -> None:
        self.teacher = AveragedTeacher(net, self.teacher_decay, self.teacher_warmup)

    def after_step(self, net: nn.Module) -> None:
        attached(self.teacher).follow(net)

    def sample(self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws) -> TVMSample:
        t, s = self.times.draw_gaps(len(x), self.gap, draws("times"))
        s_flow = self.times.draw(len(x), generator=draws("flow times"))
        e = torch.randn(x.shape, generator=draws("noise"), device=x.device)
        z, v = linear_path(x, e, t)
        z_flow, _ = linear_path(x, e, s_flow)
        y, dropped = drop_labels(y, self.label_dropout, null_label, draws("labels"))
        w = torch.where(dropped, 1.0, torch.full_like(t, self.omega))
        guidance = torch.stack([w, torch.zeros_like(w), torch.ones_like(w)], dim=1)
        null = y.new_full((), null_label)
        return TVMSample(z, t, s, z_flow, s_flow, v, y, dropped, null, guidance)

    def loss(self, net: Net, sample: TVMSample) -> Terms:
        z, t, s, z_flow, s_flow, v, y, *_ = sample
        teacher = attached(self.teacher)
        told = (sample.guidance,) if self.told else ()
        along = (None, None, torch.ones_like(s), None, *(None for _ in told))
        u, duds = self.jvp(net, (z, t, s, y, *told), along)
        step = expand(s - t, z)
        arrival = (z + step * u).detach()
        terminal = squared_error(u + step * duds, teacher(arrival, s, s, y, *told), self.reduce)
        prediction = net(z_flow, s_flow, s_flow, y, *told)
        flow = squared_error(prediction, self._guided_velocity(sample), self.reduce)
        errors = terminal + flow  # (B,)
        with torch.no_grad():
            metrics = {
                "error": errors.mean(),
                "terminal_error": terminal.mean(),
                "v_loss": squared_error(prediction, v, self.reduce).mean(),
                "dudt_rms": duds.square().mean().sqrt(),
                "tangent_norm": (step * duds).flatten(1).norm(dim=1).mean(),
            }
        weight = 1 + ~sample.dropped * (self.omega**-2 - 1)
        return Terms((weight * errors).mean(), metrics, errors.detach())

    @torch.no_grad()
    def _guided_velocity(self, sample: TVMSample) -> torch.Tensor:
        """What flow matching is towards; dropped labels keep v."""
        _, _, _, z, s, v, y, dropped, null_label, guidance = sample
        if self.omega == 1:
            return v
        told = (guidance.new_tensor([1, 0, 1]).expand_as(guidance),) if self.told else ()
        null = attached(self.teacher)(z, s, s, null_label.expand_as(y), *told)
        return torch.where(expand(dropped, v), v, self.omega * v + (1 - self.omega) * null)
