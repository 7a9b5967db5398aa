"""Static block masks: which blocks of queries see which blocks of keys, as lists that kernels walk.

    blocks = block_mask(layout, 128)                    a bool layout (..., nQ, nK)
    blocks = block_mask(create_block_mask(...))         a BlockMask of flex_attention
    out = attention(q, k, v, block_mask=blocks)

Kernels skip whole blocks and run no function inside of one, so each is seen whole or not at all.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import vmap

from .call import Blocks
from .errors import ArgumentTypeError, ArgumentValueError

UNIT = 128  # every tile of every kernel divides it
CHUNK = 64  # partial blocks whose pairs are asked for at once

_known: WeakKeyDictionary[Any, Blocks] = WeakKeyDictionary()


def block_mask(mask: Any, block_size: int | tuple[int, int] | None = None) -> Blocks:
    """The lists of a block mask, for `attention(..., block_mask=...)` any number of times.

    Args:
        mask: a `torch.nn.attention.flex_attention.BlockMask`, or bool (nQ, nK), (H, nQ, nK) or
            (B, H, nQ, nK), True where a block of queries sees a block of keys. B and H may be 1.
        block_size: rows of a block, or (of queries, of keys): multiples of 128; of a layout only.

    Raises:
        TypeError, ValueError: the mask is neither, or its blocks are no multiples of 128.
        NotImplementedError: a block of the BlockMask is seen in part. `mask_mod` is asked once for
            every pair of the blocks that may be, and blocks that only the end of the rows cuts are
            whole ones.
    """
    if isinstance(mask, Blocks):
        return mask
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "block_mask must be made outside of compiled code, by"
            " jvp_flash_attention.block_mask.block_mask"
        )
    if hasattr(mask, "kv_num_blocks"):
        if mask not in _known:
            _known[mask] = lists(_of_flex(mask), *_sizes(mask.BLOCK_SIZE))
        return _known[mask]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
        raise ArgumentTypeError(
            "block_mask must be a BlockMask of flex_attention, or a bool tensor (nQ, nK),"
            f" (H, nQ, nK) or (B, H, nQ, nK), got {_kind(mask)}"
        )
    return lists(mask[(None,) * (4 - mask.dim())], *_sizes(block_size))


def _kind(mask: Any) -> str:
    if isinstance(mask, Tensor):
        return f"{mask.dtype} {tuple(mask.shape)}"
    return type(mask).__name__


def _sizes(given: Any) -> tuple[int, int]:
    if given is None:
        raise ArgumentValueError(
            "block_mask must say how large its blocks are, got a bool layout alone; use"
            f" block_mask.block_mask(layout, {UNIT})"
        )
    pair = given if isinstance(given, tuple) else (given, given)
    if len(pair) != 2 or any(not isinstance(n, int) or n <= 0 or n % UNIT for n in pair):
        raise ArgumentValueError(
            f"block_size must be a multiple of {UNIT}, or a pair of them, got {given!r}"
        )
    return pair


def layout_of(blocks: Tensor) -> Tensor:
    """Lists of blocks (`Blocks`) as bool (b, h, nQ, nK)."""
    return _layout(blocks[..., 0], blocks[..., 1:])


def lists(layout: Tensor, block_q: int, block_k: int) -> Blocks:
    """The lists of a bool (b, h, nQ, nK)."""

    def listed(seen: Tensor) -> Tensor:
        order = torch.sort((~seen).to(torch.int8), dim=-1, stable=True)[1]
        return torch.cat([seen.sum(-1, keepdim=True), order], -1).int().contiguous()

    return Blocks(listed(layout), listed(layout.mT), block_q, block_k)


def _of_flex(mask: Any) -> Tensor:
    """The layout of a BlockMask."""
    some = _layout(mask.kv_num_blocks, mask.kv_indices)
    full = torch.zeros_like(some)
    if mask.full_kv_num_blocks is not None:
        full = _layout(mask.full_kv_num_blocks, mask.full_kv_indices)
    rows, columns = mask.BLOCK_SIZE
    L, S = getattr(mask, "seq_lengths", (some.shape[2] * rows, some.shape[3] * columns))
    for part in some.nonzero().split(CHUNK) if some.any() else ():
        b, h, q, k = part.T[..., None, None]
        i = q * rows + torch.arange(rows, device=part.device)[:, None]
        j = k * columns + torch.arange(columns, device=part.device)
        inside = (i < L) & (j < S)
        pairs = torch.broadcast_tensors(b, h, i.clamp(max=L - 1), j.clamp(max=S - 1))
        seen = vmap(mask.mask_mod)(*(x.flatten() for x in pairs)).view(inside.shape)
        whole, none = (seen | ~inside).all(-1).all(-1), ~(seen & inside).any(-1).any(-1)
        if not (whole | none).all():
            at = tuple(part[~(whole | none)][0].tolist())
            raise NotImplementedError(
                f"block_mask sees a block in part, the first is (b, h, q, k) = {at}; let its"
                " boundaries be those of blocks, or give the mask as a bool attn_mask"
            )
        full[tuple(part[whole].T)] = True
    return full


def _layout(counts: Tensor, indices: Tensor) -> Tensor:
    """(B, H, nQ) and (B, H, nQ, nK) -> bool (B, H, nQ, nK)."""
    n = indices.shape[-1]
    listed = torch.arange(n, device=counts.device) < counts[..., None]
    layout = counts.new_zeros(*counts.shape, n + 1, dtype=torch.bool)
    return layout.scatter_(-1, torch.where(listed, indices, n).long(), True)[..., :n]
