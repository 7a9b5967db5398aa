"""Encode images once: ``python scripts/encode_latents.py data.path=IMAGES data.image_size=256
output=LATENTS``, then train with ``data=latents data.path=LATENTS``.
"""

import json
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track

from training.build import build_data
from training.cli import one_line_errors, run
from training.data.latents import load_vae
from training.data.module import Data
from training.data.stream import Batch
from training.validation import positive_integer, switch


def encode(config: DictConfig) -> None:
    """Rows of the arrays: training images, their mirror images if ``flip``, held-out images."""
    positive_integer("batch_size", config.batch_size)
    switch("flip", config.flip)
    output = Path(config.output)
    if (output / "meta.json").exists():
        raise FileExistsError(f"output: {output} holds latents already; give another folder")
    data: Data = build_data(config)
    if not data.images or data.drawn or data.shape[0] != 3:
        raise ValueError(
            "data: latents are encoded from colour images that are read; choose"
            " data=image_folder, hugging_face, imagenet or cifar10"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(config.vae).to(device)

    parts = [("train", False), *[("train", True)] * config.flip, ("held_out", False)]
    lengths = [len(data.sources[name]) for name, _ in parts]
    output.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    row = 0
    for (name, mirrored), length in zip(parts, lengths, strict=True):
        starts = range(0, length, config.batch_size)
        for start in track(starts, f"{name}{', mirrored' * mirrored}", transient=True):
            numbers = list(range(start, min(start + config.batch_size, length)))
            x, y = data.read(name, Batch(0, numbers))
            with torch.no_grad():
                latent = vae.encode((x.flip(-1) if mirrored else x).to(device)).latent_dist
            if not arrays:
                arrays = create(output, sum(lengths), latent.mean.shape[1:])
            for key, values in (("mean", latent.mean), ("std", latent.std), ("labels", y)):
                arrays[key][row : row + len(y)] = values.cpu().numpy()
            row += len(y)
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    meta = {
        "vae": config.vae,
        "scale": vae.config.scaling_factor,
        "shift": getattr(vae.config, "shift_factor", None) or 0.0,
        "num_classes": data.num_classes,
        "train": sum(lengths[:-1]),
    }
    # Last: a folder without it is not finished.
    (output / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    print(f"{output}: {row} latents of shape {tuple(arrays['mean'].shape[1:])}")


def create(folder: Path, n: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Empty arrays on the disk, written row by row."""
    kinds = {"mean": (np.float16, shape), "std": (np.float16, shape), "labels": (np.int64, ())}
    return {
        key: np.lib.format.open_memmap(folder / f"{key}.npy", "w+", dtype, (n, *rest))
        for key, (dtype, rest) in kinds.items()
    }


@hydra.main(version_base="1.3", config_path="../configs", config_name="encode_latents")
def main(config: DictConfig) -> None:
    with one_line_errors():
        encode(config)


if __name__ == "__main__":
    run(main)
