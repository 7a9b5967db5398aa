"""Second launch of the backward of O, and of (O, tO): dK, dV and with dtO dtK, dtV.

Tile by tile from the saved LSE and μ (no statistics pass), with the row sums h and w of
`bwd_preprocess.py`, P = exp(S − LSE) and R = P ∘ (tS − μ):

    Hm  = Z ∘ (dtO Vᵀ) − h                G  = Z ∘ (dO Vᵀ + dtO tVᵀ)
    dtS = P ∘ Hm                          dS = P ∘ (G + Hm ∘ (tS − μ) − w)
    dK  = s (dSᵀ Q + dtSᵀ tQ)             dV  = (P ∘ Z)ᵀ dO + (R ∘ Z)ᵀ dtO
    dtK = s dtSᵀ Q                        dtV = (P ∘ Z)ᵀ dtO

With a soft cap c, u = tanh(s QKᵀ / c) and tX = s (tQ Kᵀ + Q tKᵀ), in these four products stand

    dtX = (1 − u²) ∘ dtS                  dX = (1 − u²) ∘ dS − (2 / c) u ∘ tX ∘ dtX

for dtS and dS.

Without dtO it is the ordinary backward: dS = P ∘ (Z ∘ dO Vᵀ − w). Products of a tile: 4 + 3 with
`bwd_dq.py` for the ordinary backward, 12 + 9 with every tangent; what is absent (None) removes its
own. Tiles are transposed, keys by rows. Four accumulators of 128 columns leave no registers for the
rest (a warp owns 16 rows of each: 256 registers a thread), so from that width on (dV, dtV) and (dK,
dtK) are two launches, 6 + 9 products instead of 12 and still twice as fast.

With few keys the rounding of O to 16 bits is felt in h and w, which are what it takes to make the
rows of dtS and dS sum to zero. Where one tile holds every key (SINGLE) they are taken from the
tile: h = rowsum(P ∘ Hm) and w = rowsum(P ∘ (G + Hm ∘ (tS − μ))). Where the keys of the call are a
shard of each row's (`Spec.sharded`) they are not: a tile's sums are a part of the rows'.
"""

import triton
import triton.language as tl

from ..block_info import (
    first_row,
    listed_row,
    listed_rows,
    query_parts,
    row_at,
    sequence_of,
    tiles_of,
)
from .primitives import (
    LOG2E,
    OUTSIDE,
    UNSPECIALIZED,
    add_mask,
    dot,
    dropout_factor,
    head_of,
    like,
    load_mask,
    load_operand,
    load_present,
    load_row_statistics,
    probabilities,
    soft_cap,
    store_tile,
    transpose,
    uncap,
    valid_pairs,
)


@triton.jit
def gradient_of_p(v, t_v, d_o, d_t_o, zero, PRECISION: tl.constexpr):
    """dP = dO Vᵀ + dtO tVᵀ, transposed."""
    d_p = zero
    if d_o is not None:
        d_p = dot(v, transpose(d_o), d_p, PRECISION)
    if d_t_o is not None and t_v is not None:
        d_p = dot(t_v, transpose(d_t_o), d_p, PRECISION)
    return d_p


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bwd_dkdv_kernel(
    Q, K, V, T_Q, T_K, T_V, MASK, T_MASK, SEED, CU_Q, CU_K, Q_BLOCKS,
    D_O, D_T_O, LSE, MU, H_SUM, W_SUM,
    D_K, D_T_K, D_V, D_T_V,
    scale, softcap, threshold, keep_scale, batch_per_seed, H, L, S, sequences,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOOL: tl.constexpr, WHOLE: tl.constexpr,
    SINGLE: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key/value head, against the queries that see them, of every
    head that reads it."""
    T_S: tl.constexpr = T_Q is not None or T_K is not None or T_MASK is not None
    JVP: tl.constexpr = D_T_O is not None
    # Products with V before the others: fewer operands in memory at a time.
    V_FIRST: tl.constexpr = PARTS > 1
    SPLIT: tl.constexpr = MASK is not None and not BOOL
    EMPTY: tl.constexpr = MASK is not None or LEFT is not None  # rows may attend nothing

    pid = tl.program_id(0)
    tiles = tiles_of(CU_Q, S, BLOCK_N, sequences)
    b, hk, tile = head_of(pid, tiles, H // GROUP, False)
    rows = L
    q0 = 0
    k0 = 0
    if CU_Q is not None:
        tile, k0, S, q0, L = sequence_of(
            CU_Q if CU_K is None else CU_K, CU_Q, tile, tl.arange(0, SEQUENCES), S, L, sequences,
            BLOCK_N,
        )  # fmt: skip
        if tile * BLOCK_N >= S:
            return
    shift = S - L if LOWER_RIGHT else 0
    n0 = tile * BLOCK_N
    j = n0 + tl.arange(0, BLOCK_N)
    k = load_operand(K, b, hk, k0 + n0, k0 + S, BLOCK_N, D, BLOCK_D, True, TMA, PARTS)
    if D_K is not None:
        v = load_operand(V, b, hk, k0 + n0, k0 + S, BLOCK_N, DV, BLOCK_DV, True, TMA, PARTS)
    if T_K is not None:
        t_k = load_operand(T_K, b, hk, k0 + n0, k0 + S, BLOCK_N, D, BLOCK_D, True, TMA, PARTS)
    t_v = None
    if T_V is not None and D_K is not None:
        t_v = load_operand(T_V, b, hk, k0 + n0, k0 + S, BLOCK_N, DV, BLOCK_DV, True, TMA, PARTS)

    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    d_t_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_t_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    scale2 = scale * LOG2E

    if Q_BLOCKS is None:
        parts = query_parts(n0 - shift, L, BLOCK_M, BLOCK_N, LEFT, RIGHT, LOWER_RIGHT)
    for g in range(GROUP):
        h = hk * GROUP + g
        row = first_row(b, h, H, rows) + q0
        if Q_BLOCKS is not None:
            blocks = row_at(Q_BLOCKS, b, h, n0 // BLOCK_K)
            seen = listed_rows(blocks, L, BLOCK_Q)
            parts = query_parts(n0, seen, BLOCK_M, BLOCK_N, LEFT, RIGHT)
        for PHASE in tl.static_range(3 if LEFT is not None else 2 if RIGHT is not None else 1):
            for x0 in tl.range(
                parts[2 * PHASE], parts[2 * PHASE + 1], BLOCK_M, disable_licm=V_FIRST
            ):
                m0 = x0
                if Q_BLOCKS is not None:
                    m0 = listed_row(blocks, x0, BLOCK_Q)
                i = m0 + tl.arange(0, BLOCK_M)
                zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                if V_FIRST:
                    d_o = load_present(
                        D_O, b, h, q0 + m0, q0 + L, BLOCK_M, DV, BLOCK_DV, not WHOLE, TMA, PARTS
                    )
                    d_t_o = load_present(
                        D_T_O, b, h, q0 + m0, q0 + L, BLOCK_M, DV, BLOCK_DV, not WHOLE, TMA, PARTS
                    )
                    if D_K is not None:
                        d_p = gradient_of_p(v, t_v, d_o, d_t_o, zero, PRECISION)
                        if JVP:
                            h_m = dot(v, transpose(d_t_o), zero, PRECISION)
                q = load_operand(
                    Q, b, h, q0 + m0, q0 + L, BLOCK_M, D, BLOCK_D, not WHOLE, TMA, PARTS
                )
                s = dot(k, transpose(q), zero, PRECISION) * scale2
                if T_Q is not None:
                    t_q = load_operand(
                        T_Q, b, h, q0 + m0, q0 + L, BLOCK_M, D, BLOCK_D, not WHOLE, TMA, PARTS
                    )
                if T_S:
                    t_s = zero
                    if T_Q is not None:
                        t_s = dot(k, transpose(t_q), t_s, PRECISION)
                    if T_K is not None:
                        t_s = dot(t_k, transpose(q), t_s, PRECISION)
                    t_s *= scale
                if softcap is not None:
                    s, u, slope = soft_cap(s, softcap)
                    bend = None
                    if T_S:
                        bend = t_s * u * (2.0 / softcap)
                        t_s *= slope
                if T_MASK is not None:
                    t_s += load_mask(T_MASK, b, h, i[None, :], j[:, None], L, S, 0)
                mask = zero
                if MASK is not None:
                    mask = load_mask(
                        MASK, b, h, i[None, :], j[:, None], L, S, 0 if BOOL else OUTSIDE
                    )
                    if not BOOL:
                        s, hidden = add_mask(s, mask)
                        if T_S:
                            t_s = tl.where(hidden, 0.0, t_s)
                m, log_l = load_row_statistics(LSE, row + i, i < L, EMPTY, SPLIT)
                p = probabilities(s, m[None, :], log_l[None, :] if SPLIT else log_l, SPLIT)
                if SPLIT:
                    counted = hidden == 0
                if PHASE != 0 or BOOL or SINGLE:
                    valid = valid_pairs(
                        i[None, :], j[:, None], S, mask, LEFT, RIGHT, PHASE, BOOL, shift
                    )
                    if PHASE != 0:
                        valid = valid & (i < L)[None, :]
                    p = tl.where(valid, p, 0.0)
                    if T_S:
                        t_s = tl.where(valid, t_s, 0.0)
                    counted = counted & valid if SPLIT else valid
                if softcap is not None and (MASK is not None or PHASE != 0):
                    slope = tl.where(counted, slope, 0.0)
                    if T_S:
                        bend = tl.where(counted, bend, 0.0)
                p_z = p
                if SEED is not None:
                    z = dropout_factor(
                        SEED, b, h, q0 + i[None, :], k0 + j[:, None],
                        H, batch_per_seed, threshold, keep_scale,
                    )  # fmt: skip
                    p_z = p * z

                if not V_FIRST:
                    d_o = load_present(
                        D_O, b, h, q0 + m0, q0 + L, BLOCK_M, DV, BLOCK_DV, not WHOLE, TMA, PARTS
                    )
                    d_t_o = load_present(
                        D_T_O, b, h, q0 + m0, q0 + L, BLOCK_M, DV, BLOCK_DV, not WHOLE, TMA, PARTS
                    )
                if JVP and T_S:
                    t_s -= tl.load(MU + row + i, mask=i < L, other=0.0)[None, :]

                if D_V is not None:
                    if D_O is not None:
                        d_v = dot(like(p_z, k), d_o, d_v, PRECISION)
                    if JVP:
                        d_t_v = dot(like(p_z, k), d_t_o, d_t_v, PRECISION)
                        if T_S:
                            d_v = dot(like(p_z * t_s, k), d_t_o, d_v, PRECISION)

                if D_K is not None:
                    if not V_FIRST:
                        d_p = gradient_of_p(v, t_v, d_o, d_t_o, zero, PRECISION)
                    if MASK is not None or PHASE != 0:
                        d_p = tl.where(counted, d_p, 0.0)
                    if SEED is not None:
                        d_p *= z
                    if JVP:
                        if not V_FIRST:
                            h_m = dot(v, transpose(d_t_o), zero, PRECISION)
                        if MASK is not None or PHASE != 0:
                            h_m = tl.where(counted, h_m, 0.0)
                        if SEED is not None:
                            h_m *= z
                        if SINGLE:
                            h_m -= tl.sum(p * h_m, 0)[None, :]
                        else:
                            h_m -= tl.load(H_SUM + row + i, mask=i < L, other=0.0)[None, :]
                        if T_S:
                            d_p += h_m * t_s
                        d_t_x = p * h_m
                        if softcap is not None:
                            d_t_x = uncap(d_t_x, slope, None, None)
                        d_t_k = dot(like(d_t_x, k), q, d_t_k, PRECISION)
                        if T_Q is not None:
                            d_k = dot(like(d_t_x, k), t_q, d_k, PRECISION)
                    if SINGLE:
                        d_p -= tl.sum(p * d_p, 0)[None, :]
                    else:
                        d_p -= tl.load(W_SUM + row + i, mask=i < L, other=0.0)[None, :]
                    d_x = p * d_p
                    if softcap is not None:
                        d_x = uncap(d_x, slope, bend if JVP else None, d_t_x if JVP else None)
                    d_k = dot(like(d_x, k), q, d_k, PRECISION)

    if D_K is not None:
        store_tile(D_K, d_k * scale, b, hk, k0 + n0, k0 + S, BLOCK_N, D, BLOCK_D)
        if JVP:
            store_tile(D_T_K, d_t_k * scale, b, hk, k0 + n0, k0 + S, BLOCK_N, D, BLOCK_D)
    if D_V is not None:
        store_tile(D_V, d_v, b, hk, k0 + n0, k0 + S, BLOCK_N, DV, BLOCK_DV)
        if JVP:
            store_tile(D_T_V, d_t_v, b, hk, k0 + n0, k0 + S, BLOCK_N, DV, BLOCK_DV)
