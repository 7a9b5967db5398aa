"""Every rule on the arguments of sharded attention and the one line that its violation prints."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ArgumentTypeError, ArgumentValueError
from .sharding import LAYOUTS


def numbers(
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa=False,
    *, softcap: float = 0.0, window=None, cu_seqlens=None, block_mask=None, tangent_rows=None,
    tangent_keys=None,
) -> tuple[tuple[float, bool, float | None, bool], float]:  # fmt: skip
    """SDPA's arguments after the mask, in their order, and the soft cap; the other ones of
    `attention` alone are refused."""
    refused = {"window": window, "cu_seqlens": cu_seqlens, "block_mask": block_mask}
    refused |= {"tangent_rows": tangent_rows, "tangent_keys": tangent_keys}
    for name, x in refused.items():
        if x is not None:
            raise NotImplementedError(
                f"context parallel attention takes no {name}; give each process whole sequences,"
                " and call attention"
            )
    return (dropout_p, is_causal, scale, enable_gqa), softcap


def arguments(name: str, query: Tensor, key: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    """No dropout; a mask that says which keys there are, and nothing else."""
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"{name} has no dropout, got dropout_p={dropout_p}; drop in other layers"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        raise NotImplementedError(
            f"{name} takes a bool attn_mask of the keys, got"
            f" {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}; without sharding"
            " `attention` takes floating masks"
        )
    if mask.dim() > 1 and mask.shape[-2] != 1:
        raise NotImplementedError(
            f"{name} takes an attn_mask (..., heads, 1, local S) of the keys, got"
            f" {tuple(mask.shape)}; is_causal is the only mask with rows"
        )
    if mask.shape[-1:] != key.shape[-2:-1]:
        raise ArgumentValueError(
            f"{name} needs an attn_mask sharded with the keys, (..., {key.shape[-2]}), got"
            f" {tuple(mask.shape)}"
        )


def outside_of_compile(name: str) -> None:
    """A mesh is not looked into while a graph is traced."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} with a mesh cannot be compiled; make the function before, by"
            " context_parallel_attention(mesh, kind), and call it in the compiled code"
        )


def ring(name: str, mesh: DeviceMesh, layout: str, lengths: tuple[int, int] | None) -> None:
    """A 1-D mesh, a layout and two lengths."""
    dimensions(name, mesh, 1)
    if layout not in LAYOUTS:
        raise ArgumentValueError(f"{name} needs a layout of {LAYOUTS}, got {layout!r}")
    whole(name, lengths)


def whole(name: str, lengths: tuple[int, int] | None) -> None:
    """Two lengths, or None."""
    if lengths is None:
        return
    if len(lengths) != 2 or not all(isinstance(n, int) and n >= 0 for n in lengths):
        raise ArgumentValueError(
            f"{name} needs lengths=(L, S) of the whole sequences or None, got {lengths!r}"
        )


def dimensions(name: str, mesh: DeviceMesh, count: int) -> None:
    """A mesh with `count` dimensions."""
    if not isinstance(mesh, DeviceMesh):
        raise ArgumentTypeError(f"{name} needs a torch DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != count:
        raise ArgumentValueError(
            f"{name} needs a mesh with {count} dimension{'s' * (count > 1)}, got {mesh.ndim};"
            " take one as mesh['name']"
        )


def heads(name: str, H: int, size: int) -> None:
    """Heads are dealt out evenly."""
    if H % size:
        raise ArgumentValueError(
            f"{name} needs query heads divisible by its {size} processes, got {H}; use"
            " ring_attention, or a 2-D mesh with fewer"
        )
