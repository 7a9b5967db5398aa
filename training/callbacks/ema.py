"""Exponential moving averages of the weights; samples are drawn from one of them."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.sharding import exchanged, is_sharded, local
from training.validation import between, one_of, switch

Weights = dict[str, torch.Tensor]


class EMA(Callback):
    """average ← β average + (1 - β) weights after every optimizer step, for several β at once.

    Args:
        decay: one or several. β = min(decay, (1 + n) / (10 + n)) at step n: early on the average
            spans about a tenth of the run so far, so that short runs do not sample from their
            initialisation. The average is called ``0.9999``.
        warmup: if false, β = decay from the first step, as published recipes have it.
        power: none, one or several relative widths σ of power-function averages (EDM2, arXiv
            2312.02696, equations 121 to 127): β = (1 - 1 / n)^(γ + 1), a profile that
            grows with the run. The average is called ``power_0.05``.
        use: the name of the average that samples are drawn from; None is the first one.
    """

    def __init__(
        self,
        decay: float | Sequence[float] = 0.9999,
        power: float | Sequence[float] = (),
        use: str | float | None = None,
        warmup: bool = True,
    ) -> None:
        switch("callbacks.ema.warmup", warmup)
        self.warmup = warmup
        self.decays: dict[str, float] = {}
        self.exponents: dict[str, float] = {}
        listed = isinstance(decay, Sequence) and not isinstance(decay, str)
        for value in decay if listed else [decay]:  # type: ignore[union-attr]
            between("callbacks.ema.decay", value, 0, 1, open_high=True)
            self.decays[f"{value:g}"] = value
        for width in power if isinstance(power, Sequence) else [power]:
            self.exponents[f"power_{width:g}"] = exponent(width)
        names = [*self.decays, *self.exponents]
        if not names:
            raise ValueError(
                "callbacks.ema.decay: give a decay, or widths with callbacks.ema.power, or switch"
                " the averages off with callbacks.ema=null"
            )
        self.use = names[0] if use is None else str(use)
        one_of("callbacks.ema.use", self.use, names)
        self.averages: dict[str, Weights] = {name: {} for name in names}
        self.updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = dict(pl_module.net.named_parameters())  # type: ignore[union-attr]
        for name, average in self.averages.items():
            start = average or {key: w.detach().clone() for key, w in weights.items()}
            self.averages[name] = {k: start[k].to(w.device, w.dtype) for k, w in weights.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.updates:
            return  # a step of gradient accumulation
        self.updates = trainer.global_step
        weights = [local(w.detach()) for w in pl_module.net.parameters()]  # type: ignore[union-attr]
        for name, average in self.averages.items():
            update = get_ema_multi_avg_fn(self.beta(name, self.updates))
            update([local(w) for w in average.values()], weights, self.updates)

    def beta(self, name: str, n: int) -> float:
        """Of one average at step n = 1, 2, ..."""
        if name in self.decays:
            decay = self.decays[name]
            return min(decay, (1 + n) / (10 + n)) if self.warmup else decay
        return (1 - 1 / n) ** (self.exponents[name] + 1)

    @contextmanager
    def averaged(self, net: nn.Module) -> Iterator[nn.Module]:
        """A copy of the network with the averaged weights, or itself before any step. A sharded
        network itself has them meanwhile.
        """
        average = self.averages[self.use]
        if is_sharded(net) and average:
            with exchanged(net, average):
                yield net
        else:
            yield with_weights(net, average) if average else net

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["ema"] = {"averages": self.averages, "use": self.use, "updates": self.updates}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        found = checkpoint.get("ema", {}).get("averages", {})
        if found.keys() != self.averages.keys():
            raise ValueError(
                "callbacks.ema: an average cannot begin in the middle of a run; resume with those"
                f" of the checkpoint ({', '.join(found) or 'none'}); got {', '.join(self.averages)}"
            )
        self.averages = {name: dict(average) for name, average in found.items()}
        self.updates = checkpoint["ema"]["updates"]


def exponent(width: float) -> float:
    """γ of a power-function average with standard deviation ``width`` of the run's length: the root
    of σ² = (γ + 1) / ((γ + 2)² (γ + 3)).
    """
    between("callbacks.ema.power", width, 0, 1 / math.sqrt(12), open_low=True)  # γ = 0: the mean
    low, high = 0.0, 1 / width  # σ falls with γ; σ < 1 / (γ + 2)
    for _ in range(100):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
        low, high = (middle, high) if wide else (low, middle)
    return low


def choose(checkpoint: dict[str, Any], name: str) -> Weights | None:
    """Weights of a checkpoint by name: an average, ``ema`` (the one that the run sampled from), or
    ``net`` (None: those that were trained).
    """
    ema = checkpoint.get("ema", {"averages": {}, "use": None})
    if name == "net" or (name == "ema" and not ema["averages"]):
        return None
    one_of("weights", name, ["ema", "net", *ema["averages"]])
    return ema["averages"][ema["use"] if name == "ema" else name]


def with_weights(net: nn.Module, weights: Weights) -> nn.Module:
    net = copy.deepcopy(net)
    net.load_state_dict(weights, strict=False)  # buffers are fixed: only parameters are averaged
    return net


@contextmanager
def averaged_net(trainer: Trainer, pl_module: LightningModule) -> Iterator[nn.Module]:
    """The network to sample from: averaged if an EMA is among the callbacks. One in shards has its
    weights in the precision of the run, and so it samples.
    """
    net: nn.Module = pl_module.net  # type: ignore[assignment]
    emas = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    averaged = emas[0].averaged(net) if emas else nullcontext(net)
    context = trainer.precision_plugin.forward_context() if is_sharded(net) else nullcontext()
    with averaged as net, context:
        yield net
