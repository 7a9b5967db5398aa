"""Residual, norm and modulation in one kernel against the layers that it stands for."""

import pytest
import torch

from jvp_flash_attention import attention
from training.kernels import residual_norm
from training.models.dit import DiT
from training.models.layers import begin
from training.objectives.tangents import Jvp

SHAPES = [(3, 37, 72, 2), (2, 5, 40, 2), (4, 33, 64, 1)]  # images, tokens, width, with a tangent


def error(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def formula(rms):
    def f(x, g, y, b, s):
        x = x + g[:, None] * y
        c = x if rms else x - x.mean(-1, keepdim=True)
        n = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-6)
        return x, n * (1 + s[:, None]) + b[:, None]

    return f


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("images", "tokens", "width", "n"), SHAPES)
def test_value_tangent_and_gradients(images, tokens, width, n, rms):
    torch.manual_seed(0)
    x, y = (torch.randn(images, tokens, width, requires_grad=True) for _ in range(2))
    vectors = torch.randn(images, 6 * width, requires_grad=True)
    g, b, s, *_ = vectors.chunk(6, -1)  # rows far apart, as a modulation leaves them
    t_x, t_y = torch.randn(2, n, tokens, width)
    t_g, t_b, t_s, *_ = torch.randn(n, 6 * width).chunk(6, -1)
    tangents = (t_x, t_g, t_y, t_b, t_s)
    x2, h, t_x2, t_h = residual_norm.residual_norm(x, g, y, b, s, tangents, rms, torch.float32)
    exact = [a.double() for a in (x, g, y, b, s)]
    expected = formula(rms)(*exact)
    t_expected = torch.func.jvp(
        formula(rms), tuple(a.detach()[-n:] for a in exact), tuple(t.double() for t in tangents)
    )[1]
    for ours, theirs in zip((x2, h, t_x2, t_h), (*expected, *t_expected), strict=True):
        assert error(ours, theirs) < 2e-6
    assert not t_x2.requires_grad
    assert not t_h.requires_grad
    d_x2, d_h = torch.randn(2, images, tokens, width)
    inputs = (x, y, vectors)
    for used in ((0.0, 1.0), (1.0, 1.0)):  # the last layer does not use x'
        loss = sum(
            c * (d * a).sum() for c, d, a in zip(used, (d_x2, d_h), (x2, h), strict=True) if c
        )
        truth = sum(
            c * (d.double() * a).sum()
            for c, d, a in zip(used, (d_x2, d_h), expected, strict=True)
            if c
        )
        ours = torch.autograd.grad(loss, inputs, retain_graph=True)
        theirs = torch.autograd.grad(truth, inputs, retain_graph=True)
        assert max(map(error, ours, theirs)) < 2e-6


def test_the_operator_states_its_shapes_and_gradients():
    x, y = torch.randn(2, 2, 5, 8, requires_grad=True)
    g, b, s = torch.randn(3, 2, 8, requires_grad=True)
    tangents = torch.randn(1, 5, 8), torch.randn(1, 8), torch.randn(1, 5, 8), *torch.randn(2, 1, 8)
    inputs = (x, g, y, b, s, *tangents, False, torch.float32)
    torch.library.opcheck(torch.ops.flash_jvp_training.residual_norm.default, inputs)


@pytest.mark.parametrize("mode", ["single", "double", "tangent_grad"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rms", "modulation_norm": True},
        {"second_head": 1},
        {"cross_tokens": 2},
    ],
    ids=str,
)
def test_a_network_of_fused_blocks_is_the_network(options, mode, monkeypatch):
    torch.manual_seed(0)
    net = DiT(attention, 4, 1, 10, width=32, heads=2, depth=2, **options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, v = torch.randn(2, 3, 1, 4, 4)
    t, r = torch.rand(2, 3)
    y = torch.randint(0, 10, (3,))
    calls = []
    forward = residual_norm._forward
    monkeypatch.setattr(residual_norm, "_forward", lambda *a: (calls.append(0), forward(*a))[1])

    def run():
        two = "second_head" in options
        along = (v[1:], torch.ones(2), None, None)
        u, du, aux = Jvp(mode).with_aux(net.heads if two else net, (z, t, r, y), along, aux=two)
        (u.sin().sum() + (aux.sin().sum() if two else 0)).backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        return [u, du, *gradients]

    plain = run()
    assert not calls
    net.fused = True
    fused = run()
    assert len(fused) == len(plain)
    assert max(map(error, fused, plain)) < 5e-6
    # A gradient through the tangent takes the layers one by one; a second head has no tangent.
    assert bool(calls) == (mode != "tangent_grad" or "second_head" in options)


def test_what_the_kernel_cannot_serve_it_does_not_take():
    x = torch.randn(2, 3, 8)
    assert residual_norm.supports(x, x)
    assert not residual_norm.supports(x.double())
    assert not residual_norm.supports(x, x[:1])
    assert not residual_norm.supports(torch.empty(1, 1, residual_norm.MAX_WIDTH + 1))
    seen = []
    torch.func.jvp(lambda x: (seen.append(residual_norm.supports(x)), x)[1], (x,), (x,))
    assert seen == [False]  # an operator has no tangent there


def test_the_first_block_gets_what_the_others_get():
    x = torch.randn(2, 3, 8, requires_grad=True)
    stream, gate, branch = begin(x, 6)
    assert stream is x
    assert gate.shape == (2, 1, 8)
    assert gate.stride(0) == 6 * 8
    assert branch.requires_grad
    assert not gate.any()
    assert not branch.any()
