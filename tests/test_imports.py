"""Who may import whom: the library knows nothing of the training, kernels and reference nothing of
each other.
"""

import ast
import sys
from pathlib import Path

import pytest

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
        ("kernels", ("api", "autograd", "ops", "recall", "reference", "validation", "backends")),
        ("recall.py", ("api", "autograd", "ops", "kernels", "reference", "validation")),
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


def test_no_block_pointers():
    for path in files("jvp_flash_attention"):
        text = path.read_text()
        assert "make_block_ptr" not in text, path
        assert "tl.advance" not in text, path
