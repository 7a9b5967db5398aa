"""A call like an earlier one takes the launches of that one, and only where nothing else is asked
of it than its values."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from jvp_flash_attention import attention, attention_jvp, recall

pytest.importorskip("triton")


@pytest.fixture
def log(monkeypatch):
    """How often an earlier call's launches were taken."""
    taken = []

    class Known(dict):
        def get(self, key):
            launch = super().get(key)
            return launch and (lambda *tensors: taken.append(key) or launch(*tensors))

    monkeypatch.setattr(recall, "_known", Known())
    return taken


def tensors(device, count=7, shape=(1, 2, 9, 8)):
    return [torch.randn(shape, device=device) for _ in range(count)]


ours = partial(attention, backend="triton")
ours_jvp = partial(attention_jvp, backend="triton")


def plain(q, k, v, *_, **more):
    return ours(q, k, v, **more)


def func_jvp(q, k, v, t_q, t_k, t_v, _, **more):
    f = lambda q, k, v: ours(q, k, v, **more)  # noqa: E731
    return torch.func.jvp(f, (q, k, v), (t_q, t_k, t_v))


def func_jvp_of_keys(q, k, v, t_q, t_k, t_v, _, **more):
    return torch.func.jvp(lambda k: ours(q, k, v, **more), (k,), (t_k,))


def dual_level(q, k, v, t_q, t_k, t_v, _, **more):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in ((q, t_q), (k, t_k), (v, t_v))]
        return tuple(forward_ad.unpack_dual(ours(*duals, **more)))


def explicit(q, k, v, t_q, t_k, t_v, _, **more):
    return ours_jvp(q, k, v, t_q, None, t_v, **more)


WAYS = (plain, func_jvp, func_jvp_of_keys, dual_level, explicit)
NUMBERS = (
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"attn_mask": "bool"},
    {"attn_mask": "floating", "is_causal": True},
)


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_the_second_call_of_a_kind_gives_its_own_values(way, numbers, log, device):
    """The second takes the launches; the long way says what they must give."""
    for i in range(2):
        torch.manual_seed(i)
        x, more = tensors(device), dict(numbers)
        if more.get("attn_mask") == "bool":
            more["attn_mask"] = torch.rand(1, 1, 9, 9, device=device) > 0.3
        elif "attn_mask" in more:
            more["attn_mask"] = torch.randn(1, 2, 9, 9, device=device)
        got = way(*x, **more)
        assert len(log) == i
    recall._known.clear()
    exact = way(*x, **more)
    assert torch.equal(torch.stack(list(got)), torch.stack(list(exact)))
    assert len(log) == 1


def test_calls_of_other_kinds_go_the_long_way(log, device):
    q, k, v, *t, _ = tensors(device)
    ours(q, k, v)
    wide = torch.randn(1, 2, 9, 16, device=device)[..., :8]
    ours(q, wide, v)
    ours(q, k, v, is_causal=True)
    ours(q, k, v, scale=0.5)
    ours(q, k[:, :1], v[:, :1], enable_gqa=True)
    ours(q[0], k[0], v[0])
    ours(q[0], k[0], v[0])  # nor are three dimensions kept
    ours(q, k, -v)
    ours_jvp(q, k, v, *t)
    ours_jvp(q, k, v, None, *t[1:])
    ours_jvp(q, k, v, None, None, None)
    with forward_ad.dual_level():
        ours(forward_ad.make_dual(q, t[0]), k, v)
    assert len(log) == 1  # (q, k, -v), whose product is an ordinary tensor


def test_whoever_wants_more_than_values_goes_the_long_way(log, device):
    q, k, v, *t, _ = tensors(device)
    ours(q, k, v)
    ours_jvp(q, k, v, *t)
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ours(leaf, k, v).sum(), leaf)
    assert gradient.any()
    out, t_out = ours_jvp(leaf, k, v, *t)
    assert out.requires_grad
    assert t_out.requires_grad
    out, t_out = torch.func.jvp(lambda k: ours(leaf, k, v), (k,), (t[1],))
    assert out.requires_grad
    assert t_out.requires_grad
    assert torch.func.grad(lambda q: ours(q, k, v).sum())(q).any()
    assert torch.func.vmap(lambda q: ours(q, k, v))(torch.stack([q, q])).shape == (2, *q.shape)
    t_q = tuple(t[:1])
    along = lambda v: torch.func.jvp(lambda q: ours(q, k, v), (q,), t_q)[1].sum()  # noqa: E731
    assert torch.func.grad(along)(v).any()
    with torch.autocast(device, dtype=torch.float16):
        assert ours(q, k, v).dtype == torch.float16
    ours(q, k, v, dropout_p=0.5)
    zero = torch._efficientzerotensor(q.shape, device=device)
    ours_jvp(q, k, v, zero, *t[1:])
    assert not log
    with torch.no_grad():
        assert not ours(leaf, k, v).requires_grad
    assert len(log) == 1


def test_a_tangent_of_the_mask_is_not_forgotten(log, device):
    q, k, v, *_ = tensors(device)
    mask, t_mask = torch.randn(2, 1, 2, 9, 9, device=device)
    for _ in range(2):
        _, t_out = torch.func.jvp(lambda m: ours(q, k, v, m), (mask,), (t_mask,))
        assert t_out.any()
        _, t_out = ours_jvp(q, k, v, None, None, None, mask, t_attn_mask=t_mask)
        assert t_out.any()
    assert not log


def test_wrong_arguments_raise_after_a_call_with_equal_ones(log, device):
    q, k, v, t, *_ = tensors(device)
    ours(q, k, v, is_causal=True)
    with pytest.raises(TypeError, match="is_causal must be a bool"):
        ours(q, k, v, is_causal=1)
    ours_jvp(q, k, v, t, t, t)
    with pytest.raises(ValueError, match="t_key must have its primal's shape"):
        ours_jvp(q, k, v, t, t[..., :4], t)
    for bad in (None, [q], q.tolist()):
        with pytest.raises(TypeError, match="query must be a"):
            ours(bad, k, v)
        with pytest.raises(TypeError, match="query must be a"), forward_ad.dual_level():
            ours(bad, k, v)
    with pytest.raises(TypeError, match="attn_mask must be a"), forward_ad.dual_level():
        ours(q, k, v, [True])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, t)
        with pytest.raises(NotImplementedError, match="jvp of a jvp"):
            ours_jvp(dual, k, v, t, t, t)
    assert not log


def test_the_number_of_kinds_is_bounded_and_no_tensor_is_kept(log, device, monkeypatch):
    monkeypatch.setattr(recall, "MOST", 2)
    for length in range(1, 6):
        plain(*tensors(device, shape=(1, 1, length, 8)))
    assert 1 <= len(recall._known) <= 2


def test_a_program_may_begin_with_a_jvp(log, device):
    """Where a new tensor comes wrapped, and so shows how a dense one looks only once unwrapped."""
    recall._dense_keys.cache_clear()
    x = tensors(device)
    func_jvp(*x)
    func_jvp(*x)
    assert len(log) == 1
    plain(*x)
    plain(*x)
    assert len(log) == 2


def test_tensors_without_data_have_shapes_as_ever(log, device):
    x = [x.to("meta") for x in tensors(device)]
    assert attention(*x[:3]).is_meta
    assert attention_jvp(*x[:6])[1].is_meta
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], x[3])
        assert forward_ad.unpack_dual(attention(dual, *x[1:3])).tangent.is_meta


def test_tensors_that_cannot_be_unpacked_go_the_long_way(log, device):
    q, k, v, t, *_ = tensors(device)
    sparse = q.to_sparse()
    along = lambda q: torch.func.jvp(lambda k: ours(q, k, v), (k,), (t,))  # noqa: E731
    with pytest.raises(NotImplementedError, match="query must be a dense"):
        along(sparse)
    with pytest.raises(NotImplementedError, match="query must be a dense"), forward_ad.dual_level():
        ours(sparse, k, v)
    kept = []
    torch.func.jvp(lambda x: kept.append(x) or x, (q,), (t,))  # a wrapper whose transform has ended
    assert torch.equal(torch.stack(along(kept[0])), torch.stack(along(q)))


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_jvp_that_fails_below_the_transform_leaves_it_as_it_was(way, log, device, monkeypatch):
    x = tensors(device)
    way(*x)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as m:
        m.setattr("jvp_flash_attention.kernels.plans.launch", fail)
        with pytest.raises(MemoryError):
            way(*x)
    assert torch._C._functorch.peek_interpreter_stack() is None
    way(*x)


def test_no_copy_is_made_to_find_that_one_was_needed(log, device, monkeypatch):
    q, k, v, t, *_ = tensors(device, shape=(1, 2, 8, 8))
    copies, contiguous = [], torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x, *a: copies.append(x) or contiguous(x, *a)
    )
    for _ in range(2):
        ours_jvp(q.mT, k, v, t, t, t)
    assert len(copies) == 2
    assert not log


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_what_is_remembered_keeps_no_tensor(way, log, device):
    x = tensors(device)
    kept = list(map(weakref.ref, x))
    for _ in range(2):
        way(*x)
    assert len(log) == 1
    del x
    gc.collect()
    assert not any(ref() is not None for ref in kept)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("way", [plain, explicit], ids=lambda f: f.__name__)
def test_tensors_made_in_inference_mode_are_recalled(way, inside, log, device):
    with torch.inference_mode():
        x = tensors(device)
    normal = [y.clone() for y in x]
    expected = way(*normal)
    log.clear()
    with torch.inference_mode(inside):
        results = [way(*x) for _ in range(2)]
    assert len(log) == 2
    for result in results:
        for got, right in zip(_flat(result), _flat(expected), strict=True):
            assert torch.equal(got, right)
            assert got.is_inference() == inside


def _flat(result):
    return result if isinstance(result, tuple) else (result,)
