"""Sample: ``python scripts/sample.py ckpt=outputs/.../checkpoints/last.ckpt nfe=1 n=64`` writes a
PNG grid.
"""

from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from training.build import build_data, build_module
from training.callbacks.ema import with_weights
from training.checkpoints import load_checkpoint, load_weights
from training.cli import one_line_errors, run
from training.images import grid, write_png
from training.samplers.generate import balanced_labels, generate
from training.validation import one_of, positive_integer


def sample(config: DictConfig) -> None:
    positive_integer("n", config.n)
    one_of("weights", config.weights, ("ema", "net"))
    path = Path(config.ckpt)
    checkpoint = load_checkpoint(path)
    trained = DictConfig(checkpoint["config"])
    if "attention" in config:
        trained.attention = trained.model.attention = config.attention
    sampler = config.get("sampler", trained.sampler)
    if config.nfe is not None:
        sampler.nfe = config.nfe

    data = build_data(trained)
    module = build_module(trained, data)
    load_weights(module, checkpoint, path)
    net = module.net
    if config.weights == "ema" and "ema" in checkpoint:
        net = with_weights(net, checkpoint["ema"]["average"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.label is not None and config.label not in range(data.num_classes):
        raise ValueError(
            f"label must be one of 0 ... {data.num_classes - 1} or null (all), got {config.label}"
        )
    classes = data.num_classes if config.label is None else 1
    y = balanced_labels(config.n, classes) + (config.label or 0)
    images = generate(net.to(device), instantiate(sampler), y, data.shape, config.seed)
    columns = 10 if config.label is None and data.num_classes == 10 else None
    default = path.resolve().parent.parent / "samples" / f"nfe{sampler.nfe}_n{config.n}.png"
    print(write_png(config.output or default, grid(images, columns)))


@hydra.main(version_base="1.3", config_path="../configs", config_name="sample")
def main(config: DictConfig) -> None:
    with one_line_errors():
        sample(config)


if __name__ == "__main__":
    run(main)
