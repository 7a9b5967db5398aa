"""Results as JSON, CSV and tables of text or Markdown."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Row = dict
Columns = dict[str, Callable[[Row], str]]  # title -> cell


def write_json(path: Path, result: dict) -> None:
    """`result`, with what is not finite as a string, so that the file is valid JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(result), indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n")


def _finite(x):
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row; an inner dictionary becomes columns `outer.inner`, a shape BxHxLxD."""
    flat = [dict(_flat(row)) for row in rows]
    titles = list(dict.fromkeys(title for row in flat for title in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, titles)
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Row) -> Iterable[tuple[str, object]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", x) for inner, x in value.items())
        else:
            yield key, "x".join(map(str, value)) if isinstance(value, list) else value


def cells(columns: Columns, rows: Iterable[Row]) -> list[list[str]]:
    """The title line and a line a row; a column that is empty in every row is left out."""
    table = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    keep = [i for i in range(len(columns)) if any(line[i] for line in table[1:])]
    return [[line[i] for i in keep] for line in table]


def text(table: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return "\n".join(lines)


def number(x: float | None, digits: int = 3) -> str:
    """`digits` significant digits, in full notation from 1e-3 on; nothing for None."""
    if x is None:
        return ""
    if x == 0 or not math.isfinite(x):
        return str(x)
    if abs(x) < 1e-3:
        return f"{x:.{digits - 1}e}".replace("e-0", "e-")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{decimals}f}"


def shape(row: Row) -> str:
    """(B, H, L, D) and the mask."""
    mask = "" if row["mask"] == "none" else f" {row['mask']}"
    return f"({', '.join(map(str, row['shape']))}){mask}"


PASSES = {
    "forward": "forward",
    "backward": "backward",
    "jvp": "forward + JVP",
    "full": "backward of both",
}


def pass_in_words(row: Row) -> str:
    """What of the attention was measured."""
    return PASSES[row["pass"]]


def worst(row: Row) -> str:
    """Largest error among the results, marked where it is more than the tolerance."""
    if "errors" not in row:
        return ""
    error = max(map(float, row["errors"].values()), key=lambda x: math.inf if x != x else x)
    return f"{error:.1e}".replace("e-0", "e-") + ("" if row["accurate"] else " ✗")


ROWS: Columns = {
    "workload": lambda r: r["workload"],
    "(B, H, L, D)": shape,
    "dtype": lambda r: r["dtype"],
    "pass": lambda r: r["pass"],
    "implementation": lambda r: r["implementation"],
    "ms": lambda r: number(r.get("ms")) or r["status"],
    "graph ms": lambda r: number(r.get("graph_ms")),
    "TFLOP/s": lambda r: number(r.get("tflops")),
    "of bound": lambda r: f"{r['of_bound']:.2f} {r['bound_by']}" if "of_bound" in r else "",
    "MiB": lambda r: number(r.get("mib")),
    "error": worst,
}

HOST: Columns = {
    "call": lambda r: r["call"],
    "host µs": lambda r: number(r["us"]),
    "goal µs": lambda r: f"≤ {r['goal']}" if r.get("goal") else "",
}


def heading(result: dict) -> str:
    """Machine, versions and peak on one line."""
    e, peak = result["environment"], result["peak"]
    gemm = ", ".join(f"{number(x)} TFLOP/s {dtype}" for dtype, x in peak["gemm_tflops"].items())
    return (
        f"{e['gpu'] or e['cpu']}, torch {e['torch']}, Triton {e['triton']}, commit {e['commit']}; "
        f"product {peak['gemm_size']}³: {gemm}; copy: {peak['copy_gigabytes']:.0f} GB/s"
    )
