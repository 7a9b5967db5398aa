"""Gradients of keys and values of (O, tO) on Hopper: the second launch of `backward.py`, with one
role a warp as in `hopper.py`. Tiles are transposed, keys by queries.

    S   = s Q Kᵀ                  tS = s (tQ Kᵀ + Q tKᵀ)      P = exp(S − LSE)
    Hm  = dtO Vᵀ − h              G  = dO Vᵀ + dtO tVᵀ        R = P ∘ (tS − μ)
    dtS = P ∘ Hm                  dS = P ∘ (G + Hm ∘ (tS − μ) − w)
    dK  = s (dSᵀ Q + dtSᵀ tQ)     dtK = s dtSᵀ Q              dV = Pᵀ dO + Rᵀ dtO     dtV = Pᵀ dtO

A consumer owns 64 keys and walks over the queries of all heads that read them. A tile is two blocks
of products, scores and gradients; the blocks [gradients of tile j, scores of tile j + 1] of the two
warpgroups alternate. Head dims up to 64, no mask: four accumulators and four tiles of 32 queries
are what 240 registers hold.
"""

# Triton's annotations name what a kernel receives, not what its caller passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false
# What is known at compile time stands in an `if` of its own.
# ruff: noqa: SIM102

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_primitives import (
    ROWS,
    advance,
    await_turn,
    barriers,
    give_turn,
    keep_alive,
    load,
    matrix,
    ring,
    store,
    work_item,
    work_items,
)
from .primitives import LOG2E


@gluon.jit
def _producer(
    Q, T_Q, D_O, D_T_O, K, T_K, V, T_V, rings, bars, L, Hk, tiles, items,
    BM: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The warp that fetches."""
    q, t_q, d_o, d_t_o, k, t_k, v, t_v = rings
    q_ready, q_free, k_ready, k_free = bars
    QUERIES: gl.constexpr = 4 if D_O is not None else 3
    qj = 0
    kj = 0
    q_phase = 1
    k_phase = 1
    for e in range(work_items(items, False)):
        b, hk, tile = work_item(e, tiles, Hk, False)
        for g in gl.static_range(2):
            mbarrier.wait(k_free.index(kj + g), k_phase)
            k_bar = k_ready.index(kj + g)
            mbarrier.expect(k_bar, 4 * K.block_type.nbytes)
            rows = [b, hk, (2 * tile + g) * ROWS, 0]
            load(K, rows, k_bar, k.index(kj + g))
            load(T_K, rows, k_bar, t_k.index(kj + g))
            load(V, rows, k_bar, v.index(kj + g))
            load(T_V, rows, k_bar, t_v.index(kj + g))
        kj, k_phase = advance(kj, k_phase, 2, 2 * KS)
        for h in range(hk * GROUP, (hk + 1) * GROUP):
            for j in range((L + BM - 1) // BM):
                mbarrier.wait(q_free.index(qj), q_phase)
                ready = q_ready.index(qj)
                mbarrier.expect(ready, QUERIES * Q.block_type.nbytes)
                at = [b, h, j * BM, 0]
                load(Q, at, ready, q.index(qj))
                load(T_Q, at, ready, t_q.index(qj))
                load(D_T_O, at, ready, d_t_o.index(qj))
                if D_O is not None:
                    load(D_O, at, ready, d_o.index(qj))
                qj, q_phase = advance(qj, q_phase, 1, QS)


@gluon.jit
def _consumer(
    WG: gl.constexpr, D_K, D_T_K, D_V, D_T_V, STATISTICS, rings, bars, scale, L, Hk, tiles, items,
    D: gl.constexpr, BM: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr, GROUP: gl.constexpr,
    HAS_D_O: gl.constexpr,
):  # fmt: skip
    """A warpgroup of the two: 64 keys of each work item against all queries that see them.
    STATISTICS: by head four rows, LSE in base 2, μ, h and w, padded with LSE = inf, hence P = 0."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    D_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, D_L, 2)
    QUERY: gl.constexpr = gl.SliceLayout(0, S_L)
    DT: gl.constexpr = rings[0].dtype
    q_ring, t_q_ring, d_o_ring, d_t_o_ring, k_ring, t_k_ring, v_ring, t_v_ring = rings
    q_ready, q_free, k_ready, k_free = bars
    scale2 = scale * LOG2E
    qj = 0
    kj = 0
    q_phase = 0
    k_phase = 0
    started = 0
    for e in range(work_items(items, False)):
        b, hk, tile = work_item(e, tiles, Hk, False)
        d_k = gl.zeros([ROWS, D], gl.float32, D_L)
        d_t_k = gl.zeros([ROWS, D], gl.float32, D_L)
        d_v = gl.zeros([ROWS, D], gl.float32, D_L)
        d_t_v = gl.zeros([ROWS, D], gl.float32, D_L)
        k = matrix(k_ring, kj + WG, ROWS, D)
        t_k = matrix(t_k_ring, kj + WG, ROWS, D)
        v = matrix(v_ring, kj + WG, ROWS, D)
        t_v = matrix(t_v_ring, kj + WG, ROWS, D)
        mbarrier.wait(k_ready.index(kj + WG), k_phase)
        for h in range(hk * GROUP, (hk + 1) * GROUP):
            padded = (L + ROWS - 1) // ROWS * ROWS
            row = STATISTICS + (b * Hk * GROUP + h).to(gl.int64) * 4 * padded
            for j in range((L + BM - 1) // BM):
                q = matrix(q_ring, qj, BM, D)
                t_q = matrix(t_q_ring, qj, BM, D)
                d_t_o = matrix(d_t_o_ring, qj, BM, D)
                zero = gl.zeros([ROWS, BM], gl.float32, S_L)
                mbarrier.wait(q_ready.index(qj), q_phase)
                s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                t_s = warpgroup_mma(k, t_q.permute((1, 0)), zero, use_acc=False, is_async=True)
                t_s = warpgroup_mma(t_k, q.permute((1, 0)), t_s, is_async=True)
                d_t_o_t = d_t_o.permute((1, 0))
                h_m = warpgroup_mma(v, d_t_o_t, zero, use_acc=False, is_async=True)
                g = warpgroup_mma(t_v, d_t_o_t, zero, use_acc=False, is_async=True)
                if HAS_D_O:
                    d_o = matrix(d_o_ring, qj, BM, D)
                    g = warpgroup_mma(v, d_o.permute((1, 0)), g, is_async=True)
                if WG == 1:
                    give_turn(WG)
                else:
                    if started > 0:
                        give_turn(WG)
                    started = 1
                i = j * BM + gl.arange(0, BM, layout=QUERY)
                lse = gl.load(row + i)
                mu = gl.load(row + padded + i)
                s, t_s, h_m, g = warpgroup_mma_wait(0, deps=[s, t_s, h_m, g])

                p = gl.exp2(s * scale2 - gl.expand_dims(lse, 0))
                t_s = t_s * scale - gl.expand_dims(mu, 0)
                h_m = h_m - gl.expand_dims(gl.load(row + 2 * padded + i), 0)
                w = gl.load(row + 3 * padded + i)
                d_s = p * (g - gl.expand_dims(w, 0) + h_m * t_s)
                p16 = gl.convert_layout(p.to(DT), P_L, assert_trivial=True)
                r16 = gl.convert_layout((p * t_s).to(DT), P_L, assert_trivial=True)
                d_t_s16 = gl.convert_layout((p * h_m).to(DT), P_L, assert_trivial=True)
                d_s16 = gl.convert_layout(d_s.to(DT), P_L, assert_trivial=True)

                await_turn(WG)
                d_t_v = warpgroup_mma(p16, d_t_o, d_t_v, is_async=True)
                d_v = warpgroup_mma(r16, d_t_o, d_v, is_async=True)
                if HAS_D_O:
                    d_v = warpgroup_mma(p16, d_o, d_v, is_async=True)
                d_t_k = warpgroup_mma(d_t_s16, q, d_t_k, is_async=True)
                d_k = warpgroup_mma(d_t_s16, t_q, d_k, is_async=True)
                d_k = warpgroup_mma(d_s16, q, d_k, is_async=True)
                d_k, d_t_k, d_v, d_t_v = warpgroup_mma_wait(0, deps=[d_k, d_t_k, d_v, d_t_v])
                p16 = keep_alive(p16)
                r16 = keep_alive(r16)
                d_t_s16 = keep_alive(d_t_s16)
                d_s16 = keep_alive(d_s16)
                mbarrier.arrive(q_free.index(qj), count=1)
                qj, q_phase = advance(qj, q_phase, 1, QS)

        # results leave through the buffers of what was read
        k.store((d_k * scale).to(DT))
        t_k.store((d_t_k * scale).to(DT))
        v.store(d_v.to(DT))
        t_v.store(d_t_v.to(DT))
        fence_async_shared()
        at = [b, hk, (2 * tile + WG) * ROWS, 0]
        store(D_K, at, k_ring.index(kj + WG))
        store(D_T_K, at, t_k_ring.index(kj + WG))
        store(D_V, at, v_ring.index(kj + WG))
        store(D_T_V, at, t_v_ring.index(kj + WG))
        tma.store_wait(0)
        mbarrier.arrive(k_free.index(kj + WG), count=1)
        kj, k_phase = advance(kj, k_phase, 2, 2 * KS)
    if WG == 0:  # the named barriers end balanced
        if started > 0:
            give_turn(WG)


@gluon.jit(do_not_specialize=("L", "Hk", "tiles", "items"))
def keys_jvp_kernel(
    Q, K, V, T_Q, T_K, T_V, D_O, D_T_O, STATISTICS, D_K, D_T_K, D_V, D_T_V,
    scale, L, Hk, tiles, items,
    GROUP: gl.constexpr, BM: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr,
):  # fmt: skip
    """Rings of QS tiles of queries and KS pairs of key tiles; dO may be absent."""
    D: gl.constexpr = 64
    HAS_D_O: gl.constexpr = D_O is not None
    rings = (
        ring(Q, QS),
        ring(Q, QS),
        ring(Q, QS) if HAS_D_O else None,
        ring(Q, QS),
        ring(K, 2 * KS),
        ring(K, 2 * KS),
        ring(V, 2 * KS),
        ring(V, 2 * KS),
    )
    bars = (barriers(QS, 1), barriers(QS, 2), barriers(2 * KS, 1), barriers(2 * KS, 1))
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (0, D_K, D_T_K, D_V, D_T_V, STATISTICS, rings, bars, scale, L, Hk, tiles, items,
                 D, BM, QS, KS, GROUP, HAS_D_O),
            ),
            (
                _consumer,
                (1, D_K, D_T_K, D_V, D_T_V, STATISTICS, rings, bars, scale, L, Hk, tiles, items,
                 D, BM, QS, KS, GROUP, HAS_D_O),
            ),
            (
                _producer,
                (Q, T_Q, D_O, D_T_O, K, T_K, V, T_V, rings, bars, L, Hk, tiles, items,
                 BM, QS, KS, GROUP),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
