"""A static block mask is the bool mask of its blocks, in every derivative, and skips the others."""

from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention.flex_attention import create_block_mask

from jvp_flash_attention import attention, attention_jvp, selfcheck
from jvp_flash_attention.block_mask import block_mask
from jvp_flash_attention.call import Blocks
from jvp_flash_attention.selfcheck import COMPOSITIONS, Inputs, dense
from tests.cases import Case, build, check, close, errors

LAYOUT = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])


def pairs(layout, rows, columns, L, S):
    return layout.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :L, :S]


def test_the_reference_equals_dense_attention_with_its_mask():
    layout = torch.stack([LAYOUT, LAYOUT.flip(1), LAYOUT.T, ~LAYOUT])
    blocks = block_mask(layout, 128)
    q, k, v = (
        torch.randn(2, h, n, 3, dtype=torch.float64) for h, n in ((4, 300), (2, 270), (2, 270))
    )
    x, t = (q, k, v), tuple(map(torch.randn_like, (q, k, v)))
    f = lambda *x: attention(*x, enable_gqa=True, block_mask=blocks)  # noqa: E731
    theirs = lambda *x: dense(*x, pairs(layout, 128, 128, 300, 270))  # noqa: E731
    pair = torch.randn(2, 2, 4, 300, 3, dtype=torch.float64)
    for got, e in zip(jvp(f, x, t), jvp(theirs, x, t), strict=True):
        close(got, e)
    through = [vjp(lambda *x, f=f: jvp(f, x, t), *x)[1](tuple(pair)) for f in (f, theirs)]
    for got, e in zip(*through, strict=True):
        close(got, e)
    close(attention_jvp(*x, *t, enable_gqa=True, block_mask=blocks)[1], jvp(theirs, x, t)[1])


# blocks as small as the problem of `selfcheck`, which only the reference has
TINY = block_mask(torch.tensor([[True, False], [True, True]]), 128)._replace(block_q=3, block_k=4)
MASK = pairs(torch.tensor([[True, False], [True, True]]), 3, 4, 5, 6)


def of_a_bias(f):
    return lambda q, k, v, b: f(q, k, v + b[:, : v.shape[1]].mT)


blocked = of_a_bias(lambda *x: attention(*x, enable_gqa=True, block_mask=TINY))
exact = of_a_bias(lambda *x: dense(*x, MASK))


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_equals_dense_attention(name):
    results = [selfcheck.flat(COMPOSITIONS[name](Inputs(), f)) for f in (blocked, exact)]
    for got, e in zip(*results, strict=True):
        close(got, e)


@pytest.mark.compile
def test_compiled(monkeypatch):
    # inductor compiles the same operators in test_window.py
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(selfcheck, "ours", blocked)
    monkeypatch.setattr(selfcheck, "dense", exact)
    step = selfcheck.COMPILED["compile, loss through the tangent"]
    assert selfcheck._compiled(step, Inputs(), Inputs()) < 1e-10


NESTED = ((True, False, True), (False, False, False), (False, True, True))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            Case(B=1, H=2, Hk=1, L=290, S=530, D=8, blocks=NESTED),
            torch.float32,
            marks=pytest.mark.slow,
        ),
        (Case(B=1, H=1, Hk=1, L=384, S=768, D=16, blocks=NESTED), torch.float16),
        (Case(B=2, H=1, Hk=1, L=20, S=300, D=8, blocks=((((True, False),),), (((False, True),),))),
         torch.float32),
        (Case(B=1, H=2, Hk=2, L=130, S=33, D=8, blocks=(((True,), (False,)), ((False,), (True,))),
              dropout_p=0.2), torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_the_kernels_equal_the_reference(case, dtype, device):
    from jvp_flash_attention import kernels

    check(errors(kernels, case, dtype, device, rows=1), dtype, slack=2.0)


def test_blocks_that_are_not_seen_are_not_visited_by_any_pass(products):
    """Products of tiles are counted, in the interpreter."""
    from jvp_flash_attention import kernels

    def run(blocks):
        products.clear()
        p = build(Case(B=1, H=1, Hk=1, L=256, S=512, D=8, blocks=blocks), torch.float32)
        saved = kernels.forward(p.x, p.t, p.spec)
        kernels.backward(p.d_out, p.d_t_out, p.x, p.t, saved, p.spec, False)
        return [products.count(name) for name in ("forward", "bwd_dkdv", "bwd_dq")]

    for full, some in zip(
        run(((True,) * 2,) * 2), run(((False, True), (False, False))), strict=True
    ):
        assert full == 4 * some


def test_second_derivatives_through_the_kernels(device):
    layout = torch.tensor([[True, False], [True, True]], device=device)
    blocks, mask = block_mask(layout, 128), pairs(layout, 128, 128, 140, 150)
    q, k, v = (torch.randn(2, n, 8, device=device) for n in (140, 150, 150))

    def second(f, *x):
        first = lambda *x: grad(lambda *x: f(*x).square().sum(), (0, 1, 2))(*x)  # noqa: E731
        return grad(lambda *x: sum(g.square().sum() for g in first(*x)), (0, 1, 2))(*x)

    got = second(lambda *x: attention(*x, block_mask=blocks, backend="triton"), q, k, v)
    wide = (q.double(), k.double(), v.double())
    for g, e in zip(got, second(lambda *x: attention(*x, mask), *wide), strict=True):
        assert (g - e).norm() / e.norm() < 1e-4
    many = torch.stack([q, 2 * q])
    each = vmap(lambda q: attention(q, k, v, block_mask=blocks, backend="triton"))(many)
    torch.testing.assert_close(each, attention(many, k[None], v[None], mask))


def frames(b, h, i, j):
    return i // 128 >= j // 128


@pytest.mark.parametrize(("L", "S"), [(256, 384), (300, 330)])
def test_a_block_mask_of_flex_attention(L, S):
    """Blocks that only the end of the rows cuts are whole ones."""
    given = create_block_mask(frames, None, 2, L, S, device="cpu")
    q, k = (
        torch.randn(1, 2, L, 4, dtype=torch.float64),
        torch.randn(1, 2, S, 4, dtype=torch.float64),
    )
    i, j = torch.arange(L)[:, None], torch.arange(S)
    for _ in range(2):
        close(attention(q, k, k, block_mask=given), attention(q, k, k, frames(0, 0, i, j)))
    assert block_mask(given) is block_mask(given)


def test_a_block_that_is_seen_in_part_is_refused():
    given = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cpu")
    with pytest.raises(NotImplementedError, match=r"in part, the first is .* \(0, 0, 0, 0\)"):
        block_mask(given)


Q = torch.randn(2, 200, 4)
WHOLE = block_mask(torch.ones(2, 2, dtype=torch.bool), 128)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            {"block_mask": torch.ones(2, 2)},
            TypeError,
            "block_mask must be a BlockMask .*got torch.float32",
        ),
        ({"block_mask": 3}, TypeError, "block_mask must be a BlockMask of flex_attention"),
        ({"block_mask": torch.ones(2, 2) > 0}, ValueError, "must say how large its blocks are"),
        ({"block_mask": block_mask(torch.ones(2, 3) > 0, 128)}, ValueError, "must broadcast to"),
        ({"block_mask": block_mask(torch.ones(3, 2, 2) > 0, 128)}, ValueError, "must broadcast"),
        ({"is_causal": True}, NotImplementedError, "is_causal is not supported beside"),
        ({"window": (1, 2)}, NotImplementedError, "window is not supported beside block_mask"),
        ({"attn_mask": torch.ones(200, 200) > 0}, NotImplementedError, "attn_mask is not"),
        ({"cu_seqlens": torch.tensor([0, 9]).int()}, NotImplementedError, "cu_seqlens is not"),
    ],
    ids=str,
)
def test_what_is_no_block_mask_or_beside_one_is_refused_each_time(how, error, message):
    attention(Q, Q, Q, block_mask=WHOLE)
    for _ in range(2):
        with pytest.raises(error, match=message):
            attention(Q, Q, Q, **{"block_mask": WHOLE, **how})


def test_block_sizes_divide_into_the_tiles_of_every_table():
    configs = pytest.importorskip("jvp_flash_attention.kernels.configs")
    for arithmetics in configs.TABLES.values():
        for table in arithmetics.values():
            for tiles in table.values():
                assert all(128 % tile[0] == 128 % tile[1] == 0 for tile in tiles)


def test_lists_are_what_the_layout_says():
    blocks = block_mask(LAYOUT, (128, 256))
    assert isinstance(blocks, Blocks)
    assert blocks.kv_blocks[0, 0].tolist() == [[2, 0, 2, 1], [0, 0, 1, 2], [2, 1, 2, 0]]
    assert blocks.q_blocks[0, 0].tolist() == [[1, 0, 1, 2], [1, 2, 0, 1], [2, 0, 2, 1]]
