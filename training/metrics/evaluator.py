"""What samples are compared with, and by which network's features."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from training.data.module import DataModule
from training.metrics.classifier import load_classifier
from training.metrics.energy import energy_distance
from training.metrics.frechet import frechet_distance
from training.metrics.inception import Inception, inception_network
from training.metrics.neighbours import precision_recall

CHUNK = 256
Parts = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Evaluator(Protocol):
    """Scores of n samples, which come in parts: images (m, C, H, W), and the classes (m,) that they
    were asked to be of.
    """

    def scores(self, parts: Parts, n: int) -> dict[str, float]: ...


def joined(parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


class Distance:
    """Energy distance to the training distribution, for data of few dimensions."""

    def __init__(self, data: DataModule, n: int) -> None:
        self.real = data.examples("train", n)[0]

    def scores(self, parts: Parts, n: int) -> dict[str, float]:
        x, _ = joined(parts)
        return {"energy_distance": energy_distance(x, self.real)}


class Features:
    """Fréchet distance, precision and recall to training examples (or those of another ``split``)
    over a classifier's features, and the share of samples that it recognises as their class.
    """

    def __init__(
        self,
        data: DataModule,
        n: int | None,
        k: int,
        path: Path,
        steps: int,
        device: str,
        split: str = "train",
    ) -> None:
        self.net, self.k, self.device = load_classifier(path, data, steps, device), k, device
        self.real = self._see(data.examples(split, n)[0])[0]

    @torch.no_grad()
    def _see(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) and recognised classes (n,)."""
        features = torch.cat(
            [self.net.features(part.to(self.device)) for part in x.clamp(-1, 1).split(CHUNK)]
        )
        return features.cpu(), self.net.head(features).argmax(1).cpu()

    def distance(self, x: torch.Tensor) -> float:
        """The Fréchet distance alone, which takes a fraction of the time of all scores."""
        return frechet_distance(self._see(x)[0], self.real)

    def scores(self, parts: Parts, n: int) -> dict[str, float]:
        """What so few images say: a covariance needs more of them than features, a neighbour more
        than ``k``.
        """
        x, y = joined(parts)
        features, classes = self._see(x)
        least, found = min(len(features), len(self.real)), {}
        if least > features.shape[1]:
            found["frechet_distance"] = frechet_distance(features, self.real)
        if least > self.k:
            precision, recall = precision_recall(self.real, features, self.k)
            found |= {"precision": precision, "recall": recall}
        return found | {"accuracy": float((classes == y).double().mean())}


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
    reference: Path | None = None


def build_evaluator(data: DataModule, options: Options) -> Evaluator:
    """The one that suits the data set: energy distance for points, features for images."""
    if data.drawn and not data.images:
        return Distance(data, options.n)
    if options.features == "inception":
        net = inception_network(options.inception, options.device)
        kept = options.classifier.with_name("inception_statistics.npz")
        return Inception(data, net, options.reference, kept)
    return Features(
        data,
        options.n,
        options.k,
        options.classifier,
        options.classifier_steps,
        options.device,
    )
