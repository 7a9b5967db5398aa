"""Forward with its JVP on Hopper: the pass of `portable/forward.py` with one role a warp, in Gluon.

One block an SM. A producer warp fetches tiles by TMA; two consumer warpgroups own 64 queries each
and take turns on the tensor cores, so that one's softmax runs under the other's products:

    _tile_overlapping_p         S, tS │ softmax │ P V, P tV │ R │ R V
        the products of P start before tS is awaited (head dims above 96, no mask)
    _tile_overlapping_softmax   S, tS │ softmax, R │ P V, P tV, R V
        the blocks [values of tile j, scores of tile j + 1] of the two warpgroups alternate; an
        item's first scores and last values are blocks of their own, so that nobody waits while
        results are finished and stored

Beyond the mathematics there, whose names are used (steps of a tile: `fwd_primitives.py`):

* Row sums l and r stay apart in the four lanes that share a row until the last tile: no shuffle in
  the loop.
* Lazy rescaling: o, t, l, r are brought to a new maximum only where a row of the warp outgrew its
  old one by 2^THRESHOLD. P̃ then reaches 2^THRESHOLD instead of 1, which float32 sums do not notice.
* A head dim above 64 and up to 96 is two pieces, 64 + 16 or 64 + 32, each with its own buffers,
  products and accumulator: 72 costs 80 columns, not 128. Of 16 columns, those of V and tV lie side
  by side and share the product with P.
* Where there are two pairs of query buffers, the stores of an item's results are awaited under the
  next one's first scores.
* Under a causal or a block mask a block takes query tiles in pairs (first, last), (second, last but
  one) ..., which all cost the same where the mask is a triangle.
* A work item walks the tiles of keys between two bounds, which a band, the item's sequence or its
  list of blocks gives. Only the warp that fetches knows where they lie: the others see the rows of
  the listed blocks, or of the sequence, as keys 0, 1, ... At least one tile is walked, so that both
  roles agree where nothing is seen.

Operands and results are TMA descriptors of (B, H, rows, D), or with even and odd heads in a
dimension of their own (`launch.py`). What lies outside reads as zero and is not written. An absent
tangent removes its loads and products. A mask is read as a tile by TMA (FULL), or as a row that all
queries share (KEYS).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ..portable.primitives import LN2, LOG2E
from .fwd_primitives import (
    finish,
    mask_scores,
    softmax,
    start_p_values,
    start_r_values,
    start_scores,
    store_results,
    weigh_tangent,
    work_range,
)
from .fwd_producer import producer
from .primitives import (
    ROWS,
    advance,
    allocate_stages,
    await_stores,
    barriers,
    declare_flag,
    first_row,
    keep_alive,
    keys_begin,
    keys_end,
    lane_sums,
    matrix,
    side_by_side,
    store_part,
    warp_scheduler_barrier_arrive,
    warp_scheduler_barrier_sync,
    work_items,
)

UNSPECIALIZED = ("H", "L", "S", "sequences", "tiles", "items", "b_step", "h_step")


@gluon.jit
def _tile_overlapping_p(
    WG: gl.constexpr, FLAG: gl.constexpr, q, q2, t_q, t_q2, buffers, bars, masks, place,
    scale, scale2, j, first, kj, k_phase, vj, v_phase,
    stored, bj, b_phase, m, top, l, r, o, t, o2, t2, c,
    D1: gl.constexpr, D2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES_V: gl.constexpr,
    STAGES_Q: gl.constexpr, STAGES_MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    EMPTY: gl.constexpr, EDGE: gl.constexpr, MASK: gl.constexpr, BOOL: gl.constexpr,
    THRESHOLD: gl.constexpr,
    T_Q: gl.constexpr, T_K: gl.constexpr, T_V: gl.constexpr,
):  # fmt: skip
    """One tile of keys where the products of P start before tS is awaited."""
    TWO: gl.constexpr = D2 > 0
    T_S: gl.constexpr = T_Q or T_K
    PIECES: gl.constexpr = 2 if TWO else 1
    T_S_PRODUCTS: gl.constexpr = PIECES * ((1 if T_Q else 0) + (1 if T_K else 0))
    PAIR: gl.constexpr = D2 == 16 and T_V
    V2_STEP: gl.constexpr = 2 if T_V else 1
    P_PRODUCTS: gl.constexpr = PIECES * (2 if T_V else 1) - (1 if PAIR else 0)
    ADD: gl.constexpr = MASK != "none" and not BOOL
    _q_ready, q_free, k_ready, k_free, v_ready, v_free, b_ready, b_free = bars
    k = matrix(buffers[2][0], kj, BLOCK_N, D1)
    k2 = matrix(buffers[2][1], kj, BLOCK_N, D2) if TWO else None
    mbarrier.wait(k_ready.index(kj), k_phase)
    warp_scheduler_barrier_sync(WG)
    s, t_s = start_scores(q, q2, t_q, t_q2, k, k2, buffers, kj, D1, D2, BLOCK_N, T_Q, T_K)
    warp_scheduler_barrier_arrive(WG)
    s = warpgroup_mma_wait(T_S_PRODUCTS, deps=[s])
    if STAGES_Q > 1:
        stored = await_stores(stored, q_free)

    s, t_s, bj, b_phase = mask_scores(
        WG, s, t_s, buffers, b_ready, b_free, masks, place, scale, scale2, j, bj, b_phase,
        BLOCK_N, STAGES_MASK, LEFT, RIGHT, EDGE, MASK, BOOL,
    )  # fmt: skip
    m, top, l, r, o, t, o2, t2, p, p16, p16_2 = softmax(
        FLAG, s, scale2, m, top, l, r, o, t, o2, t2, q, BLOCK_N, EMPTY, ADD, THRESHOLD, TWO
    )
    v = matrix(buffers[4][0], vj, BLOCK_N, D1)
    v2 = matrix(buffers[4][1], V2_STEP * vj, BLOCK_N, D2) if TWO else None
    v_w2 = side_by_side(buffers[4][1], vj, STAGES_V, BLOCK_N, D2) if PAIR else v2
    mbarrier.wait(v_ready.index(vj), v_phase)
    o, o2, t, t2 = start_p_values(
        p16, p16_2, v, v_w2, buffers, vj, o, o2, t, t2, D1, D2, BLOCK_N, T_V
    )
    if T_S:
        t_s = warpgroup_mma_wait(P_PRODUCTS, deps=[t_s])
    mbarrier.arrive(k_free.index(kj), count=1)
    if T_S:
        c, r, p_t_s16, p_t_s16_2 = weigh_tangent(t_s, p, p16, c, l, r, scale, first, D2, BLOCK_N)
        t, t2 = start_r_values(p_t_s16, p_t_s16_2, v, v2, t, t2, TWO)
    if TWO:
        o, o2, t, t2 = warpgroup_mma_wait(0, deps=[o, o2, t, t2])
    else:
        o, t = warpgroup_mma_wait(0, deps=[o, t])
    p16 = keep_alive(p16)
    if T_S:
        p_t_s16 = keep_alive(p_t_s16)
    mbarrier.arrive(v_free.index(vj), count=1)
    return stored, bj, b_phase, m, top, l, r, o, t, o2, t2, c


@gluon.jit
def _tile_overlapping_softmax(
    WG: gl.constexpr, FLAG: gl.constexpr, q, q2, t_q, t_q2, buffers, bars, masks, place,
    scale, scale2, j, first, kj, k_phase, vj, v_phase, v_last,
    stored, bj, b_phase, m, top, l, r, o, t, o2, t2, c,
    D1: gl.constexpr, D2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES_V: gl.constexpr,
    STAGES_Q: gl.constexpr, STAGES_MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    EMPTY: gl.constexpr, EDGE: gl.constexpr, MASK: gl.constexpr, BOOL: gl.constexpr,
    THRESHOLD: gl.constexpr,
    T_Q: gl.constexpr, T_K: gl.constexpr, T_V: gl.constexpr,
):  # fmt: skip
    """One tile of keys where all that comes before the values is done in one block: the warpgroup
    has the tensor cores from the values of a tile to the scores of the next one."""
    TWO: gl.constexpr = D2 > 0
    T_S: gl.constexpr = T_Q or T_K
    PAIR: gl.constexpr = D2 == 16 and T_V
    V2_STEP: gl.constexpr = 2 if T_V else 1
    ADD: gl.constexpr = MASK != "none" and not BOOL
    _q_ready, q_free, k_ready, k_free, v_ready, v_free, b_ready, b_free = bars
    k = matrix(buffers[2][0], kj, BLOCK_N, D1)
    k2 = matrix(buffers[2][1], kj, BLOCK_N, D2) if TWO else None
    mbarrier.wait(k_ready.index(kj), k_phase)
    s, t_s = start_scores(q, q2, t_q, t_q2, k, k2, buffers, kj, D1, D2, BLOCK_N, T_Q, T_K)
    warp_scheduler_barrier_arrive(WG)
    if not first:  # the values before, whose release would have kept the scores waiting
        mbarrier.arrive(v_free.index(v_last), count=1)
    if T_S:
        s, t_s = warpgroup_mma_wait(0, deps=[s, t_s])
    else:
        s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(kj), count=1)
    if STAGES_Q > 1:
        stored = await_stores(stored, q_free)

    s, t_s, bj, b_phase = mask_scores(
        WG, s, t_s, buffers, b_ready, b_free, masks, place, scale, scale2, j, bj, b_phase,
        BLOCK_N, STAGES_MASK, LEFT, RIGHT, EDGE, MASK, BOOL,
    )  # fmt: skip
    m, top, l, r, o, t, o2, t2, p, p16, p16_2 = softmax(
        FLAG, s, scale2, m, top, l, r, o, t, o2, t2, q, BLOCK_N, EMPTY, ADD, THRESHOLD, TWO
    )
    v = matrix(buffers[4][0], vj, BLOCK_N, D1)
    v2 = matrix(buffers[4][1], V2_STEP * vj, BLOCK_N, D2) if TWO else None
    v_w2 = side_by_side(buffers[4][1], vj, STAGES_V, BLOCK_N, D2) if PAIR else v2
    if T_S:
        c, r, p_t_s16, p_t_s16_2 = weigh_tangent(t_s, p, p16, c, l, r, scale, first, D2, BLOCK_N)
    mbarrier.wait(v_ready.index(vj), v_phase)
    warp_scheduler_barrier_sync(WG)
    o, o2, t, t2 = start_p_values(
        p16, p16_2, v, v_w2, buffers, vj, o, o2, t, t2, D1, D2, BLOCK_N, T_V
    )
    if T_S:
        t, t2 = start_r_values(p_t_s16, p_t_s16_2, v, v2, t, t2, TWO)
    if TWO:
        o, o2, t, t2 = warpgroup_mma_wait(0, deps=[o, o2, t, t2])
    else:
        o, t = warpgroup_mma_wait(0, deps=[o, t])
    p16 = keep_alive(p16)
    if T_S:
        p_t_s16 = keep_alive(p_t_s16)
    return stored, bj, b_phase, m, top, l, r, o, t, o2, t2, c


@gluon.jit
def _consumer(
    WG: gl.constexpr, o_out, t_out, o_rows, t_rows, mask_row, b_step, h_step, LSE, MU, buffers,
    bars, scale, work,
    D1: gl.constexpr, D2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES_K: gl.constexpr,
    STAGES_V: gl.constexpr, STAGES_Q: gl.constexpr, STAGES_MASK: gl.constexpr,
    OVERLAP_P: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr,
    PAIRS: gl.constexpr, SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    EMPTY: gl.constexpr, EDGE: gl.constexpr, MASK: gl.constexpr, BOOL: gl.constexpr,
    THRESHOLD: gl.constexpr, HIDES: gl.constexpr,
    T_Q: gl.constexpr, T_K: gl.constexpr, T_V: gl.constexpr,
):  # fmt: skip
    """A warpgroup of the two: 64 queries of each work item against all keys they see."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    PAIR: gl.constexpr = D2 == 16 and T_V  # 16 columns take the tensor cores as long as 32
    W2: gl.constexpr = 32 if PAIR else max(D2, 16)
    L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(D2, 16), 16])
    LW2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W2, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    TWO: gl.constexpr = D2 > 0
    FLAG: gl.constexpr = "grown0" if WG == 0 else "grown1"
    T_S: gl.constexpr = T_Q or T_K
    ADD: gl.constexpr = MASK != "none" and not BOOL
    q_ready, q_free, k_ready, _k_free, _v_ready, v_free, _b_ready, _b_free = bars
    scale2 = scale * LOG2E
    kj = 0
    vj = 0
    v_last = 0
    qj = 0
    bj = 0
    k_phase = 0
    v_phase = 0
    q_phase = 0
    b_phase = 0
    stored = 0  # number + 1 of the buffers that the last stores may still read
    declare_flag(FLAG)
    if WG == 1:
        warp_scheduler_barrier_arrive(WG)
    for e in range(work_items(work[8], PAIRS)):
        b, h, q0, L, _k0, S, m0, shift, begin, end, _blocks = work_range(
            e, work, BLOCK_N, LEFT, RIGHT, LOWER_RIGHT, PAIRS, SEQUENCES, BLOCK_Q, BLOCK_K, 4
        )
        m0 += WG * ROWS
        m = gl.full([ROWS], -float("inf"), gl.float32, ROW)
        top = m if ADD else 0
        c = gl.zeros([ROWS], gl.float32, ROW)
        l = lane_sums(gl.zeros([ROWS, BLOCK_N], gl.float32, S_L), BLOCK_N)
        r = l
        o = gl.zeros([ROWS, D1], gl.float32, L1)
        t = gl.zeros([ROWS, D1], gl.float32, L1)
        o2 = gl.zeros([ROWS, W2], gl.float32, LW2) if TWO else 0
        t2 = gl.zeros([ROWS, D2], gl.float32, L2) if TWO else 0
        q = matrix(buffers[0][0], qj + WG, ROWS, D1)
        q2 = matrix(buffers[0][1], qj + WG, ROWS, D2) if TWO else None
        t_q = matrix(buffers[1][0], qj + WG, ROWS, D1)
        t_q2 = matrix(buffers[1][1], qj + WG, ROWS, D2) if TWO else None
        # keys between these are seen by all rows of this warpgroup
        clear_begin = keys_begin(m0 + shift + (ROWS - 1), LEFT)
        clear_end = keys_end(m0 + shift, 1, S, RIGHT, LOWER_RIGHT)
        place = (b, h, m0, S, shift, clear_begin, clear_end)
        mbarrier.wait(q_ready.index(qj + WG), q_phase)
        if not OVERLAP_P:  # what the scores need comes before the barrier
            mbarrier.wait(k_ready.index(kj), k_phase)
            warp_scheduler_barrier_sync(WG)
        for j in range(begin, end):
            if OVERLAP_P:
                stored, bj, b_phase, m, top, l, r, o, t, o2, t2, c = _tile_overlapping_p(
                    WG, FLAG, q, q2, t_q, t_q2, buffers, bars, (mask_row, b_step, h_step),
                    place, scale, scale2, j, j == begin, kj, k_phase, vj, v_phase,
                    stored, bj, b_phase, m, top, l, r, o, t, o2, t2, c,
                    D1, D2, BLOCK_N, STAGES_V, STAGES_Q, STAGES_MASK, LEFT, RIGHT, EMPTY, EDGE,
                    MASK, BOOL, THRESHOLD, T_Q, T_K, T_V,
                )  # fmt: skip
            else:
                stored, bj, b_phase, m, top, l, r, o, t, o2, t2, c = _tile_overlapping_softmax(
                    WG, FLAG, q, q2, t_q, t_q2, buffers, bars, (mask_row, b_step, h_step),
                    place, scale, scale2, j, j == begin, kj, k_phase, vj, v_phase, v_last,
                    stored, bj, b_phase, m, top, l, r, o, t, o2, t2, c,
                    D1, D2, BLOCK_N, STAGES_V, STAGES_Q, STAGES_MASK, LEFT, RIGHT, EMPTY, EDGE,
                    MASK, BOOL, THRESHOLD, T_Q, T_K, T_V,
                )  # fmt: skip
            v_last = vj
            kj, k_phase = advance(kj, k_phase, 1, STAGES_K)
            vj, v_phase = advance(vj, v_phase, 1, STAGES_V)

        if not OVERLAP_P:
            warp_scheduler_barrier_arrive(WG)
            mbarrier.arrive(v_free.index(v_last), count=1)
        l_row = gl.convert_layout(gl.sum(l, 1), ROW)
        r_row = gl.convert_layout(gl.sum(r, 1), ROW)
        l_row = gl.where(l_row == 0.0, 1.0, l_row)  # a row that attends nothing gives 0
        inverse = 1.0 / l_row
        r_row *= inverse
        spoiled = finish(o, t, inverse, r_row, q, t_q, L1, T_S)
        if PAIR:
            o2, p_t_v2 = gl.split(o2.reshape([ROWS, 2, D2]).permute((0, 2, 1)))
            o2 = gl.convert_layout(o2, L2, assert_trivial=True)
            t2 += gl.convert_layout(p_t_v2, L2, assert_trivial=True)
        if TWO:
            spoiled += finish(o2, t2, inverse, r_row, q2, t_q2, L2, T_S)
        fence_async_shared()
        if o_rows is None:
            store_results(o_out, t_out, buffers, b, h, m0, qj + WG, D1, TWO)
        else:
            if m0 + ROWS <= L:
                store_results(o_out, t_out, buffers, b, h, q0 + m0, qj + WG, D1, TWO)
            else:
                columns = o_out[0].shape[3]
                store_part(o_rows, q, b, h, q0 + m0, L - m0, columns, 0, D1)
                store_part(t_rows, t_q, b, h, q0 + m0, L - m0, columns, 0, D1)
                if TWO:
                    store_part(o_rows, q2, b, h, q0 + m0, L - m0, columns, D1, D2)
                    store_part(t_rows, t_q2, b, h, q0 + m0, L - m0, columns, D1, D2)
        i = m0 + gl.arange(0, ROWS, layout=ROW)
        row = first_row(b, h, work[4], work[5]) + q0 + i
        if HIDES:  # NaN where O or tO is not finite: portable/repair.py computes it anew
            m += spoiled
        if ADD:  # the backward pass takes no score to be above the first one
            short = gl.where(top == -float("inf"), 0.0, top - m)
            gl.store(LSE + 2 * row, top + spoiled, mask=i < L)
            gl.store(LSE + 2 * row + 1, gl.log2(l_row) - short, mask=i < L)
        else:
            gl.store(LSE + row, (m + gl.log2(l_row)) * LN2, mask=i < L)
        gl.store(MU + row, r_row + c, mask=i < L)
        if STAGES_Q > 1:
            stored = qj + WG + 1
        else:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(qj + WG), count=1)
        qj, q_phase = advance(qj, q_phase, 2, 2 * STAGES_Q)
    if STAGES_Q > 1:
        tma.store_wait(0)
    if WG == 0:  # the named barriers end balanced
        warp_scheduler_barrier_sync(WG)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def forward_jvp_kernel(
    Q, K, V, T_Q, T_K, T_V, O, T_O, Q2, K2, V2, T_Q2, T_K2, T_V2, O2, T_O2,
    MASK_TILES, T_MASK_TILES, MASK_ROW, b_step, h_step, CU_Q, CU_K, KV_BLOCKS, O_ROWS, T_O_ROWS,
    LSE, MU, scale, H, L, S, sequences, tiles, items,
    GROUP: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, STAGES_Q: gl.constexpr,
    STAGES_MASK: gl.constexpr, OVERLAP_P: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, PAIRS: gl.constexpr,
    SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, EMPTY: gl.constexpr,
    EDGE: gl.constexpr, MASK: gl.constexpr, BOOL: gl.constexpr,
    THRESHOLD: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """D1 + D2 columns; STAGES_K tiles of keys, STAGES_V of values, STAGES_Q pairs of query tiles
    and STAGES_MASK masks in flight; EDGE: a key tile may be cut by the end of the keys or the
    band; EMPTY: a row may see nothing of a tile before it has seen a key. O_ROWS, T_O_ROWS: the
    results once more (pointer, strides), where packed sequences end inside of a tile.
    HIDES: a key of a tile may be hidden from a row."""
    HAS_T_Q: gl.constexpr = T_Q is not None
    HAS_T_K: gl.constexpr = T_K is not None
    HAS_T_V: gl.constexpr = T_V is not None
    ROW_BYTES: gl.constexpr = (D1 + D2) * 2
    if D2 > 0:
        values2 = allocate_stages(V2, 2 * STAGES_V if HAS_T_V else STAGES_V)  # V2, tV2, V2, tV2 ...
    buffers = (
        (allocate_stages(Q, 2 * STAGES_Q), allocate_stages(Q2, 2 * STAGES_Q) if D2 > 0 else None),
        (
            allocate_stages(O, 2 * STAGES_Q),
            allocate_stages(O2, 2 * STAGES_Q) if D2 > 0 else None,
        ),  # tQ, and tO after it
        (allocate_stages(K, STAGES_K), allocate_stages(K2, STAGES_K) if D2 > 0 else None),
        (
            allocate_stages(K, STAGES_K) if HAS_T_K else None,
            allocate_stages(K2, STAGES_K) if HAS_T_K and D2 > 0 else None,
        ),
        (allocate_stages(V, STAGES_V), values2 if D2 > 0 else None),
        (
            allocate_stages(V, STAGES_V) if HAS_T_V else None,
            values2 if HAS_T_V and D2 > 0 else None,
        ),
        allocate_stages(MASK_TILES, 2 * STAGES_MASK) if MASK_TILES is not None else None,
        allocate_stages(MASK_TILES, 2 * STAGES_MASK) if T_MASK_TILES is not None else None,
    )
    x = ((Q, Q2), (T_Q, T_Q2), (K, K2), (T_K, T_K2), (V, V2), (T_V, T_V2))
    bars = (
        barriers(2 * STAGES_Q, 1),
        barriers(2 * STAGES_Q, 1),
        barriers(STAGES_K, 1),
        barriers(STAGES_K, 2),
        barriers(STAGES_V, 1),
        barriers(STAGES_V, 2),
        barriers(STAGES_MASK, 1) if MASK_TILES is not None else None,
        barriers(STAGES_MASK, 2) if MASK_TILES is not None else None,
    )
    work = (CU_Q, CU_K, KV_BLOCKS, sequences, H, L, S, tiles, items)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (0, (O, O2), (T_O, T_O2), O_ROWS, T_O_ROWS, MASK_ROW, b_step, h_step, LSE, MU,
                 buffers, bars, scale, work,
                 D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q, STAGES_MASK, OVERLAP_P,
                 LEFT, RIGHT, LOWER_RIGHT, PAIRS, SEQUENCES, BLOCK_Q, BLOCK_K, EMPTY, EDGE, MASK,
                 BOOL, THRESHOLD, HIDES, HAS_T_Q, HAS_T_K, HAS_T_V),
            ),
            (
                _consumer,
                (1, (O, O2), (T_O, T_O2), O_ROWS, T_O_ROWS, MASK_ROW, b_step, h_step, LSE, MU,
                 buffers, bars, scale, work,
                 D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q, STAGES_MASK, OVERLAP_P,
                 LEFT, RIGHT, LOWER_RIGHT, PAIRS, SEQUENCES, BLOCK_Q, BLOCK_K, EMPTY, EDGE, MASK,
                 BOOL, THRESHOLD, HIDES, HAS_T_Q, HAS_T_K, HAS_T_V),
            ),
            (
                producer,
                (x, MASK_TILES, T_MASK_TILES, b_step, h_step, buffers, bars, work,
                 BLOCK_N, STAGES_K, STAGES_V, STAGES_Q, STAGES_MASK, GROUP, LEFT, RIGHT,
                 LOWER_RIGHT, PAIRS, SEQUENCES, BLOCK_Q, BLOCK_K, MASK, ROW_BYTES),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
