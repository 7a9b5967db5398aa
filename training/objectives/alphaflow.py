"""α-Flow (arXiv 2510.20771): from flow matching (α = 1) to MeanFlow (α = 0) in the course of a run.

    Δ = t - r,   z' = z - αΔ v_g,   t' = t - αΔ                 a first step along the velocity
    target = α v_g + (1 - α) sg(u(z', t', r))                   then the network's own average
    error  = ‖u(z, t, r) - target‖²
    loss   = α error / sg(error + c)^p       (1 in place of α where r = t)
    α      = 1 - sigmoid(γ (k - middle) / (end - start))        at step k, clamped at both ends

(target - u) / α tends to the MeanFlow identity v_g - (t - r) du/dt - u; at α = 0 the objective is
``MeanFlow``. Until then it needs no derivative.
"""

import math
from typing import Any, NamedTuple

import torch

from training.objectives.meanflow import MeanFlow, MeanFlowSample
from training.objectives.objective import Net, ScheduledObjective, Terms
from training.objectives.paths import expand
from training.objectives.tangents import Jvp
from training.objectives.weighting import adaptive_weight, squared_error
from training.randomness import Draws
from training.validation import between, integer


class AlphaFlowSample(NamedTuple):
    pair: MeanFlowSample
    alpha: torch.Tensor  # ()
    discrete: bool  # α > 0

    @property
    def t(self) -> torch.Tensor:
        return self.pair.t


class AlphaFlow(MeanFlow, ScheduledObjective):
    """The α-Flow objective.

    Args:
        start, end: optimizer steps between which α falls.
        gamma: steepness of the fall.
        clamp: α below it is 0, above 1 - it is 1.

    The others are MeanFlow's.
    """

    def __init__(
        self,
        jvp: Jvp | None = None,
        equal_share: float = 0.25,
        reduce: str = "mean",
        c: float = 1e-3,
        start: int = 0,
        end: int = 1000,
        gamma: float = 25.0,
        clamp: float = 0.005,
        **meanflow: Any,
    ) -> None:
        integer("objective.start", start)
        integer("objective.end", end)
        between("objective.start", start, 0)
        between("objective.end", end, start, open_low=True)
        between("objective.gamma", gamma, 0, open_low=True)
        between("objective.clamp", clamp, 0, 0.5)
        super().__init__(jvp, equal_share, reduce, c=c, **meanflow)
        self.first, self.last, self.gamma, self.clamp = start, end, gamma, clamp

    @property
    def alpha(self) -> float:
        """α at the present step."""
        share = (self.steps - self.first) / (self.last - self.first) - 0.5
        alpha = 1 / (1 + math.exp(min(self.gamma * share, 100)))
        return 0.0 if alpha < self.clamp else 1.0 if alpha > 1 - self.clamp else alpha

    def draw(
        self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws
    ) -> AlphaFlowSample:
        pair = super().draw(x, y, null_label, draws)
        return AlphaFlowSample(pair, x.new_full((), self.alpha), self.alpha > 0)

    def loss(self, net: Net, sample: AlphaFlowSample) -> Terms:
        pair, alpha, discrete = sample
        if not discrete:
            terms = super().loss(net, pair)
            return terms._replace(metrics=terms.metrics | {"alpha": alpha})
        z, _, t, r, y, *_ = pair
        n = self._equal(len(z))
        v_g = self._guided_velocity(net, pair)
        step = alpha * (t - r)
        prediction = net(z, t, r, y)
        with torch.no_grad():  # where r = t the step is 0 and the target is v_g
            average = net(z - expand(step, z) * v_g, t - step, r, y)
            target = alpha * v_g + (1 - alpha) * average
            target = torch.cat([v_g[:n], target[n:]])
        error = squared_error(prediction, target, self.reduce)  # (B,)
        weight = adaptive_weight(error, self.p, self.c)
        weight = torch.cat([weight[:n], alpha * weight[n:]])
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "v_loss": squared_error(prediction, v_g, self.reduce).mean(),
                "weight": weight.mean(),
                "alpha": alpha,
            }
        return Terms((weight * error).mean(), metrics, error.detach())
