"""AdamW of weights that have a copy in 16 bits, and a gradient of that width.

    m ← m + (1 - β₁) (g - m)         v ← β₂ v + (1 - β₂) g²
    w ← w - η λ w - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)          w₁₆ = w in 16 bits

(arXiv 1711.05101). Of a weight 28 bytes are read or written, and no cast is a pass of its own. All
weights are one launch, whose programs find theirs in a table.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import Parameter

from jvp_flash_attention.kernels.launch_cache import Launch
from training.kernels.inputs import INTERPRETED

BLOCK, WARPS = 2048, 4  # elements and warps of a program
ALIGNED = 16  # bytes, and elements
KEPT = 8  # tables: gradients may lie elsewhere in every step


@triton.jit
def _field(table, i: tl.constexpr, dtype: tl.constexpr):
    return tl.load(table + i).to(tl.pointer_type(dtype))  # pyright: ignore[reportArgumentType]


@triton.jit
def _places(table, i: tl.constexpr, dtype: tl.constexpr, at, BLOCK: tl.constexpr):
    """A load of 16 bytes wants to know that they are aligned."""
    return tl.max_contiguous(tl.multiple_of(_field(table, i, dtype) + at, 16), BLOCK)


@triton.jit
def _adamw(
    TABLE, OWNERS, FOUND_INF,  # of each weight w, m, v, g, w16, t, size; of a program weight, block
    lr, log_beta1, log_beta2, rest1, beta2, rest2, eps, decay,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if FOUND_INF is not None:  # noqa: SIM102 - known at compile time, unlike what follows
        if tl.load(FOUND_INF) != 0.0:
            return
    table = TABLE + tl.load(OWNERS + 2 * tl.program_id(0)).to(tl.int64) * 7
    block = tl.load(OWNERS + 2 * tl.program_id(0) + 1).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < tl.multiple_of(tl.load(table + 6), 16)
    W = _places(table, 0, tl.float32, at, BLOCK)
    M = _places(table, 1, tl.float32, at, BLOCK)
    V = _places(table, 2, tl.float32, at, BLOCK)
    G = _places(table, 3, HALF, at, BLOCK)
    W16 = _places(table, 4, HALF, at, BLOCK)
    t = (tl.load(_field(table, 5, tl.float32)) + 1.0).to(tl.float64)
    g = tl.load(G, mask=there, other=0.0).to(tl.float32)
    w = tl.load(W, mask=there, other=0.0)
    m = tl.load(M, mask=there, other=0.0)
    v = tl.load(V, mask=there, other=0.0)
    # in float64: 1 - βᵗ is a small difference
    rate = lr / (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
    root = tl.sqrt((1.0 - tl.exp(t * log_beta2)).to(tl.float32))
    w -= decay * w
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w -= rate * m / (tl.sqrt_rn(v) / root + eps)
    tl.store(W, w, mask=there)
    tl.store(M, m, mask=there)
    tl.store(V, v, mask=there)
    tl.store(W16, w.to(HALF), mask=there)


@triton.jit
def _count(TABLE, FOUND_INF):
    """t ← t + 1, when no program reads it any more."""
    T = _field(TABLE + tl.program_id(0) * 7, 5, tl.float32)
    steps = 1.0
    if FOUND_INF is not None:
        steps -= tl.load(FOUND_INF)
    tl.store(T, tl.load(T) + steps)


class AdamW(torch.optim.AdamW):
    """PyTorch's, with the same state. What has a ``copy`` and a gradient of its dtype is updated by
    the kernel above, all else by PyTorch's.
    """

    half_weights = True  # whether there may be copies

    def __init__(self, *args: Any, half_weights: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.half_weights = half_weights
        self.release()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "copies" not in vars(self):  # a copy of an optimizer has other weights
            self.release()

    def release(self) -> None:
        """Forgets the copies."""
        self.copies: dict[Parameter, Parameter] = {}
        self.versions: dict[Parameter, int] = {}  # of the weight that a copy is of
        self.tables: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.owners: dict[tuple[int, ...], torch.Tensor] = {}

    def serves(self, weight: torch.Tensor) -> bool:
        """Whether the kernel does."""
        groups = (g for g in self.param_groups if any(p is weight for p in g["params"]))
        group = next(groups, None)
        unknown = ("amsgrad", "maximize", "capturable", "differentiable")
        return (
            group is not None
            and self.half_weights
            and bool(group["fused"])
            and not any(group[option] for option in unknown)
            and (weight.is_cuda or INTERPRETED)
            and weight.dtype == torch.float32
            and weight.is_contiguous()
            and weight.data_ptr() != 0  # as that of a wrapper
            and weight.data_ptr() % ALIGNED == weight.numel() % ALIGNED == 0
        )

    @torch.no_grad()
    def copy(self, weight: Parameter) -> Parameter:
        """Of ``weight`` in bfloat16, which ``step`` writes and ``refresh`` mends."""
        if weight not in self.copies:
            self.copies[weight] = Parameter(weight.to(torch.bfloat16), weight.requires_grad)
            self.versions[weight] = weight._version
        return self.copies[weight]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies anew what something else than ``step`` has changed: a checkpoint, a user. A write
        through ``.data`` is not seen before the next step.
        """
        stale = [w for w in self.copies if w._version != self.versions[w]]
        if stale:
            for weight in stale:
                self.copies[weight].copy_(weight)
            self._written(stale)

    def _written(self, weights: list[Parameter]) -> None:
        for weight in weights:
            self.versions[weight] = weight._version

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        mine = [
            [p for p in group["params"] if p in self.copies and self._narrow(p)]
            for group in self.param_groups
        ]
        gradients = {p: _readable(p.grad) for weights in mine for p in weights}
        for p in gradients:
            p.grad = None  # PyTorch's passes over it
        try:
            super().step()
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
        for group, weights in zip(self.param_groups, mine, strict=True):
            if weights:
                self._step(group, weights)
        return loss

    def _narrow(self, weight: Parameter) -> bool:
        gradient = weight.grad
        return gradient is not None and gradient.dtype == self.copies[weight].dtype

    @torch.no_grad()
    def _step(self, group: dict[str, Any], weights: list[Parameter]) -> None:
        states = [self._state(p) for p in weights]
        found_inf = getattr(self, "found_inf", None)
        table, owners = self._table(weights, states)
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        factors = (lr, _log(beta1), _log(beta2), 1 - beta1, beta2, 1 - beta2)
        rest = (group["eps"], lr * group["weight_decay"])
        options = {"HALF": tl.bfloat16, "BLOCK": BLOCK, "num_warps": WARPS}
        args = (table, owners, found_inf, *factors, *rest)
        Launch(_adamw, (len(owners),), args, options).run()
        Launch(_count, (len(weights),), (table, found_inf), {"num_warps": 1}).run()
        averages = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        torch.autograd.graph.increment_version([*weights, *averages])
        self._written(weights)

    def _state(self, weight: Parameter) -> dict[str, torch.Tensor]:
        """As PyTorch's fused step lays it out."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight) for _ in range(2))
        return state

    def _table(self, weights: list[Parameter], states: list[dict[str, Any]]) -> Any:
        """What the kernels read. A recorded step keeps its gradients where they are."""
        rows = []
        for weight, state in zip(weights, states, strict=True):
            averages = state["exp_avg"], state["exp_avg_sq"]
            fields: Any = (weight, *averages, weight.grad, self.copies[weight], state["step"])
            rows.append([*(x.data_ptr() for x in fields), weight.numel()])
        key = tuple(address for row in rows for address in row)
        if key not in self.tables:
            if len(self.tables) == KEPT:
                self.tables.clear()
            table = torch.tensor(rows, dtype=torch.int64)
            self.tables[key] = _sent(table, weights[0].device), self._owners(table[:, -1], weights)
        return self.tables[key]

    def _owners(self, sizes: torch.Tensor, weights: list[Parameter]) -> torch.Tensor:
        """Of each program the weight, and which of its blocks."""
        key = tuple(map(id, weights))
        if key not in self.owners:
            blocks = (sizes + BLOCK - 1) // BLOCK
            weight = torch.repeat_interleave(torch.arange(len(blocks)), blocks)
            block = torch.arange(len(weight)) - (blocks.cumsum(0) - blocks)[weight]
            owners = torch.stack([weight, block], 1).int()
            self.owners = {key: _sent(owners, weights[0].device)}
        return self.owners[key]


def _sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _readable(gradient: Any) -> torch.Tensor:
    """As the kernel reads it."""
    if gradient.is_contiguous() and gradient.data_ptr() % ALIGNED == 0:
        return gradient
    return gradient.clone(memory_format=torch.contiguous_format)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
