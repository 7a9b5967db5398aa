"""Bad input gives one line that names the argument, the requirement, what came and the remedy."""

import pytest
import torch

from jvp_flash_attention import api, attention, attention_jvp

Q = torch.randn(2, 4, 5, 8)
BAD = {
    "not a tensor": (TypeError, "query must be a torch.Tensor", lambda: attention([1.0], Q, Q)),
    "one dimension": (ValueError, "key must have shape", lambda: attention(Q, Q[0, 0, 0], Q)),
    "nested": (
        NotImplementedError,
        "flash_attn_varlen_func",
        lambda: attention(*[torch.nested.nested_tensor([Q[0], Q[0, :, :3]])] * 3),
    ),
    "nested, jagged": (
        NotImplementedError,
        "flash_attn_varlen_func",
        lambda: attention(*[torch.nested.nested_tensor([Q[0], Q[0, :3]], layout=torch.jagged)] * 3),
    ),
    "torch.fx": (
        TypeError,
        "torch.fx.wrap",
        lambda: torch.fx.symbolic_trace(lambda q: attention(q, q, q)),
    ),
    "integer": (TypeError, "query must be float16", lambda: attention(Q.long(), Q, Q)),
    "dtypes differ": (
        TypeError,
        "value must have query's dtype",
        lambda: attention(Q, Q, Q.double()),
    ),
    "devices differ": (
        ValueError,
        "key must be on query's device",
        lambda: attention(Q, Q.to("meta"), Q),
    ),
    "batches differ": (
        ValueError,
        "share their batch dimensions",
        lambda: attention(Q, Q.repeat(2, 1, 1, 1), Q),
    ),
    "head dims differ": (
        ValueError,
        "key must have query's head dim 8",
        lambda: attention(Q, Q[..., :4], Q),
    ),
    "kernels without a head dim": (
        NotImplementedError,
        "leave backend=None",
        lambda: attention(Q[..., :0], Q[..., :0], Q, backend="triton"),
    ),
    "lengths differ": (
        ValueError,
        "value must have key's length 5",
        lambda: attention(Q, Q, Q[:, :, :4]),
    ),
    "heads differ": (ValueError, "pass enable_gqa=True", lambda: attention(Q, Q[:, :2], Q[:, :2])),
    "heads do not divide": (
        ValueError,
        "multiple of the key and value heads",
        lambda: attention(Q, Q[:, :3], Q[:, :3], enable_gqa=True),
    ),
    "value heads do not divide": (
        ValueError,
        "got 4 and 2 and 3",
        lambda: attention(Q, Q[:, :2], Q[:, :3], enable_gqa=True),
    ),
    "key and value heads differ": (
        ValueError,
        "value must have key's number of heads 4, or 1, got 2",
        lambda: attention(Q, Q, Q[:, :2]),
    ),
    "integer mask": (
        TypeError,
        "attn_mask must be bool",
        lambda: attention(Q, Q, Q, torch.ones(5, 5).long()),
    ),
    "float8 mask": (
        TypeError,
        r"got torch.float8_e5m2; cast it",
        lambda: attention(Q, Q, Q, torch.zeros(5, 5).to(torch.float8_e5m2)),
    ),
    "sparse mask": (
        NotImplementedError,
        "attn_mask must be a dense",
        lambda: attention(Q, Q, Q, torch.ones(5, 5).to_sparse()),
    ),
    "mask of another shape": (
        ValueError,
        "attn_mask must broadcast",
        lambda: attention(Q, Q, Q, torch.ones(5, 4) > 0),
    ),
    "mask not a tensor": (
        TypeError,
        "attn_mask must be a torch.Tensor",
        lambda: attention(Q, Q, Q, "causal"),
    ),
    "dropout": (
        ValueError,
        r"dropout_p must be in \[0, 1\)",
        lambda: attention(Q, Q, Q, dropout_p=1.0),
    ),
    "scale": (ValueError, "scale must be finite", lambda: attention(Q, Q, Q, scale=float("nan"))),
    "tensor scale": (
        TypeError,
        "scale must be a Python number",
        lambda: attention(Q, Q, Q, scale=torch.tensor(0.5)),
    ),
    "causal by name": (
        TypeError,
        "is_causal must be a bool",
        lambda: attention(Q, Q, Q, is_causal="no"),
    ),
    "groups by name": (
        TypeError,
        "enable_gqa must be a bool",
        lambda: attention(Q, Q, Q, enable_gqa="no"),
    ),
    "backend": (ValueError, "backend must be one of", lambda: attention(Q, Q, Q, backend="cudnn")),
    "kernels in float64": (
        NotImplementedError,
        "leave backend=None",
        lambda: attention(Q.double(), Q.double(), Q.double(), backend="triton"),
    ),
    "tangent of another shape": (
        ValueError,
        "t_key must have its primal's shape",
        lambda: attention_jvp(Q, Q, Q, None, Q[:1], None),
    ),
    "tangent of another dtype": (
        TypeError,
        "t_query must have its primal's dtype",
        lambda: attention_jvp(Q, Q, Q, Q.double(), None, None),
    ),
    "tangent of a bool mask": (
        ValueError,
        "t_attn_mask must be None",
        lambda: attention_jvp(
            Q, Q, Q, None, None, None, torch.ones(5, 5) > 0, t_attn_mask=torch.ones(5, 5)
        ),
    ),
    "sparse": (NotImplementedError, "dense strided", lambda: attention(Q.to_sparse(), Q, Q)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_to_do(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, RuntimeError)  # what PyTorch's attention raises


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setattr(api, "_checked", {})
    times = []
    check = api._check
    monkeypatch.setattr(api, "_check", lambda *args: times.append(1) or check(*args))
    return times


def test_a_call_of_a_kind_that_passed_is_not_checked_again(checked):
    q, t = torch.randn(2, 2, 3, 5, 8)
    for _ in range(2):
        attention(q, q, q, is_causal=True)
        attention_jvp(q, q, q, t, None, t)
        attention(q[:, :1], q, q, enable_gqa=False)  # broadcast each time
    assert len(checked) == 3
    torch.func.jvp(lambda q: attention(q, q, q, is_causal=True), (q,), (t,))
    assert len(checked) == 3
    for other in (q.double(), q[:, :, :4], q.half()):
        attention(other, other, other, is_causal=True)
    assert len(checked) == 6


def test_what_equals_an_earlier_call_and_is_not_like_it_is_checked(checked):
    q = torch.randn(1, 2, 5, 8)
    t = torch.randn(1, 2, 5, 8)
    attention(q, q, q, None, 0.0, True, 1.0)
    attention_jvp(q, q, q, t, t, t)
    for _ in range(2):
        with pytest.raises(TypeError, match="is_causal"):
            attention(q, q, q, None, 0.0, 1, 1.0)
        with pytest.raises(TypeError, match="scale"):
            attention(q, q, q, None, 0.0, True, torch.tensor(1.0))
        with pytest.raises(TypeError, match="t_key"):
            attention_jvp(q, q, q, t, t.double(), t)
        with pytest.raises(NotImplementedError, match="dense strided"):
            attention(q.to_sparse(), q, q, is_causal=True, scale=1.0)
        with pytest.raises(ValueError, match="device"):
            attention(q, q.to("meta"), q, is_causal=True, scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, q, q, is_causal=True, scale=1.0).dtype == torch.bfloat16
        assert attention_jvp(q, q, q, t, None, t)[1].dtype == torch.bfloat16
    assert attention(q, q, q, is_causal=True, scale=1.0).dtype == torch.float32
    assert len(api._checked) == 4


def test_a_suspicious_layout_is_warned_of_each_time():
    q = torch.randn(1, 64, 4, 8)
    for _ in range(2):
        with pytest.warns(UserWarning, match="transpose") as caught:
            attention(q, q, q)
        assert caught[0].filename == __file__


def test_the_number_of_kinds_that_are_kept_is_bounded(checked, monkeypatch):
    monkeypatch.setattr(api, "MOST", 2)
    for n in range(1, 6):
        q = torch.randn(1, 1, n, 8)
        attention(q, q, q)
    assert len(api._checked) <= 2
