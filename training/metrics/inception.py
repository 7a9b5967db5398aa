"""FID and Inception Score as they are published, streamed: of 50 000 samples no image is kept.

FID (arXiv 1706.08500) is the Fréchet distance over the 2048 features of one network, with its
weights and its way of scaling images to 299 pixels, from at least ``PUBLISHED`` samples to all of a
reference set of real images. Anything less is told by another name. Reference statistics are a file
of ADM's or of pytorch-fid's kind (``mu``, ``sigma``), or are computed from the whole training set,
never from what an autoencoder makes of it.

Inception Score (arXiv 1606.03498): exp of the mean divergence of p(y | x) from p(y), the mean over
ten parts of the samples.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from training.data.infinite_sampler import Batch
from training.data.module import DataModule
from training.metrics.frechet import Gaussian, Moments, gaussian_distance

PUBLISHED = 50_000
CHUNK = 256
PARTS = 10  # of the Inception Score

# Images (n, 3, H, W) of bytes -> features (n, d) and logits of classes (n, c).
Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def inception_network(weights: str | None, device: str) -> Network:
    """torch-fidelity's Inception, whose weights are a local file: nothing is downloaded."""
    if weights is None or not Path(weights).is_file():
        raise FileNotFoundError(
            "inception: FID needs the file of the Inception weights that torch-fidelity uses"
            f" (pt_inception-2015-12-05-6726825d.pth); got {weights}"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        # Its own scaling is TensorFlow's, as in the published numbers.
        names = ["2048", "logits_unbiased"]
        net = NoTrainInceptionV3("inception-v3-compat", names, weights, antialias=False)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'features=inception needs torch-fidelity: pip install -e ".[fid]"'
        ) from error
    net = net.to(device)

    @torch.no_grad()
    def see(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, logits = net._torch_fidelity_forward(pixels.to(device))
        return features.cpu(), logits.cpu()

    return see


class InceptionScore:
    """Of a stream of ``n`` samples, in their order."""

    def __init__(self, n: int) -> None:
        self.n, self.seen = n, 0
        self.parts = min(PARTS, n)
        self.shares: torch.Tensor = torch.zeros(())  # Σ p of each part
        self.entropies = torch.zeros(self.parts, dtype=torch.float64)  # Σ p log p
        self.counts = torch.zeros(self.parts, dtype=torch.float64)

    def add(self, logits: torch.Tensor) -> None:
        """(m, c)"""
        log_p = logits.double().log_softmax(1)
        if not self.seen:
            self.shares = log_p.new_zeros(self.parts, log_p.shape[1])
        part = (self.seen + torch.arange(len(log_p))) * self.parts // self.n
        self.shares.index_add_(0, part, log_p.exp())
        self.entropies.index_add_(0, part, (log_p.exp() * log_p).sum(1))
        self.counts.index_add_(0, part, torch.ones(len(log_p), dtype=torch.float64))
        self.seen += len(log_p)

    def score(self) -> float:
        p = self.shares / self.counts[:, None]
        marginal = torch.special.xlogy(p, p).sum(1)
        return float((self.entropies / self.counts - marginal).exp().mean())


class Inception:
    """FID and Inception Score of samples against real images.

    Args:
        net: see ``inception_network``.
        reference: ``.npz`` file of ``mu`` and ``sigma``; None is the data set itself.
        kept: where the statistics of the data set are kept, and found again.
    """

    def __init__(self, data: DataModule, net: Network, reference: Path | None, kept: Path) -> None:
        self.net, self.data = net, data
        if reference is None and (not data.images or data.drawn):
            raise ValueError(
                "reference must name an .npz file of mu and sigma (ADM's, pytorch-fid's) for a data"
                " set that holds no real images, such as latents; got null"
            )
        if reference is None and not kept.is_file():
            keep(kept, self._moments(_whole(data)))
        self.real = load_reference(reference or kept)

    def _moments(self, images: Iterable[torch.Tensor]) -> Gaussian:
        moments = Moments()
        for part in images:
            moments.add(self.net(pixels_of(part))[0])
        return moments.gaussian()

    def scores(self, parts: Iterable[tuple[torch.Tensor, torch.Tensor]], n: int) -> dict:
        """Of n samples, ``parts`` of images and labels."""
        moments, score = Moments(), InceptionScore(n)
        for images, _ in parts:
            features, logits = self.net(pixels_of(self.data.decode(images)))
            moments.add(features)
            score.add(logits)
        name = "fid" if n >= PUBLISHED else "inception_distance"
        distance = gaussian_distance(moments.gaussian(), self.real)
        return {name: distance, "inception_score": score.score()}


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Images (n, C, H, W) in [-1, 1] -> bytes (n, 3, H, W), as they would be written to files."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)  # grey images too


def _whole(data: DataModule) -> Iterator[torch.Tensor]:
    """All training images, once each and never mirrored."""
    numbers = torch.arange(len(data.sources["train"]))
    for i, part in enumerate(numbers.split(CHUNK)):
        yield data.read("train", Batch(i, part.tolist()))[0]


def keep(path: Path, gaussian: Gaussian) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy())


def load_reference(path: Path) -> Gaussian:
    """``mu`` (d,) and ``sigma`` (d, d) of an ``.npz`` file, as ADM and pytorch-fid write them."""
    if not path.is_file():
        raise FileNotFoundError(f"reference: there is no file {path}; give an existing one")
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"reference: {path} is no .npz file of mu and sigma ({error})") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"reference: mu must be (d,) and sigma (d, d); in {path} they are {tuple(mean.shape)}"
            f" and {tuple(covariance.shape)}"
        )
    return Gaussian(mean, covariance)
