"""Continuous-time consistency models, sCM (arXiv 2410.11081), on the TrigFlow path.

    x_t = cos t x + sin t σ e                      f(x_t, t) = cos t x_t - sin t σ F(x_t / σ, t)
    dx/dt = cos t σ e - sin t x                                                 (training, sCT)
    dx/dt = the teacher's velocity                                          (distillation, sCD)
    F, dF = jvp(F, (x_t / σ, t), (cos t sin t dx/dt / σ, cos t sin t))      (rearranged, § 4.1)
    g     = -cos² t (σ F - dx/dt) - w (cos t sin t x_t + σ dF)          (cos t df/dt where w = 1)
    error = ‖g‖²
    loss  = λ(t) / e^s(t) ‖F - sg(F + g / (‖g‖ + c))‖² + s(t)                       (Algorithm 1)

or, with the warm-up of rCM (arXiv 2510.08431),

    g     = -cos t √(1 - w² sin² t) (σ F - dx/dt) - (w cos t sin t x_t + σ dF)

w is 0, the target of the denoiser, for some steps, then rises to 1. There the target of a low noise
level is built from the network's own derivative, unless w stays 0 below a time t_a, the anchor: f
is then the denoiser up to t_a, and constant along a path from there on. s is the learned
log-variance of the weighted error.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from training.objectives.objective import ScheduledObjective, Terms, drop_labels
from training.objectives.paths import expand, trig_path, trig_velocity
from training.objectives.tangents import Jvp
from training.objectives.teachers import FixedTeacher
from training.objectives.times import draw_angles
from training.objectives.weighting import squared_error
from training.randomness import Draws
from training.validation import between, integer, one_of


class SCMSample(NamedTuple):
    x_t: torch.Tensor  # (B, C, H, W)
    dxdt: torch.Tensor  # (B, C, H, W), of the sample's own x and e
    t: torch.Tensor  # (B,), in [0, π/2]
    y: torch.Tensor  # (B,), dropped labels already replaced by the null label
    dropped: torch.Tensor  # (B,), which labels were dropped
    null_label: torch.Tensor  # ()
    warmup: torch.Tensor  # (), the w of the tangent from the anchor on


class SCM(FixedTeacher, ScheduledObjective):
    """Consistency training, or distillation where there is a teacher.

    Args:
        jvp: how dF is computed (``tangents.Jvp``).
        teacher: loads a network trained on the linear path, called before the run begins; None is
            consistency training.
        teacher_guidance: scale w of v_∅ + w (v_y - v_∅), the teacher's velocity.
        sigma_data: standard deviation of the data, the path's σ.
        time_mean, time_std: of τ in t = arctan(e^τ / σ).
        denoiser_steps: w is 0 for so many steps: the training of a denoiser to start from.
        warmup_steps: the tangent's weight w then rises linearly over so many steps.
        warmup_form: ``scm`` or ``rcm``, the g of the two papers while w < 1. rCM's holds dF whole
            from the first step: it starts from a network that was trained (denoiser_steps 0).
        anchor: w is 0 where t < ``anchor``, always; 0 is none.
        reduce: ``mean``: ‖·‖² is the mean over the elements of a sample; ``sum``: their sum. Both
            in the error and where g is normalised.
        normalise: g / (‖g‖ + c) is the step towards the target; if false, g itself.
        c: of the normalisation.
        prior_weight: λ(t): ``none`` is 1, ``tan`` is 1 / (σ tan t).
        learned_variance: s(t) is ``net.log_variance``; if false, 0.
        label_dropout: share of samples without label.
    """

    one_pass = True

    def __init__(
        self,
        jvp: Jvp | None = None,
        teacher: Callable[[], nn.Module] | None = None,
        teacher_guidance: float = 1.0,
        sigma_data: float = 0.5,
        time_mean: float = -1.0,
        time_std: float = 1.4,
        denoiser_steps: int = 0,
        warmup_steps: int = 10_000,
        warmup_form: str = "scm",
        anchor: float = 0.0,
        reduce: str = "mean",
        normalise: bool = True,
        c: float = 0.1,
        prior_weight: str = "none",
        learned_variance: bool = True,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        between("objective.teacher_guidance", teacher_guidance, 0)
        between("objective.sigma_data", sigma_data, 0, open_low=True)
        between("objective.time_mean", time_mean, float("-inf"))
        between("objective.time_std", time_std, 0, open_low=True)
        for name, value in (("denoiser_steps", denoiser_steps), ("warmup_steps", warmup_steps)):
            integer(f"objective.{name}", value)
            between(f"objective.{name}", value, 0)
        one_of("objective.warmup_form", warmup_form, ("scm", "rcm"))
        between("objective.anchor", anchor, 0, math.pi / 2)
        one_of("objective.reduce", reduce, ("sum", "mean"))
        between("objective.c", c, 0, open_low=True)
        one_of("objective.prior_weight", prior_weight, ("none", "tan"))
        between("objective.label_dropout", label_dropout, 0, 1)
        self.jvp = (jvp or Jvp()).require_constant("sCM")
        self.distil(teacher, teacher_guidance)
        self.sigma_data, self.time_mean, self.time_std = sigma_data, time_mean, time_std
        self.denoiser_steps, self.warmup_steps = denoiser_steps, warmup_steps
        self.anchor, self.warmup_form = anchor, warmup_form
        self.reduce, self.normalise, self.c = reduce, normalise, c
        self.prior_weight, self.learned_variance = prior_weight, learned_variance
        self.label_dropout = label_dropout

    def sample(self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws) -> SCMSample:
        t = draw_angles(len(x), self.time_mean, self.time_std, self.sigma_data, draws("times"))
        e = torch.randn(x.shape, generator=draws("noise"), device=x.device)
        x_t, dxdt = trig_path(x, e, t, self.sigma_data)
        y, dropped = drop_labels(y, self.label_dropout, null_label, draws("labels"))
        warmup = x.new_full((), self._warmup())
        return SCMSample(x_t, dxdt, t, y, dropped, y.new_full((), null_label), warmup)

    def _warmup(self) -> float:
        steps = self.steps - self.denoiser_steps
        if steps < 0:
            return 0.0
        return min(1.0, steps / self.warmup_steps) if self.warmup_steps else 1.0

    def loss(self, net: nn.Module, sample: SCMSample) -> Terms:
        x_t, _, t, y, *_, warmup = sample
        sigma, dxdt = self.sigma_data, self._velocity(sample)
        cos, sin = expand(t.cos(), x_t), expand(t.sin(), x_t)
        t_t = t.cos() * t.sin()
        along = (cos * sin * dxdt / sigma, t_t, t_t, None)
        F, dF = self.jvp(net, (x_t / sigma, t, t, y), along)
        with torch.no_grad():
            w = expand(warmup * (t >= self.anchor), x_t)
            if self.warmup_form == "rcm":
                g = -cos * (1 - (w * sin) ** 2).clamp_min(0).sqrt() * (sigma * F - dxdt)
                g = g - (w * cos * sin * x_t + sigma * dF)
            else:
                g = -(cos**2) * (sigma * F - dxdt) - w * (cos * sin * x_t + sigma * dF)
            error = squared_error(g, torch.zeros_like(g), self.reduce)  # (B,)
            step = g / (expand(error.sqrt(), g) + self.c) if self.normalise else g
            target = F + step
        distance = squared_error(F, target, self.reduce)
        weight = torch.ones_like(t) if self.prior_weight == "none" else 1 / (sigma * t.tan())
        if self.learned_variance:
            s = net.log_variance(t)  # type: ignore[operator]
            loss, weight = (weight * torch.exp(-s) * distance + s).mean(), weight * torch.exp(-s)
        else:
            loss = (weight * distance).mean()
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "v_loss": squared_error(sigma * F, dxdt, self.reduce).mean(),
                "dudt_rms": dF.square().mean().sqrt(),
                "tangent_norm": g.flatten(1).norm(dim=1).mean(),
                "weight": weight.mean(),
                "tangent_weight": warmup.detach(),
            }
        return Terms(loss, metrics, error)

    @torch.no_grad()
    def _velocity(self, sample: SCMSample) -> torch.Tensor:
        """dx/dt: the sample's own, or the teacher's, guided for labels that were kept."""
        if self.load_teacher is None:
            return sample.dxdt
        if not self.teacher:
            raise RuntimeError(
                "distillation needs its teacher: call objective.on_fit_start(weight) first"
            )
        (teacher,) = self.teacher

        def velocity(z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            v = teacher(z, s, s, sample.y)
            if self.teacher_guidance == 1:
                return v
            null = teacher(z, s, s, sample.null_label.expand_as(sample.y))
            return null + self.teacher_guidance * (v - null)

        return trig_velocity(velocity, sample.x_t, sample.t, self.sigma_data)
