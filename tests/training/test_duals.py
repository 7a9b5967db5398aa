"""Layers with their own tangents against PyTorch's rules for the same formulas, in float64."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import linear
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from training.models.duals import Linear, layer_norm, modulate, rms_norm

torch.manual_seed(0)
LAYER = Linear(6, 6).double()
X, T = (torch.randn(3, 4, 6, dtype=torch.float64) for _ in range(2))


def plain_linear(x):
    return linear(x, LAYER.weight, LAYER.bias)


def plain_rms_norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


LAYERS = {
    "linear": (LAYER, plain_linear),
    "rms_norm": (rms_norm, plain_rms_norm),
    "layer_norm": (layer_norm, lambda x: plain_rms_norm(x - x.mean(-1, keepdim=True))),
    "modulate": (lambda x: modulate(x, x.cos(), x.sin()), lambda x: x * (1 + x.sin()) + x.cos()),
    "modulate, constants": (lambda x: modulate(x, X, T), lambda x: x * (1 + T) + X),
}


def through(f):
    """Value and tangent with their gradients to input, tangent and weights."""
    x, t = X.clone().requires_grad_(), T.clone().requires_grad_()
    y, t_y = jvp(f, (x,), (t,))
    inputs = (x, t, *LAYER.parameters())
    gradients = torch.autograd.grad((y * X + t_y.sin()).sum(), inputs, allow_unused=True)
    return y, t_y, *(g for g in gradients if g is not None)


def dual_level(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, T)))


COMPOSITIONS = {
    "plain": lambda f: f(X),
    "jvp": lambda f: jvp(f, (X,), (T,)),
    "gradient of jvp": through,
    "dual_level": dual_level,
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (T,))[1].sin().sum())(X),
    "jvp of grad": lambda f: jvp(grad(lambda x: f(x).sum()), (X,), (T,)),
    "jvp of jvp": lambda f: jvp(lambda x: jvp(f, (x,), (T,))[1], (X,), (T,)),
    "vmap of jvp": lambda f: vmap(lambda x, t: jvp(f, (x,), (t,)))(X, T),
    "jvp of vmap": lambda f: jvp(vmap(f), (X,), (T,)),
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_composition_is_that_of_the_plain_formula(layer, composition):
    f, plain = (lambda x, g=g: g(x.sin()).sin() for g in LAYERS[layer])
    ours, theirs = tree_leaves(COMPOSITIONS[composition](f)), COMPOSITIONS[composition](plain)
    torch.testing.assert_close(ours, tree_leaves(theirs), rtol=1e-10, atol=1e-12)


@pytest.mark.compile
@pytest.mark.parametrize("composition", ["jvp", "grad of jvp", "jvp of grad", "jvp of vmap"])
@pytest.mark.parametrize("layer", LAYERS)
def test_so_is_every_compiled_one(layer, composition):
    f, plain = LAYERS[layer]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: COMPOSITIONS[composition](f), fullgraph=True, backend="aot_eager"
    )
    theirs = tree_leaves(COMPOSITIONS[composition](plain))
    torch.testing.assert_close(tree_leaves(compiled()), theirs, rtol=1e-10, atol=1e-12)


def test_weights_may_have_a_tangent():
    weights, tangents = dict(LAYER.named_parameters()), {"weight": T[0].T @ T[0], "bias": T[0, 0]}
    ours = jvp(lambda x, w: functional_call(LAYER, w, x), (X, weights), (T, tangents))
    theirs = jvp(lambda x, w: linear(x, w["weight"], w["bias"]), (X, weights), (T, tangents))
    torch.testing.assert_close(ours, theirs)


def test_a_gradient_inside_of_the_jvp_keeps_its_tangent():
    def f(x, layer):
        weight = nn.Parameter(LAYER.weight.detach() * x.sum())
        y = functional_call(layer, {"weight": weight}, x)
        return torch.autograd.grad(layer_norm(y).sin().sum(), weight)[0]

    ours, theirs = (jvp(lambda x, m=m: f(x, m), (X,), (T,)) for m in (LAYER, plain_module()))
    torch.testing.assert_close(ours, theirs)


def plain_module():
    module = nn.Linear(6, 6).double()
    module.load_state_dict(LAYER.state_dict())
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_casts_value_and_tangent_as_in_a_plain_call(layer, dtype):
    f, plain = LAYERS[layer]
    f = copy.deepcopy(LAYER).float() if f is LAYER else f  # float64 is not cast
    with torch.autocast("cpu", dtype):
        value = f(X.to(dtype))
        y, t_y = jvp(f, (X.to(dtype),), (T.to(dtype),))
    assert y.dtype == t_y.dtype == value.dtype
    torch.testing.assert_close(y, value)
    exact = jvp(plain, (X,), (T,))
    torch.testing.assert_close((y.double(), t_y.double()), exact, rtol=0.05, atol=0.05)


def flops(net, run):
    with FlopCounterMode(display=False) as counter:
        run(net)
    return counter.get_total_flops()


def test_a_tangent_costs_one_product_and_the_names_of_weights_are_those_of_nn_linear():
    layer, x = Linear(6, 6), torch.randn(4, 6)
    once = flops(layer, lambda f: f(x))
    assert flops(layer, lambda f: jvp(f, (x,), (x,))) == 2 * once
    assert flops(nn.Linear(6, 6), lambda f: jvp(f, (x,), (x,))) == 3 * once, "PyTorch has mended it"
    assert isinstance(layer, nn.Linear)
    assert layer.state_dict().keys() == nn.Linear(6, 6).state_dict().keys()


@pytest.mark.compile
def test_neither_does_it_compiled():
    products = []

    def count(graph, _):
        products.extend(n for n in graph.graph.nodes if "mm" in str(n.target))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    f = torch.compile(
        lambda x: jvp(LAYER, (x,), (T,)), fullgraph=True, backend=aot_autograd(fw_compiler=count)
    )
    with torch.no_grad():
        f(X)
    assert len(products) == 2, products
