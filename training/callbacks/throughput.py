"""Time of a training step."""

import statistics
import time
from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``perf/step_ms``, the median over the last ``window`` batches, and
    ``perf/samples_per_s``.

    A batch is timed from its start to the end of its optimizer step, without the other callbacks.
    The guard reads the gradient norm in every step, so the clock has waited for the device.
    """

    def __init__(self, window: int = 50) -> None:
        self.durations: deque[float] = deque(maxlen=window)
        self.start = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.durations.append(time.perf_counter() - self.start)
        seconds = statistics.median(self.durations)
        pl_module.log("perf/step_ms", 1000 * seconds, prog_bar=True)
        pl_module.log("perf/samples_per_s", len(batch[0]) * trainer.world_size / seconds)
