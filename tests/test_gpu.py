"""The kernels on a GPU against the float64 reference, at lengths and head dims that people use."""

import copy
from functools import partial
from itertools import product

import pytest
import torch

from jvp_flash_attention import attention, attention_jvp, kernels, selfcheck
from jvp_flash_attention.call import Inputs, Spec, Tangents
from jvp_flash_attention.kernels import launch_cache
from jvp_flash_attention.kernels.problem import Problem
from tests import test_compile, tolerances
from tests.cases import Case, check, errors
from training.models.dit import DiT
from training.objectives.tangents import Jvp
from training.step import compile_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

LENGTHS = (1, 17, 64, 196, 276, 1000)
HEAD_DIMS = (16, 40, 64, 72, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
name = lambda x: str(x).removeprefix("torch.")  # noqa: E731


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_output_at_all_pairs_of_lengths(dtype, head_dim, causal, record_property):
    worst: dict[str, float] = {}
    for L in LENGTHS:
        for S in LENGTHS:
            case = Case(B=2, H=3, Hk=3, L=L, S=S, D=head_dim, causal=causal, seed=L + S)
            for key, error in errors(kernels, case, dtype, "cuda").items():
                worst[key] = max(worst.get(key, 0.0), error)
    record_property("errors", worst)
    check(worst, dtype)


@pytest.mark.parametrize("head_dim", [40, 64, 72, 88, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
def test_the_value_alone_in_one_launch_is_right_and_repeats(dtype, head_dim, record_property):
    """Of several work items a multiprocessor, of few and many keys, of shared heads."""
    worst = 0.0
    shapes = ((70, 8, 8, 256, 256), (1, 8, 2, 2100, 257), (5, 6, 6, 300, 65), (40, 4, 4, 1, 1000))
    shapes += ((50, 8, 8, 520, 200), (50, 8, 8, 640, 130))
    for B, H, Hk, L, S in shapes:
        q = 2 * torch.randn(B, L, H, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
        k, v = torch.randn(2, B, Hk, S, head_dim, device="cuda", dtype=dtype)
        run = partial(kernels.forward, Inputs(q, k, v), None, Spec(head_dim**-0.5), force="sm90")
        found, again = run(), run()
        assert torch.equal(found.out, again.out)
        assert torch.equal(found.lse, again.lse)
        k, v = (y.double().repeat_interleave(H // Hk, 1) for y in (k, v))
        scores = q.double() @ k.mT * head_dim**-0.5
        wanted = torch.softmax(scores, -1) @ v
        worst = max(worst, ((found.out - wanted).norm() / wanted.norm()).item())
        assert torch.allclose(found.lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)
    record_property("error", worst)
    assert worst < 4e-3


@pytest.mark.parametrize("head_dim", [40, 64, 72, 88, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
def test_the_gradients_of_o_in_one_launch_are_right_and_repeat(dtype, head_dim, record_property):
    """Of lengths that end inside of tiles and work items, of either side the longer one, of few
    work items and of several a multiprocessor, of heads that fit a block and others."""
    worst = 0.0
    lengths = ((256, 256), (130, 71), (1, 300), (333, 65), (64, 640), (1000, 520), (577, 1000))
    many = ((250, (256, 250)), (200, (190, 130)), (200, (128, 256)), (300, (60, 90)))
    few = ((1, (400, 400)), (60, (400, 330)))
    for B, (L, S) in (*many, *few, *((2, x) for x in lengths)):
        rows = torch.randn(4, B, 3, max(L, S), head_dim, device="cuda", dtype=dtype)
        q, d_out = rows[:2, :, :, :L]
        k, v = rows[2:, :, :, :S]
        x, spec = Inputs(q, k, v), Spec(head_dim**-0.5)
        saved = kernels.forward(x, None, spec)
        run = partial(kernels.backward, d_out, None, x, Tangents(), saved, spec, False)
        grads, again = run(force="sm90")[0][:3], run(force="sm90")[0][:3]
        assert all(map(torch.equal, grads, again))
        exact = [y.double().requires_grad_() for y in (q, k, v)]
        out = torch.softmax(exact[0] @ exact[1].mT * spec.scale, -1) @ exact[2]
        for got, wanted in zip(grads, torch.autograd.grad(out, exact, d_out.double()), strict=True):
            worst = max(worst, ((got - wanted).norm() / wanted.norm()).item())
    record_property("error", worst)
    assert worst < 4e-3


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1.3), (torch.bfloat16, 3.5)], ids=str)
def test_sums_for_biases_leave_out_rows_behind_the_last_key(dtype, size):
    """There P is exp(-LSE), which 16 bits do not hold where scores are far below zero."""
    B, L, H, D = 2, 190, 3, 72
    packed = 0.1 * torch.randn(B, L, 3, H, D, device="cuda", dtype=dtype)
    packed += torch.tensor([size, -size, 0.0], device="cuda", dtype=dtype)[:, None, None]
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    d_out = torch.randn(B, L, H, D, device="cuda", dtype=dtype).transpose(1, 2)
    x, spec = Inputs(q, k, v), Spec(D**-0.5, rows_first=True, compiled=True)
    saved = kernels.forward(x, None, spec)
    assert saved.lse.max() < (-8 if dtype == torch.float16 else -90)
    sums = kernels.room_for_sums(x, spec)
    assert sums is not None
    rows = torch.empty_like(packed).permute(2, 0, 3, 1, 4).unbind()
    kernels.backward(d_out, None, x, Tangents(), saved, spec, False, into=(*rows, sums))
    for found, wanted in ((sums[:, :, 0], rows[0]), (sums[:, :, 1], rows[2])):
        wanted = wanted.double().sum((0, 2))
        assert (found.double().sum((0, 1)) - wanted).norm() <= 1e-3 * (1 + wanted.norm())


def test_gradients_of_o_read_rows_of_o_that_are_no_multiple_of_eight():
    q, k, v, d_out = torch.randn(4, 3, 4, 200, 72, device="cuda", dtype=torch.bfloat16)
    x, spec = Inputs(q, k, v), Spec(72**-0.5)
    saved = kernels.forward(x, None, spec)
    apart = torch.zeros(3, 4, 200, 76, device="cuda", dtype=q.dtype)[..., :72].copy_(saved.out)
    run = partial(kernels.backward, d_out, None, x, Tangents())
    wanted, found = (run(y, spec, False)[0][:3] for y in (saved, saved._replace(out=apart)))
    assert all(map(torch.equal, found, wanted))


PACKED = ((0, 100, 100, 101, 230, 270), (0, 40, 140, 290, 290, 300))
LAYOUT = ((True, False, True), (False, False, False), (False, True, True))
INPUTS = (
    Case(H=4, Hk=2, L=276, S=196, D=64),
    Case(H=6, Hk=1, L=130, S=300, D=72, causal=True),
    Case(L=196, S=276, D=64, Dv=128),
    Case(L=196, S=276, D=80, Dv=40, causal=True),
    Case(L=276, S=276, D=64, mask="bool"),
    Case(L=276, S=276, D=64, mask="bool", causal=True),
    Case(L=276, S=200, D=64, mask="key"),
    Case(L=276, S=200, D=64, mask="row"),
    Case(L=276, S=276, D=128, mask="full", causal=True),
    Case(L=276, S=276, D=64, H=4, Hk=2, mask="full"),
    Case(L=276, S=276, D=64, mask="full", tangents="qkv"),  # no tangent of the mask
    Case(L=276, S=200, D=128, mask="full", tangents="qkv"),
    Case(L=276, S=200, D=72, mask="key", tangents="qkv"),
    Case(L=196, S=276, D=72, mask="full", window=(90, 20)),
    Case(L=196, S=276, D=96, mask="full"),
    Case(L=276, S=276, D=64, window=(50, 20)),
    Case(L=276, S=200, D=128, H=4, Hk=2, window=(90, None), causal=True),
    Case(L=200, S=276, D=64, window=(None, 40), mask="full"),
    Case(L=200, S=276, D=64, window=(-40, 100)),  # as flash_attn aligns it
    Case(L=276, S=300, D=64, packed=PACKED),
    Case(L=276, S=300, D=128, packed=PACKED),
    Case(L=276, S=276, D=64, H=4, Hk=2, packed=(PACKED[0], None), causal=True),
    Case(L=276, S=300, D=72, packed=PACKED, causal=True, lower_right=True, layout="blhd"),
    Case(L=276, S=300, D=128, packed=PACKED, window=(50, 20), lower_right=True),
    Case(L=276, S=300, D=64, packed=PACKED, dropout_p=0.3),
    # more tiles than a GPU has multiprocessors
    Case(L=900, S=900, D=96, H=12, Hk=6, packed=((0, 1, 258, 700, 900), None), causal=True),
    Case(B=3, H=16, Hk=16, L=276, S=300, D=64, packed=PACKED, causal=True, lower_right=True),
    Case(L=300, S=700, D=64, blocks=LAYOUT),
    Case(L=300, S=640, D=96, blocks=LAYOUT),
    Case(L=300, S=700, D=128, H=4, Hk=2, blocks=LAYOUT, layout="blhd"),
    Case(L=300, S=700, D=128, H=4, Hk=2, blocks=LAYOUT, dropout_p=0.1),
    Case(L=276, S=276, D=64, tangents="q"),
    Case(L=276, S=276, D=64, tangents="k"),
    Case(L=276, S=276, D=64, tangents="v"),
    Case(L=276, S=276, D=64, tangents="qv", causal=True),
    Case(L=276, S=276, D=64, mask="key", tangents="b"),
    Case(L=276, S=276, D=64, dropout_p=0.3),
    Case(L=276, S=276, D=64, dropout_p=0.1, causal=True, mask="full"),
    Case(L=276, S=276, D=64, scale=-0.3),
    Case(L=276, S=276, D=64, layout="blhd"),
    Case(L=276, S=276, D=72, layout="padded"),
)


KINDS = {
    "short": {"L": 60, "S": 50},
    "whole tiles": {"L": 128, "S": 256},
    "causal": {"L": 200, "S": 190, "causal": True},
    "gaps": {"L": 200, "S": 190, "layout": "padded"},
    "bool": {"L": 200, "S": 190, "mask": "bool"},
    "full": {"L": 200, "S": 190, "mask": "full"},
    "window": {"L": 200, "S": 190, "window": (50, 20)},
    "packed": {"L": 200, "S": 190, "packed": ((0, 60, 61, 160, 200), (0, 10, 75, 180, 190))},
    "blocks": {"L": 200, "S": 600, "blocks": LAYOUT[:2]},
    "softcap": {"L": 200, "S": 190, "softcap": 0.7},
    "dropout": {"L": 200, "S": 190, "dropout_p": 0.3},
}
PAIRS = list(product((8, 24, 64, 128), repeat=2))
MORE_PAIRS = [(36, 20), (100, 12), (192, 128), (256, 64), (24, 256)]  # the first without TMA
ARITHMETICS = ("bfloat16", "float32", "float32 in parts", "high")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arithmetic", "head_dims"),
    [*product(ARITHMETICS, PAIRS), *product(("bfloat16",), MORE_PAIRS)],
    ids=str,
)
def test_head_dims_that_differ(
    arithmetic, head_dims, kind, record_property, monkeypatch, launched_anew
):
    """Tiles of the one lie where those of the other lay in shared memory. Float32 operands are cut
    before in large calls, or in all; "high" cuts them in two where there is no mask."""
    if arithmetic == "float32 in parts":
        monkeypatch.setattr(Problem, "large", True)
    dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "high" else "highest")
    try:
        D, Dv = head_dims
        found = errors(kernels, Case(B=1, D=D, Dv=Dv, **KINDS[kind]), dtype, "cuda", rows=1)
    finally:
        torch.set_float32_matmul_precision(precision)
    record_property("errors", found)
    if arithmetic == "high" and kind not in ("short", "whole tiles", "causal", "gaps"):
        dtype = torch.bfloat16  # one TF32 product has as many digits
    in_two = arithmetic == "high" and dtype == torch.float32
    check(found, dtype, slack=40.0 if in_two else 2.0)


@pytest.mark.parametrize("case", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_output_for_every_kind_of_input(dtype, case, record_property):
    found = errors(kernels, case, dtype, "cuda")
    record_property("errors", found)
    check(found, dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_sequences_keep_to_themselves_behind_tma_and_nothing_waits_for_lengths(head_dim):
    """A step is captured, and replayed with other lengths; NaN in the next one is not felt."""
    x = [torch.randn(40, 300, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    cu = torch.tensor([0, 100, 270], dtype=torch.int32, device="cuda")

    def step():
        leaves = [z.detach().requires_grad_() for z in x[:6]]
        out, t_out = attention_jvp(*leaves, cu_seqlens=cu)
        return out, t_out, *torch.autograd.grad((out, t_out), leaves, x[6:])

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for end in (100, 133):
        cu[1] = end
        graph.replay()
        wanted = [z[:, :end].clone() for z in step()]
        for got, e in zip(captured, wanted, strict=True):
            assert torch.equal(got[:, :end], e)
            assert not got[:, 270:].any()
    for z in x:
        z[:, end:] = float("nan")
    for got, e in zip(step(), wanted, strict=True):  # the last tile comes from another kernel
        assert (got[:, :end] - e).norm() <= 6e-3 * e.norm()


@pytest.mark.parametrize("name", selfcheck.COMPOSITIONS)
def test_composition_equals_dense_attention_through_the_kernels(name, record_property):
    compose = selfcheck.COMPOSITIONS[name]
    got = compose(selfcheck.Inputs(torch.float32, "cuda"), selfcheck.ours)
    exact = compose(selfcheck.Inputs(torch.float64, "cuda"), selfcheck.dense)
    worst = selfcheck.error(got, exact)
    record_property("errors", {"worst": worst})
    assert worst < 1e-5


@pytest.mark.parametrize("step", test_compile.STEPS, ids=lambda f: f.__name__)
def test_compiled_step_trains_like_eager_through_the_kernels(step):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = test_compile.Net().cuda()
    args = [x.cuda() for x in (torch.randn(2, 9, 32), torch.rand(2, 1), torch.randn(2, 9, 32))]
    step(net, *args).backward()
    eager = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    try:
        torch.compile(lambda *x: step(net, *x), fullgraph=True)(*args).backward()
    except RuntimeError as error:  # PyTorch's, see README.md
        if step is test_compile.through_the_tangent and "ZeroTensors are immutable" in str(error):
            pytest.xfail("the compiled gradient through a tangent needs another PyTorch")
        raise
    for p, exact in zip(net.parameters(), eager, strict=True):
        torch.testing.assert_close(p.grad, exact, rtol=1e-3, atol=1e-5)


def test_cached_launches_go_to_the_stream_at_hand_and_change_no_bit():
    """On another stream an input is written late: a launch on the first one would not see it."""
    shape, how = (2, 4, 256, 64), {"device": "cuda", "dtype": torch.bfloat16}
    given = [torch.randn(shape, **how) for _ in range(6)]
    attention_jvp(*given)  # the cache has its kind now
    launch_cache.enable(False)
    exact = attention_jvp(*given)
    launch_cache.enable()
    attention_jvp(*given)
    side, late = torch.cuda.Stream(), torch.zeros_like(given[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**8)
        late.copy_(given[0])
        got = attention_jvp(late, *given[1:])
    side.synchronize()
    for x, y in zip(got, exact, strict=True):
        assert torch.equal(x, y)


def test_memory_beyond_outputs_is_linear_in_the_length(record_property):
    extra = {}
    for L in (4096, 16384, 65536):
        x = [torch.randn(1, 1, L, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
        for t in x:
            t.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, t_out = attention_jvp(*x)
        forward = torch.cuda.max_memory_allocated() - before
        torch.autograd.grad(out.float().sum() + t_out.float().square().sum(), x)
        extra[L] = [forward, torch.cuda.max_memory_allocated() - before]
    record_property("bytes", {str(L): sizes for L, sizes in extra.items()})
    for i in range(2):
        assert extra[65536][i] <= 16.5 * extra[4096][i]


def test_more_heads_than_a_grid_dimension_and_more_than_two_billion_elements():
    q, k, v, t = (
        torch.randn(70_000, 1, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    assert q.numel() > 2**31
    out, t_out = attention_jvp(q, k, v, t, None, None)
    for at in (slice(0, 2), slice(-2, None)):
        x = [z[at].double() for z in (q, k, v, t)]
        exact, t_exact = attention_jvp(*x, None, None)
        assert (out[at] - exact).norm() / exact.norm() < tolerances.FIRST[torch.bfloat16]
        assert (t_out[at] - t_exact).norm() / t_exact.norm() < tolerances.FIRST[torch.bfloat16]


def test_a_captured_graph_replays_forward_and_backward():
    x = [torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(8)]

    def step():
        leaves = [z.detach().requires_grad_() for z in x[:6]]
        out, t_out = attention_jvp(*leaves)
        return torch.autograd.grad((out, t_out), leaves, x[6:])

    exact = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for got, e in zip(captured, exact, strict=True):
        assert torch.equal(got, e)


@pytest.mark.parametrize(("L", "S", "B"), [(0, 9, 2), (9, 0, 2), (9, 9, 0)])
def test_nothing_in_gives_nothing_out(L, S, B):
    x = [torch.randn(B, 2, n, 64, device="cuda", dtype=torch.float16) for n in (L, S, S) * 2]
    for t in x:
        t.requires_grad_()
    out, t_out = attention_jvp(*x)
    assert out.shape == (B, 2, L, 64)
    assert not out.any()
    assert not t_out.any()
    for g in torch.autograd.grad(out.sum() + t_out.sum(), x):
        assert not g.any()


def test_rows_of_a_wider_tensor_whose_results_are_not_aligned():
    q = torch.randn(1, 2, 130, 40, device="cuda", dtype=torch.float16)[..., :36]
    out, t_out = attention_jvp(q, q, q, q, q, q)
    exact, t_exact = attention_jvp(*[q.double()] * 6)
    assert (out - exact).norm() / exact.norm() < tolerances.FIRST[torch.float16]
    assert (t_out - t_exact).norm() / t_exact.norm() < tolerances.FIRST[torch.float16]


@pytest.mark.parametrize("mode", ["single", "tangent_grad"])
@pytest.mark.parametrize("width", [144, 128])  # of two heads: 72 and 64
def test_a_compiled_block_has_the_gradients_of_its_layers(width, mode, record_property):
    """Its own kernels among them: norm, GELU, the joined gradients of q, k and v."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = DiT(attention, 16, 4, 10, width=width, heads=2, depth=2).cuda()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    exact = copy.deepcopy(net).double()
    z, v = torch.randn(2, 4, 4, 16, 16, device="cuda")
    t, r = torch.rand(2, 4, device="cuda")
    y = torch.randint(0, 10, (4,), device="cuda")

    def gradients(net, dtype):
        given = [x.to(dtype) for x in (z, t, r)]
        along = (v[2:].to(dtype), torch.ones(2, device="cuda", dtype=dtype), None, None)
        u, du = Jvp(mode)(net, (*given, y), along)
        through = du.sin().sum() if mode == "tangent_grad" else 0
        (u.sin().sum() + through).backward()
        return [u, du, *(p.grad for p in net.parameters() if p.grad is not None)]

    compile_blocks(net, fused=True)
    pairs = zip(gradients(net, torch.float32), gradients(exact, torch.float64), strict=True)
    worst = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
    record_property("errors", {"worst": worst})
    assert worst < 1e-4


@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_tangent_that_moves_all_keys_alike_costs_no_bits_of_t_o(causal, head_dim):
    """As that of a time embedding. It adds a constant to each row of tS, which softmax cancels."""
    torch.manual_seed(0)
    q, k, v, t_q, t_k, t_v = torch.randn(
        6, 2, 3, 520, head_dim, device="cuda", dtype=torch.bfloat16
    )
    t_k = t_k + 16 * torch.randn(3, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    found = attention_jvp(q, k, v, t_q, t_k, t_v, is_causal=causal)[1]
    inputs = (x.double() for x in (q, k, v, t_q, t_k, t_v))
    wanted = attention_jvp(*inputs, is_causal=causal, backend="reference")[1]
    assert (found - wanted).norm() <= tolerances.FIRST[torch.bfloat16] * wanted.norm()
