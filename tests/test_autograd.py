"""Every composition of PyTorch's transforms gives the derivative of dense attention, or raises;
none is silently wrong.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from jvp_flash_attention import attention, attention_jvp
from tests.test_reference import close, dense

torch.manual_seed(0)
DRAW = {"dtype": torch.float64}
Q, K, V = (
    torch.randn(2, 4, 5, 3, **DRAW),
    torch.randn(2, 2, 6, 3, **DRAW),
    torch.randn(2, 2, 6, 4, **DRAW),
)
BIAS = torch.randn(1, 4, 1, 6, **DRAW)
INPUTS = (Q, K, V, BIAS)
TANGENTS = tuple(torch.randn_like(x) for x in INPUTS)
D_OUT, D_T_OUT = torch.randn(2, 4, 5, 4, **DRAW), torch.randn(2, 4, 5, 4, **DRAW)


def ours(q, k, v, b):
    return attention(q, k, v, b, enable_gqa=True)


def loss(f, x):
    return (f(*x) * D_OUT).sum()


def jvp_loss(f, x, t):
    out, t_out = jvp(f, x, t)
    return (out * D_OUT).sum() + (t_out * D_T_OUT).sum()


def along(f, x, t):
    """The derivative of a loss along the tangents, as sum of products with its gradient."""
    return sum((g * d).sum() for g, d in zip(grad(lambda y: loss(f, y))(x), t, strict=True))


COMPOSITIONS = {
    "jvp": lambda f: jvp(f, INPUTS, TANGENTS),
    "jvp with one tangent": lambda f: jvp(lambda k: f(Q, k, V, BIAS), (K,), (TANGENTS[1],)),
    "jvp of the bias": lambda f: jvp(lambda b: f(Q, K, V, b), (BIAS,), (TANGENTS[3],)),
    "grad": lambda f: grad(lambda x: loss(f, x))(INPUTS),
    "vjp": lambda f: vjp(f, *INPUTS)[1](D_OUT),
    "grad of jvp": lambda f: grad(lambda x: jvp_loss(f, x, TANGENTS))(INPUTS),
    "grad of jvp in the tangents": lambda f: grad(lambda t: jvp_loss(f, INPUTS, t))(TANGENTS),
    "vjp of jvp": lambda f: vjp(lambda *x: jvp(f, x, TANGENTS), *INPUTS)[1]((D_OUT, D_T_OUT)),
    "jvp of grad": lambda f: jvp(grad(lambda x: loss(f, x)), (INPUTS,), (TANGENTS,)),
    "grad of grad": lambda f: grad(lambda x: along(f, x, TANGENTS))(INPUTS),
    "vmap": lambda f: vmap(lambda q: f(q, K, V, BIAS))(torch.stack([Q, 2 * Q])),
    "vmap over the last dimension": lambda f: vmap(lambda q: f(q, K, V, BIAS), in_dims=4)(
        torch.stack([Q, 2 * Q], 4)
    ),
    "vmap of grad in an unmapped bias": lambda f: vmap(
        lambda q: grad(lambda b: (f(q, K, V, b) * D_OUT).sum())(BIAS)
    )(torch.stack([Q, 2 * Q])),
    "vmap of jvp over tangents": lambda f: vmap(
        lambda t: jvp(lambda q: f(q, K, V, BIAS), (Q,), (t,))[1]
    )(torch.stack([TANGENTS[0], Q])),
    "grad of vmap": lambda f: grad(
        lambda b: vmap(lambda q: f(q, K, V, b))(torch.stack([Q, 2 * Q])).square().sum()
    )(BIAS),
    "jacfwd": lambda f: jacfwd(lambda q: f(q, K, V, BIAS))(Q),
    "jacfwd of the bias": lambda f: jacfwd(lambda b: f(Q, K, V, b))(BIAS),
    "jacrev": lambda f: jacrev(lambda b: f(Q, K, V, b))(BIAS),
    "hessian": lambda f: hessian(lambda b: loss(f, (Q, K, V, b)))(BIAS),
    "linearize": lambda f: linearize(f, *INPUTS)[1](*TANGENTS),
}


def flat(x):
    return [x] if isinstance(x, torch.Tensor) else [z for y in x for z in flat(y)]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition_equals_dense_attention(name):
    compose = COMPOSITIONS[name]
    for got, exact in zip(flat(compose(ours)), flat(compose(dense)), strict=True):
        close(got, exact)


def test_dual_level_gives_the_tangent_and_the_gradient_of_both():
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    t_leaves = [t.clone().requires_grad_() for t in TANGENTS]

    def run(f):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, t_leaves, strict=True)]
            out, t_out = forward_ad.unpack_dual(f(*duals))
        value = (out * D_OUT).sum() + (t_out * D_T_OUT).sum()
        return [out, t_out, *torch.autograd.grad(value, leaves + t_leaves)]

    for got, exact in zip(run(ours), run(dense), strict=True):
        close(got, exact)


def test_meanflow_use_differentiates_the_value_and_not_the_detached_tangent():
    weight = torch.randn(3, 3, **DRAW, requires_grad=True)

    def run(f):
        u, du = jvp(lambda q: f(q @ weight, K, V, BIAS), (Q,), (TANGENTS[0],))
        return torch.autograd.grad((u - (D_OUT - 0.3 * du).detach()).square().sum(), weight)[0]

    close(run(ours), run(dense))


def test_double_backward_with_create_graph():
    leaves = [x.clone().requires_grad_() for x in INPUTS]

    def run(f):
        first = torch.autograd.grad(loss(f, leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, exact in zip(run(ours), run(dense), strict=True):
        close(got, exact)


def test_explicit_form_equals_jvp_and_none_equals_a_zero_tangent():
    explicit = attention_jvp(Q, K, V, *TANGENTS[:3], BIAS, t_attn_mask=TANGENTS[3], enable_gqa=True)
    for got, exact in zip(explicit, jvp(dense, INPUTS, TANGENTS), strict=True):
        close(got, exact)
    zeros = [torch.zeros_like(x) for x in INPUTS]
    none = attention_jvp(Q, K, V, None, TANGENTS[1], None, BIAS, enable_gqa=True)
    for got, exact in zip(
        none, jvp(dense, INPUTS, (zeros[0], TANGENTS[1], *zeros[2:])), strict=True
    ):
        close(got, exact)


THIRD = {
    "jvp of jvp": lambda: jvp(
        lambda q: jvp(lambda p: ours(p, K, V, BIAS), (q,), (Q,))[1], (Q,), (Q,)
    ),
    "grad of grad of jvp": lambda: grad(
        lambda q: grad(lambda p: jvp(lambda x: ours(x, K, V, BIAS), (p,), (Q,))[1].sum())(q).sum()
    )(Q),
    "jvp of grad of jvp": lambda: jvp(
        grad(lambda p: jvp(lambda x: ours(x, K, V, BIAS), (p,), (Q,))[1].sum()), (Q,), (Q,)
    ),
    "grad of grad of grad": lambda: grad(
        lambda z: grad(lambda q: grad(lambda p: ours(p, K, V, BIAS).square().sum())(q).sum())(
            z
        ).sum()
    )(Q),
    "jvp of jvp of grad": lambda: jvp(
        lambda z: jvp(grad(lambda p: ours(p, K, V, BIAS).square().sum()), (z,), (Q,))[1], (Q,), (Q,)
    ),
    "jvp of attention_jvp": lambda: jvp(
        lambda q: attention_jvp(q, K, V, Q, None, None, enable_gqa=True)[1], (Q,), (Q,)
    ),
}


@pytest.mark.parametrize("name", THIRD)
def test_what_is_not_supported_raises(name):
    with pytest.raises(NotImplementedError, match=r"third derivative|jvp of a jvp"):
        THIRD[name]()


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
