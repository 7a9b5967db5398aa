"""Relative error against float64, of a sample.

The error of a tensor is ‖x − exact‖ / ‖exact‖ (Frobenius) over the sample: two heads, and in the
passes without gradients 256 query rows of each. The exact values come from the same (rounded)
inputs in float64, a block of rows at a time, so no L × L matrix is held.
"""

import torch
from torch import Tensor

from jvp_flash_attention import reference
from jvp_flash_attention.call import Inputs, Spec, Tangents

from .problem import Problem

RESULTS = {
    "forward": ("out",),
    "jvp": ("out", "t_out"),
    "backward": ("d_q", "d_k", "d_v"),
    "full": ("d_q", "d_k", "d_v", "d_t_q", "d_t_k", "d_t_v"),
}
# Output, tangent, gradients, those of fewer than SHORT queries. In bfloat16 1.1 times what exact
# arithmetic with P rounded once leaves in 2048 keys: docs/mathematics.md, Tolerances.
TOLERANCES = {
    "bfloat16": (2.5e-3, 2.5e-3, 2.7e-3, 3e-3),
    "float16": (3e-4, 4e-4, 4e-4, 4e-4),
    "float32": (1e-6, 2e-6, 2e-6, 2e-6),
}
SHORT = 32


class Sample:
    """The sampled part of one problem, and its exact results by pass."""

    def __init__(self, p: Problem, heads: int = 2, rows: int = 256):
        B, H, L, _, _ = p.workload
        device = p.d_out.device
        chosen = torch.linspace(0, B * H - 1, min(heads, B * H), device=device).long()
        self.b, self.h = chosen // H, chosen % H
        rng = torch.Generator().manual_seed(0)
        self.rows = torch.randperm(L, generator=rng)[:rows].sort().values.to(device)
        self.p, self.known = p, {}

    def errors(self, name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        """Relative error of each result of pass `name`."""
        if name not in self.known:
            self.known[name] = self._exact(name)
        part = self._rows if name in ("forward", "jvp") else self._heads
        return {
            key: float((part(x.detach()).double() - exact).norm() / exact.norm())
            for key, x, exact in zip(RESULTS[name], results, self.known[name], strict=True)
        }

    def _heads(self, x: Tensor) -> Tensor:
        """(B, H, L, ...) -> (heads, 1, L, ...)."""
        return x.expand(*self.p.workload[:2], *x.shape[2:])[self.b, self.h].unsqueeze(1)

    def _rows(self, x: Tensor) -> Tensor:
        """(B, H, L, ...) -> (heads, 1, rows, ...); a mask of one row for all queries keeps it."""
        return self._heads(x if x.shape[2] == 1 else x[:, :, self.rows])

    def _exact(self, name: str) -> tuple[Tensor, ...]:
        p, scale = self.p, self.p.workload.head_dim**-0.5
        if name in ("forward", "jvp"):
            q, t_q = (self._rows(x[0]).double() for x in (p.primals, p.tangents))
            k, v, t_k, t_v = (self._heads(x).double() for x in (*p.primals[1:], *p.tangents[1:]))
            mask = None if p.mask is None else self._rows(p.mask)
            if p.causal:  # of these rows
                keys = torch.arange(p.workload.length, device=q.device)
                mask = (keys <= self.rows.unsqueeze(1))[None, None]
            t = Tangents(t_q, t_k, t_v)
            exact = reference.forward(Inputs(q, k, v, mask), t, Spec(scale))
            return (exact.out,) if name == "forward" else (exact.out, exact.t_out)
        q, k, v, t_q, t_k, t_v, d_out, d_t_out = (
            self._heads(x).double() for x in (*p.primals, *p.tangents, p.d_out, p.d_t_out)
        )
        mask = None if p.mask is None else self._heads(p.mask)
        x, t, spec = Inputs(q, k, v, mask), Tangents(t_q, t_k, t_v), Spec(scale, p.causal)
        if name == "backward":
            t, d_t_out = None, None
        saved = reference.forward(x, t, spec)
        grads = reference.backward(d_out, d_t_out, x, t or Tangents(), saved, spec, False)
        return tuple(g for some in grads for g in some if g is not None)


def tolerance(result: str, dtype: str, queries: int = SHORT) -> float:
    """The largest error that counts as accurate."""
    of_out, of_tangent, of_gradients, of_few = TOLERANCES[dtype]
    gradients = of_few if queries < SHORT else of_gradients
    return {"out": of_out, "t_out": of_tangent}.get(result, gradients)


def accurate(errors: dict[str, float], dtype: str, queries: int = SHORT) -> bool:
    """Whether every error is finite and within its tolerance."""
    return all(error <= tolerance(result, dtype, queries) for result, error in errors.items())
