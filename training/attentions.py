"""Attention functions other than this project's own, with the signature of SDPA, and the tangent of
any."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvp_flash_attention
from jvp_flash_attention.distributed.context_parallel import ContextParallelAttention
from jvp_flash_attention.functorch import tangent


def sdpa(
    query: torch.Tensor,  # (B, H, L, D)
    key: torch.Tensor,  # (B, H, S, D)
    value: torch.Tensor,  # (B, H, S, Dv)
    *options: Any,
    **named: Any,
) -> torch.Tensor:  # (B, H, L, Dv)
    """PyTorch's attention on the MATH backend, always.

    MATH is the only backend with a forward-mode derivative (the fused ones have none, on a CPU
    neither); it materialises the L x S matrix, which is the cost that ``attention=jvp`` avoids.

    Autocast counts for the inputs alone, as in an ordinary call of SDPA. Under ``torch.func.jvp``
    PyTorch forgets that and casts within: on a GPU the backward then raises.
    """
    kind = query.device.type
    with sdpa_kernel(SDPBackend.MATH):
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return F.scaled_dot_product_attention(query, key, value, *options, **named)
        dtype = torch.get_autocast_dtype(kind)
        inputs = (query, key, value)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in inputs)
        with torch.autocast(kind, enabled=False):
            return F.scaled_dot_product_attention(query, key, value, *options, **named)


def sdpa_fused(
    query: torch.Tensor,  # (B, H, L, D)
    key: torch.Tensor,  # (B, H, S, D)
    value: torch.Tensor,  # (B, H, S, Dv)
    *options: Any,
    **named: Any,
) -> torch.Tensor:  # (B, H, L, Dv)
    """The best that PyTorch can do: MATH where there is a tangent, elsewhere whatever fused kernel
    it chooses. With ``objective.jvp.mode=double`` the forward that carries the gradient, and its
    backward, are then the vendor's.
    """
    if any(tangent(x) is not None for x in (query, key, value)):
        return sdpa(query, key, value, *options, **named)
    return F.scaled_dot_product_attention(query, key, value, *options, **named)


def attend_jvp(
    attention: Callable[..., torch.Tensor], values: Any, tangents: list[Any], through: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and tO: of this project's attention by its explicit form, of another one by its jvp."""
    if (explicit := _explicit_form(attention)) is not None:
        return explicit(*values, *tangents, tangent_grad=through)
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def f(*xs: torch.Tensor) -> torch.Tensor:
        arguments = list(values)
        for i, x in zip(moving, xs, strict=True):
            arguments[i] = x
        return attention(*arguments)

    # PyTorch wants a value and its tangent laid out alike, and no view of something larger.
    primals = tuple(values[i].clone(memory_format=torch.contiguous_format) for i in moving)
    # Autocast casts a value and its tangent alike.
    given = tuple(tangents[i].contiguous() for i in moving)
    out, t_out = torch.func.jvp(f, primals, given)  # pyright: ignore[reportAssignmentType]
    return out, t_out if through else t_out.detach()


def _explicit_form(attention: Callable[..., torch.Tensor]) -> Callable[..., Any] | None:
    if isinstance(attention, ContextParallelAttention):
        return attention.jvp
    given = ours(attention)
    return given and partial(jvp_flash_attention.attention_jvp, **given.keywords)


def ours(attention: Callable[..., torch.Tensor]) -> partial[torch.Tensor] | None:
    """This project's attention with the keywords that it was configured with; None: another one."""
    given = attention if isinstance(attention, partial) else partial(attention)
    return given if given.func is jvp_flash_attention.attention and not given.args else None
