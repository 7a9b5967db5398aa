"""From cases to rows: what each costs, how far it is from the machine's bound, how exact it is."""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch

from jvp_flash_attention.workloads import Workload

from . import accuracy, flops, timing
from .implementations import find, prepare
from .peak import Peak
from .problem import DTYPES, Problem, draw

GRAPH_BELOW_MS = 1.0  # shorter calls are timed as a CUDA graph too: the host may be what is slow
OUT_OF_MEMORY, UNSUPPORTED, FAILED = "out of memory", "unsupported", "failed"
NO_KERNEL = ("No available kernel", "No viable backend")  # SDPA's words
Row = dict


class Case(NamedTuple):
    """One pass of one implementation on one workload in one dtype."""

    name: str
    workload: Workload
    dtype: str
    pass_name: str
    implementation: str


class Settings(NamedTuple):
    """How to measure."""

    device: str
    budget_ms: float = 100.0  # of timed calls a case
    memory: bool = True
    accuracy: bool = True
    graph: bool = True


def measure(cases: Iterable[Case], peak: Peak, settings: Settings) -> Iterator[Row]:
    """A row for every case. Cases of one problem that follow each other share its tensors."""
    for (workload, dtype), group in groupby(cases, lambda case: (case.workload, case.dtype)):
        try:
            problem = draw(workload, DTYPES[dtype], settings.device)
        except torch.cuda.OutOfMemoryError:
            yield from ({**_head(case), "status": OUT_OF_MEMORY} for case in group)
            continue
        sample = accuracy.Sample(problem)
        for case in group:
            figures = partial(_figures, case, problem, sample, peak, settings)
            yield {**_head(case), **guarded(figures)}


def _head(case: Case) -> Row:
    return {
        "workload": case.name,
        "shape": list(case.workload[:4]),
        "mask": case.workload.mask,
        "dtype": case.dtype,
        "pass": case.pass_name,
        "implementation": case.implementation,
    }


def guarded(figures: Callable[[], Row]) -> Row:
    """The figures, or what stopped them: a benchmark goes on where one case cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA's reasons, one by one
            return {"status": "ok", **figures()}
    except torch.cuda.OutOfMemoryError:
        pass
    except NotImplementedError as reason:
        return {"status": UNSUPPORTED, "reason": _line(reason)}
    except Exception as reason:
        known = any(words in str(reason) for words in NO_KERNEL)
        return {"status": UNSUPPORTED if known else FAILED, "reason": _line(reason)}
    gc.collect()  # here, not above: the exception held the tensors
    torch.cuda.empty_cache()
    return {"status": OUT_OF_MEMORY}


def _figures(
    case: Case, p: Problem, sample: accuracy.Sample, peak: Peak, settings: Settings
) -> Row:
    implementation, device = find(case.implementation), settings.device
    row: Row = {}
    with implementation.around():
        work = prepare(implementation, case.pass_name, p)
        results = work()
        if settings.accuracy:
            row |= errors(sample, case.pass_name, case.dtype, results)
        del results
        if settings.memory:
            row["mib"] = rounded(timing.peak_mib(work, device))
        ms = timing.median_ms(work, device, settings.budget_ms)
        graph = None
        if settings.graph and device == "cuda" and ms < GRAPH_BELOW_MS:
            try:
                graph = timing.graph_ms(work, settings.budget_ms)
            except RuntimeError as reason:
                row["reason"] = f"no graph: {_line(reason)}"
    device_ms = ms if graph is None else graph
    dtype = DTYPES[case.dtype]
    bound = flops.bound(
        p.workload, case.pass_name, dtype, peak.gemm_tflops[case.dtype], peak.copy_gigabytes
    )
    tflops = flops.flops(p.workload, case.pass_name) / device_ms / 1e9
    return row | {
        "ms": rounded(ms),
        "graph_ms": rounded(graph),
        "tflops": rounded(tflops),
        "of_bound": rounded(bound.ms / device_ms),
        "bound_by": bound.by,
    }


def errors(sample: accuracy.Sample, pass_name: str, dtype: str, results: tuple) -> Row:
    """The error of each result, and whether all are within their tolerance."""
    found = sample.errors(pass_name, results)
    return {
        "errors": {key: rounded(error) for key, error in found.items()},
        "accurate": accuracy.accurate(found, dtype, sample.p.workload.length),
    }


def rounded(x: float | None) -> float | None:
    """Four significant digits."""
    return None if x is None else float(f"{x:.4g}")


def _line(reason: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(f"{type(reason).__name__}: {reason}".split())[:200]
