"""Tile sizes by pass, head dim, element size and architecture: small tables instead of autotuning at run time.

A row is (BM queries, BN keys, warps, stages).
"""

from typing import NamedTuple


SPLIT_KEYS = 128  # padded head dim from which the keys' second-order gradients take two launches (backward.py)


class Tile(NamedTuple):
    BM: int
    BN: int
    warps: int
    stages: int


# fmt: off
# Hopper and later: operands through TMA, wgmma from shared memory.
HOPPER = {
    "forward":      {16: Tile(64, 128, 4, 3), 32: Tile(64, 128, 4, 3), 64: Tile(64, 128, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    "forward_jvp":  {16: Tile(128, 128, 8, 2), 32: Tile(128, 128, 8, 2), 64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "keys":         {16: Tile(64, 64, 4, 3), 32: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 1)},
    "keys_jvp":     {16: Tile(32, 128, 8, 2), 32: Tile(32, 128, 8, 2), 64: Tile(32, 64, 4, 2), 128: Tile(32, 128, 8, 2), 256: Tile(16, 64, 8, 1)},
    "queries":      {16: Tile(64, 64, 4, 3), 32: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 1)},
    "queries_jvp":  {16: Tile(64, 64, 4, 2), 32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 16, 8, 1)},
}
# Everything else in 16 bits: at most 99 KB of shared memory, mma from registers.
PORTABLE = {
    "forward":      {16: Tile(64, 64, 4, 2), 32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2)},
    "forward_jvp":  {16: Tile(64, 64, 4, 2), 32: Tile(64, 64, 4, 2), 64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    "keys":         {16: Tile(64, 64, 4, 2), 32: Tile(64, 64, 4, 2), 64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 1), 256: Tile(16, 32, 8, 1)},
    "keys_jvp":     {16: Tile(32, 64, 4, 1), 32: Tile(32, 64, 4, 1), 64: Tile(32, 64, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "queries":      {16: Tile(64, 64, 4, 2), 32: Tile(64, 64, 4, 2), 64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    "queries_jvp":  {16: Tile(64, 32, 4, 1), 32: Tile(64, 32, 4, 1), 64: Tile(64, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# float32, on any architecture: at most 32 rows a product, which keeps it on mma.sync (three TF32 products through wgmma
# gave wrong results with a mask in Triton 3.6).
FLOAT32 = {
    "forward":      {16: Tile(32, 64, 4, 2), 32: Tile(32, 64, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "forward_jvp":  {16: Tile(32, 32, 4, 1), 32: Tile(32, 32, 4, 1), 64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
    "keys":         {16: Tile(32, 32, 4, 1), 32: Tile(32, 32, 4, 1), 64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "keys_jvp":     {16: Tile(32, 32, 4, 1), 32: Tile(32, 32, 4, 1), 64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    "queries":      {16: Tile(32, 64, 4, 1), 32: Tile(32, 32, 4, 1), 64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    "queries_jvp":  {16: Tile(32, 32, 4, 1), 32: Tile(32, 32, 4, 1), 64: Tile(32, 16, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# fmt: on


def tile(kind: str, block_d: int, itemsize: int, hopper: bool, extras: bool) -> Tile:
    """The tile of pass `kind` for padded head dim `block_d` (a power of two, 16 ... 256).

    A mask or dropout (`extras`) needs registers and shared memory of its own and halves the tile along the loop.
    """
    table = FLOAT32 if itemsize == 4 else HOPPER if hopper else PORTABLE
    tile = table[kind][block_d]
    if not extras:
        return tile
    if kind.startswith("keys"):
        return tile._replace(BM=max(tile.BM // 2, 16))
    return tile._replace(BN=max(tile.BN // 2, 16))
