"""Time of a training step and what is achieved in it."""

import time
from collections import deque
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from training.context_parallel import data_place
from training.metrics.flops import peak_tflops, step_flops
from training.rows import rows_of
from training.validation import between, positive_integer

PERCENTILES = {"step_ms_p10": 0.1, "step_ms": 0.5, "step_ms_p90": 0.9}


class Clock:
    """Seconds from one mark to the next; on a GPU between events that have passed, read without
    waiting for others.
    """

    def __init__(self) -> None:
        self.marks: deque[Any] = deque()

    def mark(self, device: torch.device) -> None:
        if device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def known(self) -> list[float]:
        """What is over and was not asked for yet."""
        found = []
        while len(self.marks) > 1:
            start, end = self.marks[0], self.marks[1]
            if not isinstance(start, torch.cuda.Event):
                found.append(end - start)
            elif end.query():
                found.append(start.elapsed_time(end) / 1000)
            else:
                break
            self.marks.popleft()
        return found


class Throughput(Callback):
    """Logs, over the last ``window`` optimizer steps that are over:

    perf/step_ms, _p10, _p90   median and percentiles of the time of a step
    perf/samples_per_s         of all processes, at the median
    perf/tflops                useful operations (``metrics.flops``) of one process, at the median
    perf/mfu                   the same as a share of ``peak_tflops``

    A step is timed from the start of its (first) batch to that of the next step: averages, logging
    and the wait for data count too. On a GPU that is between two events on the device, which is not
    kept waiting. The first ``warmup`` steps, in which kernels are compiled and tuned, are forgotten
    afterwards.

    ``peak_tflops``: of one device; None looks it up for data-centre GPUs in half precision, and
    where it is not known there is no perf/mfu.
    """

    def __init__(
        self, window: int = 50, warmup: int = 10, peak_tflops: float | None = None
    ) -> None:
        positive_integer("callbacks.throughput.window", window)
        between("callbacks.throughput.warmup", warmup, 0)
        if peak_tflops is not None:
            between("callbacks.throughput.peak_tflops", peak_tflops, 0, open_low=True)
        self.durations: deque[float] = deque(maxlen=window)
        self.warmup, self.peak, self.steps = warmup, peak_tflops, 0
        self.clock: Clock = Clock()
        self.flops: int | None = None  # of a batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.flops is None:
            shared = trainer.world_size // data_place(trainer)[1]  # processes of a sequence
            self.flops = self._count(pl_module, *batch) // shared
            self.peak = self.peak or peak_tflops(pl_module.device, str(trainer.precision))
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.clock.mark(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches = trainer.accumulate_grad_batches
        if (batch_idx + 1) % batches:
            return
        for duration in self.clock.known():
            if self.steps == self.warmup:
                self.durations.clear()
            self.steps += 1
            self.durations.append(duration)
        if not self.durations:
            return
        rows = rows_of(pl_module)
        times = torch.tensor(self.durations, dtype=torch.float64)
        for name, share in PERCENTILES.items():
            value = 1000 * float(times.quantile(share))
            rows.record(f"perf/{name}", value)
        median = float(times.quantile(0.5))
        samples = len(batch[0]) * batches * data_place(trainer)[1]
        rows.record("perf/samples_per_s", samples / median)
        if self.flops:
            tflops = self.flops * batches / median / 1e12
            rows.record("perf/tflops", tflops)
            if self.peak:
                rows.record("perf/mfu", tflops / self.peak)

    def _count(self, module: Any, x: torch.Tensor, y: torch.Tensor) -> int:
        try:
            return step_flops(module.net, module.objective, x, y)
        except Exception as error:  # the counter does not know every operation; training does
            rank_zero_warn(
                f"perf/tflops is not logged: the operations of {type(module.objective).__name__}"
                f" cannot be counted ({type(error).__name__}: {error})"
            )
            return 0
