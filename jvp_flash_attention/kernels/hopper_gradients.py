"""What the warp-specialised gradient passes (`hopper_keys.py`, `hopper_queries.py`) share: their
barriers, and what their producers fetch.

A pass walks with a tile of one side, queries or keys, along the other; the side that stays has one
slot, the other a ring of them.
"""

# Triton's annotations name what a kernel receives, not what its caller passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false
# Each function unpacks all rings and barriers, by name, and uses its own.
# ruff: noqa: RUF059

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_primitives import barriers, load


@gluon.jit
def gradient_barriers(QS: gl.constexpr, KS: gl.constexpr):
    """Ready and free: queries, keys, P and R. Both warpgroups free a tile, one frees P and R."""
    return (
        barriers(QS, 1),
        barriers(QS, 2),
        barriers(KS, 1),
        barriers(KS, 2),
        barriers(1, 1),
        barriers(1, 1),
    )


@gluon.jit
def fetch_queries(x, rings, bars, at, slot, phase):
    """Q, tQ, dO (which may be absent) and dtO into a slot once it is free."""
    q, t_q, d_o, d_t_o, k, t_k, v, t_v = rings
    q_ready, q_free, k_ready, k_free, p_ready, p_free = bars
    mbarrier.wait(q_free.index(slot), phase)
    ready = q_ready.index(slot)
    TILES: gl.constexpr = 3 if x[2] is None else 4
    mbarrier.expect(ready, TILES * x[0].block_type.nbytes)
    load(x[0], at, ready, q.index(slot))
    load(x[1], at, ready, t_q.index(slot))
    load(x[3], at, ready, d_t_o.index(slot))
    if x[2] is not None:
        load(x[2], at, ready, d_o.index(slot))


@gluon.jit
def fetch_keys(x, rings, bars, at, slot, phase):
    """K, tK, V and tV into a slot once it is free."""
    q, t_q, d_o, d_t_o, k, t_k, v, t_v = rings
    q_ready, q_free, k_ready, k_free, p_ready, p_free = bars
    mbarrier.wait(k_free.index(slot), phase)
    ready = k_ready.index(slot)
    mbarrier.expect(ready, 4 * x[0].block_type.nbytes)
    load(x[0], at, ready, k.index(slot))
    load(x[1], at, ready, t_k.index(slot))
    load(x[2], at, ready, v.index(slot))
    load(x[3], at, ready, t_v.index(slot))
