"""Rows and keys outside of a range have no tangent, cost none, and change nothing else."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import Function
from torch.func import grad, jvp, vjp
from torch.utils._python_dispatch import TorchDispatchMode

from jvp_flash_attention import attention, attention_jvp, ranges, selfcheck
from jvp_flash_attention.block_mask import block_mask
from jvp_flash_attention.call import Band, Blocks, Saved, Spec
from jvp_flash_attention.kernels import cudnn, dispatch, launch_cache
from jvp_flash_attention.modules import Attention
from jvp_flash_attention.selfcheck import COMPOSITIONS, Inputs, dense
from tests.cases import Case, build, check, close, errors, visible
from tests.test_properties import QUIET, SUBSETS, cases, layouts


class Still(Function):
    """x, whose gradient is x's own and whose tangent is zero where `kept` is 0."""

    @staticmethod
    def forward(x, kept):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(inputs[1])
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, d_x):
        return d_x, None

    @staticmethod
    def jvp(ctx, t_x, _):
        (kept,) = ctx.saved_tensors
        return None if t_x is None else t_x * kept

    @staticmethod
    def vmap(info, in_dims, x, kept):
        return Still.apply(x.movedim(in_dims[0], 0), kept), 0


def inside(n: int, pair, like: Tensor) -> Tensor:
    """(n, 1), 1 in the range and 0 outside."""
    start, stop = (0, n) if pair is None else pair
    i = torch.arange(n, device=like.device)
    return ((i >= start) & (i < stop)).to(like.dtype).unsqueeze(-1)


def moved(f, rows=None, keys=None):
    """What ranges make of a function (q, k, v, mask or None) by definition: its value, and row by
    row its derivatives, along tangents that are cut before they come in."""

    def g(q, k, v, mask=None):
        L, S = q.shape[2], k.shape[2]
        start, stop = (0, L) if rows is None else rows
        kept = inside(S, keys, k)
        still = lambda x: Still.apply(x, torch.zeros_like(x[:1, :1, :1, :1]))  # noqa: E731
        moving = (q, Still.apply(k, kept), Still.apply(v, kept), mask)
        fixed = (still(q), still(k), still(v))
        floating = mask is not None and mask.is_floating_point()
        fixed = (*fixed, still(mask) if floating else mask)
        here = (inside(L, (start, stop), q) > 0).expand(L, v.shape[3])
        return torch.where(here, f(*moving), f(*fixed))

    return g


RANGES = [
    {"rows": (2, 4)}, {"rows": (0, 3), "keys": (0, 6)}, {"keys": (2, 5)},
    {"rows": (1, 5), "keys": (2, 6)},
]  # fmt: skip


def named(pairs):
    """Ranges as arguments."""
    return {f"tangent_{name}": pair for name, pair in pairs.items()}


@pytest.mark.parametrize("pairs", RANGES, ids=str)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_equals_dense_attention(name, pairs):
    """The bias goes to the queries where keys are split, which stay together beside one."""
    inputs = Inputs()
    bare = "keys" in pairs

    def through(f):
        return (lambda q, k, v, b: f(q + b[..., :3], k, v)) if bare else f

    ours = through(lambda *x: attention(*x, enable_gqa=True, **named(pairs)))
    results = [
        selfcheck.flat(COMPOSITIONS[name](inputs, f))
        for f in (ours, through(moved(dense, **pairs)))
    ]
    for got, e in zip(*results, strict=True):
        close(got, e)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["compile, MeanFlow step", "compile, loss through the tangent"])
def test_compiled(name, monkeypatch):
    pairs = {"rows": (1, 4), "keys": (2, 6)}
    ours = lambda *x: attention(*x[:3], enable_gqa=True, **named(pairs))  # noqa: E731
    exact = lambda *x: moved(dense, **pairs)(*x[:3])  # noqa: E731
    monkeypatch.setattr(selfcheck, "ours", ours)
    monkeypatch.setattr(selfcheck, "dense", exact)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, backend="aot_eager", **how))
    assert selfcheck._compiled(selfcheck.COMPILED[name], Inputs(), Inputs()) < 1e-10


EXAMPLES = 40  # of each of the 8 compiled tests
KINDS = ("plain", "causal", "window", "mask", "blocks")


@st.composite
def ranged(draw, kind, lengths, head_dims, block_sizes=None):
    """A problem of a kind with a range of rows or keys or both."""
    case = draw(cases(lengths, head_dims, SUBSETS))
    bound = st.integers(-2, 7)
    case = replace(
        case,
        packed=None,
        lower_right=False,
        causal=kind == "causal" or (kind == "mask" and case.causal),
        window=draw(st.tuples(bound, bound)) if kind == "window" else (None, None),
        mask=draw(st.sampled_from(["bool", "key", "row", "full"])) if kind == "mask" else None,
    )
    if case.tangents == "b" and case.mask in (None, "bool"):
        case = replace(case, tangents="q")
    which = draw(st.sampled_from(["rows", "keys", "both"]))
    rows, keys = (draw(pairs(n)) for n in (case.L, case.S))
    if kind == "blocks":
        layout = draw(layouts(case.L, case.S, *block_sizes))
        case = replace(case, blocks=layout, block_sizes=block_sizes)
        rows, keys = (
            tuple(x if x == n else x // m * m for x in pair)
            for pair, n, m in zip((rows, keys), (case.L, case.S), block_sizes, strict=True)
        )
    return replace(
        case, t_rows=None if which == "keys" else rows, t_keys=None if which == "rows" else keys
    )


def pairs(n):
    """Any range of n, seldom an empty one."""
    return st.lists(st.integers(0, n), min_size=2, max_size=2, unique=n > 0).map(sorted).map(tuple)


@pytest.mark.parametrize("kind", KINDS)
def test_the_public_functions_equal_dense_attention(kind):
    """With the gradient through the tangent, in the tangents too."""

    @seed(0)
    @settings(max_examples=40, **QUIET)
    @given(ranged(kind, st.integers(4, 12), st.integers(1, 6), (3, 5)))  # the reference's alone
    def run(case):
        the_public_functions_equal_dense_attention(case)

    run()


def the_public_functions_equal_dense_attention(case):
    p = build(case, torch.float64)
    options = {"is_causal": case.causal, "scale": case.scale, "enable_gqa": True}
    options |= {"softcap": case.softcap, "tangent_rows": case.t_rows, "tangent_keys": case.t_keys}
    if case.window != (None, None):
        options["window"] = Band(*case.window)
    if case.blocks:
        options["block_mask"] = Blocks(*p.packed[2:], *case.block_sizes)
    how = (case.causal, case.scale, case.window, case.softcap)
    seen = (visible(case), False, case.scale, None, case.softcap)

    def exact(q, k, v, mask=None):
        return dense(q, k, v, *seen) if case.blocks else dense(q, k, v, mask, *how)

    f = moved(exact, case.t_rows, case.t_keys)
    floating = p.primals[3] is not None and p.primals[3].is_floating_point()
    masks = () if floating or p.primals[3] is None else (p.primals[3],)
    x = [y for y in p.primals if y is not None and y.is_floating_point()]
    at = [i for i in range(len(x)) if p.tangents[i] is not None]
    t = [p.tangents[i] for i in at]

    def explicit(x, t):
        given = [None] * 4
        for i, y in zip(at, t, strict=True):
            given[i] = y
        mask = x[3] if floating else p.primals[3]
        return attention_jvp(*x[:3], *given[:3], mask, t_attn_mask=given[3], **options)

    def theirs(x, t):
        def along(*moving):
            given = list(x)
            for i, y in zip(at, moving, strict=True):
                given[i] = y
            return f(*given, *masks)

        return jvp(along, tuple(x[i] for i in at), tuple(t))

    pair = (p.d_out, p.d_t_out)
    out, pull = vjp(explicit, x, t)
    wanted, pull_exact = vjp(theirs, x, t)
    grads, grads_exact = pull(pair), pull_exact(pair)
    for got, e in zip(
        selfcheck.flat([out, grads]), selfcheck.flat([wanted, grads_exact]), strict=True
    ):
        close(got, e)
    ours = lambda *x: (attention(*x, *masks, **options) * p.d_out).sum()  # noqa: E731
    plain = lambda *x: (exact(*x, *masks) * p.d_out).sum()  # noqa: E731
    each = tuple(range(len(x)))
    for got, e in zip(grad(ours, each)(*x), grad(plain, each)(*x), strict=True):
        close(got, e)


SMALL = Case(B=1, H=1, Hk=1, L=45, S=60, D=16)
KERNELS = [
    (Case(B=1, L=70, S=75, D=16, t_rows=(20, 50)), torch.float32),
    (replace(SMALL, H=2, L=40, S=90, t_keys=(30, 77), tangents="kv"), torch.float32),
    (replace(SMALL, L=60, causal=True, t_rows=(33, 60), t_keys=(9, 60)), torch.float16),
    (replace(SMALL, mask="full", t_rows=(7, 45), t_keys=(0, 20)), torch.float32),
    (replace(SMALL, mask="bool", window=(30, 9), t_keys=(20, 30)), torch.float32),
    (
        replace(
            SMALL, L=140, S=270, D=8, blocks=((True, False), (True, True)),
            t_rows=(128, 140), t_keys=(256, 270),
        ),
        torch.float32,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), KERNELS, ids=str)
def test_the_kernels_equal_the_reference(case, dtype, device):
    check(errors(ranges, case, dtype, device, rows=1), dtype, slack=2.0)
    check(errors(ranges, case, torch.float64, device, "reference", rows=1), torch.float64, slack=50)


@pytest.mark.parametrize("examples", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_random_problems_on_the_kernels(kind, examples, device):
    @seed(0)
    @settings(max_examples=examples, **QUIET)
    @given(
        ranged(kind, st.integers(4, 40), st.just(16)),
        st.sampled_from([torch.float32, torch.float16]),
    )
    def run(case, dtype):
        case = replace(case, B=1, H=2, Hk=min(case.Hk, 2))
        check(errors(ranges, case, dtype, device, rows=1), dtype, slack=2.0)

    run()


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_compiled_kernels_equal_the_reference(dtype, kind, record_property):
    """Where the diagonal begins is known at compile time, and so decided by the test."""
    worst: dict[str, float] = {}

    @seed(0)
    @settings(max_examples=EXAMPLES, **QUIET)
    @given(ranged(kind, st.integers(140, 300), st.just(64), (128, 128)))
    def run(case):
        case = replace(
            case, H=2 * case.Hk, Dv=None, scale=None, softcap=0.0, causal=kind == "causal"
        )
        if case.causal:
            rows, keys = (128, case.L), (64, case.S)
            case = replace(case, t_rows=case.t_rows and rows, t_keys=case.t_keys and keys)
        found = errors(ranges, case, dtype, "cuda", rows=16)
        for name, error in found.items():
            worst[name] = max(worst.get(name, 0.0), error)
        check(found, dtype, slack=2.0)

    run()
    record_property("errors", worst)
    record_property("examples", EXAMPLES)


@pytest.mark.gpu
def test_rows_on_a_second_stream_are_those_of_one_stream(monkeypatch):
    """Bit for bit, call after call, which reuse each other's memory, and in a captured graph."""
    x = [torch.randn(2, 8, 4096, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    call = lambda: torch.stack(attention_jvp(*x, tangent_rows=(1024, 3072)))  # noqa: E731
    assert x[0].shape[:3].numel() * 4096 >= ranges.BESIDE
    beside = [call() for _ in range(8)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        graph.replay()
    monkeypatch.setattr(ranges, "BESIDE", 2**60)
    alone = call()
    for result in (*beside, captured):
        assert torch.equal(result, alone)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [(333, 400), (100, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parts_of_the_keys_lose_only_what_they_are_rounded_to(dtype, keys):
    """Two or three parts in 16 bits, merged: in the interpreter 1.19 to 1.26 times the error of one
    call over all keys, of O and of tO. Far from it would be a row merged twice."""
    case = Case(H=2, Hk=1, L=150, S=400, D=64, t_keys=keys)
    check(errors(ranges, case, dtype, "cuda"), dtype, slack=1.26)


def test_a_call_like_an_earlier_one_is_written_to_its_own_results(device):
    """Launches from the cache, into rows of the results."""
    results = []
    for start in range(3):
        torch.manual_seed(start)
        x = torch.randn(6, 1, 2, 40, 16, device=device)
        how = {"tangent_rows": (9, 30), "scale": 0.3}
        got = attention_jvp(*x, **how, backend="triton")
        exact = attention_jvp(*x.double(), **how)
        for y, e in zip(got, exact, strict=True):
            assert (y - e).norm() / e.norm() < 1e-5
        results += got
    assert len({y.data_ptr() for y in results}) == 6


def test_products_of_tangents_are_left_out(products):
    """Of tiles, in the interpreter: 2 a tile without any tangent and 6 with all, 4 where only that
    of the queries is there. Backward the passes have tiles of different sizes."""
    from jvp_flash_attention import kernels

    def run(**how):
        products.clear()
        p = build(Case(B=1, H=1, Hk=1, L=64, S=64, D=16, **how), torch.float32)
        one = ranges if how else kernels
        saved = one.forward(p.x, p.t, p.spec)
        forward = len(products)
        one.backward(p.d_out, p.d_t_out, p.x, p.t, saved, p.spec, False)
        return forward, len(products) - forward

    full, full_grad = run()
    for how, sixths in (
        ({"t_rows": (32, 64)}, 4),
        ({"t_rows": (0, 0)}, 2),
        ({"t_keys": (32, 64)}, 5),
        ({"t_rows": (32, 64), "t_keys": (32, 64)}, 3.5),
    ):
        forward, grads = run(**how)
        assert forward == full * sixths / 6
        assert grads < 0.9 * full_grad


class Beside(TorchDispatchMode):
    """Counts what PyTorch runs, views and allocations aside, with the bytes of an element."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and "empty" not in name:
            self.found[name, result.element_size()] += 1
        return result


def without_kernels(monkeypatch):
    """Launches do nothing from here on."""
    monkeypatch.setattr(launch_cache, "_entries", {})
    monkeypatch.setattr(dispatch, "_launches", lambda *_: iter(()))
    monkeypatch.setattr(launch_cache.Launch, "run", lambda _: None)


PLACED = {("zero_", 8): 1, ("new_zeros", 4): 1, ("copy_", 4): 4}  # tO of plain rows; μ; LSE and μ


@pytest.mark.parametrize(
    ("how", "allocates", "found"),
    [
        ({"t_rows": (32, 64)}, False, PLACED),
        ({"t_rows": (0, 32)}, True, PLACED | {("copy_", 8): 1}),
        ({"t_keys": (32, 64)}, False, {}),
        ({"t_keys": (16, 32), "layout": "blhd"}, False, {}),
        ({"t_rows": (32, 64), "t_keys": (16, 32), "layout": "blhd"}, False, PLACED),
    ],
    ids=str,
)
def test_what_runs_beside_the_kernels(how, allocates, found, monkeypatch):
    """Copies and fills take words of 8 bytes; `allocates` as cuDNN does."""

    def plain(x, spec):
        return Saved(torch.empty_like(x.q), x.q.new_empty(x.q.shape[:3], dtype=torch.float32))

    for name in ("pays", "supports"):
        monkeypatch.setattr(cudnn, name, lambda *_: allocates)
    monkeypatch.setattr(cudnn, "forward", plain)
    without_kernels(monkeypatch)
    p = build(Case(B=2, L=64, S=64, D=16, **how), torch.float16)
    for _ in range(2):  # the second one from the cache
        with Beside() as beside:
            ranges.forward(p.x, p.t, p.spec)
        assert beside.found == found


def test_what_runs_beside_the_kernels_of_gradients(monkeypatch):
    """Rows of dQ and dtQ are placed, dK and dV of two calls added once, statistics gathered."""
    without_kernels(monkeypatch)
    p = build(Case(B=2, L=64, S=64, D=16, t_rows=(32, 64)), torch.float16)
    saved = ranges.forward(p.x, p.t, p.spec)
    with Beside() as beside:
        ranges.backward(p.d_out, p.d_t_out, p.x, p.t, saved, p.spec, False)
    assert beside.found == {("copy_", 8): 3, ("zero_", 8): 1, ("add_", 2): 2, ("clone", 4): 3}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_is_outside_is_not_read(backend, device):
    """NaN there reaches nothing."""
    L, pairs = 24, {"tangent_rows": (8, 20), "tangent_keys": (9, 24)}
    q, k, v, *t = torch.randn(6, 1, 2, L, 16, device=device)
    mask = torch.randn(L, L, device=device)
    x = [y.requires_grad_() for y in (q, k, v)]
    for bias in (None, mask):
        results = []
        for outside in (0.0, float("nan")):
            given = []
            for y, (start, stop) in zip(t, ((8, 20), (9, 24), (9, 24)), strict=True):
                cut = torch.full_like(y, outside)
                cut[:, :, start:stop] = y[:, :, start:stop]
                given.append(cut.requires_grad_())
            out = attention_jvp(*x, *given, bias, **pairs, backend=backend)
            value = (out[0] * t[0]).sum() + (out[1] * t[1]).sum()
            results.append([*out, *torch.autograd.grad(value, (*x, *given))])
        for got, e in zip(*results, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, e)


def test_a_range_that_is_all_is_none(specs):
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 9, 8)
    assert attention_jvp(q[:, :, :0], k, k, None, k, k, tangent_keys=(2, 4))[1].shape[2] == 0
    specs.clear()
    for rows, keys in (((0, 5), None), ([0, 5], (0, 9)), ((0, 4), (0, 9)), ((1, 5), [2, 3])):
        attention(q, k, k, scale=0.5, tangent_rows=rows, tangent_keys=keys)
    plain = Spec(0.5)
    assert specs == [
        plain, plain, plain._replace(t_rows_start=0, t_rows_stop=4),
        plain._replace(t_rows_start=1, t_rows_stop=5, t_keys_start=2, t_keys_stop=3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"tangent_rows": 3}, TypeError, "must be a pair"),
        ({"tangent_rows": (1, 2, 3)}, TypeError, "must be a pair"),
        ({"tangent_keys": (0, True)}, TypeError, "must be a pair"),
        ({"tangent_keys": (0.0, 2)}, TypeError, "must be a pair"),
        ({"tangent_rows": torch.tensor([0, 2])}, TypeError, "must be a pair"),
        ({"tangent_rows": (0, 129)}, ValueError, "0 <= start <= stop <= 128, got"),
        ({"tangent_keys": (-2, 4)}, ValueError, "0 <= start <= stop <= 256, got"),
        ({"tangent_keys": (5, 4)}, ValueError, "0 <= start <= stop <= 256, got"),
        ({"tangent_rows": (0, 4), "dropout_p": 0.1}, NotImplementedError, "beside dropout"),
        (
            {"tangent_rows": (0, 4), "cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)},
            NotImplementedError,
            "beside cu_seqlens",
        ),
        (
            {"tangent_keys": (100, 256), "block_mask": block_mask(torch.ones(1, 2) > 0, 128)},
            NotImplementedError,
            "where blocks of 128 do",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_each_time(how, error, message):
    q, k = torch.randn(1, 1, 128, 8), torch.randn(1, 1, 256, 8)
    (name,) = (name for name in how if name.startswith("tangent"))
    for _ in range(2):
        with pytest.raises(error, match=f"^{name} .*{message}"):
            attention(q, k, k, **how)


def test_the_module_passes_them_on():
    module = Attention(8, 2).double()
    x, t = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    out, t_out = jvp(lambda x: module(x, tangent_rows=(4, 6), tangent_keys=(4, 6)), (x,), (t,))
    cut = t.clone()
    cut[:, :4] = 0.0
    exact, t_exact = jvp(module, (x,), (cut,))
    close(out, exact)
    close(t_out[:, 4:], t_exact[:, 4:])
    assert not t_out[:, :4].any()
