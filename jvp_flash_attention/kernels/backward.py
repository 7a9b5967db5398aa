"""Backward of O, and of (O, tO), in three launches: row sums, then the keys' gradients, then the
queries'.

Row sums, O(L D) and no matrix product:

    h = rowsum(dtO ∘ O)          w = rowsum(dO ∘ O) + rowsum(dtO ∘ tO)

Then, tile by tile from the saved LSE and μ (no statistics pass), with P = exp(S − LSE) and R = P ∘
(tS − μ):

    Hm  = Z ∘ (dtO Vᵀ) − h                G  = Z ∘ (dO Vᵀ + dtO tVᵀ)
    dtS = P ∘ Hm                          dS = P ∘ (G + Hm ∘ (tS − μ) − w)

    keys:     dK  = s (dSᵀ Q + dtSᵀ tQ)      dV  = (P ∘ Z)ᵀ dO + (R ∘ Z)ᵀ dtO
              dtK = s dtSᵀ Q                 dtV = (P ∘ Z)ᵀ dtO
    queries:  dQ  = s (dS K + dtS tK)        dtQ = s dtS K            db = dS    dtb = dtS

Without dtO it is the ordinary backward: dS = P ∘ (Z ∘ dO Vᵀ − w). Products of a tile: 4 + 3 for the
ordinary backward, 12 + 9 with every tangent; what is absent (None) removes its own. The keys'
kernel holds its tiles transposed, keys by rows. Four accumulators of 128 columns leave no registers
for the rest (a warp owns 16 rows of each: 256 registers a thread), so from that width on (dV, dtV)
and (dK, dtK) are two launches, 6 + 9 products instead of 12 and still twice as fast.

With few keys the rounding of O to 16 bits is felt in h and w, which are what it takes to make the
rows of dtS and dS sum to zero. Where one tile holds every key (SINGLE) they are taken from the
tile: h = rowsum(P ∘ Hm) and w = rowsum(P ∘ (G + Hm ∘ (tS − μ))). Where the keys of the call are a
shard of each row's (`Options.sharded`) they are not: a tile's sums are a part of the rows'.
"""

# Triton's annotations name what a kernel receives, not what its caller passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    OUTSIDE,
    UNSPECIALIZED,
    add_bias,
    dot,
    dropout_factor,
    finite,
    head_of,
    load_bias,
    load_row_statistics,
    load_tile,
    probabilities,
    store_tile,
    visible,
)


@triton.jit(do_not_specialize=["H", "L"])
def row_sums_kernel(
    D_O, D_T_O, O, T_O, LSE, MU, H_SUM, W_SUM, STATISTICS, H, L,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One program: h and w of BM queries of one head. STATISTICS: by head four rows, LSE in base 2,
    μ, h and w, padded to a multiple of BM with LSE = inf (hopper_keys.py, hopper_queries.py)."""
    b, h, tile = head_of(tl.program_id(0), tl.cdiv(L, BM), H, False)
    m0 = tile * BM
    i = m0 + tl.arange(0, BM)
    row = (b * H + h).to(tl.int64) * L + i
    o = load_tile(O, b, h, m0, L, BM, DV, BLOCK_DV, True, False).to(tl.float32)
    w = tl.zeros([BM], tl.float32)
    if D_O is not None:
        d_o = load_tile(D_O, b, h, m0, L, BM, DV, BLOCK_DV, True, False).to(tl.float32)
        w += tl.sum(d_o * o, 1)
    if D_T_O is not None:
        t_o = load_tile(T_O, b, h, m0, L, BM, DV, BLOCK_DV, True, False).to(tl.float32)
        d_t_o = load_tile(D_T_O, b, h, m0, L, BM, DV, BLOCK_DV, True, False).to(tl.float32)
        h_sum = tl.sum(d_t_o * o, 1)
        w += tl.sum(d_t_o * t_o, 1)
        tl.store(H_SUM + row, h_sum, mask=i < L)
    tl.store(W_SUM + row, w, mask=i < L)
    if STATISTICS is not None:
        padded = tl.cdiv(L, BM) * BM
        at = STATISTICS + (b * H + h).to(tl.int64) * 4 * padded + i
        tl.store(at, tl.load(LSE + row, mask=i < L, other=float("inf")) * LOG2E)
        tl.store(at + padded, tl.load(MU + row, mask=i < L, other=0.0))
        tl.store(at + 2 * padded, h_sum)
        tl.store(at + 3 * padded, w)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def keys_kernel(
    Q, K, V, T_Q, T_K, T_V, BIAS, T_BIAS, SEED, D_O, D_T_O, LSE, MU, H_SUM, W_SUM,
    D_K, D_T_K, D_V, D_T_V,
    scale, threshold, keep_scale, batch_per_seed, H, L, S,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, BOOL: tl.constexpr, WHOLE: tl.constexpr, SINGLE: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of one key/value head, against every query of the heads that read it."""
    T_S: tl.constexpr = T_Q is not None or T_K is not None or T_BIAS is not None
    JVP: tl.constexpr = D_T_O is not None
    SPLIT: tl.constexpr = BIAS is not None and not BOOL

    b, hk, tile = head_of(tl.program_id(0), tl.cdiv(S, BN), H // GROUP, False)
    n0 = tile * BN
    j = n0 + tl.arange(0, BN)
    k = load_tile(K, b, hk, n0, S, BN, D, BLOCK_D, True, TMA)
    if D_K is not None:
        v = load_tile(V, b, hk, n0, S, BN, DV, BLOCK_DV, True, TMA)
    if T_K is not None:
        t_k = load_tile(T_K, b, hk, n0, S, BN, D, BLOCK_D, True, TMA)
    if T_V is not None and D_K is not None:
        t_v = load_tile(T_V, b, hk, n0, S, BN, DV, BLOCK_DV, True, TMA)

    d_k = tl.zeros([BN, BLOCK_D], tl.float32)
    d_v = tl.zeros([BN, BLOCK_DV], tl.float32)
    d_t_k = tl.zeros([BN, BLOCK_D], tl.float32)
    d_t_v = tl.zeros([BN, BLOCK_DV], tl.float32)
    scale2 = scale * LOG2E

    first = 0
    clear = 0
    if CAUSAL:  # queries before the tile do not see it; from `clear` on they see all of it
        first = n0 // BM * BM
        clear = tl.minimum(tl.cdiv(n0 + BN - 1, BM) * BM, tl.cdiv(L, BM) * BM)
    for g in range(GROUP):
        h = hk * GROUP + g
        row = (b * H + h).to(tl.int64) * L
        for PHASE in tl.static_range(2 if CAUSAL else 1):
            for m0 in tl.range(first if PHASE == 1 else clear, clear if PHASE == 1 else L, BM):
                i = m0 + tl.arange(0, BM)
                q = load_tile(Q, b, h, m0, L, BM, D, BLOCK_D, not WHOLE, TMA)
                zero = tl.zeros([BN, BM], tl.float32)
                s = dot(k, q.T, zero, PRECISION) * scale2
                if T_Q is not None:
                    t_q = load_tile(T_Q, b, h, m0, L, BM, D, BLOCK_D, not WHOLE, TMA)
                if T_S:
                    t_s = zero
                    if T_Q is not None:
                        t_s = dot(k, t_q.T, t_s, PRECISION)
                    if T_K is not None:
                        t_s = dot(t_k, q.T, t_s, PRECISION)
                    t_s *= scale
                    if T_BIAS is not None:
                        t_s += load_bias(T_BIAS, b, h, i[None, :], j[:, None], L, S, 0)
                bias = zero
                if BIAS is not None:
                    bias = load_bias(
                        BIAS, b, h, i[None, :], j[:, None], L, S, 0 if BOOL else OUTSIDE
                    )
                    if not BOOL:
                        s, hidden = add_bias(s, bias)
                        if T_S:
                            t_s = tl.where(hidden, 0.0, t_s)
                m, log_l = load_row_statistics(LSE, row + i, i < L, BIAS is not None, SPLIT)
                p = probabilities(s, m[None, :], log_l[None, :] if SPLIT else log_l, SPLIT)
                if SPLIT:
                    seen = hidden == 0
                if PHASE == 1 or BOOL or SINGLE:
                    see = visible(i[None, :], j[:, None], S, bias, PHASE == 1, BOOL)
                    if PHASE == 1:
                        see = see & (i < L)[None, :]
                    p = tl.where(see, p, 0.0)
                    if T_S:
                        t_s = tl.where(see, t_s, 0.0)
                    seen = seen & see if SPLIT else see
                p_z = p
                if SEED is not None:
                    z = dropout_factor(
                        SEED, b, h, i[None, :], j[:, None], H, batch_per_seed, threshold, keep_scale
                    )
                    p_z = p * z

                if D_O is not None:
                    d_o = load_tile(D_O, b, h, m0, L, BM, DV, BLOCK_DV, not WHOLE, TMA)
                if JVP:
                    d_t_o = load_tile(D_T_O, b, h, m0, L, BM, DV, BLOCK_DV, not WHOLE, TMA)
                    if T_S:
                        t_s -= tl.load(MU + row + i, mask=i < L, other=0.0)[None, :]

                if D_V is not None:
                    if D_O is not None:
                        d_v = dot(p_z.to(k.dtype), d_o, d_v, PRECISION)
                    if JVP:
                        d_t_v = dot(p_z.to(k.dtype), d_t_o, d_t_v, PRECISION)
                        if T_S:
                            d_v = dot((p_z * t_s).to(k.dtype), d_t_o, d_v, PRECISION)

                if D_K is not None:
                    d_p = zero
                    if D_O is not None:
                        d_p = dot(v, d_o.T, d_p, PRECISION)
                    if JVP and T_V is not None:
                        d_p = dot(t_v, d_t_o.T, d_p, PRECISION)
                    if BIAS is not None or PHASE == 1:
                        d_p = tl.where(seen, d_p, 0.0)
                    if SEED is not None:
                        d_p *= z
                    if JVP:
                        h_m = dot(v, d_t_o.T, zero, PRECISION)
                        if BIAS is not None or PHASE == 1:
                            h_m = tl.where(seen, h_m, 0.0)
                        if SEED is not None:
                            h_m *= z
                        if SINGLE:
                            h_m -= tl.sum(p * h_m, 0)[None, :]
                        else:
                            h_m -= tl.load(H_SUM + row + i, mask=i < L, other=0.0)[None, :]
                        if T_S:
                            d_p += h_m * t_s
                        d_t_s = (p * h_m).to(k.dtype)
                        d_t_k = dot(d_t_s, q, d_t_k, PRECISION)
                        if T_Q is not None:
                            d_k = dot(d_t_s, t_q, d_k, PRECISION)
                    if SINGLE:
                        d_p -= tl.sum(p * d_p, 0)[None, :]
                    else:
                        d_p -= tl.load(W_SUM + row + i, mask=i < L, other=0.0)[None, :]
                    d_k = dot((p * d_p).to(k.dtype), q, d_k, PRECISION)

    if D_K is not None:
        store_tile(D_K, d_k * scale, b, hk, n0, S, BN, D, BLOCK_D)
        if JVP:
            store_tile(D_T_K, d_t_k * scale, b, hk, n0, S, BN, D, BLOCK_D)
    if D_V is not None:
        store_tile(D_V, d_v, b, hk, n0, S, BN, DV, BLOCK_DV)
        if JVP:
            store_tile(D_T_V, d_t_v, b, hk, n0, S, BN, DV, BLOCK_DV)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def queries_kernel(
    Q, K, V, T_Q, T_K, T_V, BIAS, T_BIAS, SEED, D_O, D_T_O, LSE, MU, H_SUM, W_SUM,
    D_Q, D_T_Q, D_BIAS, D_T_BIAS,
    scale, threshold, keep_scale, batch_per_seed, H, L, S,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, BOOL: tl.constexpr, WHOLE: tl.constexpr, SINGLE: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head, against the keys that they see."""
    T_S: tl.constexpr = T_Q is not None or T_K is not None or T_BIAS is not None
    JVP: tl.constexpr = D_T_O is not None
    SPLIT: tl.constexpr = BIAS is not None and not BOOL
    DT: tl.constexpr = D_Q[0].dtype.element_ty

    b, h, tile = head_of(tl.program_id(0), tl.cdiv(L, BM), H, CAUSAL)
    hk = h // GROUP
    m0 = tile * BM
    i = m0 + tl.arange(0, BM)
    row = (b * H + h).to(tl.int64) * L + i
    q = load_tile(Q, b, h, m0, L, BM, D, BLOCK_D, True, TMA)
    if T_Q is not None:
        t_q = load_tile(T_Q, b, h, m0, L, BM, D, BLOCK_D, True, TMA)
    if D_O is not None:
        d_o = load_tile(D_O, b, h, m0, L, BM, DV, BLOCK_DV, True, TMA)
    if JVP:
        d_t_o = load_tile(D_T_O, b, h, m0, L, BM, DV, BLOCK_DV, True, TMA)
        h_sum = tl.load(H_SUM + row, mask=i < L, other=0.0)
        if T_S:
            mu = tl.load(MU + row, mask=i < L, other=0.0)
    w = tl.load(W_SUM + row, mask=i < L, other=0.0)
    m, log_l = load_row_statistics(LSE, row, i < L, True, SPLIT)

    d_q = tl.zeros([BM, BLOCK_D], tl.float32)
    d_t_q = tl.zeros([BM, BLOCK_D], tl.float32)
    scale2 = scale * LOG2E

    end = S
    full = S // BN * BN
    if CAUSAL:
        end = tl.minimum(S, m0 + BM)
        full = tl.minimum(S, m0 + 1) // BN * BN
    for PHASE in tl.static_range(1 if WHOLE else 2):
        for n0 in tl.range(0 if PHASE == 0 else full, full if PHASE == 0 else end, BN):
            j = n0 + tl.arange(0, BN)
            k = load_tile(K, b, hk, n0, S, BN, D, BLOCK_D, PHASE == 1, TMA)
            zero = tl.zeros([BM, BN], tl.float32)
            s = dot(q, k.T, zero, PRECISION) * scale2
            if T_K is not None:
                t_k = load_tile(T_K, b, hk, n0, S, BN, D, BLOCK_D, PHASE == 1, TMA)
            if T_S:
                t_s = zero
                if T_Q is not None:
                    t_s = dot(t_q, k.T, t_s, PRECISION)
                if T_K is not None:
                    t_s = dot(q, t_k.T, t_s, PRECISION)
                t_s *= scale
                if T_BIAS is not None:
                    t_s += load_bias(T_BIAS, b, h, i[:, None], j[None, :], L, S, 0)
            bias = zero
            if BIAS is not None:
                bias = load_bias(BIAS, b, h, i[:, None], j[None, :], L, S, 0 if BOOL else OUTSIDE)
                if not BOOL:
                    s, hidden = add_bias(s, bias)
                    if T_S:
                        t_s = tl.where(hidden, 0.0, t_s)
            p = probabilities(s, m[:, None], log_l[:, None] if SPLIT else log_l, SPLIT)
            if SPLIT:
                seen = hidden == 0
            if PHASE == 1 or BOOL:
                see = visible(i[:, None], j[None, :], S, bias, CAUSAL and PHASE == 1, BOOL)
                p = tl.where(see, p, 0.0)
                if T_S:
                    t_s = tl.where(see, t_s, 0.0)
                seen = seen & see if SPLIT else see
            if BIAS is not None or (CAUSAL and PHASE == 1):
                k = finite(k)
                if T_K is not None:
                    t_k = finite(t_k)

            v = load_tile(V, b, hk, n0, S, BN, DV, BLOCK_DV, PHASE == 1, TMA)
            d_p = zero
            if D_O is not None:
                d_p = dot(d_o, v.T, d_p, PRECISION)
            if JVP and T_V is not None:
                t_v = load_tile(T_V, b, hk, n0, S, BN, DV, BLOCK_DV, PHASE == 1, TMA)
                d_p = dot(d_t_o, t_v.T, d_p, PRECISION)
            if BIAS is not None or (CAUSAL and PHASE == 1):
                d_p = tl.where(seen, d_p, 0.0)
            if SEED is not None:
                z = dropout_factor(
                    SEED, b, h, i[:, None], j[None, :], H, batch_per_seed, threshold, keep_scale
                )
                d_p *= z
            if JVP:
                h_m = dot(d_t_o, v.T, zero, PRECISION)
                if BIAS is not None or (CAUSAL and PHASE == 1):
                    h_m = tl.where(seen, h_m, 0.0)
                if SEED is not None:
                    h_m *= z
                if SINGLE:
                    h_sum = tl.sum(p * h_m, 1)
                h_m -= h_sum[:, None]
                if T_S:
                    d_p += h_m * (t_s - mu[:, None])
                d_t_s = p * h_m
                d_t_q = dot(d_t_s.to(DT), k, d_t_q, PRECISION)
                if T_K is not None:
                    d_q = dot(d_t_s.to(DT), t_k, d_q, PRECISION)
                if D_T_BIAS is not None:
                    add_bias_grad(D_T_BIAS, d_t_s, b, h, i, j, L, S, BIAS_ROWS, BIAS_COLUMNS)
            if SINGLE:
                w = tl.sum(p * d_p, 1)
            d_s = p * (d_p - w[:, None])
            d_q = dot(d_s.to(DT), k, d_q, PRECISION)
            if D_BIAS is not None:
                add_bias_grad(D_BIAS, d_s, b, h, i, j, L, S, BIAS_ROWS, BIAS_COLUMNS)

    store_tile(D_Q, d_q * scale, b, h, m0, L, BM, D, BLOCK_D)
    if JVP:
        store_tile(D_T_Q, d_t_q * scale, b, h, m0, L, BM, D, BLOCK_D)


@triton.jit
def add_bias_grad(
    D_BIAS, d_s, b, h, i, j, L, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Adds a tile of dS to the bias's gradient; ROWS, COLUMNS: the bias has those dimensions, or
    was broadcast."""
    if ROWS and COLUMNS:
        at = _bias_at(D_BIAS, b, h, i[:, None], j[None, :])
        tl.atomic_add(at, d_s, mask=(i < L)[:, None] & (j < S)[None, :], sem="relaxed")
    elif COLUMNS:
        tl.atomic_add(_bias_at(D_BIAS, b, h, 0 * j, j), tl.sum(d_s, 0), mask=j < S, sem="relaxed")
    elif ROWS:
        tl.atomic_add(_bias_at(D_BIAS, b, h, i, 0 * i), tl.sum(d_s, 1), mask=i < L, sem="relaxed")
    else:
        tl.atomic_add(
            D_BIAS[0] + tl.cast(b, tl.int64) * D_BIAS[1] + tl.cast(h, tl.int64) * D_BIAS[2],
            tl.sum(d_s),
        )


@triton.jit
def _bias_at(D_BIAS, b, h, i, j):
    head = D_BIAS[0] + tl.cast(b, tl.int64) * D_BIAS[1] + tl.cast(h, tl.int64) * D_BIAS[2]
    return head + tl.cast(i, tl.int64) * D_BIAS[3] + tl.cast(j, tl.int64) * D_BIAS[4]
