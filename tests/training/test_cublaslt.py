"""Which algorithm of cuBLASLt is taken, with a stand-in for the library. Products: test_mlp.py."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from training.kernels import cublaslt

FAILED, IN_PARTS, BROKEN, SLOW, FAST, OTHER_BITS = range(6)  # what the stand-in offers
MS = {SLOW: 2.0, FAST: 1.0, OTHER_BITS: 0.5}
ROWS, COLUMNS, INNER = 4, 16, 8


class Library(cublaslt._Library):
    """It writes zeros, or ones. ``started`` are the algorithms that it was asked to run."""

    def __init__(self):
        self.started, self.attributes = [], {}
        names = ("MatmulDescCreate", "MatrixLayoutCreate", "MatmulPreferenceCreate")
        names += ("MatmulPreferenceSetAttribute", "MatmulPreferenceDestroy")
        self.functions = SimpleNamespace(**{f"cublasLt{name}": lambda *_: 0 for name in names})
        self.functions.cublasLtMatmulDescSetAttribute = self.attribute
        self.functions.cublasLtMatmulAlgoGetHeuristic = self.heuristic
        self.functions.cublasLtMatmulAlgoConfigGetAttribute = self.splits
        self.functions.cublasLtMatmul = self.matmul
        self.handle = None

    def attribute(self, description, name, value, size):
        assert size.value in (4, 8)
        self.attributes[name] = value._obj.value
        return 0

    def heuristic(self, *args):
        *_, most, candidates, found = args
        found._obj.value = 6
        for i in range(6):
            candidates[i].algorithm[0] = i
            candidates[i].status = 15 if i == FAILED else 0
        assert most >= 6
        return 0

    def splits(self, algorithm, which, value, size, written):
        assert which == cublaslt._SPLITS
        assert size.value == 4
        value._obj.value = 4 if algorithm._obj.algorithm[0] == IN_PARTS else 1
        return 0

    def matmul(self, *args):
        algorithm = args[-4]._obj.algorithm[0]
        self.started.append(algorithm)
        out = (ctypes.c_float * (ROWS * COLUMNS)).from_address(args[10].value)
        out[:] = [float(algorithm == OTHER_BITS)] * len(out)
        return 13 if algorithm == BROKEN else 0


@pytest.fixture
def library(monkeypatch):
    library = Library()

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None

        def elapsed_time(self, end):
            return MS[library.started[-1]]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return library


def product(library):
    return cublaslt._Product(library, ROWS, COLUMNS, INNER, torch.bfloat16, False, True)


def run(product):
    x, A, a = torch.randn(ROWS, INNER), torch.randn(COLUMNS, INNER), torch.randn(COLUMNS)
    z = torch.randn(ROWS, COLUMNS)
    product.run(x, A, torch.empty_like(z), z, a)
    attributes = product.library.attributes
    assert attributes[cublaslt._AUX] == z.data_ptr()
    assert attributes[cublaslt._BIAS] == a.data_ptr()
    return product.library.started


def test_the_fastest_that_runs_and_gives_the_bits_of_the_first_is_taken(library):
    chosen = product(library)
    assert chosen.choices == [BROKEN, SLOW, FAST, OTHER_BITS]
    assert run(chosen)[-1] == FAST
    assert OTHER_BITS in library.started
    library.started.clear()
    assert run(chosen) == [FAST]  # and kept


def test_nothing_is_timed_in_a_recording_or_where_runs_must_be_equal(library, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    first = product(library)
    first.choices.remove(BROKEN)
    assert run(first) == [SLOW]
    library.started.clear()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    recorded = product(library)
    recorded.choices.remove(BROKEN)
    assert run(recorded) == [SLOW]
    assert recorded.best is None  # the next call outside of a recording times them


def test_without_one_that_runs_it_says_so(library):
    broken = product(library)
    broken.choices = [BROKEN]
    with pytest.raises(RuntimeError, match="none of the algorithms"):
        run(broken)
