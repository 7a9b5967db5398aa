"""The one place that calls ``torch.func.jvp``.

An objective wants y = f(x) with its gradient to the parameters of f, and the directional derivative
t_y = (∂f/∂x) t_x. The modes differ in what it costs and in whether t_y has a gradient too (F is one
dense forward):

    single             one jvp with gradient; its primal serves the loss                      ~ 4 F
    double             a jvp without gradient, then an ordinary forward with gradient; the
                       second can be checkpointed, or use an attention that has no forward
                       mode                                                                   ~ 5 F
    tangent_grad       as single, and the loss differentiates through t_y as well
    finite_difference  (f(x + ε t_x) - f(x - ε t_x)) / 2ε without gradient, then the forward;
                       no forward mode at all; its error falls with ε², its rounding error
                       grows with 1/ε                                                         ~ 5 F

In all but ``tangent_grad`` t_y is a constant. ``single`` and ``double`` give the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from training.validation import between, one_of

CONSTANT = ("single", "double", "finite_difference")  # modes whose tangent has no gradient
MODES = (*CONSTANT, "tangent_grad")


@dataclass(frozen=True)
class Jvp:
    """``mode``: see the head of this file; ``epsilon``: of the finite difference."""

    mode: str = "single"
    epsilon: float = 5e-3

    def __post_init__(self) -> None:
        one_of("objective.jvp.mode", self.mode, MODES)
        between("objective.jvp.epsilon", self.epsilon, 0, open_low=True)

    def require_constant(self, objective: str) -> "Jvp":
        """For objectives whose target holds the tangent, without gradient by their definition."""
        if self.mode not in CONSTANT:
            raise ValueError(
                f"objective.jvp.mode={self.mode} has no meaning for {objective}, whose target holds"
                f" the tangent without gradient; use one of {', '.join(CONSTANT)}"
            )
        return self

    def __call__(
        self,
        f: Callable[..., torch.Tensor],
        primals: tuple[torch.Tensor, ...],
        tangents: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(f(primals), derivative along the tangents)."""
        y, t_y, _ = self.with_aux(lambda *x: (f(*x), ()), primals, tangents)
        return y, t_y

    def with_aux(
        self,
        f: Callable[..., tuple[torch.Tensor, Any]],
        primals: tuple[torch.Tensor, ...],
        tangents: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """For f that returns (y, aux): y, its derivative, and aux with its gradient."""
        # Slices of a larger tensor trip torch.compile: it wants primal and tangent laid out alike.
        primals = tuple(x.clone() for x in primals)
        if self.mode in ("single", "tangent_grad"):
            y, t_y, aux = torch.func.jvp(f, primals, tangents, has_aux=True)  # type: ignore[misc]
            return y, t_y.detach() if self.mode == "single" else t_y, aux
        # All evaluations of f must drop the same units: the first ones run on copies of the random
        # state.
        devices = [primals[0].device] if primals[0].is_cuda else []

        def constant(evaluate: Callable[[], torch.Tensor]) -> torch.Tensor:
            with torch.no_grad(), torch.random.fork_rng(devices):
                return evaluate()

        if self.mode == "double":
            t_y = constant(lambda: torch.func.jvp(f, primals, tangents, has_aux=True)[1])
        else:
            e = self.epsilon
            pairs = list(zip(primals, tangents, strict=True))
            ahead = constant(lambda: f(*(x + e * t_x for x, t_x in pairs))[0])
            behind = constant(lambda: f(*(x - e * t_x for x, t_x in pairs))[0])
            t_y = (ahead - behind) / (2 * e)
        y, aux = f(*primals)
        return y, t_y, aux
