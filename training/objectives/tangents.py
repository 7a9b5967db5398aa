"""The one place that asks for a Jacobian-vector product.

An objective wants y = f(x) with its gradient to the parameters of f, and the directional derivative
t_y = (∂f/∂x) t_x. The modes differ in what it costs and in whether t_y has a gradient too (F is one
dense forward):

    single             one jvp with gradient; its value serves the loss                        ~ 4 F
    double             a jvp without gradient, then an ordinary forward with gradient          ~ 5 F
    tangent_grad       as single, and the loss differentiates through t_y as well
    finite_difference  (f(x + ε t_x) - f(x - ε t_x)) / 2ε without gradient, then the forward;
                       no forward mode at all; its error falls with ε², its rounding error
                       grows with 1/ε                                                         ~ 5 F

In all but ``tangent_grad`` t_y is a constant. ``single`` and ``double`` give the same numbers.

A network that says ``takes_duals`` is given values with their tangents and carries them from block
to block (``models.jvp_layers``). Of any other f one ``torch.func.jvp`` is taken as a whole.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.dual import Dual
from training.validation import between, one_of

CONSTANT = ("single", "double", "finite_difference")  # modes whose tangent has no gradient
MODES = (*CONSTANT, "tangent_grad")
Tangents = Sequence[torch.Tensor | None]


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
        self, f: Callable[..., torch.Tensor], x: Sequence[torch.Tensor], t_x: Tangents
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """f(*x), and its derivative along t_x.

        Args:
            f: a network, one of its methods, or any function of tensors. (B, ...) -> (B, ...)
            x: every argument of f, each (B, ...).
            t_x: their tangents; None is a constant. Each (n, ...), n <= B: of the last n examples.

        Returns:
            y (B, ...) and t_y (n, ...).
        """
        y, t_y, _ = self.with_aux(f, x, t_x, aux=False)
        return y, t_y

    def with_aux(
        self,
        f: Callable[..., Any],
        x: Sequence[torch.Tensor],
        t_x: Tangents,
        aux: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """For f that returns (y, aux): y, its derivative, and aux (B, ...) with its gradient."""
        call = f if aux else lambda *x: (f(*x), ())
        through = self.mode == "tangent_grad"
        derive = _by_blocks if takes_duals(f) else _whole
        if through or self.mode == "single":
            return derive(call, x, t_x, through)
        # All evaluations of f must drop the same units: they are of the same examples then, and
        # the first ones run on copies of the random state.
        n = len(x[0]) if drops(f) else next(len(t) for t in t_x if t is not None)
        rows = [a[-n:] for a in x]
        devices = [x[0].device] if x[0].is_cuda else []

        def constant(evaluate: Callable[[], torch.Tensor]) -> torch.Tensor:
            with torch.no_grad(), torch.random.fork_rng(devices) if drops(f) else nullcontext():
                return evaluate()

        if self.mode == "double":
            t_y = constant(lambda: derive(call, rows, t_x, False)[1])
        else:
            e = self.epsilon

            def at(step: float) -> torch.Tensor:
                moved = [
                    a if t is None else torch.cat([a[: -len(t)], a[-len(t) :] + step * t])
                    for a, t in zip(rows, t_x, strict=True)
                ]
                return constant(lambda: call(*moved)[0])

            moving = next(len(t) for t in t_x if t is not None)
            t_y = (at(e) - at(-e))[-moving:] / (2 * e)
        y, rest = call(*x)
        return y, t_y, rest


def takes_duals(f: Any) -> bool:
    """Whether f is a network that carries tangents by itself, or a method of one."""
    return getattr(getattr(f, "__self__", f), "takes_duals", False)


def drops(f: Any) -> bool:
    """Whether f may draw random numbers; of a network: whether it drops units."""
    net = getattr(f, "__self__", f)
    if not isinstance(net, nn.Module):
        return True
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in net.modules())


def _by_blocks(
    f: Callable[..., Any], x: Sequence[torch.Tensor], t_x: Tangents, through: bool
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    duals = [a if t is None else Dual(a, t, through) for a, t in zip(x, t_x, strict=True)]
    (y, t_y, _), aux = f(*duals)
    return y, t_y, aux


def _whole(
    f: Callable[..., Any], x: Sequence[torch.Tensor], t_x: Tangents, through: bool
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    moving = {i: t for i, t in enumerate(t_x) if t is not None}
    n = len(next(iter(moving.values())))
    rows = [a[-n:] for a in x]

    def of_moving(*values: torch.Tensor) -> tuple[torch.Tensor, Any]:
        given = dict(zip(moving, values, strict=True))
        return f(*(given.get(i, a) for i, a in enumerate(rows)))

    primals, tangents = tuple(rows[i] for i in moving), tuple(moving.values())
    y, t_y, aux = torch.func.jvp(of_moving, primals, tangents, has_aux=True)  # type: ignore[misc]
    if n < len(x[0]):
        first, first_aux = f(*(a[:-n] for a in x))
        y = torch.cat([first, y])
        aux = torch.cat([first_aux, aux]) if isinstance(aux, torch.Tensor) else aux
    return y, t_y if through else t_y.detach(), aux
