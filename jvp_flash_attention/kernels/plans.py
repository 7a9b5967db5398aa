"""Launches that are prepared once for all tensors alike.

Between a call and its kernels lie a choice of tiles, descriptors with their checks, and Triton's
binder, which looks at every argument to find the kernel that was compiled for it: three quarters of
a call's host time. All of it depends on the tensors' signature alone (shapes, strides, dtypes,
alignment), so the first call of a signature keeps the compiled kernels and the arguments, and later
ones put their own tensors in.
"""

from collections.abc import Callable, Iterable
from functools import partial
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


class Plan(NamedTuple):
    """A launch without its tensors."""

    start: Callable[[list, int | None], Any]  # arguments, stream
    args: tuple  # as of the first call
    varying: tuple[tuple[int, int, Callable], ...]  # argument, tensor, tensor -> argument


_plans: dict[tuple, list[Plan]] = {}


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
    signature = _signature(key, inputs)
    plans = _plans.get(signature)
    if plans is not None:
        return launch(plans, tensors, first.device)
    plans = []
    for kernel, grid, args, switches in launches():
        if grid[0] > 0:
            compiled = kernel[grid](*args, **switches)
            plans.append(_plan(kernel, compiled, grid, args, switches, tensors))
    present = [id(x) for x in tensors if x is not None]
    if len(set(present)) == len(present):  # else one does not say which argument it is
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[signature] = plans
    return None


def find(key: tuple, inputs: tuple[Tensor | None, ...]) -> list[Plan] | None:
    """What an earlier `run` with this key and inputs like these left."""
    return _plans.get(_signature(key, inputs))


def launch(plans: list[Plan], tensors: tuple, device: torch.device) -> None:
    """`tensors`: the inputs and outputs of a `run`, in its order."""
    stream = _stream(device)
    for start, fixed, varying in plans:
        args = list(fixed)
        for at, which, make in varying:
            args[at] = make(tensors[which])
        start(args, stream)


def _stream(device: torch.device) -> int | None:
    if device.type != "cuda":  # Triton's interpreter
        return None
    active: Any = driver.active
    return active.get_current_stream(device.index)


def _signature(key: tuple, inputs: tuple[Tensor | None, ...]) -> tuple:
    device = next(x for x in inputs if x is not None).device
    return key, device, *map(_layout, inputs)


def _layout(x: Tensor | None):
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)


def _plan(kernel, compiled, grid, args, switches, tensors) -> Plan:
    which = {id(x): i for i, x in enumerate(tensors) if x is not None}
    varying = []
    for at, argument in enumerate(args):
        tensor, make = _maker(argument)
        if tensor is not None:
            varying.append((at, which[id(tensor)], make))
    if isinstance(compiled, CompiledKernel):
        args = (*args, *(switches[name] for name in kernel.arg_names[len(args) :]))
        run: Any = compiled.run
        fixed = (compiled.function, compiled.packed_metadata, None, None, None)
        start = partial(_start, compiled, run, (grid[0], 1, 1), fixed)
    else:  # Triton's interpreter compiles nothing
        start = partial(_interpret, kernel, grid, switches)
    kept = {at for at, _, _ in varying}
    args = tuple(None if at in kept else x for at, x in enumerate(args))  # holds no tensor alive
    return Plan(start, args, tuple(varying))


def _start(compiled: Any, run: Callable, grid: tuple, fixed: tuple, args: list, stream) -> None:
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
        compiled[grid](*args, stream=stream)  # a profiler listens
    else:  # the same without metadata for hooks
        run(*grid, stream, *fixed, *args)


def _interpret(kernel: Any, grid: tuple[int], switches: dict, args: list, _stream: None) -> None:
    kernel[grid](*args, **switches)


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
