"""Before other kernels on Hopper: float32 tensors as bfloat16 parts that add up to them.

    x₁ = bf16(x)        x₂ = bf16(x − x₁)        x₃ = bf16(x − x₁ − x₂)

Eight binary digits a part: three hold a float32. A product of two such numbers takes the six of the
nine products of parts that stand above its 24th digit (`primitives.dot`). Where x is NaN or
infinite x₁ is too and the others are 0. So is x₁ of a number above 3.39e38, the largest bfloat16.
"""

import triton
import triton.language as tl

from .primitives import finite, head_of, load_tile, split, store_tile


@triton.jit(do_not_specialize=["H", "rows"])
def split_kernel(
    X, T_X, Y, T_Y, H, rows,
    PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows of one head of X and its tangent (B, H, rows, D), into Y and T_Y (B,
    H, rows, PARTS · BLOCK_D), part beside part."""
    b, h, tile = head_of(tl.program_id(0), tl.cdiv(rows, BLOCK), H, False)
    store_parts(X, Y, b, h, tile * BLOCK, rows, PARTS, D, BLOCK_D, BLOCK)
    store_parts(T_X, T_Y, b, h, tile * BLOCK, rows, PARTS, D, BLOCK_D, BLOCK)


@triton.jit
def store_parts(
    X, Y, b, h, row, rows,
    PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if X is not None:
        x = load_tile(X, b, h, row, rows, BLOCK, D, BLOCK_D, True, False)
        parts = split(x, PARTS, Y[0].dtype.element_ty)
        for PART in tl.static_range(PARTS):
            part = parts[PART] if PART == 0 else finite(parts[PART:])[0]
            store_tile(Y, part, b, h, row, rows, BLOCK, BLOCK_D, BLOCK_D, PART * BLOCK_D)
