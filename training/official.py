"""Weights of published transformers under this project's names: DiT, SiT, and MeanFlow in PyTorch.

All three are one architecture (facebookresearch/DiT, models.py): their names differ from
``models.dit.DiT``'s, a patch is (p, q, c) where ours is (c, p, q), and the last layer of the first
two has twice the channels, of which the second half is a variance that is left out.

    dit        ε(z, k) at the time steps k = 0 ... 999 of its own diffusion
    sit        v(z, s) = x - e at s = 1 - t (arXiv 2401.08740): ours is -v(z, 1 - t)
    meanflow   u(z, t, t - r) of the linear path, as ours

SiT's time runs the other way. Sinusoids of 1 - t are a rotation of those of t,

    cos(ω (1 - t)) = cos ω cos ωt + sin ω sin ωt,   sin(ω (1 - t)) = sin ω cos ωt - cos ω sin ωt,

so that the first layer after them takes it up, and the last layer the sign: nothing is lost.
"""

import re

import torch

from training.models.embedders import FREQUENCIES, frequencies
from training.validation import one_of

FORMATS = ("dit", "sit", "meanflow")
State = dict[str, torch.Tensor]

# Official name -> ours; of blocks, what follows ``blocks.N.``.
NAMES = {
    "x_embedder.proj": "patches.projection",
    "t_embedder.mlp.0": "time.inward",
    "t_embedder.mlp.2": "time.outward",
    "r_embedder.mlp.0": "second_time.inward",
    "r_embedder.mlp.2": "second_time.outward",
    "y_embedder.embedding_table": "label.table",
    "final_layer.linear": "final.projection",
    "final_layer.adaLN_modulation.1": "final.modulation.linear",
}
BLOCK_NAMES = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.projection",
    "mlp.fc1": "mlp.expand",
    "mlp.fc2": "mlp.contract",
    "adaLN_modulation.1": "modulation.linear",
}


def is_official(state: State) -> bool:
    return "x_embedder.proj.weight" in state


def translate(state: State, form: str | None, path: object) -> State:
    """The weights under this project's names. ``form``: one of ``FORMATS``; None is ``meanflow``
    where there is a second time, and an error otherwise: files of DiT and SiT look the same.
    """
    if form is None:
        if "r_embedder.mlp.0.weight" not in state:
            raise ValueError(
                f"init_format must be given for {path}: sit (a velocity) or dit (a denoiser) have"
                " the same names; got null"
            )
        form = "meanflow"
    one_of("init_format", form, FORMATS)
    patch_weight = state["x_embedder.proj.weight"]
    _, channels, patch, _ = patch_weight.shape
    ours: State = {}
    for name, value in state.items():
        if name != "pos_embed":  # fixed: the network has its own
            ours[_renamed(name)] = value
    ours["patches.projection.weight"] = patch_weight.flatten(1)
    for kind in ("weight", "bias"):
        name = f"final.projection.{kind}"
        if name in ours:
            rows = ours[name].unflatten(0, (patch, patch, -1)).movedim(2, 0)  # (c, p, q, ...)
            ours[name] = rows[:channels].flatten(0, 2)
    if form == "sit":
        for kind in ("weight", "bias"):
            ours[f"final.projection.{kind}"] = -ours[f"final.projection.{kind}"]
        ours["time.inward.weight"] = _reversed_time(ours["time.inward.weight"])
    return ours


def _renamed(name: str) -> str:
    head, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"(blocks\.\d+)\.(.+)", head):
        return f"{block[1]}.{BLOCK_NAMES.get(block[2], block[2])}.{kind}"
    return f"{NAMES.get(head, head)}.{kind}" if head else name


def _reversed_time(weight: torch.Tensor) -> torch.Tensor:
    """W' with W' sinusoids(t) = W sinusoids(1 - t). (W, 256)"""
    cos, sin = weight.double().split(FREQUENCIES // 2, dim=1)
    omega = frequencies(weight.device, torch.float64)
    turned = [cos * omega.cos() + sin * omega.sin(), cos * omega.sin() - sin * omega.cos()]
    return torch.cat(turned, dim=1).to(weight.dtype)
