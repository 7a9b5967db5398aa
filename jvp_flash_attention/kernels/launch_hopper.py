"""Which calls the warp-specialised passes serve (`hopper.py`, `hopper_keys.py`,
`hopper_queries.py`), and their launches, for problems that TMA reads."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import configs
from .hopper import forward_jvp_kernel
from .hopper_keys import keys_jvp_kernel
from .hopper_queries import queries_jvp_kernel
from .launch import Problem, cdiv, tma_can_read
from .plans import Launch

LAYOUT_TYPES = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
    torch.int8: gl.int8,
}


def serves_forward(p: Problem, bias: Tensor | None, t_bias: Tensor | None) -> bool:
    """Whether `hopper.py` can take the call; everything else is `forward.py`'s."""
    return (
        p.D == p.DV <= 128
        and p.D % 8 == 0  # rows of the results, which TMA writes
        and p.options.scale > 0.0
        and p.options.dropout_p == 0.0
        and t_bias is None
        and min(p.B, p.H, p.L, p.S) > 0
        and (bias is None or _mask_kind(bias, p) != "")
    )


def forward_jvp(p: Problem, q, k, v, bias, t_q, t_k, t_v, out, t_out, lse, mu) -> Launch:
    """What writes O, tO, LSE and μ."""
    mask = "none" if bias is None else _mask_kind(bias, p)
    t = configs.warp_specialized(p.D, 0 if bias is None else bias.element_size())
    tiles = cdiv(p.L, 128)
    items = tiles * p.B * p.H

    def pieces(x: Tensor | None, rows: int):
        if x is None:
            return None, None
        return _descriptor(x, rows, t.D1), _descriptor(x, rows, t.D2) if t.D2 else None

    operands = (
        *(pieces(x, rows) for x, rows in ((q, 64), (k, t.BN), (v, t.BN))),
        *(pieces(x, rows) for x, rows in ((t_q, 64), (t_k, t.BN), (t_v, t.BN))),
        *(pieces(x, 64) for x in (out, t_out)),
    )
    args = (
        *(first for first, _ in operands),
        *(second for _, second in operands),
        *_mask(bias, mask, p, t.BN),
        *(lse, mu, p.options.scale, p.H, p.L, p.S, tiles, items),
    )
    switches = {
        "GROUP": p.H // p.Hk,
        **t._asdict(),
        "CAUSAL": p.options.causal,
        "EDGE": p.options.causal or p.S % t.BN != 0,
        "MASK": mask,
        "BOOL": p.bool_bias,
        "CENTER": p.options.causal or p.S <= 128,  # c matters to rows that see few keys
        # 8 and 2: p̃ times a tangent score must fit float16
        "THRESHOLD": "0f41000000" if q.dtype == torch.bfloat16 else "0f40000000",
        "num_warps": 4,
    }
    return Launch(forward_jvp_kernel, _grid(p, items, q), args, switches)


def serves_backward(p: Problem, *tangents: Tensor | None) -> bool:
    """Whether `hopper_keys.py` can take the call, and `hopper_queries.py`; everything else is
    `backward.py`'s."""
    return (
        p.D % 8 == 0
        and p.D == p.DV <= 128
        and min(p.B, p.H, p.L) > 0
        and p.S > 64  # with fewer keys `backward.py` takes h and w from the tile
        and p.options.dropout_p == 0.0
        and not p.bias
        and None not in tangents
    )


def keys(
    p: Problem, q, k, v, t_q, t_k, t_v, d_out, d_t_out, statistics, d_k, d_t_k, d_v, d_t_v
) -> Launch:
    """What writes dK, dtK, dV and dtV."""
    ring = configs.gradient_ring(p.D)
    tiles = cdiv(p.S, 64)
    items = tiles * p.B * p.Hk
    args = (
        *_squares(ring.D, q, k, v, t_q, t_k, t_v, d_out, d_t_out),
        statistics,
        *_squares(ring.D, d_k, d_t_k, d_v, d_t_v),
        *(p.options.scale, p.L, p.Hk, tiles, items),
    )
    switches = {"QS": ring.COUNT, "BM": 64, **_gradient_switches(p, ring)}
    return Launch(keys_jvp_kernel, _grid(p, items, q), args, switches)


def serves_queries(p: Problem) -> bool:
    """Whether `hopper_queries.py`, which can, is the faster one."""
    return p.D > 64


def queries(p: Problem, q, k, v, t_q, t_k, t_v, d_out, d_t_out, statistics, d_q, d_t_q) -> Launch:
    """What writes dQ and dtQ."""
    ring = configs.gradient_ring(p.D)
    tiles = cdiv(p.L, 64)
    items = tiles * p.B * p.H
    args = (
        *_squares(ring.D, q, k, v, t_q, t_k, t_v, d_out, d_t_out),
        statistics,
        *_squares(ring.D, d_q, d_t_q),
        *(p.options.scale, p.L, p.S, p.H, tiles, items),
    )
    edge = p.options.causal or p.S % 64 != 0
    switches = {"KS": ring.COUNT, "BN": 64, "EDGE": edge, **_gradient_switches(p, ring)}
    return Launch(queries_jvp_kernel, _grid(p, items, q), args, switches)


def _squares(columns: int, *tensors: Tensor | None) -> list:
    """Descriptors of tiles of 64 rows."""
    return [None if x is None else _descriptor(x, 64, columns) for x in tensors]


def _gradient_switches(p: Problem, ring: configs.Ring) -> dict[str, Any]:
    causal = p.options.causal
    return {"GROUP": p.H // p.Hk, "D": ring.D, "CAUSAL": causal, "num_warps": 4}


def _grid(p: Problem, items: int, x: Tensor) -> tuple[int]:
    blocks = cdiv(items, 2) if p.options.causal else items  # which takes pairs
    return (min(blocks, multiprocessors(x.device)),)


def _mask_kind(bias: Tensor, p: Problem) -> str:
    """full (L, S), keys (1, S), or nothing that the pass can read."""
    if bias.shape[3] != p.S or bias.dtype not in LAYOUT_TYPES:
        return ""
    if bias.shape[2] == 1 and p.L > 1:
        return "keys" if bias.stride(3) == 1 else ""
    solid = bias.as_strided(bias.shape, _solid_strides(bias))
    return "full" if bias.stride(3) == 1 and tma_can_read(solid) else ""


def _mask(bias: Tensor | None, kind: str, p: Problem, BN: int):
    """Descriptor of tiles, pointer to rows, and how far a batch entry and a head move either."""
    if bias is None:
        return None, None, 0, 0
    if kind == "full":
        tiles = _descriptor(bias, 64, BN, _solid_strides(bias))
        return tiles, None, int(bias.shape[0] > 1), int(bias.shape[1] > 1)
    b, h = (step if n > 1 else 0 for step, n in zip(bias.stride()[:2], bias.shape[:2], strict=True))
    return None, bias, b, h


def _solid_strides(x: Tensor) -> list[int]:
    """Strides that TMA accepts, also for dimensions of length 1."""
    step = x.stride(2) if x.shape[2] > 1 else 128
    return [s if n > 1 else step for s, n in zip(x.stride()[:3], x.shape, strict=False)] + [1]


def _descriptor(x: Tensor, rows: int, columns: int, strides: list[int] | None = None):
    block = [1, 1, rows, columns]
    layout: Any = _layout(rows, columns, x.dtype)
    return TensorDescriptor(x, list(x.shape), strides or list(x.stride()), block, layout)


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], LAYOUT_TYPES[dtype])


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count
