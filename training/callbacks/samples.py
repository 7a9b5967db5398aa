"""Pictures of samples during and after training."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from training.callbacks.ema import averaged_net
from training.images import picture_of, write_png
from training.samplers.generate import balanced_labels, generate
from training.sharding import is_sharded
from training.validation import positive_integer


class Samples(Callback):
    """Writes ``directory/step_000500.png``: ``rows`` samples of each class (at most ten), a class a
    column.

    Points of the plane are drawn as the density of 4096 of them.

    Drawn every ``every_n_steps`` optimizer steps and at the end, always from the same noise.
    """

    def __init__(
        self, directory: str, sampler: Any, every_n_steps: int = 500, rows: int = 8
    ) -> None:
        positive_integer("callbacks.samples.every_n_steps", every_n_steps)
        positive_integer("callbacks.samples.rows", rows)
        self.directory, self.sampler = Path(directory), sampler
        self.every_n_steps, self.rows = every_n_steps, rows
        self.last_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        net: Any = pl_module.net
        if step == self.last_step or not (trainer.is_global_zero or is_sharded(net)):
            return
        self.last_step = step
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        points = data.shape == (2, 1, 1)
        columns = min(10, data.num_classes) if data.num_classes > 1 else self.rows
        n = 4096 if points else self.rows * columns
        y = balanced_labels(n, min(10, data.num_classes))
        with averaged_net(trainer, pl_module) as net:  # a sharded one asks all processes
            x = generate(net, self.sampler, y, data.shape, pl_module.seed)  # type: ignore[arg-type]
        if not trainer.is_global_zero:
            return
        picture = picture_of(x, columns)
        path = write_png(self.directory / f"step_{step:06d}.png", picture)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=step)
