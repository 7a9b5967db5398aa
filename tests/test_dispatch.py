"""Who serves a pass, on GPUs that are not there; nothing is compiled."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from jvp_flash_attention import kernels
from jvp_flash_attention.block_mask import block_mask
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents
from jvp_flash_attention.kernels import configs, cudnn, problem
from tests.cases import Case, build
from tests.compiling import compiling

NAMES = """
import sys
import torch
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents
from jvp_flash_attention.kernels import launches

def made(arch, head_dim=128, length=256, keys=None, causal=False, mask=None, left=None, **how):
    q, k = (torch.zeros(1, 2, n, head_dim, dtype=torch.bfloat16) for n in (length, keys or length))
    rows = torch.zeros(1, 2, length)
    x, t, saved = Inputs(q, k, k, mask), Tangents(q, k, k), Saved(q, rows, q, rows)
    spec = Spec(0.1, causal, left=left)
    return [
        *launches(x, t, spec, arch=arch, **how),
        *launches(x, t, spec, saved, q, q, arch=arch, **how),
    ]

def names(*args, **how):
    return [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in made(*args, **how)]

portable = ["forward", "bwd_preprocess", "bwd_dkdv", "bwd_dkdv", "bwd_dq"]
for arch in ("sm80", "sm89", "sm100", "sm120", "gfx942"):
    assert names(arch) == portable, arch
assert not any("sm90" in module for module in sys.modules)
special = ["forward_jvp", "bwd_preprocess", "bwd_dkdv_jvp", "bwd_dq_jvp"]
assert names("sm90") == special
assert names("sm90", 64) == [*special[:3], "bwd_dq"]
assert names("sm90", 64, 256, 64) == ["forward_jvp", "bwd_preprocess", "bwd_dkdv", "bwd_dq"]
assert names("sm90", 64, 64) == ["forward", "bwd_preprocess", "bwd_dkdv", "bwd_dq"]  # short
masked = ["forward_jvp", "repair", "bwd_preprocess"]  # the repair follows where pairs are hidden
assert names("sm90", causal=True) == [*masked, "bwd_dkdv_jvp", "bwd_dq_jvp"]
assert names("sm90", 64, causal=True) == [*masked, "bwd_dkdv_jvp", "bwd_dq"]
assert names("sm90", 64, left=100) == [*masked, "bwd_dkdv_jvp", "bwd_dq_jvp"]
assert names("sm90", 32, left=100) == [*masked, "bwd_dkdv_jvp", "bwd_dq"]
for shape in ((1, 1, 256, 256), (1, 1, 1, 256)):
    for dtype in (torch.bool, torch.bfloat16):
        mask = torch.zeros(shape, dtype=dtype)
        assert names("sm90", mask=mask) == [*masked, *portable[2:]]
for launch in made("sm90", length=100, keys=256, causal=True):  # no row sees a key from 100 on
    if launch.kernel.fn.__name__.endswith("jvp_kernel"):
        read = dict(zip(launch.kernel.arg_names, launch.args))
        assert {read[name].shape[2] for name in ("K", "V", "T_K", "T_V")} == {100}
        if "D_K" in read:
            assert read["D_K"].shape[2] == 256
assert names("sm90", 256) == names("sm90", tma=False) == names("sm90", force="portable") == portable
"""


def test_each_architecture_has_its_kernels():
    compiling("-c", NAMES)


def test_every_architecture_has_every_table():
    for tables in configs.TABLES.values():
        for arithmetic in ("half", "float32"):
            assert tables[arithmetic].keys() == configs.SM80.keys()
            assert {len(row) for row in tables[arithmetic].values()} == {len(configs.HEAD_DIMS)}


def test_compiled_code_takes_cudnn_earlier_and_the_layout_of_results_does_not_say_so():
    x = Inputs(*torch.empty(3, 1, 4, 2048, 64, dtype=torch.bfloat16, device="meta"))
    assert cudnn.pays(x, Spec(1.0, compiled=True))
    assert not cudnn.pays(x, Spec(1.0, rows_first=True))
    assert not cudnn.pays(x._replace(k=x.k[:, :, 1:]), Spec(1.0, compiled=True))


def test_a_forward_without_a_tangent_is_warp_specialised_on_hopper():
    """In three warpgroups where a head has many queries of 64 columns. cuDNN need not plan it."""

    def launch(L=256, S=256, D=64, Hk=2, force=None, scale=0.1, **how):
        q = torch.empty(1, 2, L, D, dtype=torch.bfloat16)
        k = torch.empty(1, Hk, S, D, dtype=torch.bfloat16)
        x = Inputs(q, k, k)
        (found,) = kernels.launches(x, None, Spec(scale, **how), arch="sm90", force=force)
        return found

    for L, S, D, Hk, groups in ((65, 300, 40, 1, 2), (3000, 9, 64, 2, 3), (3000, 77, 72, 2, 2)):
        found = launch(L, S, D, Hk)
        assert "sm90" in found.kernel.fn.__module__
        assert found.constexprs["GROUPS"] == groups
        assert found.constexprs["EDGE"]  # no number of keys here fills its tiles
        assert found.constexprs["GROUP"] == 2 // Hk
    assert launch(S=512).constexprs["EDGE"] is False
    for how in ({"causal": True}, {"left": 9}, {"softcap": 1.0}, {"D": 32}, {"scale": -1.0}):
        assert "portable" in launch(**how).kernel.fn.__module__, how
        with pytest.raises(NotImplementedError, match="fwd of 'sm90'"):
            launch(**how, force="sm90")
    long = Inputs(*torch.empty(3, 16, 4, 2048, 64, dtype=torch.bfloat16, device="meta"))
    assert not cudnn.pays_forward(long, Spec(1.0))
    assert cudnn.pays_forward(long, Spec(1.0, causal=True))


def test_large_forward_passes_in_float32_cut_their_operands_before():
    """On Hopper; a masked gradient and a small call do not."""

    def launched(B, L, S, mask=None, backward=False, packed=None, **how):
        q, k = (torch.empty(B, 12, n, 64, device="meta") for n in (L, S))
        x = Inputs(q, k, k, mask, None, packed, packed)
        given = (Saved(q, torch.empty(B, 12, L, device="meta")), q) if backward else ()
        found = kernels.launches(x, None, Spec(0.1, **how), *given, arch="sm90", tma=False)
        return [f"{launch.kernel.fn.__name__} {launch.constexprs.get('PARTS')}" for launch in found]

    before = ["split_kernel 3"] * 3 + ["forward_kernel 3"]
    mask = torch.empty(1, 1, 1024, 1024, dtype=torch.bool)
    cu = torch.zeros(5, dtype=torch.int32, device="meta")
    assert launched(2, 1024, 1024) == launched(2, 1024, 1024, left=9) == before
    assert launched(2, 1024, 1024, mask) == launched(1, 4096, 4096, packed=cu) == before
    within = ["forward_kernel 1"]
    assert launched(1, 1024, 1024) == launched(64, 300, 1024) == launched(64, 1024, 300) == within
    assert launched(1, 2000, 2000, packed=cu) == within
    gradients = launched(2, 1024, 1024, mask, backward=True)
    assert gradients == [
        f"bwd_{name}_kernel {n}" for name, n in (("preprocess", None), ("dkdv", 1), ("dq", 1))
    ]


def test_the_gradients_of_o_alone_are_one_launch_on_hopper():
    """Where nothing is hidden and no heads are shared; behind the row sums, if a head is long."""

    def names(L=256, S=256, D=72, Hk=2, force=None, **how):
        q = torch.empty(1, 2, L, D, dtype=torch.bfloat16)
        k = torch.empty(1, Hk, S, D, dtype=torch.bfloat16)
        saved = Saved(q, torch.empty(1, 2, L))
        found = kernels.launches(
            Inputs(q, k, k), None, Spec(0.1, **how), saved, q, arch="sm90", force=force
        )
        return [launch.kernel.fn.__name__ for launch in found]

    assert names() == names(1, 65, 40) == names(256, 256, 80, force="sm90") == ["bwd_head_kernel"]
    for shape in ((257, 256, 64), (256, 257, 64), (256, 256, 88), (300, 65, 128)):
        assert names(*shape) == ["bwd_preprocess_kernel", "bwd_kernel"], shape
    portable = ["bwd_preprocess_kernel", "bwd_dkdv_kernel", "bwd_dq_kernel"]
    for how in ({"causal": True}, {"left": 9}, {"softcap": 1.0}, {"S": 64}, {"Hk": 1}, {"D": 32}):
        assert names(**how) == portable, how
        with pytest.raises(NotImplementedError, match="bwd_dkdv of 'sm90'"):
            names(**how, force="sm90")
    assert names(force="portable") == portable


def test_row_sums_count_strides_in_eights_only_where_the_product_fits():
    q = torch.empty(2, 2, 64, 64, dtype=torch.bfloat16, device="meta")
    for far, unit in ((2**30, 8), (2**31, 1), (2**30 + 4, 1)):
        d_out = torch.empty_strided(q.shape, (far, 64 * 64, 64, 1), dtype=q.dtype, device="meta")
        saved = Saved(q, torch.empty(2, 2, 64, device="meta"))
        sums, *_ = kernels.launches(
            Inputs(q, q, q), None, Spec(0.1), saved, d_out, arch="sm80", tma=False
        )
        assert sums.constexprs["UNIT"] == unit
        assert sums.args[0][1] * unit == far


def test_cudnn_leaves_the_gradients_of_short_heads():
    short = Inputs(*torch.empty(3, 64, 4, 1024, 64, dtype=torch.bfloat16, device="meta"))
    long = Inputs(*torch.empty(3, 16, 4, 2560, 64, dtype=torch.bfloat16, device="meta"))
    assert cudnn.pays(short, Spec(1.0))
    assert cudnn.pays(long, Spec(1.0))
    assert cudnn.pays_backward(long, Spec(1.0))
    for D, pays in ((64, False), (72, False), (96, True), (128, True)):
        middle = Inputs(*torch.empty(3, 16, 4, 2048, D, dtype=torch.bfloat16, device="meta"))
        assert cudnn.pays_backward(middle, Spec(1.0)) == pays
    assert not cudnn.pays_backward(short, Spec(1.0))
    assert cudnn.pays_backward(short, Spec(1.0, causal=True))
    few = short._replace(k=short.k[:, :, :64].repeat(16, 1, 1, 1), q=short.q.repeat(16, 1, 1, 1))
    assert cudnn.pays_backward(few, Spec(1.0))


def test_structure_and_a_bias_with_its_tangent_stay_on_hoppers_kernels():
    """All but the gradients of the bias, which are the portable kernels'."""
    x = torch.empty(1, 2, 512, 64, dtype=torch.bfloat16)
    bias, cu = torch.empty(1, 2, 512, 512), torch.zeros(4, dtype=torch.int32)
    blocks = block_mask(torch.ones(4, 4, dtype=torch.bool), 128)
    spec, inputs, tangents = Spec(0.1), Inputs(x, x, x), Tangents(x, x, x)
    calls = {
        "band": (inputs, tangents, spec._replace(left=5, right=-2)),
        "packed": (inputs._replace(cu_q=cu), tangents, spec._replace(causal=True)),
        "blocks": (
            inputs._replace(kv_blocks=blocks.kv_blocks, q_blocks=blocks.q_blocks),
            tangents,
            spec._replace(block_q=128, block_k=128),
        ),
        "bias": (inputs._replace(mask=bias), tangents._replace(mask=bias), spec),
    }
    rows = torch.empty(1, 2, 512)
    saved = Saved(x, rows, x, rows)
    for name, (given, t, how) in calls.items():
        forward = kernels.launches(given, t, how, arch="sm90")
        names = [launch.kernel.fn.__name__ for launch in forward]
        assert names == ["forward_jvp_kernel", "repair_kernel"], name
        back = kernels.launches(given, t, how, saved, x, x, name == "bias", arch="sm90")
        keys_gradient = back[1].kernel.fn.__name__
        assert (keys_gradient == "bwd_dkdv_jvp_kernel") == (name != "bias"), name
    keys = torch.empty(1, 2, 600, 64, dtype=torch.bfloat16)  # of which the last see all
    longer, last = Inputs(x, keys, keys), spec._replace(causal=True, lower_right=True)
    forward, *_ = kernels.launches(longer, Tangents(x, keys, keys), last, arch="sm90")
    assert forward.args[1].shape[2] == 600
    forward, *_ = kernels.launches(
        longer, Tangents(x, keys, keys), last._replace(lower_right=False), arch="sm90"
    )
    assert forward.args[1].shape[2] == 512
    wide = Inputs(*(torch.empty(1, 2, 512, 128, dtype=torch.bfloat16),) * 3, bias)
    with pytest.raises(NotImplementedError, match="no room for a float32 mask and its tangent"):
        kernels.launches(wide, Tangents(*wide[:4]), spec, arch="sm90", force="sm90")


def test_a_causal_mask_that_begins_elsewhere_takes_its_tiles_forward():
    x = torch.empty(1, 2, 512, 128, dtype=torch.bfloat16)
    causal, shifted, window = (
        kernels.launches(Inputs(x, x, x), None, spec, arch="sm90")[0].constexprs["BLOCK_N"]
        for spec in (Spec(0.1, True), Spec(0.1, right=99), Spec(0.1, left=99, right=99))
    )
    assert causal == shifted == 2 * window


def test_an_implementation_that_is_named_serves_or_raises(device):
    p = build(Case(B=1, L=5, S=6), torch.float32, device)
    free, forced = (kernels.forward(p.x, p.t, p.spec, force=f) for f in (None, "portable"))
    assert torch.equal(free.out, forced.out)
    with pytest.raises(NotImplementedError, match="fwd_jvp of 'sm90'"):
        kernels.forward(p.x, p.t, Spec(1.0), force="sm90")
    with pytest.raises(NotImplementedError, match="cuDNN does not support"):
        kernels.forward(p.x, None, Spec(1.0), force="cudnn")
    with pytest.raises(ValueError, match="force must be one of"):
        kernels.forward(p.x, p.t, Spec(1.0), force="hopper")


def piece(descriptor, b, h, column):
    """What TMA reads of a head in a descriptor of pieces, from a column on, and where it begins."""
    *_, rows, columns = descriptor.shape
    *steps, step, _ = descriptor.strides
    at = (b, h // 2, h % 2) if len(descriptor.shape) == 5 else (b, h)
    width = min(descriptor.block_shape[-1], columns - column)
    begin = sum(i * s for i, s in zip(at, steps, strict=True)) + column
    whole = descriptor.base.as_strided((rows, width), (step, 1), begin)
    return whole, begin


@pytest.mark.parametrize("beside", [True, False], ids=["heads of a token", "rows of a head"])
@pytest.mark.parametrize(("D", "D1"), [(72, 64), (88, 64), (80, 64), (64, 64)])
def test_the_pieces_of_a_head_are_its_columns_and_the_long_one_is_whole_sectors(D, D1, beside):
    """Odd heads begin with the short one where a head ends inside of a sector of 32 bytes."""
    B, H, L = 2, 5, 70
    if beside:
        packed = torch.arange(B * L * 3 * H * D).reshape(B, L, 3, H, D).to(torch.bfloat16)
        q, k, v = packed.permute(2, 0, 3, 1, 4)[:1].expand(3, B, H, L, D)
    else:
        q = k = v = torch.arange(B * H * L * D).reshape(B, H, L, D).to(torch.bfloat16)
    (launch,) = kernels.launches(Inputs(q, k, v), None, Spec(0.1), arch="sm90", force="sm90")
    long, short = launch.args[0], launch.args[4]
    by_two = len(long.shape) == 5
    assert by_two == (D in (72, 88))
    for b in range(B):
        for h in range(H):
            first, begin = piece(long, b, h, 0)
            pieces = [first]
            if D > D1:
                pieces.insert(0 if by_two and h % 2 else 1, piece(short, b, h, D1)[0])
            assert torch.equal(torch.cat(pieces, 1), q[b, h])
            assert not beside or begin * 2 % 32 == 0
    shared = Inputs(q, k[:, :1], v[:, :1])
    (launch,) = kernels.launches(shared, None, Spec(0.1), arch="sm90", force="sm90")
    assert len(launch.args[0].shape) == 4  # heads of Q and of K must agree


def test_sums_of_gradients_come_where_one_launch_makes_them():
    def room(D=64, L=300, S=None, dtype=torch.bfloat16, arch="sm90", **how):
        z = torch.empty(2, L, 3, 5, D, dtype=dtype)
        q, k, v = (z[:, : S if i else L, i].transpose(1, 2) for i in range(3))
        return kernels.room_for_sums(Inputs(q, k, v), Spec(0.1, **how), arch=arch)

    assert room().shape == (2, 5, 2, 5, 64)
    assert room(D=72, L=64 * 9).shape == (2, 9, 2, 5, 72)
    for how in (
        {"L": 64},
        {"causal": True},
        {"S": 200},
        {"dtype": torch.float32},
        {"arch": "sm80"},
    ):
        assert room(**how) is None, how
    q = torch.randn(1, 1, 5, 8)
    into = (*(torch.empty_like(q) for _ in range(3)), torch.empty(1, 1, 2, 1, 8))
    saved = kernels.forward(Inputs(q, q, q), None, Spec(1.0))
    with pytest.raises(NotImplementedError, match="gives no sums of dQ"):
        kernels.backward(q, None, Inputs(q, q, q), Tangents(), saved, Spec(1.0), False, into=into)


@pytest.mark.parametrize("tiles", [2, 6, 7, 8, 22, 131, 132, 133])
def test_every_block_meets_the_last_tiles_of_heads_as_often_as_any_other(tiles):
    """They are cut, and cost less. `work_item` in Python, for 132 blocks."""
    q = torch.empty(96, 4, 192 * tiles - 90, 64, dtype=torch.bfloat16, device="meta")
    saved = Saved(q, torch.empty(q.shape[:3], device="meta"))
    *_, launch = kernels.launches(Inputs(q, q, q), None, Spec(0.1), saved, q, arch="sm90")
    per_head, turn, items = launch.args[-3:]
    seen, cut = set(), Counter()
    for w in range(items):
        bh, tile = w // per_head, (w + w // per_head // turn) % per_head
        seen.add((bh, tile))
        cut[w % launch.grid[0]] += tile == per_head - 1
    assert len(seen) == items == 384 * per_head
    assert max(cut.values()) - min(cut.values()) <= 1


@pytest.mark.parametrize("rows_first", [False, True])
def test_a_repeated_batch_of_a_long_call_is_copied_where_tma_would_read_it(rows_first, monkeypatch):
    arch = {"now": "sm90"}
    monkeypatch.setattr(problem, "architecture", lambda device: arch["now"])
    shape, order = (
        ((1, 2**13, 16, 64), (0, 2, 1, 3)) if rows_first else ((1, 16, 2**13, 64), range(4))
    )
    x = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        .permute(*order)
        .expand(2, -1, -1, -1)
    )
    assert not problem.tma_can_read(x)
    copy = problem.readable(x)
    assert copy.stride() == (x[0].numel(), *x.stride()[1:])  # results follow the order in memory
    for other in (x[:, :, :4096], x[:1], x[:1].float().expand(2, -1, -1, -1)):
        # short, not repeated, no 16 bits
        assert problem.readable(other) is other
    heads = x[:1, :1].expand(1, 64, -1, -1)  # a copy for each head
    assert problem.readable(heads) is heads
    arch["now"] = "sm80"
    assert problem.readable(x) is x
