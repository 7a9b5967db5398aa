"""What every kernel is written with: operands, masks, dropout, products.

An operand is a 4-D tensor (B, H, rows, D) handed over as a tuple (pointer, stride_b, stride_h,
stride_row) with unit stride in D, or as a TMA descriptor of block (1, 1, BLOCK, BLOCK_D); rows and
columns outside the tensor read as zero. A mask is (pointer, stride_b, stride_h, stride_l,
stride_s), zero strides where it is broadcast. What is absent is None, and the code that would use
it is not compiled.
"""

import triton
import triton.language as tl

from ..block_info import is_valid, pair_at, row_at

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# tanh x = x + x³ (T0 + T1 x² + T2 x⁴ + T3 x⁶) up to |x| = NEAR, with relative error 1.2e-7
NEAR = tl.constexpr(0.625)
T0, T1 = tl.constexpr(-0.33332341), tl.constexpr(0.13308175)
T2, T3 = tl.constexpr(-0.0519479), tl.constexpr(0.01519537)
OUTSIDE = tl.constexpr(float("-inf"))  # of a floating mask: no pair outside of the tensors counts

# lengths and counts that must not make a kernel compile anew
UNSPECIALIZED = ("threshold", "batch_per_seed", "H", "L", "S", "sequences")


@triton.jit
def load_tile(
    X, b, h, row, rows,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr, TMA: tl.constexpr, CUT: tl.constexpr = False, COLUMN: tl.constexpr = 0,
):  # fmt: skip
    """Rows row ... row + BLOCK of head (b, h) as (BLOCK, BLOCK_D), from COLUMN on; CHECK where they
    may pass the end, `rows`. CUT where they may pass it and the tensor does not end, which TMA
    cannot know."""
    if TMA:
        x = X.load([b, h, row, COLUMN]).reshape(BLOCK, BLOCK_D)
        if CUT:
            x = tl.where((row + tl.arange(0, BLOCK) < rows)[:, None], x, 0.0)
    else:
        i = tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        at = row_at(X, b, h, row) + i[:, None] * X[3] + (COLUMN + d)[None, :]
        if CHECK and D != BLOCK_D:
            x = tl.load(at, mask=(row + i < rows)[:, None] & (d < D)[None, :], other=0.0)
        elif CHECK:
            x = tl.load(at, mask=(row + i < rows)[:, None], other=0.0)
        elif D != BLOCK_D:
            x = tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            x = tl.load(at)
    return x


@triton.jit
def load_operand(
    X, b, h, row, rows,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr, CUT: tl.constexpr = False,
):  # fmt: skip
    """A tile as the tuple of its PARTS, which lie side by side in a row (`split.py`)."""
    WIDTH: tl.constexpr = D if PARTS == 1 else BLOCK_D
    x = (load_tile(X, b, h, row, rows, BLOCK, WIDTH, BLOCK_D, CHECK, TMA, CUT),)
    for PART in tl.static_range(1, PARTS):
        x += (
            load_tile(X, b, h, row, rows, BLOCK, WIDTH, BLOCK_D, CHECK, TMA, CUT, PART * BLOCK_D),
        )
    return x


@triton.jit
def load_present(
    X, b, h, row, rows,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`load_operand`, or None of a tensor that is absent."""
    x = None
    if X is not None:
        x = load_operand(X, b, h, row, rows, BLOCK, D, BLOCK_D, CHECK, TMA, PARTS)
    return x


@triton.jit
def store_tile(
    X, x, b, h, row, rows,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMN: tl.constexpr = 0,
):  # fmt: skip
    """Stores (BLOCK, BLOCK_D) into rows row ... row + BLOCK of head (b, h), where they exist, from
    COLUMN on."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    at = row_at(X, b, h, row) + i[:, None] * X[3] + (COLUMN + d)[None, :]
    inside = (row + i < rows)[:, None] & (d < D)[None, :]
    tl.store(at, x.to(X[0].dtype.element_ty), mask=inside)


@triton.jit
def load_mask(MASK, b, h, i, j, L, S, OTHER: tl.constexpr):
    """The mask at rows i (l, 1) and columns j (1, s), or the transposed: float32, OTHER outside; a
    bool mask reads 0 or 1."""
    at = pair_at(MASK, b, h, i, j)
    return tl.load(at, mask=(i < L) & (j < S), other=OTHER).to(tl.float32)


@triton.jit
def add_mask(s, mask):
    """(S + b in base 2, which pairs −inf hides), for the loaded mask; a finite one stays finite."""
    hidden = mask == float("-inf")
    mask = tl.where(mask < -2e38, -3e38, tl.where(mask > 2e38, 3e38, mask * LOG2E))
    return tl.where(hidden, float("-inf"), s + mask), hidden


@triton.jit
def soft_cap(s, softcap):
    """(c tanh(S / c), u = tanh(S / c), 1 − u²) of scores in base 2: as accurate as float32 near 0
    and far from it, where 1 − u² would have no digits."""
    x = s * (LN2 / softcap)
    z = x * x
    near = x + x * z * (T0 + z * (T1 + z * (T2 + z * T3)))
    e = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    r = 1.0 / (1.0 + e)
    far = tl.where(x < 0.0, e - 1.0, 1.0 - e) * r
    u = tl.where(tl.abs(x) < NEAR, near, far)
    return u * (softcap * LOG2E), u, 4.0 * e * r * r


@triton.jit
def uncap(d_s, slope, bend, d_t_x):
    """dX = (1 − u²) ∘ dS − (2 / c) u ∘ tX ∘ dtX from slope = 1 − u² and bend = (2 / c) u ∘ tX; dtX
    has no second term, and dX none without tX."""
    d_x = d_s * slope
    if bend is not None:
        d_x -= bend * d_t_x
    return d_x


@triton.jit
def store_row_statistics(LSE, row, m, l, inside, SPLIT: tl.constexpr):
    """What the backward needs to find P again, from the running maximum m (base 2) and sum l:
    LSE = m + log l. SPLIT, for a floating mask: the pair (m, log2 l), because beside a mask of −1e9
    in every column a sum has no digits left for log l. Of a pair m is the maximum itself:
    `probabilities` takes no score to be above it."""
    l = tl.where(l == 0.0, 1.0, l)
    if SPLIT:
        tl.store(LSE + 2 * row, m, mask=inside)
        tl.store(LSE + 2 * row + 1, tl.log2(l), mask=inside)
    else:
        tl.store(LSE + row, m * LN2 + tl.log(l), mask=inside)


@triton.jit
def load_row_statistics(LSE, row, inside, MASKED: tl.constexpr, SPLIT: tl.constexpr):
    """(m, log2 l), or (LSE in base 2, 0); m = inf, hence P = 0, for rows past the end and for those
    that attend nothing."""
    log_l = 0.0
    if SPLIT:
        m = tl.load(LSE + 2 * row, mask=inside, other=float("inf"))
        log_l = tl.load(LSE + 2 * row + 1, mask=inside, other=0.0)
    else:
        m = tl.load(LSE + row, mask=inside, other=float("inf")) * LOG2E
    if MASKED:
        m = tl.where(m == float("-inf"), float("inf"), m)
    return m, log_l


@triton.jit
def probabilities(s, m, log_l, SPLIT: tl.constexpr):
    """P from scores in base 2 and row statistics broadcast to their shape."""
    if SPLIT:
        # S, summed in another order than the forward's, must not exceed its maximum: far from 0 its
        # last digit is worth more than exp2 can hold
        p = tl.math.exp2(tl.minimum(s - m, 0.0, tl.PropagateNan.ALL) - log_l)
    else:
        p = tl.math.exp2(s - m)
    return p


@triton.jit
def valid_pairs(
    i, j, S, mask, LEFT: tl.constexpr, RIGHT: tl.constexpr, PHASE: tl.constexpr, BOOL: tl.constexpr,
    shift,
):  # fmt: skip
    """Which pairs of rows i and columns j attend: inside the keys, in a tile at an edge inside the
    band (`is_valid`), selected by a bool mask."""
    EDGE: tl.constexpr = PHASE != 0
    valid = is_valid(i, j, S, LEFT if EDGE else None, RIGHT if EDGE else None, shift)
    if BOOL:
        valid = valid & (mask != 0)
    return valid


@triton.jit
def finite(x):
    """An operand with 0 for NaN and inf: what a hidden key holds must not reach a product, as
    0 · NaN is NaN. Parts after the first are finite."""
    return (tl.where(tl.abs(x[0]) < float("inf"), x[0], 0.0),) + x[1:]  # noqa: RUF005


@triton.jit
def spoiled(x, s):
    """Which rows of scores S see a key or value of x (BLOCK_N, D) that is not finite: 1, else 0.
    Hidden pairs have the score −inf."""
    bad = tl.max(tl.where(tl.abs(x[0]) < float("inf"), 0.0, 1.0), 1)
    return tl.max(tl.where(s == float("-inf"), 0.0, bad[None, :]), 1)


@triton.jit
def dropout_factor(SEED, b, h, i, j, H, batch_per_seed, threshold, keep_scale):
    """Z: 0 for dropped pairs, 1 / (1 − p) for the others; the same for (seed, b, h, i, j) in every
    kernel (philox.py)."""
    seed = tl.load(SEED + b // batch_per_seed)
    c0 = j + i * 0
    c1 = i + j * 0
    c2 = c0 * 0 + ((b % batch_per_seed) * H + h)
    word, _, _, _ = tl.philox(seed, c0, c1, c2, c0 * 0)
    return tl.where(word >= threshold.to(tl.uint32), keep_scale, 0.0)


@triton.jit
def split(x, PARTS: tl.constexpr, DT: tl.constexpr):
    """An operand of float32 values x: the tuple of PARTS of type DT that add up to x, each the
    rounded remainder of those before it."""
    part = x.to(DT)
    parts = (part,)
    for _ in tl.static_range(1, PARTS):
        x -= part.to(tl.float32)
        part = x.to(DT)
        parts += (part,)
    return parts


@triton.jit
def like(x, operand):
    """float32 values x as an operand of as many parts as another, of its type."""
    return split(x, len(operand), operand[0].dtype)


@triton.jit
def transpose(x):
    """An operand, transposed."""
    y = (x[0].T,)
    for PART in tl.static_range(1, len(x)):
        y += (x[PART].T,)
    return y


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b of two operands. Of one part each, PRECISION is how float32 is multiplied: ieee,
    tf32x3 or tf32. Of more, the products whose parts together stand below the last part's place are
    left out. The others are added from small to large and to `acc` in float32: wgmma truncates its
    sums."""
    PARTS: tl.constexpr = len(a)
    if PARTS == 1:
        return tl.dot(a[0], b[0], acc, input_precision=PRECISION)
    x = tl.zeros_like(acc)
    for STEP in tl.static_range(PARTS):  # (2, 0), (1, 1), (0, 2), then (1, 0), (0, 1), then (0, 0)
        for PART in tl.static_range(PARTS - STEP):
            x = tl.dot(a[PARTS - 1 - STEP - PART], b[PART], x)
    return acc + x


@triton.jit
def head_of(pid, tiles, H, REVERSED: tl.constexpr):
    """Batch, head and tile of a program; the tiles of a head are neighbours, so its keys stay in
    L2."""
    t = pid % tiles
    bh = pid // tiles
    if REVERSED:  # under a causal mask the last tile has the most work and starts first
        t = tiles - 1 - t
    return bh // H, bh % H, t
