"""Who may import whom: the library knows nothing of the training, kernels and reference nothing of
each other.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jvp_flash_attention.backends import _unusable

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "jvp_flash_attention"


def imported(path: Path) -> set[str]:
    """Absolute names of what a module imports, relative imports resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    if package[-1] == "__init__":
        package.append("")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_library_imports_torch_triton_and_the_standard_library_only():
    allowed = {"torch", "triton", "jvp_flash_attention", *sys.stdlib_module_names}
    for path in files("jvp_flash_attention"):
        # an integration is imported by its user only, and imports the library it is named after
        mine = allowed | ({path.stem} if path.parent.name == "integrations" else set())
        foreign = {name.split(".")[0] for name in imported(path)} - mine
        assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize(
    ("who", "whom"),
    [
        ("kernels", ("api", "autograd", "ops", "reference", "validation", "backends")),
        ("call.py", ("api", "autograd", "ops", "kernels", "reference", "validation", "backends")),
        ("functorch.py", ("api", "autograd", "ops", "kernels", "reference", "call", "backends")),
        ("reference.py", ("api", "autograd", "ops", "kernels", "validation", "backends")),
        ("autograd.py", ("api", "kernels", "reference", "validation")),
        ("ops.py", ("api", "autograd", "kernels", "reference", "validation")),
        ("validation.py", ("api", "autograd", "ops", "kernels", "reference", "backends")),
    ],
)
def test_nobody_in_the_library_looks_upward_or_sideways(who, whom):
    target = LIBRARY / who
    for path in sorted(target.rglob("*.py")) if target.is_dir() else [target]:
        for name in whom:
            module = f"jvp_flash_attention.{name}"
            found = {x for x in imported(path) if x == module or x.startswith(f"{module}.")}
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_models_objectives_and_samplers_know_nothing_of_attention_implementations():
    for folder in ("models", "objectives", "samplers"):
        for path in files(f"training/{folder}"):
            assert not any(x.startswith("jvp_flash_attention") for x in imported(path)), path
    for path in files("training/models"):
        assert not any(x.startswith("training.objectives") for x in imported(path)), path
    for path in files("training/objectives"):
        assert not any(x.startswith("training.models") for x in imported(path)), path


def test_only_tangents_and_attentions_call_jvp_in_the_training():
    for path in files("training"):
        if path.name not in ("tangents.py", "attentions.py"):
            assert not {x for x in imported(path) if x.endswith(("func.jvp", "forward_ad"))}, path
            assert "func.jvp(" not in path.read_text(), path


def test_importing_the_library_costs_little_and_leaves_the_compiler_alone():
    """Processor time, which other processes on the machine do not lengthen."""
    code = (
        "import sys, time, torch; start = time.process_time(); import jvp_flash_attention;"
        " print(time.process_time() - start, 'torch._dynamo' in sys.modules)"
    )
    seconds = float("inf")
    for _ in range(3):  # the best of three: files may have to be read first
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
        took, dynamo = done.stdout.split()
        assert dynamo == "False"
        seconds = min(seconds, float(took))
        if seconds < 0.5:
            return
    raise AssertionError(f"importing takes {seconds:.2f} s of the processor beyond torch")


def test_no_block_pointers():
    for path in files("jvp_flash_attention"):
        text = path.read_text()
        assert "make_block_ptr" not in text, path
        assert "tl.advance" not in text, path


OLD_TRITON = """
import sys, warnings
import torch
torch.version.cuda = "12.8"
if {version!r}:
    import triton
    triton.__version__ = {version!r}
else:
    sys.modules["triton"] = None
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from jvp_flash_attention import attention
(line,) = [str(w.message) for w in told if "jvp_flash_attention" in str(w.message)]
assert "Triton >= 3.6, found {found}" in line, line
q = torch.randn(1, 1, 3, 4)
assert attention(q, q, q).shape == q.shape
try:
    attention(q, q, q, backend="triton")
except NotImplementedError as error:
    assert "found {found}" in str(error), error
else:
    raise SystemExit("served")
"""


@pytest.mark.parametrize(("version", "found"), [("3.4.0", "3.4.0"), ("", "none")])
def test_an_old_triton_is_said_at_the_import_and_the_reference_serves(version, found):
    code = OLD_TRITON.format(version=version, found=found)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "serves"),
    [("3.5.1", False), ("none", False), ("3.6.0", True), ("3.10.0+git1", True), ("4.0", True)],
)
def test_triton_is_taken_from_3_6_on(version, serves):
    assert (_unusable(version) is None) == serves
