"""Hugging Face transformers: `attn_implementation="jvp"`."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface  # pyright: ignore[reportMissingImports]
from transformers.integrations.sdpa_attention import (  # pyright: ignore[reportMissingImports]
    sdpa_attention_forward,
)

from ..override import sdpa_override

try:
    from transformers.masking_utils import (  # pyright: ignore[reportMissingImports]
        AttentionMaskInterface,
        sdpa_mask,
    )
except ImportError:  # before 4.53 models make the masks of an unknown implementation themselves
    AttentionMaskInterface = sdpa_mask = None


def register(name: str = "jvp", backend: str | None = None) -> None:
    """Make this attention selectable by name in every model that knows `AttentionInterface`.

        register()
        model = AutoModel.from_config(config, attn_implementation="jvp")
        model.set_attn_implementation("jvp")              # or on a model that exists

    Masks, grouped heads, position biases and caches are those of "sdpa": the function is
    transformers' own `sdpa_attention_forward`, and the attention that it calls is this one.

    Args:
        name: of the implementation; one registered before under this name is replaced.
        backend: as in `jvp_flash_attention.attention`.

    Raises:
        ValueError: `name` is one of transformers' own, or contains "flash", by which transformers
            tells FlashAttention packages, with masks and inputs of their own.
    """
    if "flash" in name or name in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"name must not contain 'flash' nor be one of transformers' own, got {name!r}; for"
            " example 'jvp'"
        )
    function = partial(attention_forward, backend=backend)
    AttentionInterface.register(name, function)  # pyright: ignore[reportArgumentType]
    if AttentionMaskInterface is not None:
        AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    softcap: float | None = None,
    backend: str | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls.

    Args:
        module: the layer; its `is_causal` and `num_key_value_groups` count.
        query: (B, H, L, D).
        key: (B, Hk, S, D).
        value: (B, Hk, S, D).
        attention_mask: broadcastable to (B, H, L, S), bool or floating, or None.
        softcap: as in `jvp_flash_attention.attention`, which has none of transformers' own "sdpa":
            Gemma 2's. None or 0 for none.
        backend: as in `jvp_flash_attention.attention`.
        **kwargs: dropout, scaling, is_causal, ..., as transformers passes them.

    Returns:
        (output (B, L, H, D), None: attention weights are never made).
    """
    override = _capped_override(softcap, backend) if softcap else sdpa_override(backend=backend)
    with override:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


class _capped_override(sdpa_override):
    """`sdpa_override` whose attention has a soft cap."""

    def __init__(self, softcap: float, backend: str | None) -> None:
        super().__init__(backend=backend)
        self.softcap = softcap

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if func is F.scaled_dot_product_attention:
            kwargs = {**(kwargs or {}), "softcap": self.softcap}
        return super().__torch_function__(func, types, args, kwargs)
