"""A sliding window is the band that it says, in every derivative, and skips the tiles outside."""

import pytest
import torch
from torch.func import grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from jvp_flash_attention import attention, attention_jvp, selfcheck
from jvp_flash_attention.call import Band, Spec
from jvp_flash_attention.selfcheck import COMPOSITIONS, Inputs, dense
from tests.cases import Case, build, check, close, errors

WINDOWS = [(2, 1), (0, 3), (4, None), (-1, 2), (3, 0)]


def visible(L, S, window, causal=False):
    """Written out, in the words of the docstring."""
    left, right = (None if bound == -1 else bound for bound in window)
    i, j = torch.arange(L)[:, None], torch.arange(S)[None, :]
    valid = (j <= i) if causal else torch.ones(L, S, dtype=torch.bool)
    if left is not None:
        valid = valid & (i - left <= j)
    if right is not None:
        valid = valid & (j <= i + right)
    return valid


def math(q, k, v, mask):
    """PyTorch's own, and 0 for rows that attend nothing, whose derivatives are NaN there."""
    (rows,) = mask.any(-1).nonzero(as_tuple=True)
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(q[:, :, rows], k, v, mask[rows], enable_gqa=True)
    return torch.zeros_like(q[..., :1] * v[0, 0, 0]).index_copy(2, rows, out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("L", "S"), [(9, 9), (6, 11), (13, 7)])
def test_the_reference_equals_pytorchs_math_with_the_band_as_a_mask(L, S, window, causal):
    q, k, v = (torch.randn(2, h, n, 4, dtype=torch.float64) for h, n in ((4, L), (2, S), (2, S)))
    x, t = (q, k, v), tuple(map(torch.randn_like, (q, k, v)))
    mask = visible(L, S, window, causal)
    f = lambda *x: attention(*x, is_causal=causal, window=window, enable_gqa=True)  # noqa: E731
    theirs = lambda *x: math(*x, mask)  # noqa: E731
    out, t_out = jvp(f, x, t)
    exact, t_exact = jvp(theirs, x, t)
    close(out, exact)
    close(t_out, t_exact)
    pair = torch.randn_like(out), torch.randn_like(out)
    through = [vjp(lambda *x, f=f: jvp(f, x, t), *x)[1](pair) for f in (f, theirs)]
    for got, e in zip(*through, strict=True):
        close(got, e)
    explicit = attention_jvp(*x, *t, is_causal=causal, window=window, enable_gqa=True)
    close(explicit[1], t_exact)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_equals_dense_attention(name):
    inputs = Inputs()
    ours = lambda *x: attention(*x, enable_gqa=True, window=(1, 2))  # noqa: E731
    exact = lambda *x: dense(*x, window=(1, 2))  # noqa: E731
    results = [selfcheck.flat(COMPOSITIONS[name](inputs, f)) for f in (ours, exact)]
    for got, e in zip(*results, strict=True):
        close(got, e)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["compile, loss through the tangent"])
def test_compiled(name, monkeypatch):
    ours = lambda *x: attention(*x, enable_gqa=True, window=(1, 2))  # noqa: E731
    exact = lambda *x: dense(*x, window=(1, 2))  # noqa: E731
    monkeypatch.setattr(selfcheck, "ours", ours)
    monkeypatch.setattr(selfcheck, "dense", exact)
    step = selfcheck.COMPILED[name]
    assert selfcheck._compiled(step, Inputs(), Inputs()) < 1e-10


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(B=1, L=70, S=75, D=16, window=(9, 4)), torch.float32),
        (Case(B=1, H=4, Hk=2, L=40, S=90, D=16, window=(30, None), causal=True), torch.float16),
        (Case(B=1, H=1, Hk=1, L=90, S=40, D=16, window=(3, 0), mask="full"), torch.float32),
        (Case(B=1, H=2, Hk=1, L=45, S=45, D=16, window=(None, 7), mask="bool"), torch.float32),
        (Case(B=1, H=1, Hk=1, L=40, S=40, D=16, window=(5, 5), dropout_p=0.2), torch.float32),
    ],
    ids=str,
)
def test_the_kernels_equal_the_reference(case, dtype, device):
    from jvp_flash_attention import kernels

    check(errors(kernels, case, dtype, device, rows=1), dtype, slack=2.0)


def test_double_backward_through_the_kernels(device):
    q, k, v = (torch.randn(1, 2, 40, 8, device=device) for _ in range(3))

    def second(f, *x):
        def along(*x):
            first = grad(lambda *x: f(*x).square().sum(), (0, 1, 2))(*x)
            return sum(g.square().sum() for g in first)

        return grad(along, (0, 1, 2))(*x)

    got = second(lambda *x: attention(*x, window=(5, 2), backend="triton"), q, k, v)
    mask = visible(40, 40, (5, 2)).to(device)
    wide = [x.double() for x in (q, k, v)]
    for g, e in zip(got, second(lambda *x: math(*x, mask), *wide), strict=True):
        assert (g - e).norm() / e.norm() < 1e-4


def test_tiles_outside_are_not_visited_by_any_pass(products):
    """Products of tiles are counted, in the interpreter; at most one tile a row or column of tiles
    is visited in vain."""
    from jvp_flash_attention import kernels

    L, window = 192, (40, 24)

    def run(window):
        """Products of each pass, and its tiles (rows, columns)."""
        products.clear()
        p = build(Case(B=1, H=1, Hk=1, L=L, S=L, D=16, window=window), torch.float32)
        saved = kernels.forward(p.x, p.t, p.spec)
        kernels.backward(p.d_out, p.d_t_out, p.x, p.t, saved, p.spec, False)
        cotangents = (saved, p.d_out, p.d_t_out)
        made = [
            *kernels.launches(p.x, p.t, p.spec),
            *kernels.launches(p.x, p.t, p.spec, *cotangents),
        ]
        tiles = [
            (x.constexprs["BLOCK_M"], x.constexprs["BLOCK_N"])
            for x in made
            if "GROUP" in x.constexprs
        ]
        return [products.count(name) for name in ("forward", "bwd_dkdv", "bwd_dq")], tiles

    full, tiles = run((L, L))
    some, _ = run(window)
    valid = visible(L, L, window)
    for all_of_them, visited, (M, N) in zip(full, some, tiles, strict=True):
        needed = valid.view(L // M, M, L // N, N).any(3).any(1)
        a_tile = all_of_them / needed.numel()
        assert needed.sum() <= visited / a_tile <= needed.sum() + max(needed.shape)


def test_a_window_that_hides_nothing_is_none_and_one_that_ends_here_is_causal(specs):
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 9, 8)
    for window, causal in (
        ((-1, None), False), ((4, 8), False), ((-1, 0), False), ((9, 3), True), ((2, 9), True),
        ((3, 7), False),
    ):  # fmt: skip
        attention(q, k, k, is_causal=causal, scale=0.5, window=window)
    plain = Spec(0.5)
    assert specs == [
        plain, plain, plain._replace(causal=True), plain._replace(causal=True),
        plain._replace(causal=True, left=2), plain._replace(left=3, right=7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("window", "error"),
    [
        ((-2, 0), ValueError),
        ((1,), TypeError),
        ((1, 2, 3), TypeError),
        (4, TypeError),
        ((1.0, 0), TypeError),
        ((True, 0), TypeError),
        ("ab", TypeError),
        ((torch.tensor(1), 0), TypeError),
    ],
    ids=str,
)
def test_what_is_no_window_is_refused_each_time(window, error):
    q = torch.randn(1, 1, 5, 8)
    attention(q, q, q, window=(1, 0))
    attention(q, q, q, window=Band(-2, None))  # inside the library bounds may be negative
    for _ in range(2):
        with pytest.raises(error, match="window must"):
            attention(q, q, q, window=window)
