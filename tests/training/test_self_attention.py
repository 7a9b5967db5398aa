"""Attention of one product, whose gradient is one tensor, against that of three."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jvp_flash_attention
from jvp_flash_attention import kernels
from jvp_flash_attention.kernels import launch_cache
from training.dual import Dual
from training.kernels import self_attention as module
from training.kernels.self_attention import self_attention, self_attention_jvp
from training.models.layers import SelfAttention, with_bias_gradient


def plain(z, heads):
    q, k, v = (x.transpose(1, 2) for x in z.unflatten(-1, (3, heads, -1)).unbind(2))
    return scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("B", "N", "H", "D"), [(3, 37, 2, 24), (2, 70, 3, 72), (1, 5, 1, 8)])
def test_value_and_gradient(B, N, H, D, bias, device):
    torch.manual_seed(0)
    z = torch.randn(B, N, 3 * H * D, device=device, requires_grad=True)
    b = torch.zeros(3 * H * D, device=device, requires_grad=True) if bias else None
    d_out = torch.randn(B, N, H, D, device=device).transpose(1, 2)
    exact = z.detach().double().requires_grad_()
    wanted = plain(exact, H)
    (expected,) = torch.autograd.grad(wanted, exact, d_out.double())
    for _ in range(2):  # the second time by the cached launches
        out = self_attention(z, b, H)
        assert (out.double() - wanted).norm() < 1e-5 * wanted.norm()
        d_z, *d_b = torch.autograd.grad(out, (z, b) if bias else (z,), d_out)
        assert d_z.is_contiguous()
        assert (d_z.double() - expected).norm() < 1e-5 * expected.norm()
        for x in d_b:
            assert not x.view(3, -1)[1].any()  # of the keys
            sums = expected.sum((0, 1))
            assert (x.double() - sums).norm() < 1e-5 * sums.norm()


@pytest.mark.parametrize("moving", [1, 2, 3])
def test_the_last_examples_have_a_tangent(moving, device):
    torch.manual_seed(0)
    B, N, H, D = 3, 37, 2, 24
    z = torch.randn(B, N, 3 * H * D, device=device, requires_grad=True)
    b = torch.zeros(3 * H * D, device=device, requires_grad=True)
    t_z = torch.randn(moving, N, 3 * H * D, device=device)
    exact, t_exact = z.detach().double()[-moving:], t_z.double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, t_expected = torch.func.jvp(lambda z: plain(z, H), (exact,), (t_exact,))
    expected = torch.autograd.grad(self_attention(z, b, H).sin().sum(), (z, b))
    for _ in range(2):
        out, t_out = self_attention_jvp(z, t_z, b, H)
        assert (out - self_attention(z, b, H)).norm() < 1e-6 * out.norm()
        assert (t_out.double() - t_expected).norm() < 1e-5 * t_expected.norm()
        assert not t_out.requires_grad
        found = torch.autograd.grad(out.sin().sum(), (z, b))
        for x, y in zip(found, expected, strict=True):
            assert (x - y).norm() < 1e-5 * y.norm()


def test_the_gradient_of_another_call_is_not_written_over():
    z = torch.randn(2, 9, 48, requires_grad=True)
    (first,) = torch.autograd.grad(self_attention(z, None, 2).sum(), z)
    kept = first.clone()
    torch.autograd.grad(self_attention(2 * z, None, 2).sin().sum(), z)
    assert torch.equal(first, kept)
    launch_cache.enable(False)
    try:
        (again,) = torch.autograd.grad(self_attention(z, None, 2).sum(), z)
    finally:
        launch_cache.enable()
    assert torch.equal(again, kept)


def test_a_gradient_that_tma_cannot_read_is_copied_where_sums_are_made_beside_it(monkeypatch):
    z, b = torch.randn(3, 9, 48, requires_grad=True), torch.zeros(48, requires_grad=True)
    wanted = torch.autograd.grad(self_attention(z, b, 2).sum(0).sin().sum(), (z, b))
    backward, read = kernels.backward, []

    def with_sums(d_out, *args, into, **kwargs):
        read.append(d_out)
        grads = backward(d_out, *args, into=into[:3], **kwargs)
        q, _, v = (y.transpose(1, 2) for y in into[:3])
        into[3].copy_(torch.stack((q.sum(1), v.sum(1)), 1)[:, None])
        return grads

    monkeypatch.setattr(kernels, "room_for_sums", lambda *_: torch.empty(3, 1, 2, 2, 8))
    monkeypatch.setattr(kernels, "backward", with_sums)
    found = torch.autograd.grad(self_attention(z, b, 2).sum(0).sin().sum(), (z, b))
    assert read[0].stride(0) > 0  # of an expanded gradient it is 0
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


# heads that fit a block, few and several a multiprocessor; longer ones, of two and three warpgroups
SHAPES = [(2, 130, 3, 72), (2, 256, 2, 64), (60, 256, 8, 72), (90, 190, 4, 64)]
SHAPES += [
    (3, 700, 2, 64),
    (40, 520, 3, 40),
    (2, 130, 2, 128),
    (2, 300, 3, 72),
    (2, 400, 2, 96),
    (2, 300, 3, 88),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "N", "H", "D"), SHAPES)
def test_in_bfloat16_on_a_gpu(B, N, H, D):
    """The gradient lies in rows of all three, which TMA writes. The bias's is summed beside it."""
    z = torch.randn(B, N, 3 * H * D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    exact = z.detach().double().requires_grad_()
    d_out = torch.randn(B, N, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    (expected,) = torch.autograd.grad(plain(exact, H), exact, d_out.double())
    b = torch.zeros(3 * H * D, device="cuda", requires_grad=True)
    assert kernels.room_for_sums(*module._call(z.detach(), H)) is not None
    parts = expected.flatten(0, 1).view(B * N, 3, H * D)
    for _ in range(2):
        (d_z,) = torch.autograd.grad(self_attention(z, None, H), z, d_out)
        assert (d_z - expected).norm() < 4e-3 * expected.norm()
        d_z2, d_b = torch.autograd.grad(self_attention(z, b, H), (z, b), d_out)
        assert torch.equal(d_z, d_z2)
        assert not d_b.view(3, -1)[1].any()
        for i in (0, 2):  # as large as what rounding leaves of each row adds up to
            wrong = d_b.view(3, -1)[i] - parts[:, i].sum(0)
            assert wrong.norm() < 4e-3 * parts[:, i].norm()
    t_z = torch.randn_like(z[:1])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        last, t_z64 = exact.detach()[-1:], t_z.double()
        _, t_expected = torch.func.jvp(lambda z: plain(z, H), (last,), (t_z64,))
    out, t_out = self_attention_jvp(z, t_z, None, H)
    assert (out - plain(exact, H)).norm() < 4e-3 * out.norm()
    assert (t_out - t_expected).norm() < 4e-3 * t_expected.norm()


def test_where_cudnn_may_serve_its_gradients_are_joined(monkeypatch):
    z, b = torch.randn(2, 9, 48, requires_grad=True), torch.zeros(48, requires_grad=True)
    written = torch.autograd.grad(self_attention(z, b, 2).sin().sum(), (z, b))
    monkeypatch.setattr(module.cudnn, "pays_backward", lambda *_: True)
    joined = torch.autograd.grad(self_attention(z, b, 2).sin().sum(), (z, b))
    assert not joined[1].view(3, -1)[1].any()
    for x, y in zip(joined, written, strict=True):
        torch.testing.assert_close(x, y)


def test_head_dims_that_the_kernels_lack_stay_with_the_layers():
    layer = SelfAttention(600, 2, jvp_flash_attention.attention)
    heads = layer.project_in(torch.randn(1, 3, 600), None, fused=True)
    assert len(heads) == 3
    assert layer.attend(*heads).shape == (1, 2, 3, 300)


def test_a_second_derivative_raises():
    z = torch.randn(1, 5, 24, requires_grad=True)
    (d_z,) = torch.autograd.grad(self_attention(z, None, 2).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError):
        d_z.square().sum().backward()


def test_it_compiles():
    z, b = torch.randn(2, 5, 24, requires_grad=True), torch.zeros(24, requires_grad=True)

    def f(z, b):
        return self_attention(z, b, 2).sin().sum()

    ours = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(z, b), (z, b))
    for x, y in zip(ours, torch.autograd.grad(f(z, b), (z, b)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("kind", ["value", "few", "all", "through"])
@pytest.mark.parametrize("how", ["plain", "qk_norm", "rotary", "scale", "sdpa"])
def test_a_layer_takes_it_where_it_may_and_is_the_same(kind, how, monkeypatch):
    torch.manual_seed(0)
    attention = {
        "scale": partial(jvp_flash_attention.attention, scale=0.3),
        "sdpa": scaled_dot_product_attention,
    }.get(how, jvp_flash_attention.attention)
    if how == "sdpa" and kind != "value":
        pytest.skip("PyTorch's fused attention has no tangent")
    layer = SelfAttention(16, 2, attention, qk_norm=how == "qk_norm")
    angles = torch.rand(5, 4) if how == "rotary" else None
    x, t = torch.randn(4, 5, 16, requires_grad=True), torch.randn(4, 5, 16)
    calls, inner = [], module._forward
    monkeypatch.setattr(module, "_forward", lambda *a: (calls.append(0), inner(*a))[1])

    def run(fused):
        n = {"few": 2}.get(kind, 4)
        given = x if kind == "value" else Dual(x, t[:n], kind == "through")
        out = layer.attend(*layer.project_in(given, angles, fused))
        out = with_bias_gradient(*layer.project_out(out, fused))
        parts = [out] if kind == "value" else [out.primal, out.tangent]
        loss = sum((i + 1) * y.sin().sum() for i, y in enumerate(parts) if y.requires_grad)
        biases = (layer.qkv.bias, layer.projection.bias)
        return [*parts, *torch.autograd.grad(loss, (x, layer.qkv.weight, *biases))]

    without = run(False)
    assert not calls
    for ours, theirs in zip(run(True), without, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert bool(calls) == (how == "plain" and kind in ("value", "few"))
