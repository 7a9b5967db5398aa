"""Latents of a variational autoencoder, computed once by ``scripts/encode_latents.py``.

A folder of ``mean.npy`` and ``std.npy`` (n, C, h, w) float16, ``labels.npy`` (n,) int64 and
``meta.json``. A latent is drawn anew every time it is read, x = (mean + std e - shift) scale, as if
the image had been encoded in the training step. The arrays are mapped, not loaded.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.module import DataModule
from training.randomness import Draws
from training.validation import one_of

META = ("vae", "scale", "shift", "num_classes", "train")
# Short names of the autoencoders that papers use.
VAES = {kind: f"stabilityai/sd-vae-ft-{kind}" for kind in ("ema", "mse")}


class Latents(DataModule):
    """Latents (B, C, h, w) and labels (B,) of the folder ``path``; the first ``train`` rows of the
    arrays (as ``meta.json`` says) are trained on, the others are held out.

    ``normalise``: ``vae`` is the autoencoder's own shift and scale, ``channels`` makes mean 0 and
    standard deviation 1 of every channel.
    """

    images = False
    chunk = 64

    def __init__(
        self,
        seed: int,
        path: str,
        batch_size: int = 256,
        num_workers: int = 0,
        normalise: str = "vae",
    ) -> None:
        one_of("data.normalise", normalise, ("vae", "channels"))
        self.meta, arrays = read_folder(Path(path))
        if normalise == "channels":
            if "channel_std" not in self.meta:
                raise ValueError(
                    f"data.normalise=channels: {Path(path) / 'meta.json'} has no channel_mean and"
                    " channel_std; encode the images anew, or write them there"
                )
            scale = [1 / std for std in self.meta["channel_std"]]
            self.meta |= {"shift": self.meta["channel_mean"], "scale": scale}
        n, first = len(arrays["labels"]), self.meta["train"]
        scaling = (self.meta["shift"], self.meta["scale"])
        sources: dict[str, Any] = {
            "train": Rows(arrays, range(first), *scaling),
            "val": Rows(arrays, range(first, n), *scaling),
        }
        shape = arrays["mean"].shape[1:]
        num_classes = self.meta["num_classes"]
        super().__init__(
            seed,
            batch_size,
            **sources,
            shape=shape,
            num_classes=num_classes,
            num_workers=num_workers,
        )

    @property
    def description(self) -> dict[str, Any]:
        latents = {key: self.meta[key] for key in ("vae", "scale", "shift")}
        return super().description | {"latents": latents}

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return decode_latents(x, self.description["latents"])


@torch.no_grad()
def decode_latents(x: torch.Tensor, latents: dict[str, Any]) -> torch.Tensor:
    """Latents (n, C, h, w) -> images (n, 3, H, W) in [-1, 1]; ``latents`` names the autoencoder and
    the scaling.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = _decoder(latents["vae"], device)
    shift, scale = (per_channel(latents[key]) for key in ("shift", "scale"))
    x = x / scale + shift
    parts = [vae.decode(part.to(device)).sample.cpu() for part in x.split(16)]
    return torch.cat(parts).clamp(-1, 1)


def per_channel(values: float | list[float]) -> torch.Tensor:
    """One number, or one for each channel. (1, 1, 1) or (C, 1, 1)"""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


@functools.lru_cache(maxsize=1)
def _decoder(name: str, device: str) -> Any:
    """Loaded once, however many parts are decoded."""
    return load_vae(name).to(device)


class Rows:
    """A source over some rows of the arrays."""

    def __init__(self, arrays: dict[str, np.ndarray], rows: range, shift: Any, scale: Any) -> None:
        self.arrays, self.rows = arrays, rows
        self.shift, self.scale = per_channel(shift), per_channel(scale)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: list[int], draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.rows[i] for i in indices]
        mean, std = (torch.from_numpy(self.arrays[k][rows]).float() for k in ("mean", "std"))
        e = torch.randn(mean.shape, generator=draws("latents"))
        x = (mean + std * e - self.shift) * self.scale
        return x, torch.from_numpy(self.arrays["labels"][rows])


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """``meta.json`` and the mapped arrays, checked against each other."""
    missing = [
        f for f in ("meta.json", "mean.npy", "std.npy", "labels.npy") if not (folder / f).is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"data.path: there is no {missing[0]} in {folder}; scripts/encode_latents.py writes it"
            " when all images are encoded"
        )
    meta = json.loads((folder / "meta.json").read_text())
    if absent := [key for key in META if key not in meta]:
        raise ValueError(f"data.path: {folder / 'meta.json'} has no {absent[0]!r}")
    try:
        arrays = {k: np.load(folder / f"{k}.npy", mmap_mode="r") for k in ("mean", "std", "labels")}
    except ValueError as error:
        raise ValueError(f"data.path: an array in {folder} is not whole ({error})") from error
    mean, std, labels = arrays["mean"], arrays["std"], arrays["labels"]
    if mean.ndim != 4 or mean.shape[2] != mean.shape[3]:
        raise ValueError(f"data.path: mean.npy must be (n, C, h, h); it is {mean.shape}")
    if std.shape != mean.shape or labels.shape != mean.shape[:1]:
        raise ValueError(
            f"data.path: std.npy must have mean.npy's shape {mean.shape} and labels.npy its"
            f" length; they are {std.shape} and {labels.shape}"
        )
    if not 0 < meta["train"] < len(labels):
        raise ValueError(
            f"data.path: 'train' in {folder / 'meta.json'} must be between 1 and {len(labels) - 1};"
            f" it is {meta['train']}"
        )
    return meta, arrays


def load_vae(name: str) -> Any:
    """diffusers' AutoencoderKL by name or from a local directory, without gradients. Its weights
    are safetensors: the name may come from a file, which must not choose a pickle.
    """
    try:
        from diffusers import AutoencoderKL  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModuleNotFoundError(
            'latents are encoded and decoded with diffusers: pip install -e ".[latents]"'
        ) from error
    try:
        vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"vae: {name} cannot be loaded ({reason}); give the name of an AutoencoderKL on the hub"
            " or a local directory of one"
        ) from error
    return vae.requires_grad_(False).eval()
