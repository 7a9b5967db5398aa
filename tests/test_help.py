"""What scripts say before anything is imported: --help, and one line for a mistake."""

import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tests.commands import ENVIRONMENT, ROOT, call, in_process
from tests.test_configs import composed


@pytest.mark.parametrize("script", ["sample", "evaluate", "export", "encode_latents"])
def test_help_of_a_script_lists_its_own_keys_alone(script):
    says = in_process(f"{script}.py", "--help")
    assert "objective" not in says
    assert ("sampler=NAME" in says) == (script in ("sample", "evaluate"))
    for key in OmegaConf.load(ROOT / "configs" / f"{script}.yaml"):
        assert key in says or key in ("defaults", "hydra")


@pytest.mark.parametrize("script", ["train", "compare"])
def test_help_begins_with_the_ten_keys_that_are_used_first_and_all_of_them_exist(script):
    says = in_process(f"{script}.py", "--help")
    shown, choices = says.split("Choices for each group")
    assert "objective: alphaflow, dmf" in choices
    keys = re.findall(r"^  (([a-z_.]+)=\S+) {2,}\S", shown, re.MULTILINE)
    assert len(keys) == 10
    for given, key in keys:
        if key != "hydra.run.dir":
            assert composed(given, name=script)


def test_a_mistake_in_a_process_of_its_own_gives_one_line_too(tmp_path):
    result = call("train.py", "attention=flash9", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["train.py", "compare.py"])
def test_a_wrong_key_is_found_before_torch_and_lightning_are_imported(script, tmp_path):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "attentoin=jvp"]
try:
    runpy.run_path({str(ROOT / "scripts" / script)!r}, run_name="__main__")
except SystemExit as stopped:
    print(stopped.code, {{"torch", "lightning", "matplotlib"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "1 set()\n", done.stderr
    assert "key 'attentoin'; did you mean attention?" in done.stderr
