"""Products of matrices with GELU behind them, in one pass where a kernel does both: cuBLASLt
(``cublaslt``), or for the derivative a kernel of ours on Hopper, where there is enough to do
(``sm90.gelu_product``). Else GELU is a pass of its own (``gelu``).

Tokens are rows: x, t_x and d_y (..., W), z (..., F), A (F, W), B (W, F).
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from jvp_flash_attention.kernels.launch_cache import Launch
from jvp_flash_attention.kernels.problem import architecture, cdiv, multiprocessors
from training.kernels.column_sums import column_sums
from training.kernels.cublaslt import product_then_gelu, product_times_gelu_derivative
from training.kernels.gelu import gelu, gelu_backward, gelu_tangent
from training.kernels.launch import launched
from training.kernels.partial_sums import sum_parts

ITEM, COLUMNS, INNER = 256, 128, 64  # rows and columns of a work item, columns of x in a step
LEAST = 6  # steps of a work item: as many as slots for the weight, so far apart warpgroups may be
FEWEST = 3  # work items of a multiprocessor from which on our kernel pays
PATIENCE = 60  # seconds: then what is compiled ahead is compiled again


def gelu_product(x: Tensor, A: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
    """z = x Aᵀ + a and gelu(z)."""
    found = product_then_gelu(x, A, a)
    if found is None:
        z = nn.functional.linear(x, A, a)
        found = z, gelu(z)
    return found


def tangent_product(t_x: Tensor, A: Tensor, z: Tensor) -> Tensor:
    """(t_x Aᵀ) ∘ gelu'(z)"""
    if not _serves(t_x, A, z):
        return gelu_tangent(z, nn.functional.linear(t_x, A))

    def tangent(t_h: Tensor) -> Launch:
        _await_compiler()
        return launch(t_x, A, z, t_h)

    return launched(("gelu tangent",), (t_x, A, z), lambda: (torch.empty_like(z),), tangent)[0]


def gradient_product(d_y: Tensor, B: Tensor, z: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """d_z = (d_y B) ∘ gelu'(z) and, with ``bias``, Σ d_z over the tokens in float32, else empty."""
    if _serves(d_y, B, z):

        def outputs() -> tuple[Tensor, Tensor]:
            return torch.empty_like(z), _room_for_sums(z, bias)

        def gradient(d_z: Tensor, sums: Tensor) -> Launch:
            _await_compiler()
            return launch(d_y, B, z, d_z, sums if bias else None, transposed=False)

        d_z, sums = launched(("gelu gradient", bias), (d_y, B, z), outputs, gradient)
        return d_z, sum_parts(sums[None])[0] if bias else sums
    d_z = product_times_gelu_derivative(d_y, B, z)
    if d_z is None:
        return gelu_backward(z, d_y @ B, bias)
    return d_z, column_sums(d_z, bias)


def _room_for_sums(z: Tensor, bias: bool) -> Tensor:
    """For Σ d_z over the rows of each of the eight warps of a work item."""
    rows, width = z.numel() // z.shape[-1], z.shape[-1]
    size = (cdiv(rows, ITEM) * 8, width) if bias else (0,)
    return z.new_empty(size, dtype=torch.float32)


def _serves(x: Tensor, weight: Tensor, z: Tensor) -> bool:
    """Whether our kernel computes it, and pays."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or architecture(x.device) != "sm90":
        return False
    W, F = x.shape[-1], z.shape[-1]
    operands = (x, weight, z)
    return (
        all(y.dtype == x.dtype and y.is_contiguous() for y in operands)
        and all(y.data_ptr() % 16 == 0 for y in operands)
        and W % 8 == F % 8 == 0
        and cdiv(W, INNER) >= LEAST
        and cdiv(x.numel() // W, ITEM) * cdiv(F, COLUMNS) >= FEWEST * multiprocessors(x.device)
    )


def launch(
    x: Tensor, weight: Tensor, z: Tensor, out: Tensor, sums: Tensor | None = None,
    transposed: bool = True,
) -> Launch:  # fmt: skip
    """Of our kernel; ``transposed``: the weight is (F, W)."""
    from training.kernels.sm90.gelu_product import gelu_derivative_product_kernel as kernel

    (W, F), rows = (x.shape[-1], z.shape[-1]), z.numel() // z.shape[-1]
    steps, strips = cdiv(W, INNER), cdiv(F, COLUMNS)
    items = cdiv(rows, ITEM) * strips
    half = (ITEM // 4, COLUMNS)
    args = (
        _descriptor(x, (ITEM // 2, INNER)),
        _descriptor(weight, (COLUMNS, INNER) if transposed else (INNER, COLUMNS)),
        *(_descriptor(y, half) for y in (z, out)),
        sums,
        *_pauses(steps),
        *(F, steps, strips, items),
    )
    grid = (min(items, multiprocessors(x.device)),)
    return Launch(kernel, grid, args, {"TRANSPOSED": transposed, "num_warps": 4})


def _pauses(steps: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Before which steps each warpgroup pauses: so that the other one multiplies meanwhile. Of ten
    ways, this one took the least time at DiT-XL/2.
    """
    first, later = LEAST // 2, 5 * steps // 12
    return (first, max(first, steps // 4), 2 * steps // 3), (later, later, 3 * steps // 4)


def _descriptor(x: Tensor, block: tuple[int, int]) -> Any:
    """Of the rows of a contiguous tensor."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    width = x.shape[-1]
    layout: Any = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], list(block), layout)


_compiling: list[Future] = []


def compile_ahead(width: int, hidden: int, bias: bool, device: torch.device) -> None:
    """Begin to compile our kernel for products of a weight of this width, in two threads: it takes
    some seconds, in which the compiler of the network's blocks is busy too.
    """
    if device.type != "cuda" or architecture(device) != "sm90" or cdiv(width, INNER) < LEAST:
        return
    threads = ThreadPoolExecutor(2, "gelu products")
    _compiling.extend(
        threads.submit(_compile, width, hidden, device, bias, transposed)
        for transposed in (True, False)
    )
    threads.shutdown(wait=False)


def _compile(width: int, hidden: int, device: torch.device, bias: bool, transposed: bool) -> Any:
    def new(*shape: int) -> Tensor:  # of which a compiler sees no more than the type
        return torch.empty(shape, dtype=torch.bfloat16)

    x, z, out = new(ITEM, width), new(ITEM, hidden), new(ITEM, hidden)
    weight = new(hidden, width) if transposed else new(width, hidden)
    sums = None if transposed or not bias else _room_for_sums(z, True)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return launch(x, weight, z, out, sums, transposed).compile()


def _await_compiler() -> None:
    """What failed or hangs is compiled again, and says why."""
    wait(_compiling, PATIENCE)
    _compiling.clear()
