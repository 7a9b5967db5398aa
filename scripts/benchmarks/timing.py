"""Clocks: time on the device, time of a captured graph, time of the host, peak memory.

On a GPU, events on the stream are the clock; before every timed call more memory is read than L2
holds, so that the call finds nothing of its own there. Overwriting would do that too, but the
call would then pay for writing 50 MB of the flush back. On the CPU the clock of the host serves, so
that the same code runs there.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

L2_BYTES = 256 * 2**20  # several times the largest L2 cache
Work = Callable[[], object]


class HostEvent:
    """The part of `torch.cuda.Event` that is used here, on the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1e3 * (end.at - self.at)


def wait(device: str) -> None:
    """Until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(
    work: Work, device: str, budget_ms: float = 100.0, warmup_ms: float = 25.0, least: int = 5
) -> float:
    """Median time of a call, over as many calls as `budget_ms` allows, at least `least`."""
    cuda = device == "cuda"
    other = torch.zeros(L2_BYTES // 8 if cuda else 0, dtype=torch.int64, device=device)

    def event() -> Any:
        return torch.cuda.Event(enable_timing=True) if cuda else HostEvent()

    def times(calls: int) -> list[float]:
        pairs = [(event(), event()) for _ in range(calls)]
        for start, end in pairs:
            other.sum()
            start.record()
            work()
            end.record()
        wait(device)
        return [start.elapsed_time(end) for start, end in pairs]

    times(1)  # compiles
    estimate = max(statistics.median(times(3)), 1e-3)
    times(min(int(warmup_ms / estimate), 1000))
    return statistics.median(times(max(least, min(int(budget_ms / estimate), 1000))))


def graph_ms(work: Work, budget_ms: float = 100.0) -> float:
    """Median time of a replay of the CUDA graph of one call: what is left without host time.

    The current stream must not be the default one, and what `work` differentiates must have been
    computed on it: autograd runs a backward pass on the stream of its forward pass.
    """
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    work()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return median_ms(graph.replay, "cuda", budget_ms)


def mean_ms(work: Work, device: str, warmup: int = 10, calls: int = 100) -> float:
    """Wall clock of `calls` calls in a row and one wait, over `calls`; nothing flushed."""
    for _ in range(warmup):
        work()
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    wait(device)
    return 1e3 * (time.perf_counter() - start) / calls


def host_us(work: Work, device: str, calls: int = 300, burst: int = 20) -> float:
    """Median microseconds until a call returns, its kernels still running. Between bursts the
    device catches up, so that a full queue never holds the host."""
    for _ in range(burst):
        work()
    times = []
    for i in range(calls):
        if i % burst == 0:
            wait(device)
        start = time.perf_counter()
        work()
        times.append(1e6 * (time.perf_counter() - start))
    wait(device)
    return statistics.median(times)


def peak_mib(work: Work, device: str) -> float | None:
    """Peak MiB that a call allocates above what was allocated before: its results included, its
    inputs not. Nobody counts on the CPU."""
    if device != "cuda":
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20
