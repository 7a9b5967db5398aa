"""Improved MeanFlow, iMF (arXiv 2512.02012): the average velocity u through a loss on velocities.

    z_t = (1 - t) x + t e,   v = e - x                                        (linear path)
    v_g   = v + (1 - 1/w) (v_θ(z, t | y) - v_θ(z, t | ∅))       inside [t_min, t_max], else v
    u, du/dt = jvp(u, (z, t, r), (v_θ(z, t | y), 1, 0))
    V     = u + (t - r) sg(du/dt)
    error = ‖V - sg(v_g)‖²,   head_error = ‖v_θ - sg(v_g)‖²
    loss  = error / sg(error + c)^p + head_error / sg(head_error + c)^p

v_θ is the network's second head. The tangent is the network's own velocity, not the sample's v: V
is then a function of (z, t, r) alone and the loss an ordinary regression. The guidance w and its
interval are drawn for each sample and told the network, so that they are chosen when sampling.
"""

import math
from typing import Any, NamedTuple

import torch

from training.objectives.objective import Objective, Terms, check_label_dropout, drop_labels
from training.objectives.paths import expand, linear_path
from training.objectives.tangents import Jvp
from training.objectives.times import Times
from training.objectives.weighting import adaptive_weight, squared_error, velocity_error
from training.randomness import Draws
from training.renamed import keywords
from training.validation import between, one_of


class IMFSample(NamedTuple):
    z: torch.Tensor  # (B, C, H, W)
    v: torch.Tensor  # (B, C, H, W)
    t: torch.Tensor  # (B,)
    r: torch.Tensor  # (B,), equal to t for the first ``equal`` samples
    y: torch.Tensor  # (B,), dropped labels already replaced by the null label
    dropped: torch.Tensor  # (B,), which labels were dropped
    null_label: torch.Tensor  # ()
    guidance: torch.Tensor  # (B, 3): w, t_min, t_max
    label: torch.Tensor  # (B,), none dropped
    equal: int  # of this batch: see ``randomness.Draws.count``


class IMF(Objective):
    """The iMF objective; the network needs ``heads``.

    Args:
        jvp: how du/dt is computed (``tangents.Jvp``).
        data_proportion: share of the samples with r = t, exact over batches, processes and
            accumulation (``randomness.Draws.count``).
        reduce: ``sum`` or ``mean`` over the elements of a sample; it changes what ``c`` means.
        p, c: of the adaptive weights; p = 0 is the plain squared error.
        time_sampler, time_mean, time_std: see ``times.Times``.
        guidance_max: w has a density proportional to 1/w on [1, guidance_max]; 1 is no guidance,
            and the network is not told any.
        label_dropout: share of samples without label; their target is the plain v, and r = t.
    """

    teaches_velocity = one_pass = True

    @keywords(equal_share="data_proportion")
    def __init__(
        self,
        jvp: Jvp | None = None,
        data_proportion: float = 0.5,
        reduce: str = "sum",
        p: float = 1.0,
        c: float = 1e-2,
        time_sampler: str = "logit_normal",
        time_mean: float = -0.4,
        time_std: float = 1.0,
        guidance_max: float = 8.0,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        one_of("objective.reduce", reduce, ("sum", "mean"))
        between("objective.data_proportion", data_proportion, 0, 1)
        between("objective.p", p, 0)
        between("objective.c", c, 0, open_low=True)
        between("objective.guidance_max", guidance_max, 1)
        guidance = f"objective.guidance_max={guidance_max}" if guidance_max > 1 else ""
        check_label_dropout(label_dropout, guidance)
        self.jvp = (jvp or Jvp()).require_constant("iMF")
        self.times = Times(time_sampler, time_mean, time_std)
        self.data_proportion, self.reduce, self.p, self.c = data_proportion, reduce, p, c
        self.guidance_max, self.label_dropout = guidance_max, label_dropout

    def sample(self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws) -> IMFSample:
        n, equal = len(x), draws.count(self.data_proportion, len(x))
        t, r = self.times.draw_pairs(n, equal, draws("times"))
        e = torch.randn(x.shape, generator=draws("noise"), device=x.device)
        z, v = linear_path(x, e, t)
        of_labels, proportion = draws("labels"), self.data_proportion
        label, told = y, (self.label_dropout, null_label, of_labels, equal, proportion)
        y, dropped = drop_labels(y, *told)
        share, start, end = torch.rand(3, n, generator=draws("guidance"), device=x.device)
        start, end = start / 2, (1 + end) / 2
        start[:equal], end[:equal] = 0, 1  # flow matching samples are guided at every time
        w = torch.exp(share * math.log(self.guidance_max))
        guidance = torch.stack([w, start, end], dim=1)
        null = y.new_full((), null_label)
        return IMFSample(z, v, t, r, y, dropped, null, guidance, label, equal)

    def loss(self, net: Any, sample: IMFSample) -> Terms:
        z, _, t, r, y, _, _, guidance, _, n = sample
        told = (guidance,) if self.guidance_max > 1 else ()
        v_g, tangent = self._guided_velocity(net, sample)

        if n == len(z):
            dudt = step = v_g.new_zeros(1, 1)
            compound, head = net.heads(z, t, r, y, *told)
        else:
            along = (tangent[n:], torch.ones_like(t[n:]), None, None, *(None for _ in told))
            u, dudt, head = self.jvp.with_aux(net.heads, (z, t, r, y, *told), along)
            step = expand((t - r)[n:], dudt) * dudt  # (B - n, ...)
            compound = torch.cat([u[:n], u[n:] + step])  # V

        error = squared_error(compound, v_g, self.reduce)  # (B,)
        head_error = squared_error(head, v_g, self.reduce)
        weight = adaptive_weight(error, self.p, self.c)
        head_weight = adaptive_weight(head_error, self.p, self.c)
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "v_loss": velocity_error(compound[:n], sample.v[:n], self.reduce),
                "head_error": head_error.mean(),
                "dudt_rms": dudt.square().mean().sqrt(),
                "tangent_norm": step.flatten(1).norm(dim=1).mean(),
                "weight": weight.mean(),
            }
        loss = (weight * error + head_weight * head_error).mean()
        return Terms(loss, metrics, error.detach())

    @torch.no_grad()
    def _guided_velocity(self, net: Any, sample: IMFSample) -> tuple[torch.Tensor, torch.Tensor]:
        """v_g, and the network's velocity along which u is differentiated: that of the label, also
        where u is not told it. Each (B, C, H, W)
        """
        z, v, t, _, _, dropped, null_label, guidance, label, _ = sample
        if self.guidance_max == 1:
            return v, net.heads(z, t, t, label)[1]
        w, start, end = guidance.unbind(1)
        w = torch.where((t >= start) & (t <= end), w, 1)
        zero, one = torch.zeros_like(w), torch.ones_like(w)
        told = torch.cat([torch.stack([s, zero, one], 1) for s in (w, one)])
        twice = (torch.cat([a, a]) for a in (z, t, t))
        labels = torch.cat([label, null_label.expand_as(label)])
        conditional, null = net.heads(*twice, labels, told)[1].chunk(2)
        v_g = v + expand(1 - 1 / w, v) * (conditional - null)
        return torch.where(expand(dropped, v), v, v_g), conditional
