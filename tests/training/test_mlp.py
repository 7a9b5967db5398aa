"""The MLP as one operator against its layers; GELU alone against the formula in float64."""

import pytest
import torch
from torch.nn import functional

from training.dual import Dual
from training.kernels import cublaslt, gelu, mlp
from training.kernels.column_sums import column_sums, part_sums
from training.models.layers import Mlp, with_bias_gradient


def error(a, b):
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


def formula(z):
    return functional.gelu(z, approximate="tanh")


@pytest.mark.parametrize("shape", [(3, 37, 72), (2, 5, 300), (1, 1, 1)])
def test_gelu_its_tangent_and_its_gradient(shape):
    torch.manual_seed(0)
    z, t_z, d_h = 3 * torch.randn(shape), torch.randn(shape), torch.randn(shape)
    exact = z.double()
    expected, t_expected = torch.func.jvp(formula, (exact,), (t_z.double(),))
    assert error(gelu.gelu(z), expected) < 1e-6
    assert error(gelu.gelu_tangent(z, t_z), t_expected) < 2e-6
    (expected,) = torch.func.vjp(formula, exact)[1](d_h.double())
    d_z, d_bias = gelu.gelu_backward(z, d_h, True)
    assert error(d_z, expected) < 2e-6
    assert error(d_bias, expected.sum((0, 1))) < 2e-6


@pytest.mark.parametrize("z", [1e4, -1e4, 60.0, -60.0, 0.0])
def test_far_from_zero_gelu_is_the_identity_or_zero(z):
    x, ones = torch.full((1, 4), z), torch.ones(1, 4)
    slope = torch.full((1, 4), 0.5 if z == 0 else float(z > 0))
    assert torch.equal(gelu.gelu(x), torch.full((1, 4), max(z, 0.0)))
    assert torch.equal(gelu.gelu_tangent(x, ones), slope)
    assert torch.equal(gelu.gelu_backward(x, ones, False)[0], slope)


@pytest.mark.parametrize("shape", [(3, 37, 72), (130, 300), (1, 1)])
def test_sums_over_the_tokens(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    assert error(column_sums(x), x.double().flatten(0, -2).sum(0)) < 1e-6
    if width := x.shape[-1] // 3:
        parts = x[..., : 3 * width].contiguous().view(-1, 3, width)
        for zero in range(3):
            kept = torch.arange(3) != zero
            sums = part_sums(parts, zero)
            assert not sums[zero].any()
            assert error(sums[kept], parts.double().sum(0)[kept]) < 1e-6


def test_the_operator_states_its_shapes_and_gradients():
    def new(*shape):
        return torch.randn(shape, requires_grad=True)

    x, A, a, B, b = new(2, 5, 8), new(12, 8), new(12), new(8, 12), torch.randn(8)
    for given in ((x, A, a, B, b, torch.randn(1, 5, 8)), (x, A, None, B, None, None)):
        torch.library.opcheck(torch.ops.flash_jvp_training.mlp.default, given)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["value", "constant", "through"])
def test_it_is_the_layers(kind, bias, monkeypatch):
    torch.manual_seed(0)
    layer = Mlp(16, 40, 0.0, bias)
    x, t = torch.randn(3, 5, 16, requires_grad=True), torch.randn(2, 5, 16)
    calls, forward = [], mlp._forward
    monkeypatch.setattr(mlp, "_forward", lambda *a: (calls.append(0), forward(*a))[1])

    def run(fused):
        y = with_bias_gradient(
            *layer(x if kind == "value" else Dual(x, t, kind == "through"), fused)
        )
        parts = [y] if kind == "value" else [y.primal, y.tangent]
        loss = sum(part.sin().sum() for part in parts if part.requires_grad)
        return [*parts, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    plain = run(False)
    assert not calls
    for ours, theirs in zip(run(True), plain, strict=True):
        assert error(ours, theirs.double()) < 2e-6
    assert bool(calls) == (kind != "through")  # a gradient through the tangent takes the layers


def test_what_is_frozen_gets_no_gradient_and_none_is_computed(monkeypatch):
    layer, x = Mlp(16, 40, 0.0), torch.randn(3, 5, 16, requires_grad=True)
    layer.expand.weight.requires_grad_(False)
    layer.contract.bias.requires_grad_(False)
    asked, backward = [], mlp._backward
    monkeypatch.setattr(mlp, "_backward", lambda *a: (asked.append(a[-1]), backward(*a))[1])
    with_bias_gradient(*layer(x, True)).sin().sum().backward()
    assert asked == [[True, False, True, True]]
    ours = [p.grad for p in (x, *layer.parameters())]
    x.grad = None
    layer.zero_grad()
    layer(x)[0].sin().sum().backward()
    for a, b in zip(ours, [p.grad for p in (x, *layer.parameters())], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert error(a, b.double()) < 2e-6


def test_a_gradient_that_it_leaves_to_others_is_not_lost_without_a_word():
    x, A, B, b = torch.randn(2, 5, 8), torch.randn(12, 8), torch.randn(8, 12), torch.randn(8)
    y, *_ = torch.ops.flash_jvp_training.mlp(x, A, None, B, b.requires_grad_(), None)
    with pytest.raises(RuntimeError, match="give it b"):
        y.sum().backward()


def test_a_bias_gradient_made_elsewhere_is_summed_in_float32():
    torch.manual_seed(0)
    y = torch.randn(64, 500, 8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    d_y = torch.randn_like(y)
    of_y, of_bias = torch.autograd.grad(with_bias_gradient(y, bias), (y, bias), d_y)
    assert torch.equal(of_y, d_y)
    assert error(of_bias, d_y.double().sum((0, 1))) < 1e-6
    for alone in (with_bias_gradient(y, None), with_bias_gradient(y, bias.detach())):
        assert alone is y
    with torch.no_grad():
        assert with_bias_gradient(y, bias) is y


def test_units_are_dropped_by_the_layers(monkeypatch):
    monkeypatch.setattr(mlp, "_forward", None)
    layer, x = Mlp(16, 40, 0.5), torch.randn(3, 5, 16)
    torch.manual_seed(0)
    dropped, _ = layer(x, True)
    torch.manual_seed(0)
    assert torch.equal(dropped, layer(x)[0])


def test_autocast_computes_in_its_dtype():
    torch.manual_seed(0)
    layer, x = Mlp(16, 40, 0.0), torch.randn(3, 5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = with_bias_gradient(*layer(x, True)), layer(x)[0]
    assert fused.dtype == plain.dtype == torch.bfloat16
    assert error(fused, plain.double()) < 1e-2
    gradients = torch.autograd.grad(fused.float().sum(), [x, *layer.parameters()])
    assert {g.dtype for g in gradients} == {torch.float32}


def test_cublaslt_serves_no_cpu():
    x = torch.randn(4, 8)
    assert cublaslt.product_then_gelu(x, torch.randn(16, 8), None) is None
    assert cublaslt.product_times_gelu_derivative(x, torch.randn(8, 16), torch.randn(4, 16)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "hidden"), [(4096, 1152, 4608), (1000, 72, 136)])
def test_cublaslt_computes_it_with_the_bits_of_its_first_algorithm(rows, width, hidden, dtype):
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(shape, device="cuda", dtype=dtype)

    x, A, a, d = new(rows, width), new(hidden, width), new(hidden), new(rows, width)
    A, B = A / width**0.5, new(width, hidden) / width**0.5
    z, h = cublaslt.product_then_gelu(x, A, a)
    exact = functional.linear(x.double(), A.double(), a.double())
    rounding = 2 * torch.finfo(dtype).eps
    assert error(z, exact) < rounding
    assert error(h, formula(exact)) < rounding
    d_z = cublaslt.product_times_gelu_derivative(d, B, z)
    (expected,) = torch.func.vjp(formula, z.double())[1](d.double() @ B.double())
    assert error(d_z, expected) < rounding
    for left, right, out, backward in ((x, A, h, False), (d, B, d_z, True)):
        product = cublaslt._product(left, right, z, None if backward else a, backward)
        again = torch.empty_like(out)
        product._start(product.choices[0], left, right, again, z)
        assert torch.equal(again, out), product.best


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_mlp():
    torch.manual_seed(0)
    layer = Mlp(64, 256, 0.0).cuda()
    x, t = torch.randn(4, 33, 64, device="cuda"), torch.randn(2, 33, 64, device="cuda")
    results = []
    for dtype, fused in ((torch.bfloat16, True), (torch.float64, False)):
        net = Mlp(64, 256, 0.0).cuda().to(torch.float64 if not fused else torch.float32)
        net.load_state_dict(layer.state_dict())
        v = x.to(dtype).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=fused):
            y, t_y, _ = with_bias_gradient(*net(Dual(v, t.to(dtype)), fused))
        gradients = torch.autograd.grad(y.double().sin().sum(), [v, *net.parameters()])
        results.append([y, t_y, *gradients])
    for ours, exact in zip(*results, strict=True):
        assert error(ours, exact) < 1e-2


def test_it_compiles():
    layer, x = Mlp(16, 40, 0.0), torch.randn(3, 5, 16, requires_grad=True)

    def f(x):
        y, t_y, _ = with_bias_gradient(*layer(Dual(x, x.detach()[1:].cos()), True))
        return y.sin().sum() + t_y.detach().sum()

    def gradients(f):
        return torch.autograd.grad(f(x), [x, *layer.parameters()])

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled), gradients(f), strict=True):
        torch.testing.assert_close(ours, theirs)
