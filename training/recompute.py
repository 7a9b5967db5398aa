"""Activation checkpointing: a block keeps its input only, the backward pass computes it again.

PyTorch cannot recompute inside ``torch.func.jvp``. Where the derivative is taken without gradient
(``objective.jvp.mode=double``) nothing has to be recomputed there, and the ordinary forward pass
that carries the gradient can be.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.models.layers import Block


class Recomputed(nn.Module):
    """Goes before a block's own class, as FSDP2 does it: names of parameters stay as they are."""

    def forward(self, *args: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(*args)
        return checkpoint(super().forward, *args, use_reentrant=False)


def recompute_blocks(net: nn.Module) -> None:
    """Every ``Block`` of the network, in place; dropout draws the same mask again."""
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    if not blocks:
        raise NotImplementedError(
            f"checkpointing=true needs a model of blocks; {type(net).__name__} has none"
        )
    for block in blocks:
        kind = type(block)
        block.__class__ = type(f"Recomputed{kind.__name__}", (Recomputed, kind), {})
