"""Every composition of PyTorch's transforms gives the derivative of dense attention, or raises;
none is silently wrong.
"""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from jvp_flash_attention import attention, attention_jvp, selfcheck
from jvp_flash_attention.selfcheck import COMPOSITIONS, THIRD_ORDER, Inputs, dense, ours
from tests.cases import close


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition_equals_dense_attention(name):
    inputs = Inputs()
    got, exact = COMPOSITIONS[name](inputs, ours), COMPOSITIONS[name](inputs, dense)
    for g, e in zip(selfcheck.flat(got), selfcheck.flat(exact), strict=True):
        close(g, e)


@pytest.mark.parametrize("name", THIRD_ORDER)
def test_what_is_not_supported_raises(name):
    with pytest.raises(NotImplementedError, match=r"third derivative|jvp of a jvp"):
        THIRD_ORDER[name](Inputs(), ours)


def test_selfcheck_prints_every_composition_and_notices_a_wrong_one(capsys, monkeypatch):
    monkeypatch.setattr(selfcheck, "COMPILED", {})
    assert selfcheck.main() == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok ") == len(COMPOSITIONS) + 2  # and autocast, and ranges
    assert printed.count(" raises ") == len(THIRD_ORDER)
    monkeypatch.setattr(selfcheck, "ours", lambda *x: dense(*x).detach())
    assert selfcheck.main() == 1
    assert " WRONG " in capsys.readouterr().out


def test_explicit_form_equals_jvp_and_none_equals_a_zero_tangent():
    i = Inputs()
    Q, K, V, BIAS = i.all
    tangents = {"t_attn_mask": i.tangents[3], "enable_gqa": True}
    explicit = attention_jvp(Q, K, V, *i.tangents[:3], BIAS, **tangents)
    for got, exact in zip(explicit, jvp(dense, i.all, i.tangents), strict=True):
        close(got, exact)
    zeros = [torch.zeros_like(x) for x in i.all]
    none = attention_jvp(Q, K, V, None, i.tangents[1], None, BIAS, enable_gqa=True)
    for got, exact in zip(
        none, jvp(dense, i.all, (zeros[0], i.tangents[1], *zeros[2:])), strict=True
    ):
        close(got, exact)


def test_autocast_casts_primals_and_tangents_together():
    q, k, v, t = (torch.randn(1, 2, 9, 8) for _ in range(4))
    with torch.autocast("cpu", torch.bfloat16):
        out, t_out = jvp(attention, (q, k, v), (t, t, t))
    assert out.dtype == t_out.dtype == torch.bfloat16
    exact, t_exact = jvp(attention, (q, k, v), (t, t, t))
    assert (out - exact).norm() / exact.norm() < 1e-2
    assert (t_out - t_exact).norm() / t_exact.norm() < 1e-2


def test_leading_dimensions_are_free():
    q = torch.randn(3, 2, 4, 5, 8)
    mask = torch.randn(2, 1, 5, 5)
    exact = torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
    torch.testing.assert_close(attention(q, q, q, mask), exact)
    for x in (q[0, 0], q[0, 0, 0]):
        torch.testing.assert_close(
            attention(x, x, x), torch.nn.functional.scaled_dot_product_attention(x, x, x)
        )


def test_dropout_under_vmap_follows_its_randomness_rules():
    q = torch.randn(3, 1, 2, 16, 8)
    f = lambda x: attention(x, x, x, dropout_p=0.5)  # noqa: E731
    same = vmap(lambda x: attention(q[0], q[0], x, dropout_p=0.5), randomness="same")(
        q[:1].expand(3, 1, 2, 16, 8)
    )
    assert torch.equal(same[0], same[1])
    different = vmap(lambda x: attention(q[0], q[0], x, dropout_p=0.5), randomness="different")(
        q[:1].expand(3, 1, 2, 16, 8)
    )
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(f)(q)


def _scalar(i: Inputs, out) -> torch.Tensor:
    return sum((x * i.d_out).square().sum() for x in selfcheck.flat(out))


def _leaves(i: Inputs, f):
    leaves = [x.clone().requires_grad_() for x in (*i.all, *i.tangents)]
    return torch.autograd.grad(_scalar(i, jvp(f, tuple(leaves[:4]), tuple(leaves[4:]))), leaves)


def _parameter_made_inside(i: Inputs, f):
    def inner(q):
        bias = torch.nn.Parameter(torch.ones_like(i.bias))
        out = f(q, i.k, i.v, bias * i.tangents[3])
        return out, *torch.autograd.grad(_scalar(i, out), bias, create_graph=True)

    return jvp(inner, (i.q,), (i.q,))


# transforms around attention of which some do not reach all of its inputs
CAPTURED = {
    "gradients of everything that enters a jvp": _leaves,
    "gradients of what is made inside a jvp": _parameter_made_inside,
    "jvp of the bias's grad": lambda i, f: jvp(
        lambda q: grad(lambda b: _scalar(i, f(q, i.k, i.v, b)))(i.bias), (i.q,), (i.q,)
    ),
    "jvp of another tensor's grad": lambda i, f: jvp(
        lambda q: grad(lambda x: (f(q, i.k, i.v, i.bias) * x).sum())(i.d_out), (i.q,), (i.q,)
    ),
    "jvp of another tensor's vmap": lambda i, f: jvp(
        lambda q: vmap(lambda x: x * f(q, i.k, i.v, i.bias))(i.d_out[:, :, None, None]),
        (i.q,),
        (i.q,),
    ),
    "grad of the bias of a jvp": lambda i, f: grad(
        lambda b: _scalar(i, jvp(lambda q: f(q, i.k, i.v, b), (i.q,), (i.q,)))
    )(i.bias),
    "vmap of the queries of a jvp in the keys": lambda i, f: vmap(
        lambda q: jvp(lambda k: f(q, k, i.v, i.bias), (i.k,), (i.tangents[1],))
    )(i.many),
    "vmap of the queries of a grad of a jvp in the keys": lambda i, f: vmap(
        lambda q: grad(
            lambda b: _scalar(i, jvp(lambda k: f(q, k, i.v, b), (i.k,), (i.tangents[1],)))
        )(i.bias)
    )(i.many),
    "grad of a vmap of a jvp": lambda i, f: grad(
        lambda v: _scalar(
            i, vmap(lambda q: jvp(lambda q: f(q, i.k, v, i.bias), (q,), (i.q,)))(i.many)
        )
    )(i.v),
    "vmap of a jvp of a vmap": lambda i, f: vmap(
        lambda t: jvp(
            lambda k: vmap(lambda q: f(q, k, i.v, i.bias))(i.many), (i.k,), (i.tangents[1] * t,)
        )
    )(i.weight[0]),
    "jvp of a vmap of a grad": lambda i, f: jvp(
        lambda k: vmap(lambda q: grad(lambda b: _scalar(i, f(q, k, i.v, b)))(i.bias))(i.many),
        (i.k,),
        (i.tangents[1],),
    ),
    "jvp of a grad of a vmap": lambda i, f: jvp(
        lambda k: grad(lambda b: _scalar(i, vmap(lambda q: f(q, k, i.v, b))(i.many)))(i.bias),
        (i.k,),
        (i.tangents[1],),
    ),
    "jvp of a jvp of something else": lambda i, f: jvp(
        lambda q: jvp(lambda x: x * f(q, i.k, i.v, i.bias), (i.d_out,), (i.d_t_out,)),
        (i.q,),
        (i.q,),
    ),
    "jvp of something else of a jvp": lambda i, f: jvp(
        lambda x: jvp(lambda q: x * f(q, i.k, i.v, i.bias), (i.q,), (i.q,)),
        (i.d_out,),
        (i.d_t_out,),
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_tensors_keep_their_derivatives(name):
    i = Inputs()
    got, exact = CAPTURED[name](i, ours), CAPTURED[name](i, dense)
    for g, e in zip(selfcheck.flat(got), selfcheck.flat(exact), strict=True):
        close(g, e)


def test_a_jvp_in_queries_inside_a_jvp_in_keys_raises():
    i = Inputs()
    inner = lambda k: jvp(lambda q: i_of(q, k), (i.q,), (i.q,))  # noqa: E731
    i_of = lambda q, k: ours(q, k, i.v, i.bias)  # noqa: E731
    with pytest.raises(NotImplementedError, match="jvp of a jvp"):
        jvp(inner, (i.k,), (i.tangents[1],))


def test_the_explicit_form_in_a_dual_level_raises():
    q = torch.randn(1, 2, 5, 4)
    with forward_ad.dual_level():
        for x in (q, q.clone().requires_grad_()):
            dual = forward_ad.make_dual(x, q)
            with pytest.raises(NotImplementedError, match="jvp of a jvp"):
                attention_jvp(dual, q, q, q, None, None)
            with pytest.raises(NotImplementedError, match="jvp of a jvp"):
                attention_jvp(q, q, q, dual, None, None)


def test_a_loss_of_the_tangent_is_differentiated_inside_of_its_dual_level_too():
    i = Inputs()
    w = torch.eye(i.q.shape[-1], dtype=torch.float64, requires_grad=True)

    def loss(f):
        q = forward_ad.make_dual(i.q, i.tangents[0]) @ w
        return forward_ad.unpack_dual(f(q, i.k, i.v, i.bias)).tangent.square().sum()

    with forward_ad.dual_level():
        (got,) = torch.autograd.grad(loss(ours), w)
        exact = loss(dense)
    close(got, torch.autograd.grad(exact, w)[0])


def test_a_value_of_constants_is_one_though_its_tangent_is_not():
    q = torch.randn(1, 2, 5, 4)
    out, t_out = attention_jvp(q, q, q, q.clone().requires_grad_(), None, None)
    assert (out.requires_grad, t_out.requires_grad) == (False, True)


def test_a_gradient_goes_through_one_node_of_ours():
    x, t = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 5, 4)
    assert attention(x, t, t).grad_fn.name() == "AttentionBackward"
    out, t_out = attention_jvp(x, t, t, t, None, None)
    assert out.grad_fn.name() == t_out.grad_fn.name() == "AttentionJvpBackward"
    assert attention(t, t, t).grad_fn is None


def test_no_grad_inside_and_around_a_jvp_records_no_graph():
    x, t = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 5, 4)

    def inside(q):
        with torch.no_grad():
            return attention(q, x, x)

    assert not any(y.requires_grad for y in jvp(inside, (x,), (t,)))
    with torch.no_grad():
        assert not any(y.requires_grad for y in jvp(lambda q: attention(q, x, x), (x,), (t,)))
    assert all(y.requires_grad for y in jvp(lambda q: attention(q, x, x), (x,), (t,)))


def test_a_tensor_that_outlived_its_transform_is_read_and_keeps_its_gradient():
    q, kept = torch.randn(1, 2, 5, 4, requires_grad=True), []
    jvp(lambda x: kept.append(x) or x, (q,), (q,))
    grad(lambda x: kept.append(x) or x.sum())(q)
    (exact,) = torch.autograd.grad(attention(q, q, q).sum(), q)
    for x in kept:
        out = attention(x, x, x)
        assert torch.equal(out, attention(q, q, q))
        assert torch.equal(torch.autograd.grad(out.sum(), q)[0], exact)
        assert torch.equal(attention_jvp(q, q, q, x, x, x)[1], attention_jvp(*[q] * 6)[1])


def test_dropout_under_a_jvp_is_that_of_the_explicit_form():
    x = [torch.randn(1, 2, 5, 4) for _ in range(6)]
    torch.manual_seed(1)
    got = jvp(lambda *x: attention(*x, dropout_p=0.5), tuple(x[:3]), tuple(x[3:]))
    torch.manual_seed(1)
    for g, e in zip(got, attention_jvp(*x, dropout_p=0.5), strict=True):
        assert torch.equal(g, e)


def test_hessian_vector_product_in_a_dual_level():
    """Forward over reverse without torch.func: the graph is recorded from duals."""
    i = Inputs()

    def run(f):
        q = i.q.clone().requires_grad_()
        with forward_ad.dual_level():
            out = i.of_q(f)(forward_ad.make_dual(q, i.tangents[0]))
            (g,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            return forward_ad.unpack_dual(g).tangent

    close(run(ours), run(dense))


def test_rows_masked_by_a_finite_constant_are_those_of_a_softmax():
    i = Inputs()
    bias = torch.zeros(2, 1, 1, 6, dtype=torch.float64)
    bias[1] = -1e9
    run = lambda f: torch.func.grad(lambda q: f(q, i.k, i.v, bias).square().sum())(i.q)  # noqa: E731
    torch.testing.assert_close(run(ours), run(dense), rtol=1e-5, atol=1e-7)


STOPPED = {  # PyTorch runs a Function with gradients enabled for the levels around it
    "grad": lambda f, q: grad(f)(q),
    "jvp of grad": lambda f, q: jvp(grad(f), (q,), (q,))[1],
    "grad of vmap": lambda f, q: grad(lambda x: vmap(f)(torch.stack([x, x])).sum())(q),
    "jvp of grad of vmap": lambda f, q: jvp(
        grad(lambda x: vmap(f)(torch.stack([x, x])).sum()), (q,), (q,)
    )[1],
}


@pytest.mark.parametrize("inner", ["plain", "vjp", "grad"])
@pytest.mark.parametrize("name", STOPPED)
def test_no_grad_stops_every_level_around_it(name, inner):
    i = Inputs()

    def gradients(f):
        w = i.k.clone().requires_grad_()
        attend = lambda q: f(q, w, i.v, i.bias)  # noqa: E731

        def target(q):
            if inner == "vjp":
                out, pullback = torch.func.vjp(attend, q)
                return pullback(out)[0]  # reads tensors of the vjp, which has ended
            if inner == "grad":
                return grad(lambda x: attend(x).square().sum())(q)
            return attend(q)

        def loss(q):
            with torch.no_grad():
                stopped = target(q)
            return (q.sum() * w.sum() * stopped).sum()

        got = STOPPED[name](loss, i.q)
        return got.detach(), *torch.autograd.grad(got.square().sum(), w)

    for got, exact in zip(gradients(ours), gradients(dense), strict=True):
        close(got, exact)


def test_a_stop_of_tangents_around_a_jvp_stops_those_of_an_outer_one():
    """As by `torch.inference_mode()`, in which older versions of PyTorch have no jvp."""
    i = Inputs()

    def outer(f):
        def inner(q):
            with forward_ad._set_fwd_grad_enabled(False):
                return jvp(lambda k: f(q, k, i.v, i.bias), (i.k,), (i.tangents[1],))

        return jvp(inner, (i.q,), (i.q,))

    for got, exact in zip(selfcheck.flat(outer(ours)), selfcheck.flat(outer(dense)), strict=True):
        torch.testing.assert_close(got, exact)


def test_a_tangent_that_meets_a_recorded_attention_raises_and_is_not_zero():
    i = Inputs()
    f = i.of_q(ours)
    along = torch.func.linearize(f, i.q)[1]
    traced = make_fx(f)(i.q)
    derivative = make_fx(grad(lambda q: f(q).square().sum()))(i.q)
    for recorded in (along, traced, derivative):
        recorded(i.q)
        if recorded is traced:  # torch.func meets the operator as the Function that it stands for
            for g, e in zip(*(jvp(g, (i.q,), (i.tangents[0],)) for g in (traced, f)), strict=True):
                close(g, e)
        else:
            with pytest.raises(NotImplementedError, match=r"recorded|jvp of a jvp"):
                jvp(recorded, (i.q,), (i.tangents[0],))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="recorded"):
            recorded(forward_ad.make_dual(i.q, i.tangents[0]))
    with pytest.raises(NotImplementedError, match=r"recorded|jvp of a jvp"):
        torch.func.jacfwd(along)(i.q)


@pytest.mark.parametrize("wrapped", range(7))
def test_a_tensor_subclass_in_any_place_reaches_the_result(wrapped):
    q, k, v, t_q, t_k, t_v = torch.randn(6, 1, 2, 5, 4)
    args = [x.clone() for x in (q, k, v, t_q, t_k, t_v, torch.randn(5, 5))]
    exact = attention_jvp(*args)
    args[wrapped] = TwoTensor(args[wrapped], args[wrapped].clone())
    t_out = attention_jvp(*args)[1]
    assert isinstance(t_out, TwoTensor)
    torch.testing.assert_close(t_out.a, exact[1])


def test_tensors_without_memory_have_the_shapes_of_a_call():
    q = torch.randn(1, 2, 5, 4, device="meta")
    for how in ({"dropout_p": 0.1}, {"is_causal": True}, {"attn_mask": q[0, 0, :, :1] > 0}):
        out, t_out = jvp(lambda x: attention(x, x, x, **how), (q,), (q,))  # noqa: B023
        assert out.shape == t_out.shape == q.shape
        assert out.is_meta


def test_no_grad_inside_a_transform_is_a_stop():
    """A teacher: no gradient reaches it, in the transform or below."""
    i = Inputs()
    w = i.k.clone().requires_grad_()

    def student(f):
        def loss(q):
            with torch.no_grad():
                target = f(q, w * q.sum(), i.v, i.bias)
            return (q.square().sum() - target).square().sum()

        return loss

    for transform in (grad, lambda f: lambda q: grad(lambda x: grad(f)(x).sum())(q)):
        got, exact = (transform(student(f))(i.q) for f in (ours, dense))
        close(got, exact)
        assert not got.requires_grad


def test_batched_cotangents_and_tangents_of_the_older_vmap():
    x = [torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    x.append(torch.randn(5, 5, dtype=torch.float64, requires_grad=True))
    *t, d = (torch.randn_like(y) for y in (*x[:3], x[0]))
    batch = torch.stack([d, 2 * d.flip(0), d.roll(1, -1)])

    def run(f, cotangents, **how):
        explicit = jvp(f, (*x[1:4],), tuple(t)) if f is sdpa else attention_jvp(*x[1:4], *t)
        first = torch.autograd.grad(f(*x[1:]), x[1:], cotangents, create_graph=True, **how)
        second = torch.autograd.grad(first[0], x[1:4], torch.ones_like(first[0])) if how else ()
        return *first, *second, *torch.autograd.grad(explicit, x[1:4], (cotangents,) * 2, **how)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for g, e in zip(
            run(attention, batch, is_grads_batched=True),
            run(sdpa, batch, is_grads_batched=True),
            strict=True,
        ):
            close(g, e)
        for how in ({}, {"strategy": "forward-mode"}):
            J = partial(torch.autograd.functional.jacobian, vectorize=True, **how)
            for g, e in zip(J(attention, tuple(x[1:])), J(sdpa, tuple(x[1:])), strict=True):
                close(g, e)


def _saved(run):
    """run()'s result, and the shapes of what its graph keeps for backward."""
    shapes = []
    keep = lambda x: shapes.append(tuple(x.shape)) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        return run(), shapes


def _in_a_dual_level(f, x, t):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(*map(forward_ad.make_dual, x, t))))


DETACHED = {
    "explicit": lambda x, t: attention_jvp(*x, *t, tangent_grad=False),
    "jvp": lambda x, t: jvp(lambda *x: attention(*x, tangent_grad=False), x, t),
    "dual_level": lambda x, t: _in_a_dual_level(lambda *x: attention(*x, tangent_grad=False), x, t),
}


@pytest.mark.parametrize("form", DETACHED)
def test_a_tangent_without_gradient_saves_what_a_plain_call_saves(form):
    x = tuple(torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    t = tuple(torch.randn_like(y).requires_grad_() for y in x)
    plain, plain_shapes = _saved(lambda: attention(*x))
    (out, t_out), shapes = _saved(lambda: DETACHED[form](x, t))
    assert sorted(shapes) == sorted(plain_shapes)
    assert out.requires_grad
    assert not t_out.requires_grad
    close(t_out, attention_jvp(*x, *t)[1])
    weight = torch.randn_like(out)
    first = [torch.autograd.grad((y * weight).sum(), x, create_graph=True) for y in (out, plain)]
    for g, e in zip(*first, strict=True):
        close(g, e)
    second = [torch.autograd.grad(sum(g.square().sum() for g in gs), x) for gs in first]
    for g, e in zip(*second, strict=True):
        close(g, e)
    grads = torch.autograd.grad(out.sum(), t, allow_unused=True)
    assert grads == (None, None, None)


def test_a_tangent_without_gradient_under_vmap_and_grad():
    i = Inputs()
    t = i.tangents[1]

    def loss(v, **how):
        f = lambda k: attention(i.q, k, v, i.bias, enable_gqa=True, **how)  # noqa: E731
        out, t_out = jvp(f, (i.k,), (t,))
        return (out * (t_out if how else t_out.detach())).sum()

    close(grad(lambda v: loss(v, tangent_grad=False))(i.v), grad(loss)(i.v))
    many = torch.stack([i.v, 2 * i.v])
    close(vmap(grad(lambda v: loss(v, tangent_grad=False)))(many), vmap(grad(loss))(many))


def _heads(x: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Views (B, H, L, D) of one projection (B, L, n·H·D), four heads of 4."""
    return [y.transpose(1, 2) for y in x.unflatten(-1, (n, 4, 4)).unbind(2)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_results_have_the_order_of_the_projection_that_their_input_is_a_view_of(backend):
    x, t = torch.randn(2, 2, 5, 48)
    q, k, v = (y.detach().requires_grad_() for y in _heads(x, 3))
    how = {"backend": backend}
    results = [attention(q, k, v, **how), *attention_jvp(q, k, v, *_heads(t, 3), **how)]
    with torch.no_grad():
        results += [*(attention(q, k, v, **how) for _ in range(2))]  # the second one is recalled
        results += [*(attention_jvp(q, k, v, *_heads(t, 3), **how)[1] for _ in range(2))]
    for y in results:
        assert y.transpose(1, 2).is_contiguous()
        y.transpose(1, 2).view(2, 5, 16)  # (B, L, H·D)
    for out in (results[0], results[2]):
        for g in torch.autograd.grad(out, (q, k, v), torch.randn_like(out)):
            assert g.transpose(1, 2).is_contiguous()
    dense = [y.detach().contiguous() for y in (q, k, v)]
    assert attention(*dense, **how).is_contiguous()
    torch.testing.assert_close(results[0], attention(*dense, **how))
