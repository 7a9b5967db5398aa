"""FlashAttention's functions by their names: values, tangents and what raises, against SDPA."""

import pytest
import torch
from torch.func import jvp
from torch.nn.functional import scaled_dot_product_attention as sdpa

from jvp_flash_attention import flash_attn as fa
from tests.cases import close


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def exact(q, k, v, causal=False, mask=None, window=(-1, -1)):
    """(B, L, H, D), causal and the window aligned bottom-right."""
    L, S = q.shape[1], k.shape[1]
    left, right = window
    if causal:
        mask = torch.ones(L, S, dtype=torch.bool).tril(S - L)
    if left >= 0:
        mask = (True if mask is None else mask) & torch.ones(L, S, dtype=torch.bool).triu(
            S - L - left
        )
    if right >= 0:
        mask = (True if mask is None else mask) & torch.ones(L, S, dtype=torch.bool).tril(
            S - L + right
        )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("S", [5, 9])
def test_func_has_the_layout_grouped_heads_and_bottom_right_causal(causal, S):
    q, k, v = draw(2, 5, 4, 8), draw(2, S, 2, 8), draw(2, S, 2, 8)
    t = tuple(map(torch.randn_like, (q, k, v)))
    out, t_out = jvp(lambda *x: fa.flash_attn_func(*x, causal=causal), (q, k, v), t)
    assert out.is_contiguous()
    close(out, exact(q, k, v, causal))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        close(t_out, jvp(lambda *x: exact(*x, causal), (q, k, v), t)[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(2, 1), (0, -1), (-1, 1), (3, 0)])
@pytest.mark.parametrize(("L", "S"), [(5, 5), (5, 9), (6, 4)])
def test_windows_are_aligned_bottom_right(L, S, window, causal):
    q, k, v = draw(2, L, 4, 8), draw(2, S, 2, 8), draw(2, S, 2, 8)
    t = tuple(map(torch.randn_like, (q, k, v)))
    f = lambda *x: fa.flash_attn_func(*x, causal=causal, window_size=window)  # noqa: E731
    theirs = lambda *x: exact(*x, causal, window=window)  # noqa: E731
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        results = jvp(f, (q, k, v), t), jvp(theirs, (q, k, v), t)
    for got, e in zip(*results, strict=True):
        close(got, e.nan_to_num(0.0))  # a tangent of SDPA's in a row that attends nothing


def test_packed_forms():
    qkv = draw(2, 5, 3, 4, 8)
    close(fa.flash_attn_qkvpacked_func(qkv, causal=True), exact(*qkv.unbind(2), causal=True))
    q, kv = draw(2, 5, 4, 8), draw(2, 7, 2, 2, 8)
    close(fa.flash_attn_kvpacked_func(q, kv, 0.0, None, True), exact(q, *kv.unbind(2), causal=True))


@pytest.mark.parametrize("lengths", [([3, 1, 4], [3, 2, 5]), ([4, 4], [5, 5]), ([3, 0], [2, 6])])
def test_varlen_is_each_sequence_alone(lengths):
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in lengths]
    q, k, v = draw(sum(lengths[0]), 4, 8), draw(sum(lengths[1]), 2, 8), draw(sum(lengths[1]), 2, 8)
    how = {"causal": True, "window_size": (1, -1)}
    run = lambda q: fa.flash_attn_varlen_func(q, k, v, *starts, 9, 9, **how)  # noqa: E731
    out, t_out = jvp(run, (q,), (q,))
    parts = [
        x.split(n) for x, n in zip((q, k, v), (lengths[0], lengths[1], lengths[1]), strict=True)
    ]
    alone = lambda q, k, v: fa.flash_attn_func(q[None], k[None], v[None], **how)[0]  # noqa: E731
    pairs = [
        jvp(lambda q, k=k, v=v: alone(q, k, v), (q,), (q,)) for q, k, v in zip(*parts, strict=True)
    ]
    close(out, torch.cat([o for o, _ in pairs]))
    close(t_out, torch.cat([t for _, t in pairs]))
    assert out.is_contiguous()
    close(fa.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), *starts, 9, 9, **how), out)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise"):
        fa.flash_attn_varlen_func(q[1:], k, v, *starts, 9, 9)


def test_varlen_packed_form():
    qkv, starts = draw(7, 3, 4, 8), torch.tensor([0, 3, 7]).int()
    out = fa.flash_attn_varlen_qkvpacked_func(qkv, starts, 4, causal=True)
    for begin, end in ((0, 3), (3, 7)):
        close(out[begin:end], exact(*qkv[None, begin:end].unbind(2), causal=True)[0])


def test_kvcache_counts_what_is_filled():
    q, k, v = draw(2, 3, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)
    close(fa.flash_attn_with_kvcache(q, k, v), exact(q, k, v))
    part = {"window": (2, 1)}
    close(fa.flash_attn_with_kvcache(q, k, v, window_size=(2, 1)), exact(q, k, v, **part))
    out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=7, window_size=(2, 1))
    close(out, exact(q, k[:, :7], v[:, :7], **part))
    filled = torch.tensor([4, 7])
    out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=filled, causal=True)
    for b, n in enumerate(filled.tolist()):
        close(out[b : b + 1], exact(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True))
    for lengths in (10, -1, torch.tensor([1, 2, 3]), torch.tensor(2.0)):
        with pytest.raises(ValueError, match="cache_seqlens must be"):
            fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)


@pytest.mark.parametrize(
    "given",
    [
        {"alibi_slopes": torch.ones(4)},
        {"return_attn_probs": True},
    ],
    ids=str,
)
def test_what_is_not_built_raises_by_name(given):
    q = draw(1, 4, 4, 8)
    with pytest.raises(NotImplementedError, match=next(iter(given))):
        fa.flash_attn_func(q, q, q, **given)
