"""Which process holds which rows of a sequence, and which blocks of scores that leaves to each.

A sequence of `length` rows is split into pieces that differ by at most one row, the longer ones
first. In the contiguous layout process r of n holds piece r of n. In the zigzag layout it holds
pieces r and 2n − 1 − r of 2n, one after the other. Under a causal mask every process then has the
same work, and each block of its scores is full, causal or empty (r: queries, s: keys):

    zigzag                                    contiguous
    s = r: all rows, all keys, causal         s = r: causal
    s < r: all rows, first piece of the keys  s < r: full
    s > r: second piece of the rows, all keys s > r: empty

On a 2-D mesh the first dimension splits the sequence in the layout, the second one splits each of
these shards contiguously.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh

from ..functorch import inside_a_jvp

LAYOUTS = ("contiguous", "zigzag")


class Block(NamedTuple):
    """A part of the scores of one process's queries with another's keys."""

    rows: slice
    keys: slice
    causal: bool  # aligned at the top left, as everywhere


def split(length: int, parts: int) -> list[int]:
    """Lengths of the pieces of a sequence: they differ by at most 1, the longer ones first."""
    return [length // parts + (i < length % parts) for i in range(parts)]


def pieces(length: int, size: int, rank: int, layout: str) -> list[slice]:
    """Rows of the sequence that process `rank` of `size` holds, in its order."""
    parts, mine = size, [rank]
    if layout == "zigzag":
        parts, mine = 2 * size, [rank, 2 * size - 1 - rank]
    ends = [0, *accumulate(split(length, parts))]
    return [slice(ends[i], ends[i + 1]) for i in mine]


def shard_lengths(length: int, size: int, layout: str) -> list[int]:
    """How many rows each process holds."""
    held = (pieces(length, size, rank, layout) for rank in range(size))
    return [sum(x.stop - x.start for x in rows) for rows in held]


def block(
    rank: int, source: int, size: int, lengths: tuple[int, int], causal: bool, layout: str
) -> Block | None:
    """What the queries of process `rank` see of the keys of `source`; None where that is nothing.
    `lengths` are those of the whole sequences, equal ones where `causal`."""
    rows, keys, everything = slice(None), slice(None), slice(None)
    if causal and layout == "zigzag" and source < rank:
        first = pieces(lengths[1], size, source, layout)[0]
        keys = slice(0, first.stop - first.start)
    elif causal and layout == "zigzag" and source > rank:
        first = pieces(lengths[0], size, rank, layout)[0]
        rows = slice(first.stop - first.start, None)
    elif causal and source > rank:
        return None
    L, S = (shard_lengths(n, size, layout)[i] for n, i in zip(lengths, (rank, source), strict=True))
    if not range(L)[rows] or not range(S)[keys]:
        return None
    return Block(
        everything if len(range(L)[rows]) == L else rows,
        everything if len(range(S)[keys]) == S else keys,
        causal and source == rank,
    )


def positions(length: int, mesh: DeviceMesh, layout: str = "contiguous") -> Tensor:
    """Positions in the whole sequence of the rows that this process holds, in its order.

    Give them to whatever depends on the position: rotary embeddings, learned ones, masks.

    Args:
        length: of the whole sequence.
        mesh: 1-D, or 2-D as (ring, ulysses).
        layout: "contiguous", or "zigzag", which balances a causal mask.

    Returns:
        int64 (local length,), on the mesh's kind of device.
    """
    _check(mesh, layout)
    rows = pieces(length, mesh.size(0), mesh.get_local_rank(0), layout)
    at = torch.cat([torch.arange(x.start, x.stop, device=mesh.device_type) for x in rows])
    if mesh.ndim == 2:
        (rows,) = pieces(len(at), mesh.size(1), mesh.get_local_rank(1), "contiguous")
        at = at[rows]
    return at


def shard(x: Tensor, mesh: DeviceMesh, dim: int = -2, layout: str = "contiguous") -> Tensor:
    """This process's rows of a tensor that every process holds whole; differentiable.

    Args:
        x: (..., length, ...), the same on every process.
        mesh, layout: as `positions` takes them.
        dim: the dimension of the sequence, by default that of (B, H, L, D).

    Returns:
        (..., local length, ...), a copy.
    """
    at = positions(x.shape[dim], mesh, layout)
    return x.index_select(dim, at.to(x.device))


def unshard(
    x: Tensor,
    mesh: DeviceMesh,
    dim: int = -2,
    layout: str = "contiguous",
    length: int | None = None,
) -> Tensor:
    """The whole tensor from its shards, on every process. It has no derivative.

    Args:
        x: (..., local length, ...), as `shard` gives it.
        mesh, dim, layout: as for `shard`.
        length: of the whole sequence; None where every process holds as many rows.

    Returns:
        (..., length, ...).

    Raises:
        NotImplementedError: x has a tangent, or a gradient would be recorded.
        ValueError: this process does not hold the rows that `shard` would give it.
    """
    tangent = inside_a_jvp() and forward_ad.unpack_dual(x).tangent is not None
    if tangent or (torch.is_grad_enabled() and x.requires_grad):
        raise NotImplementedError(
            "unshard has no derivative; take the loss of the shards and add it over the processes,"
            " or pass x.detach()"
        )
    _check(mesh, layout)
    length = x.shape[dim] * mesh.size() if length is None else length
    if mesh.ndim == 2:
        mine = shard_lengths(length, mesh.size(0), layout)[mesh.get_local_rank(0)]
        x = _gather(x, mesh, 1, dim, "contiguous", mine)
    return _gather(x, mesh, 0, dim, layout, length)


def _gather(x: Tensor, mesh: DeviceMesh, mesh_dim: int, dim: int, layout: str, length: int):
    size = mesh.size(mesh_dim)
    held = shard_lengths(length, size, layout)
    mine = held[mesh.get_local_rank(mesh_dim)]
    if x.shape[dim] != mine:
        raise ValueError(
            f"x must hold {mine} of {length} rows in the layout {layout!r}, got {x.shape[dim]};"
            " pass length="
        )
    x = x.movedim(dim, 0)
    padded = x.new_zeros(max(held), *x.shape[1:])
    padded[:mine] = x
    parts = [torch.empty_like(padded) for _ in range(size)]
    distributed.all_gather(parts, padded, group=mesh.get_group(mesh_dim))
    whole = x.new_empty(length, *x.shape[1:])
    for rank, part in enumerate(parts):
        start = 0
        for rows in pieces(length, size, rank, layout):
            count = rows.stop - rows.start
            whole[rows] = part[start : start + count]
            start += count
    return whole.movedim(0, dim)


def _check(mesh: DeviceMesh, layout: str) -> None:
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must have 1 dimension, or 2 as (ring, ulysses), got {mesh.ndim}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
