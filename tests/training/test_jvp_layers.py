"""Layers of value and tangent against torch.func.jvp of the same layers, in float64."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jvp_flash_attention import attention as jvp_attention
from training.activation_checkpointing import CHOICES, checkpoint_blocks
from training.attentions import sdpa
from training.models.dit import DiT
from training.models.embedders import sinusoids
from training.models.jvp_layers import (
    Dropout,
    Dual,
    Linear,
    add,
    concatenate,
    gelu,
    layer_norm,
    linear_map,
    modulate,
    multiply,
    rms_norm,
    silu,
    subtract,
    unpack,
)
from training.objectives.tangents import Jvp, _by_blocks, _whole, takes_duals
from training.step import compile_blocks

B, N, W = 5, 3, 6
torch.manual_seed(0)
X, T, Z = torch.randn(3, B, N, W, dtype=torch.float64)
LAYER = Linear(W, W).double()
first = lambda x: linear_map(lambda x: x[:, :1], x)  # noqa: E731

LAYERS = {
    "linear": LAYER,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "gelu": gelu,
    "silu": silu,
    "modulate": lambda x: modulate(x, first(x), first(silu(x))),
    "modulate, constants": lambda x: modulate(x, last(Z, x)[:, :1], last(X, x)[:, 1:2]),
    "only the modulation moves": lambda x: modulate(last(Z, x), first(x), first(silu(x))),
    "sums": lambda x: subtract(add(add(x, last(Z, x)), silu(x)), first(x)),
    "products": lambda x: multiply(multiply(x, last(Z, x)), silu(x)),
    "parts": lambda x: concatenate([last(Z, x), *unpack(lambda x: x.split(1, 1), silu(x))], 1),
    "sinusoids": lambda x: sinusoids(linear_map(lambda x: x[:, 0, 0], x)),
}


def last(constant, x):
    """A constant of all examples, or of those that torch.func.jvp is taken of."""
    return constant if isinstance(x, Dual) or len(x) == B else constant[-len(x) :]


def error(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def results(layer, way, n, through):
    """Value, tangent, and the gradients of both to input and tangent."""
    x, t = X.clone().requires_grad_(), T[-n:].clone().requires_grad_()
    if way == "dual":
        y, t_y, _ = layer(Dual(x, t, through))
    else:
        y, t_y = torch.func.jvp(layer, (x[-n:],), (t,))
        if n < B:
            y = torch.cat([way_of_the_rest(layer, x[:-n], n), y])
    loss = (y * y.detach().cos()).sum()
    if through:
        loss = loss + (t_y.sin() * t_y.detach().cos()).sum()
    gradients = torch.autograd.grad(loss, (x, t) if through else (x,))
    return [y, t_y, *gradients]


def way_of_the_rest(layer, x, n):
    """The examples without tangent; constants are those of the first B - n."""
    global Z, X
    kept = Z, X
    Z, X = Z[:-n], X[:-n]
    try:
        return layer(x)
    finally:
        Z, X = kept


@pytest.mark.parametrize("through", [False, True], ids=["constant", "through"])
@pytest.mark.parametrize("n", [B, 2, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_own_jvp(name, n, through):
    ours, theirs = (results(LAYERS[name], way, n, through) for way in ("dual", "func"))
    assert [error(a, b) < 1e-13 for a, b in zip(ours, theirs, strict=True)] == [True] * len(ours)


def test_a_constant_tangent_has_no_graph():
    for layer in LAYERS.values():
        y = layer(Dual(X.clone().requires_grad_(), T, False))
        assert y.primal.requires_grad
        assert not y.tangent.requires_grad


def test_value_and_tangent_lose_the_same_units():
    y = Dropout(0.5)(Dual(X, X))
    assert torch.equal(y.primal, y.tangent)
    assert 0 < int((y.primal == 0).sum()) < X.numel()


def test_a_tangent_costs_one_product():
    x = torch.randn(4, 6)
    layer = Linear(6, 6)
    with FlopCounterMode(display=False) as counter:
        layer(Dual(x, x[2:]))
    assert counter.get_total_flops() == 1.5 * 4 * 6 * 6 * 2
    assert layer.state_dict().keys() == torch.nn.Linear(6, 6).state_dict().keys()


MODELS = {
    "sin_cos": {},
    "residual_in_fp32=false": {"residual_in_fp32": False},
    "rope, qk_norm, rms, swiglu": {
        "positions": "rope", "qk_norm": True, "norm": "rms", "mlp": "swiglu",
    },
    "cross": {"cross_tokens": 3},
    "prefix, guided, second head": {"label_tokens": 2, "guided": True, "second_head": 1},
    "t_r": {"conditioning": "t_r"},
    "h": {"conditioning": "h"},
    "t": {"conditioning": "t"},
    "t_then_r": {"conditioning": "t_then_r", "late_blocks": 1},
}  # fmt: skip


def network(attention=jvp_attention, **options):
    torch.manual_seed(1)
    net = DiT(attention, 8, 1, 10, size="tiny", width=32, heads=2, depth=2, **options).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def step(net, derive, n, through):
    """Value, tangent and the gradients of every parameter."""
    torch.manual_seed(2)
    z, v = torch.randn(2, B, 1, 8, 8, dtype=torch.float64)
    t, r = torch.rand(2, B, dtype=torch.float64)
    y = torch.randint(0, 10, (B,))
    two = net.second_blocks is not None
    f = net.heads if two else lambda *x: (net(*x), ())
    along = (v[-n:], torch.ones(n, dtype=torch.float64), None, None)
    u, du, aux = derive(f, (z, t, r, y), along, through)
    loss = (u.sin() * v).sum() + ((aux * v).sum() if two else 0)
    if through:
        loss = loss + (du.sin() * v[-n:]).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    return [u.detach(), du.detach(), *gradients]


@pytest.mark.parametrize("through", [False, True], ids=["constant", "through"])
@pytest.mark.parametrize("n", [B, 2])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_chain_is_the_jvp_of_the_whole_network(options, n, through):
    net = network(**options)
    assert takes_duals(net)
    assert takes_duals(net.heads)
    ours, whole = (step(net, derive, n, through) for derive in (_by_blocks, _whole))
    assert len(ours) == len(whole)
    assert max(map(error, ours, whole)) < 1e-12


@pytest.mark.parametrize("derive", [_by_blocks, _whole])
@pytest.mark.parametrize("through", [False, True], ids=["constant", "through"])
def test_positions_added_in_place_change_no_derivative(through, derive):
    ours, plain = (
        step(network(residual_in_fp32=wide), derive, 2, through) for wide in (False, True)
    )
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("attention", [sdpa, jvp_attention], ids=["sdpa", "jvp"])
def test_so_it_is_with_any_attention(attention):
    net, reference = network(attention), network()
    for through in (False, True):
        ours, whole = step(net, _by_blocks, 2, through), step(reference, _whole, 2, through)
        assert max(map(error, ours, whole)) < 1e-12


@pytest.mark.parametrize("through", [False, True], ids=["constant", "through"])
@pytest.mark.parametrize("keep", CHOICES[1:])
def test_checkpointed_blocks_give_the_same_gradients(keep, through):
    net = network(dropout=0.3, cross_tokens=2)
    kept = step(net, _by_blocks, 2, through)
    checkpoint_blocks(net, keep)
    again = step(copy.deepcopy(net), _by_blocks, 2, through)  # as the averages copy it
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.compile
@pytest.mark.parametrize(
    "through", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["constant", "through"]
)
def test_blocks_are_compiled_once_whatever_their_number(through):
    net = network()
    eager = step(net, _by_blocks, 2, through)
    compile_blocks(net, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = step(net, _by_blocks, 2, through)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # a block, the last layer
    assert max(map(error, compiled, eager)) < 1e-12


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_blocks_can_be_checkpointed_through_the_tangent():
    net = network()
    eager = step(net, _by_blocks, 2, True)
    checkpoint_blocks(net, "block")
    compile_blocks(net, backend="aot_eager")
    torch._dynamo.reset()
    assert max(map(error, step(net, _by_blocks, 2, True), eager)) < 1e-12


def test_modes_of_a_network_agree():
    found = {}
    for mode in ("single", "double", "finite_difference", "tangent_grad"):
        net = network()
        derive = lambda f, x, t_x, _, mode=mode: Jvp(mode, 1e-4).with_aux(net, x, t_x, aux=False)  # noqa: B023, E731
        found[mode] = step(net, derive, 2, False)
    for mode in ("double", "tangent_grad"):
        assert max(map(error, found[mode], found["single"])) < 1e-12
    assert error(found["finite_difference"][1], found["single"][1]) < 1e-5
