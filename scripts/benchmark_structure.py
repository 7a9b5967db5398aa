"""Times windows, packed sequences, block masks and ranges beside the dense call.

    python scripts/benchmark_structure.py
    python scripts/benchmark_structure.py --tokens 4096 --output structure.json

All in bfloat16, 16 heads of 64 and of 128. What is measured: scripts/benchmarks/structure.py. Times
are medians by events of the device, of the call and the dense one in turn.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from benchmarks import report, structure

from training.environment import environment
from training.progress import tracked


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=structure.TOKENS, help="a multiple of 512")
    add("--budget-ms", type=float, default=40.0, help="timed calls of a round take about so long")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--output", type=Path, default=Path("outputs/benchmark/structure.json"))
    options = parser.parse_args()
    if options.tokens < 512 or options.tokens % 512:
        parser.exit(2, f"error: --tokens must be a multiple of 512, got {options.tokens}\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: torch sees no CUDA device; --device cpu times the reference there\n")
    command = shlex.join(["python", "scripts/benchmark_structure.py", *sys.argv[1:]])
    rows: list[dict] = []
    result = {"command": command, "environment": environment(), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    cases = list(structure.cases(options.tokens, options.device))
    measured = structure.measure(cases, options.device, options.budget_ms)
    total = len(structure.HEAD_DIMS) * len(cases)
    for row in tracked(measured, "rows measured", total, lines=False):
        rows.append(row)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(report.markdown(structure.table(rows)))
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
