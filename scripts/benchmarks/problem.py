"""The tensors of a workload."""

from dataclasses import dataclass

import torch
from torch import Tensor

from jvp_flash_attention.workloads import Workload

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ATTENDED = 0.1  # share of pairs that a random mask lets attend, as in the earlier package's table


@dataclass(frozen=True)
class Problem:
    """N(0, 1) inputs, tangents and cotangents, all (B, H, L, D)."""

    workload: Workload
    primals: tuple[Tensor, Tensor, Tensor]  # q, k, v
    tangents: tuple[Tensor, Tensor, Tensor]
    d_out: Tensor
    d_t_out: Tensor
    mask: Tensor | None

    @property
    def causal(self) -> bool:
        return self.workload.causal


def draw(workload: Workload, dtype: torch.dtype, device: str) -> Problem:
    """The same tensors in every run."""
    rng = torch.Generator(device).manual_seed(0)
    B, H, L, D, _ = workload
    x = [torch.randn(B, H, L, D, generator=rng, device=device).to(dtype) for _ in range(8)]
    mask = _mask(workload, dtype, device, rng)
    return Problem(workload, (x[0], x[1], x[2]), (x[3], x[4], x[5]), x[6], x[7], mask)


def _mask(workload: Workload, dtype: torch.dtype, device: str, rng) -> Tensor | None:
    """bool: a random tenth of the pairs attends; padding: sample b of B attends the first
    (1 − b/4B) L keys; additive: N(0, 1); additive-full: 0 for a random tenth, else −100."""
    shape, kind = workload.mask_shape, workload.mask
    if shape is None:
        return None
    if kind == "padding":
        B, L = workload.batch, workload.length
        lengths = L - torch.arange(B, device=device) * L // (4 * B)
        return (torch.arange(L, device=device) < lengths.unsqueeze(1)).view(shape)
    if kind == "additive":
        return torch.randn(shape, generator=rng, device=device).to(dtype)
    attends = torch.rand(shape, generator=rng, device=device) < ATTENDED
    return attends if kind.startswith("bool") else torch.where(attends, 0.0, -100.0).to(dtype)
