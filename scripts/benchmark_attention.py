"""Times attention and its derivatives, beside PyTorch's backends and the peak of the machine.

    python scripts/benchmark_attention.py --workloads long_4k_128 4x16x1000x96 --passes jvp full
    python scripts/benchmark_attention.py --suite targets
    python scripts/benchmark_attention.py --suite legacy_table --dtypes float16
    python scripts/benchmark_attention.py --suite lengths

Suites: `workloads` (named in jvp_flash_attention/workloads.py, or BxHxLxD), `targets` (the goals of
the project), `legacy_table` (that of the earlier package), `lengths` (time and memory over L).

A time is the median of whole calls with L2 emptied before each; `graph ms` is the
median replay of the call as a CUDA graph, for calls below 1 ms. TFLOP/s and the share of the bound
are of the graph where there is one. How FLOPs and bounds are counted: scripts/benchmarks/flops.py.

Writes OUTPUT/SUITE_MACHINE.json and .csv, plots as .png, and prints the tables. Exit status 1 where
a case failed for another reason than memory or a missing feature.
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import torch
from benchmarks import documents, host, legacy_table, peak, plots, report, tables, targets
from benchmarks.flops import PASSES
from benchmarks.implementations import BUILT_IN, find
from benchmarks.measure import FAILED, Case, Settings, measure
from benchmarks.problem import DTYPES

from jvp_flash_attention.workloads import MASKS, WORKLOADS, Workload
from training.environment import environment
from training.progress import tracked

HOW = {"skip": [], "budget_ms": 100.0}
SUITES = {  # suite -> the options that choose what it measures, and their defaults
    "workloads": {
        "workloads": list(WORKLOADS),
        "masks": None,
        "dtypes": ["bfloat16"],
        "passes": list(PASSES),
        "implementations": list(BUILT_IN),
        **HOW,
    },
    "targets": HOW,
    "legacy_table": {"dtypes": list(DTYPES), "lengths": list(legacy_table.LENGTHS)},
    "lengths": {
        "lengths": [2**i for i in range(8, 16)],
        "masks": None,
        "dtypes": ["bfloat16"],
        "passes": ["jvp", "full"],
        "implementations": ["ours", "sdpa-math"],
        **HOW,
    },
}
MEASURES = ("memory", "accuracy", "graph", "host")


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _complete(options)
    except ValueError as reason:
        parser.error(str(reason))
    command = shlex.join(["python", "scripts/benchmark_attention.py", *(arguments or sys.argv[1:])])
    files = [[x] for x in options.dtypes] if options.suite == "legacy_table" else [options.dtypes]
    # a CUDA graph cannot be captured on the default stream
    with torch.cuda.stream(torch.cuda.Stream()) if options.device == "cuda" else nullcontext():
        failed = sum(_run(options, dtypes, command) for dtypes in files)
    return 1 if failed else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--suite", type=_suite, choices=SUITES, default="workloads")
    add("--workloads", nargs="+", metavar="NAME|BxHxLxD", help=", ".join(WORKLOADS))
    add("--lengths", nargs="+", type=int, metavar="L")
    add("--masks", nargs="+", choices=MASKS, help="instead of each workload's own")
    add("--dtypes", "--dtype", nargs="+", choices=DTYPES)
    add("--passes", nargs="+", choices=PASSES, help="full: backward of value and tangent")
    add(
        "--implementations",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(BUILT_IN)}, or module:function with SDPA's arguments",
    )
    add("--skip", nargs="+", choices=MEASURES, help="do not measure these")
    add("--budget-ms", type=float, help="timed calls of a case take about so long")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--output", type=Path, default=Path("outputs/benchmark"), help="folder of the results")
    return parser


def _suite(name: str) -> str:
    """The suite that is meant; a former name is warned about."""
    if name not in documents.FORMER:
        return name
    print(f"warning: --suite {name} is now --suite {documents.FORMER[name]}", file=sys.stderr)
    return documents.FORMER[name]


def _complete(options: argparse.Namespace) -> None:
    """Checks the options and fills in the suite's defaults."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; --device cpu times the reference there")
    mine = SUITES[options.suite]
    for name in dict.fromkeys(name for suite in SUITES.values() for name in suite):
        if getattr(options, name) is None:
            setattr(options, name, mine.get(name))
        elif name not in mine:
            option = name.replace("_", "-")
            raise ValueError(f"--suite {options.suite} has no option --{option}")
    options.dtypes = options.dtypes or [targets.DTYPE]
    if options.budget_ms is not None and options.budget_ms <= 0:
        raise ValueError(f"--budget-ms must be positive, got {options.budget_ms:g}")
    if min(options.lengths or [1]) < 1:
        raise ValueError(f"--lengths must be positive, got {min(options.lengths)}")
    for name in options.implementations or []:
        find(name)
    options.named = dict(map(_workload, options.workloads or []))


def _workload(name: str) -> tuple[str, Workload]:
    """A workload by its name, or by its shape."""
    if name in WORKLOADS:
        return name, WORKLOADS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", name):
        raise ValueError(f"a workload is one of {', '.join(WORKLOADS)} or BxHxLxD, got {name!r}")
    B, H, L, D = map(int, name.split("x"))
    return name, Workload(B, H, L, D)


def _cases(options: argparse.Namespace) -> Iterable[Case]:
    if options.suite == "targets":
        return targets.cases()
    if options.suite == "lengths":
        options.named = {f"length_{L}": Workload(1, 16, L, 128) for L in options.lengths}
    return [
        Case(name if mask is None else f"{name}+{mask}", _masked(workload, mask), dtype, x, i)
        for name, workload in options.named.items()
        for mask in options.masks or [None]
        for dtype in options.dtypes
        for x in options.passes
        for i in options.implementations
    ]


def _masked(workload: Workload, mask: str | None) -> Workload:
    return workload if mask is None else workload._replace(mask=mask)


def _run(options: argparse.Namespace, dtypes: list[str], command: str) -> int:
    """Measures one result file; returns how many cases failed."""
    device, skip = options.device, options.skip or []
    measured = peak.measure({dtype: DTYPES[dtype] for dtype in dtypes}, device)
    result = {
        "suite": options.suite,
        "command": command,
        "environment": environment(),
        "peak": measured._asdict(),
        "host": [] if "host" in skip else host.measure(device),
        "rows": [],
    }
    print(report.heading(result), flush=True)
    if options.suite == "legacy_table":
        rows = legacy_table.measure(dtypes[0], device, options.lengths)
        table = (options.lengths, legacy_table.MASKS, legacy_table.METHODS)
        total = math.prod(map(len, table))
    else:
        kept = {name: name not in skip for name in MEASURES if name != "host"}
        cases = list(_cases(options))
        rows = measure(cases, measured, Settings(device, options.budget_ms, **kept))
        total = len(cases)
    try:
        for row in tracked(rows, "rows measured", total, lines=False):
            result["rows"].append(row)
            print(_progress(row), flush=True)
    finally:  # what was measured before an interrupt is kept
        parts = (report.text(x) if isinstance(x, list) else x for x in tables.of(result))
        print("", *parts, sep="\n\n", end="\n\n")
        _write(result, options, dtypes)
    return sum(row["status"] == FAILED for row in result["rows"])


def _progress(row: dict) -> str:
    """One line while it runs."""
    name = f"{row.get('workload', '')} {report.shape(row)} {row['dtype']} {row['pass']}".strip()
    figure = f"{report.number(row['ms'])} ms" if row["status"] == "ok" else row["status"]
    reason = f" ({row['reason']})" if "reason" in row else ""
    return f"  {name} {row['implementation']}: {figure}{reason}"


def _write(result: dict, options: argparse.Namespace, dtypes: list[str]) -> None:
    suffix = f"_{dtypes[0]}" if options.suite == "legacy_table" else ""
    stem = options.output / f"{options.suite}{suffix}_{_machine(result['environment']['gpu'])}"
    report.write_json(stem.with_suffix(".json"), result)
    report.write_csv(stem.with_suffix(".csv"), result["rows"])
    written = [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    try:
        written += plots.draw(result, stem)
    except ModuleNotFoundError as missing:
        print(f"no pictures: {missing}", file=sys.stderr)
    print("written to", ", ".join(map(str, written)))


def _machine(gpu: str | None) -> str:
    """A short name: "NVIDIA H100 80GB HBM3" -> "h100"."""
    found = re.search(r"\b[A-Z]+\d+\w*", gpu or "cpu")
    return found[0].lower() if found else re.sub(r"\W+", "_", gpu or "cpu").lower()


if __name__ == "__main__":
    raise SystemExit(main())
