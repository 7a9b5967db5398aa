"""Sample: ``python scripts/sample.py ckpt=outputs/.../checkpoints/last.ckpt nfe=1 n=64`` writes a
PNG grid.
"""

from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from training.cli import one_line_errors, run
from training.data.latents import decode_latents
from training.images import picture_of, write_png
from training.loading import Trained, load_trained, sampler_of
from training.registry import trust
from training.samplers.generate import balanced_labels, generate
from training.validation import positive_integer, seed, switch


def sample(config: DictConfig) -> None:
    positive_integer("n", config.n)
    switch("decode", config.decode)
    seed(config.seed)
    trust(config.trusted)
    path = Path(config.ckpt)
    trained = load_trained(path, str(config.weights), config.get("attention"))
    sampler = sampler_of(trained.config, config.get("sampler"))
    if config.nfe is not None:
        sampler.nfe = config.nfe
    num_classes = trained.num_classes
    if config.label is not None and config.label not in range(num_classes):
        raise ValueError(
            f"label must be one of 0 ... {num_classes - 1} or null (all), got {config.label}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classes = num_classes if config.label is None else 1
    y = balanced_labels(config.n, classes) + (config.label or 0)
    images = generate(trained.net.to(device), instantiate(sampler), y, trained.shape, config.seed)
    if config.decode and trained.data["latents"]:
        images = decode_latents(images, trained.data["latents"])
    columns = 10 if config.label is None and num_classes == 10 else None
    folder = path.resolve().parent  # an exported file is beside the samples, a checkpoint below
    folder = folder if path.suffix == ".safetensors" else folder.parent
    default = folder / "samples" / f"{name_of(config, trained, sampler)}.png"
    print(write_png(config.output or default, picture_of(images, columns)))


def name_of(config: DictConfig, trained: Trained, sampler: DictConfig) -> str:
    """Tells the pictures of a run apart: whatever they depend on, where it is not the run's own."""
    path, weights = Path(config.ckpt), config.weights
    if path.suffix == ".safetensors":  # has one set of weights, and may be one of several files
        weights = "_".join([path.stem] * (path.stem != "model") + trained.averages)
    name = f"step{trained.step:06d}_{weights}_nfe{sampler.nfe}_n{config.n}_seed{config.seed}"
    own = trained.config.sampler
    for key, value in sampler.items():
        if key != "nfe" and value != own.get(key):
            name += f"_{str(value).rsplit('.', 1)[-1] if key == '_target_' else f'{key}{value}'}"
    name += f"_label{config.label}" if config.label is not None else ""
    return name + "_latents" * bool(trained.data["latents"] and not config.decode)


@hydra.main(version_base="1.3", config_path="../configs", config_name="sample")
def main(config: DictConfig) -> None:
    with one_line_errors():
        sample(config)


if __name__ == "__main__":
    run(main, adopted="sampler")
