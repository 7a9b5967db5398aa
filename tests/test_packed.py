"""Packed sequences of different lengths are each sequence alone, in every derivative, and kernels
skip the tiles of others."""

from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

from jvp_flash_attention import attention, attention_jvp, reference, selfcheck
from jvp_flash_attention.call import Band, Packed
from jvp_flash_attention.distributed import rules
from jvp_flash_attention.selfcheck import COMPOSITIONS, Inputs, dense
from tests.cases import Case, build, check, close, errors, solve

LENGTHS = ((5, 0, 3, 1), (2, 4, 0, 6))


def starts(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def alone(q, k, v, lengths, f=dense, **how):
    """(B, H, T, D) of each sequence on its own, and 0 behind the last one."""
    parts = [x.split([*n, x.shape[2] - sum(n)], 2) for x, n in zip((q, k, v), lengths, strict=True)]
    outs = [f(*x, **how) if x[1].shape[2] else x[0].new_zeros(*x[0].shape[:3], v.shape[3])
            for x in list(zip(*parts, strict=True))[:-1]]  # fmt: skip
    rest = parts[0][-1]
    return torch.cat([*outs, rest.new_zeros(*rest.shape[:3], v.shape[3])], 2)


def math(q, k, v, lengths, window=(None, None), causal=False, lower_right=False):
    """By `dense`, with the band written as the mask of each sequence."""

    def one(q, k, v):
        L, S = q.shape[2], k.shape[2]
        more = S - L if lower_right else 0
        left, right = window
        right = 0 if causal and (right is None or right > 0) else right
        beside = torch.arange(S) - torch.arange(L)[:, None] - more  # j - i
        mask = torch.ones(L, S, dtype=torch.bool)
        if left is not None:
            mask = mask & (beside >= -left)
        if right is not None:
            mask = mask & (beside <= right)
        return dense(q, k, v, mask)

    return alone(q, k, v, (lengths[0], lengths[1], lengths[1]), one)


@pytest.mark.parametrize("lower_right", [False, True])
@pytest.mark.parametrize(
    ("window", "causal"),
    [
        ((None, None), False),
        ((None, None), True),
        ((2, 1), False),
        ((1, None), True),
        ((None, -1), False),
    ],
)
def test_the_reference_is_each_sequence_alone(window, causal, lower_right):
    lengths, more = LENGTHS, (2, 3)
    T, U = (sum(n) + m for n, m in zip(lengths, more, strict=True))
    q, k, v = (torch.randn(2, h, n, 3, dtype=torch.float64) for h, n in ((4, T), (2, U), (2, U)))
    x, t = (q, k, v), tuple(map(torch.randn_like, (q, k, v)))
    how = {"is_causal": causal, "window": Band(*window), "enable_gqa": True}
    how["cu_seqlens"] = Packed(*map(starts, lengths), lower_right)
    f = lambda *x: attention(*x, **how)  # noqa: E731
    theirs = lambda *x: math(*x, lengths, window, causal, lower_right)  # noqa: E731
    out, t_out = jvp(f, x, t)
    exact, t_exact = jvp(theirs, x, t)
    close(out, exact)
    close(t_out, t_exact)
    pair = torch.randn_like(out), torch.randn_like(out)
    through = [vjp(lambda *x, f=f: jvp(f, x, t), *x)[1](pair) for f in (f, theirs)]
    for got, e in zip(*through, strict=True):
        close(got, e)
    close(attention_jvp(*x, *t, **how)[1], t_exact)


def of_a_bias(f):
    """With the bias of `selfcheck` on the values, since packed sequences take no mask."""
    return lambda q, k, v, b: f(q, k, v + b[:, : v.shape[1]].mT)


PAIR = ((3, 0, 2), (1, 2, 3))
packed = of_a_bias(lambda *x: attention(*x, enable_gqa=True, cu_seqlens=tuple(map(starts, PAIR))))
exact = of_a_bias(lambda *x: alone(*x, (PAIR[0], PAIR[1], PAIR[1])))


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_equals_dense_attention(name):
    inputs = Inputs()
    results = [selfcheck.flat(COMPOSITIONS[name](inputs, f)) for f in (packed, exact)]
    for got, e in zip(*results, strict=True):
        close(got, e)


@pytest.mark.compile
def test_compiled(monkeypatch):
    # inductor compiles the same operators in test_window.py
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(selfcheck, "ours", packed)
    monkeypatch.setattr(selfcheck, "dense", exact)
    step = selfcheck.COMPILED["compile, loss through the tangent"]
    assert selfcheck._compiled(step, Inputs(), Inputs()) < 1e-10


@pytest.mark.compile
def test_other_lengths_do_not_compile_anew():
    torch._dynamo.reset()
    graphs = []

    def counted(graph, example):
        graphs.append(graph)
        return graph

    def loss(q, cu):
        f = lambda q: attention(q, q, q, is_causal=True, cu_seqlens=cu)  # noqa: E731
        out, t_out = jvp(f, (q,), (q.detach().cos(),))
        return (out + 0.3 * t_out.detach()).square().sum()

    step = torch.compile(loss, backend=counted, fullgraph=True, dynamic=True)
    for lengths in ((3, 4), (5, 1, 3), (2, 2, 6, 4)):
        q = torch.randn(2, sum(lengths), 4, dtype=torch.float64, requires_grad=True)
        cu = starts(lengths)
        got, want = (torch.autograd.grad(f(q, cu), q)[0] for f in (step, loss))
        close(got, want)
    assert len(graphs) == 1


CU = ((0, 37, 37, 70, 71), (0, 50, 53, 53, 75))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(B=1, L=74, S=80, D=16, packed=CU), torch.float32),
        (Case(B=1, L=71, S=71, D=8, H=2, Hk=1, packed=(CU[0], None), causal=True), torch.float16),
        (Case(B=1, L=71, S=75, D=16, packed=CU, causal=True, lower_right=True), torch.float32),
        (Case(B=1, L=71, S=75, D=16, packed=CU, window=(9, 4), lower_right=True), torch.float32),
        (Case(B=1, L=71, S=75, D=16, packed=CU, window=(None, -3)), torch.float32),
        (
            Case(B=1, H=1, Hk=1, L=40, S=75, D=16, packed=((0, 40), (0, 70)), dropout_p=0.2),
            torch.float32,
        ),
        (Case(B=1, L=9, S=7, D=16, packed=((0, *range(9)), (0, *[3] * 9))), torch.float32),
        (Case(B=1, L=9, S=7, D=16, packed=((0,), (0,))), torch.float32),
        (Case(B=1, L=20, S=20, D=16, packed=((0, 20), None), layout="blhd"), torch.float32),
    ],
    ids=str,
)
def test_the_kernels_equal_the_reference(case, dtype, device):
    from jvp_flash_attention import kernels

    check(errors(kernels, case, dtype, device, rows=1), dtype, slack=2.0)


@pytest.mark.parametrize("how", [{}, {"causal": True}], ids=str)
def test_what_another_sequence_or_no_sequence_holds_is_not_felt(how, device):
    from jvp_flash_attention import kernels

    case = Case(B=1, H=1, Hk=1, L=75, S=80, packed=((0, 33, 70), (0, 41, 75)), **how)
    for implementation, dtype in ((reference, torch.float64), (kernels, torch.float32)):
        wanted = solve(implementation, build(case, dtype, device))
        p = build(case, dtype, device)
        for x, (_, begin, end) in zip(
            (*p.primals[:3], *p.tangents[:3], p.d_out, p.d_t_out),
            (case.packed[0], *[case.packed[1]] * 2, case.packed[0], *[case.packed[1]] * 2,
             *[case.packed[0]] * 2),
            strict=True,
        ):  # fmt: skip
            x[:, :, begin:end] = float("nan")
            x[:, :, end:] = float("inf")
        got = solve(implementation, p)
        for name, x in wanted.items():
            cu = case.packed[name[-1] in "kv"]
            assert torch.equal(got[name][:, :, : cu[1]], x[:, :, : cu[1]]), name
            assert not x[:, :, cu[2] :].any(), name


def test_packed_ones_have_the_derivatives_of_padded_ones_through_the_kernels(device):
    lengths = (5, 17, 1)
    cu = starts(lengths, device)
    rows = torch.cat([n * 17 + torch.arange(m) for n, m in enumerate(lengths)]).to(device)
    mask = (torch.arange(17) < torch.tensor(lengths)[:, None]).to(device)[:, None, None]
    x = tuple(torch.randn(2, 23, 8, device=device) for _ in range(3))

    def pad(x):
        x = x.new_zeros(2, 51, 8).index_copy(1, rows, x)
        return x.unflatten(1, (3, 17)).transpose(0, 1)  # (sequences, H, 17, D)

    def ours(*x):
        return attention(*x, cu_seqlens=cu, backend="triton")

    def theirs(*x):
        return attention(*map(pad, x), mask).transpose(0, 1).flatten(1, 2)[:, rows]

    t = tuple(map(torch.cos, x))

    def second(f, *x):
        first = lambda *x: grad(lambda *x: f(*x).square().sum(), (0, 1, 2))(*x)  # noqa: E731
        return grad(lambda *x: sum(g.square().sum() for g in first(*x)), (0, 1, 2))(*x)

    def through(f, *x):
        return vjp(lambda *x: jvp(f, x, t), *x)[1]((x[0], x[1]))

    def hessian_vector(f, *x):
        return jvp(grad(lambda *x: f(*x).sin().sum(), (0, 1, 2)), x, t)[1]

    wide = tuple(y.double() for y in x)
    for compose in (second, through, hessian_vector):
        t = tuple(map(torch.cos, x))
        got = compose(ours, *x)
        t = tuple(map(torch.cos, wide))
        for g, e in zip(got, compose(theirs, *wide), strict=True):
            assert (g - e).norm() / e.norm() < 1e-4


def test_tiles_of_other_sequences_are_not_visited_by_any_pass(products):
    """Products of tiles are counted, in the interpreter."""
    from jvp_flash_attention import kernels

    def run(L, S, packed):
        products.clear()
        p = build(Case(B=1, H=1, Hk=1, L=L, S=S, D=16, packed=packed), torch.float32)
        saved = kernels.forward(p.x, p.t, p.spec)
        kernels.backward(p.d_out, p.d_t_out, p.x, p.t, saved, p.spec, False)
        return [products.count(name) for name in ("forward", "bwd_dkdv", "bwd_dq")]

    each = [run(70, 33, None), run(5, 70, None), run(100, 1, None)]
    together = run(180, 110, ((0, 70, 75, 75, 175), (0, 33, 103, 108, 109)))
    assert together == [sum(counts) for counts in zip(*each, strict=True)]


def test_calls_of_a_kind_take_cached_launches_with_their_own_lengths(device):
    launch_cache = pytest.importorskip("jvp_flash_attention.kernels.launch_cache")
    launch_cache.clear()
    q = torch.randn(2, 40, 8, device=device)
    for lengths in ((10, 30), (33, 4)):
        cu = starts(lengths, device)
        got = attention(q, q, q, cu_seqlens=cu, backend="triton")
        assert len(launch_cache._entries) == 1
        torch.testing.assert_close(got, attention(q, q, q, cu_seqlens=cu, backend="reference"))


Q = torch.randn(2, 9, 4)
CU_Q = starts((4, 5))


@pytest.mark.parametrize(
    ("cu", "error", "message"),
    [
        ((4, 5), TypeError, "cu_seqlens must be a tensor, or a pair"),
        ((CU_Q,), TypeError, "cu_seqlens must be a tensor, or a pair"),
        (CU_Q.long(), TypeError, "cu_seqlens must be int32, got torch.int64"),
        ((CU_Q, CU_Q.float()), TypeError, "cu_seqlens_k must be int32"),
        (CU_Q[None], ValueError, r"cu_seqlens must have shape \(sequences \+ 1,\)"),
        ((CU_Q, CU_Q[:2]), ValueError, "equally many sequences, got 2 and 1"),
        (CU_Q.to("meta"), ValueError, "cu_seqlens must be on query's device"),
        ((CU_Q, CU_Q + 1), ValueError, "cu_seqlens_k must rise from 0 to at most 9"),
        (starts((4, 6)), ValueError, "cu_seqlens must rise from 0 to at most 9"),
        (starts((4, -2)), ValueError, "cu_seqlens must rise"),
    ],
)
def test_what_is_no_packing_is_refused_each_time(cu, error, message):
    attention(Q, Q, Q, cu_seqlens=CU_Q)
    for _ in range(2):
        with pytest.raises(error, match=message):
            attention(Q, Q, Q, cu_seqlens=cu)


def test_what_is_not_supported_beside_it_raises():
    with pytest.raises(NotImplementedError, match="attn_mask is not supported beside cu_seqlens"):
        attention(Q, Q, Q, torch.ones(9, 9) > 0, cu_seqlens=CU_Q)
    both = torch.stack([CU_Q, starts((2, 3))])
    with pytest.raises(NotImplementedError, match="vmap over cu_seqlens"):
        vmap(lambda cu: attention(Q, Q, Q, cu_seqlens=cu))(both)
    for name in ("window", "cu_seqlens"):
        with pytest.raises(
            NotImplementedError, match=f"context parallel attention takes no {name}"
        ):
            rules.numbers(**{name: CU_Q})


def ragged(lengths, H, D, like=None):
    """(B, H, L*, D), with the offsets of another where one is given."""
    offsets = starts(lengths).long() if like is None else like.offsets()
    rows = torch.randn(sum(lengths), H, D, dtype=torch.float64, requires_grad=True)
    return rows, torch.nested.nested_tensor_from_jagged(rows, offsets).transpose(1, 2)


def test_jagged_in_is_jagged_out_with_tangent_and_gradients():
    """PyTorch's own attention of the same tensors has the values; there is none with a tangent."""
    (q_rows, q), (k_rows, k) = ragged((3, 1, 4), 4, 8), ragged((2, 5, 1), 2, 8)
    v_rows, v = ragged((2, 5, 1), 2, 8, like=k)
    tangents = [ragged(*a, like=b) for *a, b in (((3, 1, 4), 4, 8, q), ((2, 5, 1), 2, 8, k))]
    (tq_rows, t_q), (tk_rows, t_k) = tangents
    leaves = (q_rows, k_rows, v_rows, tq_rows, tk_rows)
    out, t_out = attention_jvp(q, k, v, t_q, t_k, None, enable_gqa=True, is_causal=True)
    assert out.is_nested
    assert out.offsets() is q.offsets()
    packed = [x.transpose(0, 1) for x in leaves]
    how = {"enable_gqa": True, "is_causal": True}
    how["cu_seqlens"] = starts((3, 1, 4)), starts((2, 5, 1))
    wanted = attention_jvp(*packed, None, **how)
    for got, e in zip((out, t_out), wanted, strict=True):
        close(got.values(), e)
    d = torch.randn_like(wanted[0]), torch.randn_like(wanted[0])
    grads = [
        torch.autograd.grad(sum((x * y).sum() for x, y in zip(results, d, strict=True)), leaves)
        for results in ((out.values(), t_out.values()), wanted)
    ]
    for got, e in zip(*grads, strict=True):
        close(got, e)
    close(attention(q, k, v, **how | {"cu_seqlens": None}).values(), wanted[0])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        x = q.detach()
        theirs = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    close(attention(x, x, x).values(), theirs.values())


def test_jagged_ones_that_do_not_fit_together_are_refused():
    _, q = ragged((3, 1), 2, 4)
    _, k = ragged((3, 1), 2, 4)
    for given, error, message in (
        ((q, k, q), ValueError, "value must have the offsets of key"),
        ((q, Q, Q), ValueError, "key must be a jagged nested tensor"),
        ((Q, q, q), NotImplementedError, "key must be a dense tensor, got a nested one"),
        ((q.transpose(1, 2),) * 3, NotImplementedError, "make it of .length, heads, head dim."),
    ):
        with pytest.raises(error, match=message):
            attention(*given)
    with pytest.raises(ValueError, match="cu_seqlens must be None"):
        attention(q, q, q, cu_seqlens=CU_Q)
    with pytest.raises(NotImplementedError, match="attn_mask is not supported"):
        attention(q, q, q, torch.ones(4, 4) > 0)


@pytest.mark.compile
def test_jagged_compiled():
    torch._dynamo.reset()
    rows, q = ragged((3, 1, 4), 2, 4)
    step = torch.compile(lambda q: attention(q, q, q), backend="aot_eager", fullgraph=True)
    got, wanted = step(q), attention(q, q, q)
    close(got.values(), wanted.values())
    grads = [torch.autograd.grad(x.values().square().sum(), rows)[0] for x in (got, wanted)]
    close(*grads)
