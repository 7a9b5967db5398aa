"""`torch.compile(fullgraph=True)` trains with the same gradients as eager."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from jvp_flash_attention import attention, attention_jvp, ops, reference
from tests.cases import Case, build

pytestmark = pytest.mark.compile

# before 2.11 the compiler put its own words in place of an exception's, and had no gradient through
# a compiled jvp's tangent
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
OLDER = VERSION < (2, 11)


def says(words: str) -> str:
    return f"{words}|Observed exception" if OLDER else words


class Net(nn.Module):
    """One attention layer conditioned on a time t."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.time = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(1, 32)

    def forward(self, x, t, **how):
        q, k, v = (
            self.qkv(x + self.time(t)[:, None]).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        )
        return self.out(attention(q, k, v, **how).transpose(1, 2).flatten(2))


def plain(net, x, t, v):
    return (net(x, t) - v).square().mean()


def meanflow(net, x, t, v):
    u, du = jvp(net, (x, t), (v, torch.ones_like(t)))
    return (u - (v - 0.3 * du).detach()).square().mean()


def meanflow_by_the_keyword(net, x, t, v):
    f = lambda x, t: net(x, t, tangent_grad=False)  # noqa: E731
    u, du = jvp(f, (x, t), (v, torch.ones_like(t)))
    return (u - (v - 0.3 * du).detach()).square().mean()


def through_the_tangent(net, x, t, v):
    u, du = jvp(net, (x, t), (v, torch.ones_like(t)))
    return (u - v + 0.3 * du).square().mean()


THOROUGH = [plain, meanflow_by_the_keyword]
STEPS = [meanflow, through_the_tangent]
STEPS += [pytest.param(f, marks=pytest.mark.slow) for f in THOROUGH]
# inductor compiles a loss through the tangent in test_window.py too
ON_CPU = [(meanflow, "inductor"), (through_the_tangent, "inductor" if OLDER else "aot_eager")]
NIGHTLY = THOROUGH if OLDER else [*THOROUGH, through_the_tangent]
ON_CPU += [pytest.param(f, "inductor", marks=pytest.mark.slow) for f in NIGHTLY]


@pytest.mark.parametrize(("step", "backend"), ON_CPU)
def test_compiled_step_has_the_gradients_of_eager(step, backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = Net()
    args = torch.randn(2, 9, 32), torch.rand(2, 1), torch.randn(2, 9, 32)
    eager_loss = step(net, *args)
    eager_loss.backward()
    eager = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    compiled = torch.compile(lambda *x: step(net, *x), fullgraph=True, backend=backend)
    if OLDER and step is through_the_tangent:
        with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
            compiled(*args).backward()
        return
    loss = compiled(*args)
    loss.backward()
    torch.testing.assert_close(loss, eager_loss)
    for p, exact in zip(net.parameters(), eager, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not (2, 11) <= VERSION < (2, 14), reason="of these versions of PyTorch")
def test_zeros_with_memory_let_inductor_differentiate_through_the_tangent(monkeypatch):
    """Of a network on which it fails otherwise, by the recipe of docs/integrations.md."""
    from torch._inductor import decomposition

    page = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    (recipe,) = re.findall(r"tests/test_compile.py -->\n```py\n(.*?)^```", page, re.M | re.S)

    def step(net, x, t, v):
        f = lambda x: nn.functional.silu(x + net(x, t))  # noqa: E731
        u, du = jvp(f, (x,), (v,))
        return (u - v + 0.3 * du).square().mean()

    torch.manual_seed(0)
    net = Net()
    args = torch.randn(2, 9, 32), torch.rand(2, 1), torch.randn(2, 9, 32)
    step(net, *args).backward()
    eager = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    table = decomposition.decompositions.copy()
    monkeypatch.setattr(decomposition, "decompositions", table)  # the recipe is for the process
    monkeypatch.setattr(decomposition, "fast_random_decomps", lambda: table)
    for helped in (False, True):
        torch._dynamo.reset()
        loss = torch.compile(lambda *x: step(net, *x), fullgraph=True)(*args)
        if not helped:
            with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
                loss.backward()
            exec(recipe, {})
            continue
        loss.backward()
        for p, exact in zip(net.parameters(), eager, strict=True):
            torch.testing.assert_close(p.grad, exact, rtol=1e-4, atol=1e-6)


def value_then_tangent(q, t):
    return attention(q, q, q) + jvp(lambda x: attention(x, x, x), (q,), (t,))[1]


def test_a_plain_call_before_a_jvp_in_one_graph():
    torch._dynamo.reset()
    q, t = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    compiled = torch.compile(value_then_tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, t), value_then_tangent(q, t))


def test_one_graph_serves_every_length():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(value_then_tangent, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 12, 31):
        q, t = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
        torch.testing.assert_close(compiled(q, t), value_then_tangent(q, t))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_both_outputs_of_the_explicit_form_have_their_gradients():
    torch._dynamo.reset()
    x = [torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    weights = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64)

    def loss(*x):
        out, t_out = attention_jvp(*x)
        return (out * weights[0]).sum() + (t_out * weights[1]).sum()

    exact = torch.autograd.grad(loss(*x), x)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*x), x)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e)


def test_a_tangent_without_gradient_saves_no_tangent_and_copies_no_view(monkeypatch):
    torch._dynamo.reset()
    came, run = [], reference.forward
    monkeypatch.setattr(reference, "forward", lambda *x: came.extend(x[:2]) or run(*x))
    x, t, weight = (torch.randn(n, 32, requires_grad=True) for n in (18, 18, 96))
    heads = lambda x: (x @ weight.T).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)  # noqa: E731

    def outputs(x, t, **how):
        return attention_jvp(*heads(x), *heads(t), **how)

    compiled = torch.compile(lambda *x: outputs(*x, tangent_grad=False), fullgraph=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, t_out = compiled(x, t)
    for views in (came[0][:3], came[1][:3]):  # of one projection, as they were made
        assert len({x.untyped_storage().data_ptr() for x in views}) == 1
        assert {x.stride() for x in views} == {(9 * 96, 8, 96, 1)}
    exact, t_exact = outputs(x, t)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(t_out, t_exact)
    assert not t_out.requires_grad
    assert sorted({y.untyped_storage().data_ptr(): y.numel() for y in saved}.values()) == sorted(
        y.numel()
        for y in (x, weight, came[0].q, out, out[..., 0])  # of the projection; q, k, v; O, LSE
    )
    leaves = (x, weight)
    got = torch.autograd.grad(out.square().sum(), leaves)
    for g, e in zip(got, torch.autograd.grad(exact.square().sum(), leaves), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_number_may_vary_between_the_calls_of_one_function(name):
    """The compiler takes it for a symbol from the second value on."""
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    f = lambda x: attention(q, k, v, **{name: x})  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for x in (0.5, 2.0, 3.0):
        torch.testing.assert_close(compiled(x), f(x))


@pytest.mark.parametrize(
    "case",
    [
        Case(L=5, S=6, D=4),
        Case(L=5, S=6, D=4, Dv=3, mask="key", causal=True, softcap=0.7),
        Case(L=5, S=6, D=4, packed=((0, 2, 5), (0, 4, 5)), causal=True),
    ],
    ids=str,
)
def test_operators_pass_opcheck(case):
    p = build(case, torch.float64)
    spec = p.spec._replace(backend="reference")
    q, k, v, mask = (None if x is None else x.requires_grad_() for x in p.primals)
    checks = (
        "test_schema",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
        "test_autograd_registration",
    )
    x, t = p.x._replace(q=q, k=k, v=v, mask=mask), p.tangents
    torch.library.opcheck(ops.forward_op, (*x, *spec), test_utils=checks)
    torch.library.opcheck(ops.forward_jvp_op, (*x, *t, *spec), test_utils=checks)
    saved = [y.detach() for y in ops.forward_jvp_op(*x, *t, *spec)]
    x = [None if y is None else y.detach() for y in x]
    torch.library.opcheck(
        ops.backward_op,
        (p.d_out, *x, *saved[:2], None, None, *spec, p.mask_grad),
        test_utils=checks[:2],
    )
    torch.library.opcheck(
        ops.backward_jvp_op,
        (p.d_out, p.d_t_out, *x, *t, *saved, *spec, p.mask_grad),
        test_utils=checks[:2],
    )


def test_a_compiled_jvp_of_a_jvp_raises_and_is_not_zero():
    torch._dynamo.reset()
    q = torch.randn(1, 2, 9, 8)
    inner = lambda x: jvp(lambda y: attention(y, q, q), (x,), (q,))[1]  # noqa: E731
    twice = lambda x: jvp(inner, (x,), (q,))[1]  # noqa: E731
    for fullgraph in (True, False):
        with pytest.raises(Exception, match=says("jvp of a jvp|has no tangent of its own")):
            torch.compile(twice, fullgraph=fullgraph, backend="aot_eager")(q)


def test_a_compiled_jvp_of_the_explicit_form_raises_and_is_not_zero():
    torch._dynamo.reset()
    q = torch.randn(1, 2, 9, 8)
    f = lambda x: jvp(lambda y: attention_jvp(y, q, q, q, None, None), (x,), (q,))[1]  # noqa: E731
    with pytest.raises(Exception, match=says("jvp of a jvp|has no tangent of its own")):
        torch.compile(f, fullgraph=True, backend="aot_eager")(q)


Q, K, V, T, Y = torch.randn(
    5, 2, 1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)
k, v, t, y = K[0], V[0], T[0], Y[0]


def loss(q):
    return attention(q, k, v).square().sum()


def in_inference_mode(q):
    with torch.inference_mode():
        return attention(q, k, v), *jvp(lambda q: attention(q, k, v), (q,), (t,))


TRANSFORMS = {
    "inference mode": in_inference_mode,
    "vmap": lambda q: vmap(attention)(torch.stack([q, t]), K, V),
    "grad": grad(loss),
    "vjp": lambda q: vjp(lambda q: attention(q, k, q), q)[1](y),
    "jacrev": jacrev(lambda q: attention(q, k, v).sum(-1)),
    "jacfwd": jacfwd(lambda q: attention(q, k, v).sum(-1)),
    "jvp of grad": lambda q: jvp(grad(loss), (q,), (t,)),
    "grad of jvp": grad(lambda q: jvp(lambda z: attention(z, k, q), (q,), (t,))[1].square().sum()),
    "vmap of jvp": lambda q: vmap(lambda q, t: jvp(attention, (q, k, q), (t, k, t)))(
        q[None], T[:1]
    ),
    "jvp of vmap": lambda q: jvp(lambda q: vmap(attention)(torch.stack([q, q]), K, V), (q,), (t,)),
    "jvp of another's grad": lambda q: jvp(
        lambda q: grad(lambda x: (attention(q, k, v) * x).sum())(y), (q,), (t,)
    ),
    "jvp of another's jvp": lambda q: jvp(
        lambda q: jvp(lambda x: x * attention(q, k, v), (y,), (y,)), (q,), (t,)
    ),
    "grad of the explicit form": grad(
        lambda q: attention_jvp(q, k, v, t, None, q)[1].square().sum()
    ),
    "vmap of the explicit form": lambda q: vmap(lambda q: attention_jvp(q, k, v, t, None, q))(
        q[None]
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_inside_a_compiled_function_is_that_of_eager(name):
    torch._dynamo.reset()
    compiled = torch.compile(TRANSFORMS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Q[0]), TRANSFORMS[name](Q[0]))
    assert torch.ones(1).sum() == 1  # PyTorch is still itself


def test_a_compiled_vmap_trains():
    torch._dynamo.reset()
    x = [y.clone().requires_grad_() for y in (Q, K, V)]
    run = lambda *x: vmap(attention)(*x).square().sum()  # noqa: E731
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*x), x)
    torch.testing.assert_close(got, torch.autograd.grad(run(*x), x))


def test_a_tangent_without_gradient_in_a_compiled_nest_of_transforms_raises():
    torch._dynamo.reset()
    inner = lambda q: attention(q, k, v, tangent_grad=False).sum()  # noqa: E731
    nest = lambda q: jvp(grad(inner), (q,), (t,))  # noqa: E731
    with pytest.raises(Exception, match=says("leave it out and detach")):
        torch.compile(nest, fullgraph=True, backend="aot_eager")(Q[0])
