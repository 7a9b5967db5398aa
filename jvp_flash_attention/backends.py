"""Which implementation a call takes. All have the functions forward and backward."""

import re
import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .call import Spec, has_ranges
from .errors import ArgumentValueError

# Constants: torch.compile traces through `choose`.
try:
    import triton
    from triton import knobs

    FOUND, INTERPRETED = str(triton.__version__), bool(knobs.runtime.interpret)
except ImportError:
    FOUND, INTERPRETED = "none", False
TRITON_FLOOR = (3, 6)

MODULES = {"triton": f"{__package__}.kernels", "reference": f"{__package__}.reference"}
BACKENDS = tuple(MODULES)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_MAX_HEAD_DIM = 256


def _unusable(found: str) -> str | None:
    """Why the Triton of this version cannot run the kernels. A bare install does not bring one: it
    would replace that of an older torch, and torch with it."""
    version = re.match(r"(\d+)\.(\d+)", found)
    if version and tuple(map(int, version.groups())) >= TRITON_FLOOR:
        return None
    return (
        f"needs Triton >= 3.6, found {found}; torch >= 2.10 brings it, or pip install 'triton>=3.6'"
    )


NO_TRITON = _unusable(FOUND)
if NO_TRITON and torch.version.cuda:
    warnings.warn(
        "jvp_flash_attention runs its slow reference in plain PyTorch: backend='triton'"
        f" {NO_TRITON}",
        stacklevel=2,
    )

_registered: dict[str, Any] = {}
_imported: dict[str, Any] = {}


def register(name: str, passes: Any) -> str:
    """Makes an object with the four functions a backend by that name, which is returned: whatever
    differentiates or compiles attention then works with it (distributed/ring.py)."""
    _registered[name] = passes
    return name


def choose(backend: str | None, q: Tensor, v: Tensor) -> str:
    """The name of the backend: the one asked for, or raise; without a wish the kernels wherever
    they can serve."""
    if backend in _registered:
        return str(backend)
    reason = unsupported_reason(q, v)
    if backend is None:
        return "reference" if reason or not q.is_cuda else "triton"
    if backend not in BACKENDS:
        raise ArgumentValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    if backend == "triton" and reason:
        raise NotImplementedError(
            f"backend='triton' {reason}; leave backend=None to choose automatically, or use"
            " backend='reference'"
        )
    return backend


def implementation(spec: Spec) -> Any:
    """The module or object that implements a call: its backend, or `ranges` above that. The kernels
    are imported on first use, Triton is not needed before."""
    name = "ranges" if has_ranges(spec) else spec.backend
    found = _registered.get(name) or _imported.get(name)
    if found is None:
        found = _imported[name] = import_module(MODULES.get(name, f"{__package__}.{name}"))
    return found


def unsupported_reason(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take such tensors; None where they do."""
    if NO_TRITON:
        return NO_TRITON
    if not q.is_cuda and not INTERPRETED:
        return (
            f"needs CUDA tensors (or TRITON_INTERPRET=1 in the environment), got device {q.device}"
        )
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "cannot serve bfloat16 in Triton's interpreter, whose products of it are wrong"
    if q.dtype not in TRITON_DTYPES:
        return f"supports float16, bfloat16 and float32, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > TRITON_MAX_HEAD_DIM:
        return (
            f"supports head dims up to {TRITON_MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}"
        )
    if min(q.shape[-1], v.shape[-1], q.shape[1]) == 0:
        return f"supports at least 1 head and head dim 1, got {tuple(q.shape)} and {tuple(v.shape)}"
    return None
