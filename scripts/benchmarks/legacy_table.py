"""The table that the earlier package of this import name published, with an honest error column.

B = 2, H = 12, D = 64, L = 32 … 2048; no mask, causal, a bool and an additive mask of (B, H, L, L).
A timed call is what that package's script times: six clones of inputs and tangents, three
`make_dual`, one attention inside a `forward_ad.dual_level`, no backward; 10 calls to warm up, then
the wall clock of 100 calls and one wait; the best of three of these, as most rows wait for a host
that others use too. Memory is the peak of one call above the inputs and the mask, so the six clones
(6·B·H·L·D elements) and the two results are in it. Accurate is what the script's absolute
tolerances do not ask: relative error of value and tangent against float64.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor
from torch.autograd import forward_ad

from jvp_flash_attention.workloads import Workload

from . import accuracy, flops
from .implementations import BUILT_IN
from .measure import errors, guarded, rounded
from .problem import DTYPES, Problem, draw
from .report import Columns, Row, number, worst
from .timing import mean_ms, peak_mib

B, H, D = 2, 12, 64
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
MASKS = ("none", "causal", "bool-full", "additive-full")
METHODS = ("sdpa-math", "ours")
ROUNDS = 3


def measure(
    dtype: str,
    device: str,
    lengths: Sequence[int] = LENGTHS,
    methods: Sequence[str] = METHODS,
    calls: tuple[int, int] = (10, 100),
) -> Iterator[Row]:
    """A row for every length, mask and method."""
    for length in lengths:
        for mask in MASKS:
            problem = draw(Workload(B, H, length, D, mask), DTYPES[dtype], device)
            sample = accuracy.Sample(problem, heads=B * H, rows=length)
            for method in methods:
                figures = partial(_figures, problem, sample, method, dtype, device, calls)
                yield {**_head(problem, method, dtype), **guarded(figures)}


def _head(p: Problem, method: str, dtype: str) -> Row:
    return {
        "shape": list(p.workload[:4]),
        "mask": p.workload.mask,
        "dtype": dtype,
        "pass": "jvp",
        "implementation": method,
    }


def _figures(
    p: Problem, sample: accuracy.Sample, method: str, dtype: str, device: str, calls: tuple
) -> Row:
    implementation = BUILT_IN[method]
    with implementation.around(), forward_ad.dual_level():
        work = _call(p, implementation.plain)
        found = errors(sample, "jvp", dtype, work())
        mib = peak_mib(work, device)
        ms = min(mean_ms(work, device, *calls) for _ in range(ROUNDS))
    tflops = flops.flops(p.workload, "jvp") / ms / 1e9
    return {"ms": rounded(ms), "mib": rounded(mib), "tflops": rounded(tflops), **found}


def _call(p: Problem, plain: Callable[[Problem, tuple], Tensor]) -> Callable[[], tuple]:
    def work() -> tuple:
        pairs = zip(p.primals, p.tangents, strict=True)
        duals = tuple(forward_ad.make_dual(x.clone(), t.clone()) for x, t in pairs)
        return tuple(forward_ad.unpack_dual(plain(p, duals)))

    return work


def pairs(rows: Sequence[Row]) -> list[Row]:
    """A row a configuration, with both methods' figures."""
    found: dict[tuple, Row] = {}
    for row in rows:
        head = {"shape": row["shape"], "mask": row["mask"]}
        found.setdefault((row["shape"][2], row["mask"]), head)[row["implementation"]] = row
    return list(found.values())


def _figure(method: str, show: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda pair: show(pair[method]) if method in pair else ""


def _speedup(pair: Row) -> str:
    times = [pair.get(method, {}).get("ms") for method in METHODS]
    return f"{times[0] / times[1]:.1f}x" if all(times) else ""


COLUMNS: Columns = {
    "tokens": lambda p: str(p["shape"][2]),
    "mask": lambda p: p["mask"].removesuffix("-full"),
    "ms": _figure("ours", lambda r: number(r.get("ms")) or r["status"]),
    "MATH ms": _figure("sdpa-math", lambda r: number(r.get("ms")) or r["status"]),
    "speed-up": _speedup,
    "MiB": _figure("ours", lambda r: number(r.get("mib"))),
    "MATH MiB": _figure("sdpa-math", lambda r: number(r.get("mib"))),
    "error": _figure("ours", worst),
    "MATH error": _figure("sdpa-math", worst),
}


def speedups(rows: Sequence[Row]) -> list[float]:
    """SDPA MATH's time over ours in every configuration that both could run."""
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok":
            key = (tuple(row["shape"]), row["mask"])
            times.setdefault(key, {})[row["implementation"]] = row["ms"]
    return [t["sdpa-math"] / t["ours"] for t in times.values() if len(t) > 1]


def statistics_of(rows: Sequence[Row]) -> Row:
    """Speed-up over SDPA MATH; for each method how many configurations are accurate, and the most
    memory it takes of what must be there."""
    found: Row = {
        "dtype": rows[0]["dtype"],
        "speedups": speedups(rows),
        "accurate": {},
        "memory": {},
    }
    for method in METHODS:
        mine = [row for row in rows if row["implementation"] == method]
        if mine:
            good = sum(bool(row.get("accurate")) for row in mine)
            found["accurate"][method] = f"{good}/{len(mine)}"
        needed = [row["mib"] / _least_mib(row) for row in mine if row.get("mib")]
        if needed:
            found["memory"][method] = max(needed)
    return found


def statistics_lines(rows: Sequence[Row], goals: bool = True) -> list[str]:
    """The same as sentences."""
    found, lines = statistics_of(rows), []
    average, least = (" (goal ≥ 10x)", " (goal ≥ 2.5x)") if goals else ("", "")
    if faster := found["speedups"]:
        lines.append(
            f"speed-up over SDPA MATH: average {statistics.mean(faster):.2f}x{average}, "
            f"minimum {min(faster):.2f}x{least}, maximum {max(faster):.2f}x"
        )
    for method, accurate in found["accurate"].items():
        lines.append(f"accurate against float64: {method} {accurate}")
        if method in found["memory"]:
            most = found["memory"][method]
            lines.append(f"memory over six clones and two results: {method} ≤ {most:.2f}x")
    return lines


STATISTICS: Columns = {
    "dtype": lambda r: r["dtype"],
    "average": lambda r: f"{statistics.mean(r['speedups']):.2f}x",
    "least": lambda r: f"{min(r['speedups']):.2f}x",
    "most": lambda r: f"{max(r['speedups']):.2f}x",
    "accurate": lambda r: r["accurate"]["ours"],
    "MATH": lambda r: r["accurate"]["sdpa-math"],
    "memory": lambda r: _factor(r["memory"].get("ours"), 2),
    "MATH's": lambda r: _factor(r["memory"].get("sdpa-math"), 1),
}


def _factor(x: float | None, decimals: int) -> str:
    return "" if x is None else f"{x:.{decimals}f}x"  # on a CPU nobody counts memory


def _least_mib(row: Row) -> float:
    """Six clones and two results."""
    return 8 * math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize / 2**20
