"""What Triton's launcher hands to its C function, kept instead of launched.

`CompiledKernel.run` turns arguments into those of a C function: it has the driver encode a TMA
descriptor for every tensor, in Python around one call each, and adds what belongs to the kernel.
All of it follows from the addresses and the stream, so the same C function can be called again with
the same arguments. They are caught at the last step: a copy of the launcher gets a C function that
keeps what it is given. Where a launcher is built otherwise nothing is recorded, and every launch
takes the ordinary way.
"""

import copy
import threading
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, NamedTuple


class Call(NamedTuple):
    """The C function that launches a kernel, and its arguments; tensors are addresses."""

    launch: Callable
    args: tuple


def recorder(run: Any) -> Callable[..., Call | None] | None:
    """`run`'s double: it takes the same arguments and gives back the call that `run` would make, or
    None where it did its work, whatever that is, without one. None instead of a double where that
    call would hold memory of its own, as a profiler's, or cannot be caught."""
    owned = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    found = _c_function(run)
    if found is None or any(getattr(run, name, 0) for name in owned):
        return None
    launch, swap = found
    caught = threading.local()

    def catch(*args):
        caught.args = args

    double = copy.copy(run)
    double.launch = swap(catch)

    def record(*args) -> Call | None:
        caught.args = None  # not the last call's, should this one make none
        double(*args)
        return None if caught.args is None else Call(launch, caught.args)

    return record


def _c_function(run: Any) -> tuple[Callable, Callable[[Callable], Callable]] | None:
    """The C function below `run.launch`, and a way to put another in its place."""
    launch = getattr(run, "launch", None)
    if not isinstance(launch, FunctionType):  # no descriptor: it is the C function
        return (launch, lambda other: other) if callable(launch) else None
    names, cells = launch.__code__.co_freevars, launch.__closure__ or ()
    if "launcher" not in names:
        return None
    at = names.index("launcher")

    def swap(other: Callable) -> Callable:
        closure = (*cells[:at], CellType(other), *cells[at + 1 :])
        return FunctionType(launch.__code__, launch.__globals__, launch.__name__, None, closure)

    return cells[at].cell_contents, swap
