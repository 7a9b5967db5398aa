"""Encode images once: ``python scripts/encode_latents.py data.path=IMAGES data.image_size=256
output=LATENTS``, then train with ``data=latents data.path=LATENTS``.

Several processes share the work: ``torchrun --nproc-per-node 8 scripts/encode_latents.py ...``, or
jobs with ``rank=K world_size=N``. A run that was interrupted goes on where it was.
"""

import json
import os
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig

from training.build import build_data
from training.cli import one_line_errors, run
from training.data.infinite_sampler import Batch
from training.data.latents import VAES, load_vae
from training.data.module import DataModule
from training.progress import tracked
from training.validation import integer, positive_integer, switch

Arrays = dict[str, np.ndarray]


def encode(config: DictConfig) -> None:
    """Rows of the arrays: training images, their mirror images if ``flip``, held-out images."""
    positive_integer("batch_size", config.batch_size)
    switch("flip", config.flip)
    rank, world_size = place(config)
    output = Path(config.output)
    if (output / "meta.json").exists():
        raise FileExistsError(f"output: {output} holds latents already; give another folder")
    data: DataModule = build_data(config)
    if not data.images or data.drawn or data.shape[0] != 3:
        raise ValueError(
            "data: latents are encoded from colour images that are read; choose"
            " data=image_folder, hugging_face, imagenet or cifar10"
        )
    name: str = VAES.get(config.vae) or config.vae
    parts = [("train", False), *[("train", True)] * config.flip, ("val", False)]
    lengths = [len(data.sources[part]) for part, _ in parts]
    same_work(output, {"vae": name, "batch_size": config.batch_size, "lengths": lengths})
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    vae = load_vae(name).to(device)

    batches = []  # (row, part, mirrored, numbers of the images)
    row = 0
    for (part, mirrored), length in zip(parts, lengths, strict=True):
        for start in range(0, length, config.batch_size):
            numbers = range(start, min(start + config.batch_size, length))
            batches.append((row + start, part, mirrored, numbers))
        row += length
    arrays: Arrays = {}
    done = shared(output / "done.npy", np.uint8, (len(batches),))
    mine = range(rank, len(batches), world_size)
    for i in tracked(mine, "batches encoded", len(mine)):
        if done[i]:
            continue
        first, part, mirrored, numbers = batches[i]
        x, y = data.read(part, Batch(0, list(numbers)))
        with torch.no_grad():
            latent = vae.encode((x.flip(-1) if mirrored else x).to(device)).latent_dist
        arrays = arrays or create(output, row, latent.mean.shape[1:])
        for key, values in (("mean", latent.mean), ("std", latent.std), ("labels", y)):
            arrays[key][first : first + len(y)] = values.cpu().numpy()
            arrays[key].flush()  # type: ignore[attr-defined]
        done[i] = 1  # after what it says
    left = int((done == 0).sum())
    if left:
        print(f"{output}: {left} of {len(batches)} batches are left to other processes")
        return
    finish(output, config, data, vae, sum(lengths[:-1]))


def place(config: DictConfig) -> tuple[int, int]:
    """Rank and number of processes: as given, as torchrun says, or alone."""
    rank = int(os.environ.get("RANK", 0)) if config.rank is None else config.rank
    world_size = config.world_size
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    integer("rank", rank)
    positive_integer("world_size", world_size)
    if rank not in range(world_size):
        raise ValueError(f"rank must be one of 0 ... {world_size - 1} = world_size - 1; got {rank}")
    return rank, world_size


def same_work(output: Path, work: dict[str, Any]) -> None:
    """What was begun in this folder, by this process or another, is the same work."""
    output.mkdir(parents=True, exist_ok=True)
    path, text = output / "work.json", json.dumps(work)
    written_once(path, lambda temporary: temporary.write_text(text))
    if (begun := path.read_text()) != text:
        raise ValueError(
            f"output: {output} was begun with other settings, {begun}; these are {text}; give"
            " another folder, or remove it"
        )


def written_once(path: Path, write: Any) -> None:
    """Whole or not there; of several processes the first one writes it."""
    if path.exists():
        return
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def shared(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of zeros on the disk, written by all processes."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # its name ends as it likes
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            )
            file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)

    written_once(path, write)
    return np.lib.format.open_memmap(path, "r+")


def create(folder: Path, n: int, shape: tuple[int, ...]) -> Arrays:
    kinds = {"mean": (np.float16, shape), "std": (np.float16, shape), "labels": (np.int64, ())}
    return {
        key: shared(folder / f"{key}.npy", dtype, (n, *rest))
        for key, (dtype, rest) in kinds.items()
    }


def finish(output: Path, config: DictConfig, data: DataModule, vae: Any, train: int) -> None:
    arrays = {key: np.load(output / f"{key}.npy", mmap_mode="r") for key in ("mean", "std")}
    mean, std = statistics(arrays, train)
    meta = {
        "vae": VAES.get(config.vae) or config.vae,
        "scale": vae.config.scaling_factor,
        "shift": getattr(vae.config, "shift_factor", None) or 0.0,
        "channel_mean": mean,
        "channel_std": std,
        "num_classes": data.num_classes,
        "train": train,
    }
    # Last: a folder without it is not finished.
    text = json.dumps(meta, indent=2) + "\n"
    written_once(output / "meta.json", lambda temporary: temporary.write_text(text))
    for name in ("done.npy", "work.json"):
        (output / name).unlink(missing_ok=True)
    print(f"{output}: {len(arrays['mean'])} latents of shape {tuple(arrays['mean'].shape[1:])}")


def statistics(arrays: Arrays, n: int, chunk: int = 1024) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the first n latents, as they are drawn:
    their variance is that of the means and the mean of the variances.
    """
    total = squares = np.zeros(())
    for start in range(0, n, chunk):
        mean, std = (
            arrays[key][start : min(start + chunk, n)].astype(np.float64) for key in arrays
        )
        total = total + mean.sum((0, 2, 3))
        squares = squares + (mean**2 + std**2).sum((0, 2, 3))
    count = n * arrays["mean"].shape[2] * arrays["mean"].shape[3]
    mean = total / count
    return mean.tolist(), np.sqrt(squares / count - mean**2).tolist()


@hydra.main(version_base="1.3", config_path="../configs", config_name="encode_latents")
def main(config: DictConfig) -> None:
    with one_line_errors():
        encode(config)


if __name__ == "__main__":
    run(main)
