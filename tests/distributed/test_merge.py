"""Keys in shards within one process: the kernels' results merge, and their gradients add up."""

import pytest
import torch

from jvp_flash_attention import kernels, reference
from jvp_flash_attention.call import Saved, Tangents
from jvp_flash_attention.distributed.ring import attend, differentiate
from jvp_flash_attention.distributed.sharding import block, pieces
from jvp_flash_attention.merge import merge, nothing
from tests import tolerances
from tests.cases import Case, build, relative

CASES = [
    # every shard fits one tile of keys
    (Case(B=1, H=1, Hk=1, L=9, S=45, D=16, Dv=24, tangents="qkv"), "contiguous"),
    (Case(B=1, H=2, Hk=1, L=5, S=110, D=16, tangents="qk"), "zigzag"),
    (Case(B=1, H=1, Hk=1, L=37, S=37, D=16, causal=True, tangents="qkv"), "contiguous"),
    (Case(B=1, H=2, Hk=1, L=37, S=37, D=16, causal=True, tangents="qkv"), "zigzag"),
    (Case(B=2, H=1, Hk=1, L=9, S=45, D=16, mask="padding", tangents="qv"), "contiguous"),
    (Case(B=2, H=1, Hk=1, L=37, S=37, D=16, mask="padding", causal=True), "zigzag"),
]
GRADS = ("d_q", "d_t_q", "d_k", "d_v", "d_t_k", "d_t_v")


def problem(case):
    p = build(case, torch.float32)
    if case.mask == "padding":
        p.primals[3] = torch.rand(case.B, 1, 1, case.S) > 0.5
        p.primals[3][:, :, :, : case.S // 2] = False
        p.primals[3][1] = False  # nothing is left of a sample
    return p


def rows_of(length, size, rank, layout):
    return torch.cat([torch.arange(length)[x] for x in pieces(length, size, rank, layout)])


def sharded(p, layout, size, jvp):
    """Outputs and gradients of the whole sequences from blocks of `size` simulated processes."""
    (q, k, v, mask), (t_q, t_k, t_v, _) = p.primals, p.tangents
    L, S = q.shape[2], k.shape[2]
    mask = None if mask is None else mask.mT
    out = {"out": torch.zeros_like(p.d_out), "t_out": torch.zeros_like(p.d_out)}
    for name, x in zip(GRADS, (q, q, k, v, k, v), strict=True):
        out[name] = torch.zeros_like(x)
    cut = lambda x, at: None if x is None else x[:, :, at].contiguous()  # noqa: E731
    for rank in range(size):
        rows = rows_of(L, size, rank, layout)
        q_r, t_q_r, d_out, d_t_out = (cut(x, rows) for x in (q, t_q, p.d_out, p.d_t_out))
        total, calls = nothing(q_r, v, jvp), []
        for source in range(size):
            found = block(rank, source, size, (L, S), p.spec.causal, layout)
            keys = rows_of(S, size, source, layout)
            if found is not None:
                spec = p.spec._replace(causal=found.causal, sharded=True)
                shards = [cut(x, keys) for x in (k, v, mask, t_k, t_v)]
                part = attend(found, q_r, t_q_r if jvp else None, shards, spec, jvp)
                total = merge(total, part, found.rows, torch.float32, spec.backend)
                calls.append((found, keys, shards, spec))
        out["out"][:, :, rows] = total.out
        if jvp:
            out["t_out"][:, :, rows] = total.t_out
        for found, keys, shards, spec in calls:
            args = (q_r, t_q_r, shards, total, spec)
            grads = differentiate(found, d_out, d_t_out if jvp else None, *args)
            for i, (name, grad) in enumerate(zip(GRADS, grads, strict=True)):
                if grad is not None:
                    at = rows[found.rows] if i < 2 else keys[found.keys]
                    out[name][:, :, at] += grad
    return out


def whole(p, jvp):
    p = p.double()
    if not jvp:
        saved = reference.forward(p.x, None, p.spec)
        d, _ = reference.backward(p.d_out, None, p.x, Tangents(), saved, p.spec, False)
        return {"out": saved.out, "d_q": d.q, "d_k": d.k, "d_v": d.v}
    saved = reference.forward(p.x, p.t, p.spec)
    d, d_t = reference.backward(p.d_out, p.d_t_out, p.x, p.t, saved, p.spec, False)
    named = zip(GRADS, (d.q, d_t.q, d.k, d.v, d_t.k, d_t.v), strict=True)
    return {"out": saved.out, "t_out": saved.t_out, **dict(named)}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("jvp", [True, False], ids=["jvp", "plain"])
@pytest.mark.parametrize(("case", "layout"), CASES, ids=lambda x: str(x))
def test_blocks_of_keys_merge_to_the_whole(case, layout, jvp, backend):
    if not jvp and backend == "triton" and layout == "contiguous":
        pytest.skip("the interpreter takes its time; zigzag has every kind of block")
    p = problem(case)
    p.spec = p.spec._replace(backend=backend)
    got, exact = sharded(p, layout, 2, jvp), whole(p, jvp)
    for name, x in exact.items():
        square, norm = relative(got[name], x, case.L)
        limit = tolerances.SECOND if jvp else tolerances.FIRST
        assert (square / norm) ** 0.5 <= limit[torch.float32], name


@pytest.mark.parametrize("implementation", [kernels, reference])
def test_the_lse_that_is_handed_in_is_the_one_used(implementation):
    """As if the keys were there twice: P is half of what these keys alone give."""
    p = build(Case(L=9, S=20, tangents=""), torch.float32)
    saved = implementation.forward(p.x, None, p.spec)
    twice = saved._replace(lse=saved.lse + torch.tensor(2.0).log())
    args = (p.d_out, None, p.x, Tangents())
    halves, _ = implementation.backward(*args, twice, p.spec._replace(sharded=True), False)
    wholes, _ = implementation.backward(*args, saved, p.spec, False)
    for half, one in zip(halves[:3], wholes[:3], strict=True):
        torch.testing.assert_close(half, one / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_row_without_keys_in_one_shard_or_in_all(backend):
    rows, inf = slice(None), float("inf")
    one = lambda x: torch.full((1, 1, 1, 2), x)  # noqa: E731
    row = lambda x: torch.full((1, 1, 1), x)  # noqa: E731
    empty = lambda: Saved(one(0.0), row(-inf), one(0.0), row(0.0))  # noqa: E731
    full = lambda: Saved(one(3.0), row(7.0), one(4.0), row(5.0))  # noqa: E731
    put = lambda a, b: merge(a, b, rows, torch.float32, backend)  # noqa: E731
    for got, exact in (
        (put(empty(), empty()), empty()),
        (put(empty(), full()), full()),
        (put(full(), empty()), full()),
    ):
        for x, y in zip(got, exact, strict=True):
            assert torch.equal(x, y)
    lost = Saved(*(f(inf - inf) for f in (one, row, one, row)))
    for got in (put(full(), lost), put(lost, full())):
        assert all(x.isnan().all() for x in got)


@pytest.mark.parametrize("jvp", ["both", "total", "neither"])
@pytest.mark.parametrize("start", [0, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_merges_as_plain_pytorch(jvp, start, dtype):
    """Totals and parts in 16 bits as a pass gives them, the result in the type asked for: in the
    total's memory, in new memory, or in rows of a larger tensor."""
    draw = lambda *shape: torch.randn(2, 3, *shape)  # noqa: E731
    lies = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731

    def drawn(rows, t):
        out, t_out = lies(draw(rows, 24).half()), draw(rows, 24).half()
        lse = 3 * draw(rows)
        lse[:, :, 1] = float("-inf")
        return Saved(out, lse, t_out if t else None, draw(rows) if t else None)

    total, part = drawn(37, jvp != "neither"), drawn(37 - start, jvp == "both")
    copies = [Saved(*(None if x is None else x.clone() for x in total)) for _ in range(2)]
    rows = slice(start, None)
    exact = merge(copies[0], part, rows, dtype, "reference")
    larger = torch.full((2, 2, 3, 50, 24), 7.0, dtype=dtype)
    into = larger[0, :, :, 9:46], None if jvp == "neither" else larger[1, :, :, 9:46]
    placed = merge(copies[1], part, rows, dtype, "triton", into)
    assert placed.out is into[0]
    assert placed.t_out is into[1]
    assert (larger[:, :, :, :9] == 7.0).all()
    assert (larger[:, :, :, 46:] == 7.0).all()
    for got in (merge(total, part, rows, dtype, "triton"), placed):
        for x, y in zip(got, exact, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype
                torch.testing.assert_close(x, y, rtol=torch.finfo(x.dtype).eps * 4, atol=1e-5)
