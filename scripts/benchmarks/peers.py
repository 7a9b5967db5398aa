"""The table of other projects' kernels beside ours, from the rows of scripts/benchmark_peers.py."""

import json
from pathlib import Path
from typing import Any

STEPS = {
    "jvp": "value and tangent",
    "value": "the same, and the gradient of the value",
    "both": "the same, and the gradient of both",
}
PROJECTS = {
    "ours": "ours, ms",
    "earlier": "[earlier package](https://github.com/amorehead/jvp_flash_attention)",
    "rcm": "[rCM](https://github.com/NVlabs/rcm)",
    "tvm": "[TVM](https://github.com/lumalabs/tvm)",
}


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each workload and step: ms, of other projects also as a multiple of ours; – where
    a project has no such step, or not on that machine."""
    given = [project for project in PROJECTS if any(row["project"] == project for row in rows)]
    times = {(row["workload"], row["step"], row["project"]): row.get("ms") for row in rows}
    lines = [["(B, H, L, D)", "step", *(PROJECTS[project] for project in given)]]
    for workload in dict.fromkeys(row["workload"] for row in rows if "x" in row["workload"]):
        for step, meaning in STEPS.items():
            cells = [f"({workload.replace('x', ', ')})", meaning]
            base = times.get((workload, step, "ours"))
            for project in given:
                ms = times.get((workload, step, project))
                ratio = f" ({ms / base:.1f}x)" if ms and base and project != "ours" else ""
                cells.append(f"{ms:.3g}{ratio}" if ms else "–")
            lines.append(cells)
    return lines


def errors(rows: list[dict[str, Any]]) -> str:
    """Errors of all projects in one sentence."""
    found = [row[key] for row in rows for key in ("value_error", "tangent_error") if key in row]
    return (
        f"Errors of value and tangent against float64 are {min(found):.1e} to {max(found):.1e}"
        " for all of them."
    )


def load(root: Path) -> dict[Path, dict]:
    """The committed results."""
    paths = sorted((root / "docs/results").glob("peers_*.json"))
    return {path.relative_to(root): json.loads(path.read_text()) for path in paths}
