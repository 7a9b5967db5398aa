"""last.ckpt: every so many steps, at the end, and when the run is interrupted."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from training.ranks import over_ranks
from training.validation import positive_integer

# Seconds in which further signals are the same wish: the terminal and a wrapper send one each, and
# so do impatient fingers.
SAME = 2.0


class Interrupted(Exception):
    """A signal ended the run; its checkpoint is written. ``signal`` is its number."""

    def __init__(self, number: int, path: Path, step: int) -> None:
        run_dir = path.parent.parent
        super().__init__(
            f"interrupted after step {step}; resume with ckpt_path=last hydra.run.dir={run_dir}"
        )
        self.signal = number


class LastCheckpoint(Checkpoint):
    """Writes ``directory/last.ckpt``. SIGINT and SIGTERM let the step in progress finish, write it
    and raise ``Interrupted``; another signal later than ``SAME`` seconds acts as usual.
    """

    def __init__(self, directory: str, every_n_steps: int = 500) -> None:
        positive_integer("callbacks.checkpoint.every_n_steps", every_n_steps)
        self.path, self.every_n_steps = Path(directory) / "last.ckpt", every_n_steps
        self.signal = self.stop = 0
        self.noted, self.saved_step = 0.0, -1
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self.noted = number, time.monotonic()
        elif time.monotonic() - self.noted > SAME:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.stop:  # not earlier: the step before is logged by now
            raise Interrupted(self.stop, self.path, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients half accumulated are not in a checkpoint
        number = torch.tensor(self.signal, device=pl_module.device)
        self.stop = int(over_ranks(number, "max"))  # one rank's signal stops all
        step = trainer.global_step
        # At the end at once, not after the other callbacks have drawn and judged their samples.
        end = step == trainer.max_steps or trainer.should_stop  # trainer.max_time is over
        if self.stop or step % self.every_n_steps == 0 or end:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self._save(trainer)
        self._restore()

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved_step = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()
