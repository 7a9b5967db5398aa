"""The kernels on a GPU against the float64 reference, at lengths and head dims that people use."""

import pytest
import torch

from jvp_flash_attention import kernels
from tests.cases import Case, check, errors

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


INPUTS = (
    Case(H=4, Hk=2, L=276, S=196, D=64),
    Case(H=6, Hk=1, L=130, S=300, D=72, causal=True),
    Case(L=196, S=276, D=64, Dv=128),
    Case(L=196, S=276, D=80, Dv=40, causal=True),
    Case(L=276, S=276, D=64, bias="bool"),
    Case(L=276, S=276, D=64, bias="bool", causal=True),
    Case(L=276, S=200, D=64, bias="key"),
    Case(L=276, S=200, D=64, bias="row"),
    Case(L=276, S=276, D=128, bias="full", causal=True),
    Case(L=276, S=276, D=64, H=4, Hk=2, bias="full"),
    Case(L=276, S=276, D=64, tangents="q"),
    Case(L=276, S=276, D=64, tangents="k"),
    Case(L=276, S=276, D=64, tangents="v"),
    Case(L=276, S=276, D=64, tangents="qv", causal=True),
    Case(L=276, S=276, D=64, bias="key", tangents="b"),
    Case(L=276, S=276, D=64, dropout_p=0.3),
    Case(L=276, S=276, D=64, dropout_p=0.1, causal=True, bias="full"),
    Case(L=276, S=276, D=64, scale=-0.3),
    Case(L=276, S=276, D=64, layout="blhd"),
    Case(L=276, S=276, D=72, layout="padded"),
)


@pytest.mark.parametrize("case", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_output_for_every_kind_of_input(dtype, case, record_property):
    found = errors(kernels, case, dtype, "cuda")
    record_property("errors", found)
    check(found, dtype)
