"""Useful floating-point operations of a training step, the numerator of MFU."""

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from training.attentions import sdpa
from training.context_parallel import join
from training.models.jvp_layers import Linear
from training.models.layers import Block
from training.private import fake_tensors
from training.randomness import Draws
from training.sharding import copy_whole

# Dense half-precision matrix products with float32 accumulation, 10^12 a second, as published.
PEAKS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0}


def step_flops(net: nn.Module, objective: Any, x: torch.Tensor, y: torch.Tensor) -> int:
    """Of the loss and its gradient on one batch of this shape: matrix products only, 2 a
    multiply-add, attention dense, nothing recomputed, one jvp that serves value and tangent, no
    product with the zero tangent of a weight.

    It depends on network, objective and batch, not on how they are computed: the same number for
    every attention, for the modes single and double, with and without activation checkpointing.
    Counted by PyTorch on fake tensors, with which nothing is computed.
    """
    mode = fake_tensors()
    net, objective = _plain(net, mode), _plain(objective, mode)
    jvp = getattr(objective, "jvp", None)
    if jvp is not None and jvp.mode == "double":
        objective.jvp = dataclasses.replace(jvp, mode="single")
    x, y = torch.zeros(x.shape), torch.zeros(y.shape, dtype=torch.int64)
    draws = Draws(0)
    sample = objective.sample(x, y, net.null_label, draws)
    dtype = next(net.parameters()).dtype
    sample = tree_map_only(
        torch.Tensor,
        lambda x: mode.from_tensor(x.to(dtype) if x.is_floating_point() else x),
        sample,
    )
    with FlopCounterMode(display=False) as counter, mode:
        objective.loss(net, sample).loss.backward()
    return counter.get_total_flops()


def _modules(thing: nn.Module) -> list[nn.Module]:
    """All that are part of it, also teachers in a list, which are no part of its state."""
    lists = [value for value in vars(thing).values() if isinstance(value, list)]
    teachers = [part for parts in lists for part in parts if isinstance(part, nn.Module)]
    return [*thing.modules(), *(module for teacher in teachers for module in teacher.modules())]


def _fake(thing: nn.Module, mode: Any) -> Any:
    """A copy whose parameters and buffers are shapes on the CPU: no memory is taken."""
    fakes = {}
    whole = nn.ModuleList(_modules(thing))
    for x in (*whole.parameters(), *whole.buffers()):
        with mode:
            fake = torch.empty(x.shape, dtype=x.dtype)
        is_parameter = isinstance(x, nn.Parameter)
        fakes[id(x)] = nn.Parameter(fake, x.requires_grad) if is_parameter else fake
    return copy_whole(thing, _modules(thing), fakes)


def _plain(thing: nn.Module, mode: Any) -> Any:
    """A copy without memory that computes what has to be computed, and nothing twice."""
    thing = _fake(thing, mode)
    for module in _modules(thing):
        join(module, None)
        if isinstance(module, Block):
            module.checkpointing = "none"
        if type(module) is nn.Linear:
            module.__class__ = Linear
        attention = getattr(module, "attention", None)
        if callable(attention) and not isinstance(attention, nn.Module):
            module.attention = sdpa  # type: ignore[assignment]
    return thing


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Of this GPU in half precision; None where this table does not know."""
    if device.type != "cuda" or precision not in ("bf16-mixed", "16-mixed"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
