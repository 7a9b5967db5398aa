"""Queries, keys and values whose gradients one kernel joins, against PyTorch's own views."""

import pytest
import torch

from training.dual import Dual
from training.kernels import split_heads
from training.models.layers import SelfAttention


def plain(z, heads):
    return [x.transpose(1, 2) for x in z.unflatten(-1, (3, heads, -1)).unbind(2)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("B", "N", "H", "D"), [(3, 37, 2, 24), (2, 5, 3, 72), (1, 130, 1, 8)])
def test_views_and_gradients_of_any_layout(B, N, H, D, bias):
    torch.manual_seed(0)
    z = torch.randn(B, N, 3 * H * D, requires_grad=True)
    b = torch.zeros(3 * H * D, requires_grad=True) if bias else None
    parts, exact = split_heads.split_heads(z, b, H), plain(z, H)
    for ours, theirs in zip(parts, exact, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() == theirs.data_ptr()
    layouts = (B, H, N, D), (B, N, H, D), (B, H, D, N)
    d_q, d_k, d_v = (torch.randn(shape) for shape in layouts)
    d = d_q, d_k.transpose(1, 2), d_v.transpose(2, 3)
    (expected,) = torch.autograd.grad(exact, z, d)
    d_z, *d_b = torch.autograd.grad(parts, (z, b) if bias else (z,), d)
    assert torch.equal(d_z, expected)
    for x in d_b:
        torch.testing.assert_close(x, expected.sum((0, 1)))


def test_one_part_without_a_gradient():
    z = torch.randn(2, 5, 12, requires_grad=True)
    (ours,) = torch.autograd.grad(split_heads.split_heads(z, None, 2)[1].sum(), z)
    (theirs,) = torch.autograd.grad(plain(z, 2)[1].sum(), z)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", ["value", "constant", "through"])
def test_fused_projections_are_the_projections(kind, qk_norm, monkeypatch):
    torch.manual_seed(0)
    layer = SelfAttention(16, 2, torch.nn.functional.scaled_dot_product_attention, qk_norm)
    x, t = torch.randn(3, 5, 16, requires_grad=True), torch.randn(2, 5, 16)
    calls, joined = [], split_heads._joined
    monkeypatch.setattr(split_heads, "_joined", lambda *a: (calls.append(0), joined(*a))[1])

    def run(fused):
        found = layer.project_in(
            x if kind == "value" else Dual(x, t, kind == "through"), None, fused
        )
        parts = [y for part in found for y in ([part] if kind == "value" else part[:2])]
        loss = sum((i + 1) * y.sin().sum() for i, y in enumerate(parts) if y.requires_grad)
        weights = (x, layer.qkv.weight, layer.qkv.bias)
        return [*parts, *torch.autograd.grad(loss, weights)]

    without = run(False)
    assert not calls
    for ours, theirs in zip(run(True), without, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert bool(calls) == (kind != "through")  # a gradient through the tangent takes the layers


def test_it_compiles():
    z, b = torch.randn(2, 5, 12, requires_grad=True), torch.zeros(12, requires_grad=True)

    def f(z, b):
        q, k, v = split_heads.split_heads(z, b, 2)
        return q.sin().sum() + 2 * k.sin().sum() + 3 * v.sin().sum()

    ours = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(z, b), (z, b))
    for x, y in zip(ours, torch.autograd.grad(f(z, b), (z, b)), strict=True):
        torch.testing.assert_close(x, y)
