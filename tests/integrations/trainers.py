"""Small stand-ins of public trainers: how each calls attention and takes its tangent, before and
after the lines that docs/integrations.md tells to change. Their code is not here.

Every stand-in is a network of two attention layers on tokens (B, L, C) with times t and r, and the
step of MeanFlow: u, du = jvp(net, (z, t, r), (v, 1, 0)) against v − (t − r) du.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

from jvp_flash_attention import attention
from jvp_flash_attention.dropins import dmf, fastgen, rcm, tvm
from jvp_flash_attention.integrations.timm import use_fused_attention
from jvp_flash_attention.override import sdpa_override

LAYERS, HEADS, DIM, CHANNELS = 2, 2, 4, 3


def written_out(q, k, v, mask=None):
    """Attention of (B, H, L, D) as products and a softmax."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ v


class Layer(nn.Module):
    """qkv, attention of (B, H, L, D), projection."""

    def __init__(self, attend: Callable) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.proj = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.attend = attend

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, **switches: Any) -> Tensor:
        return self.merge(x, self.attend(*self.heads(x), **switches))


class Net(nn.Module):
    def __init__(self, attend: Callable[[], Callable]) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS + 2, HEADS * DIM)
        self.layers = nn.ModuleList(Layer(attend()) for _ in range(LAYERS))
        self.final = nn.Linear(HEADS * DIM, CHANNELS)

    def tokens(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times = torch.stack([t, t - r], -1)[:, None].expand(*z.shape[:2], 2)
        return self.embed(torch.cat([z, times], -1))

    def forward(self, z: Tensor, t: Tensor, r: Tensor, **switches: Any) -> Tensor:
        x = self.tokens(z, t, r)
        for layer in self.layers:
            x = layer(x, **switches)
        return self.final(x)


class Fused(nn.Module):
    """timm's attention, and DiT's, SiT's and LightningDiT's: a switch between SDPA and products."""

    def __init__(self, fused_attn: bool) -> None:
        super().__init__()
        self.fused_attn = fused_attn

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v) if self.fused_attn else written_out(q, k, v)


def by_name(q, k, v, attn_type):
    """An argument chooses."""
    return F.scaled_dot_product_attention(q, k, v) if attn_type == "fused" else written_out(q, k, v)


def channels_first(q, k, v, attend):
    """EDM's U-Net: (B·H, D, L)."""
    out = attend(*(x.flatten(0, 1).mT for x in (q, k, v)))
    return out.mT.unflatten(0, (-1, HEADS))


def weights_and_values(q, k, v):
    w = (q.mT @ k * q.shape[1] ** -0.5).softmax(-1)
    return (w @ v.mT).mT


def tokens_first(q, k, v, attend):
    """FlashAttention's layout: (B, L, H, D)."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def masked(q, k, v, attend):
    """Cross attention to a text with padding, in float32 or wider, and an additive mask."""
    mask = torch.zeros(1, 1, 1, k.shape[-2], dtype=q.dtype)
    mask[..., -1] = -10000.0
    return attend(q, k, v, mask)


def pairs(net: Net, primals, tangents, attend=None):
    """rCM: no duals. Every layer carries (value, tangent), and tangents are detached on the way."""
    x, t_x = jvp(net.tokens, primals, tangents)
    for layer in net.layers:
        qkv, t_qkv = jvp(layer.heads, (x,), (t_x.detach(),))  # (B, H, L, D)
        inputs = zip(qkv, t_qkv, strict=True)
        inputs = [(y.transpose(1, 2), t.detach().transpose(1, 2)) for y, t in inputs]
        out, t_out = (y.transpose(1, 2) for y in attend(*inputs))
        x, t_x = jvp(layer.merge, (x, out), (t_x.detach(), t_out.detach()))
    return jvp(net.final, (x,), (t_x.detach(),))


def pair_written_out(q, k, v):
    values, tangents = zip(q, k, v, strict=True)
    return jvp(lambda *x: tokens_first(*x, written_out), values, tangents)


def double_backward(f, primals, tangents):
    return torch.autograd.functional.jvp(f, primals, tangents, create_graph=True)


@dataclass
class Trainer:
    """One way to run the step."""

    attend: Callable[[], Callable] = lambda: written_out
    jvp: Callable = jvp
    switches: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Net], Any] = lambda net: None
    override: Callable[[], AbstractContextManager] = sdpa_override
    tangent_grad: bool = False  # the loss differentiates through the tangent

    def step(self, z, v, t, r) -> tuple[Tensor, list[Tensor], Any]:
        """(loss, gradients of all weights, the override)."""
        torch.manual_seed(0)
        net = Net(self.attend).double()
        self.prepare(net)
        primals, tangents = (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r))
        with self.override() as o:
            if self.jvp in (jvp, double_backward):
                u, du = self.jvp(partial(net, **self.switches), primals, tangents)
            else:
                u, du = self.jvp(net, primals, tangents)
            du = du if self.tangent_grad else du.detach()
            loss = (u - (v - (t - r)[:, None, None] * du)).square().mean()
        return loss.detach(), list(torch.autograd.grad(loss, list(net.parameters()))), o


FUSED_OFF = Trainer(lambda: Fused(False))
FUSED_ON = Trainer(lambda: Fused(False), prepare=use_fused_attention)

# repository -> (as it is, with the changed lines)
TRAINERS: dict[str, tuple[Trainer, Trainer]] = {
    "Gsunshine/py-meanflow": (
        Trainer(lambda: partial(channels_first, attend=weights_and_values)),
        Trainer(lambda: partial(channels_first, attend=fastgen.unet_attention)),
    ),
    "zhuyu-cs/MeanFlow": (FUSED_OFF, FUSED_ON),
    "haidog-yaqub/MeanFlow": (
        Trainer(jvp=double_backward), Trainer(lambda: attention),
    ),
    "snap-research/alphaflow": (Trainer(lambda: Fused(True), jvp=double_backward), FUSED_ON),
    "ali-vilab/FACM": (FUSED_OFF, Trainer(lambda: Fused(True))),
    "WZDTHU/TiM": (
        Trainer(lambda: by_name, switches={"attn_type": "vanilla"}),
        Trainer(lambda: by_name, switches={"attn_type": "fused"}),
    ),
    "kyungmnlee/dmf": (
        Trainer(lambda: partial(tokens_first, attend=partial(tokens_first, attend=written_out))),
        Trainer(lambda: partial(tokens_first, attend=dmf.flash_attn_func)),
    ),
    "lumalabs/tvm": (
        Trainer(tangent_grad=True),
        Trainer(lambda: tvm.sdpa_jvp, tangent_grad=True),
    ),
    "NVlabs/rcm": (
        Trainer(jvp=partial(pairs, attend=pair_written_out)),
        Trainer(jvp=partial(pairs, attend=rcm.torch_attention_op_withT)),
    ),
    "NVlabs/FastGen": (FUSED_OFF, FUSED_ON),
    "NVlabs/Sana": (
        Trainer(lambda: partial(masked, attend=written_out)),
        Trainer(lambda: partial(masked, attend=attention)),
    ),
}  # fmt: skip
