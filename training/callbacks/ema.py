"""Exponential moving average of the weights; samples are drawn from it."""

import copy
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.validation import between


class EMA(Callback):
    """average ← β average + (1 - β) weights after every optimizer step.

    β = min(decay, (1 + n) / (10 + n)) at step n: early on the average spans about a tenth of the
    run so far, so that short runs do not sample from their initialisation.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        between("callbacks.ema.decay", decay, 0, 1)
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}
        self.updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = dict(pl_module.net.named_parameters())  # type: ignore[union-attr]
        if not self.average:
            self.average = {name: w.detach().clone() for name, w in weights.items()}
        self.average = {name: self.average[name].to(w) for name, w in weights.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.updates:
            return  # a step of gradient accumulation
        self.updates = trainer.global_step
        beta = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [w.detach() for w in pl_module.net.parameters()]  # type: ignore[union-attr]
        get_ema_multi_avg_fn(beta)(list(self.average.values()), weights, self.updates)

    def averaged(self, net: nn.Module) -> nn.Module:
        """A copy of the network with the averaged weights, or itself before any step."""
        return with_weights(net, self.average) if self.average else net

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["ema"] = {"average": self.average, "updates": self.updates}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "ema" in checkpoint:
            self.average = dict(checkpoint["ema"]["average"])
            self.updates = checkpoint["ema"]["updates"]


def with_weights(net: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    net = copy.deepcopy(net)
    net.load_state_dict(weights, strict=False)  # buffers are fixed: only parameters are averaged
    return net


def averaged_net(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """The network to sample from: averaged if an EMA is among the callbacks."""
    net: nn.Module = pl_module.net  # type: ignore[assignment]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            return callback.averaged(net)
    return net
