"""A call as the kernels see it: its tensors, its sizes, and the tiles and operands that follow."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ..call import Inputs, Saved, Spec, Tangents, band, empty_rows, is_default, tf32_allowed
from ..functorch import materialized
from . import configs

TMA = ("sm90", "sm100")  # architectures whose copies it makes
# What a call may ask for beside its mathematics.
DETAILS = ("backend", "rows_first", "compiled", "sharded")
# And beside no mask but causal.
PLAIN = (*DETAILS, "causal", "lower_right")


class Operands(NamedTuple):
    """What the products of a pass are of, by pairs of a tensor and its tangent; None is absent."""

    q: Tensor | None
    t_q: Tensor | None
    k: Tensor | None
    t_k: Tensor | None
    v: Tensor | None
    t_v: Tensor | None
    d_out: Tensor | None = None
    d_t_out: Tensor | None = None


class Call(NamedTuple):
    """Every tensor of a forward or backward pass, as kernels read and write them; None is
    absent."""

    x: Inputs
    t: Tangents
    saved: Saved
    d_out: Tensor | None = None
    d_t_out: Tensor | None = None
    grads: Tangents = Tangents()
    t_grads: Tangents = Tangents()
    # row sums, of `bwd_preprocess`, for who reads them; where there is one, gradients are asked for
    w_sum: Tensor | None = None
    h_sum: Tensor | None = None
    statistics: Tensor | None = None  # LSE, μ, h and w, or LSE and w, once more, as sm90 reads them
    sums: Tensor | None = None  # Σ dQ and Σ dV, in parts: (B, tiles of 64, 2, H, D)
    parts: Operands | None = None  # (B, heads, rows, parts · widest) bfloat16: portable/split.py

    @property
    def jvp(self) -> bool:
        """Whether tO is computed, or dtO given."""
        return self.saved.t_out is not None if self.w_sum is None else self.d_t_out is not None

    @property
    def operands(self) -> Operands:
        x, t = self.x, self.t
        return Operands(x.q, t.q, x.k, t.k, x.v, t.v, self.d_out, self.d_t_out)


class Problem(NamedTuple):
    """Sizes and properties that the kernels of one call share."""

    B: int
    H: int
    Hk: int
    L: int
    S: int
    D: int
    DV: int
    arch: str  # a key of `configs.TABLES`
    tma: bool
    itemsize: int
    spec: Spec
    mask: bool
    bool_mask: bool
    sequences: int | None  # packed ones

    @property
    def widest(self) -> int:
        return configs.padded(max(self.D, self.DV))

    def columns(self, name: str) -> tuple[int, int]:
        """Padded columns of q and k, and of v, in the tiles of a pass.

        On Hopper both are the wider one's unless TMA fetches several tiles ahead. Tiles of the one
        are then put where tiles of the other lay, and where such layouts differ, ptxas 12.8, which
        comes with Triton 3.6 and 3.7, made descriptors before it had the address: products were
        wrong, or read outside of shared memory. At 256 columns it was right."""
        if self.itemsize == 4:
            alike = self.parts(name) > 1 or self.precision(name) == "bf16x6"
        else:
            alike = self.arch == "sm90" and (not self.tma or self.short(name) is not None)
        if alike:
            return self.widest, self.widest
        return configs.padded(self.D), configs.padded(self.DV)

    @property
    def sequence_slots(self) -> int | None:
        """Room for where each packed sequence begins and the last ends, as `block_info.sequence_of`
        looks through it."""
        return None if self.sequences is None else 1 << self.sequences.bit_length()

    def tiles(self, rows: int, block: int) -> int:
        """How many tiles the rows of a head have."""
        return tiles_of(rows, block, self.sequences)

    def short(self, name: str) -> configs.Tile | None:
        """The tile of a pass of sequences that are shorter than a usual one."""
        if self.arch != "sm90" or self.itemsize != 2 or self.sequences is not None:
            return None
        return configs.short(name, self.widest, max(self.L, self.S))

    def tile(self, name: str) -> configs.Tile:
        """The tile of a pass, by the wider of the two head dims. Forward, a bound on the right
        alone takes what a causal mask takes, which it is but for where it begins."""
        short = self.short(name)
        if short is not None:
            return short
        spec, packed = self.spec, self.sequences is not None
        window = spec.left is not None or (packed and band(spec).right is not None)
        window = window or (spec.right is not None and not name.startswith("fwd"))
        extras = self.mask or self.spec.dropout_p > 0.0 or self.spec.softcap > 0.0 or window
        return configs.tile(self.table(name), name, self.widest, extras)

    def table(self, name: str) -> dict[str, tuple]:
        """The tiles of this architecture and arithmetic."""
        parts = self.parts(name)
        if parts > 1:
            return configs.PARTS[parts]
        arithmetic = "half"
        if self.itemsize == 4:
            arithmetic = "bf16x6" if self.precision(name) == "bf16x6" else "float32"
        return configs.TABLES[self.arch][arithmetic]

    def precision(self, name: str) -> str:
        """How products of float32 are computed that is not read in `parts`: one TF32 product where
        the user allows it; otherwise three, or forward on Hopper six bfloat16 products, which keep
        float32's accuracy, or plain float32 at head dim 256, where the split operands outgrow
        shared memory, and on AMD, where there is no TF32x3."""
        if self.itemsize != 4 or self.arch.startswith("gfx") or self.parts(name) > 1:
            return "ieee"
        if tf32_allowed():
            return "tf32"
        if self.widest >= 256:
            return "ieee"
        six = "bf16x6" in configs.TABLES[self.arch] and name.startswith("fwd")
        return "bf16x6" if six else "tf32x3"

    def parts(self, name: str) -> int:
        """In how many bfloat16 parts float32 operands of a pass are read, 1 for none. On Hopper:
        two where the user allows products to lose digits, else three; gradients beside no mask but
        causal, and three forward only in large calls."""
        if self.itemsize != 4 or self.arch != "sm90" or self.widest >= 256:
            return 1
        parts = 2 if tf32_allowed() else 3
        plain = not self.mask and self.sequences is None and is_default(self.spec, but=PLAIN)
        if not (self.large if parts == 3 and name.startswith("fwd") else plain):
            return 1
        tiles = configs.PARTS[parts].get(name, ())
        return parts if configs.column(self.widest) < len(tiles) else 1

    @property
    def large(self) -> bool:
        """Whether three launches that cut operands before cost less than to cut a tile whenever it
        is read, on the host too, which takes 0.1 ms more."""
        rows, keys = (x // (self.sequences or 1) for x in (self.L, self.S))
        return min(rows, keys) >= 512 and self.B * self.H * self.L * keys >= 2**24

    def scalars(self, seed: Tensor | None) -> tuple:
        """scale, soft cap, dropout threshold, 1 / keep probability, batch entries a seed, H, L, S,
        packed sequences."""
        p = self.spec.dropout_p
        group = 1 if seed is None else max(self.B // seed.numel(), 1)
        sizes = (self.H, self.L, self.S, self.sequences)
        scales = (self.spec.scale, self.spec.softcap or None)
        return *scales, int(p * 2**32), 1.0 / (1.0 - p), group, *sizes


def problem(c: Call, spec: Spec, arch: str | None = None, tma: bool | None = None) -> Problem:
    """Sizes and properties of a call, for its tensors' own architecture or the one that is
    named."""
    B, H, L, D = c.x.q.shape
    Hk, S, DV = c.x.v.shape[1:]
    itemsize = c.x.q.element_size()
    arch = arch or architecture(c.x.q.device)
    if tma is None:
        read = c.parts or c.operands
        tma = (
            arch in TMA and (itemsize == 2 or c.parts is not None) and all(map(tma_can_read, read))
        )
    bool_mask = c.x.mask is not None and c.x.mask.dtype == torch.int8
    sizes = (B, H, Hk, L, S, D, DV)
    masked, sequences = c.x.mask is not None, sequences_of(c.x)
    return Problem(*sizes, arch, tma, itemsize, spec, masked, bool_mask, sequences)


@cache
def architecture(device: torch.device) -> str:
    """Whose tables and kernels a device takes: its own, or those of the nearest older one. Triton's
    interpreter, which has no wgmma and multiplies by no bfloat16 parts, takes the oldest."""
    if device.type != "cuda" or knobs.runtime.interpret:
        return "sm80"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm80" if minor == 0 else "sm89"
    return {9: "sm90", 10: "sm100"}.get(major, "sm80" if major < 8 else "sm120")


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at once; an H100's where there is no device."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def with_parts(c: Call, spec: Spec, arch: str | None, name: str) -> Call:
    """The call with room for the parts of its operands, where the kernels of a pass want them."""
    p = problem(c, spec, arch)
    parts = p.parts(name)
    if parts == 1:
        return c
    room = [
        None if x is None else x.new_empty(*x.shape[:3], parts * p.widest, dtype=torch.bfloat16)
        for x in c.operands
    ]
    return c._replace(parts=Operands(*room))


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """One that the kernels read without strides, contiguous: vmap may have expanded it."""
    return None if x is None else x.contiguous()


def readable(x: Tensor | None) -> Tensor | None:
    """The tensor itself where the kernels can read it: unit stride in the last dimension, and rows
    so close that 128 of them are counted in 32 bits; otherwise a copy. Also of a batch that is
    repeated, which TMA cannot read, as is what vmap does not map, where the call is long."""
    if x is None:
        return None
    x = materialized(x)
    if x.stride(-1) != 1 or x.stride(-2) >= 2**24:
        return x.contiguous()
    if _repeated(x):  # results follow the order of its rows and heads in memory
        return empty_rows(x, x.shape[3], Spec(1.0)).copy_(x)
    return x


def _repeated(x: Tensor) -> bool:
    """Whether the batch has stride 0, where TMA would read. Launches of a call that copies are not
    cached, which takes the host a fifth of a millisecond: less than TMA gains from here on."""
    far = x.shape[0] > 1 and x.stride(0) == 0 and x.numel() * x.shape[2] >= 2**36
    return far and x.element_size() == 2 and architecture(x.device) in TMA


def readable_mask(mask: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it: a bool mask as int8."""
    if mask is None:
        return None
    return mask.view(torch.int8) if mask.dtype == torch.bool else materialized(mask)


def operand(x: Tensor | None, p: Problem, rows: int, block_d: int):
    """A tensor (B, heads, rows, D) as the kernels take it: a TMA descriptor, or pointer and
    strides."""
    if x is None:
        return None
    if p.tma:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, block_d])
    return pointer(x)


def pointer(x: Tensor | None):
    """(pointer, stride_b, stride_h, stride_row)."""
    return None if x is None else (x, *x.stride()[:3])


def in_units(*tensors: Tensor | None) -> tuple[Any, ...]:
    """As `pointer`, with strides that count several elements, and how many: of a stride Triton sees
    whether 16 divides it, as it does not the 72 of some head dims, and reads 16 bytes at a time
    where 8 does."""
    steps = [step for x in tensors if x is not None for step in x.stride()[:3]]
    # a stride from 2³¹ on stays whole: the product of its eighth would be one of 32 bits
    unit = 8 if all(step % 8 == 0 and step < 2**31 for step in steps) else 1
    pointers = (
        None if x is None else (x, *(step // unit for step in x.stride()[:3])) for x in tensors
    )
    return (*pointers, unit)


def mask_pointer(mask: Tensor | None, p: Problem):
    """(pointer, four strides) of a mask broadcast to (B, H, L, S)."""
    return None if mask is None else (mask, *mask.expand(p.B, p.H, p.L, p.S).stride())


def blocks_pointer(blocks: Tensor | None, p: Problem):
    """(pointer, stride_b, stride_h, stride_row) of lists of blocks broadcast to (B, H, n, ...)."""
    return None if blocks is None else (blocks, *blocks.expand(p.B, p.H, -1, -1).stride()[:3])


def sequences_of(x: Inputs) -> int | None:
    """How many packed sequences there are, None for none."""
    return None if x.cu_q is None else x.cu_q.shape[0] - 1


def tiles_of(rows: int, block: int, sequences: int | None) -> int:
    """As `block_info.tiles_of`."""
    if sequences is not None and rows > 0:
        return rows // block + sequences + 1
    return cdiv(rows, block)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def tma_can_read(x: Tensor | None) -> bool:
    """TMA wants elements, 16-byte aligned rows and real strides; anything else is read through
    pointers."""
    if x is None:
        return True
    unit = 16 // x.element_size()
    return (
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(s % unit == 0 and s > 0 for s in x.stride()[:3])
    )
