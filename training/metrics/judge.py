"""What samples are compared with, and by which network's features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from training.data.module import Data
from training.metrics.classifier import load_classifier
from training.metrics.energy import energy_distance
from training.metrics.frechet import frechet_distance
from training.metrics.neighbours import precision_recall

CHUNK = 256


class Judge(Protocol):
    """Scores of samples x (n, C, H, W) that were asked to be of the classes y (n,)."""

    def scores(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]: ...


class Distance:
    """Energy distance to the training distribution, for data of few dimensions."""

    def __init__(self, data: Data, n: int) -> None:
        self.real = data.examples("train", n)[0]

    def scores(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        return {"energy_distance": energy_distance(x, self.real)}


class Features:
    """Fréchet distance, precision and recall to training examples over a classifier's features, and
    the share of samples that it recognises as their class.
    """

    def __init__(self, data: Data, n: int, k: int, path: Path, steps: int, device: str) -> None:
        self.net, self.k, self.device = load_classifier(path, data, steps, device), k, device
        self.real = self._see(data.examples("train", n)[0])[0]

    @torch.no_grad()
    def _see(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) and recognised classes (n,)."""
        features = torch.cat(
            [self.net.features(part.to(self.device)) for part in x.clamp(-1, 1).split(CHUNK)]
        )
        return features.cpu(), self.net.head(features).argmax(1).cpu()

    def scores(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        features, classes = self._see(x)
        precision, recall = precision_recall(self.real, features, self.k)
        return {
            "frechet_distance": frechet_distance(features, self.real),
            "precision": precision,
            "recall": recall,
            "accuracy": float((classes == y).double().mean()),
        }


class Inception:
    """FID, precision and recall over the 2048 features of the Inception network, whose weights are
    a local file: nothing is downloaded.
    """

    def __init__(self, data: Data, n: int, k: int, weights: str | None, device: str) -> None:
        if weights is None or not Path(weights).is_file():
            raise FileNotFoundError(
                "inception: FID needs the file of the Inception weights that torch-fidelity uses"
                f" (pt_inception-2015-12-05-6726825d.pth); got {weights}"
            )
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            net = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'features=inception needs torch-fidelity: pip install -e ".[fid]"'
            ) from error
        self.net, self.data, self.k, self.device = net.to(device), data, k, device
        self.real = self._see(data.examples("train", n)[0])

    @torch.no_grad()
    def _see(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in x.split(CHUNK):
            pixels = ((self.data.decode(part).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            colour = pixels.expand(-1, 3, -1, -1)  # grey images too
            parts.append(self.net(colour.to(self.device)).flatten(1).cpu())
        return torch.cat(parts)

    def scores(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        features = self._see(x)
        precision, recall = precision_recall(self.real, features, self.k)
        fid = frechet_distance(features, self.real)
        return {"fid": fid, "precision": precision, "recall": recall}


@dataclass(frozen=True)
class Options:
    """Of ``evaluate``: see configs/evaluate.yaml."""

    features: str
    n: int
    k: int
    classifier: Path
    classifier_steps: int
    inception: str | None
    device: str


def judge_of(data: Data, options: Options) -> Judge:
    """The one that suits the data set: energy distance for points, features for images."""
    if data.drawn and not data.images:
        return Distance(data, options.n)
    if options.features == "inception":
        return Inception(data, options.n, options.k, options.inception, options.device)
    return Features(
        data,
        options.n,
        options.k,
        options.classifier,
        options.classifier_steps,
        options.device,
    )
