"""Self-distillation of flow maps (arXiv 2505.18825): Lagrangian, Eulerian and progressive.

    X(z, t, r) = z + (r - t) u(z, t, r)                  the jump from t to r <= t, the flow map
    v(z, t)    = u(z, t, t)                              the velocity is the map's own
    flow       = ‖v(z, t) - (e - x)‖²                    on a share of the batch
    map        = ‖residual‖²                             on the rest, with one of

    lagrangian    ∂X/∂r - v(X, r)             = u + (r - t) ∂u/∂r - sg(v(sg(X), r))
    eulerian      ∂X/∂t + (∂X/∂z) v           = v - u + (r - t) (∂u/∂t + (∂u/∂z) v)
    progressive   [X(z, t, r) - X(X(z, t, s), s, r)] / (r - t)
                                              = u(z, t, r) - sg(λ u(z, t, s) + (1 - λ) u(z_s, s, r))

All three vanish at the flow map and only there. The first two differentiate u, and the loss
differentiates **through** that derivative (``jvp.mode=tangent_grad``; the other modes leave it out,
an ablation). The Eulerian residual has a spatial derivative; ``stop_gradient=full`` holds it
constant, as the paper does for images, and ``convex`` holds only v constant.

With a learned log-variance s(t, r), as published, the loss of a sample is error / e^s + s.
"""

from typing import Any, NamedTuple

import torch

from training.objectives.objective import Net, Objective, Terms, check_label_dropout, drop_labels
from training.objectives.paths import expand, linear_path
from training.objectives.tangents import Jvp
from training.objectives.times import Times
from training.objectives.weighting import adaptive_weight, squared_error
from training.randomness import Draws
from training.renamed import keywords
from training.validation import between, one_of, switch

KINDS = ("lagrangian", "eulerian", "progressive")


class FlowMapSample(NamedTuple):
    z: torch.Tensor  # (B, C, H, W), at t
    v: torch.Tensor  # (B, C, H, W)
    t: torch.Tensor  # (B,)
    r: torch.Tensor  # (B,), equal to t for the first samples, the flow's
    split: torch.Tensor  # (B,), λ: the share of t - r that the first of two jumps takes
    y: torch.Tensor  # (B,), dropped labels already replaced by the null label
    equal: int  # of this batch: see ``randomness.Draws.count``


class FlowMap(Objective):
    """The self-distillation of a flow map.

    Args:
        jvp: how the derivatives are computed (``tangents.Jvp``); the progressive kind has none.
        kind: ``lagrangian``, ``eulerian`` or ``progressive``.
        stop_gradient: of the Eulerian kind, ``full`` or ``convex``, see above.
        split: of the progressive kind: the time between two jumps is ``uniform`` or ``midpoint``.
        data_proportion: share of the batch with r = t, where the velocity is learned.
        reduce: ``sum`` or ``mean`` over the elements of a sample.
        p, c: of the adaptive weight; p = 0 is the plain squared error.
        time_sampler, time_mean, time_std: of both times, see ``times.Times``.
        label_dropout: share of samples without label.
        learned_variance: s(t, r) is ``net.log_variance``; if false, 0. It replaces p and c.
    """

    teaches_velocity = True

    @keywords(equal_share="data_proportion")
    def __init__(
        self,
        jvp: Jvp | None = None,
        kind: str = "lagrangian",
        stop_gradient: str = "full",
        split: str = "uniform",
        data_proportion: float = 0.75,
        reduce: str = "mean",
        p: float = 0.0,
        c: float = 1e-2,
        time_sampler: str = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        label_dropout: float = 0.1,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        one_of("objective.kind", kind, KINDS)
        one_of("objective.stop_gradient", stop_gradient, ("full", "convex"))
        one_of("objective.split", split, ("uniform", "midpoint"))
        one_of("objective.reduce", reduce, ("sum", "mean"))
        between("objective.data_proportion", data_proportion, 0, 1)
        between("objective.p", p, 0)
        between("objective.c", c, 0, open_low=True)
        check_label_dropout(label_dropout)
        self.jvp = jvp or Jvp("tangent_grad")
        self.kind, self.stop_gradient, self.split = kind, stop_gradient, split
        self.times = Times(time_sampler, time_mean, time_std)
        self.data_proportion, self.reduce, self.p, self.c = data_proportion, reduce, p, c
        switch("objective.learned_variance", learned_variance)
        if learned_variance and p:
            raise ValueError(
                f"objective.p must be 0 with objective.learned_variance=true, which weighs already;"
                f" got {p}"
            )
        self.label_dropout, self.learned_variance = label_dropout, learned_variance

    def sample(
        self, x: torch.Tensor, y: torch.Tensor, null_label: int, draws: Draws
    ) -> FlowMapSample:
        n = draws.count(self.data_proportion, len(x))
        first, second = self.times.draw(2, len(x), generator=draws("times"))
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        t[:n] = r[:n] = first[:n]  # not the later of two
        split = torch.full_like(t, 0.5)
        if self.split == "uniform":
            split = torch.rand(len(x), generator=draws("split"), device=x.device)
        e = torch.randn(x.shape, generator=draws("noise"), device=x.device)
        z, v = linear_path(x, e, t)
        y, _ = drop_labels(y, self.label_dropout, null_label, draws("labels"))
        return FlowMapSample(z, v, t, r, split, y, n)

    def loss(self, net: Any, sample: FlowMapSample) -> Terms:
        z, v, t, r, _, y, n = sample
        parts, derivative = [], z.new_zeros(1)
        if n:
            parts.append(squared_error(net(z[:n], t[:n], t[:n], y[:n]), v[:n], self.reduce))
        if n < len(z):
            rest = FlowMapSample(*(part[n:] for part in sample[:-1]), equal=0)
            residual, derivative = getattr(self, f"_{self.kind}")(net, rest)
            parts.append(squared_error(residual, torch.zeros_like(residual), self.reduce))
        error = torch.cat(parts)  # (B,)
        if self.learned_variance:
            s = net.log_variance(t, r)
            weight, price = torch.exp(-s), s
        else:
            weight, price = adaptive_weight(error, self.p, self.c), torch.zeros_like(error)
        with torch.no_grad():
            metrics = {
                "error": error.mean(),
                "v_loss": error[:n].mean(),
                "map_error": error[n:].mean() if n < len(z) else error.new_zeros(()),
                "dudt_rms": derivative.square().mean().sqrt(),
                "weight": weight.mean(),
            }
        return Terms((weight * error + price).mean(), metrics, error.detach())

    def _lagrangian(self, net: Net, part: FlowMapSample) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual, and the derivative of u in it. Each (B, C, H, W)"""
        z, _, t, r, _, y, _ = part
        u, dudr = self.jvp(net, (z, t, r, y), (None, None, torch.ones_like(r), None))
        step = expand(r - t, z)
        with torch.no_grad():
            velocity = net(z + step * u, r, r, y)
        return u + step * dudr - velocity, dudr

    def _eulerian(self, net: Net, part: FlowMapSample) -> tuple[torch.Tensor, torch.Tensor]:
        z, _, t, r, _, y, _ = part
        step, ones = expand(r - t, z), torch.ones_like(t)
        with torch.no_grad():
            v = net(z, t, t, y)
        if self.stop_gradient == "convex":
            u, dudt = self.jvp(net, (z, t, r, y), (v, ones, None, None))
            return v - u + step * dudt, dudt
        u, dudt = self.jvp(net, (z, t, r, y), (None, ones, None, None))
        with torch.no_grad():
            _, along = self.jvp(net, (z, t, r, y), (v, None, None, None))
        return v - u + step * (dudt + along), dudt + along

    def _progressive(self, net: Net, part: FlowMapSample) -> tuple[torch.Tensor, torch.Tensor]:
        z, _, t, r, split, y, _ = part
        s = t - split * (t - r)
        with torch.no_grad():
            first = net(z, t, s, y)
            second = net(z + expand(s - t, z) * first, s, r, y)
            target = torch.lerp(second, first, expand(split, z))
        return net(z, t, r, y) - target, z.new_zeros(1)
