"""A launch of a kernel of this folder, kept for all later calls like the first one."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from jvp_flash_attention.kernels import launch_cache
from jvp_flash_attention.kernels.launch_cache import Launch


def launched(
    what: tuple,
    inputs: tuple[Tensor | None, ...],
    outputs: Callable[[], tuple[Tensor, ...]],
    launch: Callable[..., Launch],
) -> Sequence[Any]:
    """The outputs of a kernel. ``what`` and shapes, strides and dtypes of the inputs, the first of
    which is there, determine ``outputs`` and ``launch``, which is given them.
    """
    key = launch_cache.key(what, inputs)
    found = launch_cache.replay(key, inputs)
    if found is None:
        found = outputs()
        launch_cache.record(key, inputs, inputs, found, lambda: [launch(*found)])
    return found
