"""The earlier package's names keep working."""

import torch
from torch.autograd import forward_ad

from jvp_flash_attention import attention_jvp
from jvp_flash_attention.jvp_attention import MASK_CONST, JVPAttn, attention


def test_all_entry_points_take_the_earlier_arguments():
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    for f in (attention, JVPAttn.fwd, JVPAttn.fwd_dual):
        out = f(
            q=q, k=k, v=v, attn_mask=None, dropout_p=0.0, causal=True, sm_scale=0.3,
            warp_specialize=False, USE_TMA=False, verify_attn_mask=False,
        )  # fmt: skip
        torch.testing.assert_close(out, exact)


def test_additive_masks_made_with_its_constant_mask():
    q = torch.randn(1, 2, 6, 8)
    see = torch.rand(6, 6) > 0.4
    see[:, 0] = True
    additive = torch.where(see, 0.0, MASK_CONST)
    exact = torch.nn.functional.scaled_dot_product_attention(q, q, q, see)
    torch.testing.assert_close(attention(q, q, q, additive), exact)


def test_dual_tensors_give_dual_tensors():
    q, k, v, t = (torch.randn(1, 2, 6, 8) for _ in range(4))
    with forward_ad.dual_level():
        out = JVPAttn.fwd_dual(forward_ad.make_dual(q, t), k, v)
        primal, tangent = forward_ad.unpack_dual(out)
    for got, exact in zip((primal, tangent), attention_jvp(q, k, v, t, None, None), strict=True):
        torch.testing.assert_close(got, exact)
