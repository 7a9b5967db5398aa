"""A soft cap is c tanh(S / c) of the scores before masks, in every derivative, never left out."""

from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

pytest.importorskip("triton")
import triton
import triton.language as tl

from jvp_flash_attention import (
    attention,
    attention_jvp,
    call,
    flash_attn,
    kernels,
    reference,
    selfcheck,
)
from jvp_flash_attention.call import Saved, Spec, Tangents
from jvp_flash_attention.kernels import cudnn
from jvp_flash_attention.kernels.portable.primitives import soft_cap
from jvp_flash_attention.selfcheck import COMPOSITIONS, Inputs, dense
from tests.cases import Case, build, check, close, errors, solve

CAP = 0.8  # scores are N(0, 1): some are saturated, some are not


def ours(*x):
    return attention(*x, enable_gqa=True, softcap=CAP)


def exact(*x):
    return dense(*x, softcap=CAP)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_equals_dense_attention(name):
    results = [selfcheck.flat(COMPOSITIONS[name](Inputs(), f)) for f in (ours, exact)]
    for got, e in zip(*results, strict=True):
        close(got, e)


def test_gradients_of_both_orders_equal_finite_differences():
    i = Inputs()
    few = [x[:1, :, : (2 if x is i.q else None)] for x in i.all]
    leaves = [x.clone().requires_grad_() for x in few]
    tangents = [torch.randn_like(x).requires_grad_() for x in few]
    assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, leaves)
    q, k, v, b, *t = (*leaves, *tangents)

    def both(q, k, v, b, t_q, t_k, t_v, t_b):
        how = {"enable_gqa": True, "softcap": CAP, "t_attn_mask": t_b}
        return attention_jvp(q, k, v, t_q, t_k, t_v, b, **how)

    assert torch.autograd.gradcheck(both, (q, k, v, b, *t))


@pytest.mark.compile
@pytest.mark.parametrize("name", selfcheck.COMPILED)
def test_compiled(name, monkeypatch):
    # inductor compiles the same operators in test_window.py
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(selfcheck, "ours", ours)
    monkeypatch.setattr(selfcheck, "dense", exact)
    assert selfcheck._compiled(selfcheck.COMPILED[name], Inputs(), Inputs()) < 1e-10


@pytest.mark.parametrize("c", [1e-3, 1e8], ids=str)
def test_far_caps_are_signs_and_nothing(c):
    """Saturated scores have slope 0, also where the square of tanh has no digits left of it."""
    p = build(Case(B=1, L=5, S=7, mask="key", softcap=c), torch.float64, backend="reference")
    exact = solve(reference, p)
    plain = build(Case(B=1, L=5, S=7, mask="key"), torch.float64, backend="reference")
    if c < 1.0:
        plain.primals[0] = 0.0 * plain.primals[0]
        torch.testing.assert_close(
            exact["out"], solve(reference, plain)["out"], rtol=0, atol=10 * c
        )
        assert exact["d_q"].abs().max() < 1e-3
    else:
        for name, x in solve(reference, plain).items():
            torch.testing.assert_close(exact[name], x, rtol=1e-9, atol=1e-9)


CASES = [
    (Case(B=1, L=19, S=40, softcap=0.8, mask="full"), torch.float32),
    (Case(B=1, H=4, Hk=2, L=20, S=35, softcap=3.0, causal=True), torch.float16),
    (Case(B=1, H=1, Hk=1, L=40, S=45, softcap=50.0, window=(9, 4), mask="bool"), torch.float32),
    (Case(B=1, H=1, Hk=1, L=33, S=33, softcap=0.3, dropout_p=0.2, tangents="k"), torch.float32),
    (Case(H=1, Hk=1, L=17, S=17, softcap=1.0, packed=((0, 5, 16), None)), torch.float32),
    (Case(B=1, H=1, Hk=1, L=9, S=40, softcap=1.0, scale=-0.5, tangents="vb", mask="key"),
     torch.float32),
    (Case(B=1, H=1, Hk=1, L=140, S=20, softcap=0.8, blocks=((True,), (False,))), torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_the_kernels_equal_the_reference(case, dtype, device):
    check(errors(kernels, case, dtype, device, rows=1), dtype, slack=2.0)


@triton.jit
def soft_cap_kernel(X, Y, U, SLOPE, softcap, N: tl.constexpr):
    at = tl.arange(0, N)
    y, u, slope = soft_cap(tl.load(X + at), softcap)
    tl.store(Y + at, y)
    tl.store(U + at, u)
    tl.store(SLOPE + at, slope)


def test_the_kernels_tanh_has_float32s_digits_everywhere(device):
    """Near 0, where 1 - exp has few, and far out, where 1 - tanh² has none."""
    c, log2e = 3.0, 1.4426950408889634
    x = torch.logspace(-6, 1.5, 4096, device=device)
    x[::2] *= -1
    got = torch.empty(3, 4096, device=device)
    soft_cap_kernel[(1,)](c * log2e * x, *got, c, 4096)
    x = x.double()
    exact = torch.stack([c * log2e * x.tanh(), x.tanh(), x.cosh() ** -2])
    for error, digits in zip((got / exact - 1).abs().amax(1), (1e-6, 1e-6, 2e-5), strict=True):
        assert error < digits
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], device=device)
    soft_cap_kernel[(1,)](x, *got, c, 4)
    torch.testing.assert_close(got[1, :4], x.tanh(), equal_nan=True)
    assert got[2, :2].tolist() == [0, 0]


def test_double_backward_and_vmap_through_the_kernels(device):
    q, k, v, t = (torch.randn(1, 2, 18, 8, device=device) for _ in range(4))
    f = lambda *x: attention(*x, softcap=CAP, backend="triton")  # noqa: E731

    def second(f, *x):
        def along(*x):
            first = grad(lambda *x: f(*x).square().sum(), (0, 1, 2))(*x)
            return sum(g.square().sum() for g in first)

        return grad(along, (0, 1, 2))(*x)

    wide = [x.double() for x in (q, k, v)]
    for g, e in zip(second(f, q, k, v), second(exact, *wide), strict=True):
        assert (g - e).norm() / e.norm() < 1e-4
    many = torch.stack([t, q])
    got = vmap(lambda t: jvp(lambda q: f(q, k, v), (q,), (t,))[1])(many)
    for one, t_q in zip(got, many.double(), strict=True):
        e = jvp(lambda q: exact(q, *wide[1:]), (wide[0],), (t_q,))[1]
        assert (one - e).norm() / e.norm() < 1e-5


def test_caps_have_launches_of_their_own(device):
    """Calls of one kind are cached: by the cap too."""
    q, k, v, t = (torch.randn(1, 1, 9, 8, device=device) for _ in range(4))
    for _ in range(2):
        for c in (0.0, 0.5, 2.0):
            f = lambda q, c=c: attention(q, k, v, softcap=c, backend="triton")  # noqa: E731
            e = lambda q, c=c: dense(q, k, v, softcap=c)  # noqa: E731
            for got, x in zip(jvp(f, (q,), (t,)), jvp(e, (q,), (t,)), strict=True):
                torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_of_a_hidden_key_is_felt(backend, device):
    q, k, v, t = (torch.randn(1, 1, 9, 8, device=device) for _ in range(4))
    seen = torch.tensor([True] * 8 + [False], device=device)
    bias = torch.zeros(9, device=device).masked_fill(~seen, float("-inf"))

    def run(k, **how):
        attend = lambda q, k: attention(q, k, v, softcap=CAP, backend=backend, **how)  # noqa: E731
        return vjp(lambda *x: jvp(attend, x, (t, t)), q, k)[1]((t, t))

    for how in ({"attn_mask": seen}, {"attn_mask": bias}, {"is_causal": True}):
        rows = slice(0, 8) if "is_causal" in how else slice(None)
        exact = run(k, **how)
        for poison in (float("nan"), float("inf")):
            got = run(k.index_fill(2, torch.tensor([8], device=device), poison), **how)
            torch.testing.assert_close(got[0][:, :, rows], exact[0][:, :, rows])
            if "is_causal" not in how:
                torch.testing.assert_close(got[1], exact[1])


def test_no_kernel_that_has_no_cap_takes_the_call(monkeypatch):
    q, rows = torch.empty(1, 2, 512, 128, dtype=torch.bfloat16), torch.empty(1, 2, 512)
    x, t, saved = call.Inputs(q, q, q), Tangents(q, q, q), Saved(q, rows, q, rows)
    spec = Spec(0.1, softcap=50.0)
    for more in ((), (saved, q, q)):
        for launch in kernels.launches(x, t, spec, *more, arch="sm90"):
            assert "portable" in launch.kernel.fn.__module__
            assert "_jvp_" not in launch.kernel.fn.__name__
        with pytest.raises(NotImplementedError, match="no soft cap"):
            kernels.launches(x, t, spec, *more, arch="sm90", force="sm90")
    monkeypatch.setattr(cudnn, "architecture", lambda _: "sm90")
    monkeypatch.setattr(cudnn, "pays", lambda *_: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert cudnn.supports(x, Spec(0.1))
    assert not cudnn.supports(x, spec)


def test_the_functions_of_flash_attn():
    q, k, v = (torch.randn(2, 5, h, 4, dtype=torch.float64) for h in (4, 2, 2))
    e = exact(*(x.transpose(1, 2) for x in (q, k, v)), None, True).transpose(1, 2)
    how = {"causal": True, "softcap": CAP}
    close(flash_attn.flash_attn_func(q, k, v, **how), e)
    close(flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **how), e)
    close(flash_attn.flash_attn_with_kvcache(q, k, v, **how), e)
    close(flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=5, **how), e)
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    close(flash_attn.flash_attn_varlen_func(*flat, cu, cu, 5, 5, **how), e.flatten(0, 1))


def test_packed_nested_tensors_take_it():
    q, k, v = (torch.randn(7, 2, 4, dtype=torch.float64) for _ in range(3))
    offsets = torch.tensor([0, 3, 7])
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in (q, k, v)]
    out = attention(*nested, softcap=CAP).values().transpose(0, 1)
    for n in (slice(0, 3), slice(3, 7)):
        e = exact(*(x[None, n].transpose(1, 2) for x in (q, k, v)))
        close(out[n], e[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("softcap", "error"),
    [
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (1e31, ValueError),  # float32 would overflow
        (1e-31, ValueError),
        (None, TypeError),
        (True, TypeError),
        ("1", TypeError),
        (torch.tensor(1.0), TypeError),
    ],
    ids=str,
)
def test_what_is_no_cap_is_refused_each_time(softcap, error):
    q = torch.randn(1, 1, 5, 8)
    attention(q, q, q, softcap=1)
    for _ in range(2):
        with pytest.raises(error, match="softcap must"):
            attention(q, q, q, softcap=softcap)
        with pytest.raises(error, match="softcap must"):
            attention_jvp(q, q, q, q, None, None, softcap=softcap)
