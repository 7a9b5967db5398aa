"""What README and docs say is true: commands, code, files, links."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fences(text: str, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


ELSEWHERE = {"docs/integrations.md"}  # tests/integrations/test_page.py
WITH_CODE = [
    page
    for page in PAGES
    if page_name(page) not in ELSEWHERE and fences(page.read_text(), "python")
]


def commands() -> list[tuple[list[str], str]]:
    """(arguments of pip install, what follows &&) of every setup line."""
    lines = [line for block in fences(README, "bash") for line in block.splitlines()]
    setups = [line.split(" && ") for line in lines if line.startswith("pip install ")]
    return [(shlex.split(install)[2:], rest) for install, rest in setups]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    needs = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(need.name): need for need in needs}


def test_there_are_two_commands_one_trains_and_one_tests():
    assert [rest for _, rest in commands()] == [
        "python scripts/train.py attention=jvp",
        "pytest -n auto --dist worksteal",
    ]


@pytest.mark.parametrize("index", [0, 1], ids=["train", "test"])
def test_what_a_command_installs_exists(index):
    option, constraints, editable, target = commands()[index][0]
    assert (option, editable) == ("-c", "-e")
    assert (ROOT / constraints).is_file()
    folder, extras = re.fullmatch(r"(.*)\[(.*)\]", target).groups()
    assert (ROOT / folder / "pyproject.toml").is_file()
    assert set(extras.split(",")) <= set(project()["optional-dependencies"])


def test_constraints_pin_every_direct_dependency_within_its_range():
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    for need in (Requirement(line) for group in groups for line in group):
        pin = pins()[canonicalize_name(need.name)]
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert need.specifier.contains(specifier.version), (need, pin)


def test_the_training_command_trains(tmp_path):
    _, command = commands()[0]
    program, *arguments = shlex.split(command)
    assert program == "python"
    more = ["trainer.max_steps=2", "logger=csv", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, *arguments, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("page", WITH_CODE, ids=page_name)
def test_the_code_of_a_page_runs(page):
    """The blocks of a page are run one after the other; a later one may use names of an earlier."""
    namespace, threads = {"__name__": page.stem}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i, block in enumerate(fences(page.read_text(), "python")):
            exec(compile(block, f"{page.name}, python block {i + 1}", "exec"), namespace)
    finally:
        torch.set_num_threads(threads)


def test_readme_shows_every_use_of_the_library():
    code = "\n".join(fences(README, "python"))
    for use in (
        "jvp(attention",
        "dual_level",
        "attention_jvp(",
        "backend=",
        "detach()",
        "MASK_CONST",
    ):
        assert use in code, use


def test_every_path_of_the_file_map_exists():
    section = README.split("## File map\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        path = ROOT / row
        assert path.is_dir() if row.endswith("/") else path.is_file(), row
    listed = {Path(row).parts[0] for row in rows}
    assert listed >= {"jvp_flash_attention", "training", "configs", "scripts", "tests", "docs"}


@pytest.fixture
def ci(tmp_path):
    """.ci/run in a copy, with tools that write down how they are called; `failing` ones fail."""
    bin, calls = tmp_path / "bin", tmp_path / "calls"
    bin.mkdir()
    calls.touch()

    def run(readme=README, failing=()):
        for tool in ("pip", "pytest", "ruff", "pyright", "mkdocs"):
            closing = "echo '==== 3 passed in 0.01s ====';" if tool == "pytest" else ""
            code = f'echo "{tool} $*" >> {calls}; {closing} exit {int(tool in failing)}'
            (bin / tool).write_text(f"#!/bin/sh\n{code}\n")
        venv = f'mkdir -p "$3/bin"; echo \'PATH="{bin}:$PATH"\' > "$3/bin/activate"'
        (bin / "python3.11").write_text(f'#!/bin/sh\necho "python $1 $2" >> {calls}; {venv}\n')
        for tool in bin.iterdir():
            tool.chmod(0o755)
        copy = tmp_path / "copy"
        (copy / ".ci").mkdir(parents=True)
        (copy / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
        (copy / "README.md").write_text(readme)
        (copy / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
        environment = {"PATH": f"{bin}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            ["bash", ".ci/run"], cwd=copy, env=environment, capture_output=True, text=True
        )
        return done, calls.read_text().splitlines()

    return run


def test_ci_runs_the_test_command_of_the_readme_in_a_fresh_environment(ci):
    done, calls = ci()
    install, test = commands()[1]
    assert done.returncode == 0, done.stderr
    assert calls.count("python -m venv") == 2  # the site has one of its own, and is built beside
    first = lambda start: next(i for i, c in enumerate(calls) if c.startswith(start))  # noqa: E731
    assert first(f"pip install {' '.join(install)}") < first(test) < first("ruff check")
    assert first("pip install -q -c constraints.txt mkdocs-material") < first("mkdocs build")
    assert first("pip install -c") < first("pyright")
    assert "ruff format --check ." in calls
    assert done.stdout.splitlines()[-1] == "==== 3 passed in 0.01s ===="


@pytest.mark.parametrize("tool", ["pip", "pytest", "ruff", "pyright", "mkdocs"])
def test_ci_fails_where_a_tool_fails(ci, tool):
    assert ci(failing=[tool])[0].returncode != 0


def test_ci_fails_without_a_test_command(ci):
    done, calls = ci(readme=README.replace("&& pytest -n auto --dist worksteal\n", "\n"))
    assert done.returncode != 0
    assert "README.md must hold one line" in done.stderr
    assert calls == []
