"""Decoupled MeanFlow, DMF (arXiv 2510.24474): a flow model turned into a flow map.

    flow   = ‖u(z_τ, τ, τ) - v_g(z_τ, τ)‖²                         at a time τ of its own
    u, du/dt = jvp(u, (z_t, t, r), (v_g(z_t, t), 1, 0))
    map    = ‖u + (t - r) du/dt - v_g(z_t, t)‖²                    at t >= r
    loss   = ½ [log(flow + c) + log(map + c)]                      (a Cauchy loss of mean squares)

With a learned log-variance s(t, r), as published, each part is log(error / e^s + c) + s instead.

    v_g    = v_∅ + w (v_y - v_∅) of a teacher inside the interval, v_y outside; or, without teacher,
             v + ω (u(z, t, t | y) - u(z, t, t | ∅)) inside, the sample's v outside

Every image serves both parts, with different noise. τ, and the two times of which t is the later
and r the earlier one, have distributions of their own. Any network of two times will do; the
published one is a flow model whose last blocks see r in place of t.

With a teacher the target is a function of (z, t) and the loss may differentiate **through** du/dt
(``jvp.mode=tangent_grad``); as published du/dt is constant (``single``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from training.objectives.objective import Net, Objective, Terms, check_label_dropout, drop_labels
from training.objectives.paths import expand, linear_path
from training.objectives.tangents import Jvp
from training.objectives.teachers import FixedTeacher
from training.objectives.times import Times
from training.objectives.weighting import squared_error
from training.randomness import Draws
from training.validation import between, switch


class DMFSample(NamedTuple):
    z: torch.Tensor  # (B, C, H, W), at t
    v: torch.Tensor  # (B, C, H, W)
    t: torch.Tensor  # (B,)
    r: torch.Tensor  # (B,), r <= t
    z_flow: torch.Tensor  # (B, C, H, W), at τ
    v_flow: torch.Tensor  # (B, C, H, W)
    t_flow: torch.Tensor  # (B,), τ
    y: torch.Tensor  # (B,), dropped labels already replaced by the null label
    dropped: torch.Tensor  # (B,), which labels were dropped
    null_label: torch.Tensor  # ()


class DMF(FixedTeacher, Objective):
    """The DMF objective.

    Args:
        jvp: how du/dt is computed (``tangents.Jvp``); ``tangent_grad`` needs a teacher.
        teacher: loads a network to distil, called when training starts; None is training.
        teacher_guidance: scale w of the teacher.
        omega: ω of the network's own guidance; 0 is none.
        guidance_start, guidance_end: either guidance acts for times in this interval.
        c: of the Cauchy loss.
        learned_variance: s(t, r) is ``net.log_variance``; if false, 0.
        time_sampler: of all times, see ``times.Times``.
        flow_mean, flow_std, t_mean, t_std, r_mean, r_std: of τ and of the two other times.
        label_dropout: share of samples without label; their target is not guided.
    """

    teaches_velocity = True

    def __init__(
        self,
        jvp: Jvp | None = None,
        teacher: Callable[[], nn.Module] | None = None,
        teacher_guidance: float = 1.0,
        omega: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        c: float = 1e-2,
        time_sampler: str = "logit_normal",
        flow_mean: float = 0.0,
        flow_std: float = 1.0,
        t_mean: float = 0.4,
        t_std: float = 1.0,
        r_mean: float = -1.2,
        r_std: float = 1.0,
        label_dropout: float = 0.1,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        between("objective.teacher_guidance", teacher_guidance, 0)
        between("objective.omega", omega, 0)
        between("objective.guidance_start", guidance_start, 0, 1)
        between("objective.guidance_end", guidance_end, guidance_start, 1)
        between("objective.c", c, 0, open_low=True)
        if teacher is not None and omega:
            raise ValueError(
                "objective.omega must be 0 with a teacher, whose guidance is"
                f" objective.teacher_guidance; got {omega}"
            )
        check_label_dropout(label_dropout, f"objective.omega={omega}" if omega else "")
        self.jvp = jvp or Jvp("tangent_grad" if teacher is not None else "single")
        if teacher is None:
            self.jvp.require_constant("DMF without a teacher")
        self.distil(teacher, teacher_guidance, (guidance_start, guidance_end))
        self.omega, self.c = omega, c
        self.flow_times = Times(time_sampler, flow_mean, flow_std)
        self.t_times = Times(time_sampler, t_mean, t_std)
        self.r_times = Times(time_sampler, r_mean, r_std)
        switch("objective.learned_variance", learned_variance)
        self.label_dropout, self.learned_variance = label_dropout, learned_variance

    def sample(self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws) -> DMFSample:
        n, times = len(x), draws("times")
        first, second = (s.draw(n, generator=times) for s in (self.t_times, self.r_times))
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        t_flow = self.flow_times.draw(n, generator=draws("flow times"))
        e, e_flow = torch.randn(2, *x.shape, generator=draws("noise"), device=x.device)
        y, dropped = drop_labels(y, self.label_dropout, null_label, draws("labels"))
        pair, flow = linear_path(x, e, t), linear_path(x, e_flow, t_flow)
        return DMFSample(*pair, t, r, *flow, t_flow, y, dropped, y.new_full((), null_label))

    def loss(self, net: Any, sample: DMFSample) -> Terms:
        z, v, t, r, z_flow, v_flow, t_flow, y, dropped, null_label = sample
        told = y, dropped, null_label
        prediction = net(z_flow, t_flow, t_flow, y)
        flow_target = self._guided_velocity(net, z_flow, v_flow, t_flow, *told)
        flow = squared_error(prediction, flow_target, "mean")
        target = self._guided_velocity(net, z, v, t, *told)
        u, dudt = self.jvp(net, (z, t, r, y), (target, torch.ones_like(t), None, None))
        step = expand(t - r, z) * dudt
        error = squared_error(u + step, target, "mean")  # (B,)
        parts = self._cauchy(net, flow, t_flow, t_flow), self._cauchy(net, error, t, r)
        loss = (parts[0] + parts[1]) / 2
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "flow_error": flow.mean(),
                "v_loss": squared_error(prediction, v_flow, "mean").mean(),
                "dudt_rms": dudt.square().mean().sqrt(),
                "tangent_norm": step.flatten(1).norm(dim=1).mean(),
            }
        return Terms(loss.mean(), metrics, error.detach())

    def _cauchy(
        self, net: Any, error: torch.Tensor, t: torch.Tensor, r: torch.Tensor
    ) -> torch.Tensor:
        if not self.learned_variance:
            return (error + self.c).log()
        s = net.log_variance(t, r)
        return (error * torch.exp(-s) + self.c).log() + s

    @torch.no_grad()
    def _guided_velocity(
        self,
        net: Net,
        z: torch.Tensor,
        v: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        dropped: torch.Tensor,
        null_label: torch.Tensor,
    ) -> torch.Tensor:
        if self.load_teacher is not None:
            return self.teacher_velocity(z, t, y, null_label)
        if self.omega == 0:
            return v
        start, end = self.interval
        inside = expand((t >= start) & (t <= end) & ~dropped, v)
        gap = net(z, t, t, y) - net(z, t, t, null_label.expand_as(y))
        return torch.where(inside, v + self.omega * gap, v)
