"""Every shipped kernel compiles for GPUs that are not there, and fits their shared memory."""

import pytest

from tests import offline
from tests.compiling import compiling

pytestmark = pytest.mark.timeout(420)


def compile_for(target: str, *arguments: str) -> str:
    return compiling("-m", "tests.offline", target, *arguments)


@pytest.fixture(scope="module")
def hopper():
    """The passes at head dim 64 in bfloat16."""
    return compile_for("sm_90", "--head-dims", "64", "--dtypes", "bfloat16", "--variants", "plain")


def check_passes(table, target, variants):
    # on Hopper every forward with tangents is warp-specialised, and gradients but those of a bias;
    # the plain ones without tangents are one launch
    hopper = target == "sm_90"
    one_launch, calls = table.count("bwd_head_kernel"), len(variants)
    assert one_launch == hopper
    gradients = calls - ("bias" in variants)
    for name, wanted, joined in (("forward", calls, 0), ("bwd_dkdv", gradients, one_launch)):
        special = table.count(f"{name}_jvp_kernel")
        assert special == (wanted if hopper else 0)
        assert table.count(f"{name}_kernel") + special + joined == 2 * calls
    special = table.count("bwd_dq_jvp_kernel")
    assert special == (hopper and "window" in variants)
    assert table.count("bwd_dq_kernel") + special + one_launch == 2 * calls


def test_every_pass_compiles_and_fits(hopper):
    check_passes(hopper, "sm_90", ["plain"])


@pytest.mark.parametrize(
    "arguments",
    [
        "--head-dims 16 --value-dim 32 --dtypes float32 --passes backward",
        "--head-dims 128 --value-dim 24 --dtypes float32 --large --passes forward",
        "--head-dims 16 --value-dim 32 --dtypes bfloat16 --length 60 --passes forward",
        "--head-dims 36 --value-dim 20 --dtypes bfloat16 --passes forward",  # no TMA
        pytest.param("--head-dims 16 128 --value-dim 64 --large", marks=pytest.mark.slow),
    ],
)
def test_head_dims_that_differ_leave_no_address_with_tiles_of_two_layouts(arguments):
    table = compile_for("sm_90", "--variants", "plain", *arguments.split())
    assert "wgmma" in table
    assert "TWO LAYOUTS" not in table


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_every_pass_compiles_and_fits_with_every_kind_of_mask_too(target):
    variants = ("plain", "bias", "window", "packed", "blocks")
    table = compile_for(
        target, "--head-dims", "64", "--dtypes", "bfloat16", "--variants", *variants
    )
    check_passes(table, target, variants)


def test_the_forward_passes_on_hopper_use_wgmma_and_do_not_spill(hopper):
    wide = compile_for(
        "sm_90", "--head-dims", "128", "--dtypes", "bfloat16", "--variants", "plain",
        "--passes", "forward", "forward_jvp",
    )  # fmt: skip
    rows = [line for line in [*hopper.splitlines(), *wide.splitlines()] if "forward_" in line]
    assert len(rows) == 4
    for row in rows:
        stack = int(row.split("stack")[1].split()[0])
        # the consumers' 240 registers at head dim 128 lack eight, which cost no time on an H200
        assert stack <= (32 if "D128" in row and "jvp" in row else 0), row
        assert int(row.split("wgmma")[1]) > 0, row


@pytest.mark.parametrize(("length", "kernel", "spills"), [(256, "bwd_head", 128), (300, "bwd", 64)])
def test_gradients_of_o_with_sums_for_biases_fit_hopper(length, kernel, spills):
    """A head in a block leaves 1.2 of 227 KiB, and spills outside of its inner loop."""
    table = compile_for(
        "sm_90", "--head-dims", "64", "72", "80", "--dtypes", "bfloat16", "--variants", "plain",
        "--passes", "backward_sums", "--length", str(length),
    )  # fmt: skip
    rows = [row for row in table.splitlines() if f" {kernel}_kernel" in row]
    assert len(rows) == 3
    for row in rows:
        assert int(row.split("stack")[1].split()[0]) <= spills, row


@pytest.mark.parametrize(
    ("variant", "tangents"),
    [pytest.param(x, ["", "_jvp"], marks=pytest.mark.slow) for x in ("plain", "bool")],
)
def test_float32_on_hopper_uses_wgmma(variant, tangents):
    """Six bfloat16 products; beside a mask the gradients' three TF32 products, wrong through it."""
    table = compile_for(
        "sm_90", "--head-dims", "64", "--dtypes", "float32", "--variants", variant,
        "--passes", *(f"{name}{t}" for name in ("forward", "backward") for t in tangents),
    )  # fmt: skip
    rows = table.splitlines()
    assert sum("forward_kernel" in row for row in rows) == len(tangents)
    assert any("bwd_" in row for row in rows)
    for row in rows:
        gradients = any(name in row for name in ("bwd_dkdv", "bwd_dq"))
        six = "forward_kernel" in row or (gradients and variant == "plain")
        assert (int(row.split("wgmma")[1]) > 0) == six, row


@pytest.mark.parametrize(
    ("variants", "head_dims", "passes"),
    [
        (["bias"], ["64"], ["forward"]),
        *(
            pytest.param([variant], ["32", "64", "128"], ["forward", "forward_jvp"],
                         marks=pytest.mark.slow)
            for variant in (
                "plain", "bool", "bias", "keys", "dropout", "window", "softcap", "blocks", "packed"
            )
        ),
    ],
)  # fmt: skip
def test_float32_that_is_cut_before_fits_beside_every_mask(variants, head_dims, passes):
    table = compile_for(
        "sm_90", "--large", "--head-dims", *head_dims, "--dtypes", "float32",
        "--variants", *variants, "--passes", *passes,
    )  # fmt: skip
    rows = [row for row in table.splitlines() if "forward_kernel" in row]
    assert len(rows) == len(head_dims) * len(passes)
    for row in rows:
        assert int(row.split("wgmma")[1]) > 0, row


@pytest.mark.slow
def test_what_keeps_hidden_values_out_on_hopper_compiles_and_costs_dq_no_spills():
    table = compile_for(
        "sm_90", "--head-dims", "128", "--dtypes", "bfloat16", "--variants", "causal",
        "--passes", "forward_jvp", "backward_jvp",
    )  # fmt: skip
    rows = table.splitlines()
    stacks = {row.split()[4]: int(row.split("stack")[1].split()[0]) for row in rows}
    assert stacks["bwd_dq_jvp_kernel"] <= 56  # as without a mask: what Q in registers costs
    assert {"forward_jvp_kernel", "repair_kernel"} < stacks.keys()


@pytest.mark.slow
def test_a_soft_cap_takes_the_portable_kernels_and_costs_no_spills():
    table = compile_for(
        "sm_90", "--head-dims", "64", "128", "--dtypes", "bfloat16", "--variants", "softcap"
    )
    assert "jvp_kernel" not in table
    assert {row.split("stack")[1].split()[0] for row in table.splitlines()} == {"0"}


@pytest.mark.slow
def test_float32_compiles_for_amd():
    compile_for("gfx942", "--head-dims", "64", "--dtypes", "float32", "--variants", "plain")


IN_PLACE = """
import re, torch
from triton.runtime import driver
from jvp_flash_attention.call import Saved
from jvp_flash_attention.kernels.merge import merge_launch
from tests.offline import TARGETS, _Driver

driver.set_active(_Driver(TARGETS["sm_90"]))
for D in (8, 64):
    rows = [torch.zeros(1, 2, 64) for _ in range(4)]
    out = [torch.zeros(1, 2, 64, D, dtype=torch.float16) for _ in range(4)]
    total, part = (Saved(out[i], rows[i], out[i + 1], rows[i + 1]) for i in (0, 2))
    launch, merged = merge_launch(total, part, 0, torch.float16)
    assert merged.out is total.out and merged.lse is total.lse
    ptx = launch.compile().asm["ptx"]
    print(*re.findall(r"ld\\.global|bar\\.sync|st\\.global", ptx))
"""


def test_results_are_merged_in_place_once_all_warps_have_read_them():
    """A warp may hold rows that another one stores. The interpreter has no warps, so the order of
    instructions shows it."""
    lines = compiling("-c", IN_PLACE).splitlines()
    for line in lines:
        order = line.split()
        last_load = max(i for i, name in enumerate(order) if name == "ld.global")
        first_store = order.index("st.global")
        assert "bar.sync" in order[last_load:first_store], line
    assert len(lines) == 2


PTX = """
add.s32 %r2, %r1, 1024;
mbarrier.init.shared::cta.b64 [%r2], 1;
add.s32 %r4, %r3, {at};
{access}
"""


@pytest.mark.parametrize(
    ("at", "access", "found"),
    [
        (1024, "st.shared.b32 [ %r4 + 0 ], %r5;", True),
        (1020, "@%p1 st.shared.v4.b32 [ %r4 + 0 ], {%r5, %r6, %r7, %r8};", True),
        (1016, "ld.shared.b32 %r5, [%r4+8];", True),
        (1000, "ld.shared.b32 %r5, [global_smem+1028];", True),
        (1012, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r5, %r6, %r7, %r8};", True),
        (1032, "st.shared.b32 [ %r4 + 0 ], %r5;", False),
        (1024, "mbarrier.try_wait.parity.shared.b64 complete, [%r4], %r5;", False),
        (1024, "mbarrier.inval.shared::cta.b64 [%r2];\nst.shared.b32 [%r4], %r5;", False),
    ],
)
def test_a_barrier_whose_place_holds_something_else_is_found(at, access, found):
    ptx = PTX.replace("{at}", str(at)).replace("{access}", access)
    assert offline.reused_barriers(ptx) == [1024] * found


ROLES = """
import re, sys, torch
from triton.runtime import driver
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents
from jvp_flash_attention.kernels import launches
from tests.offline import TARGETS, _Driver, reused_barriers

driver.set_active(_Driver(TARGETS["sm_90"]))
D = int(sys.argv[1])
q, k, v, d_out, d_t_out = (torch.empty(1, 2, 1024, D, dtype=torch.bfloat16) for _ in range(5))
x, t = Inputs(q, k, v, cu_q=torch.zeros(33, dtype=torch.int32)), Tangents(q, k, v)
spec = Spec(0.125)
saved = Saved(q, torch.empty(1, 2, 1024), q, torch.empty(1, 2, 1024))
options = {"arch": "sm90", "tma": True}
made = launches(x, t, spec, **options)
made += launches(x, t, spec, saved, d_out, d_t_out, **options)
for launch in made:
    name = launch.kernel.fn.__name__
    if name.endswith("_jvp_kernel"):
        ptx = launch.compile().asm["ptx"]
        print(name, *re.findall(r"redux\\S+|ld\\.shared\\.b32", ptx), *reused_barriers(ptx))
"""


@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_warp_of_a_role_finds_its_packed_sequence_and_no_barrier_holds_it(head_dim):
    """One word read from shared memory would be a maximum over warps. It lay where a barrier did,
    and went wrong where another process shared the GPU."""
    lines = compiling("-c", ROLES, str(head_dim)).splitlines()
    names = ["forward_jvp_kernel", "bwd_dkdv_jvp_kernel", "bwd_dq_jvp_kernel"]
    assert [line.split()[0] for line in lines] == names[: 2 if head_dim == 64 else 3]
    for line in lines:
        found = line.split()[1:]
        assert found
        assert {word.split(".")[0] for word in found} == {"redux"}, line
