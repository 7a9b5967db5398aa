"""Residual, norm and modulation in one kernel against the layers that it stands for."""

import pytest
import torch

from jvp_flash_attention import attention
from tests.compiling import compiling
from training.kernels import residual_norm
from training.models.dit import DiT
from training.models.jvp_layers import Dual
from training.models.layers import begin
from training.objectives.tangents import Jvp
from training.step import compile_blocks

# images, tokens, width, with a tangent; one tile of features, or two
SHAPES = [(3, 37, 72, 2), (2, 5, 40, 2), (4, 33, 64, 1), (2, 7, 100, 1), (3, 9, 44, 3)]


def error(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def formula(rms):
    def f(x, g, y, b, s):
        x = x + g[:, None] * y
        c = x if rms else x - x.mean(-1, keepdim=True)
        n = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-6)
        return x, n * (1 + s[:, None]) + b[:, None]

    return f


def results(shape, rms, of_stream, of_branch, device):
    """Of the kernels and of the formula in float64: values, tangents and two kinds of gradients."""
    torch.manual_seed(0)
    images, tokens, width, n = shape

    def new(*shape, dtype=of_branch, wanted=True):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=wanted)

    x, y = new(images, tokens, width, dtype=of_stream), new(images, tokens, width)
    bias = new(width, dtype=torch.float32)  # in y already
    vectors = new(images, 6 * width)
    g, b, s, *_ = vectors.chunk(6, -1)  # rows far apart, as a modulation leaves them
    t_x = new(n, tokens, width, dtype=of_stream, wanted=False)
    t_y, t_vectors = new(n, tokens, width, wanted=False), new(n, 6 * width, wanted=False)
    t_g, t_b, t_s, *_ = t_vectors.chunk(6, -1)
    tangents = (t_x, t_g, t_y, t_b, t_s)
    ours = residual_norm.residual_norm(x, g, y, bias, b, s, tangents, rms, of_branch)
    assert not ours[2].requires_grad
    assert not ours[3].requires_grad
    exact = [a.double() for a in (x, g, y + (bias - bias.detach()).to(y.dtype), b, s)]
    theirs = formula(rms)(*exact)
    t_theirs = torch.func.jvp(
        formula(rms), tuple(a.detach()[-n:] for a in exact), tuple(t.double() for t in tangents)
    )[1]
    d = new(images, tokens, width, dtype=of_stream), new(images, tokens, width)
    inputs, gradients = (x, y, vectors, bias), []
    for first in (1, 0):  # the last layer does not use x'
        given = [a.detach() for a in d[first:]]
        of_ours = torch.autograd.grad(ours[first:2], inputs, given, retain_graph=True)
        given = [a.double() for a in given]
        gradients += zip(
            of_ours,
            torch.autograd.grad(theirs[first:], inputs, given, retain_graph=True),
            strict=True,
        )
    return [*zip(ours, (*theirs, *t_theirs), strict=True), *gradients]


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_tangent_and_gradients(shape, rms):
    for ours, theirs in results(shape, rms, torch.float32, torch.float32, "cpu"):
        assert error(ours, theirs) < 2e-6


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_of_wide_tokens_in_half_precision_scale_and_gate_are_read_anew(rms):
    for ours, theirs in results((2, 9, 768, 1), rms, torch.bfloat16, torch.bfloat16, "cpu"):
        assert error(ours, theirs) < 4e-3


def test_a_program_takes_many_tokens_where_there_are_many(monkeypatch):
    monkeypatch.setattr(residual_norm, "WARPS", 1)
    assert residual_norm._rows(2, 150, 1) == residual_norm.ROWS[1]
    for ours, theirs in results((2, 150, 40, 1), False, torch.float32, torch.float32, "cpu"):
        assert error(ours, theirs) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("of_stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(32, 1024, 768, 8), (64, 256, 1152, 16), (3, 77, 384, 1)], ids=str
)
def test_on_a_gpu_in_half_precision_and_the_same_in_every_run(shape, of_stream):
    first, again = (results(shape, False, of_stream, torch.bfloat16, "cuda") for _ in range(2))
    for (ours, theirs), (repeated, _) in zip(first, again, strict=True):
        assert error(ours, theirs) < 4e-3
        assert torch.equal(ours, repeated)


OFFLINE = """
import torch
from triton.runtime import driver
from tests import offline
from training.kernels import residual_norm

def launched(what, inputs, outputs, launch):
    made = outputs()
    compiled = launch(*made).compile()
    print(inputs[0].shape[-1], offline._inspect(what[0], compiled).stack)
    return made

residual_norm.launched = launched
residual_norm.sum_parts = lambda sums: sums.sum(1)
driver.set_active(offline._Driver(offline.TARGETS["sm_90"]))
half = torch.bfloat16
for width, of_stream in ((768, half), (1152, half), (384, torch.float32)):
    x, y = torch.empty(16, 1024, width, dtype=of_stream), torch.empty(16, 1024, width, dtype=half)
    g, b, s, *_ = torch.empty(16, 6 * width, dtype=half).chunk(6, -1)
    tangents = (x[:4], g[:4], y[:4], b[:4], s[:4])
    made = residual_norm._forward(x, g, y, None, b, s, *tangents, False, half)
    x2, h, mean, rstd, *_ = made
    residual_norm._backward(x2, g, y, s, mean, rstd, x, h, False, True)
"""


def test_it_compiles_and_spills_nothing_at_published_widths():
    found = [list(map(int, line.split())) for line in compiling("-c", OFFLINE).splitlines()]
    assert [width for width, _ in found] == [768, 768, 1152, 1152, 384, 384]
    assert all(stack == 0 for _, stack in found)


def test_the_operator_states_its_shapes_and_gradients():
    x, y = torch.randn(2, 2, 5, 8, requires_grad=True)
    g, b, s = torch.randn(3, 2, 8, requires_grad=True)
    tangents = torch.randn(1, 5, 8), torch.randn(1, 8), torch.randn(1, 5, 8), *torch.randn(2, 1, 8)
    bias = torch.randn(8, requires_grad=True)
    for given in ((bias, b, s, *tangents), (None, b, s, *[None] * 5)):
        inputs = (x, g, y, *given, False, torch.float32)
        torch.library.opcheck(torch.ops.flash_jvp_training.residual_norm.default, inputs)


@pytest.mark.parametrize("mode", ["single", "double", "tangent_grad"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rms", "modulation_norm": True},
        {"second_head": 1},
        {"cross_tokens": 2},
        {"label_tokens": 2},
        {"conditioning": "t_then_r", "late_blocks": 1},
        {"mlp": "swiglu"},
        {"dropout": 0.3},
        {"bias": False},
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
        torch.manual_seed(1)  # of dropped units
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
    # Tokens in front are no condition of each image.
    served = mode != "tangent_grad" or "second_head" in options
    assert bool(calls) == (served and "label_tokens" not in options)


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
    stream, gate, branch, bias = begin(x, 6, torch.empty(8, requires_grad=True))
    assert stream is x
    assert gate.shape == (2, 1, 8)
    assert gate.stride(0) == 6 * 8
    assert branch.requires_grad
    assert bias.requires_grad
    assert not gate.any()
    assert not branch.any()
    assert not bias.any()
    frozen = torch.empty(8, dtype=torch.bfloat16)
    assert bias.dtype == begin(x, 6, frozen).bias.dtype == torch.float32  # as what is handed over
    assert not begin(x, 6, frozen).bias.requires_grad
    assert begin(x, 6, None).bias is None
    assert begin(Dual(x, x.detach(), through=True), 6, torch.empty(8)).bias is None


@pytest.mark.parametrize("frozen", [False, True])
def test_and_shares_their_compiled_graph(frozen):
    net = DiT(attention, 4, 1, 10, width=32, heads=2, depth=3)
    for block in net.blocks:
        block.mlp.contract.bias.requires_grad_(not frozen)
    compile_blocks(net, True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    z, v = torch.randn(2, 3, 1, 4, 4)
    t, r = torch.rand(2, 3)
    along = (v[1:], torch.ones(2), None, None)
    u, _, _ = Jvp("single").with_aux(net, (z, t, r, torch.randint(0, 10, (3,))), along, aux=False)
    u.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of a block, the last layer
