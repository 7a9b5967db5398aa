"""Host overhead: how long Python needs until a call returns, which bounds short sequences."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from jvp_flash_attention import attention, attention_jvp

from .timing import host_us

GOALS_US = {"attention_jvp": 60, "torch.func.jvp(attention)": 150}


def measure(device: str) -> list[dict]:
    """Tiny tensors, so that no kernel takes as long as its call. On the CPU there is nothing to
    measure: a call returns when it is done."""
    if device != "cuda":
        return []
    q, k, v, t_q, t_k, t_v = (
        torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16) for _ in range(6)
    )
    x, t = (q, k, v), (t_q, t_k, t_v)
    # PyTorch's share: one fused attention, and a jvp of nothing
    calls = {
        "scaled_dot_product_attention": lambda: scaled_dot_product_attention(q, k, v),
        "attention": lambda: attention(q, k, v),
        "attention_jvp": lambda: attention_jvp(q, k, v, t_q, t_k, t_v),
        "torch.func.jvp(identity)": lambda: torch.func.jvp(lambda q, k, v: q, x, t),
        "torch.func.jvp(attention)": lambda: torch.func.jvp(attention, x, t),
    }
    return [
        {"call": name, "us": round(host_us(call, device), 1), "goal": GOALS_US.get(name)}
        for name, call in calls.items()
    ]
