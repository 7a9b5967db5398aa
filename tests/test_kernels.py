"""The Triton kernels against the float64 reference: in Triton's interpreter on a CPU, compiled on a
GPU.
"""

import pytest
import torch
from torch.func import jvp

from jvp_flash_attention import attention, attention_jvp, kernels, reference
from jvp_flash_attention.call import Inputs, Spec, Tangents, tf32_allowed
from jvp_flash_attention.kernels import configs, dispatch
from jvp_flash_attention.kernels.portable import launch as portable
from jvp_flash_attention.kernels.portable.split import split_kernel
from jvp_flash_attention.kernels.problem import Problem, pointer, problem
from tests.cases import Case, build, check, errors, solve

CASES = (
    Case(H=2, Hk=1, L=37, S=50, D=8, B=1),
    Case(B=1, L=70, S=50, D=16, Dv=24, causal=True),
    Case(H=1, Hk=1, L=33, S=64, mask="bool"),
    Case(B=1, L=33, S=64, mask="bool", causal=True),
    Case(B=1, L=33, S=64, mask="key", causal=True),
    Case(B=1, L=33, S=40, mask="row"),
    Case(B=1, H=2, Hk=1, L=33, S=40, mask="full", causal=True),
    Case(B=1, L=33, S=40, tangents="v"),
    Case(B=1, L=33, S=40, tangents="q"),
    Case(B=1, L=33, S=40, tangents="k"),
    Case(B=1, L=33, S=40, tangents="b", mask="key"),
    Case(H=1, Hk=1, L=33, S=40, dropout_p=0.3),
    Case(B=1, L=33, S=40, dropout_p=0.3, mask="full", causal=True),
    Case(B=1, L=33, S=40, scale=-0.5),
    Case(B=1, L=33, S=40, layout="blhd"),
    Case(H=1, Hk=1, L=33, S=40, layout="padded", D=24),
    Case(B=1, L=1, S=3),
    Case(B=1, L=3, S=1, causal=True),
    Case(B=1, L=3, S=0),
    Case(B=0, L=3, S=4),
    Case(B=1, H=1, Hk=1, L=40, S=40, D=72),
    Case(B=1, H=1, Hk=1, L=20, S=36, D=136, causal=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_output_in_float32(case, device):
    check(errors(kernels, case, torch.float32, device, rows=1), torch.float32)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_every_output_in_float16(case, device):
    check(errors(kernels, case, torch.float16, device), torch.float16)


def read_in_parts(parts, monkeypatch):
    """Float32 operands of every pass that has tiles for it, as on Hopper."""
    small = dict.fromkeys(configs.PARTS[parts], ((32, 32, 4, 1),))
    monkeypatch.setitem(configs.PARTS, parts, small)
    monkeypatch.setattr(Problem, "parts", lambda p, name: parts if name in small else 1)


@pytest.mark.parametrize(
    ("parts", "case"),
    [
        (3, Case(H=2, Hk=1, L=37, S=50, D=8, B=1)),
        (3, Case(B=1, H=1, Hk=1, L=33, S=40, Dv=24, mask="full", causal=True)),
        (2, Case(B=1, H=1, Hk=1, L=33, S=40, tangents="k")),
    ],
)
def test_float32_by_bfloat16_parts_of_the_operands(parts, case, device, monkeypatch, launched_anew):
    """Through the interpreter, which cuts where a GPU rounds: two parts have 15
    binary digits."""
    if device != "cpu":
        pytest.skip("test_every_output_in_float32 takes them where they are the device's own")
    read_in_parts(parts, monkeypatch)
    found = errors(kernels, case, torch.float32, device, rows=1)
    check(found, torch.float32, 1.0 if parts == 3 else 40.0)
    if parts == 2:
        assert max(found.values()) > 1e-5  # and are not computed by another arithmetic


@pytest.mark.parametrize(("D", "Dv"), [(8, 40), (40, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_head_dim_in_the_columns_of_a_wider_one(D, Dv, dtype, device, monkeypatch, launched_anew):
    """As on Hopper, float32 in parts."""
    monkeypatch.setattr(Problem, "columns", lambda p, name: (p.widest, p.widest))
    if dtype == torch.float32:
        read_in_parts(3, monkeypatch)
    case = Case(B=1, H=2, Hk=1, L=37, S=50, D=D, Dv=Dv, causal=True)
    check(errors(kernels, case, dtype, device, rows=1), dtype)


def test_the_parts_of_a_number_add_up_to_it(device):
    exponents = torch.arange(-26.0, 22.0, 2.0, device=device)
    x = torch.randn(1, 2, 5, 24, device=device) * 10.0**exponents
    x[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
    parts = torch.full((1, 2, 5, 3 * 32), 7.0, device=device, dtype=torch.bfloat16)
    split_kernel[(2,)](pointer(x), None, pointer(parts), None, 2, 5, 3, 24, 32, 64)
    first, second, third = parts.double().unflatten(-1, (3, 32)).unbind(-2)
    assert not parts.unflatten(-1, (3, 32))[..., 24:].any()
    assert not second[0, 0, 0, :4].any()
    assert not third[0, 0, 0, :4].any()
    total = (first + second + third)[..., :24]
    torch.testing.assert_close(total, x.double(), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_through_tma_descriptors_equal_tiles_through_pointers(causal, device, monkeypatch):
    """The descriptors of Hopper and later, on the CPU through the interpreter."""
    monkeypatch.setattr(kernels.dispatch, "problem", lambda *args: problem(*args[:3], tma=True))
    case = Case(L=33, S=64, D=24, H=2, Hk=1, causal=causal)
    check(errors(kernels, case, torch.float16, device), torch.float16)


def test_public_functions_reach_the_kernels(device):
    q, k, v, t = (torch.randn(1, 2, 9, 8, device=device) for _ in range(4))
    out, t_out = attention_jvp(q, k, v, t, None, t, backend="triton")
    exact, t_exact = attention_jvp(q, k, v, t, None, t, backend="reference")
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(t_out, t_exact)
    torch.testing.assert_close(attention(q, k, v, backend="triton"), exact)


def test_not_a_number_in_a_query_reaches_its_row_only(device):
    q, k, v = (torch.randn(1, 2, 20, 16, device=device) for _ in range(3))
    q[0, 1, 3, 5] = float("nan")
    out = attention(q, k, v, backend="triton")
    expected = torch.zeros(1, 2, 20, dtype=torch.bool, device=device)
    expected[0, 1, 3] = True
    assert torch.equal(out.isnan().all(-1), expected)
    assert torch.equal(out.isnan().any(-1), expected)


def test_not_a_number_in_a_masked_key_reaches_nothing(device):
    q, k, v = (torch.randn(1, 2, 20, 16, device=device) for _ in range(3))
    k[0, :, 7] = float("nan")
    see = torch.ones(20, dtype=torch.bool, device=device)
    see[7] = False
    for backend in ("triton", "reference"):
        out, t_out = attention_jvp(q, k, v, q, None, v, see, backend=backend)
        assert out.isfinite().all()
        assert t_out.isfinite().all()


def test_deterministic_algorithms_give_the_same_mask_gradient(device):
    case = Case(B=1, H=1, Hk=1, L=33, S=40, mask="key")
    found = errors(kernels, case, torch.float32, device, rows=1)
    torch.use_deterministic_algorithms(True)
    try:
        again = errors(kernels, case, torch.float32, device, rows=1)
    finally:
        torch.use_deterministic_algorithms(False)
    check(again, torch.float32)
    assert found.keys() == again.keys()


def test_tracing_records_the_kernels_and_not_their_memory(device):
    """`linearize` replays a trace; a launch that it did not see would leave outputs unwritten."""
    q, k, v, t = (torch.randn(1, 2, 9, 8, device=device) for _ in range(4))
    f = lambda q: attention(q, k, v, backend="triton")  # noqa: E731
    exact = torch.func.jvp(f, (q,), (t,))[1]
    torch.testing.assert_close(torch.func.linearize(f, q)[1](t), exact)


def test_one_dropout_mask_serves_a_mapped_pullback(device):
    q, k, v = (torch.randn(1, 2, 9, 8, device=device) for _ in range(3))
    out, pullback = torch.func.vjp(lambda q: attention(q, k, v, dropout_p=0.5, backend="triton"), q)
    cotangents = torch.randn(3, *out.shape, device=device)
    exact = torch.stack([pullback(c)[0] for c in cotangents])
    torch.testing.assert_close(torch.func.vmap(lambda c: pullback(c)[0])(cotangents), exact)


def test_infinite_keys_behind_a_mask_and_negative_views_count_for_nothing(device):
    q, k, v = (torch.randn(1, 2, 20, 16, device=device) for _ in range(3))
    bias = torch.randn(20, 20, device=device)
    exact = attention(q, k, v, -bias.index_fill(1, torch.tensor([7], device=device), torch.inf))
    k[0, :, 7] = float("inf")
    hidden = torch._neg_view(bias.index_fill(1, torch.tensor([7], device=device), torch.inf))
    torch.testing.assert_close(attention(q, k, v, hidden, backend="triton"), exact)


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_rows_masked_by_a_finite_constant_are_those_of_a_softmax(device, low):
    """Every key of the second batch entry, and some of the first's; LSE alone would lose log l."""
    p = build(Case(H=1, Hk=1, L=17, mask="key"), torch.float32, device)
    p.primals[3][0, ..., :9] = p.primals[3][1] = low
    exact, got = solve(reference, p), solve(kernels, p)
    for name, x in exact.items():
        norm = float(x.norm())
        error = float((got[name] - x).norm())
        assert error <= 2e-3 * norm, name  # beside 1e4 float32 has digits of 1e4 / 2^24


def test_a_gate_without_tangent_behind_the_attention(device):
    """The backward of tO * gate gives dO as a symbolic zero, which has no memory."""
    q, k, v, t, gate = (torch.randn(1, 2, 9, 8, device=device) for _ in range(5))

    def gradient(backend):
        f = lambda x, k: attention(x, k, v, backend=backend) * gate  # noqa: E731
        loss = lambda q, k: jvp(lambda x: f(x, k), (q,), (t,))[1].square().sum()  # noqa: E731
        return torch.func.grad(loss, (0, 1))(q, k)

    for got, exact in zip(gradient("triton"), gradient("reference"), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_either_name_of_the_switch_of_tf32_is_read(device):
    """PyTorch's old question raises after the new switch was used."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the old switch only")
    before = torch.backends.cuda.matmul.fp32_precision
    q = torch.randn(1, 2, 9, 8, device=device)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert tf32_allowed()
        attention(q, q, q, backend="triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("tokens", [13, 30, 47, 60])
def test_short_sequences_in_tiles_of_their_size(tokens, device, monkeypatch):
    """Those of Hopper, which no other device chooses."""
    monkeypatch.setattr(
        Problem, "short", lambda p, name: configs.short(name, p.widest, max(p.L, p.S))
    )
    case = Case(B=1, L=tokens, S=tokens - 2, D=8, H=2, Hk=1, mask="full", causal=True)
    check(errors(kernels, case, torch.float16, device, rows=1), torch.float16, slack=2.0)


@pytest.mark.parametrize(("L", "D"), [(130, 72), (64, 16), (5, 24)])
def test_the_row_sums_leave_those_of_the_columns(L, D, device):
    """Σ dO of each tile of 64, where a call has room for it."""
    torch.manual_seed(0)
    q = torch.randn(2, L, 3, D, device=device).transpose(1, 2)
    d_out = torch.randn(2, L, 3, D, device=device).transpose(1, 2)
    saved = kernels.forward(Inputs(q, q, q), None, Spec(0.3))
    sums = q.new_full((2, -(-L // 64), 2, 3, D), 7.0)
    into = (*map(torch.empty_like, (q, q, q)), sums)
    c = dispatch._backward_call(
        d_out, None, Inputs(q, q, q), Tangents(), saved, Spec(0.3), False, into
    )
    for launch in portable.launches("bwd_preprocess", problem(c, Spec(0.3)), c):
        launch.run()
    for i, tile in enumerate(d_out.split(64, 2)):
        assert torch.allclose(sums[:, i, 1], tile.sum(2), rtol=1e-5, atol=1e-5)
    assert (sums[:, :, 0] == 7.0).all()  # dQ's are another launch's
    w = (d_out * saved.out).sum(3)
    assert torch.allclose(c.w_sum, w, rtol=1e-4, atol=1e-5)
