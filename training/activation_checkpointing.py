"""Activation checkpointing: a block keeps little, the backward pass computes the rest again.

    none        everything is kept
    attention   the input of the block, queries, keys, values and the output of attention
    block       the input of the block alone

Value and tangent are ordinary tensors between blocks (``models.jvp_layers``), so that it works in
every mode of the jvp, the gradient through the tangent included.
"""

from torch import nn

from training.models.layers import Block
from training.validation import one_of

CHOICES = ("none", "attention", "block")


def checkpoint_blocks(net: nn.Module, keep: str) -> None:
    """Every ``Block`` of the network, in place; dropout draws the same mask again."""
    one_of("checkpointing", keep, CHOICES)
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    if keep != "none" and not blocks:
        raise NotImplementedError(
            f"checkpointing={keep} needs a model of blocks; {type(net).__name__} has none"
        )
    for block in blocks:
        block.checkpointing = keep
