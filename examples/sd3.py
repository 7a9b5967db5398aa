"""MeanFlow with the transformer of Stable Diffusion 3 from diffusers, which is not changed.

    python examples/sd3.py [STEPS]      # needs: pip install -c constraints.txt diffusers

The model calls F.scaled_dot_product_attention, whose fused kernels have no forward derivative.
After native.activate() those calls come to this library, in the whole process. The second time of
MeanFlow is added to the model's own embedding of the first.

A tiny configuration with random weights learns scikit-learn's digits. `from_pretrained` takes the
place of the constructor for published weights.
"""

import sys

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import jvp

from jvp_flash_attention import native

TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}


class MeanFlowSD3(nn.Module):
    """u(z, t, r, y). A class label stands for the prompt: one text token and its pooled form."""

    def __init__(self, transformer: SD3Transformer2DModel, classes: int) -> None:
        super().__init__()
        config = transformer.config
        self.transformer = transformer
        self.token = nn.Embedding(classes, config.joint_attention_dim)
        self.pooled = nn.Embedding(classes, config.pooled_projection_dim)
        self.span = TimestepEmbedding(1, transformer.inner_dim)  # of t - r

    def forward(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B,), (B,) -> (B, C, H, W)"""
        time_text = self.transformer.time_text_embed
        hook = time_text.register_forward_hook(
            lambda module, inputs, out: out + self.span((t - r)[:, None])
        )
        with hook:  # a hook is a context manager that removes itself
            return self.transformer(
                hidden_states=z,
                encoder_hidden_states=self.token(y)[:, None],
                pooled_projections=self.pooled(y),
                timestep=1000 * t,  # the model counts times from 0 to 1000
                return_dict=False,
            )[0]


def error_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(B,): the squared distance to the target that the MeanFlow identity gives."""
    t, r = torch.rand(2, len(x)).sort(0, descending=True).values
    e = torch.randn_like(x)
    z, v = x + t[:, None, None, None] * (e - x), e - x
    u, du = jvp(lambda z, t: net(z, t, r, y), (z, t), (v, torch.ones_like(t)))
    target = v - (t - r)[:, None, None, None] * du
    return (u - target.detach()).square().sum((1, 2, 3))


def main(steps: int = 300) -> None:
    native.activate()
    torch.manual_seed(0)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 8 - 1
    net = MeanFlowSD3(SD3Transformer2DModel(**TINY), 10)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (64,))
        error = error_of(net, images[batch], labels[batch])
        (error / (error.detach() + 1e-2)).mean().backward()  # adaptive weight: the loss is about 1
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            print(f"{step}/{steps}  error {error.mean():.3f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
