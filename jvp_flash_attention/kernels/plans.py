"""Launches that are prepared once for all tensors alike.

Between a call and its kernels lie a choice of tiles, descriptors with their checks, and Triton's
binder, which looks at every argument to find the kernel that was compiled for it: three quarters of
a call's host time. All of it depends on the tensors' signature alone (shapes, strides, dtypes,
alignment), so the first call of a signature keeps the compiled kernels and the arguments, and later
ones put their own tensors in.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

MOST = 4096  # signatures; a program with more starts to collect anew


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its arguments in order, its compile-time arguments."""

    kernel: Any
    grid: tuple[int]
    args: tuple
    switches: dict[str, Any]


class _Plan(NamedTuple):
    compiled: CompiledKernel
    grid: tuple[int, int, int]
    args: tuple  # as of the first call
    varying: tuple[tuple[int, int, Callable], ...]  # argument, tensor, tensor -> argument

    def launch(self, tensors: tuple, stream: int) -> None:
        args = list(self.args)
        for at, which, make in self.varying:
            args[at] = make(tensors[which])
        kernel: Any = self.compiled
        if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            kernel[self.grid](*args, stream=stream)  # a profiler listens
        else:  # the same without metadata for hooks
            fixed = (kernel.function, kernel.packed_metadata, None, None, None)
            kernel.run(*self.grid, stream, *fixed, *args)


_plans: dict[tuple, list[_Plan]] = {}


def run(
    key: tuple,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    launches: Callable[[], Iterable[Launch]],
) -> None:
    """Makes the launches. `key` and the signature of `inputs` must determine them up to the tensors
    themselves; `outputs` are fresh tensors whose layout follows. An empty grid is skipped."""
    first = next(x for x in inputs if x is not None)
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return run(key, inputs, outputs, launches)
    tensors = (*inputs, *outputs)
    signature = (key, first.device, *map(_signature, inputs))
    plans = _plans.get(signature)
    if plans is not None:
        stream = _stream(first.device)
        for plan in plans:
            plan.launch(tensors, stream)
        return None
    plans = []
    for kernel, grid, args, switches in launches():
        if grid[0] > 0:
            compiled = kernel[grid](*args, **switches)
            plans.append(_plan(kernel, compiled, grid, args, switches, tensors))
    present = [id(x) for x in tensors if x is not None]
    # Triton's interpreter compiles nothing; one tensor in two places says not which one an argument
    # is
    if None not in plans and len(set(present)) == len(present):
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[signature] = plans
    return None


def _stream(device: torch.device) -> int:
    active: Any = driver.active
    return active.get_current_stream(device.index)


def _signature(x: Tensor | None):
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)


def _plan(kernel, compiled, grid, args, switches, tensors) -> _Plan | None:
    if not isinstance(compiled, CompiledKernel):
        return None
    which = {id(x): i for i, x in enumerate(tensors) if x is not None}
    varying = []
    for at, argument in enumerate(args):
        tensor, make = _maker(argument)
        if tensor is not None:
            varying.append((at, which[id(tensor)], make))
    names = kernel.arg_names[len(args) :]
    args = (*args, *(switches[name] for name in names))
    kept = {at for at, _, _ in varying}
    args = tuple(None if at in kept else x for at, x in enumerate(args))  # holds no tensor alive
    return _Plan(compiled, (grid[0], 1, 1), args, tuple(varying))


def _maker(argument: Any) -> tuple[Tensor | None, Callable]:
    """The tensor in an argument, and how another one of its signature becomes the argument."""
    if isinstance(argument, Tensor):
        return argument, lambda x: x
    if isinstance(argument, tuple) and isinstance(argument[0], Tensor):
        strides = argument[1:]
        return argument[0], lambda x: (x, *strides)
    if hasattr(argument, "block_shape"):  # a descriptor, checked the first time
        kind, fields = type(argument), {**vars(argument), "base": None}

        def descriptor(x: Tensor):
            other = object.__new__(kind)
            other.__dict__.update(fields, base=x)
            return other

        return vars(argument)["base"], descriptor
    return None, lambda x: x
