"""α-Flow (arXiv 2510.20771): from flow matching (α = 1) to MeanFlow (α = 0) in the course of a run.

    Δ = t - r,   z' = z - αΔ v_g,   t' = t - αΔ                 a first step along the velocity
    target = α v_g + (1 - α) sg(u(z', t', r))                   then the network's own average
    error  = ‖u(z, t, r) - target‖²          (the target clipped where r < t and α > 0)
    loss   = α error / sg(error + c)^p       (1 in place of α where r = t)
    α      = 1 - sigmoid(γ (k - middle) / (end - start))        at step k, clamped at both ends

(target - u) / α tends to the MeanFlow identity v_g - (t - r) du/dt - u; at α = 0 the objective is
``MeanFlow``. Until then it needs no derivative, and at α = 1 no second evaluation either.

Labels are dropped inside the guidance interval, whatever r is, and the target there is the
unconditional one, ω v + (1 - ω) u(z, t, t | ∅): the official code drops before it guides.
"""

import math
from typing import Any, NamedTuple

import torch

from training.objectives.meanflow import MeanFlow, MeanFlowSample
from training.objectives.objective import Net, ScheduledObjective, Terms, drop_labels
from training.objectives.paths import expand
from training.objectives.tangents import Jvp
from training.objectives.weighting import adaptive_weight, squared_error, velocity_error
from training.randomness import Draws
from training.renamed import keywords
from training.validation import between, integer


class AlphaFlowSample(NamedTuple):
    pair: MeanFlowSample
    alpha: torch.Tensor  # ()
    stage: str  # "flow" where α = 1, "between", "mean" where α = 0: what the step must compute

    @property
    def t(self) -> torch.Tensor:
        return self.pair.t


class AlphaFlow(MeanFlow, ScheduledObjective):
    """The α-Flow objective.

    Args:
        start, end: optimizer steps between which α falls.
        gamma: steepness of the fall.
        clamp: α below it is 0, above 1 - it is 1.
        clip: targets of r < t are kept within ± ``clip`` while α > 0; None does not.

    The others are MeanFlow's.
    """

    dropped_keep_v = False

    @keywords(equal_share="data_proportion")
    def __init__(
        self,
        jvp: Jvp | None = None,
        data_proportion: float = 0.25,
        reduce: str = "mean",
        c: float = 1e-3,
        start: int = 0,
        end: int = 1000,
        gamma: float = 25.0,
        clamp: float = 0.005,
        clip: float | None = 4.0,
        **meanflow: Any,
    ) -> None:
        integer("objective.start", start)
        integer("objective.end", end)
        between("objective.start", start, 0)
        between("objective.end", end, start, open_low=True)
        between("objective.gamma", gamma, 0, open_low=True)
        between("objective.clamp", clamp, 0, 0.5)
        super().__init__(jvp, data_proportion, reduce, c=c, **meanflow)
        if clip is not None:
            between("objective.clip", clip, 0, open_low=True)
        self.clip = math.inf if clip is None else clip
        self.first, self.last, self.gamma, self.clamp = start, end, gamma, clamp

    @property
    def alpha(self) -> float:
        """α at the present step."""
        share = (self.steps - self.first) / (self.last - self.first) - 0.5
        alpha = 1 / (1 + math.exp(min(self.gamma * share, 100)))
        return 0.0 if alpha < self.clamp else 1.0 if alpha > 1 - self.clamp else alpha

    def sample(
        self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws
    ) -> AlphaFlowSample:
        pair = super().sample(x, y, null_label, draws)
        stage = {0.0: "mean", 1.0: "flow"}.get(self.alpha, "between")
        return AlphaFlowSample(pair, x.new_full((), self.alpha), stage)

    def _drop(
        self,
        y: torch.Tensor,
        t: torch.Tensor,
        null_label: int,
        equal: int,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = self.interval
        null, dropped = drop_labels(y, self.label_dropout, null_label, generator)
        dropped = dropped & (t >= start) & (t <= end)
        return torch.where(dropped if y.ndim == 1 else dropped[:, None], null, y), dropped

    def loss(self, net: Net, sample: AlphaFlowSample) -> Terms:
        pair, alpha, stage = sample
        if stage == "mean":
            terms = super().loss(net, pair)
            return terms._replace(metrics=terms.metrics | {"alpha": alpha})
        z, v, t, r, y, _, _, n = pair
        v_g = self._guided_velocity(net, pair)
        prediction = net(z, t, r, y)
        target = v_g[n:]  # where r < t; elsewhere v_g
        if stage == "between" and n < len(z):
            with torch.no_grad():
                step = alpha * (t - r)[n:]
                arrival = z[n:] - expand(step, z) * target
                average = net(arrival, t[n:] - step, r[n:], y[n:])
                target = alpha * target + (1 - alpha) * average
        target = torch.cat([v_g[:n], target.clamp(-self.clip, self.clip)])
        error = squared_error(prediction, target, self.reduce)  # (B,)
        weight = adaptive_weight(error, self.p, self.c)
        weight = torch.cat([weight[:n], alpha * weight[n:]])
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "v_loss": velocity_error(prediction[:n], v[:n], self.reduce),
                "weight": weight.mean(),
                "alpha": alpha,
            }
        return Terms((weight * error).mean(), metrics, error.detach())
