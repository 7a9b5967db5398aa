"""Hugging Face diffusers: an attention processor."""

from diffusers.models.attention_processor import (  # pyright: ignore[reportMissingImports]
    Attention,
    AttnProcessor2_0,
)
from torch import Tensor

from ..override import sdpa_override


class JVPFlashAttnProcessor(AttnProcessor2_0):
    """`AttnProcessor2_0` whose attention is this one: self and cross attention, masks, group norm,
    query and key norms and residual are diffusers' own code.

        model.set_attn_processor(JVPFlashAttnProcessor())

    Models with a processor of their own (Flux, SD3, Wan, ...) keep it: run them inside
    `sdpa_override()`.

    Args:
        backend: as in `jvp_flash_attention.attention`.
    """

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """(B, L, C) or (B, C, h, w) -> the same shape.

        Args:
            attn: the layer.
            hidden_states: (B, L, C) or (B, C, h, w).
            encoder_hidden_states: (B, S, C'), or None for self-attention.
            attention_mask: as `attn.prepare_attention_mask` takes it.
            temb: time embedding for a spatial norm.

        Raises:
            NotImplementedError: the layer has more projections than `AttnProcessor2_0` knows.
        """
        if not isinstance(attn, Attention) or attn.added_kv_proj_dim is not None:
            raise NotImplementedError(
                "JVPFlashAttnProcessor supports layers of AttnProcessor2_0, got"
                f" {type(attn).__name__} with projections of its own; keep its processor and run"
                " the model inside jvp_flash_attention.sdpa_override()"
            )
        with sdpa_override(backend=self.backend):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs
            )
