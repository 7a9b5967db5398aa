"""A user's file: pyright, in strict mode, must know the types of the public functions."""

# pyright: strict

from typing import assert_type

import torch
from torch import Tensor

from jvp_flash_attention import attention, attention_jvp, sdpa_override
from jvp_flash_attention.flash_attn import flash_attn_func
from jvp_flash_attention.modules import Attention

q = k = v = torch.ones(1, 2, 3, 4)
assert_type(attention(q, k, v, is_causal=True), Tensor)
out, t_out = attention_jvp(q, k, v, q, None, v)
assert_type(out, Tensor)
assert_type(t_out, Tensor)
assert_type(flash_attn_func(q, k, v), Tensor)
assert_type(Attention(8, 2).forward(torch.ones(1, 3, 8)), Tensor)
with sdpa_override() as counted:
    assert_type(counted.calls, int)
