"""What a release needs: one version everywhere, and results that are not older than the code.

    python scripts/check_release.py            # lists every result file, and what to run again
    python scripts/check_release.py --strict   # exit status 1 where one is older than its code

A result file names the commit that it was measured at. Its age is the number of commits since; it
is old where one of them touched the code that it measures. The files in docs/results/earlier are
kept for comparison and not measured again.

Exit status 1 where versions differ, or a file names a commit that is not in the history and no
reason is given in REWRITTEN.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
# Commits that were rewritten before they were merged -> the one that brought their results.
REWRITTEN = {
    "05bc666021a0": "5ed3efa",  # digits_objectives
    "3c9eac0428a3": "4ba6106",  # eight_gaussians
    "fc0c5a7063d9": "8737b99",  # evaluate_digits
    "a025f8a01356": "e1d6222",  # the same change, rebased
    "84137e936af2": "bb1225f",  # the same change, rebased
}
KERNELS, TRAINING = ("jvp_flash_attention",), ("jvp_flash_attention", "training", "configs")
# Pattern of names -> the code that is measured, and what measures it where the file does not say.
MEASURED = (
    ("compare_*", TRAINING, "python scripts/compare.py"),
    ("context_parallel_*", KERNELS, "python scripts/benchmark_context_parallel.py"),
    ("digits_objectives*", TRAINING, "python scripts/digits_objectives.py"),
    ("digits_recipes*", TRAINING, "python scripts/digits_objectives.py"),
    ("eight_gaussians*", TRAINING, "python scripts/eight_gaussians.py"),
    ("evaluate_*", TRAINING, "python scripts/evaluate.py"),
    ("fashion_mnist_*", TRAINING, "python scripts/fashion_mnist.py"),
    ("gpu_tests_*", KERNELS, "pytest -m gpu"),
    ("openclipart_*", TRAINING, "python scripts/openclipart.py"),
    ("scaling_*", TRAINING, "python scripts/scaling.py"),
    ("step_*", TRAINING, "python scripts/profile_step.py"),
    ("tiles_*", KERNELS, "python scripts/tile_tables.py"),
    ("*", KERNELS, "python scripts/benchmark_attention.py"),
)


class Result(NamedTuple):
    """A result file; `commit` is the oldest of the history that it names, if any."""

    name: str
    commit: str | None
    unknown: list[str]  # commits that are not in the history
    age: int | None  # commits since
    touched: int | None  # those among them that changed the code it measures
    command: str


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """What git prints, or None where it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def has_history(root: Path = ROOT) -> bool:
    """Whether this is a clone with all commits: a shallow one cannot tell ages."""
    return git("rev-parse", "--is-shallow-repository", root=root) == "false"


def commits(value: Any) -> Iterator[str]:
    """Every hash under a key `commit`, wherever it stands; of "between A and B" both."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "commit" and isinstance(inner, str):
                yield from re.findall(r"\b[0-9a-f]{7,40}(?:-dirty)?\b", inner)
            else:
                yield from commits(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from commits(inner)


def results(root: Path = ROOT) -> list[Result]:
    """All result files, the oldest first; needs the whole history."""
    folder = root / "docs" / "results"
    found = [_result(path, folder, root) for path in sorted(folder.rglob("*.json"))]
    return sorted(found, key=lambda r: -(r.age or 0))


def _result(path: Path, folder: Path, root: Path) -> Result:
    name, content = path.relative_to(folder).as_posix(), json.loads(path.read_text())
    ages: dict[str, int | None] = {}
    for named in dict.fromkeys(commits(content)):
        commit = REWRITTEN.get(named, named)
        known = git("merge-base", "--is-ancestor", commit, "HEAD", root=root) is not None
        ages[commit] = _count(f"{commit}..HEAD", root=root) if known else None
    unknown = [commit for commit, age in ages.items() if age is None]
    dated = {commit: age for commit, age in ages.items() if age is not None}
    oldest = max(dated, key=lambda commit: dated[commit], default=None)
    _, code, command = next(row for row in MEASURED if fnmatch(path.name, row[0]))
    command = content.get("command") or " ".join([command, *content.get("arguments", [])])
    touched = oldest and _count(f"{oldest}..HEAD", "--", *code, root=root)
    return Result(name, oldest, unknown, dated.get(oldest or ""), touched or 0, command)


def _count(*arguments: str, root: Path) -> int | None:
    found = git("rev-list", "--count", *arguments, root=root)
    return None if found is None else int(found)


def unexplained(found: list[Result]) -> list[str]:
    """A line for each file that names no commit, or one that the history does not have."""
    lines = []
    for r in found:
        if r.unknown:
            remedy = "add it to REWRITTEN"
            if any(commit.endswith("-dirty") for commit in r.unknown):
                remedy = "commit the files that had changed and measure again"
            lines.append(f"{r.name}: {', '.join(r.unknown)} is not in the history; {remedy}")
        elif r.commit is None:
            lines.append(f"{r.name}: names no commit; write training/environment.py's into it")
    return lines


def to_rerun(found: list[Result]) -> list[Result]:
    """The files that are older than the code they measure."""
    return [r for r in found if r.touched and not r.name.startswith("earlier/")]


def version_problems(root: Path = ROOT, released: bool = False) -> list[str]:
    """A line for each place that has another version or date than the package and the changelog;
    `released`: the changelog must have a date.
    """
    package = (root / "jvp_flash_attention" / "__init__.py").read_text()
    version = re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)[0]
    citation = (root / "CITATION.cff").read_text()
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", citation, re.MULTILINE))
    heading = re.search(
        r"^## \[(.+?)\] - (\S+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    newest, date = heading.groups() if heading else ("none", "none")
    lines = []
    if cited.get("version") != version:
        lines.append(f"CITATION.cff: version {cited.get('version')}, the package is {version}")
    if newest != version:
        lines.append(f"CHANGELOG.md: begins with {newest}, the package is {version}")
    if released and date == "Unreleased":
        lines.append(f"CHANGELOG.md: {version} has no date")
    if released and date != cited.get("date-released"):
        lines.append(f"CITATION.cff: date-released {cited.get('date-released')}, changelog {date}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strict", action="store_true", help="old results fail too")
    parser.add_argument("--released", action="store_true", help="the version must have its date")
    options = parser.parse_args()
    wrong = version_problems(released=options.released)
    old: list[Result] = []
    if has_history():
        found = results()
        wrong += unexplained(found)
        old = to_rerun(found)
        _print(found)
        for r in old:
            print(f"run again for {r.name} ({r.touched} changes of its code): {r.command}")
    else:
        wrong.append("this clone is shallow: git fetch --unshallow, ages need the history")
    for line in wrong:
        print(f"error: {line}")
    return 1 if wrong or (options.strict and old) else 0


def _print(found: list[Result]) -> None:
    table = Table("result", "commit", "age in commits", "of them in its code")
    for r in found:
        table.add_row(r.name, r.commit or "none", str(r.age), str(r.touched))
    Console(width=110).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
