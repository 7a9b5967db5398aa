"""Weights in 16 bits beside those in float32, cast once a step and not in every product's graph.

Under autocast a product casts its weight, and autograd casts the weight's gradient back. Both are
passes over memory: 3.0 of 112 ms in a step of DiT-XL/2 (H100). Here the network computes with
copies that the optimizer writes together with the weights, and the optimizer reads the gradients as
the products leave them. Loss and gradients are those of autocast, bit for bit, where a weight is
multiplied once a step. Where its gradient is a sum, the sum would be in 16 bits: ``Step.halve``
says when there are copies.

    halves = HalfWeights.of(net, optimizer, torch.bfloat16)      None where they cannot be
    halves.refresh()                      copies of weights that something else has changed
    with halves.instead():                ``net.parameters()`` are the copies:
        ...                               under autocast loss, and gradients of the copies

Whoever differentiates hands these gradients over to ``weight.grad``, as ``Step`` does. They stay 16
bits wide there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from training.kernels.adamw import AdamW
from training.models.layers import Block


class HalfWeights:
    """Of the products in the blocks of a network. Elsewhere weights are few, and used otherwise."""

    def __init__(self, layers: list[nn.Linear], optimizer: AdamW) -> None:
        self.refresh, self.release = optimizer.refresh, optimizer.release
        self.places: list[tuple[dict[str, Any], nn.Parameter, nn.Parameter]] = []
        for layer in layers:
            weight: Any = layer.weight
            weight.grad_dtype = None  # any
            self.places.append((layer._parameters, weight, optimizer.copy(weight)))

    @classmethod
    def of(
        cls, net: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None
    ) -> "HalfWeights | None":
        """None where PyTorch, the optimizer or the weights know no such gradients."""
        if not hasattr(torch.Tensor, "grad_dtype"):  # before PyTorch 2.10
            return None
        if not isinstance(optimizer, AdamW) or dtype != torch.bfloat16:
            return None
        blocks = [module for module in net.modules() if isinstance(module, Block)]
        layers = [x for block in blocks for x in block.modules() if isinstance(x, nn.Linear)]
        if not layers or not all(optimizer.serves(layer.weight) for layer in layers):
            return None
        return cls(layers, optimizer)

    @contextmanager
    def instead(self) -> Iterator[None]:
        for parameters, _, copy in self.places:
            parameters["weight"] = copy
        try:
            yield
        finally:
            for parameters, weight, _ in self.places:
                parameters["weight"] = weight
