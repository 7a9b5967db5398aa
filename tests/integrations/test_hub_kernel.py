"""The package as a kernel of Hugging Face `kernels`, beside the imported one in one process."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import jvp

import jvp_flash_attention
from scripts.kernel_repository import BACKENDS, NAME, ROOT, SOURCE, write_repository
from tests.cases import close


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kernel") / "flash-jvp"
    write_repository(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(repository):
    kernels = pytest.importorskip("kernels", reason="needs the kernels library of Hugging Face")
    return kernels.get_local_kernel(repository, backend="cpu")


def draw():
    torch.manual_seed(0)
    return torch.randn(2, 3, 1, 2, 5, 4, dtype=torch.float64).unbind(0)


def attend(package):
    """Value, tangent and gradients through both."""

    def step(x, t):
        x = x.detach().requires_grad_()
        out, t_out = jvp(lambda q, k, v: package.attention(q, k, v), tuple(x), tuple(t))
        loss = out.square().sum() + t_out.square().sum()
        return out.detach(), t_out.detach(), *torch.autograd.grad(loss, x)

    return step


def test_every_variant_holds_the_source_and_nothing_else(repository):
    source = {p.relative_to(SOURCE) for p in SOURCE.rglob("*.py")}
    roots = [repository / "torch-ext", *(repository / f"build/torch-{b}" for b in BACKENDS)]
    for root in roots:
        found = {p.relative_to(root / NAME) for p in root.rglob("*.py")}
        assert found == source
    assert "[torch-noarch]" in (repository / "build.toml").read_text()


def test_the_digests_are_those_that_kernels_computes(repository):
    pytest.importorskip("kernels", reason="needs the kernels library of Hugging Face")
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for backend in BACKENDS:
        variant = repository / f"build/torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def test_operators_have_the_namespace_of_the_build(kernel, repository):
    name = json.loads((repository / "build/torch-cpu/metadata.json").read_text())["id"]
    assert kernel.__name__ == name
    assert name == kernel.ops.NAMESPACE
    assert jvp_flash_attention.ops.NAMESPACE == "jvp_flash_attention"
    mine = getattr(torch.ops, name).flash_attn_forward_jvp.default
    assert mine is not torch.ops.jvp_flash_attention.flash_attn_forward_jvp.default
    assert set(kernel.__all__) == set(jvp_flash_attention.__all__)
    assert sys.modules[f"{name}.api"] is not jvp_flash_attention.api


def test_value_tangent_and_gradients_are_those_of_the_imported_package(kernel):
    x, t = draw()
    for got, exact in zip(attend(kernel)(x, t), attend(jvp_flash_attention)(x, t), strict=True):
        close(got, exact)


@pytest.mark.compile
@pytest.mark.parametrize("first", ["kernel", "package"])
def test_both_compile_in_one_process(kernel, first):
    torch._dynamo.reset()
    x, t = draw()
    exact = attend(jvp_flash_attention)(x, t)
    packages = [kernel, jvp_flash_attention]
    for package in packages if first == "kernel" else packages[::-1]:

        def step(x, t, package=package):
            out, t_out = jvp(lambda q, k, v: package.attention(q, k, v), tuple(x), tuple(t))
            return out, t_out

        leaf = x.detach().requires_grad_()
        out, t_out = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf, t)
        grads = torch.autograd.grad(out.square().sum() + t_out.square().sum(), leaf)
        for got, e in zip((out.detach(), t_out.detach(), *grads), exact, strict=True):
            close(got, e)


def test_the_script_writes_a_new_folder_only(repository, tmp_path):
    run = [sys.executable, "scripts/kernel_repository.py"]
    done = subprocess.run([*run, str(repository)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"new or empty, got {repository}")
    subprocess.run([*run, str(tmp_path / "new")], cwd=ROOT, check=True)
    assert (tmp_path / "new" / "build.toml").is_file()


def test_a_copy_under_another_name_registers_its_own_operators():
    """What `kernels` does, without it: vendored copies do not clash either."""
    spec = importlib.util.spec_from_file_location("vendored_copy", SOURCE / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules["vendored_copy"] = copy
    spec.loader.exec_module(copy)
    x, t = draw()
    for got, exact in zip(attend(copy)(x, t), attend(jvp_flash_attention)(x, t), strict=True):
        close(got, exact)
    assert copy.ops.NAMESPACE == "vendored_copy"
