"""Glue between a network, an objective and Lightning; no mathematics here."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from training.context_parallel import ContextParallel, data_place
from training.distributed import over_ranks
from training.objectives.objective import OPTIONAL, Objective
from training.randomness import Draws, key
from training.rows import Rows, is_due
from training.sharding import is_sharded
from training.step import Step, teachers
from training.strategies import HALVES, Sharded

SETTLED = 3  # batches, after which all is compiled and recorded


class GenerativeModule(LightningModule):
    """Trains ``net`` with ``objective``.

    Args:
        optimizer: (parameters, max_steps) -> (optimizer, scheduler of the steps).
        seed: of every random draw, see ``training.randomness``.
        compile, cuda_graphs: of the step, see ``training.step``.
        context: how processes share a sequence; None is not at all.
        config: what was configured, stored in every checkpoint so that it can be rebuilt from it.
        data: ``DataModule.description``, stored too: the data set need not be at hand then.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        optimizer: Callable[..., Any],
        seed: int,
        compile: bool = False,
        cuda_graphs: bool = False,
        config: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        context: ContextParallel | None = None,
    ) -> None:
        super().__init__()
        self.net, self.objective, self.optimizer = net, objective, optimizer
        self.seed, self.config, self.data = seed, config or {}, data or {}
        self.context = context
        objective.setup(net)
        self.step = Step(net, objective, compile, cuda_graphs)
        self.rows = Rows()
        self.batches: list[dict[str, torch.Tensor]] = []  # metrics of those since the last step
        self.made = 0  # batches of this run

    def configure_model(self) -> None:
        """Each process keeps its part of the network, where they share one."""
        if isinstance(self.trainer.strategy, Sharded):
            for net in (self.net, *teachers(self.objective)):
                self.trainer.strategy.shard(net)

    def on_fit_start(self) -> None:
        weight = next(self.net.parameters())
        sharded = isinstance(self.trainer.strategy, Sharded)  # then no device holds a whole teacher
        device = torch.device("cpu") if sharded else weight.device
        self.objective.on_fit_start(torch.empty(0, dtype=weight.dtype, device=device))
        self.configure_model()
        if self.context is not None:
            self.context.start((self.net, *teachers(self.objective)), self.device.type)
        self.step.accumulate = self.trainer.accumulate_grad_batches
        self.step.prepare(HALVES.get(str(self.trainer.precision)))

    def on_train_start(self) -> None:
        self.made = 0
        alone = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        half = HALVES.get(str(self.trainer.precision)) if alone else None
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        self.step.halve(optimizer, half)

    def on_train_end(self) -> None:
        gc.unfreeze()
        if self.step.halves is not None:
            self.step.halves.release()
            self.step.halves = None

    def _where(self, batch_idx: int) -> tuple[int, int]:
        """What keys the draws of a step: (seed, number of the batch)."""
        accumulate = self.trainer.accumulate_grad_batches
        return self.seed, self.global_step * accumulate + batch_idx % accumulate

    def sample(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> Any:
        """The noisy batch of a step, the same however often it is asked for."""
        x, y = batch
        # What is exchanged inside of a step, or of its graph, all processes exchange alike.
        alike = is_sharded(self.net) or self.step.exchange is not None
        draws = Draws(*self._where(batch_idx), *data_place(self.trainer), x.device, alike)
        null_label: int = self.net.null_label  # type: ignore[assignment]
        return self.objective.sample(x, y, null_label, draws)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> dict:
        self.rows.begin(self.global_step)
        # Dropout inside the network: of tokens, which no other process has.
        torch.manual_seed(key(*self._where(batch_idx), self.global_rank, "layers"))
        sample = self.sample(batch, batch_idx)
        loss, metrics, errors = self.step(sample)
        means = self._of_step({"loss": loss.detach(), **metrics}, batch_idx)
        if means is not None:
            self._record_means(means)
        times = getattr(sample, "t", None)
        # Lightning divides the loss by the number of accumulated batches; ``means`` has the step's.
        return {
            "loss": loss,
            "metrics": metrics,
            "means": means,
            "errors": errors,
            "times": times,
        }

    def _of_step(
        self, metrics: dict[str, torch.Tensor], batch_idx: int
    ) -> dict[str, torch.Tensor] | None:
        """Loss and metrics of a step, means over the batches that it accumulates; None before its
        last one.
        """
        self.batches.append(metrics)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return None
        batches, self.batches = self.batches, []
        if len(batches) == 1:
            return metrics

        def mean(name: str) -> torch.Tensor:
            values = torch.stack([batch[name].detach().float() for batch in batches])
            return values.nanmean() if name in OPTIONAL else values.mean()

        return {name: mean(name) for name in metrics}

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.step.backward(loss)

    def _record_means(self, values: dict[str, torch.Tensor]) -> None:
        """Means over the processes, in one exchange, where a row is going to be written."""
        means = torch.stack([value.float() for value in values.values()])
        last = self.trainer.max_steps - 1
        if is_due(self.trainer, self.global_step + 1) or self.global_step == last:
            missing = [
                value.isnan() if name in OPTIONAL else torch.zeros_like(value, dtype=torch.bool)
                for name, value in values.items()
            ]
            counts = 1.0 - torch.stack(missing).float()
            sums = torch.where(counts > 0, means, 0)
            sums, counts = over_ranks(torch.stack([sums, counts]), "mean")
            means = sums / counts
        for name, mean in zip(values, means, strict=True):
            self.rows.record(f"train/{name}", mean)

    def on_train_batch_end(self, *args: Any) -> None:
        self.rows.end(self.trainer)
        self.made += 1
        if self.made == SETTLED and self.step.compile:
            # A compiler leaves some 700,000 objects. Python's collector would look at all of them
            # now and then, for 0.3 s and more, while the GPU waits.
            gc.collect()
            gc.freeze()

    def on_train_epoch_end(self) -> None:
        """Of the stream, which ends with the run."""
        self.rows.finish(self.trainer)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.optimizer(self.net.parameters(), self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.objective.after_step(self.net)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rows.record("train/lr", optimizer.param_groups[0]["lr"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rows.end(self.trainer)  # a run that goes on from here begins with the next row
        self.rows.flush(self.trainer)
        checkpoint["config"], checkpoint["data"] = self.config, self.data
