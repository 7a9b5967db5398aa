"""Tile sizes by pass, head dim, element size and architecture: small tables instead of autotuning.

A table has a row for each pass and in it a column for padded head dims up to 64, 128 and 256;
`scripts/tile_tables.py` measures them anew.
"""

from typing import NamedTuple

HEAD_DIMS = (64, 128, 256)
# padded head dim from which the keys' second-order gradients take two launches (backward.py)
SPLIT_KEYS = 128


class Tile(NamedTuple):
    """BM queries by BN keys, the warps of a program and the stages of its pipeline."""

    BM: int
    BN: int
    warps: int
    stages: int


# Hopper and data-centre Blackwell: operands through TMA, 227 KB of shared memory.
HOPPER = {
    "forward": ((64, 128, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
    "forward_jvp": ((128, 128, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "keys": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 1)),
    "keys_jvp": ((32, 64, 4, 2), (32, 128, 8, 2), (16, 64, 8, 1)),
    "queries": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 1)),
    "queries_jvp": ((64, 64, 4, 2), (128, 32, 8, 2), (64, 16, 8, 1)),
}
# Everything else in 16 bits: at most 99 KB of shared memory, mma from registers.
PORTABLE = {
    "forward": ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    "forward_jvp": ((64, 32, 4, 2), (32, 32, 8, 1), (32, 16, 8, 1)),
    "keys": ((32, 64, 4, 2), (32, 64, 8, 1), (16, 32, 8, 1)),
    "keys_jvp": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "queries": ((64, 32, 4, 2), (64, 32, 8, 1), (32, 16, 8, 1)),
    "queries_jvp": ((64, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
}
# float32 as TF32, on any architecture: at most 32 rows a product, which keeps it on mma.sync (three
# TF32 products through wgmma gave wrong results with a mask in Triton 3.6).
FLOAT32 = {
    "forward": ((32, 32, 4, 2), (32, 32, 8, 1), (16, 16, 8, 1)),
    "forward_jvp": ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1)),
    "keys": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "keys_jvp": ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "queries": ((32, 32, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "queries_jvp": ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
# float32 as six bfloat16 products, which are wgmma: 64 rows for four warps. Of head dims up to 128.
SIX = {
    "forward": ((64, 32, 4, 2), (64, 16, 4, 2)),
    "forward_jvp": ((64, 32, 4, 2), (64, 16, 4, 1)),
}


def table(itemsize: int, hopper: bool, six: bool) -> dict[str, tuple]:
    """pass -> its tiles, one a column."""
    if six:
        return SIX
    return FLOAT32 if itemsize == 4 else HOPPER if hopper else PORTABLE


def column(block_d: int) -> int:
    """Of a table, for a padded head dim."""
    return HEAD_DIMS.index(max(block_d, 64))


def tile(
    kind: str, block_d: int, itemsize: int, hopper: bool, extras: bool, six: bool = False
) -> Tile:
    """The tile of pass `kind` for padded head dim `block_d` (a power of two, 16 ... 256); `six`:
    with float32 as six bfloat16 products.

    A mask or dropout (`extras`) needs registers and shared memory of its own: half a tile along
    the loop, but not where the tile is as narrow as six products make it: half of it was slower.
    """
    tile = Tile(*table(itemsize, hopper, six)[kind][column(block_d)])
    if six or not extras:
        return tile
    if kind.startswith("keys"):
        return tile._replace(BM=max(tile.BM // 2, 16))
    return tile._replace(BN=max(tile.BN // 2, 16))


class Rings(NamedTuple):
    """The warp-specialised pass (hopper.py): a head dim in two pieces, keys a tile, how many tiles
    of keys, of values, of query pairs and of masks are in flight, and the order of a tile."""

    D1: int
    D2: int
    BN: int
    KS: int
    VS: int
    QS: int
    BS: int
    EARLY: bool


def warp_specialized(head_dim: int, mask_bytes: int) -> Rings:
    """`mask_bytes`: of an element of a mask that is read, or 0."""
    masks = 1 if mask_bytes == 4 else 2
    if head_dim <= 64 and not mask_bytes:
        return Rings(64, 0, 128, 2, 2, 2, masks, False)
    if head_dim <= 64:
        return Rings(64, 0, 64, 2, 2, 1, masks, False)
    if head_dim <= 80:
        stages = 3 if mask_bytes <= 1 else 2  # what fits beside tiles of a mask
        return Rings(64, 16, 64, stages, stages, 2, masks, False)
    if head_dim <= 96:
        return Rings(64, 32, 64, 2, 2, 1 if mask_bytes else 2, masks, False)
    return Rings(128, 0, 64, 2, 2, 1, masks, not mask_bytes)


class Ring(NamedTuple):
    """The warp-specialised gradients (hopper_keys.py, hopper_queries.py): columns that a head dim
    takes, and how many tiles of 64 queries, or of keys, are in flight."""

    D: int
    COUNT: int


def gradient_ring(head_dim: int) -> Ring:
    return Ring(64, 4) if head_dim <= 64 else Ring(128, 2)
