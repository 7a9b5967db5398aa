"""Operators that reach their code in one step, and only where nothing else waits for the call."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from jvp_flash_attention.functorch import make_autograd_impl, only
from jvp_flash_attention.operators import operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KNOWN = make_autograd_impl is not None and only("CPU") is not None


@operator("flash_jvp_tests::scaled", no_tangent="scaled has no tangent")
def scaled(x: Tensor, by: float) -> Tensor:
    return x * by


@scaled.register_fake
def _(x, by):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    ctx.by = inputs[1]


scaled.register_autograd(lambda ctx, d: (scaled(d, ctx.by), None), setup_context=_keep)
overload = torch.ops.flash_jvp_tests.scaled.default


@pytest.fixture
def further(monkeypatch):
    """The number of times that f() hands the operator on to the dispatcher."""
    taken, redispatch = [], type(overload).redispatch

    def spy(self, *args, **kwargs):
        taken.append(self)
        return redispatch(self, *args, **kwargs)

    monkeypatch.setattr(type(overload), "redispatch", spy)

    def count(f):
        taken.clear()
        f()
        return taken.count(overload)

    return count


@pytest.mark.skipif(not KNOWN, reason="this version of PyTorch lacks the names")
def test_values_go_straight_to_the_code_and_all_else_does_not(further):
    x, p = torch.randn(3, device=DEVICE), torch.randn(3, device=DEVICE, requires_grad=True)
    assert further(lambda: overload(x, 2.0)) == 0
    assert further(lambda: overload(p, 2.0)) == 1
    with torch.no_grad():
        assert further(lambda: overload(p, 2.0)) == 0
    assert further(lambda: overload(torch._neg_view(x), 2.0)) == 1
    traced = make_fx(lambda x: overload(x, 2.0))
    assert further(lambda: traced(x)) > 0
    assert overload in [node.target for node in traced(x).graph.nodes]


def test_everything_that_pytorch_asks_of_an_operator():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(overload, (x, 2.0))
    torch.autograd.gradgradcheck(lambda x: overload(x, 2.0), x)
    compiled = torch.compile(lambda x: overload(x, 2.0).sin(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(gradient, 2 * (2 * x).cos())


def test_a_tangent_is_refused_and_not_dropped():
    x = torch.randn(3)
    with forward_ad.dual_level():
        assert torch.equal(overload(x, 2.0), 2 * x)
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="scaled has no tangent"):
            overload(dual, 2.0)
