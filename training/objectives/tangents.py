"""The one place that calls ``torch.func.jvp``.

An objective wants y = f(x) with its gradient to the parameters of f, and the directional derivative
t_y = (∂f/∂x) t_x as a constant. Two modes give the same numbers at different cost (F is one dense
forward):

    single   one jvp with gradient; its primal serves the loss                                 ~ 4 F
    double   a jvp without gradient, then an ordinary forward with gradient; the second can be
             checkpointed, or use an attention that has no forward mode                        ~ 5 F
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from training.validation import one_of

MODES = ("single", "double")


@dataclass(frozen=True)
class Jvp:
    """``mode``: see the head of this file."""

    mode: str = "single"

    def __post_init__(self) -> None:
        one_of("objective.jvp.mode", self.mode, MODES)

    def __call__(
        self,
        f: Callable[..., torch.Tensor],
        primals: tuple[torch.Tensor, ...],
        tangents: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(f(primals), derivative along the tangents); only the first carries a gradient."""
        # Slices of a larger tensor trip torch.compile: it wants primal and tangent laid out alike.
        primals = tuple(x.clone() for x in primals)
        if self.mode == "single":
            y, t_y = torch.func.jvp(f, primals, tangents)[:2]
            return y, t_y.detach()
        # Both evaluations of f must drop the same units: the first runs on a copy of the random
        # state.
        devices = [primals[0].device] if primals[0].is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            t_y = torch.func.jvp(f, primals, tangents)[1]
        return f(*primals), t_y
