"""Compiles kernels for a GPU that is not there and reads what the assembler says of them.

`kernels.launches` says what a call on that GPU would launch, and each launch is compiled for it.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from jvp_flash_attention import call
from jvp_flash_attention.block_mask import block_mask
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents
from jvp_flash_attention.kernels import dispatch, launches
from jvp_flash_attention.kernels.merge import merge_launch
from jvp_flash_attention.kernels.problem import Problem

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


PASSES = ("forward", "forward_jvp", "backward", "backward_jvp", "merge")


class Compiled(NamedTuple):
    """One kernel as assembled: registers a thread, bytes of stack a thread (spills), bytes of
    shared memory a block, Hopper's products, columns of tensor memory a block, addresses in
    shared memory that are read as tiles of more than one layout, and barriers in shared memory
    whose place holds something else too."""

    kernel: str
    registers: int
    stack: int
    shared: int
    hgmma: int
    columns: int = 0
    mixed: int = 0
    reused: int = 0


class _Driver:
    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_passes(
    target: str,
    head_dim: int,
    dtype: torch.dtype,
    passes=PASSES,
    causal=False,
    length=256,
    mask=None,
    tma: bool | None = None,
    dropout_p=0.0,
    window=(None, None),
    softcap=0.0,
    sequences: int | None = None,
    blocks: call.Blocks | None = None,
    large=False,
    value_dim: int | None = None,
) -> list[Compiled]:
    """Compiles every kernel of the named passes at (1, 2, length, head_dim), which may be so many
    packed `sequences`; a band is aligned at their ends. `large`: as of a call that cuts float32
    operands before."""
    if large:
        Problem.large = True  # and stays
    dims = [head_dim] * 4 + [value_dim or head_dim] * 5
    q, k, t_q, t_k, v, t_v, d, d_t, out = (
        torch.zeros(1, 2, length, columns, dtype=dtype) for columns in dims
    )
    spec = Spec(head_dim**-0.5, causal, dropout_p, "triton", *window, softcap=softcap)
    cu = [None] * 2 if sequences is None else torch.zeros(2, sequences + 1, dtype=torch.int32)
    spec = spec._replace(lower_right=sequences is not None and call.band(spec) != call.Band())
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    mask_grad = mask is not None and mask.is_floating_point()
    x = Inputs(q, k, v, mask, seed, *cu)
    if blocks is not None:
        spec = spec._replace(block_q=blocks.block_q, block_k=blocks.block_k)
        x = x._replace(kv_blocks=blocks.kv_blocks, q_blocks=blocks.q_blocks)
    t = Tangents(t_q, t_k, t_v, torch.zeros_like(mask) if mask_grad else None)
    rows = torch.zeros(1, 2, length)
    saved = Saved(out, rows, out, rows)
    where = {"arch": target.replace("_", ""), "tma": tma}
    calls = {
        "forward": lambda: launches(x, None, spec, **where),
        "forward_jvp": lambda: launches(x, t, spec, **where),
        "backward": lambda: launches(
            x, None, spec, Saved(out, rows), d, mask_grad=mask_grad, **where
        ),
        "backward_jvp": lambda: launches(x, t, spec, saved, d, d_t, mask_grad, **where),
        "merge": lambda: [merge_launch(saved, saved, 0, torch.float32)[0]],
        "backward_sums": lambda: _with_sums(x, spec, Saved(out, rows), d, **where),
    }
    driver.set_active(_Driver(TARGETS[target]))  # and stays: this process has no other
    found = [launch for name in passes for launch in calls[name]()]
    return [_inspect(launch.kernel.fn.__name__, launch.compile()) for launch in found]


def _with_sums(x: Inputs, spec: Spec, saved: Saved, d: torch.Tensor, **where) -> list:
    """The gradients of O with sums for biases, as self-attention of the trainer asks for them."""
    room = dispatch.room_for_sums(x, spec, where["arch"])
    into = *(torch.empty_like(y) for y in x[:3]), room
    c = dispatch._backward_call(d, None, x, Tangents(), saved, spec, False, into, where["arch"])
    return list(dispatch._launches(c, spec, None, **where))


def _inspect(name: str, compiled) -> Compiled:
    shared = compiled.metadata.shared
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        read = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: E731
        return Compiled(name, read("vgpr_count"), read("private_segment_fixed_size"), shared, 0)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        sass = _output(tools / "cuobjdump", "-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    ptx, hgmma = compiled.asm["ptx"], sass.count("HGMMA")
    return Compiled(
        name, registers, stack, shared, hgmma, columns, _mixed(ptx), len(reused_barriers(ptx))
    )


def _mixed(ptx: str) -> int:
    """Registers with an address in shared memory that become descriptors of two layouts: a pattern,
    not a fault. ptxas 12.8, which comes with Triton 3.6 and 3.7, makes some of those before it has
    the address, and products are wrong or read outside of shared memory."""
    layouts: dict[str, set[int]] = {}
    for register, constant in re.findall(r"(?:or.b64|add.s64)\s+%rd\d+, (%rd\d+), (-?\d+);", ptx):
        upper = (int(constant) % 2**64) >> 32
        if upper >> 30:  # the bits of a swizzle
            layouts.setdefault(register, set()).add(upper)
    return sum(len(found) > 1 for found in layouts.values())


def reused_barriers(ptx: str) -> list[int]:
    """Where barriers lie in shared memory whose place is written or read as something else: of
    stores and loads of threads, at addresses whose constant part is known. Triton gives a barrier
    that no role uses the place of a later value. PTX forbids that without `mbarrier.inval`, and
    wherever another process shared the GPU such values changed."""
    sums: dict[str, set[tuple[str, int]]] = {}
    for to, register, constant in re.findall(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", ptx):
        sums.setdefault(to, set()).add((register, int(constant)))

    def offset(register: str) -> int:
        total = 0
        for _ in range(8):
            known = sums.get(register, set())
            if len(known) != 1:  # the rest is not known before the kernel runs
                break
            ((register, constant),) = known
            total += constant
        return total

    valid, reused = set(), set()
    # of b8, a number at a time, is what each warp is told to do
    access = r"(mbarrier\.(?:init|inval)|(?:st|ld)\.shared(?!\.b8\s)|(?:st|ld)matrix)(\S*)\s[^;]*?"
    address = r"\[\s*(global_smem|%r\d+)\s*(?:\+\s*(\d+))?"
    for kind, how, register, constant in re.findall(access + address, ptx):
        at = offset(register) + int(constant or 0)
        if at == 0:  # nothing is known of it
            continue
        if kind == "mbarrier.init":
            valid.add(at)
        elif kind == "mbarrier.inval":
            valid.discard(at)
        else:
            words = re.search(r"(?:\.v(\d))?\.b(\d+)", how)
            width = 16  # a row of a matrix
            if words and "matrix" not in kind:
                width = int(words[1] or 1) * int(words[2]) // 8
            reused |= valid & {*range(at - 7, at + width)}
    return sorted(reused)


def _output(*command) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


SHARED = {
    "sm_80": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "gfx942": 64,
}  # KiB a block may use
COLUMNS = 512  # of tensor memory, where there is any; a kernel of more is compiled to a trap


def table(target: str, head_dims, dtypes, variants=("plain",), **kwargs):
    """Rows (head dim, dtype, variant, kernel, registers, stack, shared) for every pass; names of
    what does not fit."""
    masks = {
        "plain": {},
        "causal": {"causal": True, "length": 200},
        "bool": {"mask": torch.zeros(1, 1, 200, 200, dtype=torch.bool), "length": 200},
        "bias": {"mask": torch.zeros(1, 1, 200, 200), "length": 200},
        "dropout": {"dropout_p": 0.1},
        "window": {"window": (96, 32), "length": 200},
        "softcap": {"softcap": 50.0},
        "blocks": {"blocks": block_mask(torch.ones(2, 2, dtype=torch.bool), 128)},
        "packed": {"sequences": 40},
        "packed causal": {"sequences": 40, "causal": True},
        "tiles": {"mask": torch.zeros(1, 1, 256, 256, dtype=torch.bool)},  # a mask that TMA reads
        "keys": {"mask": torch.zeros(1, 1, 1, 256, dtype=torch.bool)},
    }
    for dtype in dtypes:
        for head_dim in head_dims:
            for variant in variants:
                for c in compile_passes(target, head_dim, dtype, **kwargs | masks[variant]):
                    yield head_dim, str(dtype).removeprefix("torch."), variant, c


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description="Compile every kernel for a GPU that is not there."
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[
            "plain",
            "causal",
            "bool",
            "bias",
            "dropout",
            "window",
            "softcap",
            "tiles",
            "keys",
            "packed",
        ],
    )
    parser.add_argument("--passes", nargs="+", default=list(PASSES))
    parser.add_argument("--large", action="store_true", help="float32 operands are cut before")
    parser.add_argument("--value-dim", type=int, help="of v, if not the head dim")
    parser.add_argument("--length", type=int, help="tokens of plain calls")
    arguments = parser.parse_args()
    failed = False
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    how = {"passes": arguments.passes, "large": arguments.large, "value_dim": arguments.value_dim}
    if arguments.length:
        how["length"] = arguments.length
    for head_dim, dtype, variant, c in table(
        arguments.target, arguments.head_dims, dtypes, arguments.variants, **how
    ):
        fits = c.shared <= SHARED[arguments.target] * 1024 and c.columns <= COLUMNS
        failed |= not fits or c.reused > 0
        print(
            f"{arguments.target:7} D{head_dim:<4} {dtype:9} {variant:8} {c.kernel:17}"
            f" registers {c.registers:3}"
            f" stack {c.stack:5} shared {c.shared:6} columns {c.columns:3} wgmma {c.hgmma:3}"
            f"{'' if fits else '  DOES NOT FIT'}"
            f"{'  ONE ADDRESS, TWO LAYOUTS' if c.mixed else ''}"
            f"{'  A BARRIER HOLDS SOMETHING ELSE' if c.reused else ''}",
            flush=True,
        )
    raise SystemExit(failed)
