"""A work item of the warp-specialised forward (`forward.py`), and the steps of one tile of keys
that both of its schedules take, in the order of its mathematics. The second piece of a head dim,
which is absent where D2 is 0, has the names with a 2.
"""

# What is known at compile time stands in an `if` of its own.
# ruff: noqa: SIM102

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from ..portable.primitives import LOG2E
from .primitives import (
    ROWS,
    advance,
    any_above,
    exponential,
    is_valid,
    keys_begin,
    keys_end,
    lane_sums,
    listed_rows,
    matrix,
    row_at,
    rows_times,
    scores,
    sequence_numbers,
    sequence_of,
    store_at,
    work_item,
)


@gluon.jit
def work_range(
    e, work, BLOCK_N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, PAIRS: gl.constexpr, SEQUENCES: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A work item: batch entry and head; where its sequence begins among queries and keys, and the
    rows of both; its first query; how far queries are shifted in the band; its first tile of keys
    and the one behind its last; the list of blocks that it sees."""
    CU_Q, CU_K, KV_BLOCKS, sequences, H, L, S, tiles, items = work
    b, h, tile = work_item(e, tiles, H, PAIRS, None if CU_Q is None else items // tiles)
    q0 = 0
    k0 = 0
    shift = 0
    blocks = 0
    if CU_Q is not None:
        n = sequence_numbers(SEQUENCES, WARPS)
        tile, q0, L, k0, S = sequence_of(
            CU_Q, CU_Q if CU_K is None else CU_K, tile, n, L, S, sequences, 2 * ROWS
        )
    m0 = tile * 2 * ROWS
    if LOWER_RIGHT:
        shift = S - L
    if CU_Q is not None:
        S = gl.where(m0 < L, S, 0)
    if KV_BLOCKS is not None:
        blocks = row_at(KV_BLOCKS, b, h, m0 // BLOCK_Q)
        S = listed_rows(blocks, S, BLOCK_K)
    begin = keys_begin(m0 + shift, LEFT) // BLOCK_N
    end = (keys_end(m0 + shift, 2 * ROWS, S, RIGHT, LOWER_RIGHT) + BLOCK_N - 1) // BLOCK_N
    if LEFT is not None or CU_Q is not None or KV_BLOCKS is not None:
        end = max(end, begin + 1)
    return b, h, q0, L, k0, S, m0, shift, begin, end, blocks


@gluon.jit
def start_scores(
    q, q2, t_q, t_q2, k, k2, buffers, kj, D1: gl.constexpr, D2: gl.constexpr, BLOCK_N: gl.constexpr,
    T_Q: gl.constexpr, T_K: gl.constexpr,
):  # fmt: skip
    """S and tS, not awaited."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    s = scores(q, k, q2, k2, gl.zeros([ROWS, BLOCK_N], gl.float32, S_L), True)
    t_s = gl.zeros([ROWS, BLOCK_N], gl.float32, S_L)
    if T_Q:
        t_s = scores(t_q, k, t_q2, k2, t_s, True)
    if T_K:
        t_k = matrix(buffers[3][0], kj, BLOCK_N, D1)
        t_k2 = matrix(buffers[3][1], kj, BLOCK_N, D2) if D2 > 0 else None
        t_s = scores(q, t_k, q2, t_k2, t_s, not T_Q)
    return s, t_s


@gluon.jit
def mask_scores(
    WG: gl.constexpr, s, t_s, buffers, b_ready, b_free, masks, place, scale, scale2, j, bj, b_phase,
    BLOCK_N: gl.constexpr, STAGES_MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    EDGE: gl.constexpr, MASK: gl.constexpr, BOOL: gl.constexpr,
):  # fmt: skip
    """S with its mask, in base 2 beside an added one; tS with the mask's tangent. Hidden pairs keep
    their tS: P is 0 there, and a tS that is not finite spoils the row, as such a V does."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ADD: gl.constexpr = MASK != "none" and not BOOL
    mask_row, b_step, h_step = masks
    b, h, m0, S, shift, clear_begin, clear_end = place
    if MASK == "full":
        mbarrier.wait(b_ready.index(bj), b_phase)
        mask = buffers[6].index(2 * bj + WG).reshape((ROWS, BLOCK_N)).load(S_L)
        if buffers[7] is not None:  # tS is multiplied by the scale later
            t_mask = buffers[7].index(2 * bj + WG).reshape((ROWS, BLOCK_N)).load(S_L)
            t_s += t_mask.to(gl.float32) * (1.0 / scale)
        fence_async_shared()  # all is read before TMA writes there again
        mbarrier.arrive(b_free.index(bj), count=1)
        bj, b_phase = advance(bj, b_phase, 1, STAGES_MASK)
    elif MASK == "keys":
        COLUMN: gl.constexpr = gl.SliceLayout(0, S_L)
        at = j * BLOCK_N + gl.arange(0, BLOCK_N, layout=COLUMN)
        at_b = b.to(gl.int64) * b_step + h.to(gl.int64) * h_step
        mask = gl.expand_dims(gl.load(mask_row + at_b + at, mask=at < S, other=0), 0)
    if BOOL:
        s = gl.where(mask != 0, s, -float("inf"))
    if ADD:
        mask = mask.to(gl.float32)
        added = gl.where(mask < -2e38, -3e38, mask * LOG2E)
        s = gl.where(mask == -float("inf"), -float("inf"), s * scale2 + added)
    edge = (j + 1) * BLOCK_N > clear_end
    if LEFT is not None:
        edge = edge | (j * BLOCK_N < clear_begin)
    if EDGE:
        if edge:
            valid = is_valid(m0, j * BLOCK_N, S, BLOCK_N, S_L, LEFT, RIGHT, shift)
            s = gl.where(valid, s, -float("inf"))
    return s, t_s, bj, b_phase


@gluon.jit
def softmax(
    FLAG: gl.constexpr, s, scale2, m, top, l, r, o, t, o2, t2, q, BLOCK_N: gl.constexpr,
    EMPTY: gl.constexpr, ADD: gl.constexpr, THRESHOLD: gl.constexpr, TWO: gl.constexpr,
):  # fmt: skip
    """P, also in 16 bits as an operand of either piece, and what was summed so far, rescaled where
    a maximum has grown; l with the new row sums. EMPTY: rows may have seen nothing yet. top: the
    maximum itself, which m may fall short of by THRESHOLD."""
    L1: gl.constexpr = o.type.layout
    m_new = gl.max(s, 1)
    if not ADD:
        m_new *= scale2
    m_new = gl.maximum(m, m_new)
    if ADD:
        top = gl.maximum(top, m_new)
    grown = m_new - m
    if EMPTY:  # from nothing to nothing is no growth, not NaN
        grown = gl.where(m_new == -float("inf"), 0.0, grown)
    if any_above(grown, THRESHOLD, FLAG):
        base = m_new
        if EMPTY:
            base = gl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = gl.exp2(m - base)
        m = m_new
        alpha4 = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout)), 1)
        l = l * alpha4
        r = r * alpha4
        o = rows_times(o, alpha, L1)
        t = rows_times(t, alpha, L1)
        if TWO:
            LW2: gl.constexpr = o2.type.layout
            L2: gl.constexpr = t2.type.layout
            o2 = rows_times(o2, alpha, LW2)
            t2 = rows_times(t2, alpha, L2)
    base = m
    if EMPTY:
        base = gl.where(m == -float("inf"), 0.0, m)
    p = exponential(s, scale2, base, ADD)
    l = l + lane_sums(p, BLOCK_N)
    p16 = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, L1, 2), assert_trivial=True)
    p16_2 = 0
    if TWO:
        PW2: gl.constexpr = gl.DotOperandLayout(0, o2.type.layout, 2)
        p16_2 = gl.convert_layout(p16, PW2, assert_trivial=True)
    return m, top, l, r, o, t, o2, t2, p, p16, p16_2


@gluon.jit
def start_p_values(
    p16, p16_2, v, v_w2, buffers, vj, o, o2, t, t2, D1: gl.constexpr, D2: gl.constexpr,
    BLOCK_N: gl.constexpr, T_V: gl.constexpr,
):  # fmt: skip
    """P V and P tV, not awaited."""
    o = warpgroup_mma(p16, v, o, is_async=True)
    if D2 > 0:
        o2 = warpgroup_mma(p16_2, v_w2, o2, is_async=True)
    if T_V:
        t = warpgroup_mma(p16, matrix(buffers[5][0], vj, BLOCK_N, D1), t, is_async=True)
        if D2 > 16:
            t_v2 = matrix(buffers[5][1], 2 * vj + 1, BLOCK_N, D2)
            t2 = warpgroup_mma(p16_2, t_v2, t2, is_async=True)
    return o, o2, t, t2


@gluon.jit
def weigh_tangent(
    t_s, p, p16, c, l, r, scale, first, D2: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """P ∘ (tS − c) in 16 bits as an operand of either piece, its row sums in r. The first tile
    gives c, its mean of tS weighted by P, whose row sums are l."""
    if first:
        sums = gl.convert_layout(gl.sum(lane_sums(p * t_s, BLOCK_N), 1), c.type.layout)
        weight = gl.convert_layout(gl.sum(l, 1), c.type.layout)
        c = sums * scale / gl.where(weight == 0.0, 1.0, weight)
    p_t_s = p * (t_s * scale - gl.expand_dims(c, 1))
    r = r + lane_sums(p_t_s, BLOCK_N)
    p_t_s16 = gl.convert_layout(p_t_s.to(p16.dtype), p16.type.layout, assert_trivial=True)
    p_t_s16_2 = 0
    if D2 > 0:
        L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2, 16])
        P2: gl.constexpr = gl.DotOperandLayout(0, L2, 2)
        p_t_s16_2 = gl.convert_layout(p_t_s16, P2, assert_trivial=True)
    return c, r, p_t_s16, p_t_s16_2


@gluon.jit
def start_r_values(p_t_s16, p_t_s16_2, v, v2, t, t2, TWO: gl.constexpr):
    """P ∘ (tS − c) V, not awaited."""
    t = warpgroup_mma(p_t_s16, v, t, is_async=True)
    if TWO:
        t2 = warpgroup_mma(p_t_s16_2, v2, t2, is_async=True)
    return t, t2


@gluon.jit
def finish(o, t, inverse, r, q, t_q, L_O: gl.constexpr, T_S: gl.constexpr):
    """O and tO from the accumulators, into the buffers that held Q and tQ. By row 0, or NaN where a
    result is not finite."""
    o = rows_times(o, inverse, L_O)
    t = rows_times(t, inverse, L_O)
    if T_S:
        t -= rows_times(o, r, L_O)
    q.store(o.to(q.dtype))
    t_q.store(t.to(q.dtype))
    spoiled = gl.sum((o + t) * 0.0, 1)
    return gl.convert_layout(spoiled, inverse.type.layout, assert_trivial=True)


@gluon.jit
def store_results(o_out, t_out, buffers, b, h, row, slot, D1: gl.constexpr, TWO: gl.constexpr):
    """O and tO of a warpgroup, not awaited."""
    store_at(o_out[0], b, h, row, 0, buffers[0][0].index(slot))
    store_at(t_out[0], b, h, row, 0, buffers[1][0].index(slot))
    if TWO:
        store_at(o_out[1], b, h, row, D1, buffers[0][1].index(slot))
        store_at(t_out[1], b, h, row, D1, buffers[1][1].index(slot))
