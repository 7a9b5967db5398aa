"""The averaged weights at equal times of the training, for curves over time."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from training.callbacks.ema import averaged_net
from training.rows import rows_of
from training.sharding import is_sharded
from training.validation import between


class Snapshots(Callback):
    """Writes ``directory/000060.pt`` after 60 seconds of training, and so on every ``seconds``: a
    dictionary of ``seconds``, ``step`` and the ``weights`` that samples are drawn from.

    Logs ``perf/seconds``, the time since the first step began, earlier parts of a resumed run
    included, as ``trainer.max_time`` counts it.
    """

    def __init__(self, directory: str, seconds: float = 60.0) -> None:
        between("callbacks.snapshots.seconds", seconds, 0, open_low=True)
        self.directory, self.every = Path(directory), seconds
        self.start, self.before, self.written = 0.0, 0.0, 0

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds(), "written": self.written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.written = state_dict["seconds"], state_dict["written"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_sharded(pl_module.net):  # type: ignore[arg-type]
            raise NotImplementedError("callbacks.snapshots needs a whole network; use trainer=ddp")
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self.seconds()
        rows_of(pl_module).record("perf/seconds", now)
        if now < (self.written + 1) * self.every or not trainer.is_global_zero:
            return
        self.written = int(now / self.every)
        with averaged_net(trainer, pl_module) as net:
            state = net.state_dict()
        weights = {name: value.cpu() for name, value in state.items()}
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{round(now):06d}.pt"
        torch.save({"seconds": now, "step": trainer.global_step, "weights": weights}, path)
