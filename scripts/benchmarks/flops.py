"""How much work a pass is, and the least time that a machine needs for it.

A product of an L × S by an S × D matrix in every head is 2·B·H·L·S·D FLOPs. The passes need

    forward     S = QKᵀ, O = PV                                                      2 products
    jvp         S, tS = tQKᵀ + QtKᵀ, O = PV, (P ∘ tS)V, PtV                           6
    backward    S, dP = dOVᵀ, dQ = dS K, dK = dSᵀQ, dV = PᵀdO                         5
    full        S, tS (2), dOVᵀ + dtOtVᵀ (2), dtOVᵀ, dQ = dS K + dtS tK (2),         15
                dK = dSᵀQ + dtSᵀtQ (2), dV = PᵀdO + RᵀdtO (2), dtQ, dtK, dtV (3)

so with L = S: 4, 12, 10 and 30·B·H·L²·D, half of it where the attention is causal. `full` is the
backward of value and tangent together. These are the products that the mathematics needs, each
once: a kernel that computes one twice, or pads D or L, pays for it and is not credited. Masks are
not credited either: every score counts, whatever they hide.

The bytes that must move are each operand once and each result once: e bytes times B·H·L·D for

    forward     q k v -> o                                                           4 tensors
    jvp         q k v tq tk tv -> o to                                               8
    backward    q k v o do -> dq dk dv                                               8
    full        q k v tq tk tv o to do dto -> dq dk dv dtq dtk dtv                  16

and the mask once, as it lies in memory. The bound of a pass is the larger of FLOPs over the rate of
a large matrix product and bytes over the rate of a large copy, both measured in the same run.
"""

import math
from typing import NamedTuple

import torch

from jvp_flash_attention.workloads import Workload


class Pass(NamedTuple):
    """What one pass multiplies and moves."""

    products: int
    tensors: int


PASSES = {
    "forward": Pass(2, 4),
    "jvp": Pass(6, 8),
    "backward": Pass(5, 8),
    "full": Pass(15, 16),
}


class Bound(NamedTuple):
    """The least time of a pass on a machine, and what sets it: "compute" or "memory"."""

    ms: float
    by: str


def flops(workload: Workload, name: str) -> float:
    """FLOPs of the products that pass `name` needs; D is the real head dim."""
    B, H, L, D, _ = workload
    return PASSES[name].products * 2.0 * B * H * L * L * D / (2 if workload.causal else 1)


def traffic(workload: Workload, name: str, dtype: torch.dtype) -> float:
    """Bytes that pass `name` must read and write."""
    B, H, L, D, mask = workload
    scores = math.prod(workload.mask_shape) if workload.mask_shape else 0
    per_score = dtype.itemsize if mask.startswith("additive") else 1
    return float(PASSES[name].tensors * B * H * L * D * dtype.itemsize + scores * per_score)


def bound(
    workload: Workload, name: str, dtype: torch.dtype, tflops: float, gigabytes: float
) -> Bound:
    """Least milliseconds at `tflops` TFLOP/s and `gigabytes` GB/s."""
    compute = flops(workload, name) / tflops / 1e9
    memory = traffic(workload, name, dtype) / gigabytes / 1e6
    return Bound(compute, "compute") if compute >= memory else Bound(memory, "memory")
