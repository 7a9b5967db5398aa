"""Two judges of a tangent: central finite differences in float64, and the exact tangent of a
model's own softmax in plain PyTorch."""

import torch
from torch.func import jvp


def relative(got, exact) -> float:
    return float((got - exact).detach().norm() / exact.detach().norm())


def check_tangent(f, x, step: float = 1e-5, tolerance: float = 1e-6):
    """`jvp` of f at x in float64 equals central differences; returns the output and the tangent."""
    assert x.dtype == torch.float64
    t = torch.randn_like(x)
    out, t_out = jvp(f, (x,), (t,))
    with torch.no_grad():
        exact = (f(x + step * t) - f(x - step * t)) / (2 * step)
    assert exact.norm() > 0
    assert relative(t_out, exact) < tolerance
    return out, t_out
