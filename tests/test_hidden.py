"""What a mask hides reaches nothing, whatever it holds; scores saturate.

In float32 the portable kernels run, on a CPU in the interpreter. The warp-specialised ones of
Hopper, and the launch that repairs what they spoil, run on a GPU in 16 bits.
"""

import itertools

import pytest
import torch

from jvp_flash_attention import kernels, reference
from jvp_flash_attention.kernels import dispatch
from jvp_flash_attention.kernels.portable import launch as portable
from jvp_flash_attention.kernels.problem import architecture, problem
from tests import tolerances
from tests.cases import Case, build, relative, solve

IMPLEMENTATIONS = {"reference": (reference, torch.float64), "triton": (kernels, torch.float32)}
PLACES = {"k": 1, "v": 2, "t_k": 5, "t_v": 6}  # among q, k, v, mask and their tangents


def _tensors(case, dtype, name, device, hidden=1):
    """Of a mask, the last keys are `hidden` from all."""
    p = build(case, dtype, device, name)
    if case.mask:
        mask = p.primals[3]
        mask[..., -hidden:] = False if mask.dtype == torch.bool else float("-inf")
    return p


def _poisoned(p, poison, places, keys=slice(-1, None)):
    for place in places:
        (*p.primals, *p.tangents)[PLACES[place]][:, :, keys] = poison
    return p


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("S", [17, pytest.param(70, marks=pytest.mark.slow)])  # tiles: 1, several
@pytest.mark.parametrize("mask", ["bool", "full", "key", None])
def test_nothing_of_a_key_that_nobody_sees_is_felt(name, S, mask, device):
    implementation, dtype = IMPLEMENTATIONS[name]
    case = Case(B=1, H=1, Hk=1, L=9, S=S, mask=mask, causal=mask is None)
    exact = solve(implementation, _tensors(case, dtype, name, device))
    places = itertools.product((["k", "t_k"], ["v", "t_v"]), (float("nan"), float("inf")))
    for at, poison in places:
        got = solve(implementation, _poisoned(_tensors(case, dtype, name, device), poison, at))
        for tensor, x in exact.items():
            atomic = tensor.endswith("mask") and device == "cuda"  # summed in any order
            same = torch.allclose if atomic else torch.equal
            assert same(got[tensor], x), (tensor, at, poison)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_queries_before_a_spoiled_key_feel_nothing_of_it_and_the_others_do(name, place, device):
    implementation, dtype = IMPLEMENTATIONS[name]
    case = Case(B=1, L=17, S=9, causal=True)  # the last key is seen from row 8 on
    p = _tensors(case, dtype, name, device)
    exact = solve(implementation, p)
    got = solve(implementation, _poisoned(p, float("nan"), [place]))
    for tensor in BY_QUERY:
        assert torch.equal(got[tensor][:, :, :8], exact[tensor][:, :, :8]), tensor
    for tensor in _felt(place):
        assert got[tensor][:, :, 8:].isnan().any(-1).all(), tensor


BY_QUERY = ("out", "out_of_jvp", "t_out", "d_q", "dd_q", "dd_t_q", "dt_q")


def _felt(place):
    """By rows that see a key whose `place` is NaN."""
    return ["t_out"] if place.startswith("t") else ["out", "out_of_jvp", "t_out"]


SPOILED = (
    Case(B=2, L=70, S=90, causal=True),
    Case(B=1, L=70, S=70, mask="full", tangents="qkv"),
    Case(B=1, L=70, S=70, mask="bool"),
    Case(B=1, L=276, S=276, packed=((0, 100, 100, 101, 230, 270), None), causal=True),
)


@pytest.mark.parametrize("case", SPOILED, ids=str)
def test_repair_computes_tiles_with_an_lse_of_nan_anew_and_no_others(case, device, monkeypatch):
    monkeypatch.setattr(portable, "multiprocessors", lambda device: 2)  # several tiles a program
    p = build(case, torch.float32, device)
    exact = kernels.forward(p.x, p.t, p.spec)
    call = dispatch._forward_call(p.x, p.t, p.spec)
    for tensor, e in zip(call.saved, exact, strict=True):
        tensor.copy_(e)
        tensor[:, 1, [40, 69]] = float("nan")
    call.saved.out[:, 0] += 1
    portable.repair(problem(call, p.spec), call).run()
    for tensor, e in zip(call.saved, exact, strict=True):
        assert torch.equal(tensor[:, 1], e[:, 1])
    assert torch.equal(call.saved.out[:, 0], exact.out[:, 0] + 1)


HIDDEN = (
    Case(L=276, S=340, D=64, causal=True),
    Case(L=276, S=340, D=72, causal=True),
    Case(L=276, S=340, D=64, window=(100, 4)),
    Case(L=276, S=340, D=128, window=(100, 4)),
    Case(L=200, S=300, D=128, H=4, Hk=2, causal=True),
    Case(L=276, S=336, D=64, mask="bool"),
    Case(L=276, S=336, D=128, mask="bool", causal=True),
    Case(L=276, S=336, D=96, mask="full", tangents="qkv"),
    Case(L=200, S=336, D=128, mask="key", tangents="qkv"),
)


def _check(got, exact, rows, dtype):
    """The rows of tensors by query, or all of all, equal up to the rounding of both."""
    for tensor, e in exact.items():
        if rows is None or tensor in BY_QUERY:
            here = slice(None) if rows is None else rows
            square, norm = relative(got[tensor][:, :, here], e[:, :, here].double())
            table = tolerances.SECOND if tensor[:2] in ("dd", "dt") else tolerances.FIRST
            assert square <= (2 * table[dtype]) ** 2 * norm, (tensor, square, norm)


@pytest.mark.gpu
@pytest.mark.parametrize("case", HIDDEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_warp_specialised_passes_feel_nothing_of_keys_that_nobody_sees(dtype, case, device):
    p = _tensors(case, dtype, "triton", device, hidden=60)
    if architecture(p.x.q.device) == "sm90":
        names = [launch.kernel.fn.__name__ for launch in kernels.launches(p.x, p.t, p.spec)]
        assert names == ["forward_jvp_kernel", "repair_kernel"]
    exact = solve(kernels, p)
    places = itertools.product((["k", "t_k"], ["v", "t_v"]), (float("nan"), float("inf")))
    for at, poison in places:
        p = _tensors(case, dtype, "triton", device, hidden=60)
        got = solve(kernels, _poisoned(p, poison, at, slice(-60, None)))
        _check(got, exact, None, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", HIDDEN, ids=str)
def test_warp_specialised_passes_feel_a_key_where_it_is_seen_alone(case, place, device):
    """Key 150 is NaN, which rows from 150 on see, causal, those of a window, and otherwise those
    that the mask lets."""
    p = _tensors(case, torch.bfloat16, "triton", device)
    i, (left, right) = torch.arange(case.L, device=device), case.window
    seen = i >= (150 if case.causal else case.L // 3)
    if left is not None:
        seen = (i - left <= 150) & (i + right >= 150)
    if case.mask == "key":
        seen[:] = False
    if case.mask:
        off = False if case.mask == "bool" else float("-inf")
        p.primals[3][:, :, ~seen if case.mask != "key" else slice(None), 150] = off
    if case.mask in ("bool", "full"):
        p.primals[3][:, :, seen, 150] = case.mask == "bool"
    exact = solve(kernels, p)
    got = solve(kernels, _poisoned(p, float("nan"), [place], 150))
    _check(got, exact, ~seen, torch.bfloat16)
    for tensor in _felt(place):
        assert got[tensor][:, :, seen].isnan().all(), tensor


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [3e2, 3e6, 1e15])
def test_scores_of_any_size_saturate(name, size, device):
    """One key of each row has all the weight: O is its value, and the scores have no gradient."""
    implementation, dtype = IMPLEMENTATIONS[name]
    p = build(Case(B=1, L=16, S=16, D=16), dtype, device, name)
    q, k, v, _ = p.primals
    q.zero_()
    q.diagonal(dim1=-2, dim2=-1).fill_(size)
    k.copy_(q / size)
    found = solve(implementation, p)
    torch.testing.assert_close(found["out"], v)
    torch.testing.assert_close(found["d_v"], p.d_out)
    torch.testing.assert_close(found["dd_t_v"], p.d_t_out)
    for tensor in ("d_q", "d_k", "dd_t_q", "dd_t_k"):
        assert found[tensor].abs().max() <= 1e-5 * size, tensor


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [3.4e38, -3.4e38, 1e30])
def test_a_mask_of_any_finite_size_is_finite(name, size, device):
    implementation, dtype = IMPLEMENTATIONS[name]
    p = build(Case(B=1, L=16, S=17, mask="key"), dtype, device, name)
    p.primals[3][..., 3:] = size
    for tensor, x in solve(implementation, p).items():
        assert x.isfinite().all(), tensor
