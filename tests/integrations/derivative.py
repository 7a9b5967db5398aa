"""Two judges of a tangent: central finite differences in float64, and the tangent of PyTorch's own
attention in its MATH backend, the only one that has one."""

import torch
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


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


class Calls(TorchFunctionMode):
    """Counts calls of SDPA, by itself and in multi-head attention."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
        return func(*args, **(kwargs or {}))


def math_jvp(f, x, t):
    """((output, tangent), calls of attention) with PyTorch's own attention."""
    with sdpa_kernel(SDPBackend.MATH), Calls() as calls:
        return jvp(f, (x,), (t,)), calls.count


def first_tensor(output):
    """Of what a model returns without its dictionary."""
    return output if torch.is_tensor(output) else first_tensor(output[0])
