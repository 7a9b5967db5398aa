"""The directory that a comparison leaves: results.json, report.md, report.html and their data."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.document import Block, Heading, Table, Text, markdown, page

ON_A_CPU = (
    "On a CPU: attention=jvp is this library's reference in plain PyTorch; no Triton kernel ran."
)


class Found(NamedTuple):
    """What a comparison found."""

    title: str
    results: dict[str, Any]
    blocks: list[Block]
    pictures: dict[str, Path]


def finite(value: Any) -> Any:
    """The same for strict JSON: a number that is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(v) for v in value]
    return value


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


def append_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_report(
    found: Found, environment: dict[str, Any], command: Sequence[str], output: Path
) -> Path:
    """Writes results.json, report.md and report.html; returns the page."""
    about = [[name, "none" if value is None else value] for name, value in environment.items()]
    about.append(["arguments", " ".join(command) or "none"])
    blocks = [*found.blocks, Heading("Environment"), Table(("what", "value"), about)]
    elsewhere = any(argument.startswith("runs=") for argument in command)
    if environment["gpu"] is None and not elsewhere:
        blocks.insert(0, Text(ON_A_CPU))
    results = {"title": found.title, "environment": environment, "arguments": list(command)}
    text = json.dumps(finite(results | found.results), indent=2, allow_nan=False)
    (output / "results.json").write_text(text + "\n")
    (output / "report.md").write_text(markdown(found.title, blocks, output))
    path = output / "report.html"
    path.write_text(page(found.title, blocks))
    return path
