"""Custom operators that reach their code in one step.

`torch.library.custom_op` puts three layers of Python between the dispatcher and an operator's code:
one records a graph, one looks for aliases, one steps out of the compiler. Compiled code calls with
values alone, which need none of them, and they take longer than what an operator does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, custom_op

from .functorch import a_dual_among, make_autograd_impl, only

_libraries: dict[str, Library] = {}


def operator(
    name: str, schema: str | None = None, no_tangent: str | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op` of a function that mutates nothing and returns new tensors.

    An operator drops a tangent without a sign of it; one that has `no_tangent` raises that.
    """

    def register(function: Callable[..., Any]) -> Any:
        op = custom_op(name, mutates_args=(), schema=schema)(function)
        if make_autograd_impl is not None:
            _shorten(op, name, function, no_tangent)
        return op

    return register


def _shorten(op: Any, name: str, function: Callable[..., Any], no_tangent: str | None) -> None:
    namespace, short = name.split("::")
    overload = getattr(getattr(torch.ops, namespace), short).default
    differentiate = make_autograd_impl(overload, op)

    def run(bottom: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if no_tangent is not None and a_dual_among(args):
            raise NotImplementedError(no_tangent)
        if keyset == bottom and not kwargs and not _recorded(args):
            return function(*args)  # where the dispatcher would go next
        return differentiate(keyset, *args, **kwargs)

    library = _libraries.setdefault(namespace, Library(namespace, "FRAGMENT"))
    for device in ("CPU", "CUDA"):
        kernel = partial(run, only(device, f"Autograd{device}"))
        library.impl(overload, kernel, f"Autograd{device}", with_keyset=True)


def _recorded(args: tuple) -> bool:
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False
