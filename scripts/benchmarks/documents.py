"""The figures in the documents, from the committed result files alone.

A document holds pairs of lines `<!-- begin NAME -->`, `<!-- end NAME -->`; what lies between them
is written here. A block whose result files are absent is empty: the section is left out.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from . import accuracy, headline, legacy_table, peers, plots, report, structure, tables, targets

ROOT = Path(__file__).parents[2]
RESULTS = Path("docs/results")
DOCUMENTS = tuple(map(Path, ("README.md", "docs/benchmarks.md", "docs/training/performance.md")))
SUITES = {  # suite -> heading of its section
    "targets": "Kernels",
    "legacy_table": "The earlier package's table",
    "lengths": "Time and memory over the length",
    "workloads": "Named workloads",
}
INTRODUCTIONS = {
    "legacy_table": (
        "The table that the earlier package of this import name published: B = 2, H = 12, D = 64,"
        " timed as its\nscript does, with six clones and `make_dual`"
        " ([`legacy_table.py`](../scripts/benchmarks/legacy_table.py)). Its check used\nabsolute"
        " tolerances. Here it is the relative error of value and tangent."
    ),
}
SHARE = (
    "`share` is what is left of the dense call: of its pairs under a window, of its blocks, of its"
    " tiles of 128 by 128 where sequences are packed (the dense call has 4 rows of 4096 tokens), of"
    " its matrix products where rows have no tangent. It is the multiple of dense to hope for."
)
FORMER = {"readme": "legacy_table"}  # suites, as older result files name them
Results = dict[Path, dict]  # path, relative to the root -> content


def load(suite: str, root: Path = ROOT) -> Results:
    """The result files of a suite, errors judged by the tolerances of today."""
    names = (suite, *(old for old, new in FORMER.items() if new == suite))
    paths = sorted(path for name in names for path in (root / RESULTS).glob(f"{name}_*.json"))
    found = {path.relative_to(root): _read(path) for path in paths}
    for row in (row for result in found.values() for row in result["rows"] if "errors" in row):
        errors = {name: float(error) for name, error in row["errors"].items()}
        row["accurate"] = accuracy.accurate(errors, row["dtype"], row["shape"][2])
    return found


def _read(path: Path) -> dict:
    """A result under today's names."""
    result = json.loads(path.read_text())
    if "suite" in result:
        result["suite"] = FORMER.get(result["suite"], result["suite"])
    if "roof" in result:
        result["peak"] = result.pop("roof")
    return result


def regenerate(document: Path, root: Path = ROOT) -> str:
    """The document's text with every block of this script written anew."""
    text = (root / document).read_text()
    for name in re.findall(r"<!-- begin (\S+) -->", text):
        if name not in BLOCKS:  # another script's
            continue
        block = BLOCKS[name](root)
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, found = re.subn(pattern, lambda m, b=block: m[1] + b + m[2], text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{document}: block {name} has no end, or is there {found} times")
    return text


def _section(suite: str) -> Callable[[Path], str]:
    """Heading, and for each file its machine, pictures and tables."""

    def block(root: Path) -> str:
        parts = []
        for path, result in load(suite, root).items():
            link = path.relative_to("docs")
            parts.append(f"{report.heading(result)} ([{path.name}]({link})).")
            stem = link.with_suffix("")
            parts += [f"![{title}]({p})" for p, (title, _) in plots.pictures(result, stem).items()]
            parts += map(_part, tables.of(result, goals=False))
        head = [f"## {SUITES[suite]}", *filter(None, [INTRODUCTIONS.get(suite)])]
        return _spaced([*head, *parts] if parts else [])

    return block


def _spaced(parts: list[str]) -> str:
    return "".join(f"\n{part}\n" for part in parts) + "\n" * bool(parts)


def _part(part: tables.Table | str) -> str:
    """A table, folded where it is long; lines as a list."""
    if isinstance(part, str):
        return "\n".join(f"- {line}" for line in part.splitlines())
    table = report.markdown(part)
    if len(part) <= 25:
        return table
    return f"<details><summary>{len(part) - 1} rows</summary>\n\n{table}\n\n</details>"


FIGURES = (  # workloads of the README
    "long_4k_128",
    "long_16k_128",
    "long_8k_64",
    "causal_4k_128",
    "mid_2k",
    "dit_l_256",
    "dit_xl_256",
)


def _times(row: dict, quantity: str) -> str:
    """How many times ours the figure of SDPA's MATH is."""
    its, ours = row["peers"].get("sdpa-math", {}).get(quantity), row.get(quantity)
    return f"{its / ours:.0f}x" if its and ours else ""


README_COLUMNS: report.Columns = {
    "(B, H, L, D)": report.shape,
    "pass": report.pass_in_words,
    "ms": lambda r: report.number(r.get("ms")),
    "TFLOP/s": lambda r: report.number(r.get("tflops")),
    "MATH ms": targets.peer("sdpa-math", "ms"),
    "speed-up": lambda r: _times(r, "ms"),
    "MiB": lambda r: report.number(r.get("mib")),
    "MATH MiB": targets.peer("sdpa-math", "mib"),
    "less memory": lambda r: _times(r, "mib"),
}


SHORT_COLUMNS = {
    name: legacy_table.STATISTICS[name]
    for name in ("dtype", "average", "least", "most", "memory", "MATH's")
}


def _figures(root: Path) -> str:
    """The block of the README: what matters of the goals, on the headline's GPU, and the statistics
    of the other table."""
    parts = []
    path = headline.TARGETS
    result = load("targets", root).get(path)
    if result:
        rows = [
            row
            for row in targets.judged(result["rows"])
            if row["workload"] in FIGURES and row["pass"] in ("jvp", "full")
        ]
        gpu, peak = result["environment"]["gpu"], result["peak"]
        gemm = report.number(peak["gemm_tflops"][targets.DTYPE])
        parts.append(
            f"**Attention** on {gpu}, {targets.DTYPE}, beside `torch.func.jvp` of SDPA's MATH"
            f" backend. An {peak['gemm_size']}³ matrix product reaches {gemm} TFLOP/s in the same"
            f" run, at a lower clock than some passes, which exceed it ([{path.name}]({path}))."
        )
        parts.append(report.markdown(report.cells(README_COLUMNS, rows)))
        found = plots.pictures(result, path.with_suffix(""))
        parts += [f"![{title}]({picture})" for picture, (title, _) in found.items()]
    others = load("legacy_table", root)
    if others:
        files = ", ".join(f"[{path.name}]({path})" for path in others)
        rows = [legacy_table.statistics_of(result["rows"]) for result in others.values()]
        parts.append(
            "**Short sequences**: 28 configurations of 32 to 2048 tokens, with and without masks."
            " Speed-up over MATH, and peak memory as a multiple of inputs, tangents and results,"
            f" which is the least possible ({files}). From 1024 tokens on, float32 operands"
            " are held once more as bfloat16 parts."
        )
        parts.append(report.markdown(report.cells(SHORT_COLUMNS, rows)))
    parts += headline.steps(root)
    return _spaced(parts)


def _peers(root: Path) -> str:
    """Other projects' kernels."""
    parts = []
    for path, result in peers.load(root).items():
        gpu, rows = result["environment"]["gpu"], result["rows"]
        parts.append(
            f"**Other kernels with a tangent** on {gpu}, {result['dtype']}, one layer without a"
            f" mask, Python included ([{path.name}]({path})). {peers.errors(rows)} A dash: rCM's"
            " gradient needs another package, and only TVM's tangent has a gradient besides ours."
        )
        parts.append(report.markdown(peers.table(rows)))
    return _spaced(parts)


def _structure(root: Path) -> str:
    """Windows, packed sequences, block masks and ranges."""
    parts = []
    for path, result in structure.load(root).items():
        machine, link = result["environment"], path.relative_to("docs")
        parts.append(
            f"{machine['gpu']}, commit {machine['commit']}, bfloat16 ([{path.name}]({link}))."
        )
        parts.append(report.markdown(structure.table(result["rows"])))
    return _spaced(["## Structure in the mask", SHARE, *parts] if parts else [])


BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": lambda root: _spaced(headline.lines(root)),
    "figures": _figures,
    "peers": _peers,
    "structure": _structure,
    "steps": lambda root: _spaced(headline.steps_by_gpu(root)),
    **{suite: _section(suite) for suite in SUITES},
}
