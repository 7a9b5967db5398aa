"""Third launch of the backward of O, and of (O, tO): dQ and with dtO dtQ; gradients of the mask.

    dQ = s (dS K + dtS tK)        dtQ = s dtS K        db = dS        dtb = dtS

with dS, dtS and SINGLE of `bwd_dkdv.py`; with a soft cap dQ and dtQ are of its dX and dtX.
"""

import triton
import triton.language as tl

from ..block_info import (
    first_row,
    head_at,
    key_parts,
    listed_row,
    listed_rows,
    pair_at,
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
    finite,
    head_of,
    like,
    load_mask,
    load_operand,
    load_row_statistics,
    probabilities,
    soft_cap,
    store_tile,
    transpose,
    uncap,
    valid_pairs,
)


@triton.jit
def load_v_and_gradient_of_p(
    V, T_V, d_o, d_t_o, zero, b, h, row, rows, BLOCK_N: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """V of a tile of keys, and dP = dO Vᵀ + dtO tVᵀ."""
    v = load_operand(V, b, h, row, rows, BLOCK_N, DV, BLOCK_DV, CHECK, TMA, PARTS)
    d_p = zero
    if d_o is not None:
        d_p = dot(d_o, transpose(v), d_p, PRECISION)
    if d_t_o is not None and T_V is not None:
        t_v = load_operand(T_V, b, h, row, rows, BLOCK_N, DV, BLOCK_DV, CHECK, TMA, PARTS)
        d_p = dot(d_t_o, transpose(t_v), d_p, PRECISION)
    return v, d_p


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bwd_dq_kernel(
    Q, K, V, T_Q, T_K, T_V, MASK, T_MASK, SEED, CU_Q, CU_K, KV_BLOCKS,
    D_O, D_T_O, LSE, MU, H_SUM, W_SUM,
    D_Q, D_T_Q, D_MASK, D_T_MASK,
    scale, softcap, threshold, keep_scale, batch_per_seed, H, L, S, sequences,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOOL: tl.constexpr, WHOLE: tl.constexpr,
    SINGLE: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, against the keys that they see."""
    T_S: tl.constexpr = T_Q is not None or T_K is not None or T_MASK is not None
    JVP: tl.constexpr = D_T_O is not None
    V_FIRST: tl.constexpr = PARTS > 1  # as in `bwd_dkdv.py`
    SPLIT: tl.constexpr = MASK is not None and not BOOL

    pid = tl.program_id(0)
    tiles = tiles_of(CU_Q, L, BLOCK_M, sequences)
    b, h, tile = head_of(pid, tiles, H, RIGHT is not None)
    hk = h // GROUP
    rows = L
    q0 = 0
    k0 = 0
    if CU_Q is not None:
        tile, q0, L, k0, S = sequence_of(
            CU_Q, CU_Q if CU_K is None else CU_K, tile, tl.arange(0, SEQUENCES), L, S, sequences,
            BLOCK_M,
        )  # fmt: skip
        if tile * BLOCK_M >= L:
            return
    shift = S - L if LOWER_RIGHT else 0
    m0 = tile * BLOCK_M
    i = m0 + tl.arange(0, BLOCK_M)
    row = first_row(b, h, H, rows) + q0 + i
    q = load_operand(Q, b, h, q0 + m0, q0 + L, BLOCK_M, D, BLOCK_D, True, TMA, PARTS)
    if T_Q is not None:
        t_q = load_operand(T_Q, b, h, q0 + m0, q0 + L, BLOCK_M, D, BLOCK_D, True, TMA, PARTS)
    d_o = None
    d_t_o = None
    if D_O is not None:
        d_o = load_operand(D_O, b, h, q0 + m0, q0 + L, BLOCK_M, DV, BLOCK_DV, True, TMA, PARTS)
    if JVP:
        d_t_o = load_operand(D_T_O, b, h, q0 + m0, q0 + L, BLOCK_M, DV, BLOCK_DV, True, TMA, PARTS)
        h_sum = tl.load(H_SUM + row, mask=i < L, other=0.0)
        if T_S:
            mu = tl.load(MU + row, mask=i < L, other=0.0)
    w = tl.load(W_SUM + row, mask=i < L, other=0.0)
    m, log_l = load_row_statistics(LSE, row, i < L, True, SPLIT)

    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_t_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale2 = scale * LOG2E

    BANDED: tl.constexpr = LEFT is not None or RIGHT is not None or CU_Q is not None
    seen = S
    if KV_BLOCKS is not None:
        blocks = row_at(KV_BLOCKS, b, h, m0 // BLOCK_Q)
        seen = listed_rows(blocks, S, BLOCK_K)
    parts = key_parts(m0 + shift, seen, BLOCK_M, BLOCK_N, LEFT, RIGHT, LOWER_RIGHT)
    for PHASE in tl.static_range(1 if WHOLE else 2 if LEFT is None else 3):
        for x0 in tl.range(parts[2 * PHASE], parts[2 * PHASE + 1], BLOCK_N, disable_licm=V_FIRST):
            n0 = x0
            if KV_BLOCKS is not None:
                n0 = listed_row(blocks, x0, BLOCK_K)
            j = n0 + tl.arange(0, BLOCK_N)
            zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if V_FIRST:
                v, d_p = load_v_and_gradient_of_p(
                    V, T_V, d_o, d_t_o, zero, b, hk, k0 + n0, k0 + S, BLOCK_N, DV, BLOCK_DV,
                    PHASE != 0, PRECISION, TMA, PARTS,
                )  # fmt: skip
                if JVP:
                    h_m = dot(d_t_o, transpose(v), zero, PRECISION)
            k = load_operand(K, b, hk, k0 + n0, k0 + S, BLOCK_N, D, BLOCK_D, PHASE != 0, TMA, PARTS)
            s = dot(q, transpose(k), zero, PRECISION) * scale2
            if T_K is not None:
                t_k = load_operand(
                    T_K, b, hk, k0 + n0, k0 + S, BLOCK_N, D, BLOCK_D, PHASE != 0, TMA, PARTS
                )
            if T_S:
                t_s = zero
                if T_Q is not None:
                    t_s = dot(t_q, transpose(k), t_s, PRECISION)
                if T_K is not None:
                    t_s = dot(q, transpose(t_k), t_s, PRECISION)
                t_s *= scale
            if softcap is not None:
                s, u, slope = soft_cap(s, softcap)
                bend = None
                if T_S:
                    bend = t_s * u * (2.0 / softcap)
                    t_s *= slope
            if T_MASK is not None:
                t_s += load_mask(T_MASK, b, h, i[:, None], j[None, :], L, S, 0)
            mask = zero
            if MASK is not None:
                mask = load_mask(MASK, b, h, i[:, None], j[None, :], L, S, 0 if BOOL else OUTSIDE)
                if not BOOL:
                    s, hidden = add_mask(s, mask)
                    if T_S:
                        t_s = tl.where(hidden, 0.0, t_s)
            p = probabilities(s, m[:, None], log_l[:, None] if SPLIT else log_l, SPLIT)
            if SPLIT:
                counted = hidden == 0
            if PHASE != 0 or BOOL:
                valid = valid_pairs(
                    i[:, None], j[None, :], S, mask, LEFT, RIGHT, PHASE, BOOL, shift
                )
                p = tl.where(valid, p, 0.0)
                if T_S:
                    t_s = tl.where(valid, t_s, 0.0)
                counted = counted & valid if SPLIT else valid
            if softcap is not None and (MASK is not None or (BANDED and PHASE != 0)):
                slope = tl.where(counted, slope, 0.0)
                if T_S:
                    bend = tl.where(counted, bend, 0.0)
            if MASK is not None or (BANDED and PHASE != 0):
                k = finite(k)
                if T_K is not None:
                    t_k = finite(t_k)

            if not V_FIRST:
                v, d_p = load_v_and_gradient_of_p(
                    V, T_V, d_o, d_t_o, zero, b, hk, k0 + n0, k0 + S, BLOCK_N, DV, BLOCK_DV,
                    PHASE != 0, PRECISION, TMA, PARTS,
                )  # fmt: skip
            if MASK is not None or (BANDED and PHASE != 0):
                d_p = tl.where(counted, d_p, 0.0)
            if SEED is not None:
                z = dropout_factor(
                    SEED, b, h, q0 + i[:, None], k0 + j[None, :],
                    H, batch_per_seed, threshold, keep_scale,
                )  # fmt: skip
                d_p *= z
            if JVP:
                if not V_FIRST:
                    h_m = dot(d_t_o, transpose(v), zero, PRECISION)
                if MASK is not None or (BANDED and PHASE != 0):
                    h_m = tl.where(counted, h_m, 0.0)
                if SEED is not None:
                    h_m *= z
                if SINGLE:
                    h_sum = tl.sum(p * h_m, 1)
                h_m -= h_sum[:, None]
                if T_S:
                    d_p += h_m * (t_s - mu[:, None])
                d_t_s = p * h_m
                d_t_x = d_t_s
                if softcap is not None:
                    d_t_x = uncap(d_t_s, slope, None, None)
                d_t_q = dot(like(d_t_x, k), k, d_t_q, PRECISION)
                if T_K is not None:
                    d_q = dot(like(d_t_x, k), t_k, d_q, PRECISION)
                if D_T_MASK is not None:
                    add_mask_grad(D_T_MASK, d_t_s, b, h, i, j, L, S, MASK_ROWS, MASK_COLUMNS)
            if SINGLE:
                w = tl.sum(p * d_p, 1)
            d_s = p * (d_p - w[:, None])
            d_x = d_s
            if softcap is not None:
                d_x = uncap(d_s, slope, bend if JVP else None, d_t_x if JVP else None)
            d_q = dot(like(d_x, k), k, d_q, PRECISION)
            if D_MASK is not None:
                add_mask_grad(D_MASK, d_s, b, h, i, j, L, S, MASK_ROWS, MASK_COLUMNS)

    store_tile(D_Q, d_q * scale, b, h, q0 + m0, q0 + L, BLOCK_M, D, BLOCK_D)
    if JVP:
        store_tile(D_T_Q, d_t_q * scale, b, h, q0 + m0, q0 + L, BLOCK_M, D, BLOCK_D)


@triton.jit
def add_mask_grad(
    D_MASK, d_s, b, h, i, j, L, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Adds a tile of dS to the mask's gradient; ROWS, COLUMNS: the mask has those dimensions, or
    was broadcast."""
    if ROWS and COLUMNS:
        at = pair_at(D_MASK, b, h, i[:, None], j[None, :])
        tl.atomic_add(at, d_s, mask=(i < L)[:, None] & (j < S)[None, :], sem="relaxed")
    elif COLUMNS:
        tl.atomic_add(pair_at(D_MASK, b, h, 0 * j, j), tl.sum(d_s, 0), mask=j < S, sem="relaxed")
    elif ROWS:
        tl.atomic_add(pair_at(D_MASK, b, h, i, 0 * i), tl.sum(d_s, 1), mask=i < L, sem="relaxed")
    else:
        tl.atomic_add(head_at(D_MASK, b, h), tl.sum(d_s))
