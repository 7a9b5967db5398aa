"""Gradients of the queries of (O, tO) on Hopper: the third launch of `backward.py`, with one role a
warp as in `hopper.py`.

    S   = s Q Kᵀ                  tS = s (tQ Kᵀ + Q tKᵀ)      P = exp(S − LSE)
    Hm  = dtO Vᵀ − h              G  = dO Vᵀ + dtO tVᵀ
    dtS = P ∘ Hm                  dS = P ∘ (G + Hm ∘ (tS − μ) − w)
    dQ  = s (dS K + dtS tK)       dtQ = s dtS K

A consumer's tile is two blocks of products: the six above, then the three of dQ and dtQ. The blocks
[gradients of tile j, scores of tile j + 1] of the two warpgroups alternate. Four tiles of scores
and two accumulators are what 240 registers hold at head dims up to 64.
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
    exponential,
    give_turn,
    keep_alive,
    load,
    matrix,
    ring,
    store,
    visible,
    work_item,
    work_items,
)
from .primitives import LOG2E


@gluon.jit
def _producer(
    Q, T_Q, D_O, D_T_O, K, T_K, V, T_V, rings, bars, S, H, tiles, items,
    BN: gl.constexpr, KS: gl.constexpr, QS: gl.constexpr, GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """The warp that fetches."""
    q, t_q, d_o, d_t_o, k, t_k, v, t_v = rings
    q_ready, q_free, k_ready, k_free, v_ready, v_free = bars
    QUERIES: gl.constexpr = 4 if D_O is not None else 3
    qj = 0
    kj = 0
    vj = 0
    q_phase = 1
    k_phase = 1
    v_phase = 1
    for e in range(work_items(items, CAUSAL)):
        b, h, m0, n = work_item(e, tiles, H, S, BN, CAUSAL)
        hk = h // GROUP
        for j in range(n):
            at = [b, hk, j * BN, 0]
            mbarrier.wait(k_free.index(kj), k_phase)
            ready = k_ready.index(kj)
            mbarrier.expect(ready, 2 * K.block_type.nbytes)
            load(K, at, ready, k.index(kj))
            load(T_K, at, ready, t_k.index(kj))
            kj, k_phase = advance(kj, k_phase, 1, KS)
            if j == 0:
                for g in gl.static_range(2):
                    mbarrier.wait(q_free.index(qj + g), q_phase)
                    q_bar = q_ready.index(qj + g)
                    mbarrier.expect(q_bar, QUERIES * Q.block_type.nbytes)
                    rows = [b, h, m0 + g * ROWS, 0]
                    load(Q, rows, q_bar, q.index(qj + g))
                    load(T_Q, rows, q_bar, t_q.index(qj + g))
                    load(D_T_O, rows, q_bar, d_t_o.index(qj + g))
                    if D_O is not None:
                        load(D_O, rows, q_bar, d_o.index(qj + g))
                qj, q_phase = advance(qj, q_phase, 2, 2 * QS)
            mbarrier.wait(v_free.index(vj), v_phase)
            v_bar = v_ready.index(vj)
            mbarrier.expect(v_bar, 2 * V.block_type.nbytes)
            load(V, at, v_bar, v.index(vj))
            load(T_V, at, v_bar, t_v.index(vj))
            vj, v_phase = advance(vj, v_phase, 1, KS)


@gluon.jit
def _consumer(
    WG: gl.constexpr, D_Q, D_T_Q, LSE, MU, H_SUM, W_SUM, rings, bars, scale, S, L, H, tiles, items,
    D: gl.constexpr, BN: gl.constexpr, KS: gl.constexpr, QS: gl.constexpr, CAUSAL: gl.constexpr,
    EDGE: gl.constexpr, HAS_D_O: gl.constexpr,
):  # fmt: skip
    """A warpgroup of the two: 64 queries of each work item against all keys they see."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    D_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, D_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    DT: gl.constexpr = rings[0].dtype
    q_ring, t_q_ring, d_o_ring, d_t_o_ring, k_ring, t_k_ring, v_ring, t_v_ring = rings
    q_ready, q_free, k_ready, k_free, v_ready, v_free = bars
    scale2 = scale * LOG2E
    qj = 0
    kj = 0
    vj = 0
    q_phase = 0
    k_phase = 0
    v_phase = 0
    started = 0
    for e in range(work_items(items, CAUSAL)):
        b, h, m0, n = work_item(e, tiles, H, S, BN, CAUSAL)
        m0 += WG * ROWS
        i = m0 + gl.arange(0, ROWS, layout=ROW)
        row = (b * H + h).to(gl.int64) * L + i
        lse = gl.load(LSE + row, mask=i < L, other=float("inf")) * LOG2E  # past the end P = 0
        mu = gl.load(MU + row, mask=i < L, other=0.0)
        h_sum = gl.load(H_SUM + row, mask=i < L, other=0.0)
        w_sum = gl.load(W_SUM + row, mask=i < L, other=0.0)
        d_q = gl.zeros([ROWS, D], gl.float32, D_L)
        d_t_q = gl.zeros([ROWS, D], gl.float32, D_L)
        q = matrix(q_ring, qj + WG, ROWS, D)
        t_q = matrix(t_q_ring, qj + WG, ROWS, D)
        d_t_o = matrix(d_t_o_ring, qj + WG, ROWS, D)
        clear = S
        if CAUSAL:
            clear = gl.minimum(S, m0 + 1)
        mbarrier.wait(q_ready.index(qj + WG), q_phase)
        for j in range(n):
            k = matrix(k_ring, kj, BN, D)
            t_k = matrix(t_k_ring, kj, BN, D)
            v = matrix(v_ring, vj, BN, D)
            t_v = matrix(t_v_ring, vj, BN, D)
            zero = gl.zeros([ROWS, BN], gl.float32, S_L)
            mbarrier.wait(k_ready.index(kj), k_phase)
            s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            t_s = warpgroup_mma(t_q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            t_s = warpgroup_mma(q, t_k.permute((1, 0)), t_s, is_async=True)
            mbarrier.wait(v_ready.index(vj), v_phase)
            h_m = warpgroup_mma(d_t_o, v.permute((1, 0)), zero, use_acc=False, is_async=True)
            g = warpgroup_mma(d_t_o, t_v.permute((1, 0)), zero, use_acc=False, is_async=True)
            if HAS_D_O:
                d_o = matrix(d_o_ring, qj + WG, ROWS, D)
                g = warpgroup_mma(d_o, v.permute((1, 0)), g, is_async=True)
            if WG == 1:
                give_turn(WG)
            else:
                if started > 0:
                    give_turn(WG)
                started = 1
            s, t_s, h_m, g = warpgroup_mma_wait(0, deps=[s, t_s, h_m, g])
            mbarrier.arrive(v_free.index(vj), count=1)

            p = exponential(s, scale2, lse, False)
            h_m = h_m - gl.expand_dims(h_sum, 1)
            d_s = g - gl.expand_dims(w_sum, 1) + h_m * (t_s * scale - gl.expand_dims(mu, 1))
            d_t_s = p * h_m
            d_s = p * d_s
            if EDGE:
                if (j + 1) * BN > clear:  # not P: beside 0 a tS that is not finite would stay
                    see = visible(m0, j * BN, S, BN, S_L, CAUSAL)
                    d_t_s = gl.where(see, d_t_s, 0.0)
                    d_s = gl.where(see, d_s, 0.0)
            d_t_s16 = gl.convert_layout(d_t_s.to(DT), P_L, assert_trivial=True)
            d_s16 = gl.convert_layout(d_s.to(DT), P_L, assert_trivial=True)

            await_turn(WG)
            d_q = warpgroup_mma(d_s16, k, d_q, is_async=True)
            d_q = warpgroup_mma(d_t_s16, t_k, d_q, is_async=True)
            d_t_q = warpgroup_mma(d_t_s16, k, d_t_q, is_async=True)
            d_q, d_t_q = warpgroup_mma_wait(0, deps=[d_q, d_t_q])
            d_s16 = keep_alive(d_s16)
            d_t_s16 = keep_alive(d_t_s16)
            mbarrier.arrive(k_free.index(kj), count=1)
            kj, k_phase = advance(kj, k_phase, 1, KS)
            vj, v_phase = advance(vj, v_phase, 1, KS)

        q.store((d_q * scale).to(DT))
        t_q.store((d_t_q * scale).to(DT))
        fence_async_shared()
        store(D_Q, [b, h, m0, 0], q_ring.index(qj + WG))
        store(D_T_Q, [b, h, m0, 0], t_q_ring.index(qj + WG))
        tma.store_wait(0)
        mbarrier.arrive(q_free.index(qj + WG), count=1)
        qj, q_phase = advance(qj, q_phase, 2, 2 * QS)
    if WG == 0:  # the named barriers end balanced
        give_turn(WG)


@gluon.jit(do_not_specialize=("H", "L", "S", "tiles", "items"))
def queries_jvp_kernel(
    Q, K, V, T_Q, T_K, T_V, D_O, D_T_O, LSE, MU, H_SUM, W_SUM, D_Q, D_T_Q,
    scale, H, L, S, tiles, items,
    GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, KS: gl.constexpr, QS: gl.constexpr,
    CAUSAL: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Rings of KS tiles of keys and of values, QS pairs of query tiles; dO may be absent."""
    HAS_D_O: gl.constexpr = D_O is not None
    rings = (
        ring(Q, 2 * QS),
        ring(Q, 2 * QS),
        ring(Q, 2 * QS) if HAS_D_O else None,
        ring(Q, 2 * QS),
        ring(K, KS),
        ring(K, KS),
        ring(V, KS),
        ring(V, KS),
    )
    bars = (
        barriers(2 * QS, 1),
        barriers(2 * QS, 1),
        barriers(KS, 1),
        barriers(KS, 2),
        barriers(KS, 1),
        barriers(KS, 2),
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (0, D_Q, D_T_Q, LSE, MU, H_SUM, W_SUM, rings, bars, scale, S, L, H, tiles, items,
                 D, BN, KS, QS, CAUSAL, EDGE, HAS_D_O),
            ),
            (
                _consumer,
                (1, D_Q, D_T_Q, LSE, MU, H_SUM, W_SUM, rings, bars, scale, S, L, H, tiles, items,
                 D, BN, KS, QS, CAUSAL, EDGE, HAS_D_O),
            ),
            (
                _producer,
                (Q, T_Q, D_O, D_T_O, K, T_K, V, T_V, rings, bars, S, H, tiles, items,
                 BN, KS, QS, GROUP, CAUSAL),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
