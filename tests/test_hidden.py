"""What a mask hides reaches nothing, whatever it holds; scores saturate."""

import itertools

import pytest
import torch

from jvp_flash_attention import kernels, reference
from tests.cases import Case, build, solve

IMPLEMENTATIONS = {"reference": (reference, torch.float64), "triton": (kernels, torch.float32)}
if torch.cuda.is_available():
    pytest.skip("the warp-specialised passes do not hide values yet", allow_module_level=True)
PLACES = {"k": 1, "v": 2, "t_k": 5, "t_v": 6}  # among q, k, v, mask and their tangents


def _tensors(case, dtype, name):
    p = build(case, dtype, backend=name)
    if case.mask == "bool":
        p.primals[3][..., -1] = False
    elif case.mask:
        p.primals[3][..., -1] = float("-inf")
    return p


def _poisoned(p, poison, places):
    for place in places:
        (*p.primals, *p.tangents)[PLACES[place]][:, :, -1] = poison
    return p


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("S", [17, pytest.param(70, marks=pytest.mark.slow)])  # tiles: 1, several
@pytest.mark.parametrize("mask", ["bool", "full", "key", None])
def test_nothing_of_a_key_that_nobody_sees_is_felt(name, S, mask):
    implementation, dtype = IMPLEMENTATIONS[name]
    case = Case(B=1, H=1, Hk=1, L=9, S=S, mask=mask, causal=mask is None)
    exact = solve(implementation, _tensors(case, dtype, name))
    places = itertools.product((["k", "t_k"], ["v", "t_v"]), (float("nan"), float("inf")))
    for at, poison in places:
        got = solve(implementation, _poisoned(_tensors(case, dtype, name), poison, at))
        for tensor, x in exact.items():
            assert torch.equal(got[tensor], x), (tensor, at, poison)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_queries_before_a_spoiled_key_feel_nothing_of_it_and_the_others_do(name, place):
    implementation, dtype = IMPLEMENTATIONS[name]
    case = Case(B=1, L=17, S=9, causal=True)  # the last key is seen from row 8 on
    exact = solve(implementation, _tensors(case, dtype, name))
    got = solve(implementation, _poisoned(_tensors(case, dtype, name), float("nan"), [place]))
    by_query = ("out", "t_out", "d_q", "dd_q", "dd_t_q")
    for tensor in by_query:
        assert torch.equal(got[tensor][:, :, :8], exact[tensor][:, :, :8]), tensor
    felt = ["t_out"] if place.startswith("t") else ["out", "t_out"]
    for tensor in felt:
        assert got[tensor][:, :, 8:].isnan().any(-1).all(), tensor


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [3e2, 3e6, 1e15])
def test_scores_of_any_size_saturate(name, size):
    """One key of each row has all the weight: O is its value, and the scores have no gradient."""
    implementation, dtype = IMPLEMENTATIONS[name]
    p = build(Case(B=1, L=16, S=16, D=16), dtype, backend=name)
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
def test_a_mask_of_any_finite_size_is_finite(name, size):
    implementation, dtype = IMPLEMENTATIONS[name]
    p = build(Case(B=1, L=16, S=17, mask="key"), dtype, backend=name)
    p.primals[3][..., 3:] = size
    for tensor, x in solve(implementation, p).items():
        assert x.isfinite().all(), tensor
