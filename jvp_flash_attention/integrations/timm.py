"""timm, and the models that have its attention: which of their two paths is taken."""

from torch import nn


def use_fused_attention(model: nn.Module, on: bool = True) -> int:
    """Lets every layer of a model call `F.scaled_dot_product_attention`, as `sdpa_override` needs.

        use_fused_attention(model)
        with sdpa_override():
            out, t_out = torch.func.jvp(model, (x,), (t,))

    timm's layers, and those of DiT, SiT and their descendants, ask their attribute `fused_attn`;
    trainers switch it off for a jvp, which PyTorch's fused attention does not have.

    Args:
        model: with layers that have the attribute `fused_attn`.
        on: False for the path that is written out.

    Returns:
        How many layers there are.

    Raises:
        ValueError: there are none.
    """
    layers = [m for m in model.modules() if isinstance(getattr(m, "fused_attn", None), bool)]
    if not layers:
        raise ValueError(
            f"model must have layers with the attribute fused_attn, got {type(model).__name__}"
            " without one; its attention is switched elsewhere, or written out"
        )
    for layer in layers:
        layer.fused_attn = on  # type: ignore[assignment]
    return len(layers)
