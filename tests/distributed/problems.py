"""Whole sequences in float64, dense attention of them, and what one process must get of it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import jvp

from jvp_flash_attention.distributed import shard

PRIMALS, TANGENTS = ("q", "k", "v"), ("t_q", "t_k", "t_v")
NAMES = (*PRIMALS, *TANGENTS)


@dataclass(frozen=True)
class Case:
    """One call. `tangents` names the inputs that have one."""

    B: int = 2
    H: int = 4
    Hk: int = 4
    L: int = 12
    S: int = 12
    D: int = 5
    Dv: int = 3
    causal: bool = False
    softcap: float = 0.0
    padding: bool = False
    tangents: str = "qkv"
    layout: str = "contiguous"

    def __str__(self):
        base = f"H{self.H}.{self.Hk}L{self.L}S{self.S}"
        more = ["causal"] if self.causal else []
        more += [f"softcap{self.softcap}"] if self.softcap else []
        more += ["padding"] if self.padding else []
        more += [f"t_{self.tangents}"] if self.tangents != "qkv" else []
        more += ["zigzag"] if self.layout == "zigzag" else []
        return "-".join([base, *more])

    @property
    def even(self) -> "Case":
        """With lengths that every number of processes up to 4 divides, in either layout."""
        return replace(self, L=16, S=16)


class Problem:
    """The tensors of a case, the same on every process."""

    def __init__(self, case: Case):
        self.case = case
        rng = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
        rows = [(case.H, case.L, case.D), (case.Hk, case.S, case.D), (case.Hk, case.S, case.Dv)]
        self.inputs = {
            name: draw(case.B, *shape) for name, shape in zip(NAMES, rows * 2, strict=True)
        }
        for name in PRIMALS:
            if name not in case.tangents:
                self.inputs[f"t_{name}"].zero_()
        self.d_out, self.d_t_out = (draw(case.B, case.H, case.L, case.Dv) for _ in range(2))
        self.mask = None
        if case.padding:
            self.mask = torch.rand(case.B, 1, 1, case.S, generator=rng) > 0.3
            self.mask[:, :, :, : case.S // 3] = False  # one process's keys are all hidden
            self.mask[1] = False  # nothing is left of a sample

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / sqrt(D)) v with the whole matrix; rows that see nothing give 0."""
        case = self.case
        k, v = (x.repeat_interleave(case.H // case.Hk, 1) for x in (k, v))
        s = q @ k.mT / case.D**0.5
        s = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
        see = torch.ones(case.L, case.S, dtype=torch.bool)
        see = see.tril() if case.causal else see
        see = see if self.mask is None else see & self.mask
        p = torch.softmax(s.masked_fill(~see, -1e4), -1) * see
        return p @ v

    def solve(self, mode: str) -> dict[str, Tensor]:
        """Value, tangent and gradients of <O, dO>, or in mode "tangent" of <O, dO> + <tO, dtO>."""
        leaves = {name: x.clone().requires_grad_() for name, x in self.inputs.items()}
        primals = tuple(leaves[name] for name in PRIMALS)
        tangents = tuple(leaves[name] for name in TANGENTS)
        out, t_out = jvp(self.dense, primals, tangents)
        return collect(out, t_out, leaves, self.d_out, self.d_t_out, mode)

    def mine(self, results: dict[str, Tensor], mesh) -> dict[str, Tensor]:
        """This process's shards of whole results."""
        return {name: shard(x, mesh, layout=self.case.layout) for name, x in results.items()}


def collect(out, t_out, leaves, d_out, d_t_out, mode: str) -> dict[str, Tensor]:
    """Results by name, of whole sequences or of shards."""
    loss = (out * d_out).sum()
    wanted = PRIMALS
    if mode == "tangent":
        loss, wanted = loss + (t_out * d_t_out).sum(), NAMES
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    named = {f"d_{name}": x for name, x in zip(wanted, grads, strict=True)}
    return {"out": out.detach(), "t_out": t_out.detach(), **named}
