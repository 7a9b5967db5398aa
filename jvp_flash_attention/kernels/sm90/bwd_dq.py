"""Gradients of queries of (O, tO) on Hopper: the third launch of a backward, with one role a
warp.

    S   = s Q Kᵀ                  tS = s (tQ Kᵀ + Q tKᵀ)
    P   = exp(S − LSE)            R  = P ∘ (tS − μ)
    Hm  = dtO Vᵀ − h              G  = dO Vᵀ + dtO tVᵀ
    dtS = P ∘ Hm                  dS = P ∘ (G − w) + R ∘ Hm
    dQ  = s (dS K + dtS tK)       dtQ = s dtS K

The mirror image of `bwd_dkdv.py`: the two warpgroups share 64 queries, one computes S and tS and
passes P and R on through shared memory, the other the rest. At head dims up to 64 the portable
kernel, whose warpgroups own queries of their own, is as fast, but beside a window and a band of
packed sequences, where its tiles are narrow and all checked.
"""

# Each role unpacks all buffers and barriers, by name, and uses its own. What is known at compile
# time stands in an `if` of its own.
# ruff: noqa: RUF059, SIM102

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
from .bwd_primitives import (
    add_products,
    any_not_finite,
    bwd_barriers,
    clear_behind,
    fetch,
    load_p,
    make_finite,
    seen_row,
    seen_rows,
    store_p,
    store_rows,
    tile_of,
)
from .primitives import (
    ROWS,
    advance,
    allocate_stages,
    declare_flag,
    first_row,
    is_crossed,
    is_valid,
    key_tiles,
    matrix,
    smem_tile,
    tiles_of,
    work_items,
)


@gluon.jit
def _producer(
    queries, keys, buffers, bars, work,
    BLOCK_N: gl.constexpr, STAGES_K: gl.constexpr, GROUP: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, PAIRS: gl.constexpr,
    SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The warp that fetches. queries: Q, tQ, dtO, dO; keys: K, tK, V, tV."""
    q, t_q, d_o, d_t_o, k, t_k, v, t_v = buffers
    q_ready, q_free, k_ready, k_free, p_ready, p_free = bars
    slot = 0
    phase = 1
    q_phase = 1
    for e in range(work_items(work[8], PAIRS)):
        b, h, _n, m0, q0, L, k0, S = tile_of(e, work, PAIRS, SEQUENCES, 1)
        fetch(queries, (q, t_q, d_t_o, d_o), q_ready, q_free, [b, h, q0 + m0, 0], 0, q_phase)
        q_phase ^= 1
        shift = S - L if LOWER_RIGHT else 0
        blocks, seen = seen_rows(work[2], b, h, m0, S, BLOCK_Q, BLOCK_K)
        first, end = key_tiles(m0 + shift, seen, BLOCK_N, LEFT, RIGHT, LOWER_RIGHT)
        for j in range(first, end):
            at = [b, h // GROUP, k0 + seen_row(work[2], blocks, j * BLOCK_N, BLOCK_K), 0]
            fetch(keys, (k, t_k, v, t_v), k_ready, k_free, at, slot, phase)
            slot, phase = advance(slot, phase, 1, STAGES_K)


@gluon.jit
def _keep_valid(
    x, y, m0, n0, S, shift, BLOCK_N: gl.constexpr, S_L: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Two tiles of pairs, 0 where a pair does not count."""
    crossed = n0 + BLOCK_N > S
    if LEFT is not None or RIGHT is not None:
        crossed = crossed | is_crossed(m0 + shift, n0, ROWS, BLOCK_N, LEFT, RIGHT)
    if crossed:
        valid = is_valid(m0, n0, S, BLOCK_N, S_L, LEFT, RIGHT, shift)
        x = gl.where(valid, x, 0.0)
        y = gl.where(valid, y, 0.0)
    return x, y


@gluon.jit
def _scores(
    STATISTICS, buffers, bars, p_tile, r_tile, scale, work,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES_K: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, PAIRS: gl.constexpr, SEQUENCES: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """The warpgroup of S and tS."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    Q_L: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    K_L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    (
        q_buffers, t_q_buffers, d_o_buffers, d_t_o_buffers,
        k_buffers, t_k_buffers, v_buffers, t_v_buffers,
    ) = buffers  # fmt: skip
    q_ready, q_free, k_ready, k_free, p_ready, p_free = bars
    scale2 = scale * LOG2E
    CU, _, lists, sequences, H, L_all, _, _, items = work
    padded = tiles_of(CU, L_all, ROWS, sequences) * ROWS
    if LEFT is not None or RIGHT is not None:
        declare_flag("spoiled")
    slot = 0
    phase = 0
    q_phase = 0
    p_phase = 1
    for e in range(work_items(items, PAIRS)):
        b, h, n, m0, q0, L, k0, S = tile_of(e, work, PAIRS, SEQUENCES, 4)
        shift = S - L if LOWER_RIGHT else 0
        row = STATISTICS + first_row(b, h, H, 4) * padded + (q0 // ROWS + n) * ROWS
        i = m0 + gl.arange(0, ROWS, layout=ROW)
        lse = gl.load(row + i)
        mu = gl.load(row + padded + i)
        q = matrix(q_buffers, 0, ROWS, D)
        t_q = matrix(t_q_buffers, 0, ROWS, D)
        mbarrier.wait(q_ready.index(0), q_phase)
        q = q.load(Q_L)  # registers: shared memory is wanted longer than the tensor cores
        t_q = t_q.load(Q_L)
        blocks, seen = seen_rows(lists, b, h, m0, S, BLOCK_Q, BLOCK_K)
        first, end = key_tiles(m0 + shift, seen, BLOCK_N, LEFT, RIGHT, LOWER_RIGHT)
        for j in range(first, end):
            n0 = seen_row(lists, blocks, j * BLOCK_N, BLOCK_K)
            k = matrix(k_buffers, slot, BLOCK_N, D)
            t_k = matrix(t_k_buffers, slot, BLOCK_N, D)
            zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S_L)
            mbarrier.wait(k_ready.index(slot), phase)
            if CU is not None:
                if n0 + BLOCK_N > S:
                    clear_behind(k, S - n0, D)
                    clear_behind(t_k, S - n0, D)
            s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            t_s = warpgroup_mma(t_q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            t_s = warpgroup_mma(q, t_k.permute((1, 0)), t_s, is_async=True)
            s = warpgroup_mma_wait(2, deps=[s])
            p = gl.exp2(s * scale2 - gl.expand_dims(lse, 1))
            t_s = warpgroup_mma_wait(0, deps=[t_s])
            if LEFT is not None or RIGHT is not None:
                # rows that do not see a key do not feel it, whatever it holds
                if is_crossed(m0 + shift, n0, ROWS, BLOCK_N, LEFT, RIGHT):
                    if any_not_finite(s, t_s, BLOCK_N):
                        make_finite(k, K_L)
                        make_finite(t_k, K_L)
            mbarrier.arrive(k_free.index(slot), count=1)
            r = p * (t_s * scale - gl.expand_dims(mu, 1))
            if EDGE:
                p, r = _keep_valid(p, r, m0, n0, S, shift, BLOCK_N, S_L, LEFT, RIGHT)
            store_p(p, r, p_tile, r_tile, p_ready, p_free, p_phase)
            p_phase ^= 1
            slot, phase = advance(slot, phase, 1, STAGES_K)
        fence_async_shared()  # Q and tQ are read before TMA writes there again
        mbarrier.arrive(q_free.index(0), count=1)
        q_phase ^= 1


@gluon.jit
def _gradients(
    d_q_out, d_t_q_out, STATISTICS, buffers, bars, p_tile, r_tile, scale, work,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES_K: gl.constexpr, HAS_D_O: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, PAIRS: gl.constexpr,
    SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The warpgroup of Hm, G, dQ and dtQ."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    D_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, D_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    DT: gl.constexpr = buffers[0].dtype
    (
        q_buffers, t_q_buffers, d_o_buffers, d_t_o_buffers,
        k_buffers, t_k_buffers, v_buffers, t_v_buffers,
    ) = buffers  # fmt: skip
    q_ready, q_free, k_ready, k_free, p_ready, p_free = bars
    CU, _, lists, sequences, H, L_all, _, _, items = work
    padded = tiles_of(CU, L_all, ROWS, sequences) * ROWS
    slot = 0
    phase = 0
    q_phase = 0
    p_phase = 0
    for e in range(work_items(items, PAIRS)):
        b, h, n, m0, q0, L, k0, S = tile_of(e, work, PAIRS, SEQUENCES, 4)
        shift = S - L if LOWER_RIGHT else 0
        row = STATISTICS + first_row(b, h, H, 4) * padded + (q0 // ROWS + n) * ROWS
        i = m0 + gl.arange(0, ROWS, layout=ROW)
        h_sum = gl.load(row + 2 * padded + i)
        w = gl.load(row + 3 * padded + i)
        d_q = gl.zeros([ROWS, D], gl.float32, D_L)
        d_t_q = gl.zeros([ROWS, D], gl.float32, D_L)
        if HAS_D_O:
            d_o = matrix(d_o_buffers, 0, ROWS, D)
        d_t_o = matrix(d_t_o_buffers, 0, ROWS, D)
        mbarrier.wait(q_ready.index(0), q_phase)
        blocks, seen = seen_rows(lists, b, h, m0, S, BLOCK_Q, BLOCK_K)
        first, end = key_tiles(m0 + shift, seen, BLOCK_N, LEFT, RIGHT, LOWER_RIGHT)
        for j in range(first, end):
            n0 = seen_row(lists, blocks, j * BLOCK_N, BLOCK_K)
            k = matrix(k_buffers, slot, BLOCK_N, D)
            t_k = matrix(t_k_buffers, slot, BLOCK_N, D)
            v_t = matrix(v_buffers, slot, BLOCK_N, D).permute((1, 0))
            t_v_t = matrix(t_v_buffers, slot, BLOCK_N, D).permute((1, 0))
            zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S_L)
            mbarrier.wait(k_ready.index(slot), phase)
            if CU is not None:  # K and tK, read behind P, are the other warpgroup's to clear
                if n0 + BLOCK_N > S:
                    clear_behind(matrix(v_buffers, slot, BLOCK_N, D), S - n0, D)
                    clear_behind(matrix(t_v_buffers, slot, BLOCK_N, D), S - n0, D)
            h_m = warpgroup_mma(d_t_o, v_t, zero, use_acc=False, is_async=True)
            g = warpgroup_mma(d_t_o, t_v_t, zero, use_acc=False, is_async=True)
            if HAS_D_O:
                g = warpgroup_mma(d_o, v_t, g, is_async=True)
            h_m, g = warpgroup_mma_wait(0, deps=[h_m, g])
            h_m = h_m - gl.expand_dims(h_sum, 1)
            g = g - gl.expand_dims(w, 1)
            d_t_s, d_s = load_p(h_m, g, p_tile, r_tile, p_ready, p_free, p_phase, S_L)
            p_phase ^= 1
            if LEFT is not None or RIGHT is not None:
                d_t_s, d_s = _keep_valid(d_t_s, d_s, m0, n0, S, shift, BLOCK_N, S_L, LEFT, RIGHT)
            d_q, d_t_q = add_products(d_s, d_t_s, k, t_k, d_q, d_t_q, P_L)
            mbarrier.arrive(k_free.index(slot), count=1)
            slot, phase = advance(slot, phase, 1, STAGES_K)
        # through the buffer of dtO, which this warpgroup alone reads
        d_t_o.store((d_q * scale).to(DT))
        fence_async_shared()
        store_rows(*d_q_out, d_t_o, d_t_o_buffers.index(0), b, h, q0 + m0, L - m0, D)
        tma.store_wait(0)
        d_t_o.store((d_t_q * scale).to(DT))
        fence_async_shared()
        store_rows(*d_t_q_out, d_t_o, d_t_o_buffers.index(0), b, h, q0 + m0, L - m0, D)
        tma.store_wait(0)
        mbarrier.arrive(q_free.index(0), count=1)
        q_phase ^= 1


@gluon.jit(do_not_specialize=("H", "L", "S", "sequences", "tiles", "items"))
def bwd_dq_jvp_kernel(
    Q, K, V, T_Q, T_K, T_V, D_O, D_T_O, STATISTICS, CU_Q, CU_K, KV_BLOCKS,
    D_Q, D_T_Q, D_Q_ROWS, D_T_Q_ROWS,
    scale, H, L, S, sequences, tiles, items,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES_K: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, PAIRS: gl.constexpr,
    SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """STAGES_K tiles of keys in flight, one set of queries; dO may be absent. D_Q_ROWS, D_T_Q_ROWS:
    as `bwd_primitives.store_rows` takes them."""
    HAS_D_O: gl.constexpr = D_O is not None
    buffers = (
        allocate_stages(Q, 1),
        allocate_stages(Q, 1),
        allocate_stages(Q, 1) if HAS_D_O else None,
        allocate_stages(Q, 1),
        allocate_stages(K, STAGES_K),
        allocate_stages(K, STAGES_K),
        allocate_stages(V, STAGES_K),
        allocate_stages(V, STAGES_K),
    )
    bars = bwd_barriers(1, STAGES_K)
    p_tile = smem_tile(BLOCK_N)
    r_tile = smem_tile(BLOCK_N)
    if CU_K is None:
        work = (CU_Q, CU_Q, KV_BLOCKS, sequences, H, L, S, tiles, items)
    else:
        work = (CU_Q, CU_K, KV_BLOCKS, sequences, H, L, S, tiles, items)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _gradients,
                ((D_Q, D_Q_ROWS), (D_T_Q, D_T_Q_ROWS), STATISTICS, buffers, bars, p_tile, r_tile,
                 scale, work, D, BLOCK_N, STAGES_K, HAS_D_O, LEFT, RIGHT, LOWER_RIGHT, PAIRS,
                 SEQUENCES, BLOCK_Q, BLOCK_K),
            ),
            (
                _scores,
                (STATISTICS, buffers, bars, p_tile, r_tile, scale, work, D, BLOCK_N, STAGES_K,
                 LEFT, RIGHT, LOWER_RIGHT, PAIRS, SEQUENCES, BLOCK_Q, BLOCK_K, EDGE),
            ),
            (
                _producer,
                ((Q, T_Q, D_T_O, D_O), (K, T_K, V, T_V), buffers, bars, work, BLOCK_N, STAGES_K,
                 GROUP, LEFT, RIGHT, LOWER_RIGHT, PAIRS, SEQUENCES, BLOCK_Q, BLOCK_K),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
