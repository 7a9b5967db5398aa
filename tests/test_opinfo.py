"""PyTorch's own samples of `scaled_dot_product_attention`, and shapes that broadcast as it does,
against its MATH backend in float64, and against finite differences by `gradcheck`.
"""

from inspect import signature

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.autograd.functional import jvp as functional_jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jvp_flash_attention import attention, attention_jvp, reference
from tests.cases import close

pytest.importorskip("expecttest")  # PyTorch's test helpers import it
from torch.testing._internal.common_methods_invocations import op_db

NAME = "nn.functional.scaled_dot_product_attention"
DOUBLE = torch.float64


def samples():
    """[((q, k, v, mask or None), is_causal)] of every sample without dropout."""
    (op,) = (op for op in op_db if op.name == NAME)
    found = []
    for sample in op.sample_inputs("cpu", DOUBLE, requires_grad=True):
        kwargs = dict(sample.kwargs)
        if kwargs.pop("dropout_p", 0.0) == 0.0:
            mask, causal = kwargs.pop("attn_mask", None), kwargs.pop("is_causal", False)
            assert not kwargs
            found.append(((sample.input, *sample.args, mask), causal))
    return found


SAMPLES = samples()
# q, k, v, enable_gqa
BROADCAST = [
    ((4, 3, 2), (2, 4, 5, 2), (2, 4, 5, 2), False),
    ((2, 1, 3, 2), (2, 4, 5, 2), (2, 4, 5, 2), False),
    ((2, 4, 3, 2), (2, 1, 5, 2), (2, 4, 5, 3), False),
    ((2, 4, 3, 2), (2, 1, 5, 2), (2, 1, 5, 2), False),
    ((1, 4, 3, 2), (2, 1, 5, 2), (1, 4, 5, 2), False),
    ((3, 2), (2, 1, 5, 2), (1, 4, 5, 2), False),
    ((3, 2), (5, 2), (5, 3), False),
    ((3, 2), (4, 5, 2), (5, 2), False),
    ((2, 4, 3, 2), (2, 2, 5, 2), (2, 4, 5, 2), True),
    ((2, 4, 3, 2), (2, 2, 5, 2), (1, 1, 5, 3), True),
    ((1, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 2), True),
    ((3, 2, 4, 3, 2), (2, 4, 5, 2), (4, 5, 2), False),
    ((3, 1, 4, 3, 2), (1, 2, 1, 5, 2), (4, 5, 2), False),
    ((2, 3, 4, 0), (2, 3, 5, 0), (2, 3, 5, 2), False),
    ((2, 3, 4, 2), (2, 3, 5, 2), (2, 3, 5, 0), False),
    ((2, 0, 4, 2), (2, 0, 5, 2), (2, 0, 5, 2), False),
    ((2, 3, 4, 2), (2, 3, 0, 2), (2, 3, 0, 2), False),
    ((2, 3, 0, 2), (2, 3, 5, 2), (2, 3, 5, 2), False),
    ((0, 3, 4, 2), (0, 3, 5, 2), (1, 3, 5, 2), False),
]


def draw(shapes, dtype=DOUBLE, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=dtype, generator=rng) for s in shapes]


def exact(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def derivatives(f, inputs):
    """Everything of order one and two that f has at the inputs, along fixed directions."""
    x = tuple(i.detach().requires_grad_() for i in inputs)
    t = tuple(draw([i.shape for i in x], seed=1))
    every = {"allow_unused": True, "materialize_grads": True}
    out = f(*x)
    (d,) = draw([out.shape], seed=2)
    grads = torch.autograd.grad(out, x, d, create_graph=True)
    along = sum((g * s).sum() for g, s in zip(grads, t, strict=True)) + sum(0 * i.sum() for i in x)
    _, t_out = torch.func.jvp(f, x, t)
    through = (t_out * d).sum() + sum(0 * i.sum() for i in x)
    slope = lambda *x: torch.func.vjp(f, *x)[1](d)  # noqa: E731
    return [
        out,
        *grads,
        *torch.autograd.grad(along, x, **every),
        t_out,
        *torch.autograd.grad(through, x, **every),
        *torch.func.jvp(slope, x, t)[1],
    ]


def compare(f, g, inputs):
    got, want = derivatives(f, inputs), derivatives(g, inputs)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        close(a, b)
    return got[0]


def test_the_samples_are_all_there(record_property):
    record_property("samples", len(SAMPLES))
    print(f"{NAME}: {len(SAMPLES)} samples without dropout")
    assert len(SAMPLES) >= 13


@pytest.mark.parametrize("at", range(len(SAMPLES)))
def test_every_derivative_of_a_sample_is_that_of_pytorchs_attention(at):
    (*inputs, mask), causal = SAMPLES[at]
    inputs += [] if mask is None else [mask]
    compare(
        lambda *x: attention(*x, is_causal=causal), lambda *x: exact(*x, is_causal=causal), inputs
    )


@pytest.mark.parametrize("at", range(len(SAMPLES)))
def test_a_sample_passes_the_checks_that_pytorch_makes_of_its_operators(at):
    """Batched by PyTorch's older vmap too, forward over reverse too."""
    (*inputs, mask), causal = SAMPLES[at]
    inputs += [] if mask is None else [mask]
    f = lambda *x: attention(*x, is_causal=causal)  # noqa: E731
    batched = {"check_batched_grad": True, "fast_mode": True}
    gradcheck(f, inputs, check_forward_ad=True, check_batched_forward_grad=True, **batched)
    gradgradcheck(f, inputs, check_fwd_over_rev=True, **batched)


@pytest.mark.parametrize("at", range(len(SAMPLES)))
def test_a_sample_is_mapped_over_every_input(at):
    (*inputs, mask), causal = SAMPLES[at]
    inputs = [x.detach() for x in (*inputs, mask) if x is not None]
    f = lambda *x: attention(*x, is_causal=causal)  # noqa: E731
    for mapped in ({0}, {1, 2}, set(range(len(inputs)))):
        many = [torch.stack([x, x.sin()], -1) if i in mapped else x for i, x in enumerate(inputs)]
        dims = tuple(-1 if i in mapped else None for i in range(len(inputs)))
        pick = lambda n: [x[..., n] if i in mapped else x for i, x in enumerate(many)]  # noqa: E731, B023
        want = torch.stack([f(*pick(n)) for n in range(2)])
        close(torch.func.vmap(f, dims)(*many), want)
        t = tuple(draw([x.shape for x in many]))
        got = torch.func.jvp(torch.func.vmap(f, dims), tuple(many), t)[1]
        want = torch.func.jvp(torch.func.vmap(lambda *x: exact(*x, is_causal=causal), dims),
                              tuple(many), t)[1]  # fmt: skip
        close(got, want)


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_dimensions_broadcast_as_in_pytorchs_attention(shapes):
    *shapes, gqa = shapes
    inputs = draw(shapes)
    out = compare(
        lambda *x: attention(*x, enable_gqa=gqa), lambda *x: exact(*x, enable_gqa=gqa), inputs
    )
    assert out.is_contiguous()
    t = draw(shapes, seed=1)
    _, t_want = torch.func.jvp(lambda *x: exact(*x, enable_gqa=gqa), tuple(inputs), tuple(t))
    out_2, t_out = attention_jvp(*inputs, *t, enable_gqa=gqa)
    close(out_2, out)
    close(t_out, t_want)


@pytest.mark.parametrize("mask", [(5,), (3, 1), (4, 1, 5), (1, 3, 5), (2, 1, 1, 5), (2, 4, 3, 5)])
def test_a_mask_broadcasts_beside_inputs_that_do(mask):
    (mask,) = draw([mask], seed=3)
    for shapes in [((4, 3, 2), (2, 1, 5, 2), (2, 4, 5, 2)), ((1, 4, 3, 2), (2, 4, 5, 2), (5, 2))]:
        compare(attention, exact, [*draw(shapes), mask])


@pytest.mark.parametrize("shapes", [*BROADCAST[1:3], BROADCAST[4], BROADCAST[9]], ids=str)
def test_the_kernels_take_stride_zero(shapes):
    *shapes, gqa = shapes
    x, t = draw(shapes, torch.float32), draw(shapes, torch.float32, seed=1)
    how = {"enable_gqa": gqa}
    got = attention_jvp(*x, *t, backend="triton", **how)
    want = attention_jvp(*(i.double() for i in (*x, *t)), backend="reference", **how)
    y = [i.clone().requires_grad_() for i in x]
    z = [i.double().requires_grad_() for i in x]
    both = attention_jvp(*y, *t, backend="triton", **how)
    both_64 = attention_jvp(*z, *(i.double() for i in t), backend="reference", **how)
    (d,) = draw([got[0].shape], torch.float32, seed=2)
    got += torch.autograd.grad(((both[0] + both[1]) * d).sum(), y)
    want += torch.autograd.grad(((both_64[0] + both_64[1]) * d.double()).sum(), z)
    for g, w in zip(got, want, strict=True):
        assert float((g.double() - w).norm()) <= 6e-6 * float(w.norm())


def test_nothing_is_copied_before_the_kernels():
    """Batch entries and heads that are shared have stride 0 there."""
    from jvp_flash_attention import api

    q, k, v = draw([(1, 4, 3, 2), (2, 4, 5, 2), (4, 5, 2)])
    ready = api.prepare(q, k, v, None, 0.0, False, None, False, None)[0][:3]
    assert [x.data_ptr() for x in ready] == [x.data_ptr() for x in (q, k, v)]
    assert [x.stride(0) for x in ready] == [0, k.stride(0), 0]
    q, k, v = draw([(2, 4, 3, 2), (2, 1, 5, 2), (1, 1, 5, 2)])  # one head serves all, as a group
    ready = api.prepare(q, k, v, None, 0.0, False, None, False, None)[0][:3]
    assert [tuple(x.shape[:2]) for x in ready] == [(2, 4), (2, 1), (2, 1)]
    assert [x.data_ptr() for x in ready] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_batched_cotangents_and_tangents_of_autograd_functional(strategy):
    q, y = draw([(2, 2, 2), (1, 4, 2)])
    f = lambda q: attention(q, y, y.sin())  # noqa: E731
    g = lambda q: f(q).square().sum()  # noqa: E731
    close(jacobian(f, q, vectorize=True, strategy=strategy), jacobian(f, q))
    got = hessian(g, q, vectorize=True, outer_jacobian_strategy=strategy)
    close(got, torch.func.hessian(g)(q))


def test_autograd_functional_jvp_runs_no_pass_that_it_throws_away(monkeypatch):
    """Its double backward wants the tangent alone, and says so to nobody but the engine."""
    passes = []

    def spied(name, run):
        jvp = {"forward": "t", "backward": "d_t_out"}[name]

        def spy(*args):
            given = signature(run).bind(*args).arguments
            passes.append(name if given[jvp] is None else f"{name}_jvp")
            return run(*args)

        return spy

    for name in ("forward", "backward"):
        monkeypatch.setattr(reference, name, spied(name, getattr(reference, name)))
    x, t, w = draw([(2, 2, 3, 4), (2, 2, 3, 4), (4, 4)])
    w.requires_grad_()
    mask = draw([(3, 3)])[0]
    for f in (
        lambda x: attention(x @ w, x.sin(), 2 * x),
        lambda x: attention(x, x, x @ w, x.mean() * mask),
    ):
        passes.clear()
        out, t_out = functional_jvp(f, x, t, create_graph=True)
        assert passes == ["forward", "backward", "forward_jvp"]
        want = torch.func.jvp(f, (x,), (t,))
        close(t_out, want[1])
        got, want = ((a.sin() + b.sin()).sum() for a, b in ((out, t_out), want))
        close(*(torch.autograd.grad(y, w)[0] for y in (got, want)))


@pytest.mark.parametrize("wanted", ["q", "v", "qk", "d"])
def test_a_double_backward_has_every_gradient_that_is_wanted(wanted):
    inputs = dict(zip("qkvd", draw([(2, 2, 3, 4)] * 4), strict=True))
    found = []
    for f in (attention, exact):
        x = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        q, k, v = (x[name] for name in "qkv")  # leaves, of which the engine does not say
        dq = torch.autograd.grad(f(q, k * 1, v * 1), q, x["d"], create_graph=True)[0]
        found.append(torch.autograd.grad(dq.sin().sum(), [x[name] for name in wanted]))
    for got, want in zip(*found, strict=True):
        close(got, want)


def test_the_older_vmap_over_the_inputs():
    from torch._vmap_internals import _vmap

    q, y = draw([(3, 2, 2, 4, 2), (1, 3, 2)])
    q.requires_grad_()
    got, want = _vmap(lambda q: attention(q, y, y))(q), attention(q, y, y)
    close(got, want)
    close(*(torch.autograd.grad(x.sin().sum(), q)[0] for x in (got, want)))


@pytest.mark.compile
@pytest.mark.parametrize("shapes", [BROADCAST[4], BROADCAST[9]], ids=str)
def test_broadcasting_compiles(shapes):
    *shapes, gqa = shapes
    x, t = tuple(draw(shapes)), tuple(draw(shapes, seed=1))
    f = lambda *x: attention(*x, enable_gqa=gqa)  # noqa: E731
    torch._dynamo.reset()
    step = torch.compile(lambda *x: torch.func.jvp(f, x, t), fullgraph=True, backend="aot_eager")
    for got, want in zip(step(*x), torch.func.jvp(f, x, t), strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.float32])
def test_a_tangent_of_another_dtype_is_taken_in_its_primals(kind):
    q, t = draw([(1, 2, 5, 4)] * 2, torch.float32)
    t = t.half().float()  # exact in each
    want = torch.func.jvp(lambda q: attention(q, q, q), (q,), (t,))[1]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(q, t.to(kind))
        got = forward_ad.unpack_dual(attention(x, x, x)).tangent
    assert torch.equal(got, want)
    assert torch.equal(torch.func.jvp(lambda q: attention(q, q, q), (q,), (t.to(kind),))[1], want)
