"""What bounds a training step: where the GPU's time goes, and how much of it is idle."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# The first kind with a part of its name in a kernel's.
KINDS = {
    "communication": ("nccl",),
    "optimizer": ("multi_tensor_apply", "adam", "lerp"),
    "attention": ("flash", "fmha", "attention", "cudnn", "bwd_", "keys_kernel", "keys_jvp",
                  "queries_kernel", "queries_jvp", "row_sums", "forward_kernel", "forward_jvp",
                  "repair_kernel"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "gemv"),
    "copies": ("memcpy", "memset", "direct_copy", "catarray"),
}  # fmt: skip
REST = "elementwise"


class Profile(NamedTuple):
    step_ms: float  # from the start of a step to that of the next
    busy: float  # share of it in which a kernel ran
    kinds: dict[str, float]  # ms a step
    kernels: list[tuple[str, float, float]]  # (name, ms a step, launches a step), longest first
    exposed: float  # ms a step in which only communication ran


def profile_steps(step: Callable[[], Any], steps: int) -> Profile:
    """The kernels of so many calls of ``step`` on this GPU, which has been warmed up."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return of_events([e for e in events if e.get("cat") in kinds], steps)


def of_events(events: list[dict[str, Any]], steps: int) -> Profile:
    """``events``: with name, ts and dur in microseconds, as in a trace of Chrome's."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        times[event["name"]].append(event["dur"])
    end = max((e["ts"] + e["dur"] for e in events), default=0.0)
    span = end - min((e["ts"] for e in events), default=0.0)
    busy = _covered(events)
    exposed = busy - _covered([e for e in events if kind(e["name"]) != "communication"])
    shares: dict[str, float] = dict.fromkeys((*KINDS, REST), 0.0)
    for name, durations in times.items():
        shares[kind(name)] += sum(durations) / 1000 / steps
    kernels = [(name, sum(d) / 1000 / steps, len(d) / steps) for name, d in times.items()]
    kernels.sort(key=lambda kernel: -kernel[1])
    share = busy / span if events else 0.0
    return Profile(span / 1000 / steps, share, shares, kernels, exposed / 1000 / steps)


def _covered(events: list[dict[str, Any]]) -> float:
    """Microseconds in which at least one of them ran."""
    covered, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def kind(kernel: str) -> str:
    lower = kernel.lower()
    return next((k for k, parts in KINDS.items() if any(p in lower for p in parts)), REST)
