"""GELU with tangent and gradient of the bias in one kernel against the formula in float64."""

import pytest
import torch
from torch.nn import functional

from training.dual import Dual
from training.kernels import gelu
from training.models.layers import Mlp

SHAPES = [(3, 37, 72, 2), (2, 5, 300, 2), (4, 33, 64, 1), (1, 1, 1, 1)]  # images, tokens, W, moving


def error(a, b):
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


def formula(z):
    return functional.gelu(z, approximate="tanh")


@pytest.mark.parametrize("tangent", [True, False])
@pytest.mark.parametrize(("images", "tokens", "width", "n"), SHAPES)
def test_value_tangent_and_gradients(images, tokens, width, n, tangent):
    torch.manual_seed(0)
    z = (3 * torch.randn(images, tokens, width)).requires_grad_()
    bias = torch.zeros(width, requires_grad=True)
    t_z, d_h = torch.randn(n, tokens, width), torch.randn(images, tokens, width)
    h, t_h = gelu.gelu(Dual(z, t_z), bias)[:2] if tangent else (gelu.gelu(z, bias), None)
    exact = z.detach().double().requires_grad_()
    expected = formula(exact)
    assert error(h, expected) < 1e-6
    if tangent:
        assert (
            error(t_h, torch.func.jvp(formula, (exact.detach()[-n:],), (t_z.double(),))[1]) < 2e-6
        )
        assert not t_h.requires_grad
    d_z, d_bias = torch.autograd.grad(h, (z, bias), d_h)
    (expected,) = torch.autograd.grad(expected, exact, d_h.double())
    assert error(d_z, expected) < 2e-6
    assert error(d_bias, expected.sum((0, 1))) < 2e-6


@pytest.mark.parametrize("z", [1e4, -1e4, 60.0, -60.0, 0.0])
def test_far_from_zero_it_is_the_identity_or_zero(z):
    x = torch.full((1, 4), z, requires_grad=True)
    h, t_h, _ = gelu.gelu(Dual(x, torch.ones(1, 4)), None)
    slope = 0.5 if z == 0 else float(z > 0)
    assert torch.equal(h, torch.full((1, 4), max(z, 0.0)))
    assert torch.equal(t_h, torch.full((1, 4), slope))
    assert torch.equal(torch.autograd.grad(h.sum(), x)[0], torch.full((1, 4), slope))


def test_the_operator_states_its_shapes_and_gradients():
    z, bias = torch.randn(2, 5, 8, requires_grad=True), torch.zeros(8, requires_grad=True)
    for given in ((z, bias, torch.randn(1, 5, 8)), (z, None, None)):
        torch.library.opcheck(torch.ops.flash_jvp_training.gelu.default, given)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["value", "constant", "through"])
def test_a_fused_mlp_is_the_mlp(kind, bias, monkeypatch):
    torch.manual_seed(0)
    mlp = Mlp(16, 40, 0.0, bias)
    x, t = torch.randn(3, 5, 16, requires_grad=True), torch.randn(2, 5, 16)
    calls, forward = [], gelu._forward
    monkeypatch.setattr(gelu, "_forward", lambda *a: (calls.append(0), forward(*a))[1])

    def run(fused):
        y = mlp(x if kind == "value" else Dual(x, t, kind == "through"), fused)
        parts = [y] if kind == "value" else [y.primal, y.tangent]
        loss = sum(part.sin().sum() for part in parts if part.requires_grad)
        return [*parts, *torch.autograd.grad(loss, [x, *mlp.parameters()])]

    plain = run(False)
    assert not calls
    for ours, theirs in zip(run(True), plain, strict=True):
        assert error(ours, theirs.double()) < 2e-6
    assert bool(calls) == (kind != "through")  # a gradient through the tangent takes the layers
