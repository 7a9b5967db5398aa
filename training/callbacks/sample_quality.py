"""How good the final samples are, by a measure that takes seconds; ``scripts/evaluate.py`` takes
longer and says more.
"""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from training.callbacks.ema import averaged_net
from training.data.module import DataModule
from training.metrics.energy import energy_distance
from training.metrics.svm import SVM
from training.samplers.generate import balanced_labels, generate
from training.sharding import is_sharded
from training.validation import positive_integer

CLASSES = 100  # a support vector machine for more would take longer than it is worth


class SampleQuality(Callback):
    """At the end, judges n samples of the averaged network.

    Images with classes: ``sample_accuracy``, the share of class-conditional samples that an SVM
    trained on at most ``fit`` real images recognises, and ``real_accuracy`` of the same SVM over
    held-out real images, which is the ceiling to compare with. Points and other data that are no
    images: ``energy_distance`` to new data, and ``real_energy_distance`` of other new data, which
    is the floor. Nothing for latents, for more than 100 classes, or for images without classes.
    """

    def __init__(self, sampler: Any, n: int = 1000, fit: int = 5000) -> None:
        positive_integer("callbacks.sample_quality.n", n)
        positive_integer("callbacks.sample_quality.fit", fit)
        self.sampler, self.n, self.fit = sampler, n, fit
        self.result: dict[str, float] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sharded = is_sharded(pl_module.net)  # type: ignore[arg-type]
        if not (trainer.is_global_zero or sharded):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        y = balanced_labels(self.n, data.num_classes)
        # Another seed than the picture's: these are other samples.
        seed: int = pl_module.seed + 1  # type: ignore[assignment,operator]
        points = data.drawn and not data.images
        classes = data.images and 1 < data.num_classes <= CLASSES
        if not (points or classes):
            return
        with averaged_net(trainer, pl_module) as net:  # a sharded one asks all processes
            images = generate(net, self.sampler, y, data.shape, seed)
        if not trainer.is_global_zero:
            return
        if points:
            self.result = self._distance(data, images)
        else:
            svm = SVM(*data.examples("train", self.fit))
            self.result = {
                "sample_accuracy": svm.accuracy(images, y),
                "real_accuracy": svm.accuracy(*data.examples("val", self.n)),
            }
        for logger in trainer.loggers:
            logger.log_metrics(self.result, step=trainer.global_step)

    def _distance(self, data: DataModule, samples: Any) -> dict[str, float]:
        real = data.examples("val", self.n)[0]
        return {
            "energy_distance": energy_distance(samples, real),
            "real_energy_distance": energy_distance(data.examples("train", self.n)[0], real),
        }
