"""`python -m jvp_flash_attention.selfcheck --report`: the text that an issue asks for."""

import platform

import pytest
import torch

import jvp_flash_attention
from jvp_flash_attention import selfcheck

FOUND = [("plain", "ok 1.0e-16"), ("jvp", "ok 2.0e-16"), ("jvp of jvp", "raises (a jvp of a jvp)")]


def test_a_report_holds_versions_machine_and_counts(capsys, monkeypatch):
    monkeypatch.setattr(selfcheck, "check", lambda device: FOUND)
    assert selfcheck.main(["--report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    told = dict(line.split(": ", 1) for line in lines[1:-1])
    assert told["flash-jvp"] == jvp_flash_attention.__version__
    assert told["torch"] == torch.__version__
    assert told["python"].startswith(platform.python_version())
    names = ["flash-jvp", "python", "torch", "CUDA", "cuDNN", "triton", "GPU", "selfcheck"]
    assert list(told) == names
    if not torch.cuda.is_available():
        assert told["GPU"] == "none"
    assert told["selfcheck"].startswith("2 ok, 1 raise, 0 wrong, ")
    assert platform.node() not in "\n".join(lines) or not platform.node()


def test_a_report_names_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(selfcheck, "check", lambda device: [*FOUND, ("grad", "WRONG 3.0e-01")])
    assert selfcheck.main(["--report"]) == 1
    printed = capsys.readouterr().out
    assert "1 wrong" in printed
    assert printed.endswith("\ngrad: WRONG 3.0e-01\n```\n")


def test_it_names_the_card_and_its_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    assert selfcheck.versions()["GPU"] == "NVIDIA H100 80GB HBM3 (sm_90)"


def test_help_says_what_it_does(capsys):
    with pytest.raises(SystemExit):
        selfcheck.main(["--help"])
    assert "--report" in capsys.readouterr().out
