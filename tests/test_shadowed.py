"""Another distribution of the same import name: the error says so, in one line."""

import importlib
import shutil
import subprocess
import sys
import sysconfig
import warnings

import pytest

import jvp_flash_attention
from jvp_flash_attention import shadowed
from tests.test_imports import LIBRARY

FOREIGN = ("__init__.py", "jvp_attention.py")  # the files of the other distribution


def last_line(folder, statement):
    """Of an interpreter that sees this folder and installed packages, but not this project."""
    paths = [str(folder), sysconfig.get_path("purelib")]
    code = f"import sys; sys.path[:0] = {paths}; {statement}"
    run = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module", params=["overwritten", "removed"])
def site(request, tmp_path_factory):
    """A folder of packages after the other distribution came second, or was removed."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "jvp_flash_attention"
    shutil.copytree(LIBRARY, package)
    for name in FOREIGN:
        (package / name).unlink()
        if request.param == "overwritten":
            (package / name).write_text("")
    return folder


@pytest.mark.parametrize("name", jvp_flash_attention.__all__)
def test_a_public_name_says_what_happened(site, name):
    line = last_line(site, f"from jvp_flash_attention import {name}")
    assert line == f"ImportError: {shadowed.MIXED}"


def test_so_does_a_module(site):
    line = last_line(site, "import jvp_flash_attention.flash_attn")
    assert line == f"ImportError: {shadowed.MIXED}"


def test_the_other_distribution_beside_ours_is_warned_about(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        shadowed.warn_of_the_other(tmp_path)
    (tmp_path / "jvp_flash_attention-0.12.0.dist-info").mkdir()
    with pytest.warns(UserWarning, match="pip uninstall -y jvp_flash_attention flash-jvp"):
        shadowed.warn_of_the_other(tmp_path)


@pytest.mark.parametrize("name", jvp_flash_attention.__all__)
def test_a_function_is_no_module_and_stays_a_function(name):
    function = getattr(jvp_flash_attention, name)
    with pytest.raises(ImportError, match=f"from jvp_flash_attention import {name}"):
        importlib.import_module(f"jvp_flash_attention.{name}")
    assert getattr(jvp_flash_attention, name) is function
