"""The warp of the warp-specialised forward that fetches tiles by TMA (`forward.py`)."""

# What is known at compile time stands in an `if` of its own.
# ruff: noqa: SIM102

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .fwd_primitives import work_range
from .primitives import ROWS, advance, listed_row, load, load_at, work_items


@gluon.jit
def _fetch(x, buffers, at: gl.constexpr, b, h, row, barrier, slot):
    """Both pieces of one tile of operand number `at`; V2 and tV2 alternate."""
    load_at(x[at][0], b, h, row, 0, barrier, buffers[at][0].index(slot))
    if x[at][1] is not None:
        slot2 = slot
        if at >= 4:
            if x[5][0] is not None:
                slot2 = 2 * slot + at - 4
        load_at(x[at][1], b, h, row, 64, barrier, buffers[at][1].index(slot2))


@gluon.jit
def producer(
    x, mask_tiles, t_mask_tiles, b_step, h_step, buffers, bars, work,
    BLOCK_N: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
    STAGES_Q: gl.constexpr, STAGES_MASK: gl.constexpr,
    GROUP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr,
    PAIRS: gl.constexpr, SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    MASK: gl.constexpr, ROW_BYTES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches. x: the operands Q, tQ, K, tK, V, tV, each in two pieces; ROW_BYTES: of
    both."""
    q_ready, q_free, k_ready, k_free, v_ready, v_free, b_ready, b_free = bars
    T_Q: gl.constexpr = x[1][0] is not None
    T_K: gl.constexpr = x[3][0] is not None
    T_V: gl.constexpr = x[5][0] is not None
    kj = 0
    vj = 0
    qj = 0
    bj = 0
    k_phase = 1
    v_phase = 1
    q_phase = 1
    b_phase = 1
    for e in range(work_items(work[8], PAIRS)):
        b, h, q0, _L, k0, _S, m0, _shift, begin, end, blocks = work_range(
            e, work, BLOCK_N, LEFT, RIGHT, LOWER_RIGHT, PAIRS, SEQUENCES, BLOCK_Q, BLOCK_K, 1
        )
        hk = h // GROUP
        for j in range(begin, end):
            n0 = k0 + j * BLOCK_N
            if work[2] is not None:
                n0 = listed_row(blocks, n0, BLOCK_K)
            mbarrier.wait(k_free.index(kj), k_phase)
            ready = k_ready.index(kj)
            mbarrier.expect(ready, BLOCK_N * ROW_BYTES * (2 if T_K else 1))
            _fetch(x, buffers, 2, b, hk, n0, ready, kj)
            if T_K:
                _fetch(x, buffers, 3, b, hk, n0, ready, kj)
            kj, k_phase = advance(kj, k_phase, 1, STAGES_K)
            if j == begin:  # after the first keys, which need not wait until results are stored
                for g in gl.static_range(2):
                    mbarrier.wait(q_free.index(qj + g), q_phase)
                    q_bar = q_ready.index(qj + g)
                    mbarrier.expect(q_bar, ROWS * ROW_BYTES * (2 if T_Q else 1))
                    _fetch(x, buffers, 0, b, h, q0 + m0 + g * ROWS, q_bar, qj + g)
                    if T_Q:
                        _fetch(x, buffers, 1, b, h, q0 + m0 + g * ROWS, q_bar, qj + g)
                qj, q_phase = advance(qj, q_phase, 2, 2 * STAGES_Q)
            if MASK == "full":
                mbarrier.wait(b_free.index(bj), b_phase)
                b_bar = b_ready.index(bj)
                TILES: gl.constexpr = 2 if t_mask_tiles is None else 4
                mbarrier.expect(b_bar, TILES * mask_tiles.block_type.nbytes)
                for g in gl.static_range(2):
                    at = [b * b_step, h * h_step, m0 + g * ROWS, j * BLOCK_N]
                    load(mask_tiles, at, b_bar, buffers[6].index(2 * bj + g))
                    if t_mask_tiles is not None:
                        load(t_mask_tiles, at, b_bar, buffers[7].index(2 * bj + g))
                bj, b_phase = advance(bj, b_phase, 1, STAGES_MASK)
            mbarrier.wait(v_free.index(vj), v_phase)
            v_bar = v_ready.index(vj)
            mbarrier.expect(v_bar, BLOCK_N * ROW_BYTES * (2 if T_V else 1))
            _fetch(x, buffers, 4, b, hk, n0, v_bar, vj)
            if T_V:
                _fetch(x, buffers, 5, b, hk, n0, v_bar, vj)
            vj, v_phase = advance(vj, v_phase, 1, STAGES_V)
