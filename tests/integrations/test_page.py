"""The code of docs/integrations.md, section by section, where its library is installed."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
SECTIONS = {section.split("\n")[0]: section for section in PAGE.split("\n## ")[1:]}
LIBRARIES = ("timm", "transformers", "diffusers", "kernels")


def blocks(section: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def namespace_of(*titles: str) -> dict:
    """What the blocks of these sections define, run one after the other."""
    module = ModuleType("the_page_of_integrations")
    sys.modules[module.__name__] = module  # the compiler of torch 2.12 imports it by its name
    namespace = vars(module)
    for title in titles:
        for i, block in enumerate(blocks(SECTIONS[title])):
            exec(compile(block, f"{title}, block {i + 1}", "exec"), namespace)
    return namespace


@pytest.mark.compile
def test_the_code_of_the_library_itself_runs():
    namespace_of(*(title for title in SECTIONS if title not in LIBRARIES))


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_code_of_a_library_runs(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs the {library} library")
    namespace_of(library)
