"""The reference against PyTorch's own differentiation of dense attention, in float64."""

from itertools import chain

import pytest
import torch
from torch.func import grad, jvp

from jvp_flash_attention import attention, attention_jvp, reference
from jvp_flash_attention.call import Inputs, Spec, Tangents
from jvp_flash_attention.selfcheck import dense
from tests.cases import Case, build, close, solve

CASES = (
    Case(L=7, S=9, D=5, Dv=6),
    Case(L=9, S=5, D=8, causal=True),
    Case(H=4, Hk=2, L=7, S=9, D=5, mask="full", causal=True),
    Case(L=7, S=9, mask="bool"),
    Case(L=7, S=9, mask="key"),
    Case(L=1, S=1),
    Case(L=7, S=9, scale=-0.7),
)


@pytest.fixture(params=CASES, ids=str)
def problem(request):
    case = request.param
    p = build(case, torch.float64, backend="reference")
    primals = [x for x in p.primals if x is not None]
    tangents = [
        t if t is not None else torch.zeros_like(x)
        for x, t in zip(p.primals, p.tangents, strict=True)
        if x is not None
    ]
    options = {"is_causal": case.causal, "scale": case.scale, "enable_gqa": True}
    ours = lambda *x: attention(*x, **options)  # noqa: E731
    theirs = lambda *x: dense(*x, causal=case.causal, scale=case.scale)  # noqa: E731
    floating = tuple(i for i, x in enumerate(primals) if x.is_floating_point())
    return ours, theirs, primals, tangents, floating, p


def test_value_and_tangent_equal_those_of_dense_attention(problem):
    ours, theirs, primals, tangents, floating, _ = problem

    def of(f):
        def g(*x):
            full = list(primals)
            for i, y in zip(floating, x, strict=True):
                full[i] = y
            return f(*full)

        return jvp(g, tuple(primals[i] for i in floating), tuple(tangents[i] for i in floating))

    for got, exact in zip(of(ours), of(theirs), strict=True):
        close(got, exact)


def test_gradients_through_value_and_tangent_equal_those_of_dense_attention(problem):
    ours, theirs, primals, tangents, floating, p = problem

    def loss(f):
        def g(x, t):
            full = list(primals)

            def inner(*y):
                for i, z in zip(floating, y, strict=True):
                    full[i] = z
                return f(*full)

            out, t_out = jvp(inner, tuple(x), tuple(t))
            return (out * p.d_out).sum() + (t_out * p.d_t_out).sum()

        return grad(g, (0, 1))([primals[i] for i in floating], [tangents[i] for i in floating])

    for got, exact in zip(chain(*loss(ours)), chain(*loss(theirs)), strict=True):
        close(got, exact)


def test_gradcheck_and_gradgradcheck_pass_in_forward_and_reverse():
    p = build(Case(B=1, H=2, Hk=1, L=3, S=4, D=3, mask="key"), torch.float64)
    inputs = [x.requires_grad_() for x in p.primals]
    f = lambda q, k, v, b: attention(q, k, v, b, enable_gqa=True)  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)
    g = lambda q, k, v, b, *t: attention_jvp(q, k, v, *t, b, enable_gqa=True)  # noqa: E731
    tangents = [t.requires_grad_() for t in p.tangents[:3]]
    assert torch.autograd.gradcheck(g, inputs + tangents)


def test_rows_are_taken_in_blocks_without_changing_anything(monkeypatch):
    case = Case(L=23, S=9, mask="full", causal=True)
    p = build(case, torch.float64)
    cotangents = (p.d_out, p.d_t_out)
    whole = reference.forward(p.x, p.t, p.spec)
    whole_grads = sum(reference.backward(*cotangents, p.x, p.t, whole, p.spec, True), ())
    monkeypatch.setattr(reference, "ROWS", 5)
    blocks = reference.forward(p.x, p.t, p.spec)
    grads = sum(reference.backward(*cotangents, p.x, p.t, blocks, p.spec, True), ())
    for got, exact in zip((*blocks, *grads), (*whole, *whole_grads), strict=True):
        close(got, exact)


def test_no_keys_and_no_batch_give_zeros_and_nothing():
    q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 0, 4, requires_grad=True)
    out = attention(q, k, k)
    assert out.eq(0).all()
    assert out.shape == (1, 2, 3, 4)
    out.sum().backward()
    assert q.grad.eq(0).all()
    assert attention(q[:0], k[:0], k[:0]).shape == (0, 2, 3, 4)


def test_dropout_keeps_the_stated_share_and_is_one_mask_for_value_and_tangent():
    torch.manual_seed(0)
    B, H, L, S = 2, 3, 64, 96
    q, k = (
        torch.zeros(B, H, L, 8, dtype=torch.float64),
        torch.zeros(B, H, S, 8, dtype=torch.float64),
    )
    v = torch.eye(S, dtype=torch.float64).expand(B, H, S, S).contiguous()
    out, t_out = attention_jvp(q, k, v, None, None, v, dropout_p=0.25)
    kept = out != 0
    assert abs(kept.double().mean().item() - 0.75) < 0.01
    close(out[kept], torch.full_like(out[kept], 1 / S / 0.75))
    close(t_out, out)


def test_dropout_follows_manual_seed():
    q = torch.randn(1, 2, 16, 8)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(attention(q, q, q, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_half_precision_inputs_are_computed_in_float32():
    q = torch.randn(1, 2, 16, 8).bfloat16()
    out, lse, *_ = reference.forward(Inputs(q, q, q), None, Spec(8**-0.5))
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    exact = reference.forward(Inputs(*[q.double()] * 3), None, Spec(8**-0.5)).out
    assert (out.double() - exact).norm() / exact.norm() < 3e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_arithmetic_does_not_depend_on_autocast(dtype):
    """Nor does a product q kᵀ of 10⁵ overflow, which autocast would hold in float16."""
    p = build(Case(D=24, mask="key", scale=1e-4), dtype)
    for x in p.primals[:2]:
        x.mul_(150)
    exact = solve(reference, p)
    with torch.autocast("cpu", dtype):
        got = solve(reference, p)
    for name, x in exact.items():
        assert x.isfinite().all(), name
        assert torch.equal(got[name], x), name


def test_products_of_a_rounded_p_leave_the_error_that_the_documents_state():
    """docs/mathematics.md, Tolerances: P̃, P̃ ∘ (tS − μ), O and tO rounded once, all else exact."""
    rng = torch.Generator().manual_seed(0)
    rounded = lambda x: x.bfloat16().double()  # noqa: E731
    draw = lambda rows: rounded(torch.randn(2, 3, rows, 64, generator=rng))  # noqa: E731
    q, t_q, k, v, t_k, t_v = (draw(rows) for rows in (256, 256, *[2048] * 4))
    out, lse, t_out, mu = reference.forward(Inputs(q, k, v), Tangents(t_q, t_k, t_v), Spec(0.125))
    s = 0.125 * q @ k.mT
    t_s = 0.125 * (t_q @ k.mT + q @ t_k.mT)
    top = s.amax(-1, keepdim=True)
    inverse = (top - lse[..., None]).exp()  # 1 / l
    p = (s - top).exp()
    p_t_s = rounded(p * (t_s - mu[..., None]))
    approximate = rounded(p) @ v * inverse, (p_t_s @ v + rounded(p) @ t_v) * inverse
    for x, exact, stated in zip(approximate, (out, t_out), (2.30e-3, 2.34e-3), strict=True):
        error = float((rounded(x) - exact).norm() / exact.norm())
        assert abs(error / stated - 1) < 0.01


@pytest.mark.parametrize(
    ("causal", "kept", "stated"),
    [
        (False, False, (2.36e-3, 2.34e-3)),
        (True, False, (2.37e-3, 2.39e-3)),
        (True, True, (2.78e-3, 2.76e-3)),
    ],
    ids=["full", "causal", "causal with O as it is kept"],
)
def test_products_of_a_rounded_ds_leave_the_error_that_the_documents_state(causal, kept, stated):
    """docs/mathematics.md, Tolerances: dS, the gradients and, where `kept`, the O in w rounded
    once, all else exact; 17 queries and 196 keys."""
    rng = torch.Generator().manual_seed(0)
    rounded = lambda x: x.bfloat16().double()  # noqa: E731
    draw = lambda rows: rounded(torch.randn(20, 3, rows, 64, generator=rng))  # noqa: E731
    q, d_out, k, v = draw(17), draw(17), draw(196), draw(196)
    x, spec = Inputs(q, k, v), Spec(0.125, causal)
    saved = reference.forward(x, None, spec)
    exact, _ = reference.backward(d_out, None, x, Tangents(), saved, spec, False)
    out, lse, *_ = saved
    s = 0.125 * q @ k.mT
    p = (s - lse[..., None]).exp()
    if causal:
        p = p.tril()
    w = (d_out * (rounded(out) if kept else out)).sum(-1, keepdim=True)
    d_s = rounded(p * (d_out @ v.mT - w))
    for x, e, bound in zip((d_s @ k, d_s.mT @ q), exact, stated, strict=False):
        error = float((rounded(0.125 * x) - e).norm() / e.norm())
        assert abs(error / bound - 1) < 0.01
