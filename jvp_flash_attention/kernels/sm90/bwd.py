"""Gradients of O alone on Hopper: one launch behind the row sums, with one role a warp.

    S  = s Q Kᵀ      P = exp(S − LSE)      dP = dO Vᵀ      dS = P ∘ (dP − w)
    dQ = s dS K                                            first half of a work item
    dK = s dSᵀ Q     dV = Pᵀ dO                            second half, tiles transposed

A work item is 64 queries of each warpgroup and the keys of the same place in a head. In the first
half queries stay and tiles of keys pass, in the second keys stay and queries pass. S and dP are
computed in both, seven products for five. So no result is summed between blocks: no float32 buffer
to clear and to convert, and two runs are equal bit for bit. The items of a head run beside each
other, and the second half reads from L2 what the first has fetched.

All warpgroups read what passes and share no result. One's products run under the others' softmax,
without any order between them. Up to 64 columns there are registers for three: in the second half
dP begins at -w, so that w takes none of its own. A warpgroup whose rows lie behind the last lets
tiles pass. Results of a half are stored under the first scores of the next.

A head dim above 64 and up to 96 is two pieces, as in `forward.py`. Names of the second end in 2.
"""

# Each role unpacks all buffers and barriers, by name, and uses its own. What is known at compile
# time stands in an `if` of its own.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..portable.primitives import LOG2E
from .primitives import (
    ROWS,
    advance,
    allocate_stages,
    await_stores,
    barriers,
    first_row,
    keep_alive,
    let_pass,
    load_tile,
    matrix,
    scores,
    store_sums,
    store_tile,
    work_item,
    work_items,
)


@gluon.jit
def _fetch(x, buffers, bar, b, h, row, slot, D1: gl.constexpr):
    """A tile of each of two tensors."""
    for i in gl.static_range(2):
        load_tile(x[i], buffers[i], slot, bar, b, h, row, D1)


@gluon.jit
def _fetch_half(
    staying, passing, buffers, bars, b, h, row, rows, own, own_phase, slot, phase,
    D1: gl.constexpr, TILE_BYTES: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """What stays, of all warpgroups, and all tiles that pass, of so many rows."""
    stay, moving = buffers
    stay_ready, stay_free, ready, free = bars
    mbarrier.wait(stay_free.index(own), own_phase)
    mbarrier.expect(stay_ready.index(own), 2 * GROUPS * TILE_BYTES)
    for g in gl.static_range(GROUPS):
        at = row + g * ROWS
        _fetch(staying, stay, stay_ready.index(own), b, h, at, GROUPS * own + g, D1)
    own, own_phase = advance(own, own_phase, 1, 2)
    for at in range(0, rows, ROWS):
        mbarrier.wait(free.index(slot), phase)
        mbarrier.expect(ready.index(slot), 2 * TILE_BYTES)
        _fetch(passing, moving, ready.index(slot), b, h, at, slot, D1)
        slot, phase = advance(slot, phase, 1, STAGES)
    return own, own_phase, slot, phase


@gluon.jit
def _producer(
    given, D1: gl.constexpr, TILE_BYTES: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """The warp that fetches. queries: Q and dO, keys: K and V, each in two pieces."""
    queries, keys, buffers, bars, work = given
    H, L, S, tiles, turn, items = work
    own = 0
    own_phase = 1
    slot = 0
    phase = 1
    for e in range(work_items(items, False)):
        b, h, tile = work_item(e, tiles, H, False, turn=turn)
        row = tile * (GROUPS * ROWS)
        if row < L:
            own, own_phase, slot, phase = _fetch_half(
                queries, keys, buffers, bars, b, h, row, S, own, own_phase, slot, phase,
                D1, TILE_BYTES, STAGES, GROUPS,
            )  # fmt: skip
        if row < S:
            own, own_phase, slot, phase = _fetch_half(
                keys, queries, buffers, bars, b, h, row, L, own, own_phase, slot, phase,
                D1, TILE_BYTES, STAGES, GROUPS,
            )  # fmt: skip


@gluon.jit
def _add_product(a, x, x2, d, d2):
    """d + a x, not awaited, and a in 16 bits, which the products read."""
    L1: gl.constexpr = gl.DotOperandLayout(0, d.type.layout, 2)
    a16 = gl.convert_layout(a.to(x.dtype), L1, assert_trivial=True)
    d = warpgroup_mma(a16, x, d, is_async=True)
    if x2 is not None:
        L2: gl.constexpr = gl.DotOperandLayout(0, d2.type.layout, 2)
        d2 = warpgroup_mma(gl.convert_layout(a16, L2, assert_trivial=True), x2, d2, is_async=True)
    return a16, d, d2


@gluon.jit
def _skip_half(
    stay_ready, stay_free, ready, free, slot, phase, own, own_phase, stored, rows,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Of a warpgroup whose rows lie behind the last."""
    stored = await_stores(stored, stay_free)
    mbarrier.wait(stay_ready.index(own), own_phase)
    for _ in range(0, rows, ROWS):
        slot, phase = let_pass(ready, free, slot, phase, STAGES)
    stored = own + 1  # nothing is
    own, own_phase = advance(own, own_phase, 1, 2)
    return slot, phase, own, own_phase, stored


@gluon.jit
def _consumer(
    WG: gl.constexpr, given, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """A warpgroup of GROUPS. STATISTICS: by head two rows, LSE in base 2 and w, padded with
    LSE = inf, hence P = 0."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(D2, 16), 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_L)
    TWO: gl.constexpr = D2 > 0
    PIECES: gl.constexpr = 2 if TWO else 1
    results, STATISTICS, SUMS, buffers, bars, scale, work = given
    stay, moving = buffers
    stay0, stay1 = stay
    moving0, moving1 = moving
    stay_ready, stay_free, ready, free = bars
    d_q_out, d_k_out, d_v_out = results
    H, L, S, tiles, turn, items = work
    scale2 = scale * LOG2E
    padded = (L + (ROWS - 1)) // ROWS * ROWS
    stored = 0  # number + 1 of the slot that the last stores may still read
    own = 0
    own_phase = 0
    slot = 0
    phase = 0
    for e in range(work_items(items, False)):
        b, h, tile = work_item(e, tiles, H, False, turn=turn)
        begin = tile * (GROUPS * ROWS)
        row = begin + WG * ROWS
        statistics = STATISTICS + first_row(b, h, H, 2) * padded
        if row < L:
            i = row + gl.arange(0, ROWS, layout=ROW)
            lse = gl.load(statistics + i)
            w = gl.load(statistics + padded + i)
            at = GROUPS * own + WG
            q = matrix(stay0[0], at, ROWS, D1)
            d_o = matrix(stay1[0], at, ROWS, D1)
            q2 = matrix(stay0[1], at, ROWS, D2) if TWO else None
            d_o2 = matrix(stay1[1], at, ROWS, D2) if TWO else None
            d_q = gl.zeros([ROWS, D1], gl.float32, L1)
            d_q2 = gl.zeros([ROWS, D2], gl.float32, L2) if TWO else 0
            mbarrier.wait(stay_ready.index(own), own_phase)
            for n0 in range(0, S, ROWS):
                k = matrix(moving0[0], slot, ROWS, D1)
                v = matrix(moving1[0], slot, ROWS, D1)
                k2 = matrix(moving0[1], slot, ROWS, D2) if TWO else None
                v2 = matrix(moving1[1], slot, ROWS, D2) if TWO else None
                zero = gl.zeros([ROWS, ROWS], gl.float32, S_L)
                mbarrier.wait(ready.index(slot), phase)
                s = scores(q, k, q2, k2, zero, True)
                d_p = scores(d_o, v, d_o2, v2, zero, True)
                stored = await_stores(stored, stay_free)
                s = warpgroup_mma_wait(PIECES, deps=[s])
                p = gl.exp2(s * scale2 - gl.expand_dims(lse, 1))
                d_p = warpgroup_mma_wait(0, deps=[d_p])
                d_s = p * (d_p - gl.expand_dims(w, 1))
                if EDGE:  # behind the last key P may be infinite, and 0 · inf is not 0
                    j = gl.expand_dims(n0 + gl.arange(0, ROWS, layout=COLUMN), 0)
                    d_s = gl.where(j < S, d_s, 0.0)
                d_s16, d_q, d_q2 = _add_product(d_s, k, k2, d_q, d_q2)
                if TWO:
                    d_q, d_q2 = warpgroup_mma_wait(0, deps=[d_q, d_q2])
                else:
                    d_q = warpgroup_mma_wait(0, deps=[d_q])
                keep_alive(d_s16)
                mbarrier.arrive(free.index(slot), count=1)
                slot, phase = advance(slot, phase, 1, STAGES)
            d_q = d_q * scale
            d_q2 = d_q2 * scale if TWO else None
            store_tile(d_q_out, d_q, d_q2, stay0, at, b, h, row, D1, D2)
            if SUMS is not None:
                to = 2 * (b * ((L + (ROWS - 1)) // ROWS) + row // ROWS) * H + h
                store_sums(SUMS, to, d_q_out, d_q, d_q2, stay0, at, h, D, D1, D2)
            stored = own + 1
            own, own_phase = advance(own, own_phase, 1, 2)
        elif begin < L:
            slot, phase, own, own_phase, stored = _skip_half(
                stay_ready, stay_free, ready, free, slot, phase, own, own_phase, stored, S, STAGES
            )
        if row < S:
            at = GROUPS * own + WG
            k = matrix(stay0[0], at, ROWS, D1)
            v = matrix(stay1[0], at, ROWS, D1)
            k2 = matrix(stay0[1], at, ROWS, D2) if TWO else None
            v2 = matrix(stay1[1], at, ROWS, D2) if TWO else None
            d_k = gl.zeros([ROWS, D1], gl.float32, L1)
            d_v = gl.zeros([ROWS, D1], gl.float32, L1)
            d_k2 = gl.zeros([ROWS, D2], gl.float32, L2) if TWO else 0
            d_v2 = gl.zeros([ROWS, D2], gl.float32, L2) if TWO else 0
            mbarrier.wait(stay_ready.index(own), own_phase)
            for m0 in range(0, L, ROWS):
                i = m0 + gl.arange(0, ROWS, layout=COLUMN)
                lse = gl.load(statistics + i)
                w = gl.load(statistics + padded + i)
                q = matrix(moving0[0], slot, ROWS, D1)
                d_o = matrix(moving1[0], slot, ROWS, D1)
                q2 = matrix(moving0[1], slot, ROWS, D2) if TWO else None
                d_o2 = matrix(moving1[1], slot, ROWS, D2) if TWO else None
                zero = gl.zeros([ROWS, ROWS], gl.float32, S_L)
                mbarrier.wait(ready.index(slot), phase)
                s = scores(k, q, k2, q2, zero, True)
                d_p = scores(v, d_o, v2, d_o2, zero - gl.expand_dims(w, 0), False)
                stored = await_stores(stored, stay_free)
                s = warpgroup_mma_wait(PIECES, deps=[s])
                p = gl.exp2(s * scale2 - gl.expand_dims(lse, 0))
                p16, d_v, d_v2 = _add_product(p, d_o, d_o2, d_v, d_v2)
                d_p = warpgroup_mma_wait(PIECES, deps=[d_p])
                d_s = p * d_p
                d_s16, d_k, d_k2 = _add_product(d_s, q, q2, d_k, d_k2)
                if TWO:
                    d_k, d_k2, d_v, d_v2 = warpgroup_mma_wait(0, deps=[d_k, d_k2, d_v, d_v2])
                else:
                    d_k, d_v = warpgroup_mma_wait(0, deps=[d_k, d_v])
                keep_alive(p16)
                keep_alive(d_s16)
                mbarrier.arrive(free.index(slot), count=1)
                slot, phase = advance(slot, phase, 1, STAGES)
            d_k2 = d_k2 * scale if TWO else None
            store_tile(d_k_out, d_k * scale, d_k2, stay0, at, b, h, row, D1, D2)
            store_tile(d_v_out, d_v, d_v2, stay1, at, b, h, row, D1, D2)
            stored = own + 1
            own, own_phase = advance(own, own_phase, 1, 2)
        elif begin < S:
            slot, phase, own, own_phase, stored = _skip_half(
                stay_ready, stay_free, ready, free, slot, phase, own, own_phase, stored, L, STAGES
            )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("H", "L", "S", "tiles", "turn", "items"))
def bwd_kernel(
    Q, K, V, D_O, D_Q, D_K, D_V, Q2, K2, V2, D_O2, D_Q2, D_K2, D_V2, STATISTICS, SUMS,
    scale, H, L, S, tiles, turn, items,
    D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """D1 + D2 columns, of which D exist; STAGES pairs of passing tiles in flight, two pairs of what
    stays of each of GROUPS warpgroups; SUMS: `Call.sums`, of which Σ dO is another launch's; EDGE:
    the last tile of keys is cut."""
    TILE_BYTES: gl.constexpr = ROWS * (D1 + D2) * 2
    TWO: gl.constexpr = D2 > 0
    stay = (
        (allocate_stages(Q, 2 * GROUPS), allocate_stages(Q2, 2 * GROUPS) if TWO else None),
        (allocate_stages(V, 2 * GROUPS), allocate_stages(V2, 2 * GROUPS) if TWO else None),
    )
    moving = (
        (allocate_stages(Q, STAGES), allocate_stages(Q2, STAGES) if TWO else None),
        (allocate_stages(V, STAGES), allocate_stages(V2, STAGES) if TWO else None),
    )
    buffers = (stay, moving)
    bars = (barriers(2, 1), barriers(2, GROUPS), barriers(STAGES, 1), barriers(STAGES, GROUPS))
    work = (H, L, S, tiles, turn, items)
    results = ((D_Q, D_Q2), (D_K, D_K2), (D_V, D_V2))
    given = (results, STATISTICS, SUMS, buffers, bars, scale, work)
    fetched = (((Q, Q2), (D_O, D_O2)), ((K, K2), (V, V2)), buffers, bars, work)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (0, given, D, D1, D2, STAGES, GROUPS, EDGE)),
                (_consumer, (1, given, D, D1, D2, STAGES, GROUPS, EDGE)),
                (_producer, (fetched, D1, TILE_BYTES, STAGES, GROUPS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (0, given, D, D1, D2, STAGES, GROUPS, EDGE)),
                (_consumer, (1, given, D, D1, D2, STAGES, GROUPS, EDGE)),
                (_consumer, (2, given, D, D1, D2, STAGES, GROUPS, EDGE)),
                (_producer, (fetched, D1, TILE_BYTES, STAGES, GROUPS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
