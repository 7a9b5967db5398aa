"""Products with GELU in their epilogue, by cuBLASLt, which is part of PyTorch's CUDA.

    z = x Wᵀ + b,  h = gelu(z)            one kernel writes both
    d_z = (d V) ∘ gelu'(z)                one kernel reads z and writes d_z

PyTorch offers the first without z and not the second. A pass over z of its own costs more than
what the epilogue adds. Rows are tokens. cuBLAS counts by columns, so that every matrix here is its
transpose there.
"""

import ctypes
import threading
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

# Names and numbers of cublasLt.h, the same in CUDA 12 and 13.
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
_TRANSPOSE_A, _EPILOGUE, _BIAS, _AUX, _AUX_STRIDE = 3, 7, 8, 11, 12  # of a product
_SPLITS = 2  # of an algorithm: partial sums
_MOST_WORKSPACE = 1  # of a search
_WITH_BIAS, _GELU, _GELU_BACKWARD = 4, 32 | 128, 64 | 128  # epilogues, z in "aux"
ALIGNED = 256  # bytes: what its choice of algorithms expects
CANDIDATES, ROUNDS = 16, 4
WORKSPACE = 32 << 20  # bytes; without any, GELU's backward is a slow pass of its own


class _Candidate(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class _Library:
    """cuBLASLt and its handle on one device. Raises OSError where there is none."""

    def __init__(self) -> None:
        if torch.version.cuda is None:
            raise OSError("PyTorch is not built for CUDA")
        major = torch.version.cuda.split(".")[0]
        self.functions = ctypes.CDLL(f"libcublasLt.so.{major}")
        self.handle = self.new("cublasLtCreate")

    def call(self, name: str, *args: Any) -> None:
        if status := getattr(self.functions, name)(*args):
            raise RuntimeError(f"{name} returned {status}")

    def new(self, name: str, *args: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *args)
        return made


class _Product:
    """out (rows, columns) = left (rows, inner) right, with an epilogue of z (rows, columns).

    ``right`` is (columns, inner), a weight, or with ``backward`` (inner, columns).
    """

    def __init__(
        self, library: _Library, rows: int, columns: int, inner: int, dtype: torch.dtype,
        backward: bool, bias: bool,
    ) -> None:  # fmt: skip
        self.library, self.lock = library, threading.Lock()
        kind = _TYPES[dtype]
        self.description = library.new("cublasLtMatmulDescCreate", _COMPUTE_FLOAT32, _FLOAT32)
        self.set(_TRANSPOSE_A, ctypes.c_int32(not backward))
        epilogue = _GELU_BACKWARD if backward else _GELU | (_WITH_BIAS if bias else 0)
        self.set(_EPILOGUE, ctypes.c_uint32(epilogue))
        self.set(_AUX_STRIDE, ctypes.c_int64(columns))
        a = (columns, inner) if backward else (inner, columns)
        self.layouts = [
            library.new(
                "cublasLtMatrixLayoutCreate", kind,
                ctypes.c_uint64(m), ctypes.c_uint64(n), ctypes.c_int64(m),
            )
            for m, n in (a, (inner, rows), (columns, rows))
        ]  # fmt: skip
        preference, most = library.new("cublasLtMatmulPreferenceCreate"), ctypes.c_size_t(WORKSPACE)
        library.call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference, _MOST_WORKSPACE, ctypes.byref(most), _size(most),
        )  # fmt: skip
        self.candidates, found = (_Candidate * CANDIDATES)(), ctypes.c_int()
        a, b, d = self.layouts
        status = library.functions.cublasLtMatmulAlgoGetHeuristic(
            library.handle, self.description, a, b, d, d, preference,
            CANDIDATES, self.candidates, ctypes.byref(found),
        )  # fmt: skip
        library.call("cublasLtMatmulPreferenceDestroy", preference)
        found = range(found.value if status == 0 else 0)
        # Whole sums alone: most of them are the same.
        working = (i for i in found if self.candidates[i].status == 0)
        self.choices = [i for i in working if self._splits(i) == 1]
        self.best: int | None = None

    def set(self, attribute: int, value: Any) -> None:
        self.library.call(
            "cublasLtMatmulDescSetAttribute",
            self.description, attribute, ctypes.byref(value), _size(value),
        )  # fmt: skip

    def _splits(self, i: int) -> int:
        value, written = ctypes.c_uint32(), ctypes.c_size_t()
        self.library.call(
            "cublasLtMatmulAlgoConfigGetAttribute", ctypes.byref(self.candidates[i]), _SPLITS,
            ctypes.byref(value), _size(value), ctypes.byref(written),
        )  # fmt: skip
        return value.value

    def run(self, left: Tensor, right: Tensor, out: Tensor, z: Tensor, bias: Tensor | None) -> None:
        with self.lock:  # the description holds the pointers
            if bias is not None:
                self.set(_BIAS, ctypes.c_void_p(bias.data_ptr()))
            choice = self.choices[0] if self.best is None else self.best
            if self.best is None and not torch.cuda.is_current_stream_capturing():
                timed = not torch.are_deterministic_algorithms_enabled()
                choice = self.best = self._fastest(left, right, z) if timed else choice
            self._start(choice, left, right, out, z)

    def _start(self, choice: int, left: Tensor, right: Tensor, out: Tensor, z: Tensor) -> None:
        self.set(_AUX, ctypes.c_void_p(z.data_ptr()))
        a, b, d = self.layouts
        candidate = self.candidates[choice]
        workspace = out.new_empty(candidate.workspace, dtype=torch.uint8)
        left_, right_, out_, space = (
            ctypes.c_void_p(x.data_ptr()) for x in (left, right, out, workspace)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.library.call(
            "cublasLtMatmul", self.library.handle, self.description,
            ctypes.byref(_ONE), right_, a, left_, b, ctypes.byref(_ZERO), out_, d, out_, d,
            ctypes.byref(candidate), space, ctypes.c_size_t(candidate.workspace), stream,
        )  # fmt: skip

    def _fastest(self, *like: Tensor) -> int:
        """Of those that give the bits of the first one, so that runs are equal whichever it is. By
        turns, so that the clock's drift meets all alike, and on random numbers: gates, and so
        gradients, may be zero in the first step.
        """
        random = torch.Generator(like[0].device).manual_seed(0)
        left, right, z = (torch.empty_like(x).normal_(generator=random) for x in like)
        out, first, times = torch.empty_like(z), None, {}
        for i in self.choices:
            with suppress(RuntimeError):  # one that does not run is no candidate
                self._start(i, left, right, out, z)
                first = out.clone() if first is None else first
                if torch.equal(out, first):
                    times[i] = float("inf")
        if not times:
            raise RuntimeError("cuBLASLt: none of the algorithms that it offers runs")
        for _ in range(ROUNDS):
            for i in times:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                self._start(i, left, right, out, z)
                end.record()
                end.synchronize()
                times[i] = min(times[i], start.elapsed_time(end))
        return min(times, key=times.__getitem__)


_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)
_libraries: dict[torch.device, _Library | None] = {}
_products: dict[tuple, _Product] = {}


def _size(value: Any) -> ctypes.c_size_t:
    return ctypes.c_size_t(ctypes.sizeof(value))


def _product(left: Tensor, right: Tensor, z: Tensor, bias: Tensor | None, backward: bool) -> Any:
    """What computes it, or None: no such library, types, shapes or alignment."""
    columns, inner = z.shape[-1], left.shape[-1]
    shape = (inner, columns) if backward else (columns, inner)
    if not left.is_cuda or left.numel() == 0 or right.shape != shape:
        return None
    kind = (left.dtype, left.device)
    for x in (left, right, z, bias):
        if x is not None and (
            (x.dtype, x.device) != kind or not x.is_contiguous() or x.data_ptr() % ALIGNED
        ):
            return None
    rows = left.numel() // inner
    key = (left.device, left.dtype, rows, columns, inner, backward, bias is not None)
    found = _products.get(key)
    if found is None:
        if left.dtype not in _TYPES or columns % 8 or inner % 8:
            return None
        if left.device not in _libraries:
            try:
                with torch.cuda.device(left.device):
                    _libraries[left.device] = _Library()
            except (OSError, AttributeError):
                _libraries[left.device] = None
        library = _libraries[left.device]
        if library is None:
            return None
        with torch.cuda.device(left.device):
            shape = (rows, columns, inner)
            found = _Product(library, *shape, left.dtype, backward, bias is not None)
        _products[key] = found
    return found if found.choices else None


def product_then_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """z = x Wᵀ + b and gelu(z), or None where cuBLASLt does not serve. (..., W), (F, W), (F,)"""
    z = x.new_empty(*x.shape[:-1], len(weight))
    found = _product(x, weight, z, bias, False)
    if found is None:
        return None
    h = torch.empty_like(z)
    with torch.cuda.device(x.device):
        found.run(x, weight, h, z, bias)
    return z, h


def product_times_gelu_derivative(d: Tensor, weight: Tensor, z: Tensor) -> Tensor | None:
    """(d V) ∘ gelu'(z), or None where cuBLASLt does not serve. (..., W), (W, F), (..., F)"""
    found = _product(d, weight, z, None, True)
    if found is None:
        return None
    d_z = torch.empty_like(z)
    with torch.cuda.device(d.device):
        found.run(d, weight, d_z, z, None)
    return d_z
