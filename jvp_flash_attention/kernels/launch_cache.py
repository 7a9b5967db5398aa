"""Launches of earlier calls, for all later ones like them.

Between a call and its kernels lie a choice of tiles, descriptors with their checks, and Triton's
binder, which looks at every argument to find the kernel that was compiled for it: three quarters of
a call's host time. All of it depends on the tensors' shapes, strides, dtypes, alignment and device
alone, so the first call of a kind keeps the compiled kernels, the arguments and what results look
like, and later ones put their own tensors in.

    launch_cache.enable(False)      every call of every kernel goes through Triton's binder
    launch_cache.clear()            launches are made anew

A cached launch starts a `CompiledKernel` as Triton itself does, which Triton does not promise: with
a version that is not in `TRITONS`, or without one of the names, nothing is cached. Entries hold no
tensors. Streams, CUDA graphs and devices: each launch goes to the current stream of its tensors'
device. Threads: an entry is never changed once it is there. A forked process begins without any.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

TRITONS = ("3.6", "3.7", "3.8", "3.9")
MOST = 4096  # kinds of calls; a program with more starts to collect anew

try:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    _hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    _ = [hook.calls for hook in _hooks]
    KNOWN = triton.__version__.startswith(tuple(f"{version}." for version in TRITONS))
except (ImportError, AttributeError):
    KNOWN = False
    CompiledKernel, driver = type(None), None  # type: ignore[assignment,misc]

_enabled = KNOWN
_entries: dict[tuple, "Entry"] = {}


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its arguments in order, its compile-time arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constexprs: dict[str, Any]

    def run(self) -> Any:
        """Through Triton's binder, which compiles where it must; gives the compiled kernel."""
        return self.kernel[self.grid](*self.args, **self.constexprs)

    def compile(self) -> Any:
        """For Triton's active driver, which need have no device."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.constexprs)


class CachedLaunch(NamedTuple):
    """A launch without its tensors."""

    start: Callable[[list, int | None], None]  # arguments, stream
    args: tuple  # of the first call; None where a tensor goes
    varying: tuple[tuple[int, int, Callable], ...]  # argument, tensor, tensor -> argument


class Entry(NamedTuple):
    """A kind of call."""

    launches: list[CachedLaunch]
    results: tuple[Callable[[Tensor], Tensor] | None, ...]  # how each is allocated, beside q
    bytes: tuple[int, ...]  # inputs that are read as int8: bool masks


def enable(on: bool = True) -> None:
    """Switches the cache on or off, for the whole process; it is on where Triton is known."""
    global _enabled
    _enabled = on and KNOWN
    clear()


def clear() -> None:
    """Forgets all entries, for instance because a table of tiles has changed."""
    _entries.clear()


os.register_at_fork(after_in_child=clear)


def key(what: tuple, inputs: tuple[Tensor | None, ...]) -> tuple:
    """Of a kind of call; `what` and the kind of the tensors must determine the launches and results
    up to the tensors themselves."""
    return (what, *[x if x is None else tensor_key(x) for x in inputs])


def tensor_key(x: Tensor) -> tuple:
    """What launches depend on, of a tensor. Its device too: a cached launch takes an address
    without asking whose it is. A symbolic zero has no address."""
    address = x.data_ptr()
    of_memory = address % 16 if address else None
    return x.shape, x.stride(), x.dtype, of_memory, x.get_device(), x.is_neg()


def replay(key: tuple, inputs: tuple[Tensor | None, ...]) -> list[Any] | None:
    """The results of a call by the launches of an earlier one of its kind; None where there was
    none."""
    entry = _entries.get(key)
    if entry is None:
        return None
    q: Any = inputs[0]
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return replay(key, inputs)
    results: list[Any] = [None if make is None else make(q) for make in entry.results]
    tensors = [*inputs, *results]
    for at in entry.bytes:
        tensors[at] = tensors[at].view(torch.int8)
    active: Any = q.is_cuda and driver.active  # type: ignore[union-attr]
    stream = active.get_current_stream(q.get_device()) if active else None
    for start, fixed, varying in entry.launches:
        args = list(fixed)
        for at, which, make in varying:
            args[at] = make(tensors[which])
        start(args, stream)
    return results


def record(
    key: tuple,
    inputs: tuple[Tensor | None, ...],
    read: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    launches: Callable[[], Iterable[Launch]],
    zeroed: tuple[int, ...] = (),
) -> None:
    """Makes the launches, an empty grid aside, and keeps them. `read` are the inputs as the kernels
    read them: where one had to be copied nothing is kept. `zeroed` are the results that begin as
    zeros."""
    q: Any = inputs[0]
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return record(key, inputs, read, results, launches, zeroed)
    tensors = (*read, *results)
    made, instrumented = [], False
    for launch in launches():
        if min(launch.grid) > 0:
            compiled = launch.run()
            if _enabled:
                # a profiler's code wants its memory, and Triton takes another kernel without it
                run = getattr(compiled, "run", None)
                instrumented |= getattr(run, "profile_scratch_size", 0) > 0
                made.append(_cached(launch, compiled, tensors))
    present = [id(x) for x in tensors if x is not None]
    distinct = len(set(present)) == len(present)  # else one does not say which argument it is
    pairs = [(i, x, y) for i, (x, y) in enumerate(zip(inputs, read, strict=True)) if x is not y]
    bool_masks = all(x.dtype == torch.bool and not x.is_neg() for _, x, _ in pairs if x is not None)
    if _enabled and distinct and bool_masks and not instrumented and None not in made:
        if len(_entries) >= MOST:
            _entries.clear()
        makers = tuple(_allocator(x, i in zeroed, q) for i, x in enumerate(results))
        _entries[key] = Entry(made, makers, tuple(i for i, _, _ in pairs))


def _allocator(x: Tensor | None, zeroed: bool, q: Tensor) -> Callable[[Tensor], Tensor] | None:
    if x is None:
        return None
    shape, stride, dtype = x.shape, x.stride(), x.dtype
    if zeroed:
        return lambda q: q.new_zeros(shape, dtype=dtype)
    if dtype == q.dtype:
        return lambda q: q.new_empty_strided(shape, stride)
    return lambda q: q.new_empty_strided(shape, stride, dtype=dtype)


def _cached(launch: Launch, compiled: Any, tensors: tuple) -> CachedLaunch | None:
    kernel, grid, args, constexprs = launch
    which = {id(x): i for i, x in enumerate(tensors) if x is not None}
    if isinstance(compiled, CompiledKernel):
        try:
            start = _starter(compiled, (*grid, 1, 1)[:3])
        except AttributeError:
            return None
        pointer, later = Tensor.data_ptr, [constexprs[n] for n in kernel.arg_names[len(args) :]]
    else:  # Triton's interpreter compiles nothing, and reads the tensors themselves
        start = lambda args, _: kernel[grid](*args, **constexprs)  # noqa: E731
        pointer, later = lambda x: x, ()
    varying = []
    for at, argument in enumerate(args):
        tensor, make = _maker(argument, pointer)
        if tensor is not None:
            varying.append((at, which[id(tensor)], make))
    kept = {at for at, _, _ in varying}
    fixed = (None if at in kept else x for at, x in enumerate(args))  # holds no tensor alive
    return CachedLaunch(start, (*fixed, *later), tuple(varying))


def _starter(compiled: Any, grid: tuple) -> Callable[[list, int | None], None]:
    """Starts the kernel as `CompiledKernel.__getitem__` does, without asking for its metadata where
    no profiler listens."""
    enter, leave = _hooks
    launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def start(args: list, stream: int | None) -> None:
        if enter.calls or leave.calls:
            compiled[grid](*args, stream=stream)
        else:
            launcher(*grid, stream, function, metadata, None, None, None, *args)

    return start


def _maker(argument: Any, pointer: Callable) -> tuple[Tensor | None, Callable]:
    """The tensor in an argument, and how another one of its kind becomes the argument."""
    if isinstance(argument, Tensor):
        return argument, pointer
    if isinstance(argument, tuple) and isinstance(argument[0], Tensor):  # problem.pointer's
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
