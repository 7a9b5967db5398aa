"""A value with its tangent: what objectives hand to networks, and blocks to each other."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch


class Dual(NamedTuple):
    """A value with its tangent.

    The tangent may be that of the last n examples only: the others have none, and cost nothing.
    ``through``: the loss differentiates through the tangent; else it is a constant, and no graph
    of it is kept.
    """

    primal: torch.Tensor  # (B, ...)
    tangent: torch.Tensor  # (n, ...), 1 <= n <= B
    through: bool = False

    def rule(self) -> AbstractContextManager[None]:
        """The context in which the tangent of what depends on this is computed."""
        return torch.set_grad_enabled(self.through and torch.is_grad_enabled())  # type: ignore[return-value]

    def follow(self, value: torch.Tensor, tangent: torch.Tensor) -> "Dual":
        return Dual(value, tangent, self.through)
