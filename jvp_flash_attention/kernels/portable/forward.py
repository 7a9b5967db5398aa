"""Forward, and forward with its JVP, in one pass over the keys.

    S = s QKᵀ + b        tS = s (tQ Kᵀ + Q tKᵀ) + tb        P = softmax(S)        μ = rowsum(P ∘ tS)
    O = P V              tO = (P ∘ (tS − μ)) V + P tV

With a soft cap c and u = tanh(s QKᵀ / c): S = c u + b, tS = (1 − u²) ∘ s (tQ Kᵀ + Q tKᵀ) + tb.

Online over tiles of keys, with the running maximum m, P̃ = exp(S − m), α = exp(m_old − m_new):

    l ← α l + rowsum(P̃)          r ← α r + rowsum(P̃ ∘ (tS − c))
    o ← α o + P̃ V                t ← α t + (P̃ ∘ (tS − c)) V + P̃ tV      one accumulator t, not two
    O = o / l                     tO = t / l − (r / l) O
    LSE = m + log l               μ = r / l + c

The constant c of a row changes nothing in exact arithmetic; as the mean of tS over the first tile
of keys it is near μ and keeps P̃ ∘ (tS − c), which is rounded to 16 bits for its product with V, as
small as what remains of it in tO.

Products of a tile: 2 for the value; with all tangents 6, and an absent tangent removes its own. The
softmax runs in base 2. With dropout, Z multiplies P̃ in the products with the values and nowhere
else.
"""

import triton
import triton.language as tl

from ..block_info import (
    first_row,
    key_parts,
    listed_row,
    listed_rows,
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
    soft_cap,
    spoiled,
    store_row_statistics,
    store_tile,
    transpose,
    valid_pairs,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    Q, K, V, T_Q, T_K, T_V, MASK, T_MASK, SEED, CU_Q, CU_K, KV_BLOCKS, O, T_O, LSE, MU,
    scale, softcap, threshold, keep_scale, batch_per_seed, H, L, S, sequences, ITEM,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOOL: tl.constexpr, WHOLE: tl.constexpr,
    PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, those of another program where ITEM names it
    (`repair.py`). WHOLE: every tile of keys is full and needs no check. PRESCALE: scores are scaled
    before their maximum is taken, as a mask, a soft cap or a scale <= 0 requires."""
    T_S: tl.constexpr = T_Q is not None or T_K is not None or T_MASK is not None
    JVP: tl.constexpr = T_O is not None

    pid = tl.program_id(0) if ITEM is None else ITEM
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
    q = load_operand(Q, b, h, q0 + m0, q0 + L, BLOCK_M, D, BLOCK_D, True, TMA, PARTS)
    if T_Q is not None:
        t_q = load_operand(T_Q, b, h, q0 + m0, q0 + L, BLOCK_M, D, BLOCK_D, True, TMA, PARTS)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    r = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    t = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    c = tl.zeros([BLOCK_M], tl.float32)
    spoil = tl.zeros([BLOCK_M], tl.float32)  # 1 in rows that see a value which is not finite
    t_spoil = tl.zeros([BLOCK_M], tl.float32)
    scale2 = scale * LOG2E

    BANDED: tl.constexpr = LEFT is not None or RIGHT is not None
    CUT: tl.constexpr = CU_Q is not None and not BANDED
    seen = S
    if KV_BLOCKS is not None:
        blocks = row_at(KV_BLOCKS, b, h, m0 // BLOCK_Q)
        seen = listed_rows(blocks, S, BLOCK_K)
    parts = key_parts(m0 + shift, seen, BLOCK_M, BLOCK_N, LEFT, RIGHT, LOWER_RIGHT)
    for PHASE in tl.static_range(1 if WHOLE else 2 if LEFT is None else 3):
        for x0 in tl.range(parts[2 * PHASE], parts[2 * PHASE + 1], BLOCK_N):
            n0 = x0
            if KV_BLOCKS is not None:
                n0 = listed_row(blocks, x0, BLOCK_K)
            j = n0 + tl.arange(0, BLOCK_N)
            k = load_operand(K, b, hk, k0 + n0, k0 + S, BLOCK_N, D, BLOCK_D, PHASE != 0, TMA, PARTS)
            zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            s = dot(q, transpose(k), zero, PRECISION)
            if T_S:
                t_s = zero
                if T_Q is not None:
                    t_s = dot(t_q, transpose(k), t_s, PRECISION)
                if T_K is not None:
                    t_k = load_operand(
                        T_K, b, hk, k0 + n0, k0 + S, BLOCK_N, D, BLOCK_D, PHASE != 0, TMA, PARTS
                    )
                    t_s = dot(q, transpose(t_k), t_s, PRECISION)
                t_s *= scale
            if softcap is not None:
                s, _, slope = soft_cap(s * scale2, softcap)
                if T_S:
                    t_s *= slope
            if T_MASK is not None:
                t_s += load_mask(T_MASK, b, h, i[:, None], j[None, :], L, S, 0)
            if PRESCALE and softcap is None:
                s *= scale2
            mask = zero
            if MASK is not None:
                mask = load_mask(MASK, b, h, i[:, None], j[None, :], L, S, 0 if BOOL else OUTSIDE)
                if not BOOL:
                    s, hidden = add_mask(s, mask)
                    if T_S:
                        t_s = tl.where(hidden, 0.0, t_s)
            if PHASE != 0 or BOOL:
                valid = valid_pairs(
                    i[:, None], j[None, :], S, mask, LEFT, RIGHT, PHASE, BOOL, shift
                )
                s = tl.where(valid, s, float("-inf"))
                if T_S:
                    t_s = tl.where(valid, t_s, 0.0)

            if PRESCALE:
                m_new = tl.maximum(m, tl.max(s, 1))
            else:
                m_new = tl.maximum(m, tl.max(s, 1) * scale2)
            base = m_new
            if (
                MASK is not None or LEFT is not None
            ):  # a row that has attended nothing yet: exp2(−inf − 0) = 0, not NaN
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
            if PRESCALE:
                p = tl.math.exp2(s - base[:, None])
            else:
                p = tl.math.exp2(s * scale2 - base[:, None])
            alpha = tl.math.exp2(m - base)
            m = m_new
            row_p = tl.sum(p, 1)
            l = l * alpha + row_p
            o = o * alpha[:, None]
            if T_S:
                p_t_s = p * t_s
                row_t_s = tl.sum(p_t_s, 1)
                if x0 == parts[0]:  # the first tile
                    c = row_t_s / tl.where(row_p == 0.0, 1.0, row_p)
                p_t_s -= p * c[:, None]
                r = r * alpha + (row_t_s - row_p * c)
            if JVP:
                t = t * alpha[:, None]
            if SEED is not None:
                z = dropout_factor(
                    SEED, b, h, q0 + i[:, None], k0 + j[None, :],
                    H, batch_per_seed, threshold, keep_scale,
                )  # fmt: skip
                p = p * z
                if T_S:
                    p_t_s = p_t_s * z

            v = load_operand(
                V, b, hk, k0 + n0, k0 + S, BLOCK_N, DV, BLOCK_DV, PHASE != 0, TMA, PARTS,
                CUT and PHASE != 0,
            )  # fmt: skip
            if MASK is not None or (BANDED and PHASE != 0):
                spoil = tl.maximum(spoil, spoiled(v, s))
                v = finite(v)
            o = dot(like(p, k), v, o, PRECISION)
            if T_S:
                t = dot(like(p_t_s, k), v, t, PRECISION)
            if T_V is not None:
                t_v = load_operand(
                    T_V, b, hk, k0 + n0, k0 + S, BLOCK_N, DV, BLOCK_DV, PHASE != 0, TMA, PARTS,
                    CUT and PHASE != 0,
                )  # fmt: skip
                if MASK is not None or (BANDED and PHASE != 0):
                    t_spoil = tl.maximum(t_spoil, spoiled(t_v, s))
                    t_v = finite(t_v)
                t = dot(like(p, k), t_v, t, PRECISION)

    inverse = 1.0 / tl.where(l == 0.0, 1.0, l)  # a row that attends nothing gives 0
    o = o * inverse[:, None]
    if MASK is not None or BANDED:
        o = tl.where(spoil[:, None] > 0.0, float("nan"), o)
    row = first_row(b, h, H, rows) + q0 + i
    store_tile(O, o, b, h, q0 + m0, q0 + L, BLOCK_M, DV, BLOCK_DV)
    store_row_statistics(LSE, row, m, l, i < L, MASK is not None and not BOOL)
    if JVP:
        t = t * inverse[:, None]
        if MASK is not None or BANDED:
            t = tl.where(tl.maximum(spoil, t_spoil)[:, None] > 0.0, float("nan"), t)
        r = r * inverse
        if T_S:
            t -= r[:, None] * o
        store_tile(T_O, t, b, h, q0 + m0, q0 + L, BLOCK_M, DV, BLOCK_DV)
        tl.store(MU + row, r + c, mask=i < L)
