"""Tile sizes by architecture, arithmetic, pass and head dim: small tables instead of autotuning.

    TABLES[arch][arithmetic][pass][column]

`arithmetic` is "half" (16 bits), "float32" or, where the architecture has it, "bf16x6" (float32 as
six bfloat16 products). A column is a padded head dim up to 64, 128 or 256.
`scripts/tile_tables.py` measures a table anew.
"""

from typing import NamedTuple

HEAD_DIMS = (64, 128, 256)
# padded head dim from which the second-order dK and dV take two launches (portable/bwd_dkdv.py)
SPLIT_DKDV = 128
FORWARD = ("fwd", "fwd_jvp")


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys, the warps of a program and the stages of its pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# Hopper: operands through TMA, 227 KB of shared memory.
SM90 = {
    "fwd": ((64, 128, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
    "fwd_jvp": ((128, 128, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "bwd_dkdv": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 1)),
    "bwd_dkdv_jvp": ((32, 64, 4, 2), (32, 128, 8, 2), (16, 64, 8, 1)),
    "bwd_dq": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 1)),
    "bwd_dq_jvp": ((64, 64, 4, 2), (128, 32, 8, 2), (64, 16, 8, 1)),
}
# Data-centre Blackwell: the same, and accumulators in 512 columns of tensor memory, which fewer of
# the second-order tiles leave room for. Products of fewer than 64 rows are mma.sync. Compiled, not
# run: no table was measured.
SM100 = SM90 | {
    "fwd_jvp": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 2)),
    "bwd_dkdv_jvp": ((32, 64, 4, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
    "bwd_dq_jvp": ((64, 64, 4, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
}
# At most 99 KB of shared memory, mma from registers.
SM80 = {
    "fwd": ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    "fwd_jvp": ((64, 32, 4, 2), (32, 32, 8, 1), (32, 16, 8, 1)),
    "bwd_dkdv": ((32, 64, 4, 2), (32, 64, 8, 1), (16, 32, 8, 1)),
    "bwd_dkdv_jvp": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "bwd_dq": ((64, 32, 4, 2), (64, 32, 8, 1), (32, 16, 8, 1)),
    "bwd_dq_jvp": ((64, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
}
# float32 as TF32, on any architecture: at most 32 rows a product, which keeps it on mma.sync (three
# TF32 products through wgmma gave wrong results with a mask in Triton 3.6).
FLOAT32 = {
    "fwd": ((32, 32, 4, 2), (32, 32, 8, 1), (16, 16, 8, 1)),
    "fwd_jvp": ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1)),
    "bwd_dkdv": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "bwd_dkdv_jvp": ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "bwd_dq": ((32, 32, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "bwd_dq_jvp": ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
# Six bfloat16 products are wgmma: 64 rows for four warps. Of head dims up to 128.
BF16X6 = {
    "fwd": ((64, 32, 4, 2), (64, 16, 4, 2)),
    "fwd_jvp": ((64, 32, 4, 2), (64, 16, 4, 1)),
}
# The same of operands that were cut into three bfloat16 parts before (portable/split.py), 6 bytes a
# column of the padded head dim, and three products of two parts. The second-order dK and dV take
# two launches.
PARTS3 = {
    "fwd": ((128, 64, 8, 3), (64, 64, 4, 1)),
    "fwd_jvp": ((128, 32, 8, 2), (64, 16, 4, 2)),
    "bwd_dkdv": ((32, 64, 4, 2), (16, 64, 4, 2)),
    "bwd_dv_jvp": ((32, 128, 8, 2), (16, 64, 4, 2)),
    "bwd_dk_jvp": ((32, 64, 4, 2), (16, 64, 4, 1)),
    "bwd_dq": ((64, 64, 4, 1), (64, 32, 4, 2)),
    "bwd_dq_jvp": ((64, 32, 4, 2), (64, 16, 4, 1)),
}
PARTS2 = {
    "fwd": ((128, 64, 8, 2), (128, 64, 8, 2)),
    "fwd_jvp": ((128, 64, 8, 2), (64, 32, 4, 2)),
    "bwd_dkdv": ((64, 64, 4, 2), (64, 64, 8, 2)),
    "bwd_dv_jvp": ((32, 128, 8, 2), (16, 64, 4, 2)),
    "bwd_dk_jvp": ((32, 64, 4, 2), (32, 64, 8, 1)),
    "bwd_dq": ((64, 64, 4, 2), (64, 64, 8, 1)),
    "bwd_dq_jvp": ((128, 32, 8, 2), (64, 32, 8, 1)),
}
PARTS = {2: PARTS2, 3: PARTS3}

# Hopper, 16 bits, where sequences are shorter than a tile and most of one would be empty: of at
# most so many queries and keys. Gradients keep all keys in a tile, for exact row sums.
SHORT: dict[int, dict[str, tuple]] = {
    16: dict.fromkeys(SM90, ((16, 16, 1, 2), (16, 16, 2, 2))),
    32: dict.fromkeys(SM90, ((16, 32, 2, 2),)) | dict.fromkeys(FORWARD, ((16, 16, 1, 2),)),
    48: dict.fromkeys(FORWARD, ((16, 16, 1, 2),)),
    64: dict.fromkeys(FORWARD, ((64, 64, 4, 1),)),
}

TABLES: dict[str, dict[str, dict[str, tuple]]] = {
    "sm80": {"half": SM80, "float32": FLOAT32},
    "sm89": {"half": SM80, "float32": FLOAT32},
    "sm90": {"half": SM90, "float32": FLOAT32, "bf16x6": BF16X6},  # and PARTS
    "sm100": {"half": SM100, "float32": FLOAT32},
    "sm120": {"half": SM80, "float32": FLOAT32},
    "gfx942": {"half": SM80, "float32": FLOAT32},
}


def column(block_d: int) -> int:
    """Of a table, for a padded head dim."""
    return HEAD_DIMS.index(max(block_d, 64))


def tile(table: dict[str, tuple], name: str, block_d: int, extras: bool) -> Tile:
    """The tile of pass `name` for padded head dim `block_d` (a power of two, 16 ... 256).

    A mask, dropout, a soft cap or a window (`extras`) needs registers and shared memory of its own:
    half a tile along the loop, but not where the tile is as narrow as six products make it: half of
    it was slower. Beside tiles of three parts a floating mask leaves room for two stages.
    """
    tile = Tile(*table[name][column(block_d)])
    if table is PARTS3 and extras:
        return tile._replace(num_stages=min(tile.num_stages, 2))
    if table is BF16X6 or not extras:
        return tile
    if name.startswith(("bwd_dk", "bwd_dv")):
        return tile._replace(BLOCK_M=max(tile.BLOCK_M // 2, 16))
    return tile._replace(BLOCK_N=max(tile.BLOCK_N // 2, 16))


def short(name: str, block_d: int, tokens: int) -> Tile | None:
    """The tile of pass `name` for at most so many queries and keys; None where a usual one is as
    good, or nothing was measured."""
    table = next((table for most, table in SHORT.items() if tokens <= most), {})
    tiles = table.get(name, ())
    return Tile(*tiles[column(block_d)]) if column(block_d) < len(tiles) else None


def padded(head_dim: int) -> int:
    """The head dim a tile is given: a power of two, at least what a matrix product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def pieces(head_dim: int) -> tuple[int, int]:
    """A head dim as a power of two and, between 64 and 96, a smaller one beside it."""
    if 64 < head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    return padded(head_dim), 0


class Schedule(NamedTuple):
    """The warp-specialised forward (sm90/forward.py): a head dim in two pieces, keys a tile, how
    many tiles of keys, of values, of query pairs and of masks are in flight, and whether the
    products of P start before tS is awaited."""

    D1: int
    D2: int
    BLOCK_N: int
    STAGES_K: int
    STAGES_V: int
    STAGES_Q: int
    STAGES_MASK: int
    OVERLAP_P: bool


def schedule(head_dim: int, mask_bytes: int, t_mask: bool = False) -> Schedule:
    """`mask_bytes`: of an element of a mask that is read, or 0; `t_mask`: with its tangent."""
    masks = 1 if mask_bytes == 4 else 2
    if t_mask:  # its tiles take the memory of other stages
        masks = 1 if head_dim > 96 else masks
        return schedule(head_dim, mask_bytes)._replace(STAGES_Q=1, STAGES_MASK=masks)
    if head_dim <= 64 and not mask_bytes:
        return Schedule(64, 0, 128, 2, 2, 2, masks, False)
    if head_dim <= 64:
        return Schedule(64, 0, 64, 2, 2, 1, masks, False)
    if head_dim <= 80:
        stages = 3 if mask_bytes <= 1 else 2  # what fits beside tiles of a mask
        return Schedule(64, 16, 64, stages, stages, 2, masks, False)
    if head_dim <= 96:
        return Schedule(64, 32, 64, 2, 2, 1 if mask_bytes else 2, masks, False)
    return Schedule(128, 0, 64, 2, 2, 1, masks, not mask_bytes)


class Plain(NamedTuple):
    """The warp-specialised forward without a tangent (sm90/forward_plain.py): a head dim in two
    pieces, keys a tile, how many tiles of keys, of values and of queries are in flight, warpgroups
    of 64 queries, and whether two of them take turns."""

    D1: int
    D2: int
    BLOCK_N: int
    STAGES_K: int
    STAGES_V: int
    STAGES_Q: int
    GROUPS: int
    ORDER: bool


def plain(head_dim: int, queries: int) -> Plain:
    """Up to 512 queries a third warpgroup gains less than the last tile, partly empty, loses."""
    D1, D2 = pieces(max(head_dim, 64))
    many = D1 + D2 == 64 and queries > 512
    return Plain(D1, D2, 128, 2, 2, 2, 3 if many else 2, D1 + D2 == 64 and not many)


class Pipeline(NamedTuple):
    """The warp-specialised gradients (sm90/bwd_dkdv.py, sm90/bwd_dq.py): columns that a head dim
    takes, and how many tiles of 64 queries, or of keys, are in flight."""

    D: int
    stages: int


def pipeline(head_dim: int) -> Pipeline:
    return Pipeline(64, 4) if head_dim <= 64 else Pipeline(128, 2)


class Backward(NamedTuple):
    """The gradients of O in one launch (sm90/bwd.py): a head dim in two pieces, how many pairs of
    tiles that pass are in flight, and warpgroups of 64 rows."""

    D1: int
    D2: int
    STAGES: int
    GROUPS: int


def backward(head_dim: int) -> Backward:
    """Above 64 columns six pairs do not always fit, nor do the registers of three warpgroups."""
    D1, D2 = pieces(max(head_dim, 64))
    groups = 3 if D1 + D2 == 64 else 2
    return Backward(D1, D2, {64: 6, 80: 6, 96: 5, 128: 3}[D1 + D2], groups)


class WholeHead(NamedTuple):
    """The gradients of O of a head that fits a block (sm90/bwd_head.py): a head dim in two pieces,
    tiles of queries, and how many tiles of Q and dO, of K and V, of P and dS are in flight."""

    D1: int
    D2: int
    QUERIES: int
    STAGES_Q: int
    STAGES_K: int
    STAGES_P: int


def whole_head(head_dim: int, queries: int, keys: int) -> WholeHead | None:
    """None for a head that does not: dQ of more than 256 queries, or of wider ones, has no
    registers. Heads of at most 64 keys are the portable kernels'."""
    if max(queries, keys) > 256 or head_dim > 80:
        return None
    D1, D2 = pieces(max(head_dim, 64))
    return WholeHead(D1, D2, -(-queries // 64), 6, 2 if D2 else 3, 2)
