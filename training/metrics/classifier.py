"""A small convolutional classifier, trained on the data set itself: its features and its labels
judge the samples where no better network is at hand.
"""

import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from training.data.infinite_sampler import InfiniteSampler
from training.data.module import DataModule
from training.randomness import generator, key

FEATURES = 64


class Classifier(nn.Module):
    """Images (n, C, S, S) -> features (n, 64), from which labels follow linearly.

    Convolutions of stride 2 until the side is at most 4, then the mean over the pixels.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1), nn.GELU()]
        width = 32
        for _ in range(max(1, math.ceil(math.log2(image_size / 4)))):
            layers += [
                nn.Conv2d(width, 64, 3, stride=2, padding=1),
                nn.GroupNorm(8, 64),
                nn.GELU(),
            ]
            width = 64
        layers += [nn.Conv2d(width, FEATURES, 3, padding=1), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def train_classifier(
    data: DataModule, steps: int, device: str, batch_size: int = 128
) -> Classifier:
    """Always the same one for a data set and a number of steps: nothing depends on the run's seed.

    AdamW with a one-cycle rate and label smoothing; images are shifted by up to an eighth.
    """
    if data.num_classes < 2:
        raise ValueError(
            "features=classifier needs a data set with classes; use features=inception for images"
            " without"
        )
    channels, side, _ = data.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(0, 0, 0, "classifier"))
        net = Classifier(channels, side, data.num_classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    length = len(data.sources["train"])
    batches = InfiniteSampler(length, min(batch_size, length), seed=0)
    reach = side // 8
    for step, batch in zip(range(steps), batches, strict=False):
        x, y = data.read("train", batch)
        down, right = torch.randint(
            -reach, reach + 1, (2,), generator=generator(0, step, 0, "shift")
        ).tolist()
        x = x.roll((down, right), (2, 3)).to(device)
        optimizer.zero_grad()
        cross_entropy(net(x), y.to(device), label_smoothing=0.1).backward()
        optimizer.step()
        rate.step()
    return net.eval()


def load_classifier(path: Path, data: DataModule, steps: int, device: str) -> Classifier:
    """The classifier kept in a file, or a newly trained one, which is kept there."""
    about: dict[str, Any] = {"steps": steps, "shape": list(data.shape), "data": type(data).__name__}
    about |= {"num_classes": data.num_classes, "images": len(data.sources["train"])}
    if path.is_file():
        try:
            kept = torch.load(path, map_location=device, weights_only=True)
        except (EOFError, RuntimeError, UnpicklingError):
            kept = None
        if not isinstance(kept, dict) or not {"about", "state"} <= kept.keys():
            raise ValueError(
                f"classifier: {path} holds no classifier of scripts/evaluate.py; give another file,"
                " or remove it"
            )
        if kept["about"] != about:
            raise ValueError(
                f"classifier: {path} was trained on {kept['about']}, not on {about}; give another"
                " file, or remove it"
            )
        net = Classifier(data.shape[0], data.shape[1], data.num_classes).to(device)
        net.load_state_dict(kept["state"])
        return net.eval()
    net = train_classifier(data, steps, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"about": about, "state": net.state_dict()}, path)
    return net
