"""The wheel: the library alone, its types, its licence, addresses where they are known.

WHEEL=FILE in the environment names one that was built already (the release workflow does).
"""

import os
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPOSITORY, REF = (
    os.environ.get("REPOSITORY", "https://host/owner/name"),
    os.environ.get("REF", "v1"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """(names of its files, METADATA)"""
    path = os.environ.get("WHEEL")
    if path is None:
        folder = tmp_path_factory.mktemp("dist")
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env=os.environ | {"REPOSITORY": REPOSITORY, "REF": REF},
        )
        (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        text = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    return names, message_from_string(text)


def test_it_holds_the_library_alone(wheel):
    names, _ = wheel
    assert all(n.startswith(("jvp_flash_attention/", "flash_jvp-")) for n in names)
    modules = {n for n in names if n.endswith(".py")}
    assert modules == {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "jvp_flash_attention").rglob("*.py")
    }


def test_it_needs_torch_alone_which_brings_its_triton(wheel):
    needs = [need for need in wheel[1].get_all("Requires-Dist") if "extra" not in need]
    assert [re.split(r"[<>=; ]", need)[0] for need in needs] == ["torch"]


def test_it_brings_types_and_licence(wheel):
    names, metadata = wheel
    assert "jvp_flash_attention/py.typed" in names
    assert metadata["License-Expression"] == "MIT"
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_its_page_on_the_index_has_addresses_in_place_of_paths(wheel):
    _, metadata = wheel
    urls = dict(url.split(", ", 1) for url in metadata.get_all("Project-URL"))
    assert urls["Repository"] == REPOSITORY
    assert urls["Changelog"] == f"{REPOSITORY}/blob/{REF}/CHANGELOG.md"
    text = metadata.get_payload()
    assert f"![Handwritten digits, one per class and column]({REPOSITORY}/raw/{REF}/docs/" in text
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    assert len(links) > 10
    assert [link for link in links if not re.match(r"https?:|#", link)] == []


def test_a_build_elsewhere_has_no_addresses(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("REPOSITORY", raising=False)
    from hatch_build import Addresses

    metadata: dict = {}
    Addresses(str(ROOT), {}).update(metadata)
    assert metadata["urls"] == {}
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text()
