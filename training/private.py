"""The private names of PyTorch that the trainer uses, in one place (but ``torch.utils._pytree``).

Most of them serve what is counted without being computed. Each is looked for when it is used: a
version of PyTorch that lacks one trains, and says what it cannot count.
"""

from pkgutil import resolve_name
from typing import Any

import torch


def private(name: str) -> Any:
    """What has this name.

    Raises:
        NotImplementedError: this version of PyTorch does not have it.
    """
    try:
        return resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            f"torch {torch.__version__} has no {name.replace(':', '.')}; use another version"
        ) from error


def fake_tensors(**options: Any) -> Any:
    """A mode in which tensors are shapes: nothing is computed, no memory is taken."""
    return private("torch._subclasses.fake_tensor:FakeTensorMode")(**options)


def cut_and_not_compiled() -> Any:
    """A backend of ``torch.compile`` that cuts a graph into forward and backward as the compiler
    does, and runs them as they are.
    """
    aot_autograd = private("torch._dynamo.backends.common:aot_autograd")
    options: Any = {
        "partition_fn": private("functorch.compile:min_cut_rematerialization_partition")
    }
    return aot_autograd(fw_compiler=private("functorch.compile:nop"), **options)


def identity(storage: torch.UntypedStorage) -> int:
    """The same for all views of a memory, while it lives; also of one that is a shape alone."""
    return private("torch:UntypedStorage._cdata").__get__(storage)


def foreach_norm(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Norms in a few launches, summed and returned in ``dtype``; ``get_total_norm`` rounds them."""
    return list(private("torch:_foreach_norm")(tensors, 2, dtype))
