"""Random problems: any shape, stride, mask, grouping, and each input with or without a tangent.

On a CPU the public functions on the float64 reference against dense attention, and the interpreted
kernels against the reference; on a GPU the compiled kernels, more than a thousand of them.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from jvp_flash_attention import attention, attention_jvp, kernels
from jvp_flash_attention.call import Band, Blocks, Packed
from jvp_flash_attention.kernels.problem import Problem
from jvp_flash_attention.selfcheck import dense
from tests.cases import Case, build, check, close, errors, visible

EXAMPLES = 70  # of each of the 44 compiled tests
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


BOUNDS = st.one_of(st.none(), st.integers(-3, 20))


@st.composite
def sequences(draw, L, S) -> tuple:
    """Up to five in L rows and S keys; empty ones, and rows behind the last one."""
    n = draw(st.integers(0, 5))
    ends = lambda rows: st.lists(st.integers(0, rows), min_size=n, max_size=n).map(sorted)  # noqa: E731
    cu_q = (0, *draw(ends(L)))
    return cu_q, None if cu_q[-1] <= S and draw(st.booleans()) else (0, *draw(ends(S)))


@st.composite
def layouts(draw, L, S, rows, columns) -> tuple:
    """Any block mask of L rows and S keys."""
    line = st.tuples(*[st.booleans()] * -(-S // columns))
    return draw(st.tuples(*[line] * -(-L // rows)))


@st.composite
def cases(draw, lengths, head_dims, tangents) -> Case:
    """Any problem with lengths and head dims from the given strategies."""
    Hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    D, L, S = draw(head_dims), draw(lengths), draw(lengths)
    packed = draw(st.one_of(st.none(), sequences(L, S)))
    return Case(
        B=draw(st.integers(1, 3)),
        H=Hk * group,
        Hk=Hk,
        L=L,
        S=S,
        D=D,
        Dv=draw(st.sampled_from([None, None, 2 * D])),
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.just((None, None)), st.tuples(BOUNDS, BOUNDS))),
        packed=packed,
        lower_right=packed is not None and draw(st.booleans()),
        mask=None if packed else draw(st.sampled_from([None, None, "bool", "key", "row", "full"])),
        tangents=draw(tangents),
        scale=draw(st.sampled_from([None, 0.3, -0.5])),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.7])),
        layout=draw(st.sampled_from(["bhld", "blhd", "padded"])),
        seed=draw(st.integers(0, 10**6)),
    )


SUBSETS = st.sets(st.sampled_from("qkvb"), min_size=1).map(lambda s: "".join(sorted(s)))


@seed(0)
@settings(max_examples=120, **QUIET)
@given(cases(st.integers(1, 12), st.integers(1, 9), SUBSETS), st.data())
def test_the_public_functions_equal_dense_attention(case, data):
    alone = case.mask is None and case.packed is None and case.window == (None, None)
    if alone and not case.causal:  # sizes that only the reference has
        layout = data.draw(layouts(case.L, case.S, 3, 5))
        case = replace(case, blocks=layout, block_sizes=(3, 5))
    p = build(case, torch.float64)
    options = {"is_causal": case.causal, "scale": case.scale, "enable_gqa": True}
    options["softcap"] = case.softcap
    if case.window != (None, None):
        options["window"] = Band(*case.window)
    if case.packed:
        cu_q, cu_k = p.packed
        options["cu_seqlens"] = Packed(cu_q, cu_q if cu_k is None else cu_k, case.lower_right)
    if case.blocks:
        options["block_mask"] = Blocks(*p.packed[2:], *case.block_sizes)
    q, k, v, mask = p.primals
    t_q, t_k, t_v, t_mask = p.tangents
    out, t_out = attention_jvp(q, k, v, t_q, t_k, t_v, mask, t_attn_mask=t_mask, **options)
    inputs = [x for x in p.primals if x is not None and x.is_floating_point()]
    tangents = [
        torch.zeros_like(x) if t is None else t
        for x, t in zip(p.primals, p.tangents, strict=True)
        if x is not None and x.is_floating_point()
    ]
    masks = () if len(inputs) == 4 else (mask,)
    seen = (visible(case), False, case.scale, None, case.softcap)
    how = (case.causal, case.scale, case.window, case.softcap)
    f = lambda *x: dense(*x, *masks, *how)  # noqa: E731
    if case.packed or case.blocks:
        f = lambda *x: dense(*x, *seen)  # noqa: E731
    exact, t_exact = torch.func.jvp(f, tuple(inputs), tuple(tangents))
    close(out, exact)
    close(t_out, t_exact)
    ours = lambda *x: (attention(*x, *masks, **options) * p.d_out).sum()  # noqa: E731
    theirs = lambda *x: (f(*x) * p.d_out).sum()  # noqa: E731
    at = tuple(range(len(inputs)))
    for got, e in zip(
        torch.func.grad(ours, at)(*inputs), torch.func.grad(theirs, at)(*inputs), strict=True
    ):
        close(got, e)


@pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_the_kernels_equal_the_reference(examples):
    @seed(0)
    @settings(max_examples=examples, **QUIET)
    @given(
        cases(st.integers(1, 40), st.integers(8, 24), SUBSETS),
        st.sampled_from([torch.float32, torch.float16]),
    )
    def run(case, dtype):
        check(errors(kernels, case, dtype, "cpu", rows=1), dtype, slack=2.0)

    run()


STRUCTURE = ("window", "packed", "blocks", "softcap")
MASKS = ("bool", "key", "row", "full")
FIXED = {"fixed key": "key", "fixed full": "full"}  # without a tangent: other kernels than with one


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mask", [None, *STRUCTURE, *MASKS, *FIXED], ids=str)
@pytest.mark.parametrize(
    ("dtype", "large"),
    [
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, False),
        pytest.param(torch.float32, True, id="float32 in parts"),
    ],
    ids=str,
)
def test_the_compiled_kernels_equal_the_reference(
    dtype, large, mask, record_property, monkeypatch, launched_anew
):
    """Decided by the test, and so compiled once: dtype, head dim, kind of mask, whether that has a
    tangent. Groups go with layouts. Float32 operands are cut before in large calls, or in all."""
    if large:
        monkeypatch.setattr(Problem, "large", True)
    worst: dict[str, float] = {}
    head_dim = st.just(40 if dtype == torch.float32 else 64)
    if large:
        head_dim = st.sampled_from([40, 72])  # tiles of either width

    @seed(0)
    @settings(max_examples=EXAMPLES, **QUIET)
    @given(
        cases(st.integers(1, 300), head_dim, st.just("qkv" if mask in FIXED else "qkvb")), st.data()
    )
    def run(case, data):
        H = case.Hk * (2 if case.layout == "blhd" else 1)
        window = (33, 7) if mask == "window" else (None, None)
        softcap = 0.7 if mask == "softcap" else 0.0
        case = replace(case, H=H, Dv=None, scale=None, window=window, packed=None, softcap=softcap)
        if mask == "packed":
            packed = data.draw(sequences(case.L, case.S))
            case = replace(case, mask=None, packed=packed)
        elif mask == "blocks":
            layout = data.draw(layouts(case.L, case.S, 128, 128))
            how = {"causal": False, "lower_right": False, "mask": None}
            case = replace(case, blocks=layout, block_sizes=(128, 128), **how)
        else:
            case = replace(
                case, lower_right=False, mask=FIXED.get(mask, mask if mask in MASKS else None)
            )
        found = errors(kernels, case, dtype, "cuda", rows=16)  # hypothesis likes single rows
        for name, error in found.items():
            worst[name] = max(worst.get(name, 0.0), error)
        check(found, dtype, slack=2.0)

    run()
    record_property("errors", worst)
    record_property("examples", EXAMPLES)
