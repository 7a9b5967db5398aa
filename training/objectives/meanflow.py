"""MeanFlow (arXiv 2505.13447): the network learns the average velocity u over an interval [r, t].

    z_t = (1 - t) x + t e,   v = e - x                          (linear path)
    v_g = ω v + (1 - ω - κ) u(z, t, t | ∅) + κ u(z, t, t | y)
    u, du/dt = jvp(u, (z, t, r), (v_g, 1, 0))
    error = ‖u - sg(v_g - (t - r) du/dt)‖²                        (the MeanFlow identity)
    loss  = error / sg(error + c)^p                                 (adaptive weight)

For a share of the batch r := t: there the derivative is multiplied by 0, so it is not computed at
all.
"""

from typing import NamedTuple

import torch

from training.objectives.objective import Net, Objective, Terms, check_label_dropout, drop_labels
from training.objectives.paths import expand, linear_path
from training.objectives.tangents import Jvp
from training.objectives.times import Times
from training.objectives.weighting import adaptive_weight, squared_error, velocity_error
from training.randomness import Draws
from training.renamed import keywords
from training.validation import between, one_of


class MeanFlowSample(NamedTuple):
    z: torch.Tensor  # (B, C, H, W)
    v: torch.Tensor  # (B, C, H, W)
    t: torch.Tensor  # (B,)
    r: torch.Tensor  # (B,), equal to t for the first ``equal`` samples
    y: torch.Tensor  # (B,), dropped labels already replaced by the null label
    dropped: torch.Tensor  # (B,), which labels were dropped
    null_label: torch.Tensor  # ()
    equal: int  # of this batch: see ``randomness.Draws.count``


class MeanFlow(Objective):
    """The MeanFlow objective.

    Args:
        jvp: how du/dt is computed (``tangents.Jvp``).
        data_proportion: share of the samples with r = t, by the name of the official code (0.75 for
            ImageNet, 0.25 for CIFAR-10). Exact over batches, processes and accumulation
            (``randomness.Draws.count``).
        reduce: ``sum`` or ``mean`` over the elements of a sample; it changes what ``c`` means.
        p, c: of the adaptive weight; p = 0 is the plain squared error.
        time_sampler, time_mean, time_std: see ``times.Times``.
        r_mean, r_std: of a distribution of its own for the second of the two times, of which t is
            the later; null is the first one's.
        omega, kappa: guidance built into the target; ω = 1, κ = 0 is none; scale ω / (1 - κ).
        guidance_start, guidance_end: guidance acts for t in this interval.
        label_dropout: share of samples without label; their target is the plain v, and r = t.
    """

    teaches_velocity = one_pass = True
    dropped_keep_v = True  # the target of a sample without label is the plain v

    @keywords(equal_share="data_proportion")
    def __init__(
        self,
        jvp: Jvp | None = None,
        data_proportion: float = 0.75,
        reduce: str = "sum",
        p: float = 1.0,
        c: float = 1e-2,
        time_sampler: str = "logit_normal",
        time_mean: float = -0.4,
        time_std: float = 1.0,
        r_mean: float | None = None,
        r_std: float | None = None,
        omega: float = 1.0,
        kappa: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        one_of("objective.reduce", reduce, ("sum", "mean"))
        between("objective.data_proportion", data_proportion, 0, 1)
        between("objective.p", p, 0)
        between("objective.c", c, 0, open_low=True)
        between("objective.omega", omega, 0)
        between("objective.kappa", kappa, 0)
        between("objective.guidance_start", guidance_start, 0, 1)
        between("objective.guidance_end", guidance_end, guidance_start, 1)
        guided = abs(1 - omega - kappa) > 1e-9
        guidance = f"objective.omega={omega} objective.kappa={kappa}" if guided else ""
        check_label_dropout(label_dropout, guidance)
        self.jvp = (jvp or Jvp()).require_constant(type(self).__name__)
        self.times = Times(time_sampler, time_mean, time_std)
        self.r_times = None
        if r_mean is not None or r_std is not None:
            mean = time_mean if r_mean is None else r_mean
            self.r_times = Times(time_sampler, mean, time_std if r_std is None else r_std)
        self.data_proportion, self.reduce, self.p, self.c = data_proportion, reduce, p, c
        self.omega, self.kappa, self.interval = omega, kappa, (guidance_start, guidance_end)
        self.label_dropout = label_dropout

    def sample(
        self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws
    ) -> MeanFlowSample:
        equal = draws.count(self.data_proportion, len(x))
        t, r = self.times.draw_pairs(len(x), equal, draws("times"), self.r_times)
        e = torch.randn(x.shape, generator=draws("noise"), device=x.device)
        z, v = linear_path(x, e, t)
        y, dropped = self._drop(y, t, null_label, equal, draws("labels"))
        return MeanFlowSample(z, v, t, r, y, dropped, y.new_full((), null_label), equal)

    def _drop(
        self,
        y: torch.Tensor,
        t: torch.Tensor,
        null_label: int,
        equal: int,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return drop_labels(
            y, self.label_dropout, null_label, generator, equal, self.data_proportion
        )

    def loss(self, net: Net, sample: MeanFlowSample) -> Terms:
        z, _, t, r, y, *_ = sample
        v_g = self._guided_velocity(net, sample)

        n = sample.equal
        if n == len(z):
            dudt = tangent = v_g.new_zeros(1, 1)
            prediction, target = net(z, t, r, y), v_g
        else:
            v_rest = v_g[n:]
            along = (v_rest, torch.ones_like(t[n:]), None, None)  # r and y are constants
            prediction, dudt = self.jvp(net, (z, t, r, y), along)
            tangent = expand((t - r)[n:], dudt) * dudt  # (B - n, ...)
            target = torch.cat([v_g[:n], v_rest - tangent])

        error = squared_error(prediction, target, self.reduce)  # (B,)
        weight = adaptive_weight(error, self.p, self.c)
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "v_loss": velocity_error(prediction[:n], sample.v[:n], self.reduce),
                "dudt_rms": dudt.square().mean().sqrt(),
                "tangent_norm": tangent.flatten(1).norm(dim=1).mean(),
                "weight": weight.mean(),
            }
        return Terms((weight * error).mean(), metrics, error.detach())

    @torch.no_grad()
    def _guided_velocity(self, net: Net, sample: MeanFlowSample) -> torch.Tensor:
        """v_g; times outside the interval keep v, and so do dropped labels (MeanFlow)."""
        z, v, t, _, y, dropped, null_label, _ = sample
        if self.omega == 1 and self.kappa == 0:
            return v
        v_g = self.omega * v
        if (unconditional := 1 - self.omega - self.kappa) != 0:
            v_g = v_g + unconditional * net(z, t, t, null_label.expand_as(y))
        if self.kappa != 0:
            v_g = v_g + self.kappa * net(z, t, t, y)
        start, end = self.interval
        guided = (t >= start) & (t <= end)
        if self.dropped_keep_v:
            guided = guided & ~dropped
        return torch.where(expand(guided, v), v_g, v)
