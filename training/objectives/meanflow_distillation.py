"""MeanFlow distilled from a teacher: the tangent is the teacher's velocity, not a sample's.

    v_T   = v_∅ + w (v_y - v_∅)                            the teacher's velocity at (z, t)
    u, du/dt = jvp(u, (z, t, r), (v_T, 1, 0))
    error = ‖u + (t - r) du/dt - v_T‖²                     the MeanFlow identity (arXiv 2505.13447)
    loss  = error / sg(error + c)^p

v_T is a function of (z, t), so that the error vanishes at the average velocity of the teacher's
flow: it is the square of a residual, not a regression to a noisy target. The loss therefore may
differentiate **through** du/dt (``jvp.mode=tangent_grad``, the default); in the other modes du/dt
is constant, as in MeanFlow. The guidance is in the student, which evaluates once a jump.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.objectives.meanflow import MeanFlow, MeanFlowSample
from training.objectives.objective import Net, Terms
from training.objectives.paths import expand
from training.objectives.tangents import Jvp
from training.objectives.teachers import FixedTeacher
from training.objectives.weighting import adaptive_weight, squared_error, velocity_error
from training.validation import between


class MeanFlowDistillation(FixedTeacher, MeanFlow):
    """MeanFlow with a teacher.

    Args:
        jvp: how du/dt is computed (``tangents.Jvp``).
        teacher: loads the network to distil, called when training starts.
        teacher_guidance: scale w.

    The others are MeanFlow's; it has no guidance of its own.
    """

    one_pass = False  # through the tangent too

    def __init__(
        self,
        teacher: Callable[[], nn.Module],
        jvp: Jvp | None = None,
        teacher_guidance: float = 1.0,
        **meanflow: Any,
    ) -> None:
        between("objective.teacher_guidance", teacher_guidance, 0)
        if given := {"omega", "kappa"} & meanflow.keys():
            raise TypeError(
                f"objective.{min(given)}: a distilled MeanFlow has its teacher's guidance; use"
                " objective.teacher_guidance"
            )
        super().__init__(**meanflow)
        self.distil(teacher, teacher_guidance, self.interval)
        self.jvp = jvp or Jvp("tangent_grad")

    def loss(self, net: Net, sample: MeanFlowSample) -> Terms:
        z, v, t, r, y, _, null_label, n = sample
        target = self.teacher_velocity(z, t, y, null_label)
        if n == len(z):
            dudt = step = z.new_zeros(1, 1)
            velocity = net(z, t, r, y)
        else:
            along = (target[n:], torch.ones_like(t[n:]), None, None)  # r and y are constants
            u, dudt = self.jvp(net, (z, t, r, y), along)
            step = expand((t - r)[n:], dudt) * dudt  # (B - n, ...)
            velocity = torch.cat([u[:n], u[n:] + step])  # u + (t - r) du/dt
        error = squared_error(velocity, target, self.reduce)  # (B,)
        weight = adaptive_weight(error, self.p, self.c)
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "v_loss": velocity_error(velocity[:n], v[:n], self.reduce),
                "dudt_rms": dudt.square().mean().sqrt(),
                "tangent_norm": step.flatten(1).norm(dim=1).mean(),
                "weight": weight.mean(),
            }
        return Terms((weight * error).mean(), metrics, error.detach())
