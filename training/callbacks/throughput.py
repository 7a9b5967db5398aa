"""Time of a training step and what is achieved in it."""

import time
from collections import deque
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from training.context_parallel import data_place
from training.metrics.flops import peak_tflops, step_flops
from training.validation import between, positive_integer

PERCENTILES = {"step_ms_p10": 0.1, "step_ms": 0.5, "step_ms_p90": 0.9}


class Clock:
    """Seconds of steps; on a GPU from events that have passed, read without waiting for others."""

    def __init__(self) -> None:
        self.marks: deque[tuple[Any, Any]] = deque()
        self.begun: Any = None

    def start(self, device: torch.device) -> None:
        self.begun = self._mark() if device.type == "cuda" else time.perf_counter()

    def stop(self) -> None:
        on_gpu = isinstance(self.begun, torch.cuda.Event)
        self.marks.append((self.begun, self._mark() if on_gpu else time.perf_counter()))

    def known(self) -> list[float]:
        """Of the steps that are over and were not asked for yet."""
        found = []
        while self.marks:
            start, end = self.marks[0]
            if not isinstance(start, torch.cuda.Event):
                found.append(end - start)
            elif end.query():
                found.append(start.elapsed_time(end) / 1000)
            else:
                break
            self.marks.popleft()
        return found

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Throughput(Callback):
    """Logs, over the last ``window`` optimizer steps:

    perf/step_ms, _p10, _p90   median and percentiles of the time of a step
    perf/samples_per_s         of all processes, at the median
    perf/tflops                useful operations (``metrics.flops``) of one process, at the median
    perf/mfu                   the same as a share of ``peak_tflops``

    A step is timed from the start of its (first) batch to the end of the optimizer's step, on a GPU
    between two events on the device, which is not kept waiting. The first ``warmup`` steps, in
    which kernels are compiled and tuned, are forgotten afterwards.

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
            self.clock.start(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches = trainer.accumulate_grad_batches
        if (batch_idx + 1) % batches:
            return
        self.clock.stop()
        for duration in self.clock.known():
            if self.steps == self.warmup:
                self.durations.clear()
            self.steps += 1
            self.durations.append(duration)
        if not self.durations:
            return
        times = torch.tensor(self.durations, dtype=torch.float64)
        for name, share in PERCENTILES.items():
            value = 1000 * float(times.quantile(share))
            pl_module.log(f"perf/{name}", value, prog_bar=name == "step_ms")
        median = float(times.quantile(0.5))
        samples = len(batch[0]) * batches * data_place(trainer)[1]
        pl_module.log("perf/samples_per_s", samples / median)
        if self.flops:
            tflops = self.flops * batches / median / 1e12
            pl_module.log("perf/tflops", tflops)
            if self.peak:
                pl_module.log("perf/mfu", tflops / self.peak)

    def _count(self, module: Any, x: torch.Tensor, y: torch.Tensor) -> int:
        try:
            return step_flops(module.net, module.objective, x, y)
        except Exception as error:  # the counter does not know every operation; training does
            rank_zero_warn(
                f"perf/tflops is not logged: the operations of {type(module.objective).__name__}"
                f" cannot be counted ({type(error).__name__}: {error})"
            )
            return 0
