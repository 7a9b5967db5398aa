"""Every kind of kernel at odd shapes, for compute-sanitizer on a GPU:

    compute-sanitizer --tool memcheck python -m tests.sanitizer portable hopper
    compute-sanitizer --tool racecheck --show-backtrace no python -m tests.sanitizer portable

On Hopper racecheck reports hazards of `hopper`, where one warpgroup hands a tile to another by an
mbarrier: docs/kernels.md, Sanitizers.
"""

import sys

import torch

from jvp_flash_attention import kernels
from tests.cases import Case, build, solve

CASES = {
    "portable": (
        (torch.float32, Case(B=1, H=2, Hk=1, L=70, S=45, D=40)),
        (torch.float32, Case(B=1, H=2, L=45, S=70, D=64, mask="bool")),
        (torch.float16, Case(B=1, H=2, L=70, S=140, D=64, mask="full", causal=True, dropout_p=0.2)),
        (torch.bfloat16, Case(B=1, H=2, L=140, S=70, D=36)),  # rows that TMA does not read
    ),
    "hopper": (
        (torch.bfloat16, Case(B=1, H=2, Hk=1, L=100, S=140, D=64)),
        (torch.float16, Case(B=1, H=2, L=130, S=130, D=72, causal=True)),
        (torch.bfloat16, Case(B=1, H=2, L=140, S=100, D=128)),
        (torch.bfloat16, Case(B=1, H=2, L=140, S=100, D=64, mask="bool")),
    ),
}

if __name__ == "__main__":
    for kind in sys.argv[1:] or CASES:
        for dtype, case in CASES[kind]:
            results = solve(kernels, build(case, dtype, "cuda"))
            torch.cuda.synchronize()
            finite = all(x.isfinite().all() for x in results.values())
            print(kind, dtype, case, "finite" if finite else "NOT FINITE", flush=True)
