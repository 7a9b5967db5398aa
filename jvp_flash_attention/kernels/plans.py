"""Launches that are prepared once for all tensors alike.

Between a call and its kernels lie a choice of tiles, descriptors with their checks, and Triton's
binder, which looks at every argument to find the kernel that was compiled for it: three quarters of
a call's host time. All of it depends on the tensors' signature alone (shapes, strides, dtypes,
alignment), so the first call of a signature keeps the compiled kernels and the arguments, and later
ones put their own tensors in. Tensors at addresses that were there before, as a training step finds
them again and again, need not even that: the whole call is kept, TMA descriptors included.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ..options import layout
from .recorder import Call, recorder

MOST = 4096  # signatures, as many as `recall` keeps; a program with more starts to collect anew
READY = 2048  # calls of all signatures together, of 5 to 20 kilobytes each


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its arguments in order, its compile-time arguments."""

    kernel: Any
    grid: tuple[int]
    args: tuple
    switches: dict[str, Any]


class Plan(NamedTuple):
    """A launch without its tensors."""

    start: Callable[[list, int | None], Call | None]  # arguments, stream
    args: tuple  # of the first call; None where a tensor goes
    varying: tuple[tuple[int, int, Callable], ...]  # argument, tensor, tensor -> argument


class Plans(NamedTuple):
    """The launches of one signature."""

    plans: list[Plan]
    mark: object  # stands for them in the keys of _ready, where it keeps them apart from later ones


_plans: dict[tuple, Plans] = {}
_ready: dict[tuple, list[Call]] = {}  # the calls where tensors lay at given addresses


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
    made, instrumented = [], False
    for kernel, grid, args, switches in launches():
        if grid[0] > 0:
            compiled = kernel[grid](*args, **switches)
            instrumented |= _instrumented(compiled)
            made.append(_plan(kernel, compiled, grid, args, switches, tensors))
    present = [id(x) for x in tensors if x is not None]
    distinct = len(set(present)) == len(present)  # else one does not say which argument it is
    if distinct and not instrumented:
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[signature] = Plans(made, object())
    return None


def find(key: tuple, inputs: tuple[Tensor | None, ...]) -> Plans | None:
    """What an earlier `run` with this key and inputs like these left."""
    return _plans.get(_signature(key, inputs))


def forget() -> None:
    """Prepares every launch anew, for instance with another table of tiles. What `recall` keeps
    stays as it is."""
    _plans.clear()
    _ready.clear()


def launch(plans: Plans, tensors: tuple, device: torch.device) -> None:
    """`tensors`: the inputs and outputs of a `run`, in its order."""
    stream = _stream(device)
    where = (plans.mark, stream, *[None if x is None else x.data_ptr() for x in tensors])
    calls = _ready.get(where)
    if calls is not None and not _watched():
        for start, args in calls:
            start(*args)
        return
    calls = []
    for start, fixed, varying in plans.plans:
        args = list(fixed)
        for at, which, make in varying:
            args[at] = make(tensors[which])
        calls.append(start(args, stream))
    if None not in calls:
        if len(_ready) >= READY:
            _ready.clear()
        _ready[where] = calls


def _instrumented(compiled: Any) -> bool:
    """Whether a profiler's code is in the kernel. It wants the profiler's memory, and Triton takes
    another kernel once the profiler has gone."""
    return getattr(getattr(compiled, "run", None), "profile_scratch_size", 0) > 0


def _watched() -> bool:
    """Whether a profiler listens to Triton's launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _stream(device: torch.device) -> int | None:
    if device.type != "cuda":  # Triton's interpreter
        return None
    active: Any = driver.active
    return active.get_current_stream(device.index)


def _signature(key: tuple, inputs: tuple[Tensor | None, ...]) -> tuple:
    return key, *map(layout, inputs)


def _plan(kernel, compiled, grid, args, switches, tensors) -> Plan:
    which = {id(x): i for i, x in enumerate(tensors) if x is not None}
    if isinstance(compiled, CompiledKernel):
        start, pointer = _compiled(compiled, (grid[0], 1, 1)), Tensor.data_ptr
        later = tuple(switches[name] for name in kernel.arg_names[len(args) :])
    else:  # Triton's interpreter compiles nothing, and reads the tensors themselves
        start, pointer, later = partial(_interpret, kernel, grid, switches), lambda x: x, ()
    varying = []
    for at, argument in enumerate(args):
        tensor, make = _maker(argument, pointer)
        if tensor is not None:
            varying.append((at, which[id(tensor)], make))
    kept = {at for at, _, _ in varying}
    fixed = (None if at in kept else x for at, x in enumerate(args))  # holds no tensor alive
    return Plan(start, (*fixed, *later), tuple(varying))


def _compiled(compiled: CompiledKernel, grid: tuple) -> Callable[[list, int | None], Call | None]:
    run: Any = compiled.run
    record = recorder(run)
    # no metadata and no hooks
    fixed = (compiled.function, compiled.packed_metadata, None, None, None)

    def start(args: list, stream: int | None) -> Call | None:
        if _watched():
            compiled[grid](*args, stream=stream)
            return None
        if record is None:
            run(*grid, stream, *fixed, *args)
            return None
        call = record(*grid, stream, *fixed, *args)
        if call is not None:
            call.launch(*call.args)
        return call

    return start


def _interpret(kernel: Any, grid: tuple, switches: dict, args: list, _stream: int | None) -> None:
    kernel[grid](*args, **switches)


def _maker(argument: Any, pointer: Callable) -> tuple[Tensor | None, Callable]:
    """The tensor in an argument, and how another one of its signature becomes the argument."""
    if isinstance(argument, Tensor):
        return argument, pointer
    if isinstance(argument, tuple) and isinstance(argument[0], Tensor):  # launch.pointer's, mask's
        strides = argument[1:]
        return argument[0], lambda x: (pointer(x), *strides)
    if hasattr(argument, "block_shape"):  # a descriptor, checked the first time
        kind, fields = type(argument), {**vars(argument), "base": None}

        def descriptor(x: Tensor):
            other = object.__new__(kind)
            other.__dict__.update(fields, base=x)
            return other

        return vars(argument)["base"], descriptor
    return None, pointer
